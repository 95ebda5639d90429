"""The non-local module (NL) as an aggregator of frame features: eq. 3-6 of the paper.

With `F [m, n]` (m channels, n frames), `Q = W_q F`, `K = W_k F` and `V = W_v F`:

    A = softmax(Q^T K)              (3)
    F_o = V A                       (4)
    F_weight = s F_o + F            (5)
    F_v = mean of F_weight over frames  (6)

The code computes the pooled form, see `aggregate/hgnl.py`.
"""

from aggregate.hgnl import HGNonLocal, Start


class NonLocal(HGNonLocal):
    """NL: one attention map for all channels (eq. 3-6; Wang et al. 2018).

    It is HG-NL with one group and softmax. `inner_dim` is m1: m/2 (the default) or m/8 in the
    paper. For the other options see `HGNonLocal`.
    """

    def __init__(
        self,
        dim: int,
        inner_dim: int | None = None,
        *,
        normalize: bool = False,
        start: Start = "random",
        scale_init: float = 0.0,
        scale_scores: bool = False,
    ) -> None:
        super().__init__(
            dim,
            dim // 2 if inner_dim is None else inner_dim,
            1,
            1,
            attention="softmax",
            normalize=normalize,
            start=start,
            scale_init=scale_init,
            scale_scores=scale_scores,
        )
