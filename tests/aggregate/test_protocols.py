"""Probes, few shots, published protocols and grids in python -m aggregate.crossval."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import f1_score, recall_score
from sklearn.neighbors import KNeighborsClassifier
from sklearn.preprocessing import StandardScaler

from aggregate import crossval
from aggregate.ablation.folds import all_folds
from aggregate.ablation.probes import Probe, video_vectors
from aggregate.ablation.protocols import PROTOCOLS, describe_protocol, protocol_in
from aggregate.data.features import StoredFeatures
from aggregate.metrics import bootstrap_by_class
from aggregate.scores import Scores
from extract import InputError, RunError
from extract.cli import run_command
from extract.store import FeatureStore
from stores import classes_store, fail_rows, poison_row

QUICK = {"epochs": (3,), "batch_size": (16,), "lr": (0.01,), "seeds": (0,)}


def results_of(out: Path) -> dict:
    return json.loads((out / "results.json").read_text())


def options(features: str, out: Path, **changes) -> crossval.Options:
    return crossval.Options(features=features, out=out, **({"seeds": (0,)} | changes))


# -- probes ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("vector", ["mean", "mean-std"])
def test_the_vector_of_a_video_is_over_its_distinct_frames(vector, features):
    store = FeatureStore.open(features)
    vectors = video_vectors(
        StoredFeatures(store, np.arange(len(store))), store.frames_per_video, vector
    )
    for row in (0, 1):  # a short video, and one of full length
        slots = np.arange(store.frames_per_video)
        frames = store.gather(np.array([row]), slots)[0].astype(np.float32)
        frames = frames[store.mask(np.array([row]), slots)[0]]
        expected = np.concatenate(
            [frames.mean(axis=0), frames.std(axis=0)][: 1 + (vector == "mean-std")]
        )
        np.testing.assert_allclose(vectors[row], expected, rtol=1e-5, atol=1e-6)


def test_logistic_regression_is_scikit_learns_on_the_same_folds(features, tmp_path, capsys):
    wanted = options(features, tmp_path / "cv", agg=("logreg",), C=(0.1,))
    assert crossval.main(wanted) == 0
    store = FeatureStore.open(features)
    vectors = video_vectors(
        StoredFeatures(store, np.arange(len(store))), store.frames_per_video, "mean"
    )
    scores = Scores.load(tmp_path / "cv" / "logreg.h5")
    np.testing.assert_allclose(np.exp(scores.logits).sum(axis=1), 1, rtol=1e-4)
    for fold in all_folds(store, wanted, [0]):
        scaler = StandardScaler().fit(vectors[fold.train])
        model = LogisticRegression(C=0.1, max_iter=1000)
        model.fit(scaler.transform(vectors[fold.train]), store.labels[fold.train])
        expected = model.predict_log_proba(scaler.transform(vectors[fold.test]))
        np.testing.assert_allclose(scores.logits[fold.test], expected, rtol=1e-3, atol=1e-4)
    assert "tried     logreg C=0.1" in capsys.readouterr().out


def test_nearest_neighbors_vote_by_cosine_similarity(features, tmp_path):
    wanted = options(features, tmp_path / "cv", agg=("knn",), k=(5,))
    assert crossval.main(wanted) == 0
    store = FeatureStore.open(features)
    vectors = video_vectors(
        StoredFeatures(store, np.arange(len(store))), store.frames_per_video, "mean"
    )
    scores = Scores.load(tmp_path / "cv" / "knn.h5")
    for fold in all_folds(store, wanted, [0]):
        weights = lambda distance: np.exp((1 - distance) / 0.07)  # noqa: E731
        model = KNeighborsClassifier(5, metric="cosine", weights=weights)
        model.fit(vectors[fold.train], store.labels[fold.train])
        expected = np.log(model.predict_proba(vectors[fold.test]) + 1e-6)
        np.testing.assert_allclose(scores.logits[fold.test], expected, rtol=1e-3, atol=1e-3)


def test_c_and_k_are_chosen_inside_the_training_part(features, tmp_path):
    """A fold's own labels do not change its scores, but the labels of the held-out part do."""
    wanted = options(features, tmp_path / "a", agg=("logreg", "knn"), folds="group")
    crossval.main(wanted)
    store = FeatureStore.open(features)
    labels = store.labels.copy()
    own = store.groups == "g4"
    labels[own] = (labels[own] + 1) % 3
    FeatureStore.from_arrays(
        tmp_path / "other.zarr",
        store.read(slice(0, len(store))),
        lengths=store.num_frames,
        labels=labels,
        classes=store.classes,
        ids=store.ids.tolist(),
        splits=store.splits.tolist(),
        groups=store.groups.tolist(),
    )
    crossval.main(replace(wanted, features=str(tmp_path / "other.zarr"), out=tmp_path / "b"))
    for name in ("logreg.h5", "knn.h5"):
        one, two = (Scores.load(tmp_path / out / name) for out in "ab")
        np.testing.assert_array_equal(one.logits[own], two.logits[own])
    chosen = {
        row["options"] for head in results_of(tmp_path / "a")["heads"] for row in head["chosen"]
    }
    assert len({name for name in chosen if name.startswith("logreg")}) > 1


def test_probes_stand_beside_heads_and_fail_as_they_do(tmp_path, capsys):
    classes_store(tmp_path / "f.zarr")
    fail_rows(tmp_path / "f.zarr", [3])
    wanted = options(
        str(tmp_path / "f.zarr"),
        tmp_path / "cv",
        agg=("tsn", "logreg"),
        **QUICK | {"epochs": (20,)},
    )
    assert crossval.main(wanted) == 0
    for name in ("tsn.h5", "logreg.h5"):
        scores = Scores.load(tmp_path / "cv" / name)
        assert [scores.ids[row] for row in np.flatnonzero(scores.failed)] == ["v/0003.mp4"]
    assert "macro F1 %" in capsys.readouterr().out
    poison_row(tmp_path / "f.zarr", 4)
    with pytest.raises(RunError, match=r"features of v/0004\.mp4 \(row 4\) are not finite"):
        crossval.main(options(wanted.features, tmp_path / "cv2", agg=("logreg",)))


def test_a_class_without_an_example_gets_the_lowest_score():
    vectors = np.random.default_rng(0).normal(size=(20, 4)).astype(np.float32)
    labels = np.where(np.arange(20) % 2, 1, 3)
    for agg in ("logreg", "knn"):
        logits = Probe(agg, 3, False).fit(vectors, labels).logits(vectors, 5)
        assert logits.shape == (20, 5)
        assert np.isfinite(logits).all()
        assert (logits[:, [0, 2, 4]] <= logits.min(axis=1, keepdims=True)).all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"agg": ("logreg",), "C": (0.0,)}, r"--C 0\.0: expected one or more numbers above 0"),
        ({"agg": ("knn",), "k": ()}, "--k : expected one or more numbers above 0"),
        ({"agg": ("knn",), "C": (1.0,)}, r"--C 1\.0 does not apply to --agg knn"),
        ({"agg": ("tsn",), "vector": "mean-std"}, "--vector mean-std does not apply to --agg tsn"),
        ({"agg": ("logreg",), "g1": (4,)}, "--g1 4 does not apply to --agg logreg"),
        ({"agg": ("logreg",), "frames": (99,)}, "--frames 99: .* holds"),
        ({"agg": ()}, "--agg needs at least one value"),
        ({"agg": ("logreg",), "seeds": ()}, "--seeds needs at least one value"),
        ({"agg": ("logreg",), "shots": 0}, "--shots 0: expected at least 1"),
        (
            {"agg": ("logreg",), "shots": 21},
            "--shots 21: 3 classes have fewer usable videos: class 0, class 1",
        ),
        (
            {"agg": ("logreg",), "shots": 20},
            "--shots 20, draw 0: nothing is left to test on.* 12 of 12 groups train",
        ),
        (
            {"agg": ("tsn",), "shots": 1, "seeds": (5,)},
            "--seeds 5 does not apply to --shots: a draw replaces a seed",
        ),
    ],
)
def test_what_cannot_be_is_named_and_leaves_no_folder(changes, message, features, tmp_path):
    with pytest.raises(InputError, match=message):
        crossval.main(crossval.Options(features=features, out=tmp_path / "cv", **changes))
    assert not (tmp_path / "cv").exists()


# -- few shots ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shots", [1, 4])
def test_a_draw_has_that_many_of_each_class_and_splits_no_group(shots, features, tmp_path):
    store = FeatureStore.open(features)
    wanted = crossval.Options(features=features, shots=shots, repeats=5)
    draws = all_folds(store, wanted, [0], choosing=shots > 1)
    assert [draw.seed for draw in draws] == [0, 1, 2, 3, 4]
    for draw in draws:
        assert np.bincount(store.labels[draw.train]).tolist() == [shots] * 3
        assert not set(store.groups[draw.train]) & set(store.groups[draw.test])
        assert draw.held_out.any() == (shots > 1)
        rest = np.setdiff1d(np.arange(60), np.concatenate([draw.train, draw.test]))
        assert set(store.groups[rest]) <= set(store.groups[draw.train])
    assert len({draw.train.tobytes() for draw in draws}) > 2


def test_few_shots_report_the_mean_over_draws(features, tmp_path, capsys):
    wanted = crossval.Options(
        features=features, out=tmp_path / "cv", agg=("logreg",), C=(1.0,), shots=3, repeats=4
    )
    assert crossval.main(wanted) == 0
    printed = capsys.readouterr().out
    assert "60 videos" in printed
    assert "4 draws of 3 videos per class" in printed
    assert "Means over 4 draws" in printed
    results = results_of(tmp_path / "cv")
    (head,) = results["heads"]
    measured = head["segments"]["6"]
    store = FeatureStore.open(features)
    right, f1, recall, tested = [], [], [], 0
    vectors = video_vectors(StoredFeatures(store, np.arange(len(store))), 6, "mean")
    for draw in all_folds(store, wanted, [], choosing=False):
        model = Probe("logreg", 1.0, True).fit(vectors[draw.train], store.labels[draw.train])
        predicted = model.logits(vectors[draw.test], 3).argmax(axis=1)
        truth = store.labels[draw.test]
        right.append((predicted == truth).mean())
        f1.append(f1_score(truth, predicted, average="macro"))
        recall.append(recall_score(truth, predicted, average="macro"))
        tested += len(truth)
    np.testing.assert_allclose(measured["by_seed"], right)
    np.testing.assert_allclose(measured["macro_f1"]["value"], np.mean(f1))
    np.testing.assert_allclose(measured["mean_class"]["value"], np.mean(recall))
    assert measured["macro_f1"]["low"] < np.mean(f1) < measured["macro_f1"]["high"]
    assert measured["over_seeds"]["low"] < np.mean(right) < measured["over_seeds"]["high"]
    scores = Scores.load(tmp_path / "cv" / "logreg.h5")
    assert len(scores) == results["videos"] <= 60
    assert not scores.failed.any()


def test_macro_f1_of_failed_and_untested_videos():
    labels = np.array([0, 0, 1, 1, 2])
    predicted = np.array([[0, 3, 1, 0, 2], [0, 0, 0, 0, 0]])
    tested = np.array([[True] * 5, [True, True, False, False, False]])
    found = bootstrap_by_class(predicted, labels, 3, tested, resamples=10)
    f1 = [f1_score(labels, predicted[0], average="macro", labels=[0, 1, 2]), 1.0]
    np.testing.assert_allclose(found["macro_f1"][1], f1)
    np.testing.assert_allclose(found["mean_class"][1], [(0.5 + 0.5 + 1) / 3, 1.0])


# -- protocols ---------------------------------------------------------------------------------------------------------


def test_a_protocol_sets_options_and_what_is_given_next_to_it_wins(features, tmp_path, capsys):
    flags = f"--protocol mveb --shots 2 --repeats 3 --features {features} --out {tmp_path / 'cv'}"
    assert run_command(crossval.main, crossval.Options, prog="p", args=flags.split()) == 0
    said = capsys.readouterr().out
    assert "mveb: --agg logreg, --C 1.0, --vector mean, --standardize false, --epochs 100" in said
    assert "NOT mveb's: --repeats 3 (mveb: 10)" in said
    assert "NOT mveb's: --shots 2 (mveb: 8)" in said
    assert "3 draws of 2 videos per class" in said
    recorded = json.loads((tmp_path / "cv" / "options.json").read_text())
    assert (recorded["shots"], recorded["C"], recorded["agg"]) == (2, [1.0], ["logreg"])


@pytest.mark.parametrize("name", PROTOCOLS)
def test_every_protocol_is_made_of_options_that_exist(name):
    chosen = crossval.Options(protocol=name, **PROTOCOLS[name])
    assert "NOT" not in describe_protocol(name, chosen)
    assert (
        protocol_in(["--agg", "tsn", "--protocol", name])
        == protocol_in([f"--protocol={name}"])
        == name
    )
    assert protocol_in(["--features", "x"]) is None


def test_a_grid_is_reported_as_papers_do_and_as_chosen_inside(features, tmp_path, capsys):
    grid = {"lr": (1e-4, 0.03), "weight_decay": (0.0, 0.1), "epochs": (6,), "optimizer": ("adamw",)}
    grid |= {"folds": "3"}
    wanted = options(features, tmp_path / "cv", agg=("tsn", "max"), **QUICK | grid)
    crossval.main(wanted)
    printed = capsys.readouterr().out
    for head in results_of(tmp_path / "cv")["heads"]:
        best = head["as_reported"]
        assert best["candidates"] == 4
        own = {}
        for lr in grid["lr"]:
            for decay in grid["weight_decay"]:
                single = replace(wanted, agg=(head["name"],), lr=(lr,), weight_decay=(decay,))
                own[lr, decay] = _top1_after_the_last_epoch(
                    single, tmp_path / f"{head['name']} {lr} {decay}"
                )
        assert best["top1"] == pytest.approx(max(own.values()))
        assert (
            f"{head['name']}, as papers report a grid: {100 * best['top1']:.2f} % top-1" in printed
        )
    # The choice inside the training part is the same with fewer models at a time.
    crossval.main(replace(wanted, at_once=1, out=tmp_path / "few"))
    assert results_of(tmp_path / "few")["heads"] == results_of(tmp_path / "cv")["heads"]


def _top1_after_the_last_epoch(single: crossval.Options, out: Path) -> float:
    """A grid of two equal configurations has nothing to choose, and the last epoch counts."""
    from aggregate.ablation.configurations import candidates
    from aggregate.ablation.grid import GridTrainer
    from aggregate.metrics import ranks
    from aggregate.training.loop import fit

    store = FeatureStore.open(single.features)
    right = 0
    for fold in all_folds(store, single, [0]):
        trainer = GridTrainer(store, device="cpu")
        one = candidates(single, store).configurations[0].with_seed(0, videos=len(fold.train))
        learners, source = trainer.make_learners([one], fold.train, fold.test)
        list(fit(learners, source, until=[one.recipe.epochs]))
        (logits,) = source.validate([learners[0].model], store.frames_per_video, learners[0])
        right += int((ranks(logits, source.labels) == 0).sum())
    return right / len(store)
