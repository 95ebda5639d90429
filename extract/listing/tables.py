"""CSV files that list videos: `label,youtube_id,time_start,time_end,split` (Kinetics) and `path,label[,split,group]`.

Columns go by the header's names, never by position. Every error names file and line.
"""

import csv
import os
import posixpath
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from functools import cache
from typing import Literal, NamedTuple

from extract.cli import InputError
from extract.listing.folders import SPLITS, extension, folder, split_of
from extract.listing.labels import spellings

KINETICS_COLUMNS = ("youtube_id", "time_start", "time_end", "split")  # label too, but files for test lack it
PATH_COLUMNS = ("path", "label")  # and, where they are there: split, and group or else subject

_YOUTUBE_ID = re.compile(r"[A-Za-z0-9_-]{11}")


class Row(NamedTuple):
    """One listed video; `name` is a path below the root, in a Kinetics CSV the file's name without extension."""

    table: str
    line: int
    name: str
    label: str  # "" for unknown
    split: str
    group: str = ""

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
    paths = [os.path.join(place, name) for place in around for name in sorted(os.listdir(place))]
    return [
        path
        for path in paths
        if extension(path) == "csv" and not os.path.basename(path).startswith(".") and _kind(_header(path))
    ]


def read_table(path: str, root: str) -> Table:
    """The rows of a CSV whose videos lie below the folder `root`; `InputError` names the line that is wrong."""
    columns = _header(path)
    kind = _kind(columns)
    if kind == "kinetics":
        return Table(kind, list(_kinetics_rows(path, columns)))
    if kind == "path":
        group = next((name for name in ("group", "subject") if name in columns), "")
        return Table(kind, list(_path_rows(path, columns, root, group)), group)
    raise InputError(
        f"{path} has the columns {', '.join(columns) or '(none)'}; needed are {', '.join(KINETICS_COLUMNS)} "
        f"(and label, but for test), or {', '.join(PATH_COLUMNS)} (and split, group)"
    )


def find_clips(rows: Sequence[Row], files: Iterable[str]) -> Iterator[tuple[Row, str]]:
    """Rows of Kinetics with their file, "" for none: by its name, and never from the folder of another split."""
    first: dict[str, str] = {}
    more: dict[str, list[str]] = defaultdict(list)
    for file in files:
        if (name := stem(file)) in first:
            more[name].append(file)
        else:
            first[name] = file
    split_of_folder = cache(split_of)
    for row in rows:
        file = first.get(row.name, "")
        if file and (row.name in more or split_of_folder(folder(file)) not in ("", row.split)):
            file = _the_one(row, [file, *more.get(row.name, ())])
        yield row, file


def _the_one(row: Row, files: Sequence[str]) -> str:
    there = [file for file in files if not row.split or split_of(folder(file)) in ("", row.split)]
    if len(there) > 1:  # a clip that is there under two classes: the row's own
        there = [file for file in there if not spellings(row.label).isdisjoint(file.split("/"))] or there
    if len(there) > 1:
        raise InputError(f"{row.where}: {there[0]} and {there[1]} could both be {row.name}; remove one")
    return there[0] if there else ""


def find_paths(rows: Sequence[Row], files: Iterable[str], root: str) -> Iterator[tuple[Row, str]]:
    """Rows of paths with their file, "" for none; what a row names is a video, whatever its extension."""
    there = set(files)
    for row in rows:
        yield row, row.name if row.name in there or os.path.lexists(os.path.join(root, row.name)) else ""


def files_of(found: Iterable[tuple[Row, str]]) -> set[str]:
    """All files of all rows; `InputError` where two rows stand for one file, or for one missing video."""
    first: dict[str | tuple[str, ...], Row] = {}
    files = set()
    for row, file in found:
        # A missing clip may stand under two classes: it has no file that would have to decide for one.
        if (earlier := first.setdefault(file or (row.name, row.label, row.split), row)) is not row:
            raise InputError(f"{earlier.where} and {row.where} both list {file or row.name}; a video stands in one row")
        files.add(file)
    return files - {""}


def stem(path: str) -> str:
    """The name at the end of a POSIX path, without its extension."""
    name = path.rpartition("/")[2]
    return name.rpartition(".")[0] or name


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


def _values(path: str, columns: Sequence[str], wanted: Sequence[str]) -> Iterator[tuple[int, list[str]]]:
    """The line of each row and its values of the `wanted` columns, "" for a column that is not there."""
    positions = [columns.index(name) if name and name in columns else None for name in wanted]
    lines = _lines(path)
    next(lines)
    for line, fields in lines:
        if len(fields) < len(columns) or any(fields[len(columns) :]):
            raise InputError(
                f"{path} line {line} has {len(fields)} values and the header {len(columns)}; "
                "a value that holds a comma must be quoted"
            )
        yield line, ["" if at is None else fields[at].strip() for at in positions]


def _kinetics_rows(path: str, columns: Sequence[str]) -> Iterator[Row]:
    labelled = "label" in columns
    for line, (name, start, end, said, label) in _values(path, columns, (*KINETICS_COLUMNS, "label")):
        if not _YOUTUBE_ID.fullmatch(name):
            raise InputError(f"{path} line {line}: {name!r} is no youtube id, which has 11 characters")
        try:
            clip = f"{name}_{int(float(start)):06d}_{int(float(end)):06d}"
        except (ValueError, OverflowError):
            raise InputError(f"{path} line {line}: {start!r} to {end!r} are no times in seconds") from None
        split = _split(said, path, line)
        if labelled and not label and split != "test":
            raise InputError(f"{path} line {line}: {name} has no label; only videos of the test split may lack one")
        yield Row(path, line, clip, label, split)


def _path_rows(path: str, columns: Sequence[str], root: str, group_column: str) -> Iterator[Row]:
    base = os.path.abspath(root)
    for line, (name, label, said, group) in _values(path, columns, ("path", "label", "split", group_column)):
        if not name:
            raise InputError(f"{path} line {line} has no path")
        below = os.path.relpath(name, base) if os.path.isabs(name) else name
        below = posixpath.normpath(below.replace(os.sep, "/"))
        if below.split("/")[0] in ("..", "."):  # an id is also a place below the folder that an export fills
            raise InputError(
                f"{path} line {line}: {name} is not below {root}; give --root DIR, a folder around all videos"
            )
        yield Row(path, line, below, label, _split(said, path, line), group)


def _split(value: str, path: str, line: int) -> str:
    split = SPLITS.get(value.lower(), "")
    if value and not split:
        raise InputError(f"{path} line {line}: the split {value!r} is unknown; known are {', '.join(SPLITS)}")
    return split
