"""A decode job: a file and rows of it in; the pictures that a backbone sees of every row out.

The one job of extraction, fine-tuning, evaluation on videos and prediction. It runs in a decode
child (numpy and Pillow, no torch), which hands back two things:

- pictures: every distinct picture of a row once, uint8 [P, size, size, 3], at the row's place in the child's buffer;
- `Prepared`: which frames they are, and `clips` [V, T, L], which of them form each clip.

A view is one crop, or one random pass, of T clips. A clip is L frames; frame-wise backbones have L
= 1. To take clips in another way (at a model's own rate, say), change `_RowSampler`: it gets the
time of every frame, and may choose a frame for any number of clips.

The clips of a clip-wise backbone are taken at its own rate: around a sampled frame, the frames
shown at instants 1 / clip_fps apart. Their rows are packed into the buffer one after the other.
What does not fit is left to another job.

T = 3, L = 2:   |....ab....|.ab.......|......ab..|      a random pass: a random place in each segment
                |....ab....|....ab....|....ab....|      evaluation: the middle of each
"""

import math
from bisect import bisect_right
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np

from extract import InputError
from extract.decode.container import VideoError
from extract.decode.packets import Span, duration_of
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
from extract.sampling import segment_centers, segment_random

_MAX_ROWS_PER_JOB, _MAX_SLOT_BYTES, _MAX_CLIP_SLOT_BYTES = 16, 32 << 20, 64 << 20
# Instants of a clip are sums of floats: a frame that is shown this much later (s) counts as shown.
_INSTANT_TOLERANCE = 1e-6


@dataclass(frozen=True)
class Plan:
    """Which pictures to prepare of each row.

    With an `epoch` (training) one random pass, which is a function of (seed, id of the row, epoch),
    and nothing else.
    """

    frames: int  # T, clips per view
    crops: int  # 1, 3 or 10
    augment_passes: int
    preprocessing: Preprocessing
    seed: int = 0
    decoder: str = "pyav"
    clip_length: int = 1  # L
    epoch: int | None = None
    clip_fps: float | None = None  # frames of a clip per second; None: consecutive frames
    first_clip: int = 0  # of each row: those before it are in another job's buffer
    frame_rate: float | None = None  # of folders of numbered pictures (Hz)

    def __post_init__(self) -> None:
        if self.crops > 1 and self.preprocessing.has_one_crop:
            raise InputError(
                f"--crops {self.crops}: this backbone sees the whole picture (its crop mode is "
                f"{self.preprocessing.crop_mode}), so all crops are the same; use --crops 1"
            )

    @property
    def passes(self) -> list[int | str | None]:
        """Of each choice of frames, None for the middle ones, else what its random numbers are
        named after."""
        return (
            [None, *range(self.augment_passes)] if self.epoch is None else [f"epoch {self.epoch}"]
        )

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
        """Spans of one file that a decode child does in one pass; what is decoded twice between
        passes is little."""
        if self.clip_fps is not None:
            return _MAX_ROWS_PER_JOB
        return max(1, min(_MAX_ROWS_PER_JOB, _MAX_SLOT_BYTES // self.row_bytes))

    @property
    def slot_bytes(self) -> int:
        """Of a job's buffer. Clips share frames, so theirs may hold less than all rows: one clip of
        each view fits."""
        if self.clip_fps is None:
            return self.rows_per_job * self.row_bytes
        return max(
            self.row_bytes // self.frames,
            min(_MAX_ROWS_PER_JOB * self.row_bytes, _MAX_CLIP_SLOT_BYTES),
        )


@dataclass(frozen=True)
class Prepared:
    """What was decoded of a row: P pictures, and the clips that they form.

    frame_indices int32 [P] and frame_times float32 [P] (s), of the frame that each picture shows;
    clips int32 [V, T, L], positions in the pictures; num_frames that can be shown; problem, why the
    row is partial, if it is; end, when the last frame of the file goes (s); note, what else is to
    be recorded of it.
    """

    frame_indices: np.ndarray = field(repr=False)
    frame_times: np.ndarray = field(repr=False)
    clips: np.ndarray = field(repr=False)
    num_frames: int
    problem: str = ""
    end: float = math.nan
    note: str = ""
    first_picture: int = 0  # of the row, in the buffer

    @property
    def middles(self) -> np.ndarray:
        """int32 [V, T]: the picture in the middle of each clip."""
        return self.middles_of(1)

    def middles_of(self, parts: int) -> np.ndarray:
        """int32 [V, T * parts]: the picture in the middle of each of the equal parts of each
        clip."""
        edges = np.arange(parts + 1) * self.clips.shape[2] // parts
        return self.clips[:, :, (edges[:-1] + edges[1:] - 1) // 2].reshape(len(self.clips), -1)

    @property
    def indices(self) -> np.ndarray:
        """int32 [V, T]: the frame in the middle of each clip."""
        return self.frame_indices[self.middles]

    @property
    def timestamps(self) -> np.ndarray:
        """float32 [V, T]: when it is shown (s)."""
        return self.frame_times[self.middles]

    def pictures(self, buffer: Any, plan: Plan) -> Any:
        """uint8 [P, height, width, 3] of the row, in the buffer of its job."""
        size = math.prod(plan.preprocessing.frame_shape)
        row = buffer[self.first_picture * size :][: len(self.frame_indices) * size]
        return row.reshape(-1, *plan.preprocessing.frame_shape)


Job = tuple[
    str, list[tuple[str, Span | None]], Plan
]  # a path, rows (id, span) of that file, what to prepare of each


def decode_job(job: Job, out: Any) -> Any:
    """Decode n rows of one file in one pass over it, as a decode child does: n of Prepared,
    VideoError, or None.

    Without rows, seconds: how long the file lasts (raises VideoError). out: flat uint8, on a GPU if
    the decoder is there; the pictures of row k begin at k * plan.row_bytes, those of clips with a
    rate where the row before ends. None: `out` had no room for that row; the first row of a job may
    hold fewer clips than its plan for the same reason. `remaining_jobs` do the rest.
    """
    path, rows, plan = job
    if not rows:
        return duration_of(path)
    size = math.prod(plan.preprocessing.frame_shape)
    pictures = out[: len(out) // size * size].reshape(-1, *plan.preprocessing.frame_shape)
    used = [0] * len(rows)
    samplers = [
        _RowSampler(plan, row_id, row, used, len(pictures)) for row, (row_id, _) in enumerate(rows)
    ]
    packed = 0
    results: dict[int, Prepared | VideoError] = {}
    try:
        for row, decoded in decode_spans(
            path,
            [(span, sampler) for (_, span), sampler in zip(rows, samplers, strict=True)],
            resize=lambda frame: resize_frame(frame, plan.preprocessing),
            decoder=plan.decoder,
            frame_rate=plan.frame_rate,
        ):
            if isinstance(decoded, VideoError):
                results[row] = decoded
                continue
            first = row * plan.row_bytes // size if plan.clip_fps is None else packed
            results[row] = prepared = _write_pictures(
                decoded, plan, samplers[row].rngs, pictures, first
            )
            packed += len(prepared.frame_indices)
    except VideoError as error:  # of the whole file
        for row in range(len(rows)):
            results.setdefault(row, error)
    return [results.get(row) for row in range(len(rows))]


def used_bytes(plan: Plan, results: list[Prepared | VideoError | None]) -> int:
    """Of a job's buffer, those up to the end of the last row."""
    ends = [
        result.first_picture + len(result.frame_indices)
        for result in results
        if isinstance(result, Prepared)
    ]
    return max(ends, default=0) * math.prod(plan.preprocessing.frame_shape)


def remaining_jobs(job: Job, results: list[Prepared | VideoError | None]) -> list[Job]:
    """Jobs for what the buffer of `job` had no room for: the other clips of its first row, and the
    rows after it."""
    path, rows, plan = job
    jobs: list[Job] = []
    first = results[0]
    if (
        isinstance(first, Prepared)
        and (done := plan.first_clip + first.clips.shape[1]) < plan.frames
    ):
        jobs.append((path, rows[:1], replace(plan, first_clip=done)))
    left = [row for row, result in zip(rows, results, strict=True) if result is None]
    return [*jobs, (path, left, plan)] if left else jobs


class _RowSampler:
    """Chooses the frames of one row: int64 [passes, T, L].

    used: pictures of each row of the job, of at most `room` together. A row that has no room gets
    no frames.

    Random generators are made at each call, so a row's frames do not depend on what was decoded
    before. `rngs` keeps them, as they are after choosing frames, for the random crop of each pass;
    None for evaluation.
    """

    def __init__(self, plan: Plan, row_id: str, row: int, used: list[int], room: int):
        self._plan, self._row_id = plan, row_id
        self._row, self._used, self._room = row, used, room
        self.rngs: list[np.random.Generator | None] = []

    def __call__(self, times: FrameTimes) -> np.ndarray:
        plan, num_frames = self._plan, times.num_frames
        self.rngs = [
            None if name is None else augmentation_rng(plan.seed, self._row_id, name)
            for name in plan.passes
        ]
        middles = [
            segment_centers(num_frames, plan.frames)
            if rng is None
            else segment_random(num_frames, plan.frames, rng)
            for rng in self.rngs
        ]
        length = plan.clip_length
        if plan.clip_fps is not None:
            instants = (np.arange(length) - (length - 1) // 2) / plan.clip_fps + _INSTANT_TOLERANCE
            shown = (
                np.searchsorted(
                    times.seconds, times.seconds[np.stack(middles)][..., None] + instants, "right"
                )
                - 1
            )
            return self._that_fit(np.clip(shown, 0, num_frames - 1)[:, plan.first_clip :])
        # Neighbors around the chosen frame, moved inside where the video begins or ends.
        start = np.clip(np.stack(middles) - (length - 1) // 2, 0, max(num_frames - length, 0))
        return np.minimum(start[..., None] + np.arange(length), num_frames - 1)

    def _that_fit(self, clips: np.ndarray) -> np.ndarray:
        """The first of the clips [passes, T, L] whose pictures there is room for: all, or of the
        first row some."""
        views = [self._plan.num_views - self._plan.augment_passes] + [1] * self._plan.augment_passes

        def pictures(count: int) -> int:
            return sum(
                len(np.unique(clip[:count])) * number
                for clip, number in zip(clips, views, strict=True)
            )

        self._used[self._row] = 0
        room, count = self._room - sum(self._used), clips.shape[1]
        if pictures(count) > room:
            count = 0 if any(self._used) else bisect_right(range(count), room, key=pictures) - 1
        self._used[self._row] = pictures(count)
        return clips[:, :count]


def _write_pictures(
    decoded: Decoded,
    plan: Plan,
    rngs: list[np.random.Generator | None],
    buffer: Any,
    first_picture: int,
) -> Prepared:
    """Write each view's distinct pictures into the buffer, uint8 [pictures, height, width, 3], view
    after view."""
    height, width = decoded.frames.shape[1:3]
    out = buffer[first_picture:]
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
        first_picture=first_picture,
    )


def _views(
    height: int, width: int, plan: Plan, rng: np.random.Generator | None
) -> Iterator[Callable[[Any, Any], None]]:
    """Of a pass, functions that write frames [n, H, W, 3] as a view shows them: [n, size, size,
    3]."""

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
