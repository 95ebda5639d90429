"""Frame indices: the published vectors, and properties that must hold for every length."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from extract.sampling import segment_centers, segment_random

LENGTHS = st.integers(1, 2000)
SEGMENTS = st.integers(1, 64)


@pytest.mark.parametrize(
    ("num_frames", "num_segments", "expected"),
    [
        (250, 25, list(range(5, 250, 10))),
        (300, 25, list(range(6, 300, 12))),
        (10, 25, [0, 0, 1, 1, 1, 2, 2, 3, 3, 3, 4, 4, 5, 5, 5, 6, 6, 7, 7, 7, 8, 8, 9, 9, 9]),
        (1, 25, [0] * 25),
        (250, 3, [41, 125, 208]),
        (300, 3, [50, 150, 250]),
        (10, 3, [1, 5, 8]),
        (4, 3, [0, 2, 3]),
        (2, 3, [0, 1, 1]),
    ],
)
def test_segment_centers_are_tsns(num_frames, num_segments, expected):
    assert segment_centers(num_frames, num_segments).tolist() == expected


def test_segment_centers_are_the_formula():
    for num_frames in range(1, 2000):
        for num_segments in (1, 3, 7, 8, 10, 25):
            L, n = num_frames, num_segments
            reference = [int(i * L / n + L / (2 * n)) for i in range(n)]
            assert segment_centers(L, n).tolist() == reference, (L, n)


def test_segment_centers_differ_from_tsn_pytorchs_floats_only_where_those_round_a_whole_number_down():
    """The line of tsn-pytorch and mmaction2 loses a frame if `tick / 2 + tick * i` is 14.999...
    instead of exactly 15."""
    for num_frames in range(1, 2000):
        for num_segments in (3, 8, 25):
            tick = num_frames / num_segments
            theirs = np.array([int(tick / 2.0 + tick * segment) for segment in range(num_segments)])
            ours = segment_centers(num_frames, num_segments)
            whole = (2 * np.arange(num_segments) + 1) * num_frames % (2 * num_segments) == 0
            differ = ours != theirs
            assert not (differ & ~whole).any(), (num_frames, num_segments)
            assert (ours[differ] - theirs[differ] == 1).all(), (num_frames, num_segments)


@given(LENGTHS, SEGMENTS)
def test_segment_centers_lie_in_the_middle_of_their_segments(num_frames, num_segments):
    centers = segment_centers(num_frames, num_segments)
    assert centers.shape == (num_segments,)
    assert centers.dtype == np.int64
    middle = (np.arange(num_segments) + 0.5) * num_frames / num_segments
    assert (np.abs(centers + 0.5 - middle) <= 0.5 + 1e-9).all()
    # Frame f is as far from the start as L-1-f from the end; rounding down moves at most one frame.
    mirrored = num_frames - 1 - centers[::-1]
    assert (np.abs(centers - mirrored) <= 1).all()


def test_segment_centers_of_a_day_of_video_do_not_overflow():
    assert segment_centers(2**40, 2).tolist() == [2**38, 3 * 2**38]


@given(LENGTHS, SEGMENTS, st.integers(0, 2**32))
def test_segment_random_stays_within_its_segments(num_frames, num_segments, seed):
    frames = segment_random(num_frames, num_segments, np.random.default_rng(seed))
    assert frames.shape == (num_segments,)
    assert frames.dtype == np.int64
    for number, frame in enumerate(frames.tolist()):
        first, end = number * num_frames // num_segments, (number + 1) * num_frames // num_segments
        assert first <= frame < max(end, first + 1), number
        assert 0 <= frame < num_frames


@settings(max_examples=40)
@given(st.integers(1, 40), st.integers(1, 40))
def test_segment_random_reaches_every_frame(num_frames, num_segments):
    """The last frames too, which tsn-pytorch's equal, rounded-down segments never draw."""
    rng = np.random.default_rng(0)
    seen = {
        frame
        for _ in range(40 * 20)
        for frame in segment_random(num_frames, num_segments, rng).tolist()
    }
    assert seen == set(range(num_frames))


@given(
    SEGMENTS.flatmap(lambda segments: st.tuples(st.integers(1, segments), st.just(segments))),
    st.integers(0, 999),
)
def test_segment_random_of_a_short_video_holds_every_frame(lengths, seed):
    num_frames, num_segments = lengths
    frames = segment_random(num_frames, num_segments, np.random.default_rng(seed))
    assert np.unique(frames).tolist() == list(range(num_frames))
    assert (np.diff(frames) >= 0).all()


def test_segment_random_is_uniform_and_independent_between_segments():
    rng = np.random.default_rng(1)
    drawn = np.array([segment_random(20, 4, rng) % 5 for _ in range(4000)])
    for segment in range(4):
        counts = np.bincount(drawn[:, segment], minlength=5)
        assert (np.abs(counts - 800) < 5 * np.sqrt(800 * 0.8)).all(), (
            counts
        )  # five standard deviations
    assert np.abs(np.corrcoef(drawn.T) - np.eye(4)).max() < 0.1


def test_segment_random_is_a_function_of_its_generator():
    draws = [segment_random(300, 25, np.random.default_rng(seed)).tolist() for seed in (7, 7, 8)]
    assert draws[0] == draws[1] != draws[2]


@pytest.mark.parametrize(("num_frames", "num_segments"), [(0, 25), (-3, 25), (10, 0), (10, -1)])
def test_nothing_to_sample_is_an_error(num_frames, num_segments):
    message = f"got {num_frames} frames and {num_segments} segments"
    with pytest.raises(ValueError, match=message):
        segment_centers(num_frames, num_segments)
    with pytest.raises(ValueError, match=message):
        segment_random(num_frames, num_segments, np.random.default_rng(0))
