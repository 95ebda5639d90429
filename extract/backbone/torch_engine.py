"""A network run by PyTorch: eager on a CPU; eager, as CUDA graphs, or compiled on a GPU.

On a CPU it is the fallback for what OpenVINO does not run, and continues the stores that it began.
"""

import copy
import time
from collections.abc import Callable
from math import ceil
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from extract import RunError
from extract.backbone.batches import inputs_per_batch
from extract.backbone.inference import fold_batch_norms
from extract.backbone.model import Trunk

Run = Callable[
    [Tensor], Tensor
]  # called in inference mode, which torch.compile does not let it enter itself

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
CPU_BATCH = (
    8  # larger ones fall out of a CPU's caches: EfficientNet-Lite0 loses a fifth from 8 to 16
)
GPU_BATCH = 512  # at most


class FrameNetwork(nn.Module):
    """A trunk, and the normalization before it: uint8 [n, ..., H, W, 3] -> float [n, dim], on
    frames or on clips."""

    scale: Tensor
    shift: Tensor

    def __init__(self, trunk: Trunk, module: nn.Module, dtype: torch.dtype = torch.float32):
        super().__init__()
        self.module, self._dtype = module, dtype
        # (pixel / 255 - mean) / std as one multiply-add
        mean, std = torch.tensor(trunk.preprocessing.mean), torch.tensor(trunk.preprocessing.std)
        self.register_buffer("scale", 1 / (255 * std))
        self.register_buffer("shift", -mean / std)

    def forward(self, pixels: Tensor) -> Tensor:
        normalized = torch.addcmul(self.shift, pixels.to(torch.float32), self.scale)
        return self.module(
            normalized.movedim(-1, 1).to(self._dtype)
        )  # images are stored channels-last


class TorchEngine:
    """Runs a trunk in one precision on one device.

    Every batch has `batch_size` frames: what a kernel rounds must not depend on how many frames
    wait. form: how a GPU runs it, eager, graphs or compiled; "" on a CPU.
    """

    name = "torch"

    def __init__(
        self,
        trunk: Trunk,
        graph: nn.Module | None,
        *,
        device: torch.device,
        precision: str,
        form: str,
        batch: int,
    ):
        dtype = DTYPES[precision]
        network = copy.deepcopy(trunk.module if graph is None else graph)
        network.to(device, dtype)
        for parameter in network.parameters():
            if parameter.ndim == 4:  # of a convolution; others have no such format
                parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)
        self._network = FrameNetwork(trunk, network, dtype).to(device=device)
        self.precision, self.batch_size = precision, batch
        self.record = {"form": form} if form == "compiled" else {}
        folding = "as timm built it" if graph is None else "batch norm folded"
        pixels = torch.zeros(batch, *trunk.input_shape, dtype=torch.uint8)
        if device.type == "cuda":
            self.description = f"{folding}, {form}"
            self.slots: list[Any] = gpu_slots(
                self._run, pixels, trunk.dim, device=device, form=form
            )
        else:
            self.description = f"PyTorch, {torch.get_num_threads()} threads, {folding}"
            self.slots = [HostSlot(self._run, pixels)]

    def _run(self, pixels: Tensor) -> Tensor:
        """uint8 [batch, ..., H, W, 3] on the device -> float16 [batch, dim], perhaps still being
        computed."""
        return self._network(pixels).to(torch.float16)


def on_cpu(trunk: Trunk, *, precision: str, threads: int) -> TorchEngine:
    torch.set_num_threads(threads)
    graph = fold_batch_norms(trunk.module, trunk.example())
    batch = inputs_per_batch(CPU_BATCH, trunk.clips)
    return TorchEngine(
        trunk, graph, device=torch.device("cpu"), precision=precision, form="", batch=batch
    )


def on_gpu(
    trunk: Trunk, *, device: torch.device, precision: str, form: str, frames: int | None
) -> tuple[TorchEngine, str]:
    """The engine, and how its form was chosen: "auto" times one batch, eager and as graphs, which
    give the same bytes.

    frames: how many come together, if that is known: they are then spread evenly over batches.
    """
    graph = fold_batch_norms(trunk.module, trunk.example())
    forms = ("eager", "graphs") if form == "auto" else (form,)
    most = inputs_per_batch(GPU_BATCH, trunk.clips)
    batch = spread_evenly(frames, most) if frames is not None else max(1, most // 2)
    try:
        engines = [
            TorchEngine(trunk, graph, device=device, precision=precision, form=name, batch=batch)
            for name in forms
        ]
        if len(engines) == 1:
            return engines[0], ""
        speeds = [_frames_per_second(engine, trunk) for engine in engines]
    except torch.OutOfMemoryError:
        raise RunError(
            f"{device} has too little free memory to run {trunk.name} (nvidia-smi says who else uses it); smaller "
            "batches need less: try --block-size 8, since a batch has at most a block's frames"
        ) from None
    timings = ", ".join(f"{name} {speed:.3g}" for name, speed in zip(forms, speeds, strict=True))
    return engines[
        speeds.index(max(speeds))
    ], f" (the faster of {timings} frames/s, timed on one batch)"


def spread_evenly(count: int, most: int) -> int:
    """The batch size that spreads `count` frames over as few batches of at most `most` as possible,
    with less padding.

    600 frames and at most 512: two batches of 300.
    """
    return ceil(count / ceil(count / most))


def _frames_per_second(engine: TorchEngine, trunk: Trunk) -> float:
    pixels = np.zeros((engine.batch_size, *trunk.input_shape), np.uint8)
    slot = engine.slots[0]

    def batch() -> None:
        slot.put(0, pixels)
        slot.launch(len(pixels))
        slot.wait()

    batch()  # the first call makes the kernels
    start = time.perf_counter()
    batch()
    return len(pixels) / (time.perf_counter() - start)


class HostSlot:
    """A batch on the CPU: computed where it is launched.

    run: uint8 [batch, size, size, 3] on the device -> float16 [batch, dim], perhaps still being
    computed. batch: frames to write over, which say how large one is.
    """

    def __init__(self, run: Run, batch: Tensor):
        self.size, self._run, self._frames = len(batch), run, batch

    def put(self, place: int, frames: np.ndarray) -> None:
        """Copy uint8 frames [n, size, size, 3] to `place` and after."""
        self._frames.numpy()[place : place + len(frames)] = frames

    def launch(self, count: int) -> None:
        """Begin to compute, zeros instead of frames from `count` on; the batch is under way
        until `wait` ends."""
        self._frames[count:] = 0
        started = time.perf_counter()
        with torch.inference_mode():
            self._features = self._run(self._frames).numpy()
        self._seconds = time.perf_counter() - started

    def wait(self) -> tuple[np.ndarray, float]:
        """Features float16 [batch, dim], valid until the next `put`, and the seconds that the
        device computed."""
        return self._features, self._seconds


class CudaSlot:
    """A batch on a GPU: frames go through pinned memory on one stream, are computed and brought
    back on another.

    Between `launch` and `wait` nothing waits for the GPU, which copies this batch while it computes
    the one before.
    """

    def __init__(
        self,
        run: Run,
        batch: Tensor,
        dim: int,
        *,
        copying: torch.cuda.Stream,
        computing: torch.cuda.Stream,
    ):
        self.size, self._run, self._copying, self._computing = len(batch), run, copying, computing
        self._pinned, self._frames = batch.pin_memory(), batch.to(copying.device)
        self._features = torch.empty(len(batch), dim, dtype=torch.float16, pin_memory=True)
        self._copied, self._begun, self._ended = (
            torch.cuda.Event(enable_timing=True) for _ in range(3)
        )

    def put(self, place: int, frames: Any) -> None:
        """Frames in the host's memory are copied twice, those on the GPU (whole, not still being
        made) once."""
        here = slice(place, place + len(frames))
        if isinstance(frames, np.ndarray):
            self._pinned.numpy()[here] = frames
            frames = self._pinned[here]
        else:
            frames.record_stream(self._copying)
        with torch.cuda.stream(self._copying):
            self._frames[here].copy_(frames, non_blocking=True)

    def launch(self, count: int) -> None:
        with torch.cuda.stream(self._copying):
            self._frames[count:].zero_()
            self._copied.record()
        with torch.inference_mode(), torch.cuda.stream(self._computing):
            self._copied.wait()
            self._begun.record()
            self._features.copy_(self._run(self._frames), non_blocking=True)
            self._ended.record()

    def wait(self) -> tuple[np.ndarray, float]:
        self._ended.synchronize()
        return self._features.numpy(), self._begun.elapsed_time(self._ended) / 1000


def gpu_slots(
    run: Run, batch: Tensor, dim: int, *, device: torch.device, form: str
) -> list[CudaSlot]:
    """One slot to fill and two to be under way on a GPU, which runs the network eager, as graphs,
    or compiled."""
    copying, computing = (torch.cuda.Stream(device) for _ in range(2))
    torch.cuda.synchronize(device)  # the network was moved there on another stream than these
    if form == "compiled":
        run = torch.compile(run, dynamic=False)
    if form != "eager":
        run = _captured(run, batch.to(device), computing)
    return [CudaSlot(run, batch, dim, copying=copying, computing=computing) for _ in range(3)]


def _captured(run: Run, frames: Tensor, stream: torch.cuda.Stream) -> Run:
    """`run` as a CUDA graph on `stream`: the kernels of one call, recorded, and replayed with one
    launch."""
    with torch.inference_mode(), torch.cuda.stream(stream):
        for _ in range(
            3
        ):  # what libraries allocate and choose at their first calls must not be recorded
            run(frames)
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
            features = run(frames)

    def replay(new: Tensor) -> Tensor:
        frames.copy_(new, non_blocking=True)
        graph.replay()
        return features

    return replay
