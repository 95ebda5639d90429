"""python -m pipelines.untrimmed: make untrimmed videos with known content, from real clips of the
package.

    a room, a room | action | a room, another room      8 s at 8 frames/s, with 1 s of action

Each video holds one second of a clip of exercise_mini, which gives its class. The rest are pieces
of clips of daily_actions, the distractors, which do not depend on the class. Train, val and test
share neither an exercise nor a person in the distractors. labels.csv is written last and gives the
time of the action.
"""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from extract import Record
from extract.cli import run_as_script

if TYPE_CHECKING:
    import numpy as np

CLIPS = Path(__file__).parent / "clips"
RATE = 8  # frames per second, that of exercise_mini
ACTION, LENGTH, PIECES = 8, 64, 4  # frames of the action and of the whole; pieces of distractors
HEIGHT, WIDTH = 144, 192
# Parts of each class's 24 exercises in random order, and of the four people in daily_actions. In
# alphabetical order neighbors are alike, so a split would test on other kinds of exercise.
EXERCISES = {"train": range(12), "val": range(12, 18), "test": range(18, 24)}
PEOPLE = {"train": (1, 3), "val": (2,), "test": (4,)}


@dataclass(frozen=True)
class Options:
    """Make untrimmed videos, each a short real action among real distractors, from the clips that
    come with the package."""

    out: Path = Path("runs/untrimmed")
    """The folder for clips/ and labels.csv. Extract them with `python -m extract --videos
    OUT/labels.csv --root OUT/clips`."""
    copies: int = 3
    """Number of videos of each training exercise, each with different distractors."""
    val_copies: int = 1
    """Number of videos of each validation exercise; a test exercise has one."""


def main(options: Options) -> int:
    import pandas as pd

    from extract.durable import replace_file

    clips = {split: distractors(people) for split, people in PEOPLE.items()}

    def finish(row: Record) -> Record:
        return row | join(row, clips[row["split"]], options.out)

    with ThreadPoolExecutor() as pool:
        rows = list(pool.map(finish, planned(options.copies, options.val_copies)))
    table = pd.DataFrame(rows)
    replace_file(options.out / "labels.csv", table.to_csv(index=False))
    counts = ", ".join(f"{count} {split}" for split, count in table["split"].value_counts().items())
    print(
        f"{len(rows)} videos of {LENGTH / RATE:g} s, with {ACTION / RATE:g} s of action each: "
        f"{counts}; {options.out}"
    )
    return 0


def planned(copies: int, val_copies: int = 1) -> Iterator[Record]:
    """Rows of labels.csv: every exercise of exercise_mini, in copies with different distractors."""
    import numpy as np

    copies_of_split = {"train": copies, "val": val_copies, "test": 1}
    rng = np.random.default_rng(0)
    for folder in sorted((CLIPS / "exercise_mini" / "clips").iterdir()):
        names = [path.stem for path in sorted(folder.glob("*.mp4"))]
        exercises = rng.permutation(names).tolist()
        for split, numbers in EXERCISES.items():
            for name in exercises[numbers.start : numbers.stop]:
                for copy in range(copies_of_split[split]):
                    path = f"{split}/{folder.name}/{name}_{copy}.mp4"
                    yield {"path": path, "label": folder.name, "split": split, "group": name}


def distractors(people: tuple[int, ...]) -> "list[np.ndarray]":
    """The clips of some people of daily_actions, every second frame (7.5 per second), uint8 [n,
    HEIGHT, WIDTH, 3]."""
    import pandas as pd

    folder = CLIPS / "daily_actions"
    table = pd.read_csv(folder / "labels.csv")
    paths = table["path"][table["subject"].isin(people)]
    return [frames_of(folder / "clips" / path, slice(None, None, 2)) for path in paths]


def frames_of(path: Path, part: slice) -> "np.ndarray":
    """Frames of a clip, resized and cropped to the middle: uint8 [n, HEIGHT, WIDTH, 3]."""
    import numpy as np
    from PIL import Image, ImageOps

    from extract.decode import decode

    def fit(frame: "np.ndarray") -> "np.ndarray":
        picture = Image.fromarray(frame)
        return np.asarray(ImageOps.fit(picture, (WIDTH, HEIGHT), Image.Resampling.BILINEAR))

    return decode(path, lambda count: np.arange(count)[part], resize=fit).frames


def join(row: Record, clips: "list[np.ndarray]", out: Path) -> dict[str, float]:
    """Write the video of a row; returns the start and end of its action. The distractors depend
    only on its path."""
    import numpy as np

    from extract.decode import write_video

    rng = np.random.default_rng(list(row["path"].encode()))
    length = (LENGTH - ACTION) // PIECES
    long_clips = [clip for clip in clips if len(clip) >= length]
    pieces = []
    for number in rng.permutation(len(long_clips))[:PIECES]:
        start = rng.integers(len(long_clips[number]) - length + 1)
        pieces.append(long_clips[number][start : start + length])
    around = np.concatenate(pieces)
    first = int(rng.integers(len(around) + 1))
    # The clips alternate between two photographs, four frames each. These eight frames show both.
    path = CLIPS / "exercise_mini" / "clips" / row["label"] / f"{row['group']}.mp4"
    action = frames_of(path, slice(0, ACTION))
    frames = np.concatenate([around[:first], action, around[first:]])
    write_video(out / "clips" / row["path"], frames, rate=RATE)
    return {"action_start": first / RATE, "action_end": (first + ACTION) / RATE}


if __name__ == "__main__":
    run_as_script()
