"""python -m aggregate.ablate as a user runs it: equal to aggregate.train, killed and resumed."""

import csv
import json
import math
import os
import shlex
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import tyro
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from aggregate import ablate, train
from aggregate.ablation import compare
from aggregate.ablation.configurations import group_into_passes
from aggregate.ablation.grid import GridTrainer
from aggregate.ablation.records import Records
from aggregate.metrics import paired_bootstrap
from aggregate.training.checkpoint import Checkpoint
from aggregate.training.configurations import Configuration
from aggregate.training.loop import fit
from aggregate.training.splits import choose_rows
from extract import InputError, RunError
from extract.commands import command_of
from extract.store import FeatureStore
from processes import killed_after
from stores import classes_store, poison_row

TIMES = {"seconds", "pass_seconds", "pass_models"}


def options(features: str, out: Path, **changes) -> ablate.Options:
    small = {"agg": ("hgnl",), "g1": (4,), "g2": (2,), "m1": (8,), "seeds": (0,)}
    quick = {"epochs": (3,), "batch_size": (16,), "lr": (0.01,), "dropout": (0.3,)}
    return ablate.Options(features=features, out=out, **(small | quick | changes))


def planned(chosen: ablate.Options) -> list[Configuration]:
    return ablate.plan(chosen, FeatureStore.open(chosen.features)).configurations


def results_of(out: Path) -> dict[tuple[str, str], dict[str, str]]:
    """The rows of ablation.csv by name and seed, without the columns that differ from run to
    run."""
    with open(out / "ablation.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    return {
        (row["name"], row["seed"]): {k: v for k, v in row.items() if k not in TIMES} for row in rows
    }


# -- equal to aggregate.train --------------------------------------------------------------------------------------


def test_each_configuration_is_what_train_gives_for_it_alone_bit_for_bit(features, tmp_path):
    """The weights of the best epoch and the measures are equal, for models of every kind that
    shared a pass."""
    several = options(
        features,
        tmp_path / "a",
        agg=("tsn", "nl", "hgnl", "txb"),
        shared=("false", "true"),
        lr=(0.003, 0.01),
        seeds=(1,),
    )
    share = planned(several)
    assert len(share) == 2 * (1 + 1 + 2 + 1)
    assert len({one.batch_key for one in share}) == 1
    trainer = GridTrainer(FeatureStore.open(features), device="cpu")
    rows, val_rows, _ = choose_rows(trainer.store, share[0].options, 1)
    learners, source = trainer.make_learners(share, rows, val_rows)
    assert len(list(fit(learners, source, strict=False))) == 3
    rows = [result.row for result in trainer.run(share)]
    assert not any(learner.diverged for learner in learners)
    for number in (0, 3, 5, 6, 9):
        one, learner, row = share[number], learners[number], rows[number]
        out = tmp_path / str(number)
        words = shlex.split(command_of("aggregate.train", one.options))
        assert words[:2] == ["hgnl", "train"]
        alone = tyro.cli(train.Options, args=words[2:], config=(tyro.conf.FlagCreatePairsOff,))
        train.main(replace(alone, out=out))
        checkpoint = Checkpoint.load(out / "best.pt")
        best = {"val_average_error": learner.best_error, "epoch": learner.best_epoch}
        assert best.items() <= checkpoint.metrics.items()
        for name, tensor in checkpoint.state_dict.items():
            assert torch.equal(tensor, learner.best_state[name]), (one.name, name)
        reported = json.loads((out / "results.json").read_text())[one.options.agg]
        for segments, suffix in (("3", "at_frames"), ("6", "at_all")):
            for measure in ("top1", "top5", "average_error"):
                interval = reported[segments][measure]
                assert row[f"{measure}_{suffix}"] == interval["value"]
                assert row[f"{measure}_{suffix}_low"] == interval["low"]
        if one.options.agg in ("nl", "hgnl"):
            model = checkpoint.model()
            assert row["s"] == model.aggregator.scale.item()
            assert row["parameters"] == sum(parameter.numel() for parameter in model.parameters())
        else:
            assert row["s"] is None


def test_with_held_out_videos_a_seed_validates_on_its_own(tmp_path):
    """Without a validation split the seed chooses the validation videos, as in aggregate.train."""
    store = classes_store(tmp_path / "f.zarr", splits=False, noise=4.0)
    path = str(tmp_path / "f.zarr")
    share = planned(
        options(path, tmp_path / "a", agg=("tsn",), g1=(16,), g2=(8,), m1=(), seeds=(0, 1))
    )
    trainer = GridTrainer(store, device="cpu")
    for one in share:
        (result,) = trainer.run([one])
        train.main(replace(one.options, out=tmp_path / str(one.options.seed)))
        reported = json.loads((tmp_path / str(one.options.seed) / "results.json").read_text())
        assert result.row["top1_at_all"] == reported["tsn"]["6"]["top1"]["value"]
        np.testing.assert_array_equal(
            result.label_ranks[0], choose_rows(store, one.options, one.options.seed)[1]
        )
    assert choose_rows(store, share[0].options, 0)[1].tolist() != result.label_ranks[0].tolist()


def test_all_start_from_the_checkpoint(features, tmp_path, capsys):
    # Without batch norm, whose statistics change even at a learning rate of 0.
    train.main(
        train.Options(
            agg="tsn", features=features, out=tmp_path / "tsn", epochs=4, standardize=False
        )
    )
    tsn = tmp_path / "tsn" / "best.pt"
    still = {"lr": (1e-12,), "epochs": (1,), "standardize": ("false",)}
    frozen = options(features, tmp_path / "a", agg=("tsn", "hgnl", "txb"), init=tsn, **still)
    ablate.main(frozen)
    printed = capsys.readouterr().out
    assert printed.count("hgnl: from") == 1
    assert "skipped   txb: --init classifies 16 features, this model 8" in printed
    rows = list(results_of(tmp_path / "a").values())
    best = json.loads((tmp_path / "tsn" / "results.json").read_text())["tsn"]["6"]
    assert [float(row["top1_at_all"]) for row in rows] == [best["top1"]["value"]] * 2
    assert "top-1 - first's" in printed
    assert "+0.00 [+0.0, +0.0]" in printed


# -- the plan ------------------------------------------------------------------------------------------------------


def test_invalid_pairs_are_skipped_and_listed_and_foreign_options_left_out(features, tmp_path):
    store = FeatureStore.open(features)
    wanted = options(
        features, tmp_path, agg=("tsn", "nl", "hgnl"), g1=(2, 4, 32), g2=(2, 4), seeds=(0, 1), m1=()
    )
    chosen = ablate.plan(replace(wanted, attention=("relu", "softmax"), norm=("none", "n")), store)
    names = [one.name for one in chosen.configurations if one.options.seed == 0]
    assert names[:2] == ["tsn", "nl"]
    assert names[2:5] == [f"hgnl g1=2 g2=2 {how}" for how in ("norm=none attention=relu",)] + [
        "hgnl g1=2 g2=2 norm=none attention=softmax",
        "hgnl g1=2 g2=2 norm=n attention=relu",
    ]
    assert len(names) == 2 + 3 * 1  # dim/8 = 2: g1 = 4 does not divide it
    reasons = chosen.skipped
    assert reasons["hgnl g1=2 g2=4 norm=none attention=relu"].startswith(
        "g2 4 does not divide g1 2"
    )
    assert reasons["hgnl g1=32 g2=2 norm=none attention=relu"].startswith(
        "g1 32 does not divide dim 16"
    )
    assert "norm 'n' is for the ReLU map" in reasons["hgnl g1=2 g2=2 norm=n attention=softmax"]
    assert len(names) + len(reasons) == 2 + 3 * 2 * 4


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"agg": ("tsn", "max")}, "--g1 4 does not apply to --agg tsn max"),
        ({"g1": (3, 5)}, "no configuration can be built; hgnl g1=3: g2 2 does not divide g1 3"),
        ({"frames": (3, 7)}, "--frames 7: .* holds 6 frames per video"),
        ({"seeds": ()}, "--seeds needs at least one value"),
        ({"g1": ()}, "--g1 needs at least one value"),
        ({"lr": (0.1, -1.0)}, "--lr -1.0: expected more than 0"),
        ({"at_once": 0}, "--at-once 0: expected at least 1"),
        ({"train_split": "training"}, "has no such split"),
        ({"init": Path("none.pt")}, "the checkpoint none.pt does not exist"),
        ({"device": "gpu"}, "--device 'gpu' is not known"),
    ],
)
def test_wrong_options_are_named_and_leave_no_folder(changes, message, features, tmp_path):
    with pytest.raises(InputError, match=message):
        ablate.main(options(features, tmp_path / "a", **changes))
    assert not (tmp_path / "a").exists()


@given(
    st.sets(st.tuples(*[st.integers(0, 2)] * 4, st.integers(0, 5)), max_size=40),
    st.integers(1, 5),
)
def test_passes_hold_everything_once_and_only_what_sees_the_same(specs, at_once):
    class One:
        def __init__(self, spec):
            self.batch_key, self.spec = spec[:4], spec

    parts = group_into_passes(map(One, specs), at_once=at_once)
    assert sorted(one.spec for part in parts for one in part) == sorted(specs)
    for part in parts:
        assert 1 <= len(part) <= at_once
        assert len({one.batch_key for one in part}) == 1


# -- the folder ----------------------------------------------------------------------------------------------------


def test_trained_on_all_segments_each_measure_is_shown_once(features, tmp_path):
    every = FeatureStore.open(features).frames_per_video
    for frames, times in ((every, 1), (2, 2)):
        out = tmp_path / str(frames)
        assert ablate.main(options(features, out, frames=(frames,), epochs=(1,))) == 0
        head = (out / "summary.txt").read_text().splitlines()[0]
        assert (head.count("top-1 % @"), head.count(f"top-1 % @{every}")) == (times, 1)


def test_tables_and_figures_of_a_grid(features, tmp_path, capsys):
    out = tmp_path / "a"
    wanted = options(features, out, g1=(2, 4), g2=(1, 2, 4), seeds=(0, 1, 2))
    assert ablate.main(wanted) == 0
    printed = capsys.readouterr().out
    assert "5 configurations x 3 seeds in 3 passes, 1 skipped" in printed
    assert "skipped   hgnl g1=2 g2=4: g2 4 does not divide g1 2" in printed
    rows = results_of(out)
    assert len(rows) == 15
    with open(out / "summary.csv", newline="") as file:
        summary = {row["name"]: row for row in csv.DictReader(file)}
    for name, line in summary.items():
        for measure in ("top1_at_all", "average_error_at_frames"):
            values = [float(rows[name, str(seed)][measure]) for seed in range(3)]
            assert float(line[measure]) == pytest.approx(np.mean(values))
            if len(set(values)) > 1:
                low, high = stats.t.interval(0.95, 2, np.mean(values), stats.sem(values))
                assert float(line[f"{measure}_low"]) == pytest.approx(low)
                assert float(line[f"{measure}_high"]) == pytest.approx(high)
    assert len({line["top1_at_all"] for line in summary.values()}) > 1, (
        "all are equal: the test shows nothing"
    )
    text = (out / "summary.txt").read_text()
    assert text in printed
    (heat,) = [part for part in text.split("\n\n") if "g2=1" in part.splitlines()[0]]
    cells = {line.split()[0]: line.split()[1:] for line in heat.splitlines()[1:]}
    assert cells["g1=2"][2] == "."
    assert cells["g1=4"][2] == f"{100 * float(summary['hgnl g1=4 g2=4']['top1_at_all']):.2f}"
    for name in ("heatmap.png", "pareto.png"):
        assert (out / name).read_bytes().startswith(b"\x89PNG")
    best = max(rows.values(), key=lambda row: float(row["top1_at_all"]))
    assert f"--g1 {best['g1']}" in printed.splitlines()[-1]


def test_without_matplotlib_the_figures_are_left_out_and_that_is_said(
    features, tmp_path, capsys, monkeypatch
):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert ablate.main(options(features, tmp_path / "a", epochs=(1,))) == 0
    assert "no figures: matplotlib is not installed" in capsys.readouterr().out
    assert not list((tmp_path / "a").glob("*.png"))


@pytest.mark.usefixtures("one_thread")
def test_kill_9_loses_the_pass_in_hand_only(features, tmp_path):
    """The command is killed in the third of four passes, and its last line is torn. Finished
    results are not computed again, and the other results are the same."""
    wanted = options(
        features, tmp_path / "whole", lr=(0.003, 0.01), seeds=(0, 1, 2, 3), epochs=(12,)
    )
    ablate.main(wanted)
    cut = tmp_path / "cut"
    flags = "--agg hgnl --g1 4 --g2 2 --m1 8 --seeds 0 1 2 3 --epochs 12 --batch-size 16 --lr 0.003 0.01 --dropout 0.3"
    log = cut / "results.jsonl"
    before = killed_after(4, f"aggregate.ablate {flags} --features {features} --out {cut}", log)
    count = before.count(b"\n")
    assert count == 4
    with open(log, "ab") as file:
        file.write(b'{"key": "torn')
    trained: list[int] = []
    run = GridTrainer.run

    def counted(self, share, on_step=lambda: None):
        trained.append(len(share))
        return run(self, share, on_step)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(GridTrainer, "run", counted)
        patch.setattr(ablate, "plan_processes", lambda tasks, device: (1, 1))  # counted here
        ablate.main(replace(wanted, out=cut))
        assert sum(trained) == 8 - count
        ablate.main(replace(wanted, out=cut))  # nothing is left: only the tables are written
        assert sum(trained) == 8 - count
    assert log.read_bytes().startswith(before)
    assert log.read_bytes().count(b"\n") == 8
    assert results_of(cut) == results_of(tmp_path / "whole")


def test_other_options_and_other_contents_are_refused(features, tmp_path):
    wanted = options(features, tmp_path / "a", epochs=(1,))
    ablate.main(wanted)
    with pytest.raises(InputError, match=r"lr: \[0\.01\] in the folder, \[0\.02\] now"):
        ablate.main(replace(wanted, lr=(0.02,)))
    ablate.main(replace(wanted, placement="mmap", at_once=1))
    kept = Path(features).rename(tmp_path / "kept.zarr")
    try:
        classes_store(Path(features), videos=63)
        with pytest.raises(
            InputError, match=r"the store's videos, ids, .*labels, .* \(60 videos then, 63 now\)"
        ):
            ablate.main(wanted)
    finally:
        Path(features).rename(tmp_path / "other.zarr")
        kept.rename(features)
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "thesis.txt").write_text("my only copy")
    with pytest.raises(InputError, match="is not empty and holds no ablation"):
        ablate.main(replace(wanted, out=tmp_path / "b"))


def test_two_processes_do_not_share_a_folder(features, tmp_path):
    wanted = options(features, tmp_path / "a", epochs=(1,))
    with (
        Records(wanted, FeatureStore.open(features), by=("name", "seed"), kind="ablation"),
        pytest.raises(
            RunError, match=rf"{tmp_path / 'a'} is being written by process {os.getpid()} on "
        ),
    ):
        ablate.main(wanted)


# -- failures ------------------------------------------------------------------------------------------------------


def test_a_model_that_diverges_leaves_the_others_alone(features, tmp_path, capsys):
    """One learning rate is too large, one is good. The first is reported, and the good model is
    what it would be alone."""
    wild = {
        "agg": ("nl",),
        "g1": (16,),
        "g2": (8,),
        "m1": (4,),
        "recipe": "paper",
        "scale_init": (1.0,),
    }
    ablate.main(options(features, tmp_path / "both", lr=(0.01, 1e30), **wild))
    printed = capsys.readouterr().out
    assert "1 DIVERGED" in printed
    ablate.main(options(features, tmp_path / "one", lr=(0.01,), **wild))
    both, one = results_of(tmp_path / "both"), results_of(tmp_path / "one")
    assert both["nl lr=1e+30", "0"]["status"].startswith(("the loss is", "scores are not finite"))
    assert both["nl lr=1e+30", "0"]["top1_at_all"] == ""
    assert {**both["nl lr=0.01", "0"], "name": ""} == {**one["nl", "0"], "name": ""}
    ablate.main(options(features, tmp_path / "none", lr=(1e30,), **wild))
    assert "every configuration diverged" in capsys.readouterr().out


def test_scores_that_are_no_numbers_are_a_divergence_too(features, tmp_path):
    """A loss may stay finite although the weights after the step are not."""
    share = planned(options(features, tmp_path / "a", lr=(0.01, 0.02), epochs=(2,)))
    trainer = GridTrainer(FeatureStore.open(features), device="cpu")
    begin = trainer.make_learners

    def damaged(*arguments):
        learners, source = begin(*arguments)
        step, model = learners[1].step, learners[1].model

        def breaks(batch, epoch, number):
            step(batch, epoch, number)
            if epoch == 1:
                model.classifier.bias.data.fill_(math.nan)

        learners[1].step = breaks
        return learners, source

    trainer.make_learners = damaged
    good, bad = trainer.run(share)
    assert bad.row["status"] in ("scores are not finite in epoch 1", "the loss is nan in epoch 1")
    assert bad.label_ranks is None
    assert good.row["status"] == "done"


def test_nan_in_features_is_traced_to_its_video(tmp_path):
    classes_store(tmp_path / "f.zarr")
    poison_row(tmp_path / "f.zarr", 4)
    with pytest.raises(RunError, match=r"features of v/0004\.mp4 \(row 4\) are not finite"):
        ablate.main(options(str(tmp_path / "f.zarr"), tmp_path / "a"))


# -- comparisons ---------------------------------------------------------------------------------------------------


@given(st.lists(st.tuples(st.integers(1, 6), st.integers(0, 6)), min_size=1, max_size=12))
def test_pareto_front_by_comparing_all_with_all(points):
    lines = [
        {"name": str(i), "parameters": x, "top1_at_all": y / 6} for i, (x, y) in enumerate(points)
    ]
    front = {
        (x, y)
        for x, y in points
        if not any((a <= x and b > y) or (a < x and b >= y) for a, b in points)
    }
    named = [points[int(name)] for name in compare.pareto(lines)]
    assert len(named) == len(front)
    assert set(named) == front
    assert named == sorted(named)


@given(st.lists(st.floats(0, 1), min_size=2, max_size=6))
def test_interval_over_seeds_is_students(values):
    found = compare.over_seeds(values)
    half = stats.t.ppf(0.975, len(values) - 1) * np.std(values, ddof=1) / len(values) ** 0.5
    low, high = max(np.mean(values) - half, 0), min(np.mean(values) + half, 1)
    assert (found.value, found.low, found.high) == pytest.approx((np.mean(values), low, high))


def test_differences_are_paired_by_video():
    rng = np.random.default_rng(0)
    videos = np.arange(40)
    places = {(name, 0): np.stack([videos, *rng.integers(0, 3, (2, 40))]) for name in "ab"}
    found = compare.difference(places, "b", "a", [0])
    assert found == paired_bootstrap(places["b", 0][2] == 0, places["a", 0][2] == 0)
    # A second seed with other videos adds videos; with the same videos, it is averaged with the
    # first.
    places |= {(name, 1): places[name, 0] + np.array([[40], [0], [0]]) for name in "ab"}
    assert compare.difference(places, "b", "a", [0, 1]).value == pytest.approx(found.value)
    places |= {(name, 1): places[name, 0] for name in "ab"}
    assert compare.difference(places, "b", "a", [0, 1]) == found
    assert compare.difference(places | {("a", 0): None}, "b", "a", [0]) is None


def test_an_interval_over_seeds_stays_among_fractions():
    row = {
        "name": "tsn",
        "status": "done",
        "s": None,
        "unevenness": None,
        "changed": None,
        "seconds": 1.0,
        "parameters": 1,
    }
    rows = [
        row | {"seed": seed} | dict.fromkeys(compare.MEASURES, value)
        for seed, value in enumerate((1.0, 0.8))
    ]
    (line,) = compare.summarize(rows, {})
    assert {line[f"{measure}_high"] for measure in compare.MEASURES} == {1.0}
    assert all(0 <= line[f"{measure}_low"] < 0.9 for measure in compare.MEASURES)
