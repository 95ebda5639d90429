"""Commands as separate programs, stopped at a moment that a test chooses."""

import contextlib
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

PATIENCE = 200.0  # seconds: a busy machine takes long to start a program


@contextlib.contextmanager
def running(
    command: str, *, until: Callable[[], object], output: int = subprocess.DEVNULL
) -> Iterator[subprocess.Popen]:
    """`python -m command`, once `until()` is true. It is killed (kill -9) at the end of the
    block."""
    arguments = [sys.executable, "-m", *command.split()]
    with subprocess.Popen(arguments, stdout=output, stderr=subprocess.STDOUT, text=True) as process:
        try:
            deadline = time.monotonic() + PATIENCE
            while not until():
                assert process.poll() is None, "it ended too early"
                assert time.monotonic() < deadline, f"it has not come so far in {PATIENCE} s"
                time.sleep(0.005)
            yield process
        finally:
            process.kill()


def killed_after(results: int, command: str, log: Path) -> bytes:
    """Kill `command` when its `log` has that many lines; returns the log as it was left."""

    def enough() -> bool:
        return log.exists() and log.read_bytes().count(b"\n") >= results

    with running(command, until=enough):
        pass
    return log.read_bytes()
