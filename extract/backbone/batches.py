"""Frames in, features out, in batches of a constant size, several of them under way on a device at once.

    frames -> [ being filled | copied to the device | computed, copied back ] -> features

A slot is the memory of one batch. While one is filled the others are under way, so a device never waits for the host
where there are three; a device that computes at once (the CPU) has one.
"""

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import numpy as np
import torch
from torch import Tensor

Run = Callable[[Tensor], Tensor]  # called in inference mode, which torch.compile does not let it enter itself


class Batches:
    """Frames of any number of videos, collected into whole batches; features go where `add` was told, in its order.

    Of the frames that were `added` the first `returned` have their features, or were dropped. `check` sees the features
    of each batch, without padding, and raises where they are bad. After any error what was under way is waited for and
    dropped, and the slots can be used again.
    """

    def __init__(self, slots: Sequence[Any], *, check: Callable[[np.ndarray], None]):
        self.seconds = 0.0  # that the device computed
        self.added = self.returned = 0
        self._free, self._check = deque(slots), check
        self._under_way: deque[tuple[Any, list[np.ndarray]]] = deque()
        self._filled, self._targets = 0, list[np.ndarray]()

    def add(self, frames: Any, into: np.ndarray) -> None:
        """Frames uint8 [n, size, size, 3], whose features will be `into` float16 [n, dim], when `finish` returns at
        the latest."""
        self.added += len(frames)
        while len(frames):
            slot = self._free[0]
            count = min(len(frames), slot.size - self._filled)
            slot.put(self._filled, frames[:count])
            self._targets.append(into[:count])
            self._filled += count
            frames, into = frames[count:], into[count:]
            if self._filled == slot.size:
                self._launch()

    def finish(self) -> None:
        """Compute what waits for a whole batch, and wait for all that is under way."""
        if self._filled:
            self._launch()
        while self._under_way:
            self._take()

    def _launch(self) -> None:
        slot, count = self._free.popleft(), self._filled
        self._under_way.append((slot, self._targets))
        self._filled, self._targets = 0, []
        with self._dropped_after_an_error():
            slot.launch(count)
        if not self._free:
            self._take()

    def _take(self) -> None:
        slot, targets = self._under_way[0]
        with self._dropped_after_an_error():
            features, seconds = slot.wait()
            self._check(features[: sum(map(len, targets))])
        start = 0
        for into in targets:
            into[:] = features[start : start + len(into)]
            start += len(into)
        self.returned += start
        self.seconds += seconds
        self._under_way.popleft()
        self._free.append(slot)

    @contextmanager
    def _dropped_after_an_error(self) -> Iterator[None]:
        try:
            yield
        except BaseException:
            while self._under_way:
                slot, _ = self._under_way.popleft()
                with suppress(Exception):
                    slot.wait()
                self._free.append(slot)
            self.returned = self.added
            raise


class HostSlot:
    """A batch on the CPU: computed where it is launched.

    run: uint8 [batch, size, size, 3] on the device -> float16 [batch, dim], perhaps still being computed.
    batch: frames to write over, which say how large one is.
    """

    def __init__(self, run: Run, batch: Tensor):
        self.size, self._run, self._frames = len(batch), run, batch

    def put(self, place: int, frames: np.ndarray) -> None:
        """Copy uint8 frames [n, size, size, 3] to `place` and after."""
        self._frames.numpy()[place : place + len(frames)] = frames

    def launch(self, count: int) -> None:
        """Begin to compute, zeros in the place of frames from `count` on; the batch is under way until `wait` ends."""
        self._frames[count:] = 0
        started = time.perf_counter()
        with torch.inference_mode():
            self._features = self._run(self._frames).numpy()
        self._seconds = time.perf_counter() - started

    def wait(self) -> tuple[np.ndarray, float]:
        """Features float16 [batch, dim], valid until the next `put`, and the seconds that the device computed."""
        return self._features, self._seconds


class CudaSlot:
    """A batch on a GPU: frames go through pinned memory on one stream, are computed and brought back on another.

    Between `launch` and `wait` nothing waits for the GPU, which copies this batch while it computes the one before.
    """

    def __init__(self, run: Run, batch: Tensor, dim: int, *, copying: torch.cuda.Stream, computing: torch.cuda.Stream):
        self.size, self._run, self._copying, self._computing = len(batch), run, copying, computing
        self._pinned, self._frames = batch.pin_memory(), batch.to(copying.device)
        self._features = torch.empty(len(batch), dim, dtype=torch.float16, pin_memory=True)
        self._copied, self._begun, self._ended = (torch.cuda.Event(enable_timing=True) for _ in range(3))

    def put(self, place: int, frames: Any) -> None:
        """Frames in the host's memory are copied twice, those on the GPU (whole, not still being made) once."""
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


def gpu_slots(run: Run, batch: Tensor, dim: int, *, device: torch.device, form: str) -> list[CudaSlot]:
    """One slot to fill and two to be under way on a GPU, which runs the network eager, as graphs, or compiled."""
    copying, computing = (torch.cuda.Stream(device) for _ in range(2))
    torch.cuda.synchronize(device)  # the network was moved there on another stream than these
    if form == "compiled":
        run = torch.compile(run, dynamic=False)
    if form != "eager":
        run = _captured(run, batch.to(device), computing)
    return [CudaSlot(run, batch, dim, copying=copying, computing=computing) for _ in range(3)]


def _captured(run: Run, frames: Tensor, stream: torch.cuda.Stream) -> Run:
    """`run` as a CUDA graph on `stream`: the kernels of one call, recorded, and replayed with one launch."""
    with torch.inference_mode(), torch.cuda.stream(stream):
        for _ in range(3):  # what libraries allocate and choose at their first calls must not be recorded
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
