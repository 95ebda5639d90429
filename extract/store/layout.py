"""On-disk layout of a store: its arrays, their checksums, and a folder that syncs every change."""

import asyncio
import json
import math
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
from extract.durable import replace_file
from extract.sources import UNKNOWN, Source
from extract.store.objects import is_remote, remove_object

PENDING, OK, PARTIAL, FAILED = 0, 1, 2, 3
STATUS_NAMES = ("pending", "ok", "partial", "failed")
DROPPED = 4  # added to the status of a row that --drop-unlisted took out, so that it can come back
# Of the per-video arrays: rewriting one chunk costs a few ms, and Kinetics-700 has 133 of them.
ROWS_PER_CHUNK = 4096

# name -> (dtype, axes after [N], fill value); V and T are views and frames per video
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
    # size in bytes and digest of the file, -1 if unknown: extract/sources.py
    "sources": ("<i8", "2", -1),
    "errors": (str, "", ""),
    # Last: the number of its rows is the number of videos.
    "status": ("i1", "", PENDING),
}
# schema -> the arrays that it lacks; new stores have the last one
SCHEMAS = {
    "hgnl-features/1": ("starts", "ends", "sources"),
    "hgnl-features/2": ("sources",),
    "hgnl-features/3": (),
}
SCHEMA = list(SCHEMAS)[-1]
_CHECKED = (ZstdCodec(level=0, checksum=True),)
_CHUNK_KEYS: Any = {"name": "default", "separator": "."}
Column = Sequence[Any] | np.ndarray
# An export writes each video to a file named by its id, which must stay below the export's folder.
_UNSAFE_ID = re.compile(r"(?:^|[/\\])\.\.?(?:[/\\]|$)|^[/\\]|^$|^[A-Za-z]:[/\\]|//|/$|\0")


def create_arrays(
    group: zarr.Group, views: Sequence[str], *, frames: int, dim: int, block_size: int
) -> None:
    """Create the arrays of a store that has no videos yet."""
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
        chunk_key_encoding=_CHUNK_KEYS,
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
    """Create an array with one row per video, or replace it."""
    dtype, axes, fill = ROW_ARRAYS[name]
    sizes = {"V": views, "T": frames, "2": 2}
    shape = [sizes[axis] for axis in axes]
    array = group.create_array(
        name,
        shape=(rows, *shape),
        dtype=dtype,
        chunks=(ROWS_PER_CHUNK, *shape),
        fill_value=fill,
        chunk_key_encoding=_CHUNK_KEYS,
        compressors=_CHECKED,
        overwrite=True,
    )
    if rows:
        every_chunk(array)[:] = fill


def every_chunk(array: zarr.Array) -> zarr.Array:
    """The array, set to write chunks of fill values too: a missing chunk then means damage."""
    return array.with_config({"write_empty_chunks": True})


def chunk_names(name: str, rows: int) -> list[str]:
    """The names of a per-video array's files, in its folder."""
    chunks = math.ceil(rows / ROWS_PER_CHUNK)
    return [f"c.{number}" + ".0" * len(ROW_ARRAYS[name][1]) for number in range(chunks)]


def as_column(name: str, values: Any) -> np.ndarray:
    """Values of a per-video array with its dtype, strings as objects."""
    dtype = ROW_ARRAYS[name][0]
    return np.array(values, object if dtype is str else dtype)


def as_objects(strings: np.ndarray) -> np.ndarray:
    """NumPy's variable-length strings as str objects; equal strings share one object.

    scikit-learn and pandas do not take NumPy's own type.
    """
    shared: dict[str, str] = {}
    return np.array([shared.setdefault(text, text) for text in strings.tolist()], object)


def check_ids(ids: Iterable[str]) -> None:
    """InputError for an id that would leave the folder of an export, and for ids that repeat."""
    ids = list(ids)
    unsafe = [name for name in ids if _UNSAFE_ID.search(name)]
    if unsafe:
        raise InputError(
            f"{len(unsafe)} ids are not paths below a folder, the first is {unsafe[0]!r}; an id "
            "has no empty part, no '.' or '..' between its slashes, no drive letter and no leading "
            "slash"
        )
    if len(set(ids)) < len(ids):
        twice = [name for name, times in Counter(ids).items() if times > 1]
        raise InputError(f"{len(twice)} ids appear several times, the first is {twice[0]!r}")


def checksum(attributes: dict[str, Any]) -> str:
    """CRC-32C of a store's attributes."""
    return f"{google_crc32c.value(json.dumps(attributes, sort_keys=True).encode()):08x}"


def store_attributes(classes: Sequence[str], provenance: dict[str, Any]) -> dict[str, Any]:
    """The attributes of a store's group: schema, classes, provenance, and their checksum."""
    attributes = {"schema": SCHEMA, "classes": list(classes), "provenance": provenance}
    return attributes | {"checksum": checksum(attributes)}


class SyncedFolder(zarr.storage.LocalStore):
    """A folder whose changes are on the disk when the call that makes them returns."""

    async def set(self, key: str, value: Any) -> None:
        await asyncio.to_thread(self.set_sync, key, value)

    def set_sync(self, key: str, value: Any) -> None:
        self._check_writable()
        replace_file(self.root / key, value.as_numpy_array().tobytes())

    async def delete(self, key: str) -> None:
        await asyncio.to_thread(self.delete_sync, key)

    def delete_sync(self, key: str) -> None:
        remove_object(str(self.root / key))


def zarr_store(path: str | Path) -> Any:
    """The store that zarr opens: a folder, or an fsspec store for a URL."""
    return zarr.storage.FsspecStore.from_url(str(path)) if is_remote(path) else str(path)


@dataclass(frozen=True)
class Outcomes:
    """How the extraction of n videos ended, as the driver commits it."""

    rows: np.ndarray  # int [n]
    status: np.ndarray  # int8 [n]
    errors: list[str]
    num_frames: np.ndarray  # int32 [n]
    frame_indices: np.ndarray  # int32 [n, V, T]
    timestamps: np.ndarray  # float32 [n, V, T], seconds
    # Of the files that were read, [] for features without a file.
    sources: list[Source] = field(default_factory=list)

    def column(self, name: str) -> Any:
        """The values for the rows of the per-video array `name`."""
        if name != "sources":
            return as_column(name, getattr(self, name))
        sources = self.sources or [UNKNOWN] * len(self.rows)
        return as_column(name, [(source.size, source.digest) for source in sources]).reshape(-1, 2)

    @classmethod
    def failed(cls, rows: np.ndarray, reason: str, views: int, frames: int) -> "Outcomes":
        """The outcomes of rows that all failed for the same reason."""
        count, shape = len(rows), (len(rows), views, frames)
        return cls(
            rows=rows,
            status=np.full(count, FAILED, "i1"),
            errors=[reason] * count,
            num_frames=np.zeros(count, "<i4"),
            frame_indices=np.full(shape, -1, "<i4"),
            timestamps=np.full(shape, np.nan, "<f4"),
            sources=[UNKNOWN] * count,
        )
