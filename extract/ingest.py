"""python -m extract.ingest: make a feature store of features that other tools wrote."""

import os
import socket
import time
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from extract import InputError
from extract.cli import first_few, progress, run_as_script
from extract.commands import first_training

if TYPE_CHECKING:
    import numpy as np

    from extract.feature_files import FeatureFiles, Shape
    from extract.listing.videos import Listing
    from extract.store import FeatureStore

UNNAMED = "features made elsewhere"
_SHARD_BYTES = 4 << 20
_SECONDS_PER_COMMIT = 5.0


@dataclass(frozen=True)
class Options:
    """Make a feature store of features that other tools wrote. Run it again to continue, or after
    corrections.

    The list names the videos, and gives their labels, splits and groups. Features are joined to it
    by name.
    """

    features: Path
    """A folder of .npy, .npz, .pt (one video each) or of .json with _c.npy; or one .h5, .npy with
    its ids, .parquet."""
    labels: Path
    """A list of videos as extract takes it, such as a CSV id,label[,split,group]. The videos need
    not exist."""
    out: str
    """The feature store."""
    frames: int | None = None
    """Rows per video: the middles of N equal segments; shorter videos are masked (default: all
    rows, if all videos have as many)."""
    name: str = ""
    """The model that made the features, such as videomae-l-k400. A checkpoint takes only features
    of the name that it was trained on."""
    classes: str = "auto"
    """auto (as extract's --labels), kinetics700, or a file of lines `name` or `index name`."""
    max_failed: float = 0.05
    """Fraction of unusable videos up to which the run counts as good (exit status 0, else 3)."""
    retry_changed: bool = False
    """Read features again if their files have changed."""
    drop_unlisted: bool = False
    """Take videos that the list no longer has out of training and scores."""


def main(options: Options) -> int:
    from extract.feature_files import open_features
    from extract.listing.videos import read_listing
    from extract.store.locks import lock_store
    from extract.store.runs import real_path

    listing = read_listing(options.labels, labels=options.classes)
    files = open_features(options.features)
    listing, names = join(listing, files)
    print(listing.report())
    options = replace(options, out=real_path(options.out))  # two names of one store are one lock
    with lock_store(options.out):
        return _ingest(options, listing, files, names)


# -- which features belong to which video ----------------------------------------------------------


def join(listing: "Listing", files: "FeatureFiles") -> "tuple[Listing, dict[str, str]]":
    """Match videos with features by name.

    Names are compared with ids, with ids without the video's extension, and with file names without
    extension; if none of these matches, also with one ending that all share, as video_features
    appends (`_resnet`). The comparison with most matches is used, and the report names it.

    Returns:
        the listing, with the files of its features as paths, in the files' order; and the name of
        the features of each id, in the same order.

    Raises:
        InputError: nothing matches, or two videos match the same features.
    """
    ids = [video.id for video in listing.videos]
    stems = [_without_extension(video_id) for video_id in ids]
    bases = [_base(stem) for stem in stems]
    counts = Counter(map(_base, files.names))
    by_base = {_base(name): name for name in files.names if counts[_base(name)] == 1}
    by_name = {name: name for name in files.names}

    def match(keys: list[str], names: dict[str, str]) -> dict[str, str]:
        pairs = zip(ids, keys, strict=True)
        return {video_id: names[key] for video_id, key in pairs if key in names}

    comparisons = {
        "the id": match(ids, by_name),
        "the id without the video's extension": match(stems, by_name),
        "the file name without extension": match(bases, by_base),
    }
    matched_by = max(comparisons, key=lambda description: len(comparisons[description]))
    matches = comparisons[matched_by]
    if not matches:
        ending = _common_ending(bases[0], by_base)
        if not ending:
            raise InputError(
                f"none of the {len(ids):,} videos of {listing.source} has features: it lists "
                f"{first_few(ids)}, and there are {first_few(files.names)}"
            )
        matches = match([base + ending for base in bases], by_base)
        matched_by = f"the file name with the ending {ending}"
    id_of: dict[str, str] = {}
    for video_id, name in matches.items():
        if (earlier := id_of.setdefault(name, video_id)) != video_id:
            raise InputError(
                f"{earlier} and {video_id} would both have the features {name}; "
                "give ids that tell them apart"
            )
    matches = {id_of[name]: name for name in files.names if name in id_of}
    videos = {video.id: video for video in listing.videos}
    joined = replace(
        listing,
        layout=f"{listing.layout}; features joined by {matched_by}",
        videos=tuple(
            replace(videos[video_id], path=files.path(name)) for video_id, name in matches.items()
        ),
        missing=tuple(video for video in listing.videos if video.id not in matches),
        unlisted=tuple(sorted(name for name in files.names if name not in id_of)),
    )
    return joined, matches


def _common_ending(base: str, names: Collection[str]) -> str:
    """The part of a features' name after the video's name, such as `_resnet`; "" for none."""
    endings = sorted(name.removeprefix(base) for name in names if name.startswith(f"{base}_"))
    if len(endings) > 1:
        raise InputError(
            f"{base} has the features {', '.join(endings)}; "
            "move all but one kind away, and join the stores"
        )
    return "".join(endings)


def _without_extension(video_id: str) -> str:
    from extract.listing.folders import VIDEO_EXTENSIONS, extension

    file, mark, span = video_id.partition("#")
    if extension(file) not in VIDEO_EXTENSIONS:
        return video_id
    return file.rpartition(".")[0] + mark + span


def _base(name: str) -> str:
    return name.rpartition("/")[2]


# -- the store -------------------------------------------------------------------------------------


def _ingest(
    options: Options, listing: "Listing", files: "FeatureFiles", names: dict[str, str]
) -> int:
    import numpy as np

    from extract.store import FAILED, PENDING, FeatureStore, RunLog
    from extract.store.summary import check_space, status_table
    from extract.workers.reconcile import columns_of

    exists = Path(options.out).exists()
    if exists:
        store = FeatureStore.open(options.out, writable=True)
        name = options.name or store.provenance.get("backbone", "")
        options = replace(options, frames=options.frames or store.frames_per_video, name=name)
    frames, dim = _choose_shape(options, files, names)
    provenance = {
        "source": "extract.ingest",
        "backbone": options.name or UNNAMED,
        "sampling": {"frames": frames, "from": "rows of the array: the middles of equal segments"},
    }
    if exists:
        _continue(options, store, listing, provenance, dim)
    else:
        store = FeatureStore.create(
            options.out,
            **columns_of(listing.videos),
            classes=listing.classes,
            views=["center"],
            frames=frames,
            dim=dim,
            block_size=min(4096, max(64, _SHARD_BYTES // (2 * frames * dim))),
            provenance=provenance,
        )
    RunLog(options.out).write(
        "start", process=os.getpid(), host=socket.gethostname(), options=vars(options)
    )
    # The files of failed videos may have been mended.
    store.set_status(np.flatnonzero(store.status == FAILED), PENDING)
    pending = int((store.status == PENDING).sum())
    print(f"to do     {pending:,} of {len(store):,} videos, {frames} x {dim} each")
    check_space(Path(options.out), pending * store.video_bytes)
    _write_blocks(store, files, names)
    store.clean_up()
    print(status_table(store))
    failed = np.flatnonzero(store.status == FAILED)
    for row in failed[:5]:
        print(f"unusable: {store.ids[row]}: {store.errors[row]}")
    if len(failed) > options.max_failed * int(store.listed.sum()):
        print(
            f"{len(failed):,} of {len(store):,} videos are unusable, more than --max-failed allows"
        )
        return 3
    print(f"Next: {first_training(options.out)}")
    return 0


def _choose_shape(options: Options, files: "FeatureFiles", names: dict[str, str]) -> "Shape":
    """Frames and width of the store: --frames, or the length of all videos; and the width of most.

    Reads the shape of every array; values only if the format has no header for the shape.
    InputError if no array is usable, or if lengths differ and --frames is not given.
    """
    from extract.feature_files import UnusableError

    lengths: Counter[int] = Counter()
    widths: Counter[int] = Counter()
    first_reason = ""
    for name in progress(names.values(), unit="array", desc="shapes"):
        try:
            length, width = files.shape(name)
        except UnusableError as error:
            first_reason = first_reason or f"{name}: {error}"
            continue
        lengths[length] += 1
        widths[width] += 1
    if not widths:
        raise InputError(
            f"{options.features}: none of {len(names):,} arrays is usable; {first_reason}"
        )
    if len(widths) > 1:
        counts = ", ".join(f"{width} ({count:,} videos)" for width, count in widths.most_common(5))
        print(f"WIDTHS DIFFER: {counts}; the first is used, videos of other widths are unusable")
    if options.frames is None and len(lengths) > 1:
        raise InputError(
            f"{options.features}: videos have {min(lengths)} to {max(lengths)} rows each; "
            "give --frames N, the middles of N equal segments of each (shorter videos are masked)"
        )
    return options.frames or next(iter(lengths)), widths.most_common(1)[0][0]


def _continue(
    options: Options,
    store: "FeatureStore",
    listing: "Listing",
    provenance: dict[str, Any],
    dim: int,
) -> None:
    """Bring the rows of a store up to its listing. InputError if the store was made otherwise."""
    from extract.options import Options as ExtractOptions
    from extract.workers.reconcile import reconcile
    from extract.workers.settings import refuse_other_settings

    recorded = {**store.provenance, "width": store.dim}
    refuse_other_settings(store, recorded, {**provenance, "width": dim})
    extract_options = ExtractOptions(
        options.labels,
        options.out,
        retry_changed=options.retry_changed,
        drop_unlisted=options.drop_unlisted,
    )
    reconcile(extract_options, store, listing, listing.videos)


def _write_blocks(store: "FeatureStore", files: "FeatureFiles", names: dict[str, str]) -> None:
    """Read and write every block with a pending row; commit every few seconds."""
    import numpy as np

    from extract.store import PENDING

    ready: list[Any] = []
    committed = time.monotonic()
    for block in progress(store.missing_blocks(), unit="block"):
        rows = store.block_rows(block)
        rows = rows[store.status[rows] == PENDING]
        features = np.zeros((len(rows), *store.video_shape), "<f2")
        ready.append(_read_rows(store, files, names, rows, features))
        store.write_block(block, features, rows)
        if time.monotonic() - committed > _SECONDS_PER_COMMIT:
            store.commit(*ready)
            ready, committed = [], time.monotonic()
    if ready:
        store.commit(*ready)


def _read_rows(
    store: "FeatureStore",
    files: "FeatureFiles",
    names: dict[str, str],
    rows: "np.ndarray",
    out: "np.ndarray",
) -> Any:
    """Fill `out` [n, 1, T, D] with the features of `rows`, with one video in memory at a time, and
    return their outcomes."""

    from extract.feature_files import UnusableError
    from extract.sampling import segment_centers
    from extract.sources import read_source
    from extract.store import OK, Outcomes

    outcomes = Outcomes.failed(rows, "", 1, store.frames_per_video)
    sources, source_path = [], ""
    for position, row in enumerate(rows.tolist()):
        name = names[store.ids[row]]
        if files.path(name) != source_path:  # one file may hold all of them
            source_path = files.path(name)
            source = read_source(source_path)
        sources.append(source)
        try:
            array = files.load(name)
            chosen = segment_centers(len(array), store.frames_per_video)
            out[position, 0] = _checked(array, chosen, store.dim)
        except UnusableError as error:
            outcomes.errors[position] = str(error)
            continue
        outcomes.status[position], outcomes.num_frames[position] = OK, len(array)
        outcomes.frame_indices[position, 0] = chosen
    return replace(outcomes, sources=sources)


def _checked(array: "np.ndarray", chosen: "np.ndarray", dim: int) -> "np.ndarray":
    """Rows `chosen` of an array [T, D]. UnusableError for another width, or a value that float16
    cannot hold."""
    import numpy as np

    from extract.feature_files import UnusableError

    if array.shape[1] != dim:
        raise UnusableError(f"its width is {array.shape[1]}, the store's {dim}")
    values = array[chosen]
    too_large = ~(np.abs(values) <= np.finfo("f2").max)  # also NaN
    if too_large.any():
        row, column = np.argwhere(too_large)[0]
        raise UnusableError(
            f"row {chosen[row]} holds {values[row, column]}, expected a value in the range of "
            "float16"
        )
    return values


if __name__ == "__main__":
    run_as_script()
