"""A checkpoint that looks at videos: decoding, backbone and aggregator side by side, whole or in windows."""

import os
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from extract.cli import InputError, RunError

if TYPE_CHECKING:
    from aggregate.training.checkpoint import Checkpoint
    from extract.decode.transform import Preprocessing

WEIGHING = ("hgnl", "nl", "weighted", "attentive", "nextvlad")  # the aggregators with a weight a frame
_THUMBNAIL = 96  # pixels
_AHEAD = 3  # batches that wait for the network while more is decoded


@dataclass(frozen=True)
class Window:
    """A stretch of a video, seconds, and what the model says of it.

    indices [n] and times float [n] (s): the frames it saw; logits float32 [C]; weights float32 [groups, n], the
    aggregator's frame weights, None where it has none.
    """

    start: float
    end: float
    indices: np.ndarray
    times: np.ndarray
    logits: np.ndarray
    weights: np.ndarray | None = None


@dataclass(frozen=True)
class Prediction:
    """A video's windows: one, the whole of it, unless windows were asked for; thumbnails of the first one's frames."""

    path: str
    num_frames: int
    seconds: float
    windows: tuple[Window, ...]
    problem: str = ""
    thumbnails: list[np.ndarray] = field(default_factory=list, repr=False)


class Predictor:
    """A checkpoint ready to look at videos.

    `weights`, `device`, `precision`: see Options. Raises InputError where the recorded backbone cannot be had.
    """

    def __init__(
        self,
        checkpoint: "Checkpoint",
        *,
        weights: Path | None = None,
        device: str = "auto",
        precision: str = "auto",
        segments: int = 25,
    ):
        from pipelines.from_record import backbone_from_record, model_from_record

        if segments < 1:
            raise InputError(f"--segments {segments}: at least one frame is needed")
        self.classes, self.segments = checkpoint.classes, segments
        self.aggregator: Any = None
        self._worker = ThreadPoolExecutor(1)  # one for all videos: a new thread makes torch start new ones too
        self._per_segment = 0
        self._network: Callable[[np.ndarray], np.ndarray] = np.asarray
        if checkpoint.options["name"] == "stnet":
            from aggregate.training.learner import choose_device

            if precision not in ("auto", "fp32"):
                raise InputError(f"--precision {precision}: StNet runs in fp32 here; leave it out")
            where = choose_device(device)
            self._whole = model_from_record(checkpoint, weights).to(where)
            self._per_segment = checkpoint.options["frames_per_segment"]
            self.preprocessing: Preprocessing = self._whole.preprocessing
            self._batch = 64  # frames that are only gathered
            self.words = f"StNet on {where} in fp32"
            return
        backbone = backbone_from_record(checkpoint, weights, device=device, precision=precision, frames=segments)
        self._network, self._batch = backbone, backbone.batch_size
        self.preprocessing, self.words = backbone.preprocessing, backbone.describe()
        self._head = checkpoint.model()
        if checkpoint.options["name"] in WEIGHING:
            self.aggregator = self._head.aggregator

    def __call__(
        self,
        path: str | os.PathLike[str],
        *,
        window: float | None = None,
        stride: float | None = None,
        thumbnails=False,
    ) -> Prediction:
        """Decode `path` once, look at it as a whole or in windows (seconds).

        However long the video, only features of the frames it sees stay in memory (of StNet their pixels).
        Raises VideoError where not one frame can be read, RunError for scores that are no numbers.
        """
        from extract.decode import decode

        times, stretches = np.zeros(0), [(0, 0)]
        spans: list[tuple[float, float]] = []
        chosen: list[np.ndarray] = []

        def note(all_times: np.ndarray) -> None:
            nonlocal times
            times = all_times

        def sample(num_frames: int) -> np.ndarray:
            nonlocal spans, stretches, chosen
            spans = window_spans(_length(times), window, stride)
            stretches = [_frames_between(times, *span) for span in spans]
            chosen = [self._frames_of(*stretch) for stretch in stretches]
            return np.unique(np.concatenate(chosen))

        feed = _Feed(self.preprocessing, self._network, self._batch, self._worker, thumbnails=thumbnails)
        decoded = decode(path, sample, resize=feed.take, on_times=note)
        features = feed.finish()[_numbers(decoded.frames)]  # [n, dim], or frames for StNet
        windows = []
        for (start, end), indices in zip(spans, chosen, strict=True):
            rows = np.searchsorted(decoded.indices, indices)
            logits, weights = self._answer(features[rows])
            if not np.isfinite(logits).all():
                raise RunError(f"{os.fspath(path)}: the scores are not finite; the weights are damaged")
            windows.append(Window(start, end, indices, decoded.timestamps[rows], logits, weights))
        places = _numbers(decoded.frames)[np.searchsorted(decoded.indices, chosen[0])]
        return Prediction(
            path=os.fspath(path),
            num_frames=decoded.num_frames,
            seconds=_length(times),
            windows=tuple(windows),
            problem=decoded.problem,
            thumbnails=[feed.thumbnails[place] for place in places] if thumbnails else [],
        )

    def _frames_of(self, first: int, stop: int) -> np.ndarray:
        """The frames to see of [first, stop): each once; for StNet N neighbours a segment, as in aggregate/clips.py."""
        from extract.sampling import segment_centres

        count, N = stop - first, self._per_segment
        middles = segment_centres(count, self.segments)
        if not N:
            return first + np.unique(middles)  # what a mask over repeats gives
        start = np.clip(middles - (N - 1) // 2, 0, max(count - N, 0))
        return first + np.minimum(start[:, None] + np.arange(N), count - 1).ravel()

    def _answer(self, features: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
        """Logits [C] of one window, and the weights of its frames."""
        import torch

        with torch.inference_mode():
            if self._per_segment:
                frames = torch.from_numpy(features).unflatten(0, (1, self.segments, self._per_segment))
                return self._whole(frames, torch.ones(1, self.segments, dtype=torch.bool))[0].cpu().numpy(), None
            x = torch.from_numpy(features)[None].float()
            weights = None if self.aggregator is None else self.aggregator.frame_weights(x)[0].numpy()
            return self._head(x)[0].numpy(), weights


class _Feed:
    """Takes frames as they are decoded and computes them in batches, in a thread of its own.

    What `decode` keeps of a frame is the number it has here, so a long video stays small in memory; and where decoding
    starts over, frames get new numbers.
    """

    def __init__(
        self,
        see: "Preprocessing",
        network: Callable[[np.ndarray], np.ndarray],
        batch: int,
        worker: ThreadPoolExecutor,
        *,
        thumbnails: bool,
    ):
        self._see, self._network, self._batch, self._worker = see, network, batch, worker
        self._waiting: list[np.ndarray] = []
        self._computed: list[Future[np.ndarray]] = []
        self._count = 0
        self._keep = thumbnails
        self.thumbnails: list[np.ndarray] = []

    def take(self, frame: np.ndarray) -> np.ndarray:
        from extract.decode.transform import crop_boxes, resize_short_side

        frame = resize_short_side(frame, self._see)
        height, width = frame.shape[:2]
        top, left, tall, wide = crop_boxes(height, width, self._see.size, 1)[0][0]
        self._waiting.append(frame[top : top + tall, left : left + wide])
        if self._keep:
            self.thumbnails.append(_shrunk(frame))
        if len(self._waiting) == self._batch:
            self._send()
        self._count += 1
        return np.array([self._count - 1], np.int64).view(np.uint8).reshape(1, 1, 8)

    def _send(self) -> None:
        self._computed.append(self._worker.submit(self._network, np.stack(self._waiting)))
        self._waiting = []
        if len(self._computed) > _AHEAD:
            self._computed[-1 - _AHEAD].result()

    def finish(self) -> np.ndarray:
        if self._waiting:
            self._send()
        return np.concatenate([future.result() for future in self._computed])


def _numbers(frames: np.ndarray) -> np.ndarray:
    """What `_Feed.take` wrote: int64 [n]."""
    return np.ascontiguousarray(frames).reshape(-1, 8).view(np.int64)[:, 0]


def _shrunk(frame: np.ndarray) -> np.ndarray:
    """The square in the middle, small."""
    from PIL import Image

    height, width = frame.shape[:2]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    square = Image.fromarray(frame[top : top + side, left : left + side])
    return np.asarray(square.resize((_THUMBNAIL, _THUMBNAIL)))


# -- windows -------------------------------------------------------------------------------------------------------


def window_spans(seconds: float, window: float | None, stride: float | None = None) -> list[tuple[float, float]]:
    """Where windows start and end, in seconds; the last one is moved back so that it ends with the video.

    seconds = 10, window = 4, stride = 4    |0   4|4   8|
                                                 |6   10|
    A video no longer than a window is one.
    """
    if window is None or seconds <= window:
        return [(0.0, seconds)]
    stride = stride or window
    starts = np.arange(int((seconds - window) / stride + 1e-6) + 1) * stride
    if starts[-1] + window < seconds - 1e-3:
        starts = np.append(starts, seconds - window)
    return [(float(start), float(min(start + window, seconds))) for start in starts]


def _length(times: np.ndarray) -> float:
    """Seconds from the first frame to the end of the last, which is shown as long as is usual."""
    return float(times[-1] + np.median(np.diff(times))) if len(times) > 1 else 0.0


def _frames_between(times: np.ndarray, start: float, end: float) -> tuple[int, int]:
    """The frames [first, stop) that begin in [start, end), or the one on the screen where none does."""
    first, stop = np.searchsorted(times, [start - 1e-4, end - 1e-4])
    if stop <= first:
        first = max(int(stop) - 1, 0)
        stop = first + 1
    return int(first), int(stop)
