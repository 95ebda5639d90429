"""What end-to-end training sees of a video, prepared in decode children (numpy only, no torch: they start fast).

T = 3 segments, N = 2 frames each:   |....ab....|.ab.......|......ab..|      training: a random place in each
                                     |....ab....|....ab....|....ab....|      test: the middle of each
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from extract.decode import Span, decode
from extract.decode.transform import Preprocessing, augmentation_rng, crop_boxes, resize_short_side, training_view
from extract.sampling import segment_centres, segment_random


@dataclass(frozen=True)
class ClipPlan:
    """T segments of N frames, the weights' preprocessing, and for a test its crops (1, 3 or 10)."""

    segments: int
    frames_per_segment: int
    preprocessing: Preprocessing
    crops: int = 1

    @property
    def shape(self) -> tuple[int, ...]:
        """Of one prepared video, uint8: [crops, T, N, size, size, 3]."""
        size = self.preprocessing.size
        return (self.crops, self.segments, self.frames_per_segment, size, size, 3)


@dataclass(frozen=True)
class ClipJob:
    """A video, and for training (seed, epoch): its frames, crop and flip are a function of these and its id."""

    path: str
    video_id: str
    plan: ClipPlan
    seed: int = 0
    epoch: int = -1  # -1: a test, middle frames and evaluation crops
    span: Span | None = None  # of the file, where the video is a part of it


def prepare_clip(job: ClipJob, out: np.ndarray, on_duration: Callable[[float | None], None]) -> np.ndarray:
    """Decode one video into `out`, a flat uint8 buffer: [crops, T, N, size, size, 3] (training: one view).

    Returns the mask bool [T]: False for a segment that repeats an earlier one's frames (a video shorter than T).
    Raises VideoError where not one frame can be read.
    """
    plan, see = job.plan, job.plan.preprocessing
    rng = augmentation_rng(job.seed, job.video_id, f"epoch {job.epoch}") if job.epoch >= 0 else None
    T, N = plan.segments, plan.frames_per_segment

    def sample(num_frames: int) -> np.ndarray:
        first = segment_centres(num_frames, T) if rng is None else segment_random(num_frames, T, rng)
        # N neighbours round the chosen frame, moved inside where the video begins or ends.
        start = np.clip(first - (N - 1) // 2, 0, max(num_frames - N, 0))
        return np.minimum(start[:, None] + np.arange(N), num_frames - 1).ravel()

    decoded = decode(
        job.path, sample, span=job.span, resize=lambda frame: resize_short_side(frame, see), on_duration=on_duration
    )
    height, width = decoded.frames.shape[1:3]
    views = out[: np.prod(plan.shape)].reshape(-1, T * N, see.size, see.size, 3)
    if rng is None:
        for view, ((top, left, tall, wide), flip) in enumerate(crop_boxes(height, width, see.size, plan.crops)):
            crops = decoded.frames[:, top : top + tall, left : left + wide]
            views[view] = crops[:, :, ::-1] if flip else crops
    else:
        see_clip = training_view(height, width, see, rng)
        for place, frame in enumerate(decoded.frames):
            views[0, place] = see_clip(frame)
    segments = decoded.indices.reshape(T, N)
    same = (segments[:, None] == segments[None]).all(axis=2)
    return ~np.tril(same, k=-1).any(axis=1)
