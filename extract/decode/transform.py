"""Resizing, padding, evaluation crops and the training view of frames, as a backbone sees them.

Runs in the decode children (numpy, Pillow, scipy). A view is one crop, or one random pass, of all T
sampled frames. View 0 is always the center crop without mirroring.

center   |  ....|######|....  |   the short side is resized, the middle is seen
squash   |      |######|      |   both sides are resized, the aspect ratio is not kept
border   |      |.####.|      |   the long side is resized, the mean color fills the rest
"""

import hashlib
from collections.abc import Callable
from dataclasses import asdict, dataclass
from itertools import product
from typing import Any, Literal

import numpy as np
from PIL import Image

from extract.decode import torch_resize
from extract.decode.nvdec import resized

PerClip = Literal["mean", "time"]
Processor = Literal["torchvision", "transformers"]
Box = tuple[int, int, int, int]  # top, left, height, width

_CORNERS = ("tl", "tr", "bl", "br")
# TSN's multi-scale corner crop: sides are these fractions of the largest crop's, and height and
# width differ by one scale at most.
_SCALES = (1.0, 0.875, 0.75, 0.66)
# Its 13 positions, in quarters of the free space: the corners, the middles of edges and the center,
# and four in between.
_POSITIONS = [*product((0, 2, 4), repeat=2), *product((1, 3), repeat=2)]


@dataclass(frozen=True)
class Preprocessing:
    """The input that the weights were trained on: pictures are resized, cropped, and normalized.

    Sizes are in pixels: one number for a square, else (height, width). crop_mode is that of timm's
    `create_transform`. "center": the picture just covers `resize`, and keeps its aspect ratio.
    "squash": both sides are resized, and the aspect ratio changes. "border": the picture fits into
    `resize`, and `mean` fills the rest of the crop.

    processor: "transformers" resizes with torch's integers and rounds the center crop down.
    Otherwise Pillow resizes (if `antialias`), and the center is rounded as in torchvision.
    """

    size: int | tuple[int, int]
    resize: int | tuple[int, int]
    interpolation: str  # Pillow's name in lower case
    mean: tuple[float, ...]
    std: tuple[float, ...]
    crop_mode: Literal["center", "squash", "border"] = "center"
    antialias: bool = True  # False for torchvision's video models
    processor: Processor = "torchvision"

    @property
    def frame_shape(self) -> tuple[int, int, int]:
        """The shape of a prepared frame, uint8: (height, width, 3)."""
        return (*_height_width(self.size), 3)

    @property
    def has_one_crop(self) -> bool:
        """Whether all crops of a picture are the same, because they show the whole picture."""
        height, width = _height_width(self.resize)
        size_height, size_width = _height_width(self.size)
        is_whole = height <= size_height and width <= size_width
        return self.crop_mode == "border" or (self.crop_mode == "squash" and is_whole)

    def record(self) -> dict[str, Any]:
        """JSON values for stores and checkpoints.

        Older records have no `crop_mode`, `antialias` and `processor`: defaults are left out.
        """
        defaults = {"crop_mode": "center", "antialias": True, "processor": "torchvision"}
        return {
            key: list(value) if isinstance(value, tuple) else value
            for key, value in asdict(self).items()
            if defaults.get(key) != value
        }

    @classmethod
    def from_record(cls, record: dict[str, Any]) -> "Preprocessing":
        """The inverse of `record`."""
        values: Any = {
            key: tuple(value) if isinstance(value, list) else value for key, value in record.items()
        }
        return cls(**values)


@dataclass(frozen=True)
class Clips:
    """The clips of a clip-wise backbone: `frames` frames at `fps` around each sampled frame.

    rows: of features per clip, 1 ("mean") or one per temporal position ("time").
    """

    frames: int
    fps: float
    per_clip: PerClip
    rows: int


def is_clip_wise(name: str) -> bool:
    """Whether a `--backbone` is a video model: one of torchvision's or transformers'."""
    return name.startswith(("torchvision/", "hf/"))


def _height_width(size: int | tuple[int, int]) -> tuple[int, int]:
    return size if isinstance(size, tuple) else (size, size)


def view_names(crops: int, augment_passes: int) -> tuple[str, ...]:
    """Names of the views, in their order in the store.

    3 crops: the center and both ends of the long side (left and right; top and bottom of a portrait
    video). 10 crops: the center and the four corners, each followed by its mirror image.
    """
    crop_names = ["center", *(f"crop_{corner}" for corner in _CORNERS)]
    names = {
        1: ["center"],
        3: ["center", "crop_left", "crop_right"],
        10: [name + flip for name in crop_names for flip in ("", "_flip")],
    }
    return (*names[crops], *(f"augment_{number}" for number in range(augment_passes)))


def resized_shape(height: int, width: int, preprocessing: Preprocessing) -> tuple[int, int]:
    """Height and width of a picture after resizing, before padding, as in timm's evaluation."""
    mode = preprocessing.crop_mode
    target_height, target_width = _height_width(preprocessing.resize)
    if mode == "squash":
        return target_height, target_width
    if mode == "center" and target_height == target_width:
        # torchvision's Resize, which rounds the long side down.
        short, long = sorted((height, width))
        long = int(target_height * long / short)
        return (target_height, long) if height <= width else (long, target_height)
    choose = max if mode == "border" else min
    ratio = choose(height / target_height, width / target_width)
    return max(1, round(height / ratio)), max(1, round(width / ratio))


def resize_frame(frame: Any, preprocessing: Preprocessing) -> Any:
    """Resize uint8 [H, W, 3], and pad it if it is smaller than a crop. `cut` then takes the
    crops."""
    height, width = frame.shape[:2]
    target_height, target_width = resized_shape(height, width, preprocessing)
    if (height, width) != (target_height, target_width):
        frame = _resized(frame, (target_width, target_height), preprocessing)
    return _padded(frame, preprocessing)


def cut(frames: Any, box: Box, *, flip: bool = False) -> Any:
    """Crop frames uint8 [..., H, W, 3] from `resize_frame` to a box: [..., height, width, 3].

    With `flip`, left and right are exchanged.
    """
    top, left, height, width = box
    crops = frames[..., top : top + height, left : left + width, :]
    if not flip:
        return crops
    return crops[..., ::-1, :] if isinstance(crops, np.ndarray) else crops.flip(-2)


def crop_boxes(
    height: int, width: int, preprocessing: Preprocessing, crops: int
) -> list[tuple[Box, bool]]:
    """The evaluation crops of a frame from `resize_frame`, as (box, mirrored).

    They are in the order of `view_names`. 1 and 3 crops round the center like `processor`. 10 crops
    are TSN's: offsets are 0, 2 and 4 steps of (side - size) // 4.
    """
    tall, wide, _ = preprocessing.frame_shape
    if crops == 10:
        down, across = (height - tall) // 4, (width - wide) // 4
        steps = [(2, 2), *product((0, 4), repeat=2)]
        return [
            ((i * down, j * across, tall, wide), flip) for i, j in steps for flip in (False, True)
        ]
    rounded = int if preprocessing.processor == "transformers" else round
    top, left = rounded((height - tall) / 2), rounded((width - wide) / 2)
    boxes = [(top, left, tall, wide)]
    if crops == 3:
        is_portrait = height > width
        for end in (0, height - tall if is_portrait else width - wide):
            boxes.append((end, left, tall, wide) if is_portrait else (top, end, tall, wide))
    return [(box, False) for box in boxes]


def training_view(
    height: int, width: int, preprocessing: Preprocessing, rng: np.random.Generator
) -> Callable[[np.ndarray], np.ndarray]:
    """A random crop and flip for all frames of a clip: uint8 [H, W, 3] -> [*size, 3].

    TSN's multi-scale corner crop of a frame from `resize_frame`. Height and width are fractions of
    the largest crop with the aspect ratio of `size`, at most one scale apart. The crop is at one of
    13 positions, is resized to `size`, and is mirrored half of the time. For "squash" it is a part
    of the squashed picture, for "border" of the padded one.
    """
    size_height, size_width, _ = preprocessing.frame_shape
    largest_height = min(height, width * size_height // size_width)
    largest_width = min(width, height * size_width // size_height)
    scales = [(i, j) for i, j in product(range(len(_SCALES)), repeat=2) if abs(i - j) <= 1]
    i, j = scales[rng.integers(len(scales))]
    crop_height = max(1, int(largest_height * _SCALES[i]))
    crop_width = max(1, int(largest_width * _SCALES[j]))
    down, across = _POSITIONS[rng.integers(len(_POSITIONS))]
    top, left = down * ((height - crop_height) // 4), across * ((width - crop_width) // 4)
    flip = bool(rng.integers(2))

    def view(frame: np.ndarray) -> np.ndarray:
        part = cut(frame, (top, left, crop_height, crop_width))
        picture = _resized(part, (size_width, size_height), preprocessing)
        return cut(picture, (0, 0, size_height, size_width), flip=flip)

    return view


def augmentation_rng(seed: int, video_id: str, name: int | str) -> np.random.Generator:
    """Random numbers for one pass over a video. They depend on these three values only.

    name: the number of an augmented pass, or e.g. `epoch 3`.
    """
    digest = hashlib.sha256(f"{seed}\0{video_id}\0{name}".encode()).digest()
    return np.random.default_rng(int.from_bytes(digest[:16], "little"))


def _padded(frame: Any, preprocessing: Preprocessing) -> Any:
    """Pad to at least `size` like torchvision's CenterCrop: with black, or the mean ("border")."""
    height, width = frame.shape[:2]
    size_height, size_width, _ = preprocessing.frame_shape
    down, across = max(size_height - height, 0), max(size_width - width, 0)
    if not (down or across):
        return frame
    color = preprocessing.mean if preprocessing.crop_mode == "border" else (0.0, 0.0, 0.0)
    fill = [round(255 * value) for value in color]
    padded_shape = (height + down, width + across, 1)
    if isinstance(frame, np.ndarray):
        padded = np.tile(np.array(fill, np.uint8), padded_shape)
    else:
        padded = frame.new_tensor(fill).repeat(padded_shape)
    top, left = down // 2, across // 2
    padded[top : top + height, left : left + width] = frame
    return padded


def _resized(frame: Any, size: tuple[int, int], preprocessing: Preprocessing) -> Any:
    """Resize a frame to (width, height), with the interpolation of the weights."""
    if not isinstance(frame, np.ndarray):
        return resized(frame, size, preprocessing.interpolation, antialias=preprocessing.antialias)
    if not preprocessing.antialias:
        return _bilinear(frame, size)
    if preprocessing.processor == "transformers":
        return torch_resize.resize(frame, size, preprocessing.interpolation)
    method = Image.Resampling[preprocessing.interpolation.upper()]
    return np.asarray(Image.fromarray(frame).resize(size, method))


def _bilinear(frame: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Bilinear without antialiasing, like torch's `interpolate`: each pixel is a mean of 4."""
    upper_rows, lower_rows, down = _neighbors(size[1], frame.shape[0])
    left_columns, right_columns, across = _neighbors(size[0], frame.shape[1])
    across, down = across[None, :, None], down[:, None, None]

    def mix(first: np.ndarray, second: np.ndarray, weight: np.ndarray) -> np.ndarray:
        return first * (1 - weight) + second * weight

    upper, lower = (
        mix(rows[:, left_columns], rows[:, right_columns], across)
        for rows in (frame[upper_rows], frame[lower_rows])
    )
    return np.rint(mix(upper, lower, down)).astype(np.uint8)


def _neighbors(count: int, length: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Sample `count` positions along a side of `length` pixels.

    Returns:
        the pixel before each position, the one after it, and the weight of the latter.
    """
    step = np.float32(length / count)
    position = np.maximum((np.arange(count, dtype=np.float32) + 0.5) * step - 0.5, 0)
    first = np.minimum(position.astype(int), length - 1)
    weight = (position - first).astype(np.float32)
    return first, np.minimum(first + 1, length - 1), weight
