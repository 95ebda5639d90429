"""Which file names make a video of a folder: numbered pictures of one pattern, such as
`img_00001.jpg`."""

import os
import re
from collections.abc import Iterable

from extract import StrPath

PICTURE_EXTENSIONS = (".jpg", ".jpeg", ".png")
_NUMBERED = re.compile(r"(.*?)([0-9]+)(\.[a-z]+)", re.DOTALL)


def numbered_pictures(names: Iterable[str]) -> dict[int, str]:
    """The pictures among the names of a folder by their number, ascending; {} if they are not video.

    They are one if there are at least two, each has digits at the end of its stem, all have the
    same text before the digits and the same extension, and no number appears twice. Hidden names do
    not count.
    """
    by_number: dict[int, str] = {}
    patterns = set()
    for name in names:
        if name[0] == "." or not name.lower().endswith(PICTURE_EXTENSIONS):
            continue
        match = _NUMBERED.fullmatch(name.lower())
        number = int(match[2]) if match else -1
        if match is None or number in by_number:
            return {}
        patterns.add((match[1], match[3]))
        by_number[number] = name
    return dict(sorted(by_number.items())) if len(by_number) > 1 and len(patterns) == 1 else {}


def gaps(by_number: dict[int, str]) -> str:
    """What is missing in the numbering, "" if nothing is."""
    numbers = list(by_number)
    count = numbers[-1] - numbers[0] + 1 - len(numbers)
    if not count:
        return ""
    first = next(number for number in numbers if number + 1 not in by_number)
    return (
        f"{count:,} of the numbers {numbers[0]} to {numbers[-1]} are missing, from {first + 1} on"
    )


def picture_paths(folder: StrPath) -> list[str]:
    """The pictures of a folder as paths, in the order of their numbers; [] if they are not video.

    Raises OSError.
    """
    root = os.fspath(folder)
    return [os.path.join(root, name) for name in numbered_pictures(os.listdir(root)).values()]
