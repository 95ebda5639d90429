"""Networks in int8: post-training quantization by nncf, calibrated on the user's own videos."""

import hashlib
import importlib.metadata
import importlib.util
import logging
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from math import ceil
from pathlib import Path
from typing import Any

import numpy as np

from extract import InputError, RunError
from extract.backbone.batches import compute_features
from extract.backbone.networks import NetworkRecord, load_network, network_key, save_network
from extract.backbone.openvino_engine import (
    BATCH,
    ConversionError,
    OpenVinoEngine,
    converted_network,
)
from extract.decode.transform import Preprocessing
from extract.errors import describe_error


@dataclass(frozen=True)
class Calibration:
    """Frames uint8 [n, H, W, 3] to calibrate on, others to measure the error, and their origin."""

    frames: np.ndarray
    held_out: np.ndarray
    record: dict[str, Any]

    @property
    def digest(self) -> str:
        pixels = self.frames.tobytes() + self.held_out.tobytes()
        return hashlib.sha256(pixels).hexdigest()[:16]


def quantized_network(
    calibrate: Callable[[Preprocessing], Calibration], *, threads: int, **source: Any
) -> tuple[NetworkRecord, Any]:
    """A network's record and the network in int8, as `converted_network` returns those in fp32.

    The record's `extra` holds the calibration and the relative error: the 2-norm of the difference
    to the features in fp32 of held-out frames. `calibrate` returns the frames for a preprocessing.
    Raises InputError without nncf, RunError for too few frames, and ConversionError.
    """
    if importlib.util.find_spec("nncf") is None:
        raise InputError(
            "--precision int8 needs nncf; pip install 'hgnl-video[int8]', or use --precision auto"
        )
    record, network = converted_network(**source)
    calibration = calibrate(record.preprocessing)
    frames, held_out = calibration.frames, calibration.held_out
    if not len(frames) or not len(held_out):
        raise RunError(
            "--precision int8: too few videos can be read to calibrate on; use --precision auto"
        )
    version = importlib.metadata.version("nncf")
    key = network_key(**source, batch=BATCH, calibration=calibration.digest, nncf=version)
    if (saved := load_network(key)) is not None:
        return saved
    print(
        f"{record.name} is quantized to int8: some minutes; it is kept for later runs",
        file=sys.stderr,
    )
    model = _quantize(network, frames)
    quantization = {
        **calibration.record,
        "frames": len(frames),
        "held_out": len(held_out),
        "pixels_sha256": calibration.digest,
        "nncf": version,
        "relative_error": float(f"{_error(model, network, record.dim, held_out, threads):.3g}"),
    }
    return save_network(key, replace(record, extra={"quantization": quantization}), model)


def _quantize(network: Any, frames: np.ndarray) -> Any:
    # Imported by nncf, it warns where there is a CUDA compiler but no GPU.
    logging.getLogger("torch.utils.cpp_extension").setLevel("ERROR")
    import nncf
    import openvino
    from openvino._offline_transformations import apply_moc_transformations

    model = openvino.Core().read_model(network) if isinstance(network, Path) else network.clone()
    nncf.set_log_level("ERROR")
    # The network takes whole batches only; `np.resize` fills the last one with the first frames.
    batches = np.resize(frames, (ceil(len(frames) / BATCH), BATCH, *frames.shape[1:]))
    try:
        # Fold batch norms into convolutions before value ranges are measured.
        apply_moc_transformations(model, cf=True, smart_reshape=False)
        return nncf.quantize(model, nncf.Dataset(batches), subset_size=len(batches))
    except Exception as error:  # nncf raises many types
        raise ConversionError(f"int8: {describe_error(error)}") from error


def _error(model: Any, network: Any, dim: int, frames: np.ndarray, threads: int) -> float:
    """The relative error of a model in int8 against the network in fp32."""
    from torch import from_numpy

    from extract.backbone.inference import relative_error

    features = [
        from_numpy(compute_features(engine.slots, frames, dim))
        for engine in (
            OpenVinoEngine(model, precision="int8", threads=threads),
            OpenVinoEngine(network, precision="fp32", threads=threads),
        )
    ]
    return relative_error(*features)
