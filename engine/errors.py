"""The one kind of exception that is written for the person at the command line."""


class UserError(ValueError):
    """A mistake that a user can correct. The message is one line: what was expected, what was
    found instead, and what to do. Command lines print it without a traceback."""
