"""A network run by OpenVINO on a CPU: one inference stream per core, a batch of its own in each.

Streams do not wait for each other at every layer, as PyTorch's threads do: on a machine that others
use too, one core taken away slows one stream.
"""

import sys
import threading
import time
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import openvino

from extract.backbone.batches import inputs_per_batch
from extract.backbone.networks import NetworkRecord, load_network, network_key, save_network
from extract.cores import has_native_bf16

if TYPE_CHECKING:
    from extract.backbone.model import Trunk

BATCH = 8  # always: what a kernel rounds must not depend on how many frames wait
TYPES = {
    "fp32": "f32",
    "bf16": "bf16",
}  # what of an int8 network is not in int8 is in the CPU's own precision


class ConversionError(Exception):
    """OpenVINO does not run this network; the message says why."""


class OpenVinoEngine:
    """Runs a converted network; a frame's features are the same bytes for any number of threads."""

    name = "openvino"

    def __init__(self, model: Any, *, precision: str, threads: int):
        """model: the path of a saved network, or one in memory."""
        compiled = openvino.Core().compile_model(
            model,
            "CPU",
            {
                "NUM_STREAMS": threads,
                "INFERENCE_NUM_THREADS": threads,
                "INFERENCE_PRECISION_HINT": TYPES["bf16" if has_native_bf16() else "fp32"]
                if precision == "int8"
                else TYPES[precision],
                # Streams that are bound to cores would share the same ones with those of another
                # worker.
                "ENABLE_CPU_PINNING": False,
            },
        )
        self.precision, self.batch_size = precision, compiled.input(0).shape[0]
        self.record = {"engine": {"name": self.name, "version": openvino_version()}}
        streams = f"{threads} streams" if threads > 1 else "1 stream"
        self.description = f"OpenVINO {openvino_version()}, {streams}"
        clock = _Clock()
        # One is filled while the others are computed.
        self.slots = [
            RequestSlot(compiled.create_infer_request(), self.batch_size, clock)
            for _ in range(threads + 1)
        ]


class RequestSlot:
    """A batch of an inference request, written into OpenVINO's own memory; see HostSlot."""

    def __init__(self, request: Any, size: int, clock: "_Clock"):
        self.size, self._request, self._clock = size, request, clock
        self._pixels = request.get_input_tensor().data
        # Not a method of this slot: the request would hold the slot that holds it, in C++, where
        # Python's garbage collector does not look. Every network would stay in memory.
        self._completion = _Completion()
        request.set_callback(self._completion.ended, None)

    def put(self, place: int, frames: np.ndarray) -> None:
        self._pixels[place : place + len(frames)] = frames

    def launch(self, count: int) -> None:
        self._pixels[count:] = 0
        self._completion.done.clear()
        self._started = time.perf_counter()
        self._request.start_async()

    def wait(self) -> tuple[np.ndarray, float]:
        self._request.wait()
        self._completion.done.wait()
        # Too large for float16 becomes infinite, which is looked for.
        with np.errstate(over="ignore"):
            features = self._request.get_output_tensor().data.astype(np.float16)
        return features, self._clock.seconds(self._started, self._completion.time)


class _Completion:
    """When a request ended last."""

    def __init__(self) -> None:
        self.done, self.time = threading.Event(), 0.0

    def ended(self, _: Any) -> None:
        self.time = time.perf_counter()
        self.done.set()


class _Clock:
    """Seconds in which at least one of the requests was computed, which are waited for in the order
    of their start."""

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
    """A network's record, and its file (or the network itself, if it cannot be kept).

    source: arguments of `load_trunk`. Without a saved network this imports torch and converts: some
    seconds. Raises ConversionError, and InputError as `load_trunk`.
    """
    key = network_key(**source, batch=BATCH)
    if (saved := load_network(key)) is not None:
        return saved
    from extract.backbone.model import load_trunk

    print(
        f"{source['name']} is converted for OpenVINO: some seconds, at this start only",
        file=sys.stderr,
    )
    trunk = load_trunk(**source)
    record = NetworkRecord(
        trunk.name,
        trunk.dim,
        trunk.preprocessing,
        trunk.weights,
        trunk.input_shape,
        trunk.clips,
        {},
    )
    model = convert(trunk)
    return record, save_network(key, record, lambda path: save_model(model, path)) or model


def save_model(model: Any, path: Path) -> None:
    openvino.save_model(model, path, compress_to_fp16=False)


def convert(trunk: "Trunk") -> Any:
    """The trunk for OpenVINO, pixels uint8 [batch, ..., 3] to features float32 [batch, dim].

    Raises ConversionError if it cannot be converted, or if it gives other features than in PyTorch.
    """
    import torch

    from extract.backbone.inference import TOLERANCE, relative_error
    from extract.backbone.torch_engine import FrameNetwork

    network = FrameNetwork(trunk, trunk.module).eval()
    generator = torch.Generator().manual_seed(0)
    batch = inputs_per_batch(BATCH, trunk.clips)
    pixels = torch.randint(
        0, 256, (batch, *trunk.input_shape), dtype=torch.uint8, generator=generator
    )
    try:
        # Tracing warns of what is constant for this shape, which is the only one.
        with warnings.catch_warnings(), torch.inference_mode():
            warnings.simplefilter("ignore")
            expected = network(pixels)
            traced = torch.jit.trace(network, pixels, check_trace=False)
            model = _translated(traced, pixels)
        compiled = openvino.Core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
        got = torch.from_numpy(compiled(pixels.numpy())[0])
    except Exception as error:  # tracing and conversion can fail in any way
        raise ConversionError(
            f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"
        ) from error
    difference = relative_error(got, expected) if got.shape == expected.shape else float("inf")
    if difference > TOLERANCE:
        raise ConversionError(f"its features differ from PyTorch's by {difference:.2g}")
    return model


def _translated(traced: Any, pixels: Any) -> Any:
    """By the parts of `openvino.convert_model`, which also sends telemetry, and takes twice as
    long."""
    from openvino.frontend import FrontEndManager
    from openvino.frontend.pytorch.ts_decoder import TorchScriptPythonDecoder
    from openvino.passes import ConstantFolding, Manager

    frontend = FrontEndManager().load_by_framework("pytorch")
    decoder = TorchScriptPythonDecoder(traced, example_input=pixels)  # must outlive the conversion
    model = frontend.convert(frontend.load(decoder))
    model.inputs[0].get_node().set_element_type(openvino.Type.u8)
    model.reshape(list(pixels.shape))
    passes = Manager()
    passes.register_pass(
        ConstantFolding()
    )  # of shapes that are known now: a saved network compiles 3 times faster
    passes.run_passes(model)
    return model
