"""A worker whose decoding and backbone are sleeps, as long as they take on machines that are not at hand."""

import time
from functools import cached_property
from typing import Any

import numpy as np
import torch

from extract.backbone.model import Backbone
from extract.decode import VideoError
from extract.decode.transform import Job, Prepared, Preprocessing
from extract.workers.worker import Worker

FRAMES, SIZE, DIM = 25, 224, 64
DECODE_SECONDS = 0.2  # one core, one video
H100_FRAMES = 5000.0  # that the backbone takes a second


def sleep_to_decode(job: Job, out: np.ndarray, on_duration: Any) -> list[Prepared | VideoError]:
    _, ((name, _),), plan = job
    time.sleep(DECODE_SECONDS)
    out[: plan.row_bytes] = sum(name.encode()) % 251
    indices = np.tile(np.arange(plan.frames, dtype="<i4"), (plan.shape[0], 1))
    return [Prepared(indices, indices.astype("<f4") / 25, plan.frames, "")]


class SleepingBatches:
    def __init__(self) -> None:
        self.seconds = 0.0

    def add(self, frames: np.ndarray, into: np.ndarray) -> None:
        into[: len(frames)] = frames[:, :1, 0, 0]
        time.sleep(len(frames) / H100_FRAMES)
        self.seconds += len(frames) / H100_FRAMES

    def finish(self) -> None:
        pass


class SleepingBackbone:
    """As much of a Backbone as a worker uses."""

    device, dim, precision = torch.device("cpu"), DIM, "fp32"
    preprocessing = Preprocessing(SIZE, SIZE, "bilinear", (0.5,) * 3, (0.5,) * 3)

    def batches(self) -> SleepingBatches:
        return SleepingBatches()

    def provenance(self) -> dict[str, Any]:
        return {"backbone": "simulated"}

    def describe(self) -> str:
        return "a simulated H100"


class SimulatedWorker(Worker):
    decode_job = staticmethod(sleep_to_decode)

    @cached_property
    def _backbone(self) -> Backbone:
        return SleepingBackbone()  # type: ignore[return-value]
