"""Exceptions that are meant for the user."""


class UserError(ValueError):
    """Bad input. The message is one line that says what is wrong and what to do.

    `jrm_jax.main` prints it without a traceback and exits with status 1.
    """


def one_line(error: BaseException) -> str:
    """What an exception of a library says, short and without line breaks."""
    return (" ".join(str(error).split()) or type(error).__name__)[:300]


class RecordError(UserError):
    """One record of the user's data. `kind` says what is wrong without saying where: records that
    are left out are counted by it."""

    def __init__(self, message: str, kind: str):
        super().__init__(message)
        self.kind = kind

    def __reduce__(self):
        return RecordError, (str(self), self.kind)
