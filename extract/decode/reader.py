"""A video and frame indices in, frames out: the only place that knows a decoder.

What PyAV (FFmpeg) is asked to do, so that few frames of a video cost little and every one is the frame that decoding
everything would give:

1. A pass over the packets, without decoding, counts the frames that can be presented and finds their time stamps.
2. Packets of wanted frames are decoded, and those that wanted frames refer to; others are skipped (`NONREF`).
3. Where a key frame lies before the next wanted frame, decoding starts there.
4. Only wanted frames become RGB.

Where a wanted frame does not come out, is corrupt, or time stamps cannot be trusted, everything is decoded, frames are
chosen among what decodes, and `problem` says so if anything was wrong.
"""

import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import av
import numpy as np
from av.video.reformatter import VideoReformatter

from extract.decode.opening import DAMAGE, VideoError, check_file, open_video, opened, words_of

Sample = Callable[[int], np.ndarray]
Resize = Callable[[np.ndarray], np.ndarray]
Times = Callable[[np.ndarray], None] | None

# Codecs whose decoders leave out frames that nothing refers to, and only those, when told NONREF.
_SKIPPING = frozenset(("h264", "hevc", "mpeg1video", "mpeg2video", "mpeg4"))
# A packet of these may hold a picture that is never shown, so packets are not frames.
_HIDDEN_PICTURES = frozenset(("vp8",))
# Containers that hold the time at which a frame is presented. Elsewhere (AVI, ASF, MXF, bare streams) FFmpeg numbers
# packets as they come, which is wrong where frames are reordered; only of MPEG-4 it looks up which they are.
_TIMED = frozenset(("mov", "matroska", "mpegts", "mpeg", "flv", "nut"))
_REORDERING = frozenset(("h264", "hevc"))
# DivX and XviD put two frames of MPEG-4 in one packet of an AVI and let a packet of at most this many bytes follow.
_PLACEHOLDER_BYTES = 19
# What H.264 says where decoding starts at a key frame, of references from before it that are to be forgotten.
_EXPECTED = "mmco: unref short failure"
# Packets that stay in memory between the two passes; a longer video is read from its file twice.
_KEPT_BYTES = 64 << 20


class _UntrustedError(Exception):
    """Packets do not tell which frames there are, or a wanted frame did not come out of them."""


@dataclass(frozen=True)
class Decoded:
    """Frames of a video; unpacks as `frames, indices, timestamps`.

    frames uint8 [T, H, W, 3] RGB; indices int32 [T], positions in presentation order; timestamps float32 [T], seconds
    after the first frame; num_frames, what can be presented; problem, empty or why the video is only partly readable.
    """

    frames: np.ndarray = field(repr=False)
    indices: np.ndarray
    timestamps: np.ndarray
    num_frames: int
    problem: str = ""

    def __post_init__(self) -> None:
        count = len(self.frames)
        if self.frames.ndim != 4 or self.indices.shape != (count,) or self.timestamps.shape != (count,):
            raise ValueError(
                f"got frames {self.frames.shape}, indices {self.indices.shape}, timestamps {self.timestamps.shape}; "
                "expected [T, H, W, 3], [T] and [T]"
            )

    def __iter__(self) -> Iterator[np.ndarray]:
        return iter((self.frames, self.indices, self.timestamps))


def decode(
    path: str | os.PathLike[str],
    sample: Sample,
    *,
    resize: Resize | None = None,
    decoder: str = "pyav",
    on_duration: Callable[[float | None], None] | None = None,
    on_times: Times = None,
) -> Decoded:
    """Decode the frames of `path` that `sample(num_frames)` asks for (any order, repeats allowed).

    `resize` is applied to each wanted frame as it comes, so memory does not grow with a video's length or its picture
    size. `on_duration` is called once with the container's duration in seconds (None if unknown) before decoding.
    `on_times` is called before `sample`, each time, with when every frame is shown: float [num_frames], seconds after
    the first.
    decoder: "pyav", or "decord" (which counts frames that an edit list hides, and cannot open AV1).

    Raises VideoError where not one frame can be read, IndexError where `sample` asks for a frame that is not there.
    """
    check_file(path)
    pictures = _Pictures(resize)
    if decoder not in ("pyav", "decord"):
        raise ValueError(f"got decoder {decoder!r}, expected 'pyav' or 'decord'")
    if decoder == "decord":
        return _decode_with_decord(path, sample, pictures, on_duration, on_times)
    with opened(path) as (container, stream):
        if on_duration is not None:
            on_duration(container.duration / av.time_base if container.duration else None)
        try:
            return _decode_wanted(path, container, stream, sample, pictures, on_times)
        except _UntrustedError as reason:
            doubt = str(reason)
    return _decode_everything(path, sample, pictures, doubt, on_times)


def decoder_version(decoder: str) -> str:
    """The version of a decoder, for the store's record. Raises VideoError where it is not installed."""
    if decoder == "pyav":
        return f"PyAV {av.__version__}, libavcodec {'.'.join(map(str, av.library_versions['libavcodec']))}"
    return f"decord {_import_decord().__version__}"


class _Pictures:
    """Wanted frames as RGB arrays, turned as they are to be displayed, resized, all of one shape."""

    def __init__(self, resize: Resize | None):
        self._resize = resize
        self._to_rgb = VideoReformatter()
        self._shape: tuple[int, ...] | None = None

    def from_frame(self, frame: av.VideoFrame) -> np.ndarray:
        picture = self._to_rgb.reformat(frame, format="rgb24").to_ndarray()
        turns = round(frame.rotation / 90) % 4  # the display matrix turns counter-clockwise, as np.rot90 does
        return self.from_array(np.rot90(picture, turns) if turns else picture)

    def from_array(self, picture: np.ndarray) -> np.ndarray:
        if self._resize is not None:
            picture = self._resize(picture)
        if self._shape is None:
            self._shape = picture.shape
        elif picture.shape != self._shape:  # the stream changes its picture size half-way
            from PIL import Image

            height, width = self._shape[:2]
            picture = np.asarray(Image.fromarray(picture).resize((width, height), Image.Resampling.BILINEAR))
        return picture


# -- wanted frames only --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Packets:
    """What the first pass learns, in the file's order: time stamps, key frames, which are shown; packets if small."""

    pts: list[int]
    size: list[int]
    key: list[bool]
    order: list[int]  # packets that are shown, in presentation order
    kept: list[av.Packet]

    @property
    def keys(self) -> list[int]:
        return [number for number, key in enumerate(self.key) if key]


def _decode_wanted(path, container, stream, sample: Sample, pictures: _Pictures, on_times: Times) -> Decoded:
    packets = _read_packets(container, stream)
    if on_times is not None:
        shown = np.array([packets.pts[number] for number in packets.order])
        on_times((shown - shown[0]) * float(stream.time_base))
    indices = _checked(sample(len(packets.order)), len(packets.order), path)
    wanted = {packets.order[index]: index for index in np.unique(indices).tolist()}
    found: dict[int, np.ndarray] = {}
    by_time = {packets.pts[number]: index for number, index in wanted.items()}
    for frame in _frames(path, stream, packets, sorted(wanted)):
        index = by_time.get(frame.pts)
        if index is not None and index not in found:
            found[index] = pictures.from_frame(frame)
    lost = [index for index in wanted.values() if index not in found]
    if lost:
        raise _UntrustedError(f"frame {min(lost)} does not decode")
    first = packets.pts[packets.order[0]]
    times = [float((packets.pts[packets.order[index]] - first) * stream.time_base) for index in indices.tolist()]
    return Decoded(
        frames=np.stack([found[index] for index in indices.tolist()]),
        indices=indices,
        timestamps=np.array(times, np.float32),
        num_frames=len(packets.order),
    )


def _read_packets(container, stream) -> _Packets:
    if stream.codec_context.name in _HIDDEN_PICTURES:
        raise _UntrustedError("its packets may hold pictures that are never shown")
    pts: list[int] = []
    sizes: list[int] = []
    key: list[bool] = []
    shown: list[int] = []
    kept: list[av.Packet] = []
    total, latest = 0, -math.inf
    try:
        for packet in container.demux(stream):
            if not packet.size:
                continue
            if packet.pts is None:
                raise _UntrustedError("its packets have no time stamps")
            if packet.is_corrupt:
                raise _UntrustedError("a packet is damaged")
            if packet.dts is not None:
                if packet.dts < latest:
                    raise _UntrustedError("its packets do not come in the order in which they are decoded")
                latest = packet.dts
            if not packet.is_discard:  # an edit list hides the others
                shown.append(len(pts))
            pts.append(packet.pts)
            key.append(packet.is_keyframe)
            sizes.append(packet.size)
            total += packet.size
            if total <= _KEPT_BYTES:
                kept.append(packet)
    except DAMAGE as error:
        raise _UntrustedError(f"reading it ends with: {words_of(error)}") from None
    if len({pts[number] for number in shown}) != len(shown) or not shown:
        raise _UntrustedError("its time stamps are not one a frame")
    if early := _ends_early(container, stream, len(pts)):
        raise _UntrustedError(early)
    if _order_is_guessed(container, stream, pts, sizes):
        raise _UntrustedError("its time stamps are those of packets, not of frames")
    kept = kept if total <= _KEPT_BYTES else []
    return _Packets(pts, sizes, key, sorted(shown, key=pts.__getitem__), kept)


def _order_is_guessed(container, stream, pts: list[int], sizes: list[int]) -> bool:
    """Whether frames may come in another order than time stamps say."""
    codec = stream.codec_context
    if not (codec.has_b_frames or codec.name in _REORDERING):
        return False
    if codec.name == "mpeg4" and min(sizes) <= _PLACEHOLDER_BYTES:
        return True
    if container.format.name.split(",")[0] in _TIMED:
        return False
    return codec.name != "mpeg4" or all(one < next_one for one, next_one in pairwise(pts))


def _frames(path, stream, packets: _Packets, wanted: list[int]) -> Iterator[av.VideoFrame]:
    """Frames that come out when `wanted` packets (numbers, ascending) and what they refer to are decoded."""
    context = stream.codec_context
    skips, keys, chosen = context.name in _SKIPPING, packets.keys, set(wanted)
    source = _Kept(packets) if packets.kept else _FromFile(path, packets)
    position = key_place = 0
    sought: set[int] = set()
    latest: int | None = None
    wanted_times = {packets.pts[number] for number in wanted}

    def decoded(packet: av.Packet | None) -> Iterator[av.VideoFrame]:
        nonlocal latest
        # Frames shown before a key frame that was sought are damaged: what they refer to was not decoded.
        before = max(sought) if sought else None
        complaints = av.logging.get_last_error()[0]
        for frame in context.decode(packet):
            if frame.pts in sought and not frame.key_frame:
                raise _UntrustedError("a packet is called a key frame and is none")
            if frame.pts is None or (latest is not None and frame.pts <= latest):
                raise _UntrustedError("frames do not come in the order of their time stamps")
            if frame.is_corrupt and (before is None or frame.pts >= before or frame.pts in wanted_times):
                raise _UntrustedError(f"the frame with time stamp {frame.pts} is corrupt")
            latest = frame.pts
            yield frame
        # Not all that a decoder patches up is marked, but all is logged.
        count, last = av.logging.get_last_error()
        if count > complaints and (before is None or _EXPECTED not in str(last)):
            raise _UntrustedError("its decoder complains")

    try:
        for number in wanted:
            start = position
            while key_place < len(keys) and keys[key_place] <= number:
                # A frame shown before its key frame may refer to what lies before that.
                if packets.pts[keys[key_place]] <= packets.pts[number]:
                    start = max(start, keys[key_place])
                key_place += 1
            if start > position + 1:
                yield from decoded(None)  # what the decoder still holds back
                context.flush_buffers()
                position = start
                sought.add(packets.pts[start])
            while position <= number:
                if skips:
                    context.skip_frame = "DEFAULT" if position in chosen else "NONREF"
                yield from decoded(source.packet(position))
                position += 1
        yield from decoded(None)
    except DAMAGE as error:
        raise _UntrustedError(f"decoding ends with: {words_of(error)}") from None
    finally:
        source.close()


class _Kept:
    """Packets that the first pass kept."""

    def __init__(self, packets: _Packets):
        self._packets = packets.kept

    def packet(self, number: int) -> av.Packet:
        return self._packets[number]

    def close(self) -> None:
        pass


class _FromFile:
    """Packets read again from a file too large to keep; forward only, a gap ends at a key frame that is sought."""

    def __init__(self, path, packets: _Packets):
        self._container, self._stream = open_video(path)
        self._packets = packets
        # The size too: after seeking in a program stream, FFmpeg may give time stamps to other packets than before.
        self._numbers = {stamp: number for number, stamp in enumerate(zip(packets.pts, packets.size, strict=True))}
        self._next, self._read = 0, self._container.demux(self._stream)

    def packet(self, number: int) -> av.Packet:
        if number != self._next:
            self._container.seek(self._packets.pts[number], stream=self._stream)
            self._read = self._container.demux(self._stream)
        for packet in self._read:
            if packet.size and self._numbers.get((packet.pts, packet.size)) == number:
                self._next = number + 1
                return packet
        raise _UntrustedError(f"packet {number} is not found again")

    def close(self) -> None:
        self._container.close()


# -- everything ----------------------------------------------------------------------------------------------------


def _decode_everything(path, sample: Sample, pictures: _Pictures, doubt: str, on_times: Times) -> Decoded:
    """Two passes that decode all: the first counts the good frames, the second takes the wanted ones."""
    problems: list[str] = []
    frames = [(frame.time, frame.is_corrupt) for frame in _all_frames(path, problems)]
    if not frames:
        raise VideoError(path, f"no frame of it decodes ({problems[0] if problems else doubt})")
    # Frames that the decoder had to patch up are left out, unless there are no others.
    corrupt = sum(is_corrupt for _, is_corrupt in frames)
    take_corrupt = corrupt == len(frames)
    if corrupt:
        problems.insert(0, f"{corrupt} of {len(frames)} readable frames are corrupt")
    times = [time for time, is_corrupt in frames if take_corrupt or not is_corrupt]
    every_second = _seconds(times, path)
    if on_times is not None:
        on_times(every_second)
    indices = _checked(sample(len(times)), len(times), path)
    wanted, found = set(indices.tolist()), {}
    good = (frame for frame in _all_frames(path, []) if take_corrupt or not frame.is_corrupt)
    for index, frame in enumerate(good):
        if index in wanted:
            found[index] = pictures.from_frame(frame)
            if len(found) == len(wanted):
                break
    pictures_wanted = np.stack([found[index] for index in indices.tolist()])
    return Decoded(pictures_wanted, indices, every_second[indices], len(times), "; ".join(problems))


def _all_frames(path, problems: list[str]) -> Iterator[av.VideoFrame]:
    """All frames in presentation order, up to the first error; `problems` says what was wrong."""
    with opened(path) as (container, stream):
        packets = good = 0
        try:
            for packet in container.demux(stream):
                packets += bool(packet.size)
                for frame in packet.decode():
                    good += 1
                    yield frame
        except DAMAGE as error:
            problems.append(f"damaged after {good} readable frames: {words_of(error)}")
        else:
            if early := _ends_early(container, stream, packets):
                problems.append(early)


def _ends_early(container, stream, packets: int) -> str:
    """Says so where an MP4 holds fewer packets than its index does, which leaves out what an edit list never needs."""
    if "mp4" not in container.format.name:
        return ""
    named = sum(1 for entry in stream.index_entries if entry.size)
    return f"the file ends early: it names {named} frames and holds {packets}" if packets < named else ""


def _seconds(times: Sequence[float | None], path) -> np.ndarray:
    """Seconds after the first frame; by the frame rate where a frame has no time stamp."""
    if all(time is not None for time in times):
        seconds = np.sort(np.array(times, np.float64))  # frames come in order; time stamps may be those of packets
        return (seconds - seconds[0]).astype(np.float32)
    with opened(path) as (_, stream):
        rate = stream.average_rate or stream.guessed_rate or 25
    return (np.arange(len(times)) / float(rate)).astype(np.float32)


# -- decord --------------------------------------------------------------------------------------------------------


def _decode_with_decord(path, sample: Sample, pictures: _Pictures, on_duration, on_times: Times) -> Decoded:
    decord = _import_decord()
    try:
        reader = decord.VideoReader(os.fspath(path), num_threads=1)
        count = len(reader)
        if on_duration is not None:
            on_duration(float(reader.get_frame_timestamp(count - 1)[1]) if count else None)
        if on_times is not None:
            every = np.asarray(reader.get_frame_timestamp(np.arange(count)))[:, 0]
            on_times(every - every[0])
        indices = _checked(sample(count), count, path)
        unique = np.unique(indices)
        found = {int(index): pictures.from_array(reader[int(index)].asnumpy()) for index in unique}
        times = np.asarray(reader.get_frame_timestamp(indices))[:, 0] - float(reader.get_frame_timestamp(0)[0])
    except (decord.DECORDError, RuntimeError) as error:
        raise VideoError(path, f"decord cannot read it: {_last_line(error)}") from None
    return Decoded(np.stack([found[index] for index in indices.tolist()]), indices, times.astype(np.float32), count)


def _import_decord():
    try:
        import decord
    except ImportError:
        raise VideoError("decord", "is not installed; it has wheels for x86-64 only, use --decoder pyav") from None
    decord.logging.set_level(decord.logging.QUIET)
    return decord


# -- files and words -----------------------------------------------------------------------------------------------


def _checked(indices: Iterable[int], count: int, path) -> np.ndarray:
    """`sample`'s answer as int32 [T]; IndexError names an index that is not there."""
    checked = np.asarray(indices)
    if checked.ndim != 1 or checked.dtype.kind not in "iu" or not len(checked):
        raise ValueError(f"sample({count}) gave {checked!r}, expected integer frame indices [T]")
    wrong = checked[(checked < 0) | (checked >= count)]
    if len(wrong):
        raise IndexError(f"{os.fspath(path)} has {count} frames, sample({count}) asks for frame {wrong[0]}")
    return checked.astype(np.int32)


def _last_line(error: Exception) -> str:
    lines = [line for line in str(error).splitlines() if line.strip() and not line.startswith("Stack")]
    return lines[0].strip() if lines else type(error).__name__
