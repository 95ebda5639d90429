"""Batches under way on a fake device, which computes late and watches accesses to its memory."""

import gc
import tracemalloc
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import pretend
from extract.backbone.batches import Batches
from extract.backbone.model import load_trunk
from extract.backbone.torch_engine import gpu_slots, on_cpu
from extract.decode.jobs import Job, Prepared
from extract.decode.pool import JobResult
from extract.decode.transform import Clips, Preprocessing
from extract.listing.videos import Video
from extract.options import Options
from extract.store import FAILED, OK
from extract.workers.blocks import Block
from extract.workers.worker import Worker

PIXELS, DIM = 2, 5


class ReusedError(AssertionError):
    """The memory of a batch was written while the batch was under way."""


@dataclass
class FakeDevice:
    """Computes each batch as late as possible, when it is waited for; a batch named in `failing`
    raises."""

    seconds: float = 0.0  # seconds that it reports for a batch
    failing: frozenset[int] = frozenset()
    launched: int = 0
    most_under_way: int = 0
    under_way: int = 0
    batches: list[np.ndarray] = field(default_factory=list)

    def slots(self, count: int, size: int) -> "list[FakeSlot]":
        return [FakeSlot(self, size) for _ in range(count)]


class FakeSlot:
    """As `CudaSlot`: results exist only after `wait`, and frames are read long after `launch`
    returned."""

    def __init__(self, device: FakeDevice, size: int):
        self.size, self._device = size, device
        self._frames = np.full(
            (size, PIXELS, PIXELS, 3), 77, np.uint8
        )  # meaningless values that must never be seen
        self._features = np.full((size, DIM), np.nan, np.float16)
        self._number: int | None = None  # number of the batch that is under way

    def put(self, place: int, frames: np.ndarray) -> None:
        if self._number is not None:
            raise ReusedError
        self._frames[place : place + len(frames)] = frames

    def launch(self, count: int) -> None:
        if self._number is not None:
            raise ReusedError
        self._frames[count:] = 0
        self._features[:] = np.nan
        device = self._device
        self._number, device.launched = device.launched, device.launched + 1
        device.under_way += 1
        device.most_under_way = max(device.most_under_way, device.under_way)

    def wait(self) -> tuple[np.ndarray, float]:
        number, self._number = self._number, None
        assert number is not None, "waited for a batch that is not under way"
        self._device.under_way -= 1
        if number in self._device.failing:
            raise RuntimeError(f"batch {number} is lost")
        self._device.batches.append(self._frames.copy())
        self._features[:] = features_of(self._frames)
        return self._features, self._device.seconds


def features_of(frames: np.ndarray) -> np.ndarray:
    """The features that the device computes, one frame at a time."""
    return frames.reshape(len(frames), PIXELS * PIXELS * 3)[:, :DIM].astype(
        np.float16
    ) * np.float16(0.5)


def noise(count: int, *, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(1, 256, (count, PIXELS, PIXELS, 3), dtype=np.uint8)


def through(batches: Batches, frames: np.ndarray, features: np.ndarray) -> None:
    batches.add(frames, features)
    batches.finish()


def accept(features: np.ndarray) -> None:
    pass


@settings(max_examples=60)
@given(
    videos=st.lists(st.integers(0, 23), max_size=12),
    size=st.integers(1, 9),
    slots=st.integers(1, 4),
)
def test_every_frame_gets_its_own_features(videos: list[int], size: int, slots: int) -> None:
    """For any number of batches under way, batches are whole and in order, and padded with zeros at
    the end."""
    device = FakeDevice()
    frames = noise(sum(videos))
    features = np.full((len(frames), DIM), np.nan, np.float16)
    batches = Batches(device.slots(slots, size), check=accept)
    start = 0
    for count in videos:
        video = frames[start : start + count].copy()
        batches.add(video, features[start:])
        video[:] = 0  # the caller's memory holds another video now
        start += count
    batches.finish()
    np.testing.assert_array_equal(features, features_of(frames))
    assert device.launched == -(-len(frames) // size)
    assert device.under_way == 0
    padded = np.zeros((device.launched * size, PIXELS, PIXELS, 3), np.uint8)
    padded[: len(frames)] = frames
    np.testing.assert_array_equal(np.concatenate([padded[:0], *device.batches]), padded)


@pytest.mark.parametrize("slots", [1, 2, 3])
def test_so_many_batches_are_under_way_and_no_more(slots: int) -> None:
    device = FakeDevice(seconds=0.02)
    frames = noise(8 * 4)
    features = np.zeros((len(frames), DIM), np.float16)
    batches = Batches(device.slots(slots, 4), check=accept)
    batches.add(frames, features)
    batches.finish()
    assert device.most_under_way == slots
    assert batches.seconds == pytest.approx(8 * 0.02)
    np.testing.assert_array_equal(features, features_of(frames))


def test_a_host_goes_on_while_a_device_computes() -> None:
    """Of three slots, two are under way on a device that has finished nothing yet, while a third
    batch is filled."""
    device = FakeDevice()
    frames, features = noise(5), np.zeros((5, DIM), np.float16)
    batches = Batches(device.slots(3, 2), check=accept)
    batches.add(frames, features)  # two batches and a half
    assert device.under_way == 2
    assert not device.batches
    batches.finish()
    np.testing.assert_array_equal(features, features_of(frames))


def test_features_come_without_finish_once_their_batch_is_back() -> None:
    device = FakeDevice()
    frames = noise(12)
    features = np.full((12, DIM), np.nan, np.float16)
    batches = Batches(device.slots(3, 2), check=accept)
    batches.add(frames, features)  # six batches, of which two may still be under way
    np.testing.assert_array_equal(features[:8], features_of(frames[:8]))
    batches.finish()
    batches.finish()  # nothing is left
    np.testing.assert_array_equal(features, features_of(frames))


@pytest.mark.parametrize("failing", [0, 1, 4])
def test_an_error_while_two_batches_are_under_way(failing: int) -> None:
    """It is raised once, the other batches under way are waited for, and the same slots continue as
    if nothing had happened."""
    device = FakeDevice(failing=frozenset((failing,)))
    frames, features = noise(5 * 3), np.zeros((15, DIM), np.float16)
    slots = device.slots(3, 3)
    batches = Batches(slots, check=accept)
    with pytest.raises(RuntimeError, match=f"batch {failing} is lost"):
        through(batches, frames, features)
    assert device.under_way == 0
    np.testing.assert_array_equal(features[: 3 * failing], features_of(frames[: 3 * failing]))
    again = np.zeros_like(features)
    for one in (batches, Batches(slots, check=accept)):
        again[:] = 0
        one.add(frames, again)
        one.finish()
        np.testing.assert_array_equal(again, features_of(frames))


def test_a_batch_that_cannot_be_launched() -> None:
    device = FakeDevice()
    slots = device.slots(3, 2)
    batches = Batches(slots, check=accept)
    features = np.zeros((6, DIM), np.float16)
    batches.add(noise(4), features)
    launch, slots[2].launch = slots[2].launch, lambda count: (launch(count), 1 / 0)
    with pytest.raises(ZeroDivisionError):
        batches.add(noise(2), features[4:])
    assert device.under_way == 0


def test_bad_features_are_refused_before_they_are_kept() -> None:
    """The check sees each batch without its padding."""
    seen: list[np.ndarray] = []

    def refuse_17(features: np.ndarray) -> None:
        seen.append(features.copy())
        if (features == 17).any():
            raise ValueError(f"17 among {len(features)}")

    frames = np.full((7, PIXELS, PIXELS, 3), 10, np.uint8)
    frames[6] = 34
    features = np.zeros((7, DIM), np.float16)
    batches = Batches(FakeDevice().slots(3, 3), check=refuse_17)
    batches.add(frames, features)
    with pytest.raises(ValueError, match=r"17 among 1$"):
        batches.finish()
    assert [len(one) for one in seen] == [3, 3, 1]
    assert (features[6] == 0).all()


def test_memory_does_not_grow() -> None:
    """Thousands of batches run, also after errors; filled targets are released."""
    device = FakeDevice(failing=frozenset(range(100, 4000, 100)))
    device.batches = _Forgetting()
    batches = Batches(device.slots(3, 4), check=accept)
    frames, features = noise(4), np.zeros((4, DIM), np.float16)

    def work(count: int) -> None:
        for _ in range(count):
            try:
                batches.add(frames, features)
            except RuntimeError:
                continue
        gc.collect()

    work(300)
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        work(1500)
        grown = tracemalloc.get_traced_memory()[0] - before
    finally:
        tracemalloc.stop()
    assert grown < 20_000


# -- the slots of a GPU, on a pretended one that does everything at once and remembers what it was asked for ---------


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[deque[str]]:
    """The calls that a simulated GPU gets."""
    pretend.begin(monkeypatch.setattr)
    with pretend.CudaIsTheCpu():
        yield pretend.calls


def compute(frames: torch.Tensor) -> torch.Tensor:
    """What `features_of` computes, but with PyTorch."""
    return frames.flatten(1)[:, :DIM].to(torch.float16) * 0.5


def test_the_slots_of_a_gpu_copy_on_one_stream_and_compute_on_another(calls) -> None:
    batch = torch.zeros(4, PIXELS, PIXELS, 3, dtype=torch.uint8)
    run = pretend.compute(compute)
    slots = gpu_slots(run, batch, DIM, device=torch.device("cuda"), form="eager")
    assert len(slots) == 3
    assert [*calls] == ["all is done"]
    frames = noise(22)
    features = np.zeros((22, DIM), np.float16)
    batches = Batches(slots, check=accept)
    batches.add(frames[:9], features)
    batches.add(torch.from_numpy(frames[9:12]), features[9:])  # decoded on the GPU
    batches.add(frames[12:], features[12:])
    batches.finish()
    np.testing.assert_array_equal(features, features_of(frames))
    assert batches.seconds == 6 * 1.5
    copying, computing = "stream 1", "stream 2"
    launch = [
        f"record on {copying}",
        f"wait on {computing}",
        f"record on {computing}",
        f"compute on {computing}",
        f"record on {computing}",
    ]
    told = [call for call in calls if call not in ("all is done", f"kept for {copying}")]
    assert told[:5] == launch
    assert told[5:10] == launch  # two are under way before the host waits for one
    assert told.count("the host waits") == 6
    assert calls.count(f"kept for {copying}") == 1


def test_a_graph_is_replayed_over_the_memory_it_was_recorded_on(calls) -> None:
    def run(frames: torch.Tensor) -> torch.Tensor:
        assert torch.is_inference_mode_enabled()
        return compute(frames)

    batch = torch.zeros(4, PIXELS, PIXELS, 3, dtype=torch.uint8)
    run = pretend.compute(run)
    slots = gpu_slots(run, batch, DIM, device=torch.device("cuda"), form="graphs")
    runs = "compute on stream 2"
    assert calls.count(runs) == 4  # three that warm up, and the one that is recorded
    frames, features = noise(30), np.zeros((30, DIM), np.float16)
    through(Batches(slots, check=accept), frames, features)
    np.testing.assert_array_equal(features, features_of(frames))
    assert calls.count(runs) == 4
    assert calls.count("the host waits") == 8


def test_the_compiler_takes_what_a_backbone_runs(monkeypatch: pytest.MonkeyPatch, request) -> None:
    """Only the compiler's first half runs, which reads the Python. The second half would generate
    kernels for a minute."""
    compiler, is_available = torch.compile, torch.cuda.is_available
    request.getfixturevalue("calls")
    monkeypatch.setattr("torch.cuda.is_available", is_available)  # the compiler would read it
    monkeypatch.setattr(
        "torch.compile", lambda run, dynamic: compiler(run, dynamic=dynamic, backend="eager")
    )
    monkeypatch.setattr("extract.backbone.torch_engine._captured", lambda run, frames, stream: run)
    trunk = load_trunk("test_resnet", weights="random")
    engine = on_cpu(trunk, precision="fp32", threads=1)
    frames = np.random.default_rng(0).integers(0, 256, (5, 160, 160, 3), dtype=np.uint8)
    batch = torch.zeros(8, 160, 160, 3, dtype=torch.uint8)
    slots = gpu_slots(engine._run, batch, trunk.dim, device=torch.device("cpu"), form="compiled")
    features, expected = np.zeros((2, 5, trunk.dim), np.float16)
    through(Batches(slots, check=accept), frames, features)
    through(Batches(engine.slots, check=accept), frames, expected)
    np.testing.assert_allclose(features, expected, rtol=0.01)


class _Forgetting(list):
    def append(self, one: object) -> None:
        pass


# -- batches of a worker -------------------------------------------------------------------------------------------


class FakeBackbone:
    """The part of a Backbone that a worker uses."""

    device, dim, clips, clip_options = "cpu", DIM, None, {}
    preprocessing = Preprocessing(PIXELS, PIXELS, "bilinear", (0.5,) * 3, (0.5,) * 3)

    def __init__(self, device: FakeDevice):
        self.slots = device.slots(3, 4)

    def batches(self, **_: object) -> Batches:
        return Batches(self.slots, check=accept)


class FakePool:
    """Everything is decoded already. Row `1-0` has the first three of the frames
    `noise(6, seed=1)`, row `1-1` the others."""

    def __init__(self, *_: object, **__: object):
        pass

    def add_remote_executor(self, execute: object, *, concurrency: int) -> None:
        pass

    def submit(self, job: Job) -> "Future[JobResult]":
        _, [(row_id, _)], _ = job
        seed, k = map(int, row_id.split("-"))
        frames = noise(6, seed=seed)[3 * k : 3 * k + 3]
        clips = np.arange(3).reshape(1, 3, 1)
        prepared = Prepared(np.zeros(3, "<i4"), np.zeros(3, "<f4"), clips, 9)
        result: Future[JobResult] = Future()
        result.set_result(JobResult([prepared], frames.reshape(-1)))
        return result

    def close(self) -> None:
        pass


class FakeStore:
    def __init__(self) -> None:
        self.written: dict[int, np.ndarray] = {}

    def open(self, path: str, *, writable: bool) -> "FakeStore":
        return self

    def write_block(self, number: int, features: np.ndarray, rows: np.ndarray) -> None:
        self.written[number] = features[:, 0].copy()


def worker_on(
    device: FakeDevice, monkeypatch: pytest.MonkeyPatch, **options: Any
) -> tuple[Worker, list[Block], dict[int, np.ndarray]]:
    """A worker, three blocks of two videos of three frames, and the list of blocks that it
    wrote."""
    store = FakeStore()
    monkeypatch.setattr("extract.workers.worker.FeatureStore", store)
    monkeypatch.setattr("extract.workers.rows.SubprocessPool", FakePool)
    chosen = Options(videos=Path(), out="", frames=3, **options)
    worker = Worker(chosen, 1, backbone=FakeBackbone(device))  # type: ignore[arg-type]
    blocks = []
    for number in range(3):
        videos = tuple(Video(f"{number}-{k}", f"{number}-{k}.mp4", 0) for k in range(2))
        blocks.append(Block(number, (2 * number, 2 * number + 1), videos))
    return worker, blocks, store.written


def test_a_device_does_not_run_dry_between_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two frames left over from a block join the next block's, and a block is finished once its
    frames are back."""
    device = FakeDevice()
    worker, blocks, written = worker_on(device, monkeypatch)
    assert worker.run(blocks[0]) == []
    assert device.under_way == 1  # two frames wait for the next block
    assert worker.run(blocks[1]) + worker.run(
        blocks[2]
    )  # the first, at the latest while the third is added
    rest = worker.drain()
    assert worker.drain() == []
    assert rest[-1].number == 2
    assert device.launched == 5  # of 18 frames
    assert sorted(written) == [0, 1, 2]
    for number, features in written.items():
        np.testing.assert_array_equal(
            features, features_of(noise(6, seed=number)).reshape(2, 3, DIM)
        )
    worker.close()


def test_a_block_whose_batch_is_lost_is_never_written(monkeypatch: pytest.MonkeyPatch) -> None:
    worker, blocks, written = worker_on(FakeDevice(failing=frozenset({1})), monkeypatch)
    worker.run(blocks[0])
    worker.run(blocks[1])
    with pytest.raises(RuntimeError, match="batch 1 is lost"):
        worker.run(blocks[2])
    assert worker.drain() == []
    assert written == {}
    worker.close()


def test_a_worker_that_is_stopped_waits_for_what_is_under_way(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Otherwise OpenVINO calls back while Python ends, for example after Ctrl-C, and the process
    aborts with status 134."""
    device = FakeDevice()
    worker, blocks, written = worker_on(device, monkeypatch)
    worker.run(blocks[0])
    assert device.under_way == 1
    worker.close()
    assert device.under_way == 0
    assert written == {}


def test_a_row_that_fails_after_its_first_clips_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two of the three clips of the first video fit into a buffer, and the process that decodes the
    third one dies."""
    clips = Clips(frames=1, fps=5.0, per_clip="mean", rows=1)
    monkeypatch.setattr(FakeBackbone, "clips", clips)
    monkeypatch.setattr(FakeBackbone, "clip_options", {"clip_length": 1, "clip_fps": clips.fps})
    submit = FakePool.submit

    def submit_parts(pool: FakePool, job: Job) -> "Future[JobResult]":
        _, [(row_id, _)], plan = job
        future = submit(pool, job)
        result = future.result()
        if plan.first_clip:
            result.failure = "the decoding process died"
        elif row_id == "0-0":
            result.result[0] = replace(result.result[0], clips=np.arange(2).reshape(1, 2, 1))
        return future

    monkeypatch.setattr(FakePool, "submit", submit_parts)
    worker, blocks, written = worker_on(FakeDevice(), monkeypatch)
    [result] = worker.run(blocks[0]) + worker.drain()
    worker.close()
    outcome = result.outcome
    assert outcome.status.tolist() == [FAILED, OK]
    assert outcome.errors == ["the decoding process died", ""]
    assert outcome.num_frames.tolist() == [0, 9]
    assert (outcome.frame_indices[0] == -1).all()
    assert np.isnan(outcome.timestamps[0]).all()
    assert not written[0][0].any()
    assert written[0][1].any()


@pytest.mark.parametrize(("decoder", "third"), [("decord", "decord"), ("torchcodec-cpu", "pyav")])
def test_only_what_decodes_in_the_workers_process_is_given_up(
    decoder, third, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Workers survive crashes of their children. So if workers died over a block, the decoders in
    children are kept for it."""
    jobs: list[Job] = []
    submit = FakePool.submit
    monkeypatch.setattr(FakePool, "submit", lambda pool, job: jobs.append(job) or submit(pool, job))
    for failures, expected in ((1, decoder), (2, third)):
        worker, blocks, _ = worker_on(FakeDevice(), monkeypatch, decoder=decoder)
        worker.run(replace(blocks[0], failures=failures))
        assert [job[2].decoder for job in jobs] == [expected] * 2
        jobs.clear()
        worker.close()
