"""Fusion: the weighted mean of several models' probabilities, or of their logits."""

from collections.abc import Sequence
from typing import Literal, get_args

import numpy as np

from aggregate.scores import Scores
from ensemble.align import Aligned, Missing, align
from extract.cli import InputError

Of = Literal["probabilities", "logits"]

_ROWS_AT_ONCE = 2048  # M x 2048 x 700 float64 stay within 100 MB


def fuse(
    list_of_scores: Sequence[Scores],
    weights: Sequence[float] | np.ndarray | None = None,
    *,
    of: Of = "probabilities",
    temperatures: Sequence[float] | None = None,
    missing: Missing = "error",
) -> Scores:
    """Fused scores of videos joined by id. `weights` [M] need not sum to 1; None is equal ones.

    The logits that come back are the log of the mean probabilities, so that their softmax gives these back; or, with
    `of="logits"`, the mean logits. `temperatures` [M] divide each model's logits first. Raises InputError as `align`
    does, and for weights or temperatures that are none.
    """
    return fuse_aligned(align(list_of_scores, missing=missing), weights, of=of, temperatures=temperatures)


def fuse_aligned(
    aligned: Aligned,
    weights: Sequence[float] | np.ndarray | None = None,
    *,
    of: Of = "probabilities",
    temperatures: Sequence[float] | None = None,
) -> Scores:
    """`fuse` of what is joined already. A video that failed in some models is the mean of the others'; one that failed
    in all of them, or that a model does not list (`missing="worst"`), is a row of NaN."""
    weights = checked_weights(weights, len(aligned.names))
    scales = checked_temperatures(temperatures, len(aligned.names))
    if of not in get_args(Of):
        raise InputError(f"--of {of} is unknown; known are {', '.join(get_args(Of))}")
    used = np.flatnonzero(weights).tolist()
    fused = np.empty((len(aligned.ids), len(aligned.classes)), np.float32)
    for start in range(0, len(fused), _ROWS_AT_ONCE):
        rows = slice(start, start + _ROWS_AT_ONCE)
        there = ~aligned.failed[used, rows]
        parts = [scaled(aligned, model, rows, scales) for model in used]
        mean = _mean_of_logits if of == "logits" else _log_of_mean_probabilities
        # A probability below what float32 can say in logits must not become -inf.
        fused[rows] = np.maximum(mean(parts, weights[used], there), np.finfo(np.float32).min)
    fused[aligned.unscored(weights)] = np.nan
    return Scores(
        ids=aligned.ids,
        classes=aligned.classes,
        logits=fused,
        labels=aligned.labels,
        source={
            "model": "ensemble",
            "members": list(aligned.names),
            "weights": weights.tolist(),
            "temperatures": scales.tolist(),
            "of": of,
            "missing": aligned.missing,
        },
    )


def scaled(aligned: Aligned, model: int, rows: slice | np.ndarray, temperatures: np.ndarray) -> np.ndarray:
    """A model's logits [rows, C] float64 divided by its temperature; 0 where the video failed."""
    logits = aligned.logits[model][rows].astype(np.float64) / temperatures[model]
    logits[aligned.failed[model, rows]] = 0
    return logits


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Over the last axis."""
    shifted = logits - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def checked_weights(weights: Sequence[float] | np.ndarray | None, models: int) -> np.ndarray:
    """Weights [M] that sum to 1; None is equal ones. InputError for another number of them, negative or all zero."""
    if weights is None:
        return np.full(models, 1 / models)
    found = np.asarray(weights, np.float64)
    said = ",".join(f"{weight:g}" for weight in np.atleast_1d(found))
    if found.shape != (models,):
        raise InputError(f"--weights {said}: got {found.size} weights for {models} models")
    if not np.isfinite(found).all() or (found < 0).any() or not found.sum() > 0:
        raise InputError(f"--weights {said}: weights are finite and not negative, and not all 0")
    return found / found.sum()


def checked_temperatures(temperatures: Sequence[float] | None, models: int) -> np.ndarray:
    """Temperatures [M], None is all 1; InputError for another number of them, or one that is not above 0."""
    if temperatures is None:
        return np.ones(models)
    found = np.asarray(temperatures, np.float64)
    said = ",".join(f"{value:g}" for value in np.atleast_1d(found))
    if found.shape != (models,):
        raise InputError(f"--temperatures {said}: got {found.size} temperatures for {models} models")
    if not np.isfinite(found).all() or (found <= 0).any():
        raise InputError(f"--temperatures {said}: temperatures are finite and above 0")
    return found


def _shares(weights: np.ndarray, there: np.ndarray) -> np.ndarray:
    """Each video's weights [M, rows] over the models that have it, summing to 1; 0 where none has it."""
    shares = weights[:, None] * there
    total = shares.sum(axis=0)
    return shares / np.where(total > 0, total, 1)


def _mean_of_logits(parts: Sequence[np.ndarray], weights: np.ndarray, there: np.ndarray) -> np.ndarray:
    shares = _shares(weights, there)
    mean = shares[0][:, None] * parts[0]
    for share, part in zip(shares[1:], parts[1:], strict=True):
        mean += share[:, None] * part
    return mean


def _log_of_mean_probabilities(parts: Sequence[np.ndarray], weights: np.ndarray, there: np.ndarray) -> np.ndarray:
    """log sum_m w_m p_m without leaving the logarithm, so that no class is lost however improbable."""
    logs = [log_softmax(part) for part in parts]
    for log, here in zip(logs, there, strict=True):
        log[~here] = -np.inf  # must not be the peak of a video that it says nothing about
    peak = logs[0].copy()
    for log in logs[1:]:
        np.maximum(peak, log, out=peak)
    peak[~there.any(axis=0)] = 0
    total = np.zeros_like(peak)
    for share, log in zip(_shares(weights, there), logs, strict=True):
        log -= peak
        total += share[:, None] * np.exp(log, out=log)
    with np.errstate(divide="ignore"):  # videos that no model has: NaN in the end
        return np.log(total) + peak
