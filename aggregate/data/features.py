"""Batches from a feature store: random segments to train on, fixed segments to test on.

    stored frames    0 1 2 3 4 5 6 7 | 8 9 ... 15 | 16 ... 24    T = 25
    training, n = 3         5              11           20       random, of a random view
    testing, n = 3          4              12           20       the middle, of every view

A short video repeats frames, so it has fewer than T different ones. A thread prepares batches
ahead. A training batch depends only on (seed, epoch, position in the split).
"""

import copy
import math
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Literal, TypeVar

import numpy as np
import torch
from torch import Tensor

from extract import InputError, RunError
from extract.portable import memory_available
from extract.sampling import segment_centers
from extract.store import PENDING, FeatureStore
from extract.store.summary import human_bytes

Placement = Literal["auto", "device", "memory", "mmap"]
Item = TypeVar("Item")

BATCHES_PREFETCHED = 3
# `auto` copies smaller features into memory. Larger ones are memory-mapped, through the page cache.
_MEMORY_LIMIT = 1 << 30
# The fraction of a GPU's free memory for features: those of Kinetics-700 (56 GB) fit into 80 GB.
_GPU_FRACTION = 0.8


@dataclass(frozen=True)
class Batch:
    """One view of B videos, n frames of each."""

    x: Tensor  # [B, n, D], half precision
    mask: Tensor | None  # bool [B, n]; None if every frame is valid
    labels: Tensor  # int64 [B]
    rows: np.ndarray  # [B], rows of the store


class StoredFeatures:
    """The videos `rows` of a store, with features on the device, in memory, or memory-mapped.

    `placement_note` describes where they are, and why. Videos that failed in extraction are left
    out of tests and must not be trained on. Raises InputError if there is no row, or if more frames
    are requested than are stored. Raises RunError naming a video that is not extracted yet.
    """

    def __init__(
        self,
        store: FeatureStore,
        rows: np.ndarray,
        *,
        device: str | torch.device = "cpu",
        placement: Placement = "auto",
        training: bool = False,
    ) -> None:
        if not len(rows):
            raise InputError(f"{store.path}: no video is left to read")
        pending = rows[store.status[rows] == PENDING]
        if len(pending):
            raise RunError(
                f"{store.path}: {store.ids[pending[0]]} and {len(pending) - 1:,} more are not "
                "extracted yet; run the extraction to its end"
            )
        self.store, self.device = store, torch.device(device)
        self.views = training_views(store) if training else evaluation_views(store)
        self._select(np.asarray(rows), np.arange(len(rows)))
        shape = (len(rows), len(self.views), store.frames_per_video, store.dim)
        size = 2 * math.prod(shape)
        self.placement, self.placement_note = _place(size, self.device, placement)
        if self.placement == "mmap" and size > memory_available():
            store.disable_readahead()
            self.placement_note += "; larger than memory, so without reading ahead"
        self._cached = None if self.placement == "mmap" else self._load(shape)

    def _load(self, shape: tuple[int, int, int, int]) -> Tensor:
        """All features, [rows, views, T, D], in memory or on the device."""
        device = self.device if self.placement == "device" else None
        loaded = torch.empty(shape, dtype=torch.float16, device=device)
        slots = np.arange(shape[2])
        for start in range(0, len(self.rows), 256):
            part = slice(start, start + 256)
            for number, view in enumerate(self.views.tolist()):
                features = self.store.gather(self.rows[part], slots, view)
                loaded[part, number] = torch.from_numpy(features)
        return loaded

    def _select(self, rows: np.ndarray, cache_index: np.ndarray) -> None:
        self.rows, self._cache_index = rows, cache_index
        self.labels = self.store.labels[rows].astype(np.int64)
        self.usable = self.store.usable[rows]
        # Only a video with fewer frames than slots repeats frames; others are not searched for
        # repeats.
        self._has_repeats = self.store.num_frames[rows] < self.store.frames_per_video

    def subset(self, rows: np.ndarray) -> "StoredFeatures":
        """Some of these videos, in the order of `rows`; cached features are shared."""
        order = np.argsort(self.rows)
        index = order[np.searchsorted(self.rows, rows, sorter=order)]
        subset = copy.copy(self)
        subset._select(rows, self._cache_index[index])
        return subset

    def __len__(self) -> int:
        return len(self.rows)

    def train_batches(
        self, *, epoch: int, frames: int, batch_size: int, seed: int, balanced: bool = False
    ) -> Iterator[Batch]:
        """One epoch in random order, with random frames of `frames` segments of each video.

        If `balanced`, the epoch has the same length but equally many videos of each class: a random
        part of large classes, while videos of small classes are repeated.
        """
        self._check_frames(frames)
        rng = np.random.default_rng((seed, epoch, 0))
        order = balanced_order(self.labels, rng) if balanced else rng.permutation(len(self))
        # Row i belongs to video i, so it does not depend on the number of videos.
        shape = (len(self), frames + 1)
        draws = np.random.default_rng((seed, epoch, 1)).random(shape, dtype=np.float32)
        views = (draws[:, -1] * len(self.views)).astype(np.int64)
        return prefetched(
            self._batch(videos, frames, views[videos], draws[videos, :-1])
            for videos in in_batches(order, batch_size)
        )

    def test_batches(self, *, frames: int, batch_size: int) -> Iterator[list[Batch]]:
        """Videos that did not fail, in order: per batch, one `Batch` per view.

        Batches hold the middle frames of `frames` segments.
        """
        self._check_frames(frames)
        return prefetched(
            [
                self._batch(videos, frames, np.full(len(videos), view))
                for view in range(len(self.views))
            ]
            for videos in in_batches(np.flatnonzero(self.usable), batch_size)
        )

    def _check_frames(self, frames: int) -> None:
        stored = self.store.frames_per_video
        if not 1 <= frames <= stored:
            raise InputError(
                f"{frames} segments requested; {self.store.path} holds {stored} frames per video "
                "(extract --frames)"
            )

    def _batch(
        self, videos: np.ndarray, frames: int, view: np.ndarray, draws: np.ndarray | None = None
    ) -> Batch:
        """The batch of `videos`, indices into `rows`, with the `view` of each.

        `draws` float32 [B, n], from 0 to below 1, choose frames within the segments; with None the
        middle frames are taken.
        """
        rows, stored = self.rows[videos], self.store.frames_per_video
        stored_view = self.views[view]
        slots = _slots(np.full(len(rows), stored), frames, draws)
        mask = None
        short = np.flatnonzero(self._has_repeats[videos])
        if len(short):
            # Segments cover the distinct frames only, so that repeats displace no frame.
            new = self.store.mask(rows[short], np.arange(stored), stored_view[short])
            distinct = np.argsort(~new, axis=1, kind="stable")
            counts = np.maximum(new.sum(axis=1), 1)
            chosen = _slots(counts, frames, None if draws is None else draws[short])
            slots[short] = np.take_along_axis(distinct, chosen, axis=1)
            mask = self.store.mask(rows, slots, stored_view)
            if mask.all():
                mask = None
        return Batch(
            x=self._read(videos, view, slots),
            mask=None if mask is None else self._to_device(mask),
            labels=self._to_device(self.labels[videos]),
            rows=rows,
        )

    def _read(self, videos: np.ndarray, view: np.ndarray, slots: np.ndarray) -> Tensor:
        if self._cached is None:
            return self._to_device(self.store.gather(self.rows[videos], slots, self.views[view]))
        index = (self._cache_index[videos][:, None], view[:, None], slots)
        if self._cached.device.type == "cpu":
            # numpy copies in one thread, which is faster next to training.
            return self._to_device(self._cached.numpy()[index])
        on_device = self._to_device(np.stack(np.broadcast_arrays(*index)))
        return self._cached[on_device.unbind()]

    def _to_device(self, array: np.ndarray) -> Tensor:
        return to_device(torch.from_numpy(array), self.device)


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy to `device`, without waiting for a GPU, which copies from pinned memory later."""
    if device.type == "cuda" and tensor.is_cpu:
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def balanced_order(labels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """N indices into `labels` [N] in random order, the same number of each class, or one more."""
    present = rng.permutation(np.unique(labels))
    quotas = np.diff(np.arange(len(present) + 1) * len(labels) // len(present))
    parts = []
    for label, quota in zip(present, quotas.tolist(), strict=True):
        own = np.flatnonzero(labels == label)
        rounds = [rng.permutation(own) for _ in range(-(-quota // len(own)))]
        parts.append(np.concatenate(rounds)[:quota])
    return rng.permutation(np.concatenate(parts))


def in_batches(indices: np.ndarray, batch_size: int) -> Iterator[np.ndarray]:
    """`batch_size` of `indices` at a time."""
    return (indices[start : start + batch_size] for start in range(0, len(indices), batch_size))


def training_views(store: FeatureStore) -> np.ndarray:
    """The views for training: the augmented passes, or all crops if there is none."""
    augmented = np.setdiff1d(np.arange(store.num_views), evaluation_views(store))
    return augmented if len(augmented) else np.arange(store.num_views)


def evaluation_views(store: FeatureStore) -> np.ndarray:
    """The views whose logits a test averages: all but the augmented passes."""
    return np.flatnonzero([not name.startswith("augment_") for name in store.views])


def _slots(counts: np.ndarray, frames: int, draws: np.ndarray | None) -> np.ndarray:
    """Choose among `counts` [B] frames: int64 [B, n], the middle of each segment, or by `draws`."""
    if draws is None:
        middles = {count: segment_centers(count, frames) for count in np.unique(counts).tolist()}
        return np.stack([middles[count] for count in counts.tolist()])
    edges = np.arange(frames + 1) * counts[:, None] // frames
    widths = np.maximum(np.diff(edges, axis=1), 1)
    return edges[:, :-1] + (draws * widths).astype(np.int64)


def _place(size: int, device: torch.device, placement: Placement) -> tuple[str, str]:
    """Choose the placement of features of `size` bytes; returns it with a description."""
    chosen: str = placement
    reason = "as requested"
    if placement == "auto":
        free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else 0
        limit = human_bytes(_MEMORY_LIMIT)
        if size <= _GPU_FRACTION * free:
            chosen, reason = "device", f"{human_bytes(free)} are free there"
        elif size <= _MEMORY_LIMIT:
            chosen, reason = "memory", f"less than {limit}"
        else:
            chosen, reason = "mmap", f"more than {limit}: read as needed, through the page cache"
    where = {"device": f"on {device}", "memory": "in memory", "mmap": "memory-mapped"}[chosen]
    return chosen, f"{human_bytes(size)} {where} ({reason})"


def prefetched(items: Iterable[Item], depth: int = BATCHES_PREFETCHED) -> Iterator[Item]:
    """Yield `items`, which a thread makes up to `depth` ahead; an error in it is raised here."""
    iterator, done = iter(items), object()
    pool = ThreadPoolExecutor(1, thread_name_prefix="batches-ahead")
    try:
        ready = deque(pool.submit(next, iterator, done) for _ in range(depth))
        while (item := ready.popleft().result()) is not done:
            ready.append(pool.submit(next, iterator, done))
            yield item  # type: ignore[misc]
    finally:
        pool.shutdown(cancel_futures=True)
