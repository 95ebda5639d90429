"""Parameters of a module, and its multiplications and additions (MAdds): counted, or by the paper's
formulas."""

from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from aggregate.hgnl import HGNonLocal


def count_parameters(module: nn.Module, *, trained: bool = False) -> int:
    """Numbers in all parameters, or in those that are `trained`."""
    return sum(each.numel() for each in module.parameters() if each.requires_grad or not trained)


@dataclass(frozen=True)
class Count:
    """Multiplications and additions, each counted as one, as in the paper.

    A product of length k has 2k - 1 of them. Softmax and ReLU are not counted.
    """

    products: tuple[int, ...]  # of each convolution or matrix product, in execution order
    rest: int  # of element-wise products, sums and means

    @property
    def total(self) -> int:
        return sum(self.products) + self.rest


def count(run: Callable[[], Any]) -> Count:
    """Count the operations that torch dispatches in `run`; meta tensors suffice."""
    with torch.no_grad(), _Counter() as counter:
        run()
    return Count(tuple(counter.products), counter.rest)


def count_aggregator(module: nn.Module, *, dim: int, frames: int) -> Count:
    """Count an aggregator's evaluation of one video; `module` is on the meta device."""
    x = torch.empty(1, frames, dim, device="meta")
    return count(lambda: module.eval()(x))


class _Counter(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.products: list[int] = []
        self.rest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        match func.overloadpacket.__name__:
            case "convolution":
                self._add_product(out, length=prod(args[1].shape[1:]), bias=args[2] is not None)
            case "mm" | "bmm":
                self._add_product(out, length=args[0].shape[-1], bias=False)
            case "addmm" | "baddbmm":
                self._add_product(out, length=args[1].shape[-1], bias=True)
            case "mul" | "add" | "div":
                self.rest += out.numel()
            case "sum" | "mean":
                self.rest += args[0].numel()
        return out

    def _add_product(self, out: Tensor, *, length: int, bias: bool) -> None:
        self.products.append(out.numel() * (2 * length - 1 + bias))


def madds_by_formula(module: HGNonLocal, *, frames: int) -> tuple[int, ...]:
    """Table 2's rows for n = `frames`; biases are included."""
    m, n, g1, g2 = module.out_dim, frames, module.g1, module.g2
    m1 = len(module.key.bias) * (g1 if module.key.shared else 1)
    return (
        2 * m * m1 * n // g1,  # W_q F
        2 * m * m1 * n // g1,  # W_k F
        2 * m * m * n // g2,  # W_v F
        n * n * (2 * m1 - g2),  # Q^T K or Gmm(Q, K)
        m * n * (2 * n - 1),  # V A or Gmm(V, A)
    )
