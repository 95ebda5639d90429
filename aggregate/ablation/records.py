"""Finished results in a folder that belongs to one set of options and one feature store, one process at a time."""

import fcntl
import hashlib
import io
import json
import os
from typing import Any

import numpy as np

from aggregate.training.options import plain
from aggregate.training.run import refuse_other_options
from extract.cli import InputError, RunError
from extract.files import append, make_folder, replace_file
from extract.store import FeatureStore


class Records:
    """Of each result a line of JSON, appended whole to results.jsonl, and an array in a file of its own.

    `rows` are the records by key. `options` are those of a command with the folder as `out`, of which `free` may change
    when it goes on. InputError for a folder of other options or contents, or of anything else.
    """

    def __init__(self, options: Any, store: FeatureStore, *, free: tuple[str, ...], what: str) -> None:
        self.out = options.out
        self._name = self.out / "results.jsonl"
        others = {path.name for path in self.out.glob("*")} - {"options.json", "places"}
        if others and not self._name.exists():
            raise InputError(f"--out {self.out} is not empty and holds no {what}; give another name")
        make_folder(self.out / "places")
        self._file = os.open(self._name, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
        try:
            self.rows = self._open(options, plain(options) | {"contents_of_features": contents_of(store)}, free)
        except BaseException:
            os.close(self._file)
            raise

    def _open(self, options: Any, wanted: dict[str, Any], free: tuple[str, ...]) -> dict[str, dict[str, Any]]:
        """Lock the folder, read what is done, write the options."""
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise RunError(f"another process works in {self.out}; wait for it or give another --out") from None
        content = self._name.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]  # the end of a line that a kill cut off is no result
        os.truncate(self._file, len(whole))
        if whole:
            refuse_other_options(self.out, wanted, type(options), free=free)
        replace_file(self.out / "options.json", json.dumps(wanted, indent=1) + "\n")
        return {line["key"]: line["row"] for line in map(json.loads, whole.splitlines())}

    def add(self, key: str, row: dict[str, Any], array: np.ndarray | None) -> None:
        """Keep a result: on disk when this returns."""
        if array is not None:
            content = io.BytesIO()
            np.save(content, array)
            replace_file(self._array_file(key), content.getvalue())
        append(self._file, self._name, json.dumps({"key": key, "row": row}).encode() + b"\n")
        self.rows[key] = row

    def array(self, key: str) -> np.ndarray | None:
        file = self._array_file(key)
        return np.load(file) if file.exists() else None

    def _array_file(self, key: str) -> Any:
        return self.out / "places" / f"{hashlib.sha256(key.encode()).hexdigest()[:16]}.npy"

    def __enter__(self) -> "Records":
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._file)


def contents_of(store: FeatureStore) -> str:
    """A digest of what a store lists and of how it was made (not of every feature): another one is another data set."""
    digest = hashlib.sha256(json.dumps(store.provenance, sort_keys=True, default=str).encode())
    for values in (store.ids, store.splits, store.groups, store.classes):
        digest.update("\0".join(values).encode() + b"\1")
    for numbers in (store.labels, store.status, store.num_frames):
        digest.update(np.ascontiguousarray(numbers).tobytes())
    return digest.hexdigest()[:16]
