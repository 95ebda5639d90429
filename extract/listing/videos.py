"""List the videos of a folder, a list file or one file, with label, split and group.

Nothing is guessed silently: files that are not listed are counted and named with the reason, and
class indices come from a list of labels, never from the order of folders.
"""

import contextlib
import gc
import os
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

from extract import InputError, StrPath
from extract.cli import counted, first_few
from extract.listing.folders import (
    VIDEO_EXTENSIONS,
    Scan,
    escape_non_utf8,
    extension,
    folder,
    scan,
    split_and_class,
)
from extract.listing.labels import choose_labels
from extract.listing.leaks import describe_leaks
from extract.listing.lists import (
    FRAMES_HINT,
    LIST_EXTENSIONS,
    files_like_lists,
    is_table,
    lists_in,
    lists_of,
    read_list,
)
from extract.listing.locate import locate_paths, locate_stems, reject_duplicates
from extract.listing.pictures import describe_picture_folders, refuse_picture_folders
from extract.listing.tables import Row, Table, span_id
from extract.numbered import PICTURE_EXTENSIONS

# The id of a clip of Kinetics, or of a span of an untrimmed video that is named by its youtube id.
_CLIP = re.compile(
    r"(?:.*/)?([A-Za-z0-9_-]{11})(?:_\d{6,}_\d{6,}(?:\.[^.]*)?|\.[^.#]+#\d+-\d+)", re.DOTALL
)


@dataclass(frozen=True, slots=True)
class Video:
    """One video, or a span of one."""

    id: str  # POSIX path below the source; of a span with its milliseconds: `a.mp4#2000-5000`
    path: str
    label: int  # index in the listing's classes, -1 for unknown
    split: str = ""
    group: str = ""
    span: tuple[float, float] | None = None  # seconds


@dataclass(frozen=True, repr=False)
class Listing:
    """The videos of a source, and the files that were left out.

    Videos of a folder are sorted by id. Those of a list are in its order, with the spans of a file
    next to each other.
    """

    source: str
    layout: str  # describes how the source was read
    videos: tuple[Video, ...]
    classes: tuple[str, ...]
    labels_from: str  # describes the source of the classes
    missing: tuple[Video, ...] = ()  # rows of a list without a file
    unlisted: tuple[str, ...] = ()  # videos in no row of the list
    ignored: Mapping[str, tuple[str, ...]] = field(default_factory=dict)  # by reason
    notes: tuple[str, ...] = ()
    picture_folders: tuple[str, ...] = ()  # paths below the root

    @property
    def splits(self) -> tuple[str, ...]:
        """The splits of the listed videos: some of train, val, test, "", in this order."""
        present = {video.split for video in (*self.videos, *self.missing)}
        return tuple(split for split in ("train", "val", "test", "") if split in present)

    def class_counts(self, split: str) -> tuple[int, ...]:
        """Number of videos of a split per class, in the order of `classes`."""
        counts = Counter(video.label for video in self.videos if video.split == split)
        return tuple(counts[label] for label in range(len(self.classes)))

    def youtube_ids_in_two_splits(self) -> dict[str, tuple[str, ...]]:
        """Youtube ids that are listed in several splits, with the splits."""
        splits = _splits_of_youtube_ids((*self.videos, *self.missing))
        return {name: tuple(sorted(s)) for name, s in splits.items() if len(s) > 1}

    def report(self) -> str:
        """Describe listed, found and missing videos per split, and the files that were ignored."""
        present, missing = len(self.videos), len(self.missing)
        lines = [
            f"{self.source}: {self.layout}",
            f"{_count(present + missing, 'video')} listed, {present:,} found, "
            f"{counted([video.id for video in self.missing], 'missing')}",
            f"{_count(len(self.classes), 'class', 'classes')}: {self.labels_from}",
            *self.notes,
            *self._split_table(),
        ]
        for reason, names in sorted(self.ignored.items()):
            lines.append(f"ignored, {reason}: {counted(names)}")
        if self.unlisted:
            lines.append(f"left out, in no row of the CSV: {counted(self.unlisted)}")
        if shared := self.youtube_ids_in_two_splits():
            ids = [
                f"{name}: {', '.join(split or '-' for split in splits)}"
                for name, splits in sorted(shared.items())
            ]
            lines.append(f"youtube ids in two splits: {len(ids):,} ({'; '.join(ids[:10])})")
        return "\n".join(lines)

    def _split_table(self) -> Iterator[str]:
        yield (
            f"{'split':<6}{'listed':>9}{'found':>9}{'unlabeled':>12}{'classes':>9}   "
            "min, median, max per class"
        )
        present = Counter(video.split for video in self.videos)
        missing = Counter(video.split for video in self.missing)
        unlabeled = Counter(video.split for video in self.videos if video.label < 0)
        empty = []
        for split in self.splits:
            counts = dict(zip(self.classes, self.class_counts(split), strict=True))
            positive = [count for count in counts.values() if count]
            spread = "-"
            if positive:
                spread = f"{min(positive):,}, {median(positive):,.6g}, {max(positive):,}"
            yield (
                f"{split or '-':<6}{present[split] + missing[split]:>9,}{present[split]:>9,}"
                f"{unlabeled[split]:>12,}{len(positive):>9,}   {spread}"
            )
            if 0 < len(positive) < len(counts):
                names = [name for name, count in counts.items() if not count]
                in_split = f" in {split}" if split else ""
                empty.append(f"classes without a video{in_split}: {counted(names)}")
        yield from empty


def list_videos(
    source: StrPath,
    *,
    labels: StrPath = "auto",
    root: StrPath | None = None,
    picture_folders: bool = False,
) -> Listing:
    """List the videos of `source`.

    Args:
        source: one of
            - a folder: `<split>/<class>/<clip>`, `<class>/<clip>`, or flat. One outer folder around
              all of it is skipped, and `vol_NN` is not a class. If no folder names a class, CSVs in
              the folder or its `annotations/` are the list, if there are any.
            - a CSV `label,youtube_id,time_start,time_end,split` of Kinetics, with files anywhere
              below `root`: the clips, or for a missing clip the untrimmed `<youtube_id>.mp4` that
              it is a span of.
            - a CSV `path,label[,start,end][,split,group]`: paths below `root`, seconds; without
              `group`, a column `subject` is the group.
            - a list of another data set, see `lists`.
            - one video.
        labels: "auto" (the Kinetics-700 list if every name is in it, else the sorted names),
            "kinetics700", or a file with one class per line. Names match it as they are, with `_`
            for spaces, and with `'`, `(`, `)` removed as well.
        root: the folder of a list's videos, by default its own.
        picture_folders: accept folders of numbered pictures as videos.

    Raises:
        InputError: names what is wrong, with file and line.
    """
    source, root = os.fspath(source), None if root is None else os.fspath(root)
    with _gc_paused():
        rows, fields = _rows(source, root)
        own_folder = source if os.path.isdir(source) else os.path.dirname(source)
        listing = _listing(source, rows, labels, own_folder if root is None else root, fields)
    if not picture_folders:
        refuse_picture_folders(source, listing.picture_folders)
    return listing


def read_listing(path: StrPath, *, labels: StrPath = "auto") -> Listing:
    """The videos of a list, in its order, whose files need not exist: each path is the id.

    Raises `InputError` as `list_videos`.
    """
    source = os.fspath(path)
    if not os.path.isfile(source) or extension(source) not in LIST_EXTENSIONS:
        raise InputError(f"{source} is not a list of videos; give a CSV id,label[,split,group]")
    with _gc_paused():
        tables, layout, notes = _read_lists(lists_of(source), os.path.dirname(source) or ".")
        rows = [
            row._replace(file=row.name, span=row.span if row.untrimmed in ("", row.name) else None)
            for table in tables
            for row in table.rows
        ]
        reject_duplicates(rows)
        return _listing(source, rows, labels, "", {"layout": layout, "notes": tuple(notes)})


def _listing(
    source: str,
    rows: Sequence[Row],
    labels: StrPath,
    base: str,
    fields: dict[str, Any],
) -> Listing:
    # Labels of missing videos count: class indices must not depend on which videos are downloaded.
    names = {row.label for row in rows} - {""}
    classes, index, labels_from = choose_labels(names, labels, kinetics_names=_kinetics_names(rows))
    index[""] = -1
    videos, missing = [], []
    for row in rows:
        label = index[row.label]
        if row.file:
            path, video_id = os.path.join(base, row.file), span_id(row.file, row.span)
            group = row.group or (row.file if row.span else "")  # no split may divide a file
            videos.append(Video(video_id, path, label, row.split, group, row.span))
        else:
            missing.append(Video(row.name, "", label, row.split, row.group, row.span))
    return Listing(
        source,
        videos=tuple(videos),
        missing=tuple(missing),
        classes=classes,
        labels_from=labels_from,
        **fields,
    )


def youtube_id(video_id: str) -> str:
    """The 11 characters before `_{start:06d}_{end:06d}`, or before `.mp4#{start}-{end}`.
    `InputError` for other ids."""
    if not (clip := _CLIP.fullmatch(video_id)):
        raise InputError(
            f"{video_id!r} is not named like a clip of Kinetics: 11 characters, _<start>_<end>, "
            "extension"
        )
    return clip[1]


def shared_youtube_ids(first: Iterable[Video], second: Iterable[Video]) -> tuple[str, ...]:
    """Sorted youtube ids in both, such as leaks from Kinetics-600's train to Kinetics-700's val."""
    return tuple(
        sorted(_splits_of_youtube_ids(first).keys() & _splits_of_youtube_ids(second).keys())
    )


def _kinetics_names(rows: Sequence[Row]) -> bool:
    """Whether most files are named like clips of Kinetics, by a sample of 1,000."""
    sample = rows[:: max(1, len(rows) // 1000)]
    clips = sum(bool(_CLIP.fullmatch(span_id(row.file or row.name, row.span))) for row in sample)
    return 2 * clips > len(sample)


def _splits_of_youtube_ids(videos: Iterable[Video]) -> dict[str, set[str]]:
    splits: dict[str, set[str]] = defaultdict(set)
    for video in videos:
        if clip := _CLIP.fullmatch(video.id):
            splits[clip[1]].add(video.split)
    return splits


@contextlib.contextmanager
def _gc_paused() -> Iterator[None]:
    """Pause the cycle collector, which would take half of the time: it visits all tuples again and
    again."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def _rows(source: str, root: str | None) -> tuple[list[Row], dict[str, Any]]:
    """The videos of a source, and the fields of its listing that do not depend on the labels."""
    if not os.path.exists(source):
        link = f" (it is a link to {os.readlink(source)})" if os.path.islink(source) else ""
        raise InputError(f"there is no {source}{link}; give a folder, a CSV or a video")
    name, is_folder = os.path.basename(source), os.path.isdir(source)
    if not is_folder and extension(name) in LIST_EXTENSIONS:
        return _from_lists(
            lists_of(source), os.path.dirname(source) or "." if root is None else root
        )
    if is_folder and root is not None and (lists := lists_in(source)):
        return _from_lists(lists, root)
    if root is not None:
        raise InputError(
            f"--root {root} is the folder of a list's videos, and {source} holds no list"
        )
    if is_folder:
        return _from_folder(source)
    if extension(name) not in VIDEO_EXTENSIONS:
        extensions = " ".join(sorted(VIDEO_EXTENSIONS))
        raise InputError(
            f"{source} is not a folder, a list or, by its extension, a video; known are "
            f"{extensions}"
        )
    if escape_non_utf8(name) != name:
        raise InputError(
            f"the name {escape_non_utf8(name)} is not UTF-8, so that no store can hold it; "
            "rename the video"
        )
    return [Row(source, 0, name, "", "", file=name)], {"layout": "one video"}


def _from_folder(source: str) -> tuple[list[Row], dict[str, Any]]:
    files, ignored, inodes, pictures = scanned = scan(source)
    if not files:
        if not ignored:
            raise InputError(f"{source} contains no video; it is empty")
        reasons = "; ".join(f"{reason}: {counted(names)}" for reason, names in ignored.items())
        names = [name for names in ignored.values() for name in names]
        hint = ""
        if any(name.lower().endswith(PICTURE_EXTENSIONS) for name in names):
            hint = f". {FRAMES_HINT[0].upper()}{FRAMES_HINT[1:]}"
        raise InputError(f"{source} contains no video; ignored: {reasons}{hint}")
    by_folder = split_and_class({folder(file) for file in files})
    splits, classes = (any(names[part] for names in by_folder.values()) for part in range(2))
    if not classes and (tables := _tables_in(source)):
        return _from_lists(tables, source, scanned=scanned)
    rows = [Row(source, 0, file, *by_folder[folder(file)][::-1], file=file) for file in files]
    layout = "/".join([*["<split>"] * splits, *["<class>"] * classes, "<clip>"])
    layout = f"folders {layout}" if splits or classes else "a flat folder"
    return rows, {
        "layout": layout,
        "ignored": ignored,
        "notes": (*describe_picture_folders(pictures), *describe_leaks(rows, source, inodes)),
        "picture_folders": tuple(pictures),
    }


def _tables_in(source: str) -> list[str]:
    """The CSVs directly in a folder or in its `annotations/` that have the columns of a list."""
    folders = filter(os.path.isdir, (source, os.path.join(source, "annotations")))
    return [path for folder in folders for path in files_like_lists(folder) if is_table(path)]


def _read_lists(paths: Sequence[str], root: str) -> tuple[list[Table], str, list[str]]:
    """The tables of lists, a description, and the notes of all without repeats."""
    tables = [read_list(path, root) for path in paths]
    if not any(table.rows for table in tables):
        raise InputError(f"{paths[0]} has a header and no rows")
    notes = dict.fromkeys(note for table in tables for note in table.notes)
    return tables, " and ".join(map(os.path.basename, paths)), list(notes)


def _from_lists(
    paths: Sequence[str], root: str, *, scanned: Scan | None = None
) -> tuple[list[Row], dict[str, Any]]:
    """Videos of one or several lists below `root`. scanned: `scan(root)`, if already done."""
    if not os.path.isdir(root):
        raise InputError(
            f"--root {root} is not a folder; give the folder of the videos of {paths[0]}"
        )
    tables, description, notes = _read_lists(paths, root)
    by_path = [row for table in tables if table.kind == "path" for row in table.rows]
    by_stem = [row for table in tables if table.kind != "path" for row in table.rows]
    # A list of paths may be in a large folder: only the folders that it names are scanned.
    only = None if by_stem else {row.name.partition("/")[0] for row in by_path}
    files, ignored, inodes, pictures = scanned or scan(root, only=only)
    rows = [*locate_stems(by_stem, files if by_stem else ()), *locate_paths(by_path, files, root)]
    reject_duplicates(rows, of_two_classes=any(table.kind == "clip" for table in tables))
    located = [row for row in rows if row.file]
    if not located:
        present = f"there are {first_few(files)}" if files else "there is no video"
        raise InputError(
            f"none of the {len(rows):,} videos of {paths[0]} is below {root} "
            f"(looked for {rows[0].name}, {present}); give their folder with --root"
        )
    if spans := sum(row.span is not None for row in located):
        notes.append(
            f"{spans:,} are spans of untrimmed files, cut while reading; "
            f"{len(located) - spans:,} are whole files"
        )
        # Spans of one file are sorted by start and next to each other, to be read in one pass.
        order: dict[str, int] = {}
        for row in rows:
            order.setdefault(row.file, len(order))
        rows.sort(key=lambda row: (order[row.file], row.span or ()))
    used = {row.file for row in located}
    pictures = {name: gap for name, gap in pictures.items() if name in used}
    notes += [*describe_picture_folders(pictures), *describe_leaks(located, root, inodes)]
    read = used | {os.path.relpath(path, root) for path in paths}
    ignored = {
        reason: tuple(name for name in names if name not in read)
        for reason, names in ignored.items()
    }
    return rows, {
        "layout": f"{description}, files below {root}",
        "unlisted": tuple(file for file in files if file not in used),
        "ignored": {reason: names for reason, names in ignored.items() if names},
        "notes": tuple(notes),
        "picture_folders": tuple(pictures),
    }


def _count(number: int, noun: str, plural: str = "") -> str:
    return f"{number:,} {noun if number == 1 else plural or noun + 's'}"
