"""Find the contents of a folder: stores, runs, scores, ablations, ensembles, cross-validations and
audits, at any depth."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from extract import InputError, Record, RunError
from extract.durable import read_record

if TYPE_CHECKING:
    from aggregate.scores import Scores
    from extract.store import FeatureStore

RUN_FILES = ("options.json", "metrics.csv", "results.json", "best.pt")
# Errors that damaged files cause; the rest of the folder is still shown.
UNREADABLE = (InputError, RunError, OSError, ValueError, KeyError)


@dataclass(eq=False)
class Contents:
    """The contents of a folder, by their path below it.

    Attributes:
        scores: the scores in each file, in the order of the number of segments.
        problems: descriptions of items that could not be read, and why.
        videos: folders of the videos; ids of stores are paths below them.
    """

    root: Path = Path()
    stores: "dict[str, FeatureStore]" = field(default_factory=dict)
    runs: dict[str, Path] = field(default_factory=dict)
    scores: "dict[str, list[Scores]]" = field(default_factory=dict)
    ablations: dict[str, Path] = field(default_factory=dict)
    ensembles: dict[str, Record] = field(default_factory=dict)
    crossvals: dict[str, Record] = field(default_factory=dict)
    audits: dict[str, Record] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    videos: tuple[Path, ...] = ()

    def run_files(self, name: str) -> "Iterator[tuple[str, Path]]":
        """The runs with a file of this name that is not empty, and the file."""
        for run, folder in self.runs.items():
            if (folder / name).is_file() and (folder / name).stat().st_size:
                yield run, folder / name

    def store_named(self, features: str) -> "tuple[str, FeatureStore]":
        """The name of a store, and the store: the one in the folder with the name of the path, or
        else the one at the path itself. InputError if there is neither."""
        from extract.store import FeatureStore

        for name, store in self.stores.items():
            if Path(name).name == Path(features).name:
                return name, store
        return features, FeatureStore.open(features)

    def counts(self) -> dict[str, int]:
        return {
            "feature store": len(self.stores),
            "run": len(self.runs),
            "scores file": len(self.scores),
            "ablation": len(self.ablations),
            "ensemble": len(self.ensembles),
            "cross-validation": len(self.crossvals),
            "audit": len(self.audits),
        }

    def __str__(self) -> str:
        return ", ".join(
            f"{count} {kind}{'s' * (count != 1)}" for kind, count in self.counts().items()
        )


def find(root: Path, videos: tuple[Path, ...] = ()) -> Contents:
    """Open everything below `root`. An item that cannot be read becomes a problem; InputError if
    there is nothing."""
    contents = Contents(root, videos=videos)
    for path in _walk(root):
        name = path.relative_to(root).as_posix()
        try:
            _add(contents, path, name)
        except UNREADABLE as error:
            contents.problems.append(f"{name}: {error}")
    # The scores of a cross-validation are of no split, and are shown with it.
    for name, record in contents.crossvals.items():
        for head in record["heads"]:
            contents.scores.pop((PurePosixPath(name).parent / head["scores"]).as_posix(), None)
    if not any(contents.counts().values()) and not contents.problems:
        raise InputError(
            f"{root} holds nothing to report on: no feature store (*.zarr), run folder "
            "(options.json, metrics.csv), scores (*.h5) or ablation.csv; "
            "give the folder that the commands wrote to"
        )
    return contents


def _walk(folder: Path) -> Iterator[Path]:
    for path in sorted(folder.iterdir()):
        yield path
        if path.is_dir() and path.suffix != ".zarr" and not path.is_symlink():
            yield from _walk(path)


def _add(contents: Contents, path: Path, name: str) -> None:
    if path.suffix == ".zarr":
        from extract.store import FeatureStore

        contents.stores[name] = FeatureStore.open(path)
    elif path.name in ("options.json", "metrics.csv"):
        if not (path.parent / "results.jsonl").exists():  # an ablation is not a run
            contents.runs[name.rpartition("/")[0] or path.parent.resolve().name] = path.parent
    elif path.name == "ablation.csv":
        contents.ablations[name] = path
    elif path.suffix == ".h5":
        if scores := _scores(path):
            contents.scores[name] = scores
    elif path.suffix == ".json":
        record = read_json(path)
        schema = str(record.get("schema", "")) if isinstance(record, dict) else ""
        by_schema = {
            "hgnl-ensemble": contents.ensembles,
            "hgnl-crossval": contents.crossvals,
            "hgnl-audit": contents.audits,
        }
        by_schema.get(schema.partition("/")[0], {})[name] = record


def _scores(path: Path) -> "list[Scores]":
    """The scores in a file for each number of segments; empty if it holds features
    (`extract.export`)."""
    import h5py

    from aggregate.scores import Scores, refuse_training_scores

    with h5py.File(path) as file:
        segments = sorted(map(int, file.get("logits", ())))
    scores = [Scores.load(path, segments=count) for count in segments]
    if scores:
        refuse_training_scores(scores[0], path.name)
    return scores


def read_json(path: Path) -> Any:
    """Read a JSON record; an empty one if the file does not exist."""
    return read_record(path) if path.is_file() else {}


def random_backbones(record: Any) -> Iterator[str]:
    """The backbones with random weights in a provenance record, at any depth."""
    if isinstance(record, list | tuple):
        for part in record:
            yield from random_backbones(part)
    elif isinstance(record, dict):
        weights = record.get("weights")
        if isinstance(weights, dict) and str(weights.get("name")).startswith("random weights"):
            yield f"{record.get('backbone')} ({weights['name']})"
        yield from random_backbones([*record.values()])
