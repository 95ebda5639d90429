"""A frozen backbone: uint8 frames in, float16 features out, by the engine that suits the device.

    frames -> Batches -> engine: OpenVINO on a CPU, PyTorch on a GPU -> features

This module imports neither torch nor timm; the engine does, if it must.
"""

import importlib.util
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from extract import InputError, RunError
from extract.backbone.batches import Batches
from extract.backbone.networks import absolute_name
from extract.cores import available_cores, has_native_bf16
from extract.decode.transform import Clips, Preprocessing, is_clip_wise
from extract.device import choose_device, runs_on_cpu

if TYPE_CHECKING:
    from extract.backbone.quantized import Calibration

PRECISIONS = ("auto", "fp32", "bf16", "fp16", "int8")


class Engine(Protocol):
    """What runs a network: slots (see batches.py) of `batch_size` inputs, uint8 [batch, ..., H, W,
    3]."""

    name: str
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
    calibration: "Callable[[Preprocessing], Calibration] | None" = None,
    **options: Any,
) -> "Backbone":
    """A network with its weights, ready to run frozen.

    name, weights, seed, options: see `load_trunk`. device: "auto" (a CUDA GPU if there is one, else
    the CPU), or what torch calls it: cpu, cuda, cuda:1. precision: fp32, bf16, fp16, or "auto":
    fp16 on a GPU; on a CPU bf16 if the CPU computes in it, else fp32. form: how a GPU runs it,
    eager, graphs or compiled; "auto" times one batch of the first two, which give the same bytes
    (torch.compile, which takes minutes, rounds otherwise and is recorded: make gpu compares it).
    engine: "auto" (on a CPU OpenVINO, if it is installed and can run the network, else PyTorch),
    openvino, or torch. frames: how many come together, if that is known: a GPU then gets batches of
    even sizes. threads: CPU cores to use (default: `available_cores()`). calibration: gives the
    frames that int8 is calibrated on. Raises InputError for a device or an engine that is not there
    and for fp16 or a form on a CPU, RunError if a GPU's memory is full.
    """
    on_cpu = runs_on_cpu(device)
    _check(device, precision, form, engine, on_cpu=on_cpu)
    name = absolute_name(name)
    source: dict[str, Any] = {"name": name, "weights": weights, "seed": seed, **options}
    if on_cpu:
        if precision == "int8":
            return _in_int8(source, calibration, threads or available_cores())
        return _on_cpu(source, precision, engine, threads or available_cores())
    from extract.backbone import torch_engine
    from extract.backbone.model import load_trunk

    trunk, target = load_trunk(**source), choose_device(device)
    chosen = "fp16" if precision == "auto" else precision
    on_device, note = torch_engine.on_gpu(
        trunk, device=target, precision=chosen, form=form, frames=frames
    )
    return Backbone(trunk, on_device, device=str(target), note=note)


class Backbone:
    """A frozen image model: `backbone(frames)` turns uint8 frames into float16 features.

    A frame's features depend on that frame only, to the bit, on one machine in one precision: every
    batch has `batch_size` frames, the last one padded. Calls with multiples of `batch_size` waste
    nothing.
    """

    def __init__(self, network: Any, engine: Engine, *, device: str, note: str = ""):
        """network: a Trunk, or the NetworkRecord of a converted one; note: how the engine was
        chosen, to be shown."""
        self.name, self.weights, self.dim = network.name, network.weights, network.dim
        self.preprocessing: Preprocessing = network.preprocessing
        self.input_shape: tuple[int, ...] = network.input_shape
        self.clips: Clips | None = network.clips
        self._extra = getattr(network, "extra", {})
        self.engine, self.device, self._note = engine, device, note
        self.precision, self.batch_size = engine.precision, engine.batch_size

    def __repr__(self) -> str:
        return f"Backbone({self.describe()})"

    def __call__(self, frames: np.ndarray) -> np.ndarray:
        """frames: uint8 [n, size, size, 3], RGB, resized and cropped -> features float16 [n, dim].

        Raises ValueError for another shape or type, and NotFiniteError if a feature is not finite
        in float16.
        """
        if frames.dtype != np.uint8 or frames.shape[1:] != self.input_shape:
            expected = ", ".join(map(str, self.input_shape))
            raise ValueError(
                f"got frames {frames.dtype} {list(frames.shape)}, expected uint8 [n, {expected}]"
            )
        features = np.empty((len(frames), self.dim), np.float16)
        batches = self.batches(check=self._refuse_not_finite)
        batches.add(frames, features)
        batches.finish()
        return features

    def batches(self, *, check: Callable[[np.ndarray], None] = lambda features: None) -> Batches:
        """For frames that come bit by bit: several batches may be under way while more come. One at
        a time.

        `check` sees the features float16 [n, dim] of each batch, and may raise.
        """
        return Batches(self.engine.slots, check=check)

    def _refuse_not_finite(self, features: np.ndarray) -> None:
        damaged = int((~np.isfinite(features)).any(axis=1).sum())
        if damaged:
            raise NotFiniteError(self.not_finite(damaged, len(features)))

    def not_finite(self, damaged: int, count: int) -> str:
        """The message for frames whose features are not finite, and what to do."""
        hint = "are the weights damaged, or unfit for float16?"
        if self.precision != "fp32":
            hint = "try --precision fp32, into another --out; if that fails too, the weights are damaged"
        return (
            f"{damaged} of {count} frames have features that are not finite in float16 "
            f"({self.name}, {self.precision}); {hint}"
        )

    @property
    def clip_options(self) -> dict[str, Any]:
        """Keywords of a decode job's `Plan`."""
        return {"clip_length": self.clips.frames, "clip_fps": self.clips.fps} if self.clips else {}

    def provenance(self) -> dict[str, Any]:
        """What a feature store records of it: two stores with the same record may be joined.

        Without `engine` it is PyTorch's.
        """
        return {
            "backbone": self.name,
            "weights": dict(self.weights),
            "preprocessing": self.preprocessing.record(),
            **({"clips": asdict(self.clips)} if self.clips else {}),
            "precision": self.precision,
            **self.engine.record,
            **self._extra,
        }

    def describe(self) -> str:
        """Which weights, device, precision and engine, for the screen that a run starts with."""
        weights = self.weights["name"]
        if weights.startswith("random"):
            weights = f"RANDOM WEIGHTS ({weights}): its features mean nothing"
        where = self.device
        if where != "cpu":
            import torch

            where = f"{where} ({torch.cuda.get_device_name(where)})"
        clips = (
            f"clips of {self.clips.frames} frames, {self.clips.fps:g} per second; "
            if self.clips
            else ""
        )
        return (
            f"{self.name}, {weights}; {clips}on {where} in {self.precision}{self._note}, "
            f"{self.engine.description}"
        )


def _check(device: str, precision: str, form: str, engine: str, *, on_cpu: bool) -> None:
    if precision not in PRECISIONS:
        raise InputError(f"--precision {precision}: unknown; known are {', '.join(PRECISIONS)}")
    if engine not in ("auto", "openvino", "torch"):
        raise InputError(f"--engine {engine}: unknown; known are auto, openvino and torch")
    if precision == "fp16" and on_cpu:
        raise InputError(
            "--precision fp16 on a CPU: slower than fp32 there, and its range is small; use auto or bf16"
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


def _in_int8(
    source: dict[str, Any],
    calibration: "Callable[[Preprocessing], Calibration] | None",
    threads: int,
) -> Backbone:
    from extract.backbone.openvino_engine import ConversionError, OpenVinoEngine, converted_network
    from extract.backbone.quantized import quantized_network

    if is_clip_wise(source["name"]):
        raise InputError(
            f"--precision int8: {source['name']} is clip-wise; only timm's image models are quantized"
        )
    if calibration is None:
        raise InputError(
            "--precision int8 is calibrated on the videos of an extraction; here use --precision auto"
        )
    try:
        plain, _ = converted_network(**source)
        if plain.clips is not None:
            raise InputError(
                f"--precision int8 is for backbones of frames, and {plain.name} sees clips; use bf16"
            )
        record, network = quantized_network(
            calibration(plain.preprocessing), threads=threads, **source
        )
    except ConversionError as error:
        raise InputError(
            f"--precision int8: OpenVINO cannot run {source['name']} ({error})"
        ) from None
    numbers = record.extra["quantization"]
    note = f", relative error {numbers['relative_error']:.2g} against fp32 on {numbers['held_out']} held-out frames"
    return Backbone(
        record, OpenVinoEngine(network, precision="int8", threads=threads), device="cpu", note=note
    )


def _on_cpu(source: dict[str, Any], precision: str, engine: str, threads: int) -> Backbone:
    note = ""
    if precision == "auto":
        precision = "bf16" if has_native_bf16() else "fp32"
    if engine != "torch":
        if importlib.util.find_spec("openvino") is None:
            note = " (OpenVINO, which is faster, is not installed)"
        else:
            from extract.backbone.openvino_engine import (
                ConversionError,
                OpenVinoEngine,
                converted_network,
            )

            try:
                record, network = converted_network(**source)
                return Backbone(
                    record,
                    OpenVinoEngine(network, precision=precision, threads=threads),
                    device="cpu",
                )
            except ConversionError as error:
                note = f" (OpenVINO cannot run it: {error})"
        if engine == "openvino":
            raise InputError(
                f"--engine openvino: {source['name']}{note}; use --engine torch and another --out"
            )
    from extract.backbone import torch_engine
    from extract.backbone.model import load_trunk

    trunk = load_trunk(**source)
    return Backbone(
        trunk,
        torch_engine.on_cpu(trunk, precision=precision, threads=threads),
        device="cpu",
        note=note,
    )
