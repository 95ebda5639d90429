"""Training on a GPU: every aggregator against the CPU, grids against single runs, resuming elsewhere, end to end."""

import csv
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from aggregate import ablate, evaluate, finetune, train
from aggregate.models import build
from aggregate.scores import Scores
from aggregate.training.checkpoint import Checkpoint
from device import DEVICE, PRECISIONS
from extract import RunError
from small_models import AGGREGATORS, CLASSES
from stores import classes_store
from tolerance import assert_close

pytestmark = pytest.mark.gpu

QUICK = {"epochs": 4, "batch_size": 16, "optimizer": "adamw", "lr": 0.01}
SMALL = {"hgnl": {"g1": 4, "g2": 2, "m1": 8}, "nl": {"m1": 8}}


@pytest.fixture(scope="module")
def features(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("gpu") / "feats.zarr"
    classes_store(path)
    return str(path)


@pytest.fixture
def _full_fp32(monkeypatch):
    """By default, convolutions of a GPU round fp32 to 10 bits."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


def options(features: str, out: Path, agg: str, **changes) -> train.Options:
    return train.Options(
        agg=agg, features=features, out=out, **(QUICK | SMALL.get(agg, {}) | changes)
    )


@pytest.mark.usefixtures("_full_fp32")
@pytest.mark.parametrize("name", AGGREGATORS)
def test_forward_and_backward_are_those_of_the_cpu(name: str) -> None:
    torch.manual_seed(0)
    model = build(
        name, dim=32, num_classes=len(CLASSES), dropout=0.0, **AGGREGATORS[name]
    ).eval()  # no dropout
    x, mask = torch.randn(5, 6, 32), torch.arange(6) < torch.tensor([6, 6, 3, 1, 6])[:, None]
    seen = []
    for device in ("cpu", DEVICE):
        model = model.to(device)
        model.zero_grad()
        logits = model(x.to(device), mask.to(device))
        logits.square().mean().backward()
        gradients = {
            key: value.grad.cpu()
            for key, value in model.named_parameters()
            if value.grad is not None
        }
        seen.append((logits.detach().cpu(), gradients))
    assert_close(seen[1][0], seen[0][0])
    magnitude = max(gradient.abs().max().item() for gradient in seen[0][1].values())
    for key, gradient in seen[0][1].items():
        assert_close(seen[1][1][key], gradient, magnitude=magnitude)


@pytest.mark.parametrize("agg", AGGREGATORS)
def test_training_with_features_on_the_gpu_learns_what_the_cpu_learns(
    agg, features, tmp_path, capsys
):
    accuracies = []
    for device in ("cpu", DEVICE):
        placed = options(
            features, tmp_path / device / "run", agg, device=device, placement="device", epochs=8
        )
        assert train.main(placed) == 0
        results = json.loads((tmp_path / device / "run" / "results.json").read_text())
        accuracies.append(results[agg]["6"]["top1"]["value"])
    assert min(accuracies) >= 0.8
    assert abs(accuracies[0] - accuracies[1]) <= 0.15
    scores = tmp_path / "scores.h5"
    best = tmp_path / DEVICE / "run" / "best.pt"
    assert (
        evaluate.main(
            evaluate.Options(best, features=features, split="val", out=scores, device=DEVICE)
        )
        == 0
    )
    assert np.isfinite(Scores.load(scores).logits).all()


@pytest.mark.parametrize("devices", [(DEVICE, "cpu"), ("cpu", DEVICE)])
def test_a_run_goes_on_on_another_device(devices, features, tmp_path):
    asked = options(features, tmp_path / "run", "hgnl", device=devices[0])
    run = train.prepare(asked)
    ended = run.end_epoch

    def stops(*arguments):
        row = ended(*arguments)
        if run.epoch >= 2:
            raise KeyboardInterrupt
        return row

    run.end_epoch = stops
    with pytest.raises(KeyboardInterrupt):
        run.train()
    assert train.main(replace(asked, device=devices[1])) == 0
    with (tmp_path / "run" / "metrics.csv").open() as file:
        epochs = [
            int(row["epoch"]) for row in csv.DictReader(file) if row.get("model", "hgnl") == "hgnl"
        ]
    assert sorted(set(epochs)) == list(range(4))
    assert all(
        torch.isfinite(value).all()
        for value in Checkpoint.load(tmp_path / "run" / "last.pt").state_dict.values()
    )


def test_a_pass_of_several_is_each_of_them_alone(features, tmp_path):
    lists = {
        "epochs": (4,),
        "batch_size": (16,),
        "optimizer": ("adamw",),
        "lr": (0.01,),
        "m1": (8,),
        "seeds": (0, 1),
    }
    several = ablate.Options(
        features=features, out=tmp_path / "a", g1=(2, 4), g2=(2,), device=DEVICE, **lists
    )
    assert ablate.main(several) == 0
    with (tmp_path / "a" / "ablation.csv").open() as file:
        rows = {
            (row["g1"], row["seed"]): row for row in csv.DictReader(file) if row["agg"] == "hgnl"
        }
    assert len(rows) == 4
    for (g1, seed), row in rows.items():
        out = tmp_path / f"{g1}-{seed}"
        alone = options(
            features,
            out,
            "hgnl",
            g1=int(g1),
            seed=int(seed),
            device=DEVICE,
            dropout=float(row["dropout"]),
        )
        train.main(alone)
        single = json.loads((out / "results.json").read_text())["hgnl"]["6"]["top1"]["value"]
        assert abs(float(row["top1_at_all"]) - single) <= 0.1


@pytest.fixture(scope="module")
def videos(tmp_path_factory, request) -> Path:
    """Eight real clips of two classes."""
    source = Path(__file__).parents[2] / "pipelines" / "clips" / "exercise_mini"
    folder = tmp_path_factory.mktemp("clips")
    with (source / "labels.csv").open() as file:
        rows = list(csv.DictReader(file))
    for label in ("barbell", "kettlebells"):
        for number, row in enumerate([row for row in rows if row["label"] == label][:4]):
            target = folder / ("val" if number == 3 else "train") / label / Path(row["path"]).name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.symlink_to(source / "clips" / row["path"])
    return folder


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("model", ["tsn", "hgnl", "stnet"])
def test_fine_tuning_in_half_precision(model, precision, videos, tmp_path):
    """With scaler, clipping, micro-batches of two, and TSN's activations recomputed. The test sees
    the weights that training kept."""
    more = (
        {"g1": 4, "g2": 2, "m1": 16}
        if model == "hgnl"
        else {"frames_per_segment": 2}
        if model == "stnet"
        else {}
    )
    asked = finetune.Options(
        model=model,
        videos=videos,
        out=tmp_path / "run",
        backbone="test_resnet",
        weights="random",
        epochs=2,
        batch_size=4,
        micro_batch=2,
        decode_workers=1,
        device=DEVICE,
        precision=precision,
        checkpoint_activations=model == "tsn",
        **more,
    )
    assert finetune.main(asked) == 0
    last = Checkpoint.load(tmp_path / "run" / "last.pt")
    assert all(torch.isfinite(value).all() for value in last.state_dict.values())
    scores = tmp_path / "scores.h5"
    best = evaluate.Options(
        tmp_path / "run" / "best.pt", videos=videos, out=scores, device=DEVICE, decode_workers=1
    )
    assert evaluate.main(best) == 0
    assert np.isfinite(Scores.load(scores).logits).all()


def test_fine_tuning_out_of_memory_names_the_flag(videos, tmp_path, monkeypatch):
    def full(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    asked = finetune.Options(
        model="tsn",
        videos=videos,
        out=tmp_path / "run",
        backbone="test_resnet",
        weights="random",
        epochs=1,
        micro_batch=8,
        decode_workers=1,
        device=DEVICE,
    )
    monkeypatch.setattr("torch.nn.functional.cross_entropy", full)
    with pytest.raises(RunError, match=r"too little memory for 8 videos.*try --micro-batch 4"):
        finetune.main(asked)
