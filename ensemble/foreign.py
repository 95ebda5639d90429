"""Load scores files: our own, and those of other tools, as logits by class name.

    *.npz    one array [N, C], `ids` [N]; optional: `classes` [C], `labels` [N] (names or indices)
    *.npy    [N, C], with the ids in <stem>.txt (one per line) or <stem>.csv (column id or path)
    *.csv    a header id,<class>,<class>,... and optionally a column label
    *.pkl    mmaction2's: a list of N arrays [C], or of dicts with `pred_score` [C]; ids as for .npy

Reading never runs code from a file. If a file does not name its classes, --classes gives them in
the order of the columns.
"""

import csv
import os
import pickle
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from aggregate.scores import Scores
from extract import InputError, Record, StrPath
from extract.feature_files import check_unique, ids_beside
from extract.listing.labels import choose_labels

# Tolerance for the sum of probabilities, which may be rounded to half precision or to few digits.
_TOLERANCE = 2e-3


class _ScoresError(Exception):
    """What is wrong with a file's content, without the name of the file."""


class _Table(NamedTuple):
    """The contents of a file: N rows of C values, and the names it has."""

    ids: list[str]
    values: np.ndarray
    classes: Sequence[str] = ()
    labels: Any = None  # names of classes ("" for none), or indices (-1)


def is_scores_file(path: StrPath) -> bool:
    """Whether a path has the extension of our own scores files."""
    return os.fspath(path).lower().endswith((".h5", ".hdf5"))


def load_scores(path: Path, *, segments: int | None = None, classes: str = "") -> Scores:
    """Load a scores file of ours or of another tool; InputError names it.

    Probabilities are detected, reported, and turned into logits.
    """
    reader = _READERS.get(path.suffix.lower())
    if reader is None:
        scores = Scores.load(path, segments)
    elif not path.is_file():
        raise InputError(f"the scores file {path} does not exist")
    else:
        try:
            scores = _to_scores(path, reader(path), classes)
        except _ScoresError as error:
            raise InputError(f"{path}: {error}") from None
        except InputError:
            raise
        except Exception as error:  # numpy, csv and pickle raise many types for damaged files
            reason = f"{type(error).__name__}: {error!s:.120}"
            raise InputError(f"{path} cannot be read ({reason})") from None
    if _are_probabilities(scores.logits):
        print(
            f"{path}: every row sums to 1, so these are probabilities; "
            "their logarithms are taken as logits"
        )
        logits = np.log(np.maximum(scores.logits, np.finfo(np.float32).tiny))
        return replace(scores, logits=logits, crops=None)
    return scores


def _are_probabilities(values: np.ndarray) -> bool:
    rows = values[~np.isnan(values).any(axis=1)]
    if not len(rows) or values.shape[1] < 2 or (rows < 0).any():
        return False
    return bool((np.abs(rows.sum(axis=1, dtype=np.float64) - 1) < _TOLERANCE).all())


def _to_scores(path: Path, table: _Table, classes: str) -> Scores:
    names = table.classes
    if not names:
        if not classes:
            raise _ScoresError(
                "its classes are not named; give them in the order of its columns: --classes FILE"
            )
        names = choose_labels((), classes)[0]
    values = np.asarray(table.values)
    if values.ndim != 2 or values.dtype.kind not in "fiu":
        raise _ScoresError(f"holds {values.dtype} {list(values.shape)}, expected numbers [N, C]")
    if len(names) != values.shape[1]:
        raise _ScoresError(
            f"{values.shape[1]} columns, and {len(names)} classes are named for them"
        )
    labels = None if table.labels is None else np.asarray(table.labels)
    if labels is not None and labels.dtype.kind == "U":
        labels = _label_indices(labels.tolist(), names)
    ids = check_unique(path, table.ids, len(values))
    try:
        return Scores(ids, names, values, labels, {"model": path.stem, "from": path.name})
    except InputError as error:  # it does not know the file
        raise _ScoresError(str(error)) from None


def _label_indices(labels: Sequence[str], classes: Sequence[str]) -> np.ndarray:
    """Indices of class names, -1 for "". _ScoresError for a label that is not a class."""
    index = {name: label for label, name in enumerate(classes)} | {"": -1}
    if unknown := [label for label in labels if label not in index]:
        raise _ScoresError(f"the label {unknown[0]!r} is none of its {len(classes)} classes")
    return np.array([index[label] for label in labels])


# -- readers, by extension -----------------------------------------------------------------------


def _read_npz(path: Path) -> _Table:
    with np.load(path, allow_pickle=False) as archive:
        arrays = dict(archive)
    tables = [array for array in arrays.values() if array.ndim == 2]
    if len(tables) != 1 or "ids" not in arrays:
        shapes = ", ".join(f"{name} {list(array.shape)}" for name, array in arrays.items())
        raise _ScoresError(f"holds {shapes}; needed are one array [N, C] and `ids` [N]")
    classes = arrays["classes"].tolist() if "classes" in arrays else ()
    return _Table(arrays["ids"].tolist(), tables[0], classes, arrays.get("labels"))


def _read_npy(path: Path) -> _Table:
    return _Table(ids_beside(path), np.load(path, allow_pickle=False))


def _read_csv(path: Path) -> _Table:
    with path.open(encoding="utf-8-sig", newline="") as file:
        rows = csv.reader(file, strict=True)
        header = next(rows, [])
        lines = list(rows)
    if not header or header[0].strip().lower() not in ("id", "path", "video", "youtube_id"):
        raise _ScoresError(f"its first column is {header[:1]}, expected id; the others are classes")
    for number, line in enumerate(lines, start=2):
        if len(line) != len(header):
            raise _ScoresError(f"line {number} has {len(line)} values and the header {len(header)}")
    is_label = [name.strip().lower() == "label" for name in header]
    label_column = is_label.index(True) if any(is_label) else None
    columns = [column for column in range(1, len(header)) if column != label_column]
    values = [[float(line[column] or "nan") for column in columns] for line in lines]
    return _Table(
        ids=[line[0] for line in lines],
        values=np.reshape(values, (len(lines), len(columns))),
        classes=[header[column] for column in columns],
        labels=None if label_column is None else [line[label_column] for line in lines],
    )


class _PlainUnpickler(pickle.Unpickler):
    """Reads containers, numbers, text and NumPy arrays, and runs nothing else."""

    _ARRAYS = frozenset({"_reconstruct", "scalar", "ndarray", "dtype", "_frombuffer"})
    _MODULES = frozenset(
        {
            *("numpy", "numpy.core.multiarray", "numpy._core.multiarray"),
            *("numpy.core.numeric", "numpy._core.numeric"),
        }
    )

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("_codecs", "encode"):  # pickle protocols before 3 write bytes so
            return lambda text, encoding: text.encode("latin1")
        if module in self._MODULES and name in self._ARRAYS:
            return super().find_class(module, name)
        raise _ScoresError(
            f"it holds {module}.{name}, which only running its code could read; "
            "convert it where it was made: "
            'numpy.savez("scores.npz", scores=numpy.stack([...]), ids=[...], classes=[...])'
        )


def _read_pickle(path: Path) -> _Table:
    with path.open("rb") as file:
        content = _PlainUnpickler(file).load()
    if isinstance(content, list) and content and isinstance(content[0], dict):
        content = [_score_of(entry, number) for number, entry in enumerate(content)]
    if not isinstance(content, list | np.ndarray) or not len(content):
        raise _ScoresError(f"it holds a {type(content).__name__}, expected a list of scores")
    return _Table(ids_beside(path), np.stack([np.asarray(row) for row in content]))


def _score_of(entry: Record, number: int) -> Any:
    score = entry.get("pred_score", entry.get("pred_scores"))
    if isinstance(score, dict):
        score = score.get("item")
    if score is None:
        raise _ScoresError(f"entry {number} has no pred_score; it has {', '.join(map(str, entry))}")
    return score


_READERS = {
    ".npz": _read_npz,
    ".npy": _read_npy,
    ".csv": _read_csv,
    ".pkl": _read_pickle,
    ".pickle": _read_pickle,
}
