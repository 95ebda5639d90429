"""Where batches come from: features of a store, or frames decoded from videos. A training loop asks both the same."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

from aggregate.data.features import Batch, Placement, StoredFeatures, find_non_finite, usable
from aggregate.data.frames import VideoFrames
from aggregate.training.testing import attention, features_to_test, logits_of, predict
from extract.store import FeatureStore


class Source(Protocol):
    """Batches to train on, and scores of models over the videos that validate."""

    labels: np.ndarray  # of the validation videos: int [N]
    frames: int  # segments of a video in training

    def train_batches(self, epoch: int) -> Iterator[Batch]: ...

    def validate(self, models: Sequence[nn.Module], segments: int) -> list[np.ndarray]:
        """Logits of each model, float32 [N, C], the mean over crops; rows of NaN for videos that cannot be read."""

    def attention(self, model: nn.Module) -> dict[str, float]:
        """What there is to say of the attention of a model: s as `scale`, |s F_o| / |F| as `attention_ratio`."""

    def non_finite(self, rows: np.ndarray) -> str:
        """The name of the first video among `rows` whose input is not finite, "" where there is none."""


class CachedFeatures:
    """Videos of a feature store: `rows` to train on, `val_rows` to validate."""

    def __init__(
        self,
        store: FeatureStore,
        rows: np.ndarray,
        val_rows: np.ndarray,
        *,
        frames: int,
        batch_size: int,
        seed: int,
        device: torch.device,
        placement: Placement,
        shared: "CachedFeatures | None" = None,
    ) -> None:
        """Features that `shared` has read are not read again."""
        self.store, self.rows, self.val_rows = store, rows, val_rows
        self.frames, self.batch_size, self.seed = frames, batch_size, seed
        self.labels = store.labels[val_rows]
        self.training: StoredFeatures
        self.testing: StoredFeatures
        if shared is not None and np.array_equal(shared.rows, rows):
            self.training = shared.training
        else:
            self.training = StoredFeatures(store, rows, device=device, placement=placement, training=True)
        if shared is not None and np.array_equal(shared.val_rows, val_rows):
            self.testing = shared.testing
        else:
            self.testing = features_to_test(store, val_rows, device=device, placement=placement)

    def train_batches(self, epoch: int) -> Iterator[Batch]:
        return self.training.train_batches(epoch=epoch, frames=self.frames, batch_size=self.batch_size, seed=self.seed)

    def validate(self, models: Sequence[nn.Module], segments: int) -> list[np.ndarray]:
        crops = logits_of(
            models, self.store, self.val_rows, segments=segments, batch_size=self.batch_size, features=self.testing
        )
        return [one.mean(axis=1) for one in crops]

    def attention(self, model: nn.Module) -> dict[str, float]:
        """Over the first 1,024 validation videos that can be read."""
        rows = self.val_rows[usable(self.store)[self.val_rows]][:1024]
        few = StoredFeatures(self.store, rows, device=self.testing.device)
        found = attention(model, few.test_batches(frames=self.frames, batch_size=self.batch_size))
        return {} if found is None else dict(zip(("scale", "attention_ratio"), found, strict=True))

    def non_finite(self, rows: np.ndarray) -> str:
        return find_non_finite(self.store, rows)


@dataclass
class DecodedVideos:
    """Videos decoded as they are needed: this process's share of them where several (`world`) train together."""

    training: VideoFrames
    testing: VideoFrames  # every `world`-th of the validation videos, from `rank` on
    labels: np.ndarray
    frames: int
    batch_size: int
    micro_batch: int
    seed: int
    precision: str
    classes: int
    rank: int = 0
    world: int = 1
    failed: dict[int, str] = field(init=False)

    def __post_init__(self) -> None:
        self.failed = self.training.failed

    def train_batches(self, epoch: int) -> Iterator[Batch]:
        return self.training.train_batches(
            epoch=epoch, batch_size=self.batch_size, seed=self.seed, rank=self.rank, world=self.world
        )

    def validate(self, models: Sequence[nn.Module], segments: int) -> list[np.ndarray]:
        batches = self.testing.test_batches(batch_size=self.micro_batch)
        rows, predicted = predict(models, batches, precision=self.precision)
        mine = rows * self.world + self.rank, [scores.mean(axis=1) for scores in predicted]
        shares: list[Any] = [mine]
        if self.world > 1:
            shares = [None] * self.world
            dist.all_gather_object(shares, mine)
        several = [np.full((len(self.labels), self.classes), np.nan, np.float32) for _ in models]
        for places, scored in shares:
            for whole, scores in zip(several, scored, strict=False):  # a share without a video has no scores
                whole[places] = scores
        return several

    def attention(self, model: nn.Module) -> dict[str, float]:
        scale = getattr(getattr(getattr(model, "net", None), "aggregator", None), "scale", None)
        return {} if scale is None else {"scale": scale.item()}

    def non_finite(self, rows: np.ndarray) -> str:
        return ""  # pictures are always finite
