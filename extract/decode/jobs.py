"""A decode job: a file and rows of it in; the pictures that a backbone sees of every row out.

The one job of extraction, fine-tuning, evaluation on videos and prediction. It runs in a decode child (numpy and
Pillow, no torch), which hands back two things:

- pictures: every distinct picture of a row once, uint8 [P, size, size, 3], at the row's place in the child's buffer;
- `Prepared`: which frames they are, and `clips` [V, T, L], which of them form each clip.

A view is one crop, or one random pass, of T clips. A clip is L frames; frame-wise backbones have L = 1. To take clips
in another way (at a model's own rate, say), change `_RowSampler`: it gets the time of every frame, and may choose a
frame for any number of clips.

T = 3, L = 2:   |....ab....|.ab.......|......ab..|      a random pass: a random place in each segment
                |....ab....|....ab....|....ab....|      evaluation: the middle of each
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np

from extract.cli import InputError
from extract.decode.opening import VideoError
from extract.decode.packets import Span, length_of
from extract.decode.reader import Decoded, FrameTimes, decode_spans
from extract.decode.transform import (
    Preprocessing,
    augmentation_rng,
    crop_boxes,
    cut,
    mirrored,
    resize_frame,
    training_view,
    view_names,
)
from extract.sampling import segment_centres, segment_random

_MAX_ROWS_PER_JOB, _MAX_SLOT_BYTES = 16, 32 << 20


@dataclass(frozen=True)
class Plan:
    """Which pictures to prepare of each row.

    With an `epoch` (training) one random pass, which is a function of (seed, id of the row, epoch), and nothing else.
    """

    frames: int  # T, clips per view
    crops: int  # 1, 3 or 10
    augment_passes: int
    preprocessing: Preprocessing
    seed: int = 0
    decoder: str = "pyav"
    clip_length: int = 1  # L, consecutive frames
    epoch: int | None = None

    def __post_init__(self) -> None:
        if self.crops > 1 and self.preprocessing.has_one_crop:
            raise InputError(
                f"--crops {self.crops}: this backbone sees the whole picture (its crop mode is "
                f"{self.preprocessing.crop_mode}), so all crops are the same; use --crops 1"
            )

    @property
    def passes(self) -> list[int | str | None]:
        """Of each choice of frames, None for the middle ones, else what its random numbers are named after."""
        return [None, *range(self.augment_passes)] if self.epoch is None else [f"epoch {self.epoch}"]

    @property
    def num_views(self) -> int:
        return 1 if self.epoch is not None else len(view_names(self.crops, self.augment_passes))

    @property
    def shape(self) -> tuple[int, int, int, int, int, int]:
        """Of the clips of one row: V, T, L, height, width, 3."""
        return self.num_views, self.frames, self.clip_length, *self.preprocessing.frame_shape

    @property
    def row_bytes(self) -> int:
        """Of the pictures of one row, if all are distinct: the stride of rows in the buffer."""
        return math.prod(self.shape)

    @property
    def rows_per_job(self) -> int:
        """Spans of one file that a decode child does in one pass; what is decoded twice between passes is little."""
        return max(1, min(_MAX_ROWS_PER_JOB, _MAX_SLOT_BYTES // self.row_bytes))

    @property
    def slot_bytes(self) -> int:
        return self.rows_per_job * self.row_bytes


@dataclass(frozen=True)
class Prepared:
    """What was decoded of a row: P pictures, and the clips that they form.

    frame_indices int32 [P] and frame_times float32 [P] (s), of the frame that each picture shows; clips int32
    [V, T, L], positions in the pictures; num_frames that can be shown; problem, why the row is partial, if it is;
    end, when the last frame of the file goes (s); note, what else is to be recorded of it.
    """

    frame_indices: np.ndarray = field(repr=False)
    frame_times: np.ndarray = field(repr=False)
    clips: np.ndarray = field(repr=False)
    num_frames: int
    problem: str = ""
    end: float = math.nan
    note: str = ""

    @property
    def middles(self) -> np.ndarray:
        """int32 [V, T]: the picture in the middle of each clip."""
        return self.clips[:, :, (self.clips.shape[2] - 1) // 2]

    @property
    def indices(self) -> np.ndarray:
        """int32 [V, T]: the frame in the middle of each clip."""
        return self.frame_indices[self.middles]

    @property
    def timestamps(self) -> np.ndarray:
        """float32 [V, T]: when it is shown (s)."""
        return self.frame_times[self.middles]


Job = tuple[str, list[tuple[str, Span | None]], Plan]  # a path, rows (id, span) of that file, what to prepare of each


def decode_job(job: Job, out: Any) -> Any:
    """Decode n rows of one file in one pass over it, as a decode child does: n of Prepared or VideoError.

    Without rows, seconds: how long the file lasts (raises VideoError).
    out: flat uint8, on a GPU if the decoder is there; the pictures of row k begin at k * plan.row_bytes.
    """
    path, rows, plan = job
    if not rows:
        return length_of(path)
    pictures = out[: len(rows) * plan.row_bytes].reshape(len(rows), -1, *plan.preprocessing.frame_shape)
    samplers = [_RowSampler(plan, row_id) for row_id, _ in rows]
    results: dict[int, Prepared | VideoError] = {}
    try:
        for row, decoded in decode_spans(
            path,
            [(span, sampler) for (_, span), sampler in zip(rows, samplers, strict=True)],
            resize=lambda frame: resize_frame(frame, plan.preprocessing),
            decoder=plan.decoder,
        ):
            if isinstance(decoded, VideoError):
                results[row] = decoded
            else:
                results[row] = _write_pictures(decoded, plan, samplers[row].rngs, pictures[row])
    except VideoError as error:  # of the whole file
        for row in range(len(rows)):
            results.setdefault(row, error)
    return [results[row] for row in range(len(rows))]


class _RowSampler:
    """Chooses the frames of one row: int64 [passes, T, L].

    Random generators are made at each call, so a row's frames do not depend on what was decoded before. `rngs` keeps
    them, as they are after choosing frames, for the random crop of each pass; None for evaluation.
    """

    def __init__(self, plan: Plan, row_id: str):
        self._plan, self._row_id = plan, row_id
        self.rngs: list[np.random.Generator | None] = []

    def __call__(self, times: FrameTimes) -> np.ndarray:
        plan, num_frames = self._plan, times.num_frames
        self.rngs = [None if name is None else augmentation_rng(plan.seed, self._row_id, name) for name in plan.passes]
        middles = [
            segment_centres(num_frames, plan.frames) if rng is None else segment_random(num_frames, plan.frames, rng)
            for rng in self.rngs
        ]
        # Neighbors around the chosen frame, moved inside where the video begins or ends.
        length = plan.clip_length
        start = np.clip(np.stack(middles) - (length - 1) // 2, 0, max(num_frames - length, 0))
        return np.minimum(start[..., None] + np.arange(length), num_frames - 1)


def _write_pictures(decoded: Decoded, plan: Plan, rngs: list[np.random.Generator | None], out: Any) -> Prepared:
    """Write each view's distinct pictures into `out` uint8 [P at most, size, size, 3], one view after the other."""
    height, width = decoded.frames.shape[1:3]
    count, shown, clips = 0, [], []
    for rng, choice in zip(rngs, decoded.choice, strict=True):
        distinct, positions = np.unique(choice, return_inverse=True)
        whole = len(distinct) == len(decoded.frames)
        frames = decoded.frames if whole else decoded.frames[distinct]
        for view in _views(height, width, plan, rng):
            view(frames, out[count : count + len(distinct)])
            shown.append(distinct)
            clips.append(count + positions.reshape(choice.shape))
            count += len(distinct)
    pictures = np.concatenate(shown)
    return Prepared(
        frame_indices=decoded.indices[pictures],
        frame_times=decoded.timestamps[pictures],
        clips=np.stack(clips).astype(np.int32),
        num_frames=decoded.num_frames,
        problem=decoded.problem,
        end=decoded.end,
        note=decoded.note,
    )


def _views(
    height: int, width: int, plan: Plan, rng: np.random.Generator | None
) -> Iterator[Callable[[Any, Any], None]]:
    """Of a pass, functions that write frames [n, H, W, 3] as a view shows them: [n, size, size, 3]."""

    def write_crop(frames: Any, out: Any, *, box: tuple[int, int, int, int], flip: bool) -> None:
        crops = cut(frames, box, plan.preprocessing)
        out[:] = mirrored(crops) if flip else crops

    def write_random(frames: Any, out: Any, *, view_of: Callable[[Any], Any]) -> None:
        for number, frame in enumerate(frames):
            out[number] = view_of(frame)

    if rng is None:
        for box, flip in crop_boxes(height, width, plan.preprocessing, plan.crops):
            yield partial(write_crop, box=box, flip=flip)
    else:
        yield partial(write_random, view_of=training_view(height, width, plan.preprocessing, rng))
