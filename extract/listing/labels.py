"""Class names: the Kinetics-700 list, lists in files, and the spellings under which folders write them."""

import difflib
import os
from collections.abc import Collection, Iterable, Sequence
from functools import cache
from pathlib import Path

from extract.cli import InputError, examples

_REMOVED = str.maketrans("", "", "'()")


def kinetics700_labels() -> tuple[str, ...]:
    """The 700 labels in ASCII order; a class index is a position in it."""
    return read_labels(Path(__file__).with_name("kinetics700.txt"))


def read_labels(path: str | os.PathLike[str]) -> tuple[str, ...]:
    """The classes of a text file, one a line; `InputError` for an empty line, a repeated one, or no text."""
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").rstrip().split("\n")
    except UnicodeDecodeError as error:
        raise InputError(f"{os.fspath(path)} is not UTF-8 text ({error}); expected one class a line") from None
    first: dict[str, int] = {}
    for number, name in enumerate(map(str.strip, lines), start=1):
        if not name:
            raise InputError(f"{os.fspath(path)} line {number} is empty; expected one class a line")
        if first.setdefault(name, number) != number:
            raise InputError(f"{os.fspath(path)} names {name!r} twice, in lines {first[name]} and {number}")
    return tuple(first)


@cache
def spellings(name: str) -> frozenset[str]:
    """How copies of Kinetics write a label: as it is, `_` for spaces, and `'`, `(`, `)` removed as well."""
    underscored = name.replace(" ", "_")
    return frozenset((name, underscored, underscored.translate(_REMOVED)))


def choose_labels(
    names: Collection[str], labels: str | os.PathLike[str]
) -> tuple[tuple[str, ...], dict[str, int], str]:
    """The classes, the index of every name that may stand for one, and where the classes come from, in words.

    `labels` is "auto" (the Kinetics-700 list where all `names` are in it, else the sorted names), "kinetics700", or
    a file. `InputError` for names outside the list, with the nearest that are in it.
    """
    if labels in ("auto", "kinetics700"):
        classes, said = kinetics700_labels(), "the Kinetics-700 list"
    elif os.path.isfile(labels):
        classes, said = read_labels(labels), f"the labels of {os.fspath(labels)}"
    else:
        raise InputError(f"--labels {os.fspath(labels)}: there is no such file; known are auto, kinetics700 or a FILE")
    index = _spelling_index(classes)
    if labels == "auto" and not names:
        return (), {}, "no folder and no CSV names any"
    strange = sorted(name for name in names if name not in index)
    if not strange:
        return classes, index, said
    if labels != "auto":
        raise InputError(f"{len(strange):,} of {len(names):,} names are not in {said}: {_nearest(strange, index)}")
    said = "the sorted names"
    if 2 * len(strange) <= len(names):  # it may well be meant for Kinetics
        said += f" ({len(strange):,} are not in the Kinetics-700 list: {_nearest(strange, index)})"
    classes = tuple(sorted(names))
    return classes, _spelling_index(classes), said


def _spelling_index(classes: Sequence[str]) -> dict[str, int]:
    index: dict[str, int] = {}
    for label, name in enumerate(classes):
        for spelling in spellings(name):
            if (other := index.setdefault(spelling, label)) != label:
                raise InputError(
                    f"the classes {classes[other]!r} and {name!r} cannot be told apart where they are written "
                    f"{spelling!r}; rename one"
                )
    return index


def _nearest(strange: Sequence[str], known: Iterable[str]) -> str:
    near = {name: difflib.get_close_matches(name, known, n=1) for name in strange[:5]}
    named = [f"{name!r} (nearest: {close[0]!r})" if close else f"{name!r}" for name, close in near.items()]
    return examples([*named, *strange[5:]], 5)
