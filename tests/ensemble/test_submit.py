"""Submissions: files rank as the metrics do, errors name the entry, and grading counts as the
challenge does."""

import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from aggregate import metrics
from aggregate.scores import Scores
from ensemble.grade import grade_submission, read_ids, read_truth
from ensemble.submission import (
    check_submission,
    neutral_entries,
    submission_ids,
    write_submission,
)
from ensemble.submit import Options, main
from extract import InputError
from extract.cli import run_command
from extract.listing.labels import kinetics700_labels
from listings import write

CLASSES = ["a", "b c", "d'e", "f (g)", "ü", "h", "i"]


def clips(count: int) -> list[str]:
    return [f"val/b c/-_{row:09d}_000010_000020.mp4" for row in range(count)]


def some(logits, **changes) -> Scores:
    logits = np.asarray(logits, float)
    return Scores(**({"ids": clips(len(logits)), "classes": CLASSES, "logits": logits} | changes))


def submission(tmp_path, results=None, **changes):
    """A good submission of two videos, with the given changes."""
    entries = [
        {"label": label, "score": 0.5 - place / 10} for place, label in enumerate(CLASSES[:5])
    ]
    whole = {
        "version": "VERSION 1.0",
        "results": {"-_000000000": entries, "-_000000001": entries} | (results or {}),
        "external_data": {"used": False, "details": ""},
    } | changes
    path = tmp_path / "sub.json"
    path.write_text(json.dumps(whole), encoding="utf-8")
    return path


def official_hits(path, truth: dict[str, str], k: int) -> list[bool]:
    """The challenge's rule by its description: the k highest scores, by a plain loop that assumes
    no order."""
    results = json.loads(path.read_text(encoding="utf-8"))["results"]
    hits = []
    for video, label in truth.items():
        left, best = list(results.get(video, [])), []
        while left and len(best) < k:
            highest = max(left, key=lambda entry: entry["score"])
            best.append(highest["label"])
            left.remove(highest)
        hits.append(label in best)
    return hits


VALUES = st.sampled_from([-400.0, -1.0, 0.0, 0.5, 2.0, 90.0, 3e38]).map(np.float32)


@given(
    arrays.arrays(np.float32, (4, 7), elements=VALUES),
    st.lists(st.integers(0, 6), min_size=4, max_size=4),
)
def test_what_is_written_passes_and_grades_as_the_metrics_say(tmp_path_factory, logits, labels):
    """The file ranks exactly as the scores do, even with ties and probabilities that underflow."""
    path = tmp_path_factory.mktemp("s") / "sub.json"
    scores = some(logits)
    assert write_submission(scores, path) == 0
    assert check_submission(path, CLASSES, scores.ids).videos == 4
    truth = {
        video: {CLASSES[label]}
        for video, label in zip(submission_ids(scores.ids), labels, strict=True)
    }
    grade = grade_submission(path, truth)
    assert grade.top1_error.value == pytest.approx(metrics.top_k_error(logits, np.array(labels), 1))
    assert grade.top5_error.value == pytest.approx(metrics.top_k_error(logits, np.array(labels), 5))
    assert grade.average_error.value == pytest.approx(
        metrics.challenge_error(logits, np.array(labels))
    )
    for k, error in ((1, grade.top1_error), (5, grade.top5_error)):
        hits = official_hits(path, {video: next(iter(known)) for video, known in truth.items()}, k)
        assert error.value == pytest.approx(1 - np.mean(hits))


def test_scores_written_are_the_probabilities(tmp_path):
    logits = np.random.default_rng(0).normal(size=(3000, 7))  # more rows than are processed at once
    write_submission(some(logits), tmp_path / "sub.json")
    results = json.loads((tmp_path / "sub.json").read_text())["results"]
    row = np.exp(logits[2999]) / np.exp(logits[2999]).sum()
    expected = sorted(zip(row, CLASSES, strict=True), reverse=True)[:5]
    assert [entry["label"] for entry in results["-_000002999"]] == [label for _, label in expected]
    assert [entry["score"] for entry in results["-_000002999"]] == pytest.approx(
        [score for score, _ in expected]
    )


def test_scores_fall_in_single_precision_too(tmp_path):
    write_submission(some(np.zeros((1, 7))), tmp_path / "sub.json")
    (entries,) = json.loads((tmp_path / "sub.json").read_text())["results"].values()
    assert [entry["label"] for entry in entries] == CLASSES[:5]
    values = np.array([entry["score"] for entry in entries], np.float32)
    assert (np.diff(values) < 0).all()
    assert values == pytest.approx(1 / 7)


def test_a_failed_video_gets_the_stated_neutral_entry(tmp_path):
    scores = some([[1, 2, 3, 4, 5, 6, 7], [np.nan] * 7])
    path = tmp_path / "sub.json"
    assert write_submission(scores, path, external_data="Kinetics-600") == 1
    written = json.loads(path.read_text(encoding="utf-8"))
    assert written["results"]["-_000000001"] == entries(*neutral_entries(CLASSES))
    assert written["external_data"] == {
        "used": True,
        "details": "Kinetics-600; 1 of 2 videos could not be read and hold a neutral entry "
        "(the first 5 labels at nearly 1/7)",
    }
    checked = check_submission(path, CLASSES, scores.ids)
    assert (checked.videos, checked.neutral, checked.extra) == (2, 1, 0)
    assert str(checked) == "2 videos, 1 of them neutral (the video failed)"
    assert [item.name for item in tmp_path.iterdir()] == ["sub.json"]


def test_nothing_else_seen_is_said_so(tmp_path):
    write_submission(some(np.zeros((1, 7))), tmp_path / "sub.json", external_data="")
    assert json.loads((tmp_path / "sub.json").read_text())["external_data"] == {
        "used": False,
        "details": "",
    }


def test_ids_are_youtube_ids_where_names_are_those_of_clips():
    assert submission_ids(["val/a/-abcdefghi__000001_000011.mp4", "AAAAAAAAAAA_000100_000110"]) == [
        "-abcdefghi_",
        "AAAAAAAAAAA",
    ]
    own = ["eating/s2_ADL_23_00420_00520.mp4", "other.mp4"]
    assert submission_ids(own) == own
    assert submission_ids(["AAAAAAAAAAA"]) == ["AAAAAAAAAAA"]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (
            ["a/AAAAAAAAAAA_000001_000011.mp4", "b/AAAAAAAAAAA_000020_000030.mp4"],
            "'a/AAAAAAAAAAA_000001_000011.mp4' and 'b/AAAAAAAAAAA_000020_000030.mp4' are both video 'AAAAAAAAAAA'",
        ),
        (
            ["AAAAAAAAAAA_000001_000011.mp4", "odd.mp4"],
            "'odd.mp4' is not named like a clip of Kinetics",
        ),
        (["x", "y", "x"], "'x' and 'x' are both video 'x'"),
    ],
)
def test_ids_that_cannot_be_submitted_are_refused(names, message):
    with pytest.raises(InputError, match=message):
        submission_ids(names)


def test_fewer_than_five_classes_cannot_be_submitted(tmp_path):
    scores = Scores(ids=clips(1), classes=CLASSES[:4], logits=np.zeros((1, 4)))
    with pytest.raises(InputError, match="5 distinct labels per video, and there are 4 classes"):
        write_submission(scores, tmp_path / "sub.json")


def entries(*pairs):
    return [{"label": label, "score": score} for label, score in pairs]


FIVE = [(label, 0.5 - place / 10) for place, label in enumerate(CLASSES[:5])]


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (entries(*FIVE[:4]), "'-_000000001' has 4 labels; at least 5 are needed"),
        ([], "'-_000000001' has 0 labels"),
        (
            entries(*FIVE[:4], ("a", 0.01)),
            "'-_000000001' has the label 'a' twice, in entries 1 and 5",
        ),
        (
            entries(*FIVE, ("h", 0.1)),
            r"entry 6 \('h'\) has the score 0.1 after 0.0999.*scores fall",
        ),
        (
            entries(*FIVE[:4], ("h", FIVE[3][1])),
            r"entry 5 \('h'\) has the score 0.2 after 0.2; scores fall",
        ),
        (
            entries(*FIVE[:4], ("h", math.nan)),
            r"entry 5 \('h'\) has the score nan; scores are finite",
        ),
        (entries(("a", math.inf), *FIVE[1:]), r"entry 1 \('a'\) has the score inf"),
        (entries(("a", "0.9"), *FIVE[1:]), r"entry 1 \('a'\) has the score '0.9'"),
        (entries(("a", True), *FIVE[1:]), r"entry 1 \('a'\) has the score True"),
        (
            entries(("b_c", 0.9), *FIVE[1:]),
            "entry 1 has the label 'b_c', which is none of 7 classes",
        ),
        ([{"label": "a"}, *entries(*FIVE[1:])], "entry 1 is {'label': 'a'}, expected"),
        ([{"label": 3, "score": 1}], "entry 1 is {'label': 3, 'score': 1}, expected"),
        ([["a", 0.5]], r"entry 1 is \['a', 0.5\], expected"),
        ({"a": 0.5}, "'-_000000001' has {'a': 0.5}, expected a list"),
    ],
)
def test_the_first_bad_entry_is_named(tmp_path, entry, message):
    path = submission(tmp_path, {"-_000000001": entry})
    with pytest.raises(InputError, match=message):
        check_submission(path, CLASSES, clips(2))


def test_a_good_one_passes_and_further_videos_are_counted(tmp_path):
    path = submission(tmp_path)
    assert str(check_submission(path, CLASSES, clips(2))) == "2 videos"
    assert check_submission(path, CLASSES, ["-_000000001"]).extra == 1
    assert check_submission(path, CLASSES).videos == 2


def test_videos_that_are_missing_or_are_no_youtube_ids_are_named(tmp_path):
    path = submission(tmp_path)
    with pytest.raises(InputError, match=r"1 of 3 videos are missing, the first is '-_000000002'$"):
        check_submission(path, CLASSES, clips(3))
    with pytest.raises(InputError, match="the first is 'x'; the file begins with '-_000000000'"):
        check_submission(path, CLASSES, ["x"])
    path = submission(tmp_path, {"tooshort": entries(*FIVE)})
    with pytest.raises(InputError, match="'tooshort' is not a youtube id"):
        check_submission(path, CLASSES)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"version": 1}, "'version' is 1, expected a str"),
        ({"results": []}, r"'results' is \[\], expected a dict"),
        ({"results": {}}, "'results' holds no video"),
        ({"external_data": None}, "'external_data' is None, expected a dict"),
        ({"external_data": {"used": 1, "details": ""}}, "'used' is 1, expected a bool"),
        ({"external_data": {"used": True}}, "'details' is None, expected a str"),
    ],
)
def test_the_frame_around_the_results_is_checked(tmp_path, changes, message):
    path = submission(tmp_path)
    path.write_text(
        json.dumps(json.loads(path.read_text(encoding="utf-8")) | changes), encoding="utf-8"
    )
    with pytest.raises(InputError, match=message):
        check_submission(path, CLASSES)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"{", "is not JSON: Expecting property name"),
        (b"[]", "holds a list, expected an object"),
        (b'{"version": "1", "version": "2"}', "'version' appears twice in one object"),
        (b"\xff\xfe", "is not UTF-8"),
    ],
)
def test_files_that_are_no_submission_are_named(tmp_path, text, message):
    (tmp_path / "sub.json").write_bytes(text)
    with pytest.raises(InputError, match=message):
        check_submission(tmp_path / "sub.json", CLASSES)
    with pytest.raises(InputError, match=r"none\.json does not exist"):
        check_submission(tmp_path / "none.json", CLASSES)


def test_grading_counts_missing_as_wrong_and_says_what_the_script_would_stumble_over(tmp_path):
    path = submission(
        tmp_path,
        {"-_000000002": entries(("a", 0.1), ("b c", 0.9), ("a", 0.8), ("a", 0.7), ("a", 0.6))},
    )
    grade = grade_submission(
        path,
        {
            "-_000000000": {"a"},
            "-_000000001": {"zzz", "ü"},
            "-_000000003": {"a"},
            "-_000000002": {"a"},
        },
    )
    assert (grade.found, grade.listed, grade.extra) == (3, 4, 0)
    assert grade.top1_error.value == pytest.approx(3 / 4)
    assert grade.top5_error.value == pytest.approx(1 / 4)
    assert grade.average_error.value == pytest.approx(1 / 2)
    said = str(grade)
    assert "the challenge's figure: 0.50000" in said
    assert (
        "3 of 4 videos are in the submission\nmissing ones, the first of which is -_000000003, count as wrong"
        in said
    )
    assert "3 labels are not in the truth, the first is 'b c'" in said
    assert "-_000000002 has a label twice" in said
    assert "1 further videos" in str(
        grade_submission(path, {"-_000000000": {"a"}, "-_000000001": {"ü"}})
    )
    bad = submission(tmp_path, {"-_000000001": entries(("a", math.nan))})
    with pytest.raises(InputError, match="has the score nan"):
        grade_submission(bad, {"-_000000000": {"a"}})


def test_two_labels_of_one_video_are_a_hit_either_way_and_a_repeated_one_uses_up_a_place(tmp_path):
    path = submission(
        tmp_path,
        {"-_000000000": entries(*[("a", 0.9 - place / 10) for place in range(5)], ("h", 0.01))},
    )
    assert grade_submission(path, {"-_000000000": {"h"}}).top5_error.value == 1
    assert grade_submission(path, {"-_000000000": {"h", "a"}}).top1_error.value == 0


def test_truths_are_read_from_every_form_there_is(tmp_path):
    csv = write(
        tmp_path / "t.csv",
        'label,youtube_id,time_start,time_end,split\n"b c",-_000000000,10,20,validate\na,-_000000001,0.0,10.0,train\n',
    )
    assert read_truth(csv, "val") == {"-_000000000": {"b c"}}
    assert read_truth(csv, "train") == {"-_000000001": {"a"}}
    challenge = {
        "version": "1",
        "taxonomy": [],
        "database": {
            "-_000000000": {
                "subset": "validation",
                "annotations": [{"label": "a"}, {"label": "b c"}],
            },
            "-_000000001": {"subset": "testing", "annotations": []},
        },
    }
    path = write(tmp_path / "c.json", json.dumps(challenge))
    assert read_truth(path, "validation") == {"-_000000000": {"a", "b c"}}
    own = {"-_000000000": {"subset": "validate", "annotations": {"label": "a", "segment": [0, 10]}}}
    assert read_truth(write(tmp_path / "k.json", json.dumps(own))) == {"-_000000000": {"a"}}
    paths = write(tmp_path / "p.csv", "path,label\neating/x.mp4,eating\n")
    assert read_truth(paths) == {"eating/x.mp4": {"eating"}}
    assert read_ids(path, "test") == ["-_000000001"]


@pytest.mark.parametrize(
    ("name", "text", "split", "message"),
    [
        (
            "t.csv",
            "label,youtube_id,time_start,time_end,split\na,-_000000000,1,2,val\nb,-_000000001,1,2,train\n",
            "",
            r"t\.csv holds the splits 'train', 'val'; choose one",
        ),
        (
            "t.csv",
            "youtube_id,time_start,time_end,split\n-_000000000,1,2,test\n",
            "",
            "'-_000000000.*' has no label",
        ),
        ("t.csv", "path,label\nx.mp4,a\n", "test", r"no video of the split 'test'; it has ''"),
        ("t.json", '{"x": {"url": 1}}', "", r"t\.json is not a ground truth"),
        ("t.json", "[1]", "", r"t\.json is not a ground truth"),
        (
            "t.json",
            '{"x": {"annotations": [{"name": 1}]}}',
            "",
            r"'x' has the annotations \[\{'name': 1\}\]",
        ),
    ],
)
def test_truths_that_cannot_be_used_are_refused(tmp_path, name, text, split, message):
    with pytest.raises(InputError, match=message):
        read_truth(write(tmp_path / name, text), split)
    with pytest.raises(InputError, match="does not exist"):
        read_truth(tmp_path / f"none-{name}")


def test_ids_are_read_from_scores_text_and_csv(tmp_path):
    some(np.zeros((2, 7))).save(tmp_path / "s.h5")
    expected = ["-_000000000", "-_000000001"]
    assert read_ids(tmp_path / "s.h5") == expected
    assert read_ids(write(tmp_path / "ids.txt", "-_000000000\n\n-_000000001\n")) == expected
    table = "youtube_id,time_start,time_end,split\n-_000000000,1,2,test\n"
    assert read_ids(write(tmp_path / "ids.csv", table)) == expected[:1]
    both = "'-_000000000_000001_000002' and '-_000000000_000003_000004' are both"
    with pytest.raises(InputError, match=both):
        read_ids(write(tmp_path / "ids.csv", table + "-_000000000,3,4,test\n"))
    with pytest.raises(InputError, match=r"ids\.txt lists no video"):
        read_ids(write(tmp_path / "ids.txt", "\n"))


def command(*args: object) -> int:
    return run_command(
        main, Options, prog="python -m ensemble.submit", args=[str(arg) for arg in args]
    )


def test_the_command_checks_and_grades(tmp_path, capsys):
    classes = kinetics700_labels()
    rng = np.random.default_rng(0)
    scores = Scores(clips(3), classes, rng.normal(size=(3, 700)), labels=np.array([1, 2, 3]))
    scores.save(tmp_path / "s.h5")
    path = tmp_path / "sub.json"
    write_submission(scores, path)
    assert command("--check", path) == 0
    assert "passes: 3 videos\nmissing videos were not checked" in capsys.readouterr().out
    assert command("--check", path, "--labels", tmp_path / "s.h5", "--ids", tmp_path / "s.h5") == 0
    assert capsys.readouterr().out == f"{path} passes: 3 videos\n"
    ids = write(tmp_path / "ids.txt", "-_000000007\n")
    assert command("--check", path, "--ids", ids) == 2
    assert "the first is '-_000000007'" in capsys.readouterr().err
    assert command("--check", path, "--labels", write(tmp_path / "few.txt", "a\nb\n")) == 2
    assert "which is none of 2 classes" in capsys.readouterr().err
    truth = write(
        tmp_path / "t.csv",
        f"youtube_id,label,time_start,time_end,split\n-_000000000,{classes[1]},1,2,val\n",
    )
    assert command("--grade", path, "--truth", truth) == 0
    assert "top-1 error %" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ([], "give either --check SUBMISSION or --grade"),
        (["--check", "a", "--grade", "b"], "give either"),
        (["--grade", "a"], "--grade needs --truth"),
        (["--check", "a", "--truth", "b"], "--truth b belongs to --grade"),
        (
            ["--check", "a", "--labels", "auto"],
            "--labels auto: a submission is checked against a list",
        ),
        (["--check", "a", "--labels", "none.txt"], "none.txt: there is no such file"),
    ],
)
def test_wrong_usage_of_the_command(capsys, args, message):
    assert command(*args) == 2
    assert message in capsys.readouterr().err
