"""Several stores as one: rows joined by id, channels concatenated.

    a.zarr   v1 v2 v3   [T = 25, D = 2048]        joined   v2 v3   [T = 25, D = 2048 + 128]
    b.zarr   v3 v2 v4   [T =  1, D =  128]

If a store has fewer frames than another, each of its frames is repeated over its part of the video.
If a store has one view, that view is joined to every view of the others.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from extract import InputError, Record
from extract.cli import counted, first_few
from extract.store import DROPPED, FAILED, OK, PARTIAL, PENDING, FeatureStore


def open_features(
    paths: str | Sequence[str], *, log: Callable[[str], object] = print
) -> FeatureStore:
    """Open the store of --features, or several as one. InputError if they cannot be joined."""
    if isinstance(paths, str):
        paths = [paths]
    stores = [FeatureStore.open(path) for path in paths]
    return stores[0] if len(stores) == 1 else JoinedStores(stores, log=log)


class JoinedStores(FeatureStore):
    """The reading interface of `FeatureStore` for the videos in all of `stores`.

    Rows are in the order of the first store. A label, split or group comes from any store that has
    it. `log` is called with a text about the videos that some store lacks. Raises InputError naming
    the first video if two stores contradict each other, if no video is in all of them, or if their
    views do not fit together.
    """

    def __init__(
        self, stores: Sequence[FeatureStore], *, log: Callable[[str], object] = print
    ) -> None:
        self.stores = stores
        self.path = " + ".join(store.path for store in stores)
        if len({store.path.rstrip("/") for store in stores}) < len(stores):
            raise InputError(f"--features names a store twice: {self.path}")
        self.ids, self._rows = _common_rows(stores, self.path, log)
        self.classes, self.labels = self._join_labels()
        self.splits = self._join_values("split", self._columns("splits"))
        self.groups = self._join_values("group", self._columns("groups"))
        self.views, self._views = _common_views(stores)
        self.frames_per_video = max(store.frames_per_video for store in stores)
        # Slot k of the joined video is the slot that contains its middle.
        middles = 2 * np.arange(self.frames_per_video) + 1
        self._slots = [
            middles * store.frames_per_video // (2 * self.frames_per_video) for store in stores
        ]
        self.num_views, self._length = len(self.views), len(self.ids)
        self.dim = sum(store.dim for store in stores)
        self.provenance: Record = {
            "backbone": " + ".join(str(store.provenance.get("backbone")) for store in stores),
            "joined": [store.provenance for store in stores],
        }

    def __repr__(self) -> str:
        widths = " + ".join(str(store.dim) for store in self.stores)
        shape = (
            f"{len(self)} videos x {self.num_views} views x {self.frames_per_video} frames "
            f"x ({widths})"
        )
        return f"JoinedStores({self.path!r}, {shape}, {len(self.classes)} classes)"

    # -- columns ---------------------------------------------------------------------------------

    def _columns(self, name: str) -> list[np.ndarray]:
        """The column `name` of each store, for the joined rows."""
        pairs = zip(self.stores, self._rows, strict=True)
        return [getattr(store, name)[rows] for store, rows in pairs]

    def _join_labels(self) -> tuple[tuple[str, ...], np.ndarray]:
        pairs = zip(self.stores, self._columns("labels"), strict=True)
        names = [np.array([*store.classes, ""], object)[labels] for store, labels in pairs]
        joined = self._join_values("label", names)
        classes = list(self.stores[0].classes)
        classes += sorted(set(joined.tolist()) - {"", *classes})
        index = {name: label for label, name in enumerate(classes)} | {"": -1}
        return tuple(classes), np.array([index[name] for name in joined], "<i4")

    def _join_values(self, kind: str, columns: list[np.ndarray]) -> np.ndarray:
        """For each video, the value of the first store that has one; InputError if two differ."""
        joined = columns[0]
        for store, values in zip(self.stores[1:], columns[1:], strict=True):
            conflicts = np.flatnonzero((joined != "") & (values != "") & (joined != values))
            if len(conflicts):
                row = int(conflicts[0])
                raise InputError(
                    f"{self.path}: {len(conflicts):,} videos have another {kind} in {store.path}; "
                    f"the first, {self.ids[row]}, is {joined[row]!r} and {values[row]!r}; "
                    "correct one list and continue its store"
                )
            joined = np.where(joined == "", values, joined)
        return joined

    def _column(self, name: str) -> np.ndarray:
        """Read a per-video array, on first use.

        `num_frames` is the largest number among the stores with the most frames per video: with
        that many frames, no joined frame repeats. `frame_indices` and `timestamps` are those of
        such a store, while `mask` uses all stores.
        """
        columns = self._columns(name)
        longest = [
            number
            for number, store in enumerate(self.stores)
            if store.frames_per_video == self.frames_per_video
        ]
        if name == "status":
            statuses = np.stack(columns)
            usable = np.isin(statuses, (OK, PARTIAL)).all(axis=0)
            cases = {
                PARTIAL: usable & (statuses == PARTIAL).any(axis=0),
                OK: usable,
                DROPPED + OK: (statuses >= DROPPED).any(axis=0),
                PENDING: (statuses == PENDING).any(axis=0),
            }
            return np.select(list(cases.values()), list(cases), FAILED).astype("i1")
        if name == "num_frames":
            return np.max([columns[number] for number in longest], axis=0)
        if name in ("frame_indices", "timestamps"):
            return columns[longest[0]][:, self._views[longest[0]]]
        if name == "errors":
            errors = ["; ".join(filter(None, texts)) for texts in zip(*columns, strict=True)]
            return np.array(errors, object)
        return columns[0] if columns[0].ndim == 1 else np.concatenate(columns, axis=1)

    # -- features --------------------------------------------------------------------------------

    def disable_readahead(self) -> None:
        for store in self.stores:
            store.disable_readahead()

    def _in_each(
        self, rows: Any, frames: Any, view: Any
    ) -> "Iterator[tuple[FeatureStore, np.ndarray, np.ndarray, np.ndarray]]":
        """Each store, with its own rows, slots and views."""
        parts = zip(self.stores, self._rows, self._slots, self._views, strict=True)
        for store, own, slots, views in parts:
            yield (
                store,
                own[np.asarray(rows)],
                slots[np.atleast_2d(frames)],
                views[np.asarray(view)],
            )

    def gather(
        self, rows: np.ndarray, frames: np.ndarray, view: int | np.ndarray = 0
    ) -> np.ndarray:
        """As `FeatureStore.gather`: float16 [B, n, D], zeros for a video that failed in a store."""
        parts = [store.gather(*index) for store, *index in self._in_each(rows, frames, view)]
        features = np.concatenate(parts, axis=-1)
        features[~self.usable[rows]] = 0
        return features

    def mask(self, rows: np.ndarray, frames: np.ndarray, view: int | np.ndarray = 0) -> np.ndarray:
        """As `FeatureStore.mask`: a frame is a repeat if it is one in every store."""
        parts = [
            store.frame_indices[own[:, None], views[..., None], slots]
            for store, own, slots, views in self._in_each(rows, frames, view)
        ]
        same = np.all([part[:, :, None] == part[:, None, :] for part in parts], axis=0)
        return ~np.tril(same, k=-1).any(axis=2) & np.all([part >= 0 for part in parts], axis=0)

    def read(self, rows: slice | np.ndarray) -> np.ndarray:
        """All features of videos `rows`: float16 [n, V, T, D]."""
        parts = zip(self.stores, self._rows, self._slots, self._views, strict=True)
        return np.concatenate(
            [store.read(own[rows])[:, views][:, :, slots] for store, own, slots, views in parts],
            axis=-1,
        )


def _common_rows(
    stores: Sequence[FeatureStore], path: str, log: Callable[[str], object]
) -> tuple[np.ndarray, list[np.ndarray]]:
    """Ids of the videos that are in all stores, and their rows in each. Logs the other videos."""
    import pandas as pd

    indices = [pd.Index(store.ids, dtype=object) for store in stores]
    union = indices[0].append(indices[1:]).unique()
    listed = np.stack([union.isin(index) for index in indices])  # [stores, videos]
    common = union[listed.all(axis=0)]
    if not len(common):
        examples = " and ".join(f"{first_few(store.ids, 1)} in {store.path}" for store in stores)
        raise InputError(
            f"{path}: no video is in all of these stores ({examples}); "
            "ids must be equal to be joined"
        )
    for store, is_listed in zip(stores, listed, strict=True):
        if lacking := union[~is_listed].tolist():
            log(f"left out  {counted(lacking, f'videos that {store.path} lacks')}")
    return common.to_numpy(), [index.get_indexer(common) for index in indices]


def _common_views(stores: Sequence[FeatureStore]) -> tuple[tuple[str, ...], list[np.ndarray]]:
    """Names of the joined views, and for each store the indices of its views."""
    with_views = [store for store in stores if store.num_views > 1] or stores[:1]
    names = tuple(
        name for name in with_views[0].views if all(name in store.views for store in with_views)
    )
    if not names:
        views = "; ".join(f"{store.path} has {', '.join(store.views)}" for store in with_views)
        raise InputError(
            f"no view is in all of these stores: {views}; extract with the same --crops"
        )
    chosen = [
        [0] * len(names) if store.num_views == 1 else [store.views.index(name) for name in names]
        for store in stores
    ]
    return names, [np.array(views) for views in chosen]
