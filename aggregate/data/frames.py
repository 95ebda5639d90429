"""Batches of frames for end-to-end training and its test, decoded by child processes."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain, pairwise

import numpy as np
import torch

from aggregate.data.features import Batch, in_batches
from extract import RunError
from extract.decode import VideoError
from extract.decode.jobs import Plan
from extract.listing.videos import Video
from extract.workers.rows import RowDecoder, Submitted


def new_segments(clips: np.ndarray) -> np.ndarray:
    """bool [T] for clips [T, L]: False for a clip with the frames of an earlier one.

    Videos with fewer than T clips have such repeats.
    """
    same = (clips[:, None] == clips[None]).all(axis=2)
    return ~np.tril(same, k=-1).any(axis=1)


@dataclass
class VideoFrames:
    """The videos of a split, decoded by `decoder`, which several splits may share.

    Batches hold x uint8 [B, T, N, H, W, 3], mask bool [B, T], labels, and `rows`, indices into
    `videos`. A video that cannot be decoded is left out; `failed` maps its index to the reason.
    """

    videos: Sequence[Video]
    plan: Plan
    decoder: RowDecoder
    failed: dict[int, str] = field(default_factory=dict)

    def train_batches(
        self, *, epoch: int, batch_size: int, seed: int, rank: int = 0, world: int = 1
    ) -> Iterator[Batch]:
        """One epoch in random order: every `world`-th video of each batch of `batch_size`.

        Every process gets the same number of batches, and its part of a batch may be empty. The
        order depends only on (seed, epoch), a video's frames and view only on (seed, epoch, id).
        Raises RunError if no video can be decoded.
        """
        order = np.random.default_rng((seed, epoch, 0)).permutation(len(self.videos))
        batches = (rows[rank::world] for rows in in_batches(order, batch_size))
        for rows, [batch] in self._batches(batches, replace(self.plan, seed=seed, epoch=epoch)):
            yield batch
            if len(rows) and len(self.failed) == len(self.videos):
                name, reason = self.videos[rows[0]].id, self.failed[int(rows[0])]
                raise RunError(
                    f"none of the {len(self.videos)} videos can be decoded; {name}: {reason}"
                )

    def test_batches(self, *, batch_size: int) -> Iterator[list[Batch]]:
        """All videos in order, with the middle frames: per batch, one `Batch` per crop."""
        batches = in_batches(np.arange(len(self.videos)), batch_size)
        return (views for _, views in self._batches(batches, self.plan) if len(views[0].rows))

    def _batches(
        self, batches: Iterable[np.ndarray], plan: Plan
    ) -> Iterator[tuple[np.ndarray, list[Batch]]]:
        def submit(rows: np.ndarray) -> tuple[np.ndarray, list[Submitted]]:
            return rows, self.decoder.submit([self.videos[row] for row in rows], plan)

        # A batch is queued before the previous one is yielded; the children's buffers limit both.
        for (rows, jobs), _ in pairwise(chain(map(submit, batches), [(np.empty(0, int), [])])):
            yield rows, self._collect(rows, jobs, plan)

    def _collect(self, rows: np.ndarray, jobs: list[Submitted], plan: Plan) -> list[Batch]:
        frames = np.empty((len(rows), *plan.shape), np.uint8)
        masks: list[np.ndarray] = []
        decoded: list[int] = []
        for row, item in zip(rows.tolist(), self.decoder.read(jobs), strict=True):
            prepared = item.prepared
            if isinstance(prepared, VideoError):
                self.failed[row] = prepared.reason
                continue
            frames[len(decoded)] = item.pictures[prepared.clips]
            masks.append(new_segments(prepared.clips[0]))
            decoded.append(row)
        x = torch.from_numpy(frames[: len(decoded)])
        mask = torch.from_numpy(np.array(masks, bool).reshape(-1, plan.frames))
        labels = torch.tensor([self.videos[row].label for row in decoded], dtype=torch.int64)
        return [
            Batch(x[:, crop], mask, labels, np.array(decoded, int))
            for crop in range(plan.num_views)
        ]
