"""The audit finds planted duplicates and planted wrong labels, and little else."""

import csv
import json

import numpy as np
import pytest

from aggregate import audit
from aggregate.ablation import leaks
from aggregate.ablation.folds import Fold
from aggregate.duplicates import NEIGHBORS, near_duplicates, usual_distances, whiten
from aggregate.scores import Scores
from extract.cli import run_command
from extract.store import FeatureStore


def videos(count: int, dim: int = 96, seed: int = 0) -> np.ndarray:
    """Mean features of different videos: ten classes, a large common part, uneven variances."""
    rng = np.random.default_rng(seed)
    spread = np.geomspace(1, 0.05, dim)
    centers = rng.normal(size=(10, dim)) * spread
    features = centers[np.arange(count) % 10] + rng.normal(size=(count, dim)) * spread
    return (features + 5).astype(np.float32)


def with_copies(count: int, copies: int, noise: float) -> tuple[np.ndarray, set[tuple[int, int]]]:
    """`count` videos, followed by noisy copies of the first `copies` of them; and the planted
    pairs."""
    features = videos(count)
    spread = (features - features.mean(0)).std(0)
    rng = np.random.default_rng(1)
    extra = features[:copies] + noise * spread * rng.normal(size=(copies, features.shape[1]))
    planted = {(row, count + row) for row in range(copies)}
    return np.concatenate([features, extra.astype(np.float32)]), planted


def pairs_of(features: np.ndarray, **options) -> list[tuple[int, int]]:
    units = options.pop("units", np.arange(len(features)))
    return [
        tuple(sorted(pair)) for pair in near_duplicates(features, units, **options).rows.tolist()
    ]


@pytest.mark.parametrize("noise", [0.0, 0.1, 0.2])
def test_planted_copies_are_found_and_little_else(noise):
    features, planted = with_copies(600, 30, noise)
    pairs = pairs_of(features)
    assert len(pairs) == len(set(pairs))
    recall = len(planted & set(pairs)) / len(planted)
    precision = len(planted & set(pairs)) / len(pairs)
    assert recall >= 0.95
    assert precision >= 0.7


def test_without_copies_the_false_alarms_are_about_those_that_were_asked_for():
    features = videos(3000)
    for false_alarms in (0.01, 0.1):
        pairs = pairs_of(features, false_alarms=false_alarms)
        alarmed = len({row for pair in pairs for row in pair}) / len(features)
        assert alarmed < 2 * false_alarms


def test_pairs_of_one_unit_are_none_and_queries_limit_the_search():
    features, planted = with_copies(400, 10, 0.05)
    units = np.arange(len(features))
    units[400:405] = units[:5]  # the first five copies belong to their originals
    pairs = set(pairs_of(features, units=units)) & planted
    assert pairs == {pair for pair in planted if pair[0] >= 5}
    queries = np.arange(405, 410)
    assert set(pairs_of(features, queries=queries)) & planted == {
        pair for pair in planted if pair[0] >= 5
    }
    assert all(max(pair) in queries for pair in pairs_of(features, queries=queries))


def test_the_ratio_is_the_distance_over_the_usual_distances_by_hand():
    features, _ = with_copies(60, 3, 0.1)
    units = np.arange(len(features))
    found = near_duplicates(features, units, false_alarms=0.2)
    vectors = whiten(features).astype(float)
    distances = 1 - vectors @ vectors.T
    np.fill_diagonal(distances, np.inf)
    usual = np.sort(distances, axis=1)[:, 3]
    expected = [
        (distances[a, b] / np.sqrt(usual[a] * usual[b]), (a, b))
        for a in range(len(features))
        for b in range(a + 1, len(features))
    ]
    expected = sorted(item for item in expected if item[0] <= found.threshold)
    assert [tuple(sorted(pair)) for pair in found.rows.tolist()] == [pair for _, pair in expected]
    np.testing.assert_allclose(found.ratio, [ratio for ratio, _ in expected], atol=1e-4)


def test_a_sample_estimates_the_usual_distance_of_all(monkeypatch):
    features = videos(4000, dim=24)
    vectors, units = whiten(features), np.arange(4000)
    whole, dimension = usual_distances(vectors, units)
    monkeypatch.setattr("aggregate.duplicates.SAMPLE", 1000)
    sampled, estimated = usual_distances(vectors, units)
    assert estimated == pytest.approx(dimension, rel=0.25)
    assert np.median(sampled / whole) == pytest.approx(1, abs=0.2)


@pytest.mark.parametrize("count", [0, 1, NEIGHBORS + 1])
def test_too_few_videos_have_no_usual_distance(count):
    assert len(near_duplicates(np.ones((count, 4), np.float32), np.arange(count))) == 0


def test_equal_videos_of_one_unit_and_constant_features_are_no_crash():
    features = np.ones((20, 4), np.float32)
    near_duplicates(features, np.zeros(20, int))
    near_duplicates(features, np.arange(20))


def scores_with_wrong_labels(seed: int = 0) -> tuple[Scores, set[str]]:
    """Scores of 400 videos of 5 classes, right in most cases, and 20 wrong labels."""
    rng = np.random.default_rng(seed)
    truth = np.arange(400) % 5
    logits = rng.normal(size=(400, 5)) + 6 * np.eye(5)[truth]
    labels = truth.copy()
    wrong = rng.choice(400, 20, replace=False)
    labels[wrong] = (labels[wrong] + 1 + rng.integers(4, size=20)) % 5
    ids = [f"{row}.mp4" for row in range(400)]
    scores = Scores(ids, [f"class {c}" for c in range(5)], logits.astype(np.float32), labels)
    return scores, {ids[row] for row in wrong}


def test_planted_wrong_labels_are_found():
    scores, planted = scores_with_wrong_labels()
    listed = [line["id"] for line in audit.label_issues(scores)]
    found = planted & set(listed)
    assert len(found) / len(planted) >= 0.9
    assert len(found) / len(listed) >= 0.7
    assert set(listed[:10]) <= planted  # the clearest come first


def test_videos_without_scores_or_label_and_classes_without_videos_are_left_out():
    logits = np.array([[0, 9, 0], [np.nan] * 3, [0, 9, 0], [9, 0, 0], [0, 0, 9]], np.float32)
    labels = np.array([0, 0, -1, 0, 0])
    issues = audit.label_issues(Scores(list("abcde"), ["x", "y", "z"], logits, labels))
    assert issues == []  # y and z have no example, so they are never confident


def make_store(path, *, copies: int = 6) -> FeatureStore:
    features, _ = with_copies(90, copies, 0.05)
    count = len(features)
    noise = np.random.default_rng(2).normal(size=(count, 3, features.shape[1])) * 0.01
    return FeatureStore.from_arrays(
        path,
        features[:, None] + noise,
        lengths=np.where(np.arange(count) % 5, 3, 1),
        labels=np.arange(count) % 3,
        classes=["a", "b", "c"],
        ids=[f"{row}.mp4" for row in range(count)],
        splits=["train"] * 90 + ["test"] * copies,
    )


def run(*arguments: object) -> int:
    args = [str(argument) for argument in arguments]
    return run_command(audit.main, audit.Options, prog="audit", args=args)


def test_the_command_writes_tables_and_says_what_leaks(tmp_path, capsys):
    make_store(tmp_path / "s.zarr")
    scores, planted = scores_with_wrong_labels()
    scores.save(tmp_path / "oof.h5")
    out = tmp_path / "audit"
    flags = ("--features", tmp_path / "s.zarr", "--scores", tmp_path / "oof.h5", "--out", out)
    assert run(*flags) == 0
    printed = capsys.readouterr().out
    with open(out / "duplicates.csv", newline="") as file:
        lines = list(csv.DictReader(file))
    crossing = {(line["id_a"], line["id_b"]) for line in lines if line["across"] == "test/train"}
    assert {(f"{row}.mp4", f"{90 + row}.mp4") for row in range(6)} <= crossing
    assert lines[0]["across"] == "test/train"  # leaks come first
    assert f"{len(crossing)} of them across splits" in printed
    with open(out / "labels.csv", newline="") as file:
        listed = {line["id"] for line in csv.DictReader(file)}
    assert len(listed & planted) >= 18
    record = json.loads((out / "audit.json").read_text())
    assert record["schema"] == audit.SCHEMA
    assert len(record["duplicates"]) == len(lines)


def test_mean_features_count_repeats_once(tmp_path, monkeypatch):
    monkeypatch.setattr(leaks, "ROWS_PER_READ", 7)
    store = make_store(tmp_path / "s.zarr")
    rows = np.arange(len(store))
    stored = store.read(slice(None))[:, 0].astype(np.float32)
    expected = np.where((rows % 5 > 0)[:, None], stored.mean(1), stored[:, 0])
    np.testing.assert_allclose(leaks.mean_features(store, rows), expected, rtol=1e-5)


def test_scores_that_cannot_contradict_a_label_are_refused(tmp_path, capsys):
    make_store(tmp_path / "s.zarr")
    scores, _ = scores_with_wrong_labels()
    Scores(scores.ids, scores.classes, scores.logits).save(tmp_path / "none.h5")
    source = {"trained_on": True}
    Scores(scores.ids, scores.classes, scores.logits, scores.labels, source).save(
        tmp_path / "own.h5"
    )
    for name, message in (("none", "has no labels"), ("own", "out-of-fold scores")):
        flags = ("--features", tmp_path / "s.zarr", "--scores", tmp_path / f"{name}.h5")
        assert run(*flags, "--out", tmp_path / "audit") == 2
        assert message in capsys.readouterr().err
    assert run("--features", tmp_path / "s.zarr", "--false-alarms", "2") == 2
    assert "--false-alarms 2" in capsys.readouterr().err


def test_a_large_store_pairs_the_small_splits_with_all(monkeypatch):
    splits = np.array(["train"] * 8 + ["val"] * 2 + ["test"] * 2, object)
    monkeypatch.setattr(audit, "PAIR_ALL", 10)
    queries, scope = audit._queries(splits)
    assert queries.tolist() == [8, 9, 10, 11]
    assert "4 videos outside split 'train'" in scope
    monkeypatch.setattr(audit, "PAIR_ALL", 12)
    assert audit._queries(splits)[0] is None


def fold(test, train) -> Fold:
    return Fold("0", 0, np.array(test), np.array(train), np.zeros(len(train), bool))


def test_pairs_that_cross_folds_are_warned_of_with_examples_and_a_command(tmp_path):
    store = make_store(tmp_path / "s.zarr")
    train, copies = list(range(90)), list(range(90, 96))
    warning = leaks.describe_crossing_pairs(store, [fold(copies, train)], "s.zarr")
    count = int(warning.split()[1])
    assert 6 <= count <= 12
    assert "(about 1 would by chance)" in warning
    (named,) = [part for part in warning.split("; ") if part.startswith("the closest")]
    assert named.count(" | ") == 3
    assert warning.endswith("audit --features s.zarr")
    # Both videos of every pair in one part: nothing crosses.
    halves = [row for row in range(90) if row >= 6], [*range(6), *copies]
    pairs = near_duplicates(leaks.mean_features(store, np.arange(96)), np.arange(96)).rows
    inside = [pair for pair in pairs if np.isin(pair, halves[1]).sum() != 1]
    assert len(inside) >= 6
    crossing = leaks.describe_crossing_pairs(store, [fold(*halves)], "s.zarr")
    assert int((crossing or "warning: 0").split()[1]) == len(pairs) - len(inside)


def test_large_stores_and_features_without_a_distance_do_not_stop_a_cross_validation(
    tmp_path, monkeypatch
):
    store = make_store(tmp_path / "s.zarr")
    folds = [fold(range(90, 96), range(90))]
    monkeypatch.setattr(leaks, "mean_features", lambda store, rows: np.full((len(rows), 4), np.nan))
    assert leaks.describe_crossing_pairs(store, folds, "s.zarr").startswith(
        "near-duplicates across"
    )
    monkeypatch.setattr(leaks, "PAIR_ALL", 95)
    assert leaks.describe_crossing_pairs(store, folds, "s.zarr") == ""


def test_several_stores_are_joined(tmp_path, capsys):
    make_store(tmp_path / "a.zarr")
    make_store(tmp_path / "b.zarr")
    stores = (tmp_path / "a.zarr", tmp_path / "b.zarr")
    assert run("--features", *stores, "--out", tmp_path / "audit") == 0
    record = json.loads((tmp_path / "audit" / "audit.json").read_text())
    assert record["features"] == [str(path) for path in stores]
    crossing = {(line["id_a"], line["id_b"]) for line in record["duplicates"]}
    assert {(f"{row}.mp4", f"{90 + row}.mp4") for row in range(6)} <= crossing
