"""The errors that commands report without a traceback."""

import re


class InputError(ValueError):
    """Wrong usage or input (exit status 2). The message names the wrong value and the remedy."""


class RunError(RuntimeError):
    """A failure at run time (exit status 1), such as damage, a locked store or a full disk."""


def describe_error(error: BaseException) -> str:
    """The type and the first sentence of a library's error, whose message may be a paragraph."""
    name, sentence = type(error).__name__, first_sentence(error)
    return f"{name}: {sentence}" if sentence else name


def first_sentence(error: BaseException) -> str:
    """The first sentence of an error's message, without the period."""
    return re.split(r"[.]?\s*\n|[.] |[.]$", str(error).strip())[0]
