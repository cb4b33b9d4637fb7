"""Entry point: `python -m jrm_jax.main --config=configs/joint.py [--workdir=DIR]`."""

import os
import sys
from pathlib import Path

from absl import flags
from ml_collections import config_flags

from jrm_jax.errors import UserError

_CONFIG = config_flags.DEFINE_config_file("config", None, "File[:arguments].", lock_config=True)
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run; default runs/CONFIG-VARIANT.")
_DISTRIBUTED = flags.DEFINE_enum(
    "distributed", "auto", ["auto", "on", "off"], "Several processes; auto: on Cloud TPU pods."
)


def _is_pod() -> bool:
    hosts = os.environ.get("TPU_WORKER_HOSTNAMES") or os.environ.get("TPU_PROCESS_ADDRESSES") or ""
    return "," in hosts or "MEGASCALE_COORDINATOR_ADDRESS" in os.environ


def _main(argv: list[str]) -> int:
    if len(argv) > 1:
        raise UserError(f"unexpected argument {argv[1]!r}")
    if _CONFIG.value is None:
        raise UserError("--config is missing: --config=configs/joint.py")
    import jax

    if _DISTRIBUTED.value == "on" or (_DISTRIBUTED.value == "auto" and _is_pod()):
        jax.distributed.initialize()
    from jrm_jax import train

    config = _CONFIG.value
    name = "-".join(filter(None, (config.name, config.variant)))
    return train.run(config, Path(_WORKDIR.value or f"runs/{name}"))


def main() -> None:
    """Bad input is one line and status 1, whether the flags or the run find it."""
    try:
        # flags that name no field, and configs that refuse their argument, fail in the parser
        status = _main(flags.FLAGS(sys.argv))
    except (UserError, flags.Error, AttributeError, KeyError, TypeError, OSError) as error:
        if not isinstance(error, UserError | flags.Error) and flags.FLAGS.is_parsed():
            raise
        sys.exit(f"error: {' '.join(str(error).split())}")
    sys.exit(status)


if __name__ == "__main__":
    main()
