"""The feature store: a Zarr v3 group, one chunk per video, one shard per block of videos. Layout: docs/store-format.md.

Who writes what: workers write whole shards of `features`; the driver alone writes the per-video arrays and commits a
block once its shard is there, `status` last. Every file is written under another name, synced and renamed, and its
folder synced, before the next one. So no two writers share a file, and what a killed run or a power cut leaves is a
store in which some rows still have status 0.
"""

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import zarr

from extract.cli import InputError, RunError
from extract.commands import command_line
from extract.files import replacing
from extract.store.layout import (
    OK,
    PARTIAL,
    PENDING,
    ROW_ARRAYS,
    Rows,
    SyncedFolder,
    check_arrays,
    checksum,
    create_arrays,
    is_remote,
    target,
)
from extract.store.remote import LocalCopy
from extract.store.shards import ShardError, ShardMap, damaged_videos, shard_name

SCHEMAS = ("hgnl-features/1", "hgnl-features/2")  # the second has `starts` and `ends`


def _read_once(name: str) -> "cached_property[np.ndarray]":
    return cached_property(lambda store: store._column(name))


def as_objects(strings: np.ndarray) -> np.ndarray:
    """NumPy's strings of variable length (which scikit-learn and pandas refuse) as str objects, equal ones shared."""
    shared: dict[str, str] = {}
    objects = np.empty(len(strings), object)
    objects[:] = [shared.setdefault(text, text) for text in strings.tolist()]
    return objects


class FeatureStore:
    """Frame features of N videos, V views, T frames, D channels; `open` one, `create` one, or make one `from_arrays`.

    `ids` `splits` `groups` `errors` are str [N] (objects); `labels` int32 [N], an index in `classes` or -1; `starts`
    and `ends` float64 [N] (seconds), NaN for whole files; `status` int8 [N] (0 pending, 1 ok, 2 partial, 3 failed);
    `num_frames` int32 [N]; `frame_indices` int32 and `timestamps` float32 (seconds) [N, V, T]: in the file, also those
    of a span. Per-video arrays are read once, on first use.
    """

    def __init__(self, path: str | Path, group: zarr.Group):
        self.path = str(path)
        self._group = group
        attributes: dict[str, Any] = dict(group.attrs)
        if attributes.get("schema") not in SCHEMAS:
            raise InputError(
                f"{path} is no feature store this version reads: its schema is {attributes.get('schema')!r}, "
                f"expected {' or '.join(SCHEMAS)}; extract into another folder, or use the version that wrote it"
            )
        self._older = () if attributes["schema"] == SCHEMAS[-1] else ("starts", "ends")  # arrays that it lacks
        recorded = attributes.pop("checksum", None)  # stores of older versions have none
        if recorded not in (None, checksum(attributes)):
            raise InputError(f"{path}/zarr.json is damaged: its checksum does not match")
        self.classes: tuple[str, ...] = tuple(attributes["classes"])
        self.provenance: dict[str, Any] = attributes["provenance"]
        features = self._array("features")
        with self._whole("features"):
            self.block_size: int = features.shards[0]  # type: ignore[index]
            _, self.num_views, self.frames_per_video, self.dim = features.shape
        self._length: int = self._array("status").shape[0]
        self._sparse = False

    # -- opening and making ------------------------------------------------------------------------------------

    @classmethod
    def open(cls, path: str | Path, *, writable: bool = False) -> "FeatureStore":
        """Open a store (a folder, or a URL that fsspec knows); `InputError` if there is none or it is another's."""
        place = SyncedFolder(path) if writable and Path(path).is_dir() else target(path)
        try:
            group = zarr.open_group(place, mode="r+" if writable else "r", zarr_format=3)
        except (FileNotFoundError, FileExistsError):  # Zarr's, of a file in the place of a folder
            there = "it is no Zarr group" if Path(str(path)).exists() else "there is nothing"
            create = command_line("extract", videos="FOLDER", out=path)
            raise InputError(f"{path} is not a feature store: {there}; `{create}` creates one") from None
        except (ValueError, TypeError, KeyError) as error:  # of Zarr, which checks little of what it reads
            raise InputError(f"{path}/zarr.json is damaged ({type(error).__name__}: {error!s:.80})") from None
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
        """Make a store with every row pending, `columns` as for `append`; a local one appears whole or not at all."""
        twice = [name for name, times in Counter(columns["ids"]).items() if times > 1]
        if twice:
            raise InputError(f"{len(twice)} ids stand for several videos, the first is {twice[0]!r}")
        if not is_remote(path) and Path(path).exists():
            raise InputError(f"{path} exists already and is no feature store; give another --out or remove it")
        attributes = {"schema": SCHEMAS[-1], "classes": list(classes), "provenance": provenance}
        attributes["checksum"] = checksum(attributes)
        with nullcontext(path) if is_remote(path) else replacing(path) as place:
            group = zarr.create_group(target(place), zarr_format=3, attributes=attributes)
            create_arrays(group, views, frames=frames, dim=dim, block_size=block_size)
            cls(place, group).append(**columns)
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

        `features` is [N, T, D], or [N, V, T, D] with several views, of any float type (stored as float16);
        `lengths` [N] says how many of its T frames each video really has, the rest is padding and masked; `columns` are
        those of `append`, each optional. Raises `InputError` naming the first video with a wrong length, label, a NaN,
        or a value float16 cannot hold.
        """
        features = np.asarray(features)
        features = features[:, None] if features.ndim == 3 else features
        if features.ndim != 4:
            raise InputError(f"features must be [N, T, D] or [N, V, T, D], got shape {features.shape}")
        count, views, frames, dim = features.shape
        made: dict[str, Any] = {"ids": [f"{row:08d}" for row in range(count)], "labels": np.asarray(labels)}
        made |= {name: values for name, values in columns.items() if values is not None}
        lengths = np.asarray(lengths)
        check_arrays(features, {**made, "lengths": lengths}, num_classes=len(classes))
        store = cls.create(
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
            Rows(
                rows=np.arange(count),
                status=np.full(count, OK, "i1"),
                errors=[""] * count,
                num_frames=lengths.astype("<i4"),
                frame_indices=np.broadcast_to(indices[:, None], (count, views, frames)),
                timestamps=np.full((count, views, frames), np.nan, "<f4"),
            )
        )
        return cls.open(path)

    # -- what is in it -----------------------------------------------------------------------------------------

    def __len__(self) -> int:
        return self._length

    def __repr__(self) -> str:
        shape = f"{len(self)} videos x {self.num_views} views x {self.frames_per_video} frames x {self.dim}"
        return f"FeatureStore({self.path!r}, {shape}, {len(self.classes)} classes)"

    def _array(self, name: str) -> zarr.Array:
        with self._whole(name):
            return self._group[name]  # type: ignore[return-value]

    def _column(self, name: str) -> np.ndarray:
        if name in self._older:
            return np.full(self._length, np.nan)
        with self._whole(name):
            # A run killed while it appended may have left other arrays longer than `status`.
            column = self._array(name)[: self._length]
            if len(column) != self._length:  # type: ignore[arg-type]
                raise ValueError(f"{len(column)} rows, status has {self._length}")  # type: ignore[arg-type]
            return as_objects(column) if column.dtype.kind == "T" else column  # type: ignore[return-value,union-attr]

    @contextmanager
    def _whole(self, name: str) -> Iterator[None]:
        """What an array's damage raises in Zarr, NumPy and zstd, as an InputError."""
        try:
            yield
        except (InputError, OSError):
            raise
        except KeyError:
            raise InputError(f"{self.path} is no whole feature store: its array {name!r} is missing") from None
        except Exception as error:
            words = f"its array {name!r} is damaged ({type(error).__name__}: {error!s:.80})"
            raise InputError(f"{self.path}: {words}; copy the store again, or extract into another folder") from None

    ids = _read_once("ids")
    splits = _read_once("splits")
    groups = _read_once("groups")
    errors = _read_once("errors")
    labels = _read_once("labels")
    starts = _read_once("starts")
    ends = _read_once("ends")
    status = _read_once("status")
    num_frames = _read_once("num_frames")
    frame_indices = _read_once("frame_indices")
    timestamps = _read_once("timestamps")

    @cached_property
    def views(self) -> tuple[str, ...]:
        with self._whole("views"):
            return tuple(self._array("views")[:].tolist())  # type: ignore[union-attr]

    @property
    def usable(self) -> np.ndarray:
        """Which videos have features: bool [N]."""
        return (self.status == OK) | (self.status == PARTIAL)

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

        return ShardMap(
            paths,
            self.num_blocks,
            block_size=self.block_size,
            video_shape=self.video_shape,
            sparse=self._sparse,
        )

    def read_sparsely(self) -> None:
        """From now on `gather` reads what it is asked for and nothing around it: for a store larger than memory.

        By default the kernel reads ahead, often megabytes a frame, which fills the page cache of one that fits.
        """
        self._sparse = True
        self.__dict__.pop("_shards", None)

    def gather(self, rows: np.ndarray, frames: np.ndarray, view: int | np.ndarray = 0) -> np.ndarray:
        """Frames `frames` (int [n] or [B, n]) of videos `rows` (int [B]) in `view` (one or int [B]): float16 [B, n, D].

        Reads memory-mapped shards, a remote store's from a local copy (`remote.LocalCopy`). Failed videos give zeros
        (`mask` is False for them); a pending one is a `RunError`.
        """
        rows, frames = np.asarray(rows), np.atleast_2d(frames)
        pending = self.status[rows] == PENDING
        if pending.any():
            row = int(rows[pending][0])
            name = f"{self.path}: {self.ids[row]} (row {row})"
            raise RunError(f"{name} is not extracted yet; run the extraction to its end")
        blocks = rows // self.block_size
        try:
            self._shards.require(blocks)
        except ShardError as error:
            raise RunError(
                f"{error}; `{command_line('extract.verify', self.path, repair=True)}` marks what is damaged"
            ) from None
        index = blocks[:, None], (rows % self.block_size)[:, None], np.asarray(view)[..., None], frames
        if self._sparse:
            self._shards.ask_for(*index)
        return self._shards.array[index]

    def mask(self, rows: np.ndarray, frames: np.ndarray, view: int | np.ndarray = 0) -> np.ndarray:
        """Which of these frames are new: bool [B, n], False where an earlier one of the row is the same frame.

        A video with fewer frames than asked for has repeats; they must not count twice. Failed videos: all False.
        """
        rows, frames = np.asarray(rows), np.atleast_2d(frames)
        indices = self.frame_indices[rows[:, None], np.asarray(view)[..., None], frames]
        same = indices[:, :, None] == indices[:, None, :]
        repeated = np.tril(same, k=-1).any(axis=2)
        return ~repeated & (indices >= 0)

    def read(self, rows: slice | np.ndarray) -> np.ndarray:
        """All features of videos `rows` through Zarr, remotely too: float16 [n, V, T, D]. RunError where damaged."""
        features = self._array("features")
        try:
            return features[rows] if isinstance(rows, slice) else features.oindex[np.asarray(rows)]  # type: ignore[return-value]
        except ValueError as error:  # Zarr's, for a checksum that does not match
            repair = f"run `{command_line('extract.verify', self.path, repair=True)}`, then extract again"
            raise RunError(f"{self.path} is damaged ({error}); {repair}") from None

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
        """Write a block's shard whole: `features` float16 [n, V, T, D] of `rows`, by default all that it has.

        Its other rows, finished before, stay as they are byte for byte; RunError where they are damaged.
        """
        every = self.block_rows(block)
        rows = every if rows is None else rows
        expected = (len(rows), *self.video_shape)
        if features.shape != expected or features.dtype != np.dtype("<f2"):
            raise ValueError(f"block {block}: got {features.dtype} {features.shape}, expected float16 {expected}")
        if len(rows) < len(every):
            others, new = np.setdiff1d(every, rows), features
            features = np.empty((len(every), *new.shape[1:]), "<f2")
            features[rows - every[0]], features[others - every[0]] = new, self.read(others)
        # A dropped all-zero chunk would break the stride that `gather` lives on.
        self._array("features").with_config({"write_empty_chunks": True})[every[0] : every[-1] + 1] = features

    def commit(self, *done: Rows) -> None:
        """Enter outcomes of videos whose shards are written, of several blocks at the cost of one.

        `status` comes last: a row is finished or pending.
        """
        rows = np.concatenate([part.rows for part in done])
        order = np.argsort(rows)
        for name in ("errors", "num_frames", "frame_indices", "timestamps", "status"):
            dtype = object if name == "errors" else None
            values = np.concatenate([np.array(getattr(part, name), dtype) for part in done])
            self._set(name, rows[order], values[order])

    def _set(self, name: str, rows: np.ndarray, values: np.ndarray) -> None:
        array = self._array(name)
        if len(rows) and rows[-1] - rows[0] + 1 == len(rows):
            array[rows[0] : rows[-1] + 1] = values
        else:
            array.oindex[rows] = values
        self.__dict__.pop(name, None)  # what was read before is out of date

    def set_pending(self, rows: np.ndarray) -> None:
        """Put videos back to pending; their block will be done again."""
        if len(rows):
            self._set("status", np.sort(rows), np.full(len(rows), PENDING, "i1"))

    def append(self, **columns: Sequence[Any] | np.ndarray) -> None:
        """Add pending rows behind the others: `ids`, and `labels` `splits` `groups` `starts` `ends` where known."""
        start, stop = self._length, self._length + len(columns["ids"])
        if self._older and not np.isnan(np.array(columns.get("starts", np.nan), float)).all():
            raise InputError(f"{self.path} was made by a version that knew no spans; use another --out for them")
        features = self._array("features")
        features.resize((stop, *features.shape[1:]))
        for name, (dtype, _, _) in ROW_ARRAYS.items():  # in this order: `status` tells how many rows there are
            if name in self._older:
                continue
            array = self._array(name)
            array.resize((stop, *array.shape[1:]))
            if name in columns and start < stop:
                array[start:stop] = np.array(columns[name], dtype=object if dtype is str else dtype)
        self._length = stop
        for name in (*ROW_ARRAYS, "_shards"):
            self.__dict__.pop(name, None)

    def damaged_rows(self, block: int) -> dict[int, str]:
        """Rows of a committed block whose features cannot be trusted, with the reason (reads the whole shard)."""
        rows = self.block_rows(block)
        committed = rows[self.status[rows] != PENDING]
        if not len(committed):
            return {}
        path = self.shard_path(block)
        try:
            places = damaged_videos(path, block_size=self.block_size, video_bytes=self.video_bytes)
        except ShardError as error:
            return {int(row): str(error) for row in committed}
        damaged = np.intersect1d(committed, block * self.block_size + np.array(places, dtype=int))
        return {int(row): f"the checksum in {path.name} does not match" for row in damaged}

    def clean_up(self) -> None:
        """Remove what a killed writer left half-written (files that were never renamed). For the holder of the lock."""
        if not is_remote(self.path):
            for leftover in Path(self.path).rglob("*.partial"):
                leftover.unlink(missing_ok=True)
