"""Find the file of each listed row, by path or by stem."""

import os
from collections import defaultdict
from collections.abc import Iterable, Iterator
from functools import cache

from extract import InputError
from extract.listing.folders import folder, split_of
from extract.listing.labels import spellings
from extract.listing.tables import Row, span_id


def locate_stems(rows: Iterable[Row], files: Iterable[str]) -> Iterator[Row]:
    """Rows named by stem, with their file: the clip of that name, or else the untrimmed video that
    it is a span of.

    A file in the folder of another split does not match. Copies of ActivityNet and HACS write `v_`
    before the name.
    """
    by_stem: dict[str, list[str]] = defaultdict(list)
    for file in files:
        by_stem[stem(file)].append(file)
    split_of_folder = cache(split_of)
    for row in rows:
        untrimmed = row.untrimmed
        for name in (row.name, untrimmed, f"v_{untrimmed}") if untrimmed else (row.name,):
            matches = [
                file
                for file in by_stem.get(name, ())
                if not row.split or split_of_folder(folder(file)) in ("", row.split)
            ]
            if len(matches) > 1:  # a clip in the folders of two classes: that of the row's class
                written = spellings(row.label)
                own = [file for file in matches if not written.isdisjoint(file.split("/"))]
                matches = own or matches
            if len(matches) > 1:
                raise InputError(
                    f"{row.location}: {matches[0]} and {matches[1]} could both be {row.name}; "
                    "remove one"
                )
            if matches:
                is_clip = name == row.name != untrimmed
                row = row._replace(span=None if is_clip else row.span, file=matches[0])
                break
        yield row


def locate_paths(rows: Iterable[Row], files: Iterable[str], root: str) -> Iterator[Row]:
    """Rows named by path, with their file, which may have any extension."""
    present = set(files)
    for row in rows:
        exists = row.name in present or os.path.lexists(os.path.join(root, row.name))
        yield row._replace(file=row.name) if exists else row


def reject_duplicates(rows: Iterable[Row], *, of_two_classes: bool = False) -> None:
    """`InputError` if two rows list the same file, the same span of it, or the same missing video.

    With `of_two_classes`, a missing video may be listed under two classes, as in Kinetics.
    """
    first: dict[tuple, Row] = {}
    for row in rows:
        name = row.file or row.name
        key = (name, row.span, *((row.label, row.split) if of_two_classes and not row.file else ()))
        if (earlier := first.setdefault(key, row)) is not row:
            labels = ""
            if earlier.label != row.label:
                labels = f" as {earlier.label!r} and as {row.label!r}"
            raise InputError(
                f"{earlier.location} and {row.location} both list "
                f"{span_id(name, row.span)}{labels}; a video is listed once, with one label"
            )


def stem(path: str) -> str:
    """The last part of a POSIX path, without its extension."""
    name = path.rpartition("/")[2]
    return name.rpartition(".")[0] or name
