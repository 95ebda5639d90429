"""Decoding by torchcodec on the CPU, which runs all of it but NVDEC, against PyAV; fallbacks and
refusals."""

import re
import threading
from pathlib import Path

import numpy as np
import pytest
import torch

from decode_jobs import prepare_row
from extract import InputError
from extract.__main__ import main
from extract.decode import VideoError, decode, decoder_version
from extract.decode.jobs import Plan, decode_job
from extract.decode.nvdec import TOLERANCE, GpuDecoder, resized
from extract.decode.pool import SubprocessPool
from extract.decode.transform import Preprocessing
from extract.options import Options
from extract.sampling import segment_centers
from extract.store import OK, FeatureStore
from ffmpeg import needs_torchcodec

DECODER = "torchcodec-cpu"
pytestmark = needs_torchcodec()
SEE = Preprocessing(64, 72, "bilinear", (0.5,) * 3, (0.5,) * 3)
FINE = (
    "h264_portrait.mp4",
    "h264_vfr.mp4",
    "h264_120fps.mp4",
    "h264_long_gop.mp4",
    "h264_start_5s.mp4",
    "vp9.webm",
)


def plan_of(decoder: str, **changes) -> Plan:
    return Plan(
        **(
            {"frames": 5, "crops": 10, "augment_passes": 2, "preprocessing": SEE, "seed": 3}
            | changes
        ),
        decoder=decoder,
    )


def both(path: Path, **changes) -> list[tuple]:
    """The prepared rows and frames, by PyAV and by torchcodec."""
    here, there = plan_of("pyav", **changes), plan_of(DECODER, **changes)
    arrays = np.zeros(here.shape, np.uint8), torch.zeros(there.shape, dtype=torch.uint8)
    return [
        (prepare_row(str(path), "a", plan, out), np.asarray(out))
        for plan, out in zip((here, there), arrays, strict=True)
    ]


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("name", FINE)
def test_the_same_frames_in_every_view(name: str, interpolation: str, codec_clips: Path) -> None:
    """Ten crops and two augmented passes. Pictures differ only as much as the two resizers
    differ."""
    see = Preprocessing(64, 72, interpolation, (0.5,) * 3, (0.5,) * 3)
    (here, expected), (there, got) = both(codec_clips / name, preprocessing=see)
    assert (here.indices == there.indices).all()
    assert (here.timestamps == there.timestamps).all()
    assert (here.num_frames, here.problem) == (there.num_frames, there.problem)
    difference = np.abs(got.astype(int) - expected)
    assert difference.mean() < 1
    assert TOLERANCE >= 1


def test_spans_of_one_file_in_one_pass(codec_clips: Path) -> None:
    path, rows = (
        str(codec_clips / "h264_long_gop.mp4"),
        [("a", (0.0, 0.5)), ("b", (0.5, 1.5)), ("c", (100.0, 101.0))],
    )
    done = []
    for decoder in ("pyav", DECODER):
        plan = plan_of(decoder, crops=1, augment_passes=0)
        out = np.zeros((3, *plan.shape), np.uint8)
        flat = out.reshape(-1)
        done.append(
            (
                decode_job(
                    (path, rows, plan), flat if decoder == "pyav" else torch.from_numpy(flat)
                ),
                out,
            )
        )
    (here, expected), (there, got) = done
    for one, other in zip(here[:2], there[:2], strict=True):
        assert (one.indices == other.indices).all()
        assert (one.timestamps == other.timestamps).all()
    assert isinstance(there[2], VideoError)
    assert np.abs(got.astype(int) - expected).mean() < 1


def test_what_it_does_not_read_itself_it_says(codec_clips: Path, broken_clips: Path) -> None:
    """Every clip gives PyAV's frames or a reason, never other frames."""
    read = []
    for path in sorted([*codec_clips.iterdir(), *broken_clips.iterdir()]):
        try:
            got = decode(path, lambda count: segment_centers(count, 4), decoder=DECODER)
        except VideoError:
            continue
        expected = decode(path, lambda count: segment_centers(count, 4))
        assert (got.indices == expected.indices).all(), path
        assert np.abs(np.asarray(got.frames).astype(int) - expected.frames).mean() < 1.5, path
        read.append(path.name)
    assert set(FINE) < set(read)
    with pytest.raises(VideoError, match="its packets may hold pictures that are never shown"):
        decode(codec_clips / "vp8.webm", lambda count: segment_centers(count, 4), decoder=DECODER)


def test_resizing_is_pillows_within_a_level() -> None:
    from PIL import Image

    rng = np.random.default_rng(0)
    coarse = Image.fromarray(rng.integers(0, 256, (12, 17, 3), dtype=np.uint8))
    frame = np.array(coarse.resize((170, 120), Image.Resampling.BICUBIC))
    for mode in ("bilinear", "bicubic"):
        expected = np.asarray(
            Image.fromarray(frame).resize((96, 64), Image.Resampling[mode.upper()])
        )
        got = resized(torch.from_numpy(frame), (96, 64), mode).numpy()
        assert np.abs(got.astype(int) - expected).max() <= 1


def test_a_video_that_it_cannot_read_goes_to_a_child_and_is_named(
    codec_clips, broken_clips
) -> None:
    plan = plan_of("torchcodec-cuda", crops=1, augment_passes=0)  # the plan of a worker
    with SubprocessPool(decode_job, slot_bytes=plan.slot_bytes, workers=1, timeout=30) as children:
        decoder = GpuDecoder(children, decode_job, "cpu", timeout=30)
        good = decoder((str(codec_clips / "h264_portrait.mp4"), [("a", None)], plan))
        assert (good.result[0].note, good.failure) == ("", "")
        assert isinstance(good.buffer, torch.Tensor)
        for _ in range(6):  # more than the slots of a child
            other = decoder((str(codec_clips / "vp8.webm"), [("b", None)], plan))
            assert (
                other.result[0].note
                == "decoded by PyAV: its packets may hold pictures that are never shown"
            )
            frames = np.zeros(plan.shape, np.uint8)
            prepare_row(
                str(codec_clips / "vp8.webm"),
                "b",
                plan_of("pyav", crops=1, augment_passes=0),
                frames,
            )
            assert np.array_equal(other.buffer[: plan.row_bytes].reshape(plan.shape), frames)
        lost = decoder((str(broken_clips / "zero_bytes.mp4"), [("c", None)], plan))
        assert isinstance(lost.result[0], VideoError)
        assert "empty" in lost.result[0].reason


def test_why_nvdec_does_not_decode_a_video_is_said(codec_clips, monkeypatch) -> None:
    from torchcodec.decoders import CpuFallbackStatus, VideoDecoder

    status = CpuFallbackStatus(status_known=True)
    status._is_fallback = status._video_not_supported = True
    monkeypatch.setattr(VideoDecoder, "cpu_fallback", property(lambda decoder: status))
    said = r"NVDEC does not decode h264 of \d+ x \d+ \(Video not supported\)"
    with pytest.raises(VideoError, match=said):
        decode(
            codec_clips / "h264_portrait.mp4",
            lambda count: segment_centers(count, 4),
            decoder=DECODER,
        )


def test_a_device_that_gives_no_answer_is_not_waited_for(codec_clips) -> None:
    plan, never = plan_of("torchcodec-cuda", crops=1, augment_passes=0), threading.Event()
    with SubprocessPool(decode_job, slot_bytes=plan.slot_bytes, workers=1, timeout=30) as children:

        def hangs(job, out):
            never.wait()

        decoder = GpuDecoder(children, hangs, "cpu", timeout=0.1)
        done = decoder((str(codec_clips / "h264_portrait.mp4"), [("a", None)], plan))
    note = r"decoded by PyAV: cpu gave no answer in 0\.1\d* s \(--video-timeout\)"
    assert re.fullmatch(note, done.result[0].note)
    never.set()


def test_an_extraction_names_what_pyav_had_to_read(codec_clips, tmp_path, capsys) -> None:
    """The path of --decoder torchcodec-cuda without the CUDA device."""
    small = {
        "backbone": "test_resnet",
        "weights": "random",
        "precision": "fp32",
        "frames": 4,
        "block_size": 8,
    }
    stores = []
    for decoder in ("pyav", DECODER):
        chosen = Options(
            videos=codec_clips, out=str(tmp_path / decoder), device="cpu", decoder=decoder, **small
        )
        assert main(chosen) == 0
        stores.append(FeatureStore.open(tmp_path / decoder))
    assert (
        "decoded by PyAV: its packets may hold pictures that are never shown"
        in capsys.readouterr().out
    )
    plain, other = stores
    assert (plain.status == other.status).all()
    assert (plain.num_frames == other.num_frames).all()
    notes = {
        name: error
        for name, error in zip(other.ids, other.errors, strict=True)
        if "by PyAV" in error
    }
    assert "vp8.webm" in notes
    assert not set(FINE) & set(notes)
    rows = np.flatnonzero(other.status == OK)
    got, expected = (store.read(rows).astype(np.float64) for store in (other, plain))
    assert np.linalg.norm(got - expected) / np.linalg.norm(expected) < 0.05
    assert "levels of pyav in the mean" in other.provenance["decoder"]["version"]
    with pytest.raises(InputError, match="was made with other settings"):
        main(
            Options(
                videos=codec_clips,
                out=str(tmp_path / DECODER),
                device="cpu",
                decoder="pyav",
                **small,
            )
        )


def test_it_is_refused_where_there_is_no_gpu_or_no_torchcodec(
    codec_clips, tmp_path, monkeypatch
) -> None:
    small = {"backbone": "test_resnet", "weights": "random", "device": "cpu", "precision": "fp32"}
    with pytest.raises(
        InputError,
        match="--decoder torchcodec-cuda: PyTorch sees no CUDA device here; use --decoder",
    ):
        main(
            Options(
                videos=codec_clips, out=str(tmp_path / "f.zarr"), decoder="torchcodec-cuda", **small
            )
        )
    assert not (tmp_path / "f.zarr").exists()
    with monkeypatch.context() as without_ffmpeg:
        without_ffmpeg.setattr("torchcodec.ffmpeg_major_version", None, raising=False)
        with pytest.raises(InputError, match="it finds no shared libraries of FFmpeg"):
            decoder_version(DECODER)
    monkeypatch.setitem(__import__("sys").modules, "torchcodec", None)
    with pytest.raises(InputError, match=r"torchcodec cannot be used \(.*install .*\[gpu\]"):
        decoder_version(DECODER)
