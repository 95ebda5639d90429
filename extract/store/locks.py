"""One writer per store: a lock of the kernel for a folder, a lease for object storage
(`remote.Lease`)."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

from extract import RunError
from extract.durable import make_folder, remove_leftovers, take_lock
from extract.store.layout import is_remote
from extract.store.remote import Lease
from extract.store.runs import RunLog


class StoreLock(Protocol):
    def ensure_held(self) -> None:
        """RunError if another run has, or may have, taken the store meanwhile."""

    def close(self) -> None: ...


class FolderLock:
    """A lock on the log beside a store, which the kernel releases when the process ends, however it
    ends.

    The log lies beside the folder itself, not beside a link to it: two names of one store are one
    lock.
    """

    def __init__(self, path: str | Path):
        log_path = RunLog.path(path)
        make_folder(log_path.parent)
        self._file = log_path.open("a", encoding="utf-8")
        if not take_lock(self._file):
            self._file.close()
            starts = [record for record in RunLog.records(path) if record["event"] == "start"]
            holder = "another process"
            if starts:
                holder = f"process {starts[-1].get('process')} on {starts[-1].get('host')}"
            raise RunError(
                f"{path} is being written by {holder}; wait for it or stop it first"
            ) from None
        store = log_path.with_suffix("")  # its name is the store's and .log
        remove_leftovers(store.parent, store.name)  # of a run that was killed making the store

    def ensure_held(self) -> None:
        """The kernel keeps it."""

    def close(self) -> None:
        self._file.close()


@contextlib.contextmanager
def lock_store(path: str | Path) -> Iterator[StoreLock]:
    """Hold a store for one run; `RunError` names the process that holds it already."""
    lock = Lease(str(path)) if is_remote(path) else FolderLock(path)
    with contextlib.closing(lock):
        yield lock
