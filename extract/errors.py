"""The errors that commands report without a traceback."""


class InputError(ValueError):
    """Wrong usage or input (exit status 2). The message names the wrong value and the remedy."""


class RunError(RuntimeError):
    """A failure at run time (exit status 1), such as damage, a locked store or a full disk."""
