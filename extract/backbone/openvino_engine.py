"""A network run by OpenVINO on a CPU: one inference stream per core, each with its own batch.

PyTorch's threads wait for each other at every layer. OpenVINO's streams do not, so on a shared
machine a core that is taken away slows only one stream.
"""

import sys
import time
import warnings
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any

import numpy as np
import openvino

from extract.backbone.batches import inputs_per_batch
from extract.backbone.networks import NetworkRecord, load_network, network_keys, save_network
from extract.cores import has_native_bf16
from extract.errors import describe_error

if TYPE_CHECKING:
    from extract.backbone.model import Trunk

BATCH = 8  # constant, because the rounding of kernels depends on the batch size
# The options of `load_trunk`, as they are by default.
_DEFAULTS: dict[str, Any] = {
    "image_size": None,
    "clip_frames": None,
    "clip_fps": None,
    "per_clip": "mean",
    "processor": None,
}


class ConversionError(Exception):
    """OpenVINO cannot run this network; the message says why."""


class OpenVinoEngine:
    """Runs a converted network. Features are the same bytes for any number of threads."""

    def __init__(self, model: Any, *, precision: str, threads: int):
        """model: the path of a saved network, or an openvino.Model."""
        # The parts of an int8 network that are not in int8 are in the CPU's own precision.
        in_bf16 = has_native_bf16() if precision == "int8" else precision == "bf16"
        settings = {
            "NUM_STREAMS": threads,
            "INFERENCE_NUM_THREADS": threads,
            "INFERENCE_PRECISION_HINT": "bf16" if in_bf16 else "f32",
            # With pinning, the streams of all workers on a machine would share the first cores.
            "ENABLE_CPU_PINNING": False,
        }
        compiled = openvino.Core().compile_model(model, "CPU", settings)
        self.precision, self.batch_size = precision, compiled.input(0).shape[0]
        self.record = {"engine": {"name": "openvino", "version": openvino_version()}}
        streams = f"{threads} streams" if threads > 1 else "1 stream"
        self.description = f"OpenVINO {openvino_version()}, {streams}"
        clock = _Clock()
        # One slot is filled while the others are computed.
        self.slots = [
            RequestSlot(compiled.create_infer_request(), self.batch_size, clock)
            for _ in range(threads + 1)
        ]


class RequestSlot:
    """A batch of an inference request, in OpenVINO's own memory; methods as those of HostSlot."""

    def __init__(self, request: Any, size: int, clock: "_Clock"):
        self.size, self._request, self._clock = size, request, clock
        self._pixels = request.get_input_tensor().data
        # The callback must not refer to this slot: Python's garbage collector does not see the
        # reference from the request, so the cycle would keep every network in memory.
        request.set_callback(lambda ended: ended.set_result(time.perf_counter()), None)

    def put(self, start: int, frames: np.ndarray) -> None:
        self._pixels[start : start + len(frames)] = frames

    def launch(self, count: int) -> None:
        self._pixels[count:] = 0
        self._started, self._ended = time.perf_counter(), Future[float]()
        self._request.start_async(userdata=self._ended)

    def wait(self) -> tuple[np.ndarray, float]:
        self._request.wait()
        # A value too large for float16 becomes infinite, and `Batches` checks for that.
        with np.errstate(over="ignore"):
            features = self._request.get_output_tensor().data.astype(np.float16)
        return features, self._clock.seconds(self._started, self._ended.result())


class _Clock:
    """Counts seconds during which at least one request ran, if requests are waited for in order."""

    def __init__(self) -> None:
        self._until = 0.0

    def seconds(self, started: float, ended: float) -> float:
        seconds = max(0.0, ended - max(started, self._until))
        self._until = max(self._until, ended)
        return seconds


def openvino_version() -> str:
    """`2026.4.1`"""
    return openvino.__version__.partition("-")[0]


def converted_network(**source: Any) -> tuple[NetworkRecord, Any]:
    """A network's record, and its saved file (or the openvino.Model, if it cannot be saved).

    source: arguments of `load_trunk`. If the network was not saved before, this imports torch and
    converts it, which takes some seconds. Raises ConversionError, and InputError as `load_trunk`.
    """
    options = {"batch": BATCH, **_DEFAULTS, **source}
    name, weights = options.pop("name"), options.pop("weights")
    key, default_key = network_keys(name, weights, options, options | _DEFAULTS)
    for saved in map(load_network, dict.fromkeys((key, default_key))):
        if saved is not None and _has_options(saved[0], options):
            return saved
    from extract.backbone.model import load_trunk

    print(
        f"{name} is converted for OpenVINO: some seconds; it is kept for later runs",
        file=sys.stderr,
    )
    trunk = load_trunk(**source)
    return save_network(key, trunk.record, convert(trunk))


def _has_options(record: NetworkRecord, options: dict[str, Any]) -> bool:
    """Whether a network has these options, given or by default.

    The first extraction gives none. predict gives those of its checkpoint, and a continued
    extraction those of its store.
    """
    clips, own = record.clips, dict[str, Any](processor=record.preprocessing.processor)
    if clips is None:
        own["image_size"] = record.preprocessing.size
    else:  # clip-wise backbones refuse --image-size
        own |= {"clip_frames": clips.frames, "clip_fps": clips.fps, "per_clip": clips.per_clip}
    return all(
        options[name] in (default, own.get(name, default)) for name, default in _DEFAULTS.items()
    )


def convert(trunk: "Trunk") -> Any:
    """The trunk as an openvino.Model, from uint8 [batch, ..., 3] to float32 [batch, dim].

    Raises ConversionError if it cannot be converted, or if its features differ from PyTorch's.
    """
    import torch

    from extract.backbone.inference import TOLERANCE, relative_error
    from extract.backbone.torch_engine import FrameNetwork

    network = FrameNetwork(trunk, trunk.module).eval()
    generator = torch.Generator().manual_seed(0)
    batch = inputs_per_batch(BATCH, trunk.clips)
    shape = (batch, *trunk.input_shape)
    pixels = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
    try:
        # Tracing warns of values that are constant for this shape, which is the only one.
        with warnings.catch_warnings(), torch.inference_mode():
            warnings.simplefilter("ignore")
            expected = network(pixels)
            traced = torch.jit.trace(network, pixels, check_trace=False)
            model = _translated(traced, pixels)
        compiled = openvino.Core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
        features = torch.from_numpy(compiled(pixels.numpy())[0])
    except Exception as error:  # tracing and conversion can fail in any way
        raise ConversionError(describe_error(error)) from error
    same_shape = features.shape == expected.shape
    difference = relative_error(features, expected) if same_shape else float("inf")
    if difference > TOLERANCE:
        raise ConversionError(f"its features differ from PyTorch's by {difference:.2g}")
    return model


def _translated(traced: Any, pixels: Any) -> Any:
    """A traced module as an openvino.Model.

    This calls parts of `openvino.convert_model`, which takes twice as long and sends telemetry.
    """
    from openvino.frontend import FrontEndManager
    from openvino.frontend.pytorch.ts_decoder import TorchScriptPythonDecoder
    from openvino.passes import ConstantFolding, Manager

    frontend = FrontEndManager().load_by_framework("pytorch")
    decoder = TorchScriptPythonDecoder(traced, example_input=pixels)  # must outlive the conversion
    model = frontend.convert(frontend.load(decoder))
    model.inputs[0].get_node().set_element_type(openvino.Type.u8)
    model.reshape(list(pixels.shape))
    passes = Manager()
    # All shapes are known now. Folding them makes a saved network compile 3 times faster.
    passes.register_pass(ConstantFolding())
    passes.run_passes(model)
    return model
