"""The training loop: one or many learners on the same batches, validated after every epoch."""

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
    """Train and validate epoch by epoch. Learners keep their best state by the challenge's error.

    Args:
        learners: models that share batches, with the batch size and seed of the first one.
        start: the first epoch to train.
        until: the number of epochs of each learner, instead of its recipe's. No learner is
            validated then.
        on_step: called after every batch.
        strict: raise RunError if a learner diverges. Otherwise `Learner.diverged` says why, and
            the others continue.

    Yields:
        after each epoch its number, its seconds, and the seconds spent waiting for batches.

    Raises RunError naming the video if features are not finite.
    """

    def on_diverged(learner: Learner) -> None:
        source.check_finite(learner.recent_rows)
        if strict:
            raise_diverged(learner)

    ends = until or [learner.recipe.epochs for learner in learners]
    for epoch in range(start, max(ends)):
        started = time.perf_counter()
        running = [
            learner
            for learner, end in zip(learners, ends, strict=True)
            if epoch < end and not learner.diverged
        ]
        if not running:
            return
        batches = source.train_batches(running[0], epoch)
        waited = train_epoch(running, batches, epoch, on_step, on_diverged)
        alive = [learner for learner in running if not learner.diverged]
        if alive and until is None:
            tested = source.validate([learner.model for learner in alive], source.frames, alive[0])
            for learner, scores in zip(alive, tested, strict=True):
                learner.scores = scores
                if np.isnan(scores).all():
                    learner.diverged = f"scores are not finite in epoch {epoch}"
                    on_diverged(learner)
                else:
                    learner.keep_best(challenge_error(scores, source.labels), epoch)
        yield epoch, time.perf_counter() - started, waited


def raise_diverged(learner: Learner) -> None:
    """RunError for a learner that diverged."""
    raise RunError(
        f"{learner.name}: {learner.diverged}; a smaller --lr than {learner.recipe.lr:g} may help"
    )


def train_epoch(
    learners: Sequence[Learner],
    batches: Iterable[Batch],
    epoch: int,
    on_step: Callable[[], object] = lambda: None,
    on_diverged: Callable[[Learner], object] = raise_diverged,
) -> float:
    """Feed each batch to all `learners`; returns the seconds spent waiting for batches.

    `on_diverged` is called with a learner that diverges; if it does not raise, the others continue.
    """
    for learner in learners:
        learner.train_mode()
    waited, step_end = 0.0, time.perf_counter()
    for step, batch in enumerate(batches):
        waited += time.perf_counter() - step_end
        for learner in learners:
            if not learner.diverged:
                learner.step(batch, epoch, step)
                if learner.diverged:
                    on_diverged(learner)
        on_step()
        step_end = time.perf_counter()
    for learner in learners:
        if not learner.diverged:
            learner.end_epoch(epoch)
            if learner.diverged:
                on_diverged(learner)
    return waited
