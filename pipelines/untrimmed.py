"""python -m pipelines.untrimmed: untrimmed videos of known content, joined from the real clips the
package ships.

    a room, a room | action | a room, another room      8 s at 8 frames/s, of which the action takes 1 s

Each video holds one second of a clip of exercise_mini, whose class is the video's, somewhere among
pieces of clips of daily_actions, which say nothing of it. Train, val and test share neither an
exercise nor a person in the distractors. labels.csv says where the action lies; it is written last.
"""

import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from extract.cli import run_command

if TYPE_CHECKING:
    import numpy as np

CLIPS = Path(__file__).parent / "clips"
RATE = 8  # frames per second, that of exercise_mini
ACTION, LENGTH, PIECES = 8, 64, 4  # frames of the action and of the whole; pieces of distractors
HEIGHT, WIDTH = 144, 192
# Of each class's 24 exercises, in a drawn order (names in alphabetical order are alike, so that a
# split by them would test on other kinds of exercise), and of the four people of daily_actions.
EXERCISES = {"train": range(12), "val": range(12, 18), "test": range(18, 24)}
PEOPLE = {"train": (1, 3), "val": (2,), "test": (4,)}


@dataclass(frozen=True)
class Options:
    """Join untrimmed videos, a short real action among real distractors, from the clips that come
    with the package."""

    out: Path = Path("runs/untrimmed")
    """The folder of clips/ and labels.csv: `python -m extract --videos OUT/labels.csv --root
    OUT/clips`."""
    copies: int = 3
    """Videos of each training exercise, with other distractors each."""
    val_copies: int = 1
    """The same of each validation exercise; a test exercise has one video."""


def main(options: Options) -> int:
    import pandas as pd

    from extract.durable import replace_file

    rooms = {split: distractors(people) for split, people in PEOPLE.items()}
    with ThreadPoolExecutor() as pool:
        rows = list(
            pool.map(
                lambda row: row | join(row, rooms[row["split"]], options.out),
                planned(options.copies, options.val_copies),
            )
        )
    table = pd.DataFrame(rows)
    replace_file(options.out / "labels.csv", table.to_csv(index=False))
    counts = ", ".join(f"{count} {split}" for split, count in table["split"].value_counts().items())
    print(
        f"{len(rows)} videos of {LENGTH / RATE:g} s, {ACTION / RATE:g} s of action each: {counts}; {options.out}"
    )
    return 0


def planned(copies: int, val_copies: int = 1) -> Iterator[dict[str, Any]]:
    """Rows of labels.csv: every exercise of exercise_mini, several times with other distractors."""
    import numpy as np

    videos_each = {"train": copies, "val": val_copies, "test": 1}
    rng = np.random.default_rng(0)
    for folder in sorted((CLIPS / "exercise_mini" / "clips").iterdir()):
        exercises = rng.permutation([path.stem for path in sorted(folder.glob("*.mp4"))]).tolist()
        for split, places in EXERCISES.items():
            for name in exercises[places.start : places.stop]:
                for copy in range(videos_each[split]):
                    path = f"{split}/{folder.name}/{name}_{copy}.mp4"
                    yield {"path": path, "label": folder.name, "split": split, "group": name}


def distractors(people: tuple[int, ...]) -> "list[np.ndarray]":
    """The clips of some people of daily_actions, every second frame (7.5 a second), uint8 [n,
    HEIGHT, WIDTH, 3]."""
    import pandas as pd

    folder = CLIPS / "daily_actions"
    table = pd.read_csv(folder / "labels.csv")
    paths = table["path"][table["subject"].isin(people)]
    return [frames_of(folder / "clips" / path, slice(None, None, 2)) for path in paths]


def frames_of(path: Path, part: slice) -> "np.ndarray":
    """Frames of a clip, cut to the middle and resized: uint8 [n, HEIGHT, WIDTH, 3]."""
    import numpy as np
    from PIL import Image, ImageOps

    from extract.decode import decode

    def fit(frame: "np.ndarray") -> "np.ndarray":
        return np.asarray(
            ImageOps.fit(Image.fromarray(frame), (WIDTH, HEIGHT), Image.Resampling.BILINEAR)
        )

    return decode(path, lambda count: np.arange(count)[part], resize=fit).frames


def join(row: dict[str, Any], rooms: "list[np.ndarray]", out: Path) -> dict[str, float]:
    """Write the video of a row; when its action starts and ends. What is drawn is a function of its
    path."""
    import numpy as np

    from extract.decode import write_video

    rng = np.random.default_rng(list(row["path"].encode()))
    piece = (LENGTH - ACTION) // PIECES
    long = [room for room in rooms if len(room) >= piece]
    starts = [
        (which, rng.integers(len(long[which]) - piece + 1))
        for which in rng.permutation(len(long))[:PIECES]
    ]
    around = np.concatenate([long[which][start : start + piece] for which, start in starts])
    first = int(rng.integers(len(around) + 1))
    # The clips show two photographs in turn, four frames each: these eight hold both.
    clip = CLIPS / "exercise_mini" / "clips" / row["label"] / f"{row['group']}.mp4"
    action = frames_of(clip, slice(0, ACTION))
    write_video(
        out / "clips" / row["path"],
        np.concatenate([around[:first], action, around[first:]]),
        rate=RATE,
    )
    return {"action_start": first / RATE, "action_end": (first + ACTION) / RATE}


if __name__ == "__main__":
    sys.exit(run_command(main, Options, prog="python -m pipelines.untrimmed"))
