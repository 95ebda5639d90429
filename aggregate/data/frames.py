"""Batches from videos, for end-to-end training and its test: decoded by extraction's own children
and deadlines."""

from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from itertools import chain, pairwise

import numpy as np
import torch

from aggregate.data.features import Batch, in_batches
from extract import RunError
from extract.decode import VideoError
from extract.decode.jobs import Job, Plan, Prepared, decode_job, remaining_jobs
from extract.decode.pool import Finished, SubprocessPool
from extract.listing.videos import Video


def new_segments(clips: np.ndarray) -> np.ndarray:
    """bool [T] of clips [T, L]: False for one that repeats an earlier one's frames (a video shorter
    than T)."""
    same = (clips[:, None] == clips[None]).all(axis=2)
    return ~np.tril(same, k=-1).any(axis=1)


def clip_pool(plan: Plan, *, workers: int, timeout: float = 60.0, nice: int = 0) -> SubprocessPool:
    """Processes that decode the clips of `plan`; use it in `with`.

    A buffer holds one row, but of a clip-wise backbone at most 64 MB of it, or one clip: see
    `row_parts`.
    """
    slot_bytes = plan.row_bytes if plan.clip_fps is None else plan.slot_bytes
    return SubprocessPool(
        decode_job, slot_bytes=slot_bytes, workers=workers, timeout=timeout, nice=nice
    )


def row_parts(
    job: Job, future: "Future[Finished]", leftovers: SubprocessPool
) -> Iterator[tuple[Prepared, np.ndarray]]:
    """The only row of a job, in parts that a buffer holds, each with its pictures (valid until the
    next part).

    leftovers: does what had no room. It is a pool of its own, since jobs that were queued behind
    this one may fill the buffers that the rest would wait for. Raises VideoError.
    """
    more = [job]
    while more:
        job = more[0]
        with future.result() as finished:
            [prepared] = finished.result or [VideoError(job[0], finished.failure)]
            if isinstance(prepared, VideoError):
                raise prepared
            yield prepared, prepared.pictures(finished.buffer, job[2])
        if more := remaining_jobs(job, [prepared]):
            future = leftovers.submit(more[0])


@dataclass
class VideoFrames:
    """The videos of a split, decoded by `pool`, which several splits may share.

    Batches hold x uint8 [B, T, N, H, W, 3], mask bool [B, T], labels, and as `rows` the places in
    `videos`. A video that could not be decoded is left out; `failed` maps its place to the reason,
    as found so far.
    """

    videos: Sequence[Video]
    plan: Plan
    pool: SubprocessPool
    failed: dict[int, str] = field(default_factory=dict)

    def train_batches(
        self, *, epoch: int, batch_size: int, seed: int, rank: int = 0, world: int = 1
    ) -> Iterator[Batch]:
        """One epoch in random order: batches of `batch_size` videos, of which this process takes
        every `world`-th.

        Every process gets the same number of batches; its part of one may be empty. The order is a
        function of (seed, epoch), a video's frames and view of (seed, epoch, id). Raises RunError
        where not one video can be decoded.
        """
        order = np.random.default_rng((seed, epoch, 0)).permutation(len(self.videos))
        batches = (places[rank::world] for places in in_batches(order, batch_size))
        for places, views in self._batches(batches, replace(self.plan, seed=seed, epoch=epoch)):
            yield views[0]
            if len(places) and len(self.failed) == len(self.videos):
                name, reason = self.videos[places[0]].id, self.failed[int(places[0])]
                raise RunError(
                    f"not one of {len(self.videos)} videos can be decoded; {name}: {reason}"
                )

    def test_batches(self, *, batch_size: int) -> Iterator[list[Batch]]:
        """All videos in order, middle frames; of each batch one `Batch` a crop."""
        batches = in_batches(np.arange(len(self.videos)), batch_size)
        return (views for _, views in self._batches(batches, self.plan) if len(views[0].rows))

    def _batches(
        self, batches: Iterable[np.ndarray], plan: Plan
    ) -> Iterator[tuple[np.ndarray, list[Batch]]]:
        def queued(places: np.ndarray) -> tuple[np.ndarray, list]:
            videos = [self.videos[place] for place in places]
            return places, [
                self.pool.submit((video.path, [(video.id, video.span)], plan)) for video in videos
            ]

        # The next batch is queued before one is handed out; the slots of the children's memory hold
        # both back.
        for (places, futures), _ in pairwise(chain(map(queued, batches), [(np.empty(0, int), [])])):
            yield places, self._collect(places, futures, plan)

    def _collect(self, places: np.ndarray, futures: list, plan: Plan) -> list[Batch]:
        frames = np.empty((len(places), *plan.shape), np.uint8)
        masks: list[np.ndarray] = []
        good: list[int] = []
        for place, future in zip(places.tolist(), futures, strict=True):
            with future.result() as finished:
                [prepared] = finished.result or [
                    VideoError(self.videos[place].path, finished.failure)
                ]
                if isinstance(prepared, VideoError):
                    self.failed[place] = prepared.reason
                    continue
                pictures = finished.buffer[: plan.row_bytes].reshape(-1, *plan.shape[3:])
                frames[len(good)] = pictures[prepared.clips]
                masks.append(new_segments(prepared.clips[0]))
                good.append(place)
        x = torch.from_numpy(frames[: len(good)])
        mask = torch.from_numpy(np.array(masks, bool).reshape(-1, plan.frames))
        labels = torch.tensor([self.videos[place].label for place in good], dtype=torch.int64)
        return [
            Batch(x[:, crop], mask, labels, np.array(good, int)) for crop in range(plan.num_views)
        ]
