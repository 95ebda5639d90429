"""The attentive probe of V-JEPA and V-JEPA 2 (Bardes et al. 2024, Assran et al. 2025): a learned
query looks at frames.

With D channels, `x [n, D]` the frames of a video, LN layer norm and MLP(h) = W_2 GELU(W_1 h + b_1)
+ b_2 of width 4D:

    x = LN(x) + e(t)                    with `frame_time` only; e: sines of the relative time t of each frame
    x = x + MHA(LN(x), LN(x), LN(x))    depth - 1 times over, each followed by
    x = x + MLP(LN(x))
    h = q + MHA(q, LN(x), LN(x))        q [1, D] is learned, the same for every video
    F_v = h + MLP(LN(h))

MHA(query, key, value) is multi-head attention, biases on. Depth 1 is V-JEPA's probe, depth 4 V-JEPA
2's.
"""

import math

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from aggregate.pooling import Features, Frames, Mask, blank_masked, frame_counts
from extract import InputError

SLOWEST, FASTEST = (
    0.5,
    8.0,
)  # periods of the time's sines in a video; 16 frames still show the fastest


class Layer(nn.Module):
    """Multi-head attention over LN(x) and an MLP, each added to what it is given; 12 D^2 + 13 D
    parameters.

    `number` is that of the layer, from 1: output projections start 1 / sqrt(2 number) smaller, as
    V-JEPA's.
    """

    def __init__(self, dim: int, heads: int, number: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm_frames, self.norm_mlp = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.to_query, self.to_key_value = nn.Linear(dim, dim), nn.Linear(dim, 2 * dim)
        self.project = nn.Linear(dim, dim)
        wider, back = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)
        self.mlp = nn.Sequential(wider, nn.GELU(), back)
        for linear in (self.to_query, self.to_key_value, self.project, wider, back):
            std = 0.02 / math.sqrt(2 * number) if linear in (self.project, back) else 0.02
            nn.init.trunc_normal_(linear.weight, std=std)
            nn.init.zeros_(linear.bias)

    def products(self, x: Tensor, query: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Q [batch, heads, queries, dim/heads], K and V [batch, heads, time, dim/heads] of
        `forward`'s x and query."""
        x = self.norm_frames(x)
        Q = self.to_query(x if query is None else query)
        K, V = self.to_key_value(x).chunk(2, -1)
        Q, K, V = (one.unflatten(-1, (self.heads, -1)).transpose(1, 2) for one in (Q, K, V))
        return Q, K, V

    def forward(
        self, x: Frames, mask: Mask, query: Tensor | None = None
    ) -> Float[Tensor, "batch queries dim"]:
        """`query` [batch, queries, dim]; without one every frame asks (self-attention)."""
        seen = None if mask is None else mask[:, None, None]
        attended = scaled_dot_product_attention(*self.products(x, query), attn_mask=seen)
        h = (x if query is None else query) + self.project(attended.transpose(1, 2).flatten(2))
        return h + self.mlp(self.norm_mlp(h))


class AttentiveProbe(nn.Module):
    """A learned query, cross-attention over the frames, an MLP: `x [batch, time, dim]` to `[batch,
    dim]`.

    `depth` counts the layers of attention: the last is the query's, those before it are
    self-attention of the frames. `heads` is by default the largest divisor of `dim` up to dim/64.
    `frame_time` adds the sines of each frame's time, (i + 1/2) / n for frame i of the n valid ones;
    without it the order of frames is not seen. Parameters: depth (12 D^2 + 13 D) + D, with
    `frame_time` 2 D more. Raises InputError for a depth below 1 and for heads that do not divide
    `dim`.
    """

    def __init__(
        self, dim: int, depth: int = 1, heads: int | None = None, frame_time: bool = False
    ) -> None:
        super().__init__()
        if heads is None:
            heads = max(count for count in range(1, max(dim // 64, 1) + 1) if dim % count == 0)
        if depth < 1:
            raise InputError(
                f"depth is {depth}; the probe needs at least 1 layer, that of its query"
            )
        if heads < 1 or dim % heads:
            raise InputError(
                f"heads {heads} does not divide dim {dim}; each head has an equal part of the channels"
            )
        self.out_dim = dim
        self.norm_in = nn.LayerNorm(dim) if frame_time else None
        self.layers = nn.ModuleList(Layer(dim, heads, number) for number in range(1, depth + 1))
        self.query = nn.Parameter(torch.empty(1, 1, dim).normal_(std=0.02))  # q

    def _frames(self, x: Tensor, mask: Tensor | None) -> Frames:
        """What the query looks at."""
        x = blank_masked(x, mask)
        if self.norm_in is not None:
            x = self.norm_in(x) + time_sines(x, mask)
        for layer in self.layers[:-1]:  # type: ignore[union-attr]
            x = layer(x, mask)
        return x

    def frame_weights(self, x: Frames, mask: Mask = None) -> Float[Tensor, "batch heads time"]:
        """The query's attention to each frame, of each head; sums to 1 over the valid frames, 0
        elsewhere."""
        Q, K, _ = self.layers[-1].products(
            self._frames(x, mask), self.query.expand(x.shape[0], -1, -1)
        )  # type: ignore
        scores = (Q @ K.transpose(2, 3)).squeeze(2) * K.shape[3] ** -0.5
        return (scores if mask is None else scores.masked_fill(~mask[:, None], -torch.inf)).softmax(
            -1
        )

    def forward(self, x: Frames, mask: Mask = None) -> Features:
        return self.layers[-1](
            self._frames(x, mask), mask, self.query.expand(x.shape[0], -1, -1)
        ).squeeze(1)


class AttentiveTimeProbe(AttentiveProbe):
    """`AttentiveProbe` with `frame_time`: it sees the order of frames (STEP, arXiv 2503.24298)."""

    sees_order = True

    def __init__(self, dim: int, depth: int = 1, heads: int | None = None) -> None:
        super().__init__(dim, depth, heads, frame_time=True)


def time_sines(x: Tensor, mask: Tensor | None) -> Float[Tensor, "_ time dim"]:
    """e of t = (i + 1/2) / n, frame i of the n valid ones: sin(2 pi f t) in dim/2 frequencies f in
    geometric steps over SLOWEST .. FASTEST, then their cosines. [1, time, dim] without a mask; of
    no meaning for masked frames."""
    i = torch.arange(x.shape[1], device=x.device)[None] if mask is None else mask.cumsum(1) - 1
    t = (i + 0.5).to(x.dtype) / frame_counts(x, mask)
    f = SLOWEST * (FASTEST / SLOWEST) ** torch.linspace(
        0, 1, (x.shape[2] + 1) // 2, device=x.device, dtype=x.dtype
    )
    angles = 2 * math.pi * f * t[..., None]
    return torch.cat([angles.sin(), angles.cos()], -1)[..., : x.shape[2]]
