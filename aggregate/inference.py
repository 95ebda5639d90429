"""Predictions of trained models over batches, and how much their attention matters."""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from aggregate.data.features import Batch, StoredFeatures
from extract import InputError, RunError
from extract.cli import progress
from extract.commands import command_line
from extract.store import FeatureStore


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """torch.autocast for the precision fp32, bf16, fp16, or auto: bf16 on a GPU, else fp32."""
    if precision == "auto":
        precision = "bf16" if device.type == "cuda" else "fp32"
    half = torch.float16 if precision == "fp16" else torch.bfloat16
    return torch.autocast(device.type, half, enabled=precision != "fp32")


@torch.inference_mode()
def predict(
    models: Sequence[nn.Module], batches: Iterable[Sequence[Batch]], *, precision: str = "auto"
) -> tuple[np.ndarray, list[np.ndarray]]:
    """Run all models over `batches`. An item of `batches` holds one `Batch` per view.

    Every batch is read once for all models.

    Returns:
        rows: int64 [N], the rows of all batches.
        logits: of each model, float32 [N, views, C]; empty if there is no batch.
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
    if not rows:
        return np.empty(0, int), []
    return np.concatenate(rows), [np.concatenate(part) for part in parts]


def logits_of(
    models: Sequence[nn.Module], features: StoredFeatures, *, segments: int, batch_size: int
) -> list[np.ndarray]:
    """Logits of each model over all videos of `features`: float32 [N, crops, C].

    A video that failed in extraction has NaN. If a model gives NaN or infinity for finite features,
    all its logits are NaN. Raises InputError if extraction failed for all videos, and RunError
    naming a video whose features are not finite.
    """
    store = features.store
    if not features.usable.any():
        status = command_line("extract.status", store.path)
        raise InputError(
            f"{store.path}: all {len(features)} videos failed in extraction; see `{status}`"
        )
    batches = features.test_batches(frames=segments, batch_size=batch_size)
    total = -(-int(features.usable.sum()) // batch_size)
    seen, predicted = predict(models, progress(batches, total=total, unit="batch", leave=False))
    logits_by_model = []
    for scores in predicted:
        not_finite = seen[~np.isfinite(scores).all(axis=(1, 2))]
        check_finite(store, not_finite)
        logits = np.full((len(features), *scores.shape[1:]), np.nan, np.float32)
        if not len(not_finite):
            logits[features.usable] = scores
        logits_by_model.append(logits)
    return logits_by_model


def check_finite(store: FeatureStore, rows: np.ndarray) -> None:
    """RunError naming the first of `rows` whose stored features hold NaN or infinity."""
    for row in rows:
        if not np.isfinite(store.read(np.array([row]))).all():
            raise RunError(
                f"{store.path}: the stored features of {store.ids[row]} (row {row}) are not "
                f"finite; `{command_line('extract.verify', store.path)}` checks the store"
            )


# -- attention -------------------------------------------------------------------------------------


@torch.inference_mode()
def attention(
    model: nn.Module, batches: Iterable[tuple[Tensor, Tensor | None]]
) -> dict[str, float]:
    """How much `model` uses its attention, over batches of features and masks; {} if it has none.

    Returns:
        unevenness: distance of frame weights from even ones, the mean over videos and groups of
            KL(weights || even) / log n; 0 is even, 1 is a single frame.
        changed: fraction of videos whose predicted class changes with even weights.
        s: the scale of NL and HG-NL.
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
    scale = {"s": float(aggregator.scale)} if hasattr(aggregator, "scale") else {}
    return scale | {
        "unevenness": float(torch.cat(unevenness).mean()),
        "changed": float(torch.cat(changed).float().mean()),
    }


def _unevenness(weights: Tensor, mask: Tensor | None) -> Tensor:
    """KL(weights || even) / log n of [batch, groups, time], the mean over groups: [batch].

    A group whose weights are all 0 counts as even.
    """
    total = weights.sum(-1, keepdim=True)
    if mask is None:
        count = torch.full_like(total[:, 0], weights.shape[-1])
    else:
        count = mask.sum(1, keepdim=True)
    entropy = torch.special.entr(weights / total.clamp(min=1e-12)).sum(-1)
    log_n = count.clamp(min=2).to(weights.dtype).log()
    divergence = (log_n - entropy) / log_n
    return (divergence * (total[..., 0] > 0) * (count > 1)).mean(1)


def attention_text(measured: dict[str, float]) -> str:
    """One sentence about the result of `attention`."""
    text = (
        f"frame weights are {measured['unevenness']:.1%} of the way from even to a single frame; "
        f"made even, {measured['changed']:.1%} of the predictions change"
    )
    if measured["changed"]:
        return text
    return f"{text}: attention is not used, this model is its average of frames"
