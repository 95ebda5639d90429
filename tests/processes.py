"""Commands as separate programs, stopped at a moment that a test chooses."""

import contextlib
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

PATIENCE = 200.0  # seconds: a busy machine takes long to start a program


@contextlib.contextmanager
def running(
    command: str | list[str],
    *,
    until: Callable[[], object],
    output: int = subprocess.DEVNULL,
    env: Mapping[str, str] | None = None,
) -> Iterator[subprocess.Popen]:
    """`python -m command`, or the words of a list, once `until()` is true. It is killed (kill -9)
    at the end of the block."""
    if isinstance(command, str):
        command = [sys.executable, "-m", *command.split()]
    with subprocess.Popen(
        command, stdout=output, stderr=subprocess.STDOUT, text=True, env=env
    ) as process:
        try:
            deadline = time.monotonic() + PATIENCE
            while not until():
                assert process.poll() is None, "it ended too early"
                assert time.monotonic() < deadline, f"it has not come so far in {PATIENCE} s"
                time.sleep(0.005)
            yield process
        finally:
            process.kill()


def begin_and_wait(folder: str, task: int) -> None:
    """A task for `run_side_by_side` that says in `folder` that it has begun, and never ends."""
    (Path(folder) / str(task)).touch()
    time.sleep(1000)


_STOPS_AFTER_RESULTS = """
import importlib, os, signal, sys
from aggregate.ablation.records import Records
from extract.cli import run_command
results, name, *args = sys.argv[1:]
add, left = Records.add, iter(range(int(results)))
def add_and_stop(self, *arguments):
    add(self, *arguments)
    if next(left) == int(results) - 1:
        os.kill(os.getpid(), signal.SIGSTOP)
Records.add = add_and_stop
command = importlib.import_module(name)
sys.exit(run_command(command.main, command.Options, prog=name, args=args))
"""


def killed_after(results: int, command: str, log: Path) -> bytes:
    """Kill a grid or a cross-validation, which stops itself after that many results; returns its
    `log` as it was left."""

    def enough() -> bool:
        return log.exists() and log.read_bytes().count(b"\n") >= results

    words = [sys.executable, "-c", _STOPS_AFTER_RESULTS, str(results), *command.split()]
    with running(words, until=enough):
        pass
    return log.read_bytes()
