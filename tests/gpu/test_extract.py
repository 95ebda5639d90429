"""Whole extractions on a GPU, and decoding on it."""

from pathlib import Path

import numpy as np
import pytest
import torch

from decode_jobs import prepare_row
from device import DEVICE, PRETENDED
from extract import InputError
from extract.__main__ import main
from extract.decode.jobs import Plan
from extract.decode.nvdec import TOLERANCE
from extract.decode.transform import Preprocessing
from extract.options import Options
from extract.store import OK, FeatureStore
from extract.store.summary import status_table
from stores import store_digest

pytestmark = pytest.mark.gpu

BACKBONE = "test_resnet"
PLAN = Plan(6, 10, 1, Preprocessing(64, 72, "bilinear", (0.5,) * 3, (0.5,) * 3), 0, "pyav")


def extract(videos: Path, out: Path, **changes) -> FeatureStore:
    small = {
        "backbone": BACKBONE,
        "weights": "random",
        "frames": 2 if PRETENDED else 4,
        "block_size": 8,
        "device": DEVICE,
    }
    assert main(Options(videos=videos, out=str(out), max_failed=0.5, **(small | changes))) == 0
    return FeatureStore.open(out)


def features_of(store: FeatureStore) -> np.ndarray:
    return store.read(np.flatnonzero(store.status == OK)).astype(np.float64)


def test_an_extraction_on_a_gpu_is_that_of_a_cpu_and_gives_the_same_bytes_again(
    codec_clips, tmp_path, capsys
):
    there = extract(codec_clips, tmp_path / "there.zarr", precision="bf16", crops=3)
    assert "cuda" in capsys.readouterr().out
    extract(codec_clips, tmp_path / "again.zarr", precision="bf16", crops=3)
    digests = [store_digest(tmp_path / name) for name in ("there.zarr", "again.zarr")]
    assert digests[0] == digests[1]
    here = extract(codec_clips, tmp_path / "here.zarr", precision="fp32", crops=3, device="cpu")
    assert (there.status == here.status).all()
    got, expected = features_of(there), features_of(here)
    assert np.linalg.norm(got - expected) / np.linalg.norm(expected) < 3e-2


def test_decoding_on_a_gpu_sees_the_same_frames(demo_clips):
    """Indices, times and counts are equal, and pictures are within the tolerance that stores
    record."""
    clips = sorted((demo_clips / "exercise_mini" / "clips").rglob("*.mp4"))[::20]
    assert len(clips) >= 5
    means = []
    for clip in clips:
        expected = np.zeros(PLAN.shape, np.uint8)
        here = prepare_row(str(clip), clip.name, PLAN, expected)
        frames = torch.zeros(PLAN.shape, dtype=torch.uint8, device=DEVICE)
        plan = Plan(6, 10, 1, PLAN.preprocessing, 0, f"torchcodec-{DEVICE}")
        there = prepare_row(str(clip), clip.name, plan, frames)
        assert (here.indices == there.indices).all()
        assert (here.timestamps == there.timestamps).all()
        assert here.num_frames == there.num_frames
        means.append(np.abs(frames.cpu().numpy().astype(float) - expected).mean())
    print(
        f"levels of 255 between {DEVICE} and PyAV, in the mean: {', '.join(f'{mean:.2f}' for mean in means)}"
    )
    assert max(means) <= TOLERANCE


def test_what_a_gpu_cannot_decode_is_decoded_by_pyav_and_named(codec_clips, tmp_path, capsys):
    """VP8 is not decoded by NVDEC through torchcodec here, since its packets cannot be trusted;
    PyAV decodes it."""
    decoder = f"torchcodec-{DEVICE}"
    store = extract(codec_clips, tmp_path / "gpu.zarr", decoder=decoder, precision="bf16")
    plain = extract(codec_clips, tmp_path / "cpu.zarr", precision="bf16")
    assert (store.status == plain.status).all()
    assert (store.num_frames == plain.num_frames).all()
    by_pyav = {
        name
        for name, error in zip(store.ids, store.errors, strict=True)
        if "decoded by PyAV: " in error
    }
    assert "vp8.webm" in by_pyav
    assert "h264_portrait.mp4" not in by_pyav
    assert f"{len(store):,}" in status_table(store)
    assert "decoded by PyAV: " in capsys.readouterr().out
    got, expected = features_of(store), features_of(plain)
    assert np.linalg.norm(got - expected) / np.linalg.norm(expected) < 0.1
    rows = [
        row
        for row, name in enumerate(store.ids.tolist())
        if name in by_pyav and store.status[row] == OK
    ]
    assert np.array_equal(store.read(np.array(rows)), plain.read(np.array(rows)))  # to the bit
    record = store.provenance["decoder"]
    assert record["name"] == decoder
    assert f"within {TOLERANCE} of 255 levels of pyav" in record["version"]
    with pytest.raises(InputError, match=r"was made with other settings.*\n.*decoder"):
        extract(codec_clips, tmp_path / "gpu.zarr", decoder="pyav", precision="bf16")
