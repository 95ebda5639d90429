"""What decode children are told to do in tests: module-level functions, since a child imports them by name."""

import ctypes
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from extract.decode import VideoError


def do(job: tuple[str, Any], out: np.ndarray, on_duration) -> Any:
    """Do what the first word of a job says, with the second."""
    kind, value = job
    return _KINDS[kind](value, out, on_duration)


def never_done(job: Any, out: np.ndarray, on_duration) -> None:
    time.sleep(1000)


def _fill(value: int, out: np.ndarray, on_duration) -> int:
    out[:] = value
    return value


def _sleep(seconds: float, out: np.ndarray, on_duration) -> float:
    time.sleep(seconds)
    return seconds


def _long_video(job: tuple[float | None, float], out: np.ndarray, on_duration) -> float:
    duration, seconds = job
    on_duration(duration)
    time.sleep(seconds)
    return seconds


def _hold_the_lock(path: str | None, out: np.ndarray, on_duration) -> None:
    """As decord hangs: a C function that never returns and never gives Python's lock back."""
    if path:
        Path(path).write_text(str(os.getpid()))
    ctypes.PyDLL(None).sleep(1000)


def _wait(path: str, out: np.ndarray, on_duration) -> None:
    """Say which process this is, then wait to be stopped or killed."""
    Path(path).write_text(str(os.getpid()))
    time.sleep(1000)


def _abort(path: str, out: np.ndarray, on_duration) -> None:
    with open(path, "a") as file:
        file.write("x")
    os.abort()


def _abort_once(path: str, out: np.ndarray, on_duration) -> str:
    if not Path(path).exists():
        Path(path).touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return "done"


def _raise(error: Exception, out: np.ndarray, on_duration) -> None:
    raise error


def _bad_video(reason: str, out: np.ndarray, on_duration) -> None:
    raise VideoError("a.mp4", reason)


def _modules(_: None, out: np.ndarray, on_duration) -> list[str]:
    return sorted(sys.modules)


def _process(_: None, out: np.ndarray, on_duration) -> tuple[int, int]:
    return os.getpid(), os.nice(0)


def _burn(seconds: float, out: np.ndarray, on_duration) -> None:
    end = time.process_time() + seconds
    while time.process_time() < end:
        pass


_KINDS = {
    "fill": _fill,
    "sleep": _sleep,
    "long video": _long_video,
    "hold the lock": _hold_the_lock,
    "wait": _wait,
    "abort": _abort,
    "abort once": _abort_once,
    "exit": lambda status, out, on_duration: os._exit(status),
    "raise": _raise,
    "bad video": _bad_video,
    "modules": _modules,
    "process": _process,
    "burn": _burn,
}


def crash_at_four_seconds(job, out, on_duration):
    """`decode_job` of a decoder that crashes where a file is broken: in the span that begins at 4 s."""
    from extract.decode.transform import decode_job

    if any(span and span[0] == 4.0 for _, span in job[1]):
        os._exit(9)
    return decode_job(job, out, on_duration)


def crash_on_a_gpu(job, out, on_duration):
    """`decode_job` of a decoder on a GPU that takes its process along, at files of that name."""
    from extract.decode.transform import decode_job

    path, _, plan = job
    if plan.decoder != "pyav" and "crash" in Path(path).name:
        os._exit(9)
    return decode_job(job, out, on_duration)
