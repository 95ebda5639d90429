"""Recipes: optimizer, learning rate over epochs, which parameters decay, and how heads of attention
begin."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from extract import InputError
from extract.lazy_dynamo import defer_dynamo_import

if TYPE_CHECKING:
    import torch
    from torch import nn


@dataclass(frozen=True)
class Recipe:
    """How a model is trained. `lr` falls by 10 at each of `milestones` (0-based epochs), or along a
    cosine to 0."""

    optimizer: Literal["sgd", "adamw"]
    lr: float
    weight_decay: float
    epochs: int
    batch_size: int
    dropout: float
    milestones: tuple[int, ...] = ()  # empty: by `decay`
    decay: Literal["cosine", "linear"] = "cosine"  # to 0 at the end
    warmup: float = 0.0  # epochs of linear warm-up
    clip: float = 0.0  # largest norm of the gradient; 0: not clipped
    standardize: bool = False  # batch norm without parameters before the classifier
    label_smoothing: float = 0.0  # of the target, spread over all classes (Szegedy et al. 2016)
    balance: Literal["none", "sampler", "loss"] = "none"
    precision: Literal["auto", "fp32", "bf16"] = (
        "auto"  # of matrix products; auto: bf16 on a GPU, else fp32
    )

    def __post_init__(self) -> None:
        for name in ("lr", "epochs", "batch_size"):
            if getattr(self, name) <= 0:
                raise InputError(
                    f"--{name.replace('_', '-')} is {getattr(self, name)}; it must be above 0"
                )
        if self.weight_decay < 0:
            raise InputError(f"--weight-decay is {self.weight_decay}; it must not be below 0")
        if self.warmup < 0:
            raise InputError(f"--warmup is {self.warmup:g}; it is a number of epochs, from 0 on")
        if not 0 <= self.label_smoothing < 1:
            raise InputError(
                f"--label-smoothing is {self.label_smoothing:g}; it is a fraction, from 0 to below 1"
            )

    def __str__(self) -> str:
        falls = (
            f"/10 at epochs {', '.join(map(str, self.milestones))}"
            if self.milestones
            else self.decay
        )
        warm = f", {self.warmup:g} epochs of warm-up" if self.warmup else ""
        return (
            f"{self.optimizer}, lr {self.lr:g} {falls}{warm}, weight decay {self.weight_decay:g}, "
            f"{self.epochs} epochs of batches of {self.batch_size}, dropout {self.dropout:g}"
            f"{', features standardized' if self.standardize else ''}"
            f"{f', label smoothing {self.label_smoothing:g}' if self.label_smoothing else ''}"
            f"{f', classes balanced by the {self.balance}' if self.balance != 'none' else ''}"
            f"{f', {self.precision} products' if self.precision != 'auto' else ''}"
        )

    def factor(self, epoch: float) -> float:
        """What `lr` is multiplied by at `epoch` (with its fraction)."""
        if epoch < self.warmup:
            return (epoch + 1e-3) / self.warmup
        if self.milestones:
            return 0.1 ** sum(epoch >= milestone for milestone in self.milestones)
        done = (epoch - self.warmup) / max(self.epochs - self.warmup, 1e-9)
        return 1 - done if self.decay == "linear" else 0.5 * (1 + math.cos(math.pi * done))


# iQIYI's schedule (section 2 of the paper) with tsn-pytorch's values for what it leaves out (FACTS
# 3).
_PAPER = Recipe(
    optimizer="sgd",
    lr=1e-3,
    weight_decay=5e-4,
    epochs=40,
    batch_size=256,
    dropout=0.5,
    milestones=(20, 30),
)
_PAPER_NON_LOCAL = replace(_PAPER, epochs=8, milestones=(4, 6))
# 20 epochs (section 2 of the paper) with the released code's values.
_PAPER_STNET = Recipe(
    optimizer="sgd",
    lr=1e-2,
    weight_decay=1e-4,
    epochs=20,
    batch_size=256,
    dropout=0.5,
    milestones=(7, 13),
)
# For a frozen backbone; chosen on real features: EVIDENCE.md.
_CACHED = Recipe(
    optimizer="sgd",
    lr=1e-2,
    weight_decay=5e-4,
    epochs=30,
    batch_size=256,
    dropout=0.5,
    warmup=1.0,
    clip=5.0,
    standardize=True,
)
_LARGE_BATCH = 128
_BETA = 0.999
# What training on cached features needs of NL and HG-NL, so that attention is used after few steps.
# Everything else is the paper's: HG-NL has eq. 7's ReLU, NL eq. 3's softmax.
_CACHED_NON_LOCAL = {"normalize": True, "start": "average", "scale_init": 1.0}


def head_options(
    name: Literal["cached", "paper"], aggregator: str, asked: dict[str, Any]
) -> dict[str, Any]:
    """The options of an aggregator under the recipe `name`: those `asked` for, and the recipe's for
    the others."""
    own: dict[str, Any] = {}
    if name == "cached" and aggregator in ("nl", "hgnl"):
        own |= _CACHED_NON_LOCAL
        if aggregator == "hgnl" and asked.get("attention", "relu") == "relu":
            own["norm"] = "n_over_train"  # the un-normalized map of 25 frames is 8 times that of 3
    return own | asked


def recipe(
    name: Literal["cached", "paper"], aggregator: str, *, videos: int, **changes: Any
) -> Recipe:
    """The recipe `name` for an aggregator, with what is not None in `changes` instead of its
    own.

    A change of `epochs` moves the milestones along. "cached" takes smaller batches where there are
    few `videos`, so that an epoch has about 16 steps; below 4,096 videos 256 would leave too few.
    """
    cached = dict.fromkeys(
        ("attentive", "attentive-time"), replace(_CACHED, lr=3e-2)
    )  # 6 to 7 points better inside training parts (LOG.md)
    paper = {"nl": _PAPER_NON_LOCAL, "hgnl": _PAPER_NON_LOCAL, "stnet": _PAPER_STNET}
    chosen = cached.get(aggregator, _CACHED) if name == "cached" else paper.get(aggregator, _PAPER)
    if name == "cached":
        power_of_two = 1 << max(videos // 16, 1).bit_length() - 1
        chosen = replace(chosen, batch_size=min(max(power_of_two, 16), chosen.batch_size))
    changes = {key: value for key, value in changes.items() if value is not None}
    if "decay" in changes:  # instead of steps
        changes["milestones"] = ()
    elif "epochs" in changes and chosen.milestones:
        moved = (round(epoch * changes["epochs"] / chosen.epochs) for epoch in chosen.milestones)
        changes["milestones"] = tuple(epoch for epoch in moved if epoch)
    return replace(chosen, **changes)


def choose_precision(name: str, device: "torch.device", batch_size: int) -> str:
    """The precision of products that "auto" stands for, a function of the device and of nothing
    that changes with load.

    bf16 on a GPU, and for large batches on a CPU that multiplies bf16: small ones spend more time
    on casting weights.
    """
    import torch

    if name != "auto":
        return name
    if device.type == "cpu":
        fast = batch_size >= _LARGE_BATCH and torch.cpu._is_avx512_bf16_supported()
        return "bf16" if fast else "fp32"
    return "bf16" if device.type == "cuda" else "fp32"


def class_weights(counts: Sequence[int], balance: str) -> list[float] | None:
    """Weights of the classes in the loss, of mean 1 over those that have videos; None if they are
    not balanced so.

    The inverse of the effective number (1 - b^n) / (1 - b) of n videos, b = 0.999 (Cui et al. 2019,
    eq. 2).
    """
    if balance != "loss":
        return None
    inverse = [(1 - _BETA) / (1 - _BETA**count) if count else 0.0 for count in counts]
    present = sum(count > 0 for count in counts)
    return [value * present / sum(inverse) for value in inverse]


def make_optimizer(groups: list[dict[str, Any]], chosen: Recipe) -> "torch.optim.Optimizer":
    """The optimizer over parameter groups of `parameter_groups`.

    Fused: one pass over weights, gradients and momentum, which on a CPU is most of a small batch's
    step.
    """
    import torch

    defer_dynamo_import()
    fused = groups[0]["params"][0].device.type != "meta"  # which has no such kernel
    if chosen.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=chosen.lr, momentum=0.9, fused=fused)
    return torch.optim.AdamW(groups, lr=chosen.lr, fused=fused)


def parameter_groups(
    module: "nn.Module", chosen: Recipe, *, lr_scale: float = 1.0
) -> list[dict[str, Any]]:
    """Matrices and kernels decay; biases, norms and the scale s of NL and HG-NL (FACTS 1, no. 3) do
    not.

    `lr_scale` is kept in each group: `set_lr` multiplies by it (layer-wise learning rates).
    """
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    groups = [
        {
            "params": [p for p in trained if p.ndim >= 2],
            "weight_decay": chosen.weight_decay,
            "lr_scale": lr_scale,
        },
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0, "lr_scale": lr_scale},
    ]
    return [group for group in groups if group["params"]]


def set_lr(optimizer: "torch.optim.Optimizer", chosen: Recipe, epoch: float) -> None:
    """Set every group's learning rate for `epoch` (with its fraction): a function of it, so that
    resuming is exact."""
    for group in optimizer.param_groups:
        group["lr"] = chosen.lr * chosen.factor(epoch) * group["lr_scale"]
