"""A store on object storage, which has no rename and no lock: who may write it, and a local copy to
train from.

Written whole objects appear whole, so shards and chunks need no rename. What a lock does for a
folder, a lease does here, made of the one promise that such storage gives, a conditional put
(`If-None-Match: *`): of several who create an object, one succeeds.

    feats.zarr.lease/000007    created by the driver that holds the store, and written by it alone, every few seconds

The highest number holds the store. A driver that wants it watches that object: if it changes, its
holder lives; if it does not for LEASE_TIMEOUT, the next number is created. A driver commits only
within 3/4 of LEASE_TIMEOUT after it last renewed its lease and saw no higher one. No clocks are
compared. What remains possible is a commit that began in time and hangs in the network for longer
than the rest of LEASE_TIMEOUT: it writes what its successor would write, and may put rows of its
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
import uuid
from collections import defaultdict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import Any

from extract import RunError
from extract.durable import replacing
from extract.store.objects import file_system, network_errors_named
from extract.store.shards import ShardError, damaged_videos, read_index

HEARTBEAT_SECONDS, LEASE_TIMEOUT = 10.0, 40.0
FETCHED_AT_ONCE = 8
TAG = 12  # characters


class Lease:
    """The right to write a store at `url`, held from the start until `close`. RunError where
    another holds it."""

    def __init__(self, url: str):
        self._fs, self._folder = file_system(f"{url.rstrip('/')}.lease")
        self._url, self._lost, self._released = url, False, threading.Event()
        self._error: Exception | None = None  # of the last attempt to renew
        self._record: dict[str, Any] = {
            "process": os.getpid(),
            "host": socket.gethostname(),
            "beat": 0,
        }
        self._record["write_id"] = uuid.uuid4().hex
        with network_errors_named(url):
            self._number = self._acquire()
        self._renewed = time.monotonic()
        self._thread = threading.Thread(target=self._beat, name="lease", daemon=True)
        self._thread.start()

    def ensure_held(self) -> None:
        """RunError where another driver has, or may have, taken the store meanwhile."""
        if self._lost or time.monotonic() - self._renewed > 0.75 * LEASE_TIMEOUT:
            how = "to another run" if self._lost else "with its network"
            why = f" ({type(self._error).__name__}: {self._error!s:.200})" if self._error else ""
            raise RunError(f"{self._url}: this run has lost its lease, {how}{why}; start it again")

    def close(self) -> None:
        self._released.set()
        self._thread.join()
        # A next run waits until it sees that this one is gone, if it cannot be told.
        with contextlib.suppress(Exception):
            self._put(self._number, self._record | {"released": True})

    def _acquire(self) -> int:
        number, record = self._highest()
        deadline = time.monotonic() + LEASE_TIMEOUT
        if number and not record.get("released"):
            print(
                f"waiting {LEASE_TIMEOUT:.0f} s to see whether {_holder(record)} still writes {self._url}",
                file=sys.stderr,
            )
        while number and not record.get("released") and time.monotonic() < deadline:
            time.sleep(min(1.0, HEARTBEAT_SECONDS))
            if self._highest() != (number, record):
                raise RunError(self._held_message(record))
        try:
            self._put(number + 1, self._record, mode="create")
        except (
            Exception
        ):  # FileExistsError of most storage, of some another; or the answer was lost
            highest, record = self._highest()
            if highest <= number:
                raise
            # Our own object, if the put succeeded, its answer was lost, and it was sent again.
            if highest > number + 1 or record.get("write_id") != self._record["write_id"]:
                raise RunError(self._held_message(record)) from None
        for old in range(max(1, number - 9), number):
            with contextlib.suppress(FileNotFoundError):
                self._fs.rm_file(self._path(old))
        return number + 1

    def _held_message(self, record: dict[str, Any]) -> str:
        return f"{self._url} is being written by {_holder(record)}; wait for it or stop it first"

    def _beat(self) -> None:
        while not self._lost and not self._released.wait(HEARTBEAT_SECONDS):
            try:
                self._renew()
                self._error = None
            except (
                Exception
            ) as error:  # of any library: the network comes back, or `ensure_held` tells
                self._error = error

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
    """Shards of a remote store as local files: fetched when they are asked for, checked, and used
    again.

    They lie in $HGNL_CACHE, or ~/.cache/hgnl-video, under the tag that the storage gives each
    version of an object.
    """

    def __init__(self, url: str, *, block_size: int, video_bytes: int):
        self._url = url
        self._fs, self._remote = file_system(f"{url.rstrip('/')}/features")
        self._layout = {"block_size": block_size, "video_bytes": video_bytes}
        cache = Path(os.environ.get("HGNL_CACHE", "~/.cache/hgnl-video")).expanduser()
        self.folder = cache / f"{Path(url).name}-{hashlib.sha256(url.encode()).hexdigest()[:12]}"

    def fetch(self, names: Sequence[str]) -> list[Path]:
        """Local paths of the shards of these names (`c.7.0.0.0`). RunError names one that is
        missing or damaged."""
        with network_errors_named(self._url), ThreadPoolExecutor(FETCHED_AT_ONCE) as pool:
            return list(pool.map(self._fetch, names))

    @cached_property
    def _tags(self) -> dict[str, str]:
        """Of every shard there, from one listing."""
        self._fs.invalidate_cache()
        entries = {
            Path(entry["name"]).name: entry for entry in self._fs.ls(self._remote, detail=True)
        }
        return {
            name: hashlib.sha256(str(entry).encode()).hexdigest()[:TAG]
            for name, entry in entries.items()
        }

    @cached_property
    def _copies(self) -> dict[str, list[str]]:
        """The files of the cache by shard, from one listing: a listing per shard takes minutes for
        thousands."""
        copies: dict[str, list[str]] = defaultdict(list)
        for file in os.listdir(self.folder) if self.folder.is_dir() else ():
            copies[file[: -TAG - 1]].append(file)
        return copies

    def _fetch(self, name: str) -> Path:
        if name not in self._tags:
            raise RunError(
                f"{self._remote}/{name} is missing; run the extraction again, or copy the store again"
            )
        path = self.folder / f"{name}.{self._tags[name]}"
        if not path.exists():
            with replacing(path) as partial:
                self._fs.get_file(f"{self._remote}/{name}", str(partial))
                self._check(name, partial)
            for older in set(self._copies.get(name, ())) - {path.name}:
                (self.folder / older).unlink(missing_ok=True)
        return path

    def _check(self, name: str, path: Path) -> None:
        try:
            videos = read_index(path, **self._layout)
            damaged = [place for place in damaged_videos(path, **self._layout) if place < videos]
        except ShardError as error:
            raise RunError(f"{self._remote}/{name} came damaged: {error}") from None
        if damaged:
            raise RunError(
                f"{self._remote}/{name} came damaged: the checksum of its video {damaged[0]} does not match"
            )
