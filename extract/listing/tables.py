"""Tables with a header: delimited text in which each row lists a video, or a span of one.

    label,youtube_id,time_start,time_end,split        Kinetics (test files may lack label)
    path,label[,start,end][,split][,group]            our own; `id` for path and `subject` for group are taken too
    classname,youtube_id,subset,start,end,label       HACS clips; rows with label -1 are not of the class: left out
    video_id,start_timestamp,stop_timestamp,label     EPIC-KITCHENS, after the column to learn was renamed to label

Columns go by the header's names, never by position; commas, semicolons or tabs separate them.
Seconds may be written `01:02:03.450`. Every error names file and line.
"""

import csv
import os
import posixpath
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Literal, NamedTuple

from extract import InputError
from extract.listing.folders import SPLITS

_YOUTUBE_ID = re.compile(r"[A-Za-z0-9_-]{11}")
_SEPARATORS = {",": "commas", ";": "semicolons", "\t": "tabs"}


class Row(NamedTuple):
    """One listed video; `name` is a path below the root, or a file's name without extension.

    `file` is the file that was found for it, below the root, "" for none (yet).
    """

    table: str
    line: int
    name: str
    label: str  # "" for unknown
    split: str
    group: str = ""
    span: tuple[float, float] | None = None  # seconds; of Kinetics, to cut an untrimmed video by
    file: str = ""
    untrimmed: str = ""  # the name, without extension, of the video that the span is a part of

    @property
    def location(self) -> str:
        """For messages: "k700/train.csv line 7"."""
        return f"{self.table} line {self.line}"


class Table(NamedTuple):
    """The rows of one list. Its videos are named by `path`, or by `stem`: a file's name without its
    extension.

    `clip` is the latter of Kinetics, in which a missing video may be listed under two classes.
    """

    kind: Literal["path", "stem", "clip"]
    rows: list[Row]
    notes: tuple[str, ...] = ()


class Header(NamedTuple):
    """The first line of a table."""

    columns: list[str]
    separator: str


Values = Mapping[str, str]
# Of one line: its values, the root, the list's path and the line's number; None for a row to leave
# out.
ParseRow = Callable[[Values, str, str, int], Row | None]


def _parse_kinetics_row(values: Values, root: str, table: str, line: int) -> Row:
    name, label, split = values["youtube_id"], values.get("label", ""), parse_split(values["split"])
    _check_youtube_id(name)
    span = parse_span(values["time_start"], values["time_end"])
    if "label" in values and not label and split != "test":
        raise ValueError(f"{name} has no label; only videos of the test split may lack one")
    clip = f"{name}_{int(span[0]):06d}_{int(span[1]):06d}"
    return Row(table, line, clip, label, split, "", span, "", name)


def _parse_path_row(values: Values, root: str, table: str, line: int) -> Row:
    start, end = values.get("start", ""), values.get("end", "")
    span = parse_span(start, end) if start or end else None
    group = values["group"] if "group" in values else values.get("subject", "")
    return Row(
        table,
        line,
        path_below(values["path"], root),
        values["label"],
        parse_split(values.get("split", "")),
        group,
        span,
    )


def _parse_hacs_row(values: Values, root: str, table: str, line: int) -> Row | None:
    name = values["youtube_id"]
    _check_youtube_id(name)
    if values["label"] not in ("1", "-1"):
        raise ValueError(f"the label {values['label']!r} of HACS is neither 1 nor -1")
    if values["label"] == "-1":
        return None
    span, split = parse_span(values["start"], values["end"]), parse_split(values["subset"])
    return Row(table, line, name, values["classname"], split, span=span, untrimmed=name)


def _parse_epic_row(values: Values, root: str, table: str, line: int) -> Row:
    if "label" not in values:
        columns = ", ".join(
            name for name in ("verb", "noun", "verb_class", "noun_class") if name in values
        )
        raise InputError(
            f"a list of EPIC-KITCHENS has several labels ({columns}); rename the one to learn to `label`"
        )
    name, span = values["video_id"], parse_span(values["start_timestamp"], values["stop_timestamp"])
    return Row(
        table,
        line,
        name,
        values["label"],
        "",
        values.get("participant_id", ""),
        span,
        untrimmed=name,
    )


class Layout(NamedTuple):
    """How the rows of a table are read; `needed` columns tell it from others, `used` may be
    missing."""

    name: str
    kind: Literal["path", "stem", "clip"]
    needed: frozenset[str]
    used: frozenset[str]
    parse: ParseRow


LAYOUTS = (
    Layout(
        "HACS clips",
        "stem",
        frozenset({"classname", "youtube_id", "subset", "start", "end", "label"}),
        frozenset(),
        _parse_hacs_row,
    ),
    Layout(
        "Kinetics",
        "clip",
        frozenset({"youtube_id", "time_start", "time_end", "split"}),
        frozenset({"label"}),
        _parse_kinetics_row,
    ),
    Layout(
        "EPIC-KITCHENS",
        "stem",
        frozenset({"video_id", "start_timestamp", "stop_timestamp"}),
        frozenset({"label", "participant_id"}),
        _parse_epic_row,
    ),
    Layout(
        "path,label",
        "path",
        frozenset({"path", "label"}),
        frozenset({"start", "end", "split", "group", "subject"}),
        _parse_path_row,
    ),
)


def layout_of(header: Header) -> Layout | None:
    """The layout whose columns a header has; `InputError` if several have them and none names a
    path."""
    columns = set(header.columns)
    fitting = [layout for layout in LAYOUTS if layout.needed <= columns]
    if {"path", "label"} <= columns:
        return LAYOUTS[-1]
    if len(fitting) > 1:
        raise InputError(
            f"the columns {', '.join(header.columns)} fit {' and '.join(layout.name for layout in fitting)}; "
            "remove those of one"
        )
    return fitting[0] if fitting else None


def read_header(path: str) -> Header:
    """The columns of a table, in lower case, and what separates them; none for an empty file."""
    line = next((line for _, line in text_lines(path)), "")
    headers = []
    for separator in _SEPARATORS:
        fields = next(csv.reader([line], delimiter=separator), [])
        columns = [name.strip().lower() for name in fields]
        if "path" not in columns:
            columns = ["path" if name == "id" else name for name in columns]
        headers.append(Header(columns, separator))
    return next((header for header in headers if layout_of(header)), headers[0])


def read_table(path: str, root: str, header: Header, layout: Layout) -> Table:
    """The rows of a table whose videos lie below the folder `root`; `InputError` names the line
    that is wrong."""
    rows, left_out = [], 0
    for line, values in _values(path, header):
        try:
            row = layout.parse(values, root, path, line)
        except ValueError as error:
            raise InputError(f"{path} line {line}: {error}") from None
        if row is None:
            left_out += 1
        else:
            rows.append(row)
    return Table(layout.kind, rows, tuple(_notes(path, header, layout, left_out)))


def _notes(path: str, header: Header, layout: Layout, left_out: int) -> Iterator[str]:
    name = os.path.basename(path)
    if header.separator != ",":
        yield f"{name}: columns are separated by {_SEPARATORS[header.separator]}"
    present = layout.used & set(header.columns)
    if group := next(
        (name for name in ("group", "subject", "participant_id") if name in present), ""
    ):
        yield f"groups: the column `{group}`"
    if unused := [
        column for column in header.columns if column and column not in layout.needed | layout.used
    ]:
        yield f"{name}: columns that are not used: {', '.join(unused)}"
    if left_out:
        yield f"{name}: {left_out:,} rows with label -1 left out (they are not of the class)"


def text_lines(path: str) -> Iterator[tuple[int, str]]:
    """Number and text of each line that is not blank; `InputError` if the file is not UTF-8."""
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield number, line.rstrip("\r\n")
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 text ({error}); save it as UTF-8") from None


def _values(path: str, header: Header) -> Iterator[tuple[int, dict[str, str]]]:
    """Line number and values by column, of each line below the header that is not blank."""
    line, width = 0, len(header.columns)
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            # Strict: a quote that is never closed must not swallow the rest.
            reader = csv.reader(file, delimiter=header.separator, strict=True)
            next(reader)
            for fields in reader:
                line = reader.line_num
                if not any(fields) or fields == [" " * len(fields[0])]:
                    continue
                if len(fields) < width or any(fields[width:]):
                    counts = f"{len(fields)} values and the header {width}"
                    raise InputError(
                        f"{path} line {line} has {counts}; a value that holds a comma must be quoted"
                    )
                yield line, dict(zip(header.columns, map(str.strip, fields), strict=False))
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 text ({error}); save it as UTF-8") from None
    except csv.Error as error:
        raise InputError(f"{path} cannot be read as a CSV after line {line}: {error}") from None


def span_id(path: str, span: tuple[float, float] | None) -> str:
    """The id of a span of a file: `match.mp4#2000-5000`, in milliseconds; the path itself for the
    whole."""
    return path if span is None else f"{path}#{span[0] * 1000:.0f}-{span[1] * 1000:.0f}"


def path_below(name: str, root: str) -> str:
    """A path of a list as a POSIX path below `root`. ValueError for none, or one that leads out of
    it."""
    if not name:
        raise ValueError("its path is empty")
    if "\\" in name and not os.path.lexists(os.path.join(root, name)):
        raise ValueError(f"{name} is written with backslashes; write it with /")
    below = os.path.relpath(name, os.path.abspath(root)) if os.path.isabs(name) else name
    below = posixpath.normpath(below.replace(os.sep, "/"))
    if below.split("/")[0] in (
        "..",
        ".",
    ):  # an id is also a place below the folder that an export fills
        raise ValueError(f"{name} is not below {root}; give --root DIR, a folder around all videos")
    return below


def parse_span(start: str, end: str) -> tuple[float, float]:
    """Seconds, in whole milliseconds, of numbers or of `HH:MM:SS.mmm`."""
    try:
        span = _milliseconds(start), _milliseconds(end)
    except (ValueError, OverflowError):
        raise ValueError(f"{start!r} to {end!r} are not times in seconds") from None
    if not 0 <= span[0] < span[1]:
        raise ValueError(
            f"{start} to {end} s is not a span; it begins at 0 or later, and ends after it begins"
        )
    return span[0] / 1000, span[1] / 1000


def _milliseconds(text: str) -> int:
    if ":" not in text:
        return round(float(text) * 1000)
    minutes, _, seconds = text.rpartition(":")
    hours, _, minutes = minutes.rpartition(":")
    return 60_000 * (60 * int(hours or 0) + int(minutes)) + round(float(seconds) * 1000)


def parse_split(value: str) -> str:
    if value and value.lower() not in SPLITS:
        raise ValueError(f"the split {value!r} is unknown; known are {', '.join(SPLITS)}")
    return SPLITS[value.lower()] if value else ""


def _check_youtube_id(name: str) -> None:
    if not _YOUTUBE_ID.fullmatch(name):
        raise ValueError(f"{name!r} is not a youtube id, which has 11 characters")
