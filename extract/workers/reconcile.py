"""Apply the changes of a listing to a store: corrected labels, replaced files, unlisted videos.

An id is the path of a file below --videos, and for a span its milliseconds too. So a video that was
moved, or a span that was corrected, is a new row: it is extracted and appended, and the old row is
no longer listed. Labels, splits and groups are not a part of the id and do not depend on pixels:
they are corrected in place.
"""

import math
from collections.abc import Collection, Sequence
from typing import Any

import numpy as np

from extract.cli import counted
from extract.listing.videos import Listing, Video
from extract.options import Options
from extract.sources import file_of
from extract.store import DROPPED, FAILED, PENDING, FeatureStore, Outcomes
from extract.store.corrections import complete_correction, correct, upgrade
from extract.workers.changed import look_for_changed_files

NOT_LISTED = "no longer listed"
NO_FILE = "listed, but its file is missing"
Pairs = Sequence[tuple[int, Video]]  # rows of the store that are listed


def reconcile(
    options: Options, store: FeatureStore, listing: Listing, videos: Sequence[Video]
) -> None:
    """Update the rows of a store to a listing, and print every change. Nothing is decoded.

    New videos get pending rows at the end. An interrupted correction is completed first.

    videos: those to extract, after --limit and --window. Videos that --limit leaves out keep their
    rows.
    """
    complete_correction(store)
    upgrade(store)
    listed: Sequence[Video] = listing.videos
    left_out: set[str] = set()
    if options.window is not None:
        left_out = {file_of(video.id) for video in listed[options.limit or len(listed) :]}
        listed = videos
    rows = {row_id: row for row, row_id in enumerate(store.ids.tolist())}
    pairs = [(rows[video.id], video) for video in listed if video.id in rows]
    correct_rows(store, pairs, listing.classes)
    _list_again(store, np.array([row for row, _ in pairs], int))
    ids = {video.id for video in listed}
    unlisted = [
        row for row_id, row in rows.items() if row_id not in ids and file_of(row_id) not in left_out
    ]
    _leave_out(options, store, np.array(unlisted, int), {video.id for video in listing.missing})
    changed = look_for_changed_files(store, pairs)
    if len(changed):
        names = counted(store.ids[changed].tolist())
        print(f"replaced  files are not those that were extracted: {names}")
        if options.retry_changed:
            store.set_status(changed, PENDING)
        else:
            print("          --retry-changed extracts them again")
    append_new(store, videos, listing.classes)


# -- corrections -----------------------------------------------------------------------------------


def correct_rows(store: FeatureStore, pairs: Pairs, classes: Sequence[str]) -> None:
    """Apply labels, splits and groups of a listing with these classes, all at once or not at all.

    An empty label, split or group in the listing does not erase the one in the store.
    """
    rows = np.array([row for row, _ in pairs], int)
    stored_classes, class_names = store.classes, [*classes, ""]
    names = np.array([*stored_classes, ""], object)[store.labels]
    old = {"labels": names, "splits": store.splits, "groups": store.groups}
    listed = {
        "labels": [class_names[video.label] for _, video in pairs],
        "splits": [video.split for _, video in pairs],
        "groups": [video.group for _, video in pairs],
    }
    new, corrected, kept, examples = {}, {}, {}, []
    for name, column in listed.items():
        before, values = old[name][rows], np.array(column, object)
        changed = (values != "") & (values != before)
        new[name] = np.array(old[name], object)
        new[name][rows[changed]] = values[changed]
        corrected[name] = int(changed.sum())
        kept[name] = int(((values == "") & (before != "")).sum())
        examples += [
            f"{pairs[position][1].id}: {before[position] or 'none'} -> {values[position]}"
            for position in np.flatnonzero(changed)[:2]
        ]
    merged = merge_classes(stored_classes, classes, set(names), set(new["labels"]))
    columns = {name: new[name] for name, count in corrected.items() if count}
    if columns or merged != stored_classes:
        index = {name: label for label, name in enumerate(merged)}
        labels = np.array([index.get(name, -1) for name in new["labels"]], "<i4")
        correct(store, merged, columns | {"labels": labels})
        if merged != stored_classes:
            _print_classes(stored_classes, merged)
    if columns:
        first = "; ".join(examples[:3])
        print(f"corrected {_counts(corrected)} ({first}); nothing was decoded for it")
    if any(kept.values()):
        print(f"kept      {_counts(kept)} of the store, which the listing does not name")


def _counts(columns: dict[str, int]) -> str:
    """`3 labels, 1 groups`, without the columns that have no row."""
    return ", ".join(f"{count:,} {name}" for name, count in columns.items() if count)


def merge_classes(
    stored: Sequence[str], listed: Sequence[str], before: Collection[str], after: Collection[str]
) -> tuple[str, ...]:
    """The classes of a store that is continued with a listing.

    A class that loses all of its videos is dropped, unless it is listed. If the listing has all
    classes that remain, they take its order; otherwise new classes come last. before, after: the
    names of the rows' classes, "" for none.
    """
    remaining = [name for name in stored if name in after or name in listed or name not in before]
    if set(remaining) <= set(listed):
        return tuple(listed)
    return (*remaining, *(name for name in listed if name not in remaining))


def _print_classes(stored: Sequence[str], merged: Sequence[str]) -> None:
    added = [name for name in merged if name not in stored]
    dropped = [name for name in stored if name not in merged]
    changes = []
    if added:
        changes.append(counted(added, "new"))
    if dropped:
        changes.append(counted(dropped, "without a video dropped"))
    if not changes:
        changes.append("the same names in the order of the listing; labels are renumbered")
    print(f"classes   {len(merged):,} now: {', '.join(changes)}")


# -- rows that the listing no longer has -----------------------------------------------------------


def _list_again(store: FeatureStore, rows: np.ndarray) -> None:
    """Restore listed rows that were taken out, or that failed because they were not listed."""
    dropped = rows[store.status[rows] >= DROPPED]
    store.set_status(dropped, store.status[dropped] % DROPPED)
    given_up = rows[store.status[rows] == FAILED]
    given_up = given_up[np.isin(store.errors[given_up], (NOT_LISTED, NO_FILE))]
    store.set_status(given_up, PENDING)
    if again := np.union1d(dropped, given_up).tolist():
        print(f"again     {counted(store.ids[again].tolist(), 'videos are listed again')}")


def _leave_out(
    options: Options, store: FeatureStore, rows: np.ndarray, missing: Collection[str]
) -> None:
    """Fail unlisted rows that are pending. With --drop-unlisted, take all unlisted rows out."""
    without_file = np.array([_is_missing(row_id, missing) for row_id in store.ids[rows]], bool)
    pending = store.status[rows] == PENDING
    _give_up(store, rows[pending & without_file], NO_FILE)
    _give_up(store, rows[pending & ~without_file], NOT_LISTED)
    gone = rows[~without_file]
    if not len(gone):
        return
    print(f"unlisted  {counted(store.ids[gone].tolist(), f'videos of the store are {NOT_LISTED}')}")
    if options.drop_unlisted:
        store.set_status(gone, store.status[gone] % DROPPED + DROPPED)
        print("          they are taken out of training and scores until they are listed again")
    elif kept := int((store.status[gone] < DROPPED).sum()):
        print(f"          {kept:,} are still trained on and scored; --drop-unlisted takes them out")


def _is_missing(row_id: str, missing: Collection[str]) -> bool:
    file = file_of(row_id)
    name, _, _ = file.rpartition("/")[2].rpartition(".")
    return file in missing or name in missing  # a Kinetics CSV names clips without extension


def _give_up(store: FeatureStore, rows: np.ndarray, reason: str) -> None:
    """Fail pending rows without reading a video.

    Their shards are written first, with zeros for these rows.
    """
    for block in np.unique(rows // store.block_size).tolist():
        in_block = rows[rows // store.block_size == block]
        store.write_block(block, np.zeros((len(in_block), *store.video_shape), "<f2"), in_block)
    if len(rows):
        store.commit(Outcomes.failed(rows, reason, store.num_views, store.frames_per_video))


# -- rows that are new -----------------------------------------------------------------------------


def append_new(store: FeatureStore, videos: Sequence[Video], classes: Sequence[str]) -> None:
    """Append pending rows for new videos of a listing whose classes the store has."""
    stored_ids = set(store.ids.tolist())
    new = [video for video in videos if video.id not in stored_ids]
    if new:
        # The listing has its own order of classes.
        label = {name: number for number, name in enumerate(store.classes)}
        labels = np.array([*(label[name] for name in classes), -1])
        columns = columns_of(new)
        store.append(**columns | {"labels": labels[columns["labels"]]})


def columns_of(videos: Sequence[Video]) -> dict[str, list[Any]]:
    """The columns of a store that are known before extraction."""
    columns = {
        f"{name}s": [getattr(video, name) for video in videos]
        for name in ("id", "label", "split", "group")
    }
    spans = [video.span or (math.nan, math.nan) for video in videos]
    return columns | {"starts": [start for start, _ in spans], "ends": [end for _, end in spans]}
