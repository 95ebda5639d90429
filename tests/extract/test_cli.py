"""Behavior that all commands share: ranges of numbers, and file names with control characters."""

import contextlib
import importlib
import io
import os
import sys
import threading
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from extract import InputError
from extract.cli import check_ranges, progress, run_command

EVIL = "\x1b]0;owned\x07\x1b[31m\x9b2Jred\u202egpj.mp4"
SHOWN = r"\x1b]0;owned\x07\x1b[31m\x9b2Jred\u202egpj.mp4"


def run(module: str, *args: str) -> int:
    """Run a command as `python -m` does, but in this process."""
    package = Path(__file__).parents[2] / module.replace(".", "/")
    command = importlib.import_module(f"{module}.__main__" if package.is_dir() else module)
    return run_command(command.main, command.Options, prog=module, args=args)


@dataclass(frozen=True)
class Numbers:
    """Options with names that commands use."""

    seed: int = 0
    seeds: tuple[int, ...] = (0,)
    frames: int = 1
    epochs: int | None = None
    lr: float = 0.1
    max_failed: float = 0.05
    flag: bool = False
    others: list = field(default_factory=list)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": -1}, r"--seed -1: expected at least 0"),
        ({"seed": 2**64}, r"--seed 18446744073709551616: expected at most 9223372036854775807"),
        ({"seeds": (0, -3)}, r"--seeds -3: expected at least 0"),
        ({"frames": 0}, r"--frames 0: expected at least 1"),
        ({"epochs": 0}, r"--epochs 0: expected at least 1"),
        ({"lr": 0.0}, r"--lr 0.0: expected more than 0"),
        ({"lr": float("nan")}, r"--lr nan: expected more than 0"),
        ({"frames": 10_001}, r"--frames 10001: expected at most 10000"),
        ({"lr": float("inf")}, r"--lr inf: expected more than 0"),
        ({"max_failed": 1.5}, r"--max-failed 1.5: expected a fraction between 0 and 1"),
    ],
)
def test_numbers_out_of_range_are_refused_by_name(changes, message):
    check_ranges(Numbers())
    with pytest.raises(InputError, match=message):
        check_ranges(Numbers(**changes))


@pytest.mark.parametrize(
    "command",
    [
        ["extract", "--videos", "v", "--out", "o", "--seed", "-1"],
        ["aggregate.train", "--agg", "tsn", "--features", "f", "--seed", "-1"],
        ["aggregate.crossval", "--agg", "tsn", "--features", "f", "--seeds", "-1"],
        ["aggregate.ablate", "--agg", "tsn", "--features", "f", "--seeds", "0", "-1", "--out", "o"],
        ["aggregate.finetune", "--model", "tsn", "--videos", "v", "--seed", "-1"],
        ["ensemble", "--scores", "a.h5", "b.h5", "--out", "o", "--seed", "-1"],
    ],
    ids=lambda command: command[0],
)
def test_every_command_refuses_a_negative_seed(command, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert run(*command) == 2
    assert "-1: expected at least 0" in capsys.readouterr().err


@dataclass(frozen=True)
class Nothing:
    """No options."""


def test_control_characters_are_shown_and_not_obeyed(capsys):
    def main(_: Nothing) -> int:
        print(f"{EVIL} of\ttwo\nlines")
        print(EVIL, file=sys.stderr)
        raise InputError(f"{EVIL} is damaged")

    assert run_command(main, Nothing, prog="p", args=[]) == 2
    printed = capsys.readouterr()
    assert printed.out == f"{SHOWN} of\ttwo\nlines\n"
    assert printed.err == f"{SHOWN}\nerror: {SHOWN} is damaged\n"


def test_output_that_nobody_reads_any_more_is_said(monkeypatch, capsys):
    reader, writer = os.pipe()
    os.close(reader)
    with contextlib.suppress(BrokenPipeError), os.fdopen(writer, "w", buffering=1) as closed:
        monkeypatch.setattr(sys, "stdout", closed)
        assert run_command(lambda _: print("a line"), Nothing, prog="p", args=[]) == 1
        monkeypatch.undo()
    assert "has ended (head does, for example); run the same command" in capsys.readouterr().err


def test_a_full_memory_is_an_error_without_a_traceback(capsys):
    def main(_: Nothing) -> int:
        raise MemoryError

    assert run_command(main, Nothing, prog="p", args=[]) == 1
    expected = "error: the memory is full; ask for less at a time (MemoryError)\n"
    assert capsys.readouterr().err == expected


def test_a_bar_may_move_the_cursor(monkeypatch):
    screen = io.StringIO()
    screen.isatty = lambda: True
    monkeypatch.setattr(sys, "stderr", screen)

    def main(_: Nothing) -> int:
        with progress(total=2) as bar:
            bar.delay = 0
            bar.update()
        return 0

    assert run_command(main, Nothing, prog="p", args=[]) == 0
    assert "\r" in screen.getvalue()


def test_extract_and_status_show_such_names(tmp_path, capsys):
    videos = tmp_path / "videos"
    videos.mkdir()
    (videos / EVIL.replace("/", "")).write_bytes(b"no video")
    flags = ["--backbone", "test_resnet", "--weights", "random", "--device", "cpu"]
    commands = (
        ["extract", "--videos", str(videos), "--out", str(tmp_path / "f.zarr"), *flags],
        ["extract.status", str(tmp_path / "f.zarr")],
    )
    for command in commands:
        run(*command)
        text = "".join(capsys.readouterr())
        assert SHOWN in text
        assert not set(text) & {"\x1b", "\x07", "\x9b", "\u202e"}


def test_bars_in_a_log_leave_no_thread_behind(capsys):
    before = threading.active_count()
    for _ in range(5):
        list(progress(range(3)))
    assert threading.active_count() <= before + 1  # tqdm's own monitor, if anything
