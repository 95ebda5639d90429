"""Untrimmed videos with known boundaries, made of real clips, and parts cut out of them without
re-encoding."""

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import av

FPS = 25


def join_clips(
    path: Path, clips: Sequence[Path], *, size: tuple[int, int] = (214, 144)
) -> list[tuple[float, float]]:
    """Join all clips into one video, each beginning with a key frame; returns the start and end of
    each (s).

    Clips keep their own time stamps, so rates differ within the video as they do between the clips.
    """
    spans, begin = [], Fraction(0)
    with av.open(str(path), "w") as output:
        # Closed groups of frames, and key frames only at the requested positions.
        parameters = {"crf": "18", "x264-params": "keyint=infinite:scenecut=0:open-gop=0:bframes=2"}
        stream = output.add_stream("libx264", rate=FPS, options=parameters)
        stream.width, stream.height, stream.pix_fmt = *size, "yuv420p"
        stream.codec_context.time_base = Fraction(1, 1000)
        for clip in clips:
            with av.open(str(clip)) as source:
                video = source.streams.video[0]
                for number, frame in enumerate(source.decode(video)):
                    picture = frame.reformat(*size, format="yuv420p")
                    picture.pts = round(1000 * begin) + round(
                        1000 * Fraction(number) / video.average_rate
                    )
                    picture.time_base = Fraction(1, 1000)
                    picture.pict_type = av.video.frame.PictureType.I if number == 0 else 0
                    output.mux(stream.encode(picture))
                end = Fraction(
                    round(1000 * begin) + round(1000 * Fraction(number + 1) / video.average_rate),
                    1000,
                )
            spans.append((float(begin), float(end)))
            begin = end
        output.mux(stream.encode(None))
    return spans


def cut_out(path: Path, source: Path, span: tuple[float, float]) -> Path:
    """Write the packets of a span that begins with a key frame to a video of their own, without
    re-encoding."""
    with av.open(str(source)) as container, av.open(str(path), "w") as output:
        video = container.streams.video[0]
        stream = output.add_stream_from_template(video)
        start, stop = (round(second / video.time_base) for second in span)
        for packet in container.demux(video):
            if packet.size and start <= packet.pts < stop:
                packet.pts, packet.dts = packet.pts - start, packet.dts - start
                packet.stream = stream
                output.mux(packet)
    return path
