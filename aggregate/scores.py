"""Scores of videos and the file they travel in (HDF5): what `aggregate` writes and `ensemble`
reads.

    ids      [N] str        classes  [C] str        labels  [N] int32, -1 unknown
    groups   [N] str, what each video depends on (`group_keys`); files of earlier versions have none
    logits/3, logits/25 ... [N, C] float32, averaged over crops; a video that failed is a row of NaN
    crops/3, crops/25 ...   [N, crops, C] float32, where there were several
    attributes: schema; source, a JSON record of model, checkpoint, store and split

Before it stands a block of 512 bytes, which HDF5 skips, with the SHA-256 of the rest. numpy, and
h5py where a file is touched; no torch.
"""

import hashlib
import json
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from extract import InputError, StrPath
from extract.commands import command_line
from extract.durable import replace_file
from extract.sources import file_of

SCHEMA = "hgnl-scores/1"
_USER_BLOCK, _SIGNATURE = 512, b"\x89HDF\r\n\x1a\n"


def group_keys(
    ids: Sequence[str] | np.ndarray, groups: Sequence[str] | np.ndarray | None = None
) -> np.ndarray:
    """What each row depends on, str [N]: rows of equal keys are not independent, so they are never
    split between training and test, and are drawn together when intervals are computed.

    The key of a row is its group (subject, source), if it has one. Otherwise it is its file, so
    that the windows of one file belong together and a whole file is a group of its own. If one
    window of a file has a group, the windows of that file without one belong to it too.
    """
    names, files = (
        [str(name) for name in groups] if groups is not None else [],
        [file_of(str(name)) for name in ids],
    )
    if not any(names):
        return np.array(files, object)
    group_of_file: dict[str, str] = {}
    for file, name in zip(files, names, strict=True):
        if name:
            group_of_file.setdefault(file, name)
    return np.array(
        [name or group_of_file.get(file, file) for file, name in zip(files, names, strict=True)],
        object,
    )


@dataclass(frozen=True)
class Scores:
    """Logits [N, C] float32 of videos `ids` over `classes`; `labels` [N], -1 unknown, or None.

    `segments` is the number of frames per video was seen with; `crops` [N, crops, C] what `logits` is
    the mean of; `groups` [N] the keys of `group_keys`, by default those of the ids alone. Raises
    InputError for shapes that do not fit, no video or no class, a doubled id or class, a label that
    is not a class, and a row that holds NaN or infinity without being NaN throughout (which is a video
    that failed).
    """

    ids: Sequence[str]
    classes: Sequence[str]
    logits: np.ndarray = field(repr=False)
    labels: np.ndarray | None = field(default=None, repr=False)
    source: dict[str, Any] = field(default_factory=dict)
    segments: int = 1
    crops: np.ndarray | None = field(default=None, repr=False)
    groups: Sequence[str] | np.ndarray | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "ids", [str(name) for name in self.ids])
        object.__setattr__(self, "classes", [str(name) for name in self.classes])
        object.__setattr__(self, "logits", np.asarray(self.logits, np.float32))
        expected = (len(self.ids), len(self.classes))
        if self.logits.shape != expected:
            raise InputError(
                f"logits are {list(self.logits.shape)} for {expected[0]} ids and {expected[1]} classes"
            )
        if not all(expected):
            raise InputError(
                f"there are {expected[0]} videos and {expected[1]} classes; scores are of some of both"
            )
        for what, names in (("id", self.ids), ("class", self.classes)):
            name, times = Counter(names).most_common(1)[0]
            if times > 1:
                raise InputError(f"{what} {name!r} stands {times} times; each must be there once")
        finite = np.isfinite(self.logits)
        partly = ~finite.all(axis=1) & ~np.isnan(self.logits).all(axis=1)
        if partly.any():
            row = int(partly.argmax())
            place = int((~finite[row]).argmax())
            raise InputError(
                f"{self.ids[row]} (row {row}) has {self.logits[row, place]} for class {self.classes[place]!r}; "
                "scores are finite, or NaN throughout for a video that failed"
            )
        if self.labels is not None:
            labels = np.asarray(self.labels)
            if labels.shape != (len(self.ids),):
                raise InputError(f"labels are {list(labels.shape)} for {len(self.ids)} ids")
            wrong = (labels < -1) | (labels >= len(self.classes))
            if wrong.any():
                row = int(wrong.argmax())
                raise InputError(
                    f"{self.ids[row]} (row {row}) has label {labels[row]}; there are {expected[1]} classes"
                )
            object.__setattr__(self, "labels", labels.astype(np.int32))
        groups = group_keys(self.ids) if self.groups is None else np.asarray(self.groups, object)
        if groups.shape != (len(self.ids),):
            raise InputError(f"groups are {list(groups.shape)} for {len(self.ids)} ids")
        object.__setattr__(self, "groups", groups)
        if self.crops is not None and (self.crops.ndim != 3 or self.crops.shape[::2] != expected):
            raise InputError(
                f"crops are {list(self.crops.shape)}, expected [{expected[0]}, crops, {expected[1]}]"
            )

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def failed(self) -> np.ndarray:
        """Videos without scores: bool [N]."""
        return np.isnan(self.logits).any(axis=1)

    def by_video(self) -> "Scores":
        """One row per video: the mean over its windows (ids `path#<start ms>-<end ms>`), failed ones
        left out.

        Crops are averaged too. Raises InputError where the windows of a video are of different
        classes.
        """
        videos, of = np.unique([file_of(name) for name in self.ids], return_inverse=True)
        good = ~self.failed
        counts = np.bincount(of[good], minlength=len(videos))
        logits = np.zeros((len(videos), len(self.classes)))
        np.add.at(logits, of[good], self.logits[good])
        logits[counts == 0] = np.nan
        labels = None
        if self.labels is not None:
            labels = np.full(len(videos), -1)
            labels[of] = self.labels
            if (labels[of] != self.labels).any():
                mixed = videos[of[labels[of] != self.labels][0]]
                raise InputError(
                    f"the windows of {mixed} are of several classes; average those of one class only"
                )
        means = logits / np.maximum(counts, 1)[:, None]
        groups = np.empty(len(videos), object)
        groups[of] = self.groups
        source = {**self.source, "by": "video"}
        return Scores(
            videos.tolist(), self.classes, means, labels, source, self.segments, groups=groups
        )

    def save(self, path: StrPath) -> None:
        """Write a scores file with these logits; it appears whole or not at all."""
        save_scores(path, [self])

    @classmethod
    def load(cls, path: StrPath, segments: int | None = None) -> "Scores":
        """Read a scores file: the logits of `segments`, by default the largest number there is.

        Raises InputError naming the file, and what is wrong with it.
        """
        import h5py

        if not Path(path).is_file():
            raise InputError(
                f"{path} is not a scores file: there is no such file; "
                f"`{command_line('aggregate.evaluate')} --out` makes one"
            )
        _check_whole(path)
        try:
            file = h5py.File(path)
        except OSError as error:
            raise InputError(f"{path} is not a scores file: {error}") from None
        with file:
            if (
                file.attrs.get("schema") != SCHEMA
                or not {"ids", "classes", "logits"} <= file.keys()
            ):
                raise InputError(
                    f"{path} is not a scores file: schema {file.attrs.get('schema')!r}, expected {SCHEMA!r}"
                )
            known = sorted(int(name) for name in file["logits"])
            if not known:
                raise InputError(f"{path} holds no logits")
            segments = known[-1] if segments is None else segments
            if segments not in known:
                raise InputError(
                    f"{path} has no scores of {segments} segments; it has {', '.join(map(str, known))}"
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
    """InputError for scores of videos that their model was trained on: whatever is made of them is
    not a result."""
    if count := scores.source.get("trained_on"):
        raise InputError(
            f"{name} holds scores of {count:,} videos that the model was trained on, which is not a result; "
            "score others: `evaluate --split held-out`, or another split"
        )


def save_scores(path: StrPath, several: Sequence[Scores]) -> None:
    """Write one file of the same videos seen with several numbers of segments."""
    import h5py

    first = several[0]
    if any((one.ids, one.classes) != (first.ids, first.classes) for one in several):
        raise ValueError(
            "one scores file holds the same videos and classes for every number of segments"
        )
    # In memory first: HDF5 keeps to itself what fails while a file is closed.
    with h5py.File(os.fspath(path), "w", driver="core", backing_store=False) as file:
        text = h5py.string_dtype()
        file.attrs.update(schema=SCHEMA, source=json.dumps(first.source))
        file.create_dataset("ids", data=np.array(first.ids, object), dtype=text)
        file.create_dataset("classes", data=np.array(first.classes, object), dtype=text)
        file.create_dataset("groups", data=first.groups, dtype=text)
        if first.labels is not None:
            file.create_dataset("labels", data=first.labels)
        for one in several:
            file.create_dataset(f"logits/{one.segments}", data=one.logits)
            if one.crops is not None:
                file.create_dataset(f"crops/{one.segments}", data=np.asarray(one.crops, np.float32))
        file.flush()
        image = file.id.get_file_image()
    replace_file(path, _checksum(image) + image)


def _checksum(image: bytes) -> bytes:
    """A block that HDF5 skips, with the SHA-256 of what comes behind it."""
    return f"{SCHEMA} {hashlib.sha256(image).hexdigest()}\n".encode().ljust(_USER_BLOCK, b"\0")


def _check_whole(path: StrPath) -> None:
    """InputError for a damaged file: HDF5 hangs or crashes over some of those. Files of older
    versions cannot tell."""
    content = Path(path).read_bytes()
    begins = content[_USER_BLOCK : _USER_BLOCK + len(_SIGNATURE)]
    if begins == _SIGNATURE and content[:_USER_BLOCK] != _checksum(content[_USER_BLOCK:]):
        raise InputError(
            f"{path} was damaged, or changed by another program: its checksum does not match; make it again"
        )
