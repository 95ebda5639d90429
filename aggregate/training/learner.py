"""A model with its optimizer, trained one batch at a time.

Batches hold cached features or frames, and may be shared by several processes.
"""

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
from torch.amp.grad_scaler import GradScaler

from aggregate.data.features import Batch, to_device
from aggregate.inference import autocast
from aggregate.training.recipes import (
    Recipe,
    choose_precision,
    make_optimizer,
    parameter_groups,
    set_lr,
)


@dataclass(eq=False)
class Learner:
    """`step` trains the model on one batch; several learners can share the batches.

    The randomness of a step (dropout) depends only on (seed, epoch, step, rank). So a learner does
    the same alone, next to others, and after a resume. A model that takes frames holds its network
    as `net`, and state dicts are those of the network.
    """

    name: str
    model: nn.Module
    recipe: Recipe
    steps_per_epoch: int
    seed: int
    device: torch.device
    file: str = "best.pt"  # file name of the best state, in the folder of the run
    groups: list[dict[str, Any]] | None = None  # parameter groups; default: `parameter_groups`
    precision: str = "auto"  # auto: bf16 on a GPU, else fp32
    class_weights: Sequence[float] | None = None  # weights of the classes in the loss
    micro_batch: int = 1 << 30  # videos per forward pass; gradients of a batch are added up
    frozen: Sequence[nn.Module] = ()  # modules that stay in evaluation mode
    rank: int = 0
    world: int = 1  # number of processes that share every batch
    # Time spent in `step`; on a GPU only the time to launch the work.
    seconds: float = field(init=False, default=0.0)
    # Why training stopped: the loss or the scores are not finite. Empty otherwise.
    diverged: str = field(init=False, default="")
    # The rows of the batches between the last check of the loss and the one that failed.
    recent_rows: np.ndarray = field(init=False, repr=False)
    loss: float = field(init=False, default=math.nan)  # mean over the videos of the last epoch
    scores: np.ndarray = field(init=False, repr=False)  # logits [N, C] of the last validation
    best_error: float = field(init=False, default=math.inf)
    best_epoch: int = field(init=False, default=-1)
    best_state: dict[str, Tensor] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        self.model.to(self.device)
        groups = self.groups or parameter_groups(self.model, self.recipe)
        self.optimizer = make_optimizer(groups, self.recipe)
        self.precision = choose_precision(self.precision, self.device)
        self.scaler = GradScaler(self.device.type, enabled=self.precision == "fp16")
        self.parallel: Any = self.model
        if self.world > 1:
            ids = [self.device] if self.device.type == "cuda" else None
            self.parallel = nn.parallel.DistributedDataParallel(self.model, device_ids=ids)
        weights = None
        if self.class_weights is not None:
            weights = torch.tensor(self.class_weights, device=self.device)
        self._criterion = nn.CrossEntropyLoss(
            weights, reduction="sum", label_smoothing=self.recipe.label_smoothing
        )
        self._loss = torch.zeros((), device=self.device)
        self._videos = self._steps = 0  # counts of this epoch
        self.recent_rows = np.empty(0, int)
        self._unchecked_rows: list[np.ndarray] = []
        # On a GPU, reading the loss waits for all queued work.
        self._steps_per_check = 1 if self.device.type == "cpu" else 50

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
        key: tuple[int, ...] = (self.seed, epoch, step)
        if self.rank:
            key += (self.rank,)
        torch.manual_seed(hash(key) & 0x7FFF_FFFF_FFFF_FFFF)
        set_lr(self.optimizer, self.recipe, epoch + step / self.steps_per_epoch)
        self.optimizer.zero_grad(set_to_none=True)
        count = len(batch.labels)
        whole = int(total(count, self.world, self.device))
        if not whole:
            return
        if not count:
            self._backward_nothing(batch)
        for start in range(0, count, self.micro_batch):
            part = slice(start, start + self.micro_batch)
            mask = None if batch.mask is None else batch.mask[part]
            # With the last part, gradients are averaged over processes.
            last = start + self.micro_batch >= count
            sync = nullcontext() if last or self.world == 1 else self.parallel.no_sync()
            with sync:
                with autocast(self.device, self.precision):
                    logits = self.parallel(batch.x[part], mask)
                labels = to_device(batch.labels[part], self.device)
                loss = self._criterion(logits.float(), labels)
                # DDP averages over processes. This factor makes that the mean over the whole batch,
                # however its videos are divided among processes. Under autocast, the backward pass
                # would also cast products that the forward pass made in fp32.
                self.scaler.scale(loss * (self.world / whole)).backward()
            self._loss += loss.detach()
        if self.recipe.clip:
            self.scaler.unscale_(self.optimizer)
            clip_gradients(self.model.parameters(), self.recipe.clip)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self._videos += count
        self._steps += 1
        self._unchecked_rows.append(batch.rows)
        if self._steps % self._steps_per_check == 0:
            self._check_loss(epoch)
        self.seconds += time.perf_counter() - started

    def _backward_nothing(self, batch: Batch) -> None:
        """Gradients of 0, if only other processes have videos: all processes join the average."""
        with autocast(self.device, self.precision):
            blank = batch.x.new_zeros((1, *batch.x.shape[1:]))
            logits = self.parallel(blank, torch.ones((1, batch.x.shape[1]), dtype=torch.bool))
        self.scaler.scale(0.0 * logits.sum()).backward()

    def end_epoch(self, epoch: int) -> None:
        """Compute `loss`, the mean over the videos of all processes."""
        self._check_loss(epoch)
        summed = total(float(self._loss), self.world, self.device)
        videos = total(float(self._videos), self.world, self.device)
        self._loss.zero_()
        self._videos = self._steps = 0
        self.loss = summed / max(videos, 1)

    def _check_loss(self, epoch: int) -> None:
        loss = float(self._loss)
        if not math.isfinite(loss):
            self.diverged = f"the loss is {loss} in epoch {epoch}"
            self.recent_rows = np.concatenate(self._unchecked_rows)
        self._unchecked_rows.clear()

    # -- states ------------------------------------------------------------------------------------

    def tested_state(self) -> dict[str, Tensor]:
        return {name: value.detach().cpu().clone() for name, value in self.net.state_dict().items()}

    def keep_best(self, error: float, epoch: int) -> None:
        """Keep the current state if this epoch's validation error is the smallest so far."""
        if error < self.best_error:
            self.best_error, self.best_epoch, self.best_state = error, epoch, self.tested_state()

    def load_best(self) -> None:
        self.net.load_state_dict(self.best_state)

    def state_dict(self) -> dict[str, Any]:
        """Everything that an exact resume needs, except the best state, which has its own file."""
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
        self.best_error, self.best_epoch = state["best_error"], state["best_epoch"]
        self.best_state = best_state


def clip_gradients(parameters: Iterable[nn.Parameter], largest_norm: float) -> None:
    """Scale all gradients so that their common norm is at most `largest_norm`.

    As `torch.nn.utils.clip_grad_norm_`, without its pass over gradients that are short enough. On a
    GPU that pass is always made, since comparing the norm would wait for it.
    """
    parameters = list(parameters)
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    norm = nn.utils.get_total_norm(gradients)
    if not norm.is_cpu or norm > largest_norm:
        nn.utils.clip_grads_with_norm_(parameters, largest_norm, norm)


def total(value: float, world: int, device: torch.device) -> float:
    """The sum over processes."""
    if world == 1:
        return value
    summed = torch.tensor(float(value), dtype=torch.float64, device=device)
    dist.all_reduce(summed)
    return float(summed)
