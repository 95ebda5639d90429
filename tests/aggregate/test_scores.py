"""The scores file: it reads back as it was written, and errors name the file and the problem."""

import h5py
import numpy as np
import pytest

from aggregate.scores import Scores, group_keys, save_scores
from extract import InputError


def some(segments=3, **changes) -> Scores:
    rng = np.random.default_rng(segments)
    logits = rng.normal(size=(4, 3)).astype(np.float32)
    logits[2] = np.nan
    fields = {
        "ids": ["val/a b/x.mp4", "val/a b/ü.mp4", "val/c/z.mp4", "q"],
        "classes": ["a b", "c", "d'e"],
        "logits": logits,
        "labels": np.array([0, 0, 1, -1]),
        "source": {"model": "hgnl", "options": {"g1": 16}},
        "segments": segments,
        "crops": np.stack([logits, logits], axis=1),
    }
    return Scores(**(fields | changes))


def test_what_goes_in_comes_out(tmp_path):
    save_scores(tmp_path / "s.h5", [some(3), some(25)])
    for segments, expected in ((None, some(25)), (3, some(3)), (25, some(25))):
        got = Scores.load(tmp_path / "s.h5", segments)
        assert (got.ids, got.classes, got.source) == (
            expected.ids,
            expected.classes,
            expected.source,
        )
        assert got.segments == expected.segments
        np.testing.assert_array_equal(got.logits, expected.logits)
        np.testing.assert_array_equal(got.labels, expected.labels)
        np.testing.assert_array_equal(got.crops, expected.crops)
    assert got.failed.tolist() == [False, False, True, False]


def test_scores_without_labels(tmp_path):
    some(labels=None, crops=None).save(tmp_path / "s.h5")
    got = Scores.load(tmp_path / "s.h5")
    assert got.labels is None
    assert got.crops is None


def test_the_file_is_plain_hdf5(tmp_path):
    some(25).save(tmp_path / "s.h5")
    with h5py.File(tmp_path / "s.h5") as file:
        assert file["logits/25"].shape == (4, 3)
        assert file["ids"].asstr()[1] == "val/a b/ü.mp4"
    assert [path.name for path in tmp_path.iterdir()] == ["s.h5"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ids": ["a", "b", "a", "c"]}, "id 'a' appears 2 times"),
        ({"classes": ["a", "b", "a"]}, "class 'a' appears 2 times"),
        ({"logits": np.zeros((4, 2))}, r"logits are \[4, 2\]"),
        ({"ids": [], "logits": np.zeros((0, 3))}, "there are 0 videos and 3 classes"),
        ({"classes": [], "logits": np.zeros((4, 0))}, "there are 4 videos and 0 classes"),
        ({"labels": np.array([0, 3, 0, 0])}, "has label 3"),
        ({"labels": np.array([0])}, "labels are"),
        ({"crops": np.zeros((4, 3, 2))}, "crops are"),
        (
            {"logits": np.array([[0, 1, 2], [0, np.nan, 1], [0, 0, 0], [0, 0, 0]])},
            r"row 1\) has nan for class 'c'",
        ),
        (
            {"logits": np.array([[0, 1, 2], [0, 1, 1], [np.inf, 0, 0], [0, 0, 0]])},
            r"row 2\) has inf for class 'a b'",
        ),
    ],
)
def test_scores_that_do_not_fit_are_refused_with_the_first_offender(changes, message):
    with pytest.raises(InputError, match=message):
        some(**changes)


def test_files_that_are_no_scores_are_named(tmp_path):
    with pytest.raises(InputError, match="does not exist"):
        Scores.load(tmp_path / "none.h5")
    (tmp_path / "text.h5").write_text("hello")
    with pytest.raises(InputError, match=r"text\.h5 is not a scores file"):
        Scores.load(tmp_path / "text.h5")
    with h5py.File(tmp_path / "other.h5", "w") as file:
        file["x"] = 1
    with pytest.raises(InputError, match="schema None"):
        Scores.load(tmp_path / "other.h5")
    some(3).save(tmp_path / "s.h5")
    with pytest.raises(InputError, match="no scores of 25 segments; it has 3"):
        Scores.load(tmp_path / "s.h5", 25)
    with h5py.File(tmp_path / "s.h5", "a") as file:
        file["logits/3"][1, 1] = np.inf
    with pytest.raises(InputError, match=r"s\.h5 was damaged or changed by another program"):
        Scores.load(tmp_path / "s.h5")
    (tmp_path / "s.h5").write_bytes(
        (tmp_path / "s.h5").read_bytes()[512:]
    )  # as the first version wrote it
    with pytest.raises(InputError, match=r"s\.h5: val/a b/ü\.mp4 \(row 1\) has inf"):
        Scores.load(tmp_path / "s.h5")


def test_windows_of_a_video_are_averaged_into_one_score(tmp_path):
    ids = ["b.mp4#0-10000", "b.mp4#10000-20000", "a.mp4#0-10000", "c#1.mp4", "b.mp4#20000-25500"]
    logits = np.array([[1, 2], [3, 4], [5, 6], [7, 8], [np.nan, np.nan]])
    scores = Scores(ids, ["x", "y"], logits, np.array([1, 1, 0, -1, 1]), {"model": "tsn"}, 25)
    by_video = scores.by_video()
    assert by_video.ids == ["a.mp4", "b.mp4", "c#1.mp4"]
    np.testing.assert_allclose(
        by_video.logits, [[5, 6], [2, 3], [7, 8]]
    )  # failed windows are left out of the mean
    assert by_video.labels is not None
    assert by_video.labels.tolist() == [0, 1, -1]
    assert (by_video.segments, by_video.source) == (25, {"model": "tsn", "by": "video"})
    failed = Scores(ids[:2], ["x", "y"], np.full((2, 2), np.nan)).by_video()
    assert failed.failed.tolist() == [True]
    with pytest.raises(InputError, match=r"the windows of b\.mp4 are of several classes"):
        Scores(ids, ["x", "y"], logits, np.array([1, 0, 0, 0, 1])).by_video()


def test_groups_travel_with_scores_and_are_derived_from_ids_where_a_file_has_none(tmp_path):
    ids = ["a.mp4#0-1000", "a.mp4#1000-2000", "b.mp4", "c.mp4"]
    assert Scores(ids, ["x"], np.zeros((4, 1))).groups.tolist() == [
        "a.mp4",
        "a.mp4",
        "b.mp4",
        "c.mp4",
    ]
    grouped = Scores(ids, ["x"], np.zeros((4, 1)), groups=group_keys(ids, ["", "anna", "anna", ""]))
    assert grouped.groups.tolist() == ["anna", "anna", "anna", "c.mp4"]
    grouped.save(tmp_path / "s.h5")
    assert Scores.load(tmp_path / "s.h5").groups.tolist() == grouped.groups.tolist()
    assert grouped.by_video().groups.tolist() == ["anna", "anna", "c.mp4"]
    with pytest.raises(InputError, match=r"groups are \[1\] for 4 ids"):
        Scores(ids, ["x"], np.zeros((4, 1)), groups=["anna"])
