"""python -m extract.export feats.zarr --to DIR|FILE.h5|npy: features for other people's tools."""

import csv
import json
import sys
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from extract import InputError
from extract.cli import progress, run_command
from extract.durable import make_folder, replacing

if TYPE_CHECKING:
    import numpy as np

    from extract.store import FeatureStore


@dataclass(frozen=True)
class Options:
    """Write the features of every video that was extracted as .npy files, or all of them into one
    HDF5 file.

    --to npy --out DIR joins the windows of each video: what tools for temporal action detection
    load (ActionFormer, OpenTAD), with a .json beside it that holds the second of each row and
    ActionFormer's three numbers for it.

    --to npy --one-vector --out DIR, or --to FILE.parquet: a mean vector per row with id, label,
    split and group, for scikit-learn, FiftyOne, LightlyStudio; `hgnl ingest` reads both.
    """

    store: Annotated[str, tyro.conf.Positional]
    """The feature store."""
    to: Path
    """A folder (one .npy a row, [views, frames, dim] float16, under the video's own path), *.h5,
    *.parquet, or npy."""
    out: Path | None = None
    """With --to npy: a folder for one [rows, dim] float32 array and its .json a video."""
    one_vector: bool = False
    """With --to npy: DIR/vectors.npy [rows, dim] float32, the mean over frames, and
    DIR/vectors.csv."""


def main(options: Options) -> int:
    from extract.store import FeatureStore
    from extract.store.layout import check_ids
    from extract.store.summary import check_space

    dense = str(options.to) == "npy"
    if dense == (options.out is None):
        raise InputError(
            f"--to {options.to} --out {options.out}: --out names --to npy's folder, and only that"
        )
    to = options.out or options.to
    one_vector = options.one_vector or to.suffix == ".parquet"
    if options.one_vector and not dense:
        raise InputError(f"--one-vector is that of --to npy; --to {options.to} has its own form")
    if to.exists() and (to.is_file() or any(to.iterdir())):
        raise InputError(
            f"{to} is there already and is left as it is; give a new name or remove it"
        )
    store = FeatureStore.open(options.store)
    check_ids(store.ids)
    make_folder(to.parent)
    needed = len(store) * store.video_bytes
    needed = needed * 2 // store.num_views if dense else needed
    check_space(
        to, len(store) * store.dim * 4 if one_vector else needed
    )  # HDF5 may crash on a full disk
    if one_vector:
        (_write_vectors if dense else _write_parquet)(store, to)
    elif dense:
        return _write_dense(store, to)
    else:
        (_write_hdf5 if to.suffix in (".h5", ".hdf5") else _write_npy)(store, to)
    count = int(store.usable.sum())
    left_out = f", {len(store) - count:,} failed or pending left out" if count < len(store) else ""
    print(f"{count:,} videos written to {to}{left_out}")
    return 0


def _finished(store: "FeatureStore") -> "Iterator[tuple[np.ndarray, np.ndarray]]":
    """Rows of finished videos and their features [n, V, T, D], block by block."""
    usable = store.usable
    for block in progress(range(store.num_blocks), unit="block"):
        rows = store.block_rows(block)
        if usable[rows].any():
            yield rows[usable[rows]], store.read(rows[usable[rows]])


def _mean_vectors(store: "FeatureStore") -> "Iterator[tuple[np.ndarray, np.ndarray]]":
    """Rows of finished videos, and the mean over their frames in the first view, float32 [n, D],
    block by block.

    A frame that a short video repeats counts once.
    """
    import numpy as np

    for rows, features in _finished(store):
        mask = store.mask(rows, np.arange(store.frames_per_video))
        weights = (mask / mask.sum(axis=1, keepdims=True)).astype(np.float32)
        yield rows, np.einsum("btd,bt->bd", features[:, 0].astype(np.float32), weights)


def _columns_of(store: "FeatureStore", rows: "np.ndarray") -> dict[str, list[str]]:
    names = [*store.classes, ""]
    return {
        "id": store.ids[rows].tolist(),
        "label": [names[label] for label in store.labels[rows]],
        "split": store.splits[rows].tolist(),
        "group": store.groups[rows].tolist(),
    }


def _write_vectors(store: "FeatureStore", folder: Path) -> None:
    import numpy as np

    filled, usable = 0, np.flatnonzero(store.usable)
    with replacing(folder) as partial:
        partial.mkdir()
        shape = (len(usable), store.dim)
        vectors = np.lib.format.open_memmap(partial / "vectors.npy", "w+", np.dtype("<f4"), shape)
        for rows, means in _mean_vectors(store):
            vectors[filled : filled + len(rows)] = means
            filled += len(rows)
        vectors.flush()
        columns = _columns_of(store, usable)
        with (partial / "vectors.csv").open("w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerows([list(columns), *zip(*columns.values(), strict=True)])


def _write_parquet(store: "FeatureStore", path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    vector = pa.list_(pa.float32(), store.dim)
    texts = [(name, pa.string()) for name in ("id", "label", "split", "group")]
    schema = pa.schema([*texts, ("features", vector)])
    with replacing(path) as partial, pq.ParquetWriter(partial, schema) as writer:
        for rows, means in _mean_vectors(store):
            features = pa.FixedSizeListArray.from_arrays(pa.array(means.ravel()), type=vector)
            writer.write_table(pa.table({**_columns_of(store, rows), "features": features}, schema))


def _save(path: Path, array: "np.ndarray") -> None:
    import numpy as np

    path.parent.mkdir(parents=True, exist_ok=True)
    np.save(path, array)


def _write_npy(store: "FeatureStore", folder: Path) -> None:
    with replacing(folder) as partial:
        partial.mkdir()
        for rows, features in _finished(store):
            for row, video in zip(rows, features, strict=True):
                # The whole name with its ending: a.mp4 and a.webm are two videos.
                _save(partial / f"{store.ids[row]}.npy", video)


def _write_hdf5(store: "FeatureStore", path: Path) -> None:
    import h5py
    import numpy as np

    rows, filled = np.flatnonzero(store.usable), 0
    names = ("ids", "splits", "groups", "labels", "num_frames", "frame_indices", "timestamps")
    columns = {name: getattr(store, name)[rows] for name in names}
    columns |= {name: np.array(getattr(store, name), dtype=object) for name in ("classes", "views")}
    with replacing(path) as partial, h5py.File(partial, "w") as file:
        file.create_dataset("features", (len(rows), *store.video_shape), dtype="f2")
        for done, features in _finished(store):
            file["features"][filled : filled + len(done)] = features
            filled += len(done)
        for name, values in columns.items():
            text = values.dtype.kind not in "if"
            dtype = h5py.string_dtype() if text else values.dtype
            file.create_dataset(name, data=values.astype(object) if text else values, dtype=dtype)
        file.flush()  # closing would keep an error to itself


def _write_dense(store: "FeatureStore", folder: Path) -> int:
    import numpy as np

    windows: dict[str, list[int]] = defaultdict(list)
    for row in np.argsort(
        store.starts, kind="stable"
    ).tolist():  # whole files are NaN, which comes last
        windows[
            store.ids[row] if np.isnan(store.starts[row]) else store.ids[row].rpartition("#")[0]
        ].append(row)
    left_out, usable = {}, store.usable
    with replacing(folder) as partial:
        partial.mkdir()
        for video, listed in progress(windows.items(), unit="video"):
            rows = np.array([row for row in listed if usable[row]])
            try:
                places, record = dense_rows(store, rows)
            except InputError as error:
                left_out[video] = str(error)
                continue
            frames = store.read(rows)[:, 0].reshape(-1, store.dim)
            _save(partial / f"{video}.npy", frames[places].astype(np.float32))
            made_by = {
                "backbone": store.provenance.get("backbone"),
                "windows": len(rows),
                "of": len(listed),
            }
            (partial / f"{video}.json").write_text(
                json.dumps({"video": video, **record, **made_by}, indent=1)
            )
    print(f"{len(windows) - len(left_out):,} videos of {len(store):,} rows written to {folder}")
    for video, why in left_out.items():
        print(f"left out: {video}: {why}")
    return 0


def dense_rows(store: "FeatureStore", rows: "np.ndarray") -> "tuple[np.ndarray, dict[str, Any]]":
    """What of a video's windows `rows` (by start) makes one array at a constant rate: places among
    their n * T frames.

    With it goes what its users need: `seconds` of each row, and ActionFormer's feat_stride,
    num_frames and default_fps, by which row i is at (i * feat_stride + num_frames / 2) /
    default_fps seconds; `largest_error` is by how much that misses, at most. InputError where there
    is no such array.
    """
    import numpy as np

    if not len(rows):
        raise InputError("nothing of it was extracted")
    if len(rows) > 1 and np.isnan(store.starts[rows]).any():
        raise InputError(
            "it is there as a whole and in spans; dense features are made of one of them"
        )
    times = store.timestamps[rows, 0].ravel().astype(float)
    _, first = np.unique(store.frame_indices[rows, 0].ravel(), return_index=True)
    if np.isnan(times).any():
        raise InputError("its frames have no times")
    starts, ends, seconds = store.starts[rows], store.ends[rows], times[first]
    if np.isnan(starts[0]):  # a whole file: the middles of equal parts
        period = (seconds[-1] - seconds[0]) / max(len(seconds) - 1, 1) or 1.0
        starts, ends = seconds[:1] - period / 2, seconds[-1:] + period / 2
    else:
        period = float(np.median(ends - starts)) / store.frames_per_video
    holes = np.flatnonzero(starts[1:] > np.maximum.accumulate(ends)[:-1] + period)
    if len(holes):
        nothing = (
            f"there is nothing from {ends[: holes[0] + 1].max():g} to {starts[holes[0] + 1]:g} s"
        )
        raise InputError(f"{nothing}; dense features need windows that follow each other")
    count = max(1, round((min(ends.max(), seconds[-1] + period) - starts[0]) / period))
    wanted = starts[0] + period * (np.arange(count) + 0.5)
    chosen = np.round(np.interp(wanted, seconds, np.arange(len(seconds)))).astype(
        int
    )  # the nearest
    fps = float(store.num_frames[rows].sum() / (ends - starts).sum())
    record = {
        "seconds": np.round(seconds[chosen], 6).tolist(),
        "frames_a_second": 1 / period,
        "feat_stride": period * fps,
        "num_frames": 2 * float(wanted[0]) * fps,
        "default_fps": fps,
        "largest_error": float(np.abs(seconds[chosen] - wanted).max()),
    }
    return first[chosen], record


if __name__ == "__main__":
    sys.exit(run_command(main, Options, prog="python -m extract.export"))
