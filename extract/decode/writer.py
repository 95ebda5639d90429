"""Write frames to a video file, the opposite of `decode`."""

from collections.abc import Iterable
from fractions import Fraction

import av
import numpy as np

from extract import StrPath
from extract.durable import replacing


def write_video(path: StrPath, frames: Iterable[np.ndarray], *, rate: float) -> None:
    """Write uint8 [H, W, 3] RGB frames, H and W even, as H.264 in MP4 at `rate` frames per second.

    The file appears completely or not at all. Raises ValueError without a frame, and for sizes that
    differ or are odd.
    """
    with replacing(path) as partial, av.open(str(partial), "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=Fraction(rate).limit_denominator(1000))
        stream.options = {"preset": "veryfast", "crf": "20", "threads": "1"}
        size: tuple[int, ...] = ()
        for frame in frames:
            if not size:
                size = frame.shape
                stream.height, stream.width, stream.pix_fmt = size[0], size[1], "yuv420p"
            if frame.shape != size or size[0] % 2 or size[1] % 2:
                raise ValueError(
                    f"got a frame {frame.shape} after {size}; all must have one size, of even "
                    "height and width"
                )
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(frame))))
        if not size:
            raise ValueError(f"got no frame to write to {path}")
        container.mux(stream.encode(None))
