"""Decoding in child processes that can be killed, with frames handed back through shared memory.

A decoder can hang for ever, hold Python's lock while it does, or crash: nothing inside a process helps against that.
So each child is a process of its own with one thread here that talks to it:

    submit(job) -> queue -> thread: job -> child ... "10 s long" ... result -> Future
                            deadline passed, or child dead -> SIGKILL, a fresh child, the job's failure in words

A child starts in under half a second (it never imports torch), ends with its parent even on kill -9, and writes into
slots of memory that both see, so frames are not copied through a pipe.
"""

import contextlib
import ctypes
import mmap
import os
import pickle
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from functools import partial
from multiprocessing.connection import Connection, Pipe
from typing import Any

import numpy as np

from extract.cli import RunError

# function(job, out, on_duration) -> picklable result: `out` is a flat uint8 array of the slot's size to write into
Function = Callable[[Any, np.ndarray, Callable[[float | None], None]], Any]

SLOTS_A_CHILD = 4  # it decodes ahead until they are full and not yet released
ATTEMPTS = 3  # at a job whose child dies: someone may have killed it for other reasons than this video
SECONDS_TO_START = 60.0
_PR_SET_PDEATHSIG = 1


@dataclass
class Finished:
    """The end of a job: `result` and `buffer` (uint8, valid until `release`, perhaps on a GPU), or `failure`."""

    result: Any = None
    buffer: Any = field(default_factory=lambda: np.empty(0, np.uint8), repr=False)
    failure: str = ""
    cpu_seconds: float = 0.0
    _free: Callable[[], None] | None = field(default=None, repr=False)

    def release(self) -> None:
        """Give the slot back; `buffer` must not be read afterwards."""
        free, self._free = self._free, None
        if free is not None:
            self.buffer = np.empty(0, np.uint8)
            free()

    def __enter__(self) -> "Finished":
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


class SubprocessPool:
    """Child processes that run `function` over jobs, in the order of `submit`, each under a deadline.

    A job may take `timeout` seconds, and one more for each 10 s of video that it reports; then its child is killed
    and the job fails. A job whose child dies is tried again. `nice` lowers the children's priority.
    """

    def __init__(self, function: Function, *, slot_bytes: int, workers: int, timeout: float, nice: int = 0):
        self._jobs: queue.SimpleQueue[tuple[Any, Future[Finished]] | None] = queue.SimpleQueue()
        same: dict[str, Any] = {"slot_bytes": slot_bytes, "timeout": timeout, "nice": nice}
        self._one_more = partial(SubprocessPool, function, workers=1, **same)
        self._threads: list[_ChildThread | _HelpThread] = [
            _ChildThread(self._jobs, function, **same) for _ in range(workers)
        ]

    def submit(self, job: Any) -> "Future[Finished]":
        """Queue a job; its future never raises for what is wrong with a video, see `Finished.failure`."""
        future: Future[Finished] = Future()
        self._jobs.put((job, future))
        return future

    def help(self, elsewhere: Callable[[Any], Finished], *, at_once: int) -> None:
        """Have jobs done elsewhere too: `elsewhere(job)`, so many at once, until it raises and the help is over."""
        helpers = [_HelpThread(self._jobs, elsewhere, self.alone) for _ in range(at_once)]
        for helper in helpers:
            helper.start()
        self._threads += helpers

    def alone(self, job: Any) -> Finished:
        """Do a job now, in a child of its own: behind others in the queue it might wait for slots that those fill."""
        try:
            with self._one_more() as pool, pool.submit(job).result() as finished:
                return replace(finished, buffer=finished.buffer.copy(), _free=None)
        except RunError as error:
            return Finished(failure=str(error))

    def close(self) -> None:
        """Kill the children. Jobs that have not ended are cancelled."""
        for thread in self._threads:
            thread.close()
        with contextlib.suppress(queue.Empty):
            while waiting := self._jobs.get_nowait():
                waiting[1].cancel()
        for _ in self._threads:
            self._jobs.put(None)
        for thread in self._threads:
            if isinstance(thread, _ChildThread):  # help that is on its way is not waited for
                thread.join()

    def __enter__(self) -> "SubprocessPool":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _ChildDiedError(Exception):
    """The child ended before its job did; the message says how."""


class _DeadlineError(Exception):
    """The job took longer than it may; the message says how long."""


class _ChildThread(threading.Thread):
    """One child after the other, and the slots of memory they share with this process."""

    def __init__(self, jobs: queue.SimpleQueue, function: Function, *, slot_bytes: int, timeout: float, nice: int):
        super().__init__(name="decode-child", daemon=True)
        self._jobs, self._timeout = jobs, timeout
        self._setup = pickle.dumps((function, slot_bytes, nice))
        self._memory = os.memfd_create("decoded-frames")  # not /dev/shm, which is 64 MB in many containers
        os.ftruncate(self._memory, SLOTS_A_CHILD * slot_bytes)
        mapped = mmap.mmap(self._memory, SLOTS_A_CHILD * slot_bytes)
        self._slots = np.frombuffer(mapped, np.uint8).reshape(SLOTS_A_CHILD, slot_bytes)
        self._free: queue.SimpleQueue[int | None] = queue.SimpleQueue()
        for slot in range(SLOTS_A_CHILD):
            self._free.put(slot)
        self._closed = False
        self._child: subprocess.Popen | None = None
        self._pipe: Connection | None = None
        self.start()

    def run(self) -> None:
        with contextlib.suppress(_ChildDiedError, RunError):  # what stays wrong, the first job meets again and says
            self._start_child()  # before there is a job: the caller may be loading its backbone
        # The slot first: a job must not wait here while another thread could do it.
        while (slot := self._free.get()) is not None and (waiting := self._jobs.get()) is not None:
            job, future = waiting
            if not future.set_running_or_notify_cancel():
                self._free.put(slot)
                continue
            try:
                finished = self._do(job, slot)
            except BaseException as error:
                self._free.put(slot)
                future.set_exception(error)
                continue
            if finished.failure:
                self._free.put(slot)
            future.set_result(finished)
        self._stop_child()
        os.close(self._memory)

    def close(self) -> None:
        self._closed = True
        child = self._child
        if child is not None:
            child.kill()  # the thread, if it waits for the child, sees it die
        self._free.put(None)

    def _do(self, job: Any, slot: int) -> Finished:
        for attempt in range(1, ATTEMPTS + 1):
            try:
                result, failure, cpu_seconds = self._ask(job, slot)
                free = None if failure else (lambda: self._free.put(slot))
                return Finished(result, self._slots[slot], failure, cpu_seconds, free)
            except _DeadlineError as error:
                self._stop_child()
                return Finished(failure=f"given up after {error} s (--video-timeout): decoding hangs or is too slow")
            except _ChildDiedError as error:
                self._stop_child()
                if self._closed:
                    return Finished(failure="cancelled")
                if attempt == ATTEMPTS:
                    return Finished(failure=f"the decoding process died {ATTEMPTS} times ({error})")
        raise AssertionError

    def _ask(self, job: Any, slot: int) -> tuple[Any, str, float]:
        pipe = self._pipe or self._start_child()
        started = time.monotonic()
        allowed = self._timeout
        try:
            pipe.send((slot, job))
            while True:
                if not pipe.poll(max(0.0, started + allowed - time.monotonic())):
                    raise _DeadlineError(f"{allowed:.3g}")
                kind, *values = pipe.recv()
                if kind == "done":
                    return values[0], values[1], values[2]
                allowed = self._timeout + (values[0] or 0.0) / 10
        except (EOFError, OSError):
            raise _ChildDiedError(self._how_it_ended()) from None

    def _start_child(self) -> Connection:
        pipe, theirs = Pipe()
        with theirs:
            self._child = subprocess.Popen(
                [sys.executable, "-m", "extract.decode.subprocess_pool", str(theirs.fileno()), str(self._memory)],
                pass_fds=(theirs.fileno(), self._memory),
                stdin=subprocess.DEVNULL,
                env=os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
            )
        if self._closed:  # while it was being started, so that `close` did not see it
            self._child.kill()
        try:
            pipe.send_bytes(self._setup)
            if not pipe.poll(SECONDS_TO_START):
                raise EOFError
            pipe.recv()
        except (EOFError, OSError):
            pipe.close()
            how = self._how_it_ended()
            broken = how.startswith("exit status") and not self._closed
            self._stop_child()
            if not broken:
                raise _ChildDiedError(how) from None
            raise RunError(f"a decode process does not start ({how}); its error stands above") from None
        self._pipe = pipe
        return pipe

    def _how_it_ended(self) -> str:
        assert self._child is not None
        try:
            code = self._child.wait(timeout=1)
        except subprocess.TimeoutExpired:
            return "it does not answer"
        return f"signal {-code}, {signal.Signals(-code).name}" if code < 0 else f"exit status {code}"

    def _stop_child(self) -> None:
        if self._pipe is not None:
            self._pipe.close()
        if self._child is not None:
            self._child.kill()  # SIGKILL also ends a stopped process, and one that holds Python's lock
            self._child.wait()
        self._pipe = self._child = None


class _HelpThread(threading.Thread):
    """Takes jobs from the same queue and has them done elsewhere; holds half as many results as a child."""

    def __init__(self, jobs: queue.SimpleQueue, elsewhere: Callable[[Any], Finished], here: Callable[[Any], Finished]):
        super().__init__(name="decode-help", daemon=True)
        self._jobs, self._elsewhere, self._here = jobs, elsewhere, here
        self._slots = threading.Semaphore(SLOTS_A_CHILD // 2)

    def run(self) -> None:
        lost = False
        while not lost and self._slots.acquire() and (waiting := self._jobs.get()) is not None:
            job, future = waiting
            if not future.set_running_or_notify_cancel():
                continue
            try:
                finished = self._elsewhere(job)
            except Exception:
                lost = True
                finished = self._here(job)
            future.set_result(replace(finished, _free=self._slots.release))

    def close(self) -> None:
        self._slots.release()


# -- in the child --------------------------------------------------------------------------------------------------


def _serve(pipe: Connection, memory: int) -> None:
    """Do jobs until the parent is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to decide
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    function, slot_bytes, nice = pickle.loads(pipe.recv_bytes())
    os.nice(nice)
    slots = np.frombuffer(mmap.mmap(memory, SLOTS_A_CHILD * slot_bytes), np.uint8).reshape(SLOTS_A_CHILD, slot_bytes)
    pipe.send("ready")
    while True:
        slot, job = pipe.recv()
        started, result, failure = time.process_time(), None, ""
        try:
            result = function(job, slots[slot], lambda seconds: pipe.send(("duration", seconds)))
        except Exception as error:
            failure = getattr(error, "reason", None) or f"{type(error).__name__}: {error}"
        pipe.send(("done", result, failure, time.process_time() - started))


if __name__ == "__main__":
    # The parent is gone, or has no use for us any more.
    with contextlib.suppress(EOFError, BrokenPipeError, ConnectionResetError):
        _serve(Connection(int(sys.argv[1])), int(sys.argv[2]))
