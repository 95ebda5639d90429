"""Where batches come from, features of a store or frames decoded from videos, and the scores of
models over them."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from aggregate.data.features import Batch, StoredFeatures
from aggregate.data.frames import VideoFrames
from aggregate.scores import group_keys
from aggregate.training.learner import Learner, autocast
from aggregate.training.options import HeadOptions
from extract import InputError, RunError
from extract.cli import progress
from extract.commands import command_line
from extract.store import FeatureStore


@dataclass
class CachedFeatures:
    """Videos of a feature store to train on, and those that validate."""

    training: StoredFeatures
    testing: StoredFeatures
    frames: int  # segments of a video in training
    batch_size: int
    seed: int
    balanced: bool = False  # training batches hold all classes equally often

    @property
    def labels(self) -> np.ndarray:
        """Of the validation videos: int [N]."""
        return self.testing.labels

    @cached_property
    def groups(self) -> np.ndarray:
        """What each validation video depends on (`group_keys`): str [N]."""
        store = self.training.store
        return group_keys(store.ids, store.groups)[self.testing.rows]

    def train_batches(self, epoch: int) -> Iterator[Batch]:
        how = {"frames": self.frames, "batch_size": self.batch_size, "seed": self.seed}
        return self.training.train_batches(epoch=epoch, **how, balanced=self.balanced)

    def validate(self, models: Sequence[nn.Module], segments: int) -> list[np.ndarray]:
        """Logits of each model, float32 [N, C], the mean over crops; rows of NaN for videos that
        cannot be read."""
        crops = logits_of(models, self.testing, segments=segments, batch_size=self.batch_size)
        return [one.mean(axis=1) for one in crops]

    def attention(self, model: nn.Module) -> dict[str, float]:
        """`attention` over the first 1,024 validation videos that can be read."""
        few = self.testing.subset(self.testing.rows[self.testing.usable][:1024])
        batches = few.test_batches(frames=self.frames, batch_size=self.batch_size)
        return attention(model, ((views[0].x, views[0].mask) for views in batches))

    def check_finite(self, rows: np.ndarray) -> None:
        """RunError naming the first video among `rows` whose input is not finite."""
        check_finite(self.training.store, rows)


@dataclass
class DecodedVideos:
    """The same of videos decoded as they are needed: this process's share of them where several
    train together."""

    training: VideoFrames
    testing: (
        VideoFrames  # every `learner.world`-th of the validation videos, from `learner.rank` on
    )
    labels: np.ndarray
    groups: np.ndarray  # what each validation video depends on: keys of `group_keys`
    classes: int
    frames: int
    learner: Learner  # trained on them

    def train_batches(self, epoch: int) -> Iterator[Batch]:
        by = self.learner
        size = by.recipe.batch_size
        return self.training.train_batches(
            epoch=epoch, batch_size=size, seed=by.seed, rank=by.rank, world=by.world
        )

    def validate(self, models: Sequence[nn.Module], segments: int) -> list[np.ndarray]:
        batches = self.testing.test_batches(batch_size=self.learner.micro_batch)
        rows, predicted = predict(models, batches, precision=self.learner.precision)
        mine = (
            rows * self.learner.world + self.learner.rank,
            [scores.mean(axis=1) for scores in predicted],
        )
        shares: list[Any] = [mine]
        if self.learner.world > 1:
            shares = [None] * self.learner.world
            dist.all_gather_object(shares, mine)
        if not any(len(places) for places, _ in shares):
            raise RunError(f"not one of {len(self.labels)} videos to test on can be decoded")
        several = [np.full((len(self.labels), self.classes), np.nan, np.float32) for _ in models]
        for places, scored in shares:
            for whole, scores in zip(
                several, scored, strict=False
            ):  # a share without a video has no scores
                whole[places] = scores
        return several

    def attention(self, model: nn.Module) -> dict[str, float]:
        net: Any = model.net
        return {"s": net.aggregator.scale.item()} if hasattr(net.aggregator, "scale") else {}

    def check_finite(self, rows: np.ndarray) -> None:
        pass  # pictures always are


Source = CachedFeatures | DecodedVideos


@torch.inference_mode()
def predict(
    models: Sequence[nn.Module], batches: Iterable[Sequence[Batch]], *, precision: str = "auto"
) -> tuple[np.ndarray, list[np.ndarray]]:
    """Rows int64 [N] that the batches hold, and logits of each model for them, float32 [N, views,
    C].

    `batches` hold one `Batch` a view, each read once for all models.
    """
    rows: list[np.ndarray] = []
    parts: list[list[np.ndarray]] = [[] for _ in models]
    for model in models:
        model.eval()
    for views in batches:
        rows.append(views[0].rows)
        for model, part in zip(models, parts, strict=True):
            with autocast(next(model.parameters()).device, precision):
                logits = [model(batch.x, batch.mask) for batch in views]
            part.append(torch.stack(logits, dim=1).float().cpu().numpy())
    return np.concatenate(rows or [np.empty(0, int)]), [
        np.concatenate(part) for part in parts if part
    ]


def logits_of(
    models: Sequence[nn.Module], features: StoredFeatures, *, segments: int, batch_size: int
) -> list[np.ndarray]:
    """Logits of each model over all videos of `features`: float32 [N, crops, C], NaN where
    extraction failed.

    A model that makes of finite features what is not finite has no logits but NaN. Raises
    InputError where extraction failed for all videos, RunError naming a video whose features are
    not finite.
    """
    store = features.store
    if not features.usable.any():
        count = f"all {len(features)} videos"
        raise InputError(
            f"{store.path}: {count} failed in extraction; see `{command_line('extract.status', store.path)}`"
        )
    batches = features.test_batches(frames=segments, batch_size=batch_size)
    total = -(-int(features.usable.sum()) // batch_size)
    seen, predicted = predict(models, progress(batches, total=total, unit="batch", leave=False))
    several = []
    for scores in predicted:
        wrong = seen[~np.isfinite(scores).all(axis=(1, 2))]
        check_finite(store, wrong)
        logits = np.full((len(features), *scores.shape[1:]), np.nan, np.float32)
        logits[features.usable] = np.nan if len(wrong) else scores
        several.append(logits)
    return several


def check_finite(store: FeatureStore, rows: np.ndarray) -> None:
    """RunError naming the first of `rows` whose stored features hold NaN or infinity."""
    for row in rows:
        if not np.isfinite(store.read(np.array([row]))).all():
            raise RunError(
                f"{store.path}: the stored features of {store.ids[row]} (row {row}) are not finite; "
                f"`{command_line('extract.verify', store.path)}` checks the store"
            )


@torch.inference_mode()
def attention(
    model: nn.Module, batches: Iterable[tuple[Tensor, Tensor | None]]
) -> dict[str, float]:
    """How much `model` uses its attention, over batches of features and masks; {} if it has none.

    unevenness: how far frame weights are from even, the mean over videos and groups of
    KL(weights || even) / log n; 0 is even, 1 is a single frame. changed: the fraction of videos
    whose predicted class is another one if their weights are made even. s, if there is one.
    """
    aggregator: Any = getattr(model, "aggregator", None)
    if not hasattr(aggregator, "with_even_weights"):
        return {}
    model.eval()
    unevenness, changed = [], []
    for x, mask in batches:
        valid = slice(None) if mask is None else mask.any(1)
        x, mask = x[valid].float(), None if mask is None else mask[valid]
        unevenness.append(_unevenness(aggregator.frame_weights(x, mask), mask))
        even: Any = model.classify(aggregator.with_even_weights(x, mask))  # type: ignore[operator]
        changed.append(even.argmax(1) != model(x, mask).argmax(1))
    measured = {
        "unevenness": float(torch.cat(unevenness).mean()),
        "changed": float(torch.cat(changed).float().mean()),
    }
    return {"s": float(aggregator.scale)} | measured if hasattr(aggregator, "scale") else measured


def _unevenness(weights: Tensor, mask: Tensor | None) -> Tensor:
    """KL(weights || even) / log n of [batch, groups, time], the mean over groups: [batch]. A silent
    group is even."""
    total = weights.sum(-1, keepdim=True)
    count = (
        torch.full_like(total[:, 0], weights.shape[-1])
        if mask is None
        else mask.sum(1, keepdim=True)
    )
    entropy = torch.special.entr(weights / total.clamp(min=1e-12)).sum(-1)
    log_n = count.clamp(min=2).to(weights.dtype).log()
    return (((log_n - entropy) / log_n) * (total[..., 0] > 0) * (count > 1)).mean(1)


def attention_text(measured: dict[str, float]) -> str:
    """One sentence about `attention`, in plain words."""
    return (
        f"frame weights are {measured['unevenness']:.1%} of the way from even to a single frame; made even, "
        f"{measured['changed']:.1%} of the predictions change"
        + (
            ""
            if measured["changed"]
            else ": attention is not used, this model is its average of frames"
        )
    )


def with_possible_frames(options: Any, store: FeatureStore) -> Any:
    """`options`, with --frames at what is stored if that is less than the default; a number given
    by a person stays."""
    default, stored = HeadOptions.frames, store.frames_per_video
    if stored >= default or options.frames not in (default, (default,)):
        return options
    print(
        f"frames    {store.path} holds {stored} per video, so models train with {stored} instead of {default}"
    )
    return replace(options, frames=stored if options.frames == default else (stored,))


def possible_segments(wanted: Sequence[int], store: FeatureStore) -> list[int]:
    """The numbers asked for, each at most what is stored (said where that changes one)."""
    stored = store.frames_per_video
    if min(wanted, default=0) < 1:
        raise InputError(f"--segments {' '.join(map(str, wanted))}: each must be at least 1")
    if max(wanted) > stored:
        print(
            f"{store.path} holds {stored} frames per video, so {max(wanted)} segments become {stored}"
        )
    return sorted({min(segments, stored) for segments in wanted})
