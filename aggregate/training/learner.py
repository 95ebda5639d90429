"""A model with its optimizer, trained one batch at a time: cached features or frames, one process
or several."""

import math
import time
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from aggregate.data.features import Batch, to_device
from aggregate.training.recipes import Recipe, make_optimizer, parameter_groups, set_lr


@dataclass(eq=False)
class Learner:
    """`step` trains the model on one batch; several learners can be fed by the same batches.

    The randomness of a step (dropout) is a function of (seed, epoch, step, rank), so a learner does
    the same alone, beside others, and after a resume. `best_state` is the network as it was when
    `keep_best` was told the smallest error. A model that sees frames holds its network as `net`;
    the states are the network's.
    """

    name: str
    model: nn.Module
    recipe: Recipe
    steps_per_epoch: int
    seed: int
    device: torch.device
    file: str = "best.pt"  # where its best state goes, in the folder of the run
    groups: list[dict[str, Any]] | None = None  # of parameters; by default all of one learning rate
    precision: str = "auto"  # bf16 on a GPU, else fp32
    class_weights: Sequence[float] | None = None  # in the loss
    micro_batch: int = (
        1 << 30
    )  # videos that go through the network at once; gradients of a batch are added up
    frozen: Sequence[nn.Module] = ()  # stay in evaluation mode
    rank: int = 0
    world: int = 1  # processes that share every batch
    seconds: float = field(
        init=False, default=0.0
    )  # spent in `step`; on a GPU, for launching the work only
    lost: str = field(
        init=False, default=""
    )  # why it is trained no further: its loss is not a number
    loss: float = field(init=False, default=math.nan)  # of the last epoch: the mean over videos
    scores: np.ndarray = field(init=False, repr=False)  # then of the validation: logits [N, C]
    suspects: np.ndarray = field(
        init=False, repr=False
    )  # then the rows of the batches since the last look
    best_error: float = field(init=False, default=math.inf)
    best_epoch: int = field(init=False, default=-1)
    best_state: dict[str, Tensor] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        self.model.to(self.device)
        self.optimizer = make_optimizer(
            self.groups or parameter_groups(self.model, self.recipe), self.recipe
        )
        if self.precision == "auto":
            self.precision = "bf16" if self.device.type == "cuda" else "fp32"
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.precision == "fp16")  # type: ignore[attr-defined]
        self.parallel = self.model
        if self.world > 1:
            ids = [self.device] if self.device.type == "cuda" else None
            self.parallel = nn.parallel.DistributedDataParallel(self.model, device_ids=ids)
        weights = (
            None
            if self.class_weights is None
            else torch.tensor(self.class_weights, device=self.device)
        )
        self._criterion = nn.CrossEntropyLoss(
            weights, reduction="sum", label_smoothing=self.recipe.label_smoothing
        )
        self._loss = torch.zeros((), device=self.device)
        self._seen = 0
        self.suspects, self._since = np.empty(0, int), list[np.ndarray]()
        self._steps = 0
        # On a GPU to look at the loss is to wait for it.
        self._look_every = 1 if self.device.type == "cpu" else 50

    @property
    def net(self) -> nn.Module:
        return getattr(self.model, "net", self.model)

    def train_mode(self) -> None:
        self.parallel.train()
        for module in self.frozen:
            module.eval()

    def step(self, batch: Batch, epoch: int, step: int) -> None:
        """Forward, backward and an update."""
        started = time.perf_counter()
        words = (self.seed, epoch, step, self.rank) if self.rank else (self.seed, epoch, step)
        torch.manual_seed(hash(words) & 0x7FFF_FFFF_FFFF_FFFF)
        set_lr(self.optimizer, self.recipe, epoch + step / self.steps_per_epoch)
        self.optimizer.zero_grad(set_to_none=True)
        count = len(batch.labels)
        whole = int(total(count, self.world, self.device))
        if not whole:
            return
        if (
            not count
        ):  # other processes have videos, and gradients are averaged with ours: those of nothing
            with autocast(self.device, self.precision):
                blank = batch.x.new_zeros((1, *batch.x.shape[1:]))
                nothing = self.parallel(blank, torch.ones((1, batch.x.shape[1]), dtype=torch.bool))
                self.scaler.scale(0.0 * nothing.sum()).backward()
        for start in range(0, count, self.micro_batch):
            part = slice(start, start + self.micro_batch)
            mask = None if batch.mask is None else batch.mask[part]
            last = (
                start + self.micro_batch >= count
            )  # with it gradients are averaged over processes
            together: Any = nullcontext() if last or self.world == 1 else self.parallel.no_sync()  # type: ignore
            with together, autocast(self.device, self.precision):
                logits = self.parallel(batch.x[part], mask)
                labels = to_device(batch.labels[part], self.device)
                loss = self._criterion(logits.float(), labels)
                # DDP averages over processes; this makes it the mean over the whole batch, however
                # it is spread.
                self.scaler.scale(loss * (self.world / whole)).backward()
            self._loss += loss.detach()
        if self.recipe.clip:
            self.scaler.unscale_(self.optimizer)
            clip_gradients(self.model.parameters(), self.recipe.clip)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self._seen += count
        self._steps += 1
        self._since.append(batch.rows)
        if self._steps % self._look_every == 0:
            self._look(epoch)
        self.seconds += time.perf_counter() - started

    def end_epoch(self, epoch: int) -> None:
        """Know the `loss`, over all processes."""
        self._look(epoch)
        summed, seen = (
            total(float(value), self.world, self.device) for value in (self._loss, self._seen)
        )
        self._loss.zero_()
        self._seen = self._steps = 0
        self.loss = summed / max(seen, 1)

    def _look(self, epoch: int) -> None:
        if not math.isfinite(float(self._loss)):
            self.lost, self.suspects = (
                f"the loss is {float(self._loss)} in epoch {epoch}",
                np.concatenate(self._since),
            )
        self._since.clear()

    # -- states --------------------------------------------------------------------------------------------------------

    def tested_state(self) -> dict[str, Tensor]:
        return {name: value.detach().cpu().clone() for name, value in self.net.state_dict().items()}

    def keep_best(self, error: float, epoch: int) -> None:
        """Keep the state where this epoch's validation error is the smallest so far."""
        if error < self.best_error:
            self.best_error, self.best_epoch, self.best_state = error, epoch, self.tested_state()

    def load_best(self) -> None:
        self.net.load_state_dict(self.best_state)

    def state_dict(self) -> dict[str, Any]:
        """Everything that resuming bit for bit needs, but for the best state, which has a file of
        its own."""
        return {
            "learner": {"model": self.net.state_dict(), "optimizer": self.optimizer.state_dict()},
            "scaler": self.scaler.state_dict(),
            "best_error": self.best_error,
            "best_epoch": self.best_epoch,
        }

    def load_state_dict(self, state: dict[str, Any], best_state: dict[str, Tensor]) -> None:
        self.net.load_state_dict(state["learner"]["model"])
        self.optimizer.load_state_dict(state["learner"]["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        self.best_error, self.best_epoch, self.best_state = (
            state["best_error"],
            state["best_epoch"],
            best_state,
        )


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """Half precision where `precision` is one; bf16 on a GPU for "auto"."""
    if precision == "auto":
        precision = "bf16" if device.type == "cuda" else "fp32"
    half = torch.float16 if precision == "fp16" else torch.bfloat16
    return torch.autocast(device.type, half, enabled=precision != "fp32")


def clip_gradients(parameters: Iterable[nn.Parameter], largest_norm: float) -> None:
    """Scale all gradients so that their common norm is at most `largest_norm`.

    As `torch.nn.utils.clip_grad_norm_`, without its pass over gradients that are short enough. A
    GPU makes that pass: to look at the norm is to wait for it.
    """
    parameters = list(parameters)
    norm = nn.utils.get_total_norm([one.grad for one in parameters if one.grad is not None])
    if not norm.is_cpu or norm > largest_norm:
        nn.utils.clip_grads_with_norm_(parameters, largest_norm, norm)


def total(value: float, world: int, device: torch.device) -> float:
    """The sum over processes."""
    if world == 1:
        return value
    summed = torch.tensor(float(value), dtype=torch.float64, device=device)
    dist.all_reduce(summed)
    return float(summed)
