"""Scores that other tools wrote: read without running code of theirs, and brought to logits by
class name.

    *.npz    one array [N, C], `ids` [N]; optional: `classes` [C], `labels` [N] (names, or indices of classes)
    *.npy    [N, C], with the ids in <stem>.txt (one per line) or <stem>.csv (column id or path)
    *.csv    a header id,<class>,<class>,... and optionally a column label
    *.pkl    mmaction2's: a list of N arrays [C], or of dicts with `pred_score` [C]; ids as for .npy

If a file does not name its classes, --classes does, in the order of the columns.
"""

import csv
import pickle
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from aggregate.scores import Scores
from ensemble.entries import is_scores
from extract import InputError
from extract.feature_files import check_unique, ids_beside
from extract.listing.labels import choose_labels

_TOLERANCE = 2e-3  # of the sum of probabilities that were rounded to half precision, or printed


def load_scores(path: Path, *, segments: int | None = None, classes: str = "") -> Scores:
    """A scores file of ours or of another tool. Probabilities become logits, which is printed.
    InputError names it."""
    readers = {
        ".npz": _read_npz,
        ".npy": _read_npy,
        ".csv": _read_csv,
        ".pkl": _read_pickle,
        ".pickle": _read_pickle,
    }
    reader = readers.get(path.suffix.lower())
    if reader is None or is_scores(path):
        scores = Scores.load(path, segments)
    elif not path.is_file():
        raise InputError(f"there is no scores file {path}")
    else:
        try:
            scores = reader(path, classes)
        except InputError as error:
            raise InputError(f"{path}: {error}") from None
        except (
            Exception
        ) as error:  # numpy, csv and pickle raise a dozen types for damaged and foreign files
            raise InputError(
                f"{path} cannot be read ({type(error).__name__}: {error!s:.120})"
            ) from None
    if _are_probabilities(scores.logits):
        print(
            f"{path}: every row sums to 1, so these are probabilities; their logarithms are taken as logits"
        )
        logits = np.log(np.maximum(scores.logits, np.finfo(np.float32).tiny))
        return replace(scores, logits=logits, crops=None)
    return scores


def _are_probabilities(values: np.ndarray) -> bool:
    rows = values[~np.isnan(values).any(axis=1)]
    if not len(rows) or values.shape[1] < 2 or (rows < 0).any():
        return False
    return bool((np.abs(rows.sum(axis=1, dtype=np.float64) - 1) < _TOLERANCE).all())


def _scores(
    path: Path, ids: list[str], values: np.ndarray, classes: Sequence[str], labels: Any = None
) -> Scores:
    values = np.asarray(values)
    if values.ndim != 2 or values.dtype.kind not in "fiu":
        raise InputError(f"holds {values.dtype} {list(values.shape)}, expected numbers [N, C]")
    if len(classes) != values.shape[1]:
        raise InputError(
            f"{values.shape[1]} columns, and {len(classes)} classes are named for them"
        )
    return Scores(
        check_unique(path, ids, len(values)),
        classes,
        values,
        labels,
        {"model": path.stem, "from": path.name},
    )


def _named_classes(classes: str) -> Sequence[str]:
    if not classes:
        raise InputError(
            "its classes are not named; give them in the order of its columns: --classes FILE"
        )
    return choose_labels((), classes)[0]


def _read_npz(path: Path, classes: str) -> Scores:
    with np.load(path, allow_pickle=False) as archive:
        arrays = {name: archive[name] for name in archive.files}
    tables = [name for name, array in arrays.items() if array.ndim == 2]
    if len(tables) != 1 or "ids" not in arrays:
        names = ", ".join(f"{name} {list(array.shape)}" for name, array in arrays.items())
        raise InputError(f"holds {names}; needed are one array [N, C] and `ids` [N]")
    named = arrays["classes"].tolist() if "classes" in arrays else _named_classes(classes)
    labels = arrays.get("labels")
    if labels is not None and labels.dtype.kind == "U":
        labels = _label_indices(labels.tolist(), named)
    return _scores(path, arrays["ids"].tolist(), arrays[tables[0]], named, labels)


def _read_npy(path: Path, classes: str) -> Scores:
    return _scores(
        path, ids_beside(path), np.load(path, allow_pickle=False), _named_classes(classes)
    )


def _read_csv(path: Path, classes: str) -> Scores:
    with path.open(encoding="utf-8-sig", newline="") as file:
        rows = csv.reader(file, strict=True)
        header = next(rows, [])
        lines = list(rows)
    if not header or header[0].strip().lower() not in ("id", "path", "video", "youtube_id"):
        raise InputError(f"its first column is {header[:1]}, expected id; the others are classes")
    labeled = next(
        (place for place, name in enumerate(header) if name.strip().lower() == "label"), None
    )
    columns = [place for place in range(1, len(header)) if place != labeled]
    if wrong := next(
        (number for number, line in enumerate(lines, 2) if len(line) != len(header)), 0
    ):
        raise InputError(
            f"line {wrong} has {len(lines[wrong - 2])} values and the header {len(header)}"
        )
    named = [header[place] for place in columns]
    values = np.array(
        [[float(line[place] or "nan") for place in columns] for line in lines]
    ).reshape(-1, len(columns))
    labels = None if labeled is None else _label_indices([line[labeled] for line in lines], named)
    return _scores(path, [line[0] for line in lines], values, named, labels)


def _label_indices(labels: Sequence[str], classes: Sequence[str]) -> np.ndarray:
    """Indices of class names, -1 for "". InputError for a label that is not a class."""
    index = {name: label for label, name in enumerate(classes)} | {"": -1}
    if unknown := [label for label in labels if label not in index]:
        raise InputError(f"the label {unknown[0]!r} is none of its {len(classes)} classes")
    return np.array([index[label] for label in labels])


# -- pickles -----------------------------------------------------------------------------------------------------------


class _PlainUnpickler(pickle.Unpickler):
    """Reads containers, numbers, text and NumPy arrays, and runs nothing else."""

    _ARRAYS = frozenset({"_reconstruct", "scalar", "ndarray", "dtype", "_frombuffer"})
    _MODULES = frozenset(
        {"numpy", "numpy.core.multiarray", "numpy._core.multiarray", "numpy.core.numeric"}
    )

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("_codecs", "encode"):  # how protocols before 3 write bytes
            return lambda text, encoding: text.encode("latin1")
        if module in (*self._MODULES, "numpy._core.numeric") and name in self._ARRAYS:
            return super().find_class(module, name)
        raise InputError(
            f"it holds {module}.{name}, which only running its code could read; convert it where it was made: "
            'numpy.savez("scores.npz", scores=numpy.stack([...]), ids=[...], classes=[...])'
        )


def _read_pickle(path: Path, classes: str) -> Scores:
    with path.open("rb") as file:
        content = _PlainUnpickler(file).load()
    if isinstance(content, list) and content and isinstance(content[0], dict):
        content = [_score_of(entry, place) for place, entry in enumerate(content)]
    if not isinstance(content, list | np.ndarray) or not len(content):
        raise InputError(f"it holds a {type(content).__name__}, expected a list of scores")
    return _scores(
        path,
        ids_beside(path),
        np.stack([np.asarray(row) for row in content]),
        _named_classes(classes),
    )


def _score_of(entry: dict[str, Any], place: int) -> Any:
    score = entry.get("pred_score", entry.get("pred_scores"))
    if isinstance(score, dict):
        score = score.get("item")
    if score is None:
        raise InputError(f"entry {place} has no pred_score; it has {', '.join(map(str, entry))}")
    return score
