"""Long videos in windows: rows of so many seconds each, or of so many frames a second."""

from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

from extract.cli import InputError
from extract.listing.tables import span_id
from extract.listing.videos import Video
from extract.options import Options

_OPENED_AT_ONCE = 8


def settle(options: Options) -> Options:
    """Options with `window` and `frames` that say what `fps` said, and a `stride`; `InputError` for what cannot be.

    `fps` and `window` together give the frames a window, `fps` alone a window in which as many as `frames` are shown.
    """
    window, stride, fps, frames = options.window, options.stride, options.fps, options.frames
    for name, value, what in (
        ("window", window, "seconds"),
        ("stride", stride, "seconds"),
        ("fps", fps, "frames a second"),
    ):
        if value is not None and not 0.001 <= value < 1e6:  # ids count milliseconds
            raise InputError(f"--{name} {value:g}: expected {what}, from 0.001 on")
    if fps is not None:
        shown = frames if window is None else max(1, round(fps * window))
        if frames not in (shown, Options.__dataclass_fields__["frames"].default):
            raise InputError(
                f"--fps {fps:g} shows {shown} frames in a window of {window:g} s, and --frames is {frames}; drop one"
            )
        window, frames = frames / fps if window is None else window, shown
    if stride is not None and (window is None or stride > window):
        raise InputError(f"--stride {stride:g} is that of windows, and at most their length; give --window too")
    return replace(options, window=window, stride=stride or window, fps=None, frames=frames)


def window_spans(seconds: float, window: float, stride: float) -> list[tuple[float, float]]:
    """Where the windows of a video of so many seconds begin and end, in whole milliseconds.

    seconds = 9, window = 4, stride = 4     |0   4|4    9|       a rest shorter than half a window joins the last
    seconds = 10, window = 4, stride = 3    |0   4|
                                               |3   7|
                                                  |6   10|
    """
    length, window, stride = (round(1000 * value) for value in (seconds, window, stride))
    length = max(length, 1)
    whole = max(0, (length - window) // stride + 1)
    spans = [(place * stride, place * stride + window) for place in range(whole)]
    rest = length - spans[-1][1] if spans else length
    if not spans or 2 * rest >= window:
        spans.append((whole * stride, length))
    elif rest:
        spans[-1] = (spans[-1][0], length)
    return [(start / 1000, end / 1000) for start, end in spans]


def cut_windows(videos: Iterable[Video], window: float, stride: float) -> list[Video]:
    """Windows of videos, or of spans of them; a group each, where none is known, so that no split tears one apart.

    A file that cannot be opened stays whole, and fails when it is read.
    """
    from extract.decode import VideoError
    from extract.decode.packets import length_of

    def length(video: Video) -> float | None:
        try:
            return length_of(video.path) if video.span is None else video.span[1] - video.span[0]
        except VideoError:
            return None

    videos, cut = list(videos), []
    with ThreadPoolExecutor(_OPENED_AT_ONCE) as pool:
        for video, seconds in zip(videos, pool.map(length, videos), strict=True):
            if seconds is None:
                cut.append(video)
                continue
            begin, file = (video.span[0], video.id.rpartition("#")[0]) if video.span else (0.0, video.id)
            for start, end in window_spans(seconds, window, stride):
                span = round(begin + start, 3), round(begin + end, 3)
                cut.append(replace(video, id=span_id(file, span), group=video.group or file, span=span))
    return cut
