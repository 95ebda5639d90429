"""Features that other tools wrote: which names there are, the shape of each, and one video's array
at a time.

    a folder    <name>.npy .npz .pt .pth, each [T, D] or [D]; <name>_c.npy beside <name>.json
    *.h5        a dataset per video, [T, D] or [D]; or `features` [N, T, D] with `ids`
    *.npy       [N, D] or [N, T, D], with the ids in <stem>.txt (one per line) or <stem>.csv (column id or path)
    *.parquet   a column id or path, and one column of lists: [D] or [T, D]

Nothing is unpickled: an array of objects, or a file that needs code to be read, is refused by name.
"""

import csv
import os
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from extract import InputError
from extract.listing.folders import extension

Shape = tuple[int, int]  # T, D
FILE_EXTENSIONS = frozenset({"npy", "npz", "pt", "pth"})
_NOT_FEATURES = ("_fps", "_timestamps_ms")  # video_features writes these arrays beside its features


class UnusableError(ValueError):
    """Why the features of one video cannot be taken."""


class FeatureFiles(Protocol):
    """Features by name. `shape` and `load` raise UnusableError; calls in the order of `names` are
    the fast ones."""

    names: list[str]

    def path(self, name: str) -> str:
        """The file that holds it."""

    def shape(self, name: str) -> Shape: ...

    def load(self, name: str) -> np.ndarray:
        """[T, D], of any type of number."""


def open_features(path: Path) -> FeatureFiles:
    """Features in a folder or a file. InputError for what is neither, or holds no features."""
    if path.is_dir():
        files: FeatureFiles = _Folder(path)
    elif not path.exists():
        raise InputError(f"--features {path} does not exist")
    elif path.suffix in (".h5", ".hdf5"):
        files = _Hdf5(path)
    elif path.suffix == ".npy":
        files = _Table(path, ids_beside(path), _load_npy(path))
    elif path.suffix == ".parquet":
        files = _Parquet(path)
    else:
        raise InputError(
            f"--features {path}: known are a folder, .h5, .npy with its ids, and .parquet"
        )
    if not files.names:
        kinds = (
            ""
            if path.is_file()
            else f"; known are {', '.join(sorted(FILE_EXTENSIONS))}, and pickles are never read"
        )
        raise InputError(f"--features {path} holds no features{kinds}")
    return files


def check_shape(shape: tuple[int, ...], dtype: np.dtype | None = None) -> Shape:
    """T, D of an array [T, D], [1, T, D] or [D]. UnusableError for another shape, nothing in it, or
    no numbers."""
    if dtype is not None and dtype.kind not in "fiu":
        what = (
            "objects (a pickle), which are never loaded"
            if dtype.hasobject
            else f"{dtype}, which is not numbers"
        )
        raise UnusableError(f"it holds {what}")
    two = (
        shape[1:]
        if len(shape) == 3 and shape[0] == 1
        else (1, *shape)
        if len(shape) == 1
        else shape
    )
    if len(two) != 2:
        raise UnusableError(f"its shape is {list(shape)}, expected [T, D] or [D]")
    if 0 in two:
        raise UnusableError(f"it is empty: its shape is {list(shape)}")
    return two  # type: ignore[return-value]


def _as_rows(array: np.ndarray) -> np.ndarray:
    return array.reshape(check_shape(array.shape, array.dtype))


# -- one file per video ------------------------------------------------------------------------------------------------


class _Folder:
    """Files below a folder; a name is a file's path without its extension."""

    def __init__(self, root: Path):
        self._root, self._files = str(root), dict[str, str]()
        for folder, folders, files in os.walk(root, followlinks=True):
            folders[:] = sorted(name for name in folders if not name.startswith("."))
            below = os.path.relpath(folder, root).replace(os.sep, "/")
            self._add_files("" if below == "." else f"{below}/", files)
        self.names = sorted(self._files)

    def _add_files(self, below: str, files: list[str]) -> None:
        records = {file.removesuffix(".json") for file in files if file.endswith(".json")}
        for file in sorted(files):
            if extension(file) not in FILE_EXTENSIONS or file.startswith("."):
                continue
            name = file.rpartition(".")[0]
            if name.endswith("_v") and name.removesuffix("_v") in records:
                continue  # the mean of the clips in _c.npy
            if name.endswith(_NOT_FEATURES):
                continue
            if name.endswith("_c") and name.removesuffix("_c") in records:
                name = name.removesuffix("_c")
            if earlier := self._files.get(below + name):
                raise InputError(
                    f"{self._root}: {earlier} and {below}{file} are both features of {below}{name}"
                )
            self._files[below + name] = below + file

    def path(self, name: str) -> str:
        return os.path.join(self._root, self._files[name])

    def shape(self, name: str) -> Shape:
        path = self.path(name)
        if path.endswith(".npy"):
            header = _read(path, _load_npy_header)
            return check_shape(*header)
        array = self._load(path)
        return check_shape(array.shape, array.dtype)

    def load(self, name: str) -> np.ndarray:
        return _as_rows(self._load(self.path(name)))

    def _load(self, path: str) -> np.ndarray:
        readers = {".npz": _load_npz, ".pt": _load_torch, ".pth": _load_torch}
        return _read(
            path,
            readers.get(os.path.splitext(path)[1], lambda path: np.load(path, allow_pickle=False)),
        )


def _read(path: str, reader: Callable[[str], Any]) -> Any:
    """What `reader` makes of a file; UnusableError for what it cannot read."""
    try:
        return reader(path)
    except UnusableError:
        raise
    except (
        Exception
    ) as error:  # numpy, zipfile and torch raise a dozen types for damaged and unsafe files
        text = str(error).split("\n")[0]
        if any(word in str(error) for word in ("ickle", "Weights only", "Python objects")):
            text = "it holds Python objects (a pickle), which are never loaded; save a plain array"
        raise UnusableError(f"it cannot be read ({type(error).__name__}: {text[:120]})") from None


def _load_npy_header(path: str) -> tuple[tuple[int, ...], np.dtype]:
    """Shape and type, from the first bytes."""
    array = (
        np.load(path, mmap_mode="r", allow_pickle=False) if os.path.getsize(path) else np.load(path)
    )
    return array.shape, array.dtype


def _load_npz(path: str) -> np.ndarray:
    with zipfile.ZipFile(path) as archive:
        if archive.testzip():  # numpy does not look at the checksums of what it skips
            raise UnusableError("its checksum does not match")
    with np.load(path, allow_pickle=False) as archive:
        return archive[_only(archive.files)]


def _load_torch(path: str) -> np.ndarray:
    import torch

    content = torch.load(path, map_location="cpu", weights_only=True)
    if isinstance(content, dict):
        content = content[
            _only([name for name, value in content.items() if isinstance(value, torch.Tensor)])
        ]
    if not isinstance(content, torch.Tensor):
        raise UnusableError(f"it holds a {type(content).__name__}, expected one tensor")
    return content.float().numpy() if content.is_floating_point() else content.numpy()


def _only(names: list[str]) -> str:
    """The only array of a file, or the one called features. UnusableError asks which of several."""
    if len(names) == 1:
        return names[0]
    if "features" in names:
        return "features"
    raise UnusableError(
        f"it holds the arrays {', '.join(map(str, names)) or '(none)'}; call the right one `features`"
    )


# -- many videos per file ----------------------------------------------------------------------------------------------


class _Hdf5:
    """A dataset per video, also in groups; a group with one dataset in it is a video too
    (ActivityNet's C3D)."""

    def __init__(self, path: Path):
        import h5py

        self._path = str(path)
        try:
            self._file = h5py.File(path)
        except OSError as error:
            raise InputError(
                f"--features {path} is not an HDF5 file that can be read: {error!s:.120}"
            ) from None
        self._keys: dict[str, str] = {}
        if {"ids", "features"} <= self._file.keys():
            self._table: Any = self._file["features"]
            self.names = check_unique(path, self._file["ids"].asstr()[:].tolist(), len(self._table))
            self._rows = {name: row for row, name in enumerate(self.names)}
            return
        self._table, datasets = None, list[str]()
        self._file.visititems(
            lambda key, item: datasets.append(key) if isinstance(item, h5py.Dataset) else None
        )
        for key in datasets:
            parent = self._file[key].parent
            alone = parent.name != "/" and len(parent) == 1
            self._keys[parent.name.strip("/") if alone else key] = key
        self.names = sorted(self._keys)

    def path(self, name: str) -> str:
        return self._path

    def shape(self, name: str) -> Shape:
        if self._table is not None:
            return check_shape(self._table.shape[1:], self._table.dtype)
        dataset = self._file[self._keys[name]]
        return check_shape(dataset.shape, dataset.dtype)

    def load(self, name: str) -> np.ndarray:
        try:
            array = (
                self._file[self._keys[name]][()]
                if self._table is None
                else self._table[self._rows[name]]
            )
        except OSError as error:
            raise UnusableError(f"it cannot be read ({error!s:.120})") from None
        return _as_rows(array)


class _Table:
    """One array [N, D] or [N, T, D], memory-mapped."""

    def __init__(self, path: Path, ids: list[str], array: np.ndarray):
        self._path, self._array = str(path), array
        self.names = check_unique(path, ids, len(array) if array.ndim else 0)
        self._rows = {name: row for row, name in enumerate(self.names)}

    def path(self, name: str) -> str:
        return self._path

    def shape(self, name: str) -> Shape:
        return check_shape(self._array.shape[1:], self._array.dtype)

    def load(self, name: str) -> np.ndarray:
        return _as_rows(np.asarray(self._array[self._rows[name]]))


def _load_npy(path: Path) -> np.ndarray:
    try:
        return _read(str(path), lambda path: np.load(path, mmap_mode="r", allow_pickle=False))
    except UnusableError as error:
        raise InputError(f"--features {path}: {error}") from None


def ids_beside(path: Path) -> list[str]:
    """The ids of a table's rows, from the text file or the CSV beside it."""
    text, table = path.with_suffix(".txt"), path.with_suffix(".csv")
    if text.exists():
        return text.read_text(encoding="utf-8-sig").split("\n")[
            : -1 if text.read_bytes().endswith(b"\n") else None
        ]
    if table.exists():
        with table.open(encoding="utf-8-sig", newline="") as file:
            rows = csv.DictReader(file)
            column = next(
                (name for name in ("id", "path") if name in (rows.fieldnames or ())), None
            )
            if column is None:
                raise InputError(
                    f"{table} has no column id or path, which would name the rows of {path}"
                )
            return [row[column] for row in rows]
    raise InputError(
        f"{path} does not say which videos its rows are; write their ids, one per line, into {text}"
    )


def check_unique(path: Path, ids: list[str], rows: int) -> list[str]:
    if len(ids) != rows:
        raise InputError(f"{path} holds {rows:,} rows, and {len(ids):,} ids are given for them")
    if len(set(ids)) < len(ids):
        seen: set[str] = set()
        twice = next(name for name in ids if name in seen or seen.add(name))  # type: ignore[func-returns-value]
        raise InputError(f"{path}: the id {twice!r} is given for two rows")
    return ids


class _Parquet:
    """A row per video; read in batches, so that a group of rows need not fit into memory."""

    _BATCH = 256

    def __init__(self, path: Path):
        import pyarrow as pa
        import pyarrow.parquet as pq

        try:
            self._file = pq.ParquetFile(path)
        except (pa.ArrowInvalid, OSError) as error:
            raise InputError(
                f"--features {path} is not a Parquet file that can be read: {error!s:.120}"
            ) from None
        schema = self._file.schema_arrow
        names = [name for name in ("id", "path") if name in schema.names]
        lists = [
            field.name
            for field in schema
            if pa.types.is_list(field.type)
            or pa.types.is_large_list(field.type)
            or pa.types.is_fixed_size_list(field.type)
        ]
        column = "features" if "features" in lists else lists[0] if len(lists) == 1 else None
        if not names or column is None:
            columns = ", ".join(f"{field.name} ({field.type})" for field in schema)
            raise InputError(
                f"{path} has the columns {columns}; needed are id or path, and one of lists (features)"
            )
        self._path, self._column, self._position = str(path), column, 0
        ids = self._file.read([names[0]]).column(0).to_pylist()
        self.names = check_unique(path, [str(name) for name in ids], self._file.metadata.num_rows)
        self._rows = {name: row for row, name in enumerate(self.names)}
        self._arrays: Iterator[np.ndarray | None] = iter(())
        self._shapes: list[Shape | None] | None = None

    def path(self, name: str) -> str:
        return self._path

    def shape(self, name: str) -> Shape:
        if self._shapes is None:
            self._shapes = [
                None if array is None else _shape_or_none(array) for array in self._read()
            ]
        if shape := self._shapes[self._rows[name]]:
            return shape
        return check_shape(self.load(name).shape)  # says what is wrong with it

    def load(self, name: str) -> np.ndarray:
        row = self._rows[name]
        if row < self._position or self._position == 0:
            self._arrays, self._position = self._read(), 0
        while self._position <= row:
            array = next(self._arrays)
            self._position += 1
        if array is None:
            raise UnusableError("it is null, or a list of lists of different lengths")
        return _as_rows(array)

    def _read(self) -> Iterator[np.ndarray | None]:
        for batch in self._file.iter_batches(self._BATCH, columns=[self._column]):
            for value in batch.column(0):
                yield _array_of(value)


def _array_of(value: Any) -> np.ndarray | None:
    """[D] or [T, D] of a cell of lists, None for a null or lists of different lengths."""
    items = value.values
    if items is None:
        return None
    if not hasattr(items, "flatten") or not hasattr(items.type, "value_type"):
        return items.to_numpy(zero_copy_only=False)
    flat, rows = items.flatten().to_numpy(zero_copy_only=False), len(items)
    if items.null_count or any(len(item) * rows != len(flat) for item in items):
        return None
    return flat.reshape(rows, -1) if rows else flat.reshape(0, 0)


def _shape_or_none(array: np.ndarray) -> Shape | None:
    try:
        return check_shape(array.shape, array.dtype)
    except UnusableError:
        return None
