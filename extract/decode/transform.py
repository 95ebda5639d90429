"""What the backbone sees of a video: resizing, evaluation crops, augmented passes (numpy and Pillow, no torch).

Runs in the decode children. A view is one crop, or one augmented pass, of all T sampled frames; view 0 is always the
unflipped centre crop.
"""

import hashlib
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
from PIL import Image

from extract.decode.on_gpu import resized

Box = tuple[int, int, int, int]  # top, left, height, width

_CORNERS = ("tl", "tr", "bl", "br")
# TSN's multi-scale corner crop: sides are these fractions of the short side, at most one scale apart.
_SCALES = (1.0, 0.875, 0.75, 0.66)
# And its 13 places, in quarters of the room there is: corners, edges' middles and the centre, and four between them.
_PLACES = [(i, j) for i in (0, 2, 4) for j in (0, 2, 4)] + [(i, j) for i in (1, 3) for j in (1, 3)]


@dataclass(frozen=True)
class Preprocessing:
    """How a backbone's weights were trained to see: short side `resize`, crop `size` (pixels), then mean and std."""

    size: int
    resize: int
    interpolation: Literal["bilinear", "bicubic"]
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __post_init__(self) -> None:
        if not 0 < self.size <= self.resize:
            raise ValueError(f"a crop of {self.size} does not fit frames with a short side of {self.resize}")

    def record(self) -> dict[str, Any]:
        """Plain values, as stores and checkpoints keep them: what JSON gives back."""
        return {**asdict(self), "mean": list(self.mean), "std": list(self.std)}


def view_names(crops: int, augment_passes: int) -> tuple[str, ...]:
    """Names of the views, in their order in the store.

    10 crops: the centre and the four corners, each followed by its mirror image. 3 crops: the centre and both ends of
    the long side (left and right; top and bottom of a portrait video).
    """
    names = {
        1: ("center",),
        3: ("center", "crop_left", "crop_right"),
        10: ("center", "center_flip", *(f"crop_{corner}{flip}" for corner in _CORNERS for flip in ("", "_flip"))),
    }
    return names[crops] + tuple(f"augment_{number}" for number in range(augment_passes))


def resize_short_side(frame: Any, preprocessing: Preprocessing) -> Any:
    """Resize uint8 [H, W, 3] so that its short side is `preprocessing.resize`, antialiased, as torchvision does."""
    height, width = frame.shape[:2]
    short, target = min(height, width), preprocessing.resize
    if short == target:
        return frame
    long = int(target * max(height, width) / short)
    size = (target, long) if width <= height else (long, target)
    return _resized(frame, size, preprocessing)


def crop_boxes(height: int, width: int, size: int, crops: int) -> list[tuple[Box, bool]]:
    """The evaluation crops of a frame: (box, mirrored) in the order of `view_names`.

    1 and 3 crops round the centre as torchvision does. 10 crops are TSN's: offsets 0, 2 and 4 steps of
    (side - size) // 4.
    """
    if crops == 10:
        down, across = (height - size) // 4, (width - size) // 4
        places = [(2 * down, 2 * across), (0, 0), (0, 4 * across), (4 * down, 0), (4 * down, 4 * across)]
        return [((top, left, size, size), flip) for top, left in places for flip in (False, True)]
    top, left = round((height - size) / 2), round((width - size) / 2)
    boxes = [(top, left, size, size)]
    if crops == 3:
        ends = [(0, left), (height - size, left)] if height > width else [(top, 0), (top, width - size)]
        boxes += [(*end, size, size) for end in ends]
    return [(box, False) for box in boxes]


def training_view(
    height: int, width: int, preprocessing: Preprocessing, rng: np.random.Generator
) -> Callable[[np.ndarray], np.ndarray]:
    """A random crop and flip for all frames of a clip (TSN's training view): uint8 [H, W, 3] -> [size, size, 3].

    Multi-scale corner crop: height and width are fractions of the short side, at most one scale apart, at one of 13
    fixed places; resized to `size`; mirrored half of the time.
    """
    sides = [int(min(height, width) * scale) for scale in _SCALES]
    pairs = [(h, w) for i, h in enumerate(sides) for j, w in enumerate(sides) if abs(i - j) <= 1]
    crop_height, crop_width = pairs[rng.integers(len(pairs))]
    down, across = _PLACES[rng.integers(13)]
    top, left = down * ((height - crop_height) // 4), across * ((width - crop_width) // 4)
    flip = bool(rng.integers(2))
    size = (preprocessing.size, preprocessing.size)

    def view(frame: np.ndarray) -> np.ndarray:
        picture = _resized(frame[top : top + crop_height, left : left + crop_width], size, preprocessing)
        return mirrored(picture) if flip else picture

    return view


def augmentation_rng(seed: int, video_id: str, name: int | str) -> np.random.Generator:
    """The random numbers of one pass (a number, or `epoch 3`) over one video: a function of these three alone."""
    digest = hashlib.sha256(f"{seed}\0{video_id}\0{name}".encode()).digest()
    return np.random.default_rng(int.from_bytes(digest[:16], "little"))


def mirrored(frames: Any) -> Any:
    return frames[..., ::-1, :] if isinstance(frames, np.ndarray) else frames.flip(-2)


def _resized(frame: Any, size: tuple[int, int], preprocessing: Preprocessing) -> Any:
    """Resize to (width, height) with the weights' own interpolation; Pillow antialiases where it shrinks."""
    if not isinstance(frame, np.ndarray):
        return resized(frame, size, preprocessing.interpolation)
    filters = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}
    return np.asarray(Image.fromarray(frame).resize(size, filters[preprocessing.interpolation]))
