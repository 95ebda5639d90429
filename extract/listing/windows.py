"""Cut long videos into windows of N seconds, one row each."""

import contextlib
import json
import os
import stat
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path

from extract import InputError
from extract.cli import progress
from extract.cores import available_cores
from extract.durable import make_folder
from extract.listing.tables import span_id
from extract.listing.videos import Video
from extract.numbered import picture_paths
from extract.options import DEFAULTS, Options
from extract.sources import file_of

MAX_WINDOWS = 1_000_000  # of one file
_MAX_PENDING = 256  # files
FileState = tuple[str, int, int]  # path, size, modification time (ns)


def resolve_windowing(options: Options) -> Options:
    """The options with `window`, `stride` and `frames` instead of `fps`.

    `fps` and `window` together set the frames per window; `fps` alone sets a window in which
    `frames` are shown. Raises InputError for options that contradict each other.
    """
    for name, unit in {"window": "s", "stride": "s", "fps": "frames per second"}.items():
        value = getattr(options, name)
        if value is not None and not 0.001 <= value < 1e6:  # ids count milliseconds
            raise InputError(f"--{name} {value:g}: expected 0.001 to 1,000,000 {unit}")
    window, stride, fps, frames = options.window, options.stride, options.fps, options.frames
    if fps is not None and window is None:
        frames = frames or DEFAULTS["frames"]
        window = frames / fps
    elif fps is not None and window is not None:
        shown = max(1, round(fps * window))
        if frames not in (shown, None):
            raise InputError(
                f"--fps {fps:g} shows {shown} frames in a window of {window:g} s, "
                f"and --frames is {frames}; drop one"
            )
        frames = shown
    if stride is not None and (window is None or stride > window):
        raise InputError(
            f"--stride {stride:g} needs windows, and is at most their length; give --window too"
        )
    return replace(options, window=window, stride=stride or window, fps=None, frames=frames)


def window_spans(seconds: float, window: float, stride: float) -> list[tuple[float, float]]:
    """Start and end of the windows of a video, in seconds with whole milliseconds.

    A remainder shorter than half a window is merged into the last window.

    seconds = 9, window = 4, stride = 4     |0   4|4    9|
    seconds = 10, window = 4, stride = 3    |0   4|
                                               |3   7|
                                                  |6   10|
    """
    length, window, stride = (round(1000 * value) for value in (seconds, window, stride))
    length = max(length, 1)
    whole = max(0, (length - window) // stride + 1)
    spans = [(index * stride, index * stride + window) for index in range(whole)]
    remainder = length - spans[-1][1] if spans else length
    if not spans or 2 * remainder >= window:
        spans.append((whole * stride, length))
    elif remainder:
        spans[-1] = (spans[-1][0], length)
    return [(start / 1000, end / 1000) for start, end in spans]


def cut_windows(
    videos: Iterable[Video], lengths: Mapping[str, float | None], window: float, stride: float
) -> list[Video]:
    """Cut videos, or spans of them, into windows.

    The windows of a video are one group unless it has a group, so that no split divides it. A file
    whose length is unknown stays whole, and fails when it is read. Raises InputError for a file
    with more than MAX_WINDOWS.

    Args:
        lengths: seconds of each file that has no span, see `file_lengths`.
    """
    windows = []
    for video in videos:
        seconds = lengths[video.path] if video.span is None else video.span[1] - video.span[0]
        if seconds is None:
            windows.append(video)
            continue
        if seconds / stride > MAX_WINDOWS:
            raise InputError(
                f"{video.id} lasts {seconds:,.0f} s, which is {seconds / stride:,.0f} windows; "
                f"expected at most {MAX_WINDOWS:,} per file, give a longer --window or --stride"
            )
        offset, file = 0.0, video.id
        if video.span:
            offset, file = video.span[0], file_of(video.id)
        for start, end in window_spans(seconds, window, stride):
            span = round(offset + start, 3), round(offset + end, 3)
            windows.append(
                replace(video, id=span_id(file, span), group=video.group or file, span=span)
            )
    return windows


def file_lengths(
    paths: Iterable[str],
    *,
    timeout: float,
    cache: Path | None = None,
    frame_rate: float | None = None,
) -> dict[str, float | None]:
    """Seconds that each file lasts, None for one that cannot be read or hangs.

    Args:
        timeout: seconds per file, see `time_limit`. Files are opened in child processes.
        cache: JSON lines [path, size, modification time, seconds] of earlier calls, to be extended:
            a restart opens only files that have changed.
        frame_rate: pictures per second of folders of numbered pictures.
    """
    from extract.decode.jobs import decode_job
    from extract.decode.pool import SubprocessPool

    cached = _read_cache(cache)
    lengths: dict[str, float | None] = {}
    unknown: list[FileState] = []
    for path in dict.fromkeys(paths):
        lengths[path] = None
        try:
            status = os.stat(path)
            if stat.S_ISDIR(status.st_mode):
                if frame_rate is not None:
                    lengths[path] = len(picture_paths(path)) / frame_rate or None
                continue
        except (OSError, ValueError):  # decoding will report it
            continue
        state = path, status.st_size, status.st_mtime_ns
        if state in cached:
            lengths[path] = cached[state]
        else:
            unknown.append(state)
    if not unknown:
        return lengths
    workers = min(len(unknown), available_cores())
    with (
        SubprocessPool(decode_job, slot_bytes=1, workers=workers, timeout=timeout) as pool,
        open(cache or os.devnull, "a", encoding="utf-8", buffering=1) as file,
        progress(total=len(unknown), desc="lengths", unit="file", leave=False) as bar,
    ):
        for first in range(0, len(unknown), _MAX_PENDING):
            states = unknown[first : first + _MAX_PENDING]
            futures = [pool.submit((path, [], None)) for path, _, _ in states]
            for state, future in zip(states, futures, strict=True):
                with future.result() as finished:
                    lengths[state[0]] = finished.result
                if finished.result is not None:
                    file.write(json.dumps([*state, finished.result]) + "\n")
                bar.update()
    return lengths


def lengths_path(store: str) -> Path:
    """The cache of the lengths of videos, next to their store."""
    path = Path(f"{store.rstrip('/')}.lengths")
    make_folder(path.parent)
    return path


def _read_cache(cache: Path | None) -> dict[FileState, float]:
    """Seconds that files last; a line that a kill cut short is left out."""
    cached: dict[FileState, float] = {}
    if cache is not None and cache.exists():
        for line in cache.read_text(encoding="utf-8", errors="replace").splitlines():
            with contextlib.suppress(ValueError, TypeError):
                path, size, changed, seconds = json.loads(line)
                cached[path, size, changed] = float(seconds)
    return cached
