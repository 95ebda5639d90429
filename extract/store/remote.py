"""A store on object storage, which has no rename and no lock: who may write it, and a local copy to train from.

Written whole objects appear whole, so shards and chunks need no rename. What a lock does for a folder, a lease does
here, made of the one promise that such storage gives, a conditional put (`If-None-Match: *`): of several who create an
object, one succeeds.

    feats.zarr.lease/000007    created by the driver that holds the store, and written by it alone, every few seconds

The highest number holds the store. Who wants it watches that object: if it changes, its holder lives; if it does not
for PATIENCE seconds, the next number is created. A driver commits only within 3/4 of PATIENCE after it last renewed its
lease and saw no higher one. No clocks are compared. What remains possible is a commit that began in time and hangs in
the network for longer than the rest of PATIENCE: it writes what its successor would write, and may put rows of its
chunk back to pending; they are done again, with the same bytes.
"""

import contextlib
import hashlib
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import Any

from extract.cli import RunError
from extract.files import replacing
from extract.store.shards import ShardError, damaged_videos, read_index

BEAT, PATIENCE = 10.0, 40.0  # seconds
FETCHED_AT_ONCE = 8
TAG = 12  # characters


class Lease:
    """The right to write a store at `url`, held from the start until `close`. RunError where another holds it."""

    def __init__(self, url: str):
        self._fs, self._folder = _file_system(f"{url.rstrip('/')}.lease")
        self._url, self._lost, self._released = url, False, threading.Event()
        self._record: dict[str, Any] = {"process": os.getpid(), "host": socket.gethostname(), "beat": 0}
        self._number = self._take()
        self._renewed = time.monotonic()
        self._thread = threading.Thread(target=self._beat, name="lease", daemon=True)
        self._thread.start()

    def write(self, event: str, **fields: Any) -> None:
        """Nothing: on object storage no log is kept (RunLog is what a folder has instead)."""

    def confirm(self) -> None:
        """RunError where another driver has, or may have, taken the store meanwhile."""
        if self._lost or time.monotonic() - self._renewed > 0.75 * PATIENCE:
            how = "to another run or with its network"
            raise RunError(f"{self._url}: this run has lost its lease, {how}; start it again")

    def close(self) -> None:
        self._released.set()
        self._thread.join()
        with contextlib.suppress(OSError):  # who comes next waits until it sees that this one is gone
            self._put(self._number, self._record | {"released": True})

    def _take(self) -> int:
        number, record = self._highest()
        deadline = time.monotonic() + PATIENCE
        if number and not record.get("released"):
            print(
                f"waiting: does {_holder(record)} still write {self._url}? {PATIENCE:.0f} s will tell", file=sys.stderr
            )
        while number and not record.get("released") and time.monotonic() < deadline:
            time.sleep(min(1.0, BEAT))
            if self._highest() != (number, record):
                raise RunError(self._taken(record))
        try:
            self._put(number + 1, self._record, mode="create")
        except OSError:  # FileExistsError of most, of some storage another
            if self._highest()[0] <= number:
                raise
            raise RunError(self._taken(self._highest()[1])) from None
        for old in range(max(1, number - 9), number):
            with contextlib.suppress(FileNotFoundError):
                self._fs.rm_file(self._path(old))
        return number + 1

    def _taken(self, record: dict[str, Any]) -> str:
        return f"{self._url} is being written by {_holder(record)}; wait for it or stop it first"

    def _beat(self) -> None:
        while not self._lost and not self._released.wait(BEAT):
            with contextlib.suppress(OSError):  # the network comes back, or `confirm` tells
                self._renew()

    def _renew(self) -> None:
        began = time.monotonic()
        self._record["beat"] += 1
        self._put(self._number, self._record)
        self._lost = self._highest()[0] > self._number
        self._renewed = began

    def _highest(self) -> tuple[int, dict[str, Any]]:
        self._fs.invalidate_cache()
        try:
            number = max(int(Path(name).name) for name in self._fs.ls(self._folder, detail=False))
        except (FileNotFoundError, ValueError):
            return 0, {}
        return number, json.loads(self._fs.cat_file(self._path(number)))

    def _put(self, number: int, record: dict[str, Any], mode: str = "overwrite") -> None:
        self._fs.pipe_file(self._path(number), json.dumps(record).encode(), mode=mode)

    def _path(self, number: int) -> str:
        return f"{self._folder}/{number:06d}"


def _holder(record: dict[str, Any]) -> str:
    return f"process {record.get('process')} on {record.get('host')}"


class LocalCopy:
    """Shards of a remote store as local files: fetched when they are asked for, checked, and used again.

    They lie in $HGNL_CACHE, or ~/.cache/hgnl-video, under the tag that the storage gives each version of an object.
    """

    def __init__(self, url: str, *, block_size: int, video_bytes: int):
        self._fs, self._remote = _file_system(f"{url.rstrip('/')}/features")
        self._layout = {"block_size": block_size, "video_bytes": video_bytes}
        cache = Path(os.environ.get("HGNL_CACHE", "~/.cache/hgnl-video")).expanduser()
        self.folder = cache / f"{Path(url).name}-{hashlib.sha256(url.encode()).hexdigest()[:12]}"

    def fetch(self, names: Sequence[str]) -> list[Path]:
        """Local paths of the shards of these names (`c.7.0.0.0`). RunError names one that is missing or damaged."""
        with ThreadPoolExecutor(FETCHED_AT_ONCE) as pool:
            return list(pool.map(self._fetch, names))

    @cached_property
    def _tags(self) -> dict[str, str]:
        """Of every shard there, from one listing."""
        self._fs.invalidate_cache()
        entries = {Path(entry["name"]).name: entry for entry in self._fs.ls(self._remote, detail=True)}
        return {name: hashlib.sha256(str(entry).encode()).hexdigest()[:TAG] for name, entry in entries.items()}

    def _fetch(self, name: str) -> Path:
        if name not in self._tags:
            raise RunError(f"{self._remote}/{name} is missing; run the extraction again, or copy the store again")
        path = self.folder / f"{name}.{self._tags[name]}"
        if not path.exists():
            with replacing(path) as partial:
                self._fs.get_file(f"{self._remote}/{name}", str(partial))
                self._check(name, partial)
            for older in set(self.folder.glob(f"{name}.{'?' * TAG}")) - {path}:
                older.unlink(missing_ok=True)
        return path

    def _check(self, name: str, path: Path) -> None:
        try:
            videos = read_index(path, **self._layout)
            damaged = [place for place in damaged_videos(path, **self._layout) if place < videos]
        except ShardError as error:
            raise RunError(f"{self._remote}/{name} came damaged: {error}") from None
        if damaged:
            raise RunError(f"{self._remote}/{name} came damaged: the checksum of its video {damaged[0]} does not match")


def _file_system(url: str) -> tuple[Any, str]:
    import fsspec

    return fsspec.core.url_to_fs(url)
