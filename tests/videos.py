"""Small videos of every kind, written with PyAV, and their content by plainly decoding
everything."""

import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from av.stream import Disposition

from extract.decode.container import LENIENT_METADATA

# FFmpeg's name of a container, if it does not follow from the file's extension.
_CONTAINERS = {".mkv": "matroska", ".ts": "mpegts", ".3gp": "3gp", ".wmv": "asf"}


def moving_pictures(count: int, width: int, height: int) -> Iterator[np.ndarray]:
    """`count` pictures uint8 [H, W, 3], no two alike: a drifting gradient under a moving bright
    square."""
    y, x = np.mgrid[:height, :width]
    for number in range(count):
        picture = (
            np.stack([x * 4 + number * 9, y * 5 + number * 3, (x + y) * 3 - number * 11], axis=-1)
            % 256
        )
        left = number * 4 % max(1, width - 10)
        picture[height // 4 : height // 2, left : left + 10] = (255, 0, number * 15 % 256)
        yield picture.astype(np.uint8)


def _frame(picture: np.ndarray, pix_fmt: str) -> av.VideoFrame:
    if pix_fmt != "pal8":
        return av.VideoFrame.from_ndarray(picture, format="rgb24").reformat(format=pix_fmt)
    shades = np.repeat(
        np.arange(256, dtype=np.uint8)[:, None], 4, axis=1
    )  # swscale makes no palettes
    return av.VideoFrame.from_ndarray(
        (np.ascontiguousarray(picture[..., 0]), shades), format="pal8"
    )


def write_video(
    path: Path,
    *,
    codec: str = "libx264",
    pix_fmt: str = "yuv420p",
    size: tuple[int, int] = (64, 48),
    frames: int = 24,
    fps: int = 25,
    gop: int | None = None,
    bframes: int | None = None,
    interlaced: bool = False,
    pts: Sequence[int] | None = None,
    container: str | None = None,
    options: dict[str, str] | None = None,
    container_options: dict[str, str] | None = None,
    more_streams: Sequence[tuple[int, int]] = (),
    audio: bool = False,
) -> Path:
    """Write a video of `size` (width, height); `pts` in units of 1/1000 s replaces a constant rate.

    `more_streams` are the sizes of further video streams, with other pictures; the last one is
    marked as the one to show. Raises PyAV's error if the encoder or the container refuses it.
    """
    settings = {"strict": "-2"} | (options or {})
    if codec == "libx265":
        settings["x265-params"] = "log-level=none"
    if gop is not None:
        settings["g"] = str(gop)
    if bframes is not None:
        settings["bf"] = str(bframes)
    if interlaced:
        settings |= {"flags": "+ildct+ilme"}
        if codec == "libx264":
            settings["x264-params"] = "tff=1"
    container = container or _CONTAINERS.get(path.suffix)
    with av.open(str(path), "w", format=container, options=container_options or {}) as output:
        sources = []
        for number, (width, height) in enumerate([size, *more_streams]):
            stream = output.add_stream(codec, rate=fps, options=settings)
            stream.width, stream.height, stream.pix_fmt = width, height, pix_fmt
            if pts is not None:
                stream.codec_context.time_base = Fraction(1, 1000)
            pictures = moving_pictures(frames + 5 * number, width, height)
            for _ in range(5 * number):
                next(pictures)  # other pictures than the first stream's
            sources.append((stream, pictures))
        if more_streams:
            stream.disposition = Disposition.default
        sound = output.add_stream("aac", rate=16000) if audio else None
        if sound is not None:
            sound.layout = "mono"
        for number in range(frames):
            for stream, pictures in sources:
                frame = _frame(next(pictures), pix_fmt)
                frame.pts = number if pts is None else pts[number]
                frame.time_base = Fraction(1, fps) if pts is None else Fraction(1, 1000)
                output.mux(stream.encode(frame))
        for stream, _ in sources:
            output.mux(stream.encode(None))
        if sound is not None:
            silence = av.AudioFrame(format="fltp", layout="mono", samples=1024)
            silence.sample_rate = 16000
            for number in range(frames * 16000 // fps // 1024):
                for plane in silence.planes:
                    plane.update(bytes(plane.buffer_size))
                silence.pts = number * 1024
                output.mux(sound.encode(silence))
            output.mux(sound.encode(None))
    return path


def write_repeated(path: Path, source: Path, times: int) -> Path:
    """Write a video `times` as long as `source` by repeating its packets, without re-encoding."""
    with av.open(str(source)) as container:
        video = container.streams.video[0]
        length = video.duration or round(container.duration / av.time_base / video.time_base)
        with av.open(str(path), "w", format=_CONTAINERS.get(path.suffix)) as output:
            stream = output.add_stream_from_template(video)
            for number in range(times):
                container.seek(0, stream=video)
                for packet in container.demux(video):
                    if packet.size:
                        packet.pts += number * length
                        packet.dts = None if packet.dts is None else packet.dts + number * length
                        packet.stream = stream
                        output.mux(packet)
    return path


def x264_defaults(source: Path, out: Path) -> Path:
    """Encode the pictures of `source` again with x264's defaults (medium, crf 23, a key frame every
    250)."""
    with av.open(str(source)) as reader, av.open(str(out), "w") as writer:
        video = reader.streams.video[0]
        stream = writer.add_stream("libx264", rate=video.average_rate)
        stream.width, stream.height, stream.pix_fmt = video.width, video.height, "yuv420p"
        for number, frame in enumerate(reader.decode(video)):
            picture = av.VideoFrame.from_ndarray(frame.to_ndarray(), format="yuv420p")
            picture.pts = number
            writer.mux(stream.encode(picture))
        writer.mux(stream.encode(None))
    return out


def _box(content: bytes, kind: bytes) -> int:
    """The position after the name of the first MP4 box of a kind; ValueError if there is none."""
    return content.index(kind) + 4


def forget_key_frames(path: Path) -> Path:
    """Remove the list of key frames from an MP4, so that every frame is called a key frame."""
    content = path.read_bytes()
    assert content.count(b"stss") == 1
    path.write_bytes(content.replace(b"stss", b"free"))
    return path


def turn(path: Path, degrees: int) -> Path:
    """Set the display matrix of an MP4's first track to a clockwise rotation by 0, 90, 180 or 270
    degrees."""
    content = bytearray(path.read_bytes())
    matrix = _box(content, b"tkhd") + 40
    a, b = {0: (1, 0), 90: (0, 1), 180: (-1, 0), 270: (0, -1)}[degrees]
    one, w = 1 << 16, 1 << 30
    struct.pack_into(">9i", content, matrix, a * one, b * one, 0, -b * one, a * one, 0, 0, 0, w)
    path.write_bytes(content)
    return path


def cut_by_edit_list(path: Path, *, start: float, seconds: float) -> Path:
    """Make the edit list of an MP4's first track show `seconds` from `start` on; the frames stay in
    the file."""
    content = bytearray(path.read_bytes())
    movie_scale = struct.unpack_from(">I", content, _box(content, b"mvhd") + 12)[0]
    media_scale = struct.unpack_from(">I", content, _box(content, b"mdhd") + 12)[0]
    edits = _box(content, b"elst")
    count, _, first = struct.unpack_from(">IIi", content, edits + 4)
    assert count == 1, f"{path} has {count} edits, expected one to change"
    struct.pack_into(
        ">Ii", content, edits + 8, round(seconds * movie_scale), first + round(start * media_scale)
    )
    path.write_bytes(content)
    return path


@dataclass(frozen=True)
class Whole:
    """A whole video: frames uint8 [H, W, 3], their seconds after the first, and the error that
    ended it, if any."""

    frames: list[np.ndarray]
    seconds: list[float]
    corrupt: list[bool]
    error: str


def decode_everything(path: Path) -> Whole:
    """Every frame as plain PyAV gives it: no skipping, no seeking, no rotation."""
    frames, seconds, corrupt, error = [], [], [], ""
    with av.open(str(path), **LENIENT_METADATA) as container:
        stream = container.streams.best("video")
        assert stream is not None, f"{path} has no video stream"
        stream.codec_context.thread_count = 1
        try:
            for frame in container.decode(stream):
                frames.append(frame.to_ndarray(format="rgb24"))
                seconds.append(frame.time)
                corrupt.append(frame.is_corrupt)
        except av.FFmpegError as problem:
            error = str(problem)
    if seconds and None not in seconds:
        seconds = [time - seconds[0] for time in seconds]
    return Whole(frames, seconds, corrupt, error)


# -- kinds of video --------------------------------------------------------------------------------------------------

_B = {"gop": 8, "bframes": 3, "frames": 30}
_VFR = np.cumsum(np.random.default_rng(0).integers(5, 300, 30)).tolist()
_LATE = [5000 + 40 * number for number in range(30)]

# name -> how it is written; files that only decoding everything reads correctly are below
TRUSTED = {
    "a.mp4": {},
    "b-frames.mp4": _B,
    "b-frames.mkv": _B,
    "b-frames.ts": _B,
    "b-frames.flv": _B,
    "b-frames.mov": _B,
    "no-b-frames.mp4": {"gop": 8, "bframes": 0},
    "keys-only.mp4": {"gop": 1},
    "one-key.mp4": {"options": {"x264-params": "keyint=infinite"}},
    "open-gop.mp4": _B | {"options": {"x264-params": "open-gop=1:keyint=6:b-pyramid=strict"}},
    "open-gop.ts": _B | {"options": {"x264-params": "open-gop=1:keyint=6"}},
    "many-references.mkv": {
        "frames": 30,
        "options": {"x264-params": "ref=8:bframes=8:b-adapt=2:weightp=2"},
    },
    "slices.mp4": _B | {"options": {"x264-params": "slices=4:aud=1:pic-struct=1"}},
    "fragments.mp4": _B | {"container_options": {"movflags": "frag_keyframe+empty_moov"}},
    "faststart.mp4": _B | {"container_options": {"movflags": "faststart"}},
    "interlaced.mp4": _B | {"interlaced": True},
    "interlaced.ts": _B | {"codec": "mpeg2video", "interlaced": True},
    "10-bit-h264.mp4": _B | {"pix_fmt": "yuv420p10le"},
    "10-bit-hevc.mp4": _B | {"codec": "libx265", "pix_fmt": "yuv420p10le"},
    "12-bit-hevc.mkv": _B | {"codec": "libx265", "pix_fmt": "yuv422p12le"},
    "10-bit-av1.mp4": {"codec": "libsvtav1", "pix_fmt": "yuv420p10le"},
    "gray.mp4": _B | {"pix_fmt": "gray"},
    "gray-10-bit.mkv": {"pix_fmt": "gray10le"},
    "odd-size.mp4": _B | {"pix_fmt": "yuv444p", "size": (63, 47)},
    "odd-size-vp9.webm": {"codec": "libvpx-vp9", "size": (33, 17)},
    "tiny.mkv": {"codec": "ffv1", "size": (1, 1)},
    "full-range.mp4": _B | {"pix_fmt": "yuvj420p"},
    "rgb.mkv": _B | {"codec": "libx264rgb", "pix_fmt": "rgb24"},
    "alpha.mkv": {"codec": "ffv1", "pix_fmt": "yuva420p"},
    "hevc.mkv": _B | {"codec": "libx265"},
    "hevc-open-gop.ts": _B | {"codec": "libx265", "gop": 6},
    "vfr.mp4": _B | {"pts": _VFR},
    "vfr.mkv": _B | {"pts": _VFR},
    "vfr.ts": _B | {"pts": _VFR},
    "vfr-vp9.webm": {"codec": "libvpx-vp9", "frames": 30, "pts": _VFR},
    "late.mp4": _B | {"pts": _LATE},
    "late.mkv": _B | {"pts": _LATE},
    "late.ts": _B | {"pts": _LATE},
    "audio.mp4": _B | {"audio": True},
    "streams.mp4": _B | {"more_streams": [(96, 80)]},
    "streams.mkv": _B | {"more_streams": [(32, 32), (96, 80)]},
    "mpeg4.avi": _B | {"codec": "mpeg4"},
    "mpeg4.mp4": _B | {"codec": "mpeg4"},
    "mpeg1.mpg": _B | {"codec": "mpeg1video", "container": "mpeg"},
    "mpeg2.vob": _B | {"codec": "mpeg2video", "container": "vob"},
    "mjpeg.avi": {"codec": "mjpeg", "pix_fmt": "yuvj420p"},
    "wmv.wmv": {"codec": "wmv2"},
    "a.gif": {"codec": "gif", "pix_fmt": "rgb8"},
    "one-frame.mp4": {"frames": 1},
}

DOUBTED = {
    # Packets are numbered as they come: these frames were silently in the wrong order.
    "b-frames.avi": _B,
    "b-frames.wmv": _B,
    "b-frames.mxf": _B,
    "mpeg1.wmv": _B | {"codec": "mpeg1video"},
    "bare.m1v": {
        "codec": "mpeg1video",
        "gop": 6,
        "bframes": 3,
        "frames": 30,
        "options": {"flags": "-cgop"},
    },
    "bare.h264": _B,
    "bare.hevc": _B | {"codec": "libx265"},
    # Every packet is called a key frame: these were decoded from the middle of a group.
    "h263.avi": {"codec": "h263p"},
    "h263.mov": {"codec": "h263", "size": (176, 144)},
    # Decoding can start only at the first frame, although others are called key frames.
    "intra-refresh.mp4": {
        "frames": 40,
        "options": {"x264-params": "intra-refresh=1:keyint=8:bframes=0"},
    },
    # Packets hold pictures that are never shown.
    "vp8.webm": {
        "codec": "libvpx",
        "frames": 40,
        "options": {"auto-alt-ref": "1", "lag-in-frames": "16"},
    },
}
