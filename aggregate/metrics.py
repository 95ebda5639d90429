"""How good scores are: top-k errors, mean-class accuracy, the challenge's figure, and how sure one
can be of them.

Scores are [N, C], labels [N] an index in C. The rule for ties: of classes with equal scores the
lower index ranks first, which is also the order a submission lists them in. A row that holds a NaN
(a video that failed) is wrong in every metric. numpy only.
"""

import csv
import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np

RESAMPLES = 2000
ENDS = ("", "_low", "_high")  # of the columns of an interval
_DRAWS_AT_ONCE = 1 << 22  # 32 MB of counts
_ROWS_AT_ONCE = 4096  # keeps the comparisons of 70,000 x 700 scores in cache


@dataclass(frozen=True)
class Interval:
    """An estimate and its 95 % bootstrap interval over independent units (groups of videos)."""

    value: float
    low: float
    high: float

    def columns(self, name: str) -> dict[str, float]:
        """As columns of a table: `name`, `name_low` and `name_high`."""
        return {
            f"{name}{end}": value
            for end, value in zip(ENDS, (self.value, self.low, self.high), strict=True)
        }

    @classmethod
    def of(cls, row: Mapping[str, Any], name: str) -> "Interval":
        """What `columns` gave."""
        return cls(*(row[f"{name}{end}"] for end in ENDS))

    def __format__(self, spec: str) -> str:
        """`61.83 [61.3, 62.4]`, in percent; "+" for signs."""
        return f"{100 * self.value:{spec}.2f} [{100 * self.low:{spec}.1f}, {100 * self.high:{spec}.1f}]"


@dataclass(frozen=True)
class Summary:
    """What one set of scores is worth; all as fractions of the videos that count, failed ones as
    errors."""

    top1: Interval
    top5: Interval
    mean_class: Interval
    average_error: Interval  # the challenge's figure: the mean of top-1 and top-5 error
    scored: int  # videos with scores
    listed: int  # videos with a label, scored or failed
    top1_of_scored: float  # the same if failed videos are left out
    units: int  # that were resampled for the intervals: groups, or videos if each is a group of its own

    @staticmethod
    def header() -> str:
        return f"{'top-1 %':>20} {'top-5 %':>20} {'mean class %':>20} {'average error %':>20}  scored / listed"

    def __str__(self) -> str:
        """One line under `header`."""
        cells = " ".join(f"{format(getattr(self, f.name)):>20}" for f in fields(self)[:4])
        of_scored = (
            f", top-1 of the scored {100 * self.top1_of_scored:.2f}"
            if self.scored < self.listed
            else ""
        )
        return f"{cells}  {self.scored:,} / {self.listed:,}{of_scored}"

    def resampled(self) -> str:
        """`12 groups of 60 videos`: what the intervals are over."""
        return describe_units(self.units, self.listed)


def describe_units(units: int, videos: int) -> str:
    """`12 groups of 60 videos`, or `60 videos` if each is a group of its own."""
    return f"{videos:,} videos" if units == videos else f"{units:,} groups of {videos:,} videos"


def independent_units(groups: np.ndarray) -> np.ndarray:
    """Numbers int [N] of the units that may be told apart, from 0 on: rows of one group are one
    unit.

    `groups` [N] are the keys of `aggregate.scores.group_keys`. If all rows have the same key,
    nothing else is left: each row is a unit.
    """
    names, units = np.unique(groups, return_inverse=True)
    return units if len(names) > 1 else np.arange(len(groups))


def ranks(scores: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """The place of the true label in each row, 0 the best: int64 [N]; C (behind all) for a row that
    holds a NaN.

    Raises ValueError where labels are not an index in C, naming the first.
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
    places = np.empty(len(labels), np.int64)
    for start in range(0, len(labels), _ROWS_AT_ONCE):
        part, truth = (
            scores[start : start + _ROWS_AT_ONCE],
            labels[start : start + _ROWS_AT_ONCE, None],
        )
        own = np.take_along_axis(part, truth, axis=1)
        before = (part > own) | ((part == own) & (np.arange(classes) < truth))
        place = before.sum(axis=1)
        place[np.isnan(part).any(axis=1)] = classes
        places[start : start + _ROWS_AT_ONCE] = place
    return places


def top_k_error(scores: np.ndarray, labels: np.ndarray, k: int) -> float:
    """1 - the fraction of rows with the true label among the k highest scores. Nothing to score is
    a ValueError."""
    if k < 1:
        raise ValueError(f"k is {k}; the top k are at least 1")
    # With fewer than k classes every label is in the top k; a row with a NaN, ranked C, stays
    # wrong.
    return float((_some(ranks(scores, labels)) >= min(k, np.asarray(scores).shape[1])).mean())


def challenge_error(scores: np.ndarray, labels: np.ndarray) -> float:
    """The average of top-1 and top-5 error, by which the challenge ranks (FACTS 7)."""
    return float(challenge_errors(_some(ranks(scores, labels)), np.asarray(scores).shape[1]).mean())


def challenge_errors(places: np.ndarray, classes: int) -> np.ndarray:
    """Each video's share of the challenge error, by its rank: float [N] of 0 (first), 0.5 (in the
    top 5) or 1."""
    return ((places >= 1) + (places >= min(5, classes)).astype(float)) / 2


def bootstrap(
    values: np.ndarray,
    groups: np.ndarray | None = None,
    *,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Interval:
    """The mean of `values` [N] with its 95 % percentile interval under resampling of groups.

    Videos of one group (`groups` [N], keys or numbers) are drawn together, since they are not
    independent: the cluster bootstrap (Cameron, Gelbach and Miller 2008). None: each video is a
    group of its own.
    """
    values = np.asarray(values, float)
    sums, sizes = values, np.ones(len(values))
    if groups is not None:
        units = independent_units(groups)
        sums, sizes = np.bincount(units, values), np.bincount(units).astype(float)
    # Groups of equal sum and size are drawn at once: many times faster, and the same.
    distinct, counts = np.unique(np.stack([sums, sizes], axis=1), axis=0, return_counts=True)
    drawn = np.concatenate([draws @ distinct for draws in _resampled(counts, resamples, seed)])
    return Interval(
        float(values.mean()), *np.percentile(drawn[:, 0] / drawn[:, 1], [2.5, 97.5]).tolist()
    )


def paired_bootstrap(
    ours: np.ndarray, theirs: np.ndarray, groups: np.ndarray | None = None, *, seed: int = 0
) -> Interval:
    """The mean of `ours - theirs` [N], both measured on the same videos, with its 95 % interval
    over groups."""
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
    """`mean_class` accuracy and `macro_f1`: each the mean over S runs with its 95 % interval over
    groups, and of each run.

    Args:
        predicted: int [S, N], the class that ranks first; `classes` for a video that failed.
        labels: int [N].
        tested: bool [S, N], the videos that a run tested.
        groups: [N] as in `bootstrap`.

    As in scikit-learn, a class counts that is a label or was predicted; the F1 of one without a hit
    is 0.
    """
    units = np.arange(len(labels)) if groups is None else independent_units(groups)
    drawn = [
        np.mean(_by_class(predicted, labels, classes, tested, times[units]), axis=0)
        for draws in _resampled(np.ones(int(units.max()) + 1, int), resamples, 0)
        for times in draws
    ]
    runs = _by_class(predicted, labels, classes, tested, np.ones(len(labels)))
    low, high = np.percentile(drawn, [2.5, 97.5], axis=0)
    return {
        name: (
            Interval(float(runs[:, place].mean()), float(low[place]), float(high[place])),
            runs[:, place].tolist(),
        )
        for place, name in enumerate(("mean_class", "macro_f1"))
    }


def _by_class(
    predicted: np.ndarray, labels: np.ndarray, classes: int, tested: np.ndarray, times: np.ndarray
) -> np.ndarray:
    """Mean-class accuracy and macro F1 of each run, [S, 2], if video i counts `times[i]` times."""
    runs = []
    for answers, seen in zip(predicted, tested, strict=True):
        truth, answer, weights = labels[seen], answers[seen], times[seen]
        of_class = np.bincount(truth, weights, minlength=classes)
        as_class = np.bincount(answer, weights, minlength=classes + 1)[:classes]
        hits = np.bincount(truth, weights * (answer == truth), minlength=classes)
        present, counted = of_class > 0, of_class + as_class > 0
        recall = hits[present] / of_class[present]
        f1 = 2 * hits[counted] / (of_class + as_class)[counted]
        runs.append((recall.mean() if len(recall) else 0.0, f1.mean() if len(f1) else 0.0))
    return np.array(runs)


def summarize(
    scores: np.ndarray, labels: np.ndarray, groups: Sequence[str] | np.ndarray | None = None
) -> Summary:
    """All metrics of the rows that have a label (others, -1, are left out), with intervals over
    `groups` [N]."""
    labeled = np.asarray(labels) >= 0
    if not labeled.any():
        raise ValueError("no video has a label; there is nothing to score")
    scores, labels = np.asarray(scores)[labeled], np.asarray(labels)[labeled]
    groups = None if groups is None else np.asarray(groups)[labeled]
    return summarize_places(ranks(scores, labels), labels, scores.shape[1], groups)


def summarize_places(
    places: np.ndarray, labels: np.ndarray, classes: int, groups: np.ndarray | None = None
) -> Summary:
    """`summarize` of what `ranks` gives: places int [N], `classes` for a video that failed."""
    first, in_five = _some(places) == 0, places < min(5, classes)
    units = np.arange(len(places)) if groups is None else independent_units(groups)
    scored = places < classes
    right = np.bincount(labels, first, minlength=classes).astype(int)
    wrong = np.bincount(labels, ~first, minlength=classes).astype(int)
    mean_class = float(_mean_class(np.stack([right, wrong], axis=1)))
    return Summary(
        top1=bootstrap(first, units),
        top5=bootstrap(in_five, units),
        mean_class=Interval(mean_class, *_mean_class_ends(first, labels, classes, units)),
        average_error=bootstrap(challenge_errors(places, classes), units),
        scored=int(scored.sum()),
        listed=len(labels),
        top1_of_scored=float(first[scored].mean()) if scored.any() else 0.0,
        units=int(units.max()) + 1,
    )


def _mean_class_ends(
    first: np.ndarray, labels: np.ndarray, classes: int, units: np.ndarray
) -> list[float]:
    """The 95 % interval of the mean-class accuracy of `first` bool [N] under resampling of
    units."""
    # Outcomes: 2 x label + wrong. A unit is what its videos' outcomes are; without groups there are
    # few kinds of it.
    outcomes = 2 * labels + ~first
    kinds, counts = units, np.ones(int(units.max()) + 1, int)
    if len(counts) == len(units):
        present, kinds, counts = np.unique(outcomes, return_inverse=True, return_counts=True)
        outcomes, kinds = present, np.arange(len(present))
    drawn = [
        np.bincount(outcomes, times[kinds], minlength=2 * classes)
        for draws in _resampled(counts, RESAMPLES, 0)
        for times in draws
    ]
    return np.percentile(
        _mean_class(np.reshape(drawn, (RESAMPLES, classes, 2))), [2.5, 97.5]
    ).tolist()


def _some(places: np.ndarray) -> np.ndarray:
    if not len(places):
        raise ValueError("there is no video to score")
    return places


def _mean_class(outcomes: np.ndarray) -> np.ndarray:
    """Of counts [..., classes, 2] of right and wrong; classes without a video are left out."""
    counts = outcomes.sum(axis=-1)
    return (outcomes[..., 0] / np.maximum(counts, 1)).sum(axis=-1) / np.count_nonzero(
        counts, axis=-1
    )


def _resampled(counts: np.ndarray, resamples: int, seed: int) -> Iterator[np.ndarray]:
    """How often each of the distinct units, of which there are `counts`, is drawn when all units
    are drawn anew: parts of int [resamples, units]. The same as drawing units one by one, and at
    70,000 of them many times faster."""
    total, rng = int(counts.sum()), np.random.default_rng(seed)
    at_once = max(1, _DRAWS_AT_ONCE // len(counts))
    for start in range(0, resamples, at_once):
        yield rng.multinomial(total, counts / total, size=min(at_once, resamples - start))


def csv_of(rows: Sequence[Mapping[str, Any]]) -> str:
    """A table of measures with a heading; what a row lacks stays empty."""
    columns = dict.fromkeys(name for row in sorted(rows, key=len, reverse=True) for name in row)
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(columns), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def text_table(rows: Sequence[Sequence[str]]) -> str:
    """Rows of text as a table: the first column to the left, the others to the right."""
    first, *others = ([len(cell) for cell in column] for column in zip(*rows, strict=True))
    widths = [max(lengths) for lengths in others]
    return "\n".join(
        "  ".join([row[0].ljust(max(first)), *map(str.rjust, row[1:], widths)]) for row in rows
    )
