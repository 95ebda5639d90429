"""A finished store of features that were made elsewhere, checked before a byte is written."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from extract import InputError
from extract.store.layout import OK, Outcomes


def write_arrays(
    store_class: Any,
    path: str | Path,
    features: np.ndarray,
    *,
    lengths: Sequence[int] | np.ndarray,
    labels: Sequence[int] | np.ndarray,
    classes: Sequence[str],
    **columns: Sequence[Any] | np.ndarray | None,
) -> None:
    """`FeatureStore.from_arrays`, of the class given."""
    features = np.asarray(features)
    features = features[:, None] if features.ndim == 3 else features
    if features.ndim != 4:
        raise InputError(f"features must be [N, T, D] or [N, V, T, D], got shape {features.shape}")
    count, views, frames, dim = features.shape
    made: dict[str, Any] = {
        "ids": [f"{row:08d}" for row in range(count)],
        "labels": np.asarray(labels),
    }
    made |= {name: values for name, values in columns.items() if values is not None}
    lengths = np.asarray(lengths)
    check_arrays(features, {**made, "lengths": lengths}, num_classes=len(classes))
    store = store_class.create(
        path,
        classes=classes,
        views=["center", *(f"view_{view}" for view in range(1, views))],
        frames=frames,
        dim=dim,
        block_size=64,
        provenance={"source": "FeatureStore.from_arrays"},
        **made,
    )
    # Padding repeats the last real frame's index, which is what `mask` looks at.
    indices = np.minimum(np.arange(frames), lengths[:, None] - 1).astype("<i4")
    for block in range(store.num_blocks):
        store.write_block(block, features[store.block_rows(block)].astype("<f2"))
    store.commit(
        Outcomes(
            rows=np.arange(count),
            status=np.full(count, OK, "i1"),
            errors=[""] * count,
            num_frames=lengths.astype("<i4"),
            frame_indices=np.broadcast_to(indices[:, None], (count, views, frames)),
            timestamps=np.full((count, views, frames), np.nan, "<f4"),
        )
    )


def check_arrays(features: np.ndarray, columns: dict[str, Any], *, num_classes: int) -> None:
    """InputError naming the first video with a wrong length or label, or a value that float16
    cannot hold."""
    count, _, frames, _ = features.shape
    for name, values in columns.items():
        if len(values) != count:
            raise InputError(f"features hold {count} videos, {name} {len(values)}")
    ids, lengths, labels = columns["ids"], columns["lengths"], columns["labels"]
    _check_each(
        ids, lengths, (lengths < 1) | (lengths > frames), f"a length of 1 to {frames} frames"
    )
    _check_each(
        ids, labels, (labels < -1) | (labels >= num_classes), f"a label below {num_classes}, or -1"
    )
    real = np.arange(frames) < lengths[:, None]
    for row in range(count):  # one at a time: a copy of everything may not fit
        wrong = ~(np.abs(features[row][:, real[row]]) <= np.finfo("f2").max)
        if wrong.any():
            value = features[row][:, real[row]][wrong][0]
            raise InputError(
                f"{ids[row]} (row {row}): expected features that float16 can hold, got {value}"
            )


def _check_each(ids: Sequence[str], values: Any, wrong: np.ndarray, expected: str) -> None:
    if wrong.any():
        row = int(np.flatnonzero(wrong)[0])
        raise InputError(f"{ids[row]} (row {row}): expected {expected}, got {values[row]!s}")
