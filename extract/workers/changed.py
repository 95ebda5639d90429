"""Find files that were replaced since their features were extracted.

The store holds the size and the digest of each file. To read a digest again takes a moment, so the
modification times of files that are known to be unchanged are kept next to the store, and a file
with the same size and time is not read. They are not in the store, whose bytes must not depend on
when the videos were copied.
"""

import contextlib
import io
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from extract.cli import progress
from extract.listing.videos import Video
from extract.sources import Source, read_source, stat_source
from extract.store import FAILED, PENDING, FeatureStore
from extract.store.objects import read_object, write_object

_NUM_READERS = 8


class SeenTimes:
    """The digest and the modification time (ns) that each row's file was last seen with.

    They are kept in a file next to the store, int64 [N, 2].
    """

    def __init__(self, store: FeatureStore) -> None:
        self._path = f"{store.path.rstrip('/')}.sources"
        self._values = np.full((len(store), 2), -1, "<i8")
        self._changed = False
        content = read_object(self._path) or b""
        try:
            values = np.load(io.BytesIO(content), allow_pickle=False)
            count = min(len(values), len(store))
            self._values[:count] = values[:count]
        except (ValueError, EOFError, OSError, TypeError, IndexError):
            pass  # missing or damaged: the videos are read again

    def holds(self, rows: np.ndarray, digests: np.ndarray, times: np.ndarray) -> np.ndarray:
        """Which files have been seen with this digest and time: bool [n]."""
        return (self._values[rows] == np.stack([digests, times], axis=1)).all(axis=1)

    def note(self, rows: Sequence[int] | np.ndarray, sources: Iterable[Source]) -> None:
        """sources: of the rows, or none if they are unknown."""
        values = np.array([(source.digest, source.mtime_ns) for source in sources], "<i8")
        if len(values):
            self._values[rows] = values
            self._changed = True

    def save(self) -> None:
        """Raises RunError."""
        if self._changed:
            buffer = io.BytesIO()
            np.save(buffer, self._values)
            write_object(self._path, buffer.getvalue())
            self._changed = False


def look_for_changed_files(store: FeatureStore, pairs: Sequence[tuple[int, Video]]) -> np.ndarray:
    """Rows whose file is not the one that their features were extracted from: int [n].

    Pending rows, rows whose file was not recorded, and files that cannot be read do not count.
    """
    recorded = store.sources
    is_checked = (recorded[:, 0] >= 0) & (store.status != PENDING) & (store.status <= FAILED)
    pairs = [(row, video) for row, video in pairs if is_checked[row]]
    rows = np.array([row for row, _ in pairs], int)
    sizes, times = _sizes_and_times([video.path for _, video in pairs])
    seen = SeenTimes(store)
    same_size = sizes == recorded[rows, 0]
    unread = same_size & ~seen.holds(rows, recorded[rows, 1], times)
    changed = (sizes >= 0) & ~same_size
    positions = np.flatnonzero(unread)
    sources = _read_sources([pairs[position][1].path for position in positions])
    for position, source in zip(positions, sources, strict=True):
        if not source.known:
            continue
        changed[position] = source[:2] != tuple(recorded[rows[position]])
        if not changed[position]:
            seen.note([rows[position]], [source])
    seen.save()
    return rows[changed]


def _sizes_and_times(paths: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Size in bytes and modification time of each file: int64 [n] each.

    -1 if the file cannot be reached. The size of anything but a file is 0.
    """
    by_path = dict.fromkeys(paths, (-1, -1))  # windows share a file
    for path in by_path:
        with contextlib.suppress(OSError):
            by_path[path] = stat_source(path)
    values = np.array([by_path[path] for path in paths], "<i8").reshape(-1, 2)
    return values[:, 0], values[:, 1]


def _read_sources(paths: Sequence[str]) -> list[Source]:
    distinct = list(dict.fromkeys(paths))
    with ThreadPoolExecutor(_NUM_READERS) as pool:
        sources = progress(pool.map(read_source, distinct), total=len(distinct), unit="file")
        by_path = dict(zip(distinct, sources, strict=True))
    return [by_path[path] for path in paths]
