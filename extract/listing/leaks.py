"""Leaks between splits: one file under two names, and overlapping spans of one file."""

import math
import os
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence

from extract.cli import counted
from extract.listing.tables import Row, span_id


def describe_leaks(rows: Sequence[Row], root: str, inodes: Mapping[str, int]) -> list[str]:
    """A line for each kind of leak between splits, with examples; none without a leak.

    `inodes` are those of the files below `root`, as `folders.scan` returns them.
    """
    if len({row.split for row in rows}) < 2:
        return []
    kinds = {
        "ONE FILE IN TWO SPLITS under two names (links)": list(_linked_files(rows, root, inodes)),
        "SPANS THAT OVERLAP in two splits": list(_overlapping_spans(rows)),
    }
    return [f"{kind}: {counted(pairs)}" for kind, pairs in kinds.items() if pairs]


def _linked_files(rows: Sequence[Row], root: str, inodes: Mapping[str, int]) -> Iterator[str]:
    by_inode: dict[int, dict[str, Row]] = defaultdict(dict)  # for each file a row of each split
    for row in rows:
        if inode := inodes.get(row.file):
            by_inode[inode].setdefault(row.split, row)
    for by_split in by_inode.values():
        first, *others = by_split.values()
        for row in others:
            paths = [os.path.join(root, name) for name in (first.file, row.file)]
            # Two file systems below one root may use the same inode number.
            if first.file != row.file and os.path.samefile(*paths):
                yield f"{_name(first)} = {_name(row)}"


def _overlapping_spans(rows: Sequence[Row]) -> Iterator[str]:
    by_file: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        if row.file:
            by_file[row.file].append(row)
    for parts in by_file.values():
        if len({row.split for row in parts}) < 2:
            continue
        latest: dict[str, Row] = {}  # of the earlier parts, the one of each split that ends last
        for row in sorted(parts, key=_seconds):
            start, end = _seconds(row)
            for split, earlier in latest.items():
                if split != row.split and _seconds(earlier)[1] > start:
                    yield f"{_name(earlier)} and {_name(row)}"
            if row.split not in latest or end > _seconds(latest[row.split])[1]:
                latest[row.split] = row


def _seconds(row: Row) -> tuple[float, float]:
    return row.span or (0.0, math.inf)


def _name(row: Row) -> str:
    return f"{span_id(row.file, row.span)} in {row.split or 'no split'}"
