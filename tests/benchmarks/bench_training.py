"""Training on cached features against the same loop on tensors in memory, and against a DataLoader
over Zarr.

The contenders take turns in one process, several times; the figure is the median of the ratios of a
turn. The store has the shape of Kinetics-700 (25 x 2048 float16 per video, 700 classes) and a tenth
of its videos: 54,236, 5.55 GB. It is written here and read from the page cache, except if a test
empties the cache first.

Run: `python -m pytest -s tests/benchmarks/bench_training.py`
"""

import os
import re
import resource
import time
from pathlib import Path
from statistics import median

import numpy as np
import pytest
import torch
import zarr
from torch.utils.data import DataLoader, Dataset

from aggregate.data.features import Batch, StoredFeatures, prefetched
from aggregate.models import build
from aggregate.training.learner import Learner
from aggregate.training.loop import train_epoch
from aggregate.training.recipes import choose_precision, head_options, parameter_groups, recipe
from extract.sampling import segment_random
from extract.store import OK, FeatureStore, Outcomes

VIDEOS, FRAMES, DIM, CLASSES, BATCH = 54_236, 25, 2048, 700, 256
SEGMENTS = 3


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> FeatureStore:
    path = tmp_path_factory.mktemp("k700") / "feats.zarr"
    made = FeatureStore.create(
        path,
        ids=[f"{row:08d}.mp4" for row in range(VIDEOS)],
        labels=np.arange(VIDEOS) % CLASSES,
        splits=["train"] * VIDEOS,
        groups=[""] * VIDEOS,
        classes=[f"class {number}" for number in range(CLASSES)],
        views=["center"],
        frames=FRAMES,
        dim=DIM,
        block_size=64,
        provenance={"source": "benchmark"},
    )
    rng = np.random.default_rng(0)
    noise = rng.random((128, 1, FRAMES, DIM), dtype=np.float32).astype("<f2")
    for block in range(made.num_blocks):
        rows = made.block_rows(block)
        first = int(rng.integers(64))
        made.write_block(block, noise[first : first + len(rows)])
    made.commit(
        Outcomes(
            rows=np.arange(VIDEOS),
            status=np.full(VIDEOS, OK, "i1"),
            errors=[""] * VIDEOS,
            num_frames=np.full(VIDEOS, 250, "<i4"),
            frame_indices=np.broadcast_to(np.arange(FRAMES, dtype="<i4") * 10, (VIDEOS, 1, FRAMES)),
            timestamps=np.zeros((VIDEOS, 1, FRAMES), "<f4"),
        )
    )
    return FeatureStore.open(path)


def learner(name: str, videos: int, precision: str = "auto", **options) -> Learner:
    """A learner as `aggregate.train` makes it, with the recipe's options of the head."""
    chosen = recipe("cached", name, videos=VIDEOS)
    device = torch.device("cpu")
    torch.manual_seed(0)
    return Learner(
        name=name,
        precision=choose_precision(precision, device, chosen.batch_size),
        model=build(
            name, dim=DIM, num_classes=CLASSES, **(head_options("cached", name, {}) | options)
        ),
        recipe=chosen,
        steps_per_epoch=-(-videos // BATCH),
        seed=0,
        device=torch.device("cpu"),
    )


def seconds(work) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def resident(rows: np.ndarray, x: torch.Tensor, labels: torch.Tensor, epoch: int):
    """The contender: features are one tensor in memory, and all batches are drawn before the clock
    starts."""
    rng = np.random.default_rng(epoch)
    order = torch.from_numpy(rng.permutation(len(rows)))
    slots = torch.from_numpy(np.stack([segment_random(FRAMES, SEGMENTS, rng) for _ in rows]))
    for start in range(0, len(rows), BATCH):
        places = order[start : start + BATCH]
        yield Batch(x[places[:, None], slots[places]], None, labels[places], places.numpy())


@pytest.mark.parametrize("sparse", [False, True])
def test_reading_a_store_that_is_not_in_memory(store, sparse):
    """As for a store larger than memory: its pages are dropped from the page cache, then 20 batches
    are gathered.

    This test comes first, since pages that are mapped cannot be dropped from the page cache.
    """
    for block in range(store.num_blocks):
        with open(store.shard_path(block), "rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    cold = FeatureStore.open(store.path)
    if sparse:
        cold.disable_readahead()
    rng = np.random.default_rng(0)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_majflt, read_bytes()

    def gather() -> None:
        for _ in range(20):
            rows = rng.choice(VIDEOS, BATCH, replace=False)
            cold.gather(rows, np.sort(rng.integers(0, FRAMES, (BATCH, SEGMENTS)), axis=1))

    wall = seconds(gather)
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_majflt - before[0]
    read, wanted = read_bytes() - before[1], 20 * BATCH * SEGMENTS * DIM * 2
    print(
        f"\ncold, {'sparse' if sparse else 'reading ahead'}: {20 * BATCH / wall:,.0f} videos/s; {faults:,} major "
        f"faults, {read / 1e6:.0f} MB read for {wanted / 1e6:.0f} MB wanted ({read / wall / 1e6:.0f} MB/s)"
    )
    assert read > 0, "the page cache was not emptied; nothing was measured"
    if sparse:
        assert read < 4 * wanted  # a frame of 4 kB lies in two pages


def read_bytes() -> int:
    return int(re.search(r"read_bytes: (\d+)", Path("/proc/self/io").read_text())[1])


@pytest.mark.parametrize("name", ["tsn", "hgnl"])
def test_the_loop_from_a_mapped_store_keeps_up_with_tensors_in_memory(store, name):
    rows = np.arange(40 * BATCH)
    mapped = StoredFeatures(store, rows, placement="mmap", training=True)
    x = torch.from_numpy(store.gather(rows, np.arange(FRAMES)))
    labels = torch.from_numpy(store.labels[rows].astype(np.int64))
    ours, theirs = learner(name, len(rows)), learner(name, len(rows))
    ratios = []
    for turn in range(6):
        ready = list(
            resident(rows, x, labels, turn)
        )  # even the gather is done before its clock starts
        batches = mapped.train_batches(epoch=turn, frames=SEGMENTS, batch_size=BATCH, seed=0)
        one = seconds(lambda batches=batches: train_epoch([ours], batches, 0))
        other = seconds(lambda ready=ready: train_epoch([theirs], ready, 0))
        ratios.append(other / one)
    share = median(ratios[1:])
    print(
        f"\n{name}: training from the mapped store at {share:.2f} of the loop over finished batches in memory"
    )
    assert share >= 0.9


class VideosInZarr(Dataset):
    """The data set that a user would write."""

    def __init__(self, path: str, rows: int):
        group = zarr.open_group(path, mode="r")
        self.features, self.labels, self.rows = group["features"], group["labels"][:], rows

    def __len__(self) -> int:
        return self.rows

    def __getitem__(self, row: int):
        frames = segment_random(FRAMES, SEGMENTS, np.random.default_rng())
        return torch.from_numpy(self.features[row, 0][frames]), int(self.labels[row])


def test_against_a_dataloader_over_zarr(store):
    """Batches alone, and with TSN's training, which is mostly arithmetic once batches cost
    nothing."""
    rows = 10 * BATCH
    features = StoredFeatures(store, np.arange(VIDEOS), placement="mmap", training=True)
    ours, theirs = learner("tsn", rows), learner("tsn", rows)

    def with_store(train: bool) -> float:
        batches = features.train_batches(epoch=0, frames=SEGMENTS, batch_size=BATCH, seed=0)
        return VIDEOS / seconds(lambda: train_epoch([ours], batches, 0) if train else list(batches))

    def with_loader(train: bool, workers: int) -> float:
        loader = DataLoader(
            VideosInZarr(store.path, rows), batch_size=BATCH, shuffle=True, num_workers=workers
        )
        batches = (Batch(x, None, labels, np.zeros(len(labels), int)) for x, labels in loader)
        return rows / seconds(lambda: train_epoch([theirs], batches, 0) if train else list(batches))

    with_store(False)
    for train in (False, True):
        turns = [
            (with_store(train), max(with_loader(train, 0), with_loader(train, 2))) for _ in range(3)
        ]
        ratio = median(one / other for one, other in turns)
        print(
            f"\n{'TSN training' if train else 'batches'}, videos/s: store {median(t[0] for t in turns):,.0f}, "
            f"DataLoader over Zarr (better of 0 and 2 workers) {median(t[1] for t in turns):,.0f}: {ratio:.0f} times"
        )
        assert ratio >= (5 if train else 20)


@pytest.mark.parametrize("name", ["tsn", "hgnl"])
def test_a_step_against_a_step_in_fp32_that_is_not_fused(name):
    """The former step: fp32 products, SGD and clipping in passes of their own, dropout by
    `bernoulli_`. The two take turns."""
    ours, theirs = (
        learner(name, VIDEOS, precision, standardize=True) for precision in ("auto", "fp32")
    )
    groups = parameter_groups(theirs.model, theirs.recipe)
    theirs.optimizer = torch.optim.SGD(groups, lr=theirs.recipe.lr, momentum=0.9, foreach=False)
    theirs.model.dropout = torch.nn.Dropout(theirs.recipe.dropout)
    x, labels = torch.randn(BATCH, SEGMENTS, DIM).half(), torch.randint(CLASSES, (BATCH,))
    batch, ratios, steps = Batch(x, None, labels, np.arange(BATCH)), [], []
    for one in (ours, theirs):
        one.train_mode()
        one.step(batch, 0, 0)
    for turn in range(10):
        walls = [
            seconds(lambda one=one, turn=turn: one.step(batch, 0, turn + 1))
            for one in (ours, theirs)
        ]
        ratios.append(walls[0] / walls[1])
        steps.append(walls[0])
    print(
        f"\n{name}: a step in {ours.precision} takes {median(ratios):.2f} of one in fp32 as it was "
        f"({1e3 * median(steps):.1f} ms)"
    )
    assert median(ratios) <= 0.85


def anonymous_memory() -> int:
    """Memory of this process in bytes, without page cache."""
    return 1024 * int(re.search(r"RssAnon:\s+(\d+)", Path("/proc/self/status").read_text())[1])


@pytest.mark.parametrize("name", ["tsn", "hgnl"])
def test_seconds_an_epoch_and_memory(store, name):
    features = StoredFeatures(store, np.arange(VIDEOS), training=True)
    assert features.placement == "mmap"
    trained = learner(name, VIDEOS)
    peak = 0

    def watch() -> None:
        nonlocal peak
        peak = max(peak, anonymous_memory())

    walls = []
    for epoch in range(3):
        batches = features.train_batches(epoch=epoch, frames=SEGMENTS, batch_size=BATCH, seed=0)
        walls.append(
            seconds(
                lambda batches=batches, epoch=epoch: train_epoch([trained], batches, epoch, watch)
            )
        )
    print(
        f"\n{name}: epochs of a tenth of Kinetics-700 take {', '.join(f'{wall:.1f}' for wall in walls)} s "
        f"({10 * median(walls):.0f} s for all, by proportion), RssAnon {peak / 1e9:.2f} GB"
    )
    assert peak < 4e9


def test_batches_are_ready_before_they_are_asked_for():
    """`prefetched` adds almost no time per batch."""
    cost = seconds(lambda: list(prefetched(range(2000)))) / 2000
    print(f"\nhanding a batch over from the thread: {1e6 * cost:.0f} us")
