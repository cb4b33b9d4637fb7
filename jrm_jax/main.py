"""Entry point: `python -m jrm_jax.main --config=configs/joint.py [--workdir=DIR]`."""

import ctypes
import errno
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
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # the disk's fault, wherever it shows


def _is_pod() -> bool:
    hosts = os.environ.get("TPU_WORKER_HOSTNAMES") or os.environ.get("TPU_PROCESS_ADDRESSES") or ""
    return "," in hosts or "MEGASCALE_COORDINATOR_ADDRESS" in os.environ


def _keep_memory() -> None:
    """Let glibc keep freed memory. XLA on the CPU asks for its buffers anew at every step; given
    back to the system in between, each page costs a fault: a quarter of a step's time."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):  # not glibc
        return
    for option, value in ((-4, 0), (-1, 2**31 - 1), (-2, 2**26)):  # MMAP_MAX, TRIM_, TOP_PAD
        mallopt(option, value)


def _main(argv: list[str]) -> int:
    if len(argv) > 1:
        raise UserError(f"unexpected argument {argv[1]!r}")
    if _CONFIG.value is None:
        raise UserError("--config is missing: --config=configs/joint.py")
    _keep_memory()
    import jax

    if _DISTRIBUTED.value == "on" or (_DISTRIBUTED.value == "auto" and _is_pod()):
        jax.distributed.initialize()
    from jrm_jax import train

    config = _CONFIG.value
    try:
        name = "-".join(filter(None, (config.name, config.variant)))
    except OSError as error:  # a config file that is not there fails when it is first read
        raise UserError(f"--config: {_one_line(error)}") from error
    return train.run(config, Path(_WORKDIR.value or f"runs/{name}"))


def main() -> None:
    """Bad input is one line and status 1, whether the flags or the run find it."""
    try:
        # flags that name no field, and configs that refuse their argument, fail in the parser
        status = _main(flags.FLAGS(sys.argv))
    except (UserError, flags.Error, AttributeError, KeyError, TypeError, OSError) as error:
        expected = isinstance(error, UserError | flags.Error) or (
            isinstance(error, OSError) and error.errno in _FULL
        )
        if not expected and flags.FLAGS.is_parsed():
            raise
        sys.exit(f"error: {_one_line(error)}")
    sys.exit(status)


def _one_line(error: BaseException) -> str:
    """The end of what the flag libraries say: they print reprs, tracebacks and lists of tries."""
    text = str(error)
    if isinstance(error, KeyError | AttributeError):
        while isinstance(error, BaseException) and error.args:
            error = error.args[0]
        text = f"--config has no such field: {error}"
    elif "\nTraceback (" in text or isinstance(error, OSError):
        text = text.strip().splitlines()[-1].removeprefix("jrm_jax.errors.UserError: ")
    return " ".join(text.split())


if __name__ == "__main__":
    main()
