"""Files of the first version (commit add2693) open, and its half-finished runs are refused;
tests/compat holds such files.

`store` is a feature store of 30 videos (used as f.zarr). `tsn` and `hgnl` are finished runs on it.
`cut` is a run that was stopped after one of three epochs. `hgnl.h5` holds scores. `grid` is an
ablation with one of three results. `tuned` is a fine-tuning of test_resnet that was stopped after
one of two epochs.
"""

import shutil
from pathlib import Path

import numpy as np
import pytest

from aggregate import ablate, evaluate, finetune, train
from aggregate.endtoend import model_from_record
from aggregate.scores import Scores
from aggregate.training.checkpoint import Checkpoint
from extract import InputError
from extract.store import FeatureStore

COMMON = {"features": "f.zarr", "batch_size": 8, "lr": 0.02, "dropout": 0.0}
GROUPS = {"g1": 4, "g2": 2, "m1": 8}


@pytest.fixture
def old(tmp_path, monkeypatch) -> Path:
    shutil.copytree(Path(__file__).parent / "compat", tmp_path / "old")
    (tmp_path / "old" / "store").rename(tmp_path / "old" / "f.zarr")
    monkeypatch.chdir(tmp_path / "old")
    return tmp_path / "old"


def test_stores_checkpoints_and_scores_open(old):
    store = FeatureStore.open("f.zarr")
    assert (len(store), store.frames_per_video, store.dim) == (30, 6, 16)
    assert np.isfinite(store.gather(np.arange(30), np.array([0, 5]))).all()
    evaluate.main(
        evaluate.Options(Path("hgnl/best.pt"), "f.zarr", segments=(3, 6), out=Path("new.h5"))
    )
    for segments in (3, 6):
        then, now = Scores.load("hgnl.h5", segments), Scores.load("new.h5", segments)
        assert then.ids == now.ids
        np.testing.assert_allclose(now.logits, then.logits, rtol=1e-4, atol=1e-5)


def test_half_done_runs_are_refused_in_one_sentence(old, tmp_path):
    """Every kind of half-finished run of an earlier version, also with the options with which it
    was started."""
    clips = tmp_path / "clips" / "train" / "a"
    clips.mkdir(parents=True)
    lists = {
        "g1": (4,),
        "g2": (1, 2),
        "m1": (8,),
        "seeds": (0,),
        "epochs": (2,),
        "batch_size": (8,),
        "lr": (0.02,),
    }
    cut = train.Options(agg="hgnl", out=Path("cut"), epochs=3, scale_init=0.1, **GROUPS, **COMMON)
    finished = train.Options(
        agg="hgnl", out=Path("hgnl"), epochs=2, init=Path("tsn/best.pt"), **GROUPS, **COMMON
    )
    grid = ablate.Options(
        features="f.zarr", out=Path("grid"), agg=("tsn", "hgnl"), dropout=(0.0,), **lists
    )
    tuned = finetune.Options(
        model="hgnl", videos=clips.parents[1], out=Path("tuned"), backbone="test_resnet"
    )
    for command, options in ((train, cut), (train, finished), (ablate, grid), (finetune, tuned)):
        before = {path: path.read_bytes() for path in options.out.rglob("*") if path.is_file()}
        with pytest.raises(
            InputError, match="was started by another version of this program and cannot be"
        ):
            command.main(options)
        assert before == {
            path: path.read_bytes() for path in options.out.rglob("*") if path.is_file()
        }


def test_checkpoints_of_all_kinds_start_new_runs(old):
    """best.pt of training on cached features, and of a fine-tuning with its backbone in it."""
    train.main(
        train.Options(
            agg="hgnl", out=Path("new"), epochs=1, init=Path("tsn/best.pt"), **GROUPS, **COMMON
        )
    )
    tuned = model_from_record(Checkpoint.load("tuned/last.pt"))
    assert tuned.net.backbone is not None
