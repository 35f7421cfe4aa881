"""The error that a user can mend."""


class UserError(ValueError):
    """Wrong input, not a bug: one line that says what was expected, what came, and what to do.

    The command lines print it without a traceback and exit with code 1."""
