"""A video by its packets: which frames there are, and the wanted ones decoded without the others.

What packets say is believed only where it is what decoding everything would say;
`UnreliablePacketsError` says why not.
"""

import contextlib
import math
from array import array
from collections.abc import Iterator, Sequence
from fractions import Fraction
from itertools import pairwise
from typing import Any

import av
import numpy as np
from av.video.reformatter import VideoReformatter

from extract.decode.container import (
    DECODE_ERRORS,
    VideoError,
    check_file,
    check_length,
    check_size,
    error_text,
    open_video,
    opened,
)

Span = tuple[float, float]  # seconds after the first frame of a file: start <= time < end

# Codecs whose decoders leave out frames that nothing refers to, and only those, when told NONREF.
_SKIPPING = frozenset(("h264", "hevc", "mpeg1video", "mpeg2video", "mpeg4"))
# A packet of these may hold a picture that is never shown, so packets are not frames.
_HIDDEN_PICTURES = frozenset(("vp8",))
# Containers that hold the time at which a frame is presented. Elsewhere (AVI, ASF, MXF, bare
# streams) FFmpeg numbers packets as they come, which is wrong where frames are reordered; only of
# MPEG-4 it looks up which they are.
_TIMED = frozenset(("mov", "matroska", "mpegts", "mpeg", "flv", "nut"))
# Containers with an index of their packets, so that the last ones are found without reading the
# others.
_INDEXED = frozenset(("mov", "matroska"))
_REORDERING = frozenset(("h264", "hevc"))
# DivX and XviD put two frames of MPEG-4 in one packet of an AVI and let a packet of at most this
# many bytes follow.
_PLACEHOLDER_BYTES = 19
# What H.264 says where decoding starts at a key frame, of references from before it that are to be
# forgotten.
_BENIGN_WARNING = "mmco: unref short failure"
# How much later than a container's own start the first frame may come, unmentioned (s).
_NOTED_OFFSET = 0.1
# Packets that stay in memory between the two passes; a longer video is read from its file twice.
_KEPT_BYTES = 64 << 20


class UnreliablePacketsError(Exception):
    """Packets do not tell which frames there are, or a wanted frame did not come out of them."""


class VideoFile:
    """What each way of reading a file offers, once it has been looked through: when frames are
    shown, and the frames.

    times float64 [num_frames]: when every frame is shown, ascending, seconds after the first; end:
    when the last goes.
    """

    times: np.ndarray
    end: float
    slack = 0.0  # by how much times may be too small
    numbers: np.ndarray | None = (
        None  # int [num_frames], of each in the file, if some frames of it are missing
    )
    offset = 0.0  # of the first frame, after the container's own start (s)
    clock_note = ""  # what else is to be known of the times

    def problem(self, span: Span | None) -> str:
        """What is wrong with the file, as far as a span is concerned: that it ends before the span
        does."""
        last_frame = self.end - float(
            self.times[-1]
        )  # a span may end while another frame would have been shown
        if span is None or span[1] <= self.end + max(last_frame, 0.0) + 1e-3:
            return ""
        return f"the file ends at {self.end:.3f} s, the span at {span[1]:g} s"

    def note(self, span: Span | None) -> str:
        """What is to be recorded of a span, or of the whole file, that is not damage."""
        notes = [self.clock_note] if self.clock_note else []
        if span is not None and self.offset > _NOTED_OFFSET:
            notes.append(
                f"times count from the first frame, {self.offset:.2f} s after the start of a player's clock"
            )
        return "; ".join(notes)

    def pictures(self, indices: list[int]) -> Iterator[tuple[int, Any]]:
        """Frames (ascending indices) as RGB, turned as they are displayed; UnreliablePacketsError
        if one is doubted."""
        raise NotImplementedError


class PacketDecoder(VideoFile):
    """A video by its packets, which go by their numbers in the file's order; those of a small file
    stay in memory.

    Raises UnreliablePacketsError.
    """

    def __init__(self, path):
        self._path = path
        self.pts, self._sizes, self._key, self._order = (
            array("q"),
            array("l"),
            bytearray(),
            array("l"),
        )
        self._kept: list[av.Packet] = []
        container, stream = open_video(path)
        self._opened: Any = container, stream  # until frames are asked for
        try:
            stop = self._read(container, stream)
        except UnreliablePacketsError:
            container.close()
            raise
        if not self._key[0] or self.pts[self._order[0]] < self.pts[0]:
            self._leave_out_undecodable_start()
        first = self.pts[self._order[0]]
        self.times = seconds(np.array(self.pts)[self._order] - first, stream.time_base)
        self.offset = offset_of(container, stream, first)
        self.end = last_frame_end(self.times, float(seconds(stop - first, stream.time_base)))

    def pictures(self, indices: list[int]) -> Iterator[tuple[int, np.ndarray]]:
        (container, stream), self._opened = self._opened or open_video(self._path), None
        with container:
            wanted = {self._order[index]: index for index in indices}
            by_time = {self.pts[number]: index for number, index in wanted.items()}
            to_rgb = VideoReformatter()
            for frame in self._frames(stream.codec_context, sorted(wanted)):
                index = by_time.pop(frame.pts, None)  # type: ignore[arg-type]
                if index is not None:
                    check_size(self._path, frame.width, frame.height)
                    yield index, upright(frame, to_rgb)

    def _leave_out_undecodable_start(self) -> None:
        """The file begins in the middle of a group of pictures: its first frame is the first one
        that decodes."""
        with opened(self._path) as (container, stream):
            try:
                frames = (frame for packet in container.demux(stream) for frame in packet.decode())
                first = next((frame.pts for frame in frames if not frame.is_corrupt), None)
            except DECODE_ERRORS as error:
                raise UnreliablePacketsError(
                    f"decoding its start ends with: {error_text(error)}"
                ) from None
        left_out = [number for number in self._order if first is None or self.pts[number] < first]
        if first is None or first not in self.pts:
            raise UnreliablePacketsError("its first frame that decodes is not one of its packets")
        self._order = self._order[len(left_out) :]
        if left_out:
            self.clock_note = undecodable_start(len(left_out))

    def _read(self, container, stream) -> int:
        """Look at every packet, without decoding; returns the time stamp at which the last frame
        goes."""
        if stream.codec_context.name in _HIDDEN_PICTURES:
            raise UnreliablePacketsError("its packets may hold pictures that are never shown")
        total, stop, latest = 0, -math.inf, -math.inf
        try:
            for packet in container.demux(stream):
                if not packet.size:
                    continue
                if packet.pts is None:
                    raise UnreliablePacketsError("its packets have no time stamps")
                if packet.is_corrupt:
                    raise UnreliablePacketsError("a packet is damaged")
                if packet.dts is not None:
                    if packet.dts < latest:
                        raise UnreliablePacketsError(
                            "its packets do not come in the order in which they are decoded"
                        )
                    latest = packet.dts
                if not packet.is_discard:  # an edit list hides the others
                    self._order.append(len(self.pts))
                    stop = max(stop, packet.pts + (packet.duration or 0))
                self.pts.append(packet.pts)
                self._key.append(packet.is_keyframe)
                self._sizes.append(packet.size)
                total += packet.size
                if total <= _KEPT_BYTES:
                    self._kept.append(packet)
        except DECODE_ERRORS as error:
            raise UnreliablePacketsError(f"reading it ends with: {error_text(error)}") from None
        if total > _KEPT_BYTES:
            self._kept.clear()
        shown = np.array(self.pts)[self._order] if self._order else np.empty(0)
        if len(np.unique(shown)) != len(shown) or not len(shown):
            raise UnreliablePacketsError("its time stamps are not one a frame")
        if early := truncation(container, stream, len(self.pts)):
            raise UnreliablePacketsError(early)
        if _order_is_guessed(container, stream, self.pts, self._sizes):
            raise UnreliablePacketsError("its time stamps are those of packets, not of frames")
        self._order = array("l", np.array(self._order)[np.argsort(shown)].tolist())
        return int(stop)

    def numbers_of(self, stamps: Sequence[int]) -> np.ndarray | None:
        """int [n]: the numbers of frames with these time stamps, None if they are not ascending or
        not all in it."""
        number = {self.pts[packet]: index for index, packet in enumerate(self._order)}
        numbers = np.array([number.get(stamp, -1) for stamp in stamps])
        return numbers if (numbers >= 0).all() and (np.diff(numbers) > 0).all() else None

    def _frames(self, context, wanted: list[int]) -> Iterator[av.VideoFrame]:
        """Frames that come out when `wanted` packets (numbers, ascending) and what they refer to
        are decoded."""
        skips, chosen = context.name in _SKIPPING, set(wanted)
        keys = np.flatnonzero(np.frombuffer(self._key, bool)).tolist()
        again = None if self._kept else _Redemuxer(self._path, self.pts, self._sizes)
        position = key_place = 0
        sought: set[int] = set()
        latest: int | None = None
        wanted_times = {self.pts[number] for number in wanted}

        def decoded(packet: av.Packet | None) -> Iterator[av.VideoFrame]:
            nonlocal latest
            # Frames shown before a key frame that was sought are damaged: what they refer to was
            # not decoded.
            before = max(sought) if sought else None
            complaints = av.logging.get_last_error()[0]
            frames = context.decode(packet)
            # Not all that a decoder patches up is marked, but all is logged.
            count, last = av.logging.get_last_error()
            if count > complaints and (before is None or _BENIGN_WARNING not in str(last)):
                raise UnreliablePacketsError("its decoder complains")
            for frame in frames:
                if frame.pts in sought and not frame.key_frame:
                    raise UnreliablePacketsError("a packet is called a key frame and is none")
                if frame.pts is None or (latest is not None and frame.pts <= latest):
                    raise UnreliablePacketsError("frames are not in the order of their time stamps")
                needed = before is None or frame.pts >= before or frame.pts in wanted_times
                if frame.is_corrupt and needed:
                    raise UnreliablePacketsError(f"the frame at time {frame.pts} is corrupt")
                latest = frame.pts
                yield frame

        try:
            for number in wanted:
                start = position
                while key_place < len(keys) and keys[key_place] <= number:
                    # A frame shown before its key frame may refer to what lies before that.
                    if self.pts[keys[key_place]] <= self.pts[number]:
                        start = max(start, keys[key_place])
                    key_place += 1
                if start > position + 1:
                    yield from decoded(None)  # what the decoder still holds back
                    context.flush_buffers()
                    position = start
                    sought.add(self.pts[start])
                while position <= number:
                    if skips:
                        context.skip_frame = "DEFAULT" if position in chosen else "NONREF"
                    yield from decoded(again.packet(position) if again else self._kept[position])
                    position += 1
            yield from decoded(None)
        except DECODE_ERRORS as error:
            raise UnreliablePacketsError(f"decoding ends with: {error_text(error)}") from None
        finally:
            if again:
                again.close()


def _order_is_guessed(container, stream, pts: Sequence[int], sizes: Sequence[int]) -> bool:
    """Whether frames may come in another order than time stamps say."""
    codec = stream.codec_context
    if not (codec.has_b_frames or codec.name in _REORDERING):
        return False
    if codec.name == "mpeg4" and min(sizes) <= _PLACEHOLDER_BYTES:
        return True
    if container.format.name.split(",")[0] in _TIMED:
        return False
    return codec.name != "mpeg4" or all(one < next_one for one, next_one in pairwise(pts))


class _Redemuxer:
    """Packets of a file too large to keep, read once more; forward only, a gap ends at a key frame
    that is sought."""

    def __init__(self, path, pts: Sequence[int], sizes: Sequence[int]):
        self._container, self._stream = open_video(path)
        self._pts, self._sizes = pts, sizes
        self._next, self._read = 0, self._container.demux(self._stream)

    def packet(self, number: int) -> av.Packet:
        if number != self._next:
            self._container.seek(self._pts[number], stream=self._stream)
            self._read = self._container.demux(self._stream)
        self._next = number + 1
        for packet in self._read:
            # The size too: after seeking in a program stream, FFmpeg may give time stamps to other
            # packets than before.
            if packet.size == self._sizes[number] and packet.pts == self._pts[number]:
                return packet
        raise UnreliablePacketsError(f"packet {number} is not found again")

    def close(self) -> None:
        self._container.close()


def truncation(container, stream, packets: int) -> str:
    """Says so where an MP4 holds fewer packets than its index does, which leaves out what an edit
    list never needs."""
    if "mp4" not in container.format.name:
        return ""
    named = sum(1 for entry in stream.index_entries if entry.size)
    return (
        f"the file ends early: it names {named} frames and holds {packets}"
        if packets < named
        else ""
    )


def upright(frame: av.VideoFrame, to_rgb: VideoReformatter) -> np.ndarray:
    """A frame as RGB, turned as it is to be displayed."""
    picture = to_rgb.reformat(frame, format="rgb24").to_ndarray()
    turns = (
        round(frame.rotation / 90) % 4
    )  # the display matrix turns counter-clockwise, as np.rot90 does
    return np.rot90(picture, turns) if turns else picture


def duration_of(path: str) -> float:
    """Seconds from a video's first frame to the end of its last, by packets that exist.

    MP4 and Matroska files have an index: only their last packets are read. Others are read as a
    whole. Raises VideoError for a file that is not a video, has no packet that can be read, or
    claims an impossible length.
    """
    check_file(path)
    with opened(path) as (container, stream):
        indexed = container.format.name.split(",")[0] in _INDEXED
        if not indexed:
            with contextlib.suppress(UnreliablePacketsError):
                return PacketDecoder(path).end
        length = _length_by_packets(container, stream, seek=indexed)
        if length is None and indexed:  # the index is damaged
            container.seek(0, stream=stream)
            length = _length_by_packets(container, stream, seek=False)
    if length is None:
        raise VideoError(path, "not one packet of its video can be read")
    check_length(path, length)
    return length


def _length_by_packets(container, stream, *, seek: bool) -> float | None:
    """None if there is no packet with a time stamp. Where time stamps jump back, times go on (see
    `carry_on`)."""
    usual = round(1 / (stream.average_rate * stream.time_base)) if stream.average_rate else 1
    parts: list[list[int]] = []  # [first time stamp, end] between jumps back
    latest = -math.inf
    with contextlib.suppress(*DECODE_ERRORS, ValueError):
        first = stream.start_time
        if seek:
            claimed = (container.duration or 0) / av.time_base / stream.time_base
            container.seek(int((first or 0) + (stream.duration or claimed)), stream=stream)
        for packet in container.demux(stream):
            if packet.pts is None or not packet.size or packet.is_discard:
                continue
            if packet.dts is not None:
                if packet.dts < latest or not parts:
                    parts.append([packet.pts, packet.pts])
                latest = packet.dts
            elif not parts:
                parts.append([packet.pts, packet.pts])
            start, end = parts[-1]
            parts[-1] = [min(start, packet.pts), max(end, packet.pts + (packet.duration or usual))]
    if not parts:
        return None
    if seek and first is not None:
        parts[0][0] = min(parts[0][0], first)
    return float(sum(end - start for start, end in parts) * stream.time_base)


def carry_on(times: np.ndarray, usual: float) -> tuple[np.ndarray, list[float]]:
    """Times that jump back (s), with each part after a jump moved behind the one before; and when
    they jumped.

    `usual` is how long a frame is shown, if the times do not say it.
    """
    steps = np.diff(times)
    forward = steps[steps > 0]
    step = float(np.median(forward)) if len(forward) else usual
    moved = np.concatenate([[0.0], np.cumsum(np.where(steps > 0, steps, step))])
    return moved, [float(moved[place + 1]) for place in np.flatnonzero(steps <= 0)]


def offset_of(container, stream, first: int) -> float:
    """By how much the first frame (its time stamp) comes after the container's own start, in
    seconds."""
    return float(seconds(first, stream.time_base)) - (container.start_time or 0) / av.time_base


def undecodable_start(count: int) -> str:
    return f"its first {count} frames cannot be decoded: it begins in the middle of a group of pictures"


def seconds(ticks, base: Fraction):
    """Time stamps in seconds. One rounding: a frame at 2 s is at 2.0 whatever the time base, and
    spans begin there."""
    return ticks * base.numerator / base.denominator


def last_frame_end(times: np.ndarray, known: float = 0.0) -> float:
    """When the last of frames at `times` goes: when its packet says, at least after as long as is
    usual."""
    return max(
        known, float(times[-1]) + (float(np.median(np.diff(times))) if len(times) > 1 else 0.0)
    )
