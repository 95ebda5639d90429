"""The Temporal Xception Block (TXB) of StNet (He et al. 2018, arXiv 1811.01549), which also runs on cached features."""

from jaxtyping import Bool, Float
from torch import Tensor, nn

from aggregate.pooling import blank_masked
from extract.cli import InputError


class TemporalXception(nn.Module):
    """Temporal Xception Block, then max over time: the aggregator of StNet and, alone, the Temporal Xception Network.

        x = BN(in) -> depthwise k3 -> pointwise -> BN -> ReLU -> depthwise k3 -> pointwise -> + -> BN -> ReLU -> max
             `------------------------------ pointwise -------------------------------------'

    `out_dim` is dim/2 by default (2048 -> 1024 in StNet). Unlike the other aggregators it sees the order of frames.

    A mask takes frames out: the valid ones move together, so that neighbours in time are neighbours here, and beyond
    the last one stand the zeros that pad any video. Batch norm counts valid frames only. A masked video so gives what
    its valid frames alone would give.
    """

    def __init__(self, dim: int, out_dim: int | None = None) -> None:
        super().__init__()
        out_dim = dim // 2 if out_dim is None else out_dim
        if out_dim < 1:
            raise InputError(f"out_dim is {out_dim}; a Temporal Xception Block over {dim} channels needs at least 1")
        self.out_dim = out_dim
        self.norm_in = nn.BatchNorm1d(dim)
        self.depthwise1 = nn.Conv1d(dim, dim, 3, padding=1, groups=dim)
        self.pointwise1 = nn.Linear(dim, out_dim)
        self.norm_long = nn.BatchNorm1d(out_dim)
        self.depthwise2 = nn.Conv1d(out_dim, out_dim, 3, padding=1, groups=out_dim)
        self.pointwise2 = nn.Linear(out_dim, out_dim)
        self.short = nn.Linear(dim, out_dim)
        self.norm_out = nn.BatchNorm1d(out_dim)

    def forward(
        self, x: Float[Tensor, "batch time dim"], mask: Bool[Tensor, "batch time"] | None = None
    ) -> Float[Tensor, "batch out_dim"]:
        x = blank_masked(x, mask)
        if mask is not None:
            x, mask = valid_first(x, mask)
        x = normalise(self.norm_in, x, mask)
        long = self.pointwise1(over_time(self.depthwise1, x))
        long = normalise(self.norm_long, long, mask).relu()
        long = self.pointwise2(over_time(self.depthwise2, long))
        # Masked frames are at 0 here and valid ones, after the ReLU, not below it: they cannot win the max.
        return normalise(self.norm_out, long + self.short(x), mask).relu().amax(1)


def over_time(conv: nn.Conv1d, x: Float[Tensor, "batch time dim"]) -> Float[Tensor, "batch time dim"]:
    """A convolution along `time`."""
    return conv(x.transpose(1, 2)).transpose(1, 2)


def normalise(
    norm: nn.BatchNorm1d, x: Float[Tensor, "batch time dim"], mask: Bool[Tensor, "batch time"] | None
) -> Float[Tensor, "batch time dim"]:
    """Batch norm over the valid frames of all videos; masked frames come out as 0."""
    if mask is None:
        return norm(x.flatten(0, 1)).unflatten(0, x.shape[:2])
    return x.new_zeros(x.shape).index_put((mask,), norm(x[mask]))


def valid_first(
    x: Float[Tensor, "batch time dim"], mask: Bool[Tensor, "batch time"]
) -> tuple[Float[Tensor, "batch time dim"], Bool[Tensor, "batch time"]]:
    """The valid frames of each video moved to its front, in their order, and the mask that fits."""
    order = mask.byte().argsort(dim=1, descending=True, stable=True)
    return x.gather(1, order[..., None].expand_as(x)), mask.gather(1, order)
