"""Weights of an ensemble, searched on labeled videos and judged on others; and who adds what.

`Ranking` answers "where does the true label rank under these weights?" many times over. A class can
overtake the true label under weights that are not negative only if it is ahead in at least one
model, and it stays ahead if it is ahead in all; so only the few classes on which the models
disagree are kept, which is exact and some hundred times faster than fusing again.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import combinations, permutations
from typing import Any

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
from extract import InputError
from extract.cli import progress

FOLDS = 5
STEPS = (0.1, 0.05, 0.02, 0.01)  # weight moved from one model to another
_TIE = 1e-12  # a sum of differences this small is a tie that rounding hides


@dataclass(frozen=True)
class Found:
    """Searched weights, and what they are worth on videos they were not searched on.

    `summary` is over all labeled videos, each under the weights that the other folds gave;
    `against_equal` is its average error minus that of equal weights on the same videos (below 0 is
    better), with a 95 % interval.
    """

    weights: tuple[float, ...]
    weights_by_fold: tuple[tuple[float, ...], ...]
    summary: Summary
    against_equal: Interval
    in_sample: (
        float  # average error of `weights` on the videos they were searched on: too good to be true
    )
    seed: int

    @property
    def beats_equal(self) -> bool:
        return self.against_equal.high < 0

    def statement(self) -> str:
        """In plain words, whether the search was worth it."""
        figure = (
            f"on held-out folds ({len(self.weights_by_fold)}, seed {self.seed}) their average error is "
            f"{self.summary.average_error} %, {signed(self.against_equal)} against equal weights"
        )
        if self.beats_equal:
            return f"Searched weights beat equal ones: {figure}."
        return f"Searched weights do NOT beat equal ones: {figure}. Prefer --weights equal."

    def advice(self, names: Sequence[str]) -> str:
        """How far the folds agree, and the weights to give for other videos."""
        columns = zip(names, zip(*self.weights_by_fold, strict=True), strict=True)
        spread = ", ".join(
            f"{name} {min(column):.2f} to {max(column):.2f}" for name, column in columns
        )
        return (
            f"across folds: {spread}; error on the videos they were searched on (too good to be true): "
            f"{100 * self.in_sample:.2f} %\nfor other videos of these models: --weights "
            + ",".join(f"{weight:.4g}" for weight in self.weights)
        )

    def record(self) -> dict[str, Any]:
        said = {
            "folds": len(self.weights_by_fold),
            "beats_equal": self.beats_equal,
            "statement": self.statement(),
        }
        return asdict(self) | said


@dataclass(frozen=True)
class Row:
    """A line of the table: models at equal weights, or all of them at the chosen ones."""

    name: str
    weights: tuple[float, ...]
    summary: Summary
    against_equal: Interval  # average error minus that of all models at equal weights


def search_weights(
    list_of_scores: Sequence[Scores], *, missing: Missing = "error"
) -> tuple[float, ...]:
    """Weights [M], summing to 1, for `fuse` of scores joined by id; `Found` from `search` says what
    they are worth."""
    return search(Ranking.of(align(list_of_scores, missing=missing))).weights


@dataclass(frozen=True)
class Ranking:
    """Where the true label ranks under any weights, for the N labeled videos.

    `margins` [K, M] float64 is, for each of K contested (video, class), each model's probability of
    the class minus that of the true label; `videos` [K] the video; `first` [K] whether the class
    wins a tie, having the lower index. `ahead` [N] counts the classes that are ahead in every
    model.
    """

    aligned: Aligned
    rows: np.ndarray  # [N], the labeled rows of `aligned`
    margins: np.ndarray
    videos: np.ndarray
    first: np.ndarray
    ahead: np.ndarray

    @classmethod
    def of(cls, aligned: Aligned) -> "Ranking":
        """InputError where no video has a label."""
        rows = np.flatnonzero(aligned.labels >= 0)
        if not len(rows):
            raise InputError(
                f"none of the {len(aligned.ids):,} videos has a label. Search on the validation scores, and give the "
                "weights that are found there"
            )
        starts = progress(range(0, len(rows), ROWS_AT_ONCE), desc="ranking")
        pieces = [
            _contested(aligned, rows[start : start + ROWS_AT_ONCE], start) for start in starts
        ]
        return cls(aligned, rows, *(np.concatenate(parts) for parts in zip(*pieces, strict=True)))

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def models(self) -> int:
        return len(self.aligned.names)

    def places(self, weights: Sequence[float] | np.ndarray) -> np.ndarray:
        """The rank of the true label under `weights` [M], as `metrics.ranks` counts it, up to place
        5; int64 [N].

        Behind place 5 it is only known to be behind place 5.
        """
        found = checked_weights(weights, self.models)
        margin = self.margins @ found
        before = (margin > _TIE) | ((margin >= -_TIE) & self.first)
        places = self.ahead + np.bincount(self.videos, before, minlength=len(self)).astype(np.int64)
        places[self.aligned.unscored(found)[self.rows]] = len(self.aligned.classes)
        return places

    def errors(self, places: np.ndarray) -> np.ndarray:
        """Each video's share of the challenge error, float [N]."""
        return challenge_errors(places, len(self.aligned.classes))

    def summary(self, places: np.ndarray) -> Summary:
        return summarize_ranks(
            places, self.aligned.labels[self.rows], len(self.aligned.classes), self.groups
        )

    @property
    def groups(self) -> np.ndarray:
        """What each labeled video depends on: keys of `group_keys` [N]."""
        return self.aligned.groups[self.rows]


def _contested(aligned: Aligned, rows: np.ndarray, start: int) -> tuple[np.ndarray, ...]:
    """The fields of `Ranking` from `margins` on, of some rows, the first of which is video
    `start`."""
    truth = aligned.labels[rows][:, None]
    lower = np.arange(len(aligned.classes)) < truth
    some, always = np.zeros(lower.shape, bool), np.ones(lower.shape, bool)
    margins = []
    for model in range(len(aligned.names)):
        values = np.exp(log_probabilities(aligned, model, rows))
        margin = values - np.take_along_axis(values, truth, axis=1)
        margin[aligned.failed[model, rows]] = 0  # decides nothing
        ahead = (margin > 0) | ((margin == 0) & lower)
        some |= ahead
        always &= ahead
        margins.append(margin)
    ahead_of_truth = always.sum(axis=1)
    # Five classes ahead in every model: wrong under any weights, however the others stand.
    videos, classes = np.nonzero(some & ~always & (ahead_of_truth < 5)[:, None])
    contested = np.stack([margin[videos, classes] for margin in margins], axis=1)
    return contested, videos + start, lower[videos, classes], ahead_of_truth


def search(ranking: Ranking, *, seed: int = 0) -> Found:
    """Search weights on all labeled videos, and judge the search by cross-validation.

    Every fold's videos are scored under weights that were searched on the other folds. The folds
    are a function of (seed, sorted groups), never of the order of a file; a group is in one fold.
    Raises InputError for fewer than two videos.
    """
    if len(ranking) < 2:
        raise InputError(
            f"weights cannot be searched on {len(ranking)} labeled video; use --weights equal"
        )
    groups = ranking.groups
    if len(set(groups.tolist())) == 1:  # nothing else can be told apart
        groups = np.array(ranking.aligned.ids, object)[ranking.rows]
    units = independent_units(groups)  # in the order of their names
    count = int(units.max()) + 1
    fold = (np.random.default_rng(seed).permutation(count) % min(FOLDS, count))[units]
    places = np.empty(len(ranking), np.int64)
    by_fold = []
    for held_out in progress(range(fold.max() + 1), desc="searching", unit="fold"):
        by_fold.append(fit(ranking, fold != held_out))
        places[fold == held_out] = ranking.places(by_fold[-1])[fold == held_out]
    weights = fit(ranking, np.ones(len(ranking), bool))
    equal = ranking.errors(ranking.places(np.ones(ranking.models)))
    return Found(
        weights=weights,
        weights_by_fold=tuple(by_fold),
        summary=ranking.summary(places),
        against_equal=paired_bootstrap(ranking.errors(places), equal, ranking.groups, seed=seed),
        in_sample=float(ranking.errors(ranking.places(weights)).mean()),
        seed=seed,
    )


@dataclass(frozen=True)
class Dropped:
    """A member that was left out, and the average error (fraction) with it and without it."""

    name: str
    error_with: float
    error_without: float

    def statement(self) -> str:
        return (
            f"{self.name} is left out: without it the average error on these videos is "
            f"{100 * self.error_without:.2f} %, with it {100 * self.error_with:.2f} %"
        )


def select(ranking: Ranking) -> tuple[tuple[float, ...], tuple[Dropped, ...]]:
    """Equal weights of the members that the labeled videos support, and which were left out.

    From all members, the one is dropped whose removal lowers the average error most, or leaves it
    as it is, until every removal would raise it (Caruana et al. 2004, backward).
    """

    def error(members: Sequence[int]) -> float:
        weights = np.isin(range(ranking.models), members).astype(float)
        return float(ranking.errors(ranking.places(weights)).mean())

    members, dropped = list(range(ranking.models)), []
    while len(members) > 1:
        teams = [[other for other in members if other != member] for member in members]
        errors = [error(team) for team in teams]
        # Of equal removals, that of the member which is worse alone.
        alone = [error([member]) for member in members]
        choice = min(range(len(members)), key=lambda place: (errors[place], -alone[place]))
        before = error(members)
        if errors[choice] > before + _TIE:
            break
        name = ranking.aligned.names[members[choice]]
        dropped.append(Dropped(name, before, errors[choice]))
        members = teams[choice]
    weights = np.isin(range(ranking.models), members) / len(members)
    return tuple(weights.tolist()), tuple(dropped)


def table(ranking: Ranking, chosen: Sequence[float] | None = None) -> list[Row]:
    """Who adds what: single models, all pairs, all but one, all at equal weights, and all at the
    `chosen` weights."""
    models, names = range(ranking.models), ranking.aligned.names
    teams: dict[str, np.ndarray] = {}
    for team in dict.fromkeys(
        t for n in (1, 2, len(models) - 1, len(models)) if n for t in combinations(models, n)
    ):
        name = " + ".join(names[model] for model in team)
        if len(team) == len(models) > 1:
            name = "all, equal weights"
        elif len(team) == len(models) - 1 > 2:
            name = f"without {next(names[model] for model in models if model not in team)}"
        teams[name] = np.isin(models, team) / len(team)
    if chosen is not None:
        teams["all, given weights"] = checked_weights(chosen, len(models))
    equal = ranking.errors(ranking.places(np.ones(len(models))))
    rows = []
    for name, weights in teams.items():
        places = ranking.places(weights)
        difference = paired_bootstrap(ranking.errors(places), equal, ranking.groups)
        rows.append(Row(name, tuple(weights.tolist()), ranking.summary(places), difference))
    return rows


def signed(difference: Interval) -> str:
    """`-0.31 [-0.5, -0.1]`, in percentage points."""
    return (
        f"{100 * difference.value:+.2f} [{100 * difference.low:+.2f}, {100 * difference.high:+.2f}]"
    )


def fit(ranking: Ranking, chosen: np.ndarray) -> tuple[float, ...]:
    """Weights of least challenge error on the videos `chosen` bool [N], by coordinate search.

    From equal ones, or one model alone where that is better, weight goes from one model to another,
    the best move first, while the error falls; ties stay where they are.
    """

    def error(weights: np.ndarray) -> float:
        return float(ranking.errors(ranking.places(weights))[chosen].mean())

    unit = np.eye(ranking.models)
    weights = min([checked_weights(None, ranking.models), *unit], key=error)
    least = error(weights)
    for step in STEPS:
        while True:
            moves = [
                weights + min(step, weights[giver]) * (unit[taker] - unit[giver])
                for giver, taker in permutations(range(ranking.models), 2)
                if weights[giver] > 0
            ]
            best = min(moves, key=error, default=weights)
            if (lower := error(best)) >= least:
                break
            weights, least = best, lower
    rounded = np.round(weights, 4)  # what is printed is what is used
    rounded[rounded.argmax()] += 1 - rounded.sum()
    return tuple(np.round(rounded, 4).tolist())
