"""Decode in child processes that can be killed; frames come back through shared memory.

A decoder may hang forever, hold Python's lock meanwhile, or crash. Only killing the process helps.
So each child is a process, and a thread here talks to it:

    submit(job) -> queue -> thread: job -> child ... result -> Future
                            after the deadline, or if the child dies: SIGKILL, a new child, and
                            the job fails with a message

A child starts in under half a second (it never imports torch), ends with its parent even on kill
-9, and writes into slots of shared memory, so frames are not copied through a pipe.
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
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from functools import partial
from multiprocessing.connection import Connection, Pipe
from pathlib import Path
from typing import Any

import numpy as np

from extract import RunError
from extract.decode.container import MAX_PIXELS, time_limit
from extract.portable import end_with_parent, shared_memory
from extract.sources import UNKNOWN, Source, read_source

# function(job, out) returns anything that can be pickled, and writes into `out`: a slot, flat uint8
Function = Callable[[Any, np.ndarray], Any]

SLOTS_PER_CHILD = 4  # results that a child computes ahead until they are released
ATTEMPTS = 3  # at a job whose child dies: it may have been killed for reasons other than the video
SECONDS_TO_START = 60.0
_PROGRAM_BYTES = 1 << 29


@dataclass
class JobResult(AbstractContextManager["JobResult"]):
    """The result of a job, or its `failure`.

    buffer: uint8, valid until `release`; on a GPU if it was decoded there.
    source: identifies the file of the job, as it was before it was read.
    """

    result: Any = None
    buffer: Any = field(default_factory=lambda: np.empty(0, np.uint8), repr=False)
    failure: str = ""
    cpu_seconds: float = 0.0
    source: Source = UNKNOWN
    _free: Callable[[], None] | None = field(default=None, repr=False)

    def release(self) -> None:
        """Free the slot. `buffer` must not be read afterwards."""
        free, self._free = self._free, None
        if free is not None:
            self.buffer = np.empty(0, np.uint8)
            free()

    def detach(self, num_bytes: int | None = None) -> "JobResult":
        """Copy the first `num_bytes` of the buffer (default: all), and free the slot."""
        detached = replace(self, buffer=self.buffer[:num_bytes].copy(), _free=None)
        self.release()
        return detached

    def __exit__(self, *_: object) -> None:
        self.release()


_Run = Callable[[Any, int], JobResult | None]  # of a job and a slot; None: the executor is lost
_Slots = queue.SimpleQueue[int | None]  # free slots of a thread; None ends it


class SubprocessPool(AbstractContextManager["SubprocessPool"]):
    """Child processes that run `function` over jobs, in the order of `submit`.

    A job is a tuple that begins with the path of its file, which sets its deadline (`time_limit`).
    After the deadline its child is killed and the job fails. A job whose child dies is tried again.
    """

    def __init__(self, function: Function, *, slot_bytes: int, workers: int, timeout: float):
        self._jobs: queue.SimpleQueue[tuple[Any, Future[JobResult]] | None] = queue.SimpleQueue()
        settings: dict[str, Any] = {"slot_bytes": slot_bytes, "timeout": timeout}
        self._single_child_pool = partial(SubprocessPool, function, workers=1, **settings)
        self._slots: list[_Slots] = []  # of each thread
        self._children = [_Child(function, **settings) for _ in range(workers)]
        self._threads = [
            self._start_thread(child.run, SLOTS_PER_CHILD, child.prestart)
            for child in self._children
        ]

    def submit(self, job: Any) -> "Future[JobResult]":
        """Queue a job. Problems with a video do not raise; they are in `JobResult.failure`."""
        future: Future[JobResult] = Future()
        self._jobs.put((job, future))
        return future

    def add_remote_executor(self, execute: Callable[[Any], JobResult], *, concurrency: int) -> None:
        """Also run jobs by `execute(job)`, several at a time, until it raises."""

        def run(job: Any, _: int) -> JobResult | None:
            with contextlib.suppress(Exception):
                return execute(job)
            return None

        for _ in range(concurrency):
            self._start_thread(run, SLOTS_PER_CHILD // 2)

    def run_isolated(self, job: Any) -> JobResult:
        """Run a job now, in a new child. In the queue it might wait for slots that jobs before it
        fill."""
        try:
            with self._single_child_pool() as pool:
                return pool.submit(job).result().detach()
        except RunError as error:
            return JobResult(failure=str(error))

    def close(self) -> None:
        """Kill the children. Unfinished jobs are canceled."""
        for child in self._children:
            child.kill()
        with contextlib.suppress(queue.Empty):
            while item := self._jobs.get_nowait():
                item[1].cancel()
        for slots in self._slots:
            slots.put(None)
            self._jobs.put(None)
        # Threads of remote executors are not waited for.
        for thread, child in zip(self._threads, self._children, strict=True):
            thread.join()
            child.shutdown()
        self._threads, self._children = [], []

    def _start_thread(
        self, run: _Run, num_slots: int, prestart: Callable[[], None] = lambda: None
    ) -> threading.Thread:
        """Start a thread that runs jobs. It holds at most `num_slots` results."""
        slots: _Slots = queue.SimpleQueue()
        for slot in range(num_slots):
            slots.put(slot)
        self._slots.append(slots)
        thread = threading.Thread(
            target=self._work, args=(prestart, run, slots), name="decode", daemon=True
        )
        thread.start()
        return thread

    def _work(self, prestart: Callable[[], None], run: _Run, slots: _Slots) -> None:
        prestart()
        is_lost = False
        # Take a slot first: a job must not wait here while another thread could run it.
        while not is_lost and (slot := slots.get()) is not None and (item := self._jobs.get()):
            job, future = item
            if not future.set_running_or_notify_cancel():
                slots.put(slot)
                continue
            try:
                result = run(job, slot)
                is_lost = result is None
                result = result or self.run_isolated(job)
            except BaseException as error:
                slots.put(slot)
                future.set_exception(error)
                continue
            if result.failure:
                slots.put(slot)
            free = None if result.failure else partial(slots.put, slot)
            future.set_result(replace(result, _free=free))

    def __exit__(self, *_: object) -> None:
        self.close()


class _ChildDiedError(Exception):
    """The child ended before its job did. The message says how."""


class _Child:
    """A child process, its successors if it has to be killed, and the memory shared with them."""

    def __init__(self, function: Function, *, slot_bytes: int, timeout: float):
        self._timeout, self._setup = timeout, pickle.dumps((function, slot_bytes))
        self._memory = shared_memory(SLOTS_PER_CHILD * slot_bytes)
        self._buffers = _mapped(self._memory, slot_bytes)
        self._closed = False
        self._process: subprocess.Popen | None = None
        self._pipe: Connection | None = None

    def prestart(self) -> None:
        """Start before the first job, while the caller loads its backbone, for example."""
        with contextlib.suppress(_ChildDiedError, RunError):  # the first job reports it
            self._start()

    def run(self, job: Any, slot: int) -> JobResult:
        for _ in range(ATTEMPTS):
            try:
                return self._request(job, slot)
            except _ChildDiedError as error:
                description = str(error)
                self._stop()
                if self._closed:
                    return JobResult(failure="cancelled")
        return JobResult(failure=f"the decoding process died {ATTEMPTS} times ({description})")

    def kill(self) -> None:
        """Kill the child for good. The thread that waits for it sees it die."""
        self._closed = True
        if (process := self._process) is not None:
            process.kill()

    def shutdown(self) -> None:
        self._stop()
        os.close(self._memory)

    def _request(self, job: Any, slot: int) -> JobResult:
        pipe = self._pipe or self._start()
        allowed = time_limit(self._timeout, job[0])
        try:
            pipe.send((slot, job))
            if pipe.poll(allowed):
                result, failure, cpu_seconds, source = pipe.recv()
                return JobResult(result, self._buffers[slot], failure, cpu_seconds, source)
        except (EOFError, OSError):
            raise _ChildDiedError(_describe_exit(self._exit_status())) from None
        self._stop()
        return JobResult(
            failure=f"given up after {allowed:.3g} s (--video-timeout): decoding hangs or is too "
            "slow"
        )

    def _start(self) -> Connection:
        pipe, child_end = Pipe()
        with child_end:
            descriptors = child_end.fileno(), self._memory
            module = ["-P", "-m", "extract.decode.pool"]
            # This package first: a folder of its name may lie on the path before it.
            path = [str(Path(__file__).parents[2]), *filter(None, sys.path)]
            self._process = subprocess.Popen(
                [sys.executable, *module, *map(str, descriptors)],
                pass_fds=descriptors,
                stdin=subprocess.DEVNULL,
                env=os.environ | {"PYTHONPATH": os.pathsep.join(path)},
            )
        if self._closed:  # `kill` was called during the start and did not see this process
            self._process.kill()
        try:
            pipe.send_bytes(self._setup)
            if not pipe.poll(SECONDS_TO_START):
                raise EOFError
            pipe.recv()
        except (EOFError, OSError):
            pipe.close()
            status = self._exit_status()
            self._stop()
            description = _describe_exit(status)
            if self._closed or status is None or status < 0:
                raise _ChildDiedError(description) from None
            raise RunError(
                f"a decode process does not start ({description}); its error is printed above"
            ) from None
        self._pipe = pipe
        return pipe

    def _exit_status(self) -> int | None:
        assert self._process is not None
        with contextlib.suppress(subprocess.TimeoutExpired):
            return self._process.wait(timeout=1)
        return None

    def _stop(self) -> None:
        if self._pipe is not None:
            self._pipe.close()
        if self._process is not None:
            self._process.kill()  # SIGKILL ends a process that is stopped or holds Python's lock
            self._process.wait()
        self._pipe = self._process = None


def _describe_exit(status: int | None) -> str:
    if status is None:
        return "it does not answer"
    if status < 0:
        return f"signal {-status}, {signal.Signals(-status).name}"
    return f"exit status {status}"


def _mapped(memory: int, slot_bytes: int) -> np.ndarray:
    """Memory that parent and child share: uint8 [slots, slot_bytes]."""
    mapping = mmap.mmap(memory, SLOTS_PER_CHILD * slot_bytes)
    return np.frombuffer(mapping, np.uint8).reshape(SLOTS_PER_CHILD, slot_bytes)


# -- in the child ----------------------------------------------------------------------------------


def memory_limit(slot_bytes: int) -> int:
    """Bytes that a child may allocate: for Python and FFmpeg, the decoder's pictures, and a picture
    before and after resizing.

    A decoder holds 16 reference pictures and a few others, of 1.5 bytes per pixel.
    """
    return _PROGRAM_BYTES + 32 * MAX_PIXELS + 2 * slot_bytes


def _limit_memory(slot_bytes: int) -> None:
    """Make a file that needs more memory fail alone, before the kernel kills any other process."""
    # Platforms without such a limit, or a lower limit set by the user.
    with contextlib.suppress(ImportError, ValueError, OSError):
        import resource

        _, hard_limit = resource.getrlimit(resource.RLIMIT_DATA)
        resource.setrlimit(resource.RLIMIT_DATA, (memory_limit(slot_bytes), hard_limit))


def _serve(pipe: Connection, memory: int) -> None:
    """Run jobs until the parent is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides what Ctrl-C does
    end_with_parent()
    function, slot_bytes = pickle.loads(pipe.recv_bytes())
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
            allowed = f"{memory_limit(slot_bytes) / 1e9:.1f} GB that a process may take"
            failure = f"decoding it takes more than the {allowed}"
        except Exception as error:
            failure = getattr(error, "reason", None) or f"{type(error).__name__}: {error}"
        pipe.send((result, failure, time.process_time() - started, source))


if __name__ == "__main__":
    # These errors mean that the parent is gone, or has closed its end of the pipe.
    with contextlib.suppress(EOFError, BrokenPipeError, ConnectionResetError):
        _serve(Connection(int(sys.argv[1])), int(sys.argv[2]))
