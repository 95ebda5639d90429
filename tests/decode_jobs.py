"""Jobs of decode children in tests. They are functions of a module, since a child imports them by
name."""

import contextlib
import ctypes
import os
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from extract.decode import VideoError


def do(job: tuple[str, Any], out: np.ndarray) -> Any:
    """Run the kind of job that the first part of `job` names, with the second part."""
    kind, value = job
    return _KINDS[Path(kind).name](value, out)


def never_done(job: Any, out: np.ndarray) -> None:
    if begun := os.environ.get("HGNL_TEST_BEGUN"):
        Path(begun).touch()
    time.sleep(1000)


def _fill(value: int, out: np.ndarray) -> int:
    out[:] = value
    return value


def _sleep(seconds: float, out: np.ndarray) -> float:
    time.sleep(seconds)
    return seconds


def _meet(place: tuple[str, int, int], out: np.ndarray) -> None:
    """Report that this one of several jobs has started, and wait for all the others."""
    folder, number, count = place
    (Path(folder) / str(number)).touch()
    while len(os.listdir(folder)) < count:
        time.sleep(0.005)


def _hold_the_lock(path: str | None, out: np.ndarray) -> None:
    """Hang as decord does: in a C function that never returns and never releases Python's lock."""
    if path:
        Path(path).write_text(str(os.getpid()))
    ctypes.PyDLL(None).sleep(1000)


def _wait(path: str, out: np.ndarray) -> None:
    """Write the number of this process, then wait to be stopped or killed."""
    Path(path).write_text(str(os.getpid()))
    time.sleep(1000)


def _stop(path: str, out: np.ndarray) -> None:
    """Write the number of this process, then stop it."""
    Path(path).write_text(str(os.getpid()))
    os.kill(os.getpid(), signal.SIGSTOP)


def _abort(path: str, out: np.ndarray) -> None:
    with open(path, "a") as file:
        file.write("x")
    os.abort()


def _abort_once(path: str, out: np.ndarray) -> str:
    if not Path(path).exists():
        Path(path).touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return "done"


def _raise(error: Exception, out: np.ndarray) -> None:
    raise error


def _bad_video(reason: str, out: np.ndarray) -> None:
    raise VideoError("a.mp4", reason)


def _modules(_: None, out: np.ndarray) -> list[str]:
    return sorted(sys.modules)


def _process(_: None, out: np.ndarray) -> int:
    return os.getpid()


def _burn(seconds: float, out: np.ndarray) -> None:
    end = time.process_time() + seconds
    while time.process_time() < end:
        pass


def _allocate(count: int, out: np.ndarray) -> int:
    return np.empty(count, np.uint8).size


def _with_little_memory(job: Any, out: np.ndarray) -> Any:
    """`decode_job` with 20 MB more memory than this process uses."""
    import resource

    from extract.decode.jobs import decode_job

    status = Path("/proc/self/status").read_text()
    taken = 1024 * int(
        next(line for line in status.splitlines() if line.startswith("VmData")).split()[1]
    )
    limits = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (taken + (20 << 20), limits[1]))
    try:
        return decode_job(job, out)
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, limits)


_KINDS = {
    "allocate": _allocate,
    "with little memory": _with_little_memory,
    "fill": _fill,
    "sleep": _sleep,
    "meet": _meet,
    "hold the lock": _hold_the_lock,
    "wait": _wait,
    "stop": _stop,
    "abort": _abort,
    "abort once": _abort_once,
    "exit": lambda status, out: os._exit(status),
    "raise": _raise,
    "bad video": _bad_video,
    "modules": _modules,
    "process": _process,
    "burn": _burn,
}


def crash_at_four_seconds(job, out):
    """`decode_job` of a decoder that crashes at damage in a file: in the span that begins at 4 s.

    On a GPU, which decodes in the process of its worker, it fails without a crash.
    """
    from extract.decode.jobs import decode_job

    _, rows, plan = job
    if any(span and span[0] == 4.0 for _, span in rows):
        if plan.decoder != "pyav":
            raise RuntimeError("the GPU cannot read this")
        os._exit(9)
    return decode_job(job, out)


def crash_on_a_gpu(job, out):
    """`decode_job` of a decoder on a GPU that crashes its process at files of that name."""
    from extract.decode.jobs import decode_job

    path, rows, plan = job
    if plan.decoder == "pyav":
        return decode_job(job, out)
    if "crash" in Path(path).name:
        os._exit(9)
    return decode_job((path, rows, replace(plan, decoder="pyav")), out.numpy())


def held(job, out):
    """`decode_job` that waits at points that a test chooses, by files in the folder HGNL_TEST_HELD.

    If the file `hold` names a folder, the videos below that folder wait until the file is gone. If
    there is a file `stop`, one child removes it and stops, while it holds a video: the first whose
    parent's command line begins with the text of the file.
    """
    from extract.decode.jobs import decode_job

    if "HGNL_TEST_HELD" in os.environ:
        folder = Path(os.environ["HGNL_TEST_HELD"])
        with contextlib.suppress(FileNotFoundError):
            while (folder / "hold").read_text() in Path(job[0]).parts:
                time.sleep(0.005)
        parent = Path(f"/proc/{os.getppid()}/cmdline").read_text()
        with contextlib.suppress(FileNotFoundError):
            if parent.startswith((folder / "stop").read_text()):
                (folder / "stop").unlink()
                os.kill(os.getpid(), signal.SIGSTOP)
    return decode_job(job, out)


def prepare_row(path: str, row_id: str, plan: Any, out: Any, *, span: Any = None) -> Any:
    """`decode_job` for one row, in this process; the row's clips are written into `out` [V, T, L,
    size, size, 3]."""
    from extract.decode.jobs import decode_job

    buffer = (
        np.zeros(plan.row_bytes, np.uint8)
        if isinstance(out, np.ndarray)
        else out.new_zeros(plan.row_bytes)
    )
    [prepared] = decode_job((path, [(row_id, span)], plan), buffer)
    if isinstance(prepared, VideoError):
        raise prepared
    out[...] = clips_of(prepared, buffer).reshape(out.shape)
    return prepared


def clips_of(prepared: Any, buffer: Any) -> Any:
    """uint8 [V, T, L, size, size, 3] from a flat buffer with the pictures of one row."""
    clips = prepared.clips.astype(int)
    size = round((len(buffer) // clips.size // 3) ** 0.5)
    return buffer.reshape(-1, size, size, 3)[clips]
