"""One time zero and one numbering per file, for any part of it that is decoded, in any order."""

import contextlib
from pathlib import Path

import av
import numpy as np
import pytest

from decode_jobs import prepare_row
from extract.decode import VideoError, decode, reader
from extract.decode.container import opened
from extract.decode.jobs import Plan, decode_job
from extract.decode.packets import duration_of
from extract.decode.transform import Preprocessing
from extract.sampling import segment_centers
from videos import decode_everything, write_video

SEE = Preprocessing(32, 36, "bilinear", (0.5,) * 3, (0.5,) * 3)


def centers(num_frames: int) -> np.ndarray:
    return segment_centers(num_frames, 4)


def without_its_start(path: Path, source: Path) -> int:
    """Write a transport stream that begins with the packets of the second frame; returns the number
    of frames before the next key frame."""
    with av.open(str(source)) as container:
        packets = [
            (packet.pos, packet.is_keyframe) for packet in container.demux(video=0) if packet.size
        ]
    content = source.read_bytes()
    tables = content[: 188 * 3]  # SDT, PAT and PMT
    path.write_bytes(tables + content[packets[1][0] :])
    return [key for _, key in packets[1:]].index(True)


def spans_in_any_order(path: Path) -> list:
    """Indices and times of the span of 2 to 3 s: alone, and after others."""
    seen = []
    for earlier in ([], [(0.0, 1.0)], [(0.0, 2.0), (3.0, 3.5)]):
        reader._cache.clear()
        for span in earlier:
            decode(path, centers, span=span)
        decoded = decode(path, centers, span=(2.0, 3.0))
        seen.append((decoded.indices.tolist(), decoded.timestamps.tolist(), decoded.note))
    reader._cache.clear()
    return seen


def test_a_stream_that_begins_in_the_middle_of_a_group_counts_from_its_first_frame_that_decodes(
    tmp_path,
):
    source = write_video(
        tmp_path / "whole.ts", frames=120, gop=16, bframes=2, options={"sc_threshold": "0"}
    )
    path = tmp_path / "midgop.ts"
    lost = without_its_start(path, source)
    whole = decode_everything(path)
    assert lost > 5
    assert len(whole.frames) == 120 - 1 - lost
    alone, *later = spans_in_any_order(path)
    assert later == [alone] * 2
    assert alone[0] == (50 + segment_centers(25, 4)).tolist()
    frames = decode(path, np.arange)
    assert frames.num_frames == len(whole.frames)
    assert np.array_equal(frames.frames, whole.frames)
    assert frames.problem == ""
    note = (
        f"its first {lost} frames cannot be decoded: it begins in the middle of a group of pictures"
    )
    assert frames.note == note
    assert alone[2].startswith(f"{note}; times count from the first frame, 0.")
    assert duration_of(str(path)) == pytest.approx(frames.end)


def test_time_that_jumps_back_goes_on(tmp_path):
    """Two streams are joined byte by byte. The result is as long as both, with every frame once, in
    the order of the file."""
    first, second = (
        write_video(tmp_path / f"{n}.ts", frames=n, gop=16, bframes=2) for n in (60, 50)
    )
    path = tmp_path / "joined.ts"
    path.write_bytes(first.read_bytes() + second.read_bytes())
    parts = [*decode_everything(first).frames, *decode_everything(second).frames]
    alone, *later = spans_in_any_order(path)
    assert later == [alone] * 2
    assert alone[0] == (50 + segment_centers(25, 4)).tolist()
    whole = decode(path, np.arange)
    assert np.array_equal(whole.frames, parts)
    np.testing.assert_allclose(whole.timestamps, np.arange(110) / 25, atol=1e-5)
    assert (whole.problem, whole.note) == (
        "",
        "time stamps jump back at 2.400 s; times go on from there",
    )
    assert duration_of(str(path)) == pytest.approx(4.4)


def test_a_clock_that_starts_before_the_pictures_is_noted_of_spans(tmp_path):
    path = tmp_path / "late.mkv"
    with av.open(str(path), "w") as output:
        picture, sound = output.add_stream("libx264", rate=25), output.add_stream("aac", rate=16000)
        picture.width, picture.height, picture.pix_fmt, sound.layout = 64, 48, "yuv420p", "mono"
        for number in range(110):
            silence = av.AudioFrame(format="fltp", layout="mono", samples=1024)
            silence.sample_rate, silence.pts = 16000, number * 1024
            for plane in silence.planes:
                plane.update(bytes(plane.buffer_size))
            output.mux(sound.encode(silence))
        for number in range(50):
            frame = av.VideoFrame.from_ndarray(np.full((48, 64, 3), number, np.uint8))
            frame.pts = 125 + number
            output.mux(picture.encode(frame))
        output.mux([*picture.encode(None), *sound.encode(None)])
    assert decode(path, centers).note == ""
    noted = decode(path, centers, span=(0.0, 1.0))
    assert (
        noted.note == "times count from the first frame, 5.00 s after the start of a player's clock"
    )
    plan = Plan(4, 1, 0, SEE)
    assert (
        prepare_row(str(path), "a", plan, np.zeros(plan.shape, np.uint8), span=(0.0, 1.0)).note
        == noted.note
    )


def damage(path: Path, every: int) -> None:
    """Change bytes inside some packets, so that the packets still tell the number of frames."""
    with av.open(str(path)) as container:
        packets = [(packet.pos, packet.size) for packet in container.demux(video=0) if packet.size]
    content = bytearray(path.read_bytes())
    for position, size in packets[5::every]:
        if size > 40:
            for quarter in (1, 2, 3):
                content[position + size * quarter // 4] ^= 0x5A
    path.write_bytes(content)


def test_frames_of_a_damaged_file_keep_their_numbers_and_times(tmp_path):
    path = write_video(tmp_path / "a.mp4", frames=100, gop=10, size=(160, 120))
    damage(path, 9)
    whole = decode(path, np.arange)
    assert whole.problem
    assert whole.num_frames < 100
    np.testing.assert_allclose(whole.timestamps, whole.indices / 25, atol=1e-5)
    for start in range(4):
        decoded = decode(path, centers, span=(float(start), start + 1.0))
        np.testing.assert_allclose(decoded.timestamps, decoded.indices / 25, atol=1e-5)


def test_frames_that_the_decoder_had_to_patch_up_are_left_out(tmp_path):
    path = write_video(tmp_path / "a.mp4", frames=100, gop=10, size=(160, 120))
    damage(path, 9)
    good = []
    with opened(path) as (container, stream), contextlib.suppress(av.FFmpegError):
        for packet in container.demux(stream):
            good += [not frame.is_corrupt for frame in packet.decode()]
    assert 0 < sum(good) < len(good)
    assert decode(path, np.arange).num_frames == sum(good)


def test_a_lost_packet_of_a_transport_stream_is_noticed_whatever_frame_is_wanted(tmp_path):
    """A part of a late frame is lost, and frame 0 is requested."""
    path = write_video(tmp_path / "a.ts", frames=60, gop=10, size=(320, 240))
    content = bytearray(path.read_bytes())
    parts = [
        place
        for place in range(0, len(content), 188)
        if content[place + 1] & 0x5F == 0x01 and content[place + 2] == 0x00
    ]
    lost = next(place for place in parts[len(parts) * 3 // 4 :] if not content[place + 1] & 0x40)
    path.write_bytes(content[:lost] + content[lost + 188 :])
    assert decode(path, np.arange).problem
    first = decode(path, lambda count: np.array([0]))
    assert first.problem == decode(path, np.arange).problem
    assert first.num_frames == decode(path, np.arange).num_frames < 60


def test_the_last_frame_goes_when_its_packet_says(tmp_path):
    with (
        av.open(str(write_video(tmp_path / "a.mp4", frames=25, fps=25))) as source,
        av.open(str(tmp_path / "long.mkv"), "w") as output,
    ):
        stream = output.add_stream_from_template(source.streams.video[0])
        for packet in [packet for packet in source.demux(video=0) if packet.size]:
            if packet.pts * packet.time_base > 0.95:
                packet.duration = round(2 / packet.time_base)
            packet.stream = stream
            output.mux(packet)
    decoded = decode(tmp_path / "long.mkv", np.arange)
    assert decoded.timestamps[-1] == pytest.approx(0.96)
    assert decoded.end == pytest.approx(2.96)
    assert duration_of(str(tmp_path / "long.mkv")) == pytest.approx(2.96)
    assert decode(tmp_path / "long.mkv", np.arange, span=(0.0, 4.0)).problem == ""


def test_views_of_a_damaged_file_do_not_depend_on_what_was_decoded_before(tmp_path):
    path = write_video(tmp_path / "a.mp4", frames=120, fps=10, gop=10, size=(160, 120))
    damage(path, 31)
    plan = Plan(4, 1, 2, SEE)
    rows = [(f"a#{start}", (float(start), start + 2.0)) for start in range(0, 12, 2)]

    def views(*chosen: int) -> list:
        out = np.zeros(len(chosen) * plan.row_bytes, np.uint8)
        results = decode_job((str(path), [rows[number] for number in chosen], plan), out)
        return [
            result.reason
            if isinstance(result, VideoError)
            else (result.indices.tolist(), result.problem, result.pictures(out, plan).tobytes())
            for result in results
        ]

    alone = []
    for number in range(len(rows)):
        reader._cache.clear()
        alone += views(number)
    assert {bool(view[1]) for view in alone if isinstance(view, tuple)} == {False, True}
    reader._cache.clear()
    assert views(*range(len(rows))) == alone
    for number in reversed(range(len(rows))):
        assert views(number) == [alone[number]]
