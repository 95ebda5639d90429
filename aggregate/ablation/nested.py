"""Nested cross-validation of one head in one fold.

    inner run    train on `inner`, validate on the held-out rows: chooses the epoch and the options
    outer run    train on all of `train` up to that epoch, test on `test` once

With the same batches and options, a model equals the one that `aggregate.train` trains, bit for bit
(on one machine, with one number of threads).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.special import log_softmax

from aggregate.ablation.configurations import group_into_passes
from aggregate.ablation.folds import Fold
from aggregate.ablation.grid import GridTrainer
from aggregate.ablation.options import PROBES
from aggregate.metrics import challenge_error, ranks
from aggregate.training.configurations import Configuration
from aggregate.training.loop import fit
from extract import RunError


@dataclass(frozen=True, eq=False)
class FoldTask:
    """The work of one process at a time: one aggregator in one fold."""

    fold: Fold
    agg: str
    candidates: Sequence[Any]  # each a Configuration, or a Probe
    segments: Sequence[int]  # numbers of segments in the test
    at_once: int
    vector: str = "mean"  # of probes

    @property
    def row(self) -> dict[str, Any]:
        fold = self.fold
        return {"seed": fold.seed, "fold": fold.name, "agg": self.agg, "videos": len(fold.test)}


def score_fold(trainer: GridTrainer, task: FoldTask) -> tuple[dict[str, Any], np.ndarray]:
    """The row that is recorded, and logits float32 [segments, N, C] of the fold's `test`.

    If a head has several candidates, the row also has `as_reported`: for each candidate the number
    of correct test videos after its last epoch, by which many papers choose. RunError if every
    candidate diverges in the inner run, or the chosen one in the outer run.
    """
    if task.agg in PROBES:
        return _score_probe(trainer, task)
    fold = task.fold
    best, epoch, error = _choose(trainer, task)
    chosen = best.with_seed(fold.seed, videos=len(fold.train))
    as_papers = len(task.candidates) > 1
    outer = [chosen]
    if as_papers:
        outer = [each.with_seed(fold.seed, videos=len(fold.train)) for each in task.candidates]
    tested: list[np.ndarray] = []
    correct: dict[str, int] = {}
    for group in group_into_passes(outer, at_once=task.at_once):
        learners, source = trainer.make_learners(group, fold.train, fold.test)
        ends = [each.recipe.epochs if as_papers else epoch + 1 for each in group]
        for number, *_ in fit(learners, source, until=ends, strict=False):
            if chosen in group and number == epoch:
                learner = learners[group.index(chosen)]
                tested = [
                    source.validate([learner.model], segments, learner)[0]
                    for segments in task.segments
                ]
        for configuration, learner in zip(group, learners, strict=True):
            if as_papers and not learner.diverged:
                (logits,) = source.validate([learner.model], task.segments[-1], learner)
                correct[configuration.name] = int((ranks(logits, source.labels) == 0).sum())
    if not tested or np.isnan(tested[0]).all():
        raise RunError(
            f"fold {fold.name}, seed {fold.seed}: {chosen.name} diverged; a smaller --lr may help"
        )
    row = task.row | {"options": chosen.name, "epoch": epoch, "inner_error": error}
    return row | ({"as_reported": correct} if correct else {}), np.stack(tested)


def _score_probe(trainer: GridTrainer, task: FoldTask) -> tuple[dict[str, Any], np.ndarray]:
    """`score_fold` for logistic regression or nearest neighbors, which have no epochs."""
    store, fold, classes = trainer.store, task.fold, len(trainer.store.classes)

    def vectors(rows: np.ndarray, segments: int = store.frames_per_video) -> np.ndarray:
        return trainer.vectors(rows, segments, task.vector)

    probes = task.candidates
    chosen, error = probes[0], None
    if len(probes) > 1:
        inner, held_out = vectors(fold.inner), vectors(fold.held_out_rows)
        held_out_labels = store.labels[fold.held_out_rows]
        errors = []
        for probe in probes:
            fitted = probe.fit(inner, store.labels[fold.inner])
            errors.append(_errors(fitted.logits(held_out, classes), held_out_labels))
        best = min(errors)
        chosen, error = probes[errors.index(best)], best[0]
    model = chosen.fit(vectors(fold.train), store.labels[fold.train])
    tested = [model.logits(vectors(fold.test, count), classes) for count in task.segments]
    row = {"options": chosen.name, "epoch": None, "inner_error": error}
    return task.row | row | {"converged": model.converged}, np.stack(tested)


def _choose(trainer: GridTrainer, task: FoldTask) -> tuple[Configuration, int, float]:
    """The candidate and the epoch with the smallest error on the held-out rows, and that error.

    Ties go to the smaller cross-entropy.
    """
    fold = task.fold
    candidates = [each.with_seed(fold.seed, videos=len(fold.inner)) for each in task.candidates]
    # Remaining ties go to the first candidate, however --at-once divides them into passes.
    order = {candidate: number for number, candidate in enumerate(candidates)}
    best = ((math.inf, math.inf), 0, 0)
    for group in group_into_passes(candidates, at_once=task.at_once):
        learners, source = trainer.make_learners(group, fold.inner, fold.held_out_rows)
        for epoch, *_ in fit(learners, source, strict=False):
            for candidate, learner in zip(group, learners, strict=True):
                if not learner.diverged:
                    errors = _errors(learner.scores, source.labels)
                    best = min(best, (errors, epoch, order[candidate]))
    (error, _), epoch, number = best
    if math.isinf(error):
        raise RunError(
            f"fold {fold.name}, seed {fold.seed}: every {task.agg} diverged; a smaller --lr may "
            "help"
        )
    return candidates[number], epoch, error


def _errors(logits: np.ndarray, labels: np.ndarray) -> tuple[float, float]:
    """The challenge's error, and the cross-entropy, of logits [N, C]."""
    likelihoods = log_softmax(logits.astype(float), axis=1)[range(len(labels)), labels]
    return challenge_error(logits, labels), -float(likelihoods.mean())
