"""Run a checkpoint on videos, whole or in windows, with extraction's own decoding."""

import os
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import groupby
from operator import attrgetter
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
    from extract.workers.rows import DecodedRow


class Window(NamedTuple):
    """A time window of a video, in seconds, and the model's scores for it.

    Attributes:
        num_frames: number of frames that are shown in it.
        indices: [n], the frames that the model saw.
        times: float [n] (s), the times at which these frames are shown.
        logits: float32 [C].
        weights: float32 [groups, n], the aggregator's frame weights; None if it has none.
        problem: why a part of the window could not be read.
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
    """A video's windows. If no windows were requested, there is one: the whole video.

    Attributes:
        problem: why a part of the video could not be read.
        crops: [n, size, size, 3], the pictures that the model saw of the first window.
    """

    path: str
    seconds: float
    windows: tuple[Window, ...]
    problem: str = ""
    crops: np.ndarray = field(default_factory=lambda: np.empty(0), repr=False)


class Predictor:
    """A checkpoint that is ready to classify videos.

    Videos are decoded in a child process, with the same deadline as in extraction. For `weights`,
    `device`, `precision` and `video_timeout` (s), see `pipelines.predict.Options`. Raises
    InputError if the recorded backbone cannot be loaded.
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
            plan_of,
        )
        from extract.workers.rows import RowDecoder

        if segments < 1:
            raise InputError(f"--segments {segments}: at least one frame is needed")
        self.classes = checkpoint.classes
        self._is_stnet = checkpoint.options["name"] == "stnet"
        self._clips = clips_of(checkpoint)
        self._plan = plan_of(checkpoint, segments)
        # Its child starts while the backbone is loaded here.
        self._decoder = RowDecoder.start(self._plan, workers=1, timeout=video_timeout)
        weakref.finalize(self, self._decoder.close)
        self._network: Callable[[np.ndarray], np.ndarray] = np.asarray

        if self._is_stnet:
            from extract.device import choose_device

            if precision not in ("auto", "fp32"):
                raise InputError(f"--precision {precision}: StNet runs in fp32 here; leave it out")
            stnet_device = choose_device(device)
            self._model: Any = model_from_record(checkpoint, weights).to(stnet_device)
            self.description = f"StNet on {stnet_device} in fp32"
            return
        backbone = backbone_from_record(
            checkpoint, weights, device=device, precision=precision, frames=segments
        )
        self._network, self._model = backbone, checkpoint.model()
        self.description = backbone.describe()

    def __call__(
        self,
        path: StrPath,
        *,
        window: float | None = None,
        stride: float | None = None,
    ) -> Prediction:
        """Classify a video as a whole, or in windows (seconds) as extraction cuts them.

        Only the frames of a few windows are in memory at a time, even for long videos. A window
        without a readable frame is left out and counted. Raises VideoError if no window is left,
        and RunError for scores that are not finite.
        """
        from extract.listing.videos import Video

        path = os.fspath(path)
        spans = self._spans(path, window, stride)
        windows: list[Window] = []
        crops = np.empty(0)
        problems: dict[str, None] = {}  # an ordered set
        videos = [Video(path, path, -1, span=span) for span in spans]
        rows = self._decoder.read(self._decoder.submit(videos, self._plan))
        decoded = groupby(rows, key=attrgetter("span"))
        for span, parts in progress(decoded, total=len(spans), unit="window", leave=False):
            try:
                seen, pictures = self._classify(path, span, parts)
            except (VideoError, NotFiniteError) as error:
                problems[error.reason if isinstance(error, VideoError) else str(error)] = None
                continue
            problems[seen.problem] = None
            if not windows:
                crops = pictures.copy()  # a later window is decoded into the same buffer
            windows.append(seen)
        problem = "; ".join(filter(None, problems))
        if not windows:
            raise VideoError(path, problem)
        if num_lost := len(spans) - len(windows):
            problem = f"{num_lost} of {len(spans)} windows could not be decoded: {problem}"
        return Prediction(path, windows[-1].end, tuple(windows), problem, crops)

    def _spans(
        self, path: str, window: float | None, stride: float | None
    ) -> "list[Span] | list[None]":
        from extract.listing.windows import window_spans

        if window is None:
            return [None]
        with self._decoder.pool.submit((path, [], self._plan)).result() as finished:
            if finished.failure:
                raise VideoError(path, finished.failure)
            return [*window_spans(finished.result, window, stride or window)]

    def _classify(
        self, path: str, span: "Span | None", parts: "Iterator[DecodedRow]"
    ) -> tuple[Window, np.ndarray]:
        """The scores of one window, and the pictures uint8 [n, size, size, 3] that the model
        saw, valid until the next window is decoded.

        Its clips may come in several parts.
        """
        import torch

        from aggregate.data.frames import new_segments

        weights = None
        with torch.inference_mode():
            if self._is_stnet:
                prepared, pictures = _checked(next(parts))
                indices, times = prepared.frame_indices, prepared.frame_times
                clips = prepared.clips[0]
                mask = torch.from_numpy(new_segments(clips))
                logits = self._model(torch.from_numpy(pictures[clips])[None], mask[None])
            else:
                prepared, features, indices, times, pictures = self._features(parts)
                x = torch.from_numpy(features)[None].float()
                logits = self._model(x)
                if hasattr(self._model.aggregator, "frame_weights"):
                    weights = self._model.aggregator.frame_weights(x)[0].numpy()
        if not logits.isfinite().all():
            raise RunError(f"{path}: the scores are not finite; the weights are damaged")
        start, end = span or (0.0, prepared.end)
        scores = logits[0].cpu().numpy()
        return (
            Window(
                start, end, prepared.num_frames, indices, times, scores, weights, prepared.problem
            ),
            pictures,
        )

    def _features(
        self, parts: "Iterator[DecodedRow]"
    ) -> "tuple[Prepared, np.ndarray, np.ndarray, np.ndarray, np.ndarray]":
        """The last part, the features [n, dim] of the distinct frames or clips, and their frames:
        indices [n], times [n] (s) and pictures [n, size, size, 3].

        Clips are computed one by one; their frames are those in the middle of each feature's part.
        """
        if self._clips is None:
            prepared, pictures = _checked(next(parts))
            features = self._network(pictures)
            return prepared, features, prepared.frame_indices, prepared.frame_times, pictures
        rows_per_clip, computed = self._clips.rows, {}
        for prepared, pictures in map(_checked, parts):
            middles = prepared.middles(rows_per_clip).reshape(-1, rows_per_clip)
            for clip, middle in zip(prepared.clips[0], middles, strict=True):
                key = prepared.frame_indices[clip].tobytes()
                if key not in computed:
                    computed[key] = (
                        self._network(pictures[clip][None]).reshape(rows_per_clip, -1),
                        prepared.frame_indices[middle],
                        prepared.frame_times[middle],
                        pictures[middle],
                    )
        columns = zip(*computed.values(), strict=True)
        features, indices, times, crops = map(np.concatenate, columns)
        return prepared, features, indices, times, crops


def _checked(row: "DecodedRow") -> "tuple[Prepared, np.ndarray]":
    """What was decoded of a row, and its pictures. Raises VideoError if it failed."""
    if isinstance(row.prepared, VideoError):
        raise row.prepared
    return row.prepared, row.pictures
