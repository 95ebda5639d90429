"""Clip-wise backbones: torchvision's and transformers' video models, without their classifiers.

    torchvision/NAME        every model of torchvision.models.video
    hf/FOLDER, hf/OWNER/ID  V-JEPA 2, VideoMAE, TimeSformer and ViViT of transformers, which needs
                            hgnl-video[hf]

A module maps normalized clips, float [n, 3, L, height, width], to [n, P, dim]: one row of features
per clip (P = 1), or one per temporal position of the model.
"""

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from PIL import Image
from torch import Tensor, nn

from extract import InputError
from extract.backbone.image_models import square_or_sides
from extract.backbone.weights import (
    download_error,
    fit_weights,
    load_weights,
    offline_at_once,
    read_state_dict,
    refuse_misfit,
)
from extract.decode import torch_resize
from extract.decode.transform import PerClip, Preprocessing
from extract.errors import describe_error, first_sentence
from extract.sources import sha256_of

# Clips of torchvision's weights, by the start of a model's name: frames and frames per second, from
# their documentation (`clip_len` and `frame_rate`).
_TORCHVISION_CLIPS = {
    "r": (16, 15.0),
    "mc": (16, 15.0),
    "s3d": (128, 15.0),
    "mvit": (16, 7.5),
    "swin": (32, 15.0),
}
# Frames per second at which models of transformers were trained. It is not in their configurations,
# but in the training configurations of their authors: V-JEPA 2 `fps: 4`; VideoMAE every 4th frame
# (of 30 per second); ViViT every 2nd of 25 per second (scenic: 250 frames in 10 s).
_HF_FPS = {"vjepa2": 4.0, "videomae": 7.5, "timesformer": 30 / 32, "vivit": 12.5}
# TimeSformer, by its frames per clip: 8 x 32 (base), 16 x 16 (HR) and 96 x 4 (L), at 30 per second.
_TIMESFORMER_FPS = {8: 30 / 32, 16: 30 / 16, 96: 30 / 4}
# Entries of config.json that features do not depend on.
_NOT_OF_THE_NETWORK = (
    "_name_or_path",
    "architectures",
    "dtype",
    "id2label",
    "label2id",
    "problem_type",
    "torch_dtype",
    "transformers_version",
)


@dataclass(frozen=True)
class VideoModel:
    """A module as above in fp32, its preprocessing and clips, and the record of its weights.

    config: the entries of `config.json` that a model of transformers is built from.
    """

    module: nn.Module
    preprocessing: Preprocessing
    weights: dict[str, str]  # {} for random ones
    clip_frames: int
    clip_fps: float
    config: dict[str, Any] = field(default_factory=dict)


def load_video_model(
    name: str, *, weights: str, clip_frames: int | None, per_clip: PerClip
) -> VideoModel:
    """Build the model `name` and load `weights` ("pretrained", "random" or a file) into it.

    Args:
        clip_frames: frames per clip, by default the model's own.
        per_clip: "mean" for one row of features (the class token, if there is one), "time" for one
            per temporal position, which is a mean over space.

    Raises InputError for an unknown model, for weights that are not available or do not fit, and
    for `per_clip="time"` of a model without temporal positions.
    """
    library, _, model_name = name.partition("/")
    load = _torchvision_model if library == "torchvision" else _hf_model
    return load(model_name, weights, clip_frames, per_clip)


# -- torchvision -----------------------------------------------------------------------------------


class _TorchvisionTrunk(nn.Module):
    """A model of torchvision.models.video up to its classifier."""

    def __init__(self, net: Any, dim: int, per_clip: PerClip):
        super().__init__()
        self.net, self.dim = net, dim
        if per_clip == "time":
            if not hasattr(net, "avgpool"):
                raise InputError(
                    "--per-clip time: an MViT has a class token, and no features per temporal "
                    "position"
                )
            # s3d's pooling keeps temporal positions; its classifier averages over them.
            if hasattr(net, "classifier"):
                self.net = nn.Sequential(net.features, net.avgpool)
            else:
                net.avgpool = nn.AdaptiveAvgPool3d((None, 1, 1))

    def forward(self, clips: Tensor) -> Tensor:
        features = self.net(clips)
        if features.ndim == 5:  # [n, dim, P, height, width]
            return features.mean((3, 4)).transpose(1, 2)
        return features.unflatten(1, (self.dim, -1)).transpose(1, 2)


def _torchvision_model(
    name: str, weights: str, clip_frames: int | None, per_clip: PerClip
) -> VideoModel:
    from torchvision import models

    names = models.list_models(module=models.video)
    if name not in names:
        raise InputError(
            f"--backbone torchvision/{name}: unknown; torchvision has the video models "
            f"{', '.join(names)}"
        )
    published = cast(Any, models.get_model_weights(name)).DEFAULT
    net: Any = models.get_model(name, weights=None)
    classifier = next(
        attribute for attribute in ("fc", "classifier", "head") if hasattr(net, attribute)
    )
    dim = _input_width(getattr(net, classifier))
    setattr(net, classifier, nn.Identity())
    net.pretrained_cfg = {"classifier": classifier}  # as in timm's models, for `fit_weights`
    full_name = f"torchvision/{name}"
    record: dict[str, str] = {}
    if weights == "pretrained":
        record = {"name": f"torchvision {published}"}
        try:
            state = published.get_state_dict(progress=True, check_hash=True)
        except Exception as error:  # no network, a damaged download
            file = published.url.rpartition("/")[2]
            raise download_error(full_name, file, error) from error
        fit_weights(net, state, published.url, full_name)
    elif weights != "random":
        record = load_weights(net, weights, name=full_name)
    preset = published.transforms()
    resize = preset.resize_size  # of the short side, or of both
    preprocessing = Preprocessing(
        size=preset.crop_size[0],
        resize=resize[0] if len(resize) == 1 else tuple(resize),
        interpolation=preset.interpolation.value,
        mean=tuple(preset.mean),
        std=tuple(preset.std),
        crop_mode="center" if len(resize) == 1 else "squash",
        antialias=False,  # VideoClassification.forward
    )
    frames, fps = next(
        clip for prefix, clip in _TORCHVISION_CLIPS.items() if name.startswith(prefix)
    )
    trunk = _TorchvisionTrunk(net, dim, per_clip)
    return VideoModel(trunk, preprocessing, record, clip_frames or frames, fps)


def _input_width(classifier: nn.Module) -> int:
    layers = [part for part in classifier.modules() if isinstance(part, nn.Linear | nn.Conv3d)]
    return layers[-1].weight.shape[1]


# -- transformers ----------------------------------------------------------------------------------


class _HfTrunk(nn.Module):
    """A model of transformers with pooled tokens."""

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
        if self.kind == "timesformer":  # the frames of a patch are next to each other
            return patches.unflatten(1, (-1, self.positions)).mean(1)
        return patches.unflatten(1, (self.positions, -1)).mean(2)


def _hf_model(name: str, weights: str, clip_frames: int | None, per_clip: PerClip) -> VideoModel:
    try:
        from transformers import AutoConfig, AutoModel, AutoVideoProcessor, logging
    except ImportError:
        raise InputError(
            f"--backbone hf/{name}: needs transformers; pip install 'hgnl-video[hf]'"
        ) from None
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    folder = _hf_folder(name, with_weights=weights == "pretrained")
    with _refuse_configuration(name):
        config: Any = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        processor: Any = AutoVideoProcessor.from_pretrained(folder, trust_remote_code=False)
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
    fps = getattr(processor, "fps", None) or usual_fps
    if not 0 < fps < float("inf"):
        raise InputError(
            f"--backbone hf/{name}: its preprocessor's fps is {fps}; expected more than 0"
        )
    frames = clip_frames or own_frames
    tubelet = max(1, _frames_per_token(config))
    if frames % tubelet:  # the model would drop the frames that are left over
        raise InputError(
            f"--clip-frames {frames}: hf/{name} joins {tubelet} frames into a token; give a "
            f"multiple of {tubelet}"
        )
    setattr(config, frames_key, frames)
    record: dict[str, str] = {}
    if weights == "random":
        with _refuse_configuration(name):
            model = AutoModel.from_config(config)
    else:
        files = _weight_files(folder, name) if weights == "pretrained" else [Path(weights)]
        model, record = _hf_with_weights(config, files, name)
    trunk = _HfTrunk(model, per_clip, frames // tubelet)
    preprocessing = _hf_preprocessing(processor, name)
    return VideoModel(trunk, preprocessing, record, frames, float(fps), _config_record(folder))


@contextmanager
def _refuse_configuration(name: str) -> Iterator[None]:
    """InputError for a configuration that transformers cannot use. It raises many types."""
    try:
        yield
    except Exception as error:
        raise InputError(
            f"--backbone hf/{name}: its configuration cannot be used ({first_sentence(error)})"
        ) from error


def _frames_per_token(config: Any) -> int:
    if config.model_type == "timesformer":
        return 1
    size = config.tubelet_size  # a number, or (frames, height, width)
    return size if isinstance(size, int) else size[0]


def _config_record(folder: Path) -> dict[str, Any]:
    content = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return {key: value for key, value in content.items() if key not in _NOT_OF_THE_NETWORK}


def _hf_folder(name: str, *, with_weights: bool) -> Path:
    folder = Path(name)
    if folder.is_dir():
        # transformers writes preprocessor_config.json or video_preprocessor_config.json.
        for pattern in ("config.json", "*preprocessor_config.json"):
            if not any(folder.glob(pattern)):
                file = pattern.removeprefix("*")
                raise InputError(
                    f"--backbone hf/{name}: the folder holds no {file}; expected a model's folder "
                    "as transformers' save_pretrained writes it, or as the hub has it"
                )
        return folder
    if folder.is_absolute() or len(folder.parts) > 2:  # no id of the hub
        raise InputError(
            f"--backbone hf/{name}: there is no such folder; if it was moved, put a link at its "
            "old path"
        )
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
            f"--backbone hf/{name}: is not a folder, and cannot be downloaded from the Hugging "
            f"Face hub ({describe_error(error)}); on a machine with a network, `hf download {name} "
            "--local-dir FOLDER`, and pass hf/FOLDER"
        ) from None
    return downloaded


def _weight_files(folder: Path, name: str) -> list[Path]:
    files = sorted(folder.glob("model*.safetensors")) or sorted(folder.glob("pytorch_model*.bin"))
    if not files:
        raise InputError(
            f"--backbone hf/{name} --weights pretrained: {folder} holds neither model.safetensors "
            "nor pytorch_model.bin; give --weights FILE, or random"
        )
    return files


def _hf_with_weights(config: Any, files: list[Path], name: str) -> tuple[nn.Module, dict[str, str]]:
    """The model with the tensors of `files`, and their record. InputError unless all are loaded."""
    from transformers import AutoModel

    state: dict[str, Tensor] = {}
    for file in files:
        state |= read_state_dict(file)
    digests = "".join(map(sha256_of, files))
    sha256 = digests if len(files) == 1 else hashlib.sha256(digests.encode()).hexdigest()
    model_class: Any = AutoModel._model_mapping[type(config)]
    with _refuse_configuration(name):
        model, info = model_class.from_pretrained(
            None,
            config=config,
            state_dict=dict(state),
            dtype=torch.float32,
            ignore_mismatched_sizes=True,  # they are refused below
            output_loading_info=True,
        )
    expected = model.state_dict()
    # transformers renames the biases of VideoMAE, and leaves them at 0.
    for key, value in state.items():
        own = key.removeprefix(f"{model.base_model_prefix}.")
        own = own.replace(".q_bias", ".query.bias").replace(".v_bias", ".value.bias")
        if key.endswith((".q_bias", ".v_bias")) and own in expected:
            expected[own].copy_(value)
    problems = {
        "tensors of the file were not loaded": _not_loaded(model, state),
        # The features do not depend on these modules of ViViT and V-JEPA 2.
        "are missing": sorted(
            key for key in info["missing_keys"] if not key.startswith(("pooler.", "predictor."))
        ),
        "have another shape": sorted(key for key, *_ in info["mismatched_keys"]),
    }
    refuse_misfit(files[0], f"hf/{name}", problems)
    return model, {"name": f"{Path(name).name}/{files[0].name}", "sha256": sha256}


def _not_loaded(model: Any, state: dict[str, Tensor]) -> list[str]:
    """The tensors of a file that are not in the model, compared by value: their keys change."""
    prefix = f"{model.base_model_prefix}."
    # In the file of a whole model, the other keys are those of its classifier or decoder.
    keys = [key for key in state if key.startswith(prefix)] or list(state)
    loaded = {_fingerprint(value) for value in model.state_dict().values()}
    return sorted(key for key in keys if _fingerprint(state[key]) not in loaded)


def _fingerprint(value: Tensor) -> str:
    content = value.detach().to(torch.float32).contiguous().numpy().tobytes()
    return f"{value.numel()} {hashlib.sha256(content).hexdigest()}"


def _hf_preprocessing(processor: Any, name: str) -> Preprocessing:
    """The preprocessing in `preprocessor_config.json`, as the model's own processor reads it."""
    size, crop = processor.size, processor.crop_size
    if not processor.do_resize or not (size.shortest_edge or size.height) or size.longest_edge:
        raise InputError(
            f"--backbone hf/{name}: its preprocessor resizes to {dict(size)}; expected "
            "shortest_edge alone, or height and width"
        )
    with _refuse_configuration(name):
        interpolation = Image.Resampling(processor.resample).name.lower()
    if interpolation not in torch_resize.INTERPOLATIONS:
        raise InputError(
            f"--backbone hf/{name}: its preprocessor resizes by {interpolation}; supported are "
            f"{', '.join(torch_resize.INTERPOLATIONS)}"
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
    # (frame * factor - offset - mean) / std, written as (frame / 255 - mean) / std
    factor = 255 * (processor.rescale_factor if processor.do_rescale else 1.0)
    # ViViT's processor subtracts 1 when it rescales, whatever `offset` says; no other one does.
    is_vivit = type(processor).__name__ == "VivitVideoProcessor"
    offset = 1.0 if is_vivit and processor.do_rescale else 0.0
    mean = processor.image_mean if processor.do_normalize else (0.0,) * 3
    std = processor.image_std if processor.do_normalize else (1.0,) * 3
    return Preprocessing(
        size=square_or_sides(*cropped),
        resize=resize,
        interpolation=interpolation,
        mean=tuple((offset + value) / factor for value in mean),
        std=tuple(value / factor for value in std),
        crop_mode="squash" if squash else "center",
        processor="transformers",
    )
