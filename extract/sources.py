"""Identify the file that a row's features were made from, by its size and a digest of both ends.

A digest of the whole file would read every byte again. The first and last 64 kB and the size detect
usual replacements: another encoding, a longer download, another clip. They do not detect changed
bytes in the middle of a file of the same size.

A folder of numbered pictures is identified by the names and sizes of all, and both ends of the
first and the last.
"""

import hashlib
import os
import re
import stat
from typing import NamedTuple

from extract import StrPath
from extract.numbered import picture_paths

END_BYTES = 1 << 16  # of each end of a file


class Source(NamedTuple):
    """The file of a row as it was when it was read; -1 for unknown."""

    size: int = -1  # bytes
    digest: int = -1  # 64 bits
    mtime_ns: int = -1

    @property
    def known(self) -> bool:
        return self.size >= 0


UNKNOWN = Source()
_SPAN_ID = re.compile(r"(.+)#\d+-\d+", re.DOTALL)


def file_of(row_id: str) -> str:
    """The file of a row, from its id: that of a span ends with milliseconds, `a.mp4#2000-5000`."""
    span = _SPAN_ID.fullmatch(row_id)
    return span[1] if span else row_id


def read_source(path: StrPath) -> Source:
    """Size, digest and modification time of a file; `UNKNOWN` if it cannot be read.

    Reads at most 128 kB of a file, and twice that of a folder of pictures.
    """
    try:
        if os.path.isdir(path):
            return _read_pictures(path)
        if not stat.S_ISREG(os.stat(path).st_mode):  # opening a pipe would never return
            return UNKNOWN
        with open(path, "rb", buffering=0) as file:
            status = os.fstat(file.fileno())
            ends = os.pread(file.fileno(), END_BYTES, 0)
            if status.st_size > END_BYTES:
                last = max(END_BYTES, status.st_size - END_BYTES)
                ends += os.pread(file.fileno(), END_BYTES, last)
    except OSError:
        return UNKNOWN
    digest = hashlib.blake2b(ends, digest_size=8, key=str(status.st_size).encode()).digest()
    return Source(status.st_size, int.from_bytes(digest, "little", signed=True), status.st_mtime_ns)


def stat_source(path: StrPath) -> tuple[int, int]:
    """Size and modification time as in `Source`, without reading; size 0 if it is not a file.

    For a folder, the total size of its numbered pictures and the latest time. Raises OSError.
    """
    status = os.stat(path)
    if not stat.S_ISDIR(status.st_mode):
        return status.st_size if stat.S_ISREG(status.st_mode) else 0, status.st_mtime_ns
    pictures = [os.stat(picture) for picture in picture_paths(path)]
    latest = max((picture.st_mtime_ns for picture in pictures), default=status.st_mtime_ns)
    return sum(picture.st_size for picture in pictures), latest


def _read_pictures(folder: StrPath) -> Source:
    paths = picture_paths(folder)
    if not paths:
        return UNKNOWN
    size, changed = stat_source(folder)
    digest = hashlib.blake2b(digest_size=8)
    for path in paths:
        digest.update(b"%s\0%d\0" % (os.fsencode(os.path.basename(path)), os.stat(path).st_size))
    for path in (paths[0], paths[-1]):
        digest.update(b"%d" % read_source(path).digest)
    return Source(size, int.from_bytes(digest.digest(), "little", signed=True), changed)


def sha256_of(path: StrPath) -> str:
    """The SHA-256 of a whole file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
