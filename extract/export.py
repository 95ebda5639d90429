"""python -m extract.export feats.zarr --to DIR|FILE.h5: features for other people's tools."""

import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from extract.cli import InputError, RunError, run_command
from extract.files import make_folder, replacing

if TYPE_CHECKING:
    from extract.store import FeatureStore


@dataclass(frozen=True)
class Options:
    """Write the features of every video that was extracted as .npy files, or all of them into one HDF5 file."""

    store: Annotated[str, tyro.conf.Positional]
    """The feature store."""
    to: Path
    """A folder (one .npy a video, [views, frames, dim] float16, under the video's own path), or a file named *.h5."""


def main(options: Options) -> int:
    from extract.store import FeatureStore
    from extract.store.summary import human_bytes

    if options.to.exists() and (options.to.is_file() or any(options.to.iterdir())):
        raise InputError(f"--to {options.to} is there already and is left as it is; give a new name or remove it")
    store = FeatureStore.open(options.store)
    make_folder(options.to.parent)
    needed, free = len(store) * store.video_bytes, shutil.disk_usage(options.to.parent).free
    if needed > free:  # said before: HDF5 may crash where a disk becomes full
        raise RunError(
            f"--to {options.to} needs {human_bytes(needed)}, its disk has {human_bytes(free)} free; use another one"
        )
    write = _write_hdf5 if options.to.suffix in (".h5", ".hdf5") else _write_npy
    count = write(store, options.to)
    left_out = len(store) - count
    print(
        f"{count:,} videos written to {options.to}" + (f", {left_out:,} failed or pending left out" if left_out else "")
    )
    return 0


def _finished(store: "FeatureStore"):
    """Rows and features of finished videos, block by block, checksums checked."""
    from extract.store import OK, PARTIAL

    for block in range(store.num_blocks):
        rows = store.block_rows(block)
        rows = rows[(store.status[rows] == OK) | (store.status[rows] == PARTIAL)]
        if len(rows):
            try:
                yield rows, store.read(rows)
            except ValueError as error:
                raise RunError(
                    f"block {block} is damaged ({error}); run `python -m extract.verify {store.path} --repair`"
                ) from None


def _write_npy(store: "FeatureStore", folder: Path) -> int:
    import numpy as np

    count = 0
    with replacing(folder) as partial:
        partial.mkdir()
        for rows, features in _finished(store):
            for row, video in zip(rows, features, strict=True):
                # The whole name with its ending: a.mp4 and a.webm are two videos.
                path = partial / f"{store.ids[row]}.npy"
                path.parent.mkdir(parents=True, exist_ok=True)
                np.save(path, video)
                count += 1
    return count


def _write_hdf5(store: "FeatureStore", path: Path) -> int:
    import h5py
    import numpy as np

    rows = np.flatnonzero((store.status == 1) | (store.status == 2))
    with replacing(path) as partial, h5py.File(partial, "w") as file:
        shape = (len(rows), store.num_views, store.frames_per_video, store.dim)
        features = file.create_dataset("features", shape, dtype="f2")
        filled = 0
        for block_rows, block in _finished(store):
            features[filled : filled + len(block_rows)] = block
            filled += len(block_rows)
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
