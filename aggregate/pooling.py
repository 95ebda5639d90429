"""Aggregators that pool each frame by itself: average (TSN), max, and learned frame weights.

Each maps `x [batch, time, dim]` to `[batch, dim]`, for any `time`. Masked frames do not count,
so their values do not matter (see `aggregate/masks.py`).
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from aggregate.masks import Features, Frames, Mask, average, blank_masked


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
    """`sum_t a_t f_t` with `a = softmax over frames of w . f_t`; w is learned.

    This is the "weighted averaging" of the paper's introduction: each frame is weighted by itself,
    without comparing pairs of frames. w starts at 0, which is TSN.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.out_dim = dim
        self.score = nn.Linear(dim, 1, bias=False)  # a bias would cancel in the softmax
        nn.init.zeros_(self.score.weight)

    def frame_weights(self, x: Frames, mask: Mask = None) -> Float[Tensor, "batch 1 time"]:
        """The weight of each frame: sums to 1 over the valid frames, 0 for masked ones."""
        scores = self.score(blank_masked(x, mask)).squeeze(-1)
        if mask is not None:
            scores = scores.masked_fill(~mask, -torch.inf)
        return scores.softmax(-1)[:, None]

    def with_even_weights(self, x: Frames, mask: Mask = None) -> Features:
        """F_v without attention: the average."""
        return average(blank_masked(x, mask), mask)

    def forward(self, x: Frames, mask: Mask = None) -> Features:
        return torch.bmm(self.frame_weights(x, mask), blank_masked(x, mask)).squeeze(1)
