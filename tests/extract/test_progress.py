"""Progress of a run: every second on a terminal, every 30 s in a log, by frames instead of blocks;
and its last line."""

import io
import sys
import time
from collections import Counter
from itertools import count
from pathlib import Path

import numpy as np
import pytest

from extract import RunError, cli
from extract.listing.videos import Video
from extract.options import Options
from extract.store import Outcomes
from extract.workers import progress, ray_pool
from extract.workers.blocks import BackboneInfo, Block, BlockResult
from extract.workers.ray_pool import RayActorPool
from simulated_ray import PendingError, RayActorError, SimulatedRay


class FakeStore:
    num_views, frames_per_video = 2, 7
    provenance = {"sampling": {"frames": 5}}  # noqa: RUF012


class FakePool:
    """Completes ten frames on each call."""

    frames = 0

    def settled(self) -> int:
        self.frames += 10
        return self.frames


def states(screen: io.StringIO) -> set[str]:
    """The progress texts that a bar has shown, without the bar itself."""
    return {part.partition("|")[0] for part in screen.getvalue().split("\r")}


def test_a_bar_moves_while_a_block_is_in_hand(monkeypatch):
    screen = io.StringIO()
    screen.isatty = lambda: True
    monkeypatch.setattr(sys, "stderr", screen)
    monkeypatch.setattr(progress, "SECONDS_PER_MOVE", 0.02)
    totals = Counter()
    with progress.shown_progress(FakePool(), totals, 300, 10):
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
    monkeypatch.setattr(progress, "SECONDS_PER_MOVE", 60.0)
    pool = FakePool()
    pool.settled = lambda: 7
    with progress.shown_progress(pool, Counter(videos=3), 10, 10):
        pass  # 30 frames are finished, whatever workers report


def test_a_log_has_a_line_each_thirty_seconds_with_the_time_that_is_left(monkeypatch, capsys):
    assert cli.LOG_SECONDS == 30
    clock = [1000.0]
    monkeypatch.setattr("tqdm.std.time", lambda: clock[0])
    with cli.progress(total=1000, unit="frame") as bar:
        for _ in range(40):
            clock[0] += 2.5
            bar.update(10)
    lines = [line for line in capsys.readouterr().err.splitlines() if line]
    assert [line.partition("%")[0].strip() for line in lines] == ["12", "24", "36", "40"]
    assert all("\r" not in line and "frame/s" in line for line in lines)
    done, left = lines[0].split(" [")[0], lines[0].split("<")[1]
    assert "120/1000" in done
    assert left.startswith("03:40")


@pytest.mark.parametrize(
    ("totals", "expected"),
    [
        ({"frames": 100, "device": 8.5, "wait": 1.1}, "The limit was the backbone."),
        ({"frames": 100, "device": 2.0, "wait": 7.0}, "The limit was decoding."),
        ({"frames": 0}, "no frame was computed in 10.0 s: no video could be read"),
    ],
)
def test_the_limit_is_what_took_longer(totals, expected):
    assert progress.time_breakdown(Counter(totals), wall=10.0, workers=1).endswith(expected)


def simulated_pool(monkeypatch, answer, **changed) -> RayActorPool:
    """A pool over a simulated cluster of three nodes; nodes and workers are polled on each turn."""
    ray = SimulatedRay(answer, [{"CPU": 1.0}] * 3, **changed)
    monkeypatch.setitem(sys.modules, "ray", ray)
    monkeypatch.setattr(ray_pool, "NODE_POLL_SECONDS", -1.0)
    pool = RayActorPool(Options(Path("videos"), "feats.zarr", device="cpu"))
    pool.describe()
    pool.check("nonce", "video", "version")
    return pool


INFO = BackboneInfo({"precision": "fp32"}, 1, 4, 1000, frames_per_video=5, description="")
BLOCKS = [Block(number, (number,), (Video(f"{number}.mp4", "", 0),)) for number in range(6)]


def result_of(block: Block) -> BlockResult:
    outcome = Outcomes.failed(np.array(block.rows), "", 1, 1)
    return BlockResult(block.number, outcome, "here", 5, {})


def test_workers_of_a_cluster_are_asked_how_far_they_are_without_waiting(monkeypatch):
    fine, dying, _starting = range(3)
    settled = {fine: count(10, 10), dying: iter([7, RayActorError("lost"), 8, 9])}
    seen: list[int] = []

    def answer(actor, method, *_):
        match method:
            case "describe":
                return INFO
            case "check" if actor in (fine, dying):
                return None
            case "settled":
                if isinstance(answered := next(settled[actor]), Exception):
                    raise answered
                return answered
        raise PendingError

    def on_wait() -> None:
        seen.append(pool.settled())
        if len(seen) == 5:
            raise KeyboardInterrupt

    pool = simulated_pool(monkeypatch, answer, on_wait=on_wait)
    with pytest.raises(KeyboardInterrupt):
        list(pool.extract(BLOCKS))
    # An answer is used on the next turn. A worker that does not answer keeps its last value.
    assert seen == [0, 10, 20 + 7, 30 + 7, 40 + 8]


def test_videos_of_a_lost_worker_count_and_its_other_frames_are_taken_back(monkeypatch, capsys):
    turns = 0

    def answer(actor, method, *arguments):
        match method:
            case "describe":
                return INFO
            case "check" if actor == 0:
                return None
            case "run" if arguments[0].number == 0:
                return [result_of(arguments[0])]
            case "run" if turns > 3:
                raise RayActorError("lost")
            case "settled":
                return 9
        raise PendingError

    def on_wait() -> None:
        nonlocal turns
        turns += 1
        seen.append(pool.settled())
        if turns == 6:
            raise KeyboardInterrupt

    seen: list[int] = []
    pool = simulated_pool(monkeypatch, answer, on_wait=on_wait)
    with pytest.raises(KeyboardInterrupt):
        list(pool.extract(BLOCKS))
    assert seen[1:4] == [9, 9, 9]
    assert seen[-1] == INFO.frames_per_video  # frames of the one video that it had finished
    assert "a worker was lost (RayActorError); 3 blocks go to another" in capsys.readouterr().err


def test_a_cluster_that_never_gets_a_worker_says_so(monkeypatch):
    monkeypatch.setattr(ray_pool, "SECONDS_WITHOUT_WORKERS", 1.0)

    def answer(*_):
        raise PendingError

    with pytest.raises(
        RunError, match=r"asks for \{'num_cpus': 1\}, the cluster has \{'CPU': 3.0, 'GPU': 0\}"
    ):
        simulated_pool(monkeypatch, answer)
