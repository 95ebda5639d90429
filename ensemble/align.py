"""Scores of several models, brought to one order of videos and classes: joined by id and by name,
never by position."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, get_args

import numpy as np
import pandas as pd

from aggregate.scores import Scores, group_keys, refuse_training_scores
from extract import InputError

Missing = Literal["error", "drop", "worst"]


@dataclass(frozen=True)
class Aligned:
    """M models' logits of the same N videos: M arrays [N, C] float32, a failed video being a row of
    NaN.

    `labels` int32 [N] are indices in `classes`, -1 unknown. `lacking` bool [M, N] says which model
    does not list a video at all (only with `missing="worst"`); its row is NaN there too.
    """

    names: tuple[str, ...]
    ids: list[str] = field(repr=False)
    classes: list[str] = field(repr=False)
    logits: tuple[np.ndarray, ...] = field(repr=False)
    labels: np.ndarray = field(repr=False)
    lacking: np.ndarray = field(repr=False)
    failed: np.ndarray = field(repr=False)  # bool [M, N], lacking ones included
    counts: pd.DataFrame = field(
        repr=False
    )  # of each model: videos it lists, that it lacks, and that failed
    missing: Missing = "error"
    dropped: int = 0
    split: str = ""  # of the videos, if all files agree
    groups: np.ndarray = field(
        default_factory=lambda: np.empty(0, object), repr=False
    )  # keys of `group_keys` [N]

    def unscored(self, weights: np.ndarray) -> np.ndarray:
        """Videos that count as wrong under `weights` [M]: bool [N].

        A model of some weight does not list the video, or it failed in every model of some weight.
        Where it failed in some of them only, the others speak for it.
        """
        used = np.asarray(weights) > 0
        return np.logical_or(self.lacking[used].any(axis=0), self.failed[used].all(axis=0))

    def report(self) -> str:
        """What was joined, with the counts of what is missing."""
        videos, labeled = len(self.ids), int((self.labels >= 0).sum())
        lines = [f"{videos:,} videos, {labeled:,} with a label, {len(self.classes):,} classes"]
        lines.append(self.counts.map("{:,}".format).to_string())
        if self.dropped:
            lines.append(
                f"{self.dropped:,} videos that one model lacks are left out (--missing drop)"
            )
        if wrong := int(self.lacking.any(axis=0).sum()):
            lines.append(f"{wrong:,} videos that one model lacks count as wrong (--missing worst)")
        return "\n".join(lines)


def align(
    list_of_scores: Sequence[Scores],
    *,
    missing: Missing = "error",
    names: Sequence[str] | None = None,
) -> Aligned:
    """Join scores by video id, columns by class name; rows and columns are in the first's order.

    A video that one of them lacks is an error, is left out (`missing="drop"`), or counts as wrong
    ("worst"). Raises InputError, naming the first offender, for other classes, such a video, no
    common video, and labels that contradict each other.
    """
    if missing not in get_args(Missing):
        known = ", ".join(get_args(Missing))
        raise InputError(f"--missing {missing} is unknown; known are {known}")
    if not list_of_scores:
        raise InputError("there are no scores to join; give at least one scores file")
    if names is None:
        names = [f"model {place + 1}" for place in range(len(list_of_scores))]
    for scores, name in zip(list_of_scores, names, strict=True):
        refuse_training_scores(scores, name)
    classes = list(list_of_scores[0].classes)
    for scores, name in zip(list_of_scores, names, strict=True):
        _check_classes(classes, list(scores.classes), names[0], name)
    listed = [pd.Index(scores.ids, dtype=object) for scores in list_of_scores]
    union = pd.Index(dict.fromkeys(name for ids in listed for name in ids), dtype=object)
    there = np.stack([union.isin(ids) for ids in listed])
    everywhere = there.all(axis=0)
    if missing == "error" and not everywhere.all():
        raise InputError(_who_lacks_what(names, union, there))
    if missing == "drop" and not everywhere.any():
        raise InputError(
            f"{' and '.join(names)} have no video in common; {names[0]} begins with {listed[0][0]!r}, "
            f"{names[1]} with {listed[1][0]!r}"
        )
    kept = everywhere if missing == "drop" else np.ones(len(union), bool)
    ids, lacking = union[kept], ~there[:, kept]
    logits, said = zip(*(_in_order(scores, ids, classes) for scores in list_of_scores), strict=True)
    # Rows are NaN throughout or not at all.
    failed = np.stack([np.isnan(rows[:, 0]) for rows in logits])
    counts = {
        "listed": map(len, listed),
        "lacking": lacking.sum(axis=1),
        "failed": (failed & ~lacking).sum(axis=1),
    }
    splits = {str(scores.source.get("split", "")) for scores in list_of_scores}
    return Aligned(
        names=tuple(names),
        ids=ids.tolist(),
        classes=classes,
        logits=logits,
        labels=_agreed(np.stack(said), names, ids, classes),
        lacking=lacking,
        failed=failed,
        counts=pd.DataFrame(counts, index=names),
        missing=missing,
        dropped=int((~kept).sum()),
        split=splits.pop() if len(splits) == 1 else "",
        groups=_groups(list_of_scores, ids),
    )


def _check_classes(ours: list[str], theirs: list[str], first: str, name: str) -> None:
    for some, others, here, there in ((ours, theirs, first, name), (theirs, ours, name, first)):
        known = set(others)
        if alone := [label for label in some if label not in known]:
            raise InputError(
                f"{name} has other classes than {first} ({len(theirs):,} and {len(ours):,}): "
                f"{alone[0]!r} is in {here} and not in {there}; fuse models of the same classes"
            )


def _who_lacks_what(names: Sequence[str], ids: pd.Index, there: np.ndarray) -> str:
    """Of videos some of which are not everywhere; `there` is bool [models, videos]."""
    video = int(there.all(axis=0).argmin())
    having, without = names[int(there[:, video].argmax())], names[int(there[:, video].argmin())]
    lacking = zip(names, (~there).sum(axis=1), strict=True)
    return (
        f"{ids[video]!r} is in {having} and not in {without}; of {len(ids):,} videos are missing: "
        f"{', '.join(f'{name} {count:,}' for name, count in lacking if count)}. "
        "--missing drop leaves them out, --missing worst counts them as wrong"
    )


def _in_order(
    scores: Scores, ids: pd.Index, classes: Sequence[str]
) -> tuple[np.ndarray, np.ndarray]:
    """A model's logits and labels of `ids` over `classes`: NaN and -1 for what it does not list."""
    columns = pd.Index(scores.classes, dtype=object)
    table = pd.DataFrame(
        scores.logits, pd.Index(scores.ids, dtype=object), columns, copy=False
    )  # may be 200 MB
    labels = np.full(len(scores), -1) if scores.labels is None else scores.labels
    said = pd.Series(labels, table.index).reindex(ids, fill_value=-1).to_numpy()
    ours = np.append(
        pd.Index(classes, dtype=object).get_indexer(columns), -1
    )  # behind the last index, for -1
    return table.reindex(index=ids, columns=pd.Index(classes, dtype=object)).to_numpy(), ours[
        said
    ].astype(np.int32)


def _groups(list_of_scores: Sequence[Scores], ids: pd.Index) -> np.ndarray:
    """What each video depends on: the first model's key that says more than the id does (old files
    have none)."""
    groups = group_keys(ids.tolist())
    from_ids = groups.copy()
    for scores in list_of_scores:
        keys = pd.Series(scores.groups, pd.Index(scores.ids, dtype=object)).reindex(ids)
        new = (groups == from_ids) & keys.notna().to_numpy()
        groups[new] = keys.to_numpy()[new]
    return groups


def _agreed(
    said: np.ndarray, names: Sequence[str], ids: pd.Index, classes: Sequence[str]
) -> np.ndarray:
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
