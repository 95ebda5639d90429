"""Runs that write a store: the log next to it, and what differs from the recorded settings."""

import contextlib
import json
import os
import time
from pathlib import Path
from typing import Any

from extract.durable import os_errors_as_run_error
from extract.store.objects import is_remote


class RunLog:
    """The log next to a store (`feats.zarr.log`, JSON lines): times, speeds, options of its runs.

    Only the process that holds the store's lock writes it. A store on object storage has no log,
    because objects cannot be appended to.
    """

    def __init__(self, store: str | Path):
        self._path = None if is_remote(store) else self.path(store)

    def write(self, event: str, **fields: Any) -> None:
        """Append one record. Raises RunError."""
        if self._path is None:
            return
        record = {"event": event, "time": round(time.time(), 3), **fields}
        with os_errors_as_run_error(self._path), self._path.open("ab+") as file:
            file.seek(max(file.seek(0, os.SEEK_END) - 1, 0))
            last_line_is_cut = file.read() not in (b"", b"\n")  # by a kill or a full disk
            line = json.dumps(record, default=str).encode() + b"\n"
            file.write(b"\n" * last_line_is_cut + line)

    @staticmethod
    def path(store: str | Path) -> Path:
        """Next to the folder itself, also if `store` is a link to it."""
        return Path(f"{real_path(store).rstrip('/')}.log")

    @staticmethod
    def records(store: str | Path) -> list[dict[str, Any]]:
        """The records of all runs so far, oldest first, without lines that are cut or damaged."""
        path = RunLog.path(store)
        if is_remote(store) or not path.exists():
            return []
        records = []
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            with contextlib.suppress(json.JSONDecodeError):
                record = json.loads(line)
                if isinstance(record, dict) and isinstance(record.get("event"), str):
                    records.append(record)
        return records


def real_path(store: str | Path) -> str:
    """The path with its links followed; unchanged if it has none."""
    real = os.path.realpath(store)
    return str(store) if is_remote(store) or real == os.path.abspath(store) else real


def process_of(record: dict[str, Any]) -> str:
    """The process that wrote a record of a log or a lease: `process 4711 on gpu-3`."""
    return f"process {record.get('process')} on {record.get('host')}"


def difference(
    recorded: dict[str, Any],
    current: dict[str, Any],
    prefix: str = "",
    *,
    then: str = "in the store",
) -> list[str]:
    """The differences between two records, one line each.

    For example `weights.sha256: 12ab in the store, 34cd now`.
    """
    lines = []
    for key in sorted(recorded.keys() | current.keys()):
        old, new = recorded.get(key), current.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            lines += difference(old, new, f"{prefix}{key}.", then=then)
        elif json.loads(json.dumps(old)) != json.loads(json.dumps(new)):
            lines.append(f"{prefix}{key}: {old} {then}, {new} now")
    return lines
