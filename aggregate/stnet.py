"""StNet and its Temporal Xception Block, which also runs on cached features.

He et al. 2018, arXiv 1811.01549.

frames [batch, T, N, 3, H, W]: each of T segments has N frames, stacked into a super-image of 3 N
channels.

    super-images
      -> stem -> Res2 -> Res3 -> temporal block -> Res4 -> temporal block -> Res5 -> average pool
         timm:   layer1  layer2                    layer3                    layer4
      -> [batch, T, dim] -> Temporal Xception Block -> max over time -> linear -> logits
"""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from aggregate.masks import Features, Frames, Mask, blank_masked, norm_valid_frames, valid_first
from extract import InputError

Maps = Float[Tensor, "images channels height width"]
SegmentFrames = Float[Tensor, "batch time frames 3 height width"]


class TemporalBlock(nn.Module):
    """A convolution over time between two stages, at each position of the map separately.

    x + BN(ReLU(conv(x))), as in Baidu's released code; the paper has ReLU(BN(conv(x))). gamma
    starts at 0, so at first the block is the identity, and a pretrained trunk is not disturbed.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        # The paper's 3 x 1 x 1 convolution, over [time, height * width]: the same weights, but up
        # to twice as fast on a CPU. Weights of five dimensions could not be channels-last.
        self.conv = nn.Conv2d(channels, channels, (3, 1), padding=(1, 0))
        self.norm = nn.BatchNorm2d(channels)
        nn.init.zeros_(self.norm.weight)

    def forward(self, x: Maps, time: int) -> Maps:
        """`images` holds the `time` maps of each video one after the other."""
        # If x is channels-last, this is a channels-last view of it: nothing is copied.
        videos = x.unflatten(0, (-1, time)).transpose(1, 2).flatten(3)
        out = self.norm(self.conv(videos).relu())
        return x + out.unflatten(3, x.shape[2:]).transpose(1, 2).flatten(0, 1)


class StNet(nn.Module):
    """StNet on a timm trunk with the four stages layer1 .. layer4 of a ResNet.

    `backbone` becomes a part of this model. Its classifier is removed. For `frames_per_segment`
    N > 1 its first convolution is widened to 3 N channels, with weights w.repeat(1, N, 1, 1) / N:
    N equal frames give what one frame gave before. T may differ between training and test, since
    only convolutions and a maximum run over time. `aggregator` and `classifier` are named as in a
    VideoClassifier, so that those of a "txb" trained on cached features can be loaded
    (`aggregate.models.carry_over`).

    Raises InputError for a trunk without those stages or not for RGB, and for numbers out of range.
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
                f"num_classes {num_classes} and frames_per_segment {frames_per_segment} "
                "must both be at least 1"
            )
        check_dropout(dropout)
        _check_trunk(backbone)
        _widen(backbone, frames_per_segment)
        backbone.reset_classifier(0, "avg")  # type: ignore[operator]
        stages: Any = backbone.feature_info
        channels = {stage["module"]: stage["num_chs"] for stage in stages}
        self.frames_per_segment = frames_per_segment
        self.backbone = backbone
        self.after_res3 = TemporalBlock(channels["layer2"])
        self.after_res4 = TemporalBlock(channels["layer3"])
        self.aggregator = TemporalXception(channels["layer4"])
        self.dropout = nn.Dropout(dropout)
        self.classifier = nn.Linear(self.aggregator.out_dim, num_classes)

    def maps(self, frames: SegmentFrames) -> Maps:
        """The maps after Res5, temporal blocks included; `images` is batch x time.

        Raises ValueError for frames of another shape.
        """
        N = self.frames_per_segment
        if frames.ndim != 6 or not frames.shape[1] or tuple(frames.shape[2:4]) != (N, 3):
            raise ValueError(
                f"got frames {list(frames.shape)}; "
                f"this model takes [batch, time, {N}, 3, height, width]"
            )
        time, x = frames.shape[1], frames.flatten(0, 1).flatten(1, 2)
        # timm reads this flag in its own forward, which is not called here.
        recompute = getattr(self.backbone, "grad_checkpointing", False) and torch.is_grad_enabled()
        for name, child in self.backbone.named_children():
            if recompute and name.startswith("layer"):
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

    def features(self, frames: SegmentFrames) -> Features:
        """One vector per video, the input of the classifier."""
        pool: Any = self.backbone.global_pool
        pooled = pool(self.maps(frames)).unflatten(0, frames.shape[:2])
        # Not in half precision, even under autocast: see VideoClassifier.features.
        with torch.autocast(frames.device.type, enabled=False):
            return self.aggregator(pooled.to(self.classifier.weight.dtype))

    def forward(self, frames: SegmentFrames) -> Float[Tensor, "batch classes"]:
        return self.classifier(self.dropout(self.features(frames)))


def check_dropout(dropout: float) -> None:
    """Raise InputError unless the fraction is at least 0 and below 1."""
    if not 0 <= dropout < 1:
        raise InputError(f"dropout is {dropout}; expected a fraction from 0 to below 1")


def _check_trunk(backbone: nn.Module) -> None:
    """Raise InputError unless layer1 .. layer4 and a pool follow each other in `backbone`."""
    children = [name for name, _ in backbone.named_children()]
    first = children.index("layer1") if "layer1" in children else 0
    expected = ["layer1", "layer2", "layer3", "layer4", "global_pool"]
    if children[first : first + 5] != expected or not hasattr(backbone, "feature_info"):
        raise InputError(
            "StNet needs a timm trunk with the four stages layer1 .. layer4 (resnet50, "
            "seresnext101_32x4d, legacy_seresnext101_32x4d ...); "
            f"{type(backbone).__name__} consists of {', '.join(children) or 'nothing'}"
        )


def _widen(backbone: nn.Module, frames: int) -> None:
    """Make the first convolution take super-images; its weights are divided by `frames`."""
    conv = next(module for module in backbone.modules() if isinstance(module, nn.Conv2d))
    if conv.in_channels != 3:
        raise InputError(
            f"the trunk's first convolution takes {conv.in_channels} channels; give a trunk for "
            f"RGB (in_chans=3), StNet itself widens it for {frames} frames per segment"
        )
    if frames > 1:
        conv.in_channels = 3 * frames
        conv.weight = nn.Parameter(conv.weight.detach().repeat(1, frames, 1, 1) / frames)


class TemporalXception(nn.Module):
    """Temporal Xception Block (TXB), then max over time: the aggregator of StNet.

    On cached features it is the Temporal Xception Network.

        x = BN(in) -> depthwise k3 -> pointwise -> BN -> ReLU
              |         -> depthwise k3 -> pointwise -> + -> BN -> ReLU -> max
              `-------------- pointwise ----------------'

    `out_dim` is dim/2 by default (2048 -> 1024 in StNet). TXB sees the order of frames.

    With a mask, the output equals that of the valid frames alone: they are moved together, so that
    neighbors in time stay neighbors, with the usual zero padding after the last one. Batch norm
    counts valid frames only.
    """

    sees_order = True

    def __init__(self, dim: int, out_dim: int | None = None) -> None:
        super().__init__()
        out_dim = dim // 2 if out_dim is None else out_dim
        if out_dim < 1:
            raise InputError(
                f"out_dim is {out_dim}; a Temporal Xception Block over {dim} channels needs "
                "at least 1"
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

    def forward(self, x: Frames, mask: Mask = None) -> Float[Tensor, "batch out_dim"]:
        x = blank_masked(x, mask)
        if mask is not None:
            x, mask = valid_first(x, mask)
        x = norm_valid_frames(self.norm_in, x, mask)
        long = self.pointwise1(over_time(self.depthwise1, x))
        long = norm_valid_frames(self.norm_long, long, mask).relu()
        long = self.pointwise2(over_time(self.depthwise2, long))
        # After the ReLU no valid frame is below the 0 of masked ones, which never win the max.
        return norm_valid_frames(self.norm_out, long + self.short(x), mask).relu().amax(1)


def over_time(conv: nn.Conv1d, x: Frames) -> Frames:
    """Convolve along `time`."""
    return conv(x.transpose(1, 2)).transpose(1, 2)
