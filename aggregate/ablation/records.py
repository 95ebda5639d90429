"""Finished results in a folder that belongs to one set of options and one feature store, one
process at a time."""

import contextlib
import hashlib
import io
import json
import os
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from aggregate.training.manifest import contents_of, say_other_version, sha256_of
from aggregate.training.options import plain
from aggregate.training.recipes import choose_precision
from aggregate.training.run import refuse_other_options
from extract import InputError
from extract.device import choose_device
from extract.durable import LOCK, append, is_leftover, locked, make_folder, replace_file
from extract.store import FeatureStore

Key = tuple[Any, ...]


class Records:
    """Of each result a row, a line of JSON appended whole to results.jsonl, and an array in a file
    of its own.

    `rows` are the rows by what stands in their columns `by`. `options` are those of the command
    with the folder as `out`; `kind` names its results. InputError for a folder of other options or
    contents, or of anything else.
    """

    def __init__(
        self, options: Any, store: FeatureStore, *, by: tuple[str, ...], kind: str
    ) -> None:
        self.out, self._by = options.out, by
        self.rows: dict[Key, dict[str, Any]] = {}
        self._written_as: dict[Key, str] = {}
        self._name = self.out / "results.jsonl"
        others = {path.name for path in self.out.glob("*") if not is_leftover(path.name)}
        if others - {"options.json", "places", LOCK} and not self._name.exists():
            raise InputError(
                f"--out {self.out} is not empty and holds no {kind}; give another name"
            )
        contents = {
            "contents_of_features": contents_of(store),
            "contents_of_init": sha256_of(getattr(options, "init", None)),
            # What --precision auto is for large batches on this device.
            "auto_precision": choose_precision("auto", choose_device(options.device), 1 << 20),
        }
        with contextlib.ExitStack() as stack:
            stack.enter_context(locked(self.out))
            make_folder(self.out / "places")
            self._file = os.open(self._name, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
            stack.callback(os.close, self._file)
            self._open(plain(options) | contents | {"version": version("hgnl-video")})
            self._held = stack.pop_all()

    def _open(self, wanted: dict[str, Any]) -> None:
        """Read what is done, write the options."""
        content = self._name.read_bytes()
        whole = content[
            : content.rfind(b"\n") + 1
        ]  # the end of a line that a kill cut off is not a result
        os.truncate(self._file, len(whole))
        if whole:
            refuse_other_options(self.out, wanted)
            say_other_version(
                json.loads((self.out / "options.json").read_text(encoding="utf-8"))["version"]
            )
        replace_file(self.out / "options.json", json.dumps(wanted, indent=1) + "\n")
        for line in map(json.loads, whole.splitlines()):
            self._keep(line["row"], line["key"])

    def _keep(self, row: dict[str, Any], written_as: str) -> None:
        key = tuple(row[column] for column in self._by)
        self.rows[key], self._written_as[key] = row, written_as

    def add(self, row: dict[str, Any], array: np.ndarray | None) -> None:
        """Keep a result: on disk when this returns."""
        key = json.dumps([row[column] for column in self._by])
        if array is not None:
            content = io.BytesIO()
            np.save(content, array)
            replace_file(self._array_file(key), content.getvalue())
        append(self._file, self._name, json.dumps({"key": key, "row": row}).encode() + b"\n")
        self._keep(row, key)

    def array(self, key: Key) -> np.ndarray | None:
        file = self._array_file(self._written_as[key])
        return np.load(file) if file.exists() else None

    def _array_file(self, written_as: str) -> Path:
        return self.out / "places" / f"{hashlib.sha256(written_as.encode()).hexdigest()[:16]}.npy"

    def __enter__(self) -> "Records":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._held.close()
        if kind is KeyboardInterrupt:
            print(
                f"\nstopped; {self.out} holds {len(self.rows)} results, the same command goes on",
                flush=True,
            )
