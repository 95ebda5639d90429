"""python -m ensemble from scores files to the fused file, summary and submission."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from aggregate import metrics
from aggregate.scores import Scores
from ensemble.__main__ import Options, main
from ensemble.fuse import fuse
from ensemble.submission import check_submission
from extract.cli import run_command

ROOT = Path(__file__).parents[2]
CLASSES = [f"class {name}" for name in "abcdefgh"]


def command(*args: object) -> int:
    return run_command(main, Options, prog="python -m ensemble", args=[str(arg) for arg in args])


@pytest.fixture
def files(tmp_path) -> list[Path]:
    """Three models of 120 videos in three orders. One model failed on all videos."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 8, 120)
    paths = []
    for name, strength in (("tsn", 1.5), ("hgnl", 1.8), ("stnet", 0.5)):
        logits = strength * np.eye(8)[labels] + rng.normal(size=(120, 8))
        logits[3] = np.nan
        order = rng.permutation(120)
        ids = [f"val/x/{row:011d}_000010_000020.mp4" for row in order]
        paths.append(tmp_path / f"{name}.h5")
        Scores(ids, CLASSES, logits[order], labels[order]).save(paths[-1])
    return paths


def test_equal_weights_from_files_to_submission(files, tmp_path, capsys):
    out, sub = tmp_path / "out" / "fused.h5", tmp_path / "out" / "sub.json"
    assert command("--scores", *files, "--out", out, "--submission", sub) == 0
    said = capsys.readouterr().out
    fused, expected = Scores.load(out), fuse([Scores.load(path) for path in files])
    assert fused.ids == expected.ids
    np.testing.assert_array_equal(fused.logits, expected.logits)
    assert fused.source["weights"] == [1 / 3] * 3
    assert check_submission(sub, CLASSES, fused.ids).neutral == 1
    assert "passes the check: 120 videos, 1 of them neutral" in said
    assert "120 videos, 120 with a label, 8 classes" in said
    record = json.loads((tmp_path / "out" / "fused.json").read_text())
    table = {row["name"]: row for row in record["table"]}
    assert set(table) == {
        *("tsn", "hgnl", "stnet", "tsn + hgnl", "tsn + stnet", "hgnl + stnet"),
        "all, equal weights",
    }
    error = metrics.challenge_error(fused.logits, fused.labels)
    assert table["all, equal weights"]["summary"]["average_error"]["value"] == pytest.approx(error)
    assert table["tsn"]["summary"]["scored"] == 119
    assert table["tsn"]["against_equal"]["value"] > 0
    assert all(name in said for name in table)
    assert (record["weights"], record["weights_from"]) == ([1 / 3] * 3, "equal")
    assert record["submission"] == {"path": str(sub), "videos": 120, "neutral": 1}
    assert record["videos"]["failed"] == [1, 1, 1]
    assert sorted(path.name for path in out.parent.iterdir()) == [
        "fused.h5",
        "fused.json",
        "sub.json",
    ]


def test_searched_weights_are_used_shown_and_judged(files, tmp_path, capsys):
    out = tmp_path / "fused.h5"
    assert command("--scores", *files, "--weights", "search", "--out", out) == 0
    said = capsys.readouterr().out
    record = json.loads(out.with_suffix(".json").read_text())
    assert record["weights_from"] == "search"
    assert record["weights"] == pytest.approx(Scores.load(out).source["weights"])
    assert record["search"]["statement"] in said
    assert record["search"]["folds"] == 5
    assert record["table"][-1]["name"] == "all, searched, held out"
    assert record["table"][-1]["summary"] == record["search"]["summary"]
    weights = said.split("for other videos of these models: --weights ")[1].split()[0]
    assert [float(part) for part in weights.split(",")] == pytest.approx(record["weights"])
    files_written = out.read_bytes(), out.with_suffix(".json").read_bytes()
    assert command("--scores", *files, "--weights", "search", "--out", out) == 0
    assert (out.read_bytes(), out.with_suffix(".json").read_bytes()) == files_written
    assert command("--scores", *files, "--weights", weights, "--out", tmp_path / "again.h5") == 0
    np.testing.assert_array_equal(
        Scores.load(tmp_path / "again.h5").logits, Scores.load(out).logits
    )
    assert "all, given weights" in capsys.readouterr().out


def test_members_are_selected_and_their_weights_can_be_given_on_other_videos(
    files, tmp_path, capsys
):
    out = tmp_path / "fused.h5"
    assert command("--scores", *files, "--out", out, "--weights", "select") == 0
    record = json.loads(out.with_suffix(".json").read_text())
    assert record["weights_from"] == "select"
    assert [member["name"] for member in record["left_out"]] == ["stnet"]
    assert record["weights"] == [0.5, 0.5, 0]
    printed = capsys.readouterr().out
    assert "stnet is left out: without it the average error on these videos is" in printed
    table = {row["name"]: row for row in record["table"]}
    pair, given = table["tsn + hgnl"], table["all, given weights"]
    assert given["summary"] == pair["summary"]
    again = ",".join(map(repr, record["weights"]))
    given_out = tmp_path / "given.h5"
    assert command("--scores", *files, "--out", given_out, "--weights", again) == 0
    np.testing.assert_array_equal(Scores.load(given_out).logits, Scores.load(out).logits)


def test_without_labels_there_is_a_fusion_and_no_search(files, tmp_path, capsys):
    bare = []
    for path in files:
        scores = Scores.load(path)
        bare.append(tmp_path / f"test-{path.name}")
        Scores(scores.ids, scores.classes, scores.logits).save(bare[-1])
    out = tmp_path / "fused.h5"
    assert command("--scores", *bare, "--weights", "search", "--out", out) == 2
    assert "none of the 120 videos has a label" in capsys.readouterr().err
    assert not out.exists()
    assert command("--scores", *bare, "--weights", "0.5,0.3,0.2", "--out", out) == 0
    assert "no video has a label: there is nothing to measure" in capsys.readouterr().out
    expected = fuse([Scores.load(path) for path in files], [0.5, 0.3, 0.2])
    np.testing.assert_array_equal(Scores.load(out).logits, expected.logits)


def test_missing_videos_are_dropped_only_when_asked_and_it_is_said(files, tmp_path, capsys):
    scores = Scores.load(files[1])
    Scores(scores.ids[:100], scores.classes, scores.logits[:100], scores.labels[:100]).save(
        files[1]
    )
    out, sub = tmp_path / "fused.h5", tmp_path / "sub.json"
    assert command("--scores", *files, "--out", out) == 2
    assert "of 120 videos are missing: hgnl 20. --missing drop" in capsys.readouterr().err
    assert command("--scores", *files, "--out", out, "--missing", "drop", "--submission", sub) == 0
    assert "it lacks the 20 videos that were left out" in capsys.readouterr().out
    assert len(Scores.load(out)) == 100
    assert command("--scores", *files, "--out", out, "--missing", "worst", "--submission", sub) == 0
    assert "20 videos that one model lacks count as wrong" in capsys.readouterr().out
    assert Scores.load(out).failed.sum() in (20, 21)  # one failed anyway


def test_what_cannot_be_submitted_is_said_before_anything_is_written(tmp_path, capsys):
    ids = ["a/AAAAAAAAAAA_000001_000011.mp4", "b/AAAAAAAAAAA_000021_000031.mp4"]
    Scores(ids, CLASSES, np.zeros((2, 8))).save(tmp_path / "s.h5")
    args = (
        "--scores",
        tmp_path / "s.h5",
        "--out",
        tmp_path / "f.h5",
        "--submission",
        tmp_path / "sub.json",
    )
    assert command(*args) == 2
    assert f"{ids[0]!r} and {ids[1]!r} are both video 'AAAAAAAAAAA'" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["s.h5"]


def test_one_model_is_an_ensemble_too(files, tmp_path):
    assert command("--scores", files[0], "--out", tmp_path / "f.h5", "--weights", "search") == 0
    assert json.loads((tmp_path / "f.json").read_text())["weights"] == [1]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (
            ["--weights", "best"],
            "--weights best: known are equal, select, search, or a number per model",
        ),
        (["--weights", "1,2"], "--weights 1,2: got 2 weights for 3 models"),
        (["--segments", "25"], "tsn.h5 has no scores of 25 segments; it has 1"),
        (
            ["--submission", "fused.json"],
            "fused.json would be written over another output, fused.json",
        ),
        (["--submission", "tsn.h5"], "tsn.h5 would be written over an input"),
        (["--scores", "tsn.h5", "tsn.h5"], "--scores: tsn.h5 is given twice"),
        (["--scores", "tsn.h5", "link.h5"], "--scores: link.h5 is given twice"),
        (["--scores", "none.h5"], "none.h5 is not a scores file (it does not exist)"),
    ],
)
def test_wrong_usage_says_what_to_do(files, monkeypatch, capsys, args, message):
    monkeypatch.chdir(files[0].parent)
    Path("link.h5").symlink_to("tsn.h5")
    given = [] if "--scores" in args else ["--scores", "tsn.h5", "hgnl.h5", "stnet.h5"]
    assert command(*given, *args, "--out", "fused.h5") == 2
    assert message in capsys.readouterr().err
    assert not Path("fused.h5").exists()


@pytest.mark.parametrize("module", ["ensemble", "ensemble.submit"])
def test_help_needs_no_heavy_library(module):
    """Imports are the slow part of --help."""
    code = (
        "import sys, runpy\n"
        "sys.argv = ['x', '--help']\ntry:\n"
        f"    runpy.run_module({module!r}, run_name='__main__', alter_sys=True)\n"
        "except SystemExit as done:\n    code = done.code\n"
        "heavy = {'torch', 'numpy', 'scipy', 'h5py', 'pandas', 'sklearn', 'zarr', 'ray', 'av'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy or code else 0)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "--help" in done.stdout
