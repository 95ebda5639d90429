"""Fusion and search at the size of Kinetics-700's test set:
`pytest -s tests/benchmarks/bench_ensemble.py`.

There are 70,000 videos x 700 classes x 3 models whose errors resemble those of the paper's models
(top-1 about 60 %, correlated). Each command runs in a process of its own with two threads at most,
and is measured from start to end, with reading and writing of files and the table. The limits hold
for CPU seconds. Nearly all work runs in one thread, so CPU seconds are the wall time of an
otherwise idle machine. Wall time is printed too. Memory is the peak resident set.
"""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from aggregate.scores import Scores
from extract.listing.labels import kinetics700_labels

ROOT = Path(__file__).parents[2]
VIDEOS = 70_000
LIMIT_GB = 4

# Runs a command as `python -m` does and prints its peak memory at the end.
MEASURED = """
import resource, runpy, sys
sys.argv = ["python -m ensemble", *sys.argv[1:]]
try:
    runpy.run_module("ensemble", run_name="__main__", alter_sys=True)
except SystemExit as done:
    used = resource.getrusage(resource.RUSAGE_SELF)
    print("used", used.ru_maxrss / 1e6, used.ru_utime + used.ru_stime)
    sys.exit(done.code)
"""


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> list[Path]:
    folder = tmp_path_factory.mktemp("scores")
    classes = kinetics700_labels()
    rng = np.random.default_rng(0)
    labels = rng.integers(0, len(classes), VIDEOS)
    rows = np.arange(VIDEOS)
    ids = [f"test/{row:011d}_000010_000020.mp4" for row in rows]
    common = rng.normal(size=(VIDEOS, len(classes)), scale=0.9).astype(np.float32)
    margin = rng.normal(size=VIDEOS, scale=1.5)  # some videos are hard for all
    paths = []
    for name, strength in (("tsn", 4.9), ("hgnl", 5.0), ("stnet", 4.5)):
        logits = common + rng.standard_normal(common.shape, np.float32) * 0.8
        logits[rows, labels] += strength + margin
        paths.append(folder / f"{name}.h5")
        Scores(ids, classes, 2 * logits, labels).save(paths[-1])
    return paths


def measured(*args: object) -> tuple[float, float, float, str]:
    """Wall and CPU seconds, peak GB, and the printed text."""
    threads = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "2")
    started = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", MEASURED, *map(str, args)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ | threads,
        check=False,
    )
    seconds = time.perf_counter() - started
    assert done.returncode == 0, done.stderr
    said, _, used = done.stdout.rpartition("used ")
    peak, cpu = map(float, used.split())
    return seconds, cpu, peak, said


@pytest.mark.parametrize(
    ("weights", "limit"),
    [
        ("0.5,0.3,0.2", 20),
        ("search", 120),
    ],
)
def test_fusing_70000_videos(files, tmp_path, weights, limit):
    out = tmp_path / "fused.h5"
    seconds, cpu, peak, said = measured(
        *(
            "--scores",
            *files,
            "--out",
            out,
            "--weights",
            weights,
            "--submission",
            tmp_path / "sub.json",
        )
    )
    print(
        f"\n{said}\n{weights}: {cpu:.1f} CPU s ({seconds:.1f} s of wall time), peak {peak:.2f} GB"
    )
    assert len(json.loads(out.with_suffix(".json").read_text())["table"]) == 8
    assert cpu < limit
    assert peak < LIMIT_GB
