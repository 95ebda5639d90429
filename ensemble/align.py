"""Scores of several models, brought to one order of videos and classes: joined by id and by name, never by position."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, get_args

import numpy as np

from aggregate.scores import Scores
from extract.cli import InputError

Missing = Literal["error", "drop", "worst"]


@dataclass(frozen=True)
class Aligned:
    """M models' logits of the same N videos: M arrays [N, C] float32, a failed video being a row of NaN.

    `labels` int32 [N] are indices in `classes`, -1 unknown. `lacking` bool [M, N] says which model does not list a
    video at all (only with `missing="worst"`); its row is NaN there too.
    """

    names: tuple[str, ...]
    ids: list[str] = field(repr=False)
    classes: list[str] = field(repr=False)
    logits: tuple[np.ndarray, ...] = field(repr=False)
    labels: np.ndarray = field(repr=False)
    lacking: np.ndarray = field(repr=False)
    failed: np.ndarray = field(repr=False)  # bool [M, N], lacking ones included
    missing: Missing = "error"
    listed: tuple[int, ...] = ()  # videos in each file
    dropped: int = 0

    def unscored(self, weights: np.ndarray) -> np.ndarray:
        """Videos that count as wrong under `weights` [M]: bool [N].

        A model of some weight does not list the video, or it failed in every model of some weight. Where it failed in
        some of them only, the others speak for it.
        """
        used = np.asarray(weights) > 0
        return np.logical_or(self.lacking[used].any(axis=0), self.failed[used].all(axis=0))

    def report(self) -> str:
        """What was joined, with the counts of what is missing."""
        videos, labelled = len(self.ids), int((self.labels >= 0).sum())
        lines = [f"{videos:,} videos, {labelled:,} with a label, {len(self.classes):,} classes"]
        width = max(map(len, self.names))
        for name, listed, lacking, failed in zip(self.names, self.listed, self.lacking, self.failed, strict=True):
            absent, broken = int(lacking.sum()), int((failed & ~lacking).sum())
            more = f", {absent:,} not listed" * bool(absent) + f", {broken:,} failed" * bool(broken)
            lines.append(f"  {name:<{width}}  {listed:,} listed{more}")
        if self.dropped:
            lines.append(f"{self.dropped:,} videos that one model lacks are left out (--missing drop)")
        if wrong := int(self.lacking.any(axis=0).sum()):
            lines.append(f"{wrong:,} videos that one model lacks count as wrong (--missing worst)")
        return "\n".join(lines)


def align(
    list_of_scores: Sequence[Scores], *, missing: Missing = "error", names: Sequence[str] | None = None
) -> Aligned:
    """Join scores by video id, their columns by class name; rows and columns stand in the order of the first.

    A video that one of them lacks is an error, is left out (`missing="drop"`), or counts as wrong ("worst"). Raises
    InputError, naming the first offender, for other classes, such a video, no common video, and labels that
    contradict each other.
    """
    if missing not in get_args(Missing):
        raise InputError(f"--missing {missing} is unknown; known are {', '.join(get_args(Missing))}")
    if not list_of_scores:
        raise InputError("there are no scores to join; give at least one scores file")
    names = [f"model {place + 1}" for place in range(len(list_of_scores))] if names is None else list(names)
    first = list_of_scores[0]
    columns = [_columns(first, scores, names[0], name) for scores, name in zip(list_of_scores, names, strict=True)]
    ids, dropped = _join(list_of_scores, names, missing)
    rows = [_rows(scores, ids) for scores in list_of_scores]
    lacking = np.stack([row < 0 for row in rows])
    logits = tuple(
        _taken(scores.logits, row, column) for scores, row, column in zip(list_of_scores, rows, columns, strict=True)
    )
    return Aligned(
        names=tuple(names),
        ids=ids,
        classes=list(first.classes),
        logits=logits,
        labels=_labels(list_of_scores, names, rows, columns, ids),
        lacking=lacking,
        # A row is NaN throughout or not at all, which Scores has seen to.
        failed=np.stack([np.isnan(part[:, 0]) for part in logits]),
        missing=missing,
        listed=tuple(len(scores) for scores in list_of_scores),
        dropped=dropped,
    )


def _columns(first: Scores, scores: Scores, first_name: str, name: str) -> np.ndarray:
    """Where the classes of `first` stand in `scores`."""
    if scores.classes == first.classes:
        return np.arange(len(first.classes))
    place = {known: column for column, known in enumerate(scores.classes)}
    known = set(first.classes)
    for one, other, here, there in ((first, place, first_name, name), (scores, known, name, first_name)):
        if alone := [known for known in one.classes if known not in other]:
            raise InputError(
                f"{name} has other classes than {first_name} ({len(scores.classes):,} and {len(first.classes):,}): "
                f"{alone[0]!r} is in {here} and not in {there}; fuse models of the same classes"
            )
    return np.array([place[known] for known in first.classes])


def _join(list_of_scores: Sequence[Scores], names: Sequence[str], missing: Missing) -> tuple[list[str], int]:
    """The videos to keep and how many were dropped."""
    if all(scores.ids == list_of_scores[0].ids for scores in list_of_scores):
        return list(list_of_scores[0].ids), 0
    union = list(dict.fromkeys(name for scores in list_of_scores for name in scores.ids))
    sets = [set(scores.ids) for scores in list_of_scores]
    everywhere = set.intersection(*sets)
    if len(everywhere) == len(union) or missing == "worst":
        return union, 0
    if missing == "error":
        video = next(name for name in union if name not in everywhere)
        having = next(name for name, there in zip(names, sets, strict=True) if video in there)
        without = next(name for name, there in zip(names, sets, strict=True) if video not in there)
        counts = ", ".join(
            f"{name} {len(union) - len(there):,}"
            for name, there in zip(names, sets, strict=True)
            if there != set(union)
        )
        raise InputError(
            f"{video!r} is in {having} and not in {without}; of {len(union):,} videos are missing: {counts}. "
            "--missing drop leaves them out, --missing worst counts them as wrong"
        )
    if not everywhere:
        raise InputError(
            f"{' and '.join(names)} have no video in common; {names[0]} begins with {list_of_scores[0].ids[0]!r}, "
            f"{names[1]} with {list_of_scores[1].ids[0]!r}"
        )
    return [name for name in union if name in everywhere], len(union) - len(everywhere)


def _rows(scores: Scores, ids: list[str]) -> np.ndarray:
    """Where `ids` stand in `scores`, -1 for those that do not."""
    if scores.ids == ids:
        return np.arange(len(ids))
    place = {name: row for row, name in enumerate(scores.ids)}
    return np.array([place.get(name, -1) for name in ids])


def _taken(logits: np.ndarray, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    if not np.array_equal(columns, np.arange(logits.shape[1])):
        logits = logits[:, columns]
    if np.array_equal(rows, np.arange(len(logits))):
        return logits  # no copy of what may be 200 MB
    taken = logits[rows]
    taken[rows < 0] = np.nan
    return taken


def _labels(
    list_of_scores: Sequence[Scores],
    names: Sequence[str],
    rows: Sequence[np.ndarray],
    columns: Sequence[np.ndarray],
    ids: Sequence[str],
) -> np.ndarray:
    """The label that any model knows."""
    labels, said_by = np.full(len(ids), -1, np.int32), np.full(len(ids), -1)
    for model, (scores, row, column) in enumerate(zip(list_of_scores, rows, columns, strict=True)):
        if scores.labels is None:
            continue
        to_first = np.append(np.argsort(column), -1).astype(np.int32)  # its class index -> ours; -1 stays -1
        said = np.where(row < 0, -1, to_first[scores.labels[row]])
        clash = (said >= 0) & (labels >= 0) & (said != labels)
        if clash.any():
            video = int(clash.argmax())
            classes = list_of_scores[0].classes
            raise InputError(
                f"{ids[video]!r} is {classes[labels[video]]!r} in {names[said_by[video]]} and "
                f"{classes[said[video]]!r} in {names[model]}; the scores were made with different labels"
            )
        said_by = np.where((labels < 0) & (said >= 0), model, said_by)
        labels = np.where(labels < 0, said, labels).astype(np.int32)
    return labels
