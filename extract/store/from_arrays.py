"""Checks of features that were computed elsewhere, before a byte of them is written."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from extract import InputError
from extract.store.layout import Column


def check_arrays(
    features: np.ndarray, *, classes: Sequence[str], **columns: Column | None
) -> tuple[np.ndarray, dict[str, Any]]:
    """Features [N, V, T, D], and the columns that are given, of `FeatureStore.from_arrays`.

    Raises InputError naming the first video with a wrong length or label, or a value that float16
    cannot hold.
    """
    features = np.asarray(features)
    features = features[:, None] if features.ndim == 3 else features
    if features.ndim != 4:
        raise InputError(f"features must be [N, T, D] or [N, V, T, D], got shape {features.shape}")
    count, _, frames, _ = features.shape
    checked: dict[str, Any] = {"ids": [f"{row:08d}" for row in range(count)]}
    checked |= {name: values for name, values in columns.items() if values is not None}
    for name, values in checked.items():
        if len(values) != count:
            raise InputError(f"features hold {count} videos, {name} {len(values)}")
    lengths, labels = np.asarray(checked["lengths"]), np.asarray(checked["labels"])
    num_classes = len(classes)
    for values, valid, expected in (
        (lengths, (lengths >= 1) & (lengths <= frames), f"a length of 1 to {frames} frames"),
        (labels, (labels >= -1) & (labels < num_classes), f"a label below {num_classes}, or -1"),
    ):
        if not valid.all():
            row = int(np.argmin(valid))
            name = f"{checked['ids'][row]} (row {row})"
            raise InputError(f"{name}: expected {expected}, got {values[row]!s}")
    for row in range(count):  # one at a time: a copy of everything may not fit into memory
        real = features[row, :, : int(lengths[row])]
        too_large = ~(np.abs(real) <= np.finfo("f2").max)  # or NaN
        if too_large.any():
            raise InputError(
                f"{checked['ids'][row]} (row {row}): expected features that float16 can hold, "
                f"got {real[too_large][0]}"
            )
    return features, checked | {"lengths": lengths, "labels": labels}
