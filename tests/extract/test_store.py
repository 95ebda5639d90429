"""The feature store: round trips, gather against plain Zarr, damage, locks, commits, growth."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.model_selection import LeaveOneGroupOut

from extract import InputError, RunError
from extract.store import (
    FAILED,
    OK,
    PENDING,
    FeatureStore,
    Outcomes,
    RunLog,
    difference,
    lock_store,
)
from extract.store.damage import damaged_rows

CLASSES = ["running", "sleeping"]


def make(
    path, count=20, *, views=("center",), frames=4, dim=6, block_size=8, done=True
) -> FeatureStore:
    store = FeatureStore.create(
        path,
        ids=[f"train/running/{i:03d}.mp4" for i in range(count)],
        labels=np.arange(count) % 2,
        splits=["train"] * count,
        groups=["s1"] * count,
        classes=CLASSES,
        views=views,
        frames=frames,
        dim=dim,
        block_size=block_size,
        provenance={"backbone": "b", "weights": {"sha256": "12"}},
    )
    for block in range(store.num_blocks) if done else ():
        finish(store, block)
    return store


def features_of(store: FeatureStore, rows: np.ndarray) -> np.ndarray:
    """Features that tell their row, view, frame and channel."""
    shape = (store.num_views, store.frames_per_video, store.dim)
    return np.stack([np.random.default_rng(row).normal(size=shape) for row in rows]).astype("<f2")


def finish(store: FeatureStore, block: int, *, status: int = OK) -> None:
    rows = store.block_rows(block)
    store.write_block(block, features_of(store, rows))
    shape = (len(rows), store.num_views, store.frames_per_video)
    store.commit(
        Outcomes(
            rows=rows,
            status=np.full(len(rows), status, "i1"),
            errors=["broken" if status == FAILED else ""] * len(rows),
            num_frames=np.full(len(rows), 100, "<i4"),
            frame_indices=np.broadcast_to(
                np.arange(store.frames_per_video, dtype="<i4") * 7, shape
            ),
            timestamps=np.zeros(shape, "<f4"),
        )
    )


def test_a_store_reads_back_and_opens_with_plain_zarr(tmp_path):
    make(tmp_path / "a.zarr", 20, views=("center", "center_flip"))
    store = FeatureStore.open(tmp_path / "a.zarr")
    assert (len(store), store.num_views, store.frames_per_video, store.dim) == (20, 2, 4, 6)
    assert store.classes == tuple(CLASSES)
    assert store.views == ("center", "center_flip")
    assert store.ids[19] == "train/running/019.mp4"
    assert store.status.tolist() == [OK] * 20
    assert store.provenance["weights"] == {"sha256": "12"}
    plain = zarr.open(str(tmp_path / "a.zarr"), mode="r")
    np.testing.assert_array_equal(plain["features"][:], features_of(store, np.arange(20)))
    np.testing.assert_array_equal(store.read(slice(3, 7)), plain["features"][3:7])
    assert plain["features"].shards == (8, 2, 4, 6)
    assert plain["features"].chunks == (1, 2, 4, 6)
    assert "20 videos" in repr(store)


@settings(max_examples=20)
@given(
    count=st.integers(1, 30),
    views=st.integers(1, 3),
    frames=st.integers(1, 5),
    dim=st.integers(1, 9),
    block_size=st.integers(1, 9),
    seed=st.integers(0, 99),
)
def test_gather_equals_plain_indexing(
    tmp_path_factory, count, views, frames, dim, block_size, seed
):
    path = tmp_path_factory.mktemp("g") / "g.zarr"
    names = [f"v{i}" for i in range(views)]
    store = make(path, count, views=names, frames=frames, dim=dim, block_size=block_size)
    everything = features_of(store, np.arange(count))
    rng = np.random.default_rng(seed)
    rows, picked, view = (
        rng.integers(0, count, 12),
        rng.integers(0, frames, (12, 3)),
        rng.integers(0, views, 12),
    )
    np.testing.assert_array_equal(
        store.gather(rows, picked, view), everything[rows[:, None], view[:, None], picked]
    )
    np.testing.assert_array_equal(
        store.gather(rows, picked[0]), everything[rows[:, None], 0, picked[0][None]]
    )
    assert store.gather(rows, picked).dtype == np.float16


def test_gather_keeps_no_descriptors_open(tmp_path):
    store = make(tmp_path / "a.zarr", 120, block_size=1)
    before = len(os.listdir("/proc/self/fd"))
    store.gather(np.arange(120), np.array([0]))
    assert len(os.listdir("/proc/self/fd")) == before
    mapped = Path("/proc/self/maps").read_text().count("a.zarr/features/c.")
    assert mapped == 120
    del store
    assert "a.zarr/features/c." not in Path("/proc/self/maps").read_text()


def test_mask_hides_repeats_of_short_videos(tmp_path):
    features = np.ones((3, 4, 2), "f4")
    store = FeatureStore.from_arrays(
        tmp_path / "s.zarr",
        features,
        lengths=[4, 2, 1],
        labels=[0, 1, -1],
        classes=CLASSES,
        ids=["a", "b", "c"],
    )
    expected = [[True] * 4, [True, True, False, False], [True, False, False, False]]
    assert store.mask(np.arange(3), np.arange(4)).tolist() == expected
    # A repeat alone counts as its frame; the same frame drawn twice counts once.
    assert store.mask(np.array([1]), np.array([3])).tolist() == [[True]]
    assert store.mask(np.array([0]), np.array([2, 2, 1])).tolist() == [[True, False, True]]
    assert store.num_frames.tolist() == [4, 2, 1]


def test_pending_videos_are_not_read_and_failed_ones_are_masked(tmp_path):
    store = make(tmp_path / "a.zarr", 16, done=False)
    finish(store, 1, status=FAILED)
    assert store.missing_blocks() == [0]
    with pytest.raises(RunError, match=r"train/running/003\.mp4 \(row 3\) is not extracted yet"):
        store.gather(np.array([9, 3]), np.array([0]))
    store = make(tmp_path / "b.zarr", 3, done=False)
    rows = np.arange(3)
    store.write_block(0, np.zeros((3, 1, 4, 6), "<f2"))
    unknown = np.full((3, 1, 4), -1, "<i4")
    store.commit(
        Outcomes(
            rows,
            np.full(3, FAILED, "i1"),
            ["x"] * 3,
            np.zeros(3, "<i4"),
            unknown,
            np.zeros((3, 1, 4), "<f4"),
        )
    )
    assert not store.gather(rows, np.array([0, 1])).any()
    assert not store.mask(rows, np.array([0, 1])).any()


def test_outcomes_of_several_blocks_go_to_their_rows_in_whatever_order_they_come(tmp_path):
    store = make(tmp_path / "a.zarr", 20, done=False)

    def outcome(block: int) -> Outcomes:
        rows = store.block_rows(block)
        store.write_block(block, features_of(store, rows))
        indices = np.broadcast_to(rows[:, None, None], (len(rows), 1, 4)).astype("<i4")
        status = np.where(rows % 2, FAILED, OK).astype("i1")
        errors = [f"row {row}" for row in rows]
        return Outcomes(rows, status, errors, rows.astype("<i4"), indices, indices.astype("<f4"))

    store.commit(outcome(2), outcome(0))
    store = FeatureStore.open(tmp_path / "a.zarr")
    done = np.array([*range(8), *range(16, 20)])
    assert (
        store.num_frames[done].tolist() == store.frame_indices[done, 0, 3].tolist() == done.tolist()
    )
    assert store.errors[done].tolist() == [f"row {row}" for row in done]
    assert store.status.tolist() == [
        (OK, FAILED)[row % 2] if row in done else PENDING for row in range(20)
    ]


def test_a_zero_block_still_has_its_shard(tmp_path):
    store = make(tmp_path / "a.zarr", 8, done=False)
    store.write_block(0, np.zeros((8, 1, 4, 6), "<f2"))
    assert store.shard_path(0).stat().st_size == 8 * (48 + 4) + 8 * 16 + 4


def test_rows_can_be_appended_and_the_short_block_rewritten(tmp_path):
    store = make(tmp_path / "a.zarr", 10)
    store.append(
        ids=["val/x.mp4", "val/y.mp4"], labels=[1, -1], splits=["val"] * 2, groups=[""] * 2
    )
    assert store.missing_blocks() == [1]
    np.testing.assert_array_equal(
        store.gather(np.array([9]), np.array([2]))[0, 0], features_of(store, np.array([9]))[0, 0, 2]
    )
    finish(store, 1)
    store = FeatureStore.open(tmp_path / "a.zarr")
    assert len(store) == 12
    assert store.ids[-2:].tolist() == ["val/x.mp4", "val/y.mp4"]
    assert store.labels[-2:].tolist() == [1, -1]
    np.testing.assert_array_equal(store.read(slice(0, 12)), features_of(store, np.arange(12)))


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (lambda path: path.write_bytes(flip(path.read_bytes(), 60)), [1]),
        (lambda path: path.write_bytes(path.read_bytes()[:-9]), list(range(8))),
        (lambda path: path.write_bytes(flip(path.read_bytes(), -20)), list(range(8))),
        (lambda path: path.write_bytes(flip(path.read_bytes(), -2)), list(range(8))),
        (
            lambda path: path.write_bytes(
                path.read_bytes()[:-132] + b"more" + path.read_bytes()[-132:]
            ),
            list(range(8)),
        ),
        (lambda path: path.unlink(), list(range(8))),
    ],
    ids=["one video", "cut short", "index", "checksum of the index", "grown", "missing"],
)
def test_damage_is_found_and_named(tmp_path, damage, expected):
    store = make(tmp_path / "a.zarr", 20)
    assert [damaged_rows(store, block) for block in range(3)] == [{}, {}, {}]
    damage(store.shard_path(0))
    assert sorted(damaged_rows(store, 0)) == expected
    assert damaged_rows(store, 1) == {}
    if len(expected) > 1:
        with pytest.raises(RunError, match=r"c\.0\.0\.0\.0.*hgnl verify"):
            FeatureStore.open(tmp_path / "a.zarr").gather(np.array([0]), np.array([0]))


def flip(data: bytes, place: int) -> bytes:
    changed = bytearray(data)
    changed[place] ^= 0xFF
    return bytes(changed)


def test_from_arrays_refuses_what_cannot_be_stored(tmp_path):
    def store(features=None, **changed):
        arguments = {
            "lengths": [2, 2],
            "labels": [0, 1],
            "classes": CLASSES,
            "ids": ["a", "b"],
        } | changed
        return FeatureStore.from_arrays(
            tmp_path / "s.zarr", np.ones((2, 2, 3)) if features is None else features, **arguments
        )

    with pytest.raises(InputError, match=r"b \(row 1\): expected a length of 1 to 2 frames, got 3"):
        store(lengths=[1, 3])
    with pytest.raises(InputError, match=r"a \(row 0\): expected a label below 2, or -1, got 2"):
        store(labels=[2, 0])
    with pytest.raises(InputError, match=r"b \(row 1\).*got nan"):
        store(np.array([np.ones((2, 3)), np.full((2, 3), np.nan)]))
    with pytest.raises(InputError, match=r"a \(row 0\).*got 70000"):
        store(np.full((2, 2, 3), 70000.0))
    with pytest.raises(InputError, match=r"shape \(2, 2\)"):
        store(np.ones((2, 2)))
    with pytest.raises(InputError, match="features hold 2 videos, splits 1"):
        store(splits=["val"])
    with pytest.raises(InputError, match="'a'"):
        store(ids=["a", "a"])
    store(
        np.array([np.ones((2, 3)), [[1, 2, 3], [np.nan] * 3]]), lengths=[2, 1]
    )  # padding may hold anything
    with pytest.raises(InputError, match="exists already"):
        store()


def test_what_is_no_store_is_named(tmp_path):
    with pytest.raises(
        InputError, match=r"none\.zarr is not a feature store \(it does not exist\)"
    ):
        FeatureStore.open(tmp_path / "none.zarr")
    (tmp_path / "folder").mkdir()
    with pytest.raises(InputError, match=r"folder is not a feature store \(not a Zarr group\)"):
        FeatureStore.open(tmp_path / "folder")
    zarr.create_group(str(tmp_path / "other.zarr"), attributes={"schema": "somebody/7"})
    with pytest.raises(InputError, match="somebody/7"):
        FeatureStore.open(tmp_path / "other.zarr")
    with pytest.raises(ValueError, match=r"float32 \(3, 1, 4, 6\)"):
        make(tmp_path / "a.zarr", 8, done=False).write_block(0, np.zeros((3, 1, 4, 6), "f4"))


@pytest.mark.parametrize(
    ("old", "new"), [("running", "runnyng"), ('"sha256": "12"', '"sha256": "13"')]
)
def test_a_changed_attribute_is_damage(old, new, tmp_path):
    make(tmp_path / "a.zarr", 2)
    record = tmp_path / "a.zarr" / "zarr.json"
    assert old in record.read_text()
    record.write_text(record.read_text().replace(old, new))
    with pytest.raises(
        InputError, match=r"a\.zarr/zarr\.json is damaged: its checksum does not match"
    ):
        FeatureStore.open(tmp_path / "a.zarr")


def test_a_second_run_is_refused_and_told_who_holds_the_store(tmp_path):
    code = f"""
import time
from extract.store import RunLog, lock_store
with lock_store({str(tmp_path / "a.zarr")!r}):
    RunLog({str(tmp_path / "a.zarr")!r}).write("start", process=4711, host="elsewhere")
    print("held", flush=True)
    time.sleep(60)
"""
    child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    assert child.stdout is not None
    with child, child.stdout:
        assert child.stdout.readline() == b"held\n"
        with (
            pytest.raises(RunError, match="process 4711 on elsewhere"),
            lock_store(tmp_path / "a.zarr"),
        ):
            pass
        child.kill()  # kill -9: the kernel releases the store
    with lock_store(tmp_path / "a.zarr"):
        RunLog(tmp_path / "a.zarr").write("end")
    assert [record["event"] for record in RunLog.records(tmp_path / "a.zarr")] == ["start", "end"]


def test_a_line_of_the_log_cut_by_a_kill_is_left_out(tmp_path):
    RunLog.path(tmp_path / "a.zarr").write_text(json.dumps({"event": "start"}) + '\n{"event": "blo')
    assert RunLog.records(tmp_path / "a.zarr") == [{"event": "start"}]
    assert RunLog.records("memory://a.zarr") == []


def test_difference_names_what_differs():
    recorded = {"backbone": "a", "weights": {"sha256": "1", "name": "x"}, "seed": 0}
    assert difference(recorded, recorded) == []
    wanted = {"backbone": "a", "weights": {"sha256": "2", "name": "x"}, "views": 3}
    assert difference(recorded, wanted) == [
        "seed: 0 in the store, None now",
        "views: None in the store, 3 now",
        "weights.sha256: 1 in the store, 2 now",
    ]


def test_a_remote_store_is_written_and_read_plainly(tmp_path, monkeypatch):
    monkeypatch.setenv("HGNL_CACHE", str(tmp_path))
    store = make("memory://remote.zarr", 10)
    np.testing.assert_array_equal(store.read(slice(0, 10)), features_of(store, np.arange(10)))
    assert FeatureStore.open("memory://remote.zarr").read(np.array([7, 2])).shape == (2, 1, 4, 6)
    np.testing.assert_array_equal(
        store.gather(np.array([7]), np.arange(4))[0], store.read(np.array([7]))[0, 0]
    )
    assert [path.name[:9] for path in tmp_path.rglob("c.*")] == ["c.0.0.0.0"]


def test_pending_again(tmp_path):
    store = make(tmp_path / "a.zarr", 20)
    store.set_status(np.array([17, 3]), PENDING)
    assert FeatureStore.open(tmp_path / "a.zarr").missing_blocks() == [0, 2]
    assert np.flatnonzero(store.status == PENDING).tolist() == [3, 17]
    store.set_status(np.array([], dtype=int), PENDING)


def test_a_killed_writer_leaves_nothing_behind(tmp_path):
    store = make(tmp_path / "a.zarr", 20)
    (tmp_path / "a.zarr" / "features" / "c.0.0.0.0123.partial").write_bytes(b"half")
    store.clean_up()
    assert not list((tmp_path / "a.zarr").rglob("*.partial"))


def test_reading_sparsely_reads_the_same(tmp_path):
    rng = np.random.default_rng(5)
    features = rng.normal(size=(150, 2, 6, 100)).astype(
        "<f2"
    )  # frames that begin in the middle of pages
    store = FeatureStore.from_arrays(
        tmp_path / "s.zarr",
        features,
        lengths=np.full(150, 6),
        labels=np.zeros(150, int),
        classes=["a"],
    )
    rows, frames, view = (
        rng.integers(0, 150, 64),
        rng.integers(0, 6, (64, 3)),
        rng.integers(0, 2, 64),
    )
    before = store.gather(rows, frames, view)
    store.disable_readahead()
    np.testing.assert_array_equal(store.gather(rows, frames, view), before)
    np.testing.assert_array_equal(before, features[rows[:, None], view[:, None], frames])


def test_columns_are_what_scikit_learn_and_pandas_take(tmp_path):
    subjects = ["ann", "ann", "bob", "bob", "eve", ""]
    store = FeatureStore.from_arrays(
        tmp_path / "a.zarr",
        np.ones((6, 2, 4), np.float16),
        lengths=[2] * 6,
        labels=[0, 1] * 3,
        classes=["a", "b"],
        splits=["train", "val"] * 3,
        groups=subjects,
    )
    columns = {name: getattr(store, name) for name in ("ids", "splits", "groups", "errors")}
    assert {column.dtype for column in columns.values()} == {np.dtype(object)}
    assert (
        store.splits[0] is store.splits[2]
    )  # equal strings are one object: 650,000 rows need the pointers only
    folds = list(LeaveOneGroupOut().split(store.labels, store.labels, store.groups))
    assert [test.tolist() for _, test in folds] == [[5], [0, 1], [2, 3], [4]]
    assert pd.DataFrame(columns).groupby("groups").size().to_dict() == {
        "": 1,
        "ann": 2,
        "bob": 2,
        "eve": 1,
    }
    assert (store.splits == "val").tolist() == [False, True] * 3
