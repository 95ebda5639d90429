"""Of what a store is made: arrays with a row a video, their checksums, a folder in which every change is synced."""

import asyncio
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import zarr
from zarr.codecs import BytesCodec, Crc32cCodec, ZstdCodec

from extract.cli import InputError
from extract.files import replace_file, sync, writing

PENDING, OK, PARTIAL, FAILED = 0, 1, 2, 3
STATUS_NAMES = ("pending", "ok", "partial", "failed")
ROWS_PER_CHUNK = 4096  # of the per-video arrays: rewriting one chunk costs a few ms, and Kinetics-700 has 133 of them

# name -> (dtype, shape behind [N], fill value); V and T stand for views and frames a video
ROW_ARRAYS: dict[str, tuple[Any, str, Any]] = {
    "ids": (str, "", ""),
    "splits": (str, "", ""),
    "groups": (str, "", ""),
    "starts": ("<f8", "", float("nan")),
    "ends": ("<f8", "", float("nan")),
    "labels": ("<i4", "", -1),
    "frame_indices": ("<i4", "VT", -1),
    "timestamps": ("<f4", "VT", float("nan")),
    "num_frames": ("<i4", "", 0),
    "errors": (str, "", ""),
    "status": ("i1", "", PENDING),  # last: the number of its rows is the number of videos
}
_CHECKED = (ZstdCodec(level=0, checksum=True),)


def create_arrays(group: zarr.Group, views: Sequence[str], *, frames: int, dim: int, block_size: int) -> None:
    """The arrays of a store that has no videos yet."""
    group.create_array(
        "features",
        shape=(0, len(views), frames, dim),
        dtype="<f2",
        chunks=(1, len(views), frames, dim),
        shards=(block_size, len(views), frames, dim),
        serializer=BytesCodec(endian="little"),
        compressors=(Crc32cCodec(),),
        filters=None,
        fill_value=0,
        chunk_key_encoding={"name": "default", "separator": "."},
    )
    names = group.create_array(
        "views", shape=(len(views),), dtype=str, chunks=(len(views),), fill_value="", compressors=_CHECKED
    )
    names[:] = np.array(views, dtype=object)
    for name, (dtype, extra, fill) in ROW_ARRAYS.items():
        shape = (len(views), frames) if extra else ()
        group.create_array(
            name,
            shape=(0, *shape),
            dtype=dtype,
            chunks=(ROWS_PER_CHUNK, *shape),
            fill_value=fill,
            chunk_key_encoding={"name": "default", "separator": "."},
            compressors=_CHECKED,
        )


def checksum(attributes: dict[str, Any]) -> str:
    """CRC-32C of what a store's attributes hold."""
    return f"{google_crc32c.value(json.dumps(attributes, sort_keys=True).encode()):08x}"


class SyncedFolder(zarr.storage.LocalStore):
    """A folder in which every change is on the disk when it has been made."""

    async def set(self, key: str, value: Any) -> None:
        await asyncio.to_thread(self.set_sync, key, value)

    def set_sync(self, key: str, value: Any) -> None:
        self._check_writable()
        replace_file(self.root / key, value.as_numpy_array().tobytes())

    async def delete(self, key: str) -> None:
        await asyncio.to_thread(self.delete_sync, key)

    def delete_sync(self, key: str) -> None:
        path = self.root / key  # of a chunk
        if path.exists():
            with writing(path):
                path.unlink()
                sync(path.parent)


def target(path: str | Path) -> Any:
    """What zarr opens; a folder, or an fsspec store for a URL."""
    return zarr.storage.FsspecStore.from_url(str(path)) if is_remote(path) else str(path)


def is_remote(path: str | Path) -> bool:
    """Whether a store's path is a URL for fsspec (`s3://...`, `memory://...`)."""
    return "://" in str(path)


@dataclass(frozen=True)
class Rows:
    """What the driver commits for some rows: outcomes of n videos."""

    rows: np.ndarray  # int [n]
    status: np.ndarray  # int8 [n]
    errors: list[str]
    num_frames: np.ndarray  # int32 [n]
    frame_indices: np.ndarray  # int32 [n, V, T]
    timestamps: np.ndarray = field(repr=False)  # float32 [n, V, T], seconds


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
