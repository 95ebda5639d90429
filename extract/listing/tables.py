"""Tables with a header: delimited text in which each row lists a video, or a span of one.

    label,youtube_id,time_start,time_end,split        Kinetics (test files may lack label)
    path,label[,start,end][,split][,group]            our own; also `id` for path, `subject` for
                                                      group
    classname,youtube_id,subset,start,end,label       HACS clips, without rows of label -1
    video_id,start_timestamp,stop_timestamp,label     EPIC-KITCHENS, with the column to learn
                                                      renamed to label

Columns go by the header's names, never by position; commas, semicolons or tabs separate them.
Seconds may be written `01:02:03.450`. Every error names file and line.
"""

import contextlib
import csv
import os
import posixpath
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Set
from typing import Literal, NamedTuple, TextIO, TypeVar

from extract import InputError, StrPath
from extract.listing.folders import SPLITS

Entry = TypeVar("Entry")
Kind = Literal["path", "stem", "clip"]

_YOUTUBE_ID = re.compile(r"[A-Za-z0-9_-]{11}")
_SEPARATORS = {",": "commas", ";": "semicolons", "\t": "tabs"}


class Row(NamedTuple):
    """One listed video."""

    table: str  # the path of the list
    line: int
    name: str  # a path below the root, or the stem of a file: its name without extension
    label: str  # "" for unknown
    split: str
    group: str = ""
    span: tuple[float, float] | None = None  # seconds; of Kinetics, used if the clip is missing
    file: str = ""  # the path below the root once it is located, "" for a missing file
    untrimmed: str = ""  # the stem of the video that the span is a part of

    @property
    def location(self) -> str:
        """For messages: "k700/train.csv line 7"."""
        return f"{self.table} line {self.line}"


class Table(NamedTuple):
    """The rows of one list, whose videos are named by path or by stem.

    Kind `clip` is stems of Kinetics, in which a missing video may be listed under two classes.
    """

    kind: Kind
    rows: list[Row]
    notes: tuple[str, ...] = ()


class Header(NamedTuple):
    """The first line of a table."""

    columns: list[str]
    separator: str


Values = Mapping[str, str]
# From a line's values, the root, the list's path and the line's number; None leaves the line out.
ParseRow = Callable[[Values, str, str, int], Row | None]


def _parse_kinetics_row(values: Values, root: str, table: str, line: int) -> Row:
    name = _checked_youtube_id(values["youtube_id"])
    label, split = values.get("label", ""), parse_split(values["split"])
    span = parse_span(values["time_start"], values["time_end"])
    if "label" in values and not label and split != "test":
        raise ValueError(f"{name} has no label; only videos of the test split may lack one")
    clip = f"{name}_{int(span[0]):06d}_{int(span[1]):06d}"
    return Row(table, line, clip, label, split, span=span, untrimmed=name)


def _parse_path_row(values: Values, root: str, table: str, line: int) -> Row:
    start, end = values.get("start", ""), values.get("end", "")
    span = parse_span(start, end) if start or end else None
    group = values.get("group", values.get("subject", ""))
    name, split = path_below(values["path"], root), parse_split(values.get("split", ""))
    return Row(table, line, name, values["label"], split, group, span)


def _parse_hacs_row(values: Values, root: str, table: str, line: int) -> Row | None:
    name = _checked_youtube_id(values["youtube_id"])
    if values["label"] not in ("1", "-1"):
        raise ValueError(f"the label {values['label']!r} of HACS is neither 1 nor -1")
    if values["label"] == "-1":
        return None
    span, split = parse_span(values["start"], values["end"]), parse_split(values["subset"])
    return Row(table, line, name, values["classname"], split, span=span, untrimmed=name)


def _parse_epic_row(values: Values, root: str, table: str, line: int) -> Row:
    if "label" not in values:
        columns = [name for name in ("verb", "noun", "verb_class", "noun_class") if name in values]
        raise ValueError(
            f"a list of EPIC-KITCHENS has several labels ({', '.join(columns)}); "
            "rename the one to learn to `label`"
        )
    name, group = values["video_id"], values.get("participant_id", "")
    span = parse_span(values["start_timestamp"], values["stop_timestamp"])
    return Row(table, line, name, values["label"], "", group, span, untrimmed=name)


class Layout(NamedTuple):
    """A known set of columns: those that identify it, those that may be missing, and a parser."""

    name: str
    kind: Kind
    needed: Set[str]
    optional: Set[str]
    parse: ParseRow


LAYOUTS = (
    Layout(
        "HACS clips",
        "stem",
        {"classname", "youtube_id", "subset", "start", "end", "label"},
        set(),
        _parse_hacs_row,
    ),
    Layout(
        "Kinetics",
        "clip",
        {"youtube_id", "time_start", "time_end", "split"},
        {"label"},
        _parse_kinetics_row,
    ),
    Layout(
        "EPIC-KITCHENS",
        "stem",
        {"video_id", "start_timestamp", "stop_timestamp"},
        {"label", "participant_id"},
        _parse_epic_row,
    ),
    Layout(
        "path,label",
        "path",
        {"path", "label"},
        {"start", "end", "split", "group", "subject"},
        _parse_path_row,
    ),
)


def layout_of(header: Header) -> Layout | None:
    """The layout whose columns a header has. `InputError` if several fit and none names a path."""
    fitting = [layout for layout in LAYOUTS if layout.needed <= set(header.columns)]
    if len(fitting) > 1 and fitting[-1].kind != "path":
        names = " and ".join(layout.name for layout in fitting)
        raise InputError(
            f"the columns {', '.join(header.columns)} fit {names}; remove those of one"
        )
    return fitting[-1] if fitting else None


def read_header(path: str) -> Header:
    """The columns of a table, in lower case, and their separator; no columns for an empty file."""
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
    """The rows of a table whose videos are below the folder `root`; `InputError` names the line
    that is wrong."""
    rows, left_out = parse_rows(
        path,
        _values(path, header),
        lambda line, values: layout.parse(values, root, path, line),
    )
    return Table(layout.kind, rows, tuple(_notes(path, header, layout, left_out)))


def parse_rows(
    path: str,
    entries: Iterable[tuple[int, Entry]],
    parse: Callable[[int, Entry], Row | None],
    unit: str = "line",
) -> tuple[list[Row], int]:
    """The rows of numbered entries of a list, and for how many entries `parse` returns None.

    `InputError` for a ValueError of `parse`, with the list and the number.
    """
    rows, left_out = [], 0
    for number, entry in entries:
        try:
            row = parse(number, entry)
        except ValueError as error:
            raise InputError(f"{path} {unit} {number}: {error}") from None
        if row is None:
            left_out += 1
        else:
            rows.append(row)
    return rows, left_out


def _notes(path: str, header: Header, layout: Layout, left_out: int) -> Iterator[str]:
    name = os.path.basename(path)
    if header.separator != ",":
        yield f"{name}: columns are separated by {_SEPARATORS[header.separator]}"
    groups = ("group", "subject", "participant_id")
    present = [column for column in groups if column in layout.optional & set(header.columns)]
    if present:
        yield f"groups: the column `{present[0]}`"
    used = layout.needed | layout.optional | {""}
    if unused := [column for column in header.columns if column not in used]:
        yield f"{name}: columns that are not used: {', '.join(unused)}"
    if left_out:
        yield f"{name}: {left_out:,} rows with label -1 left out (they are not of the class)"


@contextlib.contextmanager
def open_text(path: StrPath) -> Iterator[TextIO]:
    """Open UTF-8 text, with or without a byte order mark. `InputError` if it is not UTF-8."""
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            yield file
    except UnicodeDecodeError as error:
        raise InputError(
            f"{os.fspath(path)} is not UTF-8 text ({error}); save it as UTF-8"
        ) from None


def text_lines(path: StrPath) -> Iterator[tuple[int, str]]:
    """Number and text of each line that is not blank."""
    with open_text(path) as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                yield number, line.rstrip("\r\n")


def _values(path: str, header: Header) -> Iterator[tuple[int, dict[str, str]]]:
    """Line number and values by column, of each line below the header that is not blank."""
    line, width = 0, len(header.columns)
    try:
        with open_text(path) as file:
            # Strict: after an unclosed quote, the rest of the file must not become one value.
            reader = csv.reader(file, delimiter=header.separator, strict=True)
            next(reader)
            for fields in reader:
                line = reader.line_num
                if not any(map(str.strip, fields)):
                    continue
                if len(fields) < width or any(fields[width:]):
                    raise InputError(
                        f"{path} line {line} has {len(fields)} values and the header {width}; "
                        "a value that holds a comma must be quoted"
                    )
                yield line, dict(zip(header.columns, map(str.strip, fields), strict=False))
    except csv.Error as error:
        raise InputError(f"{path} cannot be read as a CSV after line {line}: {error}") from None


def span_id(path: str, span: tuple[float, float] | None) -> str:
    """The id of a span of a file, in milliseconds: `match.mp4#2000-5000`; the path for no span."""
    return path if span is None else f"{path}#{span[0] * 1000:.0f}-{span[1] * 1000:.0f}"


def path_below(name: str, root: str) -> str:
    """A path of a list as a POSIX path below `root`. ValueError for "", or a path outside."""
    if not name:
        raise ValueError("its path is empty")
    if "\\" in name and not os.path.lexists(os.path.join(root, name)):
        raise ValueError(f"{name} is written with backslashes; write it with /")
    below = os.path.relpath(name, os.path.abspath(root)) if os.path.isabs(name) else name
    below = posixpath.normpath(below)
    # The id is also a path below the folder of an export.
    if below.split("/")[0] in ("..", "."):
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
    """train, val or test of its usual names; "" for "". Raises ValueError."""
    if value and value.lower() not in SPLITS:
        raise ValueError(f"the split {value!r} is unknown; known are {', '.join(SPLITS)}")
    return SPLITS[value.lower()] if value else ""


def _checked_youtube_id(name: str) -> str:
    if not _YOUTUBE_ID.fullmatch(name):
        raise ValueError(f"{name!r} is not a youtube id, which has 11 characters")
    return name
