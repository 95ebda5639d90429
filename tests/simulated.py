"""Workers with simulated parts: a backbone that imports no torch, and decoding that sleeps, crashes
or waits."""

import time
from typing import Any

import numpy as np

from decode_jobs import crash_on_a_gpu, held
from extract.decode.transform import Preprocessing
from extract.workers.worker import Worker
from simulated_decoding import sleep_to_decode

FRAMES, SIZE, DIM = 25, 224, 64
H100_FRAMES = 5000.0  # frames per second of the backbone


class SleepingBatches:
    def __init__(self) -> None:
        self.seconds = 0.0
        self.added = self.completed = 0

    def add(self, frames: np.ndarray, into: np.ndarray) -> None:
        self.added = self.completed = self.added + len(frames)
        into[: len(frames)] = frames[:, :1, 0, 0]
        time.sleep(len(frames) / H100_FRAMES)
        self.seconds += len(frames) / H100_FRAMES

    def finish(self) -> None:
        pass

    def discard(self) -> None:
        pass


class SleepingBackbone:
    """The part of a Backbone that a worker uses."""

    device, dim, precision, clips = "cpu", DIM, "fp32", None
    clip_options: dict[str, Any] = {}  # noqa: RUF012
    preprocessing = Preprocessing(SIZE, SIZE, "bilinear", (0.5,) * 3, (0.5,) * 3)

    def batches(self, **_: object) -> SleepingBatches:
        return SleepingBatches()

    def provenance(self) -> dict[str, Any]:
        return {"backbone": "simulated", "precision": self.precision}

    def describe(self) -> str:
        return "a simulated H100"


class SimulatedWorker(Worker):
    decode_job = staticmethod(sleep_to_decode)

    def __init__(self, *arguments: Any):
        super().__init__(*arguments, backbone=SleepingBackbone())  # type: ignore[arg-type]


class PixelBatches(SleepingBatches):
    """The features of a frame are a part of its middle row."""

    def add(self, frames: np.ndarray, into: np.ndarray) -> None:
        self.added = self.completed = self.added + len(frames)
        into[: len(frames)] = frames[:, SIZE // 2, :DIM, 0]


class PixelBackbone(SleepingBackbone):
    def batches(self, **_: object) -> PixelBatches:
        return PixelBatches()


class HeldWorker(Worker):
    """A worker that decodes only as far as a test allows (`decode_jobs.held`)."""

    decode_job = staticmethod(held)


class HeldPixelWorker(HeldWorker):
    def __init__(self, *arguments: Any):
        super().__init__(*arguments, backbone=PixelBackbone())  # type: ignore[arg-type]


class CrashingWorker(Worker):
    decode_job = staticmethod(crash_on_a_gpu)

    def __init__(self, *arguments: Any):
        super().__init__(*arguments, backbone=SleepingBackbone())  # type: ignore[arg-type]
