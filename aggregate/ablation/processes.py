"""Independent trainings side by side: one process per core, with one thread each.

    parent    tasks, longest first -> [ process 1 | process 2 | ... ] -> results, as they end -> the folder's records

Steps on small batches gain nothing from a second thread. Only the parent writes. Processes ignore
Ctrl-C, which is the parent's to decide, and die with it, also after a kill -9.
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
from extract.portable import end_with_parent

Task = TypeVar("Task")
Result = TypeVar("Result")

_process: dict[str, Any] = {}  # in a child: `prepare`, and once it was called its result as `state`


def prepare_environment() -> None:
    """Settings that PyTorch reads when it is loaded; call this before. Child processes inherit
    them.

    Threads that wait for each other must not spin: on a busy machine that took 14 times the CPU
    time. Large tensors in huge pages: a step of a large head otherwise spends a third of its time
    on page faults.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")


def plan_processes(tasks: int, device: str) -> tuple[int, int]:
    """How many processes for N tasks, and threads of each. A GPU is used by this process
    alone.

    Both are functions of all tasks of a command, not of those that are left: a resumed run has the
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
    """Each task with `work(prepare(), task)`, as they end; `prepare` is called once in each
    process.

    With one process everything happens in this one. An error of a task is raised here and ends the
    others; RunError if a process dies.
    """
    if processes == 1 or not tasks:
        state = prepare() if tasks else None
        yield from ((task, work(state, task)) for task in tasks)
        return
    from joblib.externals.loky import ProcessPoolExecutor

    # Its processes are replaced if their memory grew; the message takes that for a defect.
    warnings.filterwarnings("ignore", message="A worker stopped while some jobs were given")
    executor = ProcessPoolExecutor(
        processes,
        initializer=_begin,
        initargs=(prepare,),
        env={"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)},
    )
    try:
        # A few at a time: an executor that is shut down with tasks it has not handed out yet prints
        # a KeyError of its own thread.
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
            f"a training process died ({str(error).splitlines()[0]:.200}); if memory ran out, --at-once takes less. "
            "Run the same command again to go on"
        ) from None
    finally:
        executor.shutdown(kill_workers=True)


def _begin(prepare: Callable[[], Any]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    end_with_parent()
    _process.clear()
    _process["prepare"] = prepare


def _run(work: Callable[[Any, Task], Result], task: Task) -> Result:
    if "state" not in _process:
        _process["state"] = _process["prepare"]()
    return work(_process["state"], task)
