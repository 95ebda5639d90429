"""Eq. 3-8 of the paper as they are written: the reference for the pooled forms in aggregate/nl.py
and aggregate/hgnl.py."""

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import conv1d

from aggregate.hgnl import GroupedLinear, HGNonLocal


def literal_form(
    module: HGNonLocal, F: Float[Tensor, "batch dim time"]
) -> Float[Tensor, "batch dim"]:
    """HG-NL by eq. 7, 8, 5, 6, or NL (one group, softmax) by eq. 3-6, with the weights of
    `module`."""
    n = F.shape[-1]
    Q, K, V = products(module, F)
    scores = gmm(Q, K, groups=module.g2, transpose=True) * module.score_factor
    # eq. 7 or 3: [batch, g2, time, time]
    A = scores.relu() if module.attention == "relu" else scores.softmax(2)
    if module.norm != "none":
        A = A * {"n": 1 / n, "n_over_train": module.train_frames / n}[module.norm]
    F_o = gmm(V, A, groups=module.g2).flatten(1, 2)  # eq. 8 or 4
    F_weight = module.scale * F_o + F  # eq. 5
    return F_weight.mean(-1)  # eq. 6


def products(
    module: HGNonLocal, F: Float[Tensor, "batch dim time"]
) -> tuple[Tensor, Tensor, Tensor]:
    """Q, K [batch, m1, time] and V [batch, dim, time]."""
    normalized = F
    if module.normalize:
        variance = F.var(1, keepdim=True, correction=0)
        normalized = (F - F.mean(1, keepdim=True)) / (variance + 1e-5).sqrt()
    Q, K = convolve(normalized, module.query), convolve(normalized, module.key)
    return Q, K, convolve(F, module.value)


def convolve(
    F: Float[Tensor, "batch dim time"], layer: GroupedLinear
) -> Float[Tensor, "batch out time"]:
    """W F of a 1x1 convolution, grouped if `layer` is. Shared weights are repeated for each
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
    """Grouped matrix multiplication: each group of `left`'s channels (transposed) times the same group of `right`."""
    left = left.unflatten(1, (groups, -1))
    right = right if right.ndim == 4 else right.unflatten(1, (groups, -1))
    return torch.matmul(left.transpose(-1, -2) if transpose else left, right)
