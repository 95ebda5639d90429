"""Benchmarks of a GPU: `python tests/gpu/bench.py --out FILE --seconds N` writes one line of JSON
per benchmark.

A benchmark returns numbers by name, some with goals: the measured value, and the value that we hope
for on an H100. They run in order of importance, and none starts that would not end in time. With
HGNL_GPU=pretended, the GPU is simulated and the sizes are meaningless: that shows only that the
benchmarks run.
"""

import argparse
import csv
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

import pretend
from device import DEVICE, PRETENDED
from extract.backbone.frozen import Backbone, load_backbone
from extract.backbone.model import load_trunk
from extract.cli import run_command
from extract.cores import available_cores
from extract.decode.jobs import Plan, decode_job
from extract.decode.pool import SubprocessPool
from extract.store import FeatureStore, RunLog
from timing import flops_per_frame

ROOT = Path(__file__).parents[2]
KINETICS = 542_357  # training videos
Numbers = dict[str, Any]


@dataclass(frozen=True)
class Size:
    """The amount of work; a rehearsal does almost none."""

    backbone: str
    batch: int
    batches: int
    clips: int
    frames: int  # of each
    block: int  # clips
    videos: int  # of cached features
    dim: int
    product: int  # side of the matrices whose product is timed
    groups: tuple[tuple[int, ...], tuple[int, ...]]  # g1 and g2 of the grid


FULL = Size(
    "legacy_seresnext101_32x4d",
    400,
    24,
    960,
    25,
    32,
    54_236,
    2048,
    8192,
    ((4, 8, 16, 32), (2, 4, 8, 16)),
)
TINY = Size("test_resnet", 4, 2, 2, 4, 1, 300, 32, 256, ((2, 4), (2,)))


def seconds_of(work: Callable[[], Any], *, repeats: int = 5) -> float:
    """The median of several turns, after one that does not count."""
    each = []
    for _ in range(repeats + 1):
        torch.cuda.synchronize()
        started = time.perf_counter()
        work()
        torch.cuda.synchronize()
        each.append(time.perf_counter() - started)
    return float(np.median(each[1:]))


def attempt(numbers: Numbers, what: str, work: Callable[[], Numbers]) -> None:
    """Add the numbers that `work` measures. If it fails, its error is added instead, and the other
    numbers are kept."""
    try:
        numbers |= work()
    except Exception as error:
        words = f"{what}: {type(error).__name__}: {str(error).partition(chr(10))[0][:200]}"
        numbers["error"] = "; ".join(filter(None, [numbers.get("error"), words]))


def ceilings(size: Size) -> Numbers:
    """Limits of the machine: a matrix product, a copy to the device from pinned memory, and a copy
    on the device."""
    left, right = (torch.randn(size.product, size.product, device=DEVICE).half() for _ in range(2))
    product = seconds_of(lambda: left @ right)
    host = torch.randint(0, 256, (size.product, size.product), dtype=torch.uint8)
    host = host.pin_memory()
    there = host.to(DEVICE, copy=True)
    other = torch.empty_like(there)
    return {
        "matrix product, TFLOP/s": 2 * size.product**3 / product / 1e12,
        "host to device, GB/s": host.nbytes
        / seconds_of(lambda: there.copy_(host, non_blocking=True))
        / 1e9,
        "device to device, GB/s read and written": 2
        * host.nbytes
        / seconds_of(lambda: other.copy_(there))
        / 1e9,
    }


def backbone_alone(size: Size) -> Numbers:
    """The backbone on ready frames in host memory, with several batches under way; start-up is
    counted separately."""
    numbers: Numbers = {}
    loaded = {"weights": "random", "device": DEVICE, "precision": "fp16", "frames": size.batch}
    trunk = load_trunk(size.backbone, weights="random")
    side = trunk.preprocessing.size
    frames = np.random.default_rng(0).integers(0, 256, (size.batch, side, side, 3), dtype=np.uint8)
    flops = flops_per_frame(trunk)

    def measured(form: str) -> Numbers:
        started = time.perf_counter()
        one = load_backbone(size.backbone, **loaded, form=form)
        one(frames)
        start_up = time.perf_counter() - started
        speed, busy = _streamed(one, frames, size.batches)
        return {
            f"{form}, start-up s": start_up,
            f"{form}, frames/s": speed,
            f"{form}, device busy": busy,
        }

    for form in ("eager", "graphs", "compiled"):
        attempt(numbers, form, lambda form=form: measured(form))
    best = max(value for name, value in numbers.items() if name.endswith("frames/s"))
    numbers |= {
        "best, TFLOP/s": best * flops / 1e12,
        "host to device used, GB/s": best * frames[0].nbytes / 1e9,
    }
    return numbers | {"goals": {"SE-ResNeXt101 alone, frames/s": (best, ">=", 5000)}}


def _streamed(backbone: Backbone, frames: np.ndarray, count: int) -> tuple[float, float]:
    """Frames per second over `count` batches, and the fraction of the time in which the device
    computed."""
    features = np.empty((len(frames), backbone.dim), np.float16)
    batches = backbone.batches()
    started = time.perf_counter()
    for _ in range(count):
        batches.add(frames, features)
    batches.finish()
    wall = time.perf_counter() - started
    return count * len(frames) / wall, batches.seconds / wall


def extraction(size: Size) -> Numbers:
    """Whole extractions of real clips by each decoder, against the slower of decoding alone and the
    backbone alone."""
    from extract.__main__ import main
    from extract.options import Options

    with tempfile.TemporaryDirectory() as folder:
        clips = Path(folder, "clips")
        clips.mkdir()
        source = sorted((ROOT / "pipelines" / "clips").rglob("*.mp4"))
        for number in range(size.clips):
            (clips / f"{number:04d}.mp4").symlink_to(source[number % len(source)])
        wanted = {
            "weights": "random",
            "backbone": size.backbone,
            "device": DEVICE,
            "frames": size.frames,
            "block_size": size.block,
        }
        numbers: Numbers = {}
        backbone = load_backbone(
            size.backbone,
            weights="random",
            device=DEVICE,
            precision="fp16",
            frames=size.block * size.frames,
        )
        side = backbone.preprocessing.size
        alone, _ = _streamed(
            backbone, np.zeros((backbone.batch_size, side, side, 3), np.uint8), size.batches
        )
        decoding = _decoding_alone(backbone, sorted(map(str, clips.iterdir())), size.frames)
        numbers |= {"backbone alone, frames/s": alone, "decoding alone by pyav, frames/s": decoding}

        def whole(decoder: str) -> Numbers:
            out = Path(folder, f"{decoder}.zarr")
            chosen: Any = {**wanted, "decoder": decoder, "precision": "fp16"}
            if main(Options(videos=clips, out=str(out), **chosen)):
                raise RuntimeError(f"the extraction with {decoder} failed")
            records = RunLog.records(out)
            speed = records[-1]["frames"] / records[-1]["wall"]
            busy = (
                sum(one["seconds"]["device"] for one in records if one["event"] == "block")
                / records[-1]["wall"]
            )
            found = {f"{decoder}, frames/s": speed, f"{decoder}, device busy": busy}
            if decoder == "pyav":
                ratio = speed / min(alone, decoding)
                return found | {
                    "goals": {"extraction / min(backbone, decoding)": (ratio, ">=", 0.9)}
                }
            by_pyav = sum("decoded by PyAV" in error for error in FeatureStore.open(out).errors)
            return found | {f"{decoder}, videos it left to pyav": by_pyav}

        for decoder in ("pyav", "torchcodec-cuda"):
            attempt(numbers, decoder, lambda decoder=decoder: whole(decoder))
    return numbers


def _decoding_alone(backbone: Backbone, paths: list[str], frames: int) -> float:
    plan = Plan(frames, 1, 0, backbone.preprocessing, 0, "pyav")
    cores = available_cores()
    with SubprocessPool(decode_job, slot_bytes=plan.slot_bytes, workers=cores, timeout=60) as pool:
        jobs = [(path, [(path, None)], plan) for path in paths]
        for future in [pool.submit(job) for job in jobs[:cores]]:
            future.result().release()
        started = time.perf_counter()
        for future in [pool.submit(job) for job in jobs]:
            future.result().release()
        return len(jobs) * plan.frames / (time.perf_counter() - started)


def epochs(size: Size) -> Numbers:
    """Epochs of training on cached features on the device; the time for all of Kinetics-700 is
    scaled up from them."""
    numbers: Numbers = {}
    goals: dict[str, tuple[float, str, float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        store = _cached(Path(folder, "f.zarr"), size, videos=size.videos)
        for agg, hoped in (("tsn", 3.0), ("hgnl", 5.0)):
            seconds = _epoch_seconds(store, agg, size) * KINETICS / size.videos
            numbers[f"{agg}, s an epoch of {KINETICS:,} videos x 3 frames"] = seconds
            goals[f"epoch of Kinetics-700, {agg}, s"] = (seconds, "<=", hoped)
    return numbers | {"goals": goals}


def _cached(path: Path, size: Size, *, videos: int) -> FeatureStore:
    classes = min(700, videos // 6)
    rows = np.arange(videos)
    return FeatureStore.from_arrays(
        path,
        np.random.default_rng(0)
        .standard_normal((videos, 3, size.dim), np.float32)
        .astype(np.float16),
        lengths=np.full(videos, 3),
        labels=rows % classes,
        classes=[f"class {number}" for number in range(classes)],
        splits=["val" if row // classes % 6 == 5 else "train" for row in rows.tolist()],
    )


def _epoch_seconds(store: FeatureStore, agg: str, size: Size) -> float:
    from aggregate.data.features import StoredFeatures
    from aggregate.models import build
    from aggregate.training.learner import Learner
    from aggregate.training.recipes import recipe

    rows = np.arange(len(store))
    features = StoredFeatures(store, rows, device=DEVICE, placement="device", training=True)
    groups = {"g1": size.groups[0][0], "g2": size.groups[1][0]} if agg == "hgnl" else {}
    model = build(agg, dim=size.dim, num_classes=len(store.classes), dropout=0.5, **groups)
    chosen = recipe("cached", agg, videos=len(rows))
    steps = -(-len(features) // chosen.batch_size)
    learner = Learner(agg, model, chosen, steps, 0, torch.device(DEVICE))
    learner.train_mode()
    seconds = []
    for epoch in range(3):
        torch.cuda.synchronize()
        started = time.perf_counter()
        batches = features.train_batches(
            epoch=epoch, frames=3, batch_size=chosen.batch_size, seed=0
        )
        for step, batch in enumerate(batches):
            learner.step(batch, epoch, step)
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    return min(seconds[1:])


def grid(size: Size) -> Numbers:
    """Every combination of g1 and g2 with three seeds by one command, against one command for each
    (one is timed)."""
    walls, passes = [], []
    with tempfile.TemporaryDirectory() as folder:
        store = _cached(Path(folder, "f.zarr"), size, videos=max(size.videos // 10, 300))
        command = ["--features", str(store.path), "--epochs", "2"]
        command += ["--device", "cpu" if PRETENDED else DEVICE, "--at-once", "64"]
        for number, (g1, g2, seeds) in enumerate(
            ((size.groups[0][:1], size.groups[1][:1], (0,)), (*size.groups, range(3)))
        ):
            lists = {"--g1": g1, "--g2": g2, "--seeds": seeds, "--out": [Path(folder, str(number))]}
            started = time.perf_counter()
            words = [
                *command,
                *(str(word) for name, values in lists.items() for word in (name, *values)),
            ]
            _run_ablate(words)
            walls.append(time.perf_counter() - started)
            with Path(folder, str(number), "ablation.csv").open() as file:
                passes.append([float(row["pass_seconds"]) for row in csv.DictReader(file)])
    count = len(passes[1])
    return {
        "configurations": count,
        "one command of all, s": walls[1],
        "a command of one, s": walls[0],
        "without starts and reports: one by one / in one pass": count
        * passes[0][0]
        / sum(set(passes[1])),
        "goals": {
            f"{count} configurations in one pass / one by one, times faster": (
                count * walls[0] / walls[1],
                ">=",
                5.0,
            )
        },
    }


def _run_ablate(words: list[str]) -> None:
    """Run the command in a separate process; in a rehearsal in this one, where the libraries are
    imported already."""
    if not PRETENDED:
        command = [sys.executable, "-m", "aggregate.ablate", *words]
        subprocess.run(command, check=True, cwd=ROOT, stdout=subprocess.DEVNULL)
        return
    from aggregate import ablate

    assert run_command(ablate.main, ablate.Options, prog="aggregate.ablate", args=words) == 0


# In order of importance, with the seconds that each is expected to take at most.
BENCHMARKS: dict[str, tuple[Callable[[Size], Numbers], float]] = {
    "ceilings": (ceilings, 10),
    "backbone alone": (backbone_alone, 120),
    "extraction": (extraction, 80),
    "epochs": (epochs, 45),
    "grid": (grid, 60),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=300.0)
    arguments = parser.parse_args()
    size, started = TINY if PRETENDED else FULL, time.monotonic()
    if PRETENDED:
        pretend.begin()
    for name, (run, expected) in BENCHMARKS.items():
        left = arguments.seconds - (time.monotonic() - started)
        begun = time.perf_counter()
        try:
            if left < expected and not PRETENDED:
                raise TimeoutError(f"{left:.0f} s are left, it takes about {expected:.0f}")
            result = run(size)
        except Exception as error:  # the others are still useful
            result = {"error": f"{type(error).__name__}: {error}"}
        result["seconds"] = time.perf_counter() - begun
        with arguments.out.open("a") as file:
            file.write(json.dumps({name: result}) + "\n")


if __name__ == "__main__":
    main()
