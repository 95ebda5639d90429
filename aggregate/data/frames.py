"""Batches from videos, for end-to-end training and its test: decoded by extraction's own children and deadlines."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain, pairwise
from math import prod

import numpy as np
import torch

from aggregate.data.clips import ClipJob, ClipPlan, prepare_clip
from aggregate.data.features import Batch, in_batches
from extract.cli import RunError
from extract.decode.subprocess_pool import SubprocessPool
from extract.listing.videos import Video


def clip_pool(plan: ClipPlan, *, workers: int, timeout: float = 60.0, nice: int = 0) -> SubprocessPool:
    """Processes that decode the clips of `plan`; use it in `with`."""
    return SubprocessPool(prepare_clip, slot_bytes=prod(plan.shape), workers=workers, timeout=timeout, nice=nice)


@dataclass
class VideoFrames:
    """The videos of a split, decoded by `pool`, which several splits may share.

    Batches hold x uint8 [B, T, N, H, W, 3], mask bool [B, T], labels, and as `rows` the places in `videos`. A video
    that could not be decoded is left out; `failed` maps its place to the reason, as found so far.
    """

    videos: Sequence[Video]
    plan: ClipPlan
    pool: SubprocessPool
    failed: dict[int, str] = field(default_factory=dict)

    def train_batches(
        self, *, epoch: int, batch_size: int, seed: int, rank: int = 0, world: int = 1
    ) -> Iterator[Batch]:
        """One epoch in random order: batches of `batch_size` videos, of which this process takes every `world`-th.

        Every process gets the same number of batches; its part of one may be empty. The order is a function of (seed,
        epoch), a video's frames and view of (seed, epoch, id). Raises RunError where not one video can be decoded.
        """
        order = np.random.default_rng((seed, epoch, 0)).permutation(len(self.videos))
        batches = (places[rank::world] for places in in_batches(order, batch_size))
        for places, views in self._batches(batches, seed=seed, epoch=epoch):
            yield views[0]
            if len(places) and len(self.failed) == len(self.videos):
                name, reason = self.videos[places[0]].id, self.failed[int(places[0])]
                raise RunError(f"not one of {len(self.videos)} videos can be decoded; {name}: {reason}")

    def test_batches(self, *, batch_size: int) -> Iterator[list[Batch]]:
        """All videos in order, middle frames; of each batch one `Batch` a crop."""
        batches = in_batches(np.arange(len(self.videos)), batch_size)
        return (views for _, views in self._batches(batches) if len(views[0].rows))

    def _batches(
        self, batches: Iterable[np.ndarray], *, seed: int = 0, epoch: int = -1
    ) -> Iterator[tuple[np.ndarray, list[Batch]]]:
        def queued(places: np.ndarray) -> tuple[np.ndarray, list]:
            videos = [self.videos[place] for place in places]
            clips = (ClipJob(video.path, video.id, self.plan, seed, epoch, video.span) for video in videos)
            return places, [self.pool.submit(clip) for clip in clips]

        # The next batch is queued before one is handed out; the slots of the children's memory hold both back.
        for (places, futures), _ in pairwise(chain(map(queued, batches), [(np.empty(0, int), [])])):
            yield places, self._collect(places, futures)

    def _collect(self, places: np.ndarray, futures: list) -> list[Batch]:
        frames = np.empty((len(places), *self.plan.shape), np.uint8)
        masks: list[np.ndarray] = []
        good: list[int] = []
        for place, future in zip(places.tolist(), futures, strict=True):
            with future.result() as finished:
                if finished.failure:
                    self.failed[place] = finished.failure
                    continue
                frames[len(good)] = finished.buffer[: frames[0].size].reshape(self.plan.shape)
                masks.append(finished.result)
                good.append(place)
        x = torch.from_numpy(frames[: len(good)])
        mask = torch.from_numpy(np.array(masks, bool).reshape(-1, self.plan.segments))
        labels = torch.tensor([self.videos[place].label for place in good], dtype=torch.int64)
        return [Batch(x[:, crop], mask, labels, np.array(good, int)) for crop in range(self.plan.crops)]
