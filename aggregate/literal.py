"""Eq. 3-8 as they are written, and a counter of their multiplications and additions.

Nothing here runs in training: `aggregate.complexity` counts these forms for the paper's Table 2,
and the tests hold the pooled forms of aggregate/nl.py and aggregate/hgnl.py to them.
"""

from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import conv1d
from torch.utils._python_dispatch import TorchDispatchMode

from aggregate.hgnl import GroupedLinear, HGNonLocal


def literal_form(
    module: HGNonLocal, F: Float[Tensor, "batch dim time"]
) -> Float[Tensor, "batch dim"]:
    """HG-NL by eq. 7, 8, 5, 6, and NL, of one group and with softmax, by eq. 3-6, with the weights
    of `module`."""
    n = F.shape[-1]
    Q, K, V = _products(module, F)
    scores = gmm(Q, K, groups=module.g2, transpose=True) * module.score_factor
    A = (
        scores.relu() if module.attention == "relu" else scores.softmax(2)
    )  # eq. 7 or 3: [batch, g2, time, time]
    if module.norm != "none":
        A = A * {"n": 1 / n, "n_over_train": module.train_frames / n}[module.norm]
    F_o = gmm(V, A, groups=module.g2).flatten(1, 2)  # eq. 8 or 4
    F_weight = module.scale * F_o + F  # eq. 5
    return F_weight.mean(-1)  # eq. 6


def _products(
    module: HGNonLocal, F: Float[Tensor, "batch dim time"]
) -> tuple[Tensor, Tensor, Tensor]:
    """Q, K [batch, m1, time] and V [batch, dim, time]."""
    asked = (
        (F - F.mean(1, keepdim=True)) / (F.var(1, keepdim=True, correction=0) + 1e-5).sqrt()
        if module.normalize
        else F
    )
    return convolve(asked, module.query), convolve(asked, module.key), convolve(F, module.value)


def convolve(
    F: Float[Tensor, "batch dim time"], layer: GroupedLinear
) -> Float[Tensor, "batch out time"]:
    """W F of a 1x1 convolution, grouped where `layer` is; shared weights are repeated for each
    group."""
    repeats = layer.groups if layer.shared else 1
    return conv1d(
        F,
        layer.weight.repeat(repeats, 1)[..., None],
        layer.bias.repeat(repeats),
        groups=layer.groups,
    )


def gmm(
    left: Tensor, right: Tensor, *, groups: int, transpose: bool = False
) -> Float[Tensor, "batch groups _ time"]:
    """Grouped matrix multiplication: the channels of a group of `left` (transposed) times the same
    group of `right`."""
    left = left.unflatten(1, (groups, -1))
    right = right if right.ndim == 4 else right.unflatten(1, (groups, -1))
    return torch.matmul(left.transpose(-1, -2) if transpose else left, right)


@dataclass(frozen=True)
class Count:
    """Multiplications and additions, counted one by one as the paper does (a product of length k is
    2k - 1 of them)."""

    products: tuple[
        int, ...
    ]  # one number for each convolution or matrix product, in the order they ran
    rest: int  # element-wise products, sums and means; softmax and ReLU are not counted, as in the paper


def count(run: Callable[[], Any]) -> Count:
    """Count what `run` computes, from the operations that torch really dispatches (meta tensors
    will do)."""
    with torch.no_grad(), _Counter() as counter:
        run()
    return Count(tuple(counter.products), counter.rest)


class _Counter(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.products: list[int] = []
        self.rest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        match func.overloadpacket.__name__:
            case "convolution":
                self._product(out, length=prod(args[1].shape[1:]), added=args[2] is not None)
            case "mm" | "bmm":
                self._product(out, length=args[0].shape[-1], added=False)
            case "addmm" | "baddbmm":
                self._product(out, length=args[1].shape[-1], added=True)
            case "mul" | "add" | "div":
                self.rest += out.numel()
            case "sum" | "mean":
                self.rest += args[0].numel()
        return out

    def _product(self, out: Tensor, *, length: int, added: bool) -> None:
        self.products.append(out.numel() * (2 * length - 1 + added))
