"""python -m extract.export feats.zarr --to DIR|FILE.h5|npy: features for other people's tools."""

import json
import shutil
import sys
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from extract.cli import InputError, RunError, progress, run_command
from extract.files import make_folder, replacing

if TYPE_CHECKING:
    import numpy as np

    from extract.store import FeatureStore


@dataclass(frozen=True)
class Options:
    """Write the features of every video that was extracted as .npy files, or all of them into one HDF5 file.

    --to npy --out DIR joins the windows of each video: what tools for temporal action detection load (ActionFormer,
    OpenTAD), with a .json beside it that holds the second of each row and ActionFormer's three numbers for it.
    """

    store: Annotated[str, tyro.conf.Positional]
    """The feature store."""
    to: Path
    """A folder (one .npy a row, [views, frames, dim] float16, under the video's own path), a file *.h5, or npy."""
    out: Path | None = None
    """With --to npy: a folder for one [rows, dim] float32 array and its .json a video."""


def main(options: Options) -> int:
    from extract.store import FeatureStore
    from extract.store.summary import human_bytes

    dense = str(options.to) == "npy"
    if dense == (options.out is None):
        raise InputError(
            f"--to {options.to} --out {options.out}: --out names the folder for --to npy, and only for that"
        )
    to = options.out or options.to
    if to.exists() and (to.is_file() or any(to.iterdir())):
        raise InputError(f"{to} is there already and is left as it is; give a new name or remove it")
    store = FeatureStore.open(options.store)
    make_folder(to.parent)
    needed, free = len(store) * store.video_bytes, shutil.disk_usage(to.parent).free
    if dense:
        needed = needed * 2 // store.num_views
    if needed > free:  # said before: HDF5 may crash where a disk becomes full
        raise RunError(f"{to} needs {human_bytes(needed)}, its disk has {human_bytes(free)} free; use another one")
    if dense:
        return _write_dense(store, to)
    write = _write_hdf5 if to.suffix in (".h5", ".hdf5") else _write_npy
    count = write(store, to)
    left_out = len(store) - count
    print(f"{count:,} videos written to {to}" + (f", {left_out:,} failed or pending left out" if left_out else ""))
    return 0


def _read(store: "FeatureStore", rows: "np.ndarray") -> "np.ndarray":
    """Features [n, V, T, D] of rows, checksums checked."""
    try:
        return store.read(rows)
    except ValueError as error:
        words = f"{store.path} is damaged ({error}); run `python -m extract.verify {store.path} --repair`"
        raise RunError(words) from None


def _finished(store: "FeatureStore") -> "Iterator[np.ndarray]":
    """Rows of finished videos, block by block."""
    for block in progress(range(store.num_blocks), unit="block"):
        rows = store.block_rows(block)
        if len(done := rows[(store.status[rows] == 1) | (store.status[rows] == 2)]):
            yield done


def _write_npy(store: "FeatureStore", folder: Path) -> int:
    import numpy as np

    count = 0
    with replacing(folder) as partial:
        partial.mkdir()
        for rows in _finished(store):
            for row, video in zip(rows, _read(store, rows), strict=True):
                # The whole name with its ending: a.mp4 and a.webm are two videos.
                path = partial / f"{store.ids[row]}.npy"
                path.parent.mkdir(parents=True, exist_ok=True)
                np.save(path, video)
                count += 1
    return count


def _write_dense(store: "FeatureStore", folder: Path) -> int:
    import numpy as np

    windows: dict[str, list[int]] = defaultdict(list)
    for row in np.argsort(store.starts, kind="stable").tolist():  # whole files are NaN, which comes last
        windows[store.ids[row] if np.isnan(store.starts[row]) else store.ids[row].rpartition("#")[0]].append(row)
    left_out = {}
    with replacing(folder) as partial:
        partial.mkdir()
        for video, listed in progress(windows.items(), unit="video"):
            rows = np.array([row for row in listed if store.status[row] in (1, 2)])
            try:
                places, record = dense_rows(store, rows)
            except InputError as error:
                left_out[video] = str(error)
                continue
            path = partial / f"{video}.npy"
            path.parent.mkdir(parents=True, exist_ok=True)
            np.save(path, _read(store, rows)[:, 0].reshape(-1, store.dim)[places].astype(np.float32))
            made_by = {"backbone": store.provenance.get("backbone"), "windows": len(rows), "of": len(listed)}
            path.with_suffix(".json").write_text(json.dumps({"video": video, **record, **made_by}, indent=1))
    print(f"{len(windows) - len(left_out):,} videos of {len(store):,} rows written to {folder}")
    for video, why in left_out.items():
        print(f"left out: {video}: {why}")
    return 0


def dense_rows(store: "FeatureStore", rows: "np.ndarray") -> "tuple[np.ndarray, dict[str, Any]]":
    """What of a video's windows `rows` (by start) makes one array at a constant rate: places among their n * T frames.

    With it goes what its users need: `seconds` of each row, and ActionFormer's feat_stride, num_frames and default_fps,
    by which row i is at (i * feat_stride + num_frames / 2) / default_fps seconds; `largest_error` is by how much that
    misses, at most. InputError where there is no such array.
    """
    import numpy as np

    if not len(rows):
        raise InputError("nothing of it was extracted")
    if len(rows) > 1 and np.isnan(store.starts[rows]).any():
        raise InputError("it is there as a whole and in spans; dense features are made of one of them")
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
        nothing = f"there is nothing from {ends[: holes[0] + 1].max():g} to {starts[holes[0] + 1]:g} s"
        raise InputError(f"{nothing}; dense features need windows that follow each other")
    count = max(1, round((min(ends.max(), seconds[-1] + period) - starts[0]) / period))
    wanted = starts[0] + period * (np.arange(count) + 0.5)
    chosen = np.round(np.interp(wanted, seconds, np.arange(len(seconds)))).astype(int)  # the nearest
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


def _write_hdf5(store: "FeatureStore", path: Path) -> int:
    import h5py
    import numpy as np

    rows = np.flatnonzero((store.status == 1) | (store.status == 2))
    with replacing(path) as partial, h5py.File(partial, "w") as file:
        shape = (len(rows), store.num_views, store.frames_per_video, store.dim)
        features = file.create_dataset("features", shape, dtype="f2")
        filled = 0
        for done in _finished(store):
            features[filled : filled + len(done)] = _read(store, done)
            filled += len(done)
        text = h5py.string_dtype()
        for name in ("ids", "splits", "groups"):
            file.create_dataset(name, data=getattr(store, name)[rows].astype(object), dtype=text)
        for name in ("labels", "num_frames", "frame_indices", "timestamps"):
            file.create_dataset(name, data=getattr(store, name)[rows])
        file.create_dataset("classes", data=np.array(store.classes, dtype=object), dtype=text)
        file.create_dataset("views", data=np.array(store.views, dtype=object), dtype=text)
        file.flush()  # closing would keep an error to itself
    return len(rows)


if __name__ == "__main__":
    sys.exit(run_command(main, Options, prog="python -m extract.export"))
