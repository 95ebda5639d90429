"""A listing beside a store that exists already: what was corrected, replaced, or is no longer
listed.

An id is the path of a file below --videos, and of a span its milliseconds too. So a video that
moved to another folder, or a span that was corrected, is another row: the old one is no longer
listed, the new one is appended and extracted. Labels, splits and groups are not in the id and do
not depend on pixels: they are corrected in place.
"""

import math
from collections.abc import Collection, Sequence
from typing import Any

import numpy as np

from extract.cli import first_few
from extract.listing.videos import Listing, Video
from extract.options import Options
from extract.sources import file_of
from extract.store import DROPPED, FAILED, PENDING, FeatureStore, Outcomes
from extract.store.corrections import correct
from extract.workers.changed import look_for_changed_files

NOT_LISTED = "no longer listed"
NO_FILE = "listed, but its file is missing"
Pairs = Sequence[tuple[int, Video]]  # rows of the store that are listed


def reconcile(
    options: Options, store: FeatureStore, listing: Listing, videos: Sequence[Video]
) -> None:
    """Bring the rows of a store up to its listing and print what was done; nothing is decoded.

    videos: those to extract, after --limit and --window. What lies beyond --limit is not touched.
    """
    every: Sequence[Video] = listing.videos
    beyond: set[str] = set()
    if options.window is not None:  # what lies beyond --limit was not cut
        beyond = {
            file_of(video.id) for video in listing.videos[len(listing.videos[: options.limit]) :]
        }
        every = videos
    rows = {row_id: row for row, row_id in enumerate(store.ids.tolist())}
    pairs = [(rows[video.id], video) for video in every if video.id in rows]
    correct_rows(store, pairs, listing.classes)
    _list_again(store, np.array([row for row, _ in pairs], int))
    listed = {video.id for video in every}
    unlisted = [
        row
        for row_id, row in rows.items()
        if row_id not in listed and file_of(row_id) not in beyond
    ]
    _leave_out(options, store, np.array(unlisted, int), {video.id for video in listing.missing})
    changed = look_for_changed_files(store, pairs)
    if len(changed):
        names = f"{len(changed):,} ({first_few(store.ids[changed].tolist())})"
        print(f"replaced  files are not those that were extracted: {names}")
        if options.retry_changed:
            store.set_status(changed, PENDING)
        else:
            print("          --retry-changed extracts them again")


# -- corrections ---------------------------------------------------------------------------------------------------


def correct_rows(store: FeatureStore, pairs: Pairs, classes: Sequence[str]) -> None:
    """Apply labels, splits and groups of a listing with these classes, all at once or not at all.

    An empty split or group, or no label, in the listing does not erase the one in the store.
    """
    rows = np.array([row for row, _ in pairs], int)
    names = np.array([*store.classes, ""], object)[store.labels]
    old = {"labels": names, "splits": store.splits, "groups": store.groups}
    listed_names = [*classes, ""]
    listed = {
        "labels": np.array([listed_names[video.label] for _, video in pairs], object),
        "splits": np.array([video.split for _, video in pairs], object),
        "groups": np.array([video.group for _, video in pairs], object),
    }
    new, counts, kept, shown = {}, {}, {}, []
    for name, values in listed.items():
        before = old[name][rows]
        changed = (values != "") & (values != before)
        new[name] = np.array(old[name], object)
        new[name][rows[changed]] = values[changed]
        counts[name] = int(changed.sum())
        kept[name] = int(((values == "") & (before != "")).sum())
        shown += [
            f"{pairs[place][1].id}: {before[place] or 'none'} -> {values[place]}"
            for place in np.flatnonzero(changed)[:2]
        ]
    merged = merge_classes(store.classes, classes, set(names), set(new["labels"]))
    columns = {name: new[name] for name, count in counts.items() if count}
    if columns or merged != store.classes:
        index = {name: label for label, name in enumerate(merged)}
        labels = np.array([index.get(name, -1) for name in new["labels"]], "<i4")
        stored = store.classes
        correct(store, merged, columns | {"labels": labels})
        if merged != stored:
            _print_classes(stored, merged)
    if columns:
        what = ", ".join(f"{count:,} {name}" for name, count in counts.items() if count)
        print(f"corrected {what} ({'; '.join(shown[:3])}); nothing was decoded for it")
    if any(kept.values()):
        what = ", ".join(f"{count:,} {name}" for name, count in kept.items() if count)
        print(f"kept      {what} of the store, which the listing does not name")


def merge_classes(
    stored: Sequence[str], listed: Sequence[str], before: Collection[str], after: Collection[str]
) -> tuple[str, ...]:
    """The classes of a store that is continued with a listing.

    A class that all its videos have left is dropped, unless it is listed. If the listing has all
    that remain, its order is taken; else what it adds comes last. before, after: the names that
    rows have, "" for none.
    """
    remaining = [name for name in stored if name in after or name in listed or name not in before]
    if set(remaining) <= set(listed):
        return tuple(listed)
    return (*remaining, *(name for name in listed if name not in remaining))


def _print_classes(stored: Sequence[str], merged: Sequence[str]) -> None:
    added = [name for name in merged if name not in stored]
    dropped = [name for name in stored if name not in merged]
    changes = [f"{len(added):,} new ({first_few(added)})"] if added else []
    changes += (
        [f"{len(dropped):,} without a video dropped ({first_few(dropped)})"] if dropped else []
    )
    if not changes:
        changes = ["the same names in the order of the listing; labels are renumbered"]
    print(f"classes   {len(merged):,} now: {', '.join(changes)}")


# -- rows that are no longer listed --------------------------------------------------------------------------------


def _list_again(store: FeatureStore, rows: np.ndarray) -> None:
    """Rows that were taken out, or given up for want of a file, and are listed now."""
    dropped = rows[store.status[rows] >= DROPPED]
    store.set_status(dropped, store.status[dropped] % DROPPED)
    given_up = rows[store.status[rows] == FAILED]
    given_up = given_up[np.isin(store.errors[given_up], (NOT_LISTED, NO_FILE))]
    store.set_status(given_up, PENDING)
    if again := np.union1d(dropped, given_up).tolist():
        print(
            f"again     {len(again):,} videos are listed again ({first_few(store.ids[again].tolist())})"
        )


def _leave_out(
    options: Options, store: FeatureStore, rows: np.ndarray, missing: Collection[str]
) -> None:
    """Rows that are not among the videos: pending ones fail by name; with --drop-unlisted they are
    taken out."""
    names = store.ids[rows]
    without_file = np.array([_is_missing(name, missing) for name in names], bool)
    pending = store.status[rows] == PENDING
    _give_up(store, rows[pending & without_file], NO_FILE)
    _give_up(store, rows[pending & ~without_file], NOT_LISTED)
    gone = rows[~without_file]
    if not len(gone):
        return
    print(
        f"unlisted  {len(gone):,} videos of the store are {NOT_LISTED} ({first_few(store.ids[gone].tolist())})"
    )
    if options.drop_unlisted:
        store.set_status(gone, store.status[gone] % DROPPED + DROPPED)
        print("          they are taken out of training and scores until they are listed again")
    elif kept := int((store.status[gone] < DROPPED).sum()):
        print(f"          {kept:,} are still trained on and scored; --drop-unlisted takes them out")


def _is_missing(row_id: str, missing: Collection[str]) -> bool:
    file = file_of(row_id)
    stem = file.rpartition("/")[2].rpartition(".")[
        0
    ]  # the missing clips of a Kinetics CSV have no extension
    return file in missing or stem in missing


def _give_up(store: FeatureStore, rows: np.ndarray, reason: str) -> None:
    """Fail pending rows without reading a video. Their shards are written first, with zeros for
    them."""
    for block in np.unique(rows // store.block_size).tolist():
        own = rows[rows // store.block_size == block]
        store.write_block(block, np.zeros((len(own), *store.video_shape), "<f2"), own)
    if len(rows):
        store.commit(Outcomes.failed(rows, reason, store.num_views, store.frames_per_video))


# -- rows that are new ---------------------------------------------------------------------------------------------


def append_new(store: FeatureStore, videos: Sequence[Video], classes: Sequence[str]) -> None:
    """Append pending rows for the videos that a store does not have, after `reconcile` with the
    same listing."""
    known = set(store.ids.tolist())
    new = [video for video in videos if video.id not in known]
    if new:
        # The listing numbers its classes in its own order; `reconcile` has brought their names into
        # the store.
        label = {name: number for number, name in enumerate(store.classes)}
        labels = np.array([*(label[name] for name in classes), -1])
        columns = columns_of(new)
        store.append(**columns | {"labels": labels[columns["labels"]]})


def columns_of(videos: Sequence[Video]) -> dict[str, list[Any]]:
    """What a store holds of its rows from the start."""
    columns = {
        f"{name}s": [getattr(video, name) for video in videos]
        for name in ("id", "label", "split", "group")
    }
    spans = [video.span or (math.nan, math.nan) for video in videos]
    return columns | {"starts": [start for start, _ in spans], "ends": [end for _, end in spans]}
