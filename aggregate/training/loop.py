"""The one training loop: learners, one or many, on one stream of batches; validated after every
epoch."""

import time
from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np

from aggregate.data.features import Batch
from aggregate.metrics import challenge_error
from aggregate.training.learner import Learner
from aggregate.training.sources import Source
from extract import RunError


def fit(
    learners: Sequence[Learner],
    source: Source,
    *,
    start: int = 0,
    until: Sequence[int] | None = None,
    on_step: Callable[[], object] = lambda: None,
    strict: bool = True,
) -> Iterator[tuple[int, float, float]]:
    """Train epoch by epoch, from `start`: the number of each that is done, its seconds, and of
    these those of waiting for batches. Learners then know their `loss` and `scores`, and keep their
    best state by the challenge's error.

    `until` N epochs each learner is trained instead of its recipe's, and none is validated. A
    learner that diverges raises RunError; where not `strict` it is lost (`Learner.lost` says why)
    and the others go on. Features that are not finite raise RunError naming their video.
    """

    def on_lost(learner: Learner) -> None:
        source.check_finite(learner.suspects)
        if strict:
            refuse(learner)

    ends = until or [learner.recipe.epochs for learner in learners]
    for number in range(start, max(ends)):
        started = time.perf_counter()
        running = [
            one for one, end in zip(learners, ends, strict=True) if number < end and not one.lost
        ]
        if not running:
            return
        waited = train_epoch(running, source.train_batches(number), number, on_step, on_lost)
        alive = [learner for learner in running if not learner.lost]
        if alive and until is None:
            tested = source.validate([learner.model for learner in alive], source.frames)
            for learner, scores in zip(alive, tested, strict=True):
                learner.scores = scores
                if np.isnan(scores).all():
                    learner.lost = f"scores are not finite in epoch {number}"
                    on_lost(learner)
                else:
                    learner.keep_best(challenge_error(scores, source.labels), number)
        yield number, time.perf_counter() - started, waited


def refuse(learner: Learner) -> None:
    """RunError for a learner that diverged."""
    raise RunError(
        f"{learner.name}: {learner.lost}; a smaller --lr than {learner.recipe.lr:g} may help"
    )


def train_epoch(
    learners: Sequence[Learner],
    batches: Iterable[Batch],
    epoch: int,
    on_step: Callable[[], object] = lambda: None,
    on_lost: Callable[[Learner], object] = refuse,
) -> float:
    """One pass over `batches`, each fed to all `learners`: the seconds of waiting for batches.

    `on_lost` is told of a learner that diverges; where it raises nothing the others go on.
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
    for learner in learners:
        if not learner.lost:
            learner.end_epoch(epoch)
            if learner.lost:
                on_lost(learner)
    return waited
