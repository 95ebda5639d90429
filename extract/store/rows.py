"""What a store holds of each video beside its features: status, frames and times; and checks of such columns."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from extract.cli import InputError

PENDING, OK, PARTIAL, FAILED = 0, 1, 2, 3
STATUS_NAMES = ("pending", "ok", "partial", "failed")


@dataclass(frozen=True)
class Rows:
    """What the driver commits for some rows: outcomes of n videos."""

    rows: np.ndarray  # int [n]
    status: np.ndarray  # int8 [n]
    errors: list[str]
    num_frames: np.ndarray  # int32 [n]
    frame_indices: np.ndarray  # int32 [n, V, T]
    timestamps: np.ndarray = field(repr=False)  # float32 [n, V, T], seconds

    def __post_init__(self) -> None:
        counts = {name: len(getattr(self, name)) for name in self.__dataclass_fields__}
        if len(set(counts.values())) != 1:
            raise ValueError(f"expected the same number of videos in every field, got {counts}")

    @classmethod
    def joined(cls, parts: "Sequence[Rows]") -> "Rows":
        """Outcomes of several blocks as one, which costs as much to commit as one."""
        errors = [error for part in parts for error in part.errors]
        columns = {name: [getattr(part, name) for part in parts] for name in cls.__dataclass_fields__}
        return cls(**{name: np.concatenate(of) for name, of in columns.items() if name != "errors"}, errors=errors)


def check_arrays(features: np.ndarray, columns: dict[str, Any], *, num_classes: int) -> None:
    """InputError naming the first video with a wrong length or label, or a value that float16 cannot hold."""
    count, _, frames, _ = features.shape
    for name, values in columns.items():
        if len(values) != count:
            raise InputError(f"features hold {count} videos, {name} {len(values)}")
    ids, lengths, labels = columns["ids"], columns["lengths"], columns["labels"]
    _check_each(ids, lengths, (lengths < 1) | (lengths > frames), f"a length of 1 to {frames} frames")
    _check_each(ids, labels, (labels < -1) | (labels >= num_classes), f"a label below {num_classes}, or -1")
    real = np.arange(frames) < lengths[:, None]
    for row in range(count):  # one at a time: a copy of everything may not fit
        wrong = ~(np.abs(features[row][:, real[row]]) <= np.finfo("f2").max)
        if wrong.any():
            value = features[row][:, real[row]][wrong][0]
            raise InputError(f"{ids[row]} (row {row}): expected features that float16 can hold, got {value}")


def _check_each(ids: Sequence[str], values: Any, wrong: np.ndarray, expected: str) -> None:
    if wrong.any():
        row = int(np.flatnonzero(wrong)[0])
        raise InputError(f"{ids[row]} (row {row}): expected {expected}, got {values[row]!s}")
