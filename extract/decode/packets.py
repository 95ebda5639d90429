"""Decode selected frames of a video from its packets, without decoding the others.

The packets are trusted only if they describe the same frames that decoding everything would give.
Otherwise `UnreliablePacketsError` says why not.
"""

import contextlib
import math
from array import array
from bisect import bisect_left, bisect_right
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

Span = tuple[float, float]  # start <= time < end, in seconds after the first frame of a file

# With skip_frame NONREF, decoders of these codecs skip exactly the frames that no other frame
# refers to.
_SKIPPING = frozenset(("h264", "hevc", "mpeg1video", "mpeg2video", "mpeg4"))
# A packet of these codecs may hold a picture that is never shown, so packets are not frames.
_HIDDEN_PICTURES = frozenset(("vp8",))
# Containers that store the presentation time of a frame. In others (AVI, ASF, MXF, bare streams)
# FFmpeg numbers the packets in file order, which is wrong for reordered frames. MPEG-4 is the
# exception: FFmpeg finds out which frames are reordered.
_TIMED = frozenset(("mov", "matroska", "mpegts", "mpeg", "flv", "nut"))
# Containers with an index of packets: the last packets are found without reading the others.
_INDEXED = frozenset(("mov", "matroska"))
_REORDERING = frozenset(("h264", "hevc"))
# DivX and XviD put two MPEG-4 frames into one packet of an AVI, and a packet of at most this many
# bytes after it.
_PLACEHOLDER_BYTES = 19
# Logged by the H.264 decoder after a seek to a key frame, about references that precede it.
_BENIGN_WARNING = "mmco: unref short failure"
# If the first frame comes later than this after the container's start (s), a note says so.
_NOTED_OFFSET = 0.1
# Packets up to this size are kept in memory between the two passes. Larger files are read twice.
_KEPT_BYTES = 64 << 20


class UnreliablePacketsError(Exception):
    """The packets do not tell which frames there are, or a requested frame was not decoded."""


class VideoFile:
    """The frames of a file and their times. The base class of every way to read one.

    times: float64 [num_frames], when each frame is shown, ascending, seconds after the first.
    end: when the last frame ends (s).
    """

    times: np.ndarray
    end: float
    time_tolerance = 0.0  # `times` may be too small by this much (s)
    numbers: np.ndarray | None = None  # int [num_frames] in the file, if some frames are missing
    offset = 0.0  # of the first frame from the container's own start (s)
    clock_note = ""  # a remark on `times`

    def problem(self, span: Span | None) -> str:
        """What is wrong with the file as far as a span is concerned, e.g. that it ends too early.

        A span may end while one more frame would have been shown.
        """
        last_frame = self.end - float(self.times[-1])
        if span is None or span[1] <= self.end + max(last_frame, 0.0) + 1e-3:
            return ""
        return f"the file ends at {self.end:.3f} s, the span at {span[1]:g} s"

    def note(self, span: Span | None) -> str:
        """A remark on a span, or on the whole file, that does not concern damage."""
        notes = [self.clock_note] if self.clock_note else []
        if span is not None and self.offset > _NOTED_OFFSET:
            notes.append(
                f"times count from the first frame, {self.offset:.2f} s after the start of a "
                "player's clock"
            )
        return "; ".join(notes)

    def pictures(self, indices: list[int]) -> Iterator[tuple[int, Any]]:
        """Frames by ascending index, as RGB and rotated for display.

        Raises UnreliablePacketsError if one of them may be wrong.
        """
        raise NotImplementedError


class PacketDecoder(VideoFile):
    """Reads a video by its packets, which are numbered in file order.

    The packets of a small file stay in memory. Raises UnreliablePacketsError.
    """

    def __init__(self, path):
        self._path = path
        self.pts, self._sizes, self._is_key = array("q"), array("l"), bytearray()
        self._order = array("l")  # packet numbers of the frames in presentation order
        self._kept: list[av.Packet] = []
        container, stream = open_video(path)
        self._opened: Any = container, stream  # until frames are requested
        try:
            stop = self._read(container, stream)
        except UnreliablePacketsError:
            container.close()
            raise
        if not self._is_key[0] or self.pts[self._order[0]] < self.pts[0]:
            self._skip_undecodable_start()
        shown = np.array(self.pts)[self._order]
        self.times = to_seconds(shown - shown[0], stream.time_base)
        self.offset = start_offset(container, stream, int(shown[0]))
        last_end = float(to_seconds(stop - int(shown[0]), stream.time_base))
        self.end = max(last_end, last_frame_end(self.times))

    def pictures(self, indices: list[int]) -> Iterator[tuple[int, np.ndarray]]:
        (container, stream), self._opened = self._opened or open_video(self._path), None
        with container:
            numbers = sorted(self._order[index] for index in indices)
            index_of = {self.pts[self._order[index]]: index for index in indices}
            reformatter = VideoReformatter()
            for frame in self._frames(stream.codec_context, numbers):
                index = index_of.pop(frame.pts, None)  # type: ignore[arg-type]
                if index is not None:
                    yield index, to_rgb(self._path, frame, reformatter)

    def frame_numbers(self, stamps: Sequence[int]) -> np.ndarray | None:
        """int [n]: the indices of the frames with these time stamps.

        None if a time stamp is not in the file, or if they are not ascending.
        """
        index_of = {self.pts[number]: index for index, number in enumerate(self._order)}
        indices = np.array([index_of.get(stamp, -1) for stamp in stamps])
        return indices if (indices >= 0).all() and (np.diff(indices) > 0).all() else None

    def _skip_undecodable_start(self) -> None:
        """The file begins within a group of pictures: start with the first frame that decodes."""
        with opened(self._path) as (container, stream):
            try:
                frames = (frame for packet in container.demux(stream) for frame in packet.decode())
                first = next((frame.pts for frame in frames if not frame.is_corrupt), None)
            except DECODE_ERRORS as error:
                raise UnreliablePacketsError(
                    f"decoding its start ends with: {error_text(error)}"
                ) from None
        if first is None or first not in self.pts:
            raise UnreliablePacketsError("its first frame that decodes is not one of its packets")
        skipped = sum(self.pts[number] < first for number in self._order)
        self._order = self._order[skipped:]
        if skipped:
            self.clock_note = (
                f"its first {skipped} frames cannot be decoded: it begins in the middle of a group "
                "of pictures"
            )

    def _read(self, container, stream) -> int:
        """Read all packets without decoding. Returns the time stamp when the last frame ends."""
        if stream.codec_context.name in _HIDDEN_PICTURES:
            raise UnreliablePacketsError("its packets may hold pictures that are never shown")
        total_bytes, stop, latest = 0, -math.inf, -math.inf
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
                        raise UnreliablePacketsError("its packets are not in decoding order")
                    latest = packet.dts
                if not packet.is_discard:  # packets that an edit list hides
                    self._order.append(len(self.pts))
                    stop = max(stop, packet.pts + (packet.duration or 0))
                self.pts.append(packet.pts)
                self._is_key.append(packet.is_keyframe)
                self._sizes.append(packet.size)
                total_bytes += packet.size
                if total_bytes <= _KEPT_BYTES:
                    self._kept.append(packet)
        except DECODE_ERRORS as error:
            raise UnreliablePacketsError(f"reading it ends with: {error_text(error)}") from None
        if total_bytes > _KEPT_BYTES:
            self._kept.clear()
        shown = np.array(self.pts)[self._order]
        if not len(shown) or len(np.unique(shown)) != len(shown):
            raise UnreliablePacketsError("its frames do not have a time stamp each")
        if reason := truncation(container, stream, len(self.pts)):
            raise UnreliablePacketsError(reason)
        if _order_is_guessed(container, stream, self.pts, self._sizes):
            raise UnreliablePacketsError("its time stamps are those of packets, not of frames")
        self._order = array("l", np.array(self._order)[np.argsort(shown)].tolist())
        return int(stop)

    def _frames(self, context, numbers: list[int]) -> Iterator[av.VideoFrame]:
        """Decode the packets with these ascending numbers and the packets that they refer to.

        Yields every frame that the decoder returns, in the order of time stamps.
        """
        requested = set(numbers)
        requested_times = {self.pts[number] for number in numbers}
        can_skip = context.name in _SKIPPING
        keys = np.flatnonzero(np.frombuffer(self._is_key, bool)).tolist()
        redemuxer = None if self._kept else _Redemuxer(self._path, self.pts, self._sizes)
        seek_times: set[int] = set()  # of the key frames at which decoding started anew
        position, latest = 0, -math.inf

        def decoded(packet: av.Packet | None) -> Iterator[av.VideoFrame]:
            nonlocal latest
            # Frames shown before such a key frame are damaged: their references were not decoded.
            last_seek = max(seek_times, default=-math.inf)
            errors_before = av.logging.get_last_error()[0]
            frames = context.decode(packet)
            # The decoder does not mark every frame that it repaired, but it logs all of them.
            errors, message = av.logging.get_last_error()
            has_errors = errors > errors_before
            if has_errors and not (seek_times and _BENIGN_WARNING in str(message)):
                raise UnreliablePacketsError("the decoder logged errors")
            for frame in frames:
                if frame.pts in seek_times and not frame.key_frame:
                    raise UnreliablePacketsError("a packet is marked as a key frame but is not one")
                if frame.pts is None or frame.pts <= latest:
                    raise UnreliablePacketsError("frames are not in the order of their time stamps")
                needed = frame.pts >= last_seek or frame.pts in requested_times
                if frame.is_corrupt and needed:
                    raise UnreliablePacketsError(f"the frame at time {frame.pts} is corrupt")
                latest = frame.pts
                yield frame

        try:
            for number in numbers:
                # A frame shown before its key frame may refer to packets before that.
                upcoming = keys[bisect_left(keys, position) : bisect_right(keys, number)]
                usable = [key for key in upcoming if self.pts[key] <= self.pts[number]]
                start = max(usable, default=position)
                if start > position + 1:
                    yield from decoded(None)  # the frames that the decoder still holds
                    context.flush_buffers()
                    position = start
                    seek_times.add(self.pts[start])
                while position <= number:
                    if can_skip:
                        context.skip_frame = "DEFAULT" if position in requested else "NONREF"
                    packet = redemuxer.packet(position) if redemuxer else self._kept[position]
                    yield from decoded(packet)
                    position += 1
            yield from decoded(None)
        except DECODE_ERRORS as error:
            raise UnreliablePacketsError(f"decoding ends with: {error_text(error)}") from None
        finally:
            if redemuxer:
                redemuxer.close()


def _order_is_guessed(container, stream, pts: Sequence[int], sizes: Sequence[int]) -> bool:
    """Whether the order of frames may differ from the order of the time stamps."""
    codec = stream.codec_context
    if not (codec.has_b_frames or codec.name in _REORDERING):
        return False
    if codec.name == "mpeg4" and min(sizes) <= _PLACEHOLDER_BYTES:
        return True
    if container.format.name.split(",")[0] in _TIMED:
        return False
    return codec.name != "mpeg4" or all(first < second for first, second in pairwise(pts))


class _Redemuxer:
    """Reads the packets of a large file a second time, forward only.

    A gap in the requested numbers must end at a key frame, to which it seeks.
    """

    def __init__(self, path, pts: Sequence[int], sizes: Sequence[int]):
        self._container, self._stream = open_video(path)
        self._pts, self._sizes = pts, sizes
        self._next, self._packets = 0, self._container.demux(self._stream)

    def packet(self, number: int) -> av.Packet:
        if number != self._next:
            self._container.seek(self._pts[number], stream=self._stream)
            self._packets = self._container.demux(self._stream)
        self._next = number + 1
        for packet in self._packets:
            # Compare the size too: after a seek in a program stream, FFmpeg may assign time stamps
            # to other packets than before.
            if packet.size == self._sizes[number] and packet.pts == self._pts[number]:
                return packet
        raise UnreliablePacketsError(f"packet {number} is not found again")

    def close(self) -> None:
        self._container.close()


def truncation(container, stream, num_packets: int) -> str:
    """A message if an MP4 has fewer packets than its index, else "".

    The index leaves out packets that an edit list never needs.
    """
    if "mp4" not in container.format.name:
        return ""
    indexed = sum(1 for entry in stream.index_entries if entry.size)
    if num_packets >= indexed:
        return ""
    return f"the file ends early: it names {indexed} frames and holds {num_packets}"


def to_rgb(path, frame: av.VideoFrame, reformatter: VideoReformatter) -> np.ndarray:
    """A frame as RGB uint8 [H, W, 3], rotated for display. VideoError if it is too large."""
    check_size(path, frame.width, frame.height)
    picture = reformatter.reformat(frame, format="rgb24").to_ndarray()
    turns = round(frame.rotation / 90) % 4  # counterclockwise, like np.rot90
    return np.rot90(picture, turns) if turns else picture


def duration_of(path: str) -> float:
    """Seconds from a video's first frame to the end of its last, from packets that exist.

    MP4 and Matroska files have an index, so only their last packets are read. Other files are read
    completely. Raises VideoError if the file is not a video, has no readable packet, or claims an
    impossible length.
    """
    check_file(path)
    with opened(path) as (container, stream):
        is_indexed = container.format.name.split(",")[0] in _INDEXED
        if not is_indexed:
            with contextlib.suppress(UnreliablePacketsError):
                return PacketDecoder(path).end
        duration = _duration_by_packets(container, stream, seek=is_indexed)
        if duration is None and is_indexed:  # the index is damaged
            container.seek(0, stream=stream)
            duration = _duration_by_packets(container, stream, seek=False)
    if duration is None:
        raise VideoError(path, "not one packet of its video can be read")
    check_length(path, duration)
    return duration


def _duration_by_packets(container, stream, *, seek: bool) -> float | None:
    """Seconds, or None if no packet has a time stamp.

    If time stamps jump back, the parts before and after the jump are added up.
    """
    usual = round(1 / (stream.average_rate * stream.time_base)) if stream.average_rate else 1
    parts: list[list[int]] = []  # [first time stamp, end]
    latest = -math.inf
    with contextlib.suppress(*DECODE_ERRORS, ValueError):
        first = stream.start_time
        if seek:
            claimed = (container.duration or 0) / av.time_base / stream.time_base
            container.seek(int((first or 0) + (stream.duration or claimed)), stream=stream)
        for packet in container.demux(stream):
            if packet.pts is None or not packet.size or packet.is_discard:
                continue
            dts = latest if packet.dts is None else packet.dts
            if dts < latest or not parts:
                parts.append([packet.pts, packet.pts])
            latest = dts
            start, end = parts[-1]
            parts[-1] = [min(start, packet.pts), max(end, packet.pts + (packet.duration or usual))]
    if not parts:
        return None
    if seek and first is not None:
        parts[0][0] = min(parts[0][0], first)
    return float(sum(end - start for start, end in parts) * stream.time_base)


def remove_jumps(times: np.ndarray, usual: float) -> tuple[np.ndarray, list[float]]:
    """Move each part of `times` (s) that follows a jump back behind the part before it.

    usual: the duration of a frame, if the times do not tell it (s).

    Returns:
        the ascending times, and those at which a jump was removed.
    """
    steps = np.diff(times)
    forward = steps[steps > 0]
    step = float(np.median(forward)) if len(forward) else usual
    moved = np.concatenate([[0.0], np.cumsum(np.where(steps > 0, steps, step))])
    return moved, moved[1:][steps <= 0].tolist()


def start_offset(container, stream, first: int) -> float:
    """Seconds from the container's own start to the first frame, whose time stamp is `first`."""
    return float(to_seconds(first, stream.time_base)) - (container.start_time or 0) / av.time_base


def to_seconds(ticks, base: Fraction):
    """Time stamps in seconds, rounded once: in any time base, a frame at 2 s is at exactly 2.0."""
    return ticks * base.numerator / base.denominator


def frame_range(times: np.ndarray, span: Span | None, tolerance: float = 0.0) -> tuple[int, int]:
    """Indices of the first frame that is shown in a span, and of the one after the last.

    tolerance: `times` may be too small by this much (s). Without a span: all frames.
    """
    limits = np.subtract(span or (-np.inf, np.inf), tolerance)
    first, stop = np.searchsorted(times, limits).tolist()
    return first, stop


def last_frame_end(times: np.ndarray) -> float:
    """When the last frame ends, if it is shown as long as the median frame (s)."""
    usual = float(np.median(np.diff(times))) if len(times) > 1 else 0.0
    return float(times[-1]) + usual
