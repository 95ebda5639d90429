"""Find pairs of nearly identical videos by their mean features (numpy only).

Cosine similarity of raw features means little: all videos from one gym are similar. So features are
whitened first (Jegou and Chum 2012), and each distance is compared with the usual distances around
its two videos. The store's intrinsic dimension (Levina and Bickel 2004) tells how close two
different videos come by chance.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

COMPONENTS = 64  # number of principal components that are kept
SHRINKAGE = 0.1  # added to each variance, as a fraction of the mean variance
SAMPLE = 20_000  # number of rows for the estimates of covariance and usual distances
NEIGHBORS = 5  # number of nearest rows from which the usual distance around a video is estimated
BLOCK = 2048  # number of rows per block of similarities


@dataclass(frozen=True)
class Pairs:
    """P pairs of rows, the most similar first."""

    rows: np.ndarray  # int [P, 2]
    similarity: np.ndarray  # [P], the cosine of the whitened features
    ratio: np.ndarray  # [P], the distance divided by the usual distance around both videos
    threshold: float  # the largest ratio that is kept

    def __len__(self) -> int:
        return len(self.rows)


def near_duplicates(
    features: np.ndarray,
    units: np.ndarray,
    *,
    queries: np.ndarray | None = None,
    false_alarms: float = 0.02,
) -> Pairs:
    """Find pairs of rows of different units whose features are closer than chance explains.

    With fewer than NEIGHBORS + 2 rows, no usual distance can be estimated, and no pair is found.

    Args:
        features: float [N, D], one vector per video.
        units: int [N]; rows of one unit (a subject, a file) are never paired.
        queries: int [Q], the rows whose partners are searched, by default all. Q x N similarities
            are computed in blocks.
        false_alarms: the expected fraction of videos with a chance pair, assuming that the density
            of features is locally uniform.
    """
    count = len(features)
    queries = np.arange(count) if queries is None else np.asarray(queries)
    if count < NEIGHBORS + 2 or not len(queries):
        return Pairs(np.empty((0, 2), int), np.empty(0), np.empty(0), 0.0)
    vectors = whiten(features)
    usual, dimension = usual_distances(vectors, units)
    # P(nearest < r x fourth nearest) = 1 - (1 - r^m)^3, which is about 3 r^m.
    threshold = float((false_alarms / 3) ** (1 / dimension))
    # similarity >= 1 - threshold * c_a * c_b, with c = sqrt(usual), is one product of vectors with
    # one more component.
    reach = np.sqrt(threshold * usual)[:, None]
    extended = np.concatenate([vectors, reach], axis=1).astype(np.float32)
    query_number = np.full(count, count)
    query_number[queries] = np.arange(len(queries))
    parts = []
    for rows, columns in _products(extended, queries):
        once = query_number[rows] < query_number[columns]  # pairs of two queries are found twice
        keep = (units[rows] != units[columns]) & once
        parts.append(np.stack([rows[keep], columns[keep]], axis=1))
    pairs = np.concatenate(parts)
    similarity = np.einsum("ij,ij->i", vectors[pairs[:, 0]], vectors[pairs[:, 1]])
    ratio = (1 - similarity) / np.sqrt(usual[pairs[:, 0]] * usual[pairs[:, 1]])
    order = np.argsort(ratio, kind="stable")
    return Pairs(pairs[order], similarity[order], ratio[order].clip(0), threshold)


def whiten(features: np.ndarray) -> np.ndarray:
    """Whiten features with PCA, then normalize each row: float32 [N, K]."""
    sample = features[_sample(len(features))]
    center = sample.mean(axis=0)
    deviations = (sample - center).astype(np.float64)
    variances, axes = np.linalg.eigh(deviations.T @ deviations / len(sample))
    kept = max(1, min(COMPONENTS, features.shape[1], len(sample) // 4))
    variances, axes = variances[::-1][:kept].clip(0), axes[:, ::-1][:, :kept]
    scale = np.sqrt(variances + SHRINKAGE * variances.mean() + 1e-12)
    projection = (axes / scale).astype(np.float32)
    vectors = np.empty((len(features), kept), np.float32)
    for start in range(0, len(features), BLOCK):
        part = slice(start, start + BLOCK)
        vectors[part] = (features[part] - center) @ projection
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True).clip(1e-12)


def usual_distances(vectors: np.ndarray, units: np.ndarray) -> tuple[np.ndarray, float]:
    """Distance (1 - cosine) [N] to the fourth nearest row of another unit; intrinsic dimension.

    The dimension is estimated without the nearest row, which may be a duplicate. With a sample of n
    of N rows, distances are scaled by (n/N)^(1/dimension).
    """
    count = len(vectors)
    sample = _sample(count)
    nearest = np.empty((count, NEIGHBORS), np.float32)
    for start in range(0, count, BLOCK):
        part = slice(start, start + BLOCK)
        distances = 1 - vectors[part] @ vectors[sample].T
        distances[units[part][:, None] == units[sample][None]] = np.inf
        nearest[part] = np.sort(np.partition(distances, NEIGHBORS - 1, axis=1)[:, :NEIGHBORS])
    nearest = nearest.clip(1e-6)
    complete = nearest[np.isfinite(nearest).all(axis=1)]
    if not len(complete):
        return np.full(count, 1.0), 1.0
    numbers = np.arange(2, NEIGHBORS, dtype=np.float32)
    spacings = numbers * np.diff(np.log(complete)[:, 1:], axis=1)
    # Each spacing is exponential with mean 1/m. The median resists clusters of duplicates.
    dimension = np.log(2) / max(float(np.median(spacings)), 1e-6)
    usual = np.where(np.isfinite(nearest[:, 3]), nearest[:, 3], np.median(complete[:, 3]))
    return usual * (len(sample) / count) ** (1 / dimension), dimension


def _products(vectors: np.ndarray, queries: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Pairs (rows, columns) whose product is at least 1, block by block."""
    for start in range(0, len(queries), BLOCK):
        rows = queries[start : start + BLOCK]
        for left in range(0, len(vectors), 8 * BLOCK):
            product = vectors[rows] @ vectors[left : left + 8 * BLOCK].T
            hits, columns = np.nonzero(product >= 1)
            yield rows[hits], columns + left


def _sample(count: int) -> np.ndarray:
    if count <= SAMPLE:
        return np.arange(count)
    return np.sort(np.random.default_rng(0).choice(count, SAMPLE, replace=False))
