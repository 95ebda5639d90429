"""Networks in int8: nncf's post-training quantization, calibrated on frames of the videos that are
to be extracted."""

import hashlib
import importlib.metadata
import importlib.util
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from extract import InputError, RunError
from extract.backbone.batches import Batches
from extract.backbone.networks import NetworkRecord, load_network, network_key, save_network
from extract.backbone.openvino_engine import (
    BATCH,
    ConversionError,
    OpenVinoEngine,
    converted_network,
    save_model,
)


@dataclass(frozen=True)
class Calibration:
    """Frames uint8 [n, H, W, 3] that value ranges are taken from, others to measure the error on,
    and their origin."""

    frames: np.ndarray
    held_out: np.ndarray
    record: dict[str, Any]

    @property
    def digest(self) -> str:
        digest = hashlib.sha256(self.frames.tobytes())
        digest.update(self.held_out.tobytes())
        return digest.hexdigest()[:16]


def quantized_network(
    calibration: Calibration, *, threads: int, **source: Any
) -> tuple[NetworkRecord, Any]:
    """A network's record and the network in int8, as `converted_network` gives those in fp32.

    Its record's `extra` says how it was calibrated and its relative error (2-norm of the features
    of held-out frames against fp32). Raises InputError without nncf, RunError for too few frames,
    and ConversionError.
    """
    if importlib.util.find_spec("nncf") is None:
        raise InputError(
            "--precision int8 needs nncf; pip install 'hgnl-video[int8]', or use --precision auto"
        )
    if min(len(calibration.frames), len(calibration.held_out)) < 1:
        raise RunError(
            "--precision int8: too few videos can be read to calibrate on; use --precision auto"
        )
    version = importlib.metadata.version("nncf")
    key = network_key(**source, batch=BATCH, calibration=calibration.digest, nncf=version)
    if (saved := load_network(key)) is not None:
        return saved
    record, network = converted_network(**source)
    print(f"{record.name} is quantized to int8: some minutes, at this start only", file=sys.stderr)
    model = _quantize(network, calibration.frames)
    error = _relative_error(
        _features(model, record, calibration.held_out, threads=threads, precision="int8"),
        _features(network, record, calibration.held_out, threads=threads, precision="fp32"),
    )
    extra = {
        "quantization": {
            **calibration.record,
            "frames": len(calibration.frames),
            "held_out": len(calibration.held_out),
            "pixels_sha256": calibration.digest,
            "nncf": version,
            "relative_error": float(f"{error:.3g}"),
        }
    }
    record = replace(record, extra=extra)
    return record, save_network(key, record, lambda path: save_model(model, path)) or model


def _quantize(network: Any, frames: np.ndarray) -> Any:
    import nncf
    import openvino
    from openvino._offline_transformations import apply_moc_transformations

    model = openvino.Core().read_model(network) if isinstance(network, Path) else network.clone()
    nncf.set_log_level("ERROR")
    # Whole batches, which is the only size that the network takes; the last one begins anew.
    padded = np.resize(frames, (-(-len(frames) // BATCH) * BATCH, *frames.shape[1:]))
    batches = padded.reshape(-1, BATCH, *frames.shape[1:])
    try:
        # Batch norms become part of convolutions before ranges are measured.
        apply_moc_transformations(model, cf=True, smart_reshape=False)
        return nncf.quantize(model, nncf.Dataset(batches), subset_size=len(batches))
    except Exception as error:  # nncf raises many types
        raise ConversionError(
            f"int8: {type(error).__name__}: {str(error).strip().splitlines()[0]}"
        ) from error


def _features(
    network: Any, record: NetworkRecord, frames: np.ndarray, *, threads: int, precision: str
) -> np.ndarray:
    engine = OpenVinoEngine(network, precision=precision, threads=threads)
    features = np.empty((len(frames), record.dim), np.float16)
    batches = Batches(engine.slots, check=lambda _: None)
    batches.add(frames, features)
    batches.finish()
    return features.astype(np.float64)


def _relative_error(features: np.ndarray, expected: np.ndarray) -> float:
    return float(np.linalg.norm(features - expected) / np.linalg.norm(expected))
