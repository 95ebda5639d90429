"""How far a run is: each second on a terminal, each 30 s in a log, by frames and not by blocks; and its last line."""

import io
import sys
import time
from collections import Counter

import pytest

from extract import cli
from extract.cli import progress
from extract.workers import driver
from extract.workers.ray_pool import RayActorPool, _WorkerHandle


class FakeStore:
    num_views, frames_per_video = 2, 7
    provenance = {"sampling": {"frames": 5}}  # noqa: RUF012


class FakePool:
    """Settles ten frames each time that it is asked."""

    frames = 0

    def settled(self) -> int:
        self.frames += 10
        return self.frames


def states(screen: io.StringIO) -> set[str]:
    """What a bar has shown before its picture: how far it was."""
    return {part.partition("|")[0] for part in screen.getvalue().split("\r")}


def test_a_bar_moves_while_a_block_is_in_hand(monkeypatch):
    screen = io.StringIO()
    screen.isatty = lambda: True
    monkeypatch.setattr(sys, "stderr", screen)
    monkeypatch.setattr(driver, "SECONDS_PER_MOVE", 0.02)
    totals = Counter()
    with driver._shown_progress(FakePool(), totals, 300, FakeStore()):
        deadline = time.monotonic() + 60
        while len(states(screen)) < 7 and time.monotonic() < deadline:
            time.sleep(0.05)  # a bar appears after a second
        moved = states(screen)
        totals.update(videos=300, failed=2)
    assert len(moved) > 5
    last = screen.getvalue().strip().splitlines()[-1]
    assert "3000/3000" in last
    assert "300 of 300 videos, 2 failed" in last


def test_frames_of_a_lost_worker_are_taken_back(monkeypatch):
    monkeypatch.setattr(driver, "SECONDS_PER_MOVE", 60.0)
    pool = FakePool()
    pool.settled = lambda: 7
    with driver._shown_progress(pool, Counter(videos=3), 10, FakeStore()):
        pass  # 30 frames are handed in, whatever workers say


def test_a_log_has_a_line_each_thirty_seconds_with_the_time_that_is_left(monkeypatch, capsys):
    assert cli.LOG_SECONDS == 30
    monkeypatch.setattr(cli, "LOG_SECONDS", 0.3)
    with progress(total=100, unit="frame") as bar:
        for _ in range(40):
            time.sleep(0.05)
            bar.update()
    lines = [line for line in capsys.readouterr().err.splitlines() if line]
    assert 2 <= len(lines) < 40  # not one for each update
    assert all("\r" not in line and "frame/s" in line for line in lines)
    done, left = lines[0].split(" [")[0], lines[0].split("<")[1]
    assert "/100" in done
    assert left.startswith("00:0")


@pytest.mark.parametrize(
    ("totals", "expected"),
    [
        ({"frames": 100, "device": 8.5, "wait": 1.1}, "The limit was the backbone."),
        ({"frames": 100, "device": 2.0, "wait": 7.0}, "The limit was decoding."),
        ({"frames": 0}, "no frame was computed in 10.0 s: no video could be read"),
    ],
)
def test_the_limit_is_what_took_longer(totals, expected):
    assert driver._time_breakdown(Counter(totals), wall=10.0, workers=1).endswith(expected)


class FakeCluster:
    """Ray whose calls are answered at once, with what they were made of."""

    class exceptions:  # noqa: N801  # as in Ray
        RayError = RuntimeError

    def wait(self, calls, timeout):
        return calls, []

    def get(self, call):
        if isinstance(call, Exception):
            raise call
        return call


class FakeActor:
    def __init__(self, *answers):
        self.answers = list(answers)
        self.settled = self

    def options(self, concurrency_group):
        return self

    def remote(self):
        return self.answers.pop(0)


def test_workers_of_a_cluster_are_asked_how_far_they_are_without_waiting():
    pool = object.__new__(RayActorPool)
    pool._ray, pool._lost_frames = FakeCluster(), 5
    fine, dying, starting = (
        FakeActor(10, 20, 30),
        FakeActor(7, RuntimeError("lost"), 8),
        FakeActor(),
    )
    pool._workers = [
        _WorkerHandle(fine, ready=True),
        _WorkerHandle(dying, ready=True),
        _WorkerHandle(starting),
    ]
    seen = []
    for _ in range(3):
        pool._poll_progress()
        seen.append(pool.settled())
    assert seen == [5, 5 + 10 + 7, 5 + 20 + 7]  # what is asked is known the next time
