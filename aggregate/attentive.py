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
from typing import Any

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

    def forward(self, x: Frames, mask: Mask) -> Frames:
        """Self-attention: each frame attends to all."""
        normed = self.norm_frames(x)
        parts = (self.to_query(normed), *self.to_key_value(normed).chunk(2, -1))
        Q, K, V = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in parts)
        attn_mask = None if mask is None else mask[:, None, None]
        attended = scaled_dot_product_attention(Q, K, V, attn_mask=attn_mask)
        return self._with_residuals(x, attended.transpose(1, 2).flatten(2))

    def query_weights(
        self, query: Float[Tensor, "1 dim"], x: Frames, mask: Mask
    ) -> Float[Tensor, "batch heads time"]:
        """Each head's attention from the query to the frames LN(x).

        The query is the same for all videos, so it is multiplied by W_k instead of every frame:
        q . (W_k x + b_k) = (W_k^T q) . x + a constant, which cancels in the softmax.
        """
        w_k, _ = self._key_value_weights()
        q = self.to_query(query).view(self.heads, 1, -1)
        scores = (x @ torch.bmm(q, w_k).squeeze(1).T).transpose(1, 2) * q.shape[2] ** -0.5
        if mask is not None:
            scores = scores.masked_fill(~mask[:, None], -torch.inf)
        return scores.softmax(-1)

    def pool(self, query: Float[Tensor, "1 dim"], x: Frames, mask: Mask) -> Features:
        """Attend from the query to the frames.

        Each head averages the frames before W_v, and not after it: weights that sum to 1 give
        sum of a_i (W_v x_i + b_v) = W_v (sum of a_i x_i) + b_v.
        """
        x = self.norm_frames(x)
        averages = torch.bmm(self.query_weights(query, x, mask), x)
        _, w_v = self._key_value_weights()
        # With W_v as the first factor its gradient has the layout of W_v and is not copied.
        attended = torch.bmm(w_v, averages.permute(1, 2, 0)).flatten(0, 1).T
        return self._with_residuals(query, attended + self.to_key_value.bias.chunk(2)[1])

    def _key_value_weights(self) -> list[Float[Tensor, "heads width dim"]]:
        """W_k and W_v of each head."""
        return [part.unflatten(0, (self.heads, -1)) for part in self.to_key_value.weight.chunk(2)]

    def _with_residuals(self, x: Tensor, attended: Tensor) -> Tensor:
        h = x + self.project(attended)
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

    def _encode(self, x: Frames, mask: Mask) -> Frames:
        """The frames after all layers but the last."""
        x = blank_masked(x, mask)
        if self.norm_in is not None:
            x = self.norm_in(x) + time_sines(x, mask)
        for layer in self.layers[:-1]:  # type: ignore[union-attr]
            x = layer(x, mask)
        return x

    def frame_weights(self, x: Frames, mask: Mask = None) -> Float[Tensor, "batch heads time"]:
        """Each head's attention to each frame: sums to 1 over valid frames, 0 for masked ones."""
        last: Any = self.layers[-1]
        return last.query_weights(self.query[0], last.norm_frames(self._encode(x, mask)), mask)

    def forward(self, x: Frames, mask: Mask = None) -> Features:
        last: Any = self.layers[-1]
        return last.pool(self.query[0], self._encode(x, mask), mask)


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
