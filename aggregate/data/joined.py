"""Several stores as one: rows joined by id, channels side by side.

    a.zarr   v1 v2 v3   [T = 25, D = 2048]        joined   v2 v3   [T = 25, D = 2048 + 128]
    b.zarr   v3 v2 v4   [T =  1, D =  128]

A store with fewer frames repeats each over its part of the video; one with a single view goes with
every view.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from extract import InputError
from extract.cli import first_few
from extract.store import DROPPED, FAILED, OK, PARTIAL, PENDING, FeatureStore


def open_features(
    paths: str | Sequence[str], *, log: Callable[[str], object] = print
) -> FeatureStore:
    """The store of --features, or several as one, which read alike. InputError for stores that
    cannot be joined."""
    if isinstance(paths, str) or len(paths) == 1:
        return FeatureStore.open(paths if isinstance(paths, str) else paths[0])
    return JoinedStores([FeatureStore.open(path) for path in paths], log=log)


class JoinedStores(FeatureStore):
    """The reading interface of `FeatureStore` over the videos that all of `stores` have, in the
    order of the first.

    `log` gets which videos some of them lack. Labels, splits and groups are those that any store
    has. InputError, naming the first video, if two contradict each other, if no video is in all, or
    if their views do not go together.
    """

    def __init__(
        self, stores: Sequence[FeatureStore], *, log: Callable[[str], object] = print
    ) -> None:
        self.stores = stores  # which are only read; nothing of this one is on the disk
        self.path = " + ".join(store.path for store in stores)
        if len({store.path.rstrip("/") for store in stores}) < len(stores):
            raise InputError(f"--features names a store twice: {self.path}")
        self.ids, self._rows = _common_rows(stores, self.path, log)
        self.classes, self.labels = self._join_labels()
        self.splits, self.groups = self._join_texts("splits"), self._join_texts("groups")
        self.views, self._views = _common_views(stores)
        self.frames_per_video = max(store.frames_per_video for store in stores)
        # Slot k of the joined video is the slot that its middle falls into.
        middles = 2 * np.arange(self.frames_per_video) + 1
        self._slots = [
            middles * store.frames_per_video // (2 * self.frames_per_video) for store in stores
        ]
        self.num_views, self._length = len(self.views), len(self.ids)
        self.dim = sum(store.dim for store in stores)
        self.provenance: dict[str, Any] = {
            "backbone": " + ".join(str(store.provenance.get("backbone")) for store in stores),
            "joined": [store.provenance for store in stores],
        }

    def __repr__(self) -> str:
        widths = " + ".join(str(store.dim) for store in self.stores)
        shape = f"{len(self)} videos x {self.num_views} views x {self.frames_per_video} frames x ({widths})"
        return f"JoinedStores({self.path!r}, {shape}, {len(self.classes)} classes)"

    # -- columns -------------------------------------------------------------------------------------------------------

    def _join_labels(self) -> tuple[tuple[str, ...], np.ndarray]:
        names = [np.array([*store.classes, ""], object)[store.labels] for store in self.stores]
        joined = self._agreed(
            "label", [values[rows] for values, rows in zip(names, self._rows, strict=True)]
        )
        classes = list(self.stores[0].classes)
        classes += sorted(set(joined.tolist()) - {"", *classes})
        index = {name: label for label, name in enumerate(classes)} | {"": -1}
        return tuple(classes), np.array([index[name] for name in joined], "<i4")

    def _join_texts(self, column: str) -> np.ndarray:
        values = [
            getattr(store, column)[rows]
            for store, rows in zip(self.stores, self._rows, strict=True)
        ]
        return self._agreed(column.removesuffix("s"), values)

    def _agreed(self, what: str, columns: list[np.ndarray]) -> np.ndarray:
        """For each video the value of the first store that has any. InputError if another store has
        another one."""
        joined = columns[0]
        for store, values in zip(self.stores[1:], columns[1:], strict=True):
            clash = np.flatnonzero((joined != "") & (values != "") & (joined != values))
            if len(clash):
                row = int(clash[0])
                raise InputError(
                    f"{self.path}: {len(clash):,} videos have another {what} in {store.path}; the first, "
                    f"{self.ids[row]}, is {joined[row]!r} and {values[row]!r}; correct one list and continue its store"
                )
            joined = np.where(joined == "", values, joined)
        return joined

    def _columns(self, name: str) -> list[np.ndarray]:
        return [
            getattr(store, name)[rows] for store, rows in zip(self.stores, self._rows, strict=True)
        ]

    @property
    def usable(self) -> np.ndarray:
        """Which videos have features in every store: bool [N]."""
        return np.all(self._columns("usable"), axis=0)

    def _column(self, name: str) -> np.ndarray:
        """A per-video array that is read when it is first asked for.

        `num_frames` is the most that a store with the most frames per video says: if that is
        enough, no joined frame repeats. `frame_indices` and `timestamps` are those of such a store;
        `mask` looks at all.
        """
        columns = self._columns(name)
        longest = [
            place
            for place, store in enumerate(self.stores)
            if store.frames_per_video == self.frames_per_video
        ]
        if name == "status":
            partial = np.where(
                np.any([column == PARTIAL for column in columns], axis=0), PARTIAL, OK
            )
            broken = np.where(
                np.any([column == PENDING for column in columns], axis=0), PENDING, FAILED
            )
            dropped = np.any([column >= DROPPED for column in columns], axis=0)
            return np.where(self.usable, partial, np.where(dropped, DROPPED + OK, broken)).astype(
                "i1"
            )
        if name == "num_frames":
            return np.max([columns[place] for place in longest], axis=0)
        if name in ("frame_indices", "timestamps"):
            return columns[longest[0]][:, self._views[longest[0]]]
        if name == "errors":
            return np.array(
                ["; ".join(filter(None, texts)) for texts in zip(*columns, strict=True)], object
            )
        return columns[0] if columns[0].ndim == 1 else np.concatenate(columns, axis=1)

    # -- features ------------------------------------------------------------------------------------------------------

    def disable_readahead(self) -> None:
        for store in self.stores:
            store.disable_readahead()

    def _each(
        self, read: Callable[..., np.ndarray], rows: Any, frames: Any, view: Any
    ) -> list[np.ndarray]:
        """`read(store, rows, frames, view)` of each store, in its own rows, slots and views."""
        parts = zip(self.stores, self._rows, self._slots, self._views, strict=True)
        return [
            read(
                store, own[np.asarray(rows)], slots[np.atleast_2d(frames)], views[np.asarray(view)]
            )
            for store, own, slots, views in parts
        ]

    def gather(
        self, rows: np.ndarray, frames: np.ndarray, view: int | np.ndarray = 0
    ) -> np.ndarray:
        """As `FeatureStore.gather`: float16 [B, n, D]. A video that failed in one store is zeros in
        all."""
        features = np.concatenate(self._each(FeatureStore.gather, rows, frames, view), axis=-1)
        features[~self.usable[rows]] = 0
        return features

    def mask(self, rows: np.ndarray, frames: np.ndarray, view: int | np.ndarray = 0) -> np.ndarray:
        """As `FeatureStore.mask`: a frame repeats an earlier one if it does in every store."""

        def indices(
            store: FeatureStore, rows: np.ndarray, frames: np.ndarray, view: np.ndarray
        ) -> np.ndarray:
            return store.frame_indices[rows[:, None], view[..., None], frames]

        parts = self._each(indices, rows, frames, view)
        same = np.all([part[:, :, None] == part[:, None, :] for part in parts], axis=0)
        return ~np.tril(same, k=-1).any(axis=2) & np.all([part >= 0 for part in parts], axis=0)

    def read(self, rows: slice | np.ndarray) -> np.ndarray:
        """All features of videos `rows`: float16 [n, V, T, D]."""
        parts = []
        for store, own, slots, views in zip(
            self.stores, self._rows, self._slots, self._views, strict=True
        ):
            parts.append(store.read(own[rows])[:, views][:, :, slots])
        return np.concatenate(parts, axis=-1)


def _common_rows(
    stores: Sequence[FeatureStore], path: str, log: Callable[[str], object]
) -> tuple[np.ndarray, list[np.ndarray]]:
    """Ids of the videos that are in all stores, and their rows in each. Logs what some of them
    lack."""
    by_id = [{video_id: row for row, video_id in enumerate(store.ids.tolist())} for store in stores]
    common = [video_id for video_id in by_id[0] if all(video_id in rows for rows in by_id[1:])]
    if not common:
        firsts = " and ".join(
            f"{first_few(list(rows), 1)} in {s.path}" for s, rows in zip(stores, by_id, strict=True)
        )
        raise InputError(
            f"{path}: no video is in all of these stores ({firsts}); ids must be equal to be joined"
        )
    every = dict.fromkeys(video_id for rows in by_id for video_id in rows)
    for store, rows in zip(stores, by_id, strict=True):
        if lacking := [video_id for video_id in every if video_id not in rows]:
            log(f"left out  {len(lacking):,} videos that {store.path} lacks ({first_few(lacking)})")
    return np.array(common, object), [
        np.array([rows[video_id] for video_id in common]) for rows in by_id
    ]


def _common_views(stores: Sequence[FeatureStore]) -> tuple[tuple[str, ...], list[np.ndarray]]:
    """Names of the joined views, and the view of each store that each of them is."""
    several = [store for store in stores if store.num_views > 1] or stores[:1]
    names = tuple(
        name for name in several[0].views if all(name in store.views for store in several)
    )
    if not names:
        views = "; ".join(f"{store.path} has {', '.join(store.views)}" for store in several)
        raise InputError(
            f"no view is in all of these stores: {views}; extract with the same --crops"
        )
    chosen = [
        [0] * len(names) if s.num_views == 1 else [s.views.index(name) for name in names]
        for s in stores
    ]
    return names, [np.array(views) for views in chosen]
