"""Weights of an ensemble, searched on labelled videos and judged on others; and who adds what.

`Ranking` answers "where does the true label rank under these weights?" many times over. A class can overtake the true
label under weights that are not negative only if it is ahead in at least one model, and it stays ahead if it is ahead
in all; so only the few classes on which the models disagree are kept, which is exact and some hundred times faster
than fusing again.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import combinations, permutations

import numpy as np

from aggregate.metrics import Interval, Summary, paired_bootstrap, summarise_places
from aggregate.scores import Scores
from ensemble.align import Aligned, Missing, align
from ensemble.fuse import Of, checked_temperatures, checked_weights, log_softmax, scaled
from extract.cli import InputError

FOLDS = 5
STEPS = (0.1, 0.05, 0.02, 0.01)  # weight moved from one model to another in the refinement
_ROWS_AT_ONCE = 2048
_TIE = 1e-12  # a sum of differences this small is a tie that rounding hides


@dataclass(frozen=True)
class Found:
    """Searched weights, and what they are worth on videos they were not searched on.

    `summary` is over all labelled videos, each under the weights that the other folds gave; `against_equal` is its
    average error minus that of equal weights on the same videos (below 0 is better), with a 95 % interval.
    """

    weights: tuple[float, ...]
    weights_by_fold: tuple[tuple[float, ...], ...]
    summary: Summary
    against_equal: Interval
    in_sample: float  # average error of `weights` on the videos they were searched on: too good to be true
    seed: int

    @property
    def beats_equal(self) -> bool:
        return self.against_equal.high < 0

    def statement(self) -> str:
        """In plain words, whether the search was worth it."""
        folds = len(self.weights_by_fold)
        figure = (
            f"on held-out folds ({folds}, seed {self.seed}) their average error is {self.summary.average_error} %, "
            f"{signed(self.against_equal)} against equal weights"
        )
        if self.beats_equal:
            return f"Searched weights beat equal ones: {figure}."
        return f"Searched weights do NOT beat equal ones: {figure}. Prefer --weights equal."


@dataclass(frozen=True)
class Row:
    """A line of the table: models at equal weights, or all of them at the chosen ones."""

    name: str
    weights: tuple[float, ...]
    summary: Summary
    against_equal: Interval  # average error minus that of all models at equal weights


def search_weights(
    list_of_scores: Sequence[Scores],
    *,
    of: Of = "probabilities",
    temperatures: Sequence[float] | None = None,
    missing: Missing = "error",
    folds: int = FOLDS,
    seed: int = 0,
) -> tuple[float, ...]:
    """Weights [M], summing to 1, for `fuse` of scores joined by id; `Found` from `search` says what they are worth."""
    aligned = align(list_of_scores, missing=missing)
    return search(Ranking.of(aligned, of=of, temperatures=temperatures), folds=folds, seed=seed).weights


@dataclass(frozen=True)
class Ranking:
    """Where the true label ranks under any weights, for the N labelled videos.

    `margins` [K, M] float64 is, for each of K contested (video, class), each model's score of the class minus that of
    the true label; `videos` [K] the video; `first` [K] whether the class wins a tie, having the lower index. `ahead`
    [N] counts the classes that are ahead in every model.
    """

    aligned: Aligned
    kind: Of
    temperatures: np.ndarray
    rows: np.ndarray  # [N], the labelled rows of `aligned`
    margins: np.ndarray
    videos: np.ndarray
    first: np.ndarray
    ahead: np.ndarray
    true_logs: np.ndarray  # [N, M] each model's log probability of the true label

    @classmethod
    def of(
        cls, aligned: Aligned, *, of: Of = "probabilities", temperatures: Sequence[float] | None = None
    ) -> "Ranking":
        """InputError where no video has a label."""
        scales = checked_temperatures(temperatures, len(aligned.names))
        rows = np.flatnonzero(aligned.labels >= 0)
        if not len(rows):
            raise InputError(f"none of the {len(aligned.ids):,} videos has a label; there is nothing to search on")
        pieces = [
            _contested(aligned, rows[start : start + _ROWS_AT_ONCE], start, of, scales)
            for start in range(0, len(rows), _ROWS_AT_ONCE)
        ]
        return cls(aligned, of, scales, rows, *(np.concatenate(parts) for parts in zip(*pieces, strict=True)))

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def models(self) -> int:
        return len(self.aligned.names)

    @property
    def labels(self) -> np.ndarray:
        return self.aligned.labels[self.rows]

    def places(self, weights: Sequence[float] | np.ndarray) -> np.ndarray:
        """The rank of the true label under `weights` [M], as `metrics.ranks` counts it, up to place 5; int64 [N].

        Behind place 5 it is only known to be behind place 5.
        """
        found = checked_weights(weights, self.models)
        margin = self.margins @ found
        before = (margin > _TIE) | ((margin >= -_TIE) & self.first)
        places = self.ahead + np.bincount(self.videos, before, minlength=len(self)).astype(np.int64)
        places[self.aligned.unscored(found)[self.rows]] = len(self.aligned.classes)
        return places

    def errors(self, weights: Sequence[float] | np.ndarray) -> np.ndarray:
        """Each video's share of the challenge error, float [N]."""
        return self.errors_at(self.places(weights))

    def errors_at(self, places: np.ndarray) -> np.ndarray:
        return ((places >= 1) + (places >= min(5, len(self.aligned.classes))).astype(float)) / 2

    def summary(self, places: np.ndarray) -> Summary:
        return summarise_places(places, self.labels, len(self.aligned.classes))


def search(ranking: Ranking, *, folds: int = FOLDS, seed: int = 0) -> Found:
    """Search weights on all labelled videos, and judge the search by cross-validation.

    Every fold's videos are scored under weights that were searched on the other folds. The folds are a function of
    (seed, sorted ids), never of the order of a file. Raises InputError for fewer than two folds or videos.
    """
    if folds < 2:
        raise InputError(f"--folds {folds}: weights are judged on videos they were not searched on, so 2 at least")
    if len(ranking) < 2:
        raise InputError(f"weights cannot be searched on {len(ranking)} labelled video; use --weights equal")
    fold = _folds(ranking, min(folds, len(ranking)), seed)
    places = np.empty(len(ranking), np.int64)
    by_fold = []
    for held_out in range(fold.max() + 1):
        weights = _fit(ranking, fold != held_out)
        by_fold.append(weights)
        places[fold == held_out] = ranking.places(weights)[fold == held_out]
    weights = _fit(ranking, np.ones(len(ranking), bool))
    equal = ranking.errors(checked_weights(None, ranking.models))
    return Found(
        weights=weights,
        weights_by_fold=tuple(by_fold),
        summary=ranking.summary(places),
        against_equal=paired_bootstrap(ranking.errors_at(places), equal, seed=seed),
        in_sample=float(ranking.errors(weights).mean()),
        seed=seed,
    )


def table(ranking: Ranking, chosen: Sequence[float] | None = None) -> list[Row]:
    """Who adds what: single models, all pairs, all but one, all at equal weights, and all at the `chosen` weights."""
    everyone = tuple(range(ranking.models))
    names = ranking.aligned.names
    teams = dict.fromkeys(
        team for size in (1, 2, ranking.models - 1, ranking.models) if size for team in combinations(everyone, size)
    )
    rows = []
    equal = ranking.errors(np.ones(ranking.models))
    for team in teams:
        weights = np.isin(everyone, team) / len(team)
        if len(team) == ranking.models > 1:
            name = "all, equal weights"
        elif len(team) == ranking.models - 1 > 2:
            name = f"without {next(names[model] for model in everyone if model not in team)}"
        else:
            name = " + ".join(names[model] for model in team)
        rows.append(_row(ranking, name, weights, equal))
    if chosen is not None:
        rows.append(_row(ranking, "all, given weights", checked_weights(chosen, ranking.models), equal))
    return rows


def signed(difference: Interval) -> str:
    """`-0.31 [-0.5, -0.1]`, in percentage points."""
    return f"{100 * difference.value:+.2f} [{100 * difference.low:+.2f}, {100 * difference.high:+.2f}]"


def _row(ranking: Ranking, name: str, weights: np.ndarray, equal: np.ndarray) -> Row:
    places = ranking.places(weights)
    return Row(
        name=name,
        weights=tuple(weights.tolist()),
        summary=ranking.summary(places),
        against_equal=paired_bootstrap(ranking.errors_at(places), equal),
    )


def _contested(
    aligned: Aligned, rows: np.ndarray, start: int, of: Of, temperatures: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """The fields of `Ranking` from `margins` on, of some rows, the first of which is video `start`."""
    truth = aligned.labels[rows][:, None]
    lower = np.arange(len(aligned.classes)) < truth
    never = np.ones(lower.shape, bool)
    always = np.ones(lower.shape, bool)
    margins, true_logs = [], []
    for model in range(len(aligned.names)):
        values = scaled(aligned, model, rows, temperatures)
        logs = log_softmax(values)
        true_logs.append(np.take_along_axis(logs, truth, axis=1)[:, 0])
        if of == "probabilities":
            values = np.exp(logs, out=logs)
        margin = values - np.take_along_axis(values, truth, axis=1)
        ahead = (margin > 0) | ((margin == 0) & lower)  # where the video failed: 0, which decides nothing
        never &= ~ahead
        always &= ahead
        margins.append(margin)
    ahead_of_truth = always.sum(axis=1)
    # Five classes ahead in every model: wrong under any weights, however the others stand.
    videos, classes = np.nonzero(~never & ~always & (ahead_of_truth < 5)[:, None])
    return (
        np.stack([margin[videos, classes] for margin in margins], axis=1),
        videos + start,
        lower[videos, classes],
        ahead_of_truth,
        np.stack(true_logs, axis=1),
    )


def _folds(ranking: Ranking, folds: int, seed: int) -> np.ndarray:
    """The fold of each video, all of nearly one size."""
    ids = np.array([ranking.aligned.ids[row] for row in ranking.rows], object)
    fold = np.empty(len(ids), np.int64)
    fold[np.argsort(ids)] = np.random.default_rng(seed).permutation(len(ids)) % folds
    return fold


def _fit(ranking: Ranking, chosen: np.ndarray) -> tuple[float, ...]:
    """Weights from the videos `chosen` bool [N]: least log-loss first, then the challenge error from there."""

    def error(weights: np.ndarray) -> float:
        return float(ranking.errors(weights)[chosen].mean())

    equal = checked_weights(None, ranking.models)
    if ranking.models == 1:
        return (1.0,)
    smooth = _rounded(_least_log_loss(ranking, chosen))
    best = _refine(error, smooth if error(smooth) <= error(equal) else equal)
    return tuple(_rounded(best).tolist())


def _refine(error: Callable[[np.ndarray], float], weights: np.ndarray) -> np.ndarray:
    """Move weight from one model to another, the best move first, while the error falls; ties stay where they are."""
    least = error(weights)
    for step in STEPS:
        while True:
            moves = [
                _moved(weights, giver, taker, step)
                for giver, taker in permutations(range(len(weights)), 2)
                if weights[giver] > 0
            ]
            errors = [error(move) for move in moves]
            best = int(np.argmin(errors))
            if errors[best] >= least:
                break
            weights, least = moves[best], errors[best]
    return weights


def _moved(weights: np.ndarray, giver: int, taker: int, step: float) -> np.ndarray:
    moved = weights.copy()
    amount = min(step, weights[giver])
    moved[giver] -= amount
    moved[taker] += amount
    return moved


def _rounded(weights: np.ndarray) -> np.ndarray:
    """To four digits, summing to 1: what is printed is what is used."""
    rounded = np.round(weights, 4)
    rounded[rounded.argmax()] += 1 - rounded.sum()
    return np.round(rounded, 4)


def _least_log_loss(ranking: Ranking, chosen: np.ndarray) -> np.ndarray:
    """Weights on the simplex of least mean log-loss (convex in them, for either kind of mean).

    Over the videos that every model scored: on others a missing member would be taken for a confident one.
    """
    from scipy.optimize import minimize

    complete = chosen & ~ranking.aligned.failed[:, ranking.rows].any(axis=0)
    equal = checked_weights(None, ranking.models)
    if not complete.any():
        return equal
    loss = _mixture_loss(ranking, complete) if ranking.kind == "probabilities" else _logits_loss(ranking, complete)
    bounds = [(0.0, 1.0)] * ranking.models
    constraint = {"type": "eq", "fun": lambda w: w.sum() - 1, "jac": np.ones_like}
    found = minimize(loss, equal, jac=True, method="SLSQP", bounds=bounds, constraints=[constraint], tol=1e-8)
    weights = np.clip(found.x, 0, None)
    # Whatever the solver thinks of its last step, the result has to be no worse than the start.
    if not np.isfinite(weights).all() or weights.sum() <= 0 or loss(weights / weights.sum())[0] > loss(equal)[0]:
        return equal
    return weights / weights.sum()


def _mixture_loss(ranking: Ranking, complete: np.ndarray) -> Callable[[np.ndarray], tuple[float, np.ndarray]]:
    """-mean log sum_m w_m p_m(truth) and its gradient [M]."""
    logs = ranking.true_logs[complete]
    peak = logs.max(axis=1, keepdims=True)
    ratios = np.exp(logs - peak)

    def loss(weights: np.ndarray) -> tuple[float, np.ndarray]:
        mixed = np.maximum(ratios @ weights, 1e-300)
        return float(-(np.log(mixed) + peak[:, 0]).mean()), -(ratios / mixed[:, None]).mean(axis=0)

    return loss


def _logits_loss(ranking: Ranking, complete: np.ndarray) -> Callable[[np.ndarray], tuple[float, np.ndarray]]:
    """mean of logsumexp(z) - z(truth) with z = sum_m w_m z_m, and its gradient [M]."""
    aligned, rows = ranking.aligned, ranking.rows[complete]

    def loss(weights: np.ndarray) -> tuple[float, np.ndarray]:
        total, gradient = 0.0, np.zeros(ranking.models)
        for start in range(0, len(rows), _ROWS_AT_ONCE):
            some = rows[start : start + _ROWS_AT_ONCE]
            truth = aligned.labels[some][:, None]
            parts = [scaled(aligned, model, some, ranking.temperatures) for model in range(ranking.models)]
            mixed = sum(weight * part for weight, part in zip(weights, parts, strict=True))
            logs = log_softmax(np.asarray(mixed))
            total -= np.take_along_axis(logs, truth, axis=1).sum()
            probabilities = np.exp(logs)
            for model, part in enumerate(parts):
                expected = np.einsum("nc,nc->", probabilities, part)
                gradient[model] += expected - np.take_along_axis(part, truth, axis=1).sum()
        return total / len(rows), gradient / len(rows)

    return loss
