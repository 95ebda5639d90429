"""A checkpoint that looks at videos, whole or in windows: decoded by spans, as extraction does it, in a child."""

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
    """A stretch of a video, seconds, and what the model says of it; `problem` says what of it could not be read.

    num_frames that are shown in it; indices [n] and times float [n] (s) of those it saw; logits float32 [C]; weights
    float32 [groups, n], the aggregator's frame weights, None where it has none.
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
    """A video's windows: one, the whole of it, unless windows were asked for; the crops [n, size, size, 3] it saw of
    the first one; `problem` says what could not be read."""

    path: str
    seconds: float
    windows: tuple[Window, ...]
    problem: str = ""
    crops: np.ndarray = field(default_factory=lambda: np.empty(0), repr=False)


class Predictor:
    """A checkpoint ready to look at videos.

    Videos are decoded in a child process, under the deadline that extraction has. `weights`, `device`, `precision`,
    `video_timeout` (s): see Options. Raises InputError where the recorded backbone cannot be had.
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
        from aggregate.endtoend import backbone_from_record, model_from_record, preprocessing_of
        from extract.decode.jobs import Plan, decode_job
        from extract.decode.subprocess_pool import SubprocessPool

        if segments < 1:
            raise InputError(f"--segments {segments}: at least one frame is needed")
        self.classes, self.segments = checkpoint.classes, segments
        self.preprocessing = preprocessing_of(checkpoint)
        self._per_segment = checkpoint.options.get("frames_per_segment", 0)  # of StNet
        self._plan = plan = Plan(segments, 1, 0, self.preprocessing, clip_length=max(self._per_segment, 1))
        # The child starts while the backbone is loaded here.
        self._pool = SubprocessPool(decode_job, slot_bytes=plan.slot_bytes, workers=1, timeout=video_timeout)
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
            backbone = backbone_from_record(checkpoint, weights, device=device, precision=precision, frames=segments)
            self._network, self._model = backbone, checkpoint.model()
            self.words = backbone.describe()
            if checkpoint.options["name"] in WEIGHING:
                self._aggregator = self._model.aggregator

    def __call__(
        self, path: str | os.PathLike[str], *, window: float | None = None, stride: float | None = None
    ) -> Prediction:
        """Look at a video as a whole or in windows (seconds), those of extraction.

        However long the video, only the frames of some windows are in memory. A window in which nothing can be seen is
        left out and counted. Raises VideoError where there is no other, RunError for scores that are no numbers.
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
            crops = crops if windows else pictures.copy()
            start, end = span or (0.0, prepared.end)
            frames = prepared.frame_indices, prepared.frame_times
            windows.append(Window(start, end, prepared.num_frames, *frames, logits, weights, prepared.problem))
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
        jobs = [rows[first : first + plan.rows_per_job] for first in range(0, len(rows), plan.rows_per_job)]
        for some, future in [(some, self._pool.submit((name, some, plan))) for some in jobs]:
            with future.result() as finished:
                results = finished.result or [VideoError(path, finished.failure)] * len(some)
                for number, ((_, span), prepared) in enumerate(zip(some, results, strict=True)):
                    row = finished.buffer[number * plan.row_bytes :][: plan.row_bytes]
                    pictures = row.reshape(-1, *plan.shape[3:])
                    yield span, prepared, pictures[: len(getattr(prepared, "frame_indices", ()))]

    def _answer(
        self, path: str | os.PathLike[str], pictures: np.ndarray, clips: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray | None]:
        """Logits [C] of one window, and the weights of its frames; clips int [T, L], positions in the pictures."""
        import torch

        from aggregate.data.frames import new_segments

        with torch.inference_mode():
            if self._per_segment:
                clip, mask = torch.from_numpy(pictures[clips]), torch.from_numpy(new_segments(clips))
                logits, weights = self._model(clip[None], mask[None]), None
            else:
                x = torch.from_numpy(self._network(pictures))[None].float()
                logits = self._model(x)
                weights = None if self._aggregator is None else self._aggregator.frame_weights(x)[0].numpy()
        if not logits.isfinite().all():
            raise RunError(f"{os.fspath(path)}: the scores are not finite; the weights are damaged")
        return logits[0].cpu().numpy(), weights
