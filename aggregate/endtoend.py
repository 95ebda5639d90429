"""Models that take frames: a backbone with an aggregator, or StNet; building and loading them.

A checkpoint records its backbone, and the backbone is loaded again from that record. If that fails,
it is an error: another backbone is never used instead.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float, UInt8
from torch import Tensor, nn

from aggregate.data.features import to_device
from aggregate.models import VideoClassifier, build
from aggregate.stnet import StNet
from aggregate.training.checkpoint import Checkpoint
from extract import InputError, Record
from extract.backbone.frozen import Backbone, load_backbone
from extract.backbone.networks import pip_weights_file
from extract.commands import command_line
from extract.decode.jobs import Plan
from extract.decode.transform import Clips, Preprocessing

if TYPE_CHECKING:
    from extract.backbone.model import Trunk


class FrameModel(nn.Module):
    """From decoded frames (uint8) to logits, for training and testing.

    `net` is a StNet, or a VideoClassifier with a `backbone` as one more child. In its state dict
    the head's tensors have the names of a classifier on cached features; the backbone's start with
    `backbone.`, and `extract --weights` reads them.
    """

    mean: Tensor  # mean of pixel values from 0 to 255
    std: Tensor

    def __init__(self, net: VideoClassifier | StNet, preprocessing: Preprocessing) -> None:
        super().__init__()
        self.net, self.preprocessing = net, preprocessing
        for name in ("mean", "std"):
            levels = torch.tensor(getattr(preprocessing, name)).view(3, 1, 1) * 255
            self.register_buffer(name, levels, persistent=False)

    def forward(
        self,
        frames: UInt8[Tensor, "batch time frames height width 3"],
        mask: Bool[Tensor, "batch time"] | None = None,
    ) -> Float[Tensor, "batch classes"]:
        """Logits. A StNet ignores the mask; for clip-wise backbones see `clip_features`."""
        device = self.mean.device
        pictures = self._normalize(to_device(frames, device))
        if isinstance(self.net, StNet):
            return self.net(pictures)
        backbone: Any = self.net.backbone
        features = backbone(pictures.flatten(0, 2).contiguous(memory_format=torch.channels_last))
        mask = None if mask is None or mask.all() else to_device(mask, device)
        return self.net(features.unflatten(0, pictures.shape[:2]), mask)

    def clip_features(
        self, clip: UInt8[Tensor, "length height width 3"]
    ) -> Float[Tensor, "rows dim"]:
        """Features of one clip, for a clip-wise backbone.

        `net` takes the features of all clips of a video.
        """
        backbone: Any = self.net.backbone
        pictures = self._normalize(to_device(clip, self.mean.device))
        recorded: Any = self.net.options
        return backbone(pictures.transpose(0, 1)[None]).reshape(-1, recorded["dim"])

    def _normalize(
        self, frames: UInt8[Tensor, "*shape height width 3"]
    ) -> Float[Tensor, "*shape 3 height width"]:
        return (frames.movedim(-1, -3).float() - self.mean) / self.std


def build_net(options: Mapping[str, Any], backbone: nn.Module) -> VideoClassifier | StNet:
    """Build the model of `Checkpoint.options` on a backbone without a classifier."""
    if options["name"] != "stnet":
        return _attach_backbone(backbone, build(**options))
    if options.get("form", "released") != "released":  # an option of earlier versions
        raise InputError(
            "a StNet of form 'paper' is no longer supported, only the released form; train it again"
        )
    net = StNet(
        backbone, options["num_classes"], options["frames_per_segment"], dropout=options["dropout"]
    )
    net.options = dict(options)  # type: ignore[assignment]  # as in a VideoClassifier
    return net


def _attach_backbone(backbone: nn.Module, head: VideoClassifier) -> VideoClassifier:
    head.backbone = backbone
    return head


def backbone_record(trunk: "Trunk") -> Record:
    """The record of a checkpoint's backbone: a store's provenance without the precision."""
    return {
        "backbone": trunk.name,
        "weights": dict(trunk.weights),
        "preprocessing": trunk.preprocessing.record(),
    }


def freeze_batch_norms(backbone: nn.Module) -> list[nn.Module]:
    """Freeze all batch norms but the first (TSN's partial BN): statistics and parameters.

    Returns them: they must be set to evaluation mode after every `train()`.
    """
    kind = nn.modules.batchnorm._BatchNorm
    norms = [module for module in backbone.modules() if isinstance(module, kind)][1:]
    for norm in norms:
        norm.eval().requires_grad_(False)
    return [*norms]


def backbone_from_record(
    checkpoint: Checkpoint, weights: Path | None = None, **execution: Any
) -> Backbone:
    """The recorded backbone for fast inference.

    `execution` holds device, precision and frames, see `load_backbone`. `weights` is the weights
    file, needed if no package has the weights. Raises InputError if the recorded backbone cannot be
    loaded.
    """
    backbone = load_backbone(**_backbone_arguments(checkpoint, weights), **execution)
    check_backbone(checkpoint, backbone, weights_file=weights)
    return backbone


def model_from_record(checkpoint: Checkpoint, weights: Path | None = None) -> FrameModel:
    """The whole model in fp32 on the CPU, in evaluation mode.

    Checkpoints of models on cached features are taken too. Raises InputError as
    `backbone_from_record` does.
    """
    from extract.backbone.model import load_trunk  # a second start of predict needs no timm

    arguments = _backbone_arguments(checkpoint, weights)
    if checkpoint.holds_backbone:
        net = build_net(checkpoint.options, load_trunk(arguments["name"], weights="random").module)
        net.load_state_dict(checkpoint.state_dict)
    else:
        trunk = load_trunk(**arguments)
        check_backbone(checkpoint, trunk, weights_file=weights)
        net = _attach_backbone(trunk.module, checkpoint.model())
    return FrameModel(net, preprocessing_of(checkpoint)).eval()


def check_backbone(
    checkpoint: Checkpoint, backbone: "Backbone | Trunk", *, weights_file: Path | None = None
) -> None:
    """Raise InputError unless `backbone` is the one that the checkpoint was trained on.

    Weights are compared by digest. The name of their file does not matter.
    """
    recorded: Record = {"preprocessing": preprocessing_of(checkpoint).record()}
    current = {"preprocessing": backbone.preprocessing.record()}
    if "config" in checkpoint.features:  # of a model of transformers
        recorded["config"] = checkpoint.features["config"]
        current["config"] = backbone.extra.get("config", {})
    name, weights = checkpoint.features["backbone"], checkpoint.features["weights"]
    if recorded != current and (name == backbone.name or checkpoint.holds_backbone):
        from extract.store import difference

        changes = "; ".join(difference(recorded, current, then="in the checkpoint"))
        raise InputError(
            f"{checkpoint.path} was trained on another {backbone.name}: {changes}; use "
            "the version of timm, or the files of the model's folder, that it was trained with"
        )
    if checkpoint.holds_backbone:
        return  # the checkpoint's own tensors are used
    key = "sha256" if "sha256" in weights else "name"
    if name != backbone.name or backbone.weights.get(key) != weights[key]:
        source = f"the installed weights of {backbone.name}"
        if weights_file:
            source = f"--weights {weights_file}"
        raise InputError(
            f"{source} are not those {checkpoint.path} was trained on: "
            f"{_description(backbone.weights)} instead of {_description(weights)} of {name}"
        )


def preprocessing_of(checkpoint: Checkpoint) -> Preprocessing:
    """The preprocessing that a checkpoint records. Raises InputError if it records no backbone."""
    record = checkpoint.features
    if not {"backbone", "weights", "preprocessing"} <= set(record):
        raise InputError(
            f"{checkpoint.path} was trained on features made elsewhere: "
            f"it records no backbone for videos, only {record}; "
            f"give --features to {command_line('aggregate.evaluate')}"
        )
    return Preprocessing.from_record(record["preprocessing"])


def clips_of(checkpoint: Checkpoint) -> Clips | None:
    """The clips that a checkpoint's backbone takes; None if it takes single frames."""
    record = checkpoint.features.get("clips")
    return None if record is None else Clips(**record)


def plan_of(checkpoint: Checkpoint, segments: int, crops: int = 1) -> Plan:
    """The decoding plan of a checkpoint: the middle frames or clips of a video's segments."""
    clip: dict[str, Any] = {"clip_length": checkpoint.options.get("frames_per_segment", 1)}
    if clips := clips_of(checkpoint):
        clip = {"clip_length": clips.frames, "clip_fps": clips.fps}
    return Plan(segments, crops, 0, preprocessing_of(checkpoint), **clip)


def _backbone_arguments(checkpoint: Checkpoint, weights: Path | None) -> dict[str, Any]:
    """Keyword arguments for `load_trunk` and `load_backbone`."""
    size = preprocessing_of(checkpoint).size
    name, recorded = checkpoint.features["backbone"], checkpoint.features["weights"]
    if checkpoint.holds_backbone:
        if weights is not None:
            raise InputError(
                f"--weights {weights}: the fine-tuned {checkpoint.path} holds its own backbone; "
                "drop it"
            )
        return {"name": name, "weights": checkpoint.path, "seed": 0}
    options: dict[str, Any] = {"image_size": size} if isinstance(size, int) else {}
    if clips := clips_of(checkpoint):
        options = {"clip_frames": clips.frames, "clip_fps": clips.fps, "per_clip": clips.per_clip}
        options["processor"] = preprocessing_of(checkpoint).processor
    if seed := re.fullmatch(r"random weights, seed (-?\d+)", recorded["name"]):
        if weights is not None:
            raise InputError(
                f"--weights {weights}: {checkpoint.path} was trained on {recorded['name']}; drop it"
            )
        return {"name": name, "weights": "random", "seed": int(seed[1]), **options}
    file: Path | str = weights or "pretrained"
    if weights is None and "sha256" in recorded and not name.startswith("hf/"):  # not timm's
        file = pip_weights_file(name)
        if Path(file).name != recorded["name"]:
            raise InputError(
                f"{checkpoint.path} was trained on {name} with weights {recorded['name']} "
                f"(SHA-256 {recorded['sha256'][:12]}...); "
                f"give that file: --weights {recorded['name']}"
            )
    return {"name": name, "weights": file, "seed": 0, **options}


def _description(weights: dict[str, str]) -> str:
    return weights["name"] + (f" (SHA-256 {weights['sha256']})" if "sha256" in weights else "")
