"""What the backbone sees of a video: resizing, evaluation crops, augmented passes (numpy and Pillow, no torch).

Runs in the decode children. A view is one crop, or one augmented pass, of all T sampled frames; view 0 is always the
unflipped centre crop.
"""

import hashlib
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any, Literal

import numpy as np
from PIL import Image

from extract.decode import Decoded, Span, VideoError, decode_spans
from extract.decode.on_gpu import resized
from extract.sampling import segment_centres, segment_random

Box = tuple[int, int, int, int]  # top, left, height, width

_CORNERS = ("tl", "tr", "bl", "br")
# TSN's multi-scale corner crop: sides are these fractions of the short side, at most one scale apart.
_SCALES = (1.0, 0.875, 0.75, 0.66)
# And its 13 places, in quarters of the room there is: corners, edges' middles and the centre, and four between them.
_PLACES = [(i, j) for i in (0, 2, 4) for j in (0, 2, 4)] + [(i, j) for i in (1, 3) for j in (1, 3)]
_ROWS_A_JOB, _SLOT_BYTES = 16, 32 << 20


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


@dataclass(frozen=True)
class Plan:
    """What to prepare of each video: T frames in some crops, and augmented passes."""

    frames: int
    crops: int  # 1, 3 or 10
    augment_passes: int
    preprocessing: Preprocessing
    seed: int
    decoder: str

    @property
    def shape(self) -> tuple[int, int, int, int, int]:
        """Of the frames of one row: V, T, size, size, 3."""
        size = self.preprocessing.size
        return len(view_names(self.crops, self.augment_passes)), self.frames, size, size, 3

    @property
    def row_bytes(self) -> int:
        return math.prod(self.shape)

    @property
    def rows_a_job(self) -> int:
        """Spans of one file that a decode child does in one pass; what is decoded twice between passes is little."""
        return max(1, min(_ROWS_A_JOB, _SLOT_BYTES // self.row_bytes))

    @property
    def slot_bytes(self) -> int:
        return self.rows_a_job * self.row_bytes


@dataclass(frozen=True)
class Prepared:
    """What was really decoded: indices int32 [V, T], timestamps float32 [V, T] (s), and why it is partial, if it is."""

    indices: np.ndarray = field(repr=False)
    timestamps: np.ndarray = field(repr=False)
    num_frames: int
    problem: str
    note: str = ""  # what else is to be recorded of it


Job = tuple[str, list[tuple[str, Span | None]], Plan]  # a path, rows (id, span) of that file, what to prepare of each


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
        return _mirrored(picture) if flip else picture

    return view


def augmentation_rng(seed: int, video_id: str, number: int | str) -> np.random.Generator:
    """The random numbers of one augmented pass over one video: a function of these three, and of nothing else."""
    digest = hashlib.sha256(f"{seed}\0{video_id}\0{number}".encode()).digest()
    return np.random.default_rng(int.from_bytes(digest[:16], "little"))


def prepare(path: str, video_id: str, plan: Plan, out: np.ndarray, *, span: Span | None = None) -> Prepared:
    """Decode a video, or a span of it, once and write all its views into `out`: uint8 [V, T, size, size, 3].

    Raises VideoError where not one frame can be read.
    """
    if out.shape != plan.shape or not str(out.dtype).endswith("uint8"):
        raise ValueError(f"got {out.dtype} {out.shape} to write into, expected uint8 {plan.shape}")
    [prepared] = decode_job((path, [(video_id, span)], plan), out.reshape(-1))
    if isinstance(prepared, VideoError):
        raise prepared
    return prepared


def decode_job(
    job: Job, out: np.ndarray, on_duration: Callable[[float | None], None] | None = None
) -> list[Prepared | VideoError]:
    """`prepare` for n rows of one file in one pass over it, as a decode child calls it.

    out: flat uint8, on a GPU if the decoder is there, of which the first n * plan.row_bytes are written.
    """
    path, wanted, plan = job
    views = out[: len(wanted) * plan.row_bytes].reshape(len(wanted), *plan.shape)
    rngs = [[augmentation_rng(plan.seed, name, number) for number in range(plan.augment_passes)] for name, _ in wanted]

    def sample(num_frames: int, rngs: list[np.random.Generator]) -> np.ndarray:
        passes = [segment_random(num_frames, plan.frames, rng) for rng in rngs]
        return np.concatenate([segment_centres(num_frames, plan.frames), *passes])

    results: dict[int, Prepared | VideoError] = {}
    try:
        for place, decoded in decode_spans(
            path,
            [(span, partial(sample, rngs=mine)) for (_, span), mine in zip(wanted, rngs, strict=True)],
            resize=lambda frame: resize_short_side(frame, plan.preprocessing),
            decoder=plan.decoder,
            on_duration=on_duration,
        ):
            mine = rngs[place], views[place]
            results[place] = decoded if isinstance(decoded, VideoError) else _write_views(decoded, plan, *mine)
    except VideoError as error:  # of the whole file
        for place in range(len(wanted)):
            results.setdefault(place, error)
    return [results[place] for place in range(len(wanted))]


def _write_views(decoded: Decoded, plan: Plan, rngs: list[np.random.Generator], out: np.ndarray) -> Prepared:
    height, width = decoded.frames.shape[1:3]
    boxes = crop_boxes(height, width, plan.preprocessing.size, plan.crops)
    for view, ((top, left, tall, wide), flip) in enumerate(boxes):
        crops = decoded.frames[: plan.frames, top : top + tall, left : left + wide]
        out[view] = _mirrored(crops) if flip else crops
    for number, rng in enumerate(rngs):
        view_of = training_view(height, width, plan.preprocessing, rng)
        first = (1 + number) * plan.frames
        for place, frame in enumerate(decoded.frames[first : first + plan.frames]):
            out[len(boxes) + number, place] = view_of(frame)

    def by_view(values: np.ndarray) -> np.ndarray:
        passes = values.reshape(1 + plan.augment_passes, plan.frames)
        return np.concatenate([np.repeat(passes[:1], len(boxes), axis=0), passes[1:]])

    return Prepared(by_view(decoded.indices), by_view(decoded.timestamps), decoded.num_frames, decoded.problem)


def _mirrored(frames: Any) -> Any:
    return frames[..., ::-1, :] if isinstance(frames, np.ndarray) else frames.flip(-2)


def _resized(frame: Any, size: tuple[int, int], preprocessing: Preprocessing) -> Any:
    """Resize to (width, height) with the weights' own interpolation; Pillow antialiases where it shrinks."""
    if not isinstance(frame, np.ndarray):
        return resized(frame, size, preprocessing.interpolation)
    filters = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}
    return np.asarray(Image.fromarray(frame).resize(size, filters[preprocessing.interpolation]))
