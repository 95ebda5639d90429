"""The one training loop: learners, one or many, on one stream of batches; validated after every epoch."""

import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from aggregate.data.features import Batch
from aggregate.metrics import challenge_error
from aggregate.training.learner import Learner
from aggregate.training.sources import DamagedModelError, Source
from extract.cli import RunError


@dataclass(frozen=True)
class Epoch:
    """What an epoch came to: of each learner the mean loss and the validation's logits [N, C]; None for a lost one."""

    number: int
    losses: list[float]
    scores: list[np.ndarray | None]
    seconds: float
    waited: float  # of these, for batches


def fit(
    learners: Sequence[Learner],
    source: Source,
    *,
    start: int = 0,
    on_step: Callable[[], object] = lambda: None,
    strict: bool = True,
) -> Iterator[Epoch]:
    """Train epoch by epoch, from `start`; each learner keeps its best state by the challenge's error.

    A learner that diverges raises RunError; where not `strict` it is lost (`Learner.lost` says why) and the others go
    on. Features that are not finite raise RunError naming their video.
    """

    def on_lost(learner: Learner) -> None:
        source.check_finite(learner.suspects)
        if strict:
            refuse(learner)

    for number in range(start, learners[0].recipe.epochs):
        started = time.perf_counter()
        running = [learner for learner in learners if not learner.lost]
        if not running:
            return
        losses, waited = train_epoch(running, source.train_batches(number), number, on_step, on_lost)
        scores = _validate([learner for learner in running if not learner.lost], source, number, strict)
        for learner, logits in scores.items():
            learner.keep_best(challenge_error(logits, source.labels), number)
        wall = time.perf_counter() - started
        yield Epoch(
            number, [losses.get(one, math.nan) for one in learners], [scores.get(one) for one in learners], wall, waited
        )


def refuse(learner: Learner) -> None:
    """RunError for a learner that diverged."""
    raise RunError(f"{learner.name}: {learner.lost}; a smaller --lr than {learner.recipe.lr:g} may help")


def train_epoch(
    learners: Sequence[Learner],
    batches: Iterable[Batch],
    epoch: int,
    on_step: Callable[[], object] = lambda: None,
    on_lost: Callable[[Learner], object] = refuse,
) -> tuple[dict[Learner, float], float]:
    """One pass over `batches`, each fed to all `learners`: their mean losses, and the seconds of waiting for batches.

    `on_lost` is told of a learner that diverges; where it raises nothing the others go on, and that one has no loss.
    """
    for learner in learners:
        learner.train_mode()
    waited, asked = 0.0, time.perf_counter()
    for step, batch in enumerate(batches):
        waited += time.perf_counter() - asked
        for learner in learners:
            if not learner.lost:
                learner.step(batch, epoch, step)
                if learner.lost:
                    on_lost(learner)
        on_step()
        asked = time.perf_counter()
    losses = {learner: learner.mean_loss(epoch) for learner in learners if not learner.lost}
    for learner in losses:
        if learner.lost:
            on_lost(learner)
    return {learner: loss for learner, loss in losses.items() if not learner.lost}, waited


def _validate(learners: list[Learner], source: Source, epoch: int, strict: bool) -> dict[Learner, np.ndarray]:
    """Scores of the learners; one whose scores are not finite is lost, or ends the run where `strict`."""
    while learners:
        try:
            scores = source.validate([learner.model for learner in learners], source.frames)
            return dict(zip(learners, scores, strict=True))
        except DamagedModelError as error:
            if strict:
                raise
            learners.pop(error.place).lost = f"scores are not finite in epoch {epoch}"
    return {}
