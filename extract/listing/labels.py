"""Class names: the Kinetics-700 list, lists in files, and the spellings under which folders write
them."""

import difflib
import os
import re
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from functools import cache
from pathlib import Path

from extract import InputError
from extract.cli import first_few

_REMOVED = str.maketrans("", "", "'()")


def kinetics700_labels() -> tuple[str, ...]:
    """The 700 labels in ASCII order; a class index is a position in it."""
    return read_labels(Path(__file__).with_name("kinetics700.txt"))


def read_labels(path: str | os.PathLike[str]) -> tuple[str, ...]:
    """The classes of a text file, one a line; `InputError` for an empty line, a repeated one, or no
    text."""
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").rstrip().split("\n")
    except UnicodeDecodeError as error:
        raise InputError(
            f"{os.fspath(path)} is not UTF-8 text ({error}); expected one class a line"
        ) from None
    first: dict[str, int] = {}
    for number, name in enumerate(map(str.strip, lines), start=1):
        if not name:
            raise InputError(f"{os.fspath(path)} line {number} is empty; expected one class a line")
        if first.setdefault(name, number) != number:
            raise InputError(
                f"{os.fspath(path)} names {name!r} twice, in lines {first[name]} and {number}"
            )
    return tuple(first)


@cache
def spellings(name: str) -> frozenset[str]:
    """How copies of Kinetics write a label: as it is, `_` for spaces, and `'`, `(`, `)` removed as
    well."""
    underscored = name.replace(" ", "_")
    return frozenset((name, underscored, underscored.translate(_REMOVED)))


def choose_labels(
    names: Collection[str], labels: str | os.PathLike[str], *, kinetics_names: bool = False
) -> tuple[tuple[str, ...], dict[str, int], str]:
    """The classes, the index of every name that may be written for one, and a description of where
    they come from.

    `labels` is "kinetics700", a file (one class per line, or `index name` per line), or "auto": the
    Kinetics-700 list if all `names` are in it and the listing looks like Kinetics
    (`kinetics_names`: its files are named by youtube ids; or most of the 700 are there), else the
    names, integers in their order. Integers index the classes of a list. `InputError` for names
    outside the list, with the nearest that are in it.
    """
    if labels == "auto":
        return _choose_automatically(names, kinetics_names=kinetics_names)
    if labels == "kinetics700":
        numbered, source = dict(enumerate(kinetics700_labels())), "the Kinetics-700 list"
    elif os.path.isfile(labels):
        numbered, source = _numbered(labels), f"the labels of {os.fspath(labels)}"
    else:
        raise InputError(
            f"--labels {os.fspath(labels)}: there is no such file; known are auto, kinetics700 or a FILE"
        )
    classes = tuple(numbered.values())
    index = _spelling_index(classes)
    if names and _are_integers(names) and not _are_integers(classes):
        index |= {str(number): label for label, number in enumerate(numbered)}
        index |= {name: index[str(int(name))] for name in names if str(int(name)) in index}
        source += f", by number ({min(numbered)} to {max(numbered)})"
    if unknown := sorted(name for name in names if name not in index):
        raise InputError(
            f"{len(unknown):,} of {len(names):,} names are not in {source}: {_nearest(unknown, index)}"
        )
    return classes, index, source


def _choose_automatically(
    names: Collection[str], *, kinetics_names: bool
) -> tuple[tuple[str, ...], dict[str, int], str]:
    """What --labels auto takes: the Kinetics-700 list or the names."""
    if not names:
        return (), {}, "no folder and no CSV names any"
    kinetics = kinetics700_labels()
    index = _spelling_index(kinetics)
    unknown = sorted(name for name in names if name not in index)
    if not unknown and (kinetics_names or 2 * len(names) > len(kinetics)):
        return kinetics, index, "the Kinetics-700 list"
    if _are_integers(names):
        classes = tuple(sorted(names, key=lambda name: (int(name), name)))
        source = "the integers in their order"
        if (count := int(classes[-1]) + 1) > len(classes):
            source += f" (of 0 to {count - 1:,}, {count - len(classes):,} are absent: the index is not the integer)"
    else:
        classes, source = tuple(sorted(names)), "the sorted names"
        if not unknown:
            source += " (they are classes of Kinetics-700 too: --labels kinetics700 takes all 700)"
        elif 2 * len(unknown) <= len(names):  # the listing may well be meant for Kinetics
            source += (
                f" ({len(unknown):,} are not in the Kinetics-700 list: {_nearest(unknown, index)})"
            )
    return classes, _spelling_index(classes), source


def _are_integers(names: Iterable[str]) -> bool:
    return all(name.isascii() and name.isdecimal() for name in names)


def _numbered(path: str | os.PathLike[str]) -> dict[int, str]:
    """The classes of a label map by their number: `index name` per line, or a name per line,
    numbered from 0.

    Lines that all begin with the numbers 0 to N-1 or 1 to N are the first kind, so that `3 point
    shot` may be a name.
    """
    lines = read_labels(path)
    pairs = [re.fullmatch(r"(\d+)(?:\s*[,;]\s*|\s+)(\S.*)", line) for line in lines]
    numbered = {int(pair[1]): pair[2] for pair in pairs if pair}
    numbers = sorted(numbered)
    if numbers not in (list(range(len(lines))), list(range(1, len(lines) + 1))):
        return dict(enumerate(lines))
    if len(set(numbered.values())) < len(numbered):
        name, _ = Counter(numbered.values()).most_common(1)[0]
        raise InputError(f"{os.fspath(path)} gives the name {name!r} to several numbers")
    return {number: numbered[number] for number in numbers}


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
    named = [
        f"{name!r} (nearest: {close[0]!r})" if close else f"{name!r}"
        for name, close in near.items()
    ]
    return first_few([*named, *strange[5:]], 5)
