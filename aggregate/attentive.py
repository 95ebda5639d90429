"""The attentive probe of V-JEPA and V-JEPA 2: a learned query attends to the frames.

Bardes et al. 2024, arXiv 2404.08471; Assran et al. 2025, arXiv 2506.09985.

With D channels, `x [n, D]` the frames of a video, LN layer norm, and the MLP of width 4D
MLP(h) = W_2 GELU(W_1 h + b_1) + b_2:

    x = LN(x) + e(t)                    with `frame_time` only; e: sines of each frame's time t
    x = x + MHA(LN(x), LN(x), LN(x))    depth - 1 times, each followed by
    x = x + MLP(LN(x))
    h = q + MHA(q, LN(x), LN(x))        q [1, D] is learned, and the same for every video
    F_v = h + MLP(LN(h))

MHA(query, key, value) is multi-head attention with biases. V-JEPA has depth 1, V-JEPA 2 depth 4.
"""

import math

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from aggregate.masks import Features, Frames, Mask, blank_masked, frame_counts
from extract import InputError

# Periods per video of the slowest and the fastest sine; 16 frames still resolve the fastest.
SLOWEST, FASTEST = 0.5, 8.0


class Layer(nn.Module):
    """Multi-head attention over LN(x), then an MLP, each with a residual connection.

    It has 12 D^2 + 13 D parameters. `number` is the layer's position, from 1: as in V-JEPA, output
    projections start smaller by 1 / sqrt(2 number).
    """

    def __init__(self, dim: int, heads: int, number: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm_frames, self.norm_mlp = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.to_query, self.to_key_value = nn.Linear(dim, dim), nn.Linear(dim, 2 * dim)
        self.project = nn.Linear(dim, dim)
        widen, narrow = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)
        self.mlp = nn.Sequential(widen, nn.GELU(), narrow)
        for linear in (self.to_query, self.to_key_value, self.project, widen, narrow):
            std = 0.02 / math.sqrt(2 * number) if linear in (self.project, narrow) else 0.02
            nn.init.trunc_normal_(linear.weight, std=std)
            nn.init.zeros_(linear.bias)

    def products(self, x: Tensor, query: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Q [batch, heads, queries, dim/heads], and K and V [batch, heads, time, dim/heads]."""
        x = self.norm_frames(x)
        Q = self.to_query(x if query is None else query)
        K, V = self.to_key_value(x).chunk(2, -1)
        Q, K, V = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in (Q, K, V))
        return Q, K, V

    def forward(
        self, x: Frames, mask: Mask, query: Tensor | None = None
    ) -> Float[Tensor, "batch queries dim"]:
        """Attend from `query` [batch, queries, dim], or from every frame if it is None."""
        attn_mask = None if mask is None else mask[:, None, None]
        attended = scaled_dot_product_attention(*self.products(x, query), attn_mask=attn_mask)
        h = (x if query is None else query) + self.project(attended.transpose(1, 2).flatten(2))
        return h + self.mlp(self.norm_mlp(h))


class AttentiveProbe(nn.Module):
    """A learned query, cross-attention over the frames, and an MLP.

    Maps `x [batch, time, dim]` to `[batch, dim]`. The last of the `depth` attention layers is the
    query's; those before it are self-attention of the frames. `heads` is by default the largest
    divisor of `dim` that is at most dim/64. `frame_time` adds sines of each frame's time,
    (i + 1/2) / n for frame i of n valid ones; without it the order of frames is not seen.

    It has depth (12 D^2 + 13 D) + D parameters, and 2 D more with `frame_time`. Raises InputError
    for a depth below 1, and if `heads` does not divide `dim`.
    """

    def __init__(
        self, dim: int, depth: int = 1, heads: int | None = None, frame_time: bool = False
    ) -> None:
        super().__init__()
        if heads is None:
            heads = max(count for count in range(1, max(dim // 64, 1) + 1) if dim % count == 0)
        if depth < 1:
            raise InputError(f"depth is {depth}; the probe needs at least 1 layer")
        if heads < 1 or dim % heads:
            raise InputError(
                f"heads {heads} does not divide dim {dim}; choose a divisor, "
                "since each head gets an equal part of the channels"
            )
        self.out_dim = dim
        self.norm_in = nn.LayerNorm(dim) if frame_time else None
        self.layers = nn.ModuleList(Layer(dim, heads, number) for number in range(1, depth + 1))
        self.query = nn.Parameter(torch.empty(1, 1, dim).normal_(std=0.02))  # q

    def _encode(self, x: Tensor, mask: Tensor | None) -> tuple[Frames, Tensor]:
        """The frames after all layers but the last, and the query of each video."""
        x = blank_masked(x, mask)
        if self.norm_in is not None:
            x = self.norm_in(x) + time_sines(x, mask)
        for layer in self.layers[:-1]:  # type: ignore[union-attr]
            x = layer(x, mask)
        return x, self.query.expand(x.shape[0], -1, -1)

    def frame_weights(self, x: Frames, mask: Mask = None) -> Float[Tensor, "batch heads time"]:
        """Each head's attention to each frame: sums to 1 over valid frames, 0 for masked ones."""
        Q, K, _ = self.layers[-1].products(*self._encode(x, mask))  # type: ignore[operator]
        scores = (Q @ K.transpose(2, 3)).squeeze(2) * K.shape[3] ** -0.5
        if mask is not None:
            scores = scores.masked_fill(~mask[:, None], -torch.inf)
        return scores.softmax(-1)

    def forward(self, x: Frames, mask: Mask = None) -> Features:
        x, query = self._encode(x, mask)
        return self.layers[-1](x, mask, query).squeeze(1)


class AttentiveTimeProbe(AttentiveProbe):
    """`AttentiveProbe` with `frame_time`: it sees the order of frames (STEP, arXiv 2503.24298)."""

    sees_order = True

    def __init__(self, dim: int, depth: int = 1, heads: int | None = None) -> None:
        super().__init__(dim, depth, heads, frame_time=True)


def time_sines(x: Tensor, mask: Tensor | None) -> Float[Tensor, "_ time dim"]:
    """Encode each frame's time t = (i + 1/2) / n, for frame i of n valid ones.

    The first half of the channels holds sin(2 pi f t), for dim/2 frequencies f in geometric steps
    from SLOWEST to FASTEST; the second half holds the cosines. The shape is [1, time, dim] without
    a mask. Values at masked frames are meaningless.
    """
    i = torch.arange(x.shape[1], device=x.device)[None] if mask is None else mask.cumsum(1) - 1
    t = (i + 0.5).to(x.dtype) / frame_counts(x, mask)
    steps = torch.linspace(0, 1, (x.shape[2] + 1) // 2, device=x.device, dtype=x.dtype)
    f = SLOWEST * (FASTEST / SLOWEST) ** steps
    angles = 2 * math.pi * f * t[..., None]
    return torch.cat([angles.sin(), angles.cos()], -1)[..., : x.shape[2]]
