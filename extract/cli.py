"""The door of every command: options in, exit status out.

A command is a frozen dataclass of options and a function `main(options) -> exit status or None` beside it;
`run_command` makes the flags from the one (tyro) and the exit status from the other.

Exit status: 0 done, 1 an error at run time, 2 wrong usage or input, 3 finished but too many videos failed,
130 interrupted.
"""

import sys
from collections.abc import Callable, Sequence
from typing import TypeVar

Options = TypeVar("Options")


class InputError(ValueError):
    """Wrong usage or input (exit status 2): the message says what was wrong, with the value, and what to do."""


class RunError(RuntimeError):
    """Something failed at run time, such as damage, a locked store, a full disk (exit status 1)."""


def run_command(
    main: Callable[[Options], int | None], options: type[Options], *, prog: str, args: Sequence[str] | None = None
) -> int:
    """Parse `args` (default: the command line) into `options`, run `main`, return the exit status.

    `InputError` -> 2, `RunError` and `OSError` -> 1 (their message on stderr, no traceback), Ctrl-C -> 130.
    Anything else is a defect of ours and keeps its traceback.
    """
    import tyro  # here, so that importing a command as a library stays cheap

    chosen = tyro.cli(options, prog=prog, args=args, config=(tyro.conf.FlagCreatePairsOff,))
    try:
        return main(chosen) or 0
    except (InputError, RunError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, InputError) else 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
