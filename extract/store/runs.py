"""Runs that write a store: their log beside it, and the settings that it was begun with."""

import contextlib
import json
import os
import time
from pathlib import Path
from typing import Any

from extract.durable import os_errors_as_run_error
from extract.store.layout import is_remote


class RunLog:
    """The log beside a store (`feats.zarr.log`, JSON lines): times and speeds, which do not belong
    into the store.

    Only the holder of the store's lock writes it. On object storage, which cannot append, there is
    none.
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
            cut = file.read() not in (b"", b"\n")  # by a kill or a full disk
            file.write(b"\n" * cut + json.dumps(record, default=str).encode() + b"\n")

    @staticmethod
    def path(store: str | Path) -> Path:
        """Beside the folder itself, also if `store` is a link to it."""
        return Path(f"{real_path(store).rstrip('/')}.log")

    @staticmethod
    def records(store: str | Path) -> list[dict[str, Any]]:
        """What earlier runs wrote, oldest first; lines that are cut or damaged are left out."""
        if is_remote(store) or not RunLog.path(store).exists():
            return []
        records = []
        text = RunLog.path(store).read_text(encoding="utf-8", errors="replace")
        for line in text.splitlines():
            with contextlib.suppress(json.JSONDecodeError):
                record = json.loads(line)
                if isinstance(record, dict) and isinstance(record.get("event"), str):
                    records.append(record)
        return records


def real_path(store: str | Path) -> str:
    """The path itself, or where it leads if a link is in it."""
    real = str(store) if is_remote(store) else os.path.realpath(store)
    return str(store) if real == os.path.abspath(store) else real


def difference(
    recorded: dict[str, Any],
    wanted: dict[str, Any],
    prefix: str = "",
    *,
    then: str = "in the store",
) -> list[str]:
    """The differences between two records, one line each: `weights.sha256: 12ab in the store, 34cd
    now`."""
    lines = []
    for key in sorted(recorded.keys() | wanted.keys()):
        old, new = recorded.get(key), wanted.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            lines += difference(old, new, f"{prefix}{key}.", then=then)
        elif json.loads(json.dumps(old)) != json.loads(json.dumps(new)):
            lines.append(f"{prefix}{key}: {old} {then}, {new} now")
    return lines
