"""A store on object storage, which has no rename and no lock: a writer's lease and a local copy.

Storage shows an object only when it is written whole, so shards and chunks need no rename. A lease
takes the place of a folder's lock. It relies only on conditional puts (`If-None-Match: *`): if
several processes create the same object, one of them succeeds.

    feats.zarr.lease/000007    created, and written every few seconds, by the driver that holds
                               the store

The driver that created the highest number holds the store. Another driver watches that object. If
it changes, its writer is alive. If it stays the same for LEASE_TIMEOUT, the other driver creates
the next number. A driver commits only within 3/4 of LEASE_TIMEOUT after it last renewed its lease
and saw no higher number. Clocks of different machines are never compared.

One case remains: a commit begins in time, then hangs in the network for longer than the rest of
LEASE_TIMEOUT. It writes the same values as its successor, and may set rows of its chunk back to
pending. Those are extracted again, with the same bytes.
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
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import Any

from extract import RunError
from extract.durable import cache_folder, is_leftover, replacing
from extract.store.objects import remote_file_system
from extract.store.runs import process_of
from extract.store.shards import ShardError, ShardLayout

HEARTBEAT_SECONDS, LEASE_TIMEOUT = 10.0, 40.0
MAX_DOWNLOADS = 8  # at a time
TAG = 12  # characters


class Lease:
    """The right to write the store at `url`, held until `close`.

    Raises RunError if another process holds it.
    """

    def __init__(self, url: str):
        self._url, self._lost, self._released = url, False, threading.Event()
        self._error: Exception | None = None  # of the last attempt to renew
        self._record: dict[str, Any] = {
            "process": os.getpid(),
            "host": socket.gethostname(),
            "beat": 0,
            "write_id": uuid.uuid4().hex,
        }
        with remote_file_system(f"{url.rstrip('/')}.lease") as (self._fs, self._folder):
            self._number = self._acquire()
        self._renewed = time.monotonic()
        self._thread = threading.Thread(target=self._keep_renewing, name="lease", daemon=True)
        self._thread.start()

    def ensure_held(self) -> None:
        """Raises RunError if another driver has taken the store, or may have."""
        if self._lost or time.monotonic() - self._renewed > 0.75 * LEASE_TIMEOUT:
            how = "to another run" if self._lost else "with its network"
            why = f" ({type(self._error).__name__}: {self._error!s:.200})" if self._error else ""
            raise RunError(f"{self._url}: this run has lost its lease, {how}{why}; start it again")

    def close(self) -> None:
        self._released.set()
        self._thread.join()
        # If this fails, the next run waits for LEASE_TIMEOUT.
        with contextlib.suppress(Exception):
            self._put(self._number, self._record | {"released": True})

    def _acquire(self) -> int:
        """Create the next number, after the holder of the highest one has shown no sign of life."""
        number, record = self._highest()
        if number and not record.get("released"):
            self._wait_for_holder(number, record)
        try:
            self._put(number + 1, self._record, mode="create")
        # Most storage raises FileExistsError if it exists, some another error.
        except Exception:
            highest, record = self._highest()
            if highest <= number:
                raise
            # The object may be ours: the put succeeded, its answer was lost, and it was sent again.
            if highest > number + 1 or record.get("write_id") != self._record["write_id"]:
                raise self._held_by(record) from None
        for old in range(max(1, number - 9), number):
            with contextlib.suppress(FileNotFoundError):
                self._fs.rm_file(self._path(old))
        return number + 1

    def _wait_for_holder(self, number: int, record: dict[str, Any]) -> None:
        """Watch the lease of another process for LEASE_TIMEOUT; RunError if that is renewed."""
        print(
            f"waiting {LEASE_TIMEOUT:.0f} s to see whether {process_of(record)} still writes "
            f"{self._url}",
            file=sys.stderr,
        )
        deadline = time.monotonic() + LEASE_TIMEOUT
        while time.monotonic() < deadline:
            time.sleep(min(1.0, HEARTBEAT_SECONDS))
            if self._highest() != (number, record):
                raise self._held_by(record)

    def _held_by(self, record: dict[str, Any]) -> RunError:
        return RunError(
            f"{self._url} is being written by {process_of(record)}; wait for it or stop it first"
        )

    def _keep_renewing(self) -> None:
        while not self._lost and not self._released.wait(HEARTBEAT_SECONDS):
            try:
                self._renew()
                self._error = None
            except Exception as error:  # the network may come back; else `ensure_held` raises
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


class LocalCopy:
    """Shards of a remote store as local files: downloaded on first use, checked, and kept.

    The files are in `durable.cache_folder`. A name ends with a tag of the object's version, so a
    changed object is downloaded again.
    """

    def __init__(self, url: str, layout: ShardLayout):
        self._url, self._layout = f"{url.rstrip('/')}/features", layout
        digest = hashlib.sha256(url.encode()).hexdigest()[:12]
        self.folder = cache_folder() / f"{Path(url).name}-{digest}"

    def fetch(self, names: Sequence[str]) -> list[Path]:
        """Local paths of the shards with these names (`c.7.0.0.0`).

        Raises RunError naming one that is missing or damaged.
        """
        with (
            remote_file_system(self._url) as (self._fs, self._remote),
            ThreadPoolExecutor(MAX_DOWNLOADS) as pool,
        ):
            return list(pool.map(self._fetch, names))

    @cached_property
    def _paths(self) -> dict[str, Path]:
        """The local path of each shard's current version, by name.

        From one listing of the storage: one per shard takes minutes for thousands. Copies of other
        versions are removed.
        """
        self._fs.invalidate_cache()
        paths = {}
        for entry in self._fs.ls(self._remote, detail=True):
            tag = hashlib.sha256(str(entry).encode()).hexdigest()[:TAG]
            name = Path(entry["name"]).name
            paths[name] = self.folder / f"{name}.{tag}"
        current = {path.name for path in paths.values()}
        for copy in os.listdir(self.folder) if self.folder.is_dir() else ():
            if copy not in current and not is_leftover(copy):
                (self.folder / copy).unlink(missing_ok=True)
        return paths

    def _fetch(self, name: str) -> Path:
        if name not in self._paths:
            raise RunError(
                f"{self._remote}/{name} is missing; run the extraction again, or copy the store "
                "again"
            )
        path = self._paths[name]
        if not path.exists():
            with replacing(path) as partial:
                self._fs.get_file(f"{self._remote}/{name}", str(partial))
                self._check(name, partial)
        return path

    def _check(self, name: str, path: Path) -> None:
        try:
            intact = self._layout.intact_videos(path)
            if not all(intact):
                raise ShardError(f"the checksum of its video {intact.index(False)} does not match")
        except ShardError as error:
            raise RunError(f"{self._remote}/{name} is damaged: {error}") from None
