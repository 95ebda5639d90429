"""What a backbone sees of a frame: resizing, padding, evaluation crops and the training view (numpy
and Pillow).

Runs in the decode children. A view is one crop, or one augmented pass, of all T sampled frames;
view 0 is always the unflipped center crop.

center   |  ....|######|....  |   the short side is resized, the middle is seen
squash   |      |######|      |   both sides are resized, the aspect ratio is not kept
border   |      |.####.|      |   the long side is resized, the mean color fills the rest
"""

import hashlib
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
from PIL import Image

from extract.decode.nvdec import resized

PerClip = Literal["mean", "time"]
Box = tuple[int, int, int, int]  # top, left, height, width

_CORNERS = ("tl", "tr", "bl", "br")
# TSN's multi-scale corner crop: sides are these fractions of the largest crop's, at most one scale
# apart.
_SCALES = (1.0, 0.875, 0.75, 0.66)
# Its 13 positions, in quarters of the free space: corners, middles of edges, the center, and four
# in between.
_POSITIONS = [(i, j) for i in (0, 2, 4) for j in (0, 2, 4)] + [
    (i, j) for i in (1, 3) for j in (1, 3)
]
# A thinner picture that is to be enlarged is cropped first: 8192 x 2 pixels would become 1,048,576
# x 256. Others are resized first, since Pillow rounds a resized part of a picture differently (by
# up to 2 levels of 255).
_THIN = 10


@dataclass(frozen=True)
class Preprocessing:
    """What the weights were trained to see: a picture resized to `resize`, a crop of `size`, then
    mean and std.

    Sizes are pixels: one number for a square, else (height, width). As in timm's
    `create_transform`: crop_mode "center": the picture is as small as it can be and still cover
    `resize`; its aspect ratio is kept. crop_mode "squash": both sides are resized, and the aspect
    ratio is not kept. crop_mode "border": the picture fits into `resize`, and `mean` fills the rest
    of the crop.
    """

    size: int | tuple[int, int]
    resize: int | tuple[int, int]
    interpolation: str  # of Pillow, in lower case
    mean: tuple[float, ...]
    std: tuple[float, ...]
    crop_mode: Literal["center", "squash", "border"] = "center"
    antialias: bool = True  # torchvision's video models were trained without

    @property
    def frame_shape(self) -> tuple[int, int, int]:
        """The shape of a prepared frame, uint8: (height, width, 3)."""
        return (*_height_width(self.size), 3)

    @property
    def has_one_crop(self) -> bool:
        """Whether every crop of every picture is the same, because the whole picture is seen."""
        height, width = _height_width(self.resize)
        size_height, size_width = _height_width(self.size)
        whole = height <= size_height and width <= size_width
        return self.crop_mode == "border" or (self.crop_mode == "squash" and whole)

    def record(self) -> dict[str, Any]:
        """Plain values, as stores and checkpoints keep them: the same after a round trip through
        JSON.

        Older records have neither `crop_mode` nor `antialias`, so their defaults are left out.
        """
        record = {
            key: list(value) if isinstance(value, tuple) else value
            for key, value in asdict(self).items()
        }
        defaults = {"crop_mode": "center", "antialias": True}
        return {
            key: value
            for key, value in record.items()
            if key not in defaults or defaults[key] != value
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
    """What a clip-wise backbone sees around each sampled frame: `frames` frames at `fps` per
    second.

    rows: of features that it makes of a clip, 1 ("mean") or one per temporal position ("time").
    """

    frames: int
    fps: float
    per_clip: PerClip
    rows: int


def is_clip_wise(name: str) -> bool:
    """Whether a `--backbone` sees clips: torchvision's and transformers' video models."""
    return name.startswith(("torchvision/", "hf/"))


def _height_width(size: int | tuple[int, int]) -> tuple[int, int]:
    return size if isinstance(size, tuple) else (size, size)


def view_names(crops: int, augment_passes: int) -> tuple[str, ...]:
    """Names of the views, in their order in the store.

    10 crops: the center and the four corners, each followed by its mirror image. 3 crops: the
    center and both ends of the long side (left and right; top and bottom of a portrait video).
    """
    names = {
        1: ("center",),
        3: ("center", "crop_left", "crop_right"),
        10: (
            "center",
            "center_flip",
            *(f"crop_{corner}{flip}" for corner in _CORNERS for flip in ("", "_flip")),
        ),
    }
    return names[crops] + tuple(f"augment_{number}" for number in range(augment_passes))


def resized_shape(height: int, width: int, preprocessing: Preprocessing) -> tuple[int, int]:
    """Height and width of a picture after resizing, before padding: those of timm's evaluation
    transform."""
    resize, mode = preprocessing.resize, preprocessing.crop_mode
    target_height, target_width = _height_width(resize)
    if mode == "squash":
        return target_height, target_width
    if (
        mode == "center" and target_height == target_width
    ):  # torchvision's Resize: the long side is rounded down
        short, long = min(height, width), max(height, width)
        long = int(target_height * long / short)
        return (target_height, long) if height <= width else (long, target_height)
    choose = max if mode == "border" else min
    ratio = choose(height / target_height, width / target_width)
    return max(1, round(height / ratio)), max(1, round(width / ratio))


def resize_frame(frame: Any, preprocessing: Preprocessing) -> Any:
    """Resize uint8 [H, W, 3] and pad it to the crop's size at least. `cut` takes crops of what is
    returned.

    A thin picture that would be enlarged is returned as it is: `cut` enlarges only the part that a
    crop sees.
    """
    height, width = frame.shape[:2]
    if isinstance(frame, np.ndarray) and _is_thin(height, width, preprocessing):
        return frame
    target_height, target_width = resized_shape(height, width, preprocessing)
    if (height, width) != (target_height, target_width):
        frame = _resized(frame, (target_width, target_height), preprocessing)
    return _padded(frame, preprocessing)


def cut(frames: Any, box: Box, preprocessing: Preprocessing) -> Any:
    """A box of the resized picture: frames uint8 [T, H, W, 3] from `resize_frame` -> [T, height,
    width, 3]."""
    top, left, height, width = box
    source_height, source_width = frames.shape[1:3]
    if not _is_thin(source_height, source_width, preprocessing):
        return frames[:, top : top + height, left : left + width]
    full_height, full_width = resized_shape(source_height, source_width, preprocessing)
    down, across = source_height / full_height, source_width / full_width
    columns = (left * across, 0.0, (left + width) * across, float(source_height))
    rows = (0.0, top * down, float(width), (top + height) * down)

    def resized_part(frame: np.ndarray) -> np.ndarray:
        # First across, then down, as Pillow resizes a whole picture; of a part it would choose the
        # order itself.
        narrow = _resized(frame, (width, source_height), preprocessing, columns)
        return _resized(narrow, (width, height), preprocessing, rows)

    return np.stack([resized_part(frame) for frame in frames])


def crop_boxes(
    height: int, width: int, preprocessing: Preprocessing, crops: int
) -> list[tuple[Box, bool]]:
    """The evaluation crops of a frame from `resize_frame`: (box, mirrored) in the order of
    `view_names`.

    1 and 3 crops round the center as torchvision does. 10 crops are TSN's: offsets 0, 2 and 4 steps
    of (side - size) // 4.
    """
    height, width = _cut_from(height, width, preprocessing)
    tall, wide, _ = preprocessing.frame_shape
    if crops == 10:
        down, across = (height - tall) // 4, (width - wide) // 4
        corners = [
            (2 * down, 2 * across),
            (0, 0),
            (0, 4 * across),
            (4 * down, 0),
            (4 * down, 4 * across),
        ]
        return [((top, left, tall, wide), flip) for top, left in corners for flip in (False, True)]
    top, left = round((height - tall) / 2), round((width - wide) / 2)
    boxes = [(top, left, tall, wide)]
    if crops == 3:
        ends = (
            [(0, left), (height - tall, left)]
            if height > width
            else [(top, 0), (top, width - wide)]
        )
        boxes += [(*end, tall, wide) for end in ends]
    return [(box, False) for box in boxes]


def training_view(
    height: int, width: int, preprocessing: Preprocessing, rng: np.random.Generator
) -> Callable[[np.ndarray], np.ndarray]:
    """A random crop and flip for all frames of a clip: uint8 [H, W, 3] -> [*size, 3].

    TSN's multi-scale corner crop of a frame from `resize_frame`. Height and width are fractions of
    the largest crop of the same aspect ratio, at most one scale apart. The crop is at one of 13
    positions, is resized to `size`, and is mirrored half of the time. A "squash" model sees parts
    of squashed pictures, a "border" model parts of padded ones.
    """
    height, width = _cut_from(height, width, preprocessing)
    size_height, size_width, _ = preprocessing.frame_shape
    largest = (
        min(height, width * size_height // size_width),
        min(width, height * size_width // size_height),
    )
    scales = [(i, j) for i in range(len(_SCALES)) for j in range(len(_SCALES)) if abs(i - j) <= 1]
    i, j = scales[rng.integers(len(scales))]
    crop_height, crop_width = (
        max(1, int(largest[0] * _SCALES[i])),
        max(1, int(largest[1] * _SCALES[j])),
    )
    down, across = _POSITIONS[rng.integers(len(_POSITIONS))]
    top, left = down * ((height - crop_height) // 4), across * ((width - crop_width) // 4)
    flip = bool(rng.integers(2))

    def view(frame: np.ndarray) -> np.ndarray:
        [part] = cut(frame[None], (top, left, crop_height, crop_width), preprocessing)
        picture = _resized(part, (size_width, size_height), preprocessing)
        return mirrored(picture) if flip else picture

    return view


def augmentation_rng(seed: int, video_id: str, name: int | str) -> np.random.Generator:
    """The random numbers of one pass (a number, or `epoch 3`) over one video: a function of these
    three alone."""
    digest = hashlib.sha256(f"{seed}\0{video_id}\0{name}".encode()).digest()
    return np.random.default_rng(int.from_bytes(digest[:16], "little"))


def mirrored(frames: Any) -> Any:
    """[..., W, 3] -> the same from right to left."""
    return frames[..., ::-1, :] if isinstance(frames, np.ndarray) else frames.flip(-2)


def _is_thin(height: int, width: int, preprocessing: Preprocessing) -> bool:
    """Of a source picture, or of one from `resize_frame`: whether it is cropped before it is
    resized."""
    short, long = min(height, width), max(height, width)
    resize, size = _height_width(preprocessing.resize), _height_width(preprocessing.size)
    is_enlarged_and_cropped = short < min(resize) and min(resize) >= max(size)
    return preprocessing.crop_mode == "center" and long > _THIN * short and is_enlarged_and_cropped


def _cut_from(height: int, width: int, preprocessing: Preprocessing) -> tuple[int, int]:
    """Height and width of the picture that boxes refer to, for a frame from `resize_frame`."""
    thin = _is_thin(height, width, preprocessing)
    return resized_shape(height, width, preprocessing) if thin else (height, width)


def _padded(frame: Any, preprocessing: Preprocessing) -> Any:
    """As torchvision's CenterCrop pads: with black, or in "border" mode with the mean color."""
    height, width = frame.shape[:2]
    size_height, size_width, _ = preprocessing.frame_shape
    down, across = max(size_height - height, 0), max(size_width - width, 0)
    if not (down or across):
        return frame
    fill = (
        [round(255 * value) for value in preprocessing.mean]
        if preprocessing.crop_mode == "border"
        else [0, 0, 0]
    )
    if isinstance(frame, np.ndarray):
        padded = np.empty((height + down, width + across, 3), np.uint8)
        padded[:] = fill
    else:
        padded = frame.new_tensor(fill).repeat(height + down, width + across, 1)
    top, left = down // 2, across // 2
    padded[top : top + height, left : left + width] = frame
    return padded


def _resized(
    frame: Any, size: tuple[int, int], preprocessing: Preprocessing, box: Any = None
) -> Any:
    """Resize a frame, or (left, top, right, bottom) of it, to (width, height) with the weights' own
    interpolation."""
    if not isinstance(frame, np.ndarray):
        return resized(frame, size, preprocessing.interpolation, antialias=preprocessing.antialias)
    if not preprocessing.antialias:
        return _bilinear(frame, size, box or (0, 0, *frame.shape[1::-1]))
    method = Image.Resampling[preprocessing.interpolation.upper()]
    return np.asarray(Image.fromarray(frame).resize(size, method, box))


def _bilinear(
    frame: np.ndarray, size: tuple[int, int], box: tuple[float, float, float, float]
) -> np.ndarray:
    """Bilinear without antialiasing, as torch's `interpolate` does it: each pixel is a mean of
    4."""
    left, top, right, bottom = box
    rows, below, down = _neighbors(top, bottom, size[1], frame.shape[0])
    columns, beside, across = _neighbors(left, right, size[0], frame.shape[1])
    upper, lower = frame[rows], frame[below]
    weight = across[None, :, None]

    def mixed(lines: np.ndarray) -> np.ndarray:
        return lines[:, columns] * (1 - weight) + lines[:, beside] * weight

    weight_below = down[:, None, None]
    return np.rint(mixed(upper) * (1 - weight_below) + mixed(lower) * weight_below).astype(np.uint8)


def _neighbors(
    start: float, stop: float, count: int, length: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """For `count` pixels between start and stop of a side of `length`: the two next pixels, the
    second's weight."""
    step = np.float32((stop - start) / count)
    position = np.maximum(
        np.float32(start) + (np.arange(count, dtype=np.float32) + 0.5) * step - 0.5, 0
    )
    first = np.minimum(position.astype(int), length - 1)
    weight = (position - first).astype(np.float32)
    return first, np.minimum(first + 1, length - 1), weight
