"""NeXtVLAD (Lin, Xiao, Fan 2018, arXiv 1811.05014): what frames leave over of learned cluster
centers, group by group.

With D channels, `x_i` a frame (batch-normed, see below), K clusters, G groups, expansion lambda, L
= lambda D / G:

    x'_i = W_e x_i + b_e                                          in lambda D, cut into G groups x'_ig of L
    a_ig = sigmoid(w_g . x'_i + b_g)                              the attention of group g; 0 for masked frames
    s_igk = softmax over k of (w_gk . x'_i + b_gk)                to which cluster a group of a frame belongs
    v_k = sum over i, g of a_ig s_igk (x'_ig - c_k)               c_k in L, the same for all groups
    y = W_y dropout(bn(v_1/|v_1|, ..., v_K/|v_K|)) + b_y          in H
    F_v = y * sigmoid(W_2 relu(bn(W_1 y + b_1)) + b_2)            context gating, H / 8 inside

Frames are batch-normed and the descriptor has dropout because badly regularised the module falls
far below the average (ceshine/yt8m-2019, issue 4). It sums over frames: their order is not seen.
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import normalize

from aggregate.pooling import Frames, Mask, blank_masked
from aggregate.stnet import batch_normed, norm_valid_frames
from extract import InputError

REDUCTION = 8  # of context gating


class NeXtVLAD(nn.Module):
    """K residuals to cluster centers, gated: `x [batch, time, dim]` to `[batch, out_dim]`.

    `groups` are G, `expansion` is lambda, `out_dim` is H, m by default. `clusters` are K: 128 in
    the paper on 5 million videos, and few where there are few; `descriptor_dropout` is that before
    W_y.

    Parameters: lambda D^2 + lambda D (W_e) + G (lambda D + 1) + G K (lambda D + 1) + K lambda D / G
    (c) before W_y, then H (K lambda D / G + 1) and, with R = H / 8 rounded down, R (H + 1) + H (R +
    1); 2 each for the channels of the batch norms, D + K lambda D / G + R. Raises InputError for
    groups that do not divide lambda D, and for numbers without meaning.
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
                f"clusters {clusters}, groups {groups}, expansion {expansion} and out_dim {out_dim} must be at least 1"
            )
        wide = expansion * dim
        if wide % groups:
            raise InputError(
                f"groups {groups} does not divide expansion x dim {wide}; choose groups to fit"
            )
        if not 0 <= descriptor_dropout < 1:
            raise InputError(
                f"descriptor_dropout is {descriptor_dropout}; it is a fraction, from 0 to below 1"
            )
        self.out_dim, self.groups, self.clusters = out_dim, groups, clusters
        self.norm_in = nn.BatchNorm1d(dim)
        self.expand = nn.Linear(dim, wide)  # W_e
        self.attend = nn.Linear(wide, groups)  # w_g
        self.assign = nn.Linear(wide, groups * clusters)  # w_gk
        self.centers = nn.Parameter(
            torch.randn(clusters, wide // groups) * (wide // groups) ** -0.5
        )  # c
        self.norm_descriptor = nn.BatchNorm1d(clusters * wide // groups)
        self.dropout = nn.Dropout(descriptor_dropout)
        self.reduce = nn.Linear(clusters * wide // groups, out_dim)  # W_y
        inside = max(out_dim // REDUCTION, 1)
        self.squeeze, self.norm_gate, self.gate = (  # W_1, bn, W_2
            nn.Linear(out_dim, inside),
            nn.BatchNorm1d(inside),
            nn.Linear(inside, out_dim),
        )

    def _attended(self, x: Frames, mask: Mask) -> tuple[Tensor, Float[Tensor, "batch time groups"]]:
        """x' [batch, time, lambda dim], and a: 0 for masked frames."""
        wide = self.expand(norm_valid_frames(self.norm_in, blank_masked(x, mask), mask))
        a = self.attend(wide).sigmoid()
        return wide, a if mask is None else a.masked_fill(~mask[..., None], 0)

    def frame_weights(self, x: Frames, mask: Mask = None) -> Float[Tensor, "batch groups time"]:
        """a of each group and frame, each from 0 to 1; 0 for masked frames."""
        return self._attended(x, mask)[1].transpose(1, 2)

    def descriptors(self, x: Frames, mask: Mask = None) -> Float[Tensor, "batch clusters width"]:
        """v_k / |v_k|. The sum over frames and groups is one matrix product; c_k is taken off once,
        after it."""
        wide, a = self._attended(x, mask)
        s = self.assign(wide).unflatten(-1, (self.groups, self.clusters)).softmax(-1)
        weights = (a[..., None] * s).flatten(1, 2)  # [batch, time x groups, clusters]
        parts = wide.unflatten(-1, (self.groups, -1)).flatten(1, 2)  # [batch, time x groups, width]
        v = torch.bmm(weights.transpose(1, 2), parts) - weights.sum(1)[..., None] * self.centers
        return normalize(v, dim=-1)

    def forward(self, x: Frames, mask: Mask = None) -> Float[Tensor, "batch out_dim"]:
        y = self.reduce(
            self.dropout(batch_normed(self.norm_descriptor, self.descriptors(x, mask).flatten(1)))
        )
        return y * self.gate(batch_normed(self.norm_gate, self.squeeze(y)).relu()).sigmoid()
