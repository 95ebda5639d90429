"""What a folder of runs holds: stores, run folders, scores, ensembles and ablations, wherever they lie in it."""

import csv
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from extract.cli import InputError, RunError

if TYPE_CHECKING:
    import numpy as np

    from aggregate.scores import Scores
    from extract.store import FeatureStore

RUN_FILES = ("options.json", "metrics.csv", "results.json", "best.pt")


@dataclass
class Found:
    """What lies in a folder, by its name below it; `problems` says what could not be read and why."""

    stores: "dict[str, FeatureStore]" = field(default_factory=dict)
    runs: dict[str, Path] = field(default_factory=dict)
    scores: "dict[str, list[Scores]]" = field(default_factory=dict)  # by rising number of segments
    ensembles: dict[str, dict[str, Any]] = field(default_factory=dict)
    ablations: dict[str, Path] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    def files(self, name: str) -> "Iterator[tuple[str, Path]]":
        """The runs that have a file of this name, and that file."""
        return ((run, folder / name) for run, folder in self.runs.items() if (folder / name).is_file())

    def __str__(self) -> str:
        counts = {
            "feature store": len(self.stores),
            "run": len(self.runs),
            "scores file": len(self.scores),
            "ablation": len(self.ablations),
            "ensemble": len(self.ensembles),
        }
        return ", ".join(f"{count} {what}{'s' * (count != 1)}" for what, count in counts.items())


def find(root: Path) -> Found:
    """Open all there is below `root`. What cannot be read becomes a problem; InputError where there is nothing."""
    found = Found()
    for path in _walk(root):
        name = path.relative_to(root).as_posix()
        try:
            _take(found, path, name)
        except (InputError, RunError, OSError, ValueError, KeyError) as error:
            found.problems.append(f"{name}: {error}")
    if not any((found.stores, found.runs, found.scores, found.ensembles, found.ablations, found.problems)):
        raise InputError(
            f"{root} holds nothing to report on: no feature store (*.zarr), run folder (options.json, metrics.csv), "
            "scores (*.h5) or ablation.csv; give the folder that the commands wrote to"
        )
    return found


def _walk(folder: Path) -> Iterator[Path]:
    for path in sorted(folder.iterdir()):
        yield path
        if path.is_dir() and path.suffix != ".zarr" and not path.is_symlink():
            yield from _walk(path)


def _take(found: Found, path: Path, name: str) -> None:
    if path.suffix == ".zarr":
        from extract.store import FeatureStore

        found.stores[name] = FeatureStore.open(path)
    elif path.name in RUN_FILES[:2] and not (path.parent / "results.jsonl").exists():  # which is an ablation's
        found.runs[name.rpartition("/")[0] or path.parent.resolve().name] = path.parent
    elif path.name == "ablation.csv":
        found.ablations[name] = path
    elif path.suffix == ".h5":
        scores = _scores(path)
        if scores:
            found.scores[name] = scores
    elif path.suffix == ".json":
        record = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(record, dict) and str(record.get("schema", "")).startswith("hgnl-ensemble/"):
            found.ensembles[name] = record


def _scores(path: Path) -> "list[Scores]":
    """The scores of a file, one for each number of segments; none where it holds features (`extract.export`)."""
    import h5py

    from aggregate.scores import Scores

    with h5py.File(path) as file:
        segments = sorted(int(key) for key in file["logits"]) if "logits" in file else []
    return [Scores.load(path, segments=count) for count in segments]


def read_rows(path: Path) -> list[dict[str, str]]:
    """The rows of a CSV with a heading."""
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def columns_of(rows: list[dict[str, str]]) -> "dict[str, np.ndarray]":
    """The columns that hold numbers; what is no number in them is NaN."""
    import numpy as np

    def number(value: str | None) -> float:
        try:
            return float(value or "nan")
        except ValueError:
            return float("nan")

    columns = {name: np.array([number(row[name]) for row in rows]) for name in (rows[0] if rows else ()) if name}
    return {name: values for name, values in columns.items() if np.isfinite(values).any()}


def read_json(path: Path) -> dict[str, Any]:
    """A JSON record, or an empty one where the file is not there."""
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
