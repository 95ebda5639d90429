"""Metrics against slow, obvious loops, ties and failed rows included; intervals against what they promise."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from aggregate import metrics


@st.composite
def scored(draw, min_rows=1):
    """Scores with many ties and some NaN rows, and labels."""
    rows, classes = draw(st.integers(min_rows, 12)), draw(st.integers(1, 9))
    values = st.sampled_from([-1.0, 0.0, 0.5, 2.0, float("nan")])
    scores = draw(arrays.arrays(np.float32, (rows, classes), elements=values.map(np.float32)))
    return scores, np.array(draw(st.lists(st.integers(0, classes - 1), min_size=rows, max_size=rows)))


def in_top(row, label, k) -> bool:
    """The rule, one row at a time: sort by falling score, equal scores by rising index, look among the first k."""
    if any(np.isnan(row)):
        return False
    order = sorted(range(len(row)), key=lambda place: (-row[place], place))
    return label in order[:k]


@given(scored(), st.integers(1, 9))
def test_top_k_error_is_the_obvious_loop(case, k):
    scores, labels = case
    wrong = [not in_top(row, label, k) for row, label in zip(scores.tolist(), labels, strict=True)]
    assert metrics.top_k_error(scores, labels, k) == pytest.approx(sum(wrong) / len(wrong))


@given(scored())
def test_challenge_error_is_the_average_of_both(case):
    scores, labels = case
    both = [metrics.top_k_error(scores, labels, k) for k in (1, 5)]
    assert metrics.challenge_error(scores, labels) == pytest.approx(sum(both) / 2)


@given(scored())
def test_mean_class_accuracy_is_the_obvious_loop(case):
    scores, labels = case
    each = []
    for label in sorted(set(labels.tolist())):
        rows = np.flatnonzero(labels == label)
        each.append(np.mean([in_top(scores[row].tolist(), label, 1) for row in rows]))
    assert metrics.summarise(scores, labels).mean_class.value == pytest.approx(np.mean(each))


def test_one_tie_the_lower_index_first():
    assert metrics.top_k_error(np.zeros((1, 6)), np.array([0]), 1) == 0
    assert metrics.top_k_error(np.zeros((1, 6)), np.array([5]), 5) == 1


def test_many_rows_are_ranked_as_few():
    rng = np.random.default_rng(0)
    scores, labels = rng.integers(0, 4, (9000, 7)).astype(float), rng.integers(0, 7, 9000)
    few = np.concatenate([metrics.ranks(scores[i : i + 100], labels[i : i + 100]) for i in range(0, 9000, 100)])
    assert np.array_equal(metrics.ranks(scores, labels), few)


@pytest.mark.parametrize("label", [-1, 3])
def test_a_label_that_is_no_class_is_named(label):
    with pytest.raises(ValueError, match=f"label {label} of row 1"):
        metrics.ranks(np.zeros((2, 3)), np.array([0, label]))


def test_nothing_to_score_is_an_error():
    with pytest.raises(ValueError, match="no video"):
        metrics.top_k_error(np.zeros((0, 3)), np.zeros(0, int), 1)
    with pytest.raises(ValueError, match="no video has a label"):
        metrics.summarise(np.zeros((2, 3)), np.array([-1, -1]))


def test_intervals_cover_the_truth_about_as_often_as_they_say():
    rng = np.random.default_rng(1)
    covered = 0
    for trial in range(200):
        interval = metrics.bootstrap(rng.random(60) < 0.7, resamples=300, seed=trial)
        covered += interval.low <= 0.7 <= interval.high
    assert 0.87 <= covered / 200 <= 0.99


def test_a_paired_difference_is_surer_than_two_separate_ones():
    rng = np.random.default_rng(2)
    theirs = rng.random(400) < 0.6
    ours = theirs | (rng.random(400) < 0.1)
    paired = metrics.paired_bootstrap(ours, theirs)
    assert paired.low > 0
    assert paired.value == pytest.approx(ours.mean() - theirs.mean())
    alone = metrics.bootstrap(ours)
    assert paired.high - paired.low < alone.high - alone.low


def test_a_summary_counts_failed_videos_as_errors_and_leaves_out_unlabelled_ones():
    scores = np.eye(6)[[0, 1, 2, 3]]
    scores[3] = np.nan
    scores = np.vstack([scores, np.ones((1, 6))])
    summary = metrics.summarise(scores, np.array([0, 1, 2, 3, -1]))
    assert (summary.scored, summary.listed) == (3, 4)
    assert summary.top1.value == pytest.approx(0.75)
    assert summary.average_error.value == pytest.approx(0.25)
    assert summary.mean_class.value == pytest.approx(0.75)
    assert summary.top1_of_scored == 1
    assert "3 / 4, top-1 of the scored 100.00" in str(summary)


def test_intervals_are_those_of_drawing_videos_one_by_one():
    rng = np.random.default_rng(3)
    labels = rng.integers(0, 4, 300)
    scores = rng.normal(size=(300, 7)) + 2 * np.eye(7)[labels] * (labels[:, None] > 0)
    summary = metrics.summarise(scores, labels)
    first = np.argmax(scores, axis=1) == labels
    top1, mean_class = [], []
    for _ in range(2000):
        rows = rng.integers(0, 300, 300)
        top1.append(first[rows].mean())
        mean_class.append(np.mean([first[rows][labels[rows] == label].mean() for label in range(4)]))
    for got, drawn in ((summary.top1, top1), (summary.mean_class, mean_class)):
        np.testing.assert_allclose((got.low, got.high), np.percentile(drawn, [2.5, 97.5]), atol=0.01)
