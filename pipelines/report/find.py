"""What a folder of runs holds: stores, runs, scores, ablations, ensembles, cross-validations,
wherever they lie."""

import json
from collections.abc import Iterator, Sized
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from extract import InputError, RunError

if TYPE_CHECKING:
    from aggregate.scores import Scores
    from extract.store import FeatureStore

RUN_FILES = ("options.json", "metrics.csv", "results.json", "best.pt")
UNREADABLE = (
    InputError,
    RunError,
    OSError,
    ValueError,
    KeyError,
)  # what damage comes out as; the rest is still shown


@dataclass
class Found:
    """What lies in a folder, by its name below it; `problems` says what could not be read and
    why."""

    root: Path = Path()
    stores: "dict[str, FeatureStore]" = field(default_factory=dict)
    runs: dict[str, Path] = field(default_factory=dict)
    scores: "dict[str, list[Scores]]" = field(default_factory=dict)  # by rising number of segments
    ablations: dict[str, Path] = field(default_factory=dict)
    ensembles: dict[str, dict[str, Any]] = field(default_factory=dict)
    crossvals: dict[str, dict[str, Any]] = field(default_factory=dict)
    audits: dict[str, dict[str, Any]] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    videos: tuple[Path, ...] = ()  # folders that the ids of the stores are relative to

    def files(self, name: str) -> "Iterator[tuple[str, Path]]":
        """The runs that have a file of this name with something in it, and that file."""
        for run, folder in self.runs.items():
            if (folder / name).is_file() and (folder / name).stat().st_size:
                yield run, folder / name

    def counts(self) -> dict[str, int]:
        """How many there are of each kind."""
        kinds = (
            "feature store",
            "run",
            "scores file",
            "ablation",
            "ensemble",
            "cross-validation",
            "audit",
        )
        there: list[Sized] = [
            self.stores,
            self.runs,
            self.scores,
            self.ablations,
            self.ensembles,
            self.crossvals,
            self.audits,
        ]
        return dict(zip(kinds, map(len, there), strict=True))

    def __str__(self) -> str:
        return ", ".join(
            f"{count} {kind}{'s' * (count != 1)}" for kind, count in self.counts().items()
        )


def find(root: Path, videos: tuple[Path, ...] = ()) -> Found:
    """Open all there is below `root`. What cannot be read becomes a problem; InputError where there
    is nothing."""
    found = Found(root, videos=videos)
    for path in _walk(root):
        name = path.relative_to(root).as_posix()
        try:
            _take(found, path, name)
        except UNREADABLE as error:
            found.problems.append(f"{name}: {error}")
    for name, record in found.crossvals.items():  # which shows them itself: they are of no split
        for head in record["heads"]:
            found.scores.pop((PurePosixPath(name).parent / head["scores"]).as_posix(), None)
    if not any(found.counts().values()) and not found.problems:
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
    elif (
        path.name in RUN_FILES[:2] and not (path.parent / "results.jsonl").exists()
    ):  # which is an ablation's
        found.runs[name.rpartition("/")[0] or path.parent.resolve().name] = path.parent
    elif path.name == "ablation.csv":
        found.ablations[name] = path
    elif path.suffix == ".h5" and (scores := _scores(path)):
        found.scores[name] = scores
    elif path.suffix == ".json":
        record = read_json(path)
        schema = str(record.get("schema", "")) if isinstance(record, dict) else ""
        for kind, there in (
            ("hgnl-ensemble/", found.ensembles),
            ("hgnl-crossval/", found.crossvals),
            ("hgnl-audit/", found.audits),
        ):
            if schema.startswith(kind):
                there[name] = record


def _scores(path: Path) -> "list[Scores]":
    """The scores of a file, one for each number of segments; none where it holds features
    (`extract.export`)."""
    import h5py

    from aggregate.scores import Scores, refuse_training_scores

    with h5py.File(path) as file:
        segments = sorted(int(key) for key in file["logits"]) if "logits" in file else []
    several = [Scores.load(path, segments=count) for count in segments]
    for scores in several[:1]:
        refuse_training_scores(scores, path.name)
    return several


def read_json(path: Path) -> Any:
    """A JSON record, or an empty one where the file is not there."""
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
