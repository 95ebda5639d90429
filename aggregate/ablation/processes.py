"""Independent trainings in parallel: one process per core, with one thread each.

    parent    tasks, longest first -> [ process 1 | process 2 | ... ] -> results -> records

Steps on small batches gain nothing from a second thread. Only the parent writes. Child processes
ignore Ctrl-C, which the parent handles, and end with the parent, even after a kill -9.
"""

import itertools
import os
import signal
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, wait
from concurrent.futures.process import BrokenProcessPool
from typing import Any, TypeVar

from extract import RunError
from extract.cores import available_cores
from extract.portable import end_with_parent, keep_freed_memory

Task = TypeVar("Task")
Result = TypeVar("Result")

_process: dict[str, Any] = {}  # in a child: `prepare`, and its result `state` after the first call


def prepare_environment() -> None:
    """Set environment variables for training. Call this before PyTorch is imported, since it reads
    them on import. Child processes inherit them.

    Waiting threads sleep: spinning took 14 times the CPU time on a busy machine. Large tensors use
    huge pages, and freed memory is kept for the next step. Otherwise a step of a large head spends
    a third of its time on page faults.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    keep_freed_memory()


def plan_processes(tasks: int, device: str) -> tuple[int, int]:
    """The number of processes for N tasks, and of threads in each. A GPU has this process only.

    `tasks` counts all tasks of a command, finished ones included, so that a resumed run gives the
    same bits.
    """
    from extract.device import choose_device

    cores = available_cores()
    if choose_device(device).type != "cpu":
        return 1, cores
    processes = max(1, min(cores, tasks))
    return processes, cores // processes


def run_side_by_side(
    work: Callable[[Any, Task], Result],
    tasks: Sequence[Task],
    *,
    prepare: Callable[[], Any],
    processes: int,
    threads: int,
) -> Iterator[tuple[Task, Result]]:
    """Yield each task with `work(state, task)`, in the order in which they end; state = prepare().

    If the number of processes is 1, the work is done in this one. The error of a task is raised
    here and ends the others. RunError if a process dies.
    """
    if processes == 1 or not tasks:
        state = prepare() if tasks else None
        yield from ((task, work(state, task)) for task in tasks)
        return
    from joblib.externals.loky import ProcessPoolExecutor

    # loky replaces a process whose memory grew; its warning about that is misleading.
    warnings.filterwarnings("ignore", message="A worker stopped while some jobs were given")
    executor = ProcessPoolExecutor(
        processes,
        initializer=_initialize,
        initargs=(prepare,),
        env={"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)},
    )
    try:
        # Submit a few at a time: an executor that is shut down with tasks in its queue prints a
        # KeyError from one of its threads.
        upcoming = iter(tasks)
        waiting: dict[Any, Task] = {}
        while True:
            for task in itertools.islice(upcoming, processes + 1 - len(waiting)):
                waiting[executor.submit(_run, work, task)] = task
            if not waiting:
                break
            for future in wait(waiting, return_when=FIRST_COMPLETED).done:
                task = waiting.pop(future)
                yield task, future.result()
    except BrokenProcessPool as error:
        raise RunError(
            f"a training process died ({str(error).splitlines()[0]:.200}); if memory ran out, "
            "lower --at-once. Run the same command again to resume"
        ) from None
    finally:
        executor.shutdown(kill_workers=True)


def _initialize(prepare: Callable[[], Any]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    end_with_parent()
    keep_freed_memory()
    _process.clear()
    _process["prepare"] = prepare


def _run(work: Callable[[Any, Task], Result], task: Task) -> Result:
    if "state" not in _process:
        _process["state"] = _process["prepare"]()
    return work(_process["state"], task)
