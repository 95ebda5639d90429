"""Sample frame indices from the number of frames.

num_frames = 10, num_segments = 4        |0 1|2 3 4|5 6|7 8 9|
segment_centers                            1   3     6   8
"""

import numpy as np


def segment_centers(num_frames: int, num_segments: int) -> np.ndarray:
    """The middle frame of each of `num_segments` equal segments: int64 [num_segments], `int(i*L/n +
    L/(2n))`.

    TSN's test sampling (mmaction2 and tsn-pytorch agree). Fewer frames than segments give repeats.
    Raises ValueError for less than one frame or segment.
    """
    _check(num_frames, num_segments)
    return (2 * np.arange(num_segments, dtype=np.int64) + 1) * num_frames // (2 * num_segments)


def segment_random(num_frames: int, num_segments: int, rng: np.random.Generator) -> np.ndarray:
    """A random frame of each segment `[floor(i*L/n), floor((i+1)*L/n))`: int64 [num_segments],
    ascending.

    Every frame can be drawn, the last ones too. With fewer frames than segments, empty segments
    give their first frame, so that every frame is included and some repeat.
    """
    _check(num_frames, num_segments)
    edges = np.arange(num_segments + 1, dtype=np.int64) * num_frames // num_segments
    return edges[:-1] + rng.integers(0, np.maximum(np.diff(edges), 1))


def _check(num_frames: int, num_segments: int) -> None:
    if num_frames < 1 or num_segments < 1:
        raise ValueError(
            f"got {num_frames} frames and {num_segments} segments, expected at least one of each"
        )
