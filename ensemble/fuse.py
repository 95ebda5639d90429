"""Fusion: the weighted mean of several models' probabilities."""

from collections.abc import Sequence

import numpy as np
from scipy.special import log_softmax

from aggregate.scores import Scores
from ensemble.align import Aligned, Missing, align
from extract import InputError
from extract.cli import progress

ROWS_AT_ONCE = 2048  # M x 2048 x 700 float64 stay within 100 MB


def fuse(
    list_of_scores: Sequence[Scores],
    weights: Sequence[float] | np.ndarray | None = None,
    *,
    missing: Missing = "error",
) -> Scores:
    """Fuse scores of videos joined by id.

    The returned logits are the logarithms of the mean probabilities, so their softmax is that mean.
    Raises InputError as `align` and `checked_weights` do.

    Args:
        weights: [M], need not sum to 1; None for equal weights.
    """
    return fuse_aligned(align(list_of_scores, missing=missing), weights)


def fuse_aligned(aligned: Aligned, weights: Sequence[float] | np.ndarray | None = None) -> Scores:
    """`fuse` for scores that are aligned already.

    A video that failed in some models gets the mean of the others. A video that failed in all of
    them, or that a model does not list (`missing="worst"`), gets a row of NaN.
    """
    weights = checked_weights(weights, len(aligned.names))
    used = np.flatnonzero(weights).tolist()
    fused = np.empty((len(aligned.ids), len(aligned.classes)), np.float32)
    for start in progress(range(0, len(fused), ROWS_AT_ONCE), desc="fusing"):
        rows = slice(start, start + ROWS_AT_ONCE)
        failed = aligned.failed[used, rows]  # [models, rows]
        shares = weights[used, None] * ~failed
        total = shares.sum(axis=0)
        shares /= np.where(total > 0, total, 1)
        logs = np.stack([log_probabilities(aligned, model, rows) for model in used])
        logs[failed] = -np.inf  # failed rows must not give a video its peak
        # log sum_m w_m p_m relative to the peak, so that even improbable classes are not lost
        peak = np.maximum(logs.max(axis=0), -1e300)
        with np.errstate(divide="ignore"):  # videos without any scores become NaN below
            mean = np.log(np.einsum("mr,mrc->rc", shares, np.exp(logs - peak))) + peak
        # A probability below the range of float32 logits must not become -inf.
        fused[rows] = np.maximum(mean, np.finfo(np.float32).min)
    fused[aligned.unscored(weights)] = np.nan
    return Scores(
        ids=aligned.ids,
        classes=aligned.classes,
        logits=fused,
        labels=aligned.labels,
        groups=aligned.groups,
        source={
            "model": "ensemble",
            "members": list(aligned.names),
            "weights": weights.tolist(),
            "missing": aligned.missing,
            "split": aligned.split,
        },
    )


def log_probabilities(aligned: Aligned, model: int, rows: slice | np.ndarray) -> np.ndarray:
    """A model's log probabilities [rows, C] float64; log(1/C) if the video failed."""
    logits = aligned.logits[model][rows].astype(np.float64)
    logits[aligned.failed[model, rows]] = 0
    return log_softmax(logits, axis=1)


def checked_weights(weights: Sequence[float] | np.ndarray | None, models: int) -> np.ndarray:
    """Weights [M] scaled to sum to 1; None for equal weights.

    Raises InputError if the number of weights is not that of the models, if one is negative, and if
    all are 0.
    """
    weights = np.ones(models) if weights is None else np.asarray(weights, np.float64)
    described = ",".join(f"{weight:g}" for weight in np.atleast_1d(weights))
    if weights.shape != (models,):
        raise InputError(f"--weights {described}: got {weights.size} weights for {models} models")
    if not np.isfinite(weights).all() or (weights < 0).any() or not weights.sum() > 0:
        raise InputError(
            f"--weights {described}: weights are finite and not negative, and not all 0"
        )
    return weights / weights.sum()
