"""A frozen backbone: uint8 frames in, float16 features out, by the engine that suits the device.

    frames -> Batches -> engine: OpenVINO on a CPU, PyTorch on a GPU -> features

Start-up is fast because this module imports neither torch nor timm. Engines import them if needed.
"""

import importlib.util
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from extract import InputError, RunError
from extract.backbone.batches import Batches, Check, accept, compute_features
from extract.backbone.networks import NetworkRecord, absolute_name
from extract.cores import available_cores, has_native_bf16
from extract.decode.transform import Preprocessing, is_clip_wise
from extract.device import choose_device, runs_on_cpu

if TYPE_CHECKING:
    from extract.backbone.quantized import Calibration

PRECISIONS = ("auto", "fp32", "bf16", "fp16", "int8")
ENGINES = ("auto", "openvino", "torch")


class Engine(Protocol):
    """Runs a network in slots (see batches.py) of `batch_size` inputs uint8 [..., H, W, 3]."""

    precision: str
    batch_size: int
    slots: list[Any]
    description: str
    record: dict[str, Any]  # its part of a store's provenance


class NotFiniteError(RunError):
    """Features that are not finite in float16."""


def load_backbone(
    name: str,
    *,
    weights: str | Path,
    device: str = "auto",
    precision: str = "auto",
    form: str = "auto",
    engine: str = "auto",
    seed: int = 0,
    frames: int | None = None,
    threads: int | None = None,
    calibrate: "Callable[[Preprocessing], Calibration] | None" = None,
    **options: Any,
) -> "Backbone":
    """Load a network with its weights, to compute features with it.

    Args:
        name, weights, seed, options: see `load_trunk`.
        device: "auto" (a CUDA GPU if there is one, else the CPU), or torch's name: cpu, cuda,
            cuda:1.
        precision: fp32, bf16, fp16, int8 or "auto": fp16 on a GPU; bf16 on a CPU that computes in
            it, else fp32.
        form: how a GPU runs the network: eager, graphs or compiled. "auto" times a batch of the
            first two, whose features are the same bytes. torch.compile takes minutes and rounds
            differently, so it is recorded.
        engine: "auto" (on a CPU OpenVINO, if it is installed and can run the network, else
            PyTorch), openvino or torch.
        frames: how many frames come together, if that is known. A GPU then gets batches of even
            sizes.
        threads: CPU cores to use (default: `available_cores()`).
        calibrate: returns the frames that int8 is calibrated on, for a preprocessing.

    Raises InputError for a device or an engine that this machine does not have, and for fp16 or a
    form on a CPU. Raises RunError if a GPU's memory is full.
    """
    on_cpu = runs_on_cpu(device)
    _check_options(device, precision, form, engine, on_cpu=on_cpu)
    name = absolute_name(name)
    source: dict[str, Any] = {"name": name, "weights": weights, "seed": seed, **options}
    threads = threads or available_cores()
    if on_cpu and precision == "int8":
        return _in_int8(source, calibrate, threads)
    if on_cpu:
        return _on_cpu(source, precision, engine, threads)
    from extract.backbone import torch_engine
    from extract.backbone.model import load_trunk

    trunk, gpu = load_trunk(**source), choose_device(device)
    precision = "fp16" if precision == "auto" else precision
    gpu_engine, note = torch_engine.on_gpu(
        trunk, device=gpu, precision=precision, form=form, frames=frames
    )
    return Backbone(trunk, gpu_engine, device=str(gpu), note=note)


class Backbone:
    """A frozen network: `backbone(frames)` turns uint8 frames into float16 features.

    On one machine and in one precision, the features of a frame are the same bytes whichever frames
    come with it: every batch has `batch_size` frames, and the last one is padded. Calls with
    multiples of `batch_size` frames need no padding.
    """

    def __init__(self, network: NetworkRecord, engine: Engine, *, device: str, note: str = ""):
        """note: how the engine was chosen, for `describe`."""
        self.name, self.weights, self.dim = network.name, network.weights, network.dim
        self.preprocessing, self.clips = network.preprocessing, network.clips
        self.input_shape, self.extra = network.input_shape, network.extra
        self.engine, self.device, self._note = engine, device, note
        self.precision, self.batch_size = engine.precision, engine.batch_size

    def __repr__(self) -> str:
        return f"Backbone({self.describe()})"

    def __call__(self, frames: np.ndarray) -> np.ndarray:
        """Compute the features float16 [n, dim] of frames uint8 [n, size, size, 3].

        The frames are RGB, resized and cropped. Raises ValueError for another shape or type, and
        NotFiniteError if a feature is not finite in float16.
        """
        if frames.dtype != np.uint8 or frames.shape[1:] != self.input_shape:
            expected = ", ".join(map(str, self.input_shape))
            raise ValueError(
                f"got frames {frames.dtype} {list(frames.shape)}, expected uint8 [n, {expected}]"
            )
        check = self.check_finite
        return compute_features(self.engine.slots, frames, self.dim, check=check)

    def batches(self, *, check: Check = accept) -> Batches:
        """For frames that come one after the other. Use one `Batches` at a time.

        `check` gets the features float16 [n, dim] of each batch, and may raise.
        """
        return Batches(self.engine.slots, check=check)

    def check_finite(self, features: np.ndarray) -> None:
        """NotFiniteError, with a remedy, if features [n, dim] are not finite."""
        num_damaged = (~np.isfinite(features)).any(axis=1).sum()
        if not num_damaged:
            return
        hint = "are the weights damaged, or unfit for float16?"
        if self.precision != "fp32":
            hint = (
                "try --precision fp32, into another --out; if that fails too, the weights are "
                "damaged"
            )
        raise NotFiniteError(
            f"{num_damaged} of {len(features)} frames have features that are not finite in float16 "
            f"({self.name}, {self.precision}); {hint}"
        )

    @property
    def clip_options(self) -> dict[str, Any]:
        """Keyword arguments of a decode job's `Plan`."""
        return {"clip_length": self.clips.frames, "clip_fps": self.clips.fps} if self.clips else {}

    def provenance(self) -> dict[str, Any]:
        """The record for a feature store. Stores with the same record may be joined.

        A record without `engine` means PyTorch.
        """
        return {
            "backbone": self.name,
            "weights": dict(self.weights),
            "preprocessing": self.preprocessing.record(),
            **({"clips": asdict(self.clips)} if self.clips else {}),
            "precision": self.precision,
            **self.engine.record,
            **self.extra,
        }

    def describe(self) -> str:
        """Weights, device, precision and engine as text, printed when a run starts."""
        weights, device, clips = self.weights["name"], self.device, ""
        if weights.startswith("random"):
            weights = f"RANDOM WEIGHTS ({weights}): its features mean nothing"
        if device != "cpu":
            import torch

            device = f"{device} ({torch.cuda.get_device_name(device)})"
        if self.clips:
            clips = f"clips of {self.clips.frames} frames, {self.clips.fps:g} per second; "
        return (
            f"{self.name}, {weights}; {clips}on {device} in {self.precision}{self._note}, "
            f"{self.engine.description}"
        )


def _check_options(device: str, precision: str, form: str, engine: str, *, on_cpu: bool) -> None:
    if precision not in PRECISIONS:
        raise InputError(f"--precision {precision}: unknown; known are {', '.join(PRECISIONS)}")
    if engine not in ENGINES:
        raise InputError(f"--engine {engine}: unknown; known are auto, openvino and torch")
    if precision == "fp16" and on_cpu:
        raise InputError(
            "--precision fp16 on a CPU: slower than fp32 there, and its range is small; use auto "
            "or bf16"
        )
    if form != "auto" and on_cpu:
        raise InputError(
            f"--form {form} is how a GPU runs a backbone; on a CPU there is one form only, auto"
        )
    if precision == "int8" and (engine == "torch" or not on_cpu):
        raise InputError(
            "--precision int8 is OpenVINO's, on a CPU; leave out --engine, and give --device cpu"
        )
    if engine == "openvino" and not on_cpu:
        raise InputError(
            f"--engine openvino runs on a CPU, and --device {device} is a GPU; add --device cpu"
        )
    if (engine == "openvino" or precision == "int8") and not _has_openvino():
        option = "--precision int8" if precision == "int8" else "--engine openvino"
        raise InputError(
            f"{option} needs OpenVINO, which is not installed; pip install openvino, or use "
            "--precision auto --engine torch and another --out"
        )


def _has_openvino() -> bool:
    return importlib.util.find_spec("openvino") is not None


def _in_int8(
    source: dict[str, Any],
    calibrate: "Callable[[Preprocessing], Calibration] | None",
    threads: int,
) -> Backbone:
    from extract.backbone.openvino_engine import ConversionError, OpenVinoEngine
    from extract.backbone.quantized import quantized_network

    name = source["name"]
    if is_clip_wise(name):
        raise InputError(
            f"--precision int8: {name} is clip-wise; only timm's image models are quantized"
        )
    if calibrate is None:
        raise InputError(
            "--precision int8 is calibrated on the videos of an extraction; here use --precision "
            "auto"
        )
    try:
        record, network = quantized_network(calibrate, threads=threads, **source)
    except ConversionError as error:
        raise InputError(f"--precision int8: OpenVINO cannot run {name} ({error})") from None
    quantization = record.extra["quantization"]
    note = (
        f", relative error {quantization['relative_error']:.2g} against fp32 on "
        f"{quantization['held_out']} held-out frames"
    )
    engine = OpenVinoEngine(network, precision="int8", threads=threads)
    return Backbone(record, engine, device="cpu", note=note)


def _on_cpu(source: dict[str, Any], precision: str, engine: str, threads: int) -> Backbone:
    note = ""
    if precision == "auto":
        precision = "bf16" if has_native_bf16() else "fp32"
    if engine != "torch" and not _has_openvino():
        note = " (OpenVINO, which is faster, is not installed)"
    elif engine != "torch":
        from extract.backbone import openvino_engine

        try:
            record, network = openvino_engine.converted_network(**source)
            cpu_engine = openvino_engine.OpenVinoEngine(
                network, precision=precision, threads=threads
            )
            return Backbone(record, cpu_engine, device="cpu")
        except openvino_engine.ConversionError as error:
            note = f" (OpenVINO cannot run it: {error})"
    if engine == "openvino":
        raise InputError(
            f"--engine openvino: {source['name']}{note}; use --engine torch and another --out"
        )
    from extract.backbone import torch_engine
    from extract.backbone.model import load_trunk

    trunk = load_trunk(**source)
    torch_on_cpu = torch_engine.on_cpu(trunk, precision=precision, threads=threads)
    return Backbone(trunk, torch_on_cpu, device="cpu", note=note)
