"""Read a folder of numbered pictures as a video. Pillow decodes its frames."""

import os
import warnings
from collections import Counter
from collections.abc import Iterator

import numpy as np

from extract.cli import first_few
from extract.decode.container import MAX_PIXELS, VideoError, check_file, check_size, error_text
from extract.decode.packets import Span, UnreliablePacketsError, VideoFile, frame_range
from extract.numbered import gaps, numbered_pictures

_EXIF_ORIENTATION = 0x0112
_SWAPS_SIDES = (5, 6, 7, 8)  # orientations that swap width and height


class PictureFolder(VideoFile):
    """Frame k is the picture with the k-th smallest number, and is shown from k / rate on (Hz).

    `pictures` raises UnreliablePacketsError for a picture that is damaged or has another size than
    the first. With `only_good`, all pictures are decoded beforehand, and those that are damaged or
    differ in size from most are left out.
    """

    def __init__(self, path, *, rate: float, only_good: bool = False):
        self._path = os.fspath(path)
        try:
            by_number = numbered_pictures(os.listdir(path))
        except OSError as error:
            raise VideoError(path, f"cannot be read: {error_text(error)}") from None
        if not by_number:
            raise VideoError(path, "is a folder, but not one of numbered pictures of one pattern")
        self._names = list(by_number.values())
        self._all_times = np.arange(len(self._names)) / rate
        self.times, self.end = self._all_times, len(self._names) / rate
        if missing := gaps(by_number):
            self.clock_note = f"{missing}; times count the pictures that exist"
        self._damage: dict[int, str] = {}  # by position, with the picture's name
        if only_good:
            self._leave_out_damaged()
        else:
            self._size = self._decoded(0, header_only=True)

    def pictures(self, indices: list[int]) -> Iterator[tuple[int, np.ndarray]]:
        for index in indices:
            number = index if self.numbers is None else int(self.numbers[index])
            picture = self._decoded(number)
            if picture.shape[1::-1] != self._size:
                raise UnreliablePacketsError(f"{self._names[number]} has another size")
            yield index, picture

    def problem(self, span: Span | None) -> str:
        first, stop = frame_range(self._all_times, span)
        damaged = [number for number in self._damage if first <= number < stop]
        reasons = [self._damage[number] for number in damaged]
        problems = [super().problem(span)]
        if damaged:
            count = f"{len(damaged)} of {stop - first} pictures are damaged"
            problems.insert(0, f"{count} ({first_few(reasons)})")
        return "; ".join(filter(None, problems))

    def _leave_out_damaged(self) -> None:
        sizes: dict[int, tuple[int, ...]] = {}
        for number in range(len(self._names)):
            try:
                sizes[number] = self._decoded(number).shape[1::-1]
            except UnreliablePacketsError as error:
                self._damage[number] = str(error)
        if not sizes:
            raise VideoError(
                self._path, f"not one of its pictures can be decoded ({self._damage[0]})"
            )
        [(self._size, _)] = Counter(sizes.values()).most_common(1)
        width, height = self._size
        for number, size in sizes.items():
            if size != self._size:
                own_size = f"{self._names[number]} is {size[0]} x {size[1]}"
                self._damage[number] = f"{own_size}, most pictures are {width} x {height}"
        self._damage = dict(sorted(self._damage.items()))
        good = [number for number in sizes if number not in self._damage]
        self.numbers, self.times = np.array(good), self._all_times[good]

    def _decoded(self, number: int, *, header_only: bool = False):
        """A picture as RGB uint8 [height, width, 3], rotated for display.

        With `header_only`, only its (width, height). Raises UnreliablePacketsError if it is damaged
        or too large.
        """
        from PIL import Image, ImageOps

        name = self._names[number]
        path = os.path.join(self._path, name)
        try:
            check_file(path)
            with warnings.catch_warnings():
                warnings.simplefilter("error", Image.DecompressionBombWarning)
                with Image.open(path, formats=("JPEG", "PNG")) as image:
                    check_size(path, *image.size)
                    if image.mode[0] in "IF":
                        raise VideoError(
                            path, f"has {image.mode} pixels; expected 8 bits per color"
                        )
                    if header_only:
                        is_turned = image.getexif().get(_EXIF_ORIENTATION) in _SWAPS_SIDES
                        return image.size[::-1] if is_turned else image.size
                    return np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
        except VideoError as error:
            reason = error.reason
        except MemoryError:
            raise
        except (Image.DecompressionBombError, Image.DecompressionBombWarning):
            reason = f"has more than {MAX_PIXELS:,} pixels"
        except Exception as error:  # Pillow's parsers may raise anything for a damaged picture
            reason = f"cannot be decoded: {error_text(error).replace(path, name)}"
        raise UnreliablePacketsError(f"{name} {reason}")
