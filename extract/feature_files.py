"""Features that other tools wrote: their names, the shape of each, and one video's array at a time.

    a folder    <name>.npy .npz .pt .pth, each [T, D] or [D]; or <name>_c.npy next to <name>.json
    *.h5        a dataset per video, [T, D] or [D]; or `features` [N, T, D] with `ids`
    *.npy       [N, D] or [N, T, D], with the ids in <stem>.txt (one per line),
                or in <stem>.csv (column id or path)
    *.parquet   a column id or path, and one column of lists: [D] or [T, D]

Nothing is unpickled: arrays of Python objects, and files that run code to be read, are refused.
"""

import contextlib
import csv
import itertools
import os
import zipfile
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from extract import InputError, StrPath
from extract.listing.folders import extension

Shape = tuple[int, int]  # T, D
FILE_EXTENSIONS = frozenset({"npy", "npz", "pt", "pth"})
# Of arrays that video_features writes next to its features.
_NOT_FEATURES = ("_fps", "_timestamps_ms")


class UnusableError(ValueError):
    """The features of one video cannot be used; the message says why."""


class FeatureFiles(ABC):
    """Features by name, in one file or in many. Reading in the order of `names` is fastest."""

    names: list[str]
    _source: Path

    def path(self, name: str) -> str:
        """The file that holds the features of a name."""
        return str(self._source)

    @abstractmethod
    def _open(self, name: str) -> Any:
        """An array, or a part of a file that has a shape and a dtype and is read by np.asarray."""

    def shape(self, name: str) -> Shape:
        """T, D of an array. Raises UnusableError."""
        with _errors_as_unusable():
            array = self._open(name)
            return check_shape(array.shape, array.dtype)

    def load(self, name: str) -> np.ndarray:
        """[T, D], of any type of number. Raises UnusableError."""
        with _errors_as_unusable():
            array = np.asarray(self._open(name))
            return array.reshape(check_shape(array.shape, array.dtype))


def open_features(path: Path) -> FeatureFiles:
    """Features in a folder or a file. InputError for an unknown kind of file, or if it is empty."""
    if path.is_dir():
        files: FeatureFiles = _Folder(path)
    elif not path.exists():
        raise InputError(f"--features {path} does not exist")
    elif path.suffix in (".h5", ".hdf5"):
        files = _open_hdf5(path)
    elif path.suffix == ".npy":
        files = _open_npy(path)
    elif path.suffix == ".parquet":
        files = _Parquet(path)
    else:
        raise InputError(
            f"--features {path}: expected a folder, .h5, .npy with its ids, or .parquet"
        )
    if not files.names:
        extensions = ", ".join(sorted(FILE_EXTENSIONS))
        hint = f"; expected {extensions}; pickles are never read" if path.is_dir() else ""
        raise InputError(f"--features {path} holds no features{hint}")
    return files


def check_shape(shape: tuple[int, ...], dtype: np.dtype) -> Shape:
    """T, D of an array [T, D], [1, T, D] or [D]. UnusableError for other shapes, empty arrays, and
    arrays that do not hold numbers."""
    if dtype.hasobject:
        raise UnusableError("it holds objects (a pickle), which are never loaded")
    if dtype.kind not in "fiu":
        raise UnusableError(f"it holds {dtype}, which is not numbers")
    match shape:
        case (length, dim) | (1, length, dim):
            rows = length, dim
        case (dim,):
            rows = 1, dim
        case _:
            raise UnusableError(f"its shape is {list(shape)}, expected [T, D] or [D]")
    if 0 in rows:
        raise UnusableError(f"it is empty: its shape is {list(shape)}")
    return rows


@contextlib.contextmanager
def _errors_as_unusable() -> Iterator[None]:
    """Raise UnusableError for an array that cannot be read.

    numpy, zipfile, torch, h5py and pyarrow raise a dozen types for damaged and unsafe files.
    """
    try:
        yield
    except UnusableError:
        raise
    except Exception as error:
        text = str(error).split("\n")[0]
        if any(word in str(error) for word in ("ickle", "Weights only", "Python objects")):
            text = "it holds Python objects (a pickle), which are never loaded; save a plain array"
        raise UnusableError(f"it cannot be read ({type(error).__name__}: {text[:120]})") from None


# -- one file per video ----------------------------------------------------------------------------


class _Folder(FeatureFiles):
    """Files below a folder; a name is a file's path without its extension."""

    def __init__(self, root: Path):
        self._source = root
        self._files: dict[str, str] = {}
        for folder, folders, files in os.walk(root, followlinks=True):
            folders[:] = [name for name in folders if not name.startswith(".")]
            below = os.path.relpath(folder, root)
            self._add_files("" if below == "." else f"{below}/", files)
        self.names = sorted(self._files)

    def _add_files(self, prefix: str, files: list[str]) -> None:
        # <name>_c.npy holds the features of the clips of a video, <name>_v.npy their mean.
        with_record = {file.removesuffix(".json") for file in files if file.endswith(".json")}
        for file in sorted(files):
            stem = file.rpartition(".")[0]
            if extension(file) not in FILE_EXTENSIONS or file.startswith("."):
                continue
            is_mean = stem.endswith("_v") and stem.removesuffix("_v") in with_record
            if is_mean or stem.endswith(_NOT_FEATURES):
                continue
            if stem.removesuffix("_c") in with_record:
                stem = stem.removesuffix("_c")
            name, path = prefix + stem, prefix + file
            if (earlier := self._files.setdefault(name, path)) != path:
                raise InputError(
                    f"{self._source}: {earlier} and {path} are both features of {name}"
                )

    def path(self, name: str) -> str:
        return os.path.join(self._source, self._files[name])

    def _open(self, name: str) -> np.ndarray:
        path = self.path(name)
        match extension(path):
            case "npy":
                return _map_npy(path)
            case "npz":
                return _load_npz(path)
            case _:
                return _load_torch(path)


def _map_npy(path: StrPath) -> np.ndarray:
    return np.load(path, mmap_mode="r", allow_pickle=False)  # reads the header only


def _load_npz(path: str) -> np.ndarray:
    with zipfile.ZipFile(path) as archive:
        if archive.testzip():  # numpy does not check the arrays that it skips
            raise UnusableError("its checksum does not match")
    with np.load(path, allow_pickle=False) as archive:
        return archive[_choose_array(archive.files)]


def _load_torch(path: str) -> np.ndarray:
    import torch

    content = torch.load(path, map_location="cpu", weights_only=True)
    if isinstance(content, dict):
        tensors = [name for name, value in content.items() if isinstance(value, torch.Tensor)]
        content = content[_choose_array(tensors)]
    if not isinstance(content, torch.Tensor):
        raise UnusableError(f"it holds a {type(content).__name__}, expected one tensor")
    return content.float().numpy() if content.is_floating_point() else content.numpy()


def _choose_array(names: list[str]) -> str:
    """The only array of a file, or the one called features. UnusableError if neither exists."""
    if len(names) == 1:
        return names[0]
    if "features" in names:
        return "features"
    listed = ", ".join(map(str, names)) or "(none)"
    raise UnusableError(f"it holds the arrays {listed}; call the right one `features`")


# -- many videos per file --------------------------------------------------------------------------


class _Table(FeatureFiles):
    """One array [N, D] or [N, T, D]: a memory-mapped .npy, or a dataset of HDF5."""

    def __init__(self, path: Path, ids: list[str], array: Any):
        self._source, self._array = path, array
        self.names = check_unique(path, ids, len(array) if array.ndim else 0)
        self._rows = {name: row for row, name in enumerate(ids)}

    def _open(self, name: str) -> Any:
        return self._array[self._rows[name]]

    def shape(self, name: str) -> Shape:
        return check_shape(self._array.shape[1:], self._array.dtype)


def _open_npy(path: Path) -> FeatureFiles:
    try:
        with _errors_as_unusable():
            array = _map_npy(path)
    except UnusableError as error:
        raise InputError(f"--features {path}: {error}") from None
    return _Table(path, ids_beside(path), array)


def ids_beside(path: Path) -> list[str]:
    """The ids of a table's rows, from the text file or the CSV next to it."""
    text, table = path.with_suffix(".txt"), path.with_suffix(".csv")
    if text.exists():
        return text.read_text(encoding="utf-8-sig").removesuffix("\n").split("\n")
    if not table.exists():
        raise InputError(
            f"{path} does not name the videos of its rows; write their ids, one per line, into "
            f"{text}"
        )
    with table.open(encoding="utf-8-sig", newline="") as file:
        rows = csv.DictReader(file)
        columns = [name for name in ("id", "path") if name in (rows.fieldnames or ())]
        if not columns:
            raise InputError(
                f"{table} has no column id or path, which would name the rows of {path}"
            )
        return [row[columns[0]] for row in rows]


def check_unique(path: Path, ids: list[str], rows: int) -> list[str]:
    """The ids. InputError unless there is one for each row, all different."""
    if len(ids) != rows:
        raise InputError(f"{path} holds {rows:,} rows, and {len(ids):,} ids are given for them")
    if len(set(ids)) < len(ids):
        [(repeated, _)] = Counter(ids).most_common(1)
        raise InputError(f"{path}: the id {repeated!r} is given for two rows")
    return ids


def _open_hdf5(path: Path) -> FeatureFiles:
    import h5py

    try:
        file = h5py.File(path)
    except OSError as error:
        raise InputError(
            f"--features {path} is not an HDF5 file that can be read: {error!s:.120}"
        ) from None
    if {"ids", "features"} <= file.keys():
        return _Table(path, file["ids"].asstr()[:].tolist(), file["features"])
    return _Datasets(path, file)


class _Datasets(FeatureFiles):
    """A dataset of HDF5 per video, also in groups; a group with one dataset is a video too
    (ActivityNet's C3D)."""

    def __init__(self, path: Path, file: Any):
        from h5py import Dataset

        self._source, self._file = path, file
        keys: list[str] = []
        file.visititems(lambda key, item: keys.append(key) if isinstance(item, Dataset) else None)
        self._keys = {}
        for key in keys:
            group = file[key].parent
            is_alone = group.name != "/" and len(group) == 1
            self._keys[group.name.strip("/") if is_alone else key] = key
        self.names = sorted(self._keys)

    def _open(self, name: str) -> Any:
        dataset = self._file[self._keys[name]]
        if dataset.shape is None:  # HDF5's null dataspace
            raise UnusableError("it is empty: it has no shape")
        return dataset


class _Parquet(FeatureFiles):
    """A row per video, read in batches: a group of rows need not fit into memory."""

    _BATCH_ROWS = 256

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
        id_columns = [name for name in ("id", "path") if name in schema.names]
        lists = [field.name for field in schema if pa.types.is_nested(field.type)]
        if "features" in lists:
            lists = ["features"]
        if not id_columns or len(lists) != 1:
            columns = ", ".join(f"{field.name} ({field.type})" for field in schema)
            raise InputError(
                f"{path} has the columns {columns}; needed are id or path, "
                "and one of lists (features)"
            )
        ids = self._file.read(id_columns[:1]).column(0).to_pylist()
        self._source, self._column = path, lists[0]
        self.names = check_unique(path, [str(name) for name in ids], self._file.metadata.num_rows)
        self._rows = {name: row for row, name in enumerate(self.names)}
        self._cells, self._next_row = self._read(), 0

    def _read(self) -> Iterator[Any]:
        for batch in self._file.iter_batches(self._BATCH_ROWS, columns=[self._column]):
            yield from batch.column(0)

    def _open(self, name: str) -> np.ndarray:
        row = self._rows[name]
        if row < self._next_row:
            self._cells, self._next_row = self._read(), 0
        cell = next(itertools.islice(self._cells, row - self._next_row, None))
        self._next_row = row + 1
        return _array_of(cell)


def _array_of(cell: Any) -> np.ndarray:
    """[D] or [T, D] of a cell of lists. UnusableError for a null, or lists of different lengths."""
    import pyarrow.compute as pc

    items = cell.values
    if items is not None and not hasattr(items.type, "value_type"):
        return items.to_numpy(zero_copy_only=False)
    if items is None or items.null_count or len(pc.list_value_length(items).unique()) > 1:
        raise UnusableError("it is null, or a list of lists of different lengths")
    values = items.flatten().to_numpy(zero_copy_only=False)
    return values.reshape(len(items), len(values) // max(len(items), 1))
