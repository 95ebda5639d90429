"""Read frames of videos: a sampler chooses frames by their times, and only those are decoded.

How PyAV (FFmpeg) decodes a few frames of a video at low cost, and still returns exactly the frames
that decoding everything would give:

1. Read all packets without decoding them, to count the frames and to get their time stamps.
2. Decode the packets of the chosen frames and those that they refer to (`NONREF` skips the others).
3. If there is a key frame before the next chosen frame, start decoding there.
4. Convert only the chosen frames to RGB.

If a chosen frame does not decode, is corrupt, or the time stamps are not reliable, everything is
decoded and frames are chosen among those that decode. `problem` then describes the damage, if any.

Several spans of one file are read in one pass. What was learned about a file is kept until spans of
another file are read, so its next spans cost only a seek and their own frames.
"""

import math
import os
from array import array
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
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
    frame_range,
    last_frame_end,
    remove_jumps,
    start_offset,
    to_rgb,
    to_seconds,
    truncation,
)
from extract.decode.pictures import PictureFolder

Resize = Callable[[np.ndarray], np.ndarray]
# Chooses frames of a video or a span from their times: float64 [num_frames], ascending, in seconds
# after the first frame of the file. Returns indices of any shape from 0 to num_frames - 1, in any
# order, with or without repeats; if it returns none, nothing of the span is decoded. For a damaged
# video it is called twice, so it must depend on the times only.
Sampler = Callable[[np.ndarray], np.ndarray]


@dataclass(frozen=True)
class Decoded:
    """Decoded frames of a video; unpacks as `frames, indices, timestamps`.

    frames: uint8 [D, H, W, 3] RGB.
    indices: int32 [D], positions in presentation order.
    timestamps: float32 [D], seconds after the first frame.
    num_frames: how many frames can be shown.
    problem: why the video is only partly readable, or "".
    end: when the last frame of the file ends (s).
    choice: int32 in the shape that the sampler returned, positions in `frames`.
    note: a remark to be stored with the features.
    """

    frames: np.ndarray = field(repr=False)
    indices: np.ndarray
    timestamps: np.ndarray
    num_frames: int
    problem: str = ""
    end: float = float("nan")
    choice: np.ndarray = field(default_factory=lambda: np.empty(0, np.int32), repr=False)
    note: str = ""

    def as_chosen(self) -> "Decoded":
        """The same with the frames in the order of the sampler, repeats included."""
        if np.array_equal(self.choice, np.arange(len(self.frames))):
            return self  # without a copy of all frames
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
    """Decode the frames `sample(num_frames)` of a video, in any order, with or without repeats.

    With a `span`, `num_frames` counts the frames that are shown in it, and indices refer to those.
    `options` are those of `decode_spans`. Raises VideoError if no frame can be read, and IndexError
    if `sample` returns an index that does not exist.
    """

    def sampler(times: np.ndarray) -> np.ndarray:
        return _check_indices(sample(len(times)), len(times), path)

    [(_, decoded)] = decode_spans(path, [(span, sampler)], **options)
    if isinstance(decoded, VideoError):
        raise decoded
    return decoded.as_chosen()


def decode_spans(
    path: StrPath,
    requests: Sequence[tuple[Span | None, Sampler]],
    *,
    resize: Resize | None = None,
    decoder: str = "pyav",
    frame_rate: float | None = None,
) -> Iterator[tuple[int, Decoded | VideoError]]:
    """Decode several spans of a file in one pass.

    Yields the position of each request in `requests` with its frames or its failure, as soon as it
    is complete. So consecutive spans are not in memory at the same time.

    Args:
        requests: spans (None: the whole file), each with the sampler that chooses its frames. A
            frame that is chosen several times is decoded, resized and returned once.
        resize: applied to each chosen frame at once, so memory does not grow with the length of the
            video or the size of its pictures.
        decoder: "pyav"; "decord", which counts frames that an edit list hides, and cannot open AV1;
            or "torchcodec-cuda" (see nvdec.py), whose frames are tensors on that device, and which
            raises VideoError if only PyAV can read the file.
        frame_rate: in Hz. If given, `path` may be a folder of numbered pictures, which Pillow
            decodes, not `decoder`.
    """
    rate = frame_rate if os.path.isdir(path) else None
    if rate is None:
        check_file(path)
    key = (os.fspath(path), decoder, rate, os.stat(path).st_mtime_ns)
    source = _cache.pop(key, None)
    _cache.clear()
    source = source or _Source(path, decoder, rate)
    reason = source.reason
    pending = list(range(len(requests)))
    if source.file is not None:
        check_length(path, source.file.end)
        try:
            yield from _decode(source.file, path, requests, pending, resize)
        except UnreliablePacketsError as error:
            reason = str(error)
            # The frames of a span must not depend on the other spans that are decoded with it.
            for position in [*pending] if len(pending) > 1 else []:
                with suppress(UnreliablePacketsError):
                    yield from _decode(source.file, path, requests, [position], resize)
                    pending.remove(position)
    if pending:
        fully_decoded = source.decode_fully(reason)
        check_length(path, fully_decoded.end)
        yield from _decode(fully_decoded, path, requests, pending, resize)
    if any(span for span, _ in requests):
        _cache[key] = source


class _Source:
    """A file that was opened for decoding: by its packets, by decoding everything, or both.

    reason: why its packets are not reliable, in which case `file` is None.
    """

    def __init__(self, path, decoder: str, rate: float | None):
        self._path, self._decoder, self._rate = path, decoder, rate
        self.file: VideoFile | None = None
        self.reason = ""
        self._fully_decoded: VideoFile | None = None
        try:
            self.file = _open(path, decoder, rate)
        except UnreliablePacketsError as error:
            self.reason = str(error)

    def decode_fully(self, reason: str) -> VideoFile:
        if self._fully_decoded is None:
            if self._rate is not None:
                self._fully_decoded = PictureFolder(self._path, rate=self._rate, only_good=True)
            elif self._decoder.startswith("torchcodec-"):  # PyAV is left to GpuDecoder
                raise VideoError(self._path, reason)
            else:
                table = self.file if isinstance(self.file, PacketDecoder) else None
                self._fully_decoded = _FullDecode(self._path, reason, table)
        return self._fully_decoded


_cache: dict[tuple, _Source] = {}  # the file whose spans were read last


def _open(path, decoder: str, rate: float | None) -> VideoFile:
    if rate is not None:
        return PictureFolder(path, rate=rate)
    if decoder == "pyav":
        return PacketDecoder(path)
    if decoder == "decord":
        return DecordFile(path)
    name, _, device = decoder.partition("-")
    if name == "torchcodec" and device:
        return TorchcodecFile(path, device=device)
    raise ValueError(f"got decoder {decoder!r}, expected 'pyav', 'decord' or 'torchcodec-DEVICE'")


def decoder_version(decoder: str) -> str:
    """The version of a decoder, for the store. Raises VideoError if it is not installed."""
    if decoder == "pyav":
        libavcodec = ".".join(map(str, av.library_versions["libavcodec"]))
        return f"PyAV {av.__version__}, libavcodec {libavcodec}"
    if decoder.startswith("torchcodec-"):
        return torchcodec_version(decoder.removeprefix("torchcodec-"))
    return f"decord {import_decord().__version__}"


def _decode(
    file: VideoFile,
    path: StrPath,
    requests: Sequence[tuple[Span | None, Sampler]],
    pending: list[int],
    resize: Resize | None,
) -> Iterator[tuple[int, Decoded | VideoError]]:
    """Decode the `pending` requests in one pass over a file, and remove each from the list."""
    chosen: dict[int, np.ndarray] = {}  # by request, indices in the file
    num_frames: dict[int, int] = {}
    for position in [*pending]:
        span, sample = requests[position]
        first, stop = frame_range(file.times, span, file.time_tolerance)
        if first >= stop:
            reason = file.problem(span)
            start, end = span or (-math.inf, math.inf)
            nothing = f"no frame of it is shown from {start:g} to {end:g} s"
            pending.remove(position)
            yield position, VideoError(path, nothing + (f" ({reason})" if reason else ""))
            continue
        sampled = sample(file.times[first:stop])
        if not np.size(sampled):
            pending.remove(position)
            continue
        num_frames[position] = stop - first
        chosen[position] = first + _check_indices(sampled, stop - first, path)
    if not chosen:
        return
    order = sorted(chosen, key=lambda position: chosen[position].max())
    distinct = np.unique(np.concatenate([indices.ravel() for indices in chosen.values()]))
    pictures = file.pictures(distinct.tolist())
    decoded: dict[int, np.ndarray] = {}  # by index in the file, those that are still needed
    for number, position in enumerate(order, 1):
        indices, choice = np.unique(chosen[position], return_inverse=True)
        while indices[-1] not in decoded and (item := next(pictures, None)):
            index, picture = item
            decoded[index] = picture if resize is None else resize(picture)
        if number == len(order):
            deque(pictures, maxlen=0)  # an error behind the last frame may concern it too
        if missing := set(indices.tolist()) - decoded.keys():
            raise UnreliablePacketsError(f"frame {min(missing)} does not decode")
        span = requests[position][0]
        numbers = indices if file.numbers is None else file.numbers[indices].astype(np.int32)
        result = Decoded(
            frames=_stack([decoded[index] for index in indices.tolist()]),
            indices=numbers,
            timestamps=file.times[indices].astype(np.float32),
            num_frames=num_frames[position],
            problem=file.problem(span),
            end=file.end,
            choice=choice.reshape(chosen[position].shape).astype(np.int32),
            note=file.note(span),
        )
        pending.remove(position)
        yield position, result
        first_needed = min((chosen[later].min() for later in order[number:]), default=math.inf)
        decoded = {index: picture for index, picture in decoded.items() if index >= first_needed}


def _check_indices(indices: Iterable[int], count: int, path) -> np.ndarray:
    """The result of a sampler as int32; IndexError names an index that does not exist."""
    checked = np.asarray(indices)
    if not checked.ndim or checked.dtype.kind not in "iu" or not checked.size:
        raise ValueError(f"sample({count}) returned {checked!r}, expected integer frame indices")
    wrong = checked[(checked < 0) | (checked >= count)]
    if len(wrong):
        raise IndexError(
            f"{os.fspath(path)} has {count} frames, sample({count}) returned frame {wrong[0]}"
        )
    return checked.astype(np.int32)


def _stack(pictures: list[Any]) -> Any:
    """Pictures in one array, in the size of the first. A stream may change its size."""
    if not isinstance(pictures[0], np.ndarray):
        return stacked(pictures)
    from PIL import Image

    shape = pictures[0].shape
    for number, picture in enumerate(pictures):
        if picture.shape != shape:
            image = Image.fromarray(picture)
            resized = image.resize((shape[1], shape[0]), Image.Resampling.BILINEAR)
            pictures[number] = np.asarray(resized)
    return np.stack(pictures)


# -- decoding everything ---------------------------------------------------------------------------


class _FullDecode(VideoFile):
    """A video that is decoded completely, twice: to find the good frames, and to read some of them.

    table: the packets of the file, if they are reliable as far as the list of frames goes. Numbers
    and times of frames are then taken from it, so they do not depend on how a span is decoded.
    """

    def __init__(self, path, reason: str, table: PacketDecoder | None):
        self._path, self._next = path, 0
        self._frames: Iterator[av.VideoFrame] = iter(())
        self._damage: list[str] = []
        self._jumps: list[int] = []
        stamps, corrupt, has_times = array("q"), bytearray(), True
        for frame in _all_frames(path, self._damage, self._jumps):
            has_times = has_times and frame.pts is not None
            stamps.append(frame.pts or 0)
            corrupt.append(frame.is_corrupt)
        if not stamps:
            why = self._damage[0] if self._damage else reason
            raise VideoError(path, f"no frame of it decodes ({why})")
        self._corrupt = np.frombuffer(corrupt, bool)
        # Frames that the decoder had to repair are left out, unless all are like that.
        self._take_corrupt = bool(self._corrupt.all())
        good = np.ones(len(stamps), bool) if self._take_corrupt else ~self._corrupt
        numbers = table.frame_numbers(stamps) if table is not None and has_times else None
        if table is not None and numbers is not None:
            self._expected_times, self._decoded_times = table.times, table.times[numbers]
            self.numbers, self.end = numbers[good], table.end
            self.offset, self.clock_note = table.offset, table.clock_note
        else:
            own_times = self._own_times(np.array(stamps), has_times)
            self._expected_times = self._decoded_times = own_times
            self.end = last_frame_end(own_times)
        self.times = self._decoded_times[good]

    def _own_times(self, stamps: np.ndarray, has_times: bool) -> np.ndarray:
        """float64 [num_frames]: seconds after the first frame, from the time stamps if possible."""
        with opened(self._path) as (container, stream):
            rate, base = stream.average_rate or stream.guessed_rate or 25, stream.time_base
            if not has_times:
                return np.arange(len(stamps)) / float(rate)
            first = stamps[0] if self._jumps else stamps.min()
            self.offset = start_offset(container, stream, int(first))
        if not self._jumps:  # frames are in order; time stamps may be those of packets
            return to_seconds(np.sort(stamps) - first, base)
        times, jumps = remove_jumps(to_seconds(stamps - first, base), 1 / float(rate))
        if jumps:
            self.clock_note = f"time stamps jump back at {jumps[0]:.3f} s; times go on from there"
        return times

    def problem(self, span: Span | None) -> str:
        corrupt = self._corrupt[slice(*frame_range(self._decoded_times, span))]
        first, stop = frame_range(self._expected_times, span)
        missing = stop - first - len(corrupt)
        too_short = super().problem(span)
        damage = self._damage if too_short or span is None else []
        reasons = []
        if corrupt.any():
            reasons.append(f"{corrupt.sum()} of {len(corrupt)} readable frames are corrupt")
        if missing > 0 and not damage:
            reasons.append(f"{missing} of {stop - first} frames do not decode")
        return "; ".join(filter(None, [*reasons, too_short, *damage]))

    def pictures(self, indices: list[int]) -> Iterator[tuple[int, np.ndarray]]:
        # Spans that follow each other are decoded in one pass.
        if not self._next or indices[0] < self._next:
            self._frames, self._next = _all_frames(self._path, [], []), 0
        requested, reformatter = set(indices), VideoReformatter()
        for frame in self._frames:
            if self._take_corrupt or not frame.is_corrupt:
                index, self._next = self._next, self._next + 1
                if index in requested:
                    yield index, to_rgb(self._path, frame, reformatter)
                if index == indices[-1]:
                    break


def _all_frames(path, problems: list[str], jumps: list[int]) -> Iterator[av.VideoFrame]:
    """Decode all frames in presentation order, up to the first error.

    Appends errors to `problems`. Appends to `jumps` the numbers of packets at which the decoding
    time jumps back, as it does if two streams were joined byte by byte.
    """
    with opened(path) as (container, stream):
        num_packets = num_frames = 0
        latest = -math.inf
        try:
            for packet in container.demux(stream):
                num_packets += bool(packet.size)
                if packet.dts is not None and packet.size:
                    if packet.dts < latest:
                        jumps.append(num_packets)
                    latest = packet.dts
                for frame in packet.decode():
                    num_frames += 1
                    yield frame
        except DECODE_ERRORS as error:
            problems.append(f"damaged after {num_frames} readable frames: {error_text(error)}")
        else:
            if early := truncation(container, stream, num_packets):
                problems.append(early)
