"""One head in one fold: chosen inside the training part, trained again on all of it, tested once.

    inner run    train on `train` without `held_out`, validate on `held_out`: chooses the epoch and the options
    outer run    train on `train` as far as that epoch, test on `test`

With the same batches and options, a model is the one that `aggregate.train` alone makes of them,
bit for bit (on one machine, with one number of threads).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from scipy.special import log_softmax

from aggregate.ablation.configurations import in_passes
from aggregate.ablation.folds import Fold
from aggregate.ablation.grid import GridTrainer
from aggregate.ablation.probes import PROBES, Probe
from aggregate.metrics import challenge_error, ranks
from aggregate.training.configurations import Configuration, configured
from aggregate.training.loop import fit
from extract import RunError


@dataclass(frozen=True, eq=False)
class FoldTask:
    """What one process does at a time: one aggregator in one fold."""

    fold: Fold
    agg: str
    candidates: Sequence[Configuration | Probe]
    segments: Sequence[int]  # of the test
    at_once: int
    vector: str = "mean"  # of probes

    @property
    def row(self) -> dict[str, Any]:
        return {
            "seed": self.fold.seed,
            "fold": self.fold.name,
            "agg": self.agg,
            "videos": len(self.fold.test),
        }


def score_fold(trainer: GridTrainer, task: FoldTask) -> tuple[dict[str, Any], np.ndarray]:
    """The row that is recorded, and logits float32 [segments, N, C] of the fold's `test`.

    If several candidates of a head are tried, the row has `as_reported` too: of each the number of
    test videos that are right after its last epoch, which is what papers choose by. RunError if
    every candidate diverges in the inner run, or the chosen one in the outer run.
    """
    if task.agg in PROBES:
        return _score_probe(trainer, task)
    fold, segments = task.fold, task.segments
    chosen, epoch, error = _choose(trainer, task)
    candidates = task.candidates if len(task.candidates) > 1 else [chosen]
    outer = [_in_fold(one, fold, len(fold.train)) for one in candidates]
    chosen = _in_fold(chosen, fold, len(fold.train))
    tested: list[np.ndarray] = []
    as_reported: dict[str, int] = {}
    for share in in_passes(outer, at_once=task.at_once):
        learners, source = trainer.begin(share, fold.train, fold.test)
        ends = [one.recipe.epochs if len(outer) > 1 else epoch + 1 for one in share]
        for number, *_ in fit(learners, source, until=ends, strict=False):
            if chosen in share and number == epoch:
                model = learners[share.index(chosen)].model
                tested = [source.validate([model], count)[0] for count in segments]
        for one, learner in zip(share, learners, strict=True):
            if len(outer) > 1 and not learner.lost:
                (logits,) = source.validate([learner.model], segments[-1])
                as_reported[one.name] = int((ranks(logits, source.labels) == 0).sum())
    if not tested or np.isnan(tested[0]).all():
        raise RunError(
            f"fold {fold.name}, seed {fold.seed}: {chosen.name} diverged; a smaller --lr may help"
        )
    row = task.row | {"options": chosen.name, "epoch": epoch, "inner_error": error}
    return row | ({"as_reported": as_reported} if as_reported else {}), np.stack(tested)


def _score_probe(trainer: GridTrainer, task: FoldTask) -> tuple[dict[str, Any], np.ndarray]:
    """The same for logistic regression or nearest neighbors, which have no epochs."""
    store, fold, classes = trainer.store, task.fold, len(trainer.store.classes)
    labels, stored = store.labels, store.frames_per_video
    probes: list[Any] = list(task.candidates)
    chosen, error = probes[0], None
    if len(probes) > 1:
        inner, held_out = fold.train[~fold.held_out], fold.train[fold.held_out]
        vectors = trainer.vectors(inner, stored, task.vector)
        unseen = trainer.vectors(held_out, stored, task.vector)
        fitted = (probe.fit(vectors, labels[inner]) for probe in probes)
        measured = [_measure(one.logits(unseen, classes), labels[held_out]) for one in fitted]
        chosen = probes[min(range(len(probes)), key=measured.__getitem__)]
        error = min(measured)[0]
    model = chosen.fit(trainer.vectors(fold.train, stored, task.vector), labels[fold.train])
    tested = [
        model.logits(trainer.vectors(fold.test, count, task.vector), classes)
        for count in task.segments
    ]
    row = {
        "options": chosen.name,
        "epoch": None,
        "inner_error": error,
        "converged": model.converged,
    }
    return task.row | row, np.stack(tested)


def _in_fold(one: Any, fold: Fold, videos: int) -> Configuration:
    """A candidate with the seed of the fold, and the recipe for N videos to train on."""
    return configured(one.name, replace(one.options, seed=fold.seed), videos=videos)


def _choose(trainer: GridTrainer, task: FoldTask) -> tuple[Configuration, int, float]:
    """The candidate and the epoch with the least error on `held_out` (of equals the least
    cross-entropy), and it."""
    fold = task.fold
    inner, held_out = fold.train[~fold.held_out], fold.train[fold.held_out]
    candidates = [_in_fold(one, fold, len(inner)) for one in task.candidates]
    order = {
        one: place for place, one in enumerate(candidates)
    }  # decides last, so that --at-once changes nothing
    best = ((math.inf, math.inf), 0, 0)
    for share in in_passes(candidates, at_once=task.at_once):
        learners, source = trainer.begin(share, inner, held_out)
        for epoch, *_ in fit(learners, source, strict=False):
            for one, learner in zip(share, learners, strict=True):
                if not learner.lost:
                    best = min(best, (_measure(learner.scores, source.labels), epoch, order[one]))
    (error, _), epoch, place = best
    if math.isinf(error):
        raise RunError(
            f"fold {fold.name}, seed {fold.seed}: every {task.agg} diverged; a smaller --lr may help"
        )
    return candidates[place], epoch, error


def _measure(logits: np.ndarray, labels: np.ndarray) -> tuple[float, float]:
    """The challenge's error, and the cross-entropy, of logits [N, C]."""
    likelihoods = log_softmax(logits.astype(float), axis=1)[range(len(labels)), labels]
    return challenge_error(logits, labels), -float(likelihoods.mean())
