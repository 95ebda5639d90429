"""What a command takes that has little to do, beside `import torch` in the same turns: start-up is most of it.

Method: `aggregate.train` on a store of 72 videos (16 frames x 1,280 features, 30 epochs), `extract` of one clip through
EfficientNet-Lite0, and `pipelines.predict` of the same clip with an HG-NL over it, each a process of its own; all take
turns. The ratio is of the medians; seconds are of this machine and how busy it is.
"""

import os
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

from aggregate.endtoend import backbone_record
from aggregate.models import build
from aggregate.training.checkpoint import Checkpoint
from extract.backbone.model import load_trunk
from extract.cores import available_cores
from extract.store import FeatureStore

ROOT = Path(__file__).parents[2]
CLIP = ROOT / "pipelines" / "clips" / "exercise_mini" / "clips" / "barbell" / "Barbell_Rear_Delt_Row.mp4"
TURNS = 3
ALLOWED = {"train": 3.0, "extract": 4.0, "predict": 4.0}  # times `import torch`


def test_start_up_beside_importing_torch(tmp_path: Path) -> None:
    small_store(tmp_path / "small.zarr")
    checkpoint(tmp_path / "best.pt")
    commands = {
        "import torch": ["-c", "import torch"],
        "train": ["-m", "aggregate.train", "--agg", "tsn", "--features", "small.zarr", "--out", "out"],
        "extract": ["-m", "extract", "--videos", str(CLIP), "--out", "out", "--backbone", "tf_efficientnet_lite0"],
        "predict": ["-m", "pipelines.predict", str(CLIP), "--checkpoint", "best.pt"],
    }
    seconds: dict[str, list[float]] = {name: [] for name in commands}
    cpu: dict[str, list[float]] = {name: [] for name in commands}
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    for _ in range(TURNS):
        for name, command in commands.items():
            shutil.rmtree(tmp_path / "out", ignore_errors=True)
            before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
            done = subprocess.run(
                [sys.executable, *command], cwd=tmp_path, env=environment, capture_output=True, check=False
            )
            seconds[name].append(time.perf_counter() - started)
            after = resource.getrusage(resource.RUSAGE_CHILDREN)
            cpu[name].append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
            assert done.returncode == 0, done.stderr.decode()
    usual = {name: float(np.median(some)) for name, some in seconds.items()}
    print()
    for name, took in usual.items():
        turns = ", ".join(f"{one:.1f}" for one in seconds[name])
        print(
            f"{name:12} {took:5.1f} s, {took / usual['import torch']:.2f} times import torch (turns {turns}), ", end=""
        )
        print(f"{np.median(cpu[name]):.1f} CPU s, {np.median(cpu[name]) / np.median(cpu['import torch']):.2f} times")
    print(f"load of the machine: {os.getloadavg()[0]:.1f} on {available_cores()} cores")
    for name, allowed in ALLOWED.items():
        assert usual[name] < allowed * usual["import torch"], name


def small_store(path: Path) -> None:
    labels = np.arange(72) % 6
    rng = np.random.default_rng(0)
    features = rng.normal(size=(72, 16, 1280)) + rng.normal(size=(6, 1, 1280))[labels]
    splits = ["val" if number % 4 == 0 else "train" for number in range(72)]
    FeatureStore.from_arrays(
        path, features.astype("f2"), lengths=np.full(72, 16), labels=labels, classes=list("abcdef"), splits=splits
    )


def checkpoint(path: Path) -> None:
    trunk = load_trunk("tf_efficientnet_lite0", weights="pretrained")
    record = backbone_record(trunk)
    model = build("hgnl", dim=trunk.dim, num_classes=6, scale_init=0.5)
    features = {"backbone": record.pop("name"), **record}
    Checkpoint(model.options, list("abcdef"), model.state_dict(), features, 3).save(path)
