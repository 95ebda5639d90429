"""NeXtVLAD: residuals of frames to learned cluster centers, in groups of channels.

Lin, Xiao and Fan 2018, arXiv 1811.05014.

With D channels, `x_i` a frame (after batch norm, see below), K clusters, G groups, expansion
lambda and L = lambda D / G:

    x'_i = W_e x_i + b_e                               lambda D channels, in G groups x'_ig of L
    a_ig = sigmoid(w_g . x'_i + b_g)                   attention of group g; 0 for masked frames
    s_igk = softmax over k of (w_gk . x'_i + b_gk)     assignment of group g to the clusters
    v_k = sum over i, g of a_ig s_igk (x'_ig - c_k)    c_k [L] is the same for all groups
    y = W_y dropout(bn(v_1/|v_1|, ..., v_K/|v_K|)) + b_y             H channels
    F_v = y * sigmoid(W_2 relu(bn(W_1 y + b_1)) + b_2)               gating, H / 8 hidden channels

Batch norm of the frames and dropout of the descriptor are needed: poorly regularized, the module
falls far below the average (ceshine/yt8m-2019, issue 4). It sums over frames, so their order is
not seen.
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import normalize

from aggregate.masks import Frames, Mask, batch_norm_any_size, blank_masked, norm_valid_frames
from extract import InputError

REDUCTION = 8  # the gating layer has out_dim / 8 hidden channels


class NeXtVLAD(nn.Module):
    """K residuals to cluster centers, gated: `x [batch, time, dim]` to `[batch, out_dim]`.

    `groups` is G, `expansion` is lambda, and `out_dim` is H, by default D. `clusters` is K: the
    paper has 128 for 5 million videos; take fewer for fewer videos. `descriptor_dropout` is the
    dropout before W_y.

    Number of parameters:
        before W_y: lambda D^2 + lambda D (W_e) + G (1 + K) (lambda D + 1) + K L (c)
        W_y: H (K L + 1)
        gating, with R = H / 8 rounded down: R (H + 1) + H (R + 1)
        batch norms: 2 (D + K L + R)

    Raises InputError for groups that do not divide lambda D, and for numbers out of range.
    """

    def __init__(
        self,
        dim: int,
        clusters: int = 16,
        groups: int = 8,
        expansion: int = 2,
        out_dim: int | None = None,
        descriptor_dropout: float = 0.5,
    ) -> None:
        super().__init__()
        out_dim = dim if out_dim is None else out_dim
        if min(clusters, groups, expansion, out_dim) < 1:
            raise InputError(
                f"clusters {clusters}, groups {groups}, expansion {expansion} and "
                f"out_dim {out_dim} must be at least 1"
            )
        wide = expansion * dim
        if wide % groups:
            raise InputError(
                f"groups {groups} does not divide expansion x dim {wide}; choose groups to fit"
            )
        if not 0 <= descriptor_dropout < 1:
            raise InputError(
                f"descriptor_dropout is {descriptor_dropout}; expected a fraction from 0 to below 1"
            )
        self.out_dim, self.groups, self.clusters = out_dim, groups, clusters
        self.norm_in = nn.BatchNorm1d(dim)
        self.expand = nn.Linear(dim, wide)  # W_e
        self.attend = nn.Linear(wide, groups)  # w_g
        self.assign = nn.Linear(wide, groups * clusters)  # w_gk
        width = wide // groups  # L
        self.centers = nn.Parameter(torch.randn(clusters, width) * width**-0.5)  # c
        self.norm_descriptor = nn.BatchNorm1d(clusters * width)
        self.dropout = nn.Dropout(descriptor_dropout)
        self.reduce = nn.Linear(clusters * width, out_dim)  # W_y
        hidden = max(out_dim // REDUCTION, 1)
        self.squeeze = nn.Linear(out_dim, hidden)  # W_1
        self.norm_gate = nn.BatchNorm1d(hidden)
        self.gate = nn.Linear(hidden, out_dim)  # W_2

    def _attend(self, x: Frames, mask: Mask) -> tuple[Tensor, Float[Tensor, "batch time groups"]]:
        """x' [batch, time, lambda dim], and a, which is 0 for masked frames."""
        wide = self.expand(norm_valid_frames(self.norm_in, blank_masked(x, mask), mask))
        a = self.attend(wide).sigmoid()
        return wide, a if mask is None else a.masked_fill(~mask[..., None], 0)

    def frame_weights(self, x: Frames, mask: Mask = None) -> Float[Tensor, "batch groups time"]:
        """a of each group and frame, from 0 to 1; 0 for masked frames."""
        return self._attend(x, mask)[1].transpose(1, 2)

    def descriptors(self, x: Frames, mask: Mask = None) -> Float[Tensor, "batch clusters width"]:
        """v_k / |v_k|: one matrix product sums over frames and groups; c_k is subtracted last."""
        wide, a = self._attend(x, mask)
        s = self.assign(wide).unflatten(-1, (self.groups, self.clusters)).softmax(-1)
        weights = (a[..., None] * s).flatten(1, 2)  # [batch, time x groups, clusters]
        parts = wide.unflatten(-1, (self.groups, -1)).flatten(1, 2)  # [batch, time x groups, width]
        v = torch.bmm(weights.transpose(1, 2), parts) - weights.sum(1)[..., None] * self.centers
        return normalize(v, dim=-1)

    def forward(self, x: Frames, mask: Mask = None) -> Float[Tensor, "batch out_dim"]:
        descriptor = self.descriptors(x, mask).flatten(1)
        y = self.reduce(self.dropout(batch_norm_any_size(self.norm_descriptor, descriptor)))
        hidden = batch_norm_any_size(self.norm_gate, self.squeeze(y)).relu()
        return y * self.gate(hidden).sigmoid()
