"""A checkpoint that looks at videos, whole or in windows: decoded by spans, as extraction does it,
in a child."""

import os
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from extract.backbone.frozen import NotFiniteError
from extract.cli import InputError, RunError, progress
from extract.decode import VideoError

if TYPE_CHECKING:
    from aggregate.training.checkpoint import Checkpoint
    from extract.decode.jobs import Prepared
    from extract.decode.packets import Span

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
        from extract.decode.jobs import Plan, decode_job
        from extract.decode.subprocess_pool import SubprocessPool

        if segments < 1:
            raise InputError(f"--segments {segments}: at least one frame is needed")
        self.classes, self.segments = checkpoint.classes, segments
        self.preprocessing = preprocessing_of(checkpoint)
        self._per_segment = checkpoint.options.get("frames_per_segment", 0)  # of StNet
        self._clips = clips = clips_of(checkpoint)
        clip: dict[str, Any] = {"clip_length": max(self._per_segment, 1)}
        if clips is not None:
            clip = {"clip_length": clips.frames, "clip_fps": clips.fps}
        self._plan = plan = Plan(segments, 1, 0, self.preprocessing, **clip)
        # Clips share frames, but need not: their buffer holds one row whole.
        self._rows_per_job = plan.rows_per_job if clips is None else 1
        slot_bytes = plan.slot_bytes if clips is None else plan.row_bytes
        # The child starts while the backbone is loaded here.
        self._pool = SubprocessPool(
            decode_job, slot_bytes=slot_bytes, workers=1, timeout=video_timeout
        )
        weakref.finalize(self, self._pool.close)
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
        path: str | os.PathLike[str],
        *,
        window: float | None = None,
        stride: float | None = None,
    ) -> Prediction:
        """Look at a video as a whole or in windows (seconds), those of extraction.

        However long the video, only the frames of some windows are in memory. A window in which
        nothing can be seen is left out and counted. Raises VideoError where there is no other,
        RunError for scores that are no numbers.
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
        for span, prepared, pictures in decoded:
            if isinstance(prepared, VideoError):
                problems[prepared.reason] = None
                lost += 1
                continue
            problems[prepared.problem] = None
            try:
                logits, weights = self._answer(path, pictures, prepared.clips[0])
            except NotFiniteError as error:
                problems[str(error)] = None
                lost += 1
                continue
            shown = self._shown(prepared)
            crops = crops if windows else pictures[shown]
            start, end = span or (0.0, prepared.end)
            frames = prepared.frame_indices[shown], prepared.frame_times[shown]
            windows.append(
                Window(start, end, prepared.num_frames, *frames, logits, weights, prepared.problem)
            )
        words = "; ".join(filter(None, problems))
        if not windows:
            raise VideoError(path, words)
        more = f"{lost} of {len(spans)} windows could not be seen: " if lost else ""
        return Prediction(os.fspath(path), windows[-1].end, tuple(windows), more + words, crops)

    def _decoded(
        self, path: str | os.PathLike[str], spans: "list[Span | None]"
    ) -> "Iterator[tuple[Span | None, Prepared | VideoError, np.ndarray]]":
        """Each span, what a child decoded of it, and its pictures [n, size, size, 3]."""
        plan, name = self._plan, os.fspath(path)
        rows = [(name, span) for span in spans]
        jobs = [
            rows[first : first + self._rows_per_job]
            for first in range(0, len(rows), self._rows_per_job)
        ]
        for some, future in [(some, self._pool.submit((name, some, plan))) for some in jobs]:
            with future.result() as finished:
                results = finished.result or [VideoError(path, finished.failure)] * len(some)
                for (_, span), prepared in zip(some, results, strict=True):
                    failed = isinstance(prepared, VideoError)
                    yield (
                        span,
                        prepared,
                        np.empty(0) if failed else prepared.pictures(finished.buffer, plan),
                    )

    def _shown(self, prepared: "Prepared") -> np.ndarray:
        """The pictures that the model's rows of features stand for, in their order: all, or the
        middles of clips."""
        if self._clips is None:
            return np.arange(len(prepared.frame_indices))
        return (
            prepared.middles_of(self._clips.rows)
            .reshape(self.segments, -1)[_distinct(prepared.clips[0])]
            .ravel()
        )

    def _answer(
        self, path: str | os.PathLike[str], pictures: np.ndarray, clips: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray | None]:
        """Logits [C] of one window, and the weights of its frames; clips int [T, L], positions in
        the pictures."""
        import torch

        with torch.inference_mode():
            if self._per_segment:
                clip, mask = torch.from_numpy(pictures[clips]), torch.from_numpy(_distinct(clips))
                logits, weights = self._model(clip[None], mask[None]), None
            else:
                if self._clips is None:
                    features = self._network(pictures)
                else:
                    of_clips = [
                        self._network(pictures[clip][None]) for clip in clips[_distinct(clips)]
                    ]
                    features = np.concatenate(of_clips).reshape(-1, self._model.options["dim"])
                x = torch.from_numpy(features)[None].float()
                logits = self._model(x)
                weights = (
                    None
                    if self._aggregator is None
                    else self._aggregator.frame_weights(x)[0].numpy()
                )
        if not logits.isfinite().all():
            raise RunError(f"{os.fspath(path)}: the scores are not finite; the weights are damaged")
        return logits[0].cpu().numpy(), weights


def _distinct(clips: np.ndarray) -> np.ndarray:
    """bool [T] of clips [T, L]: False for one that repeats an earlier one (see `new_segments`)."""
    from aggregate.data.frames import new_segments

    return new_segments(clips)
