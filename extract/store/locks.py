"""One writer per store: a kernel lock for a folder, a lease for object storage (remote.py)."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

from extract import RunError
from extract.durable import make_folder, remove_leftovers, take_lock
from extract.store.objects import is_remote
from extract.store.remote import Lease
from extract.store.runs import RunLog, process_of


class FolderLock:
    """A lock on the log next to a store. The kernel releases it however the process ends.

    The log is next to the folder itself, not next to a link to it, so that a store with two names
    has one lock.
    """

    def __init__(self, path: str | Path):
        log_path = RunLog.path(path)
        make_folder(log_path.parent)
        self._file = log_path.open("a", encoding="utf-8")
        if not take_lock(self._file):
            self._file.close()
            starts = [record for record in RunLog.records(path) if record["event"] == "start"]
            holder = process_of(starts[-1]) if starts else "another process"
            raise RunError(f"{path} is being written by {holder}; wait for it or stop it first")
        # A run that was killed while it created the store leaves a half-written folder.
        remove_leftovers(log_path.parent, log_path.stem)

    def ensure_held(self) -> None:
        """A kernel lock cannot be lost."""

    def close(self) -> None:
        self._file.close()


StoreLock = FolderLock | Lease


@contextlib.contextmanager
def lock_store(path: str | Path) -> Iterator[StoreLock]:
    """Hold a store for one run; `RunError` names the process that holds it already."""
    lock: StoreLock = Lease(str(path)) if is_remote(path) else FolderLock(path)
    with contextlib.closing(lock):
        yield lock
