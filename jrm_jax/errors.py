"""The one exception that is meant for the user."""


class UserError(ValueError):
    """Bad input. The message is one line that says what is wrong and what to do.

    `jrm_jax.main` prints it without a traceback and exits with status 1.
    """
