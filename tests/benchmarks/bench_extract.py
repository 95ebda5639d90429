"""A whole extraction against its limits and against the loop most people write, in one run.

SE-ResNeXt101 with random weights runs over real clips (the 10 s Kinetics clips of ../shared if they
exist, else those of the package), 25 frames each. Limits are measured in the same run: the bf16
matrix product of this machine, the backbone alone on ready frames, and the CPU time of decoding
alone. Start-up (models, children, Ray) is left out: the wall time comes from the run's own log,
from the start of the first block to the last commit.

`test_beside_others` runs each engine alone and next to one busy process per core, in turns of one
run. A fair share of the cores would be half of the quiet speed. PyTorch ran backbones on CPUs
before OpenVINO did, then with packed weights; LOG.md has their last figures.
"""

import os
import time
from pathlib import Path

import numpy as np
import pytest

from extract.__main__ import Options, main
from extract.cores import available_cores
from extract.store import RunLog
from timing import busy_neighbors

BACKBONE = "legacy_seresnext101_32x4d"
GFLOP_A_FRAME = 16.1  # 8.02 GMACs, plus batch norm, ReLU and pooling
FRAMES = 25


@pytest.fixture(scope="module")
def clips(tmp_path_factory) -> Path:
    """32 clips, four copies of each of eight: two blocks of 400 frames, each 25 whole batches (a
    block of 64 videos has 100)."""
    root = Path(__file__).parents[2]
    kinetics = root.parent / "shared" / "clips" / "kinetics_like"
    source = (
        sorted(kinetics.glob("*.mp4"))[:8]
        or sorted((root / "pipelines/clips/daily_actions").rglob("*.mp4"))[:8]
    )
    folder = tmp_path_factory.mktemp("clips")
    for clip in source:
        for copy in range(4):
            (folder / f"{clip.stem}_{copy}.mp4").symlink_to(clip)
    return folder


def run(clips: Path, out: Path, **changed) -> dict[str, float]:
    """One extraction: wall seconds without start-up, frames, and CPU seconds of decoding."""
    settings = {
        "backbone": BACKBONE,
        "weights": "random",
        "block_size": 16,
        "max_failed": 0.0,
        "frames": FRAMES,
    }
    assert main(Options(videos=clips, out=str(out), **(settings | changed))) == 0
    records = RunLog.records(out)
    decode = sum(record["seconds"]["decode"] for record in records if record["event"] == "block")
    device = sum(record["seconds"]["device"] for record in records if record["event"] == "block")
    return {
        "wall": records[-1]["wall"],
        "frames": records[-1]["frames"],
        "decode": decode,
        "device": device,
    }


def bf16_gflops() -> float:
    import torch

    left, right = (torch.randn(2048, 2048, dtype=torch.bfloat16) for _ in range(2))
    best = 0.0
    for _ in range(20):
        started = time.perf_counter()
        left @ right
        best = max(best, 2 * 2048**3 / (time.perf_counter() - started) / 1e9)
    return best


def frames_a_second_of_the_backbone() -> float:
    from extract.backbone.frozen import load_backbone

    backbone = load_backbone(BACKBONE, weights="random")
    frames = np.random.default_rng(0).integers(
        0, 256, (backbone.batch_size, 224, 224, 3), dtype=np.uint8
    )
    backbone(frames)
    seconds = []
    for _ in range(10):
        started = time.perf_counter()
        backbone(frames)
        seconds.append(time.perf_counter() - started)
    return len(frames) / float(np.median(seconds))


def the_loop_most_people_write(clips: Path, out: Path) -> float:
    """Frames per second of decord, timm in fp32 and np.save, one clip at a time."""
    import decord
    import timm
    import torch
    from torchvision.transforms import v2

    model = timm.create_model(BACKBONE, pretrained=False, num_classes=0).eval()
    transform = v2.Compose(
        [
            v2.Resize(256),
            v2.CenterCrop(224),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        ]
    )
    done, started = 0, time.perf_counter()
    for clip in sorted(clips.iterdir())[:4]:
        reader = decord.VideoReader(str(clip))
        indices = [
            int(i * len(reader) / FRAMES + len(reader) / (2 * FRAMES)) for i in range(FRAMES)
        ]
        frames = torch.from_numpy(reader.get_batch(indices).asnumpy()).permute(0, 3, 1, 2)
        with torch.no_grad():
            np.save(out / f"{clip.stem}.npy", model(transform(frames)).numpy())
        done += FRAMES
    return done / (time.perf_counter() - started)


def test_the_whole_run_against_its_limits(clips, tmp_path):
    cores = available_cores()
    backbone, product = frames_a_second_of_the_backbone(), bf16_gflops()
    naive = the_loop_most_people_write(clips, tmp_path)
    here = run(clips, tmp_path / "here.zarr")
    again = frames_a_second_of_the_backbone()
    backbone = (backbone + again) / 2
    speed = here["frames"] / here["wall"]
    both = 1 / (1 / backbone + here["decode"] / here["frames"] / cores)
    print(
        f"\nbf16 matrix product {product:,.0f} GFLOP/s: {product / GFLOP_A_FRAME:.1f} frames/s would be its limit"
    )
    print(
        f"backbone alone {backbone:.1f} frames/s; decoding {1e3 * here['decode'] / here['frames']:.1f} CPU ms a frame"
    )
    print(
        f"decoding and backbone together allow {both:.1f} frames/s; the loop most people write {naive:.1f}"
    )
    print(
        f"whole extraction {speed:.1f} frames/s: {speed * GFLOP_A_FRAME / product:.2f} of the matrix product, "
        f"{speed / both:.2f} of the two costs, {speed / naive:.2f} times the loop"
    )
    assert speed >= 0.60 * product / GFLOP_A_FRAME
    assert speed >= 0.95 * both
    assert speed >= 2.0 * naive


# Backbone: clips, and the limits for OpenVINO: against PyTorch in this run, and int8 against
# PyTorch.
GOALS = {
    "tf_efficientnet_lite0": (32, 1.25, 1.4),
    BACKBONE: (8, 1.10, 1.7),
    "vit_base_patch16_224": (8, 1.10, 1.7),
}
BESIDE_LOAD = 0.40  # of the quiet speed


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", GOALS)
def test_beside_others(name, clips, tmp_path):
    count, goal, int8_goal = GOALS[name]
    cores = available_cores()
    weights = "pretrained" if name.startswith("tf_efficientnet") else "random"
    settings = {"backbone": name, "weights": weights, "limit": count, "device": "cpu"}
    ways = {"openvino": {}, "torch": {"engine": "torch"}, "int8": {"precision": "int8"}}
    for way, changed in ways.items():  # converted, calibrated, kernels made
        run(clips, tmp_path / f"{way}-first.zarr", **settings, **changed)
    speeds = {}
    for way, changed in ways.items():
        for neighbors in (0, cores):
            turns = []
            for turn in range(2):
                out = tmp_path / f"{way}-{neighbors}-{turn}.zarr"
                with busy_neighbors(neighbors):
                    numbers = run(clips, out, **settings, **changed)
                turns.append(numbers["frames"] / numbers["wall"])
            speeds[way, neighbors] = max(turns)
    before = speeds["torch", 0]
    print(
        f"\n{name}, {cores} cores, whole extraction, frames/s; load of the machine {os.getloadavg()[0]:.1f}"
    )
    print(
        f"{'':10} {'quiet':>8} {'beside':>8} {'beside / quiet':>15} {'quiet / torch':>14} {'beside / torch':>15}"
    )
    for way in ways:
        quiet, beside = speeds[way, 0], speeds[way, cores]
        ratios = (
            f"{beside / quiet:15.2f} {quiet / before:14.2f} {beside / speeds['torch', cores]:15.2f}"
        )
        print(f"{way:10} {quiet:8.1f} {beside:8.1f} {ratios}")
    assert speeds["openvino", cores] >= BESIDE_LOAD * speeds["openvino", 0]
    assert speeds["openvino", 0] >= goal * before
    assert speeds["int8", 0] >= int8_goal * before


def test_ray_with_one_worker_against_this_process(clips, tmp_path):
    import ray

    settings = {"decode_workers": available_cores(), "precision": "bf16", "limit": 16}
    ratios = []
    for attempt in range(3):
        here = run(clips, tmp_path / f"here{attempt}.zarr", **settings)
        there = run(clips, tmp_path / f"ray{attempt}.zarr", workers=1, address="local", **settings)
        ratios.append(here["wall"] / there["wall"])
        assert not ray.is_initialized()
    each = ", ".join(f"{ratio:.3f}" for ratio in ratios)
    print(f"\nRay with one worker: {np.median(ratios):.3f} of the speed in this process ({each})")
    assert np.median(ratios) >= 0.95
