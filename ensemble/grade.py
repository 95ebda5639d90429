"""Read ground truths (labels and video lists), and compute the challenge's errors of a submission
against them."""

import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from aggregate.metrics import Interval, bootstrap
from aggregate.scores import Scores
from ensemble.foreign import is_scores_file
from ensemble.submission import (
    LABELS_PER_VIDEO,
    is_clip,
    read_json,
    read_submission,
    read_text,
    submission_ids,
)
from extract import InputError, StrPath
from extract.listing.folders import SPLITS
from extract.listing.lists import read_list
from extract.listing.videos import youtube_id

Truth = tuple[str, tuple[str, ...], str]  # name of a video, its labels, its split


@dataclass(frozen=True)
class Grade:
    """The challenge's errors of a submission over the videos of a truth; missing ones are wrong."""

    top1_error: Interval
    top5_error: Interval
    average_error: Interval
    found: int
    listed: int
    extra: int
    notes: tuple[str, ...]  # on missing videos, and on entries at which the official script stops

    def __str__(self) -> str:
        average = f"{self.average_error}   (the challenge's figure: {self.average_error.value:.5f})"
        lines = (
            f"top-1 error %    {self.top1_error}",
            f"top-5 error %    {self.top5_error}",
            f"average error %  {average}",
            f"{self.found:,} of {self.listed:,} videos are in the submission",
        )
        return "\n".join([*lines, *self.notes])


def grade_submission(path: StrPath, truth: Mapping[str, Collection[str]]) -> Grade:
    """The challenge's errors against `truth`, the labels of each video; any of its labels is right.

    As in the official script, a missing video is wrong, an extra one is ignored, and a repeated
    label counts as one more guess. Among equal scores the earlier entry ranks first; in the
    official script their order depends on the sort. Raises InputError for scores that are not
    finite numbers.
    """
    results = read_submission(path)
    ranks = np.array([_rank(results.get(video, []), labels) for video, labels in truth.items()])
    wrong = ranks[:, None] >= np.array([1, LABELS_PER_VIDEO])  # [videos, top-1 and top-5]
    missing = [video for video in truth if video not in results]
    num_found = len(truth) - len(missing)
    num_extra = len(results) - num_found
    notes = []
    if missing:
        notes.append(f"missing ones, the first of which is {missing[0]}, count as wrong")
    if num_extra:
        notes.append(f"{num_extra:,} further videos are not in the truth and are ignored")
    true_labels = {label for labels in truth.values() for label in labels}
    written = dict.fromkeys(label for entries in results.values() for label, _ in entries)
    if unknown := [label for label in written if label not in true_labels]:
        notes.append(
            f"{len(unknown):,} labels are not in the truth, the first is {unknown[0]!r}: "
            "the official script stops there with a KeyError"
        )
    repeats = (video for video, entries in results.items() if len(dict(entries)) < len(entries))
    if (video := next(repeats, None)) is not None:
        notes.append(f"{video} has a label twice, which counts as one more guess")
    return Grade(
        top1_error=bootstrap(wrong[:, 0]),
        top5_error=bootstrap(wrong[:, 1]),
        average_error=bootstrap(wrong.mean(axis=1)),
        found=num_found,
        listed=len(truth),
        extra=num_extra,
        notes=tuple(notes),
    )


def _rank(entries: list[tuple[str, float]], labels: Collection[str]) -> int:
    """The rank of the first entry with one of the labels, 0 the best, at most LABELS_PER_VIDEO."""
    best = sorted(entries, key=lambda entry: -entry[1])[:LABELS_PER_VIDEO]
    hits = (rank for rank, (label, _) in enumerate(best) if label in labels)
    return next(hits, LABELS_PER_VIDEO)


def read_truth(path: StrPath, split: str = "") -> dict[str, set[str]]:
    """The labels of each video of a split, by the id under which it is submitted.

    Reads the challenge's JSON (`database`), Kinetics' own JSON (`annotations` and `subset` for each
    video), Kinetics' CSV, or a CSV `path,label`. Raises InputError if the file is none of these, if
    a video has no label, and if there are several splits and none is chosen.
    """
    truth: dict[str, set[str]] = {}
    for name, labels, _ in _truth_of_split(os.fspath(path), split):
        if not labels:
            raise InputError(f"{path}: {name!r} has no label; a truth has one for every video")
        truth.setdefault(youtube_id(name) if is_clip(name) else name, set()).update(labels)
    return truth


def read_ids(path: StrPath, split: str = "") -> list[str]:
    """The videos that a submission must have. `path` is a scores file, a file that `read_truth`
    reads, or a text file with one video per line.

    Raises InputError for an empty list, and for a video that is listed twice.
    """
    path = os.fspath(path)
    if is_scores_file(path):
        names = list(Scores.load(path).ids)
    elif path.lower().endswith((".csv", ".json")):
        names = [name for name, _, _ in _truth_of_split(path, split)]
    else:
        names = read_text(path).split("\n")
    names = [name.strip() for name in names if name.strip()]
    if not names:
        raise InputError(f"{path} lists no video")
    return submission_ids(names)


def _truth_of_split(path: str, split: str) -> list[Truth]:
    rows = _truth_rows(path)
    splits = sorted({row_split for _, _, row_split in rows})
    described = ", ".join(map(repr, splits)) or "none"
    chosen_split = SPLITS.get(split.lower(), split)
    if not chosen_split and len(splits) > 1:
        raise InputError(f"{path} holds the splits {described}; choose one with --split")
    chosen = [row for row in rows if not chosen_split or row[2] == chosen_split]
    if not chosen:
        raise InputError(f"{path} has no video of the split {split!r}; it has {described}")
    return chosen


def _truth_rows(path: str) -> list[Truth]:
    if path.lower().endswith(".csv"):
        if not Path(path).is_file():
            raise InputError(f"{path} does not exist")
        rows = read_list(path, os.path.dirname(path) or ".").rows
        return [(row.name, (row.label,) if row.label else (), row.split) for row in rows]
    content = read_json(path)
    database = content.get("database", content) if isinstance(content, dict) else None
    if not isinstance(database, dict) or not all(
        isinstance(record, dict) and {"subset", "annotations"} & record.keys()
        for record in database.values()
    ):
        raise InputError(
            f"{path} is not a ground truth: expected a CSV, or a JSON with a subset and "
            "annotations for each video"
        )
    return [_json_truth(path, video, record) for video, record in database.items()]


def _json_truth(path: str, video: str, record: Mapping[str, Any]) -> Truth:
    """The challenge has a list of annotations per video, Kinetics' own files a single one."""
    annotations = record.get("annotations", [])
    if isinstance(annotations, dict):
        annotations = [annotations]
    try:
        labels = tuple(annotation["label"] for annotation in annotations)
    except (TypeError, KeyError):
        raise InputError(
            f"{path}: {video!r} has the annotations {annotations!r:.60}, expected labels"
        ) from None
    subset = str(record.get("subset", ""))
    return video, labels, SPLITS.get(subset.lower(), subset)
