"""Joining and fusing against slow, obvious loops over dictionaries, and every refusal with the
first name that caused it."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from aggregate.scores import Scores
from ensemble.align import align
from ensemble.fuse import fuse
from extract import InputError

CLASSES = ["a", "b c", "d'e"]


def scores(ids="uvw", *, classes=CLASSES, labels=None, seed=0, **rows) -> Scores:
    """Normal logits of videos with one-letter names; keyword arguments set single rows."""
    logits = np.random.default_rng(seed).normal(size=(len(ids), len(classes)), scale=2)
    for name, row in rows.items():
        logits[list(ids).index(name)] = row
    return Scores(ids=list(ids), classes=classes, logits=logits, labels=labels)


@st.composite
def several(draw):
    """1 to 4 models with different orders of videos and classes; some videos are missing, some
    failed."""
    models = []
    for _ in range(draw(st.integers(1, 4))):
        names = draw(st.lists(st.sampled_from("uvwxyz"), min_size=1, unique=True))
        rng = np.random.default_rng(draw(st.integers(0, 99)))
        logits = rng.normal(size=(len(names), 3), scale=draw(st.sampled_from([1.0, 30.0, 400.0])))
        logits[rng.random(len(names)) < 0.2] = np.nan
        models.append(Scores(ids=names, classes=draw(st.permutations(CLASSES)), logits=logits))
    weights = draw(
        st.lists(st.sampled_from([0.0, 0.3, 1.0, 2.5]), min_size=len(models), max_size=len(models))
    )
    return models, weights if any(weights) else [1.0] * len(models)


def softmax(row: dict[str, float]) -> dict[str, float]:
    top = max(row.values())
    total = sum(math.exp(value - top) for value in row.values())
    return {name: math.exp(value - top) / total for name, value in row.items()}


def obvious(models, weights) -> dict[str, dict[str, float] | None]:
    """The mean probabilities by name, one video at a time; None for a video that counts as
    wrong."""
    tables = []
    for model in models:
        table = {}
        for name, row in zip(model.ids, model.logits.tolist(), strict=True):
            table[name] = (
                None if any(map(math.isnan, row)) else dict(zip(model.classes, row, strict=True))
            )
        tables.append(table)
    fused: dict[str, dict[str, float] | None] = {}
    for name in {name for table in tables for name in table}:
        used = [
            (table, weight) for table, weight in zip(tables, weights, strict=True) if weight > 0
        ]
        have = [(table[name], weight) for table, weight in used if table.get(name) is not None]
        if any(name not in table for table, _ in used) or not have:
            fused[name] = None
            continue
        rows = [(softmax(row), weight) for row, weight in have]
        total = sum(weight for _, weight in rows)
        fused[name] = {
            cls: sum(weight * row[cls] for row, weight in rows) / total for cls in CLASSES
        }
    return fused


@given(several())
def test_fusion_is_the_obvious_loop(case):
    models, weights = case
    fused = fuse(models, weights, missing="worst")
    expected = obvious(models, weights)
    assert set(fused.ids) == set(expected)
    assert fused.classes == models[0].classes
    for name, row in zip(fused.ids, fused.logits.astype(float).tolist(), strict=True):
        want = expected[name]
        if want is None:
            assert all(map(math.isnan, row))
            continue
        got = {cls: math.exp(value) for cls, value in zip(fused.classes, row, strict=True)}
        assert got == pytest.approx(
            want, rel=2e-4, abs=1e-30
        )  # float32 of a logarithm near -100 is good to 4e-6


@given(several())
def test_softmax_of_a_fused_file_gives_the_mean_probabilities_back(case):
    models, weights = case
    fused = fuse(models, weights, missing="worst")
    rows = np.exp(fused.logits[~fused.failed].astype(float))
    np.testing.assert_allclose(rows.sum(axis=1), 1, rtol=1e-5)


def test_dropping_keeps_what_all_models_list():
    fused = fuse([scores("uvwx"), scores("xwu", seed=1)], missing="drop")
    assert fused.ids == ["u", "w", "x"]
    aligned = align([scores("uvwx"), scores("xwu", seed=1)], missing="drop", names=["tsn", "hgnl"])
    assert "1 videos that one model lacks are left out" in aligned.report()
    assert aligned.counts.loc["tsn"].tolist() == [4, 0, 0]


def test_what_a_model_lacks_or_failed_at_is_counted():
    report = align(
        [scores("uv"), scores("vw", v=np.nan)], missing="worst", names=["tsn", "hgnl"]
    ).report()
    assert "3 videos, 0 with a label, 3 classes" in report
    assert [line.split() for line in report.splitlines()[1:4]] == [
        ["listed", "lacking", "failed"],
        ["tsn", "2", "1", "0"],
        ["hgnl", "2", "1", "1"],
    ]
    assert "2 videos that one model lacks count as wrong" in report


def test_a_video_that_failed_in_one_model_is_left_to_the_others():
    first, second = scores("uv"), scores("uv", seed=1, u=np.nan)
    fused = fuse([first, second], [1, 3])
    alone = fuse([first])
    np.testing.assert_allclose(fused.logits[0], alone.logits[0], rtol=1e-6)
    assert not np.allclose(fused.logits[1], alone.logits[1])
    assert fuse([first, second], [0, 1]).failed.tolist() == [True, False]


def test_labels_are_carried_over_by_the_name_of_the_class():
    first = scores("uv", labels=np.array([2, -1]))
    second = scores("vu", classes=["d'e", "a", "b c"], labels=np.array([1, 0]))
    assert fuse([first, second]).labels.tolist() == [2, 0]
    with pytest.raises(InputError, match="'u' is \"d'e\" in tsn and 'a' in hgnl"):
        align([first, scores("vu", labels=np.array([0, 0]))], names=["tsn", "hgnl"])


def test_improbable_classes_keep_their_order():
    """Their probabilities are 0 in any floating point format, but their logarithms are not."""
    first = scores("u", u=[0, -2000, -3000])
    fused = fuse([first, first])
    np.testing.assert_allclose(fused.logits[0], [0, -2000, -3000])
    for both in ([first, scores("u", u=np.nan)], [scores("u", u=np.nan), first]):
        np.testing.assert_allclose(fuse(both).logits[0], [0, -2000, -3000])
    assert np.isfinite(fuse([scores("u", u=[-3e38, 0, 3e38])]).logits).all()


@pytest.mark.parametrize(
    ("models", "options", "message"),
    [
        ([], {}, "no scores to join"),
        (
            [scores(), scores(classes=["a", "b c", "f"])],
            {},
            r"\"d'e\" is in model 1 and not in model 2",
        ),
        (
            [scores(classes=["a"]), scores(classes=["a", "q"])],
            {},
            r"'q' is in model 2 and not in model 1",
        ),
        (
            [scores("uvx"), scores("wvu")],
            {},
            r"'x' is in model 1 and not in model 2; of 4 .*model 1 1, model 2 1",
        ),
        (
            [scores("uv"), scores("vuw")],
            {},
            "'w' is in model 2 and not in model 1; .*: model 1 1. --missing drop",
        ),
        (
            [scores("uv"), scores("wx")],
            {"missing": "drop"},
            "no video in common; model 1 begins with 'u', model 2 wi",
        ),
        (
            [scores()],
            {"missing": "maybe"},
            "--missing maybe is unknown; known are error, drop, worst",
        ),
        ([scores()], {"weights": [1, 2]}, "--weights 1,2: got 2 weights for 1 models"),
        ([scores()], {"weights": [-1]}, "--weights -1: weights are finite and not negative"),
        ([scores()], {"weights": [0]}, "--weights 0: .*not all 0"),
        ([scores()], {"weights": [np.inf]}, "--weights inf"),
    ],
)
def test_what_cannot_be_fused_is_refused(models, options, message):
    with pytest.raises(InputError, match=message):
        fuse(models, **options)
