"""16 configurations in one pass against 16 processes, and against 16 runs inside one process.

At demo size (60 videos, 16 channels, 30 epochs), `python -m aggregate.ablate` runs once and
`python -m aggregate.train` 16 times, in wall seconds with everything included. train also trains
the mean-pooling baseline of an HG-NL. A TSN has no baseline, so the 16 models are TSNs, and both
commands train the same models.

At the shape of Kinetics-700 (25 x 2048 float16 per video, 700 classes; 2,048 videos to train, 256
to validate), the contenders take turns in one process, on one thread. The figure is the median of
the ratios of a turn, next to that of the runs to themselves. The limit is in CPU seconds, which
equal wall seconds on an idle machine: other work moves wall time by tens of percent. The runs use
the same code with one model per pass and with the features in memory, so neither contender starts a
process, reads a store or writes.

Run: `python -m pytest -s tests/benchmarks/bench_ablate.py`
"""

import shlex
import subprocess
import sys
import time
from pathlib import Path
from statistics import median

import numpy as np
import pytest
import torch

from aggregate import ablate
from aggregate.ablation.grid import GridTrainer
from aggregate.training.loop import fit
from aggregate.training.splits import choose_rows
from extract.store import FeatureStore
from stores import classes_store

GRID = {"g1": (8, 16), "g2": (4, 8), "lr": (5e-4, 1e-3, 2e-3, 4e-3)}


def seconds(work) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def wall_and_cpu(work) -> tuple[float, float]:
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - wall, time.process_time() - cpu


def quiet(arguments: list[str]) -> None:
    subprocess.run([sys.executable, *arguments], check=True, capture_output=True)


@pytest.mark.timeout(1200)
def test_one_pass_against_sixteen_processes(tmp_path):
    features = str(tmp_path / "feats.zarr")
    classes_store(Path(features), noise=4.0)
    rates = tuple(1e-3 * 2 ** (step / 4) for step in range(16))
    options = ablate.Options(
        agg=("tsn",), features=features, out=tmp_path / "one", seeds=(0,), lr=rates, epochs=(30,)
    )
    sixteen = ablate.plan(options, FeatureStore.open(features)).configurations
    assert len(sixteen) == 16
    shared = ["--agg", "tsn", "--features", features, "--seeds", "0", "--epochs", "30"]
    one = seconds(
        lambda: quiet(
            [
                "-m",
                "aggregate.ablate",
                *shared,
                "--out",
                str(options.out),
                "--lr",
                *map(repr, rates),
            ]
        )
    )

    def processes() -> None:
        for number, configuration in enumerate(sixteen):
            words = shlex.split(ablate.command(configuration.options))[1:]
            quiet([*words, "--out", str(tmp_path / str(number))])

    many = seconds(processes)
    print(
        f"\ndemo size, 16 TSNs: one pass {one:.1f} s, 16 processes {many:.1f} s: {one / many:.3f}"
    )
    assert one <= 0.5 * many


@pytest.mark.timeout(1800)
def test_one_pass_against_sixteen_runs_in_one_process(tmp_path):
    rng = np.random.default_rng(0)
    videos, frames, dim, classes = 2_304, 25, 2048, 700
    store = FeatureStore.from_arrays(
        tmp_path / "feats.zarr",
        rng.random((videos, frames, dim), dtype=np.float32).astype(np.float16),
        lengths=np.full(videos, frames),
        labels=np.arange(videos) % classes,
        classes=[f"class {number}" for number in range(classes)],
        splits=["train"] * 2_048 + ["val"] * 256,
    )
    options = ablate.Options(
        features=store.path,
        seeds=(0,),
        epochs=(1,),
        batch_size=(256,),
        optimizer=("adamw",),
        **GRID,
    )
    share = ablate.plan(options, store).configurations
    assert len(share) == 16
    trainer = GridTrainer(store, device="cpu", placement="memory")
    rows = choose_rows(store, share[0].options, 0)[:2]

    def train(share) -> None:
        list(fit(*trainer.make_learners(share, *rows)))

    def one_pass() -> None:
        train(share)

    def runs() -> None:
        for one in share:
            train([one])

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        train(share[:1])
        turns = [tuple(map(wall_and_cpu, (one_pass, runs, runs))) for _ in range(4)]
    finally:
        torch.set_num_threads(threads)
    for clock, name in enumerate(("wall", "CPU")):
        ours, theirs, again = ([turn[contender][clock] for turn in turns] for contender in range(3))
        ratios = [one / other for one, other in zip(ours, theirs, strict=True)]
        null = [one / other for one, other in zip(again, theirs, strict=True)]
        print(
            f"\nKinetics-700's shape, 16 HG-NLs, one epoch of 2,048 videos, {name} seconds: one pass "
            f"{median(ours):.1f}, 16 runs {median(theirs):.1f}; ratio {median(ratios):.3f} "
            f"({min(ratios):.2f} - {max(ratios):.2f}), of the runs to themselves {median(null):.3f} "
            f"({min(null):.2f} - {max(null):.2f})"
        )
    assert median(ratios) <= 1.05
