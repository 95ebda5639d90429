"""A small GRU over the frames of a video: the simplest aggregator that sees their order.

Cho et al. 2014, arXiv 1406.1078.
"""

from torch import nn

from aggregate.masks import Features, Frames, Mask, average, blank_masked, valid_first
from extract import InputError


class GatedRecurrent(nn.Module):
    """Layer norm, one GRU layer, and the mean of its states over time.

    Maps `x [batch, time, dim]` to `[batch, inner_dim]`; the default `inner_dim` is 256. With a
    mask, the GRU runs over the valid frames only, in their order.

    With D = `dim` and H = `inner_dim` it has 2 D + 3 H (D + H + 2) parameters. Raises InputError
    for an `inner_dim` below 1.
    """

    sees_order = True

    def __init__(self, dim: int, inner_dim: int | None = None) -> None:
        super().__init__()
        inner_dim = 256 if inner_dim is None else inner_dim
        if inner_dim < 1:
            raise InputError(f"inner_dim (m1) is {inner_dim}; a GRU needs at least 1 channel")
        self.out_dim = inner_dim
        self.norm_in = nn.LayerNorm(dim)
        self.gru = nn.GRU(dim, inner_dim, batch_first=True)

    def forward(self, x: Frames, mask: Mask = None) -> Features:
        x = blank_masked(x, mask)
        if mask is not None:
            x, mask = valid_first(x, mask)
        states, _ = self.gru(self.norm_in(x))
        return average(blank_masked(states, mask), mask)
