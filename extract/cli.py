"""Command-line entry point: parse options, run a command, map errors to exit codes.

A command is a frozen dataclass of options and a function `main(options)` that returns an exit
status or None. `run_command` makes flags of the options (tyro) and runs `main`.

Exit status: 0 done, 1 an error at run time, 2 wrong usage or input, 3 finished but too many videos
failed, 130 interrupted.
"""

import difflib
import errno
import inspect
import os
import sys
import textwrap
import threading
from collections.abc import Callable, Collection, Iterable, Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import fields, is_dataclass, make_dataclass
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

from extract import InputError, RunError, StrPath
from extract.errors import describe_error

if TYPE_CHECKING:
    from tqdm import tqdm

Options = TypeVar("Options")


_REMEDIES = {
    errno.ENOSPC: "make room on its disk",
    errno.EDQUOT: "make room, or have your quota raised",
    errno.EFBIG: "raise the limit on the size of files (ulimit -f)",
    errno.EROFS: "make its disk writable, or give another path",
    errno.EACCES: "get permission, or give another path",
    errno.EPERM: "get permission, or give another path",
    errno.EEXIST: "a folder is needed there: move the file, or give another path",
    errno.ENOTDIR: "a folder is needed there: move the file, or give another path",
    errno.EIO: "its disk fails: choose another one",
}
_CLOSED_OUTPUT = (
    "the program that reads this command's output has ended (head does, for example); run the same "
    "command again without it to continue"
)


def describe_os_error(error: OSError, path: StrPath | None = None) -> str:
    """The error with a remedy: `runs/a/last.pt: No space left on device; make room on its disk and
    run the same command again to continue`.

    `path` is named instead of the error's own file.
    """
    code, name = error.errno or 0, path or error.filename
    if code not in _REMEDIES or name is None:
        return str(error) if path is None else f"{os.fspath(path)}: {error.strerror or error}"
    text = os.strerror(code)  # HDF5's own is a paragraph
    remedy = f"{_REMEDIES[code]} and run the same command again to continue"
    return f"{os.fspath(name)}: {text}; {remedy}"


# Ranges of numbers, for every command that has an option of that name.
AT_LEAST_0 = ("seed", "seeds", "augment_passes", "weight_decay", "backbone_lr", "warmup")
AT_LEAST_1 = (
    "frames",
    "clip_frames",
    "frames_per_segment",
    "image_size",
    "segments",
    "block_size",
    "batch_size",
    "micro_batch",
    "workers",
    "threads",
    "decode_workers",
    "limit",
    "epochs",
    "at_once",
    "shots",
    "repeats",
    "k",
)
MORE_THAN_0 = ("lr", "video_timeout", "window", "stride", "fps", "clip_fps", "frame_rate")
FRACTIONS = ("max_failed", "dropout", "label_smoothing", "val_fraction", "false_alarms")
# Larger numbers are mistakes that would fill the memory, or start for minutes.
AT_MOST = {
    "frames": 10_000,
    "segments": 10_000,
    "clip_frames": 1024,
    "image_size": 2048,
    "augment_passes": 1000,
    "block_size": 65_536,
    "workers": 10_000,
}
MAX_SEED = 2**63 - 1  # for numpy, PyTorch and OpenVINO alike


def check_ranges(options: Any) -> None:
    """InputError that names the first option with a number out of its range."""
    for name, option in vars(options).items():
        for value in option if isinstance(option, tuple | list) else (option,):
            if isinstance(value, bool) or not isinstance(value, int | float):
                continue
            expected = ""
            if name in AT_LEAST_0 and not value >= 0:
                expected = "at least 0"
            elif name in AT_LEAST_1 and not value >= 1:
                expected = "at least 1"
            elif name in (*AT_LEAST_0, *AT_LEAST_1) and value > AT_MOST.get(name, MAX_SEED):
                expected = f"at most {AT_MOST.get(name, MAX_SEED)}"
            elif name in MORE_THAN_0 and not 0 < value < float("inf"):
                expected = "more than 0"
            elif name in FRACTIONS and not 0 <= value <= 1:
                expected = "a fraction between 0 and 1"
            if expected:
                raise InputError(f"--{name.replace('_', '-')} {value}: expected {expected}")


# Control characters other than tab and newline, and characters that change the direction of text.
_CONTROLS = [
    *range(9),
    *range(11, 32),
    *range(127, 160),
    *range(0x202A, 0x202F),
    *range(0x2066, 0x206A),
]
_ESCAPES = {code: f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}" for code in _CONTROLS}


class EscapedStream:
    """A terminal's stream that prints control characters (of file names) in escaped form."""

    def __init__(self, stream: Any):
        self.unescaped = stream

    def write(self, text: str) -> int:
        return self.unescaped.write(text.translate(_ESCAPES))

    def __getattr__(self, name: str) -> Any:
        return getattr(self.unescaped, name)


def first_few(names: Collection[object], count: int = 3) -> str:
    """The first names, for a message: `a, b, c, ...`."""
    return ", ".join(map(str, list(names)[:count])) + (", ..." if len(names) > count else "")


def counted(names: Collection[object], description: str = "") -> str:
    """The number of names and the first of them, for a message: `12 new (a, b, c, ...)`."""
    text = f"{len(names):,} {description}".rstrip()
    return f"{text} ({first_few(names)})" if names else text


def text_table(rows: Sequence[Sequence[str]]) -> str:
    """Rows of text as a table: the first column is aligned left, the others right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows
    )


LOG_SECONDS = 30.0  # between two progress lines in a log
# tqdm's own lock is a semaphore of the system, which a process that is killed leaves behind.
_BAR_LOCK = threading.RLock()


def progress(iterable: Iterable[Any] | None = None, **options: Any) -> "tqdm[Any]":
    """A tqdm bar on stderr, shown for work that takes longer than a second.

    If stderr is not a terminal but a log, a line every LOG_SECONDS instead.
    """
    from tqdm import tqdm

    tqdm.set_lock(_BAR_LOCK)

    class LogLines(tqdm):
        # No monitor thread: each call makes a new class, and each class would start one.
        monitor_interval = 0

        @staticmethod
        def status_printer(file: Any) -> Callable[[str], None]:
            return lambda line: print(line, file=file, flush=True) if line.strip() else None

    screen = getattr(sys.stderr, "unescaped", sys.stderr)  # a bar moves the cursor
    options |= {"file": screen, "smoothing": 0.05, "delay": 1}
    if screen.isatty():
        return tqdm(iterable, mininterval=0.1, **options)
    options |= {"leave": True, "mininterval": LOG_SECONDS, "maxinterval": LOG_SECONDS}
    return LogLines(iterable, miniters=1, **options)


def run_command(
    main: Callable[[Options], int | None],
    options: type[Options],
    *,
    prog: str,
    args: Sequence[str] | None = None,
) -> int:
    """Parse `args` (default: the command line) into `options`, run `main`, return the exit status.

    If the class has a method `defaults_for(args)`, its result holds the defaults.

    `InputError` -> 2; `RunError`, `MemoryError` and `OSError` -> 1 (their message on stderr, no
    traceback); Ctrl-C -> 130. Any other error is a defect of this package and keeps its traceback.
    """
    import tyro  # here, so that importing a command as a library stays fast

    args = sys.argv[1:] if args is None else args
    try:
        if sys.platform == "win32":
            raise InputError(
                "Windows is not supported; run this in WSL 2 (Windows Subsystem for Linux)"
            )
        config = tyro.conf.FlagCreatePairsOff, tyro.conf.DisallowNone
        if {"-h", "--help"} & set(args):
            tyro.cli(
                _in_groups(options),
                prog=prog,
                args=["--help"],
                config=config,
                description=_wrapped(options.__doc__ or ""),
            )
        _check_flags(options, args, prog)
        defaults_for: Any = getattr(options, "defaults_for", None)
        defaults = {"default": defaults_for(args)} if defaults_for else {}
        chosen = tyro.cli(options, prog=prog, args=args, config=config, **defaults)
        check_ranges(chosen)
        with redirect_stdout(EscapedStream(sys.stdout)), redirect_stderr(EscapedStream(sys.stderr)):
            return main(chosen) or 0
    except (InputError, RunError, MemoryError, OSError) as error:
        print(f"error: {_describe(error)}", file=EscapedStream(sys.stderr))
        return 2 if isinstance(error, InputError) else 1
    except KeyboardInterrupt:
        print("interrupted; run the same command again to continue", file=sys.stderr)
        return 130


def _describe(error: Exception) -> str:
    if isinstance(error, BrokenPipeError):
        return _CLOSED_OUTPUT
    if isinstance(error, MemoryError):
        return f"the memory is full; ask for less at a time ({describe_error(error)})"
    return describe_os_error(error) if isinstance(error, OSError) else str(error)


def run_as_script() -> None:
    """Run the module of `python -m` as a command, by its `Options` and `main`, and exit."""
    module: Any = sys.modules["__main__"]
    name = getattr(module.__spec__, "name", sys.argv[0]).removesuffix(".__main__")
    sys.exit(run_command(module.main, module.Options, prog=f"python -m {name}"))


def _in_groups(options: type) -> type:
    """The options for --help: a command's own, then a group for each class that it inherits."""
    import tyro

    left = dict(options.__dataclass_fields__)  # type: ignore[attr-defined]
    groups: list[Any] = []
    for parent in filter(is_dataclass, options.__mro__):
        own = {name: left.pop(name) for name in inspect.get_annotations(parent) if name in left}
        if own:
            title = parent.__name__.removesuffix("Options").lower() if groups else "main"
            doc = None if parent.__doc__ == options.__doc__ else inspect.getdoc(parent)
            body = {
                "__doc__": doc,
                "__dataclass_fields__": own,
                "__annotations__": _help_types(parent, own),
            }
            group: Any = type(parent.__name__, (options,), body)
            groups.append((title, tyro.conf.OmitArgPrefixes[group]))  # type: ignore[misc]
    return make_dataclass("Groups", groups, kw_only=True)


def _wrapped(doc: str) -> str:
    """Paragraphs in lines of a terminal; tyro would join those that do not start with a space."""
    paragraphs = [
        textwrap.fill(" ".join(text.split()), 79, initial_indent=" ", subsequent_indent=" ")
        for text in inspect.cleandoc(doc).split("\n\n")
    ]
    return "\n\n".join(paragraphs)


def _help_types(options: type, own: dict[str, Any]) -> dict[str, Any]:
    """Types with the text of --help: tyro breaks lines where the source does, and shows None."""
    import docstring_parser
    import tyro

    described = docstring_parser.parse_from_object(options).params
    texts = {param.arg_name: " ".join((param.description or "").split()) for param in described}

    def show_default(label: str) -> str:
        return f"(default: {label})" if label not in ("None", "", "''") else ""

    return {
        name: Annotated[
            field.type,
            tyro.conf.arg(help=texts.get(name), help_behavior_hint=show_default),
        ]
        for name, field in own.items()
    }


def _check_flags(options: type, args: Sequence[str], prog: str) -> None:
    """InputError for an option that does not exist, with the most similar one."""
    flags = [f"--{field.name.replace('_', '-')}" for field in fields(options)]
    for arg in args:
        flag = arg.split("=")[0].replace("_", "-")
        if flag.startswith("--") and flag not in (*flags, "--help"):
            nearest = difflib.get_close_matches(flag, flags, n=1)
            hint = (
                f"did you mean {nearest[0]}?" if nearest else f"`{prog} --help` lists the options"
            )
            raise InputError(f"{prog} has no option {flag}; {hint}")
