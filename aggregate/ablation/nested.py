"""One head in one fold: chosen inside the training part, trained again on all of it, tested once.

    inner run    train on `train` without `held_out`, validate on `held_out`: chooses the epoch and the options
    outer run    train on `train` as far as that epoch, test on `test`

With the same batches and options, a model is the one that `aggregate.train` alone makes of them, bit for bit (on one
machine, with one number of threads).
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
from aggregate.metrics import challenge_error
from aggregate.training.configurations import Configuration, configured
from aggregate.training.loop import fit
from extract.cli import RunError


@dataclass(frozen=True, eq=False)
class FoldTask:
    """What one process does at a time: one aggregator in one fold."""

    fold: Fold
    agg: str
    candidates: Sequence[Configuration]
    segments: Sequence[int]  # of the test
    at_once: int


def score_fold(trainer: GridTrainer, task: FoldTask) -> tuple[dict[str, Any], np.ndarray]:
    """The row that is recorded, and logits float32 [segments, N, C] of the fold's `test`.

    RunError if every candidate diverges in the inner run, or the chosen one in the outer run.
    """
    fold, name = task.fold, f"fold {task.fold.name}, seed {task.fold.seed}"
    chosen, epoch, error = _choose(trainer, task)
    outer = configured(chosen.name, chosen.options, videos=len(fold.train))
    learners, source = trainer.begin([outer], fold.train, fold.test)
    list(fit(learners, source, until=[epoch + 1]))
    tested = [source.validate([learners[0].model], count)[0] for count in task.segments]
    if np.isnan(tested[0]).all():
        raise RunError(f"{name}: {outer.name} diverged; a smaller --lr may help")
    row = {"seed": fold.seed, "fold": fold.name, "agg": task.agg, "videos": len(fold.test)}
    return row | {"options": outer.name, "epoch": epoch, "inner_error": error}, np.stack(tested)


def _choose(trainer: GridTrainer, task: FoldTask) -> tuple[Configuration, int, float]:
    """The candidate and the epoch with the least error on `held_out` (of equals the least cross-entropy), and it."""
    fold = task.fold
    inner, held_out = fold.train[~fold.held_out], fold.train[fold.held_out]
    candidates = [
        configured(one.name, replace(one.options, seed=fold.seed), videos=len(inner)) for one in task.candidates
    ]
    order = {one: place for place, one in enumerate(candidates)}  # decides last, so that --at-once changes nothing
    best = ((math.inf, math.inf), 0, 0)
    for share in in_passes(candidates, at_once=task.at_once):
        learners, source = trainer.begin(share, inner, held_out)
        for epoch, *_ in fit(learners, source, strict=False):
            for one, learner in zip(share, learners, strict=True):
                if not learner.lost:
                    best = min(best, (_measure(learner.scores, source.labels), epoch, order[one]))
    (error, _), epoch, place = best
    if math.isinf(error):
        raise RunError(f"fold {fold.name}, seed {fold.seed}: every {task.agg} diverged; a smaller --lr may help")
    return candidates[place], epoch, error


def _measure(logits: np.ndarray, labels: np.ndarray) -> tuple[float, float]:
    """The challenge's error, and the cross-entropy, of logits [N, C]."""
    likelihoods = log_softmax(logits.astype(float), axis=1)[range(len(labels)), labels]
    return challenge_error(logits, labels), -float(likelihoods.mean())
