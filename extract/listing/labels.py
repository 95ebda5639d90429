"""Class names: the Kinetics-700 list, lists in files, and the spellings that folders use."""

import difflib
import os
import re
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from functools import cache
from pathlib import Path

from extract import InputError, StrPath
from extract.cli import first_few
from extract.listing.tables import open_text

_REMOVED = str.maketrans("", "", "'()")


def kinetics700_labels() -> tuple[str, ...]:
    """The 700 labels in ASCII order, which is the order of class indices."""
    return read_labels(Path(__file__).with_name("kinetics700.txt"))


def read_labels(path: StrPath) -> tuple[str, ...]:
    """The classes of a text file, one per line. `InputError` for an empty or repeated line."""
    path = os.fspath(path)
    with open_text(path) as file:
        lines = file.read().rstrip().splitlines() or [""]
    line_of: dict[str, int] = {}
    for number, name in enumerate(map(str.strip, lines), start=1):
        if not name:
            raise InputError(f"{path} line {number} is empty; expected one class per line")
        if line_of.setdefault(name, number) != number:
            raise InputError(f"{path} names {name!r} twice, in lines {line_of[name]} and {number}")
    return tuple(line_of)


@cache
def spellings(name: str) -> frozenset[str]:
    """Spellings of a label in copies of Kinetics: as it is, with `_` for spaces, and with `'`, `(`,
    `)` removed as well."""
    underscored = name.replace(" ", "_")
    return frozenset((name, underscored, underscored.translate(_REMOVED)))


def choose_labels(
    names: Collection[str], labels: StrPath, *, kinetics_names: bool = False
) -> tuple[tuple[str, ...], dict[str, int], str]:
    """Choose the classes for the names that a listing uses.

    Args:
        names: distinct labels of the listing. Integers index the classes of a list.
        labels: "kinetics700", a file (one class per line, or `index name` per line), or "auto": the
            Kinetics-700 list if all `names` are in it and the listing looks like Kinetics, else the
            sorted names, integers by value.
        kinetics_names: files are named by youtube ids. The listing looks like Kinetics then, or if
            it has more than half of the 700 classes.

    Returns:
        the classes, the index of every spelling of each, and a description of their source.

    Raises:
        InputError: names that are not in the list, with the most similar ones that are.
    """
    if labels == "auto":
        return _choose_automatically(names, kinetics_names=kinetics_names)
    if labels == "kinetics700":
        numbered, source = dict(enumerate(kinetics700_labels())), "the Kinetics-700 list"
    elif os.path.isfile(labels):
        numbered, source = _numbered(labels), f"the labels of {os.fspath(labels)}"
    else:
        raise InputError(
            f"--labels {os.fspath(labels)}: there is no such file; expected auto, kinetics700 or a "
            "FILE"
        )
    classes = tuple(numbered.values())
    index = _spelling_index(classes)
    if names and _are_integers(names) and not _are_integers(classes):
        label_of = {number: label for label, number in enumerate(numbered)}
        index |= {name: label_of[int(name)] for name in names if int(name) in label_of}
        source += f", by number ({min(numbered)} to {max(numbered)})"
    if unknown := sorted(name for name in names if name not in index):
        raise InputError(
            f"{len(unknown):,} of {len(names):,} names are not in {source}: "
            f"{_with_nearest(unknown, index)}"
        )
    return classes, index, source


def _choose_automatically(
    names: Collection[str], *, kinetics_names: bool
) -> tuple[tuple[str, ...], dict[str, int], str]:
    """Classes of `--labels auto`: the Kinetics-700 list or the names."""
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
        largest = int(classes[-1])
        absent = largest + 1 - len(classes)
        if absent > 0:
            source += f" (of 0 to {largest:,}, {absent:,} are absent: the index is not the integer)"
    else:
        classes, source = tuple(sorted(names)), "the sorted names"
        if not unknown:
            source += " (they are classes of Kinetics-700 too: --labels kinetics700 takes all 700)"
        elif 2 * len(unknown) <= len(names):  # the listing may well be meant for Kinetics
            nearest = _with_nearest(unknown, index)
            source += f" ({len(unknown):,} are not in the Kinetics-700 list: {nearest})"
    return classes, _spelling_index(classes), source


def _are_integers(names: Iterable[str]) -> bool:
    return all(name.isascii() and name.isdecimal() for name in names)


def _numbered(path: StrPath) -> dict[int, str]:
    """The classes of a file by number: `index name` per line, or a name per line from 0.

    The first format needs the numbers 0 to N-1 or 1 to N, so that `3 point shot` may be a name.
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
            if (earlier := index.setdefault(spelling, label)) != label:
                raise InputError(
                    f"the classes {classes[earlier]!r} and {name!r} cannot be told apart: both may "
                    f"be written {spelling!r}; rename one"
                )
    return index


def _with_nearest(unknown: Sequence[str], index: Iterable[str]) -> str:
    """The first unknown names with the most similar known ones: `'yogaa' (nearest: 'yoga')`."""
    texts = list(map(repr, unknown))
    for number, name in enumerate(unknown[:5]):
        if nearest := difflib.get_close_matches(name, index, n=1):
            texts[number] += f" (nearest: {nearest[0]!r})"
    return first_few(texts, 5)
