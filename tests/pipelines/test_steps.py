"""Steps of recipes: the weights that are used, and when scores are computed again."""

import json
from pathlib import Path

import numpy as np
import pytest

from aggregate import train
from aggregate.scores import Scores
from pipelines import steps
from pipelines.demo import story_of_ensemble
from stores import classes_store


def scored(path: Path, strength: float, *, seed: int) -> None:
    rng = np.random.default_rng(seed)
    labels = np.arange(400) % 8
    logits = strength * np.eye(8)[labels] + rng.normal(size=(400, 8))
    ids, classes = (
        [f"{row:011d}_000001_000011.mp4" for row in range(400)],
        [f"c{name}" for name in range(8)],
    )
    path.parent.mkdir(exist_ok=True)
    Scores(ids, classes, logits, labels).save(path)


@pytest.mark.parametrize("useful", [True, False])
def test_searched_weights_are_used_only_if_validation_supports_them(useful, tmp_path, monkeypatch):
    """In one case a model is noise, so equal weights are far worse. In the other both models are
    alike, so a search gains nothing."""
    monkeypatch.setattr(steps, "scores_are_of", lambda options: True)
    scored(tmp_path / "scores" / "a_val.h5", 2.0, seed=0)
    scored(tmp_path / "scores" / "b_val.h5", 0.0 if useful else 2.0, seed=1)
    models = {"a": {}, "b": {}}
    weights = steps.fuse(tmp_path, models, "val", weights="search", segments=(3,))
    record = json.loads((tmp_path / "fused_val.json").read_text())
    assert record["search"]["beats_equal"] == useful
    assert weights == (",".join(map(repr, record["weights"])) if useful else "equal")


def test_scores_are_made_again_only_if_what_they_are_made_of_changed(tmp_path, capsys):
    """The time of a file does not matter. The checkpoint's content, the store's rows, labels and
    features, and the options do."""
    classes_store(tmp_path / "f.zarr")
    one = {"features": str(tmp_path / "f.zarr"), "epochs": 1, "batch_size": 16}
    train.main(train.Options(agg="tsn", out=tmp_path / "tsn", **one))

    def scores(segments: tuple[int, ...] = (3,)) -> str:
        capsys.readouterr()
        steps.fuse(
            tmp_path,
            {"tsn": {"features": one["features"]}},
            "val",
            weights="equal",
            segments=segments,
        )
        return capsys.readouterr().out

    assert "== aggregate.evaluate" in scores()
    assert "== aggregate.evaluate" not in scores()
    (tmp_path / "tsn" / "best.pt").touch()
    assert "== aggregate.evaluate" not in scores()
    assert "== aggregate.evaluate" in scores((6,))
    train.main(train.Options(agg="tsn", out=tmp_path / "again", lr=0.1, **one))
    (tmp_path / "again" / "best.pt").rename(tmp_path / "tsn" / "best.pt")
    printed = scores((6,))
    assert (
        "was made of another checkpoint, or of other videos or labels, than there are now"
        in printed
    )
    assert "== aggregate.evaluate" in printed
    (tmp_path / "f.zarr").rename(tmp_path / "old.zarr")
    classes_store(tmp_path / "f.zarr", noise=0.7)
    assert "== aggregate.evaluate" in scores((6,))
    (tmp_path / "scores" / "tsn_val.h5").write_bytes(b"cut")
    printed = scores((6,))
    assert "is not a scores file" in printed
    assert "== aggregate.evaluate" in printed


def test_members_are_selected_on_validation_and_the_test_videos_are_fused_with_their_weights(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(steps, "scores_are_of", lambda options: True)
    strengths = {"tsn": 0.1, "hgnl": 2.0, "txb": 2.0}  # one of them is noise
    for seed, (name, strength) in enumerate(strengths.items()):
        for split in ("val", "test"):
            path = tmp_path / "scores" / f"{name}_{split}.h5"
            scored(path, strength, seed=seed + 9 * (split == "test"))
    models = {name: {} for name in strengths}
    weights = steps.fuse(tmp_path, models, "val", weights="select", segments=(3,))
    assert weights == "0.0,0.5,0.5"
    steps.fuse(tmp_path, models, "test", weights=weights, segments=(3,))
    val, test = (
        json.loads((tmp_path / f"fused_{split}.json").read_text()) for split in ("val", "test")
    )
    assert test["weights"] == [0, 0.5, 0.5]
    story = story_of_ensemble(val, test)
    assert "ensemble of hgnl, txb, chosen on 400 validation videos" in story
    assert "tsn is left out" in story
    pair = next(row for row in test["table"] if row["name"] == "hgnl_test + txb_test")
    assert f"top-1 {100 * pair['summary']['top1']['value']:.1f} % on test" in story
