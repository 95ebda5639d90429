"""Aggregators without pairs of frames: average (TSN), max, and a weighted average with learned
attention.

All map `x [batch, time, dim]` to `[batch, dim]` for any `time`. `mask [batch, time]` is False for
frames that are not to be counted (the repeated frames of short videos, padding); such frames count
for nothing, whatever they hold.
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

Frames = Float[Tensor, "batch time dim"]
Mask = Bool[Tensor, "batch time"] | None
Features = Float[Tensor, "batch dim"]  # F_v: one vector a video


def blank_masked(x: Frames, mask: Mask) -> Frames:
    """`x` with its masked frames at zero, so that not even a NaN in them can reach a sum.

    `mask=None` costs nothing. Raises ValueError for a mask of another shape and, on a CPU, for a
    video without any valid frame: to look would be to wait for a GPU, and there such a video is not
    finite afterwards.
    """
    if mask is None:
        return x
    if mask.shape != x.shape[:2]:
        raise ValueError(
            f"the mask is {list(mask.shape)}; for features {list(x.shape)} it must be {list(x.shape[:2])}"
        )
    # An exported graph cannot branch on values: there the caller answers for its mask.
    if mask.is_cpu and not torch.compiler.is_compiling() and not (valid := mask.any(1)).all():
        rows = (~valid).nonzero().flatten().tolist()
        raise ValueError(
            f"no frame is valid in row {rows[0]} of the mask ({len(rows)} such rows of {len(mask)})"
        )
    return x.masked_fill(~mask[..., None], 0)


def frame_counts(x: Frames, mask: Mask) -> Tensor | int:
    """n of the equations, valid frames only: an int without a mask, else `[batch, 1]` in the dtype
    of `x`."""
    return x.shape[1] if mask is None else mask.sum(1, keepdim=True).to(x.dtype)


def average(x: Frames, mask: Mask = None) -> Features:
    """Mean over the valid frames. The masked frames of `x` must be zero already
    (`blank_masked`)."""
    return x.mean(1) if mask is None else x.sum(1) / frame_counts(x, mask)


class Average(nn.Module):
    """TSN's consensus: the mean over frames, eq. 6 with s = 0 (Wang et al. 2016)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.out_dim = dim

    def forward(self, x: Frames, mask: Mask = None) -> Features:
        return average(blank_masked(x, mask), mask)


class Max(nn.Module):
    """The largest value of each channel over frames."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.out_dim = dim

    def forward(self, x: Frames, mask: Mask = None) -> Features:
        if mask is not None:
            x = blank_masked(x, mask).masked_fill(~mask[..., None], -torch.inf)
        return x.amax(1)


class WeightedAverage(nn.Module):
    """`sum_t a_t f_t` with `a = softmax over frames of w . f_t`. w is learned; it starts at 0,
    which is TSN.

    Each frame is weighed by itself: the "weighted averaging" of the paper's introduction, without
    looking at pairs.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.out_dim = dim
        self.score = nn.Linear(dim, 1, bias=False)  # a bias would cancel in the softmax
        nn.init.zeros_(self.score.weight)

    def frame_weights(self, x: Frames, mask: Mask = None) -> Float[Tensor, "batch 1 time"]:
        """How much each frame counts; sums to 1 over the valid frames, 0 elsewhere."""
        scores = self.score(blank_masked(x, mask)).squeeze(-1)
        if mask is not None:
            scores = scores.masked_fill(~mask, -torch.inf)
        return scores.softmax(-1)[:, None]

    def with_even_weights(self, x: Frames, mask: Mask = None) -> Features:
        """F_v without attention: the average."""
        return average(blank_masked(x, mask), mask)

    def forward(self, x: Frames, mask: Mask = None) -> Features:
        return torch.bmm(self.frame_weights(x, mask), blank_masked(x, mask)).squeeze(1)
