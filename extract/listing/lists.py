"""Read lists of videos in the formats of public data sets, and recognize which format a file has.

Tables with a header are read by `tables`. A format is recognized by signs that no other has; a file
that fits two is refused, and the message asks the question that decides.
"""

import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from extract import InputError
from extract.listing.folders import SPLITS, VIDEO_EXTENSIONS, extension
from extract.listing.tables import (
    LAYOUTS,
    Row,
    Table,
    layout_of,
    open_text,
    parse_rows,
    parse_span,
    parse_split,
    path_below,
    read_header,
    read_table,
    text_lines,
)

LIST_EXTENSIONS = frozenset({"csv", "tsv", "txt", "list", "json"})
_UCF = re.compile(r"(?:train|test)list(?P<number>\d+)\.txt")
_HMDB = re.compile(r"(?P<class>.+)_test_split(?P<number>\d+)\.txt")
_SEPARATORS = ("\t", ";", ",", " ")
FRAMES_HINT = (
    "a folder is a video if it holds numbered pictures of one pattern (img_00001.jpg, "
    "img_00002.jpg ...); give the folder around such folders, or a CSV path,label, "
    "to `extract --frame-rate`"
)


def read_list(path: str, root: str) -> Table:
    """The rows of a list whose videos are below `root`. `InputError` for an unknown or ambiguous
    format."""
    name = os.path.basename(path)
    if extension(name) == "json":
        return _read_json(path)
    if match := _HMDB.fullmatch(name):
        return _read_hmdb(path, match["class"])
    if _UCF.fullmatch(name):
        return _read_ucf(path, root)
    header = read_header(path)
    if layout := layout_of(header):
        return read_table(path, root, header, layout)
    if separator := _separator_of_pairs(path, root):
        return _read_pairs(path, root, separator)
    needed = "; ".join(", ".join(sorted(layout.needed)) for layout in LAYOUTS)
    raise InputError(
        f"{path} has the columns {', '.join(header.columns) or '(none)'}; needed are those of one "
        f"of: {needed}; or lines `path label` without a header, or the JSON of ActivityNet or "
        "Something-Something"
    )


def is_table(path: str) -> bool:
    """Whether a file is a CSV with the columns of a known layout."""
    return extension(path) == "csv" and layout_of(read_header(path)) is not None


def _protocol(path: str) -> tuple[re.Pattern[str], str] | None:
    """The pattern and the number of a train and test split of UCF101 or HMDB51."""
    for pattern in (_UCF, _HMDB):
        if match := pattern.fullmatch(os.path.basename(path)):
            return pattern, match["number"]
    return None


def lists_of(path: str) -> list[str]:
    """The files that are read with one file: all of a split of UCF101 or HMDB51, else itself."""
    protocol = _protocol(path)
    if protocol is None:
        return [path]
    return [file for file in files_like_lists(os.path.dirname(path)) if _protocol(file) == protocol]


def lists_in(directory: str) -> list[str]:
    """The lists directly in a folder. `InputError` for several splits of UCF101 or HMDB51."""
    paths = files_like_lists(directory)
    protocols = {_protocol(path): path for path in paths}
    protocols.pop(None, None)
    if len(protocols) > 1:
        names = " and ".join(map(os.path.basename, protocols.values()))
        raise InputError(
            f"{directory} holds several protocols, such as {names}; give one of these files as "
            "--videos: the others of its number are read with it"
        )
    return lists_of(next(iter(protocols.values()))) if protocols else paths


def files_like_lists(directory: str) -> list[str]:
    """Paths of the files directly in a folder with an extension of lists, sorted."""
    names = sorted(name for name in os.listdir(directory or ".") if not name.startswith("."))
    return [os.path.join(directory, name) for name in names if extension(name) in LIST_EXTENSIONS]


# -- text without a header -------------------------------------------------------------------------


def _separator_of_pairs(path: str, root: str) -> str:
    """The separator of path and label in the first line of a text list, "" if it is not one.

    Three fields are refused: `folder frames label` of mmaction2, or a path with two labels. The
    message depends on whether there is such a folder.
    """
    line = next((line for _, line in text_lines(path)), "").strip()
    for separator in _SEPARATORS:
        if extension(line.rpartition(separator)[0].strip()) in VIDEO_EXTENSIONS:
            return separator
    if extension(line) in VIDEO_EXTENSIONS:
        return "\t"  # paths alone
    parts = line.split()
    if len(parts) > 1 and all(part.isdecimal() for part in parts[1:]):
        if os.path.isdir(os.path.join(root, parts[0])):
            raise InputError(f"{path} lists folders, such as {parts[0]}; {FRAMES_HINT}")
        raise InputError(
            f"{path} begins with {line!r}: is that `folder frames label` (no folder {parts[0]} is "
            f"below {root}), or a video with several labels? Give a CSV path,label with one label "
            "per row"
        )
    return ""


def _read_pairs(path: str, root: str, separator: str) -> Table:
    """`abseiling/x.mp4 0` per line, of mmaction2, SlowFast and V-JEPA; or a path without a label.

    The split is the one in the list's name, such as kinetics400_val_list.txt.
    """
    split = _split_in_name(path)

    def parse(line: int, text: str) -> Row:
        text = text.strip()
        name, _, label = text.rpartition(separator)
        if extension(text) in VIDEO_EXTENSIONS:
            name, label = text, ""
        earlier, _, last = name.rpartition(separator)
        if last.isdecimal() and extension(earlier) in VIDEO_EXTENSIONS:
            raise ValueError(f"{text!r} has several labels; a video has one")
        if not extension(name):
            raise ValueError(f"{text!r} is not a path and a label")
        return Row(path, line, path_below(name.strip(), root), label.strip(), split)

    rows, _ = parse_rows(path, text_lines(path), parse)
    written = {"\t": "a tab", " ": "a space"}.get(separator, separator)
    note = f"{os.path.basename(path)}: path and label separated by {written}"
    return Table("path", rows, (f"{note}; split {split or '-'}, by the list's name",))


def _split_in_name(path: str) -> str:
    """The split in a list's name: `kinetics400_train_list_videos.txt` -> train; "" for none, or
    several."""
    parts = re.split(r"[^a-z]+", os.path.basename(path).lower())
    splits = {SPLITS[part] for part in parts if part in SPLITS}
    return splits.pop() if len(splits) == 1 else ""


def _read_ucf(path: str, root: str) -> Table:
    """UCF101's trainlist01.txt and testlist01.txt: `ApplyEyeMakeup/v_ApplyEyeMakeup_g08_c01.avi 1`,
    without the number in the latter.

    The class is the folder. The group, the video that clips were cut from, is the name before
    `_c01`.
    """
    split = "train" if os.path.basename(path).startswith("train") else "test"

    def parse(line: int, text: str) -> Row:
        name = text.split()[0]
        label, slash, file = name.partition("/")
        if not slash:
            raise ValueError(f"{name!r} has no folder, which is the class")
        group = re.sub(r"_c\d+\.\w+$", "", file)
        return Row(path, line, path_below(name, root), label, split, group)

    rows, _ = parse_rows(path, text_lines(path), parse)
    return Table("path", rows, ("groups: the video that a clip of UCF101 was cut from",))


def _read_hmdb(path: str, label: str) -> Table:
    """HMDB51's `<class>_test_split1.txt`: `April_09_brush_hair_u_nm_np1_ba_goo_0.avi 1`.

    1 is train, 2 is test, 0 is neither and left out.
    """
    splits = {"0": "", "1": "train", "2": "test"}

    def parse(line: int, text: str) -> Row | None:
        name, _, number = text.strip().rpartition(" ")
        if number not in splits:
            raise ValueError(f"{text!r} is not a file and 0, 1 or 2")
        stem = name.strip().rpartition(".")[0]
        return Row(path, line, stem, label, splits[number]) if splits[number] else None

    rows, left_out = parse_rows(path, text_lines(path), parse)
    note = f"{os.path.basename(path)}: {left_out:,} rows of neither train nor test"
    return Table("stem", rows, (note,) if left_out else ())


# -- JSON ------------------------------------------------------------------------------------------


def _read_json(path: str) -> Table:
    """A list of Something-Something or of ActivityNet."""
    try:
        with open_text(path) as file:
            content = json.load(file)
    except json.JSONDecodeError as error:
        raise InputError(f"{path} is not JSON: {error}") from None
    match content:
        case [{"id": _}, *_]:
            return _read_something(path, content)
        case {"database": dict(database)}:
            return Table("stem", list(_activitynet_rows(path, database)))
    raise InputError(
        f"{path} is not a list of videos in a known format: neither Something-Something's "
        '[{"id": ..., "template": ...}] nor ActivityNet\'s {"database": {...}}'
    )


def _read_something(path: str, entries: Sequence[Any]) -> Table:
    """Something-Something's lists, in which the class is the template without its brackets:

    [{"id": "78687", "label": "holding potato ...", "template": "Holding [something] next to
    [something]"}, ...]

    The split is the one in the list's name; the test list has ids alone.
    """
    split = _split_in_name(path)

    def parse(number: int, entry: Any) -> Row:
        if not isinstance(entry, dict) or not isinstance(entry.get("id"), str | int):
            raise ValueError(f"expected an object with an id, found {entry!r:.80}")
        label = re.sub(r"[\[\]]", "", str(entry.get("template", "")))
        return Row(path, number, str(entry["id"]), label, split)

    return Table("stem", parse_rows(path, enumerate(entries, start=1), parse, "entry")[0])


def _activitynet_rows(path: str, database: Mapping[str, Any]) -> Iterator[Row]:
    """ActivityNet's JSON, also of THUMOS, HACS segments, FineAction: a row for each annotation, a
    span of its video.

    {"database": {"<id>": {"subset": "training", "annotations": [{"segment": [0.5, 9.1], "label":
    "Fencing"}]}}}

    A video without annotations is listed as a whole, without a label.
    """
    for number, (name, entry) in enumerate(database.items(), start=1):
        try:
            split = parse_split(entry.get("subset", ""))
            annotations = entry.get("annotations") or []
            for annotation in annotations:
                span = parse_span(*map(str, annotation["segment"]))
                yield Row(path, number, name, annotation["label"], split, span=span, untrimmed=name)
            if not annotations:
                yield Row(path, number, name, "", split, untrimmed=name)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            reason: object = f"{entry!r:.120} has no subset and annotations as expected"
            if type(error) is ValueError:
                reason = error
            raise InputError(f"{path} entry {number} ({name}): {reason}") from None
