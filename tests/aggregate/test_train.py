"""python -m aggregate.train and aggregate.evaluate as a user runs them, on stores whose classes can
be learned."""

import csv
import json
import os
import signal
import subprocess
import zipfile
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

from aggregate import evaluate, train
from aggregate.inference import logits_of
from aggregate.models import AGGREGATORS
from aggregate.scores import Scores
from aggregate.training.checkpoint import Checkpoint
from aggregate.training.recipes import recipe
from aggregate.training.splits import choose_rows
from extract import InputError, RunError
from extract.store import FeatureStore
from pipelines.__main__ import main as hgnl
from processes import running
from stores import classes_store, fail_rows, poison_row


@pytest.fixture(scope="module")
def features(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("train") / "feats.zarr"
    classes_store(path)
    return str(path)


def options(features: str, out: Path, agg: str = "tsn", **changes) -> train.Options:
    quick = {"epochs": 3, "batch_size": 16, "optimizer": "adamw", "lr": 0.01, "dropout": 0.3}
    if agg == "hgnl":
        quick |= {"g1": 4, "g2": 2, "m1": 8}
    return train.Options(agg=agg, features=features, out=out, **(quick | changes))


@pytest.mark.parametrize("agg", AGGREGATORS)
def test_every_aggregator_learns_and_is_compared(agg, features, tmp_path, capsys):
    assert train.main(options(features, tmp_path / "run", agg, epochs=12)) == 0
    printed = capsys.readouterr().out
    assert {"best.pt", "last.pt", "metrics.csv", "options.json", "results.json"} <= set(
        os.listdir(tmp_path / "run")
    )
    assert any(name.startswith("events.out.tfevents") for name in os.listdir(tmp_path / "run"))
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results[agg]["6"]["top1"]["value"] >= 0.9
    assert results[agg]["6"]["listed"] == 18
    if agg != "tsn":
        assert "tsn (baseline)" in results
        assert f"{agg} - tsn (baseline): top-1" in printed
    assert ("attention: frame weights are" in printed) == (agg in ("nl", "hgnl", "weighted"))


def test_a_resumed_run_is_the_undisturbed_run_bit_for_bit(features, tmp_path):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    wanted = options(features, whole, "hgnl", epochs=5)
    train.main(wanted)
    wanted = replace(wanted, out=cut)

    class KilledError(Exception):
        pass

    for stop_after in (1, 3):
        run = train.prepare(wanted)
        ended = run.end_epoch

        def dies(*args, run=run, ended=ended, stop_after=stop_after):
            if run.epoch == stop_after:  # the epoch is trained, and lost
                raise KilledError
            return ended(*args)

        run.end_epoch = dies
        with pytest.raises(KilledError):
            run.train()
    train.main(wanted)
    one, other = (Checkpoint.load(folder / "last.pt") for folder in (whole, cut))
    for name, tensor in one.state_dict.items():
        assert torch.equal(tensor, other.state_dict[name]), name
    assert one.training["learners"][1]["best_epoch"] == other.training["learners"][1]["best_epoch"]
    rows = [
        list(csv.DictReader((folder / "metrics.csv").read_text().splitlines()))
        for folder in (whole, cut)
    ]
    times = {"seconds": 0, "waited": 0}
    assert [row | times for row in rows[0]] == [row | times for row in rows[1]]
    assert len(rows[0]) == 5


def test_ctrl_c_keeps_the_last_epoch_and_says_how_to_go_on(features, tmp_path):
    last = tmp_path / "run" / "last.pt"
    command = f"aggregate.train --agg tsn --features {features} --out {last.parent} --epochs 100000 --batch-size 8"
    with running(command, until=last.exists, output=subprocess.PIPE) as process:
        process.send_signal(signal.SIGINT)
        printed = process.communicate(timeout=60)[0]
    assert process.returncode == 130
    assert "the same command resumes" in printed
    assert Checkpoint.load(last).training["epoch"] >= 1


def test_hgnl_starts_as_the_tsn_it_is_initialized_from(features, tmp_path, capsys):
    train.main(options(features, tmp_path / "tsn", epochs=8))
    tsn = tmp_path / "tsn" / "best.pt"
    start = options(
        features,
        tmp_path / "hgnl",
        "hgnl",
        init=tsn,
        recipe="paper",
        lr=1e-12,
        epochs=1,
        control=True,
    )
    train.main(start)
    printed = capsys.readouterr().out
    assert "3 carried over by class name, 0 start fresh" in printed
    results = json.loads((tmp_path / "hgnl" / "results.json").read_text())
    assert results["hgnl"] == results["tsn (as it was)"] == results["tsn (control)"]
    assert "attention is not used" in printed


def test_other_classes_carry_over_by_name(features, tmp_path, capsys):
    train.main(options(features, tmp_path / "tsn"))
    old = Checkpoint.load(tmp_path / "tsn" / "best.pt")
    k600 = replace(old, classes=["class 2", "class 0", "Class 1"])
    k600.save(tmp_path / "k600.pt")
    train.main(options(features, tmp_path / "run", init=tmp_path / "k600.pt", lr=1e-12, epochs=1))
    printed = capsys.readouterr().out
    assert "2 carried over by class name, 1 start fresh" in printed
    assert "'class 1' starts fresh; the source spells it 'Class 1'" in printed
    new = Checkpoint.load(tmp_path / "run" / "last.pt")
    rows = [old.state_dict["classifier.weight"][row] for row in (1, 0)]
    torch.testing.assert_close(new.state_dict["classifier.weight"][[0, 2]], torch.stack(rows))


def test_without_a_validation_split_whole_groups_are_held_out(tmp_path, capsys):
    store = classes_store(tmp_path / "f.zarr", splits=False)
    train.main(options(str(tmp_path / "f.zarr"), tmp_path / "run"))
    assert "NO SPLIT 'val': 20% held out of the others, whole groups" in capsys.readouterr().out
    rows, val, _ = choose_rows(store, options("", Path()), 0)
    assert not set(store.groups[rows]) & set(store.groups[val])
    assert sorted([*rows, *val]) == list(range(60))
    assert 8 <= len(val) <= 16
    assert set(store.labels[val]) == {0, 1, 2}
    again = choose_rows(store, options("", Path()), 1)[1]
    assert set(again) != set(val)


def test_a_group_can_be_held_out_by_name(features, tmp_path):
    store = FeatureStore.open(features)
    rows, val, _ = choose_rows(store, options(features, tmp_path, val_groups=("g0", "g3")), 0)
    assert set(store.groups[val]) == {"g0", "g3"}
    # Splits are respected: neither a validation nor a test video is trained on, and no test video
    # validates.
    assert set(store.splits[rows]) == {"train"}
    assert not {"g0", "g3"} & set(store.groups[rows])
    store.__dict__["splits"] = np.where(np.arange(60) % 4 == 0, "test", store.splits)
    for several in choose_rows(store, options(features, tmp_path, val_groups=("g0", "g3")), 0)[:2]:
        assert "test" not in store.splits[several]
    with pytest.raises(InputError, match="--val-groups g99"):
        choose_rows(store, options(features, tmp_path, val_groups=("g99",)), 0)


def test_without_a_training_split_neither_validation_nor_test_is_trained_on(tmp_path):
    store = classes_store(tmp_path / "f.zarr")
    store.__dict__["splits"] = np.array(["", "val", "test"], object)[np.arange(60) // 3 % 3]
    rows, val, words = choose_rows(store, options("", Path()), 0)
    assert set(store.splits[rows]) == {""}
    assert set(store.splits[val]) == {"val"}
    assert "no split named 'train': all but 'val' and 'test' to train" in words
    store.__dict__["splits"] = np.array(["", "test"], object)[np.arange(60) // 3 % 2]
    for chosen in choose_rows(store, options("", Path()), 0)[:2]:
        assert set(store.splits[chosen]) == {""}


def test_the_last_videos_of_a_class_are_not_held_out(tmp_path):
    """Each class has two videos, so at most one of them validates, even if the fraction is
    large."""
    store = classes_store(tmp_path / "f.zarr", videos=6, splits=False)
    store.__dict__["groups"] = np.full(6, "", object)
    for seed in range(20):
        rows, val, _ = choose_rows(store, options("", Path(), val_fraction=0.9), seed)
        assert sorted(store.labels[rows]) == sorted(store.labels[val]) == [0, 1, 2]


def test_a_hold_out_takes_whole_files_and_videos_without_a_group_one_by_one(tmp_path):
    """Half of the rows are windows of few files, the others whole files without a group. Both kinds
    are held out."""
    store = classes_store(tmp_path / "f.zarr", splits=False)
    ids = [
        f"w{row // 6}.mp4#{row % 6}000-{row % 6 + 1}000" if row < 30 else f"{row}.mp4"
        for row in range(60)
    ]
    store.__dict__ |= {"ids": np.array(ids, object), "groups": np.full(60, "", object)}
    rows, val, words = choose_rows(store, options("", Path()), 0)
    assert not {ids[row].split("#")[0] for row in rows} & {ids[row].split("#")[0] for row in val}
    assert 8 <= len(val) <= 16
    assert "whole groups" in words
    rows, val, _ = choose_rows(store, options("", Path(), val_groups=("w0.mp4",)), 0)
    assert (val.tolist(), len(rows)) == (list(range(6)), 54)


def test_failed_videos_are_not_trained_on_and_count_as_errors(tmp_path, capsys):
    classes_store(tmp_path / "f.zarr")
    store = FeatureStore.open(tmp_path / "f.zarr")
    val = np.flatnonzero(store.splits == "val")
    fail_rows(tmp_path / "f.zarr", [0, int(val[0]), int(val[1])])
    train.main(options(str(tmp_path / "f.zarr"), tmp_path / "run", epochs=12))
    assert "left out: 1 failed" in capsys.readouterr().out
    result = json.loads((tmp_path / "run" / "results.json").read_text())["tsn"]["6"]
    assert (result["scored"], result["listed"]) == (16, 18)
    assert result["top1"]["value"] == pytest.approx(16 / 18)
    assert result["top1_of_scored"] == 1


def test_other_options_in_the_same_folder_are_refused(features, tmp_path):
    train.main(options(features, tmp_path / "run", epochs=1))
    with pytest.raises(InputError, match=r"lr: 0\.01 in the folder, 0.02 now"):
        train.main(options(features, tmp_path / "run", epochs=1, lr=0.02))
    train.main(options(features, tmp_path / "run", epochs=1, placement="mmap"))
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").write_text("my only copy")
    with pytest.raises(InputError, match="is not empty and holds no run"):
        train.main(options(features, tmp_path / "other"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train_split": "training"}, "has no such split; it has 'train', 'val'"),
        ({"frames": 7}, "7 segments requested"),
        ({"g1": 8}, "--g1 8 does not apply to --agg tsn"),
        ({"lr": -1.0}, "--lr -1.0: expected more than 0"),
        ({"epochs": 0}, "--epochs 0: expected at least 1"),
        ({"control": True}, "give --init tsn.pt"),
        ({"init": Path("none.pt")}, "the checkpoint none.pt does not exist"),
        ({"device": "gpu"}, "--device 'gpu' is not known"),
        ({"device": "cuda:9"}, "PyTorch sees . GPUs on this machine"),
    ],
)
def test_wrong_options_are_named(changes, message, features, tmp_path):
    with pytest.raises(InputError, match=message):
        train.main(options(features, tmp_path / "run", **changes))


def test_hgnl_says_which_group_does_not_divide(features, tmp_path):
    with pytest.raises(InputError, match="g2 3 does not divide g1 4"):
        train.main(options(features, tmp_path / "run", "hgnl", g2=3))
    train.main(
        options(features, tmp_path / "run", "hgnl", epochs=1)
    )  # the same folder works again once that is corrected


def test_a_class_without_an_example_is_named(tmp_path):
    lengths = np.full(4, 2)
    arrays = {"labels": [0, 0, 2, 2], "classes": ["a", "b", "c"], "splits": ["train", "val"] * 2}
    FeatureStore.from_arrays(tmp_path / "f.zarr", np.ones((4, 2, 8)), lengths=lengths, **arrays)
    with pytest.raises(InputError, match="1 of 3 classes have no video to train on: b"):
        train.main(options(str(tmp_path / "f.zarr"), tmp_path / "run", frames=2))
    assert (
        train.main(
            options(
                str(tmp_path / "f.zarr"), tmp_path / "run", frames=2, allow_missing_classes=True
            )
        )
        == 0
    )


def test_nan_in_features_is_traced_to_its_video(features, tmp_path):
    classes_store(tmp_path / "f.zarr")
    store = poison_row(tmp_path / "f.zarr", 4)
    with pytest.raises(RunError, match=r"features of v/0004\.mp4 \(row 4\) are not finite"):
        train.main(options(str(tmp_path / "f.zarr"), tmp_path / "run"))
    train.main(options(features, tmp_path / "good", epochs=1))
    block = store.read(store.block_rows(0))
    block[4] = block[5]
    store.write_block(0, block)
    poison_row(tmp_path / "f.zarr", 6)  # a validation video
    with pytest.raises(RunError, match=r"features of v/0006\.mp4 \(row 6\) are not finite"):
        evaluate.main(evaluate.Options(tmp_path / "good" / "best.pt", str(tmp_path / "f.zarr")))


def test_a_loss_that_diverges_says_so(features, tmp_path):
    with pytest.raises(RunError, match="a smaller --lr than 1e\\+30 may help"):
        train.main(
            options(features, tmp_path / "run", "nl", m1=4, lr=1e30, recipe="paper", scale_init=1.0)
        )


# -- evaluate ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(features, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("trained") / "run"
    train.main(options(features, out, "hgnl", epochs=6))
    return out / "best.pt"


def test_windows_are_averaged_into_one_score_a_video(trained, tmp_path, capsys):
    rng, labels = np.random.default_rng(1), np.repeat([0, 1, 2, 0], 5)
    features = np.eye(3, 16)[labels][:, None] * 3 + rng.normal(size=(20, 6, 16)) * 0.5
    starts = np.tile(np.arange(5) * 10.0, 4)
    store = FeatureStore.from_arrays(
        tmp_path / "w.zarr",
        features,
        lengths=[6] * 20,
        labels=labels,
        classes=[f"class {number}" for number in range(3)],
        ids=[
            f"{row // 5}.mp4#{start:.0f}000-{start + 10:.0f}000" for row, start in enumerate(starts)
        ],
        splits=["val"] * 20,
        starts=starts,
        ends=starts + 10,
    )
    assert store.ends[-1] == 50
    for by, ids in (("row", store.ids.tolist()), ("video", ["0.mp4", "1.mp4", "2.mp4", "3.mp4"])):
        asked = evaluate.Options(
            trained, store.path, by=by, segments=(6,), out=tmp_path / f"{by}.h5"
        )
        assert evaluate.main(asked) == 0
        assert Scores.load(tmp_path / f"{by}.h5").ids == ids
    by_row, by_video = (Scores.load(tmp_path / f"{by}.h5") for by in ("row", "video"))
    np.testing.assert_allclose(
        by_video.logits, by_row.logits.reshape(4, 5, 3).mean(axis=1), rtol=1e-5
    )
    assert "0 of 4 videos failed" in capsys.readouterr().out


def test_evaluate_writes_what_training_reported(trained, features, tmp_path, capsys):
    out = tmp_path / "scores.h5"
    assert evaluate.main(evaluate.Options(trained, features, segments=(3, 25), out=out)) == 0
    printed = capsys.readouterr().out
    assert "holds 6 frames per video, so 25 segments become 6" in printed
    results = json.loads((trained.parent / "results.json").read_text())["hgnl"]
    for segments in (3, 6):
        scores = Scores.load(out, segments)
        accuracy = (scores.logits.argmax(1) == scores.labels).mean()
        assert accuracy == pytest.approx(results[str(segments)]["top1"]["value"])
    store = FeatureStore.open(features)
    assert scores.ids == store.ids[store.splits == "val"].tolist()
    assert scores.classes == list(store.classes)
    assert scores.source["model"] == "hgnl"


def test_crops_are_averaged_before_softmax_and_kept(trained, features, tmp_path):
    store = FeatureStore.open(features)
    two = np.concatenate([store.read(slice(0, 60)), -store.read(slice(0, 60))], axis=1)
    provenance = {
        "lengths": store.num_frames,
        "labels": store.labels,
        "splits": store.splits.tolist(),
    }
    FeatureStore.from_arrays(tmp_path / "two.zarr", two, classes=store.classes, **provenance)
    evaluate.main(
        evaluate.Options(trained, str(tmp_path / "two.zarr"), segments=(6,), out=tmp_path / "s.h5")
    )
    scores = Scores.load(tmp_path / "s.h5")
    assert scores.crops.shape == (18, 2, 3)
    np.testing.assert_allclose(scores.logits, scores.crops.mean(1), rtol=1e-5)
    evaluate.main(evaluate.Options(trained, features, segments=(6,), out=tmp_path / "one.h5"))
    np.testing.assert_allclose(
        scores.crops[:, 0], Scores.load(tmp_path / "one.h5").logits, rtol=1e-4, atol=1e-5
    )


def test_training_validates_on_the_mean_over_crops(features, tmp_path):
    store = FeatureStore.open(features)
    one = store.read(slice(0, 60))
    two = np.concatenate(
        [one, np.roll(one, 1, axis=0)], axis=1
    )  # the second crop shows another class
    arrays = {"lengths": store.num_frames, "labels": store.labels, "splits": store.splits.tolist()}
    FeatureStore.from_arrays(tmp_path / "two.zarr", two, classes=store.classes, **arrays)
    run = train.prepare(options(str(tmp_path / "two.zarr"), tmp_path / "run", epochs=1))
    run.train()
    model, source = run.learners[0].model, run.source
    (crops,) = logits_of([model], source.testing, segments=3, batch_size=16)
    assert crops.shape == (18, 2, 3)
    (logits,) = source.validate([model], 3, run.learners[0])
    np.testing.assert_array_equal(logits, crops.mean(axis=1))
    np.testing.assert_array_equal(run.learners[0].scores, logits)
    assert (logits.argmax(1) != crops[:, 0].argmax(1)).any()


def test_failed_videos_are_rows_of_nan(trained, tmp_path, capsys):
    classes_store(tmp_path / "f.zarr")
    fail_rows(tmp_path / "f.zarr", [6])
    evaluate.main(evaluate.Options(trained, str(tmp_path / "f.zarr"), out=tmp_path / "s.h5"))
    printed = capsys.readouterr().out
    assert "1 of 18 videos failed; they count as errors" in printed
    assert "17 / 18, top-1 of the scored" in printed
    scores = Scores.load(tmp_path / "s.h5")
    assert [scores.ids[row] for row in np.flatnonzero(scores.failed)] == ["v/0006.mp4"]


def test_weights_that_give_no_scores_are_said_to_be_damaged(trained, features, tmp_path):
    damaged = Checkpoint.load(trained)
    state = damaged.state_dict | {
        "classifier.bias": torch.full_like(damaged.state_dict["classifier.bias"], torch.nan)
    }
    replace(damaged, state_dict=state).save(tmp_path / "damaged.pt")
    with pytest.raises(
        RunError, match=r"damaged\.pt has no scores that are finite; its weights are damaged"
    ):
        evaluate.main(evaluate.Options(tmp_path / "damaged.pt", features))


def test_labels_are_matched_by_class_name(trained, features, tmp_path):
    store = FeatureStore.open(features)
    arrays = {"lengths": store.num_frames, "splits": store.splits.tolist()}
    renamed = {"classes": list(store.classes)[::-1], "labels": 2 - store.labels}
    FeatureStore.from_arrays(tmp_path / "r.zarr", store.read(slice(0, 60)), **arrays, **renamed)
    evaluate.main(evaluate.Options(trained, str(tmp_path / "r.zarr"), out=tmp_path / "r.h5"))
    assert (
        Scores.load(tmp_path / "r.h5").labels.tolist()
        == store.labels[store.splits == "val"].tolist()
    )
    alien = {"classes": ["class 0", "class 1", "juggling"], "labels": store.labels}
    FeatureStore.from_arrays(tmp_path / "a.zarr", store.read(slice(0, 60)), **arrays, **alien)
    with pytest.raises(InputError, match="has class 'juggling'"):
        evaluate.main(evaluate.Options(trained, str(tmp_path / "a.zarr")))


def test_features_of_another_backbone_are_refused(trained, features, tmp_path):
    other = replace(Checkpoint.load(trained), features={"backbone": "resnet50"})
    other.save(tmp_path / "other.pt")
    with pytest.raises(InputError, match="the checkpoint was trained on resnet50"):
        evaluate.main(evaluate.Options(tmp_path / "other.pt", features))
    with pytest.raises(InputError, match="the checkpoint was trained on resnet50"):
        train.main(options(features, tmp_path / "run", init=tmp_path / "other.pt"))


@pytest.mark.parametrize("part", ["backbone", "weights", "preprocessing", "clips"])
def test_features_that_differ_in_any_part_are_refused(part, trained, features, tmp_path):
    checkpoint = Checkpoint.load(trained)
    replace(checkpoint, features=checkpoint.features | {part: {"as": "before"}}).save(
        tmp_path / "other.pt"
    )
    with pytest.raises(
        InputError, match=f"was made with {part} .*, the checkpoint was trained on .*before"
    ):
        evaluate.main(evaluate.Options(tmp_path / "other.pt", features))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"split": "test"}, "no video in split 'test'; it has 'train', 'val'"),
        ({"segments": (0,)}, "each must be at least 1"),
        ({"features": "nowhere.zarr"}, "is not a feature store"),
    ],
)
def test_wrong_input_to_evaluate_is_named(changes, message, trained, features):
    with pytest.raises(InputError, match=message):
        evaluate.main(evaluate.Options(trained, **({"features": features} | changes)))


def test_a_flipped_byte_of_a_checkpoint_is_found(trained, tmp_path):
    content = bytearray(trained.read_bytes())
    with zipfile.ZipFile(trained) as records:
        largest = max(records.infolist(), key=lambda record: record.file_size)
    content[largest.header_offset + 200 + largest.file_size // 2] ^= 1
    (tmp_path / "flipped.pt").write_bytes(content)
    with pytest.raises(
        InputError,
        match=r"flipped\.pt is not a checkpoint that can be read safely .*the checksum of",
    ):
        Checkpoint.load(tmp_path / "flipped.pt")


def test_a_file_that_is_no_checkpoint_is_never_unpickled(tmp_path):
    class Bomb:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "exploded"),))

    torch.save({"format": "hgnl-checkpoint", "x": Bomb()}, tmp_path / "bomb.pt")
    with pytest.raises(InputError, match="is not a checkpoint that can be read safely"):
        Checkpoint.load(tmp_path / "bomb.pt")
    assert not (tmp_path / "exploded").exists()
    torch.save({"x": 1}, tmp_path / "other.pt")
    with pytest.raises(InputError, match="is not a checkpoint of"):
        Checkpoint.load(tmp_path / "other.pt")


def test_the_attentive_probe_has_a_rate_of_its_own_in_the_cached_recipe():
    assert {
        agg: recipe("cached", agg, videos=96).lr for agg in ("tsn", "hgnl", "nextvlad", "attentive")
    } == {
        **dict.fromkeys(("tsn", "hgnl", "nextvlad"), 0.01),
        "attentive": 0.03,
    }
    assert recipe("cached", "attentive", videos=96, lr=0.2).lr == 0.2
    assert recipe("paper", "attentive", videos=96).lr == recipe("paper", "tsn", videos=96).lr


def test_the_recipe_says_how_heads_of_attention_begin_unless_flags_do(features, tmp_path, capsys):
    """The checkpoint records the options that were used."""
    small_hgnl = {"g1": 4, "g2": 2, "m1": 8, "epochs": 1}

    def used(name: str, **more) -> dict:
        train.main(options(features, tmp_path / name, "hgnl", **small_hgnl | more))
        kept = Checkpoint.load(tmp_path / name / "best.pt").options
        flags = ("attention", "normalize", "start", "scale_init", "norm", "standardize")
        return {flag: kept[flag] for flag in flags}

    paper = dict(zip(("attention", "normalize", "start"), ("relu", False, "random"), strict=True))
    paper |= {"scale_init": 0.0, "norm": "none", "standardize": False}
    cached = {"attention": "relu", "normalize": True, "start": "average", "scale_init": 1.0}
    cached["norm"] = "n_over_train"
    cached["standardize"] = True
    assert used("a") == cached
    printed = capsys.readouterr().out
    assert (
        "head      hgnl as in the paper, but A multiplied by n_train/n; W_q and W_k see frames"
        in printed
    )
    assert "; s starts at 1, not 0" in printed
    assert used("b", recipe="paper") == paper
    assert "head      hgnl as in the paper\n" in capsys.readouterr().out
    assert used("c", normalize=False, scale_init=0.5) == cached | {
        "normalize": False,
        "scale_init": 0.5,
    }
    assert used("d", norm="n") == cached | {"norm": "n"}
    assert used("f", attention="softmax") == cached | {"attention": "softmax", "norm": "none"}
    assert used("e", recipe="paper", standardize=True, attention="softmax") == paper | {
        "standardize": True,
        "attention": "softmax",
    }


@pytest.mark.parametrize("command", ["train", "ablate", "crossval"])
def test_a_store_of_two_frames_trains_with_two(command, tmp_path, capsys):
    classes_store(tmp_path / "two.zarr", videos=30, frames=2)
    arguments = {
        "train": ["--agg", "gru"],
        "ablate": ["--agg", "tsn"],
        "crossval": ["--agg", "tsn", "--folds", "2"],
    }
    out = [
        "--features",
        str(tmp_path / "two.zarr"),
        "--out",
        str(tmp_path / "run"),
        "--epochs",
        "1",
    ]
    assert hgnl([command, *arguments[command], *out]) == 0
    assert "holds 2 per video, so models train with 2 instead of 3" in capsys.readouterr().out
    if command == "train":
        assert Checkpoint.load(tmp_path / "run" / "best.pt").frames == 2
    assert hgnl([command, *arguments[command], *out, "--frames", "5"]) == 2, (
        "a number that was given stays"
    )


def test_a_head_that_sees_order_is_tested_as_it_was_trained(features, tmp_path, capsys):
    for agg, expected in (("gru", [3]), ("max", [3, 6])):
        train.main(options(features, tmp_path / agg, agg=agg))
        scores = tmp_path / f"{agg}.h5"
        assert (
            evaluate.main(evaluate.Options(tmp_path / agg / "best.pt", features, out=scores)) == 0
        )
        printed = capsys.readouterr().out
        assert (
            "gru sees the order of frames, so it is tested with 3, as it was trained" in printed
        ) == (agg == "gru")
        with h5py.File(scores) as file:
            assert sorted(map(int, file["logits"])) == expected
    evaluate.main(
        evaluate.Options(
            tmp_path / "gru" / "best.pt", features, segments=(6,), out=tmp_path / "six.h5"
        )
    )
    assert Scores.load(tmp_path / "six.h5").segments == 6


def test_a_run_begun_with_other_defaults_of_its_head_is_not_continued(
    features, tmp_path, monkeypatch
):
    from aggregate.training import recipes

    small = options(features, tmp_path / "run", "hgnl", g1=4, g2=2, m1=8, epochs=1)
    train.main(small)
    monkeypatch.setattr(recipes, "_CACHED_NON_LOCAL", {"normalize": False})
    with pytest.raises(InputError, match="normalize: True when it started, False now"):
        train.main(small)
