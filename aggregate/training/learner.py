"""Training and testing: models, batches and optimizers, and nothing of stores, commands or files."""

import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from aggregate.data.features import Batch
from aggregate.training.recipes import Recipe, make_optimizer, parameter_groups, set_lr


class DivergedError(ArithmeticError):
    """A loss that is no number. `rows` are the store's rows of the batches since the last look."""

    def __init__(self, message: str, rows: np.ndarray):
        super().__init__(message)
        self.rows = rows


@dataclass(eq=False)
class Learner:
    """A model with its optimizer: `step` trains it on one batch. Several can be fed by the same batches.

    The randomness of a step (dropout) is a function of (seed, epoch, step), so a learner does the same alone, beside
    others, and after a resume.
    """

    name: str
    model: nn.Module
    recipe: Recipe
    steps_per_epoch: int
    seed: int
    device: torch.device
    groups: list[dict[str, Any]] | None = None  # of parameters; by default all of one learning rate
    optimizer: torch.optim.Optimizer = field(init=False)
    seconds: float = field(init=False, default=0.0)  # spent in `step`; on a GPU, for launching the work only

    def __post_init__(self) -> None:
        self.model.to(self.device)
        self.optimizer = make_optimizer(self.groups or parameter_groups(self.model, self.recipe), self.recipe)
        self._loss = torch.zeros((), device=self.device)
        self._since: list[np.ndarray] = []
        self._steps = 0
        # On a GPU to look at the loss is to wait for it.
        self._look_every = 1 if self.device.type == "cpu" else 50

    def step(self, batch: Batch, epoch: int, step: int) -> None:
        """Forward, backward and an update. Raises DivergedError for a loss that is no number."""
        started = time.perf_counter()
        torch.manual_seed(hash((self.seed, epoch, step)) & 0x7FFF_FFFF_FFFF_FFFF)
        set_lr(self.optimizer, self.recipe, epoch + step / self.steps_per_epoch)
        self.optimizer.zero_grad(set_to_none=True)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
            loss = F.cross_entropy(self.model(batch.x, batch.mask).float(), batch.labels)
        loss.backward()
        if self.recipe.clip:
            nn.utils.clip_grad_norm_(self.model.parameters(), self.recipe.clip)
        self.optimizer.step()
        self._loss += loss.detach()
        self._steps += 1
        self._since.append(batch.rows)
        if self._steps % self._look_every == 0:
            self._look(epoch)
        self.seconds += time.perf_counter() - started

    def mean_loss(self, epoch: int) -> float:
        """The mean loss since the last call."""
        self._look(epoch)
        mean = float(self._loss) / max(self._steps, 1)
        self._loss.zero_()
        self._steps = 0
        return mean

    def _look(self, epoch: int) -> None:
        if not math.isfinite(float(self._loss)):
            rows = np.concatenate(self._since)
            raise DivergedError(f"{self.name}: the loss is {float(self._loss)} in epoch {epoch}", rows)
        self._since.clear()

    def state_dict(self) -> dict[str, Any]:
        """Everything that resuming bit for bit needs."""
        return {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])


def train_epoch(
    learners: Sequence[Learner],
    batches: Iterable[Batch],
    epoch: int,
    on_step: Callable[[], object] = lambda: None,
    on_diverged: Callable[[Learner, DivergedError], object] | None = None,
) -> list[float]:
    """One pass over `batches`, each fed to all `learners`; their mean losses.

    A learner that diverges ends the pass with its DivergedError; with `on_diverged`, which is told of it, the others
    go on and its loss is NaN.
    """
    running = list(learners)

    def lost(learner: Learner, error: DivergedError) -> None:
        if on_diverged is None:
            raise error
        running.remove(learner)
        on_diverged(learner, error)

    for learner in learners:
        learner.model.train()
    for step, batch in enumerate(batches):
        for learner in list(running):
            try:
                learner.step(batch, epoch, step)
            except DivergedError as error:
                lost(learner, error)
        on_step()
    losses = [math.nan] * len(learners)
    for place, learner in enumerate(learners):
        try:
            losses[place] = learner.mean_loss(epoch) if learner in running else math.nan
        except DivergedError as error:
            lost(learner, error)
    return losses


@torch.inference_mode()
def predict(models: Sequence[nn.Module], batches: Iterable[Sequence[Batch]]) -> list[np.ndarray]:
    """Logits of each model, float32 [N, views, C], over batches that hold one `Batch` a view, each read once."""
    parts: list[list[np.ndarray]] = [[] for _ in models]
    for model in models:
        model.eval()
    for views in batches:
        for model, part in zip(models, parts, strict=True):
            logits = [_logits(model, batch) for batch in views]
            part.append(torch.stack(logits, dim=1).float().cpu().numpy())
    return [np.concatenate(part) for part in parts]


@torch.inference_mode()
def attention(model: nn.Module, batches: Iterable[Sequence[Batch]]) -> tuple[float, float] | None:
    """s, and the mean over videos of |s F_o| / |F| (both averaged over frames); None where a model has no s."""
    aggregator: Any = getattr(model, "aggregator", None)
    if not hasattr(aggregator, "attention_ratio"):
        return None
    model.eval()
    ratios = []
    for views in batches:
        batch = views[0]
        valid = slice(None) if batch.mask is None else batch.mask.any(1)
        mask = None if batch.mask is None else batch.mask[valid]
        ratios.append(aggregator.attention_ratio(batch.x[valid].float(), mask).cpu())
    return float(aggregator.scale), float(torch.cat(ratios).mean())


def _logits(model: nn.Module, batch: Batch) -> Tensor:
    with torch.autocast(batch.x.device.type, torch.bfloat16, enabled=batch.x.device.type == "cuda"):
        return model(batch.x, batch.mask)
