"""What a run was trained on: recorded in its folder and in its checkpoints, and compared when the
run goes on.

    videos.csv          a row per video of the run: id, label, split, group, role (train or validate); of files, their
                        size and a digest
    Checkpoint.data     videos: SHA-256 of that file; train, validate: int64 [n, 2], a hash of each id, and one of id,
                        label, split and group; features, init, recipe: digests of what else decides; version

The ids in a checkpoint are hashes of 64 bits, so that `evaluate` knows which videos it was trained
on wherever the checkpoint is moved to; 540,000 videos take 9 MB.
"""

import csv
import hashlib
import importlib.metadata
import io
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from aggregate.training.splits import ListedVideos, choose_rows
from extract import InputError, StrPath
from extract.cli import first_few
from extract.store import FAILED, FeatureStore, difference

if TYPE_CHECKING:
    from aggregate.training.checkpoint import Checkpoint
    from aggregate.training.options import SplitOptions
    from aggregate.training.recipes import Recipe

VIDEOS = "videos.csv"
COLUMNS = ("id", "label", "split", "group")
FILE = "file"  # size and digest, if the run decodes videos
_SAMPLED = 16  # videos whose features are digested: other features of the same videos differ in all of them


class Chosen(NamedTuple):
    """Rows int [n] to train and to validate on, and a description of the choice."""

    train: np.ndarray
    validate: np.ndarray
    description: str


def columns_of(videos: FeatureStore | ListedVideos, rows: np.ndarray) -> list[tuple[str, ...]]:
    """`COLUMNS` of each of these videos."""
    names = [*videos.classes, ""]  # the last: label -1
    labels = [names[label] for label in videos.labels[rows].tolist()]
    columns = [
        videos.ids[rows].tolist(),
        labels,
        videos.splits[rows].tolist(),
        videos.groups[rows].tolist(),
    ]
    return list(zip(*columns, strict=True))


def videos_csv(videos: FeatureStore | ListedVideos, chosen: Chosen) -> bytes:
    """The content of videos.csv."""
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    listed = isinstance(videos, ListedVideos)
    writer.writerow([*COLUMNS, *[FILE] * listed, "role"])
    for role, rows in (("train", chosen.train), ("validate", chosen.validate)):
        writer.writerows([*row, role] for row in _recorded(videos, rows))
    return text.getvalue().encode("utf-8", "surrogateescape")


def _recorded(videos: FeatureStore | ListedVideos, rows: np.ndarray) -> list[tuple[str, ...]]:
    """`columns_of`; of a listing with the digest of each file."""
    columns = columns_of(videos, rows)
    if isinstance(videos, FeatureStore):
        return columns
    return [(*row, digest) for row, digest in zip(columns, videos.file_digests(rows), strict=True)]


def hashes(rows: Iterable[Sequence[str]]) -> torch.Tensor:
    """Of each row of `columns_of` a hash of its id, and one of all: int64 [n, 2]."""
    digests = [[_hash(row[0]), _hash("\0".join(row[: len(COLUMNS)]))] for row in rows]
    return torch.tensor(digests, dtype=torch.int64).reshape(-1, 2)


def _hash(text: str) -> int:
    digest = hashlib.blake2b(text.encode("utf-8", "surrogateescape"), digest_size=8)
    return int.from_bytes(digest.digest(), "little", signed=True)


def sha256_of(path: StrPath | None) -> str:
    """The SHA-256 of a file; "" for none."""
    if path is None:
        return ""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def record(
    videos: FeatureStore | ListedVideos, chosen: Chosen, *, init: Path | None, recipe: "Recipe"
) -> dict[str, Any]:
    """`Checkpoint.data` of a run on these rows."""
    return {
        "videos": hashlib.sha256(videos_csv(videos, chosen)).hexdigest(),
        "train": hashes(columns_of(videos, chosen.train)),
        "validate": hashes(columns_of(videos, chosen.validate)),
        "features": features_digest(videos, chosen.train)
        if isinstance(videos, FeatureStore)
        else "",
        "init": sha256_of(init),
        "recipe": json.loads(json.dumps(asdict(recipe))),
        "version": importlib.metadata.version("hgnl-video"),
    }


def features_digest(store: FeatureStore, rows: np.ndarray) -> str:
    """A digest of the features of some of these rows, evenly chosen."""
    few = np.sort(rows)[np.linspace(0, len(rows) - 1, min(_SAMPLED, len(rows))).astype(int)]
    return hashlib.sha256(np.ascontiguousarray(store.read(few)).tobytes()).hexdigest()[:16]


def choose_or_continue(
    videos: FeatureStore | ListedVideos,
    options: "SplitOptions",
    seed: int,
    out: Path,
    last: "Checkpoint | None",
) -> Chosen:
    """The rows of a new run; or, for a run that goes on from `last`, exactly those that it was
    begun with, by id.

    InputError if a video of the run is no longer there, or if its label, split or group is another
    now.
    """
    if last is None:
        return Chosen(*choose_rows(videos, options, seed))
    assert last.data is not None
    path = out / VIDEOS
    content = path.read_bytes() if path.is_file() else b""
    if hashlib.sha256(content).hexdigest() != last.data["videos"]:
        raise InputError(
            f"{path} is not the list of videos that {out} was trained on; restore it, or {_REMEDY}"
        )
    recorded = list(
        csv.reader(io.StringIO(content.decode("utf-8", "surrogateescape"), newline=""))
    )[1:]
    row_of = {name: row for row, name in enumerate(videos.ids.tolist())}
    lines = _changes(videos, recorded, row_of)
    if lines:
        raise other_data(out, videos.path, lines)
    rows = {
        role: np.array([row_of[row[0]] for row in recorded if row[-1] == role])
        for role in ("train", "validate")
    }
    description = f"{len(rows['train']):,} to train, {len(rows['validate']):,} to validate, as recorded in {path}"
    try:
        now = choose_rows(videos, options, seed)
        added = len(set(np.concatenate(now[:2]).tolist()) - {row_of[row[0]] for row in recorded})
    except InputError:  # no run could begin on them
        added = 0
    if added:
        description += (
            f"; {added:,} videos that {videos.path} has besides are left out: "
            "give another --out to train on them too"
        )
    return Chosen(rows["train"], rows["validate"], description)


_REMEDY = "give another --out to train on what there is now"


def other_data(out: Path, now: str, lines: Sequence[str]) -> InputError:
    """For a run that cannot go on with what there is now."""
    listed = "\n  ".join([*lines[:10], *[f"... and {len(lines) - 10:,} more"] * (len(lines) > 10)])
    return InputError(
        f"{out} was trained on something else than {now} holds now:\n  {listed}\n"
        f"restore what it was trained on to go on with it, or {_REMEDY}"
    )


def _changes(
    videos: FeatureStore | ListedVideos, recorded: Sequence[Sequence[str]], row_of: dict[str, int]
) -> list[str]:
    """What differs of the recorded videos now, one line each."""
    gone = [row[0] for row in recorded if row[0] not in row_of]
    lines = [f"{len(gone):,} of its videos are no longer there: {first_few(gone)}"] if gone else []
    present = [row for row in recorded if row[0] in row_of]
    rows = np.array([row_of[row[0]] for row in present], int)
    failed = [
        row[0]
        for row in np.array(present, object)[videos.status[rows] == FAILED]
        if row[-1] == "train"
    ]
    lines += (
        [f"{len(failed):,} videos it was trained on have failed since: {first_few(failed)}"]
        if failed
        else []
    )
    dropped = [row[0] for row in np.array(present, object)[~videos.listed[rows]]]
    lines += (
        [f"{len(dropped):,} of its videos are no longer listed: {first_few(dropped)}"]
        if dropped
        else []
    )
    for before, now in zip(present, _recorded(videos, rows), strict=True):
        lines += [
            f"{before[0]}: {name} {old!r} when it was trained, {new!r} now"
            for name, old, new in zip((*COLUMNS, FILE), before, now, strict=False)
            if old != new
        ]
    return lines


def refuse_other_data(
    out: Path,
    last: "Checkpoint",
    videos: FeatureStore | ListedVideos,
    features: dict[str, Any],
    data: dict[str, Any],
) -> None:
    """InputError naming what differs between the record of the last checkpoint and that of the same
    run now.

    `features` is the provenance and `data` the `record` of now. Another version of the program is
    said.
    """
    assert last.data is not None
    lines = []
    if last.classes != list(videos.classes):
        ours, theirs = set(last.classes), set(videos.classes)
        what = f"new: {first_few(sorted(theirs - ours))}; gone: {first_few(sorted(ours - theirs))}"
        what = "the same names in another order" if ours == theirs else what
        lines.append(
            f"{len(last.classes)} classes when it was trained, {len(videos.classes)} now ({what})"
        )
    lines += difference({"made by": last.features}, {"made by": features})
    words = {"features": "contents", "init": "the checkpoint of --init", "recipe": "recipe"}
    for name, meaning in words.items():
        lines += difference({meaning: last.data[name]}, {meaning: data[name]})
    if lines:
        raise other_data(
            out,
            videos.path,
            [line.replace(" in the store", " when it was trained") for line in lines],
        )
    say_other_version(last.data["version"])


def say_other_version(recorded: str) -> None:
    """Note it if a run goes on with another version of the program than it was begun with."""
    if recorded != (now := importlib.metadata.version("hgnl-video")):
        print(f"note      begun with version {recorded} of this program, goes on with {now}")


# -- scores ------------------------------------------------------------------------------------------------------------


def rows_of_role(
    checkpoint: "Checkpoint", videos: FeatureStore | ListedVideos, role: str
) -> np.ndarray:
    """Rows of `videos` that the checkpoint's run trained on ("train") or validated on ("validate"),
    by id.

    InputError if the checkpoint does not record them, or if some are not there.
    """
    if checkpoint.data is None:
        raise InputError(
            f"{checkpoint.path} does not record which videos it was trained on (it is of an earlier version); name a "
            "split instead"
        )
    wanted = checkpoint.data[role][:, 0].numpy()
    ids = np.array([_hash(name) for name in videos.ids.tolist()], np.int64)
    rows = np.flatnonzero(np.isin(ids, wanted) & videos.listed)
    if len(rows) < len(wanted):
        raise InputError(
            f"{videos.path} holds {len(rows):,} of the {len(wanted):,} videos that {checkpoint.path} was validated on; "
            "give the store or folder that it was trained on, or --split"
        )
    return rows


def trained_on(
    checkpoint: "Checkpoint", videos: FeatureStore | ListedVideos, rows: np.ndarray
) -> tuple[int | None, list[str]]:
    """How many of these rows the checkpoint was trained on (None: it does not say), and the ids of
    those of its videos whose label, split or group is another now."""
    if checkpoint.data is None:
        return None, []
    now = hashes(columns_of(videos, rows)).numpy()
    train, validate = (checkpoint.data[role].numpy() for role in ("train", "validate"))
    both = np.concatenate([train, validate])
    changed = np.isin(now[:, 0], both[:, 0]) & ~np.isin(now[:, 1], both[:, 1])
    return int(np.isin(now[:, 0], train[:, 0]).sum()), videos.ids[rows[changed]].tolist()


def contents_of(store: FeatureStore | ListedVideos) -> dict[str, str]:
    """Digests of what a store lists and of how it was made, one for each part, and of some of its
    features; of a listing, of its files."""
    parts: dict[str, bytes] = {}
    for name in ("ids", "splits", "groups", "classes"):
        parts[name] = "\0".join(getattr(store, name)).encode("utf-8", "surrogateescape")
    parts["labels"] = np.ascontiguousarray(store.labels).tobytes()
    if isinstance(store, ListedVideos):
        parts["files"] = "\n".join(store.file_digests(np.arange(len(store.labels)))).encode()
    else:
        parts["provenance"] = json.dumps(store.provenance, sort_keys=True, default=str).encode()
        parts["status"], parts["num_frames"] = store.status.tobytes(), store.num_frames.tobytes()
        usable = np.flatnonzero(store.usable)
        parts["features"] = features_digest(store, usable).encode() if len(usable) else b""
    digests = {name: hashlib.sha256(content).hexdigest()[:16] for name, content in parts.items()}
    return {"videos": f"{len(store.labels):,}"} | digests
