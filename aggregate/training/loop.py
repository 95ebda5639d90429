"""The one training loop: learners, one or many, on one stream of batches; validated after every epoch."""

import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import numpy as np

from aggregate.data.features import Batch
from aggregate.metrics import challenge_error
from aggregate.training.learner import DivergedError, Learner
from aggregate.training.sources import Source
from aggregate.training.testing import DamagedModelError
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
    for number in range(start, learners[0].recipe.epochs):
        started = time.perf_counter()
        running = [learner for learner in learners if not learner.lost]
        if not running:
            return

        def lose(learner: Learner, error: DivergedError) -> None:
            if name := source.non_finite(error.rows):
                raise RunError(
                    f"the stored features of {name} are not finite; `python -m extract.verify` checks the store"
                ) from None
            if strict:
                raise RunError(f"{error}; a smaller --lr than {learner.recipe.lr:g} may help") from None
            learner.lost = str(error).removeprefix(f"{learner.name}: ")

        losses, waited = train_epoch(running, source.train_batches(number), number, on_step, lose)
        scores = _validate([learner for learner in running if not learner.lost], source, number, strict)
        for learner, logits in scores.items():
            learner.keep_best(challenge_error(logits, source.labels), number)
        wall = time.perf_counter() - started
        yield Epoch(
            number, [losses.get(one, math.nan) for one in learners], [scores.get(one) for one in learners], wall, waited
        )


def train_epoch(
    learners: Sequence[Learner],
    batches: Iterable[Batch],
    epoch: int,
    on_step: Callable[[], object] = lambda: None,
    on_diverged: Callable[[Learner, DivergedError], object] | None = None,
) -> tuple[dict[Learner, float], float]:
    """One pass over `batches`, each fed to all `learners`: their mean losses, and the seconds of waiting for batches.

    A learner that diverges ends the pass with its DivergedError; with `on_diverged`, which is told of it, the others
    go on and it has no loss.
    """
    running = list(learners)

    @contextmanager
    def watched(learner: Learner) -> Iterator[None]:
        try:
            yield
        except DivergedError as error:
            if on_diverged is None:
                raise
            running.remove(learner)
            on_diverged(learner, error)

    for learner in learners:
        learner.train_mode()
    waited, asked = 0.0, time.perf_counter()
    for step, batch in enumerate(batches):
        waited += time.perf_counter() - asked
        for learner in list(running):
            with watched(learner):
                learner.step(batch, epoch, step)
        on_step()
        asked = time.perf_counter()
    losses = {}
    for learner in list(running):
        with watched(learner):
            losses[learner] = learner.mean_loss(epoch)
    return losses, waited


def _validate(learners: list[Learner], source: Source, epoch: int, strict: bool) -> dict[Learner, np.ndarray]:
    """Scores of the learners; one whose scores are not finite is lost, or ends the run where `strict`."""
    while learners:
        try:
            return dict(zip(learners, tested(learners, source, source.frames), strict=True))
        except DamagedModelError as error:
            if strict:
                raise
            learners.pop(error.place).lost = f"scores are not finite in epoch {epoch}"
    return {}


def tested(learners: Sequence[Learner], source: Source, segments: int) -> list[np.ndarray]:
    """`Source.validate` of the learners with the weights that are tested."""
    with ExitStack() as stack:
        for learner in learners:
            stack.enter_context(learner.tested_weights())
        return source.validate([learner.model for learner in learners], segments)
