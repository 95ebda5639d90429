"""Artefacts of the first version (commit add2693) open and resume: tests/compat holds what that commit wrote.

`store` is a feature store of 30 videos (used as f.zarr), `tsn` and `hgnl` finished runs on it, `cut` a run that was
stopped after one of three epochs, `whole.pt` the best.pt of the same run without the stop, `hgnl.h5` scores, `grid` an
ablation of which one of three results is kept, `ablation.csv` its whole table, `tuned` a fine-tuning of test_resnet
stopped after one of two epochs. No dropout: what a step does is no function of random numbers.
"""

import csv
import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from aggregate import ablate, evaluate, finetune, train
from aggregate.scores import Scores
from aggregate.training.checkpoint import Checkpoint
from extract.cli import InputError
from extract.store import FeatureStore

COMMON = {"features": "f.zarr", "batch_size": 8, "lr": 0.02, "dropout": 0.0}
GROUPS = {"g1": 4, "g2": 2, "m1": 8}


def rows_of(path: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(path.read_text(encoding="utf-8").splitlines()))


@pytest.fixture
def old(tmp_path, monkeypatch) -> Path:
    shutil.copytree(Path(__file__).parent / "compat", tmp_path / "old")
    (tmp_path / "old" / "store").rename(tmp_path / "old" / "f.zarr")
    monkeypatch.chdir(tmp_path / "old")
    return tmp_path / "old"


def test_stores_checkpoints_and_scores_open(old):
    store = FeatureStore.open("f.zarr")
    assert (len(store), store.frames_per_video, store.dim) == (30, 6, 16)
    assert np.isfinite(store.gather(np.arange(30), np.array([0, 5]))).all()
    evaluate.main(evaluate.Options(Path("hgnl/best.pt"), "f.zarr", segments=(3, 6), out=Path("new.h5")))
    for segments in (3, 6):
        then, now = Scores.load("hgnl.h5", segments), Scores.load("new.h5", segments)
        assert then.ids == now.ids
        np.testing.assert_allclose(now.logits, then.logits, rtol=1e-4, atol=1e-5)


def test_a_finished_run_says_what_it_said(old, capsys):
    then = json.loads((old / "hgnl" / "results.json").read_text())
    wanted = train.Options(
        agg="hgnl", out=Path("hgnl"), epochs=2, init=Path("tsn/best.pt"), control=True, **GROUPS, **COMMON
    )
    assert train.main(wanted) == 0
    assert "resuming  hgnl: 2 of 2 epochs are done" in capsys.readouterr().out
    now = json.loads((old / "hgnl" / "results.json").read_text())
    assert now.keys() == then.keys() == {"hgnl", "tsn (as it was)", "tsn (control)"}
    for name, by_segments in then.items():
        for segments, summary in by_segments.items():
            assert now[name][segments]["top1"] == summary["top1"]
    with pytest.raises(InputError, match=r"lr: 0\.02 in the folder, 0\.03 now"):
        train.main(replace(wanted, lr=0.03))


def test_a_stopped_run_becomes_the_one_that_was_not_stopped(old, capsys):
    train.main(train.Options(agg="hgnl", out=Path("cut"), epochs=3, scale_init=0.1, **GROUPS, **COMMON))
    assert "resuming  cut: 1 of 3 epochs are done" in capsys.readouterr().out
    then, now = Checkpoint.load("whole.pt"), Checkpoint.load("cut/best.pt")
    assert now.metrics["epoch"] == then.metrics["epoch"]
    for name, tensor in then.state_dict.items():
        torch.testing.assert_close(now.state_dict[name], tensor, rtol=1e-3, atol=1e-5)
    assert len((old / "cut" / "metrics.csv").read_text().splitlines()) == 4


def test_an_ablation_goes_on_where_it_stopped(old, capsys):
    lists = {"g1": (4,), "g2": (1, 2), "m1": (8,), "seeds": (0,), "epochs": (2,)}
    shared = {"batch_size": (8,), "lr": (0.02,), "dropout": (0.0,), "at_once": 1}
    ablate.main(ablate.Options(features="f.zarr", out=Path("grid"), agg=("tsn", "hgnl"), **lists, **shared))
    assert "resuming  grid: 1 of 3 are done" in capsys.readouterr().out
    tables = [rows_of(Path(name)) for name in ("ablation.csv", "grid/ablation.csv")]
    for then, now in zip(*tables, strict=True):
        for name in ("name", "seed", "parameters", "madds", "best_epoch", "top1_at_all", "average_error_at_frames"):
            assert now[name] == then[name], name


def test_a_fine_tuning_goes_on_where_it_stopped(old, demo_clips, capsys):
    source = demo_clips / "exercise_mini"
    with (source / "labels.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["label"] in ("barbell", "kettlebells")]
    chosen = [row for label in ("barbell", "kettlebells") for row in [r for r in rows if r["label"] == label][:3]]
    for number, row in enumerate(chosen):
        target = Path("clips") / ("val" if number % 3 == 2 else "train") / row["label"] / f"{number}.mp4"
        target.parent.mkdir(parents=True, exist_ok=True)
        target.symlink_to(source / "clips" / row["path"])
    # Of the first epoch best.pt holds what last.pt holds; it is not kept twice.
    replace(Checkpoint.load("tuned/last.pt"), training=None).save("tuned/best.pt")
    quick = {"epochs": 2, "batch_size": 2, "lr": 0.01, "dropout": 0.0, "backbone_lr": 0.0, "decode_workers": 1}
    finetune.main(
        finetune.Options(
            model="hgnl",
            videos=Path("clips"),
            out=Path("tuned"),
            backbone="test_resnet",
            weights="random",
            g1=4,
            g2=2,
            m1=16,
            **quick,
        )
    )
    assert "resuming  tuned: 1 of 2 epochs are done" in capsys.readouterr().out
    history = rows_of(Path("tuned/metrics.csv"))
    assert [row["epoch"] for row in history] == ["0", "1"]
    assert all(0 <= float(row["val_top1"]) <= 1 for row in history)
