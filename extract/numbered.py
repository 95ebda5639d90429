"""Folders of numbered pictures, such as `img_00001.jpg`, that are read as one video."""

import os
import re
from collections.abc import Iterable

from extract import StrPath

PICTURE_EXTENSIONS = (".jpg", ".jpeg", ".png")
_NUMBERED = re.compile(r"(.*?)([0-9]+)(\.[a-z]+)", re.DOTALL)


def numbered_pictures(names: Iterable[str]) -> dict[int, str]:
    """The pictures of a folder by number, ascending; {} if they are not a video.

    They are a video if there are at least two, each stem ends with digits, all have the same text
    before the digits and the same extension, and no number appears twice. Hidden files are ignored.
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
    """Describe the missing numbers, "" if there are none."""
    numbers = list(by_number)
    count = numbers[-1] - numbers[0] + 1 - len(numbers)
    if not count:
        return ""
    first = next(number for number in numbers if number + 1 not in by_number)
    return (
        f"{count:,} of the numbers {numbers[0]} to {numbers[-1]} are missing, from {first + 1} on"
    )


def picture_paths(folder: StrPath) -> list[str]:
    """Paths of the pictures of a folder by number; [] if they are not a video. Raises OSError."""
    root = os.fspath(folder)
    return [os.path.join(root, name) for name in numbered_pictures(os.listdir(root)).values()]
