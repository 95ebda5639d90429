"""Real clips joined into untrimmed videos: accuracy of a TSN head on their windows, compared with
the clips one by one.

The 144 clips of exercise_mini form two halves (every second clip of each class). The clips of each
half are joined into one video of 2.4 minutes with known boundaries. A head is trained on the clips
of the other half and tested on the windows of that video, through the commands that a user gives.
Figures are over both videos, 144 windows: top-1 of windows that begin with the clips (2 s), of
windows shifted by half their length (either clip's class is right), and of the clips themselves, as
the files are shipped.

Run: `python -m pytest -s tests/benchmarks/bench_untrimmed.py`
"""

import csv
from pathlib import Path

import numpy as np

from aggregate import evaluate, train
from aggregate.metrics import summarize
from aggregate.scores import Scores
from extract.__main__ import Options, main
from extract.store import FeatureStore
from untrimmed import join_clips

CLIPS = Path(__file__).parents[2] / "pipelines" / "clips" / "exercise_mini" / "clips"
CLASSES = sorted(path.name for path in CLIPS.iterdir())
TRUE = {"backbone": "tf_efficientnet_lite0", "weights": "pretrained", "frames": 8}


def table(path: Path, rows: list[list]) -> Path:
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([["path", "label", "start", "end", "split"], *rows])
    return path


def scores_of(head: Path, store: Path, out: Path) -> Scores:
    evaluate.main(
        evaluate.Options(head / "best.pt", str(store), split="test", segments=(8,), out=out)
    )
    return Scores.load(out)


def test_the_windows_of_untrimmed_videos(tmp_path):
    (tmp_path / "labels.txt").write_text("\n".join(CLASSES) + "\n")
    found: dict[str, list[np.ndarray]] = {"clips": [], "windows": [], "shifted": []}
    truth: dict[str, list[np.ndarray]] = {name: [] for name in found}
    same = TRUE | {"labels": str(tmp_path / "labels.txt")}
    for half in range(2):
        folder = tmp_path / str(half)
        folder.mkdir()
        by_class = [sorted((CLIPS / name).glob("*.mp4")) for name in CLASSES]
        joined = [clips[place + half] for place in range(0, 24, 2) for clips in by_class]
        spans = join_clips(folder / "untrimmed.mp4", joined)
        others = [clip for clips in by_class for clip in clips[1 - half :: 2]]
        rows = [
            [clip, clip.parent.name, "", "", "val" if n % 6 == 0 else "train"]
            for n, clip in enumerate(others)
        ]
        rows += [[clip, clip.parent.name, "", "", "test"] for clip in joined]
        clips = table(folder / "clips.csv", rows)
        assert main(Options(clips, str(folder / "clips.zarr"), root=CLIPS, **same)) == 0
        assert (
            train.main(
                train.Options(agg="tsn", features=str(folder / "clips.zarr"), out=folder / "tsn")
            )
            == 0
        )
        names = [clip.parent.name for clip in joined]
        cut = [
            ["untrimmed.mp4", name, *span, "test"] for name, span in zip(names, spans, strict=True)
        ]
        middles = [(a + (b - a) / 2, b + (b - a) / 2) for a, b in spans[:-1]]
        shift = [
            ["untrimmed.mp4", name, *span, "test"]
            for name, span in zip(names[:-1], middles, strict=True)
        ]
        for name, rows in (("windows", cut), ("shifted", shift)):
            source = table(folder / f"{name}.csv", rows)
            assert main(Options(source, str(folder / f"{name}.zarr"), **same)) == 0
        assert (
            main(Options(folder / "untrimmed.mp4", str(folder / "grid.zarr"), window=2.0, **same))
            == 0
        )
        by_span, by_window = (
            FeatureStore.open(folder / name) for name in ("windows.zarr", "grid.zarr")
        )
        np.testing.assert_array_equal(by_window.read(slice(0, 72)), by_span.read(slice(0, 72)))
        for name in found:
            scores = scores_of(folder / "tsn", folder / f"{name}.zarr", folder / f"{name}.h5")
            found[name].append(scores.logits)
            truth[name].append(scores.labels)
        # A shifted window shows two clips, and either class is right. The class with the better rank counts.
        last, now = found["shifted"][-1], truth["shifted"][-1]
        after = np.array([CLASSES.index(name) for name in names[1:]])
        truth["shifted"][-1] = np.where(last[range(71), after] > last[range(71), now], after, now)
    print()
    for name, logits in found.items():
        result = summarize(np.concatenate(logits), np.concatenate(truth[name]))
        print(f"  {name:<8} top-1 {100 * result.top1.value:.1f} [{result.top1}] of {result.listed}")
