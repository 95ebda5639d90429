"""Commands with little work, next to `import torch` in the same turns: most of their time is
start-up.

The commands are `aggregate.train` on a store of 72 videos (16 frames x 1,280 features, 30 epochs),
`extract` of one clip through EfficientNet-Lite0, and `pipelines.predict` of the same clip with an
HG-NL over it. Each runs in a process of its own, and they take turns, alone and next to one busy
process per core. The first start with a backbone, which converts it, does not count. The ratio is
that of the medians; seconds depend on this machine and on its load. The output names the imports of
`torch` and `timm`, since a second start of `extract` needs neither.
"""

import os
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from aggregate.endtoend import backbone_record
from aggregate.models import build
from aggregate.training.checkpoint import Checkpoint
from extract.backbone.model import load_trunk
from extract.cores import available_cores
from extract.store import FeatureStore
from timing import busy_neighbors

ROOT = Path(__file__).parents[2]
CLIP = (
    ROOT
    / "pipelines"
    / "clips"
    / "exercise_mini"
    / "clips"
    / "barbell"
    / "Barbell_Rear_Delt_Row.mp4"
)
TURNS = 3
ALLOWED = {"train": 3.0, "extract": 1.6, "predict": 2.2}  # times `import torch`


@pytest.mark.timeout(1800)
def test_start_up_beside_importing_torch(tmp_path: Path) -> None:
    small_store(tmp_path / "small.zarr")
    checkpoint(tmp_path / "best.pt")
    commands = {
        "import torch": ["-c", "import torch"],
        "train": [
            "-m",
            "aggregate.train",
            "--agg",
            "tsn",
            "--features",
            "small.zarr",
            "--out",
            "out",
        ],
        "extract": [
            "-m",
            "extract",
            "--videos",
            str(CLIP),
            "--out",
            "out",
            "--backbone",
            "tf_efficientnet_lite0",
        ],
        "predict": ["-m", "pipelines.predict", str(CLIP), "--checkpoint", "best.pt"],
    }
    environment = os.environ | {"PYTHONPATH": str(ROOT), "HGNL_CACHE": str(tmp_path / "cache")}
    for name in ("extract", "predict"):  # convert
        run(commands[name], tmp_path, environment)
    usual: dict[int, dict[str, float]] = {}
    for neighbors in (0, available_cores()):
        seconds: dict[str, list[float]] = {name: [] for name in commands}
        cpu: dict[str, list[float]] = {name: [] for name in commands}
        with busy_neighbors(neighbors):
            for _ in range(TURNS):
                for name, command in commands.items():
                    wall, used = run(command, tmp_path, environment)
                    seconds[name].append(wall)
                    cpu[name].append(used)
        usual[neighbors] = {name: float(np.median(turns)) for name, turns in seconds.items()}
        print(
            f"\nbeside {neighbors} busy processes, {available_cores()} cores, load {os.getloadavg()[0]:.1f}"
        )
        for name, took in usual[neighbors].items():
            ratio = took / usual[neighbors]["import torch"]
            print(
                f"{name:12} {took:5.1f} s, {ratio:.2f} times import torch, {np.median(cpu[name]):.1f} CPU s",
                end="",
            )
            print(f", {took / usual[0][name]:.2f} times quiet")
    for name in ("extract", "predict"):
        print(
            f"{name} imports {sorted(imported(commands[name], tmp_path, environment)) or 'neither torch nor timm'}"
        )
    for name, allowed in ALLOWED.items():
        assert usual[0][name] < allowed * usual[0]["import torch"], name


def run(command: list[str], folder: Path, environment: dict[str, str]) -> tuple[float, float]:
    """Wall and CPU seconds of a process."""
    shutil.rmtree(folder / "out", ignore_errors=True)
    before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    done = subprocess.run(
        [sys.executable, *command], cwd=folder, env=environment, capture_output=True, check=False
    )
    wall = time.perf_counter() - started
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 0, done.stderr.decode()
    return wall, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def imported(command: list[str], folder: Path, environment: dict[str, str]) -> set[str]:
    """The heavy libraries that a command imports."""
    shutil.rmtree(folder / "out", ignore_errors=True)
    times = ["-X", "importtime", *command]
    done = subprocess.run(
        [sys.executable, *times], cwd=folder, env=environment, capture_output=True, text=True
    )
    names = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    return names & {"torch", "timm", "torchvision", "openvino"}


def small_store(path: Path) -> None:
    labels = np.arange(72) % 6
    rng = np.random.default_rng(0)
    features = rng.normal(size=(72, 16, 1280)) + rng.normal(size=(6, 1, 1280))[labels]
    splits = ["val" if number % 4 == 0 else "train" for number in range(72)]
    FeatureStore.from_arrays(
        path,
        features.astype("f2"),
        lengths=np.full(72, 16),
        labels=labels,
        classes=list("abcdef"),
        splits=splits,
    )


def checkpoint(path: Path) -> None:
    trunk = load_trunk("tf_efficientnet_lite0", weights="pretrained")
    model = build("hgnl", dim=trunk.dim, num_classes=6, scale_init=0.5)
    features = backbone_record(trunk)
    Checkpoint(model.options, list("abcdef"), model.state_dict(), features, 3).save(path)
