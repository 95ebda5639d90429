"""Ground truths: the labels and the videos that they list, and the challenge's errors of a
submission against them."""

import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from aggregate.metrics import Interval, bootstrap
from ensemble.entries import (
    is_clip,
    is_scores,
    read_json,
    read_submission,
    read_text,
    submission_ids,
)
from extract import InputError, StrPath
from extract.listing.folders import SPLITS
from extract.listing.lists import read_list
from extract.listing.videos import youtube_id

Truth = tuple[str, tuple[str, ...], str]  # id or name of the clip, labels, split


@dataclass(frozen=True)
class Grade:
    """The challenge's errors of a submission over the videos of a truth; a missing one is wrong."""

    top1_error: Interval
    top5_error: Interval
    average_error: Interval
    found: int
    listed: int
    extra: int
    notes: tuple[str, ...]  # on what is missing, and on what the official script stumbles over

    def __str__(self) -> str:
        lines = (
            f"top-1 error %    {self.top1_error}",
            f"top-5 error %    {self.top5_error}",
            f"average error %  {self.average_error}   (the challenge's figure: {self.average_error.value:.5f})",
            f"{self.found:,} of {self.listed:,} videos are in the submission",
        )
        return "\n".join([*lines, *self.notes])


def grade_submission(path: StrPath, truth: Mapping[str, Collection[str]]) -> Grade:
    """The challenge's errors against `truth`, the labels of each video, any of which will do.

    As the official script counts: a video that is missing is wrong, a further one is ignored, a
    repeated label uses up a place. Where scores tie, which there depends on the sort, the earlier
    entry ranks first. Raises InputError for scores that are not finite numbers.
    """
    results = read_submission(path)
    places = []
    for video, labels in truth.items():
        ranked = sorted(results.get(video, []), key=lambda entry: -entry[1])[:5]
        places.append(
            next((place for place, (label, _) in enumerate(ranked) if label in labels), 5)
        )
    wrong = np.array(places)[:, None] >= np.array([1, 5])  # [videos, top-1 and top-5]
    missing = [video for video in truth if video not in results]
    extra = len(results) - (len(truth) - len(missing))
    known = {label for labels in truth.values() for label in labels}
    unknown = list(
        dict.fromkeys(
            label for entries in results.values() for label, _ in entries if label not in known
        )
    )
    twice = [video for video, entries in results.items() if len(dict(entries)) < len(entries)]
    notes = []
    if missing:
        notes.append(f"missing ones, the first of which is {missing[0]}, count as wrong")
    if extra:
        notes.append(f"{extra:,} further videos are not in the truth and are ignored")
    if unknown:
        notes.append(
            f"{len(unknown):,} labels are not in the truth, the first is {unknown[0]!r}: "
            "the official script stops there with a KeyError"
        )
    if twice:
        notes.append(f"{twice[0]} holds a label twice, which uses up a place")
    errors = bootstrap(wrong[:, 0]), bootstrap(wrong[:, 1]), bootstrap(wrong.mean(axis=1))
    return Grade(*errors, len(truth) - len(missing), len(truth), extra, tuple(notes))


def read_truth(path: StrPath, split: str = "") -> dict[str, set[str]]:
    """The labels of each video of a split, by the id it is submitted under.

    From the challenge's JSON (`database`), Kinetics' own JSON (a video's `annotations` and
    `subset`), Kinetics' CSV, or a CSV `path,label`. Raises InputError where the file is none of
    them or has no labels, and where it holds several splits and none was chosen.
    """
    truth: dict[str, set[str]] = {}
    for name, labels, _ in _of_split(os.fspath(path), split):
        if not labels:
            raise InputError(f"{path}: {name!r} has no label; a truth has one for every video")
        truth.setdefault(youtube_id(name) if is_clip(name) else name, set()).update(labels)
    return truth


def read_ids(path: StrPath, split: str = "") -> list[str]:
    """The videos that a submission has to hold: of a scores file, of what `read_truth` reads, or
    one a line of text.

    Raises InputError for an empty list or one video listed twice.
    """
    path = os.fspath(path)
    if is_scores(path):
        from aggregate.scores import Scores

        names = list(Scores.load(path).ids)
    elif path.lower().endswith((".csv", ".json")):
        names = [video for video, _, _ in _of_split(path, split)]
    else:
        names = read_text(path).split("\n")
    names = [name.strip() for name in names if name.strip()]
    if not names:
        raise InputError(f"{path} lists no video")
    return submission_ids(names)


def _of_split(path: str, split: str) -> list[Truth]:
    rows = _truth_rows(path)
    there = sorted({said for _, _, said in rows})
    wanted = SPLITS.get(split.lower(), split)
    if not wanted and len(there) > 1:
        raise InputError(
            f"{path} holds the splits {', '.join(map(repr, there))}; choose one with --split"
        )
    chosen = [row for row in rows if not wanted or row[2] == wanted]
    if not chosen:
        raise InputError(
            f"{path} has no video of the split {split!r}; it has {', '.join(map(repr, there)) or 'none'}"
        )
    return chosen


def _truth_rows(path: str) -> list[Truth]:
    if path.lower().endswith(".csv"):
        if not Path(path).is_file():
            raise InputError(f"there is no file {path}")
        rows = read_list(path, os.path.dirname(path) or ".").rows
        return [(row.name, (row.label,) if row.label else (), row.split) for row in rows]
    found = read_json(path)
    database = found.get("database", found) if isinstance(found, dict) else None
    if not isinstance(database, dict) or not all(
        isinstance(record, dict) and {"subset", "annotations"} & record.keys()
        for record in database.values()
    ):
        raise InputError(
            f"{path} is not a ground truth: expected a CSV, or a JSON with a subset and annotations a video"
        )
    return [_json_truth(path, video, record) for video, record in database.items()]


def _json_truth(path: str, video: str, record: Mapping[str, Any]) -> Truth:
    """The challenge has a list of annotations a video, Kinetics' own files a single one."""
    annotations = record.get("annotations", [])
    annotations = [annotations] if isinstance(annotations, dict) else annotations
    try:
        labels = tuple(annotation["label"] for annotation in annotations)
    except (TypeError, KeyError):
        raise InputError(
            f"{path}: {video!r} has the annotations {annotations!r:.60}, expected labels"
        ) from None
    said = str(record.get("subset", ""))
    return video, labels, SPLITS.get(said.lower(), said)
