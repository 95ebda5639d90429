"""python -m pipelines.untrimmed: untrimmed videos of known content, joined from the real clips the package ships.

    a room, a room | action | a room, another room      8 s at 8 frames/s, of which the action takes 1 s

Each video holds one second of a clip of exercise_mini, whose class is the video's, somewhere among pieces of clips of
daily_actions, which say nothing of it. Train, val and test share neither an exercise nor a person in the distractors.
labels.csv says where the action lies.
"""

import csv
import io
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from extract.cli import run_command

if TYPE_CHECKING:
    import numpy as np

CLIPS = Path(__file__).parent / "clips"
RATE = 8  # frames a second, that of exercise_mini
ACTION, LENGTH, PIECES = 8, 64, 4  # frames of the action and of the whole; pieces of distractors
HEIGHT, WIDTH = 144, 192
# Of each class's 24 exercises, in the order of their names, and of the four people of daily_actions.
EXERCISES = {"train": range(12), "val": range(12, 18), "test": range(18, 24)}
PEOPLE = {"train": ("1", "3"), "val": ("2",), "test": ("4",)}


@dataclass(frozen=True)
class Options:
    """Join untrimmed videos, a short real action among real distractors, from the clips that come with the package."""

    out: Path = Path("runs/untrimmed")
    """The folder of clips/ and labels.csv: `python -m extract --videos OUT/labels.csv --root OUT/clips`."""
    copies: int = 3
    """Videos of each training exercise, with other distractors each; val and test have one."""
    seed: int = 0
    """Of the distractors and of where the action lies."""


@dataclass(frozen=True)
class Planned:
    """A video to be joined: the `copy`-th of an exercise."""

    action: Path
    label: str
    split: str
    copy: int

    @property
    def path(self) -> str:
        return f"{self.split}/{self.label}/{self.action.stem}_{self.copy}.mp4"


def main(options: Options) -> int:
    from extract.files import replace_file

    rooms = {split: _rooms(people) for split, people in PEOPLE.items()}
    planned = list(_plan(options.copies))
    with ThreadPoolExecutor() as pool:
        rows = list(pool.map(lambda one: _join(one, rooms[one.split], options), planned))
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    replace_file(options.out / "labels.csv", text.getvalue())
    counts = ", ".join(f"{sum(row['split'] == split for row in rows)} {split}" for split in EXERCISES)
    print(f"{len(rows)} videos of {LENGTH / RATE:g} s, {ACTION / RATE:g} s of action each: {counts}; {options.out}")
    return 0


def _plan(copies: int) -> Iterator[Planned]:
    """Every exercise of exercise_mini, those of `train` several times."""
    folder = CLIPS / "exercise_mini" / "clips"
    for label in sorted(path.name for path in folder.iterdir()):
        exercises = sorted((folder / label).glob("*.mp4"))
        for split, places in EXERCISES.items():
            for action in exercises[places.start : places.stop]:
                for copy in range(copies if split == "train" else 1):
                    yield Planned(action, label, split, copy)


def _rooms(people: tuple[str, ...]) -> "list[np.ndarray]":
    """The clips of some people of daily_actions, every second frame (7.5 a second), uint8 [n, HEIGHT, WIDTH, 3]."""
    folder = CLIPS / "daily_actions"
    with open(folder / "labels.csv", encoding="utf-8", newline="") as file:
        paths = [row["path"] for row in csv.DictReader(file) if row["subject"] in people]
    return [_frames(folder / "clips" / path, slice(None, None, 2)) for path in paths]


def _frames(path: Path, part: slice) -> "np.ndarray":
    """Frames of a clip, cut to the middle and resized: uint8 [n, HEIGHT, WIDTH, 3]."""
    import numpy as np
    from PIL import Image, ImageOps

    from extract.decode import decode

    def fit(frame: "np.ndarray") -> "np.ndarray":
        return np.asarray(ImageOps.fit(Image.fromarray(frame), (WIDTH, HEIGHT), Image.Resampling.BILINEAR))

    return decode(path, lambda count: np.arange(count)[part], resize=fit).frames


def _join(one: Planned, rooms: "list[np.ndarray]", options: Options) -> dict[str, object]:
    """Write one video; its row of labels.csv."""
    import numpy as np

    from extract.decode import write_video

    rng = np.random.default_rng((options.seed, *one.path.encode()))
    piece = (LENGTH - ACTION) // PIECES
    long = [room for room in rooms if len(room) >= piece]
    pieces = []
    for which in rng.choice(len(long), PIECES, replace=False):
        start = rng.integers(len(long[which]) - piece + 1)
        pieces.append(long[which][start : start + piece])
    around = np.concatenate(pieces)
    first = int(rng.integers(len(around) + 1))
    # The clips show two photographs in turn, four frames each: these eight hold both.
    action = _frames(one.action, slice(0, ACTION))
    path = options.out / "clips" / one.path
    path.parent.mkdir(parents=True, exist_ok=True)
    write_video(path, np.concatenate([around[:first], action, around[first:]]), rate=RATE)
    start = {"action_start": first / RATE, "action_end": (first + ACTION) / RATE}
    return {"path": one.path, "label": one.label, "split": one.split, "group": one.action.stem} | start


if __name__ == "__main__":
    sys.exit(run_command(main, Options, prog="python -m pipelines.untrimmed"))
