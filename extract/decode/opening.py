"""Opening a video with PyAV, and why one cannot be opened, in words that a person understands."""

import os
from contextlib import contextmanager
from typing import Any

import av

# A title that is no UTF-8 is no reason to refuse a video; since PyAV 19 it never is.
ANY_TEXT: dict[str, Any] = {"metadata_errors": "replace"} if int(av.__version__.split(".")[0]) < 19 else {}

av.logging.set_level(av.logging.PANIC)  # what is wrong with a video stands in its VideoError, not on the terminal


BYTES_PER_SECOND = 2_000_000  # of a file, beyond --video-timeout
LONGEST_SECONDS = 3600.0


class VideoError(Exception):
    """A video that cannot be read: `path`, and a `reason` that a person understands."""

    def __init__(self, path: str | os.PathLike[str], reason: str):
        super().__init__(path, reason)
        self.path, self.reason = os.fspath(path), reason

    def __str__(self) -> str:
        return f"{self.path}: {self.reason}"


def time_limit(timeout: float, path: Any) -> float:
    """Seconds that reading a file may take: `timeout`, and one more per 2 MB of it; an hour at most.

    A `timeout` above an hour is the limit itself. A file's size is a fact, a duration is what its header claims.
    """
    try:
        size = os.stat(path).st_size
    except (OSError, TypeError, ValueError):  # reading it will say why
        size = 0
    return max(timeout, min(timeout + size / BYTES_PER_SECOND, LONGEST_SECONDS))


def check_file(path) -> None:
    """Raise VideoError for what is no file with something in it."""
    if os.path.isdir(path):
        raise VideoError(path, "is a folder, not a video")
    if os.path.exists(path) and not os.path.isfile(path):  # reading from a pipe would wait for ever
        raise VideoError(path, "is a pipe, a socket or a device, not a file")
    try:
        with open(path, "rb") as file:
            if not file.read(1):
                raise VideoError(path, "the file is empty (0 bytes); the download failed?")
    except FileNotFoundError:
        if os.path.islink(path):
            raise VideoError(path, f"is a link to {os.readlink(path)!r}, which does not exist") from None
        raise VideoError(path, "does not exist") from None
    except OSError as error:
        raise VideoError(path, f"cannot be read: {error.strerror}") from None


# What reading a damaged file raises; IndexError is PyAV's, where a stream appears in the middle.
DAMAGE = (av.FFmpegError, IndexError)


@contextmanager
def opened(path):
    container, stream = open_video(path)
    with container:
        yield container, stream


def open_video(path):
    """The container and its best video stream, to be decoded in one thread; VideoError says why there is none."""
    try:
        # FFmpeg takes what stands before a colon in a relative path for a protocol.
        container = av.open(os.path.abspath(path), **ANY_TEXT)
    except (av.FFmpegError, OSError, ValueError) as error:
        raise VideoError(path, _why_not(path, error)) from None
    stream = container.streams.best("video")
    if stream is None:
        kinds = sorted({stream.type for stream in container.streams})
        container.close()
        raise VideoError(path, f"has no video stream ({', '.join(kinds) or 'nothing'} only)")
    if stream.codec_context is None:
        container.close()
        raise VideoError(path, "is in a codec that this FFmpeg does not know")
    stream.codec_context.thread_count = 1  # clips are decoded side by side, each in a process of its own
    return container, stream


def _why_not(path, error: Exception) -> str:
    with open(path, "rb") as file:
        head = file.read(4096)
    start = head.lstrip()[:200].lower()
    if start.startswith((b"<!doctype", b"<html", b"<?xml")):
        return "is a web page (HTML), not a video; the download failed?"
    if b"\0" not in head and all(byte >= 32 or byte in b"\t\r\n" for byte in head):
        return "is text, not a video"
    if head[4:8] == b"ftyp":
        return f"is an MP4 without its index (moov atom), which is written last; cut short? ({words_of(error)})"
    return f"is no video that FFmpeg knows ({words_of(error)})"


def words_of(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)
