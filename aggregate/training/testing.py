"""Scores of models over the videos of a source of batches, cached features and decoded videos alike."""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from aggregate.data.features import Batch, Placement, StoredFeatures, evaluation_views, find_non_finite, usable
from aggregate.training.learner import autocast
from extract.cli import InputError, RunError
from extract.store import PENDING, FeatureStore


class DamagedModelError(RunError):
    """Scores that are no numbers; `place` is the model's, among those asked."""

    def __init__(self, message: str, place: int):
        super().__init__(message)
        self.place = place


@torch.inference_mode()
def predict(
    models: Sequence[nn.Module], batches: Iterable[Sequence[Batch]], *, precision: str = "auto"
) -> tuple[np.ndarray, list[np.ndarray]]:
    """Rows int64 [N] that the batches hold, and logits of each model for them, float32 [N, views, C].

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
    return np.concatenate(rows or [np.empty(0, int)]), [np.concatenate(part) for part in parts if part]


@torch.inference_mode()
def attention(model: nn.Module, batches: Iterable[Sequence[Batch]]) -> tuple[float, float] | None:
    """s, and the mean over videos of |s F_o| / |F| (both averaged over frames); None where a model has no s."""
    aggregator: Any = getattr(model, "aggregator", None)
    if not hasattr(aggregator, "attention_ratio"):
        return None
    model.eval()
    ratios = []
    for views in batches:
        batch = views[0]
        valid = slice(None) if batch.mask is None else batch.mask.any(1)
        mask = None if batch.mask is None else batch.mask[valid]
        ratios.append(aggregator.attention_ratio(batch.x[valid].float(), mask).cpu())
    return float(aggregator.scale), float(torch.cat(ratios).mean())


def features_to_test(
    store: FeatureStore, rows: np.ndarray, *, device: torch.device | str, placement: Placement = "auto"
) -> StoredFeatures:
    """The features of those of `rows` that did not fail in extraction. InputError where all did."""
    good = usable(store)[rows] | (store.status[rows] == PENDING)  # a pending one is refused by StoredFeatures
    if not good.any():
        raise InputError(f"{store.path}: all {len(rows)} videos failed in extraction; see `python -m extract.status`")
    return StoredFeatures(store, rows[good], device=device, placement=placement)


def logits_of(
    models: Sequence[nn.Module],
    store: FeatureStore,
    rows: np.ndarray,
    *,
    segments: int,
    batch_size: int,
    features: StoredFeatures,
) -> list[np.ndarray]:
    """Logits of each model over videos `rows`: float32 [N, crops, C], NaN where extraction failed.

    `features` are those of `features_to_test`. Raises RunError naming a video whose features are not finite,
    DamagedModelError for a model whose scores are not.
    """
    seen, predicted = predict(models, features.test_batches(frames=segments, batch_size=batch_size))
    good = np.isin(rows, seen)
    several = []
    for place, scores in enumerate(predicted):
        wrong = ~np.isfinite(scores).all(axis=(1, 2))
        if wrong.any():
            refuse_non_finite(store, seen[wrong])
            name = store.ids[seen[wrong][0]]
            raise DamagedModelError(
                f"scores of {name} are not finite though its features are; the weights are damaged", place
            )
        logits = np.full((len(rows), len(evaluation_views(store)), scores.shape[2]), np.nan, np.float32)
        logits[good] = scores
        several.append(logits)
    return several


def refuse_non_finite(store: FeatureStore, rows: np.ndarray) -> None:
    """RunError naming the first of `rows` whose stored features are not finite."""
    if name := find_non_finite(store, rows):
        raise RunError(
            f"{store.path}: the stored features of {name} are not finite; `python -m extract.verify` checks the store"
        )


def possible_segments(wanted: Sequence[int], store: FeatureStore) -> list[int]:
    """The numbers asked for, each at most what is stored (said where that changes one)."""
    stored = store.frames_per_video
    if min(wanted, default=0) < 1:
        raise InputError(f"--segments {' '.join(map(str, wanted))}: each must be at least 1")
    if max(wanted) > stored:
        print(f"{store.path} holds {stored} frames a video: {stored} segments in the place of {max(wanted)}")
    return sorted({min(segments, stored) for segments in wanted})
