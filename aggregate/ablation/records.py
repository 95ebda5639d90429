"""Finished results of a command, in a folder for one set of options and one feature store.

    options.json     the options, and digests of the data
    results.jsonl    one line of JSON per result, appended when it is finished
    places/          one array per result

Only one process writes at a time.
"""

import contextlib
import hashlib
import io
import json
import os
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from aggregate.training.manifest import contents_of, print_other_version
from aggregate.training.options import to_json
from aggregate.training.recipes import choose_precision
from aggregate.training.run import refuse_other_options
from extract import InputError, Record
from extract.device import choose_device
from extract.durable import (
    LOCK,
    append,
    is_leftover,
    locked,
    make_folder,
    read_record,
    replace_file,
    write_record,
)
from extract.sources import sha256_of
from extract.store import FeatureStore

Key = tuple[Any, ...]


class Records:
    """The results in the folder `options.out`, locked while this is open.

    `rows` maps the values of the columns `by` to the rows; `kind` names the results in messages.
    InputError if the folder holds results of other options or data, or other files.
    """

    def __init__(
        self, options: Any, store: FeatureStore, *, by: tuple[str, ...], kind: str
    ) -> None:
        self.out, self._by = options.out, by
        self.rows: dict[Key, Record] = {}
        self._path = self.out / "results.jsonl"
        names = {path.name for path in self.out.glob("*") if not is_leftover(path.name)}
        if names - {"options.json", "places", LOCK} and not self._path.exists():
            raise InputError(
                f"--out {self.out} is not empty and holds no {kind}; give another name"
            )
        init = getattr(options, "init", None)
        contents = {
            "contents_of_features": contents_of(store),
            "contents_of_init": sha256_of(init) if init else "",
            # The meaning of --precision auto for large batches on this device.
            "auto_precision": choose_precision("auto", choose_device(options.device), 1 << 20),
        }
        with contextlib.ExitStack() as stack:
            stack.enter_context(locked(self.out))
            make_folder(self.out / "places")
            self._file = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
            stack.callback(os.close, self._file)
            self._open(to_json(options) | contents | {"version": version("hgnl-video")})
            self._held = stack.pop_all()

    def _open(self, options: Record) -> None:
        """Read the finished results, write the options."""
        options_path = self.out / "options.json"
        content = self._path.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]  # without a line that a kill cut off
        os.truncate(self._file, len(whole))
        if whole:
            refuse_other_options(self.out, options)
            print_other_version(read_record(options_path)["version"])
        write_record(options_path, options)
        for line in whole.splitlines():
            row = json.loads(line)["row"]
            self.rows[self._key(row)] = row

    def _key(self, row: Record) -> Key:
        return tuple(row[column] for column in self._by)

    def add(self, row: Record, array: np.ndarray | None) -> None:
        """Keep a result. It is on disk when this returns."""
        key = self._key(row)
        if array is not None:
            content = io.BytesIO()
            np.save(content, array)
            replace_file(self._array_file(key), content.getvalue())
        line = json.dumps({"key": json.dumps(key), "row": row})
        append(self._file, self._path, f"{line}\n".encode())
        self.rows[key] = row

    def array(self, key: Key) -> np.ndarray | None:
        file = self._array_file(key)
        return np.load(file) if file.exists() else None

    def _array_file(self, key: Key) -> Path:
        digest = hashlib.sha256(json.dumps(key).encode()).hexdigest()
        return self.out / "places" / f"{digest[:16]}.npy"

    def __enter__(self) -> "Records":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._held.close()
        if kind is KeyboardInterrupt:
            print(
                f"\nstopped; {self.out} holds {len(self.rows)} results, the same command resumes",
                flush=True,
            )
