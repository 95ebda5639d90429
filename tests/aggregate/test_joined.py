"""Two stores as one: rows joined by id, channels concatenated, and contradictions refused."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from aggregate import ablate, crossval, evaluate, train
from aggregate.data.features import StoredFeatures
from aggregate.data.joined import JoinedStores, open_features
from aggregate.training.checkpoint import Checkpoint
from extract import InputError, RunError
from extract.cli import run_command
from extract.store import DROPPED, FAILED, OK, PENDING, FeatureStore
from stores import fail_rows

IDS = [f"v{i:02d}.mp4" for i in range(12)]


def make_store(
    path: Path,
    ids=tuple(IDS),
    *,
    frames: int = 6,
    dim: int = 4,
    views: int = 1,
    offset: float = 0.0,
    **columns,
) -> FeatureStore:
    """A store whose values tell their video, view, frame and channel. Every third video has only
    two frames."""
    videos = np.array([int(video_id[1:3]) for video_id in ids])
    values = np.add.outer(
        np.add.outer(np.add.outer(videos * 16, np.arange(views) * 8), np.arange(frames)),
        np.arange(dim) / 8,
    )
    lengths = np.where(videos % 3 == 0, min(2, frames), frames)
    columns = {"splits": ["val" if video % 4 == 3 else "train" for video in videos]} | columns
    columns = {
        "labels": videos % 2,
        "classes": ["even", "odd"],
        "groups": [f"g{v // 2}" for v in videos],
    } | columns
    return FeatureStore.from_arrays(
        path, values + offset, lengths=lengths, ids=list(ids), **columns
    )


@pytest.fixture
def pair(tmp_path) -> tuple[FeatureStore, FeatureStore]:
    """Two stores with ten videos in common, in two orders. They have six frames and one, and
    different orders of classes."""
    first = make_store(tmp_path / "a.zarr", IDS[:11])
    ids = IDS[:0:-1]
    labels = [1 - int(video_id[1:3]) % 2 for video_id in ids]
    return first, make_store(
        tmp_path / "b.zarr",
        ids,
        frames=1,
        dim=3,
        offset=0.5,
        labels=labels,
        classes=["odd", "even"],
    )


def test_rows_are_joined_by_id_and_channels_stand_side_by_side(pair):
    first, second = pair
    notes: list[str] = []
    joined = JoinedStores(pair, log=notes.append)
    assert joined.ids.tolist() == IDS[1:11]
    assert notes == [
        f"left out  1 videos that {first.path} lacks (v11.mp4)",
        f"left out  1 videos that {second.path} lacks (v00.mp4)",
    ]
    assert (joined.dim, joined.frames_per_video, joined.num_views, len(joined)) == (7, 6, 1, 10)
    assert [joined.classes[label] for label in joined.labels[:2]] == ["odd", "even"]
    assert joined.splits.tolist() == first.splits[1:].tolist()
    rows, frames = np.array([0, 3]), np.array([[0, 5], [2, 3]])
    there = np.array([IDS[::-1].index(joined.ids[row]) for row in rows])
    expected = [first.gather(rows + 1, frames), second.gather(there, np.zeros_like(frames))]
    assert np.array_equal(joined.gather(rows, frames), np.concatenate(expected, axis=-1))
    assert np.array_equal(joined.read(rows)[:, 0, 2], joined.gather(rows, [2])[:, 0])
    assert np.array_equal(joined.read(slice(0, 2)), joined.read(np.array([0, 1])))


def test_frames_are_laid_over_frames(tmp_path):
    joined = JoinedStores(
        [
            make_store(tmp_path / "a.zarr", frames=6),
            make_store(tmp_path / "b.zarr", frames=4, dim=3),
        ]
    )
    slots = (
        joined.gather([1], np.arange(6))[0, :, 4] - 16
    )  # the frame of the second store, counted from 0
    assert slots.tolist() == [0, 1, 1, 2, 3, 3]


def test_a_repeat_in_one_store_only_is_no_repeat(tmp_path):
    joined = JoinedStores(
        [
            make_store(tmp_path / "a.zarr", frames=6),
            make_store(tmp_path / "b.zarr", frames=1, dim=3),
        ]
    )
    masks = joined.mask(np.arange(12), np.arange(6))
    assert masks[3].sum() == 2  # two frames in the first store, one in the second
    assert masks[1].all()
    features = StoredFeatures(joined, np.arange(12))
    batch = next(features.test_batches(frames=6, batch_size=12))[0]
    assert np.array_equal(batch.mask.sum(axis=1), masks.sum(axis=1))
    assert joined.num_frames[3] == 2


def test_views_go_together(tmp_path):
    three, single = make_store(tmp_path / "a.zarr", views=3), make_store(tmp_path / "b.zarr", dim=3)
    joined = JoinedStores([three, single])
    assert joined.views == ("center", "view_1", "view_2")
    seen = joined.gather([2, 2], [0], np.array([0, 2]))[:, 0]
    assert (seen[1] - seen[0]).tolist() == [16] * 4 + [0] * 3
    two = make_store(tmp_path / "c.zarr", views=2, dim=3)
    assert JoinedStores([three, two]).views == ("center", "view_1")
    other = make_store(tmp_path / "d.zarr", views=2)
    other.views = ("left", "right")
    with pytest.raises(
        InputError,
        match=r"no view is in all of these stores: .*a\.zarr has center, view_1, view_2; ",
    ):
        JoinedStores([three, other])


def test_what_failed_in_one_store_failed(pair, tmp_path):
    fail_rows(tmp_path / "b.zarr", [2])  # v09
    joined = open_features([str(tmp_path / "a.zarr"), str(tmp_path / "b.zarr")])
    assert joined.status.tolist() == [
        FAILED if video_id == "v09.mp4" else OK for video_id in joined.ids
    ]
    assert not joined.gather([8], np.arange(6)).any()
    assert not joined.mask([8], np.arange(6)).any()
    assert joined.errors[8] == "a test made it fail"
    FeatureStore.open(tmp_path / "b.zarr", writable=True).set_status(
        np.array([4]), DROPPED + OK
    )  # v07
    joined = JoinedStores([FeatureStore.open(store.path) for store in pair])
    assert joined.ids[~joined.listed].tolist() == ["v07.mp4"]
    FeatureStore.open(tmp_path / "b.zarr", writable=True).set_status(np.array([3]), PENDING)
    with pytest.raises(RunError, match=r"v08\.mp4 and 0 more are not extracted yet"):
        StoredFeatures(
            JoinedStores([FeatureStore.open(store.path) for store in pair]), np.arange(10)
        )


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (
            {"labels": [1, *(i % 2 for i in range(1, 12))]},
            r"1 videos have another label in .*; the first, v00.mp4, is 'even' and 'odd'",
        ),
        (
            {"splits": ["test"] * 12},
            r"12 videos have another split in .* the first, v00.mp4, is 'train' and 'test'",
        ),
        (
            {"groups": ["x"] * 12},
            r"12 videos have another group in .* correct one list and continue its store",
        ),
        (
            {"ids": [f"{i:02d}x" for i in range(12)]},
            r"no video is in all of these stores \(v00\.mp4, .* in .* and 00x, .* in",
        ),
    ],
)
def test_contradictions_are_refused(tmp_path, changed, message):
    ids = changed.pop("ids", None)
    if ids:
        values = np.zeros((12, 6, 4))
        second = FeatureStore.from_arrays(
            tmp_path / "b.zarr",
            values,
            lengths=[6] * 12,
            labels=[0] * 12,
            classes=["even"],
            ids=ids,
        )
    else:
        second = make_store(tmp_path / "b.zarr", **changed)
    with pytest.raises(InputError, match=message):
        JoinedStores([make_store(tmp_path / "a.zarr"), second])


def test_what_one_store_does_not_say_the_other_does(tmp_path):
    empty = {"labels": [-1] * 12, "splits": [""] * 12, "groups": [""] * 12, "classes": []}
    full, joined = make_store(tmp_path / "a.zarr"), None
    joined = JoinedStores([make_store(tmp_path / "b.zarr", **empty), full])
    assert joined.classes == ("even", "odd")
    for column in ("labels", "splits", "groups"):
        assert getattr(joined, column).tolist() == getattr(full, column).tolist()


def test_one_store_twice_is_refused(tmp_path):
    path = make_store(tmp_path / "a.zarr").path
    with pytest.raises(InputError, match="names a store twice"):
        open_features((path, path + "/"))


# -- commands ----------------------------------------------------------------------------------------------------------


def run(module, *arguments: str) -> None:
    assert run_command(module.main, module.Options, prog="test", args=arguments) == 0


def test_every_command_takes_two_stores(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    ids = [f"v{i:02d}.mp4" for i in range(24)]
    make_store(tmp_path / "a.zarr", ids)
    make_store(tmp_path / "b.zarr", ids[::-1], frames=1, dim=3)
    both = ("--features", "a.zarr", "b.zarr")
    run(train, "--agg", "nl", *both, "--epochs", "1", "--out", "runs/nl")
    assert (
        "--checkpoint runs/nl/best.pt --features a.zarr b.zarr --split val"
        in capsys.readouterr().out
    )
    checkpoint = Checkpoint.load(tmp_path / "runs/nl/best.pt")
    assert checkpoint.options["dim"] == 7
    assert len(checkpoint.features["joined"]) == 2
    run(evaluate, "--checkpoint", "runs/nl/best.pt", *both, "--out", "nl.h5")
    run(crossval, "--agg", "tsn", *both, "--folds", "3", "--epochs", "1", "--out", "runs/cv")
    run(ablate, "--agg", "tsn", "max", *both, "--epochs", "1", "--out", "runs/ablation")
    assert (
        "--features a.zarr b.zarr" in capsys.readouterr().out
    )  # the command that trains the best model again
    assert json.loads((tmp_path / "runs/cv/results.json").read_text())["features"] == [
        "a.zarr",
        "b.zarr",
    ]
    with pytest.raises(
        InputError, match=r"a\.zarr holds features of width 4; the checkpoint takes 7"
    ):
        evaluate.main(evaluate.Options(checkpoint=Path("runs/nl/best.pt"), features="a.zarr"))
    make_store(tmp_path / "wide.zarr", ids, dim=7)
    with pytest.raises(InputError, match="the checkpoint was trained on 2 joined stores, not 1"):
        evaluate.main(evaluate.Options(checkpoint=Path("runs/nl/best.pt"), features="wide.zarr"))
    with pytest.raises(
        InputError, match="was trained on features made elsewhere: it records no backbone"
    ):
        evaluate.main(evaluate.Options(checkpoint=Path("runs/nl/best.pt"), videos=tmp_path))


@pytest.mark.parametrize(
    ("command", "message"),
    [(train, "was trained on other data"), (crossval, "features changed")],
)
def test_resuming_with_one_store_changed_is_refused(tmp_path, command, message, capsys):
    ids = [f"v{i:02d}.mp4" for i in range(24)]
    make_store(tmp_path / "a.zarr", ids)
    make_store(tmp_path / "b.zarr", ids, frames=1, dim=3)
    arguments = [
        "--agg",
        "tsn",
        "--features",
        str(tmp_path / "a.zarr"),
        str(tmp_path / "b.zarr"),
        "--epochs",
        "2",
    ]
    arguments += ["--out", str(tmp_path / "run")] + (
        ["--folds", "3"] if command is crossval else []
    )
    run(command, *arguments)
    run(command, *arguments)
    shutil.rmtree(tmp_path / "b.zarr")
    make_store(tmp_path / "b.zarr", ids, frames=2, dim=3, offset=1.0)
    assert run_command(command.main, command.Options, prog="test", args=arguments) == 2
    assert message in capsys.readouterr().err
