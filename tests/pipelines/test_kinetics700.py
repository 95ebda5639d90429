"""The whole recipe on a small folder in Kinetics' own layout: real clips, broken ones, missing
ones, and a leak."""

import csv
import json
import re
from pathlib import Path

import pytest

from extract import InputError
from pipelines import kinetics700

CLASSES = ("abseiling", "air drumming", "curling (sport)", "playing cards", "yoga")


def name_of(number: int) -> str:
    return f"{number:011d}_000001_000011.mp4"


@pytest.fixture(scope="module")
def roots(tmp_path_factory) -> tuple[Path, Path, Path]:
    """Three folders: Kinetics-700 by class (`_` for spaces) with a broken clip; flat with a CSV and
    a missing clip; a Kinetics-600."""
    source = sorted(
        (Path(__file__).parents[2] / "pipelines" / "clips" / "exercise_mini" / "clips").rglob(
            "*.mp4"
        )
    )
    folders = tmp_path_factory.mktemp("k") / "k700"
    flat = tmp_path_factory.mktemp("k") / "flat"
    k600 = tmp_path_factory.mktemp("k") / "k600"
    rows, number = [], 0
    for split, count in (("train", 3), ("val", 1), ("test", 1)):
        for label in CLASSES:
            for _ in range(count):
                old = label if label != "playing cards" else "a class of 600"
                for target in (
                    folders / split / label.replace(" ", "_"),
                    flat / split,
                    k600 / split / old,
                ):
                    target.mkdir(parents=True, exist_ok=True)
                    (target / name_of(number)).symlink_to(source[number])
                rows.append([label, f"{number:011d}", 1, 11.0, split])
                number += 1
    (folders / "train" / "air_drumming" / name_of(900)).write_bytes(b"<html>not found</html>")
    rows.append(["air drumming", f"{901:011d}", 1, 11, "train"])
    with (flat / "k700.csv").open("w", newline="") as file:
        csv.writer(file).writerows(
            [["label", "youtube_id", "time_start", "time_end", "split"], *rows]
        )
    (flat / "classes.txt").write_text("\n".join(CLASSES))
    return folders, flat, k600


def options(roots, workdir: Path, *, flat: bool = False, **changes) -> kinetics700.Options:
    quick = {
        "backbone": "test_resnet",
        "weights": "random",
        "frames": 4,
        "epochs": 2,
        "g1": 4,
        "g2": 2,
    }
    quick |= {"decode_workers": 1, "max_failed": 0.2, "skip": ("nl", "report"), "batch_size": 4}
    quick |= {"root": roots[0], "labels": str(roots[1] / "classes.txt")}
    if flat:
        quick |= {"root": roots[1]}
    return kinetics700.Options(workdir=workdir, **(quick | changes))


def test_the_whole_recipe_then_again_in_no_time(roots, tmp_path, capsys):
    work = tmp_path / "run"
    assert kinetics700.main(options(roots, work, skip=("report",))) == 0
    printed = capsys.readouterr().out
    for name in ("tsn", "hgnl", "nl"):
        assert (work / name / "best.pt").exists()
        assert re.search(rf"^{name} +\d", printed, re.MULTILINE)
    assert (work / "hgnl" / "control.pt").exists()
    assert "57.38 / 61.83" in printed
    assert "average error of the ensemble on test" in printed
    submission = json.loads((work / "submission.json").read_text())
    assert len(submission["results"]) == 5
    assert all(len(name) == 11 for name in submission["results"])
    searched, used = (
        json.loads((work / f"fused_{split}.json").read_text()) for split in ("val", "test")
    )
    # Five validation videos support no search, so the submission and the printed results have equal
    # weights.
    assert not searched["search"]["beats_equal"]
    assert used["weights"] == [1 / 3] * 3
    error = next(
        row["summary"]["average_error"]["value"]
        for row in used["table"]
        if row["name"].startswith("all")
    )
    assert f"average error of the ensemble on test: {error:.5f}" in printed
    assert "weights tsn 0.3333, hgnl 0.3333, nl 0.3333, as validation supports" in printed
    before = {path: path.stat().st_mtime_ns for path in work.rglob("c.*")}
    kinetics700.main(options(roots, work, skip=("report",)))
    again = capsys.readouterr().out
    assert "resuming" in again
    assert before == {path: path.stat().st_mtime_ns for path in work.rglob("c.*")}


def test_weights_are_searched_on_validation_and_used_on_the_test(roots, tmp_path, monkeypatch):
    fused = []

    def fuse(work, *, split, weights, **_):
        fused.append((split, weights))
        return "0.75,0.25"

    for name, stub in (
        ("fuse", fuse),
        ("run_command_step", lambda *_, **__: None),
        ("_print_results", lambda *_: None),
    ):
        monkeypatch.setattr(kinetics700, name, stub)
    for name in ("tsn", "hgnl"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "best.pt").touch()
    assert kinetics700.main(options(roots, tmp_path)) == 0
    assert fused == [("val", "search"), ("test", "0.75,0.25")]


def test_a_csv_with_missing_clips_and_kinetics_600_first(roots, tmp_path, capsys):
    made = options(roots, tmp_path / "run", flat=True, pretrain=roots[2])
    assert kinetics700.main(made) == 0
    printed = capsys.readouterr().out
    assert "1 missing" in printed
    assert (
        "youtube ids in Kinetics-600's training and Kinetics-700's val: 5: 00000000015" in printed
    )
    assert "4 carried over by class name, 1 start fresh" in printed
    assert (tmp_path / "run" / "k600_tsn" / "best.pt").exists()


def test_a_dry_run_prints_a_plan_and_writes_nothing(roots, tmp_path, capsys):
    assert kinetics700.main(options(roots, tmp_path / "run", dry_run=True)) == 0
    printed = capsys.readouterr().out
    assert "measured  decoding" in printed
    assert re.search(r"extract   k700: 26 videos, .* decoding \S+ CPU-core hours", printed)
    assert "train     k700 hgnl: optimizer sgd" in printed
    assert not (tmp_path / "run").exists()


def test_stnet_joins_the_ensemble(roots, tmp_path):
    made = options(roots, tmp_path / "run", stnet=True, epochs=1, skip=("hgnl", "nl", "report"))
    assert kinetics700.main(made) == 0
    assert json.loads((tmp_path / "run" / "fused_val.json").read_text())["models"] == [
        "tsn_val",
        "stnet_val",
    ]


def test_a_folder_without_val_is_refused(roots, tmp_path):
    with pytest.raises(InputError, match="needs labeled videos of train and of val"):
        kinetics700.main(options(roots, tmp_path / "run", root=roots[0] / "train"))
    with pytest.raises(InputError, match="has no four stages"):
        kinetics700.main(
            options(roots, tmp_path / "run", stnet=True, backbone="tf_efficientnet_lite0")
        )
    with pytest.raises(
        InputError, match="torchvision/r3d_18: the recipe takes a backbone that sees single frames"
    ):
        kinetics700.main(options(roots, tmp_path / "run", backbone="torchvision/r3d_18"))
