"""python -m extract.ingest: features that other tools made become a feature store like any
other."""

import os
import socket
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from extract import InputError
from extract.cli import first_few, progress, run_command

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
    """Make a feature store of features that other tools wrote; run it again to continue, or after
    corrections.

    The list names the videos, and gives their labels, splits and groups. Features are joined to it
    by name.
    """

    features: Path
    """A folder of .npy, .npz, .pt (one video each) or of .json with _c.npy; or one .h5, .npy with
    its ids, .parquet."""
    labels: Path
    """A list of videos as extract takes it, such as a CSV id,label[,split,group]; no video needs to
    exist."""
    out: str
    """The feature store."""
    frames: int | None = None
    """Rows per video: the middles of that many equal segments; shorter videos are masked (default:
    all, if equal)."""
    name: str = ""
    """What made the features, such as videomae-l-k400. A checkpoint takes only features of the name
    it has seen."""
    classes: str = "auto"
    """auto (as extract's --labels), kinetics700, or a file of lines `name` or `index name`."""
    max_failed: float = 0.05
    """Fraction of unusable videos up to which the run counts as good (exit status 0, else 3)."""
    retry_changed: bool = False
    """Read features again whose files are not those that were read."""
    drop_unlisted: bool = False
    """Take videos that are no longer listed out of training and scores."""


def main(options: Options) -> int:
    from extract.feature_files import open_features
    from extract.listing.videos import read_listing
    from extract.store.locks import lock_store
    from extract.store.runs import real_path

    if options.frames is not None and options.frames < 1:
        raise InputError(f"--frames {options.frames}: expected at least 1")
    listing = read_listing(options.labels, labels=options.classes)
    files = open_features(options.features)
    listing, names = join(listing, files)
    print(listing.report())
    options = replace(options, out=real_path(options.out))  # two names of one store are one lock
    with lock_store(options.out):
        return _ingest(options, listing, files, names)


# -- which features belong to which video ------------------------------------------------------------------------------


def join(listing: "Listing", files: "FeatureFiles") -> "tuple[Listing, dict[str, str]]":
    """The listing with the files of its features as paths, in the files' order; and the features'
    name by id.

    Names are compared as ids, as ids without the video's extension, and as file names without
    extension, also with one ending that all share, as video_features appends (`_resnet`). The
    comparison that finds most is used, and said. InputError if it joins nothing, or two videos with
    the same features.
    """
    comparisons = {
        "the id": lambda video_id: video_id,
        "the id without the video's extension": _without_extension,
        "the file name without extension": lambda video_id: _base(_without_extension(video_id)),
    }
    best: dict[str, str] = {}
    how = ""
    for description, key in comparisons.items():
        by_key = _by_key(files.names, base=description.startswith("the file"))
        matches = {
            video.id: by_key[key(video.id)] for video in listing.videos if key(video.id) in by_key
        }
        if len(matches) > len(best):
            best, how = matches, description
    if not best:
        best, how = _join_by_ending(listing, files)
    order = {name: place for place, name in enumerate(files.names)}
    first: dict[str, str] = {}
    for video_id, name in best.items():
        if (other := first.setdefault(name, video_id)) != video_id:
            raise InputError(
                f"{other} and {video_id} would both have the features {name}; give ids that tell them apart"
            )
    joined = [
        replace(video, path=files.path(best[video.id]))
        for video in listing.videos
        if video.id in best
    ]
    joined.sort(key=lambda video: order[best[video.id]])
    missing = [video for video in listing.videos if video.id not in best]
    unlisted = tuple(sorted(order.keys() - best.values()))
    layout = f"{listing.layout}; features joined by {how}"
    changed = replace(
        listing, videos=tuple(joined), missing=tuple(missing), unlisted=unlisted, layout=layout
    )
    return changed, best


def _by_key(names: Sequence[str], *, base: bool) -> dict[str, str]:
    """Names by themselves, or by their last part if only one name has it."""
    if not base:
        return {name: name for name in names}
    counts = Counter(map(_base, names))
    return {_base(name): name for name in names if counts[_base(name)] == 1}


def _join_by_ending(listing: "Listing", files: "FeatureFiles") -> tuple[dict[str, str], str]:
    by_base = _by_key(files.names, base=True)
    stems = {video.id: _base(_without_extension(video.id)) for video in listing.videos}
    first = next(iter(stems.values()), "")
    endings = sorted(base.removeprefix(first) for base in by_base if base.startswith(f"{first}_"))
    if not endings:
        raise InputError(
            f"none of the {len(listing.videos):,} videos of {listing.source} has features: it lists "
            f"{first_few(list(stems))}, and there are {first_few(files.names)}"
        )
    if len(endings) > 1:
        raise InputError(
            f"{first} has the features {', '.join(endings)}; move all but one kind away, and join the stores"
        )
    [ending] = endings
    matches = {
        video_id: by_base[stem + ending]
        for video_id, stem in stems.items()
        if stem + ending in by_base
    }
    return matches, f"the file name with the ending {ending}"


def _without_extension(video_id: str) -> str:
    from extract.listing.folders import VIDEO_EXTENSIONS, extension

    file, mark, span = video_id.partition("#")
    return (
        file.rpartition(".")[0] + mark + span if extension(file) in VIDEO_EXTENSIONS else video_id
    )


def _base(name: str) -> str:
    return name.rpartition("/")[2]


# -- the store ---------------------------------------------------------------------------------------------------------


def _ingest(
    options: Options, listing: "Listing", files: "FeatureFiles", names: dict[str, str]
) -> int:
    import numpy as np

    from extract.store import FAILED, PENDING, RunLog
    from extract.store.summary import check_space, status_table

    options = _continue_options(options)
    frames, dim = _choose_shape(options, files, names)
    store = _open_or_create(options, listing, frames=frames, dim=dim)
    RunLog(options.out).write(
        "start", process=os.getpid(), host=socket.gethostname(), options=vars(options)
    )
    store.set_status(
        np.flatnonzero(store.status == FAILED), PENDING
    )  # their files may have been mended
    pending = int((store.status == PENDING).sum())
    print(f"to do     {pending:,} of {len(store):,} videos, {frames} x {dim} each")
    check_space(Path(options.out), pending * store.video_bytes)
    _write_blocks(store, files, names, {video.id: video.path for video in listing.videos})
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
    print(f"Next: python -m aggregate.train --agg tsn --features {options.out}")
    return 0


def _continue_options(options: Options) -> Options:
    """Options that were not given, as the store records them."""
    from extract.store import FeatureStore

    if not Path(options.out).exists():
        return options
    store = FeatureStore.open(options.out)
    name = options.name or store.provenance.get("backbone", "")
    return replace(options, frames=options.frames or store.frames_per_video, name=name)


def _choose_shape(options: Options, files: "FeatureFiles", names: dict[str, str]) -> "Shape":
    """Frames and width of the store: --frames, or what all videos have; the width that most videos
    have.

    Reads the shape of every array, and no values but those of compressed files. InputError if no
    array is usable, or if videos differ in length and --frames is not given.
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
        print(f"WIDTHS DIFFER: {counts}; the first is taken, videos of another one are unusable")
    if options.frames is None and len(lengths) > 1:
        raise InputError(
            f"{options.features}: videos have {min(lengths)} to {max(lengths)} rows each; give --frames N, the middles "
            "of N equal segments of each (shorter videos are masked)"
        )
    return options.frames or next(iter(lengths)), widths.most_common(1)[0][0]


def _open_or_create(
    options: Options, listing: "Listing", *, frames: int, dim: int
) -> "FeatureStore":
    """The store, with a row for every video of the listing. InputError if it was made otherwise."""
    from extract.store import FeatureStore, difference
    from extract.store.corrections import complete_correction
    from extract.workers.reconcile import append_new, columns_of, reconcile

    provenance = {
        "source": "extract.ingest",
        "backbone": options.name or UNNAMED,
        "sampling": {"frames": frames, "from": "rows of the array: the middles of equal segments"},
    }
    if not Path(options.out).exists():
        return FeatureStore.create(
            options.out,
            **columns_of(listing.videos),
            classes=listing.classes,
            views=["center"],
            frames=frames,
            dim=dim,
            block_size=min(4096, max(64, _SHARD_BYTES // (2 * frames * dim))),
            provenance=provenance,
        )
    store = FeatureStore.open(options.out, writable=True)
    lines = difference({**store.provenance, "width": store.dim}, {**provenance, "width": dim})
    if lines:
        text = "\n  ".join(lines)
        raise InputError(
            f"{store.path} was made with other settings:\n  {text}\nuse those, or another --out"
        )
    complete_correction(store)
    wishes: Any = SimpleNamespace(
        window=None,
        limit=None,
        retry_changed=options.retry_changed,
        drop_unlisted=options.drop_unlisted,
    )
    reconcile(wishes, store, listing, listing.videos)
    append_new(store, listing.videos, listing.classes)
    return store


def _write_blocks(
    store: "FeatureStore", files: "FeatureFiles", names: dict[str, str], paths: dict[str, str]
) -> None:
    """Read and write every block with a pending row; commit a few at a time."""
    import numpy as np

    from extract.store import PENDING

    ready: list[Any] = []
    committed = time.monotonic()
    for block in progress(store.missing_blocks(), unit="block"):
        rows = store.block_rows(block)
        rows = rows[store.status[rows] == PENDING]
        features = np.zeros((len(rows), *store.video_shape), "<f2")
        ready.append(_read_rows(store, files, names, paths, rows, features))
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
    paths: dict[str, str],
    rows: "np.ndarray",
    out: "np.ndarray",
) -> Any:
    """Fill `out` [n, 1, T, D] with the features of `rows`, one video in memory at a time; their
    outcomes."""

    from extract.feature_files import UnusableError
    from extract.sampling import segment_centres
    from extract.sources import UNKNOWN, read_source
    from extract.store import OK, Outcomes

    outcomes = Outcomes.failed(rows, "", 1, store.frames_per_video)
    sources, source, source_path = [], UNKNOWN, ""
    for place, row in enumerate(rows.tolist()):
        video_id = store.ids[row]
        if paths[video_id] != source_path:  # one file may hold all of them
            source_path = paths[video_id]
            source = read_source(source_path)
        sources.append(source)
        try:
            array = files.load(names[video_id])
            chosen = segment_centres(len(array), store.frames_per_video)
            out[place, 0] = _checked(array, chosen, store.dim)
        except UnusableError as error:
            outcomes.errors[place] = str(error)
            continue
        outcomes.status[place], outcomes.num_frames[place] = OK, len(array)
        outcomes.frame_indices[place, 0] = chosen
    return replace(outcomes, sources=sources)


def _checked(array: "np.ndarray", chosen: "np.ndarray", dim: int) -> "np.ndarray":
    """Rows `chosen` of an array [T, D]. UnusableError for another width, or a value that float16
    cannot hold."""
    import numpy as np

    from extract.feature_files import UnusableError

    if array.shape[1] != dim:
        raise UnusableError(f"its width is {array.shape[1]}, the store's {dim}")
    values = array[chosen]
    wrong = ~(np.abs(values) <= np.finfo("f2").max)
    if wrong.any():
        place = int(wrong.any(axis=1).argmax())
        raise UnusableError(
            f"row {chosen[place]} holds {values[place][wrong[place]][0]}, expected what float16 can hold"
        )
    return values


if __name__ == "__main__":
    sys.exit(run_command(main, Options, prog="python -m extract.ingest"))
