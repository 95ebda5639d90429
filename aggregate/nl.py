"""The non-local module (NL) as an aggregator of frame features: eq. 3-6 of the paper, in their pooled form.

Literally, with `F [m, n]` (m channels, n frames), `Q = W_q F`, `K = W_k F`, `V = W_v F`:

    A = softmax(Q^T K)  (3)    F_o = V A  (4)    F_weight = s F_o + F  (5)    F_v = mean over frames of F_weight  (6)

F_v needs only the row sums of A: `mean_j (V A)_j = V w` with `w = A 1 / n`, and `V w = W_v (F w) + b_v sum(w)`. So W_v
is applied to one vector a video and no n x n x m product is made. Tests hold the two forms together, gradients too.
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from aggregate.pooling import average, blank_masked, frame_counts
from extract.cli import InputError


def masked_row_sums(
    A: Float[Tensor, "maps time time"], mask: Bool[Tensor, "maps time"] | None
) -> Float[Tensor, "maps time"]:
    """`A 1` over the valid frames: column j counts where frame j is valid, row i is 0 where frame i is not."""
    if mask is None:
        return A.sum(-1)
    valid = mask.to(A.dtype)
    return torch.bmm(A, valid[..., None]).squeeze(-1) * valid


def softmax_columns(
    scores: Float[Tensor, "maps time time"], mask: Bool[Tensor, "maps time"] | None
) -> Float[Tensor, "maps time time"]:
    """Softmax over the FIRST index of A, so that its columns, which F_o = V A mixes the frames by, sum to 1.

    Over the last index the rows would sum to 1, `w` would be 1/n for every frame and attention would vanish in eq. 6.
    """
    if mask is not None:
        scores = scores.masked_fill(~mask[..., None], -torch.inf)
    return scores.softmax(-2)


class NonLocal(nn.Module):
    """NL: one attention map for all channels (eq. 3-6; Wang et al. 2018).

    `inner_dim` is m1: m/2 (the default) or m/8 in the paper. `scale_init` is s before training: at 0 the module is the
    average of TSN. `scale_scores` divides the scores by sqrt(m1), which the paper does not.
    """

    def __init__(
        self, dim: int, inner_dim: int | None = None, *, scale_init: float = 0.0, scale_scores: bool = False
    ) -> None:
        super().__init__()
        inner_dim = dim // 2 if inner_dim is None else inner_dim
        if inner_dim < 1:
            raise InputError(f"inner_dim (m1) is {inner_dim}; NL over {dim} channels needs at least 1")
        self.out_dim = dim
        self.query = nn.Linear(dim, inner_dim)  # W_q
        self.key = nn.Linear(dim, inner_dim)  # W_k
        self.value = nn.Linear(dim, dim)  # W_v
        self.scale = nn.Parameter(torch.tensor(float(scale_init)))  # s
        self.score_factor = inner_dim**-0.5 if scale_scores else 1.0

    def frame_weights(
        self, x: Float[Tensor, "batch time dim"], mask: Bool[Tensor, "batch time"] | None = None
    ) -> Float[Tensor, "batch 1 time"]:
        """w = A 1 / n: how much of each frame's V is in the mean of F_o. Sums to 1 over the valid frames."""
        x = blank_masked(x, mask)
        scores = torch.bmm(self.query(x) * self.score_factor, self.key(x).transpose(1, 2))
        A = softmax_columns(scores, mask)  # eq. 3
        return (masked_row_sums(A, mask) / frame_counts(x, mask))[:, None]

    def terms(
        self, x: Float[Tensor, "batch time dim"], mask: Bool[Tensor, "batch time"] | None = None
    ) -> tuple[Float[Tensor, "batch dim"], Float[Tensor, "batch dim"]]:
        """The means over frames of F and of F_o: eq. 6 is the first plus s times the second."""
        x = blank_masked(x, mask)
        weights = self.frame_weights(x, mask)
        # eq. 4 averaged over frames. b_v is not multiplied by sum(w), which is 1: the columns of A sum to 1.
        return average(x, mask), self.value(torch.bmm(weights, x).squeeze(1))

    def attention_ratio(
        self, x: Float[Tensor, "batch time dim"], mask: Bool[Tensor, "batch time"] | None = None
    ) -> Float[Tensor, " batch"]:
        """|s mean(F_o)| / |mean(F)| of each video: how large attention is in F_v."""
        mean, attended = self.terms(x, mask)
        return (self.scale * attended).norm(dim=-1) / mean.norm(dim=-1)

    def forward(
        self, x: Float[Tensor, "batch time dim"], mask: Bool[Tensor, "batch time"] | None = None
    ) -> Float[Tensor, "batch dim"]:
        mean, attended = self.terms(x, mask)
        return mean + self.scale * attended  # eq. 5 and 6
