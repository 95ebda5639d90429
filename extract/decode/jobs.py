"""A decode job: one file and rows of it in, the pictures that a backbone sees of each row out.

Extraction, fine-tuning, evaluation on videos and prediction all use it. It runs in a child process
(numpy, Pillow and scipy, no torch), which returns two things:

- pictures: every distinct picture of a row once, uint8 [P, size, size, 3], in the child's buffer;
- `Prepared`: which frames they show, and `clips` [V, T, L], which pictures form each clip.

A view is one crop, or one random pass, of T clips. A clip is L frames; L = 1 for frame-wise
backbones. To choose clips in another way (at a model's own rate, say), change `_RowSampler`: it
gets the time of every frame, and may use a frame in any number of clips.

Clip-wise backbones have their own frame rate: a clip consists of the frames that are shown at
instants 1 / clip_fps apart, around a sampled frame. Rows and clips that do not fit into the buffer
are left to another job.

T = 3, L = 2:   |....ab....|.ab.......|......ab..|      random pass: anywhere in each segment
                |....ab....|....ab....|....ab....|      evaluation: the middle of each segment
"""

import math
from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np

from extract import InputError
from extract.decode.container import VideoError
from extract.decode.packets import Span, duration_of
from extract.decode.reader import Decoded, decode_spans
from extract.decode.transform import (
    Preprocessing,
    augmentation_rng,
    crop_boxes,
    cut,
    resize_frame,
    training_view,
)
from extract.sampling import segment_centers, segment_random

_MAX_ROWS_PER_JOB, _MAX_SLOT_BYTES, _MAX_CLIP_SLOT_BYTES = 16, 32 << 20, 64 << 20
# The instants of a clip are sums of floats. A frame counts as shown if it is this much later (s).
_INSTANT_TOLERANCE = 1e-6


@dataclass(frozen=True)
class Plan:
    """Which pictures to prepare of each row.

    With an `epoch` (training) there is one random pass. It depends on (seed, id of the row, epoch)
    only.
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
    first_clip: int = 0  # of each row; earlier clips are in the buffer of another job
    frame_rate: float | None = None  # of folders of numbered pictures (Hz)

    def __post_init__(self) -> None:
        if self.crops > 1 and self.preprocessing.has_one_crop:
            raise InputError(
                f"--crops {self.crops}: this backbone sees the whole picture (its crop mode is "
                f"{self.preprocessing.crop_mode}), so all crops are the same; use --crops 1"
            )

    @property
    def passes(self) -> dict[int | str | None, int]:
        """The number of views per choice of frames.

        None stands for the middle frames. Other keys seed the random numbers of a random pass.
        """
        if self.epoch is not None:
            return {f"epoch {self.epoch}": 1}
        passes: dict[int | str | None, int] = {None: self.crops}
        return passes | dict.fromkeys(range(self.augment_passes), 1)

    @property
    def num_views(self) -> int:
        return sum(self.passes.values())

    @property
    def shape(self) -> tuple[int, int, int, int, int, int]:
        """Of the clips of one row: V, T, L, height, width, 3."""
        return self.num_views, self.frames, self.clip_length, *self.preprocessing.frame_shape

    @property
    def row_bytes(self) -> int:
        """Size of one row if all of its pictures are distinct."""
        return math.prod(self.shape)

    @property
    def rows_per_job(self) -> int:
        """Spans of one file that a child decodes in one pass. Little is decoded twice between
        passes."""
        if self.clip_fps is not None:
            return _MAX_ROWS_PER_JOB
        return max(1, min(_MAX_ROWS_PER_JOB, _MAX_SLOT_BYTES // self.row_bytes))

    @property
    def slot_bytes(self) -> int:
        """Size of a job's buffer.

        Clips share frames, so theirs may be smaller than the rows. One clip of each view fits.
        """
        if self.clip_fps is None:
            return self.rows_per_job * self.row_bytes
        one_clip = self.row_bytes // self.frames
        return max(one_clip, min(_MAX_ROWS_PER_JOB * self.row_bytes, _MAX_CLIP_SLOT_BYTES))


@dataclass(frozen=True)
class Prepared:
    """What was decoded of a row: P pictures, and the clips that they form.

    frame_indices: int32 [P], the frame that each picture shows.
    frame_times: float32 [P], when it is shown (s).
    clips: int32 [V, T, L], positions in the pictures.
    num_frames: how many frames can be shown.
    problem: why the row is partial, or "".
    end: when the last frame of the file ends (s).
    note: a remark to be stored with the features.
    first_picture: of the row, in the buffer of its job.
    """

    frame_indices: np.ndarray = field(repr=False)
    frame_times: np.ndarray = field(repr=False)
    clips: np.ndarray = field(repr=False)
    num_frames: int
    problem: str = ""
    end: float = math.nan
    note: str = ""
    first_picture: int = 0

    def middles(self, parts: int = 1) -> np.ndarray:
        """int32 [V, T * parts]: cut each clip into equal parts, and take the picture in the middle
        of each."""
        edges = np.arange(parts + 1) * self.clips.shape[2] // parts
        return self.clips[:, :, (edges[:-1] + edges[1:] - 1) // 2].reshape(len(self.clips), -1)

    @property
    def indices(self) -> np.ndarray:
        """int32 [V, T]: the frame in the middle of each clip."""
        return self.frame_indices[self.middles()]

    @property
    def timestamps(self) -> np.ndarray:
        """float32 [V, T]: when that frame is shown (s)."""
        return self.frame_times[self.middles()]

    def pictures(self, buffer: Any, plan: Plan) -> Any:
        """uint8 [P, height, width, 3] of the row, in the buffer of its job."""
        pictures = _as_pictures(buffer, plan)
        return pictures[self.first_picture :][: len(self.frame_indices)]


# A path, rows (id, span) of that file, and what to prepare of each row.
Job = tuple[str, list[tuple[str, Span | None]], Plan]
Results = list[Prepared | VideoError | None]  # None: the buffer had no room for the row


def decode_job(job: Job, out: Any) -> Any:
    """Decode n rows of one file in one pass, as a child process does.

    Args:
        out: the buffer, flat uint8; on a GPU if the decoder is there. The rows are packed into it
            one after the other.

    Returns:
        `Results` of the n rows. The buffer may have no room for the last rows, or for all clips of
        the first row; see `remaining_jobs`. Without rows: the seconds that the file lasts (raises
        VideoError).
    """
    path, rows, plan = job
    if not rows:
        return duration_of(path)
    pictures = _as_pictures(out, plan)
    used = [0] * len(rows)
    samplers = [
        _RowSampler(plan, row_id, row, used, len(pictures)) for row, (row_id, _) in enumerate(rows)
    ]
    requests = [(span, sampler) for (_, span), sampler in zip(rows, samplers, strict=True)]
    used_pictures = 0
    results: dict[int, Prepared | VideoError] = {}
    try:
        for row, decoded in decode_spans(
            path,
            requests,
            resize=lambda frame: resize_frame(frame, plan.preprocessing),
            decoder=plan.decoder,
            frame_rate=plan.frame_rate,
        ):
            if isinstance(decoded, VideoError):
                results[row] = decoded
                continue
            prepared = _write_pictures(decoded, plan, samplers[row].rngs, pictures, used_pictures)
            results[row] = prepared
            used_pictures += len(prepared.frame_indices)
    except VideoError as error:  # of the whole file
        results = {row: results.get(row, error) for row in range(len(rows))}
    return [results.get(row) for row in range(len(rows))]


def _as_pictures(buffer: Any, plan: Plan) -> Any:
    """The whole pictures in a flat buffer: uint8 [pictures, height, width, 3]."""
    shape = plan.preprocessing.frame_shape
    return buffer[: len(buffer) // math.prod(shape) * math.prod(shape)].reshape(-1, *shape)


def used_bytes(plan: Plan, results: Results) -> int:
    """The part of a job's buffer that its rows fill."""
    pictures = [len(result.frame_indices) for result in results if isinstance(result, Prepared)]
    return sum(pictures) * math.prod(plan.preprocessing.frame_shape)


def remaining_jobs(job: Job, results: Results) -> list[Job]:
    """Jobs for what did not fit into the buffer: further clips of the first row, and later rows."""
    path, rows, plan = job
    jobs: list[Job] = []
    if isinstance(results[0], Prepared):
        done = plan.first_clip + results[0].clips.shape[1]
        if done < plan.frames:
            jobs.append((path, rows[:1], replace(plan, first_clip=done)))
    pending = [row for row, result in zip(rows, results, strict=True) if result is None]
    return [*jobs, (path, pending, plan)] if pending else jobs


class _RowSampler:
    """Chooses the frames of one row: int64 [passes, T, L].

    used: the number of pictures of each row of the job, shared by all of its samplers. Together
    they may have `capacity`. A row that does not fit gets no frames.

    A call makes new random generators, so a row's frames do not depend on what was decoded before.
    `rngs` keeps them in the state after choosing frames, for the random crop of each pass; they are
    None for evaluation.
    """

    def __init__(self, plan: Plan, row_id: str, row: int, used: list[int], capacity: int):
        self._plan, self._row_id = plan, row_id
        self._row, self._used, self._capacity = row, used, capacity
        self.rngs: list[np.random.Generator | None] = []

    def __call__(self, times: np.ndarray) -> np.ndarray:
        plan, num_frames, length = self._plan, len(times), self._plan.clip_length
        self.rngs = [
            None if name is None else augmentation_rng(plan.seed, self._row_id, name)
            for name in plan.passes
        ]
        middles = np.stack(
            [
                segment_centers(num_frames, plan.frames)
                if rng is None
                else segment_random(num_frames, plan.frames, rng)
                for rng in self.rngs
            ]
        )
        if plan.clip_fps is None:
            # Neighbors of the chosen frame, moved inwards at the start and the end of the video.
            start = np.clip(middles - (length - 1) // 2, 0, max(num_frames - length, 0))
            return np.minimum(start[..., None] + np.arange(length), num_frames - 1)
        offsets = (np.arange(length) - (length - 1) // 2) / plan.clip_fps + _INSTANT_TOLERANCE
        instants = times[middles][..., None] + offsets
        shown = np.searchsorted(times, instants, "right") - 1
        return self._that_fit(np.clip(shown, 0, num_frames - 1)[:, plan.first_clip :])

    def _that_fit(self, clips: np.ndarray) -> np.ndarray:
        """The first of the clips [passes, T, L] for which there is room.

        That is all or none; of the first row of a job it may be some.
        """
        num_views = self._plan.passes.values()

        def num_pictures(count: int) -> int:
            distinct = (len(np.unique(clip[:count])) for clip in clips)
            return sum(n * views for n, views in zip(distinct, num_views, strict=True))

        self._used[self._row] = 0
        room, count = self._capacity - sum(self._used), clips.shape[1]
        if num_pictures(count) > room:
            is_first = not any(self._used)
            count = bisect_right(range(count), room, key=num_pictures) - 1 if is_first else 0
        self._used[self._row] = num_pictures(count)
        return clips[:, :count]


def _write_pictures(
    decoded: Decoded,
    plan: Plan,
    rngs: list[np.random.Generator | None],
    buffer: Any,
    first_picture: int,
) -> Prepared:
    """Write the distinct pictures of each view into the buffer, uint8 [pictures, H, W, 3]."""
    height, width = decoded.frames.shape[1:3]
    out = buffer[first_picture:]
    count, shown, clips = 0, [], []
    for rng, choice in zip(rngs, decoded.choice, strict=True):
        distinct, positions = np.unique(choice, return_inverse=True)
        uses_all = len(distinct) == len(decoded.frames)
        frames = decoded.frames if uses_all else decoded.frames[distinct]
        for view in _views(height, width, plan, rng):
            for number, frame in enumerate(frames, count):
                out[number] = view(frame)
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
) -> list[Callable[[Any], Any]]:
    """Functions of a frame [H, W, 3] that return what a view of the pass shows of it."""
    if rng is not None:
        return [training_view(height, width, plan.preprocessing, rng)]
    boxes = crop_boxes(height, width, plan.preprocessing, plan.crops)
    return [partial(cut, box=box, flip=flip) for box, flip in boxes]
