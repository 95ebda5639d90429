"""Decoding in child processes that can be killed, with frames handed back through shared memory.

A decoder can hang for ever, hold Python's lock while it does, or crash: nothing inside a process
helps against that. So each child is a process of its own with one thread here that talks to it:

    submit(job) -> queue -> thread: job -> child ... result -> Future
                            deadline passed, or child dead -> SIGKILL, a fresh child, the job's failure in words

A child starts in under half a second (it never imports torch), ends with its parent even on kill
-9, and writes into slots of memory that both see, so frames are not copied through a pipe.
"""

import contextlib
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

from extract import RunError
from extract.decode.container import MAX_PIXELS, time_limit
from extract.portable import end_with_parent, shared_memory
from extract.sources import UNKNOWN, Source, read_source

# function(job, out) -> picklable result: `out` is a flat uint8 array of the slot's size to write
# into
Function = Callable[[Any, np.ndarray], Any]

SLOTS_A_CHILD = 4  # it decodes ahead until they are full and not yet released
ATTEMPTS = (
    3  # at a job whose child dies: someone may have killed it for other reasons than this video
)
SECONDS_TO_START = 60.0
_PROGRAM_BYTES = 1 << 29


@dataclass
class Finished:
    """The end of a job: `result` and `buffer` (uint8, valid until `release`, perhaps on a GPU), or
    `failure`."""

    result: Any = None
    buffer: Any = field(default_factory=lambda: np.empty(0, np.uint8), repr=False)
    failure: str = ""
    cpu_seconds: float = 0.0
    source: Source = (
        UNKNOWN  # the file that the job's first value names, as it was before it was read
    )
    _free: Callable[[], None] | None = field(default=None, repr=False)

    def release(self) -> None:
        """Give the slot back; `buffer` must not be read afterwards."""
        free, self._free = self._free, None
        if free is not None:
            self.buffer = np.empty(0, np.uint8)
            free()

    def taken(self, count: int | None = None) -> "Finished":
        """The same with a copy of (the first `count` bytes of) the buffer; the slot is given
        back."""
        kept = replace(self, buffer=self.buffer[:count].copy(), _free=None)
        self.release()
        return kept

    def __enter__(self) -> "Finished":
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


_Do = Callable[
    [Any, int], Finished | None
]  # job, slot -> its end, or None where no more can be done
_Slots = queue.SimpleQueue[int | None]  # those that hold no result; None ends their thread


class SubprocessPool:
    """Child processes that run `function` over jobs, in the order of `submit`, each under a
    deadline.

    A job is a tuple that begins with the path of its file, which says how long it may take
    (`time_limit`); then its child is killed and the job fails. A job whose child dies is tried
    again. `nice` lowers the children's priority.
    """

    def __init__(
        self, function: Function, *, slot_bytes: int, workers: int, timeout: float, nice: int = 0
    ):
        self._jobs: queue.SimpleQueue[tuple[Any, Future[Finished]] | None] = queue.SimpleQueue()
        same: dict[str, Any] = {"slot_bytes": slot_bytes, "timeout": timeout, "nice": nice}
        self._one_more = partial(SubprocessPool, function, workers=1, **same)
        self._slots: list[_Slots] = []  # of each thread
        self._children = [_Child(function, **same) for _ in range(workers)]
        self._threads = [
            self._start(child.do, SLOTS_A_CHILD, child.begin) for child in self._children
        ]

    def submit(self, job: Any) -> "Future[Finished]":
        """Queue a job; its future never raises for what is wrong with a video, see
        `Finished.failure`."""
        future: Future[Finished] = Future()
        self._jobs.put((job, future))
        return future

    def help(self, elsewhere: Callable[[Any], Finished], *, at_once: int) -> None:
        """Have jobs done elsewhere too: `elsewhere(job)`, so many at once, until it raises and the
        help is over."""

        def helped(job: Any, _: int) -> Finished | None:
            with contextlib.suppress(Exception):
                return elsewhere(job)
            return None

        for _ in range(at_once):
            self._start(helped, SLOTS_A_CHILD // 2)

    def alone(self, job: Any) -> Finished:
        """Do a job now, in a child of its own: behind others in the queue it might wait for slots
        that those fill."""
        try:
            with self._one_more() as pool:
                return pool.submit(job).result().taken()
        except RunError as error:
            return Finished(failure=str(error))

    def close(self) -> None:
        """Kill the children. Jobs that have not ended are cancelled."""
        for child in self._children:
            child.kill()
        with contextlib.suppress(queue.Empty):
            while waiting := self._jobs.get_nowait():
                waiting[1].cancel()
        for slots in self._slots:
            slots.put(None)
            self._jobs.put(None)
        for thread, child in zip(
            self._threads, self._children, strict=True
        ):  # help on its way is not waited for
            thread.join()
            child.end()
        self._threads, self._children = [], []

    def _start(
        self, do: _Do, count: int, begin: Callable[[], None] = lambda: None
    ) -> threading.Thread:
        """Have a thread do jobs, of which it holds at most so many results."""
        slots: _Slots = queue.SimpleQueue()
        for slot in range(count):
            slots.put(slot)
        self._slots.append(slots)
        thread = threading.Thread(
            target=self._work, args=(begin, do, slots), name="decode", daemon=True
        )
        thread.start()
        return thread

    def _work(self, begin: Callable[[], None], do: _Do, slots: _Slots) -> None:
        begin()
        done: Finished | None = Finished()
        # The slot first: a job must not wait here while another thread could do it.
        while (
            done and (slot := slots.get()) is not None and (waiting := self._jobs.get()) is not None
        ):
            job, future = waiting
            if not future.set_running_or_notify_cancel():
                slots.put(slot)
                continue
            try:
                done = do(job, slot)
                finished = done or self.alone(job)
            except BaseException as error:
                slots.put(slot)
                future.set_exception(error)
                continue
            if finished.failure:
                slots.put(slot)
            future.set_result(
                replace(finished, _free=None if finished.failure else partial(slots.put, slot))
            )

    def __enter__(self) -> "SubprocessPool":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _ChildDiedError(Exception):
    """The child ended before its job did; the message says how."""


class _Child:
    """One child after the other, and the slots of memory they share with this process."""

    def __init__(self, function: Function, *, slot_bytes: int, timeout: float, nice: int):
        self._timeout, self._setup = timeout, pickle.dumps((function, slot_bytes, nice))
        self._memory = shared_memory(SLOTS_A_CHILD * slot_bytes)
        self._seen = _mapped(self._memory, slot_bytes)
        self._closed = False
        self._process: subprocess.Popen | None = None
        self._pipe: Connection | None = None

    def begin(self) -> None:
        """Start before there is a job: the caller may be loading its backbone."""
        with contextlib.suppress(
            _ChildDiedError, RunError
        ):  # what stays wrong, the first job meets again and says
            self._start()

    def do(self, job: Any, slot: int) -> Finished:
        for _ in range(ATTEMPTS):
            try:
                return self._ask(job, slot)
            except _ChildDiedError as error:
                how = str(error)
                self._stop()
                if self._closed:
                    return Finished(failure="cancelled")
        return Finished(failure=f"the decoding process died {ATTEMPTS} times ({how})")

    def kill(self) -> None:
        """For good; who waits for the child sees it die."""
        self._closed = True
        if (process := self._process) is not None:
            process.kill()

    def end(self) -> None:
        self._stop()
        os.close(self._memory)

    def _ask(self, job: Any, slot: int) -> Finished:
        pipe = self._pipe or self._start()
        allowed = time_limit(self._timeout, job[0])
        try:
            pipe.send((slot, job))
            if pipe.poll(allowed):
                result, failure, cpu_seconds, source = pipe.recv()
                return Finished(result, self._seen[slot], failure, cpu_seconds, source)
        except (EOFError, OSError):
            raise _ChildDiedError(self._how_it_ended()) from None
        self._stop()
        return Finished(
            failure=f"given up after {allowed:.3g} s (--video-timeout): decoding hangs or is too slow"
        )

    def _start(self) -> Connection:
        pipe, theirs = Pipe()
        with theirs:
            self._process = subprocess.Popen(
                [
                    sys.executable,
                    "-P",
                    "-m",
                    "extract.decode.pool",
                    str(theirs.fileno()),
                    str(self._memory),
                ],
                pass_fds=(theirs.fileno(), self._memory),
                stdin=subprocess.DEVNULL,
                env=os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
            )
        if self._closed:  # while it was being started, so that `close` did not see it
            self._process.kill()
        try:
            pipe.send_bytes(self._setup)
            if not pipe.poll(SECONDS_TO_START):
                raise EOFError
            pipe.recv()
        except (EOFError, OSError):
            pipe.close()
            how = self._how_it_ended()
            broken = how.startswith("exit status") and not self._closed
            self._stop()
            if not broken:
                raise _ChildDiedError(how) from None
            raise RunError(
                f"a decode process does not start ({how}); its error stands above"
            ) from None
        self._pipe = pipe
        return pipe

    def _how_it_ended(self) -> str:
        assert self._process is not None
        try:
            code = self._process.wait(timeout=1)
        except subprocess.TimeoutExpired:
            return "it does not answer"
        return (
            f"signal {-code}, {signal.Signals(-code).name}" if code < 0 else f"exit status {code}"
        )

    def _stop(self) -> None:
        if self._pipe is not None:
            self._pipe.close()
        if self._process is not None:
            self._process.kill()  # SIGKILL also ends a stopped process, and one that holds Python's lock
            self._process.wait()
        self._pipe = self._process = None


def _mapped(memory: int, slot_bytes: int) -> np.ndarray:
    """Memory that parent and child share: uint8 [slots, slot_bytes]."""
    return np.frombuffer(mmap.mmap(memory, SLOTS_A_CHILD * slot_bytes), np.uint8).reshape(
        SLOTS_A_CHILD, slot_bytes
    )


# -- in the child --------------------------------------------------------------------------------------------------


def memory_limit(slot_bytes: int) -> int:
    """Bytes of its own that a child may take: Python and FFmpeg, a picture before and after
    resizing, and decoders'.

    A decoder holds 16 pictures that others refer to and some on their way, of 1.5 bytes per pixel.
    """
    return _PROGRAM_BYTES + 32 * MAX_PIXELS + 2 * slot_bytes


def _limit_memory(slot_bytes: int) -> None:
    """So that a file that takes more fails alone, and not whatever the kernel chooses to kill for
    it."""
    with contextlib.suppress(
        ImportError, ValueError, OSError
    ):  # a platform without, or a lower limit of the user's
        import resource

        _, most = resource.getrlimit(resource.RLIMIT_DATA)
        resource.setrlimit(resource.RLIMIT_DATA, (memory_limit(slot_bytes), most))


def _serve(pipe: Connection, memory: int) -> None:
    """Do jobs until the parent is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to decide
    end_with_parent()
    function, slot_bytes, nice = pickle.loads(pipe.recv_bytes())
    os.nice(nice)
    _limit_memory(slot_bytes)
    slots = _mapped(memory, slot_bytes)
    pipe.send("ready")
    while True:
        slot, job = pipe.recv()
        started, result, failure = time.process_time(), None, ""
        source = read_source(job[0])
        try:
            result = function(job, slots[slot])
        except MemoryError:
            failure = f"decoding it takes more than the {memory_limit(slot_bytes) / 1e9:.1f} GB that a process may take"
        except Exception as error:
            failure = getattr(error, "reason", None) or f"{type(error).__name__}: {error}"
        pipe.send((result, failure, time.process_time() - started, source))


if __name__ == "__main__":
    # The parent is gone, or has no use for us any more.
    with contextlib.suppress(EOFError, BrokenPipeError, ConnectionResetError):
        _serve(Connection(int(sys.argv[1])), int(sys.argv[2]))
