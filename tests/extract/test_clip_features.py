"""A store of clips, from the command line to scores: its rows, how it is continued, and its
exports."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from aggregate import evaluate, finetune, train
from extract import __main__ as extract
from extract import export
from extract.backbone.frozen import load_backbone
from extract.cli import run_command
from extract.decode.jobs import Plan, decode_job
from extract.decode.transform import Preprocessing
from extract.store import FeatureStore
from pipelines import export as export_onnx
from pipelines import predict
from video_transformers import make_folder

CLIP = ["--clip-frames", "4", "--clip-fps", "10"]


def run(module, *arguments: object) -> int:
    return run_command(
        module.main, module.Options, prog="command", args=[str(word) for word in arguments]
    )


def extracted(videos: Path, out: Path, backbone: str, *more: object) -> FeatureStore:
    settings = ["--backbone", backbone, "--decode-workers", "1", "--frames", "3", *CLIP]
    assert run(extract, "--videos", videos, "--out", out, *settings, *more) == 0
    return FeatureStore.open(out)


@pytest.fixture(scope="module")
def backbone(tmp_path_factory) -> str:
    """A small network that takes clips; larger ones are in test_video_models.py."""
    folder = tmp_path_factory.mktemp("videomae")
    make_folder(folder, "videomae")
    return f"hf/{folder}"


@pytest.fixture(scope="module")
def videos(tmp_path_factory, demo_clips: Path) -> Path:
    """k/train and k/val, two classes of two clips each."""
    folder = tmp_path_factory.mktemp("clips") / "k"
    clips = demo_clips / "exercise_mini" / "clips"
    for label in ("barbell", "dumbbell"):
        for number, path in enumerate(sorted((clips / label).glob("*.mp4"))[:4]):
            target = folder / ("val" if number % 2 else "train") / label / path.name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.symlink_to(path)
    return folder


@pytest.fixture(scope="module")
def store(videos: Path, backbone: str) -> FeatureStore:
    return extracted(videos, videos.parent / "clips.zarr", backbone)


def clips_of(
    path: Path, video_id: str, store: FeatureStore, preprocessing: Preprocessing
) -> np.ndarray:
    """uint8 [T, L, size, size, 3] by the decode job alone."""
    plan = Plan(3, 1, 0, preprocessing, clip_length=4, clip_fps=10.0)
    out = np.zeros(plan.row_bytes, np.uint8)
    [prepared] = decode_job((str(path), [(video_id, None)], plan), out)
    row = store.ids.tolist().index(video_id)
    assert store.frame_indices[row, 0].tolist() == prepared.indices[0].tolist()
    np.testing.assert_array_equal(store.timestamps[row, 0], prepared.timestamps[0])
    return prepared.pictures(out, plan)[prepared.clips[0]]


def test_features_are_the_backbones_of_each_clip(
    store: FeatureStore, videos: Path, backbone: str
) -> None:
    assert (len(store), store.frames_per_video, store.dim) == (8, 3, 32)
    assert store.provenance["clips"] == {"frames": 4, "fps": 10.0, "per_clip": "mean", "rows": 1}
    name = store.ids[0]
    options = {
        "device": "cpu",
        "precision": store.provenance["precision"],
        "clip_frames": 4,
        "clip_fps": 10.0,
    }
    network = load_backbone(backbone, weights="pretrained", **options)
    expected = network(clips_of(videos / name, name, store, network.preprocessing))
    np.testing.assert_array_equal(store.gather(np.array([0]), np.arange(3))[0], expected)


@pytest.mark.parametrize(
    "change", [["--clip-frames", "5"], ["--clip-fps", "9"], ["--per-clip", "time"]]
)
def test_a_store_is_not_continued_with_other_clips(
    store: FeatureStore, videos: Path, backbone: str, change: list, capsys
) -> None:
    settings = ["--backbone", backbone, "--frames", "3", *CLIP]
    assert run(extract, "--videos", videos, "--out", store.path, *settings, *change) == 2
    error = capsys.readouterr().err
    assert "was made with other settings" in error
    assert "clips" in error


def test_a_row_per_temporal_position(
    store: FeatureStore, videos: Path, backbone: str, tmp_path: Path
) -> None:
    by_time = extracted(videos, tmp_path / "s.zarr", backbone, "--per-clip", "time", "--limit", "1")
    assert by_time.provenance["clips"] == {"frames": 4, "fps": 10.0, "per_clip": "time", "rows": 2}
    assert (by_time.frames_per_video, by_time.dim) == (6, 32)
    times = by_time.timestamps[0, 0].reshape(3, 2)
    assert (times[:, 1] >= times[:, 0]).all()
    assert (times[:, 1] > times[:, 0]).any()
    assert by_time.ids[0] == store.ids[0]
    rows = by_time.gather(np.array([0]), np.arange(6))[0].astype(float).reshape(3, 2, -1).mean(1)
    clips = store.gather(np.array([0]), np.arange(3))[0].astype(float)
    assert np.linalg.norm(rows - clips) < 2e-2 * np.linalg.norm(clips)


def test_views_passes_and_windows_of_clips(videos: Path, backbone: str, tmp_path: Path) -> None:
    more = ["--crops", "3", "--augment-passes", "1", "--window", "0.5", "--limit", "1"]
    store = extracted(videos, tmp_path / "s.zarr", backbone, *more)
    assert list(store.views) == ["center", "crop_left", "crop_right", "augment_0"]
    assert len(store) > 1
    inside = (store.timestamps[:, 0] >= store.starts[:, None]) & (
        store.timestamps[:, 0] < store.ends[:, None]
    )
    assert inside.all()
    views = store.read(np.array([0]))[0]
    assert len({view.tobytes() for view in views}) == 4


def test_exported_to_other_tools_with_their_stride(
    videos: Path, backbone: str, tmp_path: Path
) -> None:
    store = extracted(videos, tmp_path / "s.zarr", backbone, "--fps", "4", "--limit", "2")
    assert run(export, store.path, "--to", "npy", "--out", tmp_path / "npy") == 0
    [array, *_] = sorted((tmp_path / "npy").rglob("*.npy"))
    record = json.loads(Path(f"{str(array)[:-4]}.json").read_text())
    assert np.load(array).shape[1] == 32
    seconds = (
        np.arange(len(record["seconds"])) * record["feat_stride"] + record["num_frames"] / 2
    ) / record["default_fps"]
    np.testing.assert_allclose(seconds, record["seconds"], atol=0.13)
    assert abs(record["default_fps"] / record["feat_stride"] - 4) < 1e-6


def test_a_head_on_clips_is_trained_and_sees_videos(
    store: FeatureStore, videos: Path, backbone: str, tmp_path: Path, capsys, monkeypatch
) -> None:
    arguments = [
        "--agg",
        "tsn",
        "--features",
        store.path,
        "--out",
        tmp_path / "run",
        "--epochs",
        "1",
        "--frames",
        "3",
    ]
    assert run(train, *arguments) == 0
    best = tmp_path / "run" / "best.pt"
    common = ["--checkpoint", best, "--split", "val", "--segments", "3"]
    assert run(evaluate, *common, "--features", store.path, "--out", tmp_path / "store.h5") == 0
    assert run(evaluate, *common, "--videos", videos, "--out", tmp_path / "videos.h5") == 0
    from aggregate.scores import Scores

    from_store, from_videos = (Scores.load(tmp_path / f"{name}.h5") for name in ("store", "videos"))
    assert list(from_store.ids) == list(from_videos.ids)
    np.testing.assert_allclose(from_store.logits, from_videos.logits, atol=3e-2, rtol=3e-2)
    capsys.readouterr()
    [clip, *_] = sorted((videos / "val").rglob("*.mp4"))
    assert run(predict, clip, "--checkpoint", best, "--segments", "3") == 0
    shown = capsys.readouterr().out
    assert "dumbbell" in shown
    # Buffers of one clip: every video comes in parts, and the scores are the same.
    monkeypatch.setattr("extract.decode.jobs._MAX_CLIP_SLOT_BYTES", 1)
    in_parts = tmp_path / "parts.h5"
    assert run(evaluate, *common, "--videos", videos, "--out", in_parts) == 0
    np.testing.assert_array_equal(Scores.load(in_parts).logits, from_videos.logits)
    capsys.readouterr()
    assert run(predict, clip, "--checkpoint", best, "--segments", "3") == 0
    assert capsys.readouterr().out == shown
    assert run(export_onnx, "--checkpoint", best, "--out", tmp_path / "model.onnx") == 2
    refused = f"sees clips of {backbone}; only checkpoints that see single frames"
    assert refused in capsys.readouterr().err
    arguments = ["--model", "tsn", "--videos", videos, "--backbone", backbone]
    assert run(finetune, *arguments, "--out", tmp_path / "f") == 2
    assert "clip-wise backbones stay frozen" in capsys.readouterr().err


def test_more_clips_than_a_buffer_holds(
    videos: Path, backbone: str, tmp_path: Path, monkeypatch, store: FeatureStore
) -> None:
    """Buffers hold one clip, so every row comes in parts, and the store is the same, byte for
    byte."""
    monkeypatch.setattr("extract.decode.jobs._MAX_CLIP_SLOT_BYTES", 1)
    small = extracted(videos, tmp_path / "s.zarr", backbone)
    for name in ("frame_indices", "timestamps", "status"):
        assert np.array_equal(getattr(small, name), getattr(store, name)), name
    rows = np.arange(len(store))
    assert torch.equal(torch.from_numpy(small.read(rows)), torch.from_numpy(store.read(rows)))


def test_videos_that_fail_leave_zeros(
    videos: Path, backbone: str, tmp_path: Path, broken_clips: Path
) -> None:
    folder = tmp_path / "k"
    folder.mkdir()
    (folder / "good.mp4").symlink_to(next((videos / "train").rglob("*.mp4")).resolve())
    (folder / "zero.mp4").symlink_to(broken_clips / "zero_bytes.mp4")
    store = extracted(folder, tmp_path / "s.zarr", backbone, "--max-failed", "1")
    assert store.status.tolist() == [1, 3]
    assert not store.read(np.array([1])).any()
    assert (store.frame_indices[1] == -1).all()


def test_a_gpu_decoder_is_refused_for_clips(
    videos: Path, backbone: str, tmp_path: Path, capsys
) -> None:
    arguments = ["--videos", videos, "--out", tmp_path / "s.zarr", "--backbone", backbone, *CLIP]
    assert run(extract, *arguments, "--decoder", "torchcodec-cuda") == 2
    assert not (tmp_path / "s.zarr" / "zarr.json").exists()
    assert capsys.readouterr().err


# -- what a folder of transformers is ----------------------------------------------------------------------------


@pytest.fixture
def own_folder(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    make_folder(folder, "videomae")
    return folder


def change(path: Path, **values: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def test_a_store_is_not_continued_with_another_configuration(
    videos: Path, own_folder: Path, tmp_path: Path, capsys
) -> None:
    """Neither of the network nor of the frames, with random weights too, and a checkpoint is as strict."""
    weights = ("--weights", "random", "--seed", "0")
    store = extracted(videos, tmp_path / "s.zarr", f"hf/{own_folder}", *weights, "--limit", "7")
    assert store.provenance["config"]["hidden_act"] == "gelu"
    assert "id2label" not in store.provenance["config"]
    options = ["--agg", "tsn", "--features", store.path, "--out", tmp_path / "run"]
    assert run(train, *options, "--epochs", "1", "--frames", "3") == 0
    [clip, *_] = sorted((videos / "val").rglob("*.mp4"))
    predicted = [clip, "--checkpoint", tmp_path / "run" / "best.pt", "--segments", "3"]
    # What features do not depend on may change: the names of classes, the version of transformers.
    config, preprocessor = (
        own_folder / name for name in ("config.json", "preprocessor_config.json")
    )
    change(config, id2label={"0": "one"}, transformers_version="6.0")
    change(preprocessor, image_processor_type="VideoMAEFeatureExtractor")
    continued = ["--videos", videos, "--out", store.path]
    assert run(extract, *continued) == 0
    assert run(predict, *predicted) == 0
    for path, values, line in (
        (config, {"hidden_act": "relu"}, "config.hidden_act: gelu in the {}, relu now"),
        (preprocessor, {"resample": 3}, "preprocessing.interpolation: bilinear in the {}, bicubic"),
    ):
        before = path.read_text()
        change(path, **values)
        capsys.readouterr()
        assert run(extract, *continued) == 2
        error = capsys.readouterr().err
        assert line.format("store") in error
        assert "use those, or another --out" in error
        assert run(predict, *predicted) == 2
        error = capsys.readouterr().err
        assert line.format("checkpoint") in error
        assert "use the version of timm, or the files of the model's folder" in error
        path.write_text(before)
    options = ["--model", "tsn", "--videos", videos, "--backbone", "test_resnet"]
    best = tmp_path / "run" / "best.pt"
    assert (
        run(finetune, *options, "--weights", "random", "--init", best, "--out", tmp_path / "f") == 2
    )
    assert "the installed weights of test_resnet are not those" in capsys.readouterr().err
    own_folder.rename(tmp_path / "moved")
    assert run(extract, *continued) == 2
    assert "there is no such folder; if it was moved, put a link" in capsys.readouterr().err


def test_stores_from_before_are_continued_as_they_were_begun(
    videos: Path, own_folder: Path, tmp_path: Path, capsys, monkeypatch
) -> None:
    """Stores and checkpoints that record neither the resizing nor the configuration: Pillow resizes."""
    from extract.backbone import video_models

    preprocessing_of = video_models._hf_preprocessing
    with monkeypatch.context() as before:
        before.setattr(video_models, "_config_record", lambda _: {})
        before.setattr(
            video_models,
            "_hf_preprocessing",
            lambda *options: replace(preprocessing_of(*options), processor="torchvision"),
        )
        old = ("--engine", "torch")  # converted networks hold their records
        name = f"hf/{own_folder}"
        whole = extracted(videos, tmp_path / "whole.zarr", name, *old)
        part = extracted(videos, tmp_path / "part.zarr", name, *old, "--limit", "4")
    assert "processor" not in part.provenance["preprocessing"]
    assert "config" not in part.provenance
    assert run(extract, "--videos", videos, "--out", part.path) == 0
    assert "--processor torchvision" in capsys.readouterr().out
    part, rows = FeatureStore.open(part.path), np.arange(8)
    np.testing.assert_array_equal(part.read(rows), whole.read(rows))
    now = extracted(videos, tmp_path / "now.zarr", name, *old)
    assert now.provenance["preprocessing"]["processor"] == "transformers"
    assert not np.array_equal(now.read(rows), whole.read(rows))
    options = ["--agg", "tsn", "--features", part.path, "--out", tmp_path / "run"]
    assert run(train, *options, "--epochs", "1", "--frames", "3") == 0
    best = ["--checkpoint", tmp_path / "run" / "best.pt", "--segments", "3"]
    scores = {name: tmp_path / f"{name}.h5" for name in ("store", "videos")}
    assert (
        run(evaluate, *best, "--features", part.path, "--split", "val", "--out", scores["store"])
        == 0
    )
    assert (
        run(evaluate, *best, "--videos", videos, "--split", "val", "--out", scores["videos"]) == 0
    )
    from aggregate.scores import Scores

    first, second = (Scores.load(path).logits for path in scores.values())
    np.testing.assert_allclose(first, second, atol=3e-2, rtol=3e-2)
    assert run(evaluate, *best, "--features", now.path, "--out", tmp_path / "now.h5") == 2
    assert "was made with preprocessing" in capsys.readouterr().err
