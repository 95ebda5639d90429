"""The feature store: a Zarr v3 group, one chunk per video, one shard per block of videos. Layout:
docs/store-format.md.

Who writes what: workers write whole shards of `features`; the driver alone writes the per-video
arrays and commits a block once its shard is there, `status` last. Every file is written under
another name, synced and renamed, and its folder synced, before the next one. So no two writers
share a file, and what a killed run or a power cut leaves is a store in which some rows still have
status 0.
"""

import math
from collections.abc import Sequence
from contextlib import nullcontext
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import zarr

from extract import InputError, RunError
from extract.commands import command_line
from extract.durable import replacing
from extract.store.corrections import read_correction
from extract.store.damage import (
    blocks_without_shard,
    damage_named,
    damaged_rows,
    missing_chunks,
    open_errors_named,
)
from extract.store.from_arrays import write_arrays
from extract.store.layout import (
    DROPPED,
    OK,
    PARTIAL,
    PENDING,
    ROW_ARRAYS,
    SCHEMAS,
    Outcomes,
    SyncedFolder,
    as_objects,
    check_ids,
    checksum,
    create_arrays,
    every_chunk,
    is_remote,
    store_attributes,
    zarr_store,
)
from extract.store.objects import network_errors_named
from extract.store.remote import LocalCopy
from extract.store.shards import ShardError, ShardMap, shard_name


def _cached_column(name: str) -> "cached_property[np.ndarray]":
    return cached_property(lambda store: store._column(name))


class FeatureStore:
    """Frame features of N videos, V views, T frames, D channels; `open` one, `create` one, or make
    one `from_arrays`.

    `ids` `splits` `groups` `errors` are str [N] (objects); `labels` int32 [N], an index in
    `classes` or -1; `starts` and `ends` float64 [N] (seconds), NaN for whole files; `status` int8
    [N] (0 pending, 1 ok, 2 partial, 3 failed; 4 more for a row that was taken out because it is no
    longer listed, see `listed`); `num_frames` int32 [N]; `frame_indices` int32 and `timestamps`
    float32 (seconds) [N, V, T]: in the file, also those of a span; `sources` int64 [N, 2], size
    (bytes) and digest of the file, -1 unknown. Per-video arrays are read once, on first use.
    """

    def __init__(self, path: str | Path, group: zarr.Group):
        self.path = str(path)
        self.group = group
        attributes: dict[str, Any] = dict(group.attrs)
        if attributes.get("schema") not in SCHEMAS:
            raise InputError(
                f"{path} has the schema {attributes.get('schema')!r}, which this version does not read; it reads "
                f"{', '.join(SCHEMAS)}; extract into another folder, or use the version that wrote it"
            )
        self.missing_columns = SCHEMAS[attributes["schema"]]
        recorded = attributes.pop("checksum", None)  # stores of older versions have none
        if recorded not in (None, checksum(attributes)):
            raise InputError(f"{path}/zarr.json is damaged: its checksum does not match")
        self.correction = read_correction(self.path)
        self.classes: tuple[str, ...] = tuple(self.correction.get("classes", attributes["classes"]))
        self.provenance: dict[str, Any] = attributes["provenance"]
        features = self.array("features")
        with damage_named(self.path, "features"):
            self.block_size: int = features.shards[0]  # type: ignore[index]
            _, self.num_views, self.frames_per_video, self.dim = features.shape
        self._length: int = self.array("status").shape[0]
        self._sparse = False

    # -- opening and making ------------------------------------------------------------------------------------

    @classmethod
    def open(cls, path: str | Path, *, writable: bool = False) -> "FeatureStore":
        """Open a store (a folder, or a URL that fsspec knows).

        Raises `NoStoreError` if there is none, `InputError` for something else or a damaged one,
        and `RunError` if object storage cannot be reached.
        """
        with network_errors_named(path), open_errors_named(path):
            local = writable and Path(path).is_dir()
            store = SyncedFolder(path) if local else zarr_store(path)
            group = zarr.open_group(store, mode="r+" if writable else "r", zarr_format=3)
            return cls(path, group)

    @classmethod
    def create(
        cls,
        path: str | Path,
        *,
        classes: Sequence[str],
        views: Sequence[str],
        frames: int,
        dim: int,
        block_size: int,
        provenance: dict[str, Any],
        **columns: Sequence[Any] | np.ndarray,
    ) -> "FeatureStore":
        """Make a store with every row pending, `columns` as for `append`.

        A local one appears whole or not at all. Raises `InputError` for ids that are not paths
        below a folder.
        """
        check_ids(columns["ids"])
        if not is_remote(path) and Path(path).exists():
            raise InputError(f"{path} exists already; give another --out or remove it")
        attributes = store_attributes(classes, provenance)
        with nullcontext(path) if is_remote(path) else replacing(path) as partial:
            group = zarr.create_group(zarr_store(partial), zarr_format=3, attributes=attributes)
            create_arrays(group, views, frames=frames, dim=dim, block_size=block_size)
            cls(partial, group).append(**columns)
        return cls.open(path, writable=True)

    @classmethod
    def from_arrays(
        cls,
        path: str | Path,
        features: np.ndarray,
        *,
        lengths: Sequence[int] | np.ndarray,
        labels: Sequence[int] | np.ndarray,
        classes: Sequence[str],
        **columns: Sequence[Any] | np.ndarray | None,
    ) -> "FeatureStore":
        """Make a finished store of features made elsewhere.

        `features` is [N, T, D], or [N, V, T, D] with several views, of any float type (stored as
        float16); `lengths` [N] says how many of its T frames each video really has, the rest is
        padding and masked; `columns` are those of `append`, each optional. Raises `InputError`
        naming the first video with a wrong length, label, a NaN, or a value float16 cannot hold.
        """
        write_arrays(
            cls, path, features, lengths=lengths, labels=labels, classes=classes, **columns
        )
        return cls.open(path)

    # -- what is in it -----------------------------------------------------------------------------------------

    def __len__(self) -> int:
        return self._length

    def __repr__(self) -> str:
        shape = f"{len(self)} videos x {self.num_views} views x {self.frames_per_video} frames x {self.dim}"
        return f"FeatureStore({self.path!r}, {shape}, {len(self.classes)} classes)"

    def array(self, name: str) -> zarr.Array:
        with damage_named(self.path, name):
            return self.group[name]  # type: ignore[return-value]

    def _column(self, name: str) -> np.ndarray:
        if name in self.correction.get("columns", {}):
            dtype = ROW_ARRAYS[name][0]
            return np.array(self.correction["columns"][name], object if dtype is str else dtype)
        if name in self.missing_columns:
            return np.full(
                (self._length, 2) if ROW_ARRAYS[name][1] else self._length, ROW_ARRAYS[name][2]
            )
        with damage_named(self.path, name):
            # A run killed while it appended may have left other arrays longer than `status`.
            column = self.array(name)[: self._length]
            if len(column) != self._length:  # type: ignore[arg-type]
                raise ValueError(f"{len(column)} rows, status has {self._length}")  # type: ignore[arg-type]
        if missing := missing_chunks(self, name):
            raise InputError(
                f"{self.path} is not complete: {name}/{missing[0]} is missing; "
                "copy the store again, or extract into another folder"
            )
        if name == "labels" and FeatureStore.open(self.path).classes != self.classes:
            raise RunError(
                f"{self.path}: its classes were corrected meanwhile; run the same command again"
            )
        return as_objects(column) if column.dtype.kind == "T" else column  # type: ignore

    ids = _cached_column("ids")
    splits = _cached_column("splits")
    groups = _cached_column("groups")
    errors = _cached_column("errors")
    labels = _cached_column("labels")
    starts = _cached_column("starts")
    ends = _cached_column("ends")
    status = _cached_column("status")
    num_frames = _cached_column("num_frames")
    sources = _cached_column("sources")
    frame_indices = _cached_column("frame_indices")
    timestamps = _cached_column("timestamps")

    @cached_property
    def views(self) -> tuple[str, ...]:
        with damage_named(self.path, "views"):
            names = tuple(self.array("views")[:].tolist())  # type: ignore[union-attr]
            if not all(names):
                raise ValueError("a view has no name: its chunk is missing")
            return names

    @property
    def usable(self) -> np.ndarray:
        """Which videos have features and are listed: bool [N]."""
        return (self.status == OK) | (self.status == PARTIAL)

    @property
    def listed(self) -> np.ndarray:
        """False for rows that `extract --drop-unlisted` took out: bool [N]. No reader counts or
        scores them."""
        return self.status < DROPPED

    @property
    def video_shape(self) -> tuple[int, int, int]:
        """V, T, D."""
        return self.num_views, self.frames_per_video, self.dim

    @property
    def video_bytes(self) -> int:
        """Bytes of one video's features."""
        return math.prod(self.video_shape) * 2

    # -- reading features --------------------------------------------------------------------------------------

    @cached_property
    def _shards(self) -> ShardMap:
        # Nothing here may hold the store, or a store that nobody uses would stay mapped.
        folder, copy = self.shard_path(0).parent, None
        if is_remote(self.path):
            copy = LocalCopy(self.path, block_size=self.block_size, video_bytes=self.video_bytes)

        def paths(blocks: list[int]) -> list[Path]:
            names = [shard_name(block) for block in blocks]
            return copy.fetch(names) if copy else [folder / name for name in names]

        # The videos that a shard holds at least: up to the last row of its block that is not
        # pending.
        finished = np.flatnonzero(self.status != PENDING)
        videos = np.zeros(self.num_blocks, int)
        np.maximum.at(videos, finished // self.block_size, finished % self.block_size + 1)
        return ShardMap(
            paths,
            videos,
            block_size=self.block_size,
            video_shape=self.video_shape,
            sparse=self._sparse,
        )

    def disable_readahead(self) -> None:
        """From now on `gather` reads what it is asked for and nothing around it: for a store larger
        than memory.

        By default the kernel reads ahead, often megabytes a frame, which fills the page cache of
        one that fits.
        """
        self._sparse = True
        self.__dict__.pop("_shards", None)

    def gather(
        self, rows: np.ndarray, frames: np.ndarray, view: int | np.ndarray = 0
    ) -> np.ndarray:
        """Frames `frames` (int [n] or [B, n]) of videos `rows` (int [B]) in `view` (one or int
        [B]): float16 [B, n, D].

        Reads memory-mapped shards, a remote store's from a local copy (`remote.LocalCopy`). Failed
        videos give zeros (`mask` is False for them); a pending one is a `RunError`.
        """
        rows, frames = np.asarray(rows), np.atleast_2d(frames)
        pending = self.status[rows] == PENDING
        if pending.any():
            row = int(rows[pending][0])
            name = f"{self.path}: {self.ids[row]} (row {row})"
            raise RunError(f"{name} is not extracted yet; run the extraction to its end")
        blocks = rows // self.block_size
        try:
            self._shards.ensure_mapped(blocks)
        except ShardError as error:
            raise RunError(
                f"{error}; `{command_line('extract.verify', self.path, repair=True)}` marks what is damaged"
            ) from None
        index = (
            blocks[:, None],
            (rows % self.block_size)[:, None],
            np.asarray(view)[..., None],
            frames,
        )
        if self._sparse:
            self._shards.prefetch(*index)
        return self._shards.array[index]

    def mask(self, rows: np.ndarray, frames: np.ndarray, view: int | np.ndarray = 0) -> np.ndarray:
        """Which of these frames are new: bool [B, n], False where an earlier one of the row is the
        same frame.

        A video with fewer frames than asked for has repeats; they must not count twice. Failed
        videos: all False.
        """
        rows, frames = np.asarray(rows), np.atleast_2d(frames)
        indices = self.frame_indices[rows[:, None], np.asarray(view)[..., None], frames]
        same = indices[:, :, None] == indices[:, None, :]
        repeated = np.tril(same, k=-1).any(axis=2)
        return ~repeated & (indices >= 0)

    def read(self, chosen: slice | np.ndarray) -> np.ndarray:
        """All features of videos (rows) through Zarr, remotely too: float16 [n, V, T, D].

        Raises RunError for damaged ones, and for finished ones whose shard is missing.
        """
        rows = np.arange(len(self))[chosen]
        finished = rows[self.status[rows] != PENDING]
        if lost := blocks_without_shard(self.path, np.unique(finished // self.block_size)):
            raise RunError(f"{self.path}: {shard_name(lost[0])} is missing; {self._repair}")
        try:
            with network_errors_named(self.path):
                if isinstance(chosen, slice):
                    return self.array("features")[chosen]  # type: ignore[return-value]
                return self.array("features").oindex[rows]  # type: ignore[return-value]
        except ValueError as error:  # Zarr's, for a checksum that does not match
            raise RunError(f"{self.path} is damaged ({error}); {self._repair}") from None

    @property
    def _repair(self) -> str:
        return f"run `{command_line('extract.verify', self.path, repair=True)}`, then extract again"

    # -- blocks, for the run -----------------------------------------------------------------------------------

    @property
    def num_blocks(self) -> int:
        return -(-len(self) // self.block_size)

    def block_rows(self, block: int) -> np.ndarray:
        """Rows of a block: int [at most block_size]."""
        return np.arange(block * self.block_size, min((block + 1) * self.block_size, len(self)))

    def missing_blocks(self) -> list[int]:
        """Blocks with a row that is still pending."""
        return np.unique(np.flatnonzero(self.status == PENDING) // self.block_size).tolist()

    def shard_path(self, block: int) -> Path:
        return Path(self.path) / "features" / shard_name(block)

    def write_block(self, block: int, features: np.ndarray, rows: np.ndarray | None = None) -> None:
        """Write a block's shard whole: `features` float16 [n, V, T, D] of `rows`, by default all
        that it has.

        Its other rows, finished before, stay as they are byte for byte; RunError where they are
        damaged.
        """
        every = self.block_rows(block)
        rows = every if rows is None else rows
        expected = (len(rows), *self.video_shape)
        if features.shape != expected or features.dtype != np.dtype("<f2"):
            raise ValueError(
                f"block {block}: got {features.dtype} {features.shape}, expected float16 {expected}"
            )
        if len(rows) < len(every):
            others, new = np.setdiff1d(every, rows), features
            features = np.empty((len(every), *new.shape[1:]), "<f2")
            features[rows - every[0]], features[others - every[0]] = new, self.read(others)
        # A dropped all-zero chunk would break the stride that `gather` lives on.
        array = self.array("features").with_config({"write_empty_chunks": True})
        array[every[0] : every[-1] + 1] = features

    def commit(self, *done: Outcomes) -> None:
        """Enter outcomes of videos whose shards are written, of several blocks at the cost of one.

        `status` comes last: a row is finished or pending.
        """
        rows = np.concatenate([part.rows for part in done])
        order = np.argsort(rows)
        for name in ("errors", "num_frames", "frame_indices", "timestamps", "sources", "status"):
            dtype = object if name == "errors" else None
            values = np.concatenate([np.array(part.column(name), dtype) for part in done])
            self._set(name, rows[order], values[order])

    def _set(self, name: str, rows: np.ndarray, values: np.ndarray) -> None:
        if name in self.missing_columns:
            return
        array = every_chunk(self.array(name))
        if len(rows) and rows[-1] - rows[0] + 1 == len(rows):
            array[rows[0] : rows[-1] + 1] = values
        else:
            array.oindex[rows] = values
        self.__dict__.pop(name, None)  # what was read before is out of date

    def set_status(self, rows: np.ndarray, status: int | np.ndarray) -> None:
        """Give rows another status: pending, so that they are done again; dropped; or listed
        again."""
        if len(rows):
            order = np.argsort(rows)
            values = np.broadcast_to(np.asarray(status, "i1"), len(rows))
            self._set("status", rows[order], values[order])

    def append(self, **columns: Sequence[Any] | np.ndarray) -> None:
        """Add pending rows behind the others: `ids`; `labels` `splits` `groups` `starts` `ends` if
        known."""
        check_ids(columns["ids"])
        start, stop = self._length, self._length + len(columns["ids"])
        self.array("features").resize((stop, *self.video_shape))
        # `status` comes last: it tells how many rows there are.
        for name, (dtype, _, fill) in ROW_ARRAYS.items():
            array = every_chunk(self.array(name))
            array.resize((stop, *array.shape[1:]))
            given: Any = fill
            if name in columns:
                given = np.array(columns[name], object if dtype is str else dtype)
            if start < stop:
                array[start:stop] = given
        self._length = stop
        for name in (*ROW_ARRAYS, "_shards"):
            self.__dict__.pop(name, None)

    # -- damage ----------------------------------------------------------------------------------------------------

    def damaged_rows(self, block: int) -> dict[int, str]:
        """Rows of a committed block whose features cannot be trusted, with the reason (reads the
        whole shard)."""
        return damaged_rows(self, block)

    def clean_up(self) -> None:
        """Remove what a killed writer left half-written (files that were never renamed). For the
        holder of the lock."""
        if not is_remote(self.path):
            for leftover in Path(self.path).rglob("*.partial"):
                leftover.unlink(missing_ok=True)
