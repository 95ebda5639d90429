"""Hierarchical group-wise non-local module (HG-NL) in its pooled form.

It is eq. 7-8 of the paper, then eq. 5 and 6. For g1 = 8 primary and g2 = 4 secondary groups:

    m channels  |      0      |      1      |      2      |      3      |   g2 groups: A and W_v
                |  0   |  1   |  2   |  3   |  4   |  5   |  6   |  7   |   g1 groups: W_q and W_k

Secondary group h owns the r = g1/g2 primary groups r h .. r h + r - 1, and its attention map A_h
sums their products (Gmm):

    A_h = ReLU(sum of Q_i^T K_i over the primary groups i of h)  (7)
    F_o,h = V_h A_h                                              (8)

F_v needs only the row sums of A: `mean_j (V_h A_h)_j = W_v,h (F_h w_h) + b_v,h sum(w_h)` with
`w = A 1 / n`. So W_v is applied to one vector per video, and the n x n x m product V A is never
computed. Tests compare values and gradients with the literal form.
"""

from typing import Literal, get_args

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn.functional import layer_norm, linear

from aggregate.masks import Features, Frames, Mask, average, blank_masked, frame_counts
from extract import InputError

Norm = Literal["none", "n", "n_over_train"]
Attention = Literal["relu", "softmax"]
Start = Literal["random", "average"]


def masked_row_sums(
    A: Float[Tensor, "maps time time"], mask: Bool[Tensor, "maps time"] | None
) -> Float[Tensor, "maps time"]:
    """`A 1` over the valid frames; 0 for the rows of masked frames."""
    if mask is None:
        return A.sum(-1)
    valid = mask.to(A.dtype)
    return torch.bmm(A, valid[..., None]).squeeze(-1) * valid


def softmax_columns(
    scores: Float[Tensor, "maps time time"], mask: Bool[Tensor, "maps time"] | None
) -> Float[Tensor, "maps time time"]:
    """Softmax over the FIRST index of A: in F_o = V A each column holds weights that sum to 1.

    Over the last index the rows would sum to 1: `w` would be 1/n for every frame, and attention
    would vanish in eq. 6.
    """
    if mask is not None:
        scores = scores.masked_fill(~mask[..., None], -torch.inf)
    return scores.softmax(-2)


def multiply_groups(
    x: Float[Tensor, "groups rows in"], weight: Float[Tensor, "groups out in"]
) -> Float[Tensor, "groups rows out"]:
    """Multiply each group of `x` by its weight."""
    if len(weight) == 1:  # as a linear layer, whose gradient needs no copy into the weight's layout
        return linear(x, weight[0])
    return torch.bmm(x, weight.transpose(1, 2))


class GroupedLinear(nn.Module):
    """The parameters of a grouped 1x1 convolution: `weight [out, in/groups]` and `bias [out]`.

    `shared` keeps one set for all groups: `weight [out/groups, in/groups]`, `bias [out/groups]`.
    They are initialized as in torch's Conv1d. There is no `forward`: HG-NL multiplies `blocks`
    itself, in batched products.
    """

    def __init__(self, in_dim: int, out_dim: int, *, groups: int, shared: bool) -> None:
        super().__init__()
        self.groups, self.out_dim = groups, out_dim
        rows = out_dim // groups if shared else out_dim
        bound = (in_dim // groups) ** -0.5
        self.weight = nn.Parameter(torch.empty(rows, in_dim // groups).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(rows).uniform_(-bound, bound))
        self.shared = shared

    def blocks(self) -> tuple[Float[Tensor, "groups out in"], Float[Tensor, "groups 1 out"]]:
        """Weight and bias of each group, as views."""
        if self.shared:
            return self.weight.expand(self.groups, -1, -1), self.bias.expand(self.groups, 1, -1)
        return self.weight.unflatten(0, (self.groups, -1)), self.bias.view(self.groups, 1, -1)


class HGNonLocal(nn.Module):
    """HG-NL (eq. 7, 8, 5, 6): g2 attention maps; W_q and W_k have g1 groups, W_v has g2.

    The defaults are the paper's module. The other values are not in the paper.

    Args:
        inner_dim: m1, by default m/8.
        shared: use one set of weights for all groups of a layer (Table 1's last column).
        norm: how the ReLU map is normalized. "none" is the paper: the attention term grows with
            the number of frames n. "n" divides A by n. "n_over_train" multiplies A by
            `train_frames` / n, so that training is as in the paper.
        attention: "softmax" takes the softmax of eq. 3 instead of the ReLU, for an ablation.
        train_frames: the number of frames in training, for `norm`.
        normalize: normalize the input of W_q and W_k to mean 0 and variance 1 over channels (layer
            norm without parameters), so that products have the same scale for every backbone.
        start: initialization. "random" is that of torch's convolutions. "average" gives all frames
            the same weight: W_v is the identity, and W_k (softmax) or W_q (ReLU) is 0.
        scale_init: s before training; at 0 the module is TSN's average.
        scale_scores: divide the scores by sqrt(m1/g2), the square root of their length.

    Raises InputError for groups that do not divide, and for an unknown or unfit option.
    """

    def __init__(
        self,
        dim: int,
        inner_dim: int | None = None,
        g1: int = 16,
        g2: int = 8,
        shared: bool = False,
        norm: Norm = "none",
        *,
        attention: Attention = "relu",
        train_frames: int = 3,
        normalize: bool = False,
        start: Start = "random",
        scale_init: float = 0.0,
        scale_scores: bool = False,
    ) -> None:
        super().__init__()
        inner_dim = dim // 8 if inner_dim is None else inner_dim
        check_groups(dim, inner_dim, g1=g1, g2=g2)
        for name, value, literal in (
            ("norm", norm, Norm),
            ("attention", attention, Attention),
            ("start", start, Start),
        ):
            if value not in (choices := get_args(literal)):
                raise InputError(f"{name} {value!r} is not known; known are {', '.join(choices)}")
        if attention == "softmax" and norm != "none":
            raise InputError(
                f"norm {norm!r} is for the ReLU map; attention 'softmax' is normalized: "
                "norm must be 'none'"
            )
        if train_frames < 1:
            raise InputError(f"train_frames is {train_frames}; expected at least 1")
        self.out_dim, self.g1, self.g2 = dim, g1, g2
        self.norm, self.attention = norm, attention
        self.train_frames, self.normalize = train_frames, normalize
        self.query = GroupedLinear(dim, inner_dim, groups=g1, shared=shared)  # W_q
        self.key = GroupedLinear(dim, inner_dim, groups=g1, shared=shared)  # W_k
        self.value = GroupedLinear(dim, dim, groups=g2, shared=shared)  # W_v
        self.scale = nn.Parameter(torch.tensor(float(scale_init)))  # s
        self.score_factor = (inner_dim // g2) ** -0.5 if scale_scores else 1.0
        self.start, self.scale_init = start, scale_init
        if start == "average":
            self._start_as_average()

    def differences(self) -> list[str]:
        """How this module differs from the paper's HG-NL or NL, one phrase per difference."""
        phrases = {
            "softmax instead of the ReLU of eq. 7": self.attention == "softmax" and self.g1 > 1,
            "A divided by n": self.norm == "n",
            "A multiplied by n_train/n": self.norm == "n_over_train",
            "W_q and W_k see frames of mean 0 and variance 1": self.normalize,
            "training starts with the same weight for every frame": self.start == "average",
            f"s starts at {self.scale_init:g}, not 0": self.scale_init != 0,
            "scores divided by the root of their length": self.score_factor != 1,
        }
        return [phrase for phrase, differs in phrases.items() if differs]

    @torch.no_grad()
    def _start_as_average(self) -> None:
        weight = self.value.weight
        weight.copy_(torch.eye(weight.shape[1]).repeat(weight.shape[0] // weight.shape[1], 1))
        self.value.bias.zero_()
        if self.attention == "softmax":
            self.key.weight.zero_()
            self.key.bias.zero_()
            return
        # The ReLU has no gradient for scores of 0, and random scores would weight frames at random.
        # So W_q is 0 and every score is close to one positive value, b_q . b_k, at which F_o is the
        # mean of F. b_q and b_k are large enough for W_k and W_q to get gradients, but nearly
        # orthogonal, so that their product is small.
        level = (1 if self.norm == "n" else 1 / self.train_frames) / self.score_factor
        b_q, b_k = self.query.bias, self.key.bias
        channels = self.query.out_dim // self.g2
        size = (level / channels) ** 0.5
        if self.query.out_dim // self.g1 % 2 == 0:  # halves of an odd number do not cancel
            size = max(0.15, size)
        cosine = min(1.0, level / (size**2 * channels))
        along = torch.randint(0, 2, b_q.shape) * 2.0 - 1
        across = along * (1 - 2.0 * (torch.arange(len(along)) % 2))
        self.query.weight.zero_()
        b_q.copy_(size * along)
        b_k.copy_(size * (cosine * along + (1 - cosine**2) ** 0.5 * across))
        self.key.weight.mul_(0.03 * level)  # at 0 all maps would stay of rank 2

    def _scores(self, x: Frames) -> Float[Tensor, "maps time time"]:
        """Gmm(Q, K) of eq. 7: [h, b, i, j] = q_i . k_j over the channels of secondary group h.

        `maps` is g2 x batch. `x`, Q and K are not copied: a primary group is a strided view, which
        batched matrix products accept.
        """
        if self.normalize:
            x = layer_norm(x, x.shape[-1:])
        ratio = self.g1 // self.g2
        (w_q, b_q), (w_k, b_k) = self.query.blocks(), self.key.blocks()
        # One pass over x for Q and K.
        weight, bias = torch.cat([w_q, w_k], 1), torch.cat([b_q, b_k], 2)
        # [g1, batch x time, dim/g1]
        groups = x.reshape(-1, self.g1, x.shape[2] // self.g1).transpose(0, 1)
        scores: Tensor | None = None
        for first in range(ratio):  # the first, second ... primary group of every secondary group
            turn = slice(first, None, ratio)
            # [g2, batch x time, 2 m1/g1]
            pair = bias[turn] + multiply_groups(groups[turn], weight[turn])
            q, k = pair.view(-1, x.shape[1], pair.shape[2]).chunk(2, -1)
            k = k.transpose(1, 2)
            scores = torch.bmm(q, k) if scores is None else torch.baddbmm(scores, q, k)
        assert scores is not None  # ratio is at least 1
        return scores if self.score_factor == 1 else scores * self.score_factor

    def _weights(self, x: Frames, mask: Mask) -> Float[Tensor, "groups batch time"]:
        """w = A 1 / n of each secondary group, normalized as `norm` says."""
        maps_mask = None if mask is None else mask.repeat(self.g2, 1)
        A = self._scores(x)
        A = A.relu() if self.attention == "relu" else softmax_columns(A, maps_mask)  # eq. 7 or 3
        n = frame_counts(x, mask)
        factor = {"none": 1, "n": 1 / n, "n_over_train": self.train_frames / n}[self.norm]
        return masked_row_sums(A, maps_mask).view(self.g2, *x.shape[:2]) * (factor / n)

    def frame_weights(self, x: Frames, mask: Mask = None) -> Float[Tensor, "batch groups time"]:
        """w = A 1 / n of each map: the weight of each frame's V in the mean of F_o; 0 if masked."""
        return self._weights(blank_masked(x, mask), mask).transpose(0, 1)

    def _aggregate(self, x: Frames, mask: Mask, *, even: bool = False) -> Features:
        """F_v; `even` replaces frame weights by their mean over the frames of a video and group."""
        x = blank_masked(x, mask)
        weights = self._weights(x, mask)
        if even:
            valid = torch.ones_like(weights) if mask is None else mask.to(weights.dtype)
            weights = weights.sum(-1, keepdim=True) * valid / valid.sum(-1, keepdim=True)
        channels = x.chunk(self.g2, -1)  # views
        # F_h w_h
        pooled = [torch.bmm(w[:, None], F) for w, F in zip(weights, channels, strict=True)]
        w_v, b_v = self.value.blocks()
        # eq. 8, averaged over frames
        attended = multiply_groups(torch.cat(pooled, 1).transpose(0, 1), w_v)
        attended = attended + b_v * weights.sum(-1, keepdim=True)
        return average(x, mask) + self.scale * attended.transpose(0, 1).flatten(1)  # eq. 5 and 6

    def with_even_weights(self, x: Frames, mask: Mask = None) -> Features:
        """F_v without attention: all frames of a video have the same weight, the mean."""
        return self._aggregate(x, mask, even=True)

    def forward(self, x: Frames, mask: Mask = None) -> Features:
        return self._aggregate(x, mask)


def check_groups(dim: int, inner_dim: int, *, g1: int, g2: int) -> None:
    """Raise InputError if the groups do not divide the channels, or each other."""
    if min(dim, inner_dim, g1, g2) < 1:
        raise InputError(
            f"dim {dim}, inner_dim {inner_dim}, g1 {g1} and g2 {g2} must all be at least 1"
        )
    if g1 % g2:
        raise InputError(
            f"g2 {g2} does not divide g1 {g1}; "
            "a secondary group is a whole number of primary groups"
        )
    for name, size in (("dim", dim), ("inner_dim (m1)", inner_dim)):
        if size % g1:
            raise InputError(
                f"g1 {g1} does not divide {name} {size}; change g1 (and g2 with it) or inner_dim"
            )
