"""python -m aggregate.crossval: equal to separate runs, independent of the labels that it reports
on, killed and resumed."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from aggregate import crossval, evaluate, train
from aggregate.ablation.folds import all_folds
from aggregate.metrics import bootstrap, ranks
from aggregate.scores import Scores
from aggregate.training.checkpoint import Checkpoint
from extract import InputError, RunError
from extract.store import FeatureStore
from processes import killed_after
from stores import classes_store, fail_rows, poison_row

QUICK = {"epochs": (4,), "batch_size": (16,), "lr": (0.01,), "seeds": (0,)}
GROUPS = {"g1": (4,), "g2": (2,), "m1": (8,)}


@pytest.fixture(scope="module")
def few_groups(tmp_path_factory) -> str:
    """30 videos in six groups, for folds of groups that several tests run."""
    path = tmp_path_factory.mktemp("crossval") / "few.zarr"
    classes_store(path, videos=30, noise=4.0)
    return str(path)


def options(features: str, out: Path, **changes) -> crossval.Options:
    changes = QUICK | {"agg": ("tsn", "hgnl")} | changes
    groups = GROUPS if "hgnl" in changes["agg"] else {}
    return crossval.Options(features=features, out=out, **(groups | changes))


def results_of(out: Path) -> dict:
    return json.loads((out / "results.json").read_text())


def relabeled(
    source: str, path: Path, *, splits: np.ndarray | None = None, labels: np.ndarray | None = None
) -> str:
    """The same videos with other splits, or with other labels."""
    store = FeatureStore.open(source)
    FeatureStore.from_arrays(
        path,
        store.read(slice(0, len(store))),
        lengths=store.num_frames,
        labels=store.labels if labels is None else labels,
        classes=store.classes,
        ids=store.ids.tolist(),
        splits=(store.splits if splits is None else splits).tolist(),
        groups=store.groups.tolist(),
    )
    return str(path)


# -- what it gives -----------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("one_thread")
def test_a_fold_is_what_separate_runs_of_train_give_bit_for_bit(few_groups, tmp_path, monkeypatch):
    """The inner run chooses the epoch. A run on everything but the fold, ended at that epoch,
    scores the fold."""
    wanted = options(
        few_groups, tmp_path / "cv", folds="group", agg=("tsn", "max", "hgnl"), lr=(0.003, 0.03)
    )
    crossval.main(wanted)
    store = FeatureStore.open(few_groups)
    folds = {fold.name: fold for fold in all_folds(store, wanted, [0])}
    assert len(folds) == 6
    fold = folds["g4"]
    splits = np.full(len(store), "", "U8")
    splits[fold.train], splits[fold.train[fold.held_out]] = "train", "val"
    inner = relabeled(few_groups, tmp_path / "inner.zarr", splits=splits)
    splits[fold.train], splits[fold.test] = "train", "val"
    outer = relabeled(few_groups, tmp_path / "outer.zarr", splits=splits)
    for head in results_of(tmp_path / "cv")["heads"]:
        (chosen,) = [one for one in head["chosen"] if one["fold"] == "g4"]
        own = {"g1": 4, "g2": 2, "m1": 8} if head["name"] == "hgnl" else {}
        rate = float(chosen["options"].split("lr=")[1].split()[0])
        single = train.Options(agg=head["name"], epochs=4, batch_size=16, lr=rate, **own)
        errors = {}
        for lr in (0.003, 0.03):
            out = tmp_path / f"{head['name']} {lr}"
            train.main(replace(single, features=inner, out=out, lr=lr))
            errors[lr] = Checkpoint.load(out / "best.pt").metrics["val_average_error"]
        assert chosen["inner_error"] == errors[rate] == min(errors.values())
        run = train.prepare(replace(single, features=outer, out=tmp_path / head["name"]))
        ended = run.end_epoch

        def stops(epoch, *times, run=run, ended=ended, last=chosen["epoch"]):
            ended(epoch, *times)
            if epoch == last:
                raise KeyboardInterrupt
            return run.history[-1]

        monkeypatch.setattr(run, "end_epoch", stops)
        with pytest.raises(KeyboardInterrupt):
            run.train()
        scores = tmp_path / f"{head['name']}.h5"
        asked = evaluate.Options(
            tmp_path / head["name"] / "last.pt", outer, out=scores, segments=(3, 6), batch_size=16
        )
        evaluate.main(asked)
        for segments in (3, 6):
            alone, together = (
                Scores.load(scores, segments),
                Scores.load(tmp_path / "cv" / head["scores"], segments),
            )
            places = [together.ids.index(name) for name in alone.ids]
            assert len(places) == 5
            np.testing.assert_array_equal(together.logits[places], alone.logits)


def test_the_reported_videos_have_no_say(few_groups, tmp_path):
    """Other labels of a fold's videos do not change how the fold is scored, although they change
    the scores of other folds."""
    store = FeatureStore.open(few_groups)
    labels = store.labels.copy()
    labels[store.groups == "g4"] = (labels[store.groups == "g4"] + 1) % 3
    other = relabeled(few_groups, tmp_path / "other.zarr", labels=labels)
    wanted = options(few_groups, tmp_path / "a", folds="group", agg=("hgnl",), lr=(0.003, 0.03))
    crossval.main(wanted)
    crossval.main(replace(wanted, features=other, out=tmp_path / "b"))
    one, two = (Scores.load(tmp_path / name / "hgnl.h5") for name in "ab")
    own = store.groups == "g4"
    np.testing.assert_array_equal(one.logits[own], two.logits[own])
    assert (one.logits[~own] != two.logits[~own]).any(axis=1).mean() > 0.9


def test_table_scores_and_results_say_the_same(features, tmp_path, capsys):
    out = tmp_path / "cv"
    assert (
        crossval.main(
            options(features, out, agg=("weighted", "tsn"), seeds=(0, 1), epochs=(2,), folds="3")
        )
        == 0
    )
    printed = capsys.readouterr().out
    assert "60 videos, 3 folds x 2 seeds, no group split" in printed
    results = results_of(out)
    assert (results["schema"], results["baseline"], results["videos"]) == (
        "hgnl-crossval/1",
        "tsn",
        60,
    )
    weighted, tsn = results["heads"]
    assert tsn["segments"]["6"]["difference"] is None
    assert {"seed", "fold", "options", "epoch", "inner_error"} <= tsn["chosen"][0].keys()
    assert len(tsn["chosen"]) == 6
    store, first = FeatureStore.open(features), {}
    for seed in (0, 1):
        crossval.main(
            options(
                features,
                tmp_path / str(seed),
                agg=("weighted", "tsn"),
                seeds=(seed,),
                epochs=(2,),
                folds="3",
            )
        )
        for name in ("weighted", "tsn"):
            scores = Scores.load(tmp_path / str(seed) / f"{name}.h5")
            assert scores.ids == store.ids.tolist()
            first[name, seed] = ranks(scores.logits, scores.labels) == 0
    mean = {
        name: (first[name, 0] + first[name, 1].astype(float)) / 2 for name in ("weighted", "tsn")
    }
    measured = weighted["segments"]["6"]
    assert measured["by_seed"] == [first["weighted", seed].mean() for seed in (0, 1)]
    assert measured["top1"] == vars(bootstrap(mean["weighted"], store.groups))
    assert measured["difference"] == vars(bootstrap(mean["weighted"] - mean["tsn"], store.groups))
    assert results["resampled"] == "12 groups of 60 videos"
    assert "intervals over 12 groups of 60 videos (bootstrap" in printed
    assert Scores.load(out / "tsn.h5").groups.tolist() == store.groups.tolist()
    assert f"{100 * measured['top1']['value']:.2f} [" in printed
    together = Scores.load(out / "tsn.h5")
    alone = [Scores.load(tmp_path / str(seed) / "tsn.h5").logits for seed in (0, 1)]
    np.testing.assert_allclose(together.logits, np.mean(alone, axis=0), rtol=1e-6)


@given(st.integers(0, 5), st.sampled_from(["2", "3", "5", "group"]), st.booleans())
def test_folds_hold_every_video_once_and_split_no_group(features, seed, folds, grouped):
    store = FeatureStore.open(features)
    if not grouped and folds != "group":
        store.__dict__["groups"] = np.full(len(store), "")
    several = all_folds(store, options(features, Path(), folds=folds), [seed])
    assert sorted(np.concatenate([fold.test for fold in several])) == list(range(60))
    for fold in several:
        assert sorted([*fold.test, *fold.train]) == list(range(60))
        inner, held_out = fold.train[~fold.held_out], fold.train[fold.held_out]
        assert set(store.labels[inner]) == {0, 1, 2}
        if len(set(store.groups)) > 1:
            parts = [set(store.groups[rows]) for rows in (fold.test, inner, held_out)]
            assert sum(map(len, parts)) == len(set.union(*parts)) == 12
        else:
            counts = np.bincount(store.labels[fold.test])
            assert counts.max() - counts.min() <= 1


def test_failed_videos_are_errors_and_chosen_splits_alone_count(tmp_path, capsys):
    classes_store(tmp_path / "f.zarr")
    fail_rows(tmp_path / "f.zarr", [3])
    crossval.main(
        options(
            str(tmp_path / "f.zarr"), tmp_path / "cv", agg=("tsn",), splits=("train",), epochs=(12,)
        )
    )
    scores = Scores.load(tmp_path / "cv" / "tsn.h5")
    store = FeatureStore.open(tmp_path / "f.zarr")
    assert scores.ids == store.ids[store.splits == "train"].tolist()
    assert [scores.ids[row] for row in np.flatnonzero(scores.failed)] == ["v/0003.mp4"]
    assert results_of(tmp_path / "cv")["heads"][0]["segments"]["6"]["top1"]["value"] < 1


# -- the folder --------------------------------------------------------------------------------------------------------


def test_kill_9_loses_the_fold_in_hand_only(features, tmp_path):
    wanted = options(features, tmp_path / "whole", epochs=(8,), seeds=(0, 1), folds="2")
    crossval.main(wanted)
    cut = tmp_path / "cut"
    flags = "--agg tsn hgnl --epochs 8 --batch-size 16 --lr 0.01 --g1 4 --g2 2 --m1 8 --seeds 0 1"
    log = cut / "results.jsonl"
    command = f"aggregate.crossval {flags} --folds 2 --features {features} --out {cut}"
    before = killed_after(2, command, log)
    assert before.count(b"\n") == 2
    crossval.main(replace(wanted, out=cut))
    assert log.read_bytes().startswith(before[: before.rfind(b"\n") + 1])
    assert results_of(cut) == results_of(tmp_path / "whole")
    for name in ("tsn.h5", "hgnl.h5"):
        np.testing.assert_array_equal(
            Scores.load(cut / name).logits, Scores.load(tmp_path / "whole" / name).logits
        )
    with pytest.raises(InputError, match=r"folds: '?2'? in the folder, '?3'? now"):
        crossval.main(replace(wanted, out=cut, folds="3"))


# -- what cannot be divided --------------------------------------------------------------------------------------------


def small(path: Path, labels: str, groups: str = "") -> str:
    """A store with one video per letter of `labels`, its class, and the letter of `groups` at the
    same position as its group."""
    names = sorted(set(labels))
    FeatureStore.from_arrays(
        path,
        np.random.default_rng(0).normal(size=(len(labels), 3, 8)),
        lengths=np.full(len(labels), 3),
        labels=[names.index(label) for label in labels],
        classes=names,
        groups=list(groups or [""] * len(labels)),
    )
    return str(path)


@pytest.mark.parametrize(
    ("labels", "groups", "changes", "message"),
    [
        (
            "aaaaaabbb",
            "",
            {},
            "--folds 5: class 'b' has 3 videos, so a fold would be without it; give --folds 3",
        ),
        ("aabbaabb", "", {"folds": "group"}, "--folds group: the 8 videos of .* have no group"),
        (
            "aabbaabb",
            "xxxxxxxx",
            {"folds": "group"},
            r"--folds group: the 8 videos of .* are of one group \('x'\)",
        ),
        (
            "aabbaabb",
            "xxxxyyyy",
            {"folds": "group"},
            "fold x: all it has to train on is one group.* at least 3",
        ),
        (
            "aaabbb" * 2,
            "xxyyzz" * 2,
            {},
            "--folds 5: there are 3 groups, which are not split; give --folds group",
        ),
        (
            "aabb" * 3 + "cc",
            "wwwwxxxxyyyyzz",
            {"folds": "group", "val_fraction": 0.5},
            "fold z: 1 of 3 classes have no video to train on: c",
        ),
        ("abab", "", {"folds": "2"}, "fold 0: none of its 2 videos to train on can be held out"),
        ("aabb", "", {"folds": "1"}, "--folds 1: give a number from 2 on, or group"),
        ("aabb", "", {"folds": "groups"}, "--folds groups: give a number from 2 on, or group"),
        ("aabb", "", {"splits": ("val",)}, "--splits val: .* has no such split; it has ''"),
        (
            "aabb",
            "",
            {"val_fraction": 1.0, "folds": "2"},
            "--val-fraction 1: expected a fraction between 0 and 1",
        ),
        ("aabb", "", {"agg": ("max",), "g1": (4,)}, "--g1 4 does not apply to --agg max"),
    ],
)
def test_what_cannot_be_divided_is_named_and_leaves_no_folder(
    labels, groups, changes, message, tmp_path
):
    features = small(tmp_path / "f.zarr", labels, groups)
    with pytest.raises(InputError, match=message):
        crossval.main(options(features, tmp_path / "cv", **changes))
    assert not (tmp_path / "cv").exists()


def test_a_video_without_a_group_is_a_group_of_its_own_and_windows_of_a_file_are_one(tmp_path):
    """100 whole files and 20 spans of 5 files give even folds, and no file is in two parts of a
    fold."""
    ids = [f"{row}.mp4" for row in range(100)] + [
        f"s{row // 4}.mp4#{row % 4}000-{row % 4 + 1}000" for row in range(20)
    ]
    groups = [""] * 120
    groups[0] = groups[1] = groups[100] = "anna"  # the other spans of s0.mp4 too
    store = FeatureStore.from_arrays(
        tmp_path / "f.zarr",
        np.zeros((120, 3, 8)),
        lengths=np.full(120, 3),
        labels=np.arange(120) % 2,
        classes=["a", "b"],
        ids=ids,
        groups=groups,
    )
    folds = all_folds(store, options(store.path, Path(), folds="5"), [0])
    assert all(20 <= len(fold.test) <= 28 for fold in folds)
    belongs = np.array([name.split("#")[0] for name in ids], object)
    belongs[[0, 1, *range(100, 104)]] = "anna"
    for fold in folds:
        parts = [
            set(belongs[rows])
            for rows in (fold.test, fold.train[~fold.held_out], fold.train[fold.held_out])
        ]
        assert sum(map(len, parts)) == len(set.union(*parts)) == 103
    left_out = all_folds(store, options(store.path, Path(), folds="group"), [0])
    assert [len(fold.test) for fold in left_out if fold.name == "anna"] == [6]
    assert len(left_out) == 103


def test_a_fold_that_tests_not_every_class_is_said(tmp_path, capsys):
    features = small(tmp_path / "f.zarr", "aabb" * 4 + "aa", "wwwwxxxxyyyyzzzzvv")
    chosen = options(features, tmp_path / "cv", folds="group", agg=("tsn",), frames=(2,))
    assert crossval.main(chosen) == 0
    assert "1 do not test every class: v of seed 0" in capsys.readouterr().out


def test_a_group_with_a_class_of_its_own_can_be_held_out_where_that_is_allowed(tmp_path):
    features = small(tmp_path / "f.zarr", "aabc" + "aabd" + "aabe" + "aabf", "wwwwxxxxyyyyzzzz")
    wanted = options(features, tmp_path / "cv", folds="group", agg=("tsn",), val_fraction=0.4)
    with pytest.raises(InputError, match=r"none of its 12 videos .* --allow-missing-classes"):
        crossval.main(wanted)
    assert crossval.main(replace(wanted, allow_missing_classes=True)) == 0


def test_nan_in_features_is_traced_to_its_video(tmp_path):
    classes_store(tmp_path / "f.zarr")
    poison_row(tmp_path / "f.zarr", 4)
    with pytest.raises(RunError, match=r"features of v/0004\.mp4 \(row 4\) are not finite"):
        crossval.main(options(str(tmp_path / "f.zarr"), tmp_path / "cv"))


def test_an_aggregator_that_diverges_whatever_is_tried_is_named(features, tmp_path):
    with pytest.raises(
        RunError, match="fold 0, seed 0: every tsn diverged; a smaller --lr may help"
    ):
        crossval.main(options(features, tmp_path / "cv", agg=("tsn",), lr=(1e38,)))


def test_a_head_that_cannot_be_built_is_named_before_any_fold(features, tmp_path):
    with pytest.raises(InputError, match=r"--agg hgnl: g2 2 does not divide g1 3"):
        crossval.main(options(features, tmp_path / "out", g1=(3,)))
    assert not (tmp_path / "out").exists()


def test_heads_that_see_order_are_tested_with_as_many_frames_as_in_training(
    features, tmp_path, capsys
):
    quick = {"epochs": (1,), "folds": "2"}
    heads = options(features, tmp_path / "cv", agg=("tsn", "gru", "attentive-time"), **quick)
    crossval.main(heads)
    assert "gru sees the order of frames, so it is tested with 3" in capsys.readouterr().out
    measured = {head["name"]: head["segments"] for head in results_of(tmp_path / "cv")["heads"]}
    assert {name: [*counts] for name, counts in measured.items()} == {
        "tsn": ["3", "6"],
        "gru": ["3"],
        "attentive-time": ["3"],
    }
    assert measured["gru"]["3"]["difference"] is not None
    assert Scores.load(tmp_path / "cv" / "gru.h5").segments == 3
    alone = options(features, tmp_path / "gru first", agg=("gru", "max"), **quick)
    crossval.main(alone)  # all are compared at the only number of the baseline
    _, best = results_of(tmp_path / "gru first")["heads"]
    assert best["segments"]["6"]["difference"] is not None
    several = options(features, tmp_path / "several", agg=("gru",), frames=(2, 3), **quick)
    crossval.main(several)  # the number that a fold chooses is not known in advance
    assert [*results_of(tmp_path / "several")["heads"][0]["segments"]] == ["2", "6"]


def test_results_of_earlier_versions_which_tested_all_frames_are_continued(features, tmp_path):
    run = options(features, tmp_path / "cv", agg=("tsn", "gru"), epochs=(1,), folds="2")
    crossval.main(run)
    first = results_of(tmp_path / "cv")
    for file in (tmp_path / "cv" / "places").iterdir():
        if len(array := np.load(file)) == 1:
            np.save(file, np.concatenate([array, array + 1]))
    crossval.main(run)
    assert results_of(tmp_path / "cv") == first
