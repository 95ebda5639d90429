"""Runs that write a store: one at a time, logged beside it, and with the settings that it was begun with."""

import contextlib
import fcntl
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from extract.cli import RunError
from extract.files import make_folder, writing
from extract.store.layout import is_remote


class RunLog:
    """The log beside a store (`feats.zarr.log`, JSON lines): times and speeds, which do not belong into the store.

    Its writer holds the store: a second run is refused and told who holds it. The kernel drops the hold with the
    process, however it ends.
    """

    def __init__(self, file: TextIO):
        self._file = file

    def write(self, event: str, **fields: Any) -> None:
        with writing(self._file.name):
            self._file.write(json.dumps({"event": event, "time": round(time.time(), 3), **fields}, default=str) + "\n")
            self._file.flush()

    def confirm(self) -> None:
        """The kernel keeps the hold (of a lease, on object storage, this must be asked)."""

    @staticmethod
    def path(store: str | Path) -> Path:
        return Path(f"{str(store).rstrip('/')}.log")

    @staticmethod
    def records(store: str | Path) -> list[dict[str, Any]]:
        """What earlier runs wrote, oldest first; a last line cut by a kill is left out."""
        if is_remote(store) or not RunLog.path(store).exists():
            return []
        records = []
        for line in RunLog.path(store).read_text(encoding="utf-8").splitlines():
            with contextlib.suppress(json.JSONDecodeError):
                records.append(json.loads(line))
        return records


@contextlib.contextmanager
def exclusive(path: str | Path) -> Iterator[RunLog]:
    """Hold a local store for one run; `RunError` names the process that holds it already."""
    log_path = RunLog.path(path)
    make_folder(log_path.parent)
    with log_path.open("a", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holders = [record for record in RunLog.records(path) if record["event"] == "start"]
            holder = f"process {holders[-1]['process']} on {holders[-1]['host']}" if holders else "another process"
            raise RunError(f"{path} is being written by {holder}; wait for it or stop it first") from None
        yield RunLog(file)


def difference(recorded: dict[str, Any], wanted: dict[str, Any], prefix: str = "") -> list[str]:
    """What differs between two provenance records, one line each: `weights.sha256: 12ab in the store, 34cd now`."""
    lines = []
    for key in sorted(recorded.keys() | wanted.keys()):
        old, new = recorded.get(key), wanted.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            lines += difference(old, new, f"{prefix}{key}.")
        elif json.dumps(old) != json.dumps(new):
            lines.append(f"{prefix}{key}: {old} in the store, {new} now")
    return lines
