"""python -m extract.export feats.zarr --to DIR|FILE.h5|npy: export features for other tools."""

import json
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from extract import InputError
from extract.cli import progress, run_as_script
from extract.durable import make_folder, replacing
from extract.sources import file_of

if TYPE_CHECKING:
    import numpy as np

    from extract.store import FeatureStore


@dataclass(frozen=True)
class Options:
    """Write the features of every video that was extracted as .npy files, or all of them into one
    HDF5 file.

    --to npy --out DIR joins the windows of each video, as tools for temporal action detection
    expect (ActionFormer, OpenTAD). A .json next to each array holds the second of each row and
    ActionFormer's three numbers for it.

    --to npy --one-vector --out DIR, or --to FILE.parquet: a mean vector per row with id, label,
    split and group, for scikit-learn, FiftyOne, LightlyStudio; `hgnl ingest` reads both.
    """

    store: Annotated[str, tyro.conf.Positional]
    """The feature store."""
    to: Path
    """A folder (a .npy per row, [views, frames, dim] float16, under the video's own path), *.h5,
    *.parquet, or npy."""
    out: Path | None = None
    """With --to npy: a folder for one [rows, dim] float32 array and its .json per video."""
    one_vector: bool = False
    """With --to npy: DIR/vectors.npy [rows, dim] float32, the mean over frames, and
    DIR/vectors.csv."""


def main(options: Options) -> int:
    from extract.store import FeatureStore
    from extract.store.layout import check_ids
    from extract.store.summary import check_space

    to_npy = str(options.to) == "npy"
    if to_npy == (options.out is None):
        raise InputError(
            f"--to {options.to} --out {options.out}: --out names the folder of --to npy, and only "
            "that"
        )
    if options.one_vector and not to_npy:
        raise InputError(f"--one-vector needs --to npy; --to {options.to} has its own form")
    target = options.out or options.to
    if target.exists() and (target.is_file() or any(target.iterdir())):
        raise InputError(
            f"{target} already exists and is left as it is; give a new name or remove it"
        )
    store = FeatureStore.open(options.store)
    check_ids(store.ids)
    make_folder(target.parent)
    if options.one_vector or target.suffix == ".parquet":
        write = _write_vectors if to_npy else _write_parquet
        video_bytes = 4 * store.dim
    elif to_npy:
        write, video_bytes = _write_dense, 2 * store.video_bytes // store.num_views
    else:
        write = _write_hdf5 if target.suffix in (".h5", ".hdf5") else _write_npy
        video_bytes = store.video_bytes
    check_space(target, len(store) * video_bytes)  # HDF5 may crash on a full disk
    write(store, target)
    if write is not _write_dense:  # which prints its own
        count, pending = int(store.usable.sum()), int((~store.usable).sum())
        left_out = f", {pending:,} failed or pending left out" if pending else ""
        print(f"{count:,} videos written to {target}{left_out}")
    return 0


def _finished(store: "FeatureStore") -> "Iterator[tuple[np.ndarray, np.ndarray]]":
    """Rows of finished videos and their features [n, V, T, D], block by block."""
    usable = store.usable
    for block in progress(range(store.num_blocks), unit="block"):
        rows = store.block_rows(block)
        rows = rows[usable[rows]]
        if len(rows):
            yield rows, store.read(rows)


def _mean_vectors(store: "FeatureStore") -> "Iterator[tuple[np.ndarray, np.ndarray]]":
    """Rows of finished videos and the mean of their frames in the first view, float32 [n, D], block
    by block.

    A frame that a short video repeats counts once.
    """
    import numpy as np

    for rows, features in _finished(store):
        mask = store.mask(rows, np.arange(store.frames_per_video))
        weights = (mask / mask.sum(axis=1, keepdims=True)).astype(np.float32)
        yield rows, np.einsum("btd,bt->bd", features[:, 0].astype(np.float32), weights)


def _fill(array: Any, blocks: "Iterator[tuple[np.ndarray, np.ndarray]]") -> None:
    """Write the values of blocks to an array, one after the other."""
    filled = 0
    for rows, values in blocks:
        array[filled : filled + len(rows)] = values
        filled += len(rows)


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
    import pandas as pd

    usable = np.flatnonzero(store.usable)
    with replacing(folder) as partial:
        partial.mkdir()
        shape = (len(usable), store.dim)
        vectors = np.lib.format.open_memmap(partial / "vectors.npy", "w+", np.dtype("<f4"), shape)
        _fill(vectors, _mean_vectors(store))
        vectors.flush()
        table = pd.DataFrame(_columns_of(store, usable))
        table.to_csv(partial / "vectors.csv", index=False)


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

    rows = np.flatnonzero(store.usable)
    names = ("ids", "splits", "groups", "labels", "num_frames", "frame_indices", "timestamps")
    columns = {name: getattr(store, name)[rows] for name in names}
    columns |= {name: np.array(getattr(store, name), dtype=object) for name in ("classes", "views")}
    with replacing(path) as partial, h5py.File(partial, "w") as file:
        dataset = file.create_dataset("features", (len(rows), *store.video_shape), dtype="f2")
        _fill(dataset, _finished(store))
        for name, values in columns.items():
            text = values.dtype.kind not in "if"
            dtype = h5py.string_dtype() if text else values.dtype
            file.create_dataset(name, data=values.astype(object) if text else values, dtype=dtype)
        file.flush()  # closing alone would not report an error


def _write_dense(store: "FeatureStore", folder: Path) -> None:
    import numpy as np

    rows_of_video: dict[str, list[int]] = defaultdict(list)
    for row in np.argsort(store.starts, kind="stable").tolist():  # NaN of whole files comes last
        rows_of_video[file_of(store.ids[row])].append(row)
    left_out, usable = {}, store.usable
    with replacing(folder) as partial:
        partial.mkdir()
        for video, all_rows in progress(rows_of_video.items(), unit="video"):
            rows = np.array(all_rows)[usable[all_rows]]
            try:
                chosen, record = resample_to_constant_rate(store, rows)
            except InputError as error:
                left_out[video] = str(error)
                continue
            frames = store.read(rows)[:, 0].reshape(-1, store.dim)
            _save(partial / f"{video}.npy", frames[chosen].astype(np.float32))
            record = {
                "video": video,
                **record,
                "backbone": store.provenance.get("backbone"),
                "windows": len(rows),
                "of": len(all_rows),
            }
            (partial / f"{video}.json").write_text(json.dumps(record, indent=1))
    written = len(rows_of_video) - len(left_out)
    print(f"{written:,} videos of {len(store):,} rows written to {folder}")
    for video, reason in left_out.items():
        print(f"left out: {video}: {reason}")


def resample_to_constant_rate(
    store: "FeatureStore", rows: "np.ndarray"
) -> "tuple[np.ndarray, dict[str, Any]]":
    """Choose frames of a video's windows that make one array at a constant rate.

    Args:
        rows: the video's windows, sorted by start.

    Returns:
        indices among the n * T frames of the rows, and what users of the array need: `seconds` of
        each row, and ActionFormer's feat_stride, num_frames and default_fps, by which row i is at
        (i * feat_stride + num_frames / 2) / default_fps seconds. `largest_error` is the largest
        difference between the two.

    Raises:
        InputError: such an array cannot be made, with the reason.
    """
    import numpy as np

    if not len(rows):
        raise InputError("nothing of it was extracted")
    starts, ends = store.starts[rows], store.ends[rows]
    if len(rows) > 1 and np.isnan(starts).any():
        raise InputError("it is listed as a whole and in spans; dense features need one of them")
    times = store.timestamps[rows, 0].ravel().astype(float)
    if np.isnan(times).any():
        raise InputError("its frames have no times")
    # A frame in two windows, or one that a short window repeats, is taken once.
    _, distinct = np.unique(store.frame_indices[rows, 0].ravel(), return_index=True)
    seconds = times[distinct]
    if np.isnan(starts[0]):  # a whole file: its frames are the middles of equal parts
        period = (seconds[-1] - seconds[0]) / max(len(seconds) - 1, 1) or 1.0
        starts, ends = seconds[:1] - period / 2, seconds[-1:] + period / 2
    else:
        period = float(np.median(ends - starts)) / store.frames_per_video
    last_end = np.maximum.accumulate(ends)
    holes = np.flatnonzero(starts[1:] > last_end[:-1] + period)
    if len(holes):
        raise InputError(
            f"there is nothing from {last_end[holes[0]]:g} to {starts[holes[0] + 1]:g} s; "
            "dense features need windows that follow each other"
        )
    count = max(1, round((min(ends.max(), seconds[-1] + period) - starts[0]) / period))
    grid = starts[0] + period * (np.arange(count) + 0.5)
    nearest = np.round(np.interp(grid, seconds, np.arange(len(seconds)))).astype(int)
    fps = float(store.num_frames[rows].sum() / (ends - starts).sum())
    record = {
        "seconds": np.round(seconds[nearest], 6).tolist(),
        "frames_a_second": 1 / period,
        "feat_stride": period * fps,
        "num_frames": 2 * float(grid[0]) * fps,
        "default_fps": fps,
        "largest_error": float(np.abs(seconds[nearest] - grid).max()),
    }
    return distinct[nearest], record


if __name__ == "__main__":
    run_as_script()
