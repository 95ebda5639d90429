"""The search against fusing again and against exhaustive search, and its figure against fresh
data."""

from dataclasses import replace
from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aggregate import metrics
from aggregate.scores import Scores
from ensemble.align import align
from ensemble.fuse import fuse_aligned
from ensemble.search import (
    FOLDS,
    STEPS,
    Ranking,
    contributions,
    fit,
    search,
    search_weights,
    select,
)
from extract import InputError


def models(*strengths: float, count=400, classes=8, seed=0, shared=0.0) -> list[Scores]:
    """Models of the same videos. `strength` is added to the true label's logit, and `shared` scales
    common noise."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, classes, count)
    truth, common = np.eye(classes)[labels], shared * rng.normal(size=(count, classes))
    return [
        Scores(
            ids=[f"v{row:05d}" for row in range(count)],
            classes=[f"c{name}" for name in range(classes)],
            logits=strength * truth + common + rng.normal(size=truth.shape),
            labels=labels,
        )
        for strength in strengths
    ]


@st.composite
def contests(draw):
    """Logits with few distinct values, so that there are ties; failed rows, missing rows, videos
    without a label."""
    count, classes, size = (
        draw(st.integers(1, 12)),
        draw(st.integers(2, 9)),
        draw(st.integers(1, 4)),
    )
    rng = np.random.default_rng(draw(st.integers(0, 999)))
    labels = rng.integers(-1, classes, count)
    labels[0] = 0
    scores = []
    for _ in range(size):
        logits = rng.integers(-2, 3, (count, classes)).astype(float)
        logits[rng.random(count) < 0.2] = np.nan
        kept = rng.permutation(count)[: rng.integers(1, count + 1)]
        kept = kept if 0 in kept else np.append(kept, 0)
        ids, names = [f"v{row}" for row in kept], [f"c{place}" for place in range(classes)]
        scores.append(Scores(ids=ids, classes=names, logits=logits[kept], labels=labels[kept]))
    # Eighths: weighted means of tied scores tie exactly, whichever way they are computed.
    weights = draw(st.lists(st.integers(0, 8), min_size=size, max_size=size))
    return align(scores, missing="worst"), np.array(weights if any(weights) else [1] * size) / 8


@settings(max_examples=200)
@given(contests())
def test_places_are_those_of_the_fused_scores(case):
    aligned, weights = case
    rows = aligned.labels >= 0
    logits = fuse_aligned(aligned, weights).logits[rows]
    # float32 resolves differences of 1e-7, and rounding turns ties into such differences
    logits = np.where(np.isnan(logits), np.nan, np.round(logits.astype(float), 5))
    expected = metrics.ranks(logits, aligned.labels[rows])
    [got] = Ranking.of(aligned).ranks([weights])
    classes = len(aligned.classes)
    exact = (expected < 5) | (expected == classes)
    assert np.array_equal(got[exact], expected[exact])
    assert ((got >= 5) & (got < classes))[~exact].all()


def test_the_search_ends_nowhere_above_a_neighbor_and_near_the_best_of_a_grid():
    ranking = Ranking.of(align(models(1.0, 2.2, 0.8, count=300, seed=5)))

    def error(weights) -> float:
        return float(ranking.errors([weights]).mean())

    end = np.array(fit(ranking, np.ones(len(ranking), bool)))
    assert end.sum() == pytest.approx(1)
    assert end.min() >= 0
    assert error(end) < error(np.ones(3))
    for giver, taker in ((0, 1), (0, 2), (1, 0), (1, 2), (2, 0), (2, 1)):
        moved = end.copy()
        amount = min(STEPS[-1], moved[giver])
        moved[giver] -= amount
        moved[taker] += amount
        assert error(moved) >= error(end)
    grid = [
        np.array(weights) / 20 for weights in product(range(21), repeat=3) if sum(weights) == 20
    ]
    assert error(end) <= min(map(error, grid)) + 0.005


def test_a_fold_never_sees_its_own_videos():
    """The figure comes from weights that were searched on the other folds; it is recomputed
    here."""
    ranking = Ranking.of(align(models(1.0, 1.4, count=103, seed=7)))
    found = search(ranking, seed=2)
    order = np.random.default_rng(2).permutation(103) % FOLDS  # the ids are sorted already
    errors = np.empty(103)
    for fold, weights in enumerate(found.weights_by_fold):
        assert weights == fit(ranking, order != fold)
        errors[order == fold] = ranking.errors([weights])[0, order == fold]
    assert found.summary.average_error.value == pytest.approx(errors.mean())
    assert found.weights == fit(ranking, np.ones(103, bool))


def test_a_strong_and_a_useless_model_are_told_apart_and_it_is_said():
    scores = models(3.0, 0.0, count=1500)
    found = search(Ranking.of(align(scores)))
    assert found.weights[0] > 0.8
    assert found.beats_equal
    assert found.statement().startswith(
        "Searched weights beat equal ones: on held-out folds (5, seed 0)"
    )
    fresh = fuse_aligned(align(models(3.0, 0.0, count=4000, seed=9)), found.weights)
    error = metrics.challenge_error(fresh.logits, fresh.labels)
    assert found.summary.average_error.low - 0.01 < error < found.summary.average_error.high + 0.01


def test_models_that_are_alike_do_not_beat_equal_weights_and_it_is_said():
    found = search(Ranking.of(align(models(1.0, 1.0, 1.0, count=300))))
    assert not found.beats_equal
    assert "do NOT beat equal ones" in found.statement()
    assert "Prefer --weights equal" in found.statement()
    assert found.in_sample <= found.summary.average_error.value


@pytest.mark.parametrize(
    ("low", "high", "beats"), [(-0.03, -0.001, True), (-0.03, 0.0, False), (-0.03, 0.002, False)]
)
def test_searched_weights_beat_equal_ones_only_if_the_whole_interval_says_so(low, high, beats):
    found = search(Ranking.of(align(models(1.0, 1.4, count=50))))
    found = replace(found, against_equal=metrics.Interval(-0.01, low, high))
    assert found.beats_equal is beats
    assert ("do NOT beat equal ones" in found.statement()) is not beats


def test_weights_are_a_function_of_the_seed_and_the_videos_not_of_the_order_in_a_file():
    scores = models(1.0, 1.5, 0.7, count=200, seed=4)
    order = np.random.default_rng(0).permutation(200)
    shuffled = [
        Scores([one.ids[row] for row in order], one.classes, one.logits[order], one.labels[order])
        for one in scores
    ]
    first = search(Ranking.of(align(scores)), seed=3)
    again = search(Ranking.of(align(shuffled)), seed=3)
    assert first == again
    assert search_weights(scores) == first.weights
    assert sum(first.weights) == pytest.approx(1)
    other = search(Ranking.of(align(scores)), seed=4)
    assert other.weights == first.weights  # the whole set has no folds
    assert other.weights_by_fold != first.weights_by_fold


def test_failed_videos_are_errors_and_do_not_spoil_the_search():
    scores = models(2.0, 1.0, count=100)
    logits = scores[0].logits.copy()
    logits[:10] = np.nan
    scores[0] = Scores(scores[0].ids, scores[0].classes, logits, scores[0].labels)
    ranking = Ranking.of(align(scores))
    rows = {row.name: row for row in contributions(ranking)}
    assert (rows["model 1"].summary.scored, rows["model 1"].summary.listed) == (90, 100)
    assert rows["all, equal weights"].summary.scored == 100
    assert 0 < min(search(ranking).weights) < 1


@pytest.mark.parametrize(
    ("size", "names"),
    [
        (1, ["model 1"]),
        (2, ["model 1", "model 2", "all, equal weights"]),
        (
            3,
            [
                *("model 1", "model 2", "model 3"),
                *("model 1 + model 2", "model 1 + model 3", "model 2 + model 3"),
                "all, equal weights",
            ],
        ),
    ],
)
def test_the_table_holds_singles_pairs_and_all(size, names):
    aligned = align(models(*[1.0, 1.5, 2.0][:size], count=60))
    rows = contributions(Ranking.of(aligned))
    assert [row.name for row in rows] == names
    for row in rows:
        fused = fuse_aligned(aligned, row.weights)
        expected = metrics.summarize(fused.logits, fused.labels)
        assert row.summary == expected
    assert rows[-1].against_equal == metrics.Interval(0, 0, 0)


def test_of_four_models_one_is_left_out_in_turn():
    rows = contributions(Ranking.of(align(models(1.0, 1.5, 2.0, 0.5, count=60))), [1, 2, 3, 4])
    names = [row.name for row in rows]
    assert len(names) == 4 + 6 + 4 + 1 + 1
    without = {row.name: row.weights for row in rows}
    assert without["without model 2"] == pytest.approx((1 / 3, 0, 1 / 3, 1 / 3))
    assert without["all, given weights"] == pytest.approx((0.1, 0.2, 0.3, 0.4))


def test_what_cannot_be_searched_is_refused():
    scores = models(1.0, 1.0, count=3)
    bare = [Scores(one.ids, one.classes, one.logits) for one in scores]
    with pytest.raises(InputError, match="none of the 3 videos has a label"):
        search_weights(bare)
    single = [Scores(one.ids[:1], one.classes, one.logits[:1], one.labels[:1]) for one in scores]
    with pytest.raises(InputError, match="on 1 labeled video"):
        search_weights(single)
    assert search_weights(scores[:1]) == (1.0,)


def test_windows_of_a_file_are_in_one_fold_and_are_resampled_together():
    """There are 12 files of 30 windows each, and the windows of a file are right or wrong
    together."""
    rng = np.random.default_rng(0)
    ids = [f"{file}.mp4#{window}000-{window + 1}000" for file in range(12) for window in range(30)]
    labels = np.repeat(rng.integers(0, 4, 12), 30)
    both = []
    for _ in range(2):
        guess = np.where(np.repeat(rng.random(12) < 0.6, 30), labels, (labels + 1) % 4)
        both.append(Scores(ids, list("abcd"), 3 * np.eye(4)[guess], labels))
    ranking = Ranking.of(align(both))
    found = search(ranking)
    assert len(found.weights_by_fold) == FOLDS
    assert found.summary.units == 12
    independent = Ranking.of(
        align(
            [Scores([f"v{row}" for row in range(360)], s.classes, s.logits, labels) for s in both]
        )
    )
    width, narrow = (
        row.summary.top1.high - row.summary.top1.low
        for row in (contributions(ranking)[0], contributions(independent)[0])
    )
    assert width > 3 * narrow


def test_groups_of_one_file_reach_the_fused_scores(tmp_path):
    labels = np.arange(8) % 2
    old = Scores([f"v{row}" for row in range(8)], ["a", "b"], np.eye(2)[labels], labels)
    new = Scores(old.ids, old.classes, old.logits, labels, groups=np.repeat(["anna", "bob"], 4))
    for pair in ((old, new), (new, old)):
        assert fuse_aligned(align(pair)).groups.tolist() == ["anna"] * 4 + ["bob"] * 4


def test_members_that_do_not_help_are_left_out_until_every_removal_hurts():
    strong, other, useless = models(2.0, 2.0, 0.1, count=2000)
    ranking = Ranking.of(align([strong, useless, other], names=["strong", "useless", "other"]))
    weights, dropped = select(ranking)
    assert weights == (0.5, 0.0, 0.5)
    (member,) = dropped
    assert member.name == "useless"

    def error(*team):
        return ranking.errors([team]).mean()

    assert member.error_with == pytest.approx(error(1, 1, 1))
    assert member.error_without == pytest.approx(error(1, 0, 1))
    assert error(1, 0, 1) < min(error(1, 0, 0), error(0, 0, 1), error(1, 1, 1))
    assert "useless is left out: without it" in member.statement()


def test_of_equal_models_one_is_left_and_one_alone_is_kept():
    (alone,) = models(1.5, count=300)
    assert select(Ranking.of(align([alone]))) == ((1.0,), ())
    twins = Ranking.of(align([alone, alone], names=["first", "second"]))
    weights, dropped = select(twins)
    assert sorted(weights) == [0.0, 1.0]
    assert dropped[0].error_with == dropped[0].error_without
