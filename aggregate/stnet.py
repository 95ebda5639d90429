"""StNet (He et al. 2018, arXiv 1811.01549), and its Temporal Xception Block, which also runs on
cached features.

frames [batch, T, N, 3, H, W]: each of T segments gives N frames, stacked into a super-image of 3 N
channels

super-images -> stem -> Res2 -> Res3 -> temporal block -> Res4 -> temporal block -> Res5 -> global average pool
                (timm: layer1)  layer2                   layer3                    layer4        |
                                                 logits <- linear <- max over time <- TXB <- [batch, T, dim]
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn.functional import batch_norm
from torch.utils.checkpoint import checkpoint

from aggregate.pooling import blank_masked
from extract import InputError


class TemporalBlock(nn.Module):
    """A convolution over time between two stages of the trunk, at every place of the map by itself.

    x + BN(ReLU(conv(x))), as Baidu released it (the paper has ReLU(BN(conv(x)))). It starts with
    gamma 0, so it is the identity, bit for bit and in training too, and a pretrained trunk is kept.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        # The 3 x 1 x 1 convolution of the paper, over [time, height * width]: the same weights, but
        # up to twice as fast on a CPU, and a model with weights of five dimensions could not be
        # made channels-last.
        self.conv = nn.Conv2d(channels, channels, (3, 1), padding=(1, 0))
        self.norm = nn.BatchNorm2d(channels)
        nn.init.zeros_(self.norm.weight)

    def forward(
        self, x: Float[Tensor, "images channels height width"], time: int
    ) -> Float[Tensor, "images channels height width"]:
        """The `time` maps of a video follow each other in `images`."""
        # Where x is channels-last, this is a view of it and channels-last too: nothing is copied.
        videos = x.unflatten(0, (-1, time)).transpose(1, 2).flatten(3)
        out = self.norm(self.conv(videos).relu())
        return x + out.unflatten(3, x.shape[2:]).transpose(1, 2).flatten(0, 1)


class StNet(nn.Module):
    """StNet on a timm trunk with the four stages layer1 .. layer4 of a ResNet.

    `backbone` becomes a part of this model: its classifier is taken off, and for
    `frames_per_segment` N > 1 its first convolution is widened to 3 N channels with weights
    w.repeat(1, N, 1, 1) / N, which sees N equal frames as it saw one. T may be another in the test
    than in training: all that runs over time is a convolution or a maximum. The children
    `aggregator` and `classifier` are named as in a VideoClassifier, so those of a "txb" trained on
    cached features fit in (`aggregate.models.carry_over`).

    Raises InputError for a trunk without those stages, or one that does not take RGB, and for unfit
    numbers.
    """

    def __init__(
        self,
        backbone: nn.Module,
        num_classes: int,
        frames_per_segment: int = 1,
        *,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if num_classes < 1 or frames_per_segment < 1:
            raise InputError(
                f"num_classes {num_classes} and frames_per_segment {frames_per_segment} must both be at least 1"
            )
        if not 0 <= dropout < 1:
            raise InputError(
                f"dropout is {dropout}; it is the fraction of features set to 0, from 0 to below 1"
            )
        _check_trunk(backbone)
        _widen(backbone, frames_per_segment)
        backbone.reset_classifier(0, "avg")  # type: ignore[operator]
        channels = {stage["module"]: stage["num_chs"] for stage in backbone.feature_info}  # type: ignore[union-attr]
        self.frames_per_segment = frames_per_segment
        self.backbone = backbone
        self.after_res3 = TemporalBlock(channels["layer2"])
        self.after_res4 = TemporalBlock(channels["layer3"])
        self.aggregator = TemporalXception(channels["layer4"])
        self.dropout = nn.Dropout(dropout)
        self.classifier = nn.Linear(self.aggregator.out_dim, num_classes)

    def maps(
        self, frames: Float[Tensor, "batch time frames 3 height width"]
    ) -> Float[Tensor, "images channels rows columns"]:
        """The maps after Res5, temporal blocks included; `images` = batch x time.

        Raises ValueError for frames of another shape.
        """
        N = self.frames_per_segment
        if frames.ndim != 6 or not frames.shape[1] or tuple(frames.shape[2:4]) != (N, 3):
            raise ValueError(
                f"got frames {list(frames.shape)}; this model takes [batch, time, {N}, 3, height, width]"
            )
        time, x = frames.shape[1], frames.flatten(0, 1).flatten(1, 2)
        recompute = getattr(self.backbone, "grad_checkpointing", False) and torch.is_grad_enabled()
        for name, child in self.backbone.named_children():
            if recompute and name.startswith(
                "layer"
            ):  # timm's own flag is read by its forward, which is not called
                for block in child:  # type: ignore[attr-defined]
                    x = checkpoint(block, x, use_reentrant=False)
            else:
                x = child(x)
            if name == "layer2":
                x = self.after_res3(x, time)
            elif name == "layer3":
                x = self.after_res4(x, time)
            elif name == "layer4":
                break
        return x

    def features(
        self, frames: Float[Tensor, "batch time frames 3 height width"]
    ) -> Float[Tensor, "batch out_dim"]:
        """One vector a video: what the classifier sees."""
        pooled = self.backbone.global_pool(self.maps(frames)).unflatten(0, frames.shape[:2])  # type: ignore[operator]
        # Not in half precision, even under autocast: see VideoClassifier.features.
        with torch.autocast(frames.device.type, enabled=False):
            return self.aggregator(pooled.to(self.classifier.weight.dtype))

    def forward(
        self, frames: Float[Tensor, "batch time frames 3 height width"]
    ) -> Float[Tensor, "batch classes"]:
        return self.classifier(self.dropout(self.features(frames)))


def _check_trunk(backbone: nn.Module) -> None:
    """Raises InputError unless the children of `backbone` are a stem, layer1 .. layer4, a pool and
    a classifier."""
    children = [name for name, _ in backbone.named_children()]
    stages = ["layer1", "layer2", "layer3", "layer4"]
    first = children.index("layer1") if "layer1" in children else 0
    if children[first : first + 5] != [*stages, "global_pool"] or not hasattr(
        backbone, "feature_info"
    ):
        raise InputError(
            f"StNet needs a timm trunk with the four stages layer1 .. layer4 (resnet50, seresnext101_32x4d, "
            f"legacy_seresnext101_32x4d ...); {type(backbone).__name__} consists of {', '.join(children) or 'nothing'}"
        )


def _widen(backbone: nn.Module, frames: int) -> None:
    """Make the first convolution take super-images of `frames` frames, each with its weights /
    `frames`."""
    conv = next(module for module in backbone.modules() if isinstance(module, nn.Conv2d))
    if conv.in_channels != 3:
        raise InputError(
            f"the trunk's first convolution takes {conv.in_channels} channels; give a trunk for RGB (in_chans=3), "
            f"StNet widens it for {frames} frames a segment itself"
        )
    if frames > 1:
        conv.in_channels = 3 * frames
        conv.weight = nn.Parameter(conv.weight.detach().repeat(1, frames, 1, 1) / frames)


class TemporalXception(nn.Module):
    """Temporal Xception Block, then max over time: the aggregator of StNet and, alone, the Temporal
    Xception Network.

        x = BN(in) -> depthwise k3 -> pointwise -> BN -> ReLU -> depthwise k3 -> pointwise -> + -> BN -> ReLU -> max
             `------------------------------ pointwise -------------------------------------'

    `out_dim` is dim/2 by default (2048 -> 1024 in StNet). Unlike the other aggregators it sees the
    order of frames.

    A mask takes frames out: the valid ones move together, so that neighbors in time are neighbors
    here, and beyond the last one stand the zeros that pad any video. Batch norm counts valid frames
    only. A masked video so gives what its valid frames alone would give.
    """

    sees_order = True

    def __init__(self, dim: int, out_dim: int | None = None) -> None:
        super().__init__()
        out_dim = dim // 2 if out_dim is None else out_dim
        if out_dim < 1:
            raise InputError(
                f"out_dim is {out_dim}; a Temporal Xception Block over {dim} channels needs at least 1"
            )
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
        x = norm_valid_frames(self.norm_in, x, mask)
        long = self.pointwise1(over_time(self.depthwise1, x))
        long = norm_valid_frames(self.norm_long, long, mask).relu()
        long = self.pointwise2(over_time(self.depthwise2, long))
        # Masked frames are at 0 here and valid ones, after the ReLU, not below it: they cannot win
        # the max.
        return norm_valid_frames(self.norm_out, long + self.short(x), mask).relu().amax(1)


def over_time(
    conv: nn.Conv1d, x: Float[Tensor, "batch time dim"]
) -> Float[Tensor, "batch time dim"]:
    """A convolution along `time`."""
    return conv(x.transpose(1, 2)).transpose(1, 2)


def norm_valid_frames(
    norm: nn.BatchNorm1d,
    x: Float[Tensor, "batch time dim"],
    mask: Bool[Tensor, "batch time"] | None,
) -> Float[Tensor, "batch time dim"]:
    """Batch norm over the valid frames of all videos; masked frames come out as 0."""
    if mask is None:
        return batch_normed(norm, x.flatten(0, 1)).unflatten(0, x.shape[:2])
    return x.new_zeros(x.shape).index_put((mask,), batch_normed(norm, x[mask]))


def batch_normed(
    norm: nn.BatchNorm1d, rows: Float[Tensor, "rows dim"]
) -> Float[Tensor, "rows dim"]:
    """Batch norm. One row, as the last batch of an epoch may be, has no variance: the running ones
    are used."""
    if norm.training and len(rows) == 1:
        return batch_norm(
            rows, norm.running_mean, norm.running_var, norm.weight, norm.bias, eps=norm.eps
        )
    return norm(rows)


def valid_first(
    x: Float[Tensor, "batch time dim"], mask: Bool[Tensor, "batch time"]
) -> tuple[Float[Tensor, "batch time dim"], Bool[Tensor, "batch time"]]:
    """The valid frames of each video moved to its front, in their order, and the mask that fits."""
    order = mask.byte().argsort(dim=1, descending=True, stable=True)
    return x.gather(1, order[..., None].expand_as(x)), mask.gather(1, order)
