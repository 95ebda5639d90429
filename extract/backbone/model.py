"""A backbone without its classifier: the module, what it must be shown, and where its weights come
from.

NAME, timm/NAME, hf-hub:OWNER/NAME   timm's image models (image_models.py)
torchvision/NAME, hf/FOLDER_OR_ID    clip-wise video models (video_models.py)
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.func import functional_call

from extract import InputError
from extract.backbone import image_models
from extract.backbone.networks import absolute_name, pip_weights_file
from extract.backbone.video_models import load_video_model
from extract.backbone.weights import load_weights
from extract.cli import counted
from extract.decode.transform import Clips, PerClip, Preprocessing, is_clip_wise


@dataclass(frozen=True)
class Trunk:
    """A module without classifier (fp32, on the CPU, in evaluation mode), and where its weights
    come from.

    The module maps float [n, 3, height, width] to [n, dim]. With `clips`, it is a clip-wise
    backbone, and maps [n, 3, L, height, width] to [n, dim], which are `clips.rows` rows of
    features, one after the other.
    """

    name: str
    module: nn.Module
    dim: int
    preprocessing: Preprocessing
    weights: dict[str, str]  # name, and sha256 if it is a file
    clips: Clips | None = None

    @property
    def input_shape(self) -> tuple[int, ...]:
        """What it sees at once, as decoded, uint8: [height, width, 3], or [L, height, width, 3]."""
        length = (self.clips.frames,) if self.clips else ()
        return (*length, *self.preprocessing.frame_shape)

    def example(self) -> Tensor:
        """A normalized input, always the same, to try a network on: float32 [1, 3, ...], stored
        channels-last."""
        noise = torch.randn(
            1, 3, *self.input_shape[:-1], generator=torch.Generator().manual_seed(0)
        )
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
) -> Trunk:
    """Build the model `name` without its classifier and load `weights` into it.

    weights: "pretrained" (the published weights; for tf_efficientnet_lite0/1/2 those of an
    installed pip package), "random" (a function of `seed` only), or a file (see
    extract/backbone/weights.py). image_size: pixels per side, if not those that the weights were
    trained at. clip_frames, clip_fps: of clip-wise backbones, if not the model's own. per_clip:
    "mean", one row of features per clip, or "time", one per temporal position. Raises InputError
    for an unknown name, weights that cannot be had or do not fit, options that the model does not
    take, and preprocessing we do not do.
    """
    if is_clip_wise(name):
        if image_size is not None:
            raise InputError(
                f"--image-size {image_size}: {name} is clip-wise; only timm's image models take another size"
            )
        return _video_trunk(
            absolute_name(name), str(weights), seed, clip_frames, clip_fps, per_clip
        )
    if clip_frames is not None or clip_fps is not None or per_clip != "mean":
        raise InputError(
            "--clip-frames, --clip-fps and --per-clip are for clip-wise backbones (torchvision/..., hf/...); "
            f"{name} sees single frames"
        )
    return _image_trunk(name, str(weights), seed, image_size)


def _image_trunk(name: str, source: str, seed: int, image_size: int | None) -> Trunk:
    name = image_models.registry_name(name)
    if source == "pretrained":
        source = pip_weights_file(name) or source
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        module = (
            image_models.pretrained(name) if source == "pretrained" else image_models.create(name)
        )
    if source == "random":
        record = {"name": f"random weights, seed {seed}"}
    elif source == "pretrained":
        record = {"name": f"timm {image_models.published(module)}"}
    else:
        record = load_weights(module, source, name=name)
    _check_finite(module, source)
    module.eval()
    if image_size is not None:
        image_models.set_image_size(module, name, image_size)
    preprocessing = image_models.preprocessing_of(
        cast(dict[str, Any], module.pretrained_cfg), name, image_size=image_size
    )
    shape = _probe(
        module, torch.zeros(1, 3, *preprocessing.frame_shape[:2]), "--image-size", name=name
    )
    if len(shape) != 1:
        raise InputError(
            f"--backbone {name}: its output per frame is {shape}, expected one vector [dim]"
        )
    return Trunk(
        name=name, module=module, dim=shape[0], preprocessing=preprocessing, weights=record
    )


def _video_trunk(
    name: str,
    source: str,
    seed: int,
    clip_frames: int | None,
    clip_fps: float | None,
    per_clip: PerClip,
) -> Trunk:
    if clip_frames is not None and clip_frames < 1:
        raise InputError(f"--clip-frames {clip_frames}: expected at least 1")
    if clip_fps is not None and not clip_fps > 0:
        raise InputError(f"--clip-fps {clip_fps:g}: expected more than 0 frames per second")
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        model = load_video_model(
            name,
            weights=source,
            seed=seed,
            clip_frames=clip_frames,
            clip_fps=clip_fps,
            per_clip=per_clip,
        )
    module = model.module.eval()
    _check_finite(module, source)
    height, width, _ = model.preprocessing.frame_shape
    # Shapes alone: a forward pass of a long clip takes half a minute on a CPU.
    tensors = chain(module.named_parameters(), module.named_buffers())
    on_meta = partial(functional_call, module, {key: value.to("meta") for key, value in tensors})
    clip = torch.zeros(1, 3, model.clip_frames, height, width, device="meta")
    shape = _probe(on_meta, clip, "--clip-frames", name=name)
    if len(shape) != 2:
        raise InputError(
            f"--backbone {name}: its output per clip is {shape}, expected vectors [positions, dim]"
        )
    clips = Clips(model.clip_frames, model.clip_fps, per_clip, rows=shape[0])
    module = nn.Sequential(module, nn.Flatten())
    return Trunk(name, module, shape[0] * shape[1], model.preprocessing, model.weights, clips)


def _check_finite(module: nn.Module, source: str) -> None:
    """Not left to the features: OpenVINO's ReLU makes 0 of what is not a number."""
    damaged = [name for name, value in module.state_dict().items() if not value.isfinite().all()]
    if damaged:
        raise InputError(
            f"--weights {source}: {counted(damaged, 'tensors hold values that are not finite')}; "
            "the file is damaged, or its training diverged"
        )


@torch.inference_mode()
def _probe(module: Callable[[Tensor], Any], pixels: Tensor, option: str, *, name: str) -> list[int]:
    """The shape of the features of a black frame or clip: pixels [1, 3, ...]."""
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
