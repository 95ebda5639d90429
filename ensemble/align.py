"""Align the scores of several models: the same videos and classes in the same order, joined by id
and by name, never by position."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import pandas as pd

from aggregate.scores import Scores, group_keys, refuse_training_scores
from extract import InputError

Missing = Literal["error", "drop", "worst"]


@dataclass(frozen=True, repr=False)
class Aligned:
    """Logits of M models for the same N videos: M arrays [N, C] float32. The row of a failed video
    is NaN.

    Attributes:
        labels: int32 [N], indices in `classes`, -1 if unknown.
        lacking: bool [M, N], videos that a model does not list (only with `missing="worst"`); their
            rows are NaN too.
        failed: bool [M, N], rows of NaN.
        counts: for each model, the number of videos that it lists, that it lacks, and that failed.
        split: the split of the videos, if all files have the same one.
        groups: keys of `group_keys` [N].
    """

    names: tuple[str, ...]
    ids: list[str]
    classes: list[str]
    logits: tuple[np.ndarray, ...]
    labels: np.ndarray
    lacking: np.ndarray
    failed: np.ndarray
    counts: pd.DataFrame
    missing: Missing
    dropped: int
    split: str
    groups: np.ndarray

    def unscored(self, weights: np.ndarray) -> np.ndarray:
        """Videos that count as wrong under `weights` [M]: bool [N].

        Only models with a weight above 0 matter. A video counts as wrong if one of them does not
        list it, or if it failed in all of them. If it failed in some of them, the others decide.
        """
        used = np.asarray(weights) > 0
        return np.logical_or(self.lacking[used].any(axis=0), self.failed[used].all(axis=0))

    def report(self) -> str:
        """Counts of videos, labels and classes, and of the videos that each model lacks."""
        num_labeled = int((self.labels >= 0).sum())
        lines = [
            f"{len(self.ids):,} videos, {num_labeled:,} with a label, "
            f"{len(self.classes):,} classes",
            self.counts.map("{:,}".format).to_string(),
        ]
        if self.dropped:
            lines.append(
                f"{self.dropped:,} videos that one model lacks are left out (--missing drop)"
            )
        if num_wrong := int(self.lacking.any(axis=0).sum()):
            lines.append(
                f"{num_wrong:,} videos that one model lacks count as wrong (--missing worst)"
            )
        return "\n".join(lines)


def align(
    list_of_scores: Sequence[Scores],
    *,
    missing: Missing = "error",
    names: Sequence[str] | None = None,
) -> Aligned:
    """Join scores by video id, and columns by class name, in the order of the first model.

    A video that one model lacks is an error, is left out (`missing="drop"`), or counts as wrong
    ("worst"). Raises InputError naming the first cause: different classes, a missing video, no
    common video, or labels that contradict each other.
    """
    if missing not in get_args(Missing):
        raise InputError(
            f"--missing {missing} is unknown; known are {', '.join(get_args(Missing))}"
        )
    if not list_of_scores:
        raise InputError("no scores to join; give at least one scores file")
    if names is None:
        names = [f"model {number}" for number in range(1, len(list_of_scores) + 1)]
    classes = pd.Index(list_of_scores[0].classes, dtype=object)
    for scores, name in zip(list_of_scores, names, strict=True):
        refuse_training_scores(scores, name)
        _check_classes(classes, pd.Index(scores.classes, dtype=object), names[0], name)

    ids_by_model = [pd.Index(scores.ids, dtype=object) for scores in list_of_scores]
    ids, lacking, dropped = _join_ids(ids_by_model, names, missing)
    logits, labels = zip(
        *(_in_order(scores, ids, classes) for scores in list_of_scores), strict=True
    )
    # A row is NaN throughout or not at all.
    failed = np.stack([np.isnan(rows[:, 0]) for rows in logits])
    counts = {
        "listed": map(len, ids_by_model),
        "lacking": lacking.sum(axis=1),
        "failed": (failed & ~lacking).sum(axis=1),
    }
    splits = {str(scores.source.get("split", "")) for scores in list_of_scores}
    return Aligned(
        names=tuple(names),
        ids=ids.tolist(),
        classes=classes.tolist(),
        logits=logits,
        labels=_common_labels(np.stack(labels), names, ids, classes),
        lacking=lacking,
        failed=failed,
        counts=pd.DataFrame(counts, index=names),
        missing=missing,
        dropped=dropped,
        split=splits.pop() if len(splits) == 1 else "",
        groups=_common_groups(list_of_scores, ids),
    )


def _check_classes(ours: pd.Index, theirs: pd.Index, first: str, name: str) -> None:
    for only, owner, without in (
        (ours.difference(theirs, sort=False), first, name),
        (theirs.difference(ours, sort=False), name, first),
    ):
        if len(only):
            raise InputError(
                f"{name} has other classes than {first} ({len(theirs):,} and {len(ours):,}): "
                f"{only[0]!r} is in {owner} and not in {without}; fuse models of the same classes"
            )


def _join_ids(
    ids_by_model: Sequence[pd.Index], names: Sequence[str], missing: Missing
) -> tuple[pd.Index, np.ndarray, int]:
    """The ids of the joined videos, bool [models, videos] that marks the videos a model lacks, and
    the number of dropped videos."""
    union = ids_by_model[0].append(ids_by_model[1:]).unique()
    listed = np.stack([union.isin(ids) for ids in ids_by_model])  # [models, videos]
    everywhere = listed.all(axis=0)
    if missing == "error" and not everywhere.all():
        raise InputError(_missing_message(names, union, listed))
    if missing == "drop" and not everywhere.any():
        raise InputError(
            f"{' and '.join(names)} have no video in common; "
            f"{names[0]} begins with {ids_by_model[0][0]!r}, {names[1]} with {ids_by_model[1][0]!r}"
        )
    kept = everywhere if missing == "drop" else np.ones(len(union), bool)
    return union[kept], ~listed[:, kept], int((~kept).sum())


def _missing_message(names: Sequence[str], ids: pd.Index, listed: np.ndarray) -> str:
    """The message that names the model without the first missing video, and counts the videos that
    each model lacks; `listed` is bool [models, videos]."""
    video = int(listed.all(axis=0).argmin())
    owner = names[int(listed[:, video].argmax())]
    without = names[int(listed[:, video].argmin())]
    counts = zip(names, (~listed).sum(axis=1), strict=True)
    return (
        f"{ids[video]!r} is in {owner} and not in {without}; of {len(ids):,} videos are missing: "
        f"{', '.join(f'{name} {count:,}' for name, count in counts if count)}. "
        "--missing drop leaves them out, --missing worst counts them as wrong"
    )


def _in_order(scores: Scores, ids: pd.Index, classes: pd.Index) -> tuple[np.ndarray, np.ndarray]:
    """A model's logits and labels for `ids` and `classes`: NaN and -1 for videos it does not
    list."""
    index = pd.Index(scores.ids, dtype=object)
    columns = pd.Index(scores.classes, dtype=object)
    logits = pd.DataFrame(scores.logits, index, columns, copy=False)  # may be 200 MB
    labels = np.full(len(index), -1) if scores.labels is None else scores.labels
    labels = pd.Series(labels, index).reindex(ids, fill_value=-1).to_numpy()
    # Label -1 takes the -1 behind the last class, so that unknown labels stay unknown.
    new_labels = np.append(classes.get_indexer(columns), -1).astype(np.int32)
    return logits.reindex(index=ids, columns=classes).to_numpy(), new_labels[labels]


def _common_groups(list_of_scores: Sequence[Scores], ids: pd.Index) -> np.ndarray:
    """The group of each video, from the first model that has one. Files of earlier versions have no
    groups: their keys are made of the ids alone."""
    groups = group_keys(ids.tolist())
    from_ids = groups.copy()
    for scores in list_of_scores:
        keys = pd.Series(scores.groups, pd.Index(scores.ids, dtype=object)).reindex(ids)
        new = (groups == from_ids) & keys.notna().to_numpy()
        groups[new] = keys.to_numpy()[new]
    return groups


def _common_labels(
    labels_by_model: np.ndarray, names: Sequence[str], ids: pd.Index, classes: pd.Index
) -> np.ndarray:
    """The label of each video [N], from any model that knows it; `labels_by_model` is [M, N]."""
    is_known = labels_by_model >= 0
    first_known = is_known.argmax(axis=0)
    labels = labels_by_model[first_known, np.arange(len(ids))]
    if (conflict := is_known & (labels_by_model != labels)).any():
        model, video = np.argwhere(conflict)[0]
        raise InputError(
            f"{ids[video]!r} is {classes[labels[video]]!r} in {names[first_known[video]]} and "
            f"{classes[labels_by_model[model, video]]!r} in {names[model]}; "
            "the scores were made with different labels"
        )
    return labels
