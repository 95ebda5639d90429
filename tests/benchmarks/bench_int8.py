"""The effect of --precision int8 and bf16 on classifiers: out-of-fold accuracy on real clips
against fp32, with intervals.

The 144 clips of exercise_mini are extracted by EfficientNet-Lite0 with its published weights, in
fp32, bf16 and int8. `aggregate.crossval` tests TSN, HG-NL and logistic regression (5 folds, 3
seeds). Differences are paired by video.
"""

from pathlib import Path

import numpy as np
import pytest

from aggregate import crossval
from aggregate.metrics import bootstrap
from aggregate.scores import Scores
from extract.__main__ import Options, main
from extract.store import FeatureStore

ROOT = Path(__file__).parents[2]
SEEDS = (0, 1, 2)
PRECISIONS = ("fp32", "bf16", "int8")
AGGREGATORS = ("tsn", "hgnl", "logreg")


def right_by_crossval(store: Path, out: Path) -> dict[str, np.ndarray]:
    """For each aggregator and video, whether the video's class has the largest out-of-fold
    score."""
    assert crossval.main(
        crossval.Options(features=str(store), out=out, agg=AGGREGATORS, seeds=SEEDS)
    ) in (0, None)
    right = {}
    for name in AGGREGATORS:
        scores = Scores.load(out / f"{name}.h5")
        order = np.argsort(scores.ids)
        right[name] = (scores.logits.argmax(1) == scores.labels)[order].astype(float)
    return right


@pytest.mark.timeout(3600)
def test_accuracy_beside_fp32(tmp_path: Path) -> None:
    videos = ROOT / "pipelines" / "clips" / "exercise_mini"
    right: dict[str, dict[str, np.ndarray]] = {}
    for precision in PRECISIONS:
        store = tmp_path / f"{precision}.zarr"
        chosen = {
            "backbone": "tf_efficientnet_lite0",
            "device": "cpu",
            "frames": 8,
            "precision": precision,
        }
        assert (
            main(
                Options(
                    videos=videos / "labels.csv", root=videos / "clips", out=str(store), **chosen
                )
            )
            == 0
        )
        right[precision] = right_by_crossval(store, tmp_path / precision)
    error = FeatureStore.open(tmp_path / "int8.zarr").provenance["quantization"]["relative_error"]
    print(
        f"\nrelative error of int8 features on held-out frames {error:.3f}; accuracy in %, and against fp32 in points"
    )
    for name in AGGREGATORS:
        line = f"{name:20}"
        for precision in PRECISIONS:
            line += f"  {precision} {100 * right[precision][name].mean():5.1f}"
            if precision != "fp32":
                gain = bootstrap(right[precision][name] - right["fp32"][name])
                line += (
                    f" ({100 * gain.value:+.1f} [{100 * gain.low:+.1f}, {100 * gain.high:+.1f}])"
                )
                assert gain.high > -0.05, "an interval that lies wholly below -5 points"
        print(line)
