"""The store against its limits, in one run: `make bench` or
`pytest -s tests/benchmarks/bench_store.py`.

The contenders take turns and their median times are compared, so that a machine that changes its
speed changes it for all. The page cache is warm.
"""

import os
import time
from collections.abc import Callable

import numpy as np
import zarr

from extract.store import OK, FeatureStore, Outcomes

FRAMES, DIM, BLOCK = 25, 2048, 64
FASTEST = 200  # frames/s of the fastest backbone measured on 2 cores
KINETICS = 542_357  # training videos in the usual copies of Kinetics-700


def medians(contenders: dict[str, Callable[[], object]], *, rounds: int) -> dict[str, float]:
    """Median seconds of each contender; they take turns."""
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, run in contenders.items():
            started = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - started)
    return {name: float(np.median(times)) for name, times in seconds.items()}


def empty_store(path, count: int) -> FeatureStore:
    return FeatureStore.create(
        path,
        ids=[f"train/abseiling/{row:011d}_000001_000011.mp4" for row in range(count)],
        labels=np.arange(count) % 700,
        splits=["train"] * count,
        groups=[""] * count,
        classes=[f"class {label}" for label in range(700)],
        views=["center"],
        frames=FRAMES,
        dim=DIM,
        block_size=BLOCK,
        provenance={},
    )


def outcome(rows: np.ndarray) -> Outcomes:
    shape = (len(rows), 1, FRAMES)
    indices = np.random.default_rng(rows[0]).integers(0, 300, shape).astype("<i4")
    return Outcomes(
        rows,
        np.full(len(rows), OK, "i1"),
        [""] * len(rows),
        np.full(len(rows), 300),
        indices,
        indices / np.float32(30),
    )


def test_commit_and_open_at_the_size_of_kinetics_700(tmp_path):
    store = empty_store(tmp_path / "k700.zarr", KINETICS)
    for block in range(0, store.num_blocks, 16):  # the neighbors of the next commit exist already
        store.commit(outcome(store.block_rows(block)))
    seconds = []
    for block in range(1, store.num_blocks, 400):
        rows = outcome(store.block_rows(block))
        started = time.perf_counter()
        store.commit(rows)
        seconds.append(time.perf_counter() - started)
    started = time.perf_counter()
    opened = FeatureStore.open(tmp_path / "k700.zarr")
    for name in ("ids", "splits", "labels", "status", "num_frames", "frame_indices"):
        assert len(getattr(opened, name)) == KINETICS
    opening = time.perf_counter() - started
    median, worst = 1e3 * np.median(seconds), 1e3 * max(seconds)
    print(f"\ncommit of a block at {KINETICS:,} rows: median {median:.1f} ms, worst {worst:.1f} ms")
    print(
        f"opening and reading ids, splits, labels, status, frame counts, frame indices: {opening:.2f} s"
    )
    assert np.median(seconds) < 0.040  # every file of it synced
    assert opening < 2


def test_what_syncing_costs(tmp_path, monkeypatch):
    """A block written and committed with every file synced, and the same without; also as a share
    of an extraction."""
    store = FeatureStore.open(empty_store(tmp_path / "a.zarr", 64 * BLOCK).path, writable=True)
    features = (
        np.random.default_rng(0)
        .standard_normal((BLOCK, 1, FRAMES, DIM), dtype=np.float32)
        .astype("<f2")
    )
    blocks = iter(range(store.num_blocks))

    def write():
        block = next(blocks)
        store.write_block(block, features)
        store.commit(outcome(store.block_rows(block)))

    def unsynced():
        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", lambda descriptor: None)
            write()

    seconds = medians({"synced": write, "not": unsynced}, rounds=30)
    cost = seconds["synced"] - seconds["not"]
    share = cost / (BLOCK * FRAMES / FASTEST)
    print(
        f"\na block: {1e3 * seconds['synced']:.1f} ms synced, {1e3 * seconds['not']:.1f} ms not: {1e3 * cost:.1f} ms"
    )
    print(f"that is {share:.2%} of an extraction at {FASTEST} frames/s")
    assert share < 0.02


def test_gather_against_memmap_and_zarr(tmp_path):
    count = 8192
    store = empty_store(tmp_path / "a.zarr", count)
    rng = np.random.default_rng(0)
    plain = np.lib.format.open_memmap(
        tmp_path / "a.npy", mode="w+", dtype="<f2", shape=(count, FRAMES, DIM)
    )
    for block in range(store.num_blocks):
        rows = store.block_rows(block)
        features = rng.standard_normal((len(rows), 1, FRAMES, DIM), dtype=np.float32).astype("<f2")
        store.write_block(block, features)
        store.commit(outcome(rows))
        plain[rows] = features[:, 0]
    store = FeatureStore.open(tmp_path / "a.zarr")
    array = zarr.open_array(str(tmp_path / "a.zarr" / "features"), mode="r")
    rows, frames = rng.integers(0, count, 256), np.sort(rng.integers(0, FRAMES, (256, 3)), axis=1)

    def by_memmap():
        return plain[rows[:, None], frames]

    def by_gather():
        return store.gather(rows, frames)

    def by_oindex():
        return array.oindex[rows]  # whole videos: its unit is the chunk

    np.testing.assert_array_equal(by_gather(), by_memmap())
    fast = medians({"memmap": by_memmap, "gather": by_gather}, rounds=200)
    slow = medians({"zarr oindex": by_oindex}, rounds=3)
    print()
    for name, seconds in (fast | slow).items():
        print(
            f"{name:12} {1e3 * seconds:9.2f} ms for 3 frames of 256 random videos, {256 / seconds:12,.0f} videos/s"
        )
    ratio, times = fast["memmap"] / fast["gather"], slow["zarr oindex"] / fast["gather"]
    print(
        f"gather: {ratio:.2f} of numpy memmap on the same bytes, {times:,.0f} times zarr's oindex"
    )
    assert ratio >= 0.5
    assert times >= 100
