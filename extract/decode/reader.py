"""A video and frame indices in, frames out: the only place that knows a decoder.

What PyAV (FFmpeg) is asked to do, so that few frames of a video cost little and every one is the
frame that decoding everything would give:

1. A pass over the packets, without decoding, counts the frames and finds their time stamps.
2. Packets of wanted frames are decoded, and those that wanted frames refer to (`NONREF` skips the
   others).
3. If a key frame lies before the next wanted frame, decoding starts there.
4. Only wanted frames become RGB.

Where a wanted frame does not come out, is corrupt, or time stamps cannot be trusted, everything is
decoded, frames are chosen among what decodes, and `problem` says so if anything was wrong.

Several spans of one file are read in one pass. What was learned of a file stays until another one
is read by spans, so that those who come for its next spans pay for their own frames and a seek.
"""

import math
import os
from array import array
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import av
import numpy as np
from av.video.reformatter import VideoReformatter

from extract import StrPath
from extract.decode.container import (
    DECODE_ERRORS,
    VideoError,
    check_file,
    check_length,
    check_size,
    error_text,
    opened,
)
from extract.decode.decord_reader import DecordFile, import_decord
from extract.decode.nvdec import TorchcodecFile, stacked, torchcodec_version
from extract.decode.packets import (
    PacketDecoder,
    Span,
    UnreliablePacketsError,
    VideoFile,
    carry_on,
    last_frame_end,
    offset_of,
    seconds,
    truncation,
    upright,
)
from extract.decode.pictures import PictureFolder

Resize = Callable[[np.ndarray], np.ndarray]


@dataclass(frozen=True)
class FrameTimes:
    """The frames of a video, or of a span of it, as a sampler sees them before anything is decoded.

    seconds: float64 [num_frames], when each is shown, ascending, in seconds after the file's first
    frame; a frame is shown until the next one is. Of a span the first may come later than the span
    begins.
    """

    seconds: np.ndarray

    @property
    def num_frames(self) -> int:
        return len(self.seconds)


# Chooses frames: integers of any shape, from 0 to num_frames - 1, in any order, repeats allowed;
# without any, nothing of the span is decoded or returned. It may be called twice for one video
# (after damage was met), and must then choose by what it gets and by nothing that it kept.
Sampler = Callable[[FrameTimes], np.ndarray]


@dataclass(frozen=True)
class Decoded:
    """Frames of a video; unpacks as `frames, indices, timestamps`.

    frames uint8 [D, H, W, 3] RGB; indices int32 [D], positions in presentation order; timestamps
    float32 [D], seconds after the first frame; num_frames, what can be presented; problem, empty or
    why the video is only partly readable; note, what else is to be recorded; end, when the last
    frame of the file goes (s); choice, int32 in the shape of the sampler's answer: the positions in
    `frames` of the frames that it chose.
    """

    frames: np.ndarray = field(repr=False)
    indices: np.ndarray
    timestamps: np.ndarray
    num_frames: int
    problem: str = ""
    end: float = float("nan")
    choice: np.ndarray = field(default_factory=lambda: np.empty(0, np.int32), repr=False)
    note: str = ""

    def __post_init__(self) -> None:
        count = len(self.frames)
        if (
            self.frames.ndim != 4
            or self.indices.shape != (count,)
            or self.timestamps.shape != (count,)
        ):
            raise ValueError(
                f"got frames {self.frames.shape}, indices {self.indices.shape}, timestamps {self.timestamps.shape}; "
                "expected [D, H, W, 3], [D] and [D]"
            )

    def as_chosen(self) -> "Decoded":
        """The same with the frames in the sampler's order, repeats repeated."""
        frames, indices, timestamps = (values[self.choice.ravel()] for values in self)
        return replace(
            self,
            frames=frames,
            indices=indices,
            timestamps=timestamps,
            choice=np.arange(len(frames)),
        )

    def __iter__(self) -> Iterator[np.ndarray]:
        return iter((self.frames, self.indices, self.timestamps))


def decode(
    path: StrPath,
    sample: Callable[[int], np.ndarray],
    *,
    span: Span | None = None,
    **options: Any,
) -> Decoded:
    """Decode the frames of `path` that `sample(num_frames)` asks for (any order; repeats are
    repeated in `frames`).

    With a `span`, `sample` gets the number of frames that are shown in it and chooses among those.
    `options` are those of `decode_spans`. Raises VideoError if not one frame can be read,
    IndexError if `sample` asks for a frame that does not exist.
    """

    def sampler(times: FrameTimes) -> np.ndarray:
        return _checked(sample(times.num_frames), times.num_frames, path)

    [(_, decoded)] = decode_spans(path, [(span, sampler)], **options)
    if isinstance(decoded, VideoError):
        raise decoded
    return decoded.as_chosen()


def decode_spans(
    path: StrPath,
    wanted: Sequence[tuple[Span | None, Sampler]],
    *,
    resize: Resize | None = None,
    decoder: str = "pyav",
    frame_rate: float | None = None,
) -> Iterator[tuple[int, Decoded | VideoError]]:
    """`decode` for several spans of a file in one pass: the place of each in `wanted`, and its
    frames or its failure.

    They come as they are complete, so spans that follow each other are not all in memory. `resize`
    is applied to each wanted frame as it comes, so memory does not grow with a video's length or
    its picture size. However often a sampler chooses a frame, it is decoded, resized and returned
    once. decoder: "pyav", or "decord" (which counts frames that an edit list hides, and cannot open
    AV1), or nvdec.py's "torchcodec-cuda", whose frames are tensors on that device (VideoError also
    where only PyAV could read it). With a `frame_rate` (Hz), the path may be a folder of numbered
    pictures, which Pillow decodes whatever the decoder.
    """
    rate = frame_rate if os.path.isdir(path) else None
    if rate is None:
        check_file(path)
    left = list(range(len(wanted)))
    key = (os.fspath(path), decoder, rate, os.stat(path).st_mtime_ns)
    source = _recent.pop(key, None)
    _recent.clear()
    source = source or _Source(path, decoder, rate)
    doubt = source.doubt
    if source.file is not None:
        check_length(path, source.file.end)
        try:
            yield from _decode(source.file, path, wanted, left, resize)
        except UnreliablePacketsError as error:
            doubt = str(error)
            if rate is None and decoder.startswith("torchcodec-"):
                raise VideoError(path, doubt) from None
            # What is decoded of a span must not depend on the spans that it was decoded with.
            for place in [*left] if len(left) > 1 else []:
                with suppress(UnreliablePacketsError):
                    yield from _decode(source.file, path, wanted, [place], resize)
                    left.remove(place)
    if left:
        everything = source.everything(doubt)
        check_length(path, everything.end)
        yield from _decode(everything, path, wanted, left, resize)
    if any(span for span, _ in wanted):
        _recent[key] = source


class _Source:
    """What was learned of a file: its packets, or `doubt` why they are not to be trusted; all of
    it, if need be."""

    def __init__(self, path, decoder: str, rate: float | None):
        self.path, self.doubt, self._rate = path, "", rate
        self.file: VideoFile | None = None
        self._everything: VideoFile | None = None
        try:
            self.file = _opener(decoder, rate)(path)
        except UnreliablePacketsError as error:
            if rate is None and decoder.startswith("torchcodec-"):
                raise VideoError(path, str(error)) from None
            self.doubt = str(error)

    def everything(self, doubt: str) -> VideoFile:
        if self._everything is None and self._rate is not None:
            self._everything = PictureFolder(self.path, rate=self._rate, only_good=True)
        if self._everything is None:
            self._everything = _FullDecode(
                self.path, doubt, self.file if isinstance(self.file, PacketDecoder) else None
            )
        return self._everything


def _opener(decoder: str, rate: float | None) -> Callable[..., VideoFile]:
    if rate is not None:
        return partial(PictureFolder, rate=rate)
    if decoder.startswith("torchcodec-"):
        return partial(TorchcodecFile, device=decoder.removeprefix("torchcodec-"))
    if decoder not in ("pyav", "decord"):
        raise ValueError(
            f"got decoder {decoder!r}, expected 'pyav', 'decord' or 'torchcodec-DEVICE'"
        )
    return PacketDecoder if decoder == "pyav" else DecordFile


_recent: dict[tuple, _Source] = {}  # the file whose spans were read last, if they were


def decoder_version(decoder: str) -> str:
    """The version of a decoder, for the store's record. Raises VideoError where it is not
    installed."""
    if decoder == "pyav":
        return f"PyAV {av.__version__}, libavcodec {'.'.join(map(str, av.library_versions['libavcodec']))}"
    if decoder.startswith("torchcodec-"):
        return torchcodec_version(decoder.removeprefix("torchcodec-"))
    return f"decord {import_decord().__version__}"


def _decode(
    file: VideoFile,
    path: StrPath,
    wanted: Sequence[tuple[Span | None, Sampler]],
    left: list[int],
    resize: Resize | None,
) -> Iterator[tuple[int, Decoded | VideoError]]:
    """What `left` (places in `wanted`, until they are done) ask of a file, in one pass over it."""
    chosen: dict[int, np.ndarray] = {}  # indices in the file
    counts: dict[int, int] = {}
    for place in [*left]:
        span, sample = wanted[place]
        inside = np.subtract(span or (-np.inf, np.inf), file.slack)
        first, stop = np.searchsorted(file.times, inside).tolist()
        if first < stop:
            answer = sample(FrameTimes(file.times[first:stop]))
            if not np.size(answer):
                left.remove(place)
                continue
            counts[place] = stop - first
            chosen[place] = first + _checked(answer, stop - first, path)
        else:
            why = file.problem(span)
            nothing = f"no frame of it is shown from {span[0]:g} to {span[1]:g} s"  # type: ignore[index]
            left.remove(place)
            yield place, VideoError(path, nothing + (f" ({why})" if why else ""))
    order = sorted(chosen, key=lambda place: chosen[place].max())
    distinct = (
        np.unique(np.concatenate([*map(np.ravel, chosen.values())])) if chosen else np.empty(0, int)
    )
    pictures = file.pictures(distinct.tolist()) if chosen else iter(())
    found: dict[int, np.ndarray] = {}
    for position, place in enumerate(order):
        indices, choice = np.unique(chosen[place], return_inverse=True)
        choice = choice.reshape(chosen[place].shape).astype(np.int32)
        last = int(indices[-1])
        while last not in found and (come := next(pictures, None)):
            found[come[0]] = come[1] if resize is None else resize(come[1])
        if position == len(order) - 1:
            deque(pictures, maxlen=0)  # what is wrong behind the last frame may be wrong with it
        lost = [index for index in indices.tolist() if index not in found]
        if lost:
            raise UnreliablePacketsError(f"frame {min(lost)} does not decode")
        shape = found[int(indices[0])].shape
        fitted = [_resized_like(found[index], shape) for index in indices.tolist()]
        frames = np.stack(fitted) if isinstance(fitted[0], np.ndarray) else stacked(fitted)
        times = file.times[indices].astype(np.float32)
        left.remove(place)
        span = wanted[place][0]
        numbers = indices if file.numbers is None else file.numbers[indices].astype(np.int32)
        problem, note = file.problem(span), file.note(span)
        yield place, Decoded(frames, numbers, times, counts[place], problem, file.end, choice, note)
        needed = min(
            (int(chosen[later].min()) for later in order[position + 1 :]), default=last + 1
        )
        found = {index: picture for index, picture in found.items() if index >= needed}


def _checked(indices: Iterable[int], count: int, path) -> np.ndarray:
    """A sampler's answer as int32; IndexError names an index that does not exist."""
    checked = np.asarray(indices)
    if not checked.ndim or checked.dtype.kind not in "iu" or not checked.size:
        raise ValueError(f"sample({count}) gave {checked!r}, expected integer frame indices")
    wrong = checked[(checked < 0) | (checked >= count)]
    if len(wrong):
        raise IndexError(
            f"{os.fspath(path)} has {count} frames, sample({count}) asks for frame {wrong[0]}"
        )
    return checked.astype(np.int32)


def _resized_like(picture: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """A picture in the size of those before it, where the stream changes its size half-way."""
    if picture.shape == shape:
        return picture
    from PIL import Image

    return np.asarray(
        Image.fromarray(picture).resize((shape[1], shape[0]), Image.Resampling.BILINEAR)
    )


# -- everything ----------------------------------------------------------------------------------------------------


class _FullDecode(VideoFile):
    """A video of which all is decoded, twice: to find the good frames, and to take the wanted ones.

    If its packets could be trusted as far as they tell which frames there are (`table`), numbers
    and times of frames are theirs, so that both are the same whichever way a span is decoded.
    """

    def __init__(self, path, doubt: str, table: PacketDecoder | None):
        self._path, self._next = path, 0
        self._damage: list[str] = []
        stamps, corrupt, timed = array("q"), bytearray(), True
        self._jumps: list[int] = []
        for frame in _all_frames(path, self._damage, self._jumps):
            timed = timed and frame.pts is not None
            stamps.append(frame.pts or 0)
            corrupt.append(frame.is_corrupt)
        if not stamps:
            raise VideoError(
                path, f"no frame of it decodes ({self._damage[0] if self._damage else doubt})"
            )
        self._corrupt = np.frombuffer(corrupt, bool)
        # Frames that the decoder had to patch up are left out, unless there are no others.
        self._take_corrupt = bool(self._corrupt.all())
        good = np.ones(len(stamps), bool) if self._take_corrupt else ~self._corrupt
        numbers = table.numbers_of(stamps) if table is not None and timed else None
        if table is not None and numbers is not None:
            self._planned, self._every = table.times, table.times[numbers]
            self.numbers, self.end = numbers[good], table.end
            self.offset, self.clock_note = table.offset, table.clock_note
        else:
            self._planned = self._every = self._own_times(np.array(stamps), timed)
            self.end = last_frame_end(self._every)
        self.times = self._every[good]
        self._frames: Iterator[av.VideoFrame] = iter(())

    def _own_times(self, stamps: np.ndarray, timed: bool) -> np.ndarray:
        """float64 [num_frames]: seconds after the first frame, by the frames' own time stamps, if
        they have any."""
        with opened(self._path) as (container, stream):
            rate, base = stream.average_rate or stream.guessed_rate or 25, stream.time_base
            if not timed:
                return np.arange(len(stamps)) / float(rate)
            first = stamps[0] if self._jumps else stamps.min()
            self.offset = offset_of(container, stream, int(first))
        if not self._jumps:  # frames come in order; time stamps may be those of packets
            return seconds(np.sort(stamps) - stamps.min(), base)
        times, jumped = carry_on(seconds(stamps - stamps[0], base), 1 / float(rate))
        if jumped:
            self.clock_note = f"time stamps jump back at {jumped[0]:.3f} s; times go on from there"
        return times

    def problem(self, span: Span | None) -> str:
        inside = slice(None) if span is None else slice(*np.searchsorted(self._every, span))
        planned = slice(None) if span is None else slice(*np.searchsorted(self._planned, span))
        corrupt, cut = self._corrupt[inside], super().problem(span)
        missing = len(self._planned[planned]) - len(corrupt)
        reasons = (
            [f"{corrupt.sum()} of {len(corrupt)} readable frames are corrupt"]
            if corrupt.any()
            else []
        )
        damage = self._damage if cut or span is None else []
        if missing > 0 and not damage:
            reasons.append(f"{missing} of {len(corrupt) + missing} frames do not decode")
        return "; ".join([*reasons, *([cut] if cut else []), *damage])

    def pictures(self, indices: list[int]) -> Iterator[tuple[int, np.ndarray]]:
        if (
            not self._next or indices[0] < self._next
        ):  # else it goes on where the spans before ended
            self._frames, self._next = _all_frames(self._path, [], []), 0
        wanted, to_rgb = set(indices), VideoReformatter()
        for frame in self._frames:
            if self._take_corrupt or not frame.is_corrupt:
                index, self._next = self._next, self._next + 1
                if index in wanted:
                    check_size(self._path, frame.width, frame.height)
                    yield index, upright(frame, to_rgb)
                if index == indices[-1]:
                    break


def _all_frames(path, problems: list[str], jumps: list[int]) -> Iterator[av.VideoFrame]:
    """All frames in presentation order, up to the first error.

    `problems` says what was wrong; `jumps` gets the packets before which time begins anew, as it
    does in two streams that were joined byte by byte.
    """
    with opened(path) as (container, stream):
        packets = good = 0
        latest = -math.inf
        try:
            for packet in container.demux(stream):
                packets += bool(packet.size)
                if packet.dts is not None and packet.size:
                    if packet.dts < latest:
                        jumps.append(packets)
                    latest = packet.dts
                for frame in packet.decode():
                    good += 1
                    yield frame
        except DECODE_ERRORS as error:
            problems.append(f"damaged after {good} readable frames: {error_text(error)}")
        else:
            if early := truncation(container, stream, packets):
                problems.append(early)
