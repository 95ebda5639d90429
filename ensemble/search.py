"""Search ensemble weights on labeled videos, judge them by cross-validation, and measure what each
model contributes.

`Ranking` gives the rank of the true label under any weights, many times faster than fusing again.
Weights are not negative. So a class can overtake the true label only if it is ahead in at least one
model, and it stays ahead if it is ahead in all of them. Therefore only the few classes on which the
models disagree are kept, and the result is exact.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import combinations, permutations

import numpy as np

from aggregate.metrics import (
    Interval,
    Summary,
    challenge_errors,
    independent_units,
    paired_bootstrap,
    summarize_ranks,
)
from aggregate.scores import Scores
from ensemble.align import Aligned, Missing, align
from ensemble.fuse import ROWS_AT_ONCE, checked_weights, log_probabilities
from extract import InputError, Record
from extract.cli import progress

FOLDS = 5
STEPS = (0.1, 0.05, 0.02, 0.01)  # weight moved from one model to another
_TIE = 1e-12  # margins this small are ties, hidden by rounding

Candidates = Sequence[Sequence[float] | np.ndarray] | np.ndarray  # weights [candidates, M]


# -- ranks under any weights ---------------------------------------------------------------------


@dataclass(frozen=True)
class Ranking:
    """Ranks of the true label for the N labeled videos, under any weights.

    Attributes:
        rows: [N], the labeled rows of `aligned`.
        margins: float64 [K, M], for each contested pair of a video and a class, each model's
            probability of the class minus that of the true label.
        videos: [K], the video of each pair.
        wins_ties: bool [K], whether the class is before the true label if they tie.
        ahead: [N], the number of classes that are ahead in every model.
    """

    aligned: Aligned
    rows: np.ndarray
    margins: np.ndarray
    videos: np.ndarray
    wins_ties: np.ndarray
    ahead: np.ndarray

    @classmethod
    def of(cls, aligned: Aligned) -> "Ranking":
        """The ranking of the labeled videos. InputError if no video has a label."""
        rows = np.flatnonzero(aligned.labels >= 0)
        if not len(rows):
            raise InputError(
                f"none of the {len(aligned.ids):,} videos has a label. Search on the validation "
                "scores, and give the weights that are found there"
            )
        starts = progress(range(0, len(rows), ROWS_AT_ONCE), desc="ranking")
        parts = [_contested(aligned, rows[start : start + ROWS_AT_ONCE], start) for start in starts]
        return cls(aligned, rows, *map(np.concatenate, zip(*parts, strict=True)))

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def models(self) -> int:
        return len(self.aligned.names)

    @property
    def groups(self) -> np.ndarray:
        """The group of each labeled video: keys of `group_keys` [N]."""
        return self.aligned.groups[self.rows]

    def ranks(self, candidates: Candidates) -> np.ndarray:
        """Ranks of the true label under each of the weights, as `metrics.ranks` counts them: int64
        [candidates, N].

        Ranks are exact up to 5; a larger number only says that the rank is at least 5.
        """
        return np.stack([self._ranks(checked_weights(each, self.models)) for each in candidates])

    def _ranks(self, weights: np.ndarray) -> np.ndarray:
        margins = self.margins @ weights
        before = (margins > _TIE) | ((margins >= -_TIE) & self.wins_ties)
        ranks = self.ahead + np.bincount(self.videos, before, minlength=len(self)).astype(np.int64)
        ranks[self.aligned.unscored(weights)[self.rows]] = len(self.aligned.classes)
        return ranks

    def errors(self, candidates: Candidates) -> np.ndarray:
        """Each video's challenge error under each of the weights: float [candidates, N]."""
        return challenge_errors(self.ranks(candidates), len(self.aligned.classes))

    @cached_property
    def _errors_of_equal_weights(self) -> np.ndarray:
        return self.errors([np.ones(self.models)])[0]

    def measure(self, ranks: np.ndarray, *, seed: int = 0) -> tuple[Summary, Interval]:
        """The measures of ranks [N], and their average error minus that of equal weights."""
        num_classes, labels = len(self.aligned.classes), self.aligned.labels[self.rows]
        errors, equal = challenge_errors(ranks, num_classes), self._errors_of_equal_weights
        return (
            summarize_ranks(ranks, labels, num_classes, self.groups),
            paired_bootstrap(errors, equal, self.groups, seed=seed),
        )


def _contested(aligned: Aligned, rows: np.ndarray, start: int) -> tuple[np.ndarray, ...]:
    """`margins`, `videos`, `wins_ties` and `ahead` of a `Ranking` for some of its rows. The first
    of these rows is video `start`."""
    truth = aligned.labels[rows][:, None]
    is_lower = np.arange(len(aligned.classes)) < truth
    in_any, in_all = np.zeros(is_lower.shape, bool), np.ones(is_lower.shape, bool)
    margins = []
    for model in range(len(aligned.names)):
        values = np.exp(log_probabilities(aligned, model, rows))
        margin = values - np.take_along_axis(values, truth, axis=1)
        margin[aligned.failed[model, rows]] = 0  # so that it decides nothing
        is_ahead = (margin > 0) | ((margin == 0) & is_lower)
        in_any |= is_ahead
        in_all &= is_ahead
        margins.append(margin)
    ahead = in_all.sum(axis=1)
    # With five classes ahead in every model, a video is wrong under any weights.
    videos, classes = np.nonzero(in_any & ~in_all & (ahead < 5)[:, None])
    contested = np.stack([margin[videos, classes] for margin in margins], axis=1)
    return contested, videos + start, is_lower[videos, classes], ahead


# -- search --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SearchResult:
    """Searched weights, and their measures on videos that they were not searched on.

    Attributes:
        summary: measures over all labeled videos, each under the weights found on the other folds.
        against_equal: the average error of `summary` minus that of equal weights on the same videos
            (below 0 is better).
        in_sample: average error of `weights` on the videos on which they were searched, which is
            too optimistic.
    """

    weights: tuple[float, ...]
    weights_by_fold: tuple[tuple[float, ...], ...]
    summary: Summary
    against_equal: Interval
    in_sample: float
    seed: int

    @property
    def beats_equal(self) -> bool:
        return self.against_equal.high < 0

    def statement(self) -> str:
        """Whether searched weights are better than equal ones, as a sentence."""
        evidence = (
            f"on held-out folds ({len(self.weights_by_fold)}, seed {self.seed}) "
            f"their average error is {self.summary.average_error} %, "
            f"{signed(self.against_equal)} against equal weights"
        )
        if self.beats_equal:
            return f"Searched weights beat equal ones: {evidence}."
        return f"Searched weights do NOT beat equal ones: {evidence}. Prefer --weights equal."

    def advice(self, names: Sequence[str]) -> str:
        """A text on how far the folds agree, and the weights to use for other videos."""
        columns = zip(*self.weights_by_fold, strict=True)
        spread = ", ".join(
            f"{name} {min(column):.2f} to {max(column):.2f}"
            for name, column in zip(names, columns, strict=True)
        )
        weights = ",".join(f"{weight:.4g}" for weight in self.weights)
        return (
            f"across folds: {spread}; error on the videos they were searched on "
            f"(too good to be true): {100 * self.in_sample:.2f} %\n"
            f"for other videos of these models: --weights {weights}"
        )

    def record(self) -> Record:
        return asdict(self) | {
            "folds": len(self.weights_by_fold),
            "beats_equal": self.beats_equal,
            "statement": self.statement(),
        }


def signed(difference: Interval) -> str:
    """`-0.31 [-0.52, -0.10]`, in percentage points."""
    value, low, high = (100 * end for end in (difference.value, difference.low, difference.high))
    return f"{value:+.2f} [{low:+.2f}, {high:+.2f}]"


def search_weights(
    list_of_scores: Sequence[Scores], *, missing: Missing = "error"
) -> tuple[float, ...]:
    """Search weights [M], summing to 1, for `fuse` of scores joined by id. `search` also measures
    them."""
    return search(Ranking.of(align(list_of_scores, missing=missing))).weights


def search(ranking: Ranking, *, seed: int = 0) -> SearchResult:
    """Search weights on all labeled videos, and judge the search by cross-validation.

    The videos of each fold are scored under weights that were searched on the other folds. Folds
    depend only on (seed, sorted groups), not on the order in a file. A group is never split.
    Raises InputError for fewer than two videos.
    """
    if len(ranking) < 2:
        raise InputError(
            f"weights cannot be searched on {len(ranking)} labeled video; use --weights equal"
        )
    groups = ranking.groups
    if len(set(groups.tolist())) == 1:  # then each video is a group
        groups = np.array(ranking.aligned.ids, object)[ranking.rows]
    units = independent_units(groups)  # in the order of their names
    num_units = int(units.max()) + 1
    folds = np.random.default_rng(seed).permutation(num_units) % min(FOLDS, num_units)
    fold = folds[units]
    weights_by_fold = [
        fit(ranking, fold != held_out)
        for held_out in progress(range(fold.max() + 1), desc="searching", unit="fold")
    ]
    weights = fit(ranking, np.ones(len(ranking), bool))
    held_out_ranks = ranking.ranks(weights_by_fold)[fold, np.arange(len(ranking))]
    return SearchResult(
        weights,
        tuple(weights_by_fold),
        *ranking.measure(held_out_ranks, seed=seed),
        in_sample=float(ranking.errors([weights]).mean()),
        seed=seed,
    )


def fit(ranking: Ranking, chosen: np.ndarray) -> tuple[float, ...]:
    """Weights with the smallest challenge error on videos `chosen` bool [N], by coordinate search.

    The search starts from equal weights, or from one model alone if that is better. It moves weight
    from one model to another, always by the best move, as long as the error falls.
    """

    def best_of(candidates: Candidates) -> tuple[np.ndarray, float]:
        errors = ranking.errors(candidates)[:, chosen].mean(axis=1)
        best = int(errors.argmin())  # the first of equals
        return np.asarray(candidates[best]), float(errors[best])

    unit = np.eye(ranking.models)
    weights, least = best_of([checked_weights(None, ranking.models), *unit])
    for step in STEPS:
        while moves := [
            weights + min(step, weights[giver]) * (unit[taker] - unit[giver])
            for giver, taker in permutations(range(ranking.models), 2)
            if weights[giver] > 0
        ]:
            moved, error = best_of(moves)
            if error >= least:
                break
            weights, least = moved, error
    rounded = np.round(weights, 4)  # so that the printed weights are those that are used
    rounded[rounded.argmax()] += 1 - rounded.sum()
    return tuple(np.round(rounded, 4).tolist())


# -- selection and contributions -----------------------------------------------------------------


@dataclass(frozen=True)
class Dropped:
    """A model that was left out, and the average error (fraction) with it and without it."""

    name: str
    error_with: float
    error_without: float

    def statement(self) -> str:
        return (
            f"{self.name} is left out: without it the average error on these videos is "
            f"{100 * self.error_without:.2f} %, with it {100 * self.error_with:.2f} %"
        )


def select(ranking: Ranking) -> tuple[tuple[float, ...], tuple[Dropped, ...]]:
    """Equal weights for the models that help on the labeled videos, and the models left out.

    The search starts from all models. It drops the model whose removal lowers the average error
    most or leaves it unchanged, until every removal would raise it (Caruana et al. 2004, backward).
    """
    unit = np.eye(ranking.models, dtype=bool)
    errors_alone = ranking.errors(unit).mean(axis=1)
    kept, dropped = np.ones(ranking.models, bool), []
    while kept.sum() > 1:
        members = np.flatnonzero(kept)
        error, *errors = ranking.errors([kept, *(kept & ~unit[members])]).mean(axis=1).tolist()
        # Among equally good removals, drop the model that is worse alone.
        choice = np.lexsort([-errors_alone[members], errors])[0]
        if errors[choice] > error + _TIE:
            break
        kept[members[choice]] = False
        dropped.append(Dropped(ranking.aligned.names[members[choice]], error, errors[choice]))
    return tuple((kept / kept.sum()).tolist()), tuple(dropped)


@dataclass(frozen=True)
class Row:
    """A line of the table: some models at equal weights, or all of them at given weights."""

    name: str
    weights: tuple[float, ...]
    summary: Summary
    against_equal: Interval  # average error minus that of all models at equal weights


def contributions(
    ranking: Ranking, weights: Sequence[float] | np.ndarray | None = None
) -> list[Row]:
    """The contribution of each model: rows for single models, all pairs, all but one, all at equal
    weights, and all at the given `weights`."""
    names = ranking.aligned.names
    count = len(names)
    sizes = sorted({1, 2, count - 1, count} - {0})
    teams = [team for size in sizes for team in combinations(range(count), size)]
    candidates = {
        _team_name(team, names): np.isin(range(count), team) / len(team) for team in teams
    }
    if weights is not None:
        candidates["all, given weights"] = checked_weights(weights, count)
    ranks = ranking.ranks(list(candidates.values()))
    return [
        Row(name, tuple(candidate.tolist()), *ranking.measure(row))
        for (name, candidate), row in zip(candidates.items(), ranks, strict=True)
    ]


def _team_name(team: Sequence[int], names: Sequence[str]) -> str:
    if len(team) == len(names) > 1:
        return "all, equal weights"
    if len(team) == len(names) - 1 > 2:
        return f"without {next(name for model, name in enumerate(names) if model not in team)}"
    return " + ".join(names[model] for model in team)
