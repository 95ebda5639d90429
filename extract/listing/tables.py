"""CSV files that list videos: `label,youtube_id,time_start,time_end,split` (Kinetics) and
`path,label[,start,end][,split,group]`.

Columns go by the header's names, never by position. Every error names file and line.
"""

import csv
import os
import posixpath
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache, partial
from typing import Literal, NamedTuple

from extract.cli import InputError
from extract.listing.folders import SPLITS, extension, folder, split_of
from extract.listing.labels import spellings

KINETICS_COLUMNS = ("youtube_id", "time_start", "time_end", "split")  # label too, but files for test lack it
PATH_COLUMNS = ("path", "label")  # and, where they are there: start and end, split, and group or else subject

_YOUTUBE_ID = re.compile(r"[A-Za-z0-9_-]{11}")


class Row(NamedTuple):
    """One listed video; `name` is a path below the root, in a Kinetics CSV the file's name without extension.

    `file` is what was found for it, below the root, "" for none (yet).
    """

    table: str
    line: int
    name: str
    label: str  # "" for unknown
    split: str
    group: str = ""
    span: tuple[float, float] | None = None  # seconds; of Kinetics, what an untrimmed video is to be cut by
    file: str = ""

    @property
    def where(self) -> str:
        """For messages: "k700/train.csv line 7"."""
        return f"{self.table} line {self.line}"


class Table(NamedTuple):
    """The rows of one CSV; `group_column` is where the groups come from, "" for none."""

    kind: Literal["kinetics", "path"]
    rows: list[Row]
    group_column: str = ""


def tables_in(source: str) -> list[str]:
    """The CSVs directly in a folder or in its `annotations/` that have the columns of a list of videos."""
    around = [place for place in (source, os.path.join(source, "annotations")) if os.path.isdir(place)]
    names = [(place, name) for place in around for name in sorted(os.listdir(place)) if not name.startswith(".")]
    paths = [os.path.join(*there) for there in names if extension(there[1]) == "csv"]
    return [path for path in paths if _kind(_header(path))]


def read_table(path: str, root: str) -> Table:
    """The rows of a CSV whose videos lie below the folder `root`; `InputError` names the line that is wrong."""
    columns = _header(path)
    kind = _kind(columns)
    if kind == "kinetics":
        labelled = "label" in columns
        return Table(kind, list(_rows(path, columns, (*KINETICS_COLUMNS, "label"), partial(_clip, labelled))))
    if kind == "path":
        group = next((name for name in ("group", "subject") if name in columns), "")
        wanted = ("path", "label", "split", group, "start", "end")
        return Table(kind, list(_rows(path, columns, wanted, partial(_path, root))), group)
    raise InputError(
        f"{path} has the columns {', '.join(columns) or '(none)'}; needed are {', '.join(KINETICS_COLUMNS)} "
        f"(and label, but for test), or {', '.join(PATH_COLUMNS)} (and start, end, split, group)"
    )


def find_clips(rows: Iterable[Row], files: Iterable[str]) -> Iterator[Row]:
    """Rows of Kinetics with their file: the clip of that name, or else the untrimmed video that it is a span of.

    A file never comes from the folder of another split.
    """
    by_stem: dict[str, list[str]] = defaultdict(list)
    for file in files:
        by_stem[stem(file)].append(file)
    split_of_folder = cache(split_of)
    for row in rows:
        for name, span in ((row.name, None), (row.name[:11], row.span)):
            there = [
                file
                for file in by_stem.get(name, ())
                if not row.split or split_of_folder(folder(file)) in ("", row.split)
            ]
            if len(there) > 1:  # a clip that is there under two classes: the row's own
                there = [file for file in there if not spellings(row.label).isdisjoint(file.split("/"))] or there
            if len(there) > 1:
                raise InputError(f"{row.where}: {there[0]} and {there[1]} could both be {row.name}; remove one")
            if there:
                row = row._replace(span=span, file=there[0])
                break
        yield row


def find_paths(rows: Iterable[Row], files: Iterable[str], root: str) -> Iterator[Row]:
    """Rows of paths with their file; what a row names is a video, whatever its extension."""
    there = set(files)
    for row in rows:
        if row.name not in there and os.path.lexists(os.path.join(root, row.name)):
            there.add(row.name)
        yield row._replace(file=row.name) if row.name in there else row


def refuse_doubles(rows: Iterable[Row], *, of_two_classes: bool) -> None:
    """`InputError` where two rows stand for one file, or one span of it, or one missing video (unless of two classes).

    A missing clip of Kinetics may stand under two classes: it has no file that would have to decide for one.
    """
    first: dict[tuple, Row] = {}
    for row in rows:
        key = (row.file or row.name, row.span, *((row.label, row.split) if of_two_classes and not row.file else ()))
        if (earlier := first.setdefault(key, row)) is not row:
            what = span_id(row.file or row.name, row.span)
            raise InputError(f"{earlier.where} and {row.where} both list {what}; a video stands in one row")


def stem(path: str) -> str:
    """The name at the end of a POSIX path, without its extension."""
    name = path.rpartition("/")[2]
    return name.rpartition(".")[0] or name


def span_id(path: str, span: tuple[float, float] | None) -> str:
    """The id of a span of a file: `match.mp4#2000-5000`, in milliseconds; the path itself for the whole."""
    return path if span is None else f"{path}#{span[0] * 1000:.0f}-{span[1] * 1000:.0f}"


def _kind(columns: Sequence[str]) -> Literal["kinetics", "path", ""]:
    if set(PATH_COLUMNS) <= set(columns):
        return "path"
    return "kinetics" if set(KINETICS_COLUMNS) <= set(columns) else ""


def _header(path: str) -> list[str]:
    first = next(_lines(path), None)
    return [] if first is None else [name.strip().lower() for name in first[1]]


def _lines(path: str) -> Iterator[tuple[int, list[str]]]:
    """Line number and fields of each line that is not blank."""
    line = 0
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file, strict=True)  # a quote that is never closed must not swallow the rest
            for fields in reader:
                line = reader.line_num
                if any(fields):
                    yield line, fields
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 text ({error}); save it as UTF-8") from None
    except csv.Error as error:
        raise InputError(f"{path} cannot be read as a CSV after line {line}: {error}") from None


def _rows(path: str, columns: Sequence[str], wanted: Sequence[str], parse: Callable[..., Iterable]) -> Iterator[Row]:
    """What `parse` makes of each line's values of the `wanted` columns, "" for a column that is not there.

    Its ValueError comes out as an InputError that names the line.
    """
    positions = [columns.index(name) if name and name in columns else None for name in wanted]
    lines = _lines(path)
    next(lines)
    for line, fields in lines:
        if len(fields) < len(columns) or any(fields[len(columns) :]):
            counts = f"{len(fields)} values and the header {len(columns)}"
            raise InputError(f"{path} line {line} has {counts}; a value that holds a comma must be quoted")
        try:
            made = parse(*["" if at is None else fields[at].strip() for at in positions])
        except ValueError as error:
            raise InputError(f"{path} line {line}: {error}") from None
        yield Row(path, line, *made)


def _clip(labelled: bool, name: str, start: str, end: str, said: str, label: str) -> tuple:
    if not _YOUTUBE_ID.fullmatch(name):
        raise ValueError(f"{name!r} is no youtube id, which has 11 characters")
    span, split = _span(start, end), _split(said)
    if labelled and not label and split != "test":
        raise ValueError(f"{name} has no label; only videos of the test split may lack one")
    return f"{name}_{int(span[0]):06d}_{int(span[1]):06d}", label, split, "", span


def _path(root: str, name: str, label: str, said: str, group: str, start: str, end: str) -> tuple:
    if not name:
        raise ValueError("its path is empty")
    below = os.path.relpath(name, os.path.abspath(root)) if os.path.isabs(name) else name
    below = posixpath.normpath(below.replace(os.sep, "/"))
    if below.split("/")[0] in ("..", "."):  # an id is also a place below the folder that an export fills
        raise ValueError(f"{name} is not below {root}; give --root DIR, a folder around all videos")
    return below, label, _split(said), group, _span(start, end) if start or end else None


def _span(start: str, end: str) -> tuple[float, float]:
    """Seconds, in whole milliseconds."""
    try:
        span = round(float(start) * 1000), round(float(end) * 1000)
    except (ValueError, OverflowError):
        raise ValueError(f"{start!r} to {end!r} are no times in seconds") from None
    if not 0 <= span[0] < span[1]:
        raise ValueError(f"{start} to {end} s is no span; it begins at 0 or later, and ends after it begins")
    return span[0] / 1000, span[1] / 1000


def _split(value: str) -> str:
    if value and value.lower() not in SPLITS:
        raise ValueError(f"the split {value!r} is unknown; known are {', '.join(SPLITS)}")
    return SPLITS[value.lower()] if value else ""
