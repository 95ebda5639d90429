"""Helpers for tests that use a feature store on disk."""

import hashlib
from pathlib import Path

import numpy as np

from extract.store import FAILED, FeatureStore, Outcomes


def store_digest(path: Path) -> dict[str, str]:
    """SHA-256 of every file of a store. Stores with equal digests are byte-identical."""
    files = (file for file in sorted(path.rglob("*")) if file.is_file())
    return {
        file.relative_to(path).as_posix(): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in files
    }


def classes_store(
    path: Path,
    *,
    videos: int = 60,
    dim: int = 16,
    frames: int = 6,
    classes: int = 3,
    splits: bool = True,
    noise: float = 0.5,
    seed: int = 0,
) -> FeatureStore:
    """A finished store whose classes can be learned: one direction per class, noise on every frame,
    some short videos.

    With `splits`, every third video is in the split `val`. Every group holds five videos.
    """
    rng = np.random.default_rng(0)
    labels = np.arange(videos) % classes
    features = (
        np.eye(classes, dim)[labels][:, None] * 3 + rng.normal(size=(videos, frames, dim)) * noise
    )
    return FeatureStore.from_arrays(
        path,
        features.astype(np.float32),
        lengths=np.where(np.arange(videos) % 7 == 0, 2, frames),
        labels=labels,
        classes=[f"class {number}" for number in range(classes)],
        ids=[f"v/{row:04d}.mp4" for row in range(videos)],
        splits=[
            ("val" if row // classes % 3 == 2 else "train") if splits else ""
            for row in range(videos)
        ],
        groups=[f"g{row // 5}" for row in range(videos)],
    )


def fail_rows(path: Path, rows: list[int]) -> None:
    """Mark videos of a finished store as failed."""
    store = FeatureStore.open(path, writable=True)
    count, shape = len(rows), (len(rows), store.num_views, store.frames_per_video)
    store.commit(
        Outcomes(
            rows=np.array(rows),
            status=np.full(count, FAILED, "i1"),
            errors=["a test made it fail"] * count,
            num_frames=np.zeros(count, "<i4"),
            frame_indices=np.full(shape, -1, "<i4"),
            timestamps=np.full(shape, np.nan, "<f4"),
        )
    )


def poison_row(path: Path, row: int) -> FeatureStore:
    """Put NaN into the first view of a video of a finished store's first block."""
    store = FeatureStore.open(path, writable=True)
    block = store.read(store.block_rows(0))
    block[row, 0, :] = np.nan
    store.write_block(0, block)
    return store
