"""Probes on one vector per video, by scikit-learn: logistic regression and k nearest neighbors.

The vector of a video is the mean of its frames over time and crops (`--vector mean-std` appends
their deviation over time). Training vectors are of all stored frames; a test with n segments sees
the middles of those.

    logreg   LogisticRegression (lbfgs) on standardized vectors; logits are log probabilities
    knn      cosine similarity s, votes weigh exp(s / 0.07) (as in DINO's kNN, Caron et al. 2021); logits are logs of
             the share of votes, plus 1e-6, so that they are finite
"""

import itertools
import warnings
from typing import Any, NamedTuple

import numpy as np
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler

from aggregate.data.features import StoredFeatures
from extract import InputError

PROBES = ("logreg", "knn")

_TEMPERATURE = 0.07
_NO_VOTE = 1e-6
_BATCH = 256


class Probe(NamedTuple):
    """A setting of `agg` (logreg or knn): `strength` is C, or k."""

    agg: str
    strength: float
    standardize: bool
    iterations: int = 1000
    balanced: bool = False

    @property
    def name(self) -> str:
        return f"{self.agg} {'C' if self.agg == 'logreg' else 'k'}={self.strength:g}"

    def fit(self, vectors: np.ndarray, labels: np.ndarray) -> "FittedProbe":
        """Fit to vectors float32 [N, D] and labels int [N]."""
        steps: list[Any] = [StandardScaler()] if self.standardize else []
        if self.agg == "logreg":
            weight = "balanced" if self.balanced else None
            steps.append(
                LogisticRegression(C=self.strength, max_iter=self.iterations, class_weight=weight)
            )
        else:
            neighbors = min(int(self.strength), len(vectors))
            steps.append(KNeighborsClassifier(neighbors, metric="cosine", weights=_vote_weights))
        model = make_pipeline(*steps)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # counted instead, and printed
            model.fit(vectors, labels)
        return FittedProbe(model, self)


class FittedProbe(NamedTuple):
    """A probe that was fitted; `converged` is False if the solver ended at its last iteration."""

    model: Pipeline
    probe: Probe

    @property
    def converged(self) -> bool:
        iterations = getattr(self.model[-1], "n_iter_", None)
        return iterations is None or bool(max(iterations) < self.probe.iterations)

    def logits(self, vectors: np.ndarray, num_classes: int) -> np.ndarray:
        """Logits float32 [N, num_classes]; of a class without a training video the lowest. NaN
        stays NaN."""
        good = np.isfinite(vectors).all(axis=1)
        logits = np.full((len(vectors), num_classes), np.nan, np.float32)
        if not good.any():
            return logits
        if self.probe.agg == "logreg":
            with np.errstate(
                divide="ignore"
            ):  # a probability that rounds to 0; it is the lowest below
                known = self.model.predict_log_proba(vectors[good])
        else:
            known = np.log(self.model.predict_proba(vectors[good]) + _NO_VOTE)
        known = np.maximum(known, np.log(np.finfo(np.float32).tiny))
        every = np.repeat(known.min(axis=1, keepdims=True), num_classes, axis=1)
        every[:, self.model.classes_] = known
        logits[good] = every
        return logits


def _vote_weights(distances: np.ndarray) -> np.ndarray:
    """Of cosine distances [N, k], relative to the nearest so that none underflows."""
    return np.exp((distances.min(axis=1, keepdims=True) - distances) / _TEMPERATURE)


def probe_candidates(agg: str, options: Any) -> list[Probe]:
    """All combinations of the options of `agg` (of aggregate.crossval). InputError for values that
    cannot be."""
    strengths = options.C if agg == "logreg" else options.k
    flag = "--C" if agg == "logreg" else "--k"
    if not strengths or min(strengths) <= 0:
        raise InputError(
            f"{flag} {' '.join(map(str, strengths))}: expected one or more numbers above 0"
        )
    standardize = [value == "true" for value in options.standardize] or [agg == "logreg"]
    iterations = options.epochs or (1000,)
    balance = [value == "loss" for value in options.balance] if agg == "logreg" else [False]
    tried = itertools.product(standardize, iterations, dict.fromkeys(balance), strengths)
    return [
        Probe(agg, strength, scaled, most, balanced) for scaled, most, balanced, strength in tried
    ]


def video_vectors(features: StoredFeatures, segments: int, vector: str) -> np.ndarray:
    """One vector per row of `features`, float32 [N, D], or [N, 2 D] with "mean-std"; NaN for failed
    videos."""
    dim = features.store.dim
    vectors = np.full((len(features), dim * (1 + (vector == "mean-std"))), np.nan, np.float32)
    start, good = 0, np.flatnonzero(features.usable)
    for views in features.test_batches(frames=segments, batch_size=_BATCH):
        x = np.concatenate(
            [view.x.cpu().float().numpy() for view in views], axis=1
        )  # [B, views x n, D]
        masks = [
            np.ones(view.x.shape[:2], bool) if view.mask is None else view.mask.cpu().numpy()
            for view in views
        ]
        weight = np.concatenate(masks, axis=1)[..., None].astype(np.float32)
        count = weight.sum(axis=1)
        mean = (x * weight).sum(axis=1) / count
        parts = [mean]
        if vector == "mean-std":
            parts.append(np.sqrt((np.square(x - mean[:, None]) * weight).sum(axis=1) / count))
        vectors[good[start : start + len(x)]] = np.concatenate(parts, axis=1)
        start += len(x)
    return vectors
