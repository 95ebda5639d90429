"""The data of a run: recorded in its folder and its checkpoints, and compared when it is resumed.

    videos.csv          a row per video of the run: id, label, split, group, role (train or
                        validate); if the run decodes files, also their size and a digest
    Checkpoint.data     videos: SHA-256 of that file
                        train, validate: int64 [n, 2], per video a hash of its id, and a hash of
                        id, label, split and group
                        features, init, recipe, version: digests and values of all other inputs

The hashes (64 bits) let `evaluate` know which videos a checkpoint was trained on, even if its file
was moved. 540,000 videos take 9 MB.
"""

import csv
import hashlib
import importlib.metadata
import io
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from aggregate.training.splits import Chosen, ListedVideos, Videos, choose_rows
from extract import InputError, Record
from extract.cli import first_few
from extract.sources import sha256_of
from extract.store import FAILED, FeatureStore, difference

if TYPE_CHECKING:
    from aggregate.training.checkpoint import Checkpoint
    from aggregate.training.recipes import Recipe

VIDEOS = "videos.csv"
COLUMNS = ("id", "label", "split", "group")
FILE = "file"  # column of sizes and digests, if the run decodes videos
# Number of videos whose features are digested. A sample suffices, since features that are made
# in another way differ in all videos.
_SAMPLED = 16
_REMEDY = "give another --out to train on the current data"


def columns_of(videos: Videos, rows: np.ndarray) -> list[tuple[str, ...]]:
    """`COLUMNS` of each of these videos."""
    names = np.array([*videos.classes, ""], object)  # the last: label -1
    labels = names[videos.labels[rows]]
    columns = (videos.ids[rows], labels, videos.splits[rows], videos.groups[rows])
    return list(zip(*(column.tolist() for column in columns), strict=True))


def videos_csv(videos: Videos, chosen: Chosen) -> bytes:
    """The content of videos.csv."""
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    listed = isinstance(videos, ListedVideos)
    writer.writerow([*COLUMNS, *[FILE] * listed, "role"])
    for role, rows in (("train", chosen.train), ("validate", chosen.validate)):
        writer.writerows([*row, role] for row in _recorded(videos, rows))
    return text.getvalue().encode("utf-8", "surrogateescape")


def _recorded(videos: Videos, rows: np.ndarray) -> list[tuple[str, ...]]:
    """`columns_of`, with the digest of each file if they are files."""
    columns = columns_of(videos, rows)
    if isinstance(videos, FeatureStore):
        return columns
    return [(*row, digest) for row, digest in zip(columns, videos.file_digests(rows), strict=True)]


def hashes(videos: Videos, rows: np.ndarray) -> torch.Tensor:
    """A hash of the id and a hash of `columns_of`, for each of these videos: int64 [n, 2]."""
    digests = [[_hash(row[0]), _hash("\0".join(row))] for row in columns_of(videos, rows)]
    return torch.tensor(digests, dtype=torch.int64).reshape(-1, 2)


def _hash(text: str) -> int:
    digest = hashlib.blake2b(text.encode("utf-8", "surrogateescape"), digest_size=8)
    return int.from_bytes(digest.digest(), "little", signed=True)


def record(videos: Videos, chosen: Chosen, *, init: Path | None, recipe: "Recipe") -> Record:
    """The `Checkpoint.data` of a run on these rows."""
    features = features_digest(videos, chosen.train) if isinstance(videos, FeatureStore) else ""
    return {
        "videos": hashlib.sha256(videos_csv(videos, chosen)).hexdigest(),
        "train": hashes(videos, chosen.train),
        "validate": hashes(videos, chosen.validate),
        "features": features,
        "init": sha256_of(init) if init else "",
        "recipe": json.loads(json.dumps(asdict(recipe))),
        "version": importlib.metadata.version("hgnl-video"),
    }


def features_digest(store: FeatureStore, rows: np.ndarray) -> str:
    """A digest of the features of at most _SAMPLED of these rows, evenly spaced."""
    positions = np.linspace(0, len(rows) - 1, min(_SAMPLED, len(rows))).astype(int)
    features = store.read(np.sort(rows)[positions])
    return hashlib.sha256(np.ascontiguousarray(features).tobytes()).hexdigest()[:16]


def choose_or_continue(videos: Videos, options: Any, last: "Checkpoint | None") -> Chosen:
    """The rows of a new run, or of a run that resumes from `last`: its recorded videos, by id.

    InputError if a recorded video is gone, or if its label, split or group changed.
    """
    if last is None:
        return choose_rows(videos, options, options.seed)
    assert last.data is not None
    out = options.folder
    path = out / VIDEOS
    content = path.read_bytes() if path.is_file() else b""
    if hashlib.sha256(content).hexdigest() != last.data["videos"]:
        raise InputError(
            f"{path} is not the list of videos that {out} was trained on; restore it, or {_REMEDY}"
        )
    text = io.StringIO(content.decode("utf-8", "surrogateescape"), newline="")
    recorded = list(csv.reader(text))[1:]
    row_of = {name: row for row, name in enumerate(videos.ids.tolist())}
    lines = _changes(videos, recorded, row_of)
    if lines:
        raise other_data(out, videos.path, lines)
    train, validate = (
        np.array([row_of[row[0]] for row in recorded if row[-1] == role])
        for role in ("train", "validate")
    )
    description = f"{len(train):,} to train, {len(validate):,} to validate, as recorded in {path}"
    try:
        now = choose_rows(videos, options, options.seed)
        added = np.setdiff1d(np.concatenate(now[:2]), np.concatenate([train, validate]))
    except InputError:  # no new run could begin on the current videos
        added = np.empty(0)
    if len(added):
        description += (
            f"; {len(added):,} new videos of {videos.path} are left out: "
            "give another --out to train on them too"
        )
    return Chosen(train, validate, description)


def other_data(out: Path, now: str, lines: Sequence[str]) -> InputError:
    """The error for a run that cannot be resumed, because its data changed in these ways."""
    more = f"\n  ... and {len(lines) - 10:,} more" if len(lines) > 10 else ""
    changes = "\n  ".join(lines[:10])
    return InputError(
        f"{out} was trained on other data than {now} holds now:\n  {changes}{more}\n"
        f"restore that data to resume the run, or {_REMEDY}"
    )


def _changes(
    videos: Videos, recorded: Sequence[Sequence[str]], row_of: dict[str, int]
) -> list[str]:
    """The changes of the recorded videos, one line each."""
    present = [row for row in recorded if row[0] in row_of]
    rows = np.array([row_of[row[0]] for row in present], int)
    ids, roles = (np.array([row[column] for row in present], object) for column in (0, -1))
    missing = {
        "of its videos are no longer there": [row[0] for row in recorded if row[0] not in row_of],
        "videos it was trained on have failed since": ids[
            (videos.status[rows] == FAILED) & (roles == "train")
        ],
        "of its videos are no longer listed": ids[~videos.listed[rows]],
    }
    lines = [
        f"{len(names):,} {text}: {first_few(names)}"
        for text, names in missing.items()
        if len(names)
    ]
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
    videos: Videos,
    features: Record,
    data: Record,
) -> None:
    """InputError naming the differences between the last checkpoint and the same run now.

    `features` is the current provenance, `data` the current `record`. Another version of the
    program is not refused, but reported.
    """
    assert last.data is not None
    lines = []
    if last.classes != list(videos.classes):
        before, now = set(last.classes), set(videos.classes)
        if before == now:
            change = "the same names in another order"
        else:
            gone = first_few(sorted(before - now))
            change = f"new: {first_few(sorted(now - before))}; gone: {gone}"
        lines.append(
            f"{len(last.classes)} classes when it was trained, {len(videos.classes)} now ({change})"
        )
    then = "when it was trained"
    lines += difference({"made by": last.features}, {"made by": features}, then=then)
    titles = {"features": "contents", "init": "the checkpoint of --init", "recipe": "recipe"}
    for name, title in titles.items():
        lines += difference({title: last.data[name]}, {title: data[name]}, then=then)
    if lines:
        raise other_data(out, videos.path, lines)
    print_other_version(last.data["version"])


def print_other_version(recorded: str) -> None:
    """Print a note if the program has another version than when the run started."""
    if recorded != (now := importlib.metadata.version("hgnl-video")):
        print(f"note      started with version {recorded} of this program, continues with {now}")


# -- scores ----------------------------------------------------------------------------------------


def validated_rows(checkpoint: "Checkpoint", videos: Videos) -> np.ndarray:
    """The rows of `videos` on which the checkpoint's run validated.

    InputError if the checkpoint does not record them, or if some are missing.
    """
    if checkpoint.data is None:
        raise InputError(
            f"{checkpoint.path} does not record which videos it was trained on (it is of an "
            "earlier version); name a split instead"
        )
    recorded = checkpoint.data["validate"][:, 0].numpy()
    hashed = np.array([_hash(name) for name in videos.ids.tolist()], np.int64)
    rows = np.flatnonzero(np.isin(hashed, recorded) & videos.listed)
    if len(rows) < len(recorded):
        raise InputError(
            f"{videos.path} holds {len(rows):,} of the {len(recorded):,} videos that "
            f"{checkpoint.path} was validated on; give the store or folder that it was trained "
            "on, or --split"
        )
    return rows


def trained_on(
    checkpoint: "Checkpoint", videos: Videos, rows: np.ndarray
) -> tuple[int | None, list[str]]:
    """How many of these rows the checkpoint was trained on, and which of its videos changed.

    The number is None if the checkpoint does not record it; the ids are those of videos whose
    label, split or group changed.
    """
    if checkpoint.data is None:
        return None, []
    ids, contents = hashes(videos, rows).numpy().T
    train, validate = (checkpoint.data[role].numpy() for role in ("train", "validate"))
    recorded_ids, recorded_contents = np.concatenate([train, validate]).T
    changed = np.isin(ids, recorded_ids) & ~np.isin(contents, recorded_contents)
    return int(np.isin(ids, train[:, 0]).sum()), videos.ids[rows[changed]].tolist()


def contents_of(store: Videos) -> dict[str, str]:
    """Digests of a store's columns, provenance and features, or of a listing's columns and files.

    There is one digest per part, so that a message can name the parts that changed. Of the features
    only a sample is digested.
    """
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
