"""Parts of files as rows: spans from tables, windows, and their frames, which equal those of
decoding everything and choosing by time."""

import csv
import re
import shutil
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import av
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from decode_jobs import prepare_row
from extract import InputError
from extract.decode import Decoded, VideoError, decode, decode_spans, packets
from extract.decode import reader as decoding
from extract.decode.jobs import Plan, decode_job
from extract.decode.packets import VideoFile, duration_of
from extract.decode.transform import Preprocessing
from extract.listing.videos import Video, list_videos, youtube_id
from extract.listing.windows import cut_windows, file_lengths, resolve_windowing, window_spans
from extract.options import Options
from extract.sampling import segment_centers
from extract.workers.rows import make_jobs
from listings import touch, write
from videos import (
    DOUBTED,
    TRUSTED,
    Whole,
    cut_by_edit_list,
    decode_everything,
    write_repeated,
    write_video,
)

SPANS = [(0.0, 0.2), (0.2, 0.4), (0.1, 0.5), (0.36, 0.4), (0.0, 0.9), (0.84, 0.92), (0.4, 1.2)]
SEE = Preprocessing(32, 40, "bilinear", (0.5,) * 3, (0.5,) * 3)


def centers(num_frames: int) -> np.ndarray:
    return segment_centers(num_frames, 5)


def shown_centers(times: np.ndarray) -> np.ndarray:
    return centers(len(times))


def seconds_of(whole: Whole) -> np.ndarray:
    """The time at which every frame of a plainly decoded video is shown, after its first."""
    return np.sort(np.array(whole.seconds)) - min(whole.seconds)


def expected(whole: Whole, span: tuple[float, float], sample=centers) -> np.ndarray:
    """The frames by the slow way: decode everything, compare each time, sample among the frames
    inside."""
    inside = [
        number
        for number, time in enumerate(seconds_of(whole))
        if span[0] - 1e-9 <= time < span[1] - 1e-9
    ]
    return (
        np.array([inside[number] for number in sample(len(inside))]) if inside else np.empty(0, int)
    )


def assert_spans_are_exact(path: Path, spans=SPANS) -> None:
    """Raises AssertionError unless spans of `path`, all in one pass and each alone, equal those of
    decoding everything."""
    whole = decode_everything(path)
    together = dict(decode_spans(path, [(span, shown_centers) for span in spans]))
    assert sorted(together) == list(range(len(spans)))
    for number, span in enumerate(spans):
        wanted, found = expected(whole, span), together[number]
        if not len(wanted):
            assert isinstance(found, VideoError), span
            continue
        assert isinstance(found, Decoded), f"{span}: {found}"
        alone = decode(path, centers, span=span)
        for decoded in (found.as_chosen(), alone):
            assert decoded.indices.tolist() == wanted.tolist(), span
            assert np.array_equal(decoded.frames, [whole.frames[index] for index in wanted]), span
            np.testing.assert_allclose(decoded.timestamps, seconds_of(whole)[wanted], atol=1e-3)
            assert decoded.num_frames == len(expected(whole, span, np.arange))


@pytest.mark.parametrize("name", TRUSTED)
@pytest.mark.parametrize("kept", [packets._KEPT_BYTES, 0])
def test_spans_are_what_decoding_all_gives(name, kept, tmp_path, monkeypatch):
    monkeypatch.setattr(packets, "_KEPT_BYTES", kept)
    assert_spans_are_exact(write_video(tmp_path / name, **TRUSTED[name]))


@pytest.mark.parametrize("name", [name for name in DOUBTED if not name.startswith("bare")])
def test_spans_of_what_cannot_be_trusted_are_exact_too(name, tmp_path):
    assert_spans_are_exact(write_video(tmp_path / name, **DOUBTED[name]))


@pytest.mark.parametrize(("start", "seconds"), [(0.2, 0.4), (0.3, 10)])
def test_spans_behind_an_edit_list(start, seconds, tmp_path):
    path = write_video(tmp_path / "a.mp4", gop=6, bframes=2, frames=40)
    assert_spans_are_exact(cut_by_edit_list(path, start=start, seconds=seconds))


@settings(max_examples=15)
@given(st.lists(st.tuples(st.integers(0, 2600), st.integers(1, 900)), min_size=1, max_size=8))
def test_any_spans_in_any_order_are_exact(tmp_path_factory, drawn):
    path = tmp_path_factory.getbasetemp() / "any.mp4"
    if not path.exists():
        steps = np.random.default_rng(1).integers(5, 200, 30)
        write_video(path, gop=7, bframes=3, frames=30, pts=np.cumsum(steps).tolist())
    assert_spans_are_exact(
        path, [(start / 1000, (start + length) / 1000) for start, length in drawn]
    )


def test_a_frame_at_the_border_belongs_to_the_span_that_begins_there(tmp_path):
    path = write_video(
        tmp_path / "a.mp4", frames=75, fps=25
    )  # frame 50 is at 2.0 s, in spite of rounding
    before, after = (decode(path, np.arange, span=span) for span in ((0.0, 2.0), (2.0, 3.0)))
    assert (before.indices[-1], after.indices[0]) == (49, 50)
    assert after.timestamps[0] == 2.0
    assert (before.problem, after.problem) == ("", "")


def test_a_span_may_end_while_another_frame_would_have_been_shown():
    file = VideoFile()
    file.times, file.end = np.array([0.0, 0.04, 0.08]), 0.12
    assert file.problem((0.0, 0.16)) == file.problem(None) == ""
    assert file.problem((0.0, 0.17)) == "the file ends at 0.120 s, the span at 0.17 s"


def test_a_span_beyond_the_end_is_cut_and_says_so(tmp_path):
    path = write_video(tmp_path / "a.mp4", frames=50)
    cut = decode(path, np.arange, span=(1.0, 5.0))
    assert cut.indices.tolist() == list(range(25, 50))
    assert cut.problem == "the file ends at 2.000 s, the span at 5 s"
    with pytest.raises(
        VideoError, match=r"no frame of it is shown from 3 to 4 s \(the file ends at 2.000 s"
    ):
        decode(path, np.arange, span=(3.0, 4.0))
    with pytest.raises(VideoError, match=r"no frame of it is shown from 0.01 to 0.03 s$"):
        decode(path, np.arange, span=(0.01, 0.03))


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv"])
def test_a_file_that_breaks_in_the_middle_fails_only_the_spans_behind_the_break(name, tmp_path):
    path = write_video(
        tmp_path / name, frames=100, gop=10, container_options={"movflags": "faststart"}
    )
    content = path.read_bytes()
    whole = decode_everything(path)
    path.write_bytes(content[: len(content) * 6 // 10])
    spans = [(second / 2, second / 2 + 0.5) for second in range(8)]
    for _ in range(2):  # the second time with what the first found
        found = dict(decode_spans(path, [(span, shown_centers) for span in spans]))
        broken = [isinstance(found[number], VideoError) for number in range(8)]
        assert broken == sorted(broken)
        assert 2 <= sum(broken) <= 4
        good = [found[number] for number in range(8 - sum(broken))]
        for span, decoded in zip(spans, good[:-1], strict=False):
            assert decoded.problem == ""
            assert np.array_equal(
                decoded.frames, [whole.frames[index] for index in expected(whole, span)]
            )
        assert all(
            "the file ends at" in found[number].reason for number in range(8) if broken[number]
        )


def test_spans_by_decord_are_those_by_pyav(tmp_path):
    pytest.importorskip("decord")
    path = write_video(tmp_path / "a.mp4", frames=75, gop=10, bframes=2)
    for start in range(0, 70, 4):
        span = (start / 25, (start + 5) / 25)
        ours, theirs = (
            decode(path, np.arange, span=span, decoder=decoder) for decoder in ("pyav", "decord")
        )
        assert ours.indices.tolist() == theirs.indices.tolist() == list(range(start, start + 5))
        assert np.array_equal(ours.frames, theirs.frames)
    assert decode(path, np.arange, span=(2.0, 9.0), decoder="decord").problem.startswith(
        "the file ends at 3.000 s"
    )


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv", "a.ts"])
def test_damage_in_the_middle_is_that_of_the_spans_it_lies_in(name, tmp_path):
    path = write_video(tmp_path / name, frames=100, gop=10, size=(160, 120), bframes=2)
    content = bytearray(path.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 60] = np.random.default_rng(0).bytes(60)
    path.write_bytes(content)
    whole = decode(path, np.arange)
    found = dict(decode_spans(path, [((n / 2, n / 2 + 0.5), shown_centers) for n in range(8)]))
    assert sum(bool(decoded.problem) for decoded in found.values()) <= 2
    assert any(decoded.problem for decoded in found.values()) == bool(whole.problem)
    for decoded in found.values():
        places = [int(np.abs(whole.timestamps - time).argmin()) for time in decoded.timestamps]
        assert np.array_equal(decoded.frames, whole.frames[places])


def test_what_follows_in_one_file_is_read_in_one_pass(tmp_path, monkeypatch):
    """Also over several calls, as in a decode child: the file's packets are read once, and few are
    decoded twice."""
    path = write_video(tmp_path / "a.mp4", frames=400, gop=20, bframes=2)
    looked, fed = [], []
    read, packet = packets.PacketDecoder._read, packets._Redemuxer.packet
    monkeypatch.setattr(packets, "_KEPT_BYTES", 0)
    monkeypatch.setattr(packets.PacketDecoder, "_read", lambda *a: looked.append(1) or read(*a))
    monkeypatch.setattr(
        packets._Redemuxer,
        "packet",
        lambda self, number: fed.append(number) or packet(self, number),
    )
    for first in range(0, 16, 4):
        spans = [((first + number) * 1.0, (first + number + 1) * 1.0) for number in range(4)]
        assert len(dict(decode_spans(path, [(span, shown_centers) for span in spans]))) == 4
    assert len(looked) == 1
    assert len(fed) <= 400 + 3 * 20


def test_an_untrusted_file_is_decoded_on_and_not_again(tmp_path, monkeypatch):
    path = write_video(tmp_path / "a.avi", gop=8, bframes=3, frames=100)
    whole = decode_everything(path)
    begun = []
    every = decoding._all_frames
    monkeypatch.setattr(decoding, "_all_frames", lambda *a: begun.append(1) or every(*a))
    for second in range(4):
        decoded = decode(path, centers, span=(second, second + 1.0))
        assert np.array_equal(decoded.frames, [whole.frames[index] for index in decoded.indices])
    assert (
        len(begun) == 2
    )  # to find the good frames, and to take them, whatever the number of spans
    assert (
        decode(path, centers, span=(1.0, 2.0)).indices.tolist()
        == expected(whole, (1.0, 2.0)).tolist()
    )


def test_a_file_that_changed_is_looked_at_again(tmp_path):
    path = write_video(tmp_path / "a.mp4", frames=50)
    assert decode(path, np.arange, span=(0.0, 10.0)).num_frames == 50
    path.unlink()
    write_video(path, frames=75)
    assert decode(path, np.arange, span=(0.0, 10.0)).num_frames == 75


# -- rows for decode children ----------------------------------------------------------------------------------------


def test_spans_are_prepared_as_the_clips_that_were_cut_out(tmp_path):
    """A part of a file, cut out losslessly at its key frames, gives the same as the span, in all
    views."""
    parts = [
        write_video(tmp_path / f"{gop}.mp4", frames=25, gop=gop, bframes=0) for gop in (5, 7, 25)
    ]
    joined = tmp_path / "joined.mp4"
    with av.open(str(joined), "w") as output:
        stream = None
        for number, part in enumerate(parts):
            with av.open(str(part)) as source:
                video = source.streams.video[0]
                stream = stream or output.add_stream_from_template(video)
                for packet in source.demux(video):
                    if packet.size:
                        packet.pts, packet.dts = (
                            value + number * video.duration for value in (packet.pts, packet.dts)
                        )
                        packet.stream = stream
                        output.mux(packet)
    plan = Plan(frames=4, crops=3, augment_passes=1, preprocessing=SEE, seed=3, decoder="pyav")
    out = np.zeros(3 * plan.row_bytes, np.uint8)
    spans = [("same id", (float(number), number + 1.0)) for number in range(3)]
    results = decode_job((str(joined), spans, plan), out)
    for number, part in enumerate(parts):
        alone = np.zeros(plan.shape, np.uint8)
        cut = prepare_row(str(part), "same id", plan, alone)
        pictures = results[number].pictures(out, plan)
        assert np.array_equal(pictures[results[number].clips], alone)
        assert np.array_equal(results[number].indices, cut.indices + 25 * number)
        np.testing.assert_allclose(results[number].timestamps, cut.timestamps + number, atol=1e-6)
        assert results[number].num_frames == 25


def test_jobs_hold_spans_of_one_file_that_stand_side_by_side():
    plan = Plan(frames=4, crops=1, augment_passes=0, preprocessing=SEE, seed=0, decoder="pyav")
    spans = [(0.0, 1.0), (1.0, 2.0), None, (0.0, 1.0), (0.5, 2.0), (3.0, 4.0)]
    videos = [
        Video(*row[:2], -1, span=row[2]) for row in zip("uvwxyz", "aabbba", spans, strict=True)
    ]
    jobs = make_jobs(videos, plan)
    assert [[row_id for row_id, _ in rows] for _, rows, _ in jobs] == [
        ["u", "v"],
        ["w"],
        ["x", "y"],
        ["z"],
    ]
    assert jobs[2] == ("b", [("x", (0.0, 1.0)), ("y", (0.5, 2.0))], plan)
    assert plan.slot_bytes == plan.rows_per_job * 4 * 32 * 32 * 3
    many = make_jobs([Video("x", "a", -1, span=(0.0, 1.0))] * 50, plan)
    assert [len(rows) for _, rows, _ in many] == [16, 16, 16, 2]
    assert (
        replace(plan, frames=25, preprocessing=replace(SEE, size=224, resize=256)).rows_per_job == 8
    )  # of 3.8 MB each
    assert (
        replace(plan, frames=500, preprocessing=replace(SEE, size=224, resize=256)).rows_per_job
        == 1
    )


def test_a_file_that_cannot_be_read_fails_each_of_its_spans_with_the_reason(broken_clips):
    plan = Plan(frames=4, crops=1, augment_passes=0, preprocessing=SEE, seed=0, decoder="pyav")
    job = (str(broken_clips / "zero_bytes.mp4"), [("a", (0.0, 1.0)), ("b", (1.0, 2.0))], plan)
    found = decode_job(job, np.zeros(plan.slot_bytes, np.uint8))
    assert [error.reason[:17] for error in found] == ["the file is empty"] * 2


# -- tables ----------------------------------------------------------------------------------------------------------


def test_a_csv_of_spans(tmp_path):
    touch(tmp_path, "match.mp4", "other.mp4")
    rows = (
        "match.mp4,goal,10,12.5,train,m1\nother.mp4,foul,0.0004,1,val,m2\nmatch.mp4,foul,2,5,train,m1\n"
        "other.mp4,goal,,,val,m2\n"
    )
    listing = list_videos(write(tmp_path / "l.csv", f"path,label,start,end,split,group\n{rows}"))
    assert [(v.id, v.span, listing.classes[v.label], v.split, v.group) for v in listing.videos] == [
        ("match.mp4#2000-5000", (2.0, 5.0), "foul", "train", "m1"),
        ("match.mp4#10000-12500", (10.0, 12.5), "goal", "train", "m1"),
        ("other.mp4", None, "goal", "val", "m2"),
        ("other.mp4#0-1000", (0.0, 1.0), "foul", "val", "m2"),
    ]
    assert all(video.path == str(tmp_path / video.id.partition("#")[0]) for video in listing.videos)
    assert (
        "3 are spans of untrimmed files, cut while reading; 1 are whole files" in listing.report()
    )


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            "x.mp4,b,5,2",
            "line 3: 5 to 2 s is not a span; it begins at 0 or later, and ends after it begins",
        ),
        ("x.mp4,b,2,2", "line 3: 2 to 2 s is not a span"),
        ("x.mp4,b,-1,2", "line 3: -1 to 2 s is not a span"),
        ("x.mp4,b,1.0001,1.0004", "line 3: 1.0001 to 1.0004 s is not a span"),
        ("x.mp4,b,nan,2", "line 3: 'nan' to '2' are not times"),
        ("x.mp4,b,1,", "line 3: '1' to '' are not times"),
        ("x.mp4,b,one,2", "line 3: 'one' to '2' are not times"),
        ("x.mp4,b,0,1", r"l\.csv line 2 and \S*l\.csv line 3 both list x\.mp4#0-1000"),
    ],
)
def test_spans_that_are_wrong_are_named_by_line(tmp_path, row, message):
    touch(tmp_path, "x.mp4")
    with pytest.raises(InputError, match=message):
        list_videos(write(tmp_path / "l.csv", f"path,label,start,end\nx.mp4,b,0,1\n{row}\n"))


def test_kinetics_over_untrimmed_downloads_and_trimmed_names_win(tmp_path):
    touch(
        tmp_path,
        "train/aaaaaaaaaaa_000003_000013.mp4",
        "train/aaaaaaaaaaa.mp4",
        "train/bbbbbbbbbbb.mkv",
        "c.mp4",
    )
    rows = "yoga,aaaaaaaaaaa,3,13,train\nyoga,bbbbbbbbbbb,7.5,17.5,train\nyoga,ccccccccccc,0,10,train\n"
    rows += "yoga,aaaaaaaaaaa,20,30,train\nyoga,bbbbbbbbbbb,0,10,val\n"
    listing = list_videos(
        write(tmp_path / "l.csv", f"label,youtube_id,time_start,time_end,split\n{rows}")
    )
    assert [(video.id, video.span) for video in listing.videos] == [
        ("train/aaaaaaaaaaa_000003_000013.mp4", None),
        ("train/bbbbbbbbbbb.mkv#7500-17500", (7.5, 17.5)),
        ("train/aaaaaaaaaaa.mp4#20000-30000", (20.0, 30.0)),
    ]
    # The last one is of another split than the folder of its file.
    assert [video.id for video in listing.missing] == [
        "ccccccccccc_000000_000010",
        "bbbbbbbbbbb_000000_000010",
    ]
    assert listing.unlisted == ("c.mp4",)
    assert (
        "2 are spans of untrimmed files, cut while reading; 1 are whole files" in listing.report()
    )
    assert [youtube_id(video.id)[0] for video in listing.videos] == ["a", "b", "a"]
    # Spans of a file are a group, so that a user's own split does not separate them.
    assert [video.group for video in listing.videos] == [
        "",
        "train/bbbbbbbbbbb.mkv",
        "train/aaaaaaaaaaa.mp4",
    ]


def test_a_hundred_thousand_spans_of_one_file_are_listed(tmp_path):
    touch(tmp_path, "long.mp4")
    with (tmp_path / "l.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["path", "label", "start", "end"])
        writer.writerows(
            ["long.mp4", f"c{number % 7}", number / 100, number / 100 + 2]
            for number in range(100_000)
        )
    videos = list_videos(tmp_path / "l.csv").videos
    assert (len(videos), videos[-1].id) == (100_000, "long.mp4#999990-1001990")


# -- windows ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("seconds", "window", "stride", "spans"),
    [
        (10, 4, 4, [(0, 4), (4, 8), (8, 10)]),  # a remainder of exactly half is a window
        (9.999, 4, 4, [(0, 4), (4, 9.999)]),
        (30, 10, 10, [(0, 10), (10, 20), (20, 30)]),
        (34.9, 10, 10, [(0, 10), (10, 20), (20, 34.9)]),
        (35, 10, 10, [(0, 10), (10, 20), (20, 30), (30, 35)]),
        (10, 4, 3, [(0, 4), (3, 7), (6, 10)]),
        (3, 10, 10, [(0, 3)]),
        (0, 10, 5, [(0, 0.001)]),
        (1, 1 / 3, 1 / 3, [(0, 0.333), (0.333, 0.666), (0.666, 1)]),
    ],
)
def test_windows(seconds, window, stride, spans):
    assert window_spans(seconds, window, stride) == spans


@given(st.integers(1, 10**7), st.integers(1, 10**5), st.integers(1, 10**5))
def test_windows_leave_nothing_out(length, window, stride):
    stride = min(stride, window)
    if length // stride > 5000:
        return
    spans = window_spans(length / 1000, window / 1000, stride / 1000)
    assert spans[0][0] == 0
    assert spans[-1][1] == length / 1000
    assert all(after[0] <= before[1] for before, after in pairwise(spans))
    assert all(end - start == pytest.approx(window / 1000) for start, end in spans[:-1])
    if len(spans) > 1:
        assert window / 2000 - 1e-9 <= spans[-1][1] - spans[-1][0] < 1.5 * window / 1000


@pytest.mark.parametrize(
    "name", ["a.mp4", "a.mkv", "a.ts", "a.avi", "late.mkv", "a.webm", "a.gif", "audio.mp4"]
)
def test_the_length_of_a_video_is_when_its_last_frame_goes(name, tmp_path):
    more = {
        "late.mkv": {"pts": [5000 + 40 * n for n in range(60)]},
        "audio.mp4": {"audio": True},
    }.get(name, {})
    more |= {".webm": {"codec": "libvpx-vp9"}, ".gif": {"codec": "gif", "pix_fmt": "rgb8"}}.get(
        Path(name).suffix, {}
    )
    path = write_video(tmp_path / name, frames=60, gop=20, bframes=2, **more)
    assert duration_of(str(path)) == pytest.approx(2.4, abs=0.041)
    last = decode(path, np.arange, span=(2.3, duration_of(str(path)) + 0.001))
    assert last.indices[-1] == 59


def test_the_length_of_what_an_edit_list_leaves(tmp_path):
    path = write_video(tmp_path / "a.mp4", gop=6, bframes=2, frames=40)
    cut = cut_by_edit_list(path, start=0.3, seconds=0.8)
    assert duration_of(str(cut)) == pytest.approx(packets.PacketDecoder(cut).end, abs=0.05)


def test_windows_of_files_of_spans_and_of_what_is_broken(tmp_path):
    write_video(tmp_path / "a.mp4", frames=60)
    write(tmp_path / "b.mp4", b"nothing to see")
    (tmp_path / "clips").mkdir()
    shutil.copy(tmp_path / "a.mp4", tmp_path / "clips" / "c.mp4")
    videos = list_videos(tmp_path).videos
    lengths = file_lengths([video.path for video in videos], timeout=60)
    windows = cut_windows(videos, lengths, 1.0, 1.0)
    assert [video.id for video in windows] == [
        "a.mp4#0-1000",
        "a.mp4#1000-2400",
        "b.mp4",
        "clips/c.mp4#0-1000",
        "clips/c.mp4#1000-2400",
    ]
    table = write(tmp_path / "l.csv", "path,label,start,end\na.mp4,x,0.5,2.4\n")
    assert [video.group for video in windows[:3]] == ["a.mp4", "a.mp4", ""]
    spans = cut_windows(list_videos(table).videos, {}, 1.0, 0.5)
    assert [(video.id, video.span) for video in spans] == [
        ("a.mp4#500-1500", (0.5, 1.5)),
        ("a.mp4#1000-2400", (1.0, 2.4)),
    ]


def test_frames_a_second_are_windows(tmp_path):
    def settled(**changed) -> tuple:
        options = resolve_windowing(Options(tmp_path, "x.zarr", **changed)).with_defaults()
        return options.window, options.stride, options.frames, options.fps

    assert settled() == (None, None, 25, None)
    assert settled(window=10.0) == (10.0, 10.0, 25, None)
    assert settled(window=10.0, stride=5.0, fps=4.0) == (10.0, 5.0, 40, None)
    assert settled(window=4.0, fps=8.0, frames=32) == (4.0, 4.0, 32, None)
    assert settled(fps=4.0) == (6.25, 6.25, 25, None)
    assert settled(fps=4.0, frames=16) == (4.0, 4.0, 16, None)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"window": 0.0}, "--window 0: expected 0.001 to 1,000,000 s"),
        ({"window": float("nan")}, "--window nan"),
        ({"window": 10.0, "stride": -1.0}, "--stride -1"),
        ({"fps": float("inf")}, "--fps inf: expected 0.001 to 1,000,000 frames per second"),
        (
            {"stride": 2.0},
            "--stride 2 needs windows, and is at most their length; give --window too",
        ),
        (
            {"window": 4.0, "fps": 8.0, "frames": 25},
            "--fps 8 shows 32 frames in a window of 4 s, and --frames is 25",
        ),
        (
            {"window": 4.0, "fps": 8.0, "frames": 16},
            "--fps 8 shows 32 frames in a window of 4 s, and --frames is 16",
        ),
        ({"window": 2.0, "stride": 3.0}, "--stride 3 needs windows, and is at most their length"),
    ],
)
def test_windows_that_cannot_be(tmp_path, changed, message):
    with pytest.raises(InputError, match=re.escape(message)):
        resolve_windowing(Options(tmp_path, "x.zarr", **changed))


def test_memory_does_not_grow_with_the_number_of_spans(tmp_path):
    """Spans are returned as soon as they are complete: of 40, no more than two are in memory."""
    short = write_video(tmp_path / "a.mp4", frames=50, gop=10)
    path = write_repeated(tmp_path / "long.mp4", short, 20)
    alive = []
    spans = [(float(second), second + 1.0) for second in range(40)]
    for place, decoded in decode_spans(
        path, [(span, shown_centers) for span in spans], resize=lambda frame: frame.copy()
    ):
        alive.append(place)
        assert decoded.frames.shape[0] == 5
    assert alive == list(range(40))
