"""The errors that a user of this package can meet: wrong input, and failures at run time."""


class InputError(ValueError):
    """Wrong usage or input (exit status 2): the message says what was wrong, with the value, and
    what to do."""


class RunError(RuntimeError):
    """Something failed at run time, such as damage, a locked store, a full disk (exit status 1)."""
