"""Scores of several models, brought to one order of videos and classes: joined by id and by name, never by position."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, get_args

import numpy as np
import pandas as pd

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
    counts: pd.DataFrame = field(repr=False)  # of each model: videos it lists, that it lacks, and that failed
    missing: Missing = "error"
    dropped: int = 0
    split: str = ""  # of the videos, where all files say the same

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
        lines.append(self.counts.map("{:,}".format).to_string())
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
    listed = [pd.Index(scores.ids, dtype=object) for scores in list_of_scores]
    ids, dropped = _join(listed, names, missing)
    rows = [index.get_indexer(ids) for index in listed]  # -1: not listed
    said = [_labels(scores, *places) for scores, *places in zip(list_of_scores, rows, columns, strict=True)]
    taken = [_taken(scores.logits, *places) for scores, *places in zip(list_of_scores, rows, columns, strict=True)]
    lacking = np.stack(rows) < 0
    # A row is NaN throughout or not at all, which Scores has seen to.
    failed = np.stack([np.isnan(logits[:, 0]) for logits in taken])
    counts = {"listed": map(len, listed), "lacking": lacking.sum(axis=1), "failed": (failed & ~lacking).sum(axis=1)}
    splits = {str(scores.source.get("split", "")) for scores in list_of_scores}
    return Aligned(
        names=tuple(names),
        ids=ids.tolist(),
        classes=list(first.classes),
        logits=tuple(taken),
        labels=_agreed(np.stack(said), names, ids, first.classes),
        lacking=lacking,
        failed=failed,
        counts=pd.DataFrame(counts, index=names),
        missing=missing,
        dropped=dropped,
        split=splits.pop() if len(splits) == 1 else "",
    )


def _columns(first: Scores, scores: Scores, first_name: str, name: str) -> np.ndarray:
    """Where the classes of `first` stand in `scores`."""
    ours, theirs = pd.Index(first.classes, dtype=object), pd.Index(scores.classes, dtype=object)
    pairs = (ours, theirs, first_name, name), (theirs, ours, name, first_name)
    for alone, here, there in ((one.difference(other, sort=False), *of) for one, other, *of in pairs):
        if len(alone):
            raise InputError(
                f"{name} has other classes than {first_name} ({len(theirs):,} and {len(ours):,}): "
                f"{alone[0]!r} is in {here} and not in {there}; fuse models of the same classes"
            )
    return theirs.get_indexer(ours)


def _join(listed: Sequence[pd.Index], names: Sequence[str], missing: Missing) -> tuple[pd.Index, int]:
    """The videos to keep and how many were dropped."""
    union = pd.Index(dict.fromkeys(name for ids in listed for name in ids), dtype=object)
    there = np.stack([union.isin(ids) for ids in listed])
    everywhere = there.all(axis=0)
    if missing == "error" and not everywhere.all():
        video = int(everywhere.argmin())
        having, without = names[int(there[:, video].argmax())], names[int(there[:, video].argmin())]
        lacking = zip(names, (~there).sum(axis=1), strict=True)
        raise InputError(
            f"{union[video]!r} is in {having} and not in {without}; of {len(union):,} videos are missing: "
            f"{', '.join(f'{name} {count:,}' for name, count in lacking if count)}. "
            "--missing drop leaves them out, --missing worst counts them as wrong"
        )
    if not everywhere.any() and missing == "drop":
        raise InputError(
            f"{' and '.join(names)} have no video in common; {names[0]} begins with {listed[0][0]!r}, "
            f"{names[1]} with {listed[1][0]!r}"
        )
    return (union[everywhere], int((~everywhere).sum())) if missing == "drop" else (union, 0)


def _taken(logits: np.ndarray, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    if not np.array_equal(columns, np.arange(logits.shape[1])):
        logits = logits[:, columns]
    if np.array_equal(rows, np.arange(len(logits))):
        return logits  # no copy of what may be 200 MB
    taken = logits[rows]
    taken[rows < 0] = np.nan
    return taken


def _labels(scores: Scores, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """What a model says of the videos, as an index in the first one's classes; -1 unknown."""
    if scores.labels is None:
        return np.full(len(rows), -1, np.int32)
    to_first = np.append(np.argsort(columns), -1).astype(np.int32)  # the -1 behind the last index stays -1
    return np.where(rows < 0, -1, to_first[scores.labels[rows]])


def _agreed(said: np.ndarray, names: Sequence[str], ids: pd.Index, classes: Sequence[str]) -> np.ndarray:
    """The label that any model knows, of what all of them say [M, N]."""
    by = (said >= 0).argmax(axis=0)
    labels = said[by, np.arange(len(ids))]
    if (clash := (said >= 0) & (said != labels)).any():
        model, video = np.argwhere(clash)[0]
        raise InputError(
            f"{ids[video]!r} is {classes[labels[video]]!r} in {names[by[video]]} and "
            f"{classes[said[model, video]]!r} in {names[model]}; the scores were made with different labels"
        )
    return labels
