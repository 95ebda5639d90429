"""Load a backbone without its classifier: the module, its preprocessing and its weights.

NAME, timm/NAME, hf-hub:OWNER/NAME   timm's image models (image_models.py)
torchvision/NAME, hf/FOLDER_OR_ID    clip-wise video models (video_models.py)
"""

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.func import functional_call

from extract import InputError
from extract.backbone import image_models
from extract.backbone.networks import NetworkRecord, absolute_name, pip_weights_file
from extract.backbone.video_models import load_video_model
from extract.backbone.weights import load_weights
from extract.cli import counted
from extract.decode.transform import Clips, PerClip, Processor, is_clip_wise

# Names of buffers that may be infinite end so: the bounds of clipped layers (Gemma 4: `input_min`).
_BOUNDS = ("_min", "_max")


@dataclass(frozen=True, kw_only=True)
class Trunk(NetworkRecord):
    """A network as a module without classifier, in fp32 on the CPU and in evaluation mode.

    The module maps float [n, 3, height, width] to [n, dim]. A clip-wise backbone (with `clips`)
    maps [n, 3, L, height, width] to [n, dim]: `clips.rows` rows of features, one after the other.
    """

    module: nn.Module

    @property
    def record(self) -> NetworkRecord:
        """The record without the module."""
        values = {field.name: getattr(self, field.name) for field in fields(NetworkRecord)}
        return NetworkRecord(**values)

    def example(self) -> Tensor:
        """A constant normalized input to test a network on: float32 [1, 3, ...], channels-last."""
        generator = torch.Generator().manual_seed(0)
        noise = torch.randn(1, 3, *self.input_shape[:-1], generator=generator)
        return noise.movedim(1, -1).contiguous().movedim(-1, 1)


def load_trunk(
    name: str,
    *,
    weights: str | Path,
    seed: int = 0,
    image_size: int | None = None,
    clip_frames: int | None = None,
    clip_fps: float | None = None,
    per_clip: PerClip = "mean",
    processor: Processor | None = None,
) -> Trunk:
    """Build the model `name` without its classifier and load `weights` into it.

    Args:
        weights: "pretrained" (the published weights; for tf_efficientnet_lite0/1/2 those of an
            installed pip package), "random" (a function of `seed` only), or a file (see
            extract/backbone/weights.py).
        image_size: pixels per side, by default those that the weights were trained with.
        clip_frames, clip_fps: of a clip-wise backbone, by default the model's own.
        per_clip: "mean" for one row of features per clip, "time" for one per temporal position.
        processor: of a clip-wise backbone's `Preprocessing`, by default its library's.

    Raises InputError for an unknown name, for weights that are not available or do not fit, for
    options that the model does not take, and for preprocessing that is not supported.
    """
    source = str(weights)
    # Random weights are a function of the seed alone, not of earlier random numbers.
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        if is_clip_wise(name):
            if image_size is not None:
                raise InputError(
                    f"--image-size {image_size}: {name} is clip-wise; only timm's image models "
                    "take another size"
                )
            trunk = _video_trunk(absolute_name(name), source, clip_frames, clip_fps, per_clip)
            if processor is not None:
                see = replace(trunk.preprocessing, processor=processor)
                trunk = replace(trunk, preprocessing=see)
        else:
            if clip_frames is not None or clip_fps is not None or per_clip != "mean":
                raise InputError(
                    "--clip-frames, --clip-fps and --per-clip are for clip-wise backbones "
                    f"(torchvision/..., hf/...); {name} sees single frames"
                )
            trunk = _image_trunk(name, source, image_size)
    if source == "random":
        trunk = replace(trunk, weights={"name": f"random weights, seed {seed}"})
    return trunk


def _image_trunk(name: str, source: str, image_size: int | None) -> Trunk:
    name = image_models.registry_name(name)
    if source == "pretrained":
        source = pip_weights_file(name) or source
    if source == "pretrained":
        module = image_models.pretrained(name)
        record = {"name": f"timm {image_models.published(module)}"}
    else:
        module = image_models.create(name)
        record = {} if source == "random" else load_weights(module, source, name=name)
    _check_finite(module, source)
    module.eval()
    if image_size is not None:
        image_models.set_image_size(module, name, image_size)
    config = cast(dict[str, Any], module.pretrained_cfg)
    preprocessing = image_models.preprocessing_of(config, name, image_size=image_size)
    frame = torch.zeros(1, 3, *preprocessing.frame_shape[:2])
    shape = _feature_shape(module, frame, "--image-size", name=name)
    if len(shape) != 1:
        raise InputError(
            f"--backbone {name}: its output per frame is {shape}, expected one vector [dim]"
        )
    return Trunk(
        name=name, dim=shape[0], preprocessing=preprocessing, weights=record, module=module
    )


def _video_trunk(
    name: str, source: str, clip_frames: int | None, clip_fps: float | None, per_clip: PerClip
) -> Trunk:
    model = load_video_model(name, weights=source, clip_frames=clip_frames, per_clip=per_clip)
    module = model.module.eval()
    _check_finite(module, source)
    height, width, _ = model.preprocessing.frame_shape
    # Shapes alone: a forward pass of a long clip takes half a minute on a CPU.
    tensors = chain(module.named_parameters(), module.named_buffers())
    on_meta = partial(functional_call, module, {key: value.to("meta") for key, value in tensors})
    clip = torch.zeros(1, 3, model.clip_frames, height, width, device="meta")
    shape = _feature_shape(on_meta, clip, "--clip-frames", name=name)
    if len(shape) != 2:
        raise InputError(
            f"--backbone {name}: its output per clip is {shape}, expected vectors [positions, dim]"
        )
    return Trunk(
        name=name,
        dim=shape[0] * shape[1],
        preprocessing=model.preprocessing,
        weights=model.weights,
        clips=Clips(model.clip_frames, clip_fps or model.clip_fps, per_clip, rows=shape[0]),
        module=nn.Sequential(module, nn.Flatten()),
        extra={"config": model.config} if model.config else {},
    )


def _check_finite(module: nn.Module, source: str) -> None:
    """InputError for weights that are not finite. Features may not show them: OpenVINO's ReLU turns
    NaN into 0."""
    damaged = [
        name
        for name, value in module.state_dict().items()
        if not value.isfinite().all() and (value.isnan().any() or not name.endswith(_BOUNDS))
    ]
    if damaged:
        raise InputError(
            f"--weights {source}: {counted(damaged, 'tensors hold values that are not finite')}; "
            "the file is damaged, or its training diverged"
        )


@torch.inference_mode()
def _feature_shape(
    module: Callable[[Tensor], Any], pixels: Tensor, option: str, *, name: str
) -> list[int]:
    """The shape of a module's features for one frame or clip, pixels [1, 3, ...].

    option: the flag to change if the module does not take that size.
    """
    try:
        features = module(pixels)
    except (RuntimeError, AssertionError, ValueError) as error:
        reason = str(error).strip().partition("\n")[0]
        size = " x ".join(map(str, pixels.shape[2:]))
        raise InputError(
            f"--backbone {name}: does not take {size} ({reason}); change {option}, or leave it out"
        ) from None
    if not isinstance(features, Tensor):
        raise InputError(
            f"--backbone {name}: its output is a {type(features).__name__}, expected vectors"
        )
    return list(features.shape[1:])
