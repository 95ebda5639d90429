"""Lists of videos in the layouts that people hold them in: which one a file has, and its rows.

Tables with a header are read by `tables`. A layout is recognized by signs that no other has; a file
that fits two is refused with the question that decides.
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
    "a folder is a video if it holds numbered pictures of one pattern (img_00001.jpg, img_00002.jpg "
    "...); give the folder around such folders, or a CSV path,label, to `extract --frame-rate`"
)


def read_list(path: str, root: str) -> Table:
    """The rows of a list whose videos lie below `root`. `InputError` for an unknown or ambiguous
    layout."""
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
    columns = "; ".join(", ".join(sorted(layout.needed)) for layout in LAYOUTS)
    raise InputError(
        f"{path} has the columns {', '.join(header.columns) or '(none)'}; needed are those of one of: {columns}; "
        "or lines `path label` without a header, or the JSON of ActivityNet or Something-Something"
    )


def is_table(path: str) -> bool:
    """Whether a file is a CSV with the columns of a known layout."""
    return extension(path) == "csv" and layout_of(read_header(path)) is not None


def lists_of(path: str) -> list[str]:
    """All files of the protocol that one file belongs to: both of UCF101's split, all classes of
    HMDB51's."""
    directory, name = os.path.split(path)
    for pattern in (_UCF, _HMDB):
        if match := pattern.fullmatch(name):
            names = [
                (pattern.fullmatch(other), other) for other in sorted(os.listdir(directory or "."))
            ]
            same = [other for found, other in names if found and found["number"] == match["number"]]
            return [os.path.join(directory, other) for other in same]
    return [path]


def lists_in(directory: str) -> list[str]:
    """The lists that lie directly in a folder; `InputError` if it holds several protocols of UCF101
    or HMDB51."""
    names = sorted(name for name in os.listdir(directory) if not name.startswith("."))
    names = [name for name in names if extension(name) in LIST_EXTENSIONS]
    for pattern in (_UCF, _HMDB):
        matches = [match for match in map(pattern.fullmatch, names) if match]
        if len({match["number"] for match in matches}) > 1:
            raise InputError(
                f"{directory} holds several protocols, such as {matches[0][0]} and {matches[-1][0]}; "
                "give one of these files as --videos: the others of its number are read with it"
            )
        if matches:
            return [os.path.join(directory, match[0]) for match in matches]
    return [os.path.join(directory, name) for name in names]


# -- text without a header ---------------------------------------------------------------------------------------------


def _separator_of_pairs(path: str, root: str) -> str:
    """What separates path and label in the first line of a text list, "" if it is not one.

    mmaction2's lists of frame folders have three fields, `folder frames label`, as a video with two
    labels would: a folder on the disk is the sign of the former.
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
            f"{path} begins with {line!r}: is that `folder frames label` (no folder {parts[0]} is below {root}), "
            "or a video with several labels? Give a CSV path,label with one label per row"
        )
    return ""


def _read_pairs(path: str, root: str, separator: str) -> Table:
    """`path label` per line, of mmaction2, SlowFast and V-JEPA; or a path alone, of a video without
    a label.

        abseiling/x.mp4 0

    The split is the one in the list's name, such as kinetics400_val_list.txt.
    """
    split, rows = _split_in_name(path), []
    for line, text in text_lines(path):
        name, _, label = text.strip().rpartition(separator)
        if extension(text.strip()) in VIDEO_EXTENSIONS:
            name, label = text.strip(), ""
        first, _, count = name.rpartition(separator)
        if count.isdecimal() and extension(first) in VIDEO_EXTENSIONS:
            raise InputError(f"{path} line {line}: {text!r} has several labels; a video has one")
        if not extension(name):
            raise InputError(f"{path} line {line}: {text!r} is not a path and a label")
        try:
            rows.append(Row(path, line, path_below(name.strip(), root), label.strip(), split))
        except ValueError as error:
            raise InputError(f"{path} line {line}: {error}") from None
    written = {"\t": "a tab", " ": "a space"}.get(separator, separator)
    note = f"{os.path.basename(path)}: path and label separated by {written}"
    return Table("path", rows, (f"{note}; split {split or '-'}, by the list's name",))


def _split_in_name(path: str) -> str:
    """The split that a list's name names: `kinetics400_train_list_videos.txt` -> train; "" for
    none, or several."""
    parts = re.split(r"[^a-z]+", os.path.basename(path).lower())
    splits = {SPLITS[part] for part in parts if part in SPLITS}
    return splits.pop() if len(splits) == 1 else ""


def _read_ucf(path: str, root: str) -> Table:
    """UCF101's trainlist01.txt and testlist01.txt: `ApplyEyeMakeup/v_ApplyEyeMakeup_g08_c01.avi 1`,
    without the number in the latter. The class is the folder; the group, of clips cut from one
    video, the name before `_c01`.
    """
    split, rows = "train" if os.path.basename(path).startswith("train") else "test", []
    for line, text in text_lines(path):
        name = text.split()[0]
        label, slash, file = name.partition("/")
        if not slash:
            raise InputError(f"{path} line {line}: {name!r} has no folder, which is the class")
        group = re.sub(r"_c\d+\.\w+$", "", file)
        rows.append(Row(path, line, path_below(name, root), label, split, group))
    return Table("path", rows, ("groups: the video that a clip of UCF101 was cut from",))


def _read_hmdb(path: str, label: str) -> Table:
    """HMDB51's `<class>_test_split1.txt`: `April_09_brush_hair_u_nm_np1_ba_goo_0.avi 1`.

    1 is train, 2 is test, 0 is neither and left out.
    """
    rows, left_out = [], 0
    for line, text in text_lines(path):
        name, _, number = text.strip().rpartition(" ")
        if number not in ("0", "1", "2"):
            raise InputError(f"{path} line {line}: {text!r} is not a file and 0, 1 or 2")
        if number == "0":
            left_out += 1
            continue
        stem = name.strip().rpartition(".")[0]
        rows.append(Row(path, line, stem, label, "train" if number == "1" else "test"))
    notes = (
        (f"{os.path.basename(path)}: {left_out:,} rows of neither train nor test",)
        if left_out
        else ()
    )
    return Table("stem", rows, notes)


# -- JSON --------------------------------------------------------------------------------------------------------------


def _read_json(path: str) -> Table:
    """A list of Something-Something or of ActivityNet."""
    try:
        with open(path, encoding="utf-8-sig") as file:
            content = json.load(file)
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise InputError(f"{path} is not JSON: {error}") from None
    if (
        isinstance(content, list)
        and content
        and isinstance(content[0], dict)
        and "id" in content[0]
    ):
        return Table("stem", list(_something_rows(path, content)))
    if isinstance(content, dict) and isinstance(content.get("database"), dict):
        return Table("stem", list(_activitynet_rows(path, content["database"])))
    raise InputError(
        f"{path} is not a list of videos that is known: neither Something-Something's "
        '[{"id": ..., "template": ...}] nor ActivityNet\'s {"database": {...}}'
    )


def _something_rows(path: str, entries: Sequence[Mapping[str, Any]]) -> Iterator[Row]:
    """Something-Something's lists, in which the class is the template without its brackets:

    [{"id": "78687", "label": "holding potato ...", "template": "Holding [something] next to
    [something]"}, ...]

    The split is the one in the list's name; the test list has ids alone.
    """
    split = _split_in_name(path)
    for number, entry in enumerate(entries, start=1):
        if not isinstance(entry, dict) or not isinstance(entry.get("id"), str | int):
            raise InputError(
                f"{path} entry {number} is {entry!r:.80}, expected an object with an id"
            )
        label = str(entry.get("template", "")).replace("[", "").replace("]", "")
        yield Row(path, number, str(entry["id"]), label, split)


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
            why = (
                error
                if type(error) is ValueError
                else f"{entry!r:.120} has no subset and annotations as expected"
            )
            raise InputError(f"{path} entry {number} ({name}): {why}") from None
