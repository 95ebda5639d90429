"""Which file each listed row means: by path, or by a file's name."""

import os
from collections import defaultdict
from collections.abc import Iterable, Iterator
from functools import cache

from extract import InputError
from extract.listing.folders import folder, split_of
from extract.listing.labels import spellings
from extract.listing.tables import Row, span_id


def locate_stems(rows: Iterable[Row], files: Iterable[str]) -> Iterator[Row]:
    """Rows named by stem with their file: the clip of that name, or else the untrimmed video that
    it is a span of.

    A file never comes from the folder of another split. Copies of ActivityNet and HACS write `v_`
    before the name.
    """
    by_stem: dict[str, list[str]] = defaultdict(list)
    for file in files:
        by_stem[stem(file)].append(file)
    split_of_folder = cache(split_of)
    for row in rows:
        untrimmed = row.untrimmed
        for name in (row.name, untrimmed, f"v_{untrimmed}") if untrimmed else (row.name,):
            if name not in by_stem:
                continue
            matches = [
                file
                for file in by_stem[name]
                if not row.split or split_of_folder(folder(file)) in ("", row.split)
            ]
            if len(matches) > 1:  # a clip that is in the folders of two classes: the row's own
                own = [
                    file for file in matches if not spellings(row.label).isdisjoint(file.split("/"))
                ]
                matches = own or matches
            if len(matches) > 1:
                raise InputError(
                    f"{row.location}: {matches[0]} and {matches[1]} could both be {row.name}; remove one"
                )
            if matches:
                row = row._replace(
                    span=None if name != untrimmed and name == row.name else row.span,
                    file=matches[0],
                )
                break
        yield row


def locate_paths(rows: Iterable[Row], files: Iterable[str], root: str) -> Iterator[Row]:
    """Rows named by path with their file; any file that a row names is a video, whatever its
    extension."""
    present = set(files)
    for row in rows:
        if row.name not in present and os.path.lexists(os.path.join(root, row.name)):
            present.add(row.name)
        yield row._replace(file=row.name) if row.name in present else row


def reject_duplicates(rows: Iterable[Row], *, of_two_classes: bool = False) -> None:
    """`InputError` if two rows list one file, or one span of it, or one missing video (unless of
    two classes).

    A missing clip of Kinetics may be listed under two classes: it has no file that would have to
    decide for one.
    """
    first: dict[tuple, Row] = {}
    for row in rows:
        name = row.file or row.name
        key = (name, row.span, *((row.label, row.split) if of_two_classes and not row.file else ()))
        if (earlier := first.setdefault(key, row)) is not row:
            labels = (
                f" as {earlier.label!r} and as {row.label!r}" if earlier.label != row.label else ""
            )
            raise InputError(
                f"{earlier.location} and {row.location} both list {span_id(name, row.span)}{labels}; "
                "a video is listed once, with one label"
            )


def stem(path: str) -> str:
    """The name at the end of a POSIX path, without its extension."""
    name = path.rpartition("/")[2]
    return name.rpartition(".")[0] or name
