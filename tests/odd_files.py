"""Small files with odd geometries and headers, written by the tests."""

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np


def write_pictures(
    path: Path,
    size: tuple[int, int],
    frames: int,
    *,
    codec: str = "libx264",
    pix_fmt: str = "yuv420p",
    times: Sequence[float] | None = None,
) -> Path:
    """Write frames of a moving gradient of `size` (width, height); `times` are seconds, by default
    10 per second."""
    width, height = size
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=10)
        stream.width, stream.height, stream.pix_fmt = width, height, pix_fmt
        stream.codec_context.time_base = Fraction(1, 1000)
        for number in range(frames):
            row = ((np.arange(width) + 8 * number) % 256).astype(np.uint8)
            image = np.broadcast_to(row[None, :, None], (height, width, 3))
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24")
            seconds = number / 10 if times is None else times[number]
            frame.pts, frame.time_base = round(seconds * 1000), Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path
