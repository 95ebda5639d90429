"""Models that see frames: a backbone and an aggregator trained together, or StNet; how they are
built and saved.

The backbone that a checkpoint was trained on is found again from its record: never another one,
never in silence.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float, UInt8
from torch import Tensor, nn

from aggregate.data.features import there
from aggregate.models import VideoClassifier, build
from aggregate.stnet import StNet
from aggregate.training.checkpoint import Checkpoint
from extract import InputError
from extract.backbone.frozen import Backbone, load_backbone
from extract.backbone.networks import pip_weights_file
from extract.commands import command_line
from extract.decode.transform import Clips, Preprocessing

if TYPE_CHECKING:
    from extract.backbone.model import Trunk


class FrameModel(nn.Module):
    """What training and testing call: uint8 frames as decoded in, logits out.

    `net` is a StNet, or a VideoClassifier with a `backbone` beside it: its state has the backbone's
    tensors below `backbone.`, so that classifiers trained on cached features fit in, and `extract
    --weights` takes the backbone.
    """

    mean: Tensor  # of levels from 0 to 255
    std: Tensor

    def __init__(
        self, net: VideoClassifier | StNet, preprocessing: Preprocessing, clips: Clips | None = None
    ) -> None:
        super().__init__()
        self.net, self.preprocessing, self.clips = net, preprocessing, clips
        for name in ("mean", "std"):
            self.register_buffer(
                name,
                torch.tensor(getattr(preprocessing, name)).view(3, 1, 1) * 255,
                persistent=False,
            )

    def forward(
        self,
        frames: UInt8[Tensor, "batch time frames height width 3"],
        mask: Bool[Tensor, "batch time"] | None = None,
    ) -> Float[Tensor, "batch classes"]:
        """A StNet sees every segment, whatever the mask. Of clip-wise backbones see
        `clip_features`."""
        device = self.mean.device
        pictures = self._normalized(there(frames, device))
        if isinstance(self.net, StNet):
            return self.net(pictures)
        backbone: Any = self.net.backbone
        features = backbone(pictures.flatten(0, 2).contiguous(memory_format=torch.channels_last))
        mask = None if mask is None or mask.all() else there(mask, device)
        return self.net(features.unflatten(0, pictures.shape[:2]), mask)

    def clip_features(
        self, clip: UInt8[Tensor, "length height width 3"]
    ) -> Float[Tensor, "rows dim"]:
        """Of one clip of a clip-wise backbone; `net` takes those of all clips of a video."""
        backbone: Any = self.net.backbone
        pictures = self._normalized(there(clip, self.mean.device))
        recorded: Any = self.net.options
        return backbone(pictures.transpose(0, 1)[None]).reshape(-1, recorded["dim"])

    def _normalized(
        self, frames: UInt8[Tensor, "*shape height width 3"]
    ) -> Float[Tensor, "*shape 3 height width"]:
        return (frames.movedim(-1, -3).float() - self.mean) / self.std


def build_net(options: Mapping[str, Any], backbone: nn.Module) -> VideoClassifier | StNet:
    """The model of `Checkpoint.options` round a backbone without classifier. InputError for blocks
    of another form."""
    if options["name"] != "stnet":
        return _over(backbone, build(**options))
    if options.get("form", "released") != "released":  # an option of earlier versions
        raise InputError(
            "a StNet of form 'paper' is built no more, only the released form; train it anew"
        )
    net = StNet(
        backbone, options["num_classes"], options["frames_per_segment"], dropout=options["dropout"]
    )
    net.options = dict(options)  # type: ignore[assignment]  # as a VideoClassifier has them
    return net


def _over(backbone: nn.Module, head: VideoClassifier) -> VideoClassifier:
    head.backbone = backbone
    return head


def backbone_record(trunk: "Trunk") -> dict[str, Any]:
    """What a checkpoint keeps of its backbone: as a store's provenance has it, without the
    precision."""
    return {
        "backbone": trunk.name,
        "weights": dict(trunk.weights),
        "preprocessing": trunk.preprocessing.record(),
    }


def freeze_batch_norms(backbone: nn.Module) -> list[nn.Module]:
    """TSN's partial BN: all batch norms of the trunk but the first keep their statistics and
    affine; returns them.

    They must be put back to evaluation mode after every `train()`.
    """
    kind = nn.modules.batchnorm._BatchNorm
    norms = [module for module in backbone.modules() if isinstance(module, kind)][1:]
    for norm in norms:
        norm.eval().requires_grad_(False)
    return [*norms]


def backbone_from_record(
    checkpoint: Checkpoint, weights: Path | None = None, **how: Any
) -> Backbone:
    """The backbone, made fast as `how` says (device, precision, frames: see `load_backbone`).

    `weights`: the file, where the record's is in no package. Raises InputError where the backbone
    cannot be had, or where it is not the recorded one.
    """
    backbone = load_backbone(**_source(checkpoint, weights), **how)
    check_backbone(checkpoint, backbone, given=weights)
    return backbone


def model_from_record(checkpoint: Checkpoint, weights: Path | None = None) -> FrameModel:
    """The whole model in fp32 on the CPU, in evaluation mode, from a checkpoint of cached features
    too.

    Raises InputError as `backbone_from_record`.
    """
    from extract.backbone.model import load_trunk  # a second start of predict needs no timm

    source = _source(checkpoint, weights)
    if checkpoint.holds_backbone:
        net = build_net(checkpoint.options, load_trunk(source["name"], weights="random").module)
        net.load_state_dict(checkpoint.state_dict)
    else:
        trunk = load_trunk(**source)
        check_backbone(checkpoint, trunk, given=weights)
        net = _over(trunk.module, checkpoint.model())
    return FrameModel(net, preprocessing_of(checkpoint), clips_of(checkpoint)).eval()


def check_backbone(
    checkpoint: Checkpoint, made: "Backbone | Trunk", *, given: Path | None = None
) -> None:
    """InputError unless `made` is what the checkpoint was trained on, whatever its file is called
    now."""
    see = preprocessing_of(checkpoint)
    if made.preprocessing != see:
        raise InputError(
            f"{checkpoint.path} was trained with {see}; the {made.name} of this version of timm takes "
            f"{made.preprocessing}"
        )
    if checkpoint.holds_backbone:
        return  # the checkpoint's own tensors
    name, recorded = checkpoint.features["backbone"], checkpoint.features["weights"]
    key = "sha256" if "sha256" in recorded else "name"
    if name != made.name or made.weights.get(key) != recorded[key]:
        where = f"--weights {given}" if given else f"the weights of {made.name} at hand"
        raise InputError(
            f"{where} are not those {checkpoint.path} was trained on: {_words(made.weights)} instead of "
            f"{_words(recorded)} of {name}"
        )


def preprocessing_of(checkpoint: Checkpoint) -> Preprocessing:
    """The preprocessing that a checkpoint records. InputError for none."""
    record = checkpoint.features
    if not {"backbone", "weights", "preprocessing"} <= set(record):
        raise InputError(
            f"{checkpoint.path} was trained on features made elsewhere: it records no backbone that could see videos, "
            f"only {record}; give --features to {command_line('aggregate.evaluate')}"
        )
    see = record["preprocessing"]
    return Preprocessing.from_record(see)


def clips_of(checkpoint: Checkpoint) -> Clips | None:
    """The clips that a checkpoint's backbone saw, None if it sees single frames."""
    record = checkpoint.features.get("clips")
    return None if record is None else Clips(**record)


def _source(checkpoint: Checkpoint, weights: Path | None) -> dict[str, Any]:
    """Keywords of `load_trunk` and `load_backbone`."""
    size = preprocessing_of(checkpoint).size
    if checkpoint.holds_backbone:
        if weights is not None:
            raise InputError(
                f"--weights {weights}: the fine-tuned {checkpoint.path} holds its own backbone; drop it"
            )
        return {"name": checkpoint.features["backbone"], "weights": checkpoint.path, "seed": 0}
    name, recorded = checkpoint.features["backbone"], checkpoint.features["weights"]
    if clips := clips_of(checkpoint):
        options = {"clip_frames": clips.frames, "clip_fps": clips.fps, "per_clip": clips.per_clip}
    else:
        options = {"image_size": size} if isinstance(size, int) else {}
    seed = re.fullmatch(r"random weights, seed (-?\d+)", recorded["name"])
    if seed and weights is not None:
        raise InputError(
            f"--weights {weights}: {checkpoint.path} was trained on {recorded['name']}; drop it"
        )
    if seed:
        return {"name": name, "weights": "random", "seed": int(seed[1]), **options}
    file: Path | str = weights or "pretrained"
    if weights is None and "sha256" in recorded and not name.startswith("hf/"):  # not timm's own
        file = pip_weights_file(name)
        if Path(file).name != recorded["name"]:
            raise InputError(
                f"{checkpoint.path} was trained on {name} with weights {recorded['name']} "
                f"(SHA-256 {recorded['sha256'][:12]}...); give that file: --weights {recorded['name']}"
            )
    return {"name": name, "weights": file, "seed": 0, **options}


def _words(weights: dict[str, str]) -> str:
    return weights["name"] + (f" (SHA-256 {weights['sha256']})" if "sha256" in weights else "")
