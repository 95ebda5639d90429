"""The feature store: a Zarr v3 group, one chunk per video, one shard per block of videos.

Its layout is in docs/store-format.md. Workers write whole shards of `features`. Only the driver
writes the per-video arrays; it commits a block after its shard is written, `status` last. Every
file is written under another name, synced and renamed, and its folder synced, before the next one.
So no two processes write the same file, and after a kill or a power cut the store is valid, with
some rows still pending.
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
from extract.store.damage import damage_as_input_error, missing_chunks, open_errors_as_input_error
from extract.store.from_arrays import check_arrays
from extract.store.layout import (
    DROPPED,
    OK,
    PARTIAL,
    PENDING,
    ROW_ARRAYS,
    SCHEMAS,
    Column,
    Outcomes,
    SyncedFolder,
    as_column,
    as_objects,
    check_ids,
    checksum,
    create_arrays,
    every_chunk,
    store_attributes,
    zarr_store,
)
from extract.store.objects import is_remote, network_errors_as_run_error, object_exists
from extract.store.remote import LocalCopy
from extract.store.shards import ShardError, ShardLayout, ShardMap, shard_name


def _cached_column(name: str) -> "cached_property[np.ndarray]":
    return cached_property(lambda store: store._column(name))


class FeatureStore:
    """Frame features of N videos, V views, T frames and D channels.

    Made by `open`, `create` or `from_arrays`. Per-video arrays are read once, on first use:

        ids, splits, groups, errors   str [N] (objects)
        labels                        int32 [N], an index in `classes`, or -1
        starts, ends                  float64 [N], seconds; NaN for whole files
        status                        int8 [N]: 0 pending, 1 ok, 2 partial, 3 failed; 4 is added for
                                      rows that the list no longer has (see `listed`)
        num_frames                    int32 [N]
        frame_indices, timestamps     int32 and float32 (seconds) [N, V, T], in the whole file
        sources                       int64 [N, 2], size (bytes) and digest of the file; -1 unknown
    """

    def __init__(self, path: str | Path, group: zarr.Group):
        self.path = str(path)
        self.group = group
        attributes: dict[str, Any] = dict(group.attrs)
        if attributes.get("schema") not in SCHEMAS:
            raise InputError(
                f"{path} has the schema {attributes.get('schema')!r}, which this version does not "
                f"read; it reads {', '.join(SCHEMAS)}; extract into another folder, or use the "
                "version that wrote it"
            )
        self.missing_columns = SCHEMAS[attributes["schema"]]
        recorded = attributes.pop("checksum", None)  # stores of older versions have none
        if recorded not in (None, checksum(attributes)):
            raise InputError(f"{path}/zarr.json is damaged: its checksum does not match")
        self.correction = read_correction(self.path)
        self.classes: tuple[str, ...] = tuple(self.correction.get("classes", attributes["classes"]))
        self.provenance: dict[str, Any] = attributes["provenance"]
        features = self.array("features")
        with damage_as_input_error(self.path, "features"):
            self.block_size: int = features.shards[0]  # type: ignore[index]
            _, self.num_views, self.frames_per_video, self.dim = features.shape
        video_shape = self.num_views, self.frames_per_video, self.dim
        self.layout = ShardLayout(self.block_size, video_shape)
        self._length: int = self.array("status").shape[0]
        self._readahead = True

    # -- open and create -----------------------------------------------------------------------

    @classmethod
    def open(cls, path: str | Path, *, writable: bool = False) -> "FeatureStore":
        """Open a store in a folder, or at a URL that fsspec supports.

        Raises NoStoreError if the path does not exist, InputError if it is not a store or the store
        is damaged, and RunError if object storage cannot be reached.
        """
        with network_errors_as_run_error(path), open_errors_as_input_error(path):
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
        **columns: Column,
    ) -> "FeatureStore":
        """Create a store whose rows are all pending; `columns` as for `append`.

        A local store appears whole or not at all. Raises InputError for ids that are not paths
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
        lengths: Column,
        labels: Column,
        classes: Sequence[str],
        **columns: Column | None,
    ) -> "FeatureStore":
        """Create a finished store of features that were computed elsewhere.

        Args:
            features: [N, T, D], or [N, V, T, D] with several views, of any float type; stored as
                float16.
            lengths: how many of the T frames of each video are real, [N]. The others are padding
                and masked.
            columns: as for `append`, each optional.

        Raises InputError naming the first video with a wrong length or label, a NaN, or a value
        that float16 cannot hold.
        """
        features, checked = check_arrays(
            features, classes=classes, lengths=lengths, labels=labels, **columns
        )
        count, views, frames, dim = features.shape
        real_frames = checked.pop("lengths")
        store = cls.create(
            path,
            classes=classes,
            views=["center", *(f"view_{view}" for view in range(1, views))],
            frames=frames,
            dim=dim,
            block_size=64,
            provenance={"source": "FeatureStore.from_arrays"},
            **checked,
        )
        for block in range(store.num_blocks):
            store.write_block(block, features[store.block_rows(block)].astype("<f2"))
        # Padding repeats the index of the last real frame, so that `mask` hides it.
        indices = np.minimum(np.arange(frames), real_frames[:, None] - 1)
        outcomes = Outcomes.failed(np.arange(count), "", views, frames)
        outcomes.status[:], outcomes.num_frames[:] = OK, real_frames
        outcomes.frame_indices[:] = indices[:, None]
        store.commit(outcomes)
        return cls.open(path)

    # -- contents ------------------------------------------------------------------------------

    def __len__(self) -> int:
        return self._length

    def __repr__(self) -> str:
        views, frames, dim = self.video_shape
        shape = f"{len(self)} videos x {views} views x {frames} frames x {dim}"
        return f"FeatureStore({self.path!r}, {shape}, {len(self.classes)} classes)"

    def array(self, name: str) -> zarr.Array:
        with damage_as_input_error(self.path, name):
            return self.group[name]  # type: ignore[return-value]

    def _column(self, name: str) -> np.ndarray:
        if name in self.correction.get("columns", {}):
            return as_column(name, self.correction["columns"][name])
        if name in self.missing_columns:
            shape = (self._length, 2) if name == "sources" else self._length
            return np.full(shape, ROW_ARRAYS[name][2])
        with damage_as_input_error(self.path, name):
            # A run killed while it appended may have left other arrays longer than `status`.
            column: Any = self.array(name)[: self._length]
            if len(column) != self._length:
                raise ValueError(f"{len(column)} rows, status has {self._length}")
        if missing := missing_chunks(self, name):
            raise InputError(
                f"{self.path} is not complete: {name}/{missing[0]} is missing; "
                "copy the store again, or extract into another folder"
            )
        if name == "labels" and FeatureStore.open(self.path).classes != self.classes:
            raise RunError(
                f"{self.path}: its classes were corrected meanwhile; run the same command again"
            )
        return as_objects(column) if column.dtype.kind == "T" else column

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
        with damage_as_input_error(self.path, "views"):
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
        """False for rows that `extract --drop-unlisted` took out: bool [N]."""
        return self.status < DROPPED

    @property
    def video_shape(self) -> tuple[int, int, int]:
        """V, T, D."""
        return self.layout.video_shape

    @property
    def video_bytes(self) -> int:
        """Bytes of one video's features."""
        return self.layout.video_bytes

    # -- read features -------------------------------------------------------------------------

    @cached_property
    def _shards(self) -> ShardMap:
        # `paths` must not refer to the store, or the shards would stay mapped after its last use.
        folder, copy = self.shard_path(0).parent, None
        if is_remote(self.path):
            copy = LocalCopy(self.path, self.layout)

        def paths(blocks: list[int]) -> list[Path]:
            names = [shard_name(block) for block in blocks]
            return copy.fetch(names) if copy else [folder / name for name in names]

        # A shard must hold the videos up to the last row of its block that is not pending.
        finished = np.flatnonzero(self.status != PENDING)
        videos = np.zeros(self.num_blocks, int)
        np.maximum.at(videos, finished // self.block_size, finished % self.block_size + 1)
        return ShardMap(self.layout, paths, videos, readahead=self._readahead)

    def disable_readahead(self) -> None:
        """Let `gather` read the pages of its frames only, which suits a store larger than memory.

        By default the kernel reads megabytes around each frame, which soon puts a store that fits
        into the page cache.
        """
        self._readahead = False
        self.__dict__.pop("_shards", None)

    def gather(
        self, rows: np.ndarray, frames: np.ndarray, view: int | np.ndarray = 0
    ) -> np.ndarray:
        """Features of single frames, read from memory-mapped shards.

        Shards of a remote store are copied to a local disk first (`remote.LocalCopy`).

        Args:
            rows: videos, int [B].
            frames: frames of each video, int [n] or [B, n].
            view: one view, or one per video, int [B].

        Returns:
            float16 [B, n, D]; zeros for failed videos, for which `mask` is False.

        Raises RunError for a video that is still pending.
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
            raise RunError(f"{error}; {self._repair}") from None
        videos = rows % self.block_size
        index = blocks[:, None], videos[:, None], np.asarray(view)[..., None], frames
        if not self._readahead:
            self._shards.prefetch(*index)
        return self._shards.array[index]

    def mask(self, rows: np.ndarray, frames: np.ndarray, view: int | np.ndarray = 0) -> np.ndarray:
        """False for a frame that repeats an earlier one of its row, and for failed videos: bool
        [B, n].

        A video with too few frames has repeats, which must not count twice. Arguments as for
        `gather`.
        """
        rows, frames = np.asarray(rows), np.atleast_2d(frames)
        indices = self.frame_indices[rows[:, None], np.asarray(view)[..., None], frames]
        same = indices[:, :, None] == indices[:, None, :]
        repeated = np.tril(same, k=-1).any(axis=2)
        return ~repeated & (indices >= 0)

    def read(self, chosen: slice | np.ndarray) -> np.ndarray:
        """All features of some rows, read by Zarr: float16 [n, V, T, D].

        Raises RunError for damaged features, and for finished rows whose shard is missing.
        """
        rows = np.arange(len(self))[chosen]
        finished = rows[self.status[rows] != PENDING]
        for block in np.unique(finished // self.block_size).tolist():
            if not object_exists(f"{self.path.rstrip('/')}/features/{shard_name(block)}"):
                raise RunError(f"{self.path}: {shard_name(block)} is missing; {self._repair}")
        try:
            with network_errors_as_run_error(self.path):
                if isinstance(chosen, slice):
                    return self.array("features")[chosen]  # type: ignore[return-value]
                return self.array("features").oindex[rows]  # type: ignore[return-value]
        except ValueError as error:  # raised by Zarr if a checksum does not match
            raise RunError(f"{self.path} is damaged ({error}); {self._repair}") from None

    @property
    def _repair(self) -> str:
        return f"run `{command_line('extract.verify', self.path, repair=True)}`, then extract again"

    # -- write blocks --------------------------------------------------------------------------

    @property
    def num_blocks(self) -> int:
        return math.ceil(len(self) / self.block_size)

    def block_rows(self, block: int) -> np.ndarray:
        """The rows of a block: int [block_size], fewer in the last block."""
        return np.arange(block * self.block_size, min((block + 1) * self.block_size, len(self)))

    def missing_blocks(self) -> list[int]:
        """Blocks with a row that is still pending."""
        return np.unique(np.flatnonzero(self.status == PENDING) // self.block_size).tolist()

    def shard_path(self, block: int) -> Path:
        return Path(self.path) / "features" / shard_name(block)

    def write_block(self, block: int, features: np.ndarray, rows: np.ndarray | None = None) -> None:
        """Write the shard of a block: `features` float16 [n, V, T, D] of `rows`, by default of all.

        The bytes of its other rows, finished before, do not change. Raises RunError if they are
        damaged.
        """
        block_rows = self.block_rows(block)
        rows = block_rows if rows is None else rows
        expected = (len(rows), *self.video_shape)
        if features.shape != expected or features.dtype != np.dtype("<f2"):
            raise ValueError(
                f"block {block}: got {features.dtype} {features.shape}, expected float16 {expected}"
            )
        first, stop = block_rows[0], block_rows[-1] + 1
        if len(rows) < len(block_rows):
            other_rows, new = np.setdiff1d(block_rows, rows), features
            features = np.empty((len(block_rows), *self.video_shape), "<f2")
            features[rows - first] = new
            features[other_rows - first] = self.read(other_rows)
        # Zarr drops chunks of zeros by default, which would break the constant stride of videos.
        every_chunk(self.array("features"))[first:stop] = features

    def commit(self, *blocks: Outcomes) -> None:
        """Write the outcomes of blocks whose shards are written, all in one pass over the arrays.

        `status` is written last, so that a row is either finished or pending.
        """
        rows = np.concatenate([block.rows for block in blocks])
        for name in ("errors", "num_frames", "frame_indices", "timestamps", "sources", "status"):
            self._set(name, rows, np.concatenate([block.column(name) for block in blocks]))

    def _set(self, name: str, rows: np.ndarray, values: np.ndarray) -> None:
        if name in self.missing_columns or not len(rows):
            return
        order = np.argsort(rows)
        rows, values = rows[order], values[order]
        array = every_chunk(self.array(name))
        if rows[-1] - rows[0] + 1 == len(rows):
            array[rows[0] : rows[-1] + 1] = values
        else:
            array.oindex[rows] = values
        self.__dict__.pop(name, None)  # the cached column

    def set_status(self, rows: np.ndarray, status: int | np.ndarray) -> None:
        """Change the status of rows, for example to pending so that they are extracted again."""
        self._set("status", rows, np.broadcast_to(np.asarray(status, "i1"), len(rows)))

    def append(self, **columns: Column) -> None:
        """Add pending rows at the end.

        columns: `ids`, and optionally `labels`, `splits`, `groups`, `starts` and `ends`.
        """
        check_ids(columns["ids"])
        start, stop = self._length, self._length + len(columns["ids"])
        self.array("features").resize((stop, *self.video_shape))
        # `status` is the last one: its length is the number of rows.
        for name, (_, _, fill) in ROW_ARRAYS.items():
            array = every_chunk(self.array(name))
            array.resize((stop, *array.shape[1:]))
            if start < stop:
                array[start:stop] = as_column(name, columns[name]) if name in columns else fill
        self._length = stop
        for name in (*ROW_ARRAYS, "_shards"):
            self.__dict__.pop(name, None)

    def clean_up(self) -> None:
        """Remove files that killed writers never renamed. The caller must hold the store's lock."""
        if not is_remote(self.path):
            for leftover in Path(self.path).rglob("*.partial"):
                leftover.unlink(missing_ok=True)
