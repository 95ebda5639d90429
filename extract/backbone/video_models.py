"""Clip-wise backbones: torchvision's and transformers' video models, without their classifiers.

    torchvision/NAME       every model of torchvision.models.video
    hf/FOLDER, hf/OWNER/ID  V-JEPA 2, VideoMAE, TimeSformer and ViViT of transformers (an extra: hgnl-video[hf])

A module maps normalized clips, float [n, 3, L, height, width], to [n, P, dim]: one row of features
per clip (P = 1), or one per temporal position of the model.
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from PIL import Image
from torch import Tensor, nn

from extract import InputError
from extract.backbone.weights import (
    first_sentence,
    fit_weights,
    load_weights,
    offline_at_once,
    read_state_dict,
)
from extract.cli import counted
from extract.decode.transform import PerClip, Preprocessing
from extract.sources import sha256_of

# Clips of torchvision's weights, from their documentation: `clip_len` and `frame_rate`.
_TORCHVISION_CLIPS = {
    "r": (16, 15.0),
    "mc": (16, 15.0),
    "s3d": (128, 15.0),
    "mvit": (16, 7.5),
    "swin": (32, 15.0),
}
# Frames per second at which models of transformers were trained. Their configurations do not hold
# it; the training configurations of their authors do: V-JEPA 2 `fps: 4`; VideoMAE every 4th frame
# (of 30 per second); ViViT every 2nd of 25 per second (scenic: 250 frames in 10 s).
_HF_FPS = {"vjepa2": 4.0, "videomae": 7.5, "timesformer": 30 / 32, "vivit": 12.5}
# TimeSformer, by its frames per clip: 8 x 32 (base), 16 x 16 (HR) and 96 x 4 (L), at 30 per second.
_TIMESFORMER_FPS = {8: 30 / 32, 16: 30 / 16, 96: 30 / 4}


@dataclass(frozen=True)
class VideoModel:
    """A module as above in fp32, what it must be shown, and the record of its weights."""

    module: nn.Module
    preprocessing: Preprocessing
    weights: dict[str, str]
    clip_frames: int
    clip_fps: float


def load_video_model(
    name: str,
    *,
    weights: str,
    seed: int,
    clip_frames: int | None,
    clip_fps: float | None,
    per_clip: PerClip,
) -> VideoModel:
    """Build the model `name` and load `weights` ("pretrained", "random" or a file) into it.

    clip_frames, clip_fps: instead of the model's own. per_clip: "mean" (one row; the class token if
    there is one), or "time" (one per temporal position, a mean over space). Raises InputError for
    an unknown model, weights that cannot be had or do not fit, and `per_clip="time"` of a model
    that keeps no temporal positions.
    """
    kind, _, model_name = name.partition("/")
    load = _torchvision_model if kind == "torchvision" else _hf_model
    return load(
        model_name, weights, f"random weights, seed {seed}", clip_frames, clip_fps, per_clip
    )


# -- torchvision -----------------------------------------------------------------------------------------------------


class _TorchvisionTrunk(nn.Module):
    """A model of torchvision.models.video up to its classifier."""

    def __init__(self, net: Any, per_clip: PerClip):
        super().__init__()
        self.net = net
        if per_clip == "time":
            if not hasattr(net, "avgpool"):
                raise InputError(
                    "--per-clip time: an MViT has a class token, and no features per temporal position"
                )
            if hasattr(
                net, "classifier"
            ):  # s3d: its pooling keeps time, and its classifier's mean does not
                self.net = nn.Sequential(net.features, net.avgpool)
            else:
                net.avgpool = nn.AdaptiveAvgPool3d((None, 1, 1))

    def forward(self, clips: Tensor) -> Tensor:
        features = self.net(clips)
        if features.ndim == 5:  # [n, dim, P, height, width]
            return features.mean((3, 4)).transpose(1, 2)
        dim = cast(int, self.dim)
        return features.unflatten(1, (dim, -1)).transpose(1, 2)


def _torchvision_model(
    name: str,
    weights: str,
    random_record: str,
    clip_frames: int | None,
    clip_fps: float | None,
    per_clip: PerClip,
) -> VideoModel:
    from torchvision import models

    known = models.list_models(module=models.video)
    if name not in known:
        raise InputError(
            f"--backbone torchvision/{name}: unknown; torchvision has the video models {', '.join(known)}"
        )
    published = cast(Any, models.get_model_weights(name)).DEFAULT
    net: Any = models.get_model(name, weights=None)
    classifier = next(
        attribute for attribute in ("fc", "classifier", "head") if hasattr(net, attribute)
    )
    dim = _input_width(getattr(net, classifier))
    setattr(net, classifier, nn.Identity())
    net.pretrained_cfg = {"classifier": classifier}  # as timm's models name theirs
    if weights == "random":
        record = {"name": random_record}
    elif weights == "pretrained":
        record = {"name": f"torchvision {published}"}
        fit_weights(net, _download(published, name), published.url, f"torchvision/{name}")
    else:
        record = load_weights(net, weights, name=f"torchvision/{name}")
    trunk = _TorchvisionTrunk(net, per_clip)
    trunk.dim = dim  # type: ignore[assignment]
    preset = published.transforms()
    resize, size = preset.resize_size, preset.crop_size[0]
    preprocessing = Preprocessing(
        size=size,
        resize=resize[0] if len(resize) == 1 else (resize[0], resize[1]),
        interpolation=preset.interpolation.value,
        mean=tuple(preset.mean),
        std=tuple(preset.std),
        crop_mode="center" if len(resize) == 1 else "squash",
        antialias=False,  # VideoClassification.forward
    )
    frames, fps = next(
        clip for prefix, clip in _TORCHVISION_CLIPS.items() if name.startswith(prefix)
    )
    return VideoModel(trunk, preprocessing, record, clip_frames or frames, clip_fps or fps)


def _input_width(classifier: nn.Module) -> int:
    last = [module for module in classifier.modules() if isinstance(module, nn.Linear | nn.Conv3d)][
        -1
    ]
    return last.in_features if isinstance(last, nn.Linear) else last.in_channels


def _download(published: Any, name: str) -> dict[str, Tensor]:
    try:
        return published.get_state_dict(progress=True, check_hash=True)
    except Exception as error:  # no network, a damaged download
        raise InputError(
            f"--weights pretrained: the weights of torchvision/{name} cannot be had ({type(error).__name__}: {error}); "
            f"where there is a network, fetch {published.url.rpartition('/')[2]}, and pass it as --weights FILE"
        ) from error


# -- transformers ----------------------------------------------------------------------------------------------------


class _HfTrunk(nn.Module):
    """A model of transformers, its tokens pooled."""

    def __init__(self, model: Any, per_clip: PerClip, positions: int):
        super().__init__()
        self.model, self.kind = model, model.config.model_type
        self.per_clip, self.positions = per_clip, positions

    def forward(self, clips: Tensor) -> Tensor:
        frames = clips.transpose(1, 2)
        if self.kind == "vjepa2":
            tokens = self.model(pixel_values_videos=frames, skip_predictor=True).last_hidden_state
        else:
            tokens = self.model(pixel_values=frames).last_hidden_state
        has_class_token = self.kind in ("timesformer", "vivit")
        if self.per_clip == "mean":
            return tokens[:, :1] if has_class_token else tokens.mean(1, keepdim=True)
        patches = tokens[:, 1:] if has_class_token else tokens
        if self.kind == "timesformer":  # all frames of a patch follow each other
            return patches.unflatten(1, (-1, self.positions)).mean(1)
        return patches.unflatten(1, (self.positions, -1)).mean(2)


def _hf_model(
    name: str,
    weights: str,
    random_record: str,
    clip_frames: int | None,
    clip_fps: float | None,
    per_clip: PerClip,
) -> VideoModel:
    try:
        from transformers import AutoConfig, AutoModel, AutoVideoProcessor, logging
    except ImportError:
        raise InputError(
            f"--backbone hf/{name}: needs transformers; pip install 'hgnl-video[hf]'"
        ) from None
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    folder = _hf_folder(name, with_weights=weights == "pretrained")
    try:
        config: Any = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        processor: Any = AutoVideoProcessor.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        reason = first_sentence(error)
        raise InputError(
            f"--backbone hf/{name}: its configuration cannot be read ({reason})"
        ) from None
    kind = config.model_type
    if kind not in _HF_FPS:
        raise InputError(
            f"--backbone hf/{name}: a model of type {kind}; supported are {', '.join(_HF_FPS)}"
        )
    frames_key = "frames_per_clip" if kind == "vjepa2" else "num_frames"
    own_frames = getattr(config, frames_key)
    usual_fps = _HF_FPS[kind]
    if kind == "timesformer":
        usual_fps = _TIMESFORMER_FPS.get(own_frames, usual_fps)
    frames = clip_frames or own_frames
    setattr(config, frames_key, frames)
    if weights == "random":
        model, record = AutoModel.from_config(config), {"name": random_record}
    else:
        files = _weight_files(folder, name) if weights == "pretrained" else [Path(weights)]
        model, record = _hf_with_weights(config, files, name)
    tubelet = (
        1 if kind == "timesformer" else config.tubelet_size
    )  # frames, or (frames, height, width)
    tubelet = tubelet if isinstance(tubelet, int) else tubelet[0]
    fps = clip_fps or getattr(processor, "fps", None) or usual_fps
    trunk = _HfTrunk(model, per_clip, frames // tubelet)
    return VideoModel(trunk, _hf_preprocessing(processor, name), record, frames, float(fps))


def _hf_folder(name: str, *, with_weights: bool) -> Path:
    folder = Path(name)
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise InputError(f"--backbone hf/{name}: the folder holds no config.json")
        if not any(
            (folder / f"{kind}preprocessor_config.json").is_file() for kind in ("", "video_")
        ):
            raise InputError(f"--backbone hf/{name}: the folder holds no preprocessor_config.json")
        return folder
    from huggingface_hub import snapshot_download

    try:
        with offline_at_once():
            downloaded = Path(snapshot_download(name, allow_patterns=["*.json"]))
            if with_weights:
                for patterns in (["model*.safetensors"], ["pytorch_model*.bin"]):
                    snapshot_download(name, allow_patterns=patterns)
                    if list(downloaded.glob(patterns[0])):
                        break
    except Exception as error:  # no network, no such id, a name that cannot be one
        raise InputError(
            f"--backbone hf/{name}: is not a folder, and cannot be had from the Hugging Face hub "
            f"({type(error).__name__}: {first_sentence(error)})"
        ) from None
    return downloaded


def _weight_files(folder: Path, name: str) -> list[Path]:
    files = sorted(folder.glob("model*.safetensors")) or sorted(folder.glob("pytorch_model*.bin"))
    if not files:
        raise InputError(
            f"--backbone hf/{name} --weights pretrained: {folder} holds neither model.safetensors nor "
            "pytorch_model.bin; give --weights FILE, or random"
        )
    return files


def _hf_with_weights(config: Any, files: list[Path], name: str) -> tuple[nn.Module, dict[str, str]]:
    """The model with the tensors of `files`. InputError unless every one of them has arrived."""
    from transformers import AutoModel

    state: dict[str, Tensor] = {}
    digests = []
    for file in files:
        state |= read_state_dict(file)
        digests.append(sha256_of(file))
    # Of several files, the digest of their digests.
    sha256 = (
        digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()
    )
    kind: Any = AutoModel._model_mapping[type(config)]
    model, info = kind.from_pretrained(
        None,
        config=config,
        state_dict=dict(state),
        dtype=torch.float32,
        ignore_mismatched_sizes=True,  # they are named below
        output_loading_info=True,
    )
    expected = model.state_dict()
    # transformers renames VideoMAE's biases, and leaves them at 0.
    for key, value in state.items():
        own = key.removeprefix(f"{model.base_model_prefix}.")
        own = own.replace(".q_bias", ".query.bias").replace(".v_bias", ".value.bias")
        if key.endswith((".q_bias", ".v_bias")) and own in expected:
            expected[own].copy_(value)
    _refuse_what_did_not_arrive(model, state, info, files[0], name)
    return model, {
        "name": f"{name.rstrip('/').rpartition('/')[2]}/{files[0].name}",
        "sha256": sha256,
    }


def _refuse_what_did_not_arrive(
    model: Any, state: dict[str, Tensor], info: Any, file: Path, name: str
) -> None:
    """Compare the tensors of a file with those of the model, by value: names change on the way."""
    prefix = f"{model.base_model_prefix}."
    of_a_whole_model = any(
        key.startswith(prefix) for key in state
    )  # then the rest is its classifier or decoder
    arrived = {_fingerprint(value) for value in model.state_dict().values()}
    lost = [
        key
        for key, value in state.items()
        if (key.startswith(prefix) or not of_a_whole_model) and _fingerprint(value) not in arrived
    ]
    unused = ("pooler.", "predictor.")  # of ViViT and V-JEPA 2: not on the way to the features
    missing = [key for key in info["missing_keys"] if not key.startswith(unused)]
    misshapen = [key for key, *_ in info["mismatched_keys"]]
    problems = {
        "tensors of the file were not taken": lost,
        "are missing": missing,
        "have another shape": misshapen,
    }
    reasons = [counted(sorted(keys), problem) for problem, keys in problems.items() if keys]
    if reasons:
        raise InputError(
            f"--weights {file} does not fit --backbone hf/{name}: {'; '.join(reasons)}"
        )


def _fingerprint(value: Tensor) -> str:
    content = value.detach().to(torch.float32).contiguous().numpy().tobytes()
    return f"{value.numel()} {hashlib.sha256(content).hexdigest()}"


def _hf_preprocessing(processor: Any, name: str) -> Preprocessing:
    """`preprocessor_config.json`, as the model's own processor reads it."""
    size, crop = processor.size, processor.crop_size
    if not processor.do_resize or not (size.shortest_edge or size.height):
        raise InputError(
            f"--backbone hf/{name}: its preprocessor resizes to {dict(size)}; expected a size"
        )
    squash = not size.shortest_edge
    resize = (size.height, size.width) if squash else size.shortest_edge
    if processor.do_center_crop:
        cropped = (crop.height, crop.width)
    elif squash:
        cropped = resize
    else:
        raise InputError(
            f"--backbone hf/{name}: its preprocessor does not crop, so frames have no constant size"
        )
    # (frame * factor - offset - mean) / std, as (frame / 255 - mean) / std
    factor = 255 * (processor.rescale_factor if processor.do_rescale else 1.0)
    offset = 1.0 if getattr(processor, "offset", False) else 0.0
    mean = processor.image_mean if processor.do_normalize else (0.0,) * 3
    std = processor.image_std if processor.do_normalize else (1.0,) * 3
    return Preprocessing(
        size=cropped[0] if cropped[0] == cropped[1] else cropped,
        resize=resize,
        interpolation=Image.Resampling(processor.resample).name.lower(),
        mean=tuple((offset + value) / factor for value in mean),
        std=tuple(value / factor for value in std),
        crop_mode="squash" if squash else "center",
    )
