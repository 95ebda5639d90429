"""Metrics against slow, obvious loops, with ties and failed rows; and properties of the
intervals."""

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
    return scores, np.array(
        draw(st.lists(st.integers(0, classes - 1), min_size=rows, max_size=rows))
    )


def in_top(row, label, k) -> bool:
    """The rule for one row at a time: sort by falling score, equal scores by rising index, look
    among the first k."""
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
    assert metrics.summarize(scores, labels).mean_class.value == pytest.approx(np.mean(each))


def test_one_tie_the_lower_index_first():
    assert metrics.top_k_error(np.zeros((1, 6)), np.array([0]), 1) == 0
    assert metrics.top_k_error(np.zeros((1, 6)), np.array([5]), 5) == 1


def test_many_rows_are_ranked_as_few():
    rng = np.random.default_rng(0)
    scores, labels = rng.integers(0, 4, (9000, 7)).astype(float), rng.integers(0, 7, 9000)
    few = np.concatenate(
        [metrics.ranks(scores[i : i + 100], labels[i : i + 100]) for i in range(0, 9000, 100)]
    )
    assert np.array_equal(metrics.ranks(scores, labels), few)


@pytest.mark.parametrize("label", [-1, 3])
def test_a_label_that_is_no_class_is_named(label):
    with pytest.raises(ValueError, match=f"label {label} of row 1"):
        metrics.ranks(np.zeros((2, 3)), np.array([0, label]))


def test_nothing_to_score_is_an_error():
    with pytest.raises(ValueError, match="no video"):
        metrics.top_k_error(np.zeros((0, 3)), np.zeros(0, int), 1)
    with pytest.raises(ValueError, match="no video has a label"):
        metrics.summarize(np.zeros((2, 3)), np.array([-1, -1]))


def test_intervals_cover_the_truth_about_as_often_as_they_say():
    rng = np.random.default_rng(1)
    covered = 0
    for trial in range(200):
        interval = metrics.bootstrap(rng.random(60) < 0.7, resamples=300, seed=trial)
        covered += interval.low <= 0.7 <= interval.high
    assert 0.87 <= covered / 200 <= 0.99


def drawn_one_by_one(values: np.ndarray, groups: np.ndarray, resamples: int = 2000) -> np.ndarray:
    """The cluster bootstrap by its definition: groups are drawn, each with all of its videos."""
    rng, names = np.random.default_rng(5), np.unique(groups)
    members = [np.flatnonzero(groups == name) for name in names]
    picks = [
        np.concatenate([members[g] for g in rng.integers(len(names), size=len(names))])
        for _ in range(resamples)
    ]
    return np.array([[values[rows].mean() for rows in picks]])[0]


def test_videos_of_a_group_are_drawn_together():
    """20 files of 20 windows each, right or wrong as a whole: the interval is far wider than for
    independent windows."""
    rng = np.random.default_rng(0)
    groups = np.repeat([f"{file}.mp4" for file in range(20)], 20)
    values = np.repeat(rng.random(20) < 0.55, 20) ^ (rng.random(400) < 0.05)
    by_file, by_window = metrics.bootstrap(values, groups), metrics.bootstrap(values)
    expected = np.percentile(drawn_one_by_one(values, groups), [2.5, 97.5])
    np.testing.assert_allclose((by_file.low, by_file.high), expected, atol=0.02)
    assert by_file.value == by_window.value == values.mean()
    assert by_file.high - by_file.low > 3 * (by_window.high - by_window.low)
    assert (
        metrics.paired_bootstrap(values, ~values, groups).low
        < metrics.paired_bootstrap(values, ~values).low
    )


def test_groups_of_one_video_and_a_single_group_are_videos():
    values = np.random.default_rng(0).random(50) < 0.4
    alone = metrics.bootstrap(values)
    assert metrics.bootstrap(values, np.array([f"{row}" for row in range(50)])) == alone
    assert metrics.bootstrap(values, np.full(50, "one subject")) == alone


def test_two_groups_are_two_units_and_one_group_says_nothing():
    assert metrics.independent_units(np.array(["b", "a", "b", "b"])).tolist() == [1, 0, 1, 1]
    assert metrics.independent_units(np.array(["a", "a", "a"])).tolist() == [0, 1, 2]


def test_a_summary_resamples_groups_in_every_interval():
    rng = np.random.default_rng(4)
    labels = np.repeat(rng.integers(0, 4, 30), 10)
    groups = np.repeat(np.arange(30), 10)
    right = np.repeat(rng.random(30) < 0.6, 10)
    scores = np.eye(4)[np.where(right, labels, (labels + 1) % 4)]
    by_group, by_video = (
        metrics.summarize(scores, labels, groups),
        metrics.summarize(scores, labels),
    )
    for name in ("top1", "mean_class", "average_error"):
        one, other = getattr(by_group, name), getattr(by_video, name)
        assert one.value == other.value
        assert one.high - one.low > 2 * (other.high - other.low), name
    drawn = []
    for _ in range(2000):
        rows = np.concatenate(
            [np.flatnonzero(groups == group) for group in rng.integers(30, size=30)]
        )
        drawn.append(
            np.mean([right[rows][labels[rows] == label].mean() for label in set(labels[rows])])
        )
    ends = by_group.mean_class.low, by_group.mean_class.high
    np.testing.assert_allclose(ends, np.percentile(drawn, [2.5, 97.5]), atol=0.03)
    for summary, units in ((by_group, "30 groups of 300 videos"), (by_video, "300 videos")):
        table = metrics.summary_table([""], [(["model"], summary)])
        assert table.endswith(f"bootstrap over {units}")


def test_a_paired_difference_is_surer_than_two_separate_ones():
    rng = np.random.default_rng(2)
    theirs = rng.random(400) < 0.6
    ours = theirs | (rng.random(400) < 0.1)
    paired = metrics.paired_bootstrap(ours, theirs)
    assert paired.low > 0
    assert paired.value == pytest.approx(ours.mean() - theirs.mean())
    alone = metrics.bootstrap(ours)
    assert paired.high - paired.low < alone.high - alone.low


def test_a_summary_counts_failed_videos_as_errors_and_leaves_out_unlabeled_ones():
    scores = np.eye(6)[[0, 1, 2, 3]]
    scores[3] = np.nan
    scores = np.vstack([scores, np.ones((1, 6))])
    summary = metrics.summarize(scores, np.array([0, 1, 2, 3, -1]))
    assert (summary.scored, summary.listed) == (3, 4)
    assert summary.top1.value == pytest.approx(0.75)
    assert summary.average_error.value == pytest.approx(0.25)
    assert summary.mean_class.value == pytest.approx(0.75)
    assert summary.top1_of_scored == 1
    table = metrics.summary_table(["model", "segments"], [(["tsn", "25"], summary)])
    assert "3 / 4, top-1 of the scored 100.00" in table


def test_intervals_are_those_of_drawing_videos_one_by_one():
    rng = np.random.default_rng(3)
    labels = rng.integers(0, 4, 300)
    scores = rng.normal(size=(300, 7)) + 2 * np.eye(7)[labels] * (labels[:, None] > 0)
    summary = metrics.summarize(scores, labels)
    first = np.argmax(scores, axis=1) == labels
    top1, mean_class = [], []
    for _ in range(2000):
        rows = rng.integers(0, 300, 300)
        top1.append(first[rows].mean())
        mean_class.append(
            np.mean([first[rows][labels[rows] == label].mean() for label in range(4)])
        )
    for got, drawn in ((summary.top1, top1), (summary.mean_class, mean_class)):
        np.testing.assert_allclose(
            (got.low, got.high), np.percentile(drawn, [2.5, 97.5]), atol=0.01
        )
