"""Long videos in windows: rows of N seconds each, or of so many frames per second."""

import contextlib
import json
import os
import stat
from collections import deque
from collections.abc import Iterable
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from extract import InputError
from extract.cli import progress
from extract.cores import available_cores
from extract.durable import make_folder
from extract.listing.tables import span_id
from extract.listing.videos import Video
from extract.numbered import picture_paths
from extract.options import DEFAULTS, Options

if TYPE_CHECKING:
    from extract.decode.pool import Finished

MAX_WINDOWS = 1_000_000  # of one file
_ASKED_AHEAD = 256  # files


def settle(options: Options) -> Options:
    """Options with `window` and `frames` that say what `fps` said, and a `stride`; `InputError` for
    what cannot be.

    `fps` and `window` together give the frames a window, `fps` alone a window in which as many as
    `frames` are shown.
    """
    window, stride, fps, frames = options.window, options.stride, options.fps, options.frames
    for name, value, what in (
        ("window", window, "seconds"),
        ("stride", stride, "seconds"),
        ("fps", fps, "frames per second"),
    ):
        if value is not None and not 0.001 <= value < 1e6:  # ids count milliseconds
            raise InputError(f"--{name} {value:g}: expected {what}, from 0.001 on")
    if fps is not None:
        default = frames or DEFAULTS["frames"]
        shown = default if window is None else max(1, round(fps * window))
        if frames not in (shown, None):
            raise InputError(
                f"--fps {fps:g} shows {shown} frames in a window of {window:g} s, and --frames is {frames}; drop one"
            )
        window, frames = shown / fps if window is None else window, shown
    if stride is not None and (window is None or stride > window):
        raise InputError(
            f"--stride {stride:g} is that of windows, and at most their length; give --window too"
        )
    return replace(options, window=window, stride=stride or window, fps=None, frames=frames)


def window_spans(seconds: float, window: float, stride: float) -> list[tuple[float, float]]:
    """Where the windows of a video of N seconds begin and end, in whole milliseconds.

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


def cut_windows(
    videos: Iterable[Video],
    window: float,
    stride: float,
    *,
    timeout: float = 60.0,
    cache: Path | None = None,
    frame_rate: float | None = None,
) -> list[Video]:
    """Windows of videos, or of spans of them; a group each, where none is known, so that no split
    tears one apart.

    A file whose length cannot be had stays whole, and fails when it is read. `timeout`, `cache` and
    `frame_rate`: see `file_lengths`. Raises InputError for a file that would be millions of windows.
    """
    videos, cut = list(videos), []
    lengths = file_lengths(
        (video.path for video in videos if video.span is None),
        timeout=timeout,
        cache=cache,
        frame_rate=frame_rate,
    )
    for video in videos:
        seconds = lengths.get(video.path) if video.span is None else video.span[1] - video.span[0]
        if seconds is None:
            cut.append(video)
            continue
        if seconds / stride > MAX_WINDOWS:
            raise InputError(
                f"{video.id} lasts {seconds:,.0f} s, which is {seconds / stride:,.0f} windows; expected at most "
                f"{MAX_WINDOWS:,} per file, give a longer --window or --stride"
            )
        begin, file = (
            (video.span[0], video.id.rpartition("#")[0]) if video.span else (0.0, video.id)
        )
        for start, end in window_spans(seconds, window, stride):
            span = round(begin + start, 3), round(begin + end, 3)
            cut.append(replace(video, id=span_id(file, span), group=video.group or file, span=span))
    return cut


def file_lengths(
    paths: Iterable[str],
    *,
    timeout: float,
    cache: Path | None = None,
    frame_rate: float | None = None,
) -> dict[str, float | None]:
    """Seconds that each file lasts, None for one that cannot be read or does not answer in time.

    Files are opened in child processes, each under the deadline of decoding (`timeout`, see
    `time_limit`). What is learned is kept in `cache` (JSON lines: path, size, modification time,
    seconds), so that a restart opens nothing that has not changed. A folder of numbered pictures
    lasts as long as they do at `frame_rate` (Hz).
    """
    from extract.decode.jobs import decode_job
    from extract.decode.pool import SubprocessPool

    known = _read_cache(cache)
    lengths: dict[str, float | None] = {}
    unknown: dict[str, list[int]] = {}
    for path in dict.fromkeys(paths):
        size, changed, seconds = known.get(path, (-1, -1, None))
        try:
            info = os.stat(path)
            if stat.S_ISDIR(info.st_mode):
                pictures = len(picture_paths(path))
                lengths[path] = pictures / frame_rate if pictures and frame_rate else None
                continue
        except (OSError, ValueError):  # reading it says why
            lengths[path] = None
            continue
        if (size, changed) == (info.st_size, info.st_mtime_ns):
            lengths[path] = seconds
        else:
            unknown[path] = [info.st_size, info.st_mtime_ns]
    if not unknown:
        return lengths
    children = min(len(unknown), available_cores())
    asked: deque[tuple[str, Future[Finished]]] = deque()
    with (
        SubprocessPool(decode_job, slot_bytes=1, workers=children, timeout=timeout) as pool,
        contextlib.nullcontext()
        if cache is None
        else cache.open("a", encoding="utf-8", buffering=1) as file,
        progress(total=len(unknown), desc="lengths", unit="file", leave=False) as bar,
    ):
        for number, path in enumerate(unknown, 1):
            asked.append((path, pool.submit((path, [], None))))
            while asked and (number == len(unknown) or len(asked) > _ASKED_AHEAD):
                first, future = asked.popleft()
                with future.result() as finished:
                    lengths[first] = finished.result
                if file is not None and lengths[first] is not None:
                    file.write(json.dumps([first, *unknown[first], lengths[first]]) + "\n")
                bar.update()
    return lengths


def lengths_path(store: str) -> Path:
    """Where the lengths of videos are kept: beside their store."""
    path = Path(f"{store.rstrip('/')}.lengths")
    make_folder(path.parent)
    return path


def _read_cache(cache: Path | None) -> dict[str, tuple[int, int, float]]:
    """What earlier runs learned; a line that a kill cut short is left out."""
    known: dict[str, tuple[int, int, float]] = {}
    if cache is not None and cache.exists():
        for line in cache.read_text(encoding="utf-8", errors="replace").splitlines():
            with contextlib.suppress(ValueError, TypeError):
                path, size, changed, seconds = json.loads(line)
                known[path] = size, changed, float(seconds)
    return known
