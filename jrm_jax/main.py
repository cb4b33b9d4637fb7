"""Entry point: `python -m jrm_jax.main --config=configs/joint.py [--workdir=DIR]`."""

import os
import sys
from pathlib import Path

from absl import flags
from ml_collections import config_flags

from jrm_jax import cli
from jrm_jax.errors import UserError
from jrm_jax.shell import config_cli
from jrm_jax.shell.stop import leave

_CONFIG = config_flags.DEFINE_config_file("config", None, "File[:arguments].", lock_config=True)
_WORKDIR = flags.DEFINE_string(
    "workdir", None, "Folder of the run; default runs/CONFIG-VARIANT-DATA."
)
_DISTRIBUTED = flags.DEFINE_enum(
    "distributed",
    "auto",
    ["auto", "on", "off"],
    "Several processes; auto: on Cloud TPU pods, and where JAX_COORDINATOR_ADDRESS is set.",
)


def _main() -> int:
    config_cli.parse(sys.argv, __doc__)
    if _CONFIG.value is None:
        raise UserError("--config is missing: --config=configs/joint.py")
    # a run has its GPUs to itself: JAX would leave a quarter of their memory alone
    if "XLA_CLIENT_MEM_FRACTION" not in os.environ:  # JAX takes one of the two names only
        os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.93")
    cli.prepare()
    from jrm_jax import distributed, train
    from jrm_jax.run import programs

    config = _CONFIG.value
    name = cli.run_name(config)
    distributed.start(_DISTRIBUTED.value)
    status = train.run(config, Path(_WORKDIR.value or f"runs/{name}"))
    if programs.are_left():
        leave(status)
    return status


def main() -> None:
    """Bad input is one line and status 1, whether the flags or the run find it."""
    try:
        status = _main()
    except cli.REPORTED as error:
        if not cli.is_expected(error) and flags.FLAGS.is_parsed():
            raise
        from jrm_jax import distributed
        from jrm_jax.data.workers import WorkerDied

        distributed.fail(f"error: {cli.in_one_line(error)}", isinstance(error, WorkerDied))
    sys.exit(status)


if __name__ == "__main__":
    main()
