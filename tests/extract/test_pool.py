"""Decode children: whatever a child does, its job ends in time with a message, and the next job
runs."""

import gc
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import CancelledError
from pathlib import Path

import numpy as np
import psutil
import pytest

from decode_jobs import do, prepare_row
from extract import RunError
from extract.decode import VideoError
from extract.decode.container import LONGEST_SECONDS, time_limit
from extract.decode.jobs import Plan, decode_job
from extract.decode.pool import (
    ATTEMPTS,
    SLOTS_PER_CHILD,
    JobResult,
    SubprocessPool,
    memory_limit,
)
from extract.decode.transform import Preprocessing
from odd_files import write_pictures

SLOT = 1000
# Seconds until a test gives up; even on a busy machine nothing here takes more than a few.
PATIENCE = 30.0
FOREVER = 1000.0  # seconds of a job, or until it is given up: no test waits so long


def pool_of(workers: int = 1, *, timeout: float = 20.0, **changed) -> SubprocessPool:
    return SubprocessPool(
        do, **({"slot_bytes": SLOT, "workers": workers, "timeout": timeout} | changed)
    )


def wait_for(condition: Callable[[], object], what: str) -> None:
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end, f"waited {PATIENCE} s for {what}"
        time.sleep(0.01)


def pid_in(path: Path) -> int:
    wait_for(lambda: path.exists() and path.read_text(), f"a process to write {path.name}")
    return int(path.read_text())


def gone(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def children() -> set[int]:
    return {child.pid for child in psutil.Process().children(recursive=True) if not gone(child.pid)}


@pytest.fixture(scope="module")
def pool():
    """A pool of one child for the tests that do not harm it."""
    with pool_of() as pool:
        works(pool)
        yield pool


@pytest.fixture(autouse=True)
def _no_child_is_left(pool):
    before = children()
    yield
    wait_for(lambda: children() <= before, "children to be gone")


@pytest.fixture
def one_second_to_hang(monkeypatch) -> None:
    """Jobs that hang are given up after a second. Other jobs have enough time, on a busy machine
    too."""
    hang = ("hold the lock", "stop", "wait")
    monkeypatch.setattr(
        "extract.decode.pool.time_limit", lambda allowed, job: 1.0 if job in hang else allowed
    )


def works(pool: SubprocessPool) -> None:
    with pool.submit(("fill", 9)).result(PATIENCE) as finished:
        assert finished.failure == ""
        assert (finished.buffer == 9).all()


# -- jobs that end ---------------------------------------------------------------------------------------------------


def test_results_come_with_what_the_child_wrote(pool):
    futures = [pool.submit(("fill", number)) for number in range(20)]
    for number, future in enumerate(futures):
        with future.result(PATIENCE) as finished:
            assert (finished.result, finished.failure) == (number, "")
            assert finished.buffer.shape == (SLOT,)
            assert (finished.buffer == number).all()
        assert finished.buffer.size == 0  # released: another job uses the memory now


def test_a_child_works_ahead_until_its_slots_are_full(pool):
    futures = [pool.submit(("fill", number)) for number in range(SLOTS_PER_CHILD + 2)]
    finished = [future.result(PATIENCE) for future in futures[:SLOTS_PER_CHILD]]
    time.sleep(0.1)
    assert not any(future.done() for future in futures[SLOTS_PER_CHILD:])
    assert [int(one.buffer[0]) for one in finished] == list(
        range(SLOTS_PER_CHILD)
    )  # no slot is overwritten
    for one in finished:
        one.release()
        one.release()  # a second release changes nothing
    for number, future in enumerate(futures[SLOTS_PER_CHILD:], SLOTS_PER_CHILD):
        with future.result(PATIENCE) as one:
            assert (one.buffer == number).all()
    works(pool)


@pytest.mark.parametrize(
    ("job", "failure"),
    [
        (("bad video", "the file is empty (0 bytes)"), "the file is empty (0 bytes)"),
        (("raise", ValueError("got 3, expected 4")), "ValueError: got 3, expected 4"),
        (
            ("raise", MemoryError()),
            "decoding it takes more than the 2.7 GB that a process may take",
        ),
    ],
)
def test_what_a_job_raises_is_its_failure(job, failure, pool):
    for _ in range(SLOTS_PER_CHILD + 1):  # a failed job holds no slot
        finished = pool.submit(job).result(PATIENCE)
        assert finished.failure == failure
    works(pool)


def test_a_job_that_cannot_be_sent_raises_and_takes_no_slot(pool):
    for _ in range(SLOTS_PER_CHILD + 1):
        with pytest.raises(Exception, match="pickle"):
            pool.submit(("fill", lambda: 0)).result(PATIENCE)
    works(pool)


def test_cpu_seconds_are_the_jobs_own(pool):
    with (
        pool.submit(("burn", 0.2)).result(PATIENCE) as burnt,
        pool.submit(("sleep", 0.2)).result(PATIENCE) as slept,
    ):
        assert 0.2 <= burnt.cpu_seconds < 0.4
        assert slept.cpu_seconds < 0.1


def test_a_child_never_imports_torch(pool):
    with pool.submit(("modules", None)).result(PATIENCE) as finished:
        assert "extract.decode.pool" in finished.result or "__main__" in finished.result
        assert not {"torch", "timm", "zarr", "ray"} & set(finished.result)


def test_a_child_starts_without_a_word(capfd):
    """For example without runpy's warning, which appears if a child's imports have imported its own
    module already."""
    with pool_of() as fresh:
        works(fresh)
    assert capfd.readouterr() == ("", "")


def test_ctrl_c_is_the_parents_to_decide(pool):
    with pool.submit(("process", None)).result(PATIENCE) as finished:
        child = finished.result
    sleeping = pool.submit(("sleep", 0.3))
    os.kill(child, signal.SIGINT)
    with sleeping.result(PATIENCE) as finished:
        assert finished.result == 0.3
    with pool.submit(("process", None)).result(PATIENCE) as finished:
        assert finished.result == child


def test_several_children_work_at_the_same_time(tmp_path):
    with pool_of(3) as pool:
        # One after the other, the first would wait for ever.
        futures = [pool.submit(("meet", (str(tmp_path), number, 3))) for number in range(3)]
        for future in futures:
            with future.result(PATIENCE) as finished:
                assert finished.failure == ""


def test_videos_are_prepared_as_in_this_process(codec_clips, broken_clips):
    see = Preprocessing(32, 40, "bilinear", (0.5,) * 3, (0.5,) * 3)
    plan = Plan(frames=3, crops=3, augment_passes=2, preprocessing=see, seed=1, decoder="pyav")
    out = np.zeros((5, 3, 32, 32, 3), np.uint8)
    with SubprocessPool(decode_job, slot_bytes=out.size, workers=1, timeout=20) as pool:
        good = pool.submit((str(codec_clips / "vp9.webm"), [("id", None)], plan))
        bad = pool.submit((str(broken_clips / "zero_bytes.mp4"), [("id", None)], plan))
        expected = prepare_row(str(codec_clips / "vp9.webm"), "id", plan, out)
        with good.result(PATIENCE) as finished:
            assert finished.buffer.tobytes() == out.tobytes()
            assert np.array_equal(finished.result[0].indices, expected.indices)
        with bad.result(PATIENCE) as finished:
            assert finished.result[0].reason.startswith("the file is empty")


# -- jobs that do not ------------------------------------------------------------------------------------------------


def test_a_child_that_holds_pythons_lock_for_ever_is_given_up(one_second_to_hang, tmp_path):
    with pool_of() as pool:
        works(pool)
        started = time.monotonic()
        finished = pool.submit(("hold the lock", str(tmp_path / "pid"))).result(PATIENCE)
        assert time.monotonic() - started >= 1.0
        assert (
            finished.failure
            == "given up after 1 s (--video-timeout): decoding hangs or is too slow"
        )
        wait_for(lambda: gone(pid_in(tmp_path / "pid")), "the child to be killed")
        works(pool)


def test_a_stopped_child_is_given_up(one_second_to_hang, tmp_path):
    with pool_of() as pool:
        works(pool)
        future = pool.submit(("stop", str(tmp_path / "pid")))
        assert future.result(PATIENCE).failure.startswith("given up after 1 s")
        wait_for(lambda: gone(pid_in(tmp_path / "pid")), "the child to be killed")
        works(pool)


def test_a_child_stopped_between_two_jobs_is_given_up(one_second_to_hang, tmp_path):
    with pool_of() as pool:
        with pool.submit(("process", None)).result(PATIENCE) as finished:
            child = finished.result
        os.kill(child, signal.SIGSTOP)
        never = pool.submit(("wait", str(tmp_path / "pid")))
        assert never.result(PATIENCE).failure.startswith("given up after 1 s")
        assert not (tmp_path / "pid").exists()
        works(pool)


def test_a_child_that_crashes_is_tried_again_and_then_given_up(tmp_path):
    with pool_of() as pool:
        finished = pool.submit(("abort", str(tmp_path / "tries"))).result(PATIENCE)
        assert finished.failure == f"the decoding process died {ATTEMPTS} times (signal 6, SIGABRT)"
        assert (tmp_path / "tries").read_text() == "x" * ATTEMPTS
        works(pool)


def test_a_job_whose_child_someone_killed_is_done_by_the_next(tmp_path):
    with pool_of() as pool:
        with pool.submit(("abort once", str(tmp_path / "mark"))).result(PATIENCE) as finished:
            assert (finished.result, finished.failure) == ("done", "")
        with pool.submit(("process", None)).result(PATIENCE) as finished:
            child = finished.result
        os.kill(child, signal.SIGKILL)  # while it is idle
        wait_for(lambda: gone(child), "the child to be gone")
        works(pool)


def test_one_bad_child_does_not_hold_up_the_others():
    with pool_of(2, timeout=FOREVER) as pool:
        bad = pool.submit(("hold the lock", None))
        for number in range(20):
            with pool.submit(("fill", number)).result(PATIENCE) as finished:
                assert finished.failure == ""
        assert not bad.done()


def test_a_job_that_takes_too_much_memory_fails_alone(pool):
    allowed = memory_limit(SLOT)
    before = pool.submit(("process", None)).result(PATIENCE).result
    finished = pool.submit(("allocate", allowed)).result(PATIENCE)
    assert finished.failure == "decoding it takes more than the 2.7 GB that a process may take"
    with pool.submit(("process", None)).result(PATIENCE) as after:
        assert after.result == before  # the child survives
    with pool.submit(("allocate", allowed // 2)).result(PATIENCE) as less:
        assert less.failure == ""


def test_a_video_that_takes_too_much_memory_fails_alone(tmp_path):
    large = write_pictures(tmp_path / "large.mp4", (2000, 2000), 3)
    small = write_pictures(tmp_path / "small.mp4", (64, 48), 3)
    plan = Plan(3, 1, 0, Preprocessing(32, 40, "bilinear", (0.5,) * 3, (0.5,) * 3))
    with SubprocessPool(do, slot_bytes=plan.slot_bytes, workers=1, timeout=30) as pool:
        for path, fails in ((large, True), (small, False), (large, True)):
            job = (str(path), [("a", None)], plan)
            with pool.submit(("with little memory", job)).result(PATIENCE) as finished:
                # FFmpeg does not always name the error correctly.
                assert (
                    bool(finished.failure) or isinstance(finished.result[0], VideoError)
                ) == fails


# -- the deadline ----------------------------------------------------------------------------------------------------


def test_a_large_file_has_longer(tmp_path):
    """It has one second more per 2 MB of file size, which a header cannot change."""
    job = tmp_path / "sleep"  # the job's name is its file
    with pool_of(timeout=0.1) as pool:
        for size, allowed in ((200_000_000, 100.1), (400_000, 0.3), (0, 0.1)):
            with job.open("wb") as file:
                file.truncate(size)
            assert time_limit(0.1, job) == pytest.approx(allowed)
            with pool.submit((str(job), 0.5)).result(PATIENCE) as finished:
                late = f"given up after {allowed:.3g} s (--video-timeout): decoding hangs or is too slow"
                assert finished.failure == ("" if allowed > 0.5 else late)


def test_the_longest_time_is_an_hour_or_what_was_chosen(tmp_path):
    with (tmp_path / "huge").open("wb") as file:
        file.truncate(1 << 40)
    assert time_limit(60, tmp_path / "huge") == LONGEST_SECONDS == 3600
    assert time_limit(7200, tmp_path / "huge") == 7200
    assert time_limit(60, tmp_path / "absent") == 60


def test_waiting_for_a_child_is_not_the_jobs_time():
    """The time in the queue and the start of a child do not count."""
    with pool_of(timeout=2.0) as pool:
        futures = [pool.submit(("sleep", 0.15)) for _ in range(16)]
        for future in futures:
            with future.result(PATIENCE) as finished:
                assert finished.failure == ""


# -- the pool --------------------------------------------------------------------------------------------------------


def test_descriptors_and_children_stay_the_same_over_many_jobs(tmp_path):
    process = psutil.Process()
    before = process.num_fds()
    with pool_of(2) as pool:
        for future in [pool.submit(("sleep", 0.01)) for _ in range(2)]:
            future.result(PATIENCE).release()
        wait_for(lambda: len(children()) >= 2, "two children")
        working, alive = process.num_fds(), len(children())
        for number in range(200):
            pool.submit(("fill", number % 256)).result(PATIENCE).release()
        assert (
            pool.submit(("exit", 7))
            .result(PATIENCE)
            .failure.endswith("died 3 times (exit status 7)")
        )
        works(pool)
        works(pool)
        assert process.num_fds() <= working
        assert len(children()) <= alive
    del pool  # its memory stays as long as it has readers
    gc.collect()
    assert process.num_fds() <= before


def test_closing_while_busy_is_quick(tmp_path):
    pool = pool_of(2, timeout=FOREVER)
    busy = [pool.submit(("hold the lock", str(tmp_path / name))) for name in ("one", "two")]
    waiting = [pool.submit(("fill", 1)) for _ in range(50)]
    pids = [pid_in(tmp_path / name) for name in ("one", "two")]
    started = time.monotonic()
    pool.close()
    assert time.monotonic() - started < PATIENCE
    assert all(gone(pid) for pid in pids)
    assert [future.result(0).failure for future in busy] == ["cancelled"] * 2
    for future in waiting:
        assert future.cancelled() or future.result(0).failure == "cancelled"
    with pytest.raises(CancelledError):
        waiting[-1].result(0)


@pytest.mark.parametrize("seconds", [0.0, 0.05, 0.2, 0.5])
def test_closing_while_children_start_is_quick(seconds):
    pool = pool_of(2, timeout=FOREVER)
    futures = [pool.submit(("hold the lock", None)) for _ in range(2)]
    time.sleep(seconds)
    started = time.monotonic()
    pool.close()
    assert time.monotonic() - started < PATIENCE
    assert all(future.cancelled() or future.result(0).failure == "cancelled" for future in futures)


def test_closing_with_results_that_nobody_released_is_quick():
    pool = pool_of(timeout=FOREVER)
    futures = [pool.submit(("fill", 5)) for _ in range(SLOTS_PER_CHILD + 3)]
    finished = [future.result(PATIENCE) for future in futures[:SLOTS_PER_CHILD]]
    started = time.monotonic()
    pool.close()
    assert time.monotonic() - started < PATIENCE
    assert all(
        (one.buffer == 5).all() for one in finished
    )  # still there: the memory lives as long as its readers
    assert all(future.cancelled() for future in futures[SLOTS_PER_CHILD:])


def test_a_function_that_children_cannot_import_says_so(capfd, monkeypatch):
    import decode_jobs

    monkeypatch.setattr(decode_jobs, "only_here", lambda job, out: None, raising=False)
    decode_jobs.only_here.__module__, decode_jobs.only_here.__qualname__ = (
        "decode_jobs",
        "only_here",
    )
    with (
        SubprocessPool(decode_jobs.only_here, slot_bytes=SLOT, workers=1, timeout=20) as pool,
        pytest.raises(
            RunError,
            match=r"a decode process does not start \(exit status 1\); its error is printed above",
        ),
    ):
        pool.submit(("fill", 1)).result(PATIENCE)
    assert "only_here" in capfd.readouterr().err


@pytest.mark.skipif(
    sys.platform != "linux", reason="asks the kernel to end children with their parent"
)
@pytest.mark.parametrize("kind", ["hold the lock", "wait"])
def test_kill_9_of_the_parent_leaves_no_child(kind, tmp_path):
    program = (
        "import sys, time\n"
        "from decode_jobs import do\n"
        "from extract.decode.pool import SubprocessPool\n"
        "pool = SubprocessPool(do, slot_bytes=1000, workers=3, timeout=1000)\n"
        "for path in sys.argv[2:]: pool.submit((sys.argv[1], path))\n"
        "time.sleep(1000)\n"
    )
    paths = [tmp_path / str(number) for number in range(2)]  # the third child does not even start
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    parent = subprocess.Popen(
        [sys.executable, "-c", program, kind, *map(str, paths)], env=environment
    )
    try:
        pids = [pid_in(path) for path in paths]
        assert not any(gone(pid) for pid in pids)
    finally:
        parent.kill()
        parent.wait()
    for pid in pids:
        wait_for(lambda pid=pid: gone(pid), f"child {pid} to end with its parent")


def test_help_from_elsewhere_takes_jobs_while_our_child_is_busy():
    def elsewhere(job):
        return JobResult(job[1], np.full(SLOT, job[1], np.uint8))

    with pool_of(timeout=FOREVER) as pool:
        busy = pool.submit(("sleep", FOREVER))
        wait_for(busy.running, "our child to take a job")
        pool.add_remote_executor(elsewhere, concurrency=2)
        futures = [pool.submit(("fill", number)) for number in range(40)]
        for number, future in enumerate(futures):  # more jobs than slots: each slot must come back
            with future.result(PATIENCE) as finished:
                assert (finished.result, finished.failure) == (number, "")
                assert (finished.buffer == number).all()
        assert not busy.done()


def test_a_job_whose_help_is_lost_is_done_here_before_later_ones_fill_every_slot():
    called = []

    def elsewhere(job):
        called.append(job)
        raise ConnectionError("the node is gone")

    with pool_of() as pool:
        pool.add_remote_executor(elsewhere, concurrency=2)
        futures = [pool.submit(("fill", number)) for number in range(4 * SLOTS_PER_CHILD)]
        for number, future in enumerate(futures):
            with future.result(PATIENCE) as finished:
                assert (finished.result, finished.failure) == (number, "")
                assert (finished.buffer == number).all()
        assert 1 <= len(called) <= 2  # each helper ends with its first loss


def test_closing_does_not_wait_for_help():
    asked, over = [], threading.Event()

    def elsewhere(job):
        asked.append(job)
        over.wait(2 * PATIENCE)
        return JobResult(job[1], np.zeros(SLOT, np.uint8))

    started = time.monotonic()
    with pool_of() as pool:
        pool.add_remote_executor(elsewhere, concurrency=1)
        for _ in range(SLOTS_PER_CHILD + 2):  # more jobs than the child has slots
            pool.submit(("fill", 1))
        wait_for(lambda: asked, "help to be asked")
    assert time.monotonic() - started < PATIENCE
    over.set()
