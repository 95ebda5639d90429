"""A checkpoint that looks at videos: decoding, backbone and aggregator side by side, whole or in windows."""

import os
import tempfile
import weakref
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from extract.cli import InputError, RunError

if TYPE_CHECKING:
    from aggregate.training.checkpoint import Checkpoint
    from extract.decode.subprocess_pool import Finished
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
        from aggregate.from_record import backbone_from_record, model_from_record
        from extract.decode.subprocess_pool import SubprocessPool

        if segments < 1:
            raise InputError(f"--segments {segments}: at least one frame is needed")
        self.classes, self.segments = checkpoint.classes, segments
        self.aggregator: Any = None
        self._worker = ThreadPoolExecutor(1)  # one for all videos: a new thread makes torch start new ones too
        self._per_segment = 0
        self._pool = SubprocessPool(watch, slot_bytes=1, workers=1, timeout=video_timeout)
        weakref.finalize(self, self._pool.close)
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
        Raises VideoError where not one frame can be read or the deadline passes, RunError for scores that are no
        numbers.
        """
        from extract.decode import VideoError

        with tempfile.NamedTemporaryFile(prefix="frames-") as pixels:
            plan = (self.preprocessing, self.segments, self._per_segment, window, stride, thumbnails)
            future = self._pool.submit((os.fspath(path), pixels.name, *plan))
            features = self._features(Path(pixels.name), future)
            finished = future.result()
        finished.release()
        if finished.failure:
            raise VideoError(path, finished.failure)
        seen: Seen = finished.result
        windows = []
        for (start, end), indices in zip(seen.spans, seen.chosen, strict=True):
            rows = np.searchsorted(seen.indices, indices)
            logits, weights = self._answer(features[seen.places[rows]])  # of [n, dim], or frames for StNet
            if not np.isfinite(logits).all():
                raise RunError(f"{os.fspath(path)}: the scores are not finite; the weights are damaged")
            windows.append(Window(start, end, indices, seen.timestamps[rows], logits, weights))
        return Prediction(
            path=os.fspath(path),
            num_frames=seen.num_frames,
            seconds=seen.seconds,
            windows=tuple(windows),
            problem=seen.problem,
            thumbnails=seen.thumbnails,
        )

    def _features(self, pixels: Path, decoding: "Future[Finished]") -> np.ndarray:
        """What the network makes of each crop in the file, in batches, while the child writes more."""
        size = self.preprocessing.size
        computed: list[Future[np.ndarray]] = []
        taken = 0
        while True:
            ended = decoding.done()  # asked first: what was written until then is seen below
            there = pixels.stat().st_size // (size * size * 3)
            while there - taken >= self._batch or (ended and taken < there):
                count = min(self._batch, there - taken)
                shape = (count, size, size, 3)
                frames = np.fromfile(pixels, np.uint8, int(np.prod(shape)), offset=taken * size * size * 3)
                computed.append(self._worker.submit(self._network, frames.reshape(shape)))
                taken += count
                if len(computed) > _AHEAD:
                    computed[-1 - _AHEAD].result()
            if ended:
                return np.concatenate([future.result() for future in computed]) if computed else np.empty(0)
            wait([decoding], timeout=0.002)

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


# -- in the child --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Seen:
    """What a child found in a video: `indices` and `timestamps` of the frames wanted, ascending, and their `places` in
    the file of crops; the windows' `spans` (s) and the frames `chosen` of each."""

    indices: np.ndarray
    timestamps: np.ndarray
    places: np.ndarray
    spans: list[tuple[float, float]]
    chosen: list[np.ndarray]
    num_frames: int
    seconds: float
    problem: str
    thumbnails: list[np.ndarray]


def watch(job: tuple[Any, ...], _: np.ndarray, on_duration: Callable[[float | None], None]) -> Seen:
    """Decode a video once; the crop of each frame that is wanted goes to a file as it comes: uint8 [size, size, 3].

    A frame is known by its place in that file, so a long video stays small in memory; and where decoding starts over,
    frames get new places. Raises VideoError where not one frame can be read.
    """
    from extract.decode import decode
    from extract.decode.transform import crop_boxes, resize_short_side

    path, pixels, see, segments, per_segment, window, stride, keep = job
    times = np.zeros(0)
    spans: list[tuple[float, float]] = []
    chosen: list[np.ndarray] = []
    small: list[np.ndarray] = []

    def note(all_times: np.ndarray) -> None:
        nonlocal times
        times = all_times

    def sample(num_frames: int) -> np.ndarray:
        nonlocal spans, chosen
        spans = window_spans(_length(times), window, stride)
        chosen = [_frames_of(*_frames_between(times, *span), segments, per_segment) for span in spans]
        return np.unique(np.concatenate(chosen))

    def take(frame: np.ndarray) -> np.ndarray:
        frame = resize_short_side(frame, see)
        top, left, tall, wide = crop_boxes(frame.shape[0], frame.shape[1], see.size, 1)[0][0]
        file.write(frame[top : top + tall, left : left + wide].tobytes())
        small.extend([_shrunk(frame)] if keep else [])
        return np.array([file.tell() // crop_bytes - 1], np.int64).view(np.uint8).reshape(1, 1, 8)

    crop_bytes = see.size**2 * 3
    with open(pixels, "r+b", buffering=0) as file:
        # Behind what a child wrote that died over this job, and perhaps in the middle of a crop.
        begin = -(-os.path.getsize(pixels) // crop_bytes)
        file.seek(begin * crop_bytes)
        decoded = decode(path, sample, resize=take, on_duration=on_duration, on_times=note)
    places = np.ascontiguousarray(decoded.frames).reshape(-1, 8).view(np.int64)[:, 0]
    first = places[np.searchsorted(decoded.indices, chosen[0])]
    return Seen(
        decoded.indices,
        decoded.timestamps,
        places,
        spans,
        chosen,
        decoded.num_frames,
        _length(times),
        decoded.problem,
        [small[place - begin] for place in first] if keep else [],
    )


def _frames_of(first: int, stop: int, segments: int, N: int) -> np.ndarray:
    """The frames to see of [first, stop): each once; for StNet N neighbours a segment, as in data/clips.py."""
    from extract.sampling import segment_centres

    count = stop - first
    middles = segment_centres(count, segments)
    if not N:
        return first + np.unique(middles)  # what a mask over repeats gives
    start = np.clip(middles - (N - 1) // 2, 0, max(count - N, 0))
    return first + np.minimum(start[:, None] + np.arange(N), count - 1).ravel()


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
