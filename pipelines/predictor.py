"""A checkpoint that looks at videos, whole or in windows: decoded by spans, as extraction does it, in a child."""

import os
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from extract.cli import InputError, RunError, progress

if TYPE_CHECKING:
    from aggregate.training.checkpoint import Checkpoint
    from extract.decode.packets import Span

WEIGHING = (
    "hgnl",
    "nl",
    "weighted",
    "attentive",
    "attentive-time",
    "nextvlad",
)  # the aggregators with a weight a frame
_SLOT_BYTES = 32 << 20  # of the windows that a child decodes in one pass


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
        from extract.decode.subprocess_pool import SubprocessPool

        if segments < 1:
            raise InputError(f"--segments {segments}: at least one frame is needed")
        self.classes, self.segments = checkpoint.classes, segments
        self.preprocessing = preprocessing_of(checkpoint)
        self._per_segment = checkpoint.options.get("frames_per_segment", 0)  # of StNet
        self._plan = self.preprocessing, segments, self._per_segment
        self._row_bytes = segments * max(self._per_segment, 1) * self.preprocessing.size**2 * 3
        self._at_once = max(1, _SLOT_BYTES // self._row_bytes)
        # The child starts while the backbone is loaded here.
        self._pool = SubprocessPool(look, slot_bytes=self._at_once * self._row_bytes, workers=1, timeout=video_timeout)
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
        from extract.decode import VideoError
        from extract.listing.windows import window_spans

        spans: list[Span | None] = [None]
        if window is not None:
            with self._pool.submit((os.fspath(path), None, *self._plan)).result() as finished:
                if finished.failure:
                    raise VideoError(path, finished.failure)
                spans = [*window_spans(finished.result, window, stride or window)]
        windows: list[Window] = []
        crops, lost = np.empty(0), 0
        problems: dict[str, None] = {}  # an ordered set
        for seen, frames in progress(self._seen(path, spans), total=len(spans), unit="window", leave=False):
            problems[seen if isinstance(seen, str) else seen.problem] = None
            if isinstance(seen, str):
                lost += 1
                continue
            logits, weights = self._answer(path, frames)
            windows.append(seen._replace(logits=logits, weights=weights))
            crops = frames.copy() if len(windows) == 1 else crops
        words = "; ".join(filter(None, problems))
        if not windows:
            raise VideoError(path, words)
        more = f"{lost} of {len(spans)} windows could not be seen: " if lost else ""
        return Prediction(os.fspath(path), windows[-1].end, tuple(windows), more + words, crops)

    def _seen(
        self, path: str | os.PathLike[str], spans: "Sequence[Span | None]"
    ) -> "Iterator[tuple[Window | str, np.ndarray]]":
        """Of each span what a child saw, and its crops [n, size, size, 3]; or why it saw nothing."""
        jobs = [spans[first : first + self._at_once] for first in range(0, len(spans), self._at_once)]
        size = self.preprocessing.size
        for some, future in [(some, self._pool.submit((os.fspath(path), some, *self._plan))) for some in jobs]:
            with future.result() as finished:
                crops = finished.buffer[: len(some) * self._row_bytes].reshape(len(some), -1, size, size, 3)
                for seen, frames in zip(finished.result or [finished.failure] * len(some), crops, strict=True):
                    yield seen, frames if isinstance(seen, str) else frames[: len(seen.indices)]

    def _answer(self, path: str | os.PathLike[str], frames: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
        """Logits [C] of one window, and the weights of its frames."""
        import torch

        with torch.inference_mode():
            if self._per_segment:
                clip = torch.from_numpy(frames).unflatten(0, (1, self.segments, self._per_segment))
                logits, weights = self._model(clip, torch.ones(1, self.segments, dtype=torch.bool)), None
            else:
                x = torch.from_numpy(self._network(frames))[None].float()
                logits = self._model(x)
                weights = None if self._aggregator is None else self._aggregator.frame_weights(x)[0].numpy()
        if not logits.isfinite().all():
            raise RunError(f"{os.fspath(path)}: the scores are not finite; the weights are damaged")
        return logits[0].cpu().numpy(), weights


# -- in the child --------------------------------------------------------------------------------------------------


def look(
    job: tuple[Any, ...], out: np.ndarray, on_duration: Callable[[float | None], None]
) -> "float | list[Window | str]":
    """The crops of some spans of a video (None: the whole) into `out`, and what was seen, or why nothing was.

    Without spans, how long the video is (s). Raises VideoError where not one frame of it can be read.
    """
    from extract.decode import VideoError, decode_spans
    from extract.decode.packets import length_of
    from extract.decode.transform import crop_boxes, resize_short_side

    path, spans, see, segments, per_segment = job
    if spans is None:
        return length_of(path)
    crops = out[: len(spans) * segments * max(per_segment, 1) * see.size**2 * 3]
    crops = crops.reshape(len(spans), -1, see.size, see.size, 3)

    def crop(frame: np.ndarray) -> np.ndarray:
        frame = resize_short_side(frame, see)
        top, left, tall, wide = crop_boxes(frame.shape[0], frame.shape[1], see.size, 1)[0][0]
        return frame[top : top + tall, left : left + wide]

    seen: list[Window | str] = [""] * len(spans)
    wanted = [(span, partial(_frames_of, segments=segments, N=per_segment)) for span in spans]
    for place, decoded in decode_spans(path, wanted, resize=crop, on_duration=on_duration):
        if isinstance(decoded, VideoError):
            seen[place] = decoded.reason
            continue
        frames, indices, times = decoded
        crops[place, : len(frames)] = frames
        start, stop = spans[place] or (0.0, decoded.end)
        seen[place] = Window(start, stop, decoded.num_frames, indices, times, problem=decoded.problem)
    return seen


def _frames_of(count: int, segments: int, N: int) -> np.ndarray:
    """The frames to see of so many: each once; for StNet N neighbours a segment, as in data/clips.py."""
    from extract.sampling import segment_centres

    middles = segment_centres(count, segments)
    if not N:
        return np.unique(middles)  # what a mask over repeats gives
    start = np.clip(middles - (N - 1) // 2, 0, max(count - N, 0))
    return np.minimum(start[:, None] + np.arange(N), count - 1).ravel()
