"""Probes on one vector per video, by scikit-learn: logistic regression and k nearest neighbors.

The vector of a video is the mean of its frames over time and crops (`--vector mean-std` appends
their standard deviation over time). Training vectors use all stored frames; a test with n segments
uses the middle frames of n segments.

    logreg   LogisticRegression (lbfgs) on standardized vectors; logits are log probabilities
    knn      votes are weighted by exp(s / 0.07) with cosine similarity s, as in DINO's kNN (Caron
             et al. 2021); logits are log(share of votes + 1e-6), so that they are finite
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
from extract.commands import spaced

_TEMPERATURE = 0.07
_NO_VOTE = 1e-6
_BATCH = 256


class Probe(NamedTuple):
    """A probe to fit, with one setting of its options."""

    agg: str  # logreg or knn
    strength: float  # C, or k
    standardize: bool
    iterations: int = 1000
    balanced: bool = False

    @property
    def name(self) -> str:
        return f"{self.agg} {'C' if self.agg == 'logreg' else 'k'}={self.strength:g}"

    def fit(self, vectors: np.ndarray, labels: np.ndarray) -> "FittedProbe":
        """Fit to vectors float32 [N, D] and labels int [N]."""
        if self.agg == "logreg":
            weight = "balanced" if self.balanced else None
            classifier = LogisticRegression(
                C=self.strength, max_iter=self.iterations, class_weight=weight
            )
        else:
            neighbors = min(int(self.strength), len(vectors))
            classifier = KNeighborsClassifier(neighbors, metric="cosine", weights=_vote_weights)
        scaler = [StandardScaler()] if self.standardize else []
        model = make_pipeline(*scaler, classifier)
        with warnings.catch_warnings():
            # Fits that do not converge are counted, and their number is printed instead.
            warnings.simplefilter("ignore", ConvergenceWarning)
            model.fit(vectors, labels)
        return FittedProbe(model, self)


class FittedProbe(NamedTuple):
    """A probe after fitting."""

    model: Pipeline
    probe: Probe

    @property
    def converged(self) -> bool:
        """False if the solver stopped at its last iteration."""
        iterations = getattr(self.model[-1], "n_iter_", None)
        return iterations is None or bool(max(iterations) < self.probe.iterations)

    def logits(self, vectors: np.ndarray, num_classes: int) -> np.ndarray:
        """Logits float32 [N, num_classes]; NaN for vectors that are not finite.

        A class without a training video gets the lowest logit of the others.
        """
        finite = np.isfinite(vectors).all(axis=1)
        logits = np.full((len(vectors), num_classes), np.nan, np.float32)
        if not finite.any():
            return logits
        probabilities = self.model.predict_proba(vectors[finite])
        if self.probe.agg == "knn":
            probabilities += _NO_VOTE
        trained = np.log(np.maximum(probabilities, np.finfo(np.float32).tiny))
        all_classes = np.repeat(trained.min(axis=1, keepdims=True), num_classes, axis=1)
        all_classes[:, self.model.classes_] = trained
        logits[finite] = all_classes
        return logits


def _vote_weights(distances: np.ndarray) -> np.ndarray:
    """Weights for cosine distances [N, k], relative to the nearest, so that none underflows."""
    return np.exp((distances.min(axis=1, keepdims=True) - distances) / _TEMPERATURE)


def probe_candidates(agg: str, options: Any) -> list[Probe]:
    """All combinations of the options of `agg` (of aggregate.crossval). InputError for invalid
    values."""
    name = "C" if agg == "logreg" else "k"
    strengths = getattr(options, name)
    if not strengths or min(strengths) <= 0:
        raise InputError(f"--{name} {spaced(strengths)}: expected one or more numbers above 0")
    standardize = [value == "true" for value in options.standardize] or [agg == "logreg"]
    iterations = options.epochs or (1000,)
    balance = [value == "loss" for value in options.balance] if agg == "logreg" else [False]
    grid = itertools.product(standardize, iterations, dict.fromkeys(balance), strengths)
    return [Probe(agg, strength, *others) for *others, strength in grid]


def video_vectors(features: StoredFeatures, segments: int, vector: str) -> np.ndarray:
    """One vector per row of `features`, float32 [N, D], or [N, 2 D] with "mean-std"; NaN for failed
    videos."""
    width = features.store.dim * (2 if vector == "mean-std" else 1)
    vectors = np.full((len(features), width), np.nan, np.float32)
    start, rows = 0, np.flatnonzero(features.usable)
    for views in features.test_batches(frames=segments, batch_size=_BATCH):
        x = np.concatenate([view.x.cpu().float().numpy() for view in views], axis=1)
        masks = [
            np.ones(view.x.shape[:2], bool) if view.mask is None else view.mask.cpu().numpy()
            for view in views
        ]
        weight = np.concatenate(masks, axis=1)[..., None].astype(np.float32)  # [B, views x n, 1]
        count = weight.sum(axis=1)
        mean = (x * weight).sum(axis=1) / count
        parts = [mean]
        if vector == "mean-std":
            parts.append(np.sqrt((np.square(x - mean[:, None]) * weight).sum(axis=1) / count))
        vectors[rows[start : start + len(x)]] = np.concatenate(parts, axis=1)
        start += len(x)
    return vectors
