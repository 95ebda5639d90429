"""Models that see frames: a backbone and an aggregator trained together, or StNet; how they are built and saved."""

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Bool, Float, UInt8
from torch import Tensor, nn

from aggregate.data.frames import normalised
from aggregate.models import VideoClassifier, build
from aggregate.stnet import StNet
from extract.backbone.model import Trunk
from extract.cli import InputError
from extract.decode.transform import Preprocessing


class EndToEnd(VideoClassifier):
    """`backbone` over every frame, then the aggregator and classifier of a VideoClassifier.

    Its state has the backbone's tensors below `backbone.` and the rest as a VideoClassifier, so classifiers trained on
    cached features fit in, and `extract --weights` takes the backbone.
    """

    def __init__(self, backbone: nn.Module, head: VideoClassifier) -> None:
        super().__init__(
            head.aggregator,
            num_classes=head.classifier.out_features,
            dropout=head.dropout.p,
            options=head.options,
        )
        self.classifier = head.classifier
        self.backbone = backbone

    def forward(  # type: ignore[override]  # frames, where the parent takes their features
        self,
        frames: Float[Tensor, "batch time 1 3 height width"],
        mask: Bool[Tensor, "batch time"] | None = None,
    ) -> Float[Tensor, "batch classes"]:
        features = self.backbone(frames.flatten(0, 2).contiguous(memory_format=torch.channels_last))
        return super().forward(features.unflatten(0, frames.shape[:2]), mask)


class Recogniser(nn.Module):
    """What training and testing call: uint8 frames as decoded in, logits out; `net` is an EndToEnd or a StNet."""

    def __init__(self, net: nn.Module, preprocessing: Preprocessing) -> None:
        super().__init__()
        self.net, self.preprocessing = net, preprocessing

    def forward(
        self, frames: UInt8[Tensor, "batch time frames height width 3"], mask: Bool[Tensor, "batch time"]
    ) -> Float[Tensor, "batch classes"]:
        device = next(self.net.parameters()).device
        pictures = normalised(frames, self.preprocessing.mean, self.preprocessing.std, device)
        if isinstance(self.net, StNet):
            return self.net(pictures)
        mask = mask.to(device)
        return self.net(pictures, None if mask.all() else mask)


def build_net(options: Mapping[str, Any], backbone: nn.Module) -> EndToEnd | StNet:
    """The model of `Checkpoint.options` round a backbone without classifier. InputError for blocks of another form."""
    if options["name"] != "stnet":
        return EndToEnd(backbone, build(**options))
    if options.get("form", "released") != "released":  # an option of earlier versions
        raise InputError("a StNet of form 'paper' is built no more, only the released form; train it anew")
    net = StNet(backbone, options["num_classes"], options["frames_per_segment"], dropout=options["dropout"])
    net.options = dict(options)  # type: ignore[assignment]  # as a VideoClassifier has them
    return net


def backbone_record(trunk: Trunk) -> dict[str, Any]:
    """What a checkpoint keeps of its backbone: a store's provenance, without the precision."""
    return {"name": trunk.name, "weights": dict(trunk.weights), "preprocessing": trunk.preprocessing.record()}


def freeze_batch_norms(backbone: nn.Module) -> list[nn.Module]:
    """TSN's partial BN: all batch norms of the trunk but the first keep their statistics and affine; returns them.

    They must be put back to evaluation mode after every `train()`.
    """
    norms = [module for module in backbone.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)][1:]
    for norm in norms:
        norm.eval()
        for parameter in norm.parameters(recurse=False):
            parameter.requires_grad_(False)
    return norms
