"""A checkpoint that looks at videos, whole or in windows: decoded by spans, as extraction does it,
in a child."""

import os
import weakref
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from extract import InputError, RunError, StrPath
from extract.backbone.frozen import NotFiniteError
from extract.cli import progress
from extract.decode import VideoError

if TYPE_CHECKING:
    from aggregate.training.checkpoint import Checkpoint
    from extract.decode.jobs import Prepared
    from extract.decode.packets import Span
    from extract.decode.pool import SubprocessPool

    Part = tuple[Prepared, np.ndarray]

WEIGHING = (
    "hgnl",
    "nl",
    "weighted",
    "attentive",
    "attentive-time",
    "nextvlad",
)  # the aggregators with a weight a frame


class Window(NamedTuple):
    """A stretch of a video, seconds, and what the model says of it; `problem` says what of it could
    not be read.

    num_frames that are shown in it; indices [n] and times float [n] (s) of those it saw; logits
    float32 [C]; weights float32 [groups, n], the aggregator's frame weights, None where it has
    none.
    """

    start: float
    end: float
    num_frames: int
    indices: np.ndarray
    times: np.ndarray
    logits: np.ndarray = np.empty(0)
    weights: np.ndarray | None = None
    problem: str = ""


@dataclass(frozen=True)
class Prediction:
    """A video's windows: one, the whole of it, unless windows were asked for; the crops [n, size,
    size, 3] it saw of the first one; `problem` says what could not be read."""

    path: str
    seconds: float
    windows: tuple[Window, ...]
    problem: str = ""
    crops: np.ndarray = field(default_factory=lambda: np.empty(0), repr=False)


class Predictor:
    """A checkpoint ready to look at videos.

    Videos are decoded in a child process, under the deadline that extraction has. `weights`,
    `device`, `precision`, `video_timeout` (s): see Options. Raises InputError where the recorded
    backbone cannot be had.
    """

    def __init__(
        self,
        checkpoint: "Checkpoint",
        *,
        weights: Path | None = None,
        device: str = "auto",
        precision: str = "auto",
        segments: int = 25,
        video_timeout: float = 60.0,
    ):
        from aggregate.endtoend import (
            backbone_from_record,
            clips_of,
            model_from_record,
            preprocessing_of,
        )
        from extract.decode.jobs import Plan

        if segments < 1:
            raise InputError(f"--segments {segments}: at least one frame is needed")
        self.classes, self.segments = checkpoint.classes, segments
        self.preprocessing = preprocessing_of(checkpoint)
        self._per_segment = checkpoint.options.get("frames_per_segment", 0)  # of StNet
        self._clips = clips = clips_of(checkpoint)
        clip: dict[str, Any] = {"clip_length": max(self._per_segment, 1)}
        if clips is not None:
            clip = {"clip_length": clips.frames, "clip_fps": clips.fps}
        self._plan = Plan(segments, 1, 0, self.preprocessing, **clip)
        # The child starts while the backbone is loaded here.
        self._pool = self._subprocess(video_timeout)
        self._video_timeout = video_timeout
        self._network: Callable[[np.ndarray], np.ndarray] = np.asarray
        self._aggregator: Any = None
        if self._per_segment:
            from extract.device import choose_device

            if precision not in ("auto", "fp32"):
                raise InputError(f"--precision {precision}: StNet runs in fp32 here; leave it out")
            where = choose_device(device)
            self._model: Any = model_from_record(checkpoint, weights).to(where)
            self.words = f"StNet on {where} in fp32"
        else:
            backbone = backbone_from_record(
                checkpoint, weights, device=device, precision=precision, frames=segments
            )
            self._network, self._model = backbone, checkpoint.model()
            self.words = backbone.describe()
            if checkpoint.options["name"] in WEIGHING:
                self._aggregator = self._model.aggregator

    def __call__(
        self,
        path: StrPath,
        *,
        window: float | None = None,
        stride: float | None = None,
    ) -> Prediction:
        """Look at a video as a whole or in windows (seconds), those of extraction.

        However long the video, only the frames of some windows are in memory. A window in which
        nothing can be seen is left out and counted. Raises VideoError where there is no other,
        RunError for scores that are not numbers.
        """
        from extract.listing.windows import window_spans

        spans: list[Span | None] = [None]
        if window is not None:
            with self._pool.submit((os.fspath(path), [], self._plan)).result() as finished:
                if finished.failure:
                    raise VideoError(path, finished.failure)
                spans = [*window_spans(finished.result, window, stride or window)]
        windows: list[Window] = []
        crops, lost = np.empty(0), 0
        problems: dict[str, None] = {}  # an ordered set
        decoded = progress(self._decoded(path, spans), total=len(spans), unit="window", leave=False)
        for span, parts in decoded:
            try:
                seen, shown = self._answer(path, span, parts)
            except (VideoError, NotFiniteError) as error:
                problems[error.reason if isinstance(error, VideoError) else str(error)] = None
                lost += 1
                continue
            problems[seen.problem] = None
            crops = crops if windows else shown
            windows.append(seen)
        words = "; ".join(filter(None, problems))
        if not windows:
            raise VideoError(path, words)
        more = f"{lost} of {len(spans)} windows could not be seen: " if lost else ""
        return Prediction(os.fspath(path), windows[-1].end, tuple(windows), more + words, crops)

    def _subprocess(self, timeout: float) -> "SubprocessPool":
        from extract.decode.jobs import decode_job
        from extract.decode.pool import SubprocessPool

        slot_bytes = self._plan.slot_bytes
        pool = SubprocessPool(decode_job, slot_bytes=slot_bytes, workers=1, timeout=timeout)
        weakref.finalize(self, pool.close)
        return pool

    @cached_property
    def _leftovers(self) -> "SubprocessPool":
        """For the clips of a window that had no room in a buffer."""
        return self._subprocess(self._video_timeout)

    def _decoded(
        self, path: StrPath, spans: "list[Span | None]"
    ) -> "Iterator[tuple[Span | None, Iterable[Part]]]":
        """Each span, and what a child decoded of it: one part, or of clips as many as buffers
        need."""
        from aggregate.data.frames import row_parts

        plan, name = self._plan, os.fspath(path)
        at_once = plan.rows_per_job if self._clips is None else 1
        rows = [(name, span) for span in spans]
        jobs = [
            (name, rows[first : first + at_once], plan) for first in range(0, len(rows), at_once)
        ]
        for job, future in [(job, self._pool.submit(job)) for job in jobs]:
            if self._clips is not None:
                yield job[1][0][1], row_parts(job, future, self._leftovers)
                continue
            with future.result() as finished:
                results = finished.result or [VideoError(path, finished.failure)] * len(job[1])
                for (_, span), prepared in zip(job[1], results, strict=True):
                    yield span, self._only_part(prepared, finished.buffer)

    def _only_part(self, prepared: "Prepared | VideoError", buffer: np.ndarray) -> "Iterator[Part]":
        if isinstance(prepared, VideoError):
            raise prepared
        yield prepared, prepared.pictures(buffer, self._plan)

    def _answer(
        self, path: StrPath, span: "Span | None", parts: "Iterable[Part]"
    ) -> tuple[Window, np.ndarray]:
        """What the model says of one window, and the pictures uint8 [n, size, size, 3] of the
        frames that it saw."""
        import torch

        with torch.inference_mode():
            weights = None
            if self._clips is None:
                [(prepared, pictures)] = parts
                indices, times = prepared.frame_indices, prepared.frame_times
            else:
                prepared, features, indices, times, pictures = self._see_clips(parts)
            if self._per_segment:
                clips = prepared.clips[0]
                clip, mask = torch.from_numpy(pictures[clips]), torch.from_numpy(_distinct(clips))
                logits = self._model(clip[None], mask[None])
            else:
                if self._clips is None:
                    features = self._network(pictures)
                x = torch.from_numpy(features)[None].float()
                logits = self._model(x)
                if self._aggregator is not None:
                    weights = self._aggregator.frame_weights(x)[0].numpy()
        if not logits.isfinite().all():
            raise RunError(f"{os.fspath(path)}: the scores are not finite; the weights are damaged")
        start, end = span or (0.0, prepared.end)
        seen = indices, times, logits[0].cpu().numpy(), weights, prepared.problem
        return Window(start, end, prepared.num_frames, *seen), pictures

    def _see_clips(
        self, parts: "Iterable[Part]"
    ) -> "tuple[Prepared, np.ndarray, np.ndarray, np.ndarray, np.ndarray]":
        """The last part; features [n, dim] of the distinct clips, computed one by one; and the
        frames in their middles: indices [n], times [n] (s), pictures [n, size, size, 3]."""
        assert self._clips is not None
        rows, clips = self._clips.rows, []
        before: set[bytes] = set()
        for prepared, pictures in parts:
            middles = prepared.middles(rows).reshape(-1, rows)
            for clip, middle in zip(prepared.clips[0], middles, strict=True):
                if (frames := prepared.frame_indices[clip].tobytes()) in before:
                    continue
                before.add(frames)
                features = self._network(pictures[clip][None]).reshape(rows, -1)
                shown = prepared.frame_indices[middle], prepared.frame_times[middle]
                clips.append((features, *shown, pictures[middle]))
        features, indices, times, crops = map(np.concatenate, zip(*clips, strict=True))
        return prepared, features, indices, times, crops


def _distinct(clips: np.ndarray) -> np.ndarray:
    """bool [T] of clips [T, L]: False for one that repeats an earlier one (see `new_segments`)."""
    from aggregate.data.frames import new_segments

    return new_segments(clips)
