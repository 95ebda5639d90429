"""Untrimmed videos with known content: the position of each part, and that train and test share
nothing."""

import csv
from pathlib import Path

import numpy as np
import pytest

from extract.decode import decode
from pipelines import untrimmed


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> tuple[Path, list[dict[str, str]]]:
    out = tmp_path_factory.mktemp("untrimmed")
    assert untrimmed.main(untrimmed.Options(out, copies=1)) == 0
    with open(out / "labels.csv", encoding="utf-8", newline="") as file:
        return out, list(csv.DictReader(file))


def test_every_exercise_is_in_one_split_and_named(made):
    out, rows = made
    assert {row["path"] for row in rows} == {
        p.relative_to(out / "clips").as_posix() for p in out.rglob("*.mp4")
    }
    counts = {split: sum(row["split"] == split for row in rows) for split in untrimmed.EXERCISES}
    assert counts == {"train": 72, "val": 36, "test": 36}
    assert len({row["group"] for row in rows}) == 144
    people = [person for split in untrimmed.PEOPLE.values() for person in split]
    assert sorted(people) == [1, 2, 3, 4]


def test_the_action_lies_where_labels_csv_says(made):
    out, rows = made
    for row in rows[::29]:
        video = decode(out / "clips" / row["path"], np.arange)
        assert video.num_frames == untrimmed.LENGTH
        assert video.frames.shape[1:] == (untrimmed.HEIGHT, untrimmed.WIDTH, 3)
        start, end = (
            round(float(row[name]) * untrimmed.RATE) for name in ("action_start", "action_end")
        )
        name = f"{row['label']}/{row['group']}.mp4"
        clip = untrimmed.frames_of(
            untrimmed.CLIPS / "exercise_mini" / "clips" / name, slice(0, untrimmed.ACTION)
        )
        assert np.abs(video.frames[start:end].astype(int) - clip).mean() < 8
        outside = np.r_[video.frames[:start], video.frames[end:]].astype(int)
        assert np.abs(outside - clip[0]).mean(axis=(1, 2, 3)).min() > 16  # nowhere else


def test_distractors_of_train_and_test_are_of_other_people():
    rooms = {split: untrimmed.distractors(people) for split, people in untrimmed.PEOPLE.items()}
    assert [len(clips) for clips in rooms.values()] == [23, 10, 10]
    first = {clip[0].tobytes() for clip in rooms["train"]}
    assert not first & {clip[0].tobytes() for clip in rooms["test"] + rooms["val"]}


def test_a_video_is_a_function_of_its_path(tmp_path):
    """It does not depend on the other videos that are made; another copy is another video."""
    rows = [row for row in untrimmed.planned(2) if row["split"] == "train"][:2]
    assert rows[0]["group"] == rows[1]["group"]
    rooms = untrimmed.distractors((1,))
    films = []
    for number, row in enumerate((rows[0], rows[0], rows[1])):
        untrimmed.join(row, rooms, tmp_path / str(number))
        films.append(
            decode(tmp_path / str(number) / "clips" / row["path"], np.arange).frames.astype(int)
        )
    assert np.abs(films[0] - films[1]).mean() < 1  # x264 may differ by a few bits
    assert np.abs(films[0] - films[2]).mean() > 8
