"""Untrimmed videos of real clips, as users have them: extracted by spans and by windows, killed
halfway, exported for detection."""

import csv
import json
import os
import shutil
import subprocess
import time
from functools import partial
from pathlib import Path

import av
import numpy as np
import pytest

from aggregate.data.frames import VideoFrames
from decode_jobs import crash_at_four_seconds
from extract import InputError
from extract.__main__ import main
from extract.cli import run_command
from extract.decode.jobs import Plan
from extract.decode.transform import Preprocessing
from extract.export import Options as ExportOptions
from extract.export import main as export
from extract.listing.videos import list_videos
from extract.store import FAILED, OK, PARTIAL, FeatureStore
from extract.store.corrections import upgrade
from extract.store.damage import damaged_columns
from extract.workers import driver
from extract.workers.rows import RowDecoder
from extractions import committed_blocks, start_held
from extractions import options as small_options
from ffmpeg import needs_torchcodec
from stores import store_digest
from untrimmed import cut_out, join_clips

LARGER = {"frames": 4, "block_size": 8}
options = partial(small_options, **LARGER)
CLIPS = Path(__file__).parents[2] / "pipelines" / "clips" / "exercise_mini" / "clips"


@pytest.fixture(scope="module")
def untrimmed(tmp_path_factory) -> Path:
    """A folder with two videos of ten clips each, 20 s, and `spans.csv` with the position of each
    clip."""
    root = tmp_path_factory.mktemp("untrimmed") / "videos"
    root.mkdir()
    rows = ["path,label,start,end,split"]
    for name, split in (("first.mp4", "train"), ("second.mp4", "val")):
        clips = [
            sorted((CLIPS / label).glob("*.mp4"))[place]
            for place in range(5)
            for label in ("barbell", "cable")
        ]
        clips = clips if split == "train" else clips[::-1]
        spans = join_clips(root / name, clips)
        for clip, (start, end) in zip(clips, spans, strict=True):
            rows.append(f"{name},{clip.parent.name},{start:.3f},{end:.3f},{split}")
    (root.parent / "spans.csv").write_text("\n".join(rows) + "\n")
    return root


@pytest.fixture(scope="module")
def by_spans(untrimmed, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("spans") / "spans.zarr"
    assert main(options(untrimmed.parent / "spans.csv", out, root=untrimmed)) == 0
    return out


@pytest.fixture(scope="module")
def by_windows(untrimmed, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("windows") / "windows.zarr"
    assert main(options(untrimmed, out, window=3.0)) == 0
    return out


def test_features_of_spans_are_those_of_clips_cut_out_without_loss(untrimmed, by_spans, tmp_path):
    store = FeatureStore.open(by_spans)
    assert store.status.tolist() == [OK] * 20
    assert store.ids[:2].tolist() == ["first.mp4#0-2000", "first.mp4#2000-4000"]
    assert (store.starts[1], store.ends[1]) == (2.0, 4.0)
    assert store.num_frames.tolist() == [16] * 20
    assert (store.timestamps[1, 0] >= 2.0).all()
    (tmp_path / "clips").mkdir()
    for row in range(len(store)):
        name, span = store.ids[row].partition("#")[0], (store.starts[row], store.ends[row])
        cut_out(tmp_path / "clips" / f"{row:02d}.mp4", untrimmed / name, span)
    assert main(options(tmp_path / "clips", tmp_path / "clips.zarr")) == 0
    clips = FeatureStore.open(tmp_path / "clips.zarr")
    assert np.isnan(clips.starts).all()
    np.testing.assert_array_equal(clips.read(slice(0, 20)), store.read(slice(0, 20)))
    np.testing.assert_allclose(
        clips.timestamps + store.starts[:, None, None], store.timestamps, atol=1e-4
    )


def test_spans_in_one_pass_are_spans_one_by_one(untrimmed, by_spans, tmp_path):
    """Blocks of one row, in an order of their own, make every span be decoded alone."""
    with (untrimmed.parent / "spans.csv").open() as file:
        rows = list(csv.reader(file))
    table = tmp_path / "shuffled.csv"
    table.write_text("\n".join(",".join(row) for row in [rows[0], *rows[:0:-1]]) + "\n")
    assert main(options(table, tmp_path / "one.zarr", block_size=1, root=untrimmed)) == 0
    one, together = FeatureStore.open(tmp_path / "one.zarr"), FeatureStore.open(by_spans)
    order = [together.ids.tolist().index(name) for name in one.ids]
    np.testing.assert_array_equal(one.read(slice(0, 20)), together.read(slice(0, 20))[order])


def test_windows_are_rows_with_all_of_the_video(by_windows, capsys):
    store = FeatureStore.open(by_windows)
    assert store.status.tolist() == [OK] * len(store)
    assert store.ids.tolist()[:2] == ["first.mp4#0-3000", "first.mp4#3000-6000"]
    # 20 s in windows of 3 s: the remainder of 2 s is a window.
    assert store.ids.tolist()[6] == "first.mp4#18000-20000"
    assert store.num_frames.sum() == 2 * 160
    assert store.provenance["sampling"]["window"] == 3.0


def test_the_same_command_goes_on_and_another_window_is_refused(
    untrimmed, by_windows, tmp_path, capsys
):
    out = tmp_path / "w.zarr"
    shutil.copytree(by_windows, out)
    assert main(options(untrimmed, out, window=3.0)) == 0
    assert "14 done before" in capsys.readouterr().out
    for other in ({"window": 4.0}, {"window": 3.0, "stride": 1.5}):
        with pytest.raises(InputError, match=r"(window|stride): 3\.0 in the store"):
            main(options(untrimmed, out, **other))
    assert main(options(untrimmed, out)) == 0
    said = capsys.readouterr().out
    assert "--window 3.0" in said
    assert "14 done before" in said


def test_kill_9_in_the_middle_of_a_file_and_resume_gives_the_same_bytes(untrimmed, tmp_path):
    assert main(options(untrimmed, tmp_path / "whole.zarr", window=1.0)) == 0
    out = tmp_path / "killed.zarr"
    quiet = {"output": subprocess.DEVNULL}
    child = start_held(untrimmed, out, tmp_path, "second.mp4", **quiet, **LARGER, window=1)
    while child.poll() is None and not committed_blocks(out):
        time.sleep(0.002)
    child.kill()
    child.wait()
    assert FeatureStore.open(out).missing_blocks()
    assert main(options(untrimmed, out, window=1.0)) == 0
    assert store_digest(out) == store_digest(tmp_path / "whole.zarr")


def test_a_broken_file_fails_only_the_windows_behind_the_break(
    untrimmed, by_windows, tmp_path, capsys
):
    (tmp_path / "broken").mkdir()

    with (
        av.open(str(untrimmed / "first.mp4")) as source,
        av.open(str(tmp_path / "fast.mp4"), "w", options={"movflags": "faststart"}) as output,
    ):
        stream = output.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(video=0):
            if packet.size:
                packet.stream = stream
                output.mux(packet)
    content = (tmp_path / "fast.mp4").read_bytes()
    (tmp_path / "broken" / "first.mp4").write_bytes(content[: len(content) // 2])
    (tmp_path / "broken" / "none.mp4").write_bytes(b"")
    assert main(options(tmp_path / "broken", tmp_path / "b.zarr", window=3.0)) == 3
    store, whole = FeatureStore.open(tmp_path / "b.zarr"), FeatureStore.open(by_windows)
    status = store.status.tolist()
    good = status.count(OK)
    assert 2 <= good <= 5
    assert status[:good] == [OK] * good
    assert PARTIAL not in status[good + 1 :]
    assert status[-1] == FAILED
    assert "the file is empty" in store.errors[-1]
    assert "the file ends at" in store.errors[-2]
    np.testing.assert_array_equal(store.read(slice(0, good)), whole.read(slice(0, good)))


@pytest.mark.parametrize(
    "decoder", ["pyav", pytest.param("torchcodec-cpu", marks=needs_torchcodec())]
)
def test_a_decoder_that_crashes_fails_one_span_and_not_those_around_it(
    decoder, untrimmed, by_spans, tmp_path, monkeypatch
):
    """With torchcodec, the job of several spans fails on the device, then in a child, and then runs
    span by span."""

    class Crashing(driver.Worker):
        decode_job = staticmethod(crash_at_four_seconds)

    monkeypatch.setattr(driver, "Worker", Crashing)
    out = tmp_path / "c.zarr"
    changed = {"root": untrimmed, "max_failed": 0.2, "decoder": decoder, "device": "cpu"}
    assert main(options(untrimmed.parent / "spans.csv", out, **changed)) == 0
    store, whole = FeatureStore.open(out), FeatureStore.open(by_spans)
    failed = np.flatnonzero(store.status == FAILED)
    assert store.ids[failed].tolist() == ["first.mp4#4000-6000", "second.mp4#4000-6000"]
    assert all("the decoding process died 3 times" in reason for reason in store.errors[failed])
    good = np.flatnonzero(store.status == OK)
    got, expected = store.read(good), whole.read(good)
    if decoder == "pyav":
        np.testing.assert_array_equal(got, expected)
    assert np.linalg.norm(got - expected) < 0.05 * np.linalg.norm(expected)


# -- dense features --------------------------------------------------------------------------------------------------


def exported(store: Path, out: Path, capsys=None) -> tuple[np.ndarray, dict]:
    assert export(ExportOptions(store=str(store), to=Path("npy"), out=out)) == 0
    return np.load(out / "first.mp4.npy"), json.loads((out / "first.mp4.json").read_text())


def actionformer_seconds(record: dict, row) -> np.ndarray:
    """ActionFormer's own grid (libs/datasets): the time of row i is that of the middle frame of its
    clip i."""
    return (row * record["feat_stride"] + 0.5 * record["num_frames"]) / record["default_fps"]


def test_dense_features_are_the_windows_joined_in_time(by_windows, tmp_path):
    array, record = exported(by_windows, tmp_path / "dense")
    store = FeatureStore.open(by_windows)
    rows = np.arange(7)
    assert (array.dtype, array.shape[1]) == (np.float32, store.dim)
    assert record["frames_a_second"] == pytest.approx(4 / 3)
    by_time = {
        round(float(time), 3): feature
        for row in rows
        for time, feature in zip(
            store.timestamps[row, 0], store.read(slice(row, row + 1))[0, 0], strict=True
        )
    }
    for second, feature in zip(record["seconds"], array, strict=True):
        np.testing.assert_array_equal(feature, by_time[round(second, 3)].astype(np.float32))
    assert np.abs(
        actionformer_seconds(record, np.arange(len(array))) - record["seconds"]
    ).max() == pytest.approx(record["largest_error"], abs=1e-5)
    assert record["largest_error"] <= 0.5 / record["frames_a_second"]
    assert (record["windows"], record["of"], record["backbone"]) == (7, 7, "test_resnet")


@pytest.mark.parametrize(
    "changed",
    [{"window": 2.0}, {"window": 2.0, "stride": 1.0}, {"fps": 2.0, "window": 2.0}, {"fps": 2.0}],
)
def test_annotated_seconds_find_their_rows_and_come_back(changed, untrimmed, tmp_path):
    assert main(options(untrimmed, tmp_path / "w.zarr", **changed)) == 0
    array, record = exported(tmp_path / "w.zarr", tmp_path / "dense")
    assert (
        len(array) == len(record["seconds"]) == 40
    )  # 2 per second for 20 s, for each way to request them
    assert record["frames_a_second"] == pytest.approx(2.0)
    # ActionFormer maps seconds to its grid by seconds * fps / stride - offset.
    offset = 0.5 * record["num_frames"] / record["feat_stride"]
    for second in (0.3, 7.0, 13.37, 19.6):
        row = second * record["default_fps"] / record["feat_stride"] - offset
        assert actionformer_seconds(record, row) == pytest.approx(second)
        assert record["seconds"][round(row)] == pytest.approx(
            second, abs=0.26 + record["largest_error"]
        )
    assert record["largest_error"] <= 1 / 8 + 1e-3  # of frames that are 1/8 s apart


def test_whole_files_and_holes(by_spans, untrimmed, tmp_path, capsys):
    assert main(options(untrimmed / "first.mp4", tmp_path / "whole.zarr", frames=10)) == 0
    array, record = exported(tmp_path / "whole.zarr", tmp_path / "whole")
    assert len(array) == 10
    assert record["largest_error"] <= 0.13
    table = tmp_path / "holes.csv"
    table.write_text(
        "path,label,start,end\nfirst.mp4,a,0,2\nfirst.mp4,a,8,10\nsecond.mp4,a,0,2\nsecond.mp4,a,1,3\n"
    )
    assert main(options(table, tmp_path / "holes.zarr", root=untrimmed)) == 0
    assert (
        export(
            ExportOptions(
                store=str(tmp_path / "holes.zarr"), to=Path("npy"), out=tmp_path / "holes"
            )
        )
        == 0
    )
    said = capsys.readouterr().out
    assert "left out: first.mp4: there is nothing from 2 to 8 s" in said
    assert [path.name for path in sorted((tmp_path / "holes").iterdir())] == [
        "second.mp4.json",
        "second.mp4.npy",
    ]


def test_where_dense_features_go_is_asked_for(by_windows, tmp_path):
    for to, out in (("npy", None), (str(tmp_path / "x.h5"), str(tmp_path / "y"))):
        args = [str(by_windows), "--to", to, *(["--out", out] if out else [])]
        assert run_command(export, ExportOptions, prog="export", args=args) == 2
    assert not os.listdir(tmp_path)


# -- older stores ----------------------------------------------------------------------------------------------------


def test_a_store_of_the_earlier_schema_takes_spans_once_it_has_this_one(tmp_path):
    shutil.copytree(Path(__file__).parents[1] / "compat" / "store", tmp_path / "old.zarr")
    store = FeatureStore.open(tmp_path / "old.zarr", writable=True)
    assert np.isnan(store.starts).all()
    assert (store.sources == -1).all()
    before = {
        name: getattr(store, name) for name in ("ids", "labels", "splits", "errors", "timestamps")
    }
    upgrade(store)
    store.append(ids=["a#0-1000"], starts=[0.0], ends=[1.0], labels=[0], splits=[""], groups=[""])
    again = FeatureStore.open(tmp_path / "old.zarr")
    assert again.ids[-1] == "a#0-1000"
    assert again.ends[-1] == 1.0
    assert np.isnan(again.starts[:-1]).all()
    for name, values in before.items():
        np.testing.assert_array_equal(getattr(again, name)[:-1], values)
    assert not damaged_columns(again)


def test_training_end_to_end_sees_the_span_and_not_the_file(untrimmed, tmp_path):
    listing = list_videos(untrimmed.parent / "spans.csv", root=untrimmed)
    assert [sum(listing.class_counts(split)) for split in ("train", "val")] == [10, 10]
    see = Preprocessing(32, 40, "bilinear", (0.5,) * 3, (0.5,) * 3)
    plan = Plan(frames=4, crops=1, augment_passes=0, preprocessing=see)
    video = listing.videos[3]
    assert video.span is not None
    whole = list_videos(cut_out(tmp_path / "cut.mp4", Path(video.path), video.span)).videos
    with RowDecoder.start(plan, workers=1, timeout=60) as decoder:
        [[of_span]] = VideoFrames([video], plan, decoder).test_batches(batch_size=1)
        [[of_clip]] = VideoFrames(whole, plan, decoder).test_batches(batch_size=1)
    np.testing.assert_array_equal(of_span.x.numpy(), of_clip.x.numpy())
