"""Files that were replaced by others of the same name since their features were made.

The store keeps size and digest of each file. Reading digests again takes a moment per file; so the
times of change of files that were found to be the same lie beside the store, and a file with that
size and time is not read. They are not in the store, which is to have the same bytes after a copy
of the videos.
"""

import io
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from extract.cli import progress
from extract.listing.videos import Video
from extract.sources import Source, read_source, stat_source
from extract.store import FAILED, PENDING, FeatureStore
from extract.store.objects import read_object, write_object

_READ_AT_ONCE = 8


class SeenTimes:
    """Beside a store: the time of change (ns) of each row's file, and the digest it was seen with,
    int64 [N, 2]."""

    def __init__(self, store: FeatureStore) -> None:
        self._path = f"{store.path.rstrip('/')}.sources"
        self._values = np.full((len(store), 2), -1, "<i8")
        self._changed = False
        content = read_object(self._path) or b""
        try:
            values = np.load(io.BytesIO(content), allow_pickle=False)
            count = min(len(values), len(store))
            self._values[:count] = values[:count]
        except (
            ValueError,
            EOFError,
            OSError,
            TypeError,
            IndexError,
        ):  # cut, or none: files are read again
            pass

    def holds(self, rows: np.ndarray, digests: np.ndarray, times: np.ndarray) -> np.ndarray:
        """Which files have been seen with this content at this time: bool [n]."""
        return (self._values[rows] == np.stack([digests, times], axis=1)).all(axis=1)

    def note(self, rows: Sequence[int] | np.ndarray, sources: Iterable[Source]) -> None:
        """sources: of the rows, or none if nothing is known of them."""
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


def look_for_changed_files(
    store: FeatureStore, pairs: Sequence[tuple[int, Video]], *, read_all: bool = False
) -> np.ndarray:
    """Rows whose file is not the one that their features were made from: int [n].

    Rows that are pending, and those whose file was not recorded, are left out; so are files that
    cannot be read. read_all: read also the files whose size and time of change are those seen
    before.
    """
    recorded = store.sources
    wanted = (recorded[:, 0] >= 0) & (store.status != PENDING) & (store.status <= FAILED)
    pairs = [(row, video) for row, video in pairs if wanted[row]]
    if not pairs:
        return np.array([], int)
    rows = np.array([row for row, _ in pairs])
    sizes, times = _sizes_and_times([video.path for _, video in pairs])
    seen = SeenTimes(store)
    same_size = sizes == recorded[rows, 0]
    unread = same_size & (read_all | ~seen.holds(rows, recorded[rows, 1], times))
    changed = (sizes >= 0) & ~same_size
    places = np.flatnonzero(unread)
    paths = [pairs[place][1].path for place in places]
    for place, source in zip(places, _read_sources(paths), strict=True):
        if not source.known:
            continue
        changed[place] = source[:2] != tuple(recorded[rows[place]])
        if not changed[place]:
            seen.note([rows[place]], [source])
    seen.save()
    return rows[changed]


def _sizes_and_times(paths: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """int64 [n] each: size in bytes and time of change; -1 for a file that cannot be reached, 0 for
    no file."""
    values = np.full((len(paths), 2), -1, "<i8")
    last_path, last = None, (-1, -1)
    for place, path in enumerate(paths):
        if path != last_path:  # windows of one file lie side by side
            last_path = path
            try:
                last = stat_source(path)
            except OSError:
                last = (-1, -1)
        values[place] = last
    return values[:, 0], values[:, 1]


def _read_sources(paths: Sequence[str]) -> list[Source]:
    distinct = list(dict.fromkeys(paths))
    with ThreadPoolExecutor(_READ_AT_ONCE) as pool:
        sources = progress(pool.map(read_source, distinct), total=len(distinct), unit="file")
        by_path = dict(zip(distinct, sources, strict=True))
    return [by_path[path] for path in paths]
