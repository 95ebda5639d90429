"""The Python and the commands of docs/features-from-elsewhere.md run, from top to bottom."""

import json
import re

import numpy as np

from aggregate.scores import Scores
from extract.store import FeatureStore
from test_readme import ELSEWHERE, PAGES, folder, run

__all__ = ["folder"]


def test_features_and_scores_from_elsewhere_go_all_the_way(folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    tested = folder / "k700" / "test" / "exercise 0" / "test.mp4"
    tested.parent.mkdir(parents=True)
    tested.symlink_to((folder / "clip.mp4").resolve())
    for language, block in re.findall(r"```(python|sh)\n(.*?)```", PAGES[ELSEWHERE], re.DOTALL):
        if language == "python":
            exec(compile(block, str(ELSEWHERE), "exec"), {})
        else:
            shown = [run(line, capsys) for line in block.splitlines()]
    assert "logreg.npz: every row sums to 1" in shown[0]
    colors, ours = FeatureStore.open("colors.zarr"), FeatureStore.open("ours.zarr")
    assert set(colors.ids) == set(ours.ids)
    results = json.loads((folder / "runs" / "both" / "results.json").read_text())
    assert results["features"] == ["ours.zarr", "colors.zarr"]
    assert (Scores.load("runs/both/tsn.h5").labels >= 0).all()
    fused = json.loads((folder / "runs" / "three.json").read_text())
    assert fused["models"] == ["ours", "colors", "logreg"]
    assert np.isfinite(Scores.load("runs/three.h5").logits).all()
    assert "color-grid" in (folder / "runs" / "report.html").read_text()
