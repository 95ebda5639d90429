"""Decoding that sleeps. It is not in `simulated`, since decode children must start without
torch."""

import time

import numpy as np

from extract.decode import VideoError
from extract.decode.jobs import Job, Prepared

DECODE_SECONDS = 0.2  # one core, one video


def sleep_to_decode(job: Job, out: np.ndarray) -> list[Prepared | VideoError]:
    _, ((name, _),), plan = job
    time.sleep(DECODE_SECONDS)
    out[: plan.row_bytes] = sum(name.encode()) % 251
    indices = np.tile(np.arange(plan.frames, dtype="<i4"), plan.num_views)
    clips = np.arange(len(indices), dtype="<i4").reshape(plan.num_views, plan.frames, 1)
    return [Prepared(indices, indices.astype("<f4") / 25, clips, plan.frames)]
