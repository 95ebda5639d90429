"""A network run by PyTorch: eager on a CPU; eager, as CUDA graphs, or compiled on a GPU.

On a CPU it runs the networks that OpenVINO cannot run, and continues the stores that it began.
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

# uint8 [batch, ..., H, W, 3] on the device -> float16 [batch, dim], perhaps still being computed.
# Called in inference mode, which a compiled function cannot enter itself.
Run = Callable[[Tensor], Tensor]

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
CPU_BATCH = 8  # frames; 16 do not fit into a CPU's caches: EfficientNet-Lite0 loses a fifth
GPU_BATCH = 512  # frames at most


class FrameNetwork(nn.Module):
    """Normalization and a trunk: uint8 frames or clips [n, ..., H, W, 3] to float [n, dim]."""

    scale: Tensor
    shift: Tensor

    def __init__(self, trunk: Trunk, module: nn.Module, dtype: torch.dtype = torch.float32):
        super().__init__()
        self.module, self._dtype = module, dtype
        # (pixel / 255 - mean) / std as one multiply-add.
        mean, std = torch.tensor(trunk.preprocessing.mean), torch.tensor(trunk.preprocessing.std)
        self.register_buffer("scale", 1 / (255 * std))
        self.register_buffer("shift", -mean / std)

    def forward(self, pixels: Tensor) -> Tensor:
        normalized = torch.addcmul(self.shift, pixels.to(torch.float32), self.scale)
        return self.module(normalized.movedim(-1, 1).to(self._dtype))  # stored channels-last


class TorchEngine:
    """Runs a trunk in one precision on one device.

    Every batch has `batch_size` inputs, because the rounding of kernels depends on the batch size.

    Args:
        graph: the trunk's module with batch norms folded, None if that is not possible.
        form: how a GPU runs it: eager, graphs or compiled; "" on a CPU.
    """

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
            if parameter.ndim == 4:  # only weights of convolutions have a memory format
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
        return self._network(pixels).to(torch.float16)


def on_cpu(trunk: Trunk, *, precision: str, threads: int) -> TorchEngine:
    """The engine on a CPU."""
    torch.set_num_threads(threads)
    graph = fold_batch_norms(trunk.module, trunk.example())
    batch = inputs_per_batch(CPU_BATCH, trunk.clips)
    return TorchEngine(
        trunk, graph, device=torch.device("cpu"), precision=precision, form="", batch=batch
    )


def on_gpu(
    trunk: Trunk, *, device: torch.device, precision: str, form: str, frames: int | None
) -> tuple[TorchEngine, str]:
    """The engine on a GPU, and a note on how its form was chosen.

    form: "auto" times one batch, eager and as graphs; their features are the same bytes. frames:
    how many frames come together, if that is known; they are then spread evenly over batches.
    """
    graph = fold_batch_norms(trunk.module, trunk.example())
    forms = ("eager", "graphs") if form == "auto" else (form,)
    limit = inputs_per_batch(GPU_BATCH, trunk.clips)
    batch = spread_evenly(frames, limit) if frames is not None else max(1, limit // 2)
    try:
        engines = {
            name: TorchEngine(
                trunk, graph, device=device, precision=precision, form=name, batch=batch
            )
            for name in forms
        }
        if form != "auto":
            return engines[form], ""
        speeds = {name: _frames_per_second(engine, trunk) for name, engine in engines.items()}
    except torch.OutOfMemoryError:
        raise RunError(
            f"{device} has too little free memory to run {trunk.name} (nvidia-smi shows the "
            "processes that use it); smaller batches need less: try --block-size 8, since a batch "
            "has at most a block's frames"
        ) from None
    timings = ", ".join(f"{name} {speed:.3g}" for name, speed in speeds.items())
    fastest = engines[max(speeds, key=speeds.__getitem__)]
    return fastest, f" (the faster of {timings} frames/s, timed on one batch)"


def spread_evenly(count: int, limit: int) -> int:
    """The batch size with the least padding for as few batches of at most `limit` as possible.

    For example, 600 frames and a limit of 512 make two batches of 300.
    """
    return ceil(count / ceil(count / limit))


def _frames_per_second(engine: TorchEngine, trunk: Trunk) -> float:
    pixels = np.zeros((engine.batch_size, *trunk.input_shape), np.uint8)
    slot = engine.slots[0]

    for _ in range(2):  # the first batch also loads the kernels
        start = time.perf_counter()
        slot.put(0, pixels)
        slot.launch(len(pixels))
        slot.wait()
    return len(pixels) / (time.perf_counter() - start)


class HostSlot:
    """A batch on the CPU, computed by `launch` itself.

    batch: memory for its frames, uint8 [batch, ..., H, W, 3].
    """

    def __init__(self, run: Run, batch: Tensor):
        self.size, self._run, self._frames = len(batch), run, batch

    def put(self, start: int, frames: np.ndarray) -> None:
        """Copy frames uint8 [n, ..., H, W, 3] into the batch, at `start` and after."""
        self._frames.numpy()[start : start + len(frames)] = frames

    def launch(self, count: int) -> None:
        """Start to compute the first `count` frames, and zeros for the rest of the batch.

        `put` must not be called again before `wait`.
        """
        self._frames[count:] = 0
        started = time.perf_counter()
        with torch.inference_mode():
            self._features = self._run(self._frames).numpy()
        self._seconds = time.perf_counter() - started

    def wait(self) -> tuple[np.ndarray, float]:
        """Features float16 [batch, dim], valid until the next `put`, and the seconds they took."""
        return self._features, self._seconds


class CudaSlot:
    """A batch on a GPU, copied there on one stream through pinned memory, and computed on another.

    Nothing waits for the GPU between `launch` and `wait`, so it copies one batch while it computes
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

    def put(self, start: int, frames: np.ndarray | Tensor) -> None:
        """Copy frames from the host's memory, or a tensor on the GPU that is computed already."""
        part = slice(start, start + len(frames))
        if isinstance(frames, np.ndarray):
            self._pinned.numpy()[part] = frames
            frames = self._pinned[part]
        else:
            frames.record_stream(self._copying)
        with torch.cuda.stream(self._copying):
            self._frames[part].copy_(frames, non_blocking=True)

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
    """Three slots of a GPU: one is filled while the GPU works on two."""
    copying, computing = (torch.cuda.Stream(device) for _ in range(2))
    torch.cuda.synchronize(device)  # the network was copied to the GPU on another stream
    if form == "compiled":
        run = torch.compile(run, dynamic=False)
    if form != "eager":
        run = _captured(run, batch.to(device), computing)
    return [CudaSlot(run, batch, dim, copying=copying, computing=computing) for _ in range(3)]


def _captured(run: Run, frames: Tensor, stream: torch.cuda.Stream) -> Run:
    """`run` as a CUDA graph: the kernels of one call, recorded and replayed with one launch."""
    with torch.inference_mode(), torch.cuda.stream(stream):
        # Libraries allocate memory and choose kernels at their first calls, before recording.
        for _ in range(3):
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
