"""Recipes: optimizer, learning rate schedule, weight decay, and the defaults of attention heads."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any, Literal

from extract import InputError
from extract.cli import check_ranges
from extract.lazy_dynamo import defer_dynamo_import

if TYPE_CHECKING:
    import torch
    from torch import nn


_UNUSED = (0, False, (), "none", "auto")  # values that have no effect, in the text of a recipe


@dataclass(frozen=True)
class Recipe:
    """How a model is trained.

    `lr` is divided by 10 at each of `milestones` (0-based epochs), or falls to 0 along `decay`.
    """

    optimizer: Literal["sgd", "adamw"]
    lr: float
    weight_decay: float
    epochs: int
    batch_size: int
    dropout: float
    milestones: tuple[int, ...] = ()  # if empty, `decay` applies
    decay: Literal["cosine", "linear"] = "cosine"
    warmup: float = 0.0  # epochs of linear warm-up
    clip: float = 0.0  # largest norm of the gradient; 0 for no clipping
    standardize: bool = False  # batch norm without parameters before the classifier
    label_smoothing: float = 0.0  # part of the target (Szegedy et al. 2016, section 7)
    balance: Literal["none", "sampler", "loss"] = "none"
    # Precision of matrix products; auto: bf16 on a GPU, else fp32.
    precision: Literal["auto", "fp32", "bf16"] = "auto"

    def __post_init__(self) -> None:
        check_ranges(self)
        if self.label_smoothing == 1:
            raise InputError("--label-smoothing 1: expected less than 1, or labels have no effect")

    def __str__(self) -> str:
        """`optimizer sgd, lr 0.01, weight decay 0.0005, ...`: all values that have an effect."""
        values = {field.name.replace("_", " "): getattr(self, field.name) for field in fields(self)}
        if self.milestones:
            del values["decay"]
        return ", ".join(
            f"{name} {value}" for name, value in values.items() if value not in _UNUSED
        )

    def factor(self, epoch: float) -> float:
        """The factor of `lr` at `epoch`, which may be fractional."""
        if epoch < self.warmup:
            return (epoch + 1e-3) / self.warmup
        if self.milestones:
            return 0.1 ** sum(epoch >= milestone for milestone in self.milestones)
        done = (epoch - self.warmup) / max(self.epochs - self.warmup, 1e-9)
        return 1 - done if self.decay == "linear" else 0.5 * (1 + math.cos(math.pi * done))


# iQIYI's schedule (section 2 of the paper), with tsn-pytorch's values for those it does not give.
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
# 20 epochs (section 2 of the paper), with the values of the released code.
_PAPER_STNET = Recipe(
    optimizer="sgd",
    lr=1e-2,
    weight_decay=1e-4,
    epochs=20,
    batch_size=256,
    dropout=0.5,
    milestones=(7, 13),
)
# For a frozen backbone, chosen on real features (EVIDENCE.md).
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
_PAPER_BY_HEAD = {"nl": _PAPER_NON_LOCAL, "hgnl": _PAPER_NON_LOCAL, "stnet": _PAPER_STNET}
# On training parts alone, a larger learning rate was 6 to 7 points better (LOG.md).
_CACHED_BY_HEAD = dict.fromkeys(("attentive", "attentive-time"), replace(_CACHED, lr=3e-2))
_LARGE_BATCH = 128
_BETA = 0.999
# Without these options, so few steps leave the attention of NL and HG-NL on cached features unused.
# All other options are the paper's: HG-NL has the ReLU of eq. 7, NL the softmax of eq. 3.
_CACHED_NON_LOCAL = {"normalize": True, "start": "average", "scale_init": 1.0}


def head_options(
    name: Literal["cached", "paper"], aggregator: str, changes: dict[str, Any]
) -> dict[str, Any]:
    """The options of an aggregator under the recipe `name`: the recipe's, then `changes`."""
    defaults: dict[str, Any] = {}
    if name == "cached" and aggregator in ("nl", "hgnl"):
        defaults |= _CACHED_NON_LOCAL
        if aggregator == "hgnl" and changes.get("attention", "relu") == "relu":
            # The map of 25 frames, not divided by their number, is 8 times that of 3.
            defaults["norm"] = "n_over_train"
    return defaults | changes


def recipe(
    name: Literal["cached", "paper"], aggregator: str, *, videos: int, **changes: Any
) -> Recipe:
    """The recipe `name` for an aggregator, changed by those `changes` that are not None.

    A change of `epochs` moves the milestones in proportion. With fewer than 4,096 `videos`,
    "cached" takes batches smaller than 256, so that an epoch still has about 16 steps.
    """
    if name == "cached":
        chosen = _CACHED_BY_HEAD.get(aggregator, _CACHED)
        power_of_two = 1 << max(videos // 16, 1).bit_length() - 1
        chosen = replace(chosen, batch_size=min(max(power_of_two, 16), chosen.batch_size))
    else:
        chosen = _PAPER_BY_HEAD.get(aggregator, _PAPER)
    changes = {key: value for key, value in changes.items() if value is not None}
    if "decay" in changes:  # replaces the milestones
        changes["milestones"] = ()
    elif "epochs" in changes and chosen.milestones:
        moved = (round(epoch * changes["epochs"] / chosen.epochs) for epoch in chosen.milestones)
        changes["milestones"] = tuple(epoch for epoch in moved if epoch)
    return replace(chosen, **changes)


def choose_precision(name: str, device: "torch.device", batch_size: int = 1) -> str:
    """The precision of matrix products; "auto" depends on the device only, not on its load.

    auto is bf16 on a GPU, and for large batches on a CPU with bf16 instructions: small batches
    would spend more time on casting weights than they save.
    """
    import torch

    if name != "auto":
        return name
    fast = device.type == "cuda" or (
        device.type == "cpu"
        and batch_size >= _LARGE_BATCH
        and torch.cpu._is_avx512_bf16_supported()
    )
    return "bf16" if fast else "fp32"


def class_weights(counts: Sequence[int], balance: str) -> list[float] | None:
    """Weights of the classes in the loss; their mean over classes with videos is 1. None unless
    `balance` is "loss".

    The inverse of the effective number (1 - b^n) / (1 - b) of n videos, b = 0.999 (Cui et al. 2019,
    eq. 2).
    """
    if balance != "loss":
        return None
    inverse = [(1 - _BETA) / (1 - _BETA**count) if count else 0.0 for count in counts]
    present = sum(count > 0 for count in counts)
    return [value * present / sum(inverse) for value in inverse]


def make_optimizer(groups: list[dict[str, Any]], chosen: Recipe) -> "torch.optim.Optimizer":
    """The optimizer over the groups of `parameter_groups`.

    It is fused: one pass over weights, gradients and momentum. On a CPU the optimizer takes most of
    the step of a small batch.
    """
    import torch

    defer_dynamo_import()
    fused = groups[0]["params"][0].device.type != "meta"  # meta has no fused kernel
    if chosen.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=chosen.lr, momentum=0.9, fused=fused)
    return torch.optim.AdamW(groups, lr=chosen.lr, fused=fused)


def parameter_groups(
    module: "nn.Module", chosen: Recipe, *, lr_scale: float = 1.0
) -> list[dict[str, Any]]:
    """Groups with and without weight decay: matrices and kernels decay; biases, norms and the scale
    s of NL and HG-NL do not.

    Each group keeps `lr_scale`, by which `set_lr` multiplies (layer-wise learning rates).
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
    """Set each group's learning rate for `epoch`, which may be fractional.

    It depends only on the epoch, so that resuming is exact.
    """
    for group in optimizer.param_groups:
        group["lr"] = chosen.lr * chosen.factor(epoch) * group["lr_scale"]
