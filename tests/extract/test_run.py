"""Whole extractions as a user runs them: real small clips, a tiny backbone, and faults of machines
and files."""

import errno
import json
import pickle
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import fields
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from extract import InputError, RunError
from extract.__main__ import Options, main
from extract.cli import run_command
from extract.export import Options as ExportOptions
from extract.export import main as export
from extract.listing.videos import Video
from extract.store import FAILED, OK, PARTIAL, PENDING, FeatureStore, RunLog
from extract.store.damage import damaged_rows
from extract.store.summary import status_table
from extract.verify import Options as VerifyOptions
from extract.verify import main as verify
from extract.workers import driver
from extract.workers.blocks import Block
from extractions import command as small_command
from extractions import committed_blocks, decode_children, start_held
from extractions import options as small_options
from simulated import HeldWorker
from stores import store_digest

options = partial(small_options, block_size=4)
command = partial(small_command, block_size=4)


@pytest.fixture(scope="module")
def clips(tmp_path_factory) -> Path:
    """Twelve real clips in two splits and two classes, with equal stems in different folders."""
    root = tmp_path_factory.mktemp("clips")
    source = Path(__file__).parents[2] / "pipelines" / "clips" / "exercise_mini" / "clips"
    for part, split in enumerate(("train", "val")):
        for label in ("barbell", "cable"):
            folder = root / split / label
            folder.mkdir(parents=True)
            for number, clip in enumerate(
                sorted((source / label).glob("*.mp4"))[part * 3 : part * 3 + 3]
            ):
                shutil.copy(clip, folder / f"clip_{number}.mp4")
    return root


@pytest.fixture(scope="module")
def undisturbed(clips, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("undisturbed") / "feats.zarr"
    assert main(options(clips, out)) == 0
    return out


def test_a_folder_becomes_a_store(clips, undisturbed):
    store = FeatureStore.open(undisturbed)
    assert len(store) == 12
    assert store.classes == ("barbell", "cable")
    assert store.ids[0] == "train/barbell/clip_0.mp4"
    assert store.status.tolist() == [OK] * 12
    assert set(store.splits) == {"train", "val"}
    assert store.num_frames.tolist() == [16] * 12
    assert store.frame_indices[0, 0].tolist() == [2, 8, 13]
    np.testing.assert_allclose(store.timestamps[0, 0], [2 / 8, 8 / 8, 13 / 8], atol=1e-4)
    assert store.provenance["backbone"] == "test_resnet"
    features = store.gather(np.arange(12), np.arange(3)).astype(np.float32)
    assert np.isfinite(features).all()
    assert len(np.unique(features.round(3), axis=0)) == 12  # all clips have different features


def test_a_run_can_be_looked_at(clips, tmp_path, capsys):
    assert main(options(clips, tmp_path / "a.zarr")) == 0
    said = capsys.readouterr().out
    for expected in (
        "12 videos x 1 views x 3 frames",
        "to do     12 videos (36 frames) in 3 blocks",
        "frames/s",
        "fp32",
    ):
        assert expected in said
    assert main(options(clips, tmp_path / "a.zarr")) == 0
    assert "to do     0 videos (0 frames) in 0 blocks, 12 done before" in capsys.readouterr().out


def test_features_do_not_depend_on_blocks_or_neighbors(clips, undisturbed, tmp_path):
    assert main(options(clips, tmp_path / "b.zarr", block_size=5)) == 0
    one, other = FeatureStore.open(undisturbed), FeatureStore.open(tmp_path / "b.zarr")
    np.testing.assert_array_equal(one.read(slice(0, 12)), other.read(slice(0, 12)))


def test_kill_9_at_any_moment_and_resume_gives_the_same_bytes(clips, undisturbed, tmp_path):
    out = tmp_path / "feats.zarr"
    rng = random.Random(0)
    log = (tmp_path / "log").open("w")
    kills = 0
    with log:
        while not out.exists() or FeatureStore.open(out).missing_blocks():
            before = len(committed_blocks(out))
            run = subprocess.Popen(command(clips, out, block_size=1), stdout=log, stderr=log)
            while run.poll() is None and len(committed_blocks(out)) < before + 4:
                time.sleep(0.001)
            time.sleep(rng.random() * 0.05)
            kills += run.poll() is None
            run.kill()
            run.wait()
            assert kills < 12
    assert kills >= 2
    assert main(options(clips, out, block_size=1)) == 0
    whole = tmp_path / "whole.zarr"
    assert main(options(clips, whole, block_size=1)) == 0
    assert store_digest(out) == store_digest(whole)
    # Committed blocks were not extracted again, except for a logged block and one in progress at
    # each kill.
    assert len(committed_blocks(out)) <= 12 + kills


def test_a_lost_decode_child_costs_nothing(clips, undisturbed, tmp_path, monkeypatch):
    """A child is killed after each of the first three blocks, while other blocks are in progress or
    to come."""
    killed: list[int] = []
    commit = FeatureStore.commit

    def commit_and_kill(self, *outcomes):
        commit(self, *outcomes)
        for child in decode_children() if len(killed) < 3 else ():
            child.kill()
            killed.append(child.pid)

    monkeypatch.setattr(FeatureStore, "commit", commit_and_kill)
    assert main(options(clips, tmp_path / "a.zarr")) == 0
    assert killed
    assert store_digest(tmp_path / "a.zarr") == store_digest(undisturbed)


def test_broken_and_odd_files_end_with_the_right_status(
    codec_clips, broken_clips, tmp_path, capsys
):
    videos = tmp_path / "videos"
    shutil.copytree(codec_clips, videos / "codecs")
    shutil.copytree(broken_clips, videos / "broken")
    (videos / "broken" / "dangling.mp4").symlink_to("nowhere.mp4")
    (videos / "broken" / "text.mp4").write_text("not a video, just words\n" * 40)
    assert main(options(videos, tmp_path / "a.zarr", max_failed=0.05)) == 3
    said = capsys.readouterr().out
    store = FeatureStore.open(tmp_path / "a.zarr")
    status = dict(zip(store.ids.tolist(), store.status.tolist(), strict=True))
    errors = dict(zip(store.ids.tolist(), store.errors.tolist(), strict=True))
    assert {name for name in status if status[name] == OK} == {
        name for name in status if name.startswith("codecs/")
    }
    partial = {"broken/truncated_faststart.mp4", "broken/bitflips.mp4"}
    assert {name for name in status if status[name] == PARTIAL} == partial
    failed = {name for name in status if status[name] == FAILED}
    assert failed == {
        f"broken/{name}"
        for name in (
            "zero_bytes.mp4",
            "html_error_page.mp4",
            "random_bytes.mp4",
            "truncated_no_moov.mp4",
            "audio_only.mp4",
            "dangling.mp4",
            "text.mp4",
        )
    }
    for name in failed | partial:
        assert errors[name], name
        assert errors[name] in said
    assert "7 of 31 videos failed, more than --max-failed 0.05 allows" in said
    rows = np.flatnonzero(store.status == FAILED)
    assert not store.gather(rows, np.arange(3)).any()


def test_a_speed_is_told_of_runs_that_read_a_video_only(clips, undisturbed, tmp_path, capsys):
    assert "measured: backbone " in status_table(FeatureStore.open(undisturbed))
    (tmp_path / "a.mp4").write_bytes(b"")
    assert main(options(tmp_path / "a.mp4", tmp_path / "f.zarr")) == 3
    assert "measured" not in capsys.readouterr().out


def test_failed_videos_are_tried_again_and_finished_rows_keep_their_bytes(
    clips, undisturbed, tmp_path
):
    videos = tmp_path / "videos"
    shutil.copytree(clips, videos)
    lost = videos / "train" / "barbell" / "clip_1.mp4"
    good = lost.read_bytes()
    lost.write_bytes(b"")
    out = tmp_path / "a.zarr"
    assert main(options(videos, out, max_failed=0.5)) == 0
    assert FeatureStore.open(out).status.tolist().count(FAILED) == 1
    lost.write_bytes(good)
    assert (
        main(options(videos, out, max_failed=0)) == 3
    )  # a failed video stays failed until --retry-failed
    assert main(options(videos, out, max_failed=0, retry_failed=True)) == 0
    assert store_digest(out) == store_digest(undisturbed)


def test_new_videos_are_appended_and_rows_never_move(clips, tmp_path):
    videos = tmp_path / "videos"
    shutil.copytree(clips / "val", videos / "val")
    out = tmp_path / "a.zarr"
    assert main(options(videos, out)) == 0
    ids, features = FeatureStore.open(out).ids.tolist(), FeatureStore.open(out).read(slice(0, 6))
    shutil.copytree(clips / "train", videos / "train")
    assert main(options(videos, out)) == 0
    store = FeatureStore.open(out)
    assert store.ids.tolist()[:6] == ids
    assert len(store) == 12
    assert store.status.tolist() == [OK] * 12
    np.testing.assert_array_equal(store.read(slice(0, 6)), features)
    assert all(damaged_rows(store, block) == {} for block in range(store.num_blocks))


def test_other_settings_are_refused_and_named(clips, undisturbed, tmp_path):
    before = store_digest(undisturbed)
    with pytest.raises(InputError, match=r"seed: 0 in the store, 1 now"):
        main(options(clips, undisturbed, seed=1))
    with pytest.raises(InputError, match=r"frames: 3 in the store, 4 now"):
        main(options(clips, undisturbed, frames=4))
    assert store_digest(undisturbed) == before


def test_what_cannot_be_written_is_said_and_nothing_is_lost(
    clips, undisturbed, tmp_path, monkeypatch
):
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "dear_diary.txt").write_text("1 January")
    with pytest.raises(InputError, match=r"notes exists and is not a feature store but a folder"):
        main(options(clips, tmp_path / "notes"))
    assert (tmp_path / "notes" / "dear_diary.txt").read_text() == "1 January"
    with pytest.raises(
        InputError, match=r"dear_diary\.txt exists and is not a feature store but a file"
    ):
        main(options(clips, tmp_path / "notes" / "dear_diary.txt"))
    assert not (tmp_path / "notes" / "dear_diary.txt.log").exists()
    with pytest.raises(RunError, match=r"/dev/null: File exists; a folder is needed there"):
        main(options(clips, "/dev/null/feats.zarr"))

    written = FeatureStore.write_block

    def full(self, block, features, rows):
        if block == 1:
            raise OSError(errno.ENOSPC, "No space left on device", str(self.shard_path(block)))
        written(self, block, features, rows)

    out = tmp_path / "a.zarr"
    with monkeypatch.context() as patch:
        patch.setattr(FeatureStore, "write_block", full)
        arguments = command(clips, out)[3:]
        assert run_command(main, Options, prog="python -m extract", args=arguments) == 1
    assert FeatureStore.open(out).missing_blocks() == [1, 2]
    assert main(options(clips, out)) == 0
    assert store_digest(out) == store_digest(undisturbed)


def test_too_little_space_is_seen_before_the_run(clips, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(1000, 990, 10))
    with pytest.raises(RunError, match="its disk has 10 B free"):
        main(options(clips, tmp_path / "a.zarr"))


def test_ctrl_c_leaves_a_store_that_resumes(clips, undisturbed, tmp_path):
    out = tmp_path / "a.zarr"
    many = {"frames": 16, "block_size": 1}
    with (tmp_path / "log").open("w") as log:
        run = start_held(clips, out, tmp_path, "val", output=log, **many)
        while run.poll() is None and not committed_blocks(out):
            time.sleep(0.005)
        run.send_signal(signal.SIGINT)
        assert run.wait(timeout=200) == 130
    assert "Traceback" not in (tmp_path / "log").read_text()
    missing = FeatureStore.open(out).missing_blocks()
    assert 0 < len(missing) < 12
    assert main(options(clips, out, **many)) == 0


def test_a_hanging_video_is_given_up_and_the_run_goes_on(clips, tmp_path, monkeypatch):
    """A decode child gets a real SIGSTOP. Its video fails with a reason, and the others are
    extracted."""
    monkeypatch.setattr(driver, "Worker", HeldWorker)
    monkeypatch.setenv("HGNL_TEST_HELD", str(tmp_path))
    (tmp_path / "stop").touch()
    changed = {"video_timeout": 4.0, "max_failed": 0.2, "decode_workers": 1, "block_size": 1}
    assert main(options(clips, tmp_path / "a.zarr", **changed)) == 0
    assert not (tmp_path / "stop").exists()
    store = FeatureStore.open(tmp_path / "a.zarr")
    assert store.status.tolist().count(FAILED) == 1
    assert "--video-timeout" in store.errors[store.status == FAILED][0]


def test_views_and_passes(clips, tmp_path):
    out = tmp_path / "a.zarr"
    assert main(options(clips, out, crops=10, augment_passes=2, limit=3)) == 0
    store = FeatureStore.open(out)
    assert store.num_views == 12
    assert store.views[:2] == ("center", "center_flip")
    assert store.views[-2:] == ("augment_0", "augment_1")
    assert len(store) == 3
    everything = store.read(slice(0, 3)).astype(np.float32)
    assert len(np.unique(everything[0, :, 0].round(4), axis=0)) == 12
    indices = store.frame_indices
    assert (indices[:, :10] == indices[:, :1]).all()
    assert (indices[:, 10] != indices[:, 0]).any()


def test_verify_names_damage_and_repair_mends_it(clips, undisturbed, tmp_path, capsys):
    out = tmp_path / "a.zarr"
    shutil.copytree(undisturbed, out)
    assert verify(VerifyOptions(store=str(out))) == 0
    shard = FeatureStore.open(out).shard_path(1)
    data = bytearray(shard.read_bytes())
    data[10] ^= 1
    shard.write_bytes(data)
    assert verify(VerifyOptions(store=str(out))) == 1
    said = capsys.readouterr().out
    assert "damaged: train/cable/clip_1.mp4 (row 4)" in said
    assert "12 finished videos in 3 blocks checked, 1 damaged" in said
    assert verify(VerifyOptions(store=str(out), repair=True)) == 0
    assert main(options(clips, out)) == 0
    assert store_digest(out) == store_digest(undisturbed)
    with pytest.raises(InputError, match="memory://x is remote"):
        verify(VerifyOptions(store="memory://x"))


def test_a_damaged_shard_is_not_copied_on(clips, undisturbed, tmp_path):
    out = tmp_path / "a.zarr"
    shutil.copytree(undisturbed, out)
    store = FeatureStore.open(out, writable=True)
    store.set_status(np.array([1]), PENDING)
    shard = store.shard_path(0)
    data = bytearray(shard.read_bytes())
    data[10] ^= 1
    shard.write_bytes(data)
    with pytest.raises(RunError, match=r"a\.zarr is damaged.*--repair"):
        main(options(clips, out))


def test_export_gives_what_was_stored(undisturbed, tmp_path):
    import h5py

    store = FeatureStore.open(undisturbed)
    assert export(ExportOptions(store=str(undisturbed), to=tmp_path / "npy")) == 0
    video = np.load(tmp_path / "npy" / "val" / "cable" / "clip_2.mp4.npy")
    np.testing.assert_array_equal(video, store.read(slice(11, 12))[0])
    assert len(list((tmp_path / "npy").rglob("*.npy"))) == 12
    assert export(ExportOptions(store=str(undisturbed), to=tmp_path / "all.h5")) == 0
    with h5py.File(tmp_path / "all.h5") as file:
        np.testing.assert_array_equal(file["features"][:], store.read(slice(0, 12)))
        assert file["ids"].asstr()[3] == store.ids[3]
        assert file["labels"][:].tolist() == store.labels.tolist()
    with pytest.raises(InputError, match=r"all\.h5 already exists"):
        export(ExportOptions(store=str(undisturbed), to=tmp_path / "all.h5"))


def test_a_remote_store(clips):
    out = "memory://run.zarr"
    assert main(options(clips, out)) == 0
    store = FeatureStore.open(out)
    assert store.status.tolist() == [OK] * 12
    assert np.isfinite(store.read(slice(0, 12)).astype(np.float32)).all()
    assert main(options(clips, out)) == 0
    assert "12 videos" in status_table(store)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"frames": 0}, "--frames 0: expected at least 1"),
        ({"augment_passes": -1}, "--augment-passes -1: expected at least 0"),
        ({"max_failed": 5.0}, "--max-failed 5.0: expected a fraction"),
        ({"video_timeout": 0.0}, "--video-timeout 0.0: expected more than 0"),
        ({"backbone": "resnet51"}, "resnet51"),
        ({"device": "cuda:9"}, "cuda:9"),
        ({"weights": "nowhere.pth"}, "nowhere.pth"),
    ],
)
def test_wrong_options_are_named(clips, tmp_path, changed, message):
    with pytest.raises(InputError, match=message):
        main(options(clips, tmp_path / "a.zarr", **changed))
    assert not (tmp_path / "a.zarr").exists()


def test_help_needs_no_heavy_library():
    """Not even numpy: imports are the slow part of --help."""
    code = (
        "import runpy, sys\nsys.argv = ['x', '--help']\n"
        "try:\n    runpy.run_module('extract', run_name='__main__', alter_sys=True)\n"
        "except SystemExit:\n    print(*sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    heavy = {"torch", "numpy", "timm", "zarr", "av", "h5py", "ray", "fsspec", "openvino", "PIL"}
    assert not heavy & set(done.stdout.splitlines()[-1].split())


def test_unknown_values_are_answered_with_the_known_ones(capsys):
    args = ["--videos", "x", "--out", "y", "--crops", "7"]
    with pytest.raises(SystemExit, match="2"):
        run_command(main, Options, prog="python -m extract", args=args)
    said = capsys.readouterr().err
    assert "'7'" in said
    assert all(f"'{known}'" in said for known in (1, 3, 10))


def test_the_log_tells_what_happened(undisturbed):
    records = RunLog.records(undisturbed)
    assert [record["event"] for record in records[:5]] == [
        "start",
        "block",
        "block",
        "block",
        "end",
    ]
    assert json.loads(json.dumps(records[0]))["options"]["backbone"] == "test_resnet"
    assert records[1]["seconds"]["device"] > 0


def test_a_block_travels_with_every_field_of_its_videos():
    video = Video("a.mp4#1000-2000", "/a.mp4", 1, "train", "somebody", (1.0, 2.0))
    assert all(getattr(video, field.name) != field.default for field in fields(Video))
    block = Block(3, (5, 6), (video, Video("b.mp4", "/b.mp4", -1)))
    assert pickle.loads(pickle.dumps(block)) == block


def test_one_video_whose_features_overflow_fails_alone(clips, undisturbed, tmp_path, capsys):
    """Weights are so large that the features of exactly one clip leave float16's range."""
    largest = np.abs(FeatureStore.open(undisturbed).read(slice(0, 12)).astype(np.float64)).max(
        (1, 2, 3)
    )
    second, first = np.sort(largest)[-2:]
    weights = scaled_weights(65_520 / np.sqrt(first * second), tmp_path / "w.pth")
    out = tmp_path / "a.zarr"
    assert main(options(clips, out, weights=str(weights), max_failed=0.1)) == 0
    store = FeatureStore.open(out)
    (failed,) = np.flatnonzero(store.status == FAILED)
    assert failed == largest.argmax()
    expected = r"features of [1-3] of its 3 frames are not finite in float16 \(computed in fp32\)"
    assert re.fullmatch(expected, store.errors[failed])
    assert store.errors[failed] in capsys.readouterr().out
    assert not store.read(slice(failed, failed + 1)).any()
    assert (store.frame_indices[failed] == -1).all()
    assert np.isfinite(store.read(slice(0, 12)).astype(np.float32)).all()


def test_weights_under_which_all_videos_overflow_stop_the_run(clips, tmp_path):
    weights = scaled_weights(1e12, tmp_path / "w.pth")
    out = tmp_path / "a.zarr"
    with pytest.raises(
        RunError, match=r"of 8 frames have features that are not finite .*are the weights damaged"
    ):
        main(options(clips, out, weights=str(weights)))
    assert FeatureStore.open(out).missing_blocks() == [0, 1, 2]


def scaled_weights(factor: float, path: Path) -> Path:
    """test_resnet with features `factor` times those of its random weights."""
    import torch

    from extract.backbone.model import load_trunk

    state = load_trunk("test_resnet", weights="random").module.state_dict()
    for name, value in state.items():
        if name.startswith(("layer4.0.bn2", "layer4.0.downsample.2")) and name.endswith(
            ("weight", "bias")
        ):
            value *= factor
    torch.save(state, path)
    return path


def test_a_store_goes_on_with_the_engine_that_began_it(clips, undisturbed, tmp_path, capsys):
    """Stores from before OpenVINO record no engine; they continue with PyTorch. Another engine is
    refused."""
    videos = tmp_path / "videos"
    shutil.copytree(clips / "val", videos / "val")
    out = tmp_path / "a.zarr"
    assert main(options(videos, out, engine="torch", precision="bf16")) == 0
    began = FeatureStore.open(out)
    assert "engine" not in began.provenance
    capsys.readouterr()
    shutil.copytree(clips / "train", videos / "train")
    assert main(options(videos, out, precision="auto")) == 0
    assert "in bf16, PyTorch, " in capsys.readouterr().out
    assert FeatureStore.open(out).provenance == began.provenance
    with pytest.raises(InputError, match=r"engine: torch in the store, openvino now"):
        main(options(videos, out, engine="openvino"))
    with pytest.raises(InputError, match=r"engine: openvino in the store, torch now"):
        main(options(clips, undisturbed, engine="torch"))
