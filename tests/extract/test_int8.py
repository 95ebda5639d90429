"""--precision int8: calibrated on a seeded sample of the videos, recorded, and with the same bytes
again."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from extract import InputError, RunError
from extract.__main__ import Options, main
from extract.backbone.frozen import load_backbone
from extract.listing.videos import Video
from extract.store import FeatureStore
from extract.workers.calibration import choose_sample
from stores import store_digest

pytest.importorskip("nncf")


def copy_clips(demo_clips: Path, videos: Path, numbers: range) -> None:
    """Copy clips of the same two classes, with the given numbers."""
    for label in ("barbell", "cable"):
        (videos / label).mkdir(parents=True, exist_ok=True)
        clips = sorted((demo_clips / "exercise_mini" / "clips" / label).glob("*.mp4"))
        for number in numbers:
            shutil.copy(clips[number], videos / label / f"{number}.mp4")


def options(videos: Path, out: Path, **changed: object) -> Options:
    settings = {
        "backbone": "tf_efficientnet_lite0",
        "device": "cpu",
        "precision": "int8",
        "frames": 4,
        "block_size": 4,
    }
    return Options(videos=videos, out=str(out), **(settings | changed))


def test_lite0_in_int8(demo_clips: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """int8 is recorded, shown and near fp32."""
    videos = tmp_path / "videos"
    copy_clips(demo_clips, videos, range(5))
    assert main(options(videos, tmp_path / "a.zarr")) == 0
    printed = capsys.readouterr().out
    store = FeatureStore.open(tmp_path / "a.zarr")
    numbers = store.provenance["quantization"]
    assert store.provenance["precision"] == "int8"
    assert {name: numbers[name] for name in ("seed", "videos", "of", "frames", "held_out")} == {
        "seed": 0,
        "videos": 10,
        "of": 10,
        "frames": 96,
        "held_out": 24,
    }
    assert json.loads(json.dumps(numbers)) == numbers
    error = numbers["relative_error"]
    assert f"in int8, relative error {error:.2g} against fp32 on 24 held-out frames" in printed
    assert 0.02 < error < 0.4  # 0.19 on frames of all clips

    assert main(options(videos, tmp_path / "fp32.zarr", precision="fp32")) == 0
    exact = FeatureStore.open(tmp_path / "fp32.zarr").read(slice(0, 10)).astype(np.float64)
    features = store.read(slice(0, 10)).astype(np.float64)
    assert 0.02 < np.linalg.norm(features - exact) / np.linalg.norm(exact) < 0.4


def test_another_cache_gives_the_same_bytes_and_a_store_continues(
    demo_clips: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It continues with new videos, and with auto."""
    small = {"backbone": "test_resnet", "weights": "random"}
    videos = tmp_path / "videos"
    copy_clips(demo_clips, videos, range(5))
    for name in ("a", "again"):
        monkeypatch.setenv("HGNL_CACHE", str(tmp_path / f"cache of {name}"))
        changed = {"threads": 2} if name == "again" else {}
        assert main(options(videos, tmp_path / f"{name}.zarr", **small, **changed)) == 0
    assert store_digest(tmp_path / "again.zarr") == store_digest(tmp_path / "a.zarr")
    store = FeatureStore.open(tmp_path / "a.zarr")

    copy_clips(demo_clips, videos, range(5, 6))
    assert main(options(videos, tmp_path / "a.zarr", **small, precision="auto")) == 0
    grown = FeatureStore.open(tmp_path / "a.zarr")
    assert len(grown) == 12
    assert grown.provenance == store.provenance


def videos_of(count: int) -> list[Video]:
    return [Video(f"{number}.mp4", f"/v/{number}.mp4", 0) for number in range(count)]


def test_the_sample_is_a_function_of_the_seed_and_the_videos() -> None:
    videos = videos_of(100)
    sample = choose_sample(videos, None, seed=1)
    assert sample == choose_sample(videos, None, seed=1)
    assert sample != choose_sample(videos, None, seed=2)
    assert (len(set(sample.videos)), sample.num_rows) == (40, 100)


class FakeStore:
    def __init__(self, count: int):
        self.ids, self.provenance = (
            np.array([f"{number}.mp4" for number in range(200)]),
            {"quantization": {"of": count}},
        )


def test_a_store_keeps_its_sample_and_names_what_is_gone() -> None:
    before = choose_sample(videos_of(100), None, seed=1)
    assert choose_sample(videos_of(200), FakeStore(100), seed=1) == before
    lost = [video for video in videos_of(200) if video != before.videos[0]]
    with pytest.raises(
        InputError, match=re.escape(f"'{before.videos[0].id}', which the store's int8 network was")
    ):
        choose_sample(lost, FakeStore(100), seed=1)


def test_int8_where_it_cannot_be(
    tmp_path: Path, demo_clips: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clip = next((demo_clips / "exercise_mini" / "clips").rglob("*.mp4"))
    with pytest.raises(
        InputError, match="--precision int8 is calibrated on at least 2 videos, here is 1"
    ):
        main(options(clip, tmp_path / "a.zarr"))
    with pytest.raises(InputError, match="--precision int8 is OpenVINO's, on a CPU"):
        load_backbone(
            "test_resnet", weights="random", device="cpu", precision="int8", engine="torch"
        )
    with pytest.raises(
        InputError, match="--precision int8 is calibrated on the videos of an extraction; here use"
    ):
        load_backbone("test_resnet", weights="random", device="cpu", precision="int8")
    for number in range(2):
        (tmp_path / f"{number}.mp4").write_bytes(b"")
    small = options(tmp_path, tmp_path / "a.zarr", backbone="test_resnet", weights="random")
    with pytest.raises(
        RunError, match="--precision int8: too few videos can be read to calibrate on"
    ):
        main(small)
    monkeypatch.setattr(
        "importlib.util.find_spec", lambda name: None if name == "nncf" else object()
    )
    with pytest.raises(
        InputError, match=r"--precision int8 needs nncf; pip install 'hgnl-video\[int8\]'"
    ):
        main(replace(small, out=str(tmp_path / "b.zarr")))
