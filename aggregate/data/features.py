"""Batches from a feature store: random segments to train on, fixed ones to test on, built ahead of
the step.

    cached frames   0 1 2 3 4 5 6 7 | 8 9 ... 15 | 16 ... 24      T = 25 (fewer where a short video repeats frames)
    training, n=3         5                11           20          a random one of each segment, from a random view
    testing, n=3          4                12           20          the middle one of each segment, every view

What a training batch holds is a function of (seed, epoch, place in the split) and of nothing else.
"""

import copy
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
# `auto` copies into memory what is smaller; a larger store stays on disk, mapped, and the page
# cache decides.
_MEMORY_LIMIT = 1 << 30
# Of a GPU's free memory `auto` gives this to features: all of Kinetics-700's (56 GB) fit into 80.
_GPU_SHARE = 0.8


@dataclass(frozen=True)
class Batch:
    """x [B, n, D] half precision, mask bool [B, n] or None where all count, labels int64 [B]; rows
    of the store [B]."""

    x: Tensor
    mask: Tensor | None
    labels: Tensor
    rows: np.ndarray


class StoredFeatures:
    """The videos `rows` of a store, with their features on the device, in memory, or memory-mapped.

    `placement` is what was taken, `words` says it with its reason. Videos that failed in extraction
    are left out of tests and may not be trained on. Raises InputError where there is no row, where
    more frames are asked for than are stored, and RunError for a video that is not extracted yet,
    naming it.
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
                f"{store.path}: {store.ids[pending[0]]} and {len(pending) - 1:,} more are not extracted yet; "
                "run the extraction to its end"
            )
        self.store, self.device = store, torch.device(device)
        self.views = training_views(store) if training else evaluation_views(store)
        self._choose(np.asarray(rows), np.arange(len(rows)))
        size = len(rows) * len(self.views) * store.frames_per_video * store.dim * 2
        self.placement, self.words = _placed(size, self.device, placement)
        if self.placement == "mmap" and size > memory_available():
            store.disable_readahead()
            self.words += "; larger than memory, so without reading ahead"
        self._held: Tensor | None = None  # [n, views, T, D]
        if self.placement != "mmap":
            shape = (len(rows), len(self.views), store.frames_per_video, store.dim)
            where = self.device if self.placement == "device" else None
            self._held = torch.empty(shape, dtype=torch.float16, device=where)
            slots = np.arange(store.frames_per_video)
            for start in range(0, len(rows), 256):
                for place, view in enumerate(self.views.tolist()):
                    part = store.gather(self.rows[start : start + 256], slots, view)
                    self._held[start : start + 256, place] = torch.from_numpy(part)

    def _choose(self, rows: np.ndarray, at: np.ndarray) -> None:
        self.rows, self._at = rows, at  # of the store, and in what is held
        self.labels = self.store.labels[rows].astype(np.int64)
        self.good = self.store.usable[rows]
        # A video shorter than its slots repeats frames; all others are spared the search for
        # repeats.
        self._short = self.store.num_frames[rows] < self.store.frames_per_video

    def subset(self, rows: np.ndarray) -> "StoredFeatures":
        """Some of the same videos, in the order given; what is held is shared."""
        order = np.argsort(self.rows)
        few = copy.copy(self)
        few._choose(rows, self._at[order[np.searchsorted(self.rows, rows, sorter=order)]])
        return few

    def __len__(self) -> int:
        return len(self.rows)

    def train_batches(
        self, *, epoch: int, frames: int, batch_size: int, seed: int, balanced: bool = False
    ) -> Iterator[Batch]:
        """One epoch in random order, `frames` random segments of each video, ready before they are
        needed.

        If `balanced`, an epoch is as long and has as many videos of each class: of large classes a
        random part, those of small ones several times.
        """
        self._check_frames(frames)
        rng = np.random.default_rng((seed, epoch, 0))
        order = balanced_order(self.labels, rng) if balanced else rng.permutation(len(self))
        # Row i belongs to video i, whatever the number of videos.
        draws = np.random.default_rng((seed, epoch, 1)).random(
            (len(self), frames + 1), dtype=np.float32
        )
        view = (draws[:, -1] * len(self.views)).astype(np.int64)
        batches = in_batches(order, batch_size)
        return prefetched(
            self._batch(places, frames, view[places], draws[places, :-1]) for places in batches
        )

    def test_batches(self, *, frames: int, batch_size: int) -> Iterator[list[Batch]]:
        """Videos that did not fail, in order; of each batch one `Batch` a view, of the middles of
        `frames` segments."""
        self._check_frames(frames)
        batches, views = (
            in_batches(np.flatnonzero(self.good), batch_size),
            np.arange(len(self.views)),
        )
        return prefetched(
            [self._batch(rows, frames, view.repeat(len(rows))) for view in views]
            for rows in batches
        )

    def _check_frames(self, frames: int) -> None:
        stored = self.store.frames_per_video
        if not 1 <= frames <= stored:
            raise InputError(
                f"{frames} segments asked for; {self.store.path} holds {stored} frames per video (extract --frames)"
            )

    def _batch(
        self, places: np.ndarray, frames: int, view: np.ndarray, draws: np.ndarray | None = None
    ) -> Batch:
        """`draws` float32 [B, n] below 1 choose within the segments; None takes the middles."""
        rows, stored = self.rows[places], self.store.frames_per_video
        stored_view = self.views[view]
        slots = _slots(np.full(len(rows), stored), frames, draws)
        mask = None
        short = np.flatnonzero(self._short[places])
        if len(short):
            # Segments are laid over the distinct frames only, so that a repeat stands in no frame's
            # place.
            new = self.store.mask(rows[short], np.arange(stored), stored_view[short])
            distinct = np.argsort(~new, axis=1, kind="stable")
            chosen = _slots(
                np.maximum(new.sum(axis=1), 1), frames, None if draws is None else draws[short]
            )
            slots[short] = np.take_along_axis(distinct, chosen, axis=1)
            mask = self.store.mask(rows, slots, stored_view)
            if mask.all():
                mask = None
        return Batch(
            x=self._read(places, view, slots),
            mask=None if mask is None else self._there(mask),
            labels=self._there(self.labels[places]),
            rows=rows,
        )

    def _read(self, places: np.ndarray, view: np.ndarray, slots: np.ndarray) -> Tensor:
        if self._held is None:
            return self._there(self.store.gather(self.rows[places], slots, self.views[view]))
        index = (self._at[places][:, None], view[:, None], slots)
        if (
            self._held.device.type == "cpu"
        ):  # numpy copies in one thread, which beside training is the faster way
            return self._there(self._held.numpy()[index])
        at, seen, frames = self._there(np.stack(np.broadcast_arrays(*index))).unbind()
        return self._held[at, seen, frames]

    def _there(self, array: np.ndarray) -> Tensor:
        return there(torch.from_numpy(array), self.device)


def there(tensor: Tensor, device: torch.device) -> Tensor:
    """On `device`. A GPU copies from pinned memory when it comes to it, so that nobody waits for
    the steps before."""
    if device.type == "cuda" and tensor.is_cpu:
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def balanced_order(labels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """As many places as there are labels [N], in random order, with the same number of each class
    (or one more)."""
    present = rng.permutation(np.unique(labels))
    shares = np.diff(np.arange(len(present) + 1) * len(labels) // len(present))
    places = []
    for label, share in zip(present, shares, strict=True):
        own = np.flatnonzero(labels == label)
        rounds = [rng.permutation(own) for _ in range(-(-int(share) // len(own)))]
        places += [part[: int(share) - number * len(own)] for number, part in enumerate(rounds)]
    return rng.permutation(np.concatenate(places))


def in_batches(places: np.ndarray, batch_size: int) -> Iterator[np.ndarray]:
    """`batch_size` of them at a time."""
    return (places[start : start + batch_size] for start in range(0, len(places), batch_size))


def training_views(store: FeatureStore) -> np.ndarray:
    """The views training draws from: the augmented passes where there are any, else all crops."""
    augmented = [place for place, name in enumerate(store.views) if name.startswith("augment_")]
    return np.array(augmented or range(store.num_views))


def evaluation_views(store: FeatureStore) -> np.ndarray:
    """The crops whose logits a test averages: all views but the augmented passes."""
    return np.array(
        [place for place, name in enumerate(store.views) if not name.startswith("augment_")]
    )


def _slots(counts: np.ndarray, frames: int, draws: np.ndarray | None) -> np.ndarray:
    """Places among `counts` [B] frames: int64 [B, n], the middle of each of n segments, or where
    `draws` falls."""
    if draws is None:
        middles = {int(count): segment_centers(int(count), frames) for count in np.unique(counts)}
        return np.stack([middles[int(count)] for count in counts])
    edges = np.arange(frames + 1) * counts[:, None] // frames
    widths = np.maximum(np.diff(edges, axis=1), 1)
    return edges[:, :-1] + (draws * widths).astype(np.int64)


def _placed(size: int, device: torch.device, placement: Placement) -> tuple[str, str]:
    """Where features of `size` bytes go, and that in words."""
    chosen: str = placement
    reason = "as asked"
    if placement == "auto":
        free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else 0
        if size <= _GPU_SHARE * free:
            chosen, reason = "device", f"{human_bytes(free)} are free there"
        elif size <= _MEMORY_LIMIT:
            chosen, reason = "memory", f"less than {human_bytes(_MEMORY_LIMIT)}"
        else:
            chosen, reason = (
                "mmap",
                f"more than {human_bytes(_MEMORY_LIMIT)}: read as needed, through the page cache",
            )
    where = {"device": f"on {device}", "memory": "in memory", "mmap": "memory-mapped"}[chosen]
    return chosen, f"{human_bytes(size)} {where} ({reason})"


def prefetched(items: Iterable[Item], depth: int = BATCHES_PREFETCHED) -> Iterator[Item]:
    """The same items, made by a thread up to `depth` before they are asked for; its error is raised
    here."""
    iterator, done = iter(items), object()
    pool = ThreadPoolExecutor(1, thread_name_prefix="batches-ahead")
    try:
        ready = deque(pool.submit(next, iterator, done) for _ in range(depth))
        while (item := ready.popleft().result()) is not done:
            ready.append(pool.submit(next, iterator, done))
            yield item  # type: ignore[misc]
    finally:
        pool.shutdown(cancel_futures=True)
