"""Scores of videos and their HDF5 file: `aggregate` writes it, `ensemble` reads it.

    ids      [N] str        classes  [C] str        labels  [N] int32, -1 unknown
    groups   [N] str, the keys of `group_keys`; files of earlier versions have none
    logits/3, logits/25 ... [N, C] float32, averaged over crops; a video that failed is a row of NaN
    crops/3, crops/25 ...   [N, crops, C] float32, if there were several
    attributes: schema; source, a JSON record of model, checkpoint, store and split

The file begins with a block of 512 bytes, which HDF5 skips: the SHA-256 of the rest. This module
needs numpy, h5py for the file and pandas for `Scores.by_video`; it does not import torch.
"""

import hashlib
import json
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from extract import InputError, Record, StrPath
from extract.commands import command_line
from extract.durable import replace_file
from extract.sources import file_of

SCHEMA = "hgnl-scores/1"
_USER_BLOCK, _SIGNATURE = 512, b"\x89HDF\r\n\x1a\n"


def group_keys(
    ids: Sequence[str] | np.ndarray, groups: Sequence[str] | np.ndarray | None = None
) -> np.ndarray:
    """A key for each row, str [N]. Rows of equal keys are not independent.

    Such rows are never split between training and test, and bootstrap intervals draw them together.
    The key of a row is its group (subject, source), if it has one, else its file: the windows of a
    file belong together. If one window of a file has a group, the others of that file get it too.
    """
    files = [file_of(str(name)) for name in ids]
    if groups is None:
        return np.array(files, object)
    own = [str(name) for name in groups]
    group_of_file: dict[str, str] = {}
    for file, group in zip(files, own, strict=True):
        if group:
            group_of_file.setdefault(file, group)
    keys = [group or group_of_file.get(file, file) for file, group in zip(files, own, strict=True)]
    return np.array(keys, object)


@dataclass(frozen=True)
class Scores:
    """Logits [N, C] float32 of videos `ids` over `classes`.

    `labels` [N] has -1 for unknown ones. `segments` is the number of frames per video that the
    model saw. `logits` is the mean of `crops` [N, crops, C]. `groups` [N] are the keys of
    `group_keys`, by default those of the ids alone.

    Raises InputError for shapes that do not fit, for no video or no class, for an id or a class
    that appears twice, for a label that is not a class, and for a row with some values that are not
    finite. A row of only NaN is a video that failed.
    """

    ids: Sequence[str]
    classes: Sequence[str]
    logits: np.ndarray = field(repr=False)
    labels: np.ndarray | None = field(default=None, repr=False)
    source: Record = field(default_factory=dict)
    segments: int = 1
    crops: np.ndarray | None = field(default=None, repr=False)
    groups: Sequence[str] | np.ndarray | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        ids, classes = list(map(str, self.ids)), list(map(str, self.classes))
        logits = np.asarray(self.logits, np.float32)
        N, C = len(ids), len(classes)
        if logits.shape != (N, C):
            raise InputError(f"logits are {list(logits.shape)} for {N} ids and {C} classes")
        if not N or not C:
            raise InputError(
                f"there are {N} videos and {C} classes; at least one of each is needed"
            )
        for kind, names in (("id", ids), ("class", classes)):
            name, times = Counter(names).most_common(1)[0]
            if times > 1:
                raise InputError(f"{kind} {name!r} appears {times} times; each must appear once")
        finite = np.isfinite(logits)
        partial = ~finite.all(axis=1) & ~np.isnan(logits).all(axis=1)
        if partial.any():
            row = int(partial.argmax())
            index = int((~finite[row]).argmax())
            raise InputError(
                f"{ids[row]} (row {row}) has {logits[row, index]} for class {classes[index]!r}; "
                "scores are finite, or all NaN for a video that failed"
            )
        labels = None if self.labels is None else np.asarray(self.labels)
        groups = group_keys(ids) if self.groups is None else np.asarray(self.groups, object)
        for column, values in (("labels", labels), ("groups", groups)):
            if values is not None and values.shape != (N,):
                raise InputError(f"{column} are {list(values.shape)} for {N} ids")
        if labels is not None:
            wrong = (labels < -1) | (labels >= C)
            if wrong.any():
                row = int(wrong.argmax())
                raise InputError(
                    f"{ids[row]} (row {row}) has label {labels[row]}; there are {C} classes"
                )
            labels = labels.astype(np.int32)
        if self.crops is not None and (self.crops.ndim != 3 or self.crops.shape[::2] != (N, C)):
            raise InputError(f"crops are {list(self.crops.shape)}, expected [{N}, crops, {C}]")
        vars(self).update(ids=ids, classes=classes, logits=logits, labels=labels, groups=groups)

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def failed(self) -> np.ndarray:
        """Videos without scores: bool [N]."""
        return np.isnan(self.logits).any(axis=1)

    def by_video(self) -> "Scores":
        """Average the windows of each video (ids `path#<start ms>-<end ms>`) that did not fail.

        Crops are averaged too. Raises InputError if the windows of a video are of different
        classes.
        """
        import pandas as pd

        files = pd.Index([file_of(name) for name in self.ids], dtype=object)
        logits = pd.DataFrame(self.logits.astype(float)).groupby(files).mean()  # without NaN
        labels = None
        if self.labels is not None:
            by_file = pd.Series(self.labels).groupby(files)
            labels = by_file.first().to_numpy()
            if (mixed := by_file.nunique() > 1).any():
                raise InputError(
                    f"the windows of {mixed.idxmax()} are of several classes; "
                    "use --by row, which scores each window"
                )
        return Scores(
            logits.index.tolist(),
            self.classes,
            logits.to_numpy(),
            labels,
            {**self.source, "by": "video"},
            self.segments,
            groups=pd.Series(self.groups, dtype=object).groupby(files).first().to_numpy(),
        )

    def save(self, path: StrPath) -> None:
        """Write a scores file with these logits, atomically."""
        save_scores(path, [self])

    @classmethod
    def load(cls, path: StrPath, segments: int | None = None) -> "Scores":
        """Read the logits of `segments` from a scores file, by default of the largest number.

        Raises InputError that names the file and the problem.
        """
        import h5py

        if not Path(path).is_file():
            raise InputError(
                f"{path} is not a scores file (it does not exist). "
                f"Create one with `{command_line('aggregate.evaluate')} --out`"
            )
        _verify_checksum(path)
        try:
            file = h5py.File(path)
        except OSError as error:
            raise InputError(f"{path} is not a scores file: {error}") from None
        with file:
            schema = file.attrs.get("schema")
            if schema != SCHEMA or not {"ids", "classes", "logits"} <= file.keys():
                raise InputError(
                    f"{path} is not a scores file: schema {schema!r}, expected {SCHEMA!r}"
                )
            available = sorted(map(int, file["logits"]))
            if not available:
                raise InputError(f"{path} holds no logits")
            segments = available[-1] if segments is None else segments
            if segments not in available:
                raise InputError(
                    f"{path} has no scores of {segments} segments; "
                    f"it has {', '.join(map(str, available))}"
                )
            crops = file.get(f"crops/{segments}")
            try:
                return cls(
                    ids=file["ids"].asstr()[:].tolist(),
                    classes=file["classes"].asstr()[:].tolist(),
                    logits=file[f"logits/{segments}"][:],
                    labels=file["labels"][:] if "labels" in file else None,
                    source=json.loads(file.attrs.get("source", "{}")),
                    segments=segments,
                    crops=None if crops is None else crops[:],
                    groups=file["groups"].asstr()[:] if "groups" in file else None,
                )
            except InputError as error:
                raise InputError(f"{path}: {error}") from None


def refuse_training_scores(scores: Scores, name: str) -> None:
    """Raise InputError for scores of videos that their model was trained on."""
    if count := scores.source.get("trained_on"):
        raise InputError(
            f"{name} holds scores of {count:,} videos that the model was trained on, "
            "which is not a result; score other videos: `evaluate --split held-out`, "
            "or another split"
        )


def save_scores(path: StrPath, by_segments: Sequence[Scores]) -> None:
    """Write one file of the same videos, scored with several numbers of segments."""
    import h5py

    first = by_segments[0]
    if any((scores.ids, scores.classes) != (first.ids, first.classes) for scores in by_segments):
        raise ValueError("the scores in one file must be of the same videos and classes")
    # In memory first: HDF5 hides errors that occur while a file is closed.
    with h5py.File(os.fspath(path), "w", driver="core", backing_store=False) as file:
        text = h5py.string_dtype()
        file.attrs.update(schema=SCHEMA, source=json.dumps(first.source))
        file.create_dataset("ids", data=np.array(first.ids, object), dtype=text)
        file.create_dataset("classes", data=np.array(first.classes, object), dtype=text)
        file.create_dataset("groups", data=first.groups, dtype=text)
        if first.labels is not None:
            file.create_dataset("labels", data=first.labels)
        for scores in by_segments:
            file.create_dataset(f"logits/{scores.segments}", data=scores.logits)
            if scores.crops is not None:
                crops = np.asarray(scores.crops, np.float32)
                file.create_dataset(f"crops/{scores.segments}", data=crops)
        file.flush()
        image = file.id.get_file_image()
    replace_file(path, _user_block(image) + image)


def _user_block(image: bytes) -> bytes:
    """The block before an HDF5 image, with the image's SHA-256."""
    return f"{SCHEMA} {hashlib.sha256(image).hexdigest()}\n".encode().ljust(_USER_BLOCK, b"\0")


def _verify_checksum(path: StrPath) -> None:
    """Raise InputError for a damaged file, since HDF5 may hang or crash on one.

    Files of older versions have no checksum.
    """
    content = Path(path).read_bytes()
    image = content[_USER_BLOCK:]
    if image.startswith(_SIGNATURE) and not content.startswith(_user_block(image)):
        raise InputError(
            f"{path} was damaged or changed by another program (its checksum does not match). "
            "Create it again"
        )
