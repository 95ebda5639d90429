"""What there is to extract: a folder, a CSV or one file becomes a `Listing` of videos with label,
split and group.

Nothing is guessed in silence: what is not listed is counted and named with the reason, and a class
index comes from a list of labels, never from the order of folders.
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

from extract import InputError
from extract.cli import first_few
from extract.listing.folders import (
    VIDEO_EXTENSIONS,
    Scan,
    escape_non_utf8,
    extension,
    folder,
    scan,
    split_and_class,
)
from extract.listing.labels import choose_labels, kinetics700_labels
from extract.listing.leaks import describe_leaks
from extract.listing.lists import (
    FRAMES_HINT,
    LIST_EXTENSIONS,
    is_table,
    lists_in,
    lists_of,
    read_list,
)
from extract.listing.locate import locate_paths, locate_stems, reject_duplicates
from extract.listing.pictures import describe_picture_folders, refuse_picture_folders
from extract.listing.tables import Row, span_id
from extract.numbered import PICTURE_EXTENSIONS

__all__ = [
    "Listing",
    "Video",
    "kinetics700_labels",
    "list_videos",
    "shared_youtube_ids",
    "youtube_id",
]

# Of a clip, or of a span of an untrimmed video.
_CLIP = re.compile(
    r"(?:.*/)?([A-Za-z0-9_-]{11})(?:_\d{6,}_\d{6,}(?:\.[^.]*)?|\.[^.#]+#\d+-\d+)", re.DOTALL
)


@dataclass(frozen=True, slots=True)
class Video:
    """One video: `id` is its POSIX path below the source, `label` an index in the listing's classes
    or -1.

    With a `span` it is a part of its file, in seconds, and its id ends with the milliseconds:
    `a.mp4#2000-5000`.
    """

    id: str
    path: str
    label: int
    split: str = ""
    group: str = ""
    span: tuple[float, float] | None = None


@dataclass(frozen=True)
class Listing:
    """The videos of a source and what was left out of them; `report()` says it all in a short
    table.

    `videos` are sorted by id, those of a CSV stand in its order, spans of one file side by side.
    `missing` are rows of a CSV without a file (their id is the name that was looked for),
    `unlisted` are videos beside them that no row names, `ignored` holds, by reason, the names of
    what is not a video.
    """

    source: str
    layout: str  # how the source was read, in words
    videos: tuple[Video, ...] = field(repr=False)
    classes: tuple[str, ...] = field(repr=False)
    labels_from: str  # where the classes come from, in words
    missing: tuple[Video, ...] = field(default=(), repr=False)
    unlisted: tuple[str, ...] = field(default=(), repr=False)
    ignored: Mapping[str, tuple[str, ...]] = field(default_factory=dict, repr=False)
    notes: tuple[str, ...] = ()
    picture_folders: tuple[str, ...] = field(default=(), repr=False)  # paths below the root

    @property
    def splits(self) -> tuple[str, ...]:
        """The splits that a video is listed in: of train, val, test, "", in this order."""
        there = {video.split for video in (*self.videos, *self.missing)}
        return tuple(split for split in ("train", "val", "test", "") if split in there)

    def class_counts(self, split: str) -> tuple[int, ...]:
        """How many videos of a split each class has, in the order of `classes`."""
        counts = Counter(video.label for video in self.videos if video.split == split)
        return tuple(counts[label] for label in range(len(self.classes)))

    def youtube_ids_in_two_splits(self) -> dict[str, tuple[str, ...]]:
        """Youtube ids that are listed in more than one split, with the splits; other names are not
        looked at."""
        splits: dict[str, set[str]] = defaultdict(set)
        for name, video in _youtube_ids((*self.videos, *self.missing)):
            splits[name].add(video.split)
        return {name: tuple(sorted(where)) for name, where in splits.items() if len(where) > 1}

    def report(self) -> str:
        """Listed, found, missing; per split and class; what was ignored and why; youtube ids in two
        splits."""
        found, missing = len(self.videos), len(self.missing)
        lines = [
            f"{self.source}: {self.layout}",
            f"{_count(found + missing, 'video')} listed, {found:,} found, {missing:,} missing"
            + _named([video.id for video in self.missing]),
            f"{_count(len(self.classes), 'class', 'classes')}: {self.labels_from}",
            *self.notes,
            *self._split_table(),
            *(
                f"ignored, {why}: {len(names):,}{_named(names)}"
                for why, names in sorted(self.ignored.items())
            ),
        ]
        if self.unlisted:
            lines.append(
                f"left out, in no row of the CSV: {len(self.unlisted):,}{_named(self.unlisted)}"
            )
        if twice := self.youtube_ids_in_two_splits():
            named = [
                f"{name}: {', '.join(split or '-' for split in where)}"
                for name, where in sorted(twice.items())
            ]
            lines.append(
                f"youtube ids that stand in two splits: {len(twice):,} ({'; '.join(named[:10])})"
            )
        return "\n".join(lines)

    def _split_table(self) -> Iterator[str]:
        yield f"{'split':<6}{'listed':>9}{'found':>9}{'unlabeled':>12}{'classes':>9}   min, median, max a class"
        found = Counter(video.split for video in self.videos)
        missing = Counter(video.split for video in self.missing)
        unlabeled = Counter(video.split for video in self.videos if video.label < 0)
        empty = []
        for split in self.splits:
            counts = self.class_counts(split)
            some = [count for count in counts if count]
            spread = f"{min(some):,}, {median(some):,.6g}, {max(some):,}" if some else "-"
            listed = found[split] + missing[split]
            yield (
                f"{split or '-':<6}{listed:>9,}{found[split]:>9,}{unlabeled[split]:>12,}{len(some):>9,}   {spread}"
            )
            if some and len(some) < len(counts):
                names = [
                    name for name, count in zip(self.classes, counts, strict=True) if not count
                ]
                empty.append(
                    f"classes without a video{f' in {split}' if split else ''}: {len(names):,}{_named(names)}"
                )
        yield from empty


def list_videos(
    source: str | os.PathLike[str],
    *,
    labels: str | os.PathLike[str] = "auto",
    root: str | os.PathLike[str] | None = None,
    picture_folders: bool = False,
) -> Listing:
    """List the videos of `source`:

    - a folder: `<split>/<class>/<clip>`, `<class>/<clip>`, or flat. One outer folder around all of it is looked
      through, `vol_NN` is not a class. If the folders name no class, CSVs in the folder or its `annotations/` are the
      list, if there are any; where they do, they are believed and no CSV is read.
    - a CSV `label,youtube_id,time_start,time_end,split` of Kinetics, its files anywhere below `root`: the clips, or
      where one is not there, the untrimmed `<youtube_id>.mp4` that it is a span of,
    - a CSV `path,label[,start,end][,split,group]`, paths below `root`, start and end in seconds; without `group`, a
      column `subject` is the group,
    - one video.

    A folder of numbered pictures of one pattern is a video too, where videos are, if the caller can
    read such `picture_folders`; else they are refused.

    `root` is the CSV's own folder unless given. `labels` is "auto" (the Kinetics-700 list where
    every name is in it, else the sorted names), "kinetics700", or a file with one class a line;
    names match it as they are, with `_` for spaces, and with `'`, `(`, `)` removed as well. Raises
    `InputError`, which says what is wrong and where.
    """
    source, root = os.fspath(source), None if root is None else os.fspath(root)
    with _gc_paused():
        rows, fields = _rows(source, root)
        base = (
            source if os.path.isdir(source) else os.path.dirname(source) if root is None else root
        )
        listing = _listing(source, rows, labels, base, fields)
    if not picture_folders:
        refuse_picture_folders(source, listing.picture_folders)
    return listing


def read_listing(
    path: str | os.PathLike[str], *, labels: str | os.PathLike[str] = "auto"
) -> Listing:
    """What a list says of its videos, whose files need not exist: `videos` in its order, each path
    is the id.

    Raises `InputError` as `list_videos`.
    """
    source = os.fspath(path)
    if not os.path.isfile(source) or extension(source) not in LIST_EXTENSIONS:
        raise InputError(f"{source} is not a list of videos; give a CSV id,label[,split,group]")
    with _gc_paused():
        paths = lists_of(source)
        tables = [read_list(path, os.path.dirname(source) or ".") for path in paths]
        rows = [
            row._replace(file=row.name, span=row.span if row.untrimmed in ("", row.name) else None)
            for table in tables
            for row in table.rows
        ]
        if not rows:
            raise InputError(f"{source} has a header and no rows")
        reject_duplicates(rows)
        notes = tuple(dict.fromkeys(note for table in tables for note in table.notes))
        layout = " and ".join(map(os.path.basename, paths))
        return _listing(source, rows, labels, "", {"layout": layout, "notes": notes})


def _listing(
    source: str,
    rows: Sequence[Row],
    labels: str | os.PathLike[str],
    base: str,
    fields: dict[str, Any],
) -> Listing:
    # Missing videos count: a class index must not depend on how much of a data set has been
    # downloaded.
    names = {row.label for row in rows} - {""}
    classes, index, labels_from = choose_labels(names, labels, kinetics_names=_kinetics_names(rows))
    index[""] = -1
    videos = [
        Video(
            span_id(row.file or row.name, row.span if row.file else None),
            os.path.join(base, row.file) if row.file else "",
            index[row.label],
            row.split,
            row.group
            or (row.file if row.span else ""),  # the spans of a file must not be torn apart
            row.span,
        )
        for row in rows
    ]
    found = tuple(video for video in videos if video.path)
    missing = tuple(video for video in videos if not video.path)
    return Listing(
        source, videos=found, missing=missing, classes=classes, labels_from=labels_from, **fields
    )


def youtube_id(video_id: str) -> str:
    """The 11 characters before `_{start:06d}_{end:06d}`, or before `.mp4#{start}-{end}`;
    `InputError` for others."""
    if not (clip := _CLIP.fullmatch(video_id)):
        raise InputError(
            f"{video_id!r} is not named like a clip of Kinetics: 11 characters, _<start>_<end>, extension"
        )
    return clip[1]


def shared_youtube_ids(first: Iterable[Video], second: Iterable[Video]) -> tuple[str, ...]:
    """Youtube ids on both sides, sorted: what leaks from, say, Kinetics-600's train into
    Kinetics-700's val."""
    ids = {name for name, _ in _youtube_ids(first)}
    return tuple(sorted(ids & {name for name, _ in _youtube_ids(second)}))


def _kinetics_names(rows: Sequence[Row]) -> bool:
    """Whether most files are named like clips of Kinetics, by a sample of 1,000."""
    sample = rows[:: max(1, len(rows) // 1000)]
    clips = sum(bool(_CLIP.fullmatch(span_id(row.file or row.name, row.span))) for row in sample)
    return 2 * clips > len(sample)


def _youtube_ids(videos: Iterable[Video]) -> Iterator[tuple[str, Video]]:
    for video in videos:
        if clip := _CLIP.fullmatch(video.id):
            yield clip[1], video


@contextlib.contextmanager
def _gc_paused() -> Iterator[None]:
    """Without the cycle collector, which walks over all the tuples made so far again and again:
    half of the time."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def _rows(source: str, root: str | None) -> tuple[list[Row], dict[str, Any]]:
    """The videos of a source before its classes have an index, and the fields of its listing that
    are known."""
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
            f"--root {root} says where the videos of a list are, and {source} holds no list"
        )
    if is_folder:
        return _from_folder(source)
    if extension(name) not in VIDEO_EXTENSIONS:
        known = " ".join(sorted(VIDEO_EXTENSIONS))
        raise InputError(
            f"{source} is not a folder, a list or, by its extension, a video; known are {known}"
        )
    if escape_non_utf8(name) != name:
        raise InputError(
            f"the name {escape_non_utf8(name)} is not UTF-8, so that no store can hold it; rename the video"
        )
    return [Row(source, 0, name, "", "", file=name)], {"layout": "one video"}


def _from_folder(source: str) -> tuple[list[Row], dict[str, Any]]:
    files, ignored, inodes, pictures = scanned = scan(source)
    if not files:
        why = "; ".join(
            f"{reason}: {len(names):,}{_named(names)}" for reason, names in ignored.items()
        )
        names = [name for names in ignored.values() for name in names]
        hint = ""
        if any(name.lower().endswith(PICTURE_EXTENSIONS) for name in names):
            hint = f". {FRAMES_HINT[0].upper()}{FRAMES_HINT[1:]}"
        raise InputError(
            f"there is no video in {source}; " + (f"ignored: {why}{hint}" if why else "it is empty")
        )
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
    """The CSVs directly in a folder or in its `annotations/` that have the columns of a list of
    videos."""
    folders = [
        path for path in (source, os.path.join(source, "annotations")) if os.path.isdir(path)
    ]
    paths = [
        os.path.join(path, name)
        for path in folders
        for name in sorted(os.listdir(path))
        if name[0] != "."
    ]
    return [path for path in paths if is_table(path)]


def _from_lists(
    paths: Sequence[str], root: str, *, scanned: Scan | None = None
) -> tuple[list[Row], dict[str, Any]]:
    """Videos of one or several lists below `root`; `scanned` is `scan(root)` if it has been made
    already."""
    if not os.path.isdir(root):
        raise InputError(
            f"--root {root} is not a folder; it says where the videos of {paths[0]} are"
        )
    tables = [read_list(path, root) for path in paths]
    by_path = [row for table in tables if table.kind == "path" for row in table.rows]
    by_stem = [row for table in tables if table.kind != "path" for row in table.rows]
    if not by_path and not by_stem:
        raise InputError(f"{paths[0]} has a header and no rows")
    # A list of paths may lie in a large folder: only the folders that it names are looked into.
    only = None if by_stem else {row.name.partition("/")[0] for row in by_path}
    files, ignored, inodes, pictures = scanned or scan(root, only=only)
    rows = [*locate_stems(by_stem, files if by_stem else ()), *locate_paths(by_path, files, root)]
    reject_duplicates(rows, of_two_classes=any(table.kind == "clip" for table in tables))
    found = [row for row in rows if row.file]
    if not found:
        present = f"there are {first_few(files)}" if files else "there is no video"
        raise InputError(
            f"none of the {len(rows):,} videos of {paths[0]} is below {root} (looked for {rows[0].name}, {present}); "
            "say with --root where they are"
        )
    notes = list(dict.fromkeys(note for table in tables for note in table.notes))
    if spans := sum(row.span is not None for row in found):
        whole = len(found) - spans
        notes.append(
            f"{spans:,} are spans of untrimmed files, cut while reading; {whole:,} are whole files"
        )
        # Spans of one file next to each other, by when they begin, so that it is read in one pass.
        first = {row.file: place for place, row in reversed([*enumerate(rows)])}
        rows.sort(key=lambda row: (first[row.file], row.span or ()))
    used = {row.file for row in found}
    pictures = {name: gap for name, gap in pictures.items() if name in used}
    notes += [*describe_picture_folders(pictures), *describe_leaks(found, root, inodes)]
    read = used | {os.path.relpath(path, root).replace(os.sep, "/") for path in paths}
    left = {
        why: tuple(name for name in names if name not in read) for why, names in ignored.items()
    }
    return rows, {
        "layout": f"{' and '.join(map(os.path.basename, paths))}, files below {root}",
        "unlisted": tuple(file for file in files if file not in used),
        "ignored": {why: names for why, names in left.items() if names},
        "notes": tuple(notes),
        "picture_folders": tuple(pictures),
    }


def _named(names: Sequence[str]) -> str:
    return f" ({first_few(names)})" if names else ""


def _count(number: int, one: str, many: str = "") -> str:
    return f"{number:,} {one if number == 1 else many or one + 's'}"
