"""What every command needs besides its arguments: how its process begins, errors in a line."""

import io
import sys
from types import TracebackType

from absl import flags
from ml_collections import ConfigDict

from jrm_jax.errors import UserError
from jrm_jax.run.workdir import default_name
from jrm_jax.shell import disk, memory, user_cache

REPORTED = (
    UserError, flags.Error, AttributeError, KeyError, TypeError, OSError, RuntimeError, MemoryError,
)  # fmt: skip


def keep_memory() -> None:
    """Let glibc keep freed memory (`memory.keep_freed`); for programs, early.

    XLA on the CPU asks for its buffers anew at every step; the faults of their pages are a quarter
    of a step's time. The lock of the one arena is what many threads then wait for: nothing is done
    for an accelerator, whose buffers are elsewhere and whose compiler has a thread per core (a
    first step of 251 s instead of 30 on an H200 with 16).
    """
    if not user_cache.may_use_an_accelerator():
        memory.keep_freed()


def free_quietly() -> None:
    """Python's tracker of shared memory frees what a killed process has left, without saying so;
    for programs, before they start their first process."""
    sys.warnoptions.append("ignore:resource_tracker")


def _end_quietly(kind: type[BaseException], error: BaseException, trace: TracebackType | None):
    """Ctrl-C while a command still imports, where nobody listens yet (`stop.StopRequest`)."""
    if issubclass(kind, KeyboardInterrupt):
        print("stopped", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, trace)


def prepare() -> None:
    """For a process that is one of the commands, before it imports jax or transformers."""
    sys.excepthook = _end_quietly
    keep_memory()
    free_quietly()
    user_cache.keep_programs()
    from jrm_jax.data import template  # NumPy's threads start with it

    template.hide_torch = True
    if isinstance(sys.stdout, io.TextIOWrapper):  # names of files may hold what is no text
        sys.stdout.reconfigure(errors="backslashreplace")


def run_name(config: ConfigDict) -> str:
    """'joint-qwen3_vl_8b-edits', see `workdir.default_name`.

    Raises:
        UserError: the config file is not there, which shows when it is first read; or a field is
            missing or not allowed, before anything uses it.
    """
    from jrm_jax.run.check_config import check_config  # it loads JAX

    try:
        check_config(config)
        return default_name(config)
    except OSError as error:
        raise UserError(f"--config: {in_one_line(error)}") from error


def is_expected(error: BaseException) -> bool:
    """Whether it is bad input, a disk that refuses or a lack of memory: none of the program's."""
    return isinstance(error, flags.Error) or disk.expected_words(error) is not None


def in_one_line(error: BaseException) -> str:
    """What a command says of the error that ended it (`errors.one_line` is for parts of a message):
    of the flag libraries, which print reprs, tracebacks and lists of tries, the end."""
    text = str(error)
    if not isinstance(error, UserError) and (told := disk.expected_words(error)) is not None:
        text = told
    elif isinstance(error, KeyError | AttributeError):
        while isinstance(error, BaseException) and error.args:
            error = error.args[0]
        text = f"--config has no such field: {error}"
    elif "\nTraceback (" in text or isinstance(error, OSError):
        text = text.strip().splitlines()[-1].removeprefix("jrm_jax.errors.UserError: ")
    return " ".join(text.split())
