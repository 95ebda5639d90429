"""Classification metrics with bootstrap intervals (numpy only).

Scores are [N, C], and labels [N] are indices in C. Of classes with equal scores the lower index
ranks first, which is also the order in which a submission lists them. A row that holds a NaN (a
video that failed) is wrong in every metric.
"""

import csv
import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass
from typing import Any

import numpy as np

from extract.cli import text_table

RESAMPLES = 2000
ENDS = ("", "_low", "_high")  # suffixes of an interval's columns
_COUNTS_PER_CHUNK = 1 << 22  # 32 MB
_ROWS_PER_CHUNK = 4096  # keeps the comparisons of 70,000 x 700 scores in cache


@dataclass(frozen=True)
class Interval:
    """An estimate and its 95 % bootstrap interval over independent units (groups of videos)."""

    value: float
    low: float
    high: float

    @classmethod
    def around(cls, value: Any, drawn: np.ndarray) -> "Interval":
        """The percentile interval of the values `drawn` in bootstrap resamples."""
        return cls(float(value), *np.percentile(drawn, [2.5, 97.5]).tolist())

    def columns(self, name: str) -> dict[str, float]:
        """Columns of a table: `name`, `name_low` and `name_high`."""
        return {f"{name}{end}": value for end, value in zip(ENDS, astuple(self), strict=True)}

    @classmethod
    def of(cls, row: Mapping[str, Any], name: str) -> "Interval":
        """The inverse of `columns`."""
        return cls(*(row[f"{name}{end}"] for end in ENDS))

    def __format__(self, spec: str) -> str:
        """`61.83 [61.3, 62.4]`, in percent; the spec "+" adds signs."""
        value, low, high = (100 * number for number in astuple(self))
        return f"{value:{spec}.2f} [{low:{spec}.1f}, {high:{spec}.1f}]"


@dataclass(frozen=True)
class Summary:
    """All metrics of one set of scores, as fractions; failed videos count as errors."""

    top1: Interval
    top5: Interval
    mean_class: Interval
    average_error: Interval  # the challenge's metric: the mean of top-1 and top-5 error
    scored: int  # number of videos with scores
    listed: int  # number of videos with a label, scored or failed
    top1_of_scored: float  # without the videos that failed
    units: int  # number of resampled units: groups, or single videos


def describe_units(units: int, videos: int) -> str:
    """`12 groups of 60 videos`, or `60 videos` if each is a group of its own."""
    return f"{videos:,} videos" if units == videos else f"{units:,} groups of {videos:,} videos"


def independent_units(groups: np.ndarray) -> np.ndarray:
    """Number the independent units, from 0: int [N]. Rows of one group are one unit.

    `groups` [N] are keys of `aggregate.scores.group_keys`. If all rows have the same key, each row
    is a unit.
    """
    names, units = np.unique(groups, return_inverse=True)
    return units if len(names) > 1 else np.arange(len(groups))


def ranks(scores: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Rank of the true label in each row: int64 [N], 0 is best, C for a row that holds a NaN.

    Raises ValueError for a label that is not an index in C, naming the first.
    """
    scores, labels = np.asarray(scores), np.asarray(labels)
    if scores.ndim != 2 or labels.shape != scores.shape[:1]:
        raise ValueError(
            f"got scores {scores.shape} and labels {labels.shape}, expected [N, C] and [N]"
        )
    classes = scores.shape[1]
    wrong = (labels < 0) | (labels >= classes)
    if wrong.any():
        row = int(wrong.argmax())
        raise ValueError(f"label {labels[row]} of row {row} is not an index of {classes} classes")
    result = np.empty(len(labels), np.int64)
    for start in range(0, len(labels), _ROWS_PER_CHUNK):
        chunk = slice(start, start + _ROWS_PER_CHUNK)
        part, truth = scores[chunk], labels[chunk, None]
        own = np.take_along_axis(part, truth, axis=1)
        ahead = (part > own) | ((part == own) & (np.arange(classes) < truth))
        failed = np.isnan(part).any(axis=1)
        result[chunk] = np.where(failed, classes, ahead.sum(axis=1))
    return result


def top_k_error(scores: np.ndarray, labels: np.ndarray, k: int) -> float:
    """1 - the fraction of rows with the true label among the k highest scores.

    Raises ValueError without a row.
    """
    if k < 1:
        raise ValueError(f"k is {k}; the top k are at least 1")
    # With fewer than k classes, every label is in the top k except in rows with a NaN, of rank C.
    limit = min(k, np.asarray(scores).shape[1])
    return float((_non_empty(ranks(scores, labels)) >= limit).mean())


def challenge_error(scores: np.ndarray, labels: np.ndarray) -> float:
    """The mean of top-1 and top-5 error, the ranking metric of the Kinetics-700 challenge."""
    errors = challenge_errors(_non_empty(ranks(scores, labels)), np.asarray(scores).shape[1])
    return float(errors.mean())


def challenge_errors(label_ranks: np.ndarray, classes: int) -> np.ndarray:
    """Challenge error of each video: float [N], 0 (rank 0), 0.5 (in the top 5) or 1."""
    return ((label_ranks >= 1) + (label_ranks >= min(5, classes)).astype(float)) / 2


def bootstrap(
    values: np.ndarray,
    groups: np.ndarray | None = None,
    *,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Interval:
    """The mean of `values` [N] with its 95 % bootstrap interval (percentile method).

    Videos of one group (`groups` [N], keys or numbers) are not independent, so they are drawn
    together: the cluster bootstrap (Cameron, Gelbach and Miller 2008). With None, each video is a
    group of its own.
    """
    values = np.asarray(values, float)
    sums, sizes = values, np.ones(len(values))
    if groups is not None:
        units = independent_units(groups)
        sums, sizes = np.bincount(units, values), np.bincount(units).astype(float)
    # Groups of equal sum and size are drawn together: the same distribution, many times faster.
    distinct, counts = np.unique(np.stack([sums, sizes], axis=1), axis=0, return_counts=True)
    drawn = np.concatenate([draws @ distinct for draws in _resample(counts, resamples, seed)])
    return Interval.around(values.mean(), drawn[:, 0] / drawn[:, 1])


def paired_bootstrap(
    ours: np.ndarray, theirs: np.ndarray, groups: np.ndarray | None = None, *, seed: int = 0
) -> Interval:
    """`bootstrap` of the difference `ours - theirs` [N], both measured on the same videos."""
    if ours.shape != theirs.shape:
        raise ValueError(
            f"paired values must be of the same videos, got {ours.shape} and {theirs.shape}"
        )
    return bootstrap(ours.astype(float) - theirs.astype(float), groups, seed=seed)


def bootstrap_by_class(
    predicted: np.ndarray,
    labels: np.ndarray,
    classes: int,
    tested: np.ndarray,
    groups: np.ndarray | None = None,
    *,
    resamples: int = 500,
) -> dict[str, tuple[Interval, list[float]]]:
    """`mean_class` accuracy and `macro_f1` of S runs.

    Each is the mean over the runs with its 95 % interval over groups, and the value of each run.
    As in scikit-learn, a class counts if it is a label or was predicted; without a hit its F1 is 0.

    Args:
        predicted: int [S, N], the predicted class; `classes` for a video that failed.
        labels: int [N].
        tested: bool [S, N], the videos that a run tested.
        groups: [N] as in `bootstrap`.
    """
    units = np.arange(len(labels)) if groups is None else independent_units(groups)
    drawn = [
        np.mean(_by_class(predicted, labels, classes, tested, times[units]), axis=0)
        for draws in _resample(np.ones(int(units.max()) + 1, int), resamples, 0)
        for times in draws
    ]
    runs = _by_class(predicted, labels, classes, tested, np.ones(len(labels))).T
    names = ("mean_class", "macro_f1")
    return {
        name: (Interval.around(values.mean(), resampled), values.tolist())
        for name, values, resampled in zip(names, runs, np.transpose(drawn), strict=True)
    }


def _by_class(
    predicted: np.ndarray, labels: np.ndarray, classes: int, tested: np.ndarray, times: np.ndarray
) -> np.ndarray:
    """Mean-class accuracy and macro F1 of each run, [S, 2]; video i counts `times[i]` times."""
    runs = []
    for predictions, rows in zip(predicted, tested, strict=True):
        truth, prediction, weights = labels[rows], predictions[rows], times[rows]
        actual = np.bincount(truth, weights, minlength=classes)
        total = actual + np.bincount(prediction, weights, minlength=classes + 1)[:classes]
        hits = np.bincount(truth, weights * (prediction == truth), minlength=classes)
        recall = hits[actual > 0] / actual[actual > 0]
        f1 = 2 * hits[total > 0] / total[total > 0]
        runs.append((recall.mean() if len(recall) else 0.0, f1.mean() if len(f1) else 0.0))
    return np.array(runs)


def summarize(
    scores: np.ndarray, labels: np.ndarray, groups: Sequence[str] | np.ndarray | None = None
) -> Summary:
    """All metrics of the rows that have a label (not -1), with intervals over `groups` [N]."""
    labeled = np.asarray(labels) >= 0
    if not labeled.any():
        raise ValueError("no video has a label; there is nothing to score")
    scores, labels = np.asarray(scores)[labeled], np.asarray(labels)[labeled]
    groups = None if groups is None else np.asarray(groups)[labeled]
    return summarize_ranks(ranks(scores, labels), labels, scores.shape[1], groups)


def summarize_ranks(
    label_ranks: np.ndarray, labels: np.ndarray, classes: int, groups: np.ndarray | None = None
) -> Summary:
    """`summarize` of the result of `ranks`: int [N], `classes` for a video that failed."""
    first, in_five = _non_empty(label_ranks) == 0, label_ranks < min(5, classes)
    units = np.arange(len(label_ranks)) if groups is None else independent_units(groups)
    scored = label_ranks < classes
    return Summary(
        top1=bootstrap(first, units),
        top5=bootstrap(in_five, units),
        mean_class=_mean_class_interval(first, labels, classes, units),
        average_error=bootstrap(challenge_errors(label_ranks, classes), units),
        scored=int(scored.sum()),
        listed=len(labels),
        top1_of_scored=float(first[scored].mean()) if scored.any() else 0.0,
        units=int(units.max()) + 1,
    )


def _mean_class_interval(
    correct: np.ndarray, labels: np.ndarray, classes: int, units: np.ndarray
) -> Interval:
    """Mean-class accuracy of `correct` bool [N], with its 95 % interval over units."""
    outcomes = 2 * labels + ~correct
    value = _mean_class(np.bincount(outcomes, minlength=2 * classes))
    counts = np.ones(int(units.max()) + 1, int)
    if len(counts) == len(units):  # no groups: videos of equal outcome are drawn together
        outcomes, counts = np.unique(outcomes, return_counts=True)
        units = np.arange(len(outcomes))
    drawn = [
        np.bincount(outcomes, times[units], minlength=2 * classes)
        for draws in _resample(counts, RESAMPLES, 0)
        for times in draws
    ]
    return Interval.around(value, _mean_class(np.array(drawn)))


def _mean_class(outcomes: np.ndarray) -> np.ndarray:
    """Mean-class accuracy of counts [..., 2 x classes]: correct and wrong videos of each class.

    Classes without a video are left out.
    """
    correct, wrong = outcomes[..., ::2], outcomes[..., 1::2]
    counts = correct + wrong
    present = np.count_nonzero(counts, axis=-1)
    return (correct / np.maximum(counts, 1)).sum(axis=-1) / present


def _non_empty(label_ranks: np.ndarray) -> np.ndarray:
    if not len(label_ranks):
        raise ValueError("no video to score")
    return label_ranks


def _resample(counts: np.ndarray, resamples: int, seed: int) -> Iterator[np.ndarray]:
    """Draw all units again, with replacement; yields chunks of int [resamples, kinds].

    `counts` says how many units there are of each kind, and the result how often each kind is
    drawn. Many times faster than drawing 70,000 units one by one.
    """
    total, rng = int(counts.sum()), np.random.default_rng(seed)
    chunk = max(1, _COUNTS_PER_CHUNK // len(counts))
    for start in range(0, resamples, chunk):
        yield rng.multinomial(total, counts / total, size=min(chunk, resamples - start))


def csv_of(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows of a table as CSV with a header; a value that a row lacks stays empty."""
    columns = dict.fromkeys(name for row in sorted(rows, key=len, reverse=True) for name in row)
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(columns), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def summary_table(titles: Sequence[str], rows: Sequence[tuple[Sequence[str], Summary]]) -> str:
    """A text table of `rows`: texts for the columns `titles`, and the metrics of one set of scores.

    A last line says what the intervals were resampled over.
    """
    table = [[*titles, "top-1 %", "top-5 %", "mean class %", "average error %", "scored / listed"]]
    for texts, summary in rows:
        intervals = summary.top1, summary.top5, summary.mean_class, summary.average_error
        scored = f"{summary.scored:,} / {summary.listed:,}"
        if summary.scored < summary.listed:
            scored += f", top-1 of the scored {100 * summary.top1_of_scored:.2f}"
        table.append([*texts, *map(format, intervals), scored])
    units = describe_units(summary.units, summary.listed)
    return f"{text_table(table)}\nintervals: 95 %, bootstrap over {units}"
