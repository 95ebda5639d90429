"""On-disk layout of a store: its per-video arrays, their checksums, and a folder that syncs every
change."""

import asyncio
import json
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import zarr
from zarr.codecs import BytesCodec, Crc32cCodec, ZstdCodec

from extract import InputError
from extract.durable import os_errors_as_run_error, replace_file, sync
from extract.sources import UNKNOWN, Source

PENDING, OK, PARTIAL, FAILED = 0, 1, 2, 3
STATUS_NAMES = ("pending", "ok", "partial", "failed")
DROPPED = 4  # added to the status of a row that --drop-unlisted took out; what it was is kept
ROWS_PER_CHUNK = 4096  # of the per-video arrays: rewriting one chunk costs a few ms, and Kinetics-700 has 133 of them

# name -> (dtype, shape behind [N], fill value); V and T are views and frames per video
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
    "sources": (
        "<i8",
        "2",
        -1,
    ),  # size in bytes and digest of the file, -1 unknown: extract/sources.py
    "errors": (str, "", ""),
    "status": ("i1", "", PENDING),  # last: the number of its rows is the number of videos
}
# schema -> the arrays that it lacks; the last one is written
SCHEMAS = {
    "hgnl-features/1": ("starts", "ends", "sources"),
    "hgnl-features/2": ("sources",),
    "hgnl-features/3": (),
}
SCHEMA = list(SCHEMAS)[-1]
_CHECKED = (ZstdCodec(level=0, checksum=True),)
# An id is also a path below the folder that an export fills.
_UNSAFE_ID = re.compile(r"(?:^|[/\\])\.\.?(?:[/\\]|$)|^[/\\]|^$|^[A-Za-z]:[/\\]|//|/$|\0")


def create_arrays(
    group: zarr.Group, views: Sequence[str], *, frames: int, dim: int, block_size: int
) -> None:
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
        "views",
        shape=(len(views),),
        dtype=str,
        chunks=(len(views),),
        fill_value="",
        compressors=_CHECKED,
    )
    names[:] = np.array(views, dtype=object)
    for name in ROW_ARRAYS:
        create_row_array(group, name, 0, views=len(views), frames=frames)


def create_row_array(group: zarr.Group, name: str, rows: int, *, views: int, frames: int) -> None:
    """An array with one row per video, which replaces one of that name."""
    dtype, extra, fill = ROW_ARRAYS[name]
    shape = {"": (), "VT": (views, frames), "2": (2,)}[extra]
    array = group.create_array(
        name,
        shape=(rows, *shape),
        dtype=dtype,
        chunks=(ROWS_PER_CHUNK, *shape),
        fill_value=fill,
        chunk_key_encoding={"name": "default", "separator": "."},
        compressors=_CHECKED,
        overwrite=True,
    )
    if rows:
        every_chunk(array)[:] = fill


def every_chunk(array: zarr.Array) -> zarr.Array:
    """The array, to be written with chunks of fill values too: a chunk that is missing is then a
    damaged copy."""
    return array.with_config({"write_empty_chunks": True})


def chunk_names(name: str, rows: int) -> list[str]:
    """The files of a per-video array, below its folder."""
    rest = ".0.0" if ROW_ARRAYS[name][1] == "VT" else ".0" if ROW_ARRAYS[name][1] else ""
    return [f"c.{number}{rest}" for number in range(-(-rows // ROWS_PER_CHUNK))]


def as_objects(strings: np.ndarray) -> np.ndarray:
    """NumPy's strings of variable length (which scikit-learn and pandas refuse) as str objects,
    equal ones shared."""
    shared: dict[str, str] = {}
    objects = np.empty(len(strings), object)
    objects[:] = [shared.setdefault(text, text) for text in strings.tolist()]
    return objects


def check_ids(ids: Iterable[str]) -> None:
    """InputError for an id that names a file outside of the folder of an export, or two ids that
    are the same."""
    ids = list(ids)
    unsafe = [name for name in ids if _UNSAFE_ID.search(name)]
    if unsafe:
        raise InputError(
            f"{len(unsafe)} ids are not paths below a folder, the first is {unsafe[0]!r}; an id has no "
            "empty part, no '.' or '..' between its slashes, no drive letter and no leading slash"
        )
    if len(set(ids)) < len(ids):
        twice = [name for name, times in Counter(ids).items() if times > 1]
        raise InputError(f"{len(twice)} ids appear several times, the first is {twice[0]!r}")


def checksum(attributes: dict[str, Any]) -> str:
    """CRC-32C of what a store's attributes hold."""
    return f"{google_crc32c.value(json.dumps(attributes, sort_keys=True).encode()):08x}"


def store_attributes(classes: Sequence[str], provenance: dict[str, Any]) -> dict[str, Any]:
    """Of the group: schema, classes, provenance, and their checksum."""
    attributes = {"schema": SCHEMA, "classes": list(classes), "provenance": provenance}
    return attributes | {"checksum": checksum(attributes)}


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
            with os_errors_as_run_error(path):
                path.unlink()
                sync(path.parent)


def zarr_store(path: str | Path) -> Any:
    """What zarr opens; a folder, or an fsspec store for a URL."""
    return zarr.storage.FsspecStore.from_url(str(path)) if is_remote(path) else str(path)


def is_remote(path: str | Path) -> bool:
    """Whether a store's path is a URL for fsspec (`s3://...`, `memory://...`)."""
    return "://" in str(path)


@dataclass(frozen=True)
class Outcomes:
    """What the driver commits for some rows: outcomes of n videos."""

    rows: np.ndarray  # int [n]
    status: np.ndarray  # int8 [n]
    errors: list[str]
    num_frames: np.ndarray  # int32 [n]
    frame_indices: np.ndarray  # int32 [n, V, T]
    timestamps: np.ndarray = field(repr=False)  # float32 [n, V, T], seconds
    sources: list[Source] = field(
        default_factory=list
    )  # of the files that were read, [] for features without a file

    def column(self, name: str) -> Any:
        """The values of a per-video array."""
        if name != "sources":
            return getattr(self, name)
        sources = self.sources or [UNKNOWN] * len(self.rows)
        return np.array([(source.size, source.digest) for source in sources], "<i8").reshape(-1, 2)

    @classmethod
    def failed(cls, rows: np.ndarray, reason: str, views: int, frames: int) -> "Outcomes":
        """Rows of which nothing could be read, all for one reason."""
        count, shape = len(rows), (len(rows), views, frames)
        return cls(
            rows=rows,
            status=np.full(count, FAILED, "i1"),
            errors=[reason] * count,
            num_frames=np.zeros(count, "<i4"),
            frame_indices=np.full(shape, -1, "<i4"),
            timestamps=np.full(shape, np.nan, "<f4"),
        )
