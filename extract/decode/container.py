"""Open a video with PyAV, check its size and length, and say why a file is not a readable video."""

import contextlib
import errno
import os
import stat
from contextlib import contextmanager
from functools import cache
from typing import Any

import av
from av.format import ContainerFormat

from extract import StrPath
from extract.sources import stat_source

# Read a video even if its title is not UTF-8. PyAV 19 and later always do.
LENIENT_METADATA: dict[str, Any] = (
    {"metadata_errors": "replace"} if int(av.__version__.split(".")[0]) < 19 else {}
)

# A VideoError names the problem with a video, so FFmpeg does not print it as well.
av.logging.set_level(av.logging.PANIC)

BYTES_PER_SECOND = 2_000_000  # of file size, for each second beyond --video-timeout
LONGEST_SECONDS = 3600.0
# 8192 x 8192 pixels are twice an 8K picture. A longer strip does not show anything.
MAX_PIXELS, MAX_ASPECT = 8192 * 8192, 32
# 11 days. A file that lasts longer than an hour has at least one byte per second: even a still
# picture takes more.
MAX_SECONDS, MIN_BYTES_PER_SECOND = 1e6, 1
# Playlists and scripts that name other files, and pictures that are found by a pattern in a name.
# Formats that read from devices or from the network are refused too: FFmpeg marks those itself.
# tests/extract/test_container.py lists all formats that are left.
REFUSED_FORMATS = frozenset(
    {
        "applehttp",
        "avisynth",
        "concat",
        "dash",
        "dvdvideo",
        "hls",
        "image2",
        "imf",
        "libcdio",
        "sdp",
        "vapoursynth",
        "vobsub",
        "webm_dash_manifest",
    }
)
_SPECIAL_FILE = "is a pipe, a socket or a device, not a file"

# Raised by PyAV for a damaged file. IndexError: a new stream begins in the middle of the file.
DECODE_ERRORS = (av.FFmpegError, IndexError)


class VideoError(Exception):
    """A video cannot be read. `path` names it, and `reason` explains it to a user."""

    def __init__(self, path: StrPath, reason: str):
        super().__init__(path, reason)
        self.path, self.reason = os.fspath(path), reason

    def __str__(self) -> str:
        return f"{self.path}: {self.reason}"


def time_limit(timeout: float, path: Any) -> float:
    """Seconds that reading a file may take: `timeout` plus one per 2 MB, but at most an hour.

    A `timeout` above an hour is the limit itself. The limit depends on the size of the file, since
    the duration in a header may be wrong.
    """
    try:
        size = stat_source(path)[0]
    except (OSError, TypeError, ValueError):  # the error is reported when the file is read
        size = 0
    return max(timeout, min(timeout + size / BYTES_PER_SECOND, LONGEST_SECONDS))


def check_file(path) -> None:
    """Raise VideoError unless `path` is a regular file with content. Never blocks on a FIFO."""
    try:
        # Open it first: between a stat and an open, the name could come to mean another file.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            mode = os.fstat(descriptor).st_mode
            is_empty = stat.S_ISREG(mode) and not os.read(descriptor, 1)
        finally:
            os.close(descriptor)
    except FileNotFoundError:
        reason = _why_absent(os.fspath(path))
    except (OSError, ValueError) as error:  # ValueError: a null character in the name
        is_special = getattr(error, "errno", None) == errno.ENXIO
        reason = _SPECIAL_FILE if is_special else f"cannot be read: {error_text(error)}"
    else:
        if stat.S_ISDIR(mode):
            reason = "is a folder, not a video"
        elif not stat.S_ISREG(mode):
            reason = _SPECIAL_FILE
        elif is_empty:
            reason = "the file is empty (0 bytes); the download failed?"
        else:
            return
    raise VideoError(path, reason)


def _why_absent(path: str) -> str:
    if os.path.islink(path):
        return f"is a link to {os.readlink(path)!r}, which does not exist"
    if "://" in path or ":/" in path:  # pathlib turns two slashes into one
        return "is an address, not a file; download it first"
    if "\\" in path:
        return (
            "does not exist; its name contains a backslash, which separates folders on Windows "
            "only: write /"
        )
    return "does not exist"


def check_length(path, seconds: float) -> None:
    """Raise VideoError if a file is too small for the length that its time stamps claim."""
    if os.path.isdir(path):  # a folder of pictures, each of which exists
        return
    size = os.stat(path).st_size
    if seconds > MAX_SECONDS or seconds > max(3600.0, size / MIN_BYTES_PER_SECOND):
        raise VideoError(
            path,
            f"its time stamps claim {seconds:,.0f} s in {size:,} bytes; expected at most "
            f"{MAX_SECONDS:,.0f} s, and at least {MIN_BYTES_PER_SECOND} byte per second of a video "
            "that is longer than an hour",
        )


def check_size(path, width: int, height: int) -> None:
    """Raise VideoError for pictures that are too large, before they are converted or resized."""
    shorter, longer = sorted((width, height))
    if width * height > MAX_PIXELS or longer > MAX_ASPECT * max(shorter, 1):
        raise VideoError(
            path,
            f"its pictures are {width} x {height}; expected at most {MAX_PIXELS:,} pixels, and a "
            f"longer side of at most {MAX_ASPECT} times the shorter",
        )


@contextmanager
def opened(path):
    container, stream = open_video(path)
    with container:
        yield container, stream


def open_video(path):
    """Open a file and return its container and its best video stream, to decode in one thread.

    Only this file is read, never another one that it refers to. Raises VideoError.
    """
    limits = {"max_pixels": str(MAX_PIXELS)}
    options = {"protocol_whitelist": "file", "format_whitelist": _format_whitelist(), **limits}
    try:
        # In a relative path, FFmpeg takes the text before a colon for a protocol.
        container = av.open(os.path.abspath(path), options=options, **LENIENT_METADATA)
    except (av.FFmpegError, OSError, ValueError) as error:
        raise VideoError(path, _diagnose(path, error)) from None
    try:
        stream = container.streams.best("video")
        if stream is None:
            kinds = sorted({stream.type for stream in container.streams})
            raise VideoError(path, f"has no video stream ({', '.join(kinds) or 'nothing'} only)")
        codec = stream.codec_context
        if codec is None:
            raise VideoError(path, "is in a codec that this FFmpeg does not know")
        check_size(path, codec.width, codec.height)
    except VideoError:
        container.close()
        raise
    codec.options = limits  # for every picture: the size may change within a stream
    codec.thread_count = 1  # each child process decodes one video
    return container, stream


def demuxers() -> dict[str, ContainerFormat]:
    """The formats that this FFmpeg reads, by name. Some have several names, separated by commas."""
    formats = {}
    for name in av.formats_available:
        with contextlib.suppress(ValueError):  # a format that can only be written
            formats[name] = ContainerFormat(name, "r")
    return formats


@cache
def _format_whitelist() -> str:
    names = (name for name, format in demuxers().items() if not is_refused(format))
    return ",".join(sorted(names))


def is_refused(format: ContainerFormat) -> bool:
    """Whether a format refers to other files, devices or the network instead of holding a video."""
    return format.no_file or not REFUSED_FORMATS.isdisjoint(format.name.split(","))


def _diagnose(path, error: Exception) -> str:
    """Why a file could not be opened, from FFmpeg's log and the first bytes of the file."""
    logged = av.logging.get_last_error()[1]
    if logged is not None and "not on whitelist" in logged[2]:
        return f"is of a kind that refers to other files ({logged[1]}); list those files themselves"
    with open(path, "rb") as file:
        head = file.read(4096)
    start = head.lstrip()[:200].lower()
    if start.startswith((b"<!doctype", b"<html", b"<?xml")):
        return "is a web page (HTML), not a video; the download failed?"
    if b"\0" not in head and all(byte >= 32 or byte in b"\t\r\n" for byte in head):
        return "is text, not a video"
    if head[4:8] == b"ftyp":
        return (
            "is an MP4 without its index (moov atom), which is written last; cut short? "
            f"({error_text(error)})"
        )
    return f"is not a video that FFmpeg knows ({error_text(error)})"


def error_text(error: Exception) -> str:
    logged = av.logging.get_last_error()[1] if isinstance(error, av.FFmpegError) else None
    if logged is not None and "max pixel count" in logged[2]:
        return f"a picture has more than {MAX_PIXELS:,} pixels"
    return getattr(error, "strerror", None) or str(error)
