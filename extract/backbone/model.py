"""Any timm image model with its weights and preprocessing, as extraction and end-to-end training start from it."""

import difflib
from dataclasses import dataclass
from math import floor
from pathlib import Path
from typing import Any, cast

import timm
import torch
from timm.data import resolve_model_data_config
from torch import Tensor, nn

from extract.backbone.networks import package_file
from extract.backbone.weights import load_weights, published_file
from extract.cli import InputError, examples
from extract.decode.transform import Preprocessing


@dataclass(frozen=True)
class Trunk:
    """A timm module without classifier (fp32, on the CPU, in evaluation mode), and where its weights come from."""

    name: str
    module: nn.Module
    dim: int
    preprocessing: Preprocessing
    weights: dict[str, str]  # name, and sha256 where it is a file

    @property
    def input_shape(self) -> tuple[int, ...]:
        """What it sees at once, as decoded: [height, width, 3]."""
        return (self.preprocessing.size, self.preprocessing.size, 3)

    def example(self) -> Tensor:
        """One normalized input, always the same, to try a network on: float32 [1, 3, height, width], channels-last."""
        noise = torch.randn(1, 3, *self.input_shape[:-1], generator=torch.Generator().manual_seed(0))
        return noise.movedim(1, -1).contiguous().movedim(-1, 1)


def load_trunk(name: str, *, weights: str | Path, seed: int = 0) -> Trunk:
    """Build timm's model `name` without its classifier and load `weights` into it.

    weights: "pretrained" (timm's published weights; for tf_efficientnet_lite0/1/2 those of an installed pip package),
    "random" (a function of `seed` only), or a file (see extract/weights.py).
    Raises InputError for an unknown name, weights that cannot be had or do not fit, and preprocessing we do not do.
    """
    _check_name(name)
    source = str(weights)
    if source == "pretrained":
        source = package_file(name) or source
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        module = _pretrained(name) if source == "pretrained" else _create(name)
    if source == "random":
        record = {"name": f"random weights, seed {seed}"}
    elif source == "pretrained":
        record = {"name": f"timm {_published(module)}"}
    else:
        record = load_weights(module, source, name=name)
    _check_finite(module, source)
    module.eval()
    preprocessing = _preprocessing(module, name)
    with torch.inference_mode():
        dim = module(torch.zeros(1, 3, preprocessing.size, preprocessing.size)).shape[1]
    return Trunk(name=name, module=module, dim=dim, preprocessing=preprocessing, weights=record)


def _check_name(name: str) -> None:
    architecture, tagged, _ = name.partition(".")
    if timm.is_model(architecture):
        if not tagged or timm.is_model_pretrained(name):
            return
        near = timm.list_pretrained(f"{architecture}.*")
    else:
        close = difflib.get_close_matches(name, timm.list_models(), n=2)
        near = list(dict.fromkeys(close + timm.list_models(f"*{name}*")))
    known = f"did you mean {', '.join(near[:5])}?" if near else "timm.list_models() lists the known ones"
    raise InputError(f"--backbone {name}: timm {timm.__version__} has no such model; {known}")


def _check_finite(module: nn.Module, source: str) -> None:
    """Not left to the features: OpenVINO's ReLU makes 0 of what is no number."""
    damaged = [name for name, value in module.state_dict().items() if not value.isfinite().all()]
    if damaged:
        raise InputError(
            f"--weights {source}: {len(damaged)} tensors hold values that are not finite ({examples(damaged)}); "
            "the file is damaged, or its training diverged"
        )


def _create(name: str, *, pretrained: bool = False) -> nn.Module:
    # drop_rate: some models drop out before the classifier unless told otherwise
    return timm.create_model(name, pretrained=pretrained, num_classes=0, drop_rate=0.0)


def _pretrained(name: str) -> nn.Module:
    config = timm.get_pretrained_cfg(name)
    file, hub = published_file(name), getattr(config, "hf_hub_id", None)
    if not (file or hub):
        raise InputError(f"--weights pretrained: timm knows no published weights of {name}; give --weights FILE")
    try:
        return _create(name, pretrained=True)
    except Exception as error:  # no network, no such file, a damaged download: each library has its own types
        choices = [file] if file else []
        choices += [f"model.safetensors of {hub} on the Hugging Face hub"] if hub else []
        raise InputError(
            f"--weights pretrained: the weights of {name} cannot be had ({type(error).__name__}: {error}); where there "
            f"is a network, fetch {' or '.join(choices)}, and pass it as --weights FILE"
        ) from error


def _published(module: nn.Module) -> str:
    config = cast(dict[str, Any], module.pretrained_cfg)
    name = f"{config['architecture']}.{config['tag']}"
    return f"{name} ({config.get('hf_hub_id') or published_file(name)})"


def _preprocessing(module: nn.Module, name: str) -> Preprocessing:
    """What the weights were trained to see, from timm's record of them."""
    record = resolve_model_data_config(module)
    channels, height, width = record["input_size"]
    if channels != 3 or height != width:
        raise InputError(f"--backbone {name}: takes {channels} x {height} x {width}; only square RGB is supported")
    if record["crop_mode"] != "center":
        raise InputError(f"--backbone {name}: its crop mode is {record['crop_mode']}; only center is supported")
    if record["interpolation"] not in ("bilinear", "bicubic"):
        raise InputError(
            f"--backbone {name}: its interpolation is {record['interpolation']}; supported are bilinear and bicubic"
        )
    return Preprocessing(
        size=height,
        resize=floor(height / record["crop_pct"]),
        interpolation=record["interpolation"],
        mean=tuple(record["mean"]),
        std=tuple(record["std"]),
    )
