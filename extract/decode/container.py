"""Opening a video with PyAV, and why one cannot be opened, in words that a person understands."""

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

# A title that is not UTF-8 is not a reason to refuse a video; since PyAV 19 it never is.
LENIENT_METADATA: dict[str, Any] = (
    {"metadata_errors": "replace"} if int(av.__version__.split(".")[0]) < 19 else {}
)

av.logging.set_level(
    av.logging.PANIC
)  # what is wrong with a video stands in its VideoError, not on the terminal


BYTES_PER_SECOND = 2_000_000  # of a file, beyond --video-timeout
LONGEST_SECONDS = 3600.0
# Pictures beyond any use: 8192 x 8192 pixels hold 8K video twice, and a strip is not a picture of
# anything.
MAX_PIXELS, MAX_ASPECT = 8192 * 8192, 32
# Lengths beyond belief: 11 days in a file; of more than an hour, one frame of a still picture takes
# more than this.
MAX_SECONDS, MIN_BYTES_PER_SECOND = 1e6, 1
# Playlists, lists and scripts that name other files, and pictures that are found by a pattern in a
# name. What reads from devices or from the network (FFmpeg says which) is refused too.
# tests/extract/test_container.py lists all others.
REFUSED_FORMATS = frozenset(
    (
        *(
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
        ),
        *("vapoursynth", "vobsub", "webm_dash_manifest"),
    )
)


class VideoError(Exception):
    """A video that cannot be read: `path`, and a `reason` that a person understands."""

    def __init__(self, path: StrPath, reason: str):
        super().__init__(path, reason)
        self.path, self.reason = os.fspath(path), reason

    def __str__(self) -> str:
        return f"{self.path}: {self.reason}"


def time_limit(timeout: float, path: Any) -> float:
    """Seconds that reading a file may take: `timeout`, and one more per 2 MB of it; an hour at
    most.

    A `timeout` above an hour is the limit itself. A file's size is a fact, a duration is what its
    header claims.
    """
    try:
        size = stat_source(path)[0]
    except (OSError, TypeError, ValueError):  # reading it will say why
        size = 0
    return max(timeout, min(timeout + size / BYTES_PER_SECOND, LONGEST_SECONDS))


def check_file(path) -> None:
    """Raise VideoError for what is not a regular file with something in it. Never waits, as opening
    a FIFO would."""
    try:
        # Opened before it is looked at: a name may come to mean another file between the two.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            mode = os.fstat(descriptor).st_mode
            empty = stat.S_ISREG(mode) and not os.read(descriptor, 1)
        finally:
            os.close(descriptor)
    except FileNotFoundError:
        raise VideoError(path, _why_absent(os.fspath(path))) from None
    except (OSError, ValueError) as error:  # ValueError: a name with a null character
        if getattr(error, "errno", None) == errno.ENXIO:
            raise VideoError(path, "is a pipe, a socket or a device, not a file") from None
        raise VideoError(path, f"cannot be read: {error_text(error)}") from None
    if stat.S_ISDIR(mode):
        raise VideoError(path, "is a folder, not a video")
    if not stat.S_ISREG(mode):
        raise VideoError(path, "is a pipe, a socket or a device, not a file")
    if empty:
        raise VideoError(path, "the file is empty (0 bytes); the download failed?")


def _why_absent(path: str) -> str:
    if os.path.islink(path):
        return f"is a link to {os.readlink(path)!r}, which does not exist"
    if "://" in path or ":/" in path:  # pathlib makes one slash of two
        return "is an address, not a file; download it first"
    if "\\" in path:
        return "does not exist; its name holds a backslash, which separates folders on Windows only: write /"
    return "does not exist"


def check_length(path, seconds: float) -> None:
    """Raise VideoError for a length that a header or a time stamp claims and the file cannot
    have."""
    if os.path.isdir(path):  # of pictures, each of which exists
        return
    size = os.stat(path).st_size
    if seconds > MAX_SECONDS or seconds > max(3600.0, size / MIN_BYTES_PER_SECOND):
        raise VideoError(
            path,
            f"its time stamps claim {seconds:,.0f} s in {size:,} bytes; expected at most {MAX_SECONDS:,.0f} s, and "
            f"{MIN_BYTES_PER_SECOND} byte per second of what is longer than an hour",
        )


def check_size(path, width: int, height: int) -> None:
    """Raise VideoError for pictures beyond any use, before they are converted or resized."""
    longer, shorter = max(width, height), min(width, height)
    if width * height > MAX_PIXELS or longer > MAX_ASPECT * max(shorter, 1):
        raise VideoError(
            path,
            f"its pictures are {width} x {height}; expected at most {MAX_PIXELS:,} pixels, and a longer side of at "
            f"most {MAX_ASPECT} times the shorter",
        )


# What reading a damaged file raises; IndexError is PyAV's, where a stream appears in the middle.
DECODE_ERRORS = (av.FFmpegError, IndexError)


@contextmanager
def opened(path):
    container, stream = open_video(path)
    with container:
        yield container, stream


def open_video(path):
    """The container and its best video stream, to be decoded in one thread; VideoError says why
    there is none.

    Nothing but this file is read, whatever is in it.
    """
    options = {
        "protocol_whitelist": "file",
        "format_whitelist": _format_whitelist(),
        "max_pixels": str(MAX_PIXELS),
    }
    try:
        # FFmpeg takes what stands before a colon in a relative path for a protocol.
        container = av.open(os.path.abspath(path), options=options, **LENIENT_METADATA)
    except (av.FFmpegError, OSError, ValueError) as error:
        raise VideoError(path, _why_not(path, error)) from None
    stream = container.streams.best("video")
    if stream is None:
        kinds = sorted({stream.type for stream in container.streams})
        container.close()
        raise VideoError(path, f"has no video stream ({', '.join(kinds) or 'nothing'} only)")
    codec = stream.codec_context
    if codec is None:
        container.close()
        raise VideoError(path, "is in a codec that this FFmpeg does not know")
    try:
        check_size(path, codec.width, codec.height)
    except VideoError:
        container.close()
        raise
    codec.options = {
        "max_pixels": str(MAX_PIXELS)
    }  # of every picture: the size may change on the way
    codec.thread_count = 1  # clips are decoded side by side, each in a process of its own
    return container, stream


def demuxers() -> dict[str, ContainerFormat]:
    """The formats that this FFmpeg reads, by name; some have several names, separated by commas."""
    formats = {}
    for name in av.formats_available:
        with contextlib.suppress(ValueError):  # is only written
            formats[name] = ContainerFormat(name, "r")
    return formats


@cache
def _format_whitelist() -> str:
    names = (name for name, format in demuxers().items() if not is_refused(format))
    return ",".join(sorted(names))


def is_refused(format: ContainerFormat) -> bool:
    """Whether a format refers to other files, to devices or to the network, rather than holding a
    video."""
    return format.no_file or not REFUSED_FORMATS.isdisjoint(format.name.split(","))


def _why_not(path, error: Exception) -> str:
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
        return f"is an MP4 without its index (moov atom), which is written last; cut short? ({error_text(error)})"
    return f"is not a video that FFmpeg knows ({error_text(error)})"


def error_text(error: Exception) -> str:
    logged = av.logging.get_last_error()[1] if isinstance(error, av.FFmpegError) else None
    if logged is not None and "max pixel count" in logged[2]:
        return f"a picture has more than {MAX_PIXELS:,} pixels"
    return getattr(error, "strerror", None) or str(error)
