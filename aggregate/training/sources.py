"""Where training batches and validation scores come from: a feature store, or decoded videos."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch.distributed as dist
from torch import nn

from aggregate.data.features import Batch, StoredFeatures
from aggregate.data.frames import VideoFrames
from aggregate.inference import attention, check_finite, logits_of, predict
from aggregate.scores import group_keys
from aggregate.training.learner import Learner
from extract import RunError


@dataclass
class CachedFeatures:
    """Videos of a feature store: those to train on, and those to validate on."""

    training: StoredFeatures
    testing: StoredFeatures
    frames: int  # segments per video in training

    @property
    def labels(self) -> np.ndarray:
        """Labels of the validation videos: int [N]."""
        return self.testing.labels

    @cached_property
    def groups(self) -> np.ndarray:
        """The group key of each validation video (`group_keys`): str [N]."""
        store = self.training.store
        return group_keys(store.ids, store.groups)[self.testing.rows]

    def train_batches(self, learner: Learner, epoch: int) -> Iterator[Batch]:
        """The batches of an epoch, for all learners with the batch size and seed of `learner`."""
        return self.training.train_batches(
            epoch=epoch,
            frames=self.frames,
            batch_size=learner.recipe.batch_size,
            seed=learner.seed,
            balanced=learner.recipe.balance == "sampler",
        )

    def validate(
        self, models: Sequence[nn.Module], segments: int, learner: Learner
    ) -> list[np.ndarray]:
        """Logits of each model, float32 [N, C], the mean over crops; NaN for unreadable videos.

        Batches have the size that `learner` is trained with.
        """
        batch_size = learner.recipe.batch_size
        crops = logits_of(models, self.testing, segments=segments, batch_size=batch_size)
        return [logits.mean(axis=1) for logits in crops]

    def attention(self, learner: Learner) -> dict[str, float]:
        """`attention` over the first 1,024 validation videos that can be read."""
        first_videos = self.testing.subset(self.testing.rows[self.testing.usable][:1024])
        batches = first_videos.test_batches(
            frames=self.frames, batch_size=learner.recipe.batch_size
        )
        return attention(learner.model, ((views[0].x, views[0].mask) for views in batches))

    def check_finite(self, rows: np.ndarray) -> None:
        """RunError naming the first video among `rows` whose input is not finite."""
        check_finite(self.training.store, rows)


@dataclass
class DecodedVideos:
    """Videos that are decoded as they are needed, with the methods of `CachedFeatures`.

    With several training processes, each process decodes its share of the videos.
    """

    training: VideoFrames
    testing: VideoFrames  # every `world`-th of the validation videos, from `rank` on
    labels: np.ndarray  # int [N], labels of all validation videos
    groups: np.ndarray
    classes: int
    frames: int

    def train_batches(self, learner: Learner, epoch: int) -> Iterator[Batch]:
        return self.training.train_batches(
            epoch=epoch,
            batch_size=learner.recipe.batch_size,
            seed=learner.seed,
            rank=learner.rank,
            world=learner.world,
        )

    def validate(
        self, models: Sequence[nn.Module], segments: int, learner: Learner
    ) -> list[np.ndarray]:
        batches = self.testing.test_batches(batch_size=learner.micro_batch)
        share_rows, crops = predict(models, batches, precision=learner.precision)
        own_rows = share_rows * learner.world + learner.rank
        parts: list[Any] = [(own_rows, [logits.mean(axis=1) for logits in crops])]
        if learner.world > 1:
            gathered: list[Any] = [None] * learner.world
            dist.all_gather_object(gathered, parts[0])
            parts = [part for part in gathered if len(part[0])]
        if not any(len(rows) for rows, _ in parts):
            raise RunError(f"none of the {len(self.labels)} videos to test on can be decoded")
        shape = (len(models), len(self.labels), self.classes)
        logits_by_model = np.full(shape, np.nan, np.float32)
        for rows, scores in parts:
            logits_by_model[:, rows] = scores
        return list(logits_by_model)

    def attention(self, learner: Learner) -> dict[str, float]:
        scale: Any = getattr(learner.net.aggregator, "scale", None)
        return {} if scale is None else {"s": scale.item()}

    def check_finite(self, rows: np.ndarray) -> None:
        """Decoded frames are always finite."""


Source = CachedFeatures | DecodedVideos
