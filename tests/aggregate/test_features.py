"""Batches from the store: which frames are drawn, which are masked, and that a draw depends only on
(seed, epoch, position)."""

import threading
import time

import numpy as np
import pytest
import torch

from aggregate.data.features import StoredFeatures, evaluation_views, prefetched, training_views
from extract import InputError, RunError
from extract.store import PENDING, FeatureStore
from stores import classes_store, fail_rows

FRAMES = 6


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> FeatureStore:
    """Features tell their video, view and frame, in three channels. Every fifth video has 2
    frames."""
    videos, views = 40, 3
    at = np.stack(
        np.meshgrid(np.arange(videos), np.arange(views), np.arange(FRAMES), indexing="ij"), axis=-1
    )
    return FeatureStore.from_arrays(
        tmp_path_factory.mktemp("features") / "f.zarr",
        at.astype(np.float32),
        lengths=np.where(np.arange(videos) % 5 == 0, 2, FRAMES),
        labels=np.arange(videos) % 4,
        classes=list("abcd"),
    )


@pytest.fixture(scope="module", params=["mmap", "memory", "device"])
def features(request, store) -> StoredFeatures:
    return StoredFeatures(store, np.arange(3, 40), placement=request.param, training=True)


def test_an_epoch_holds_every_video_once_each_segment_one_frame(features):
    seen = []
    for batch in features.train_batches(epoch=0, frames=3, batch_size=8, seed=0):
        assert batch.x.dtype == torch.float16
        video, view, frame = batch.x.numpy().astype(int).transpose(2, 0, 1)
        assert (video == batch.rows[:, None]).all()
        assert (view == view[:, :1]).all()
        assert batch.labels.tolist() == (batch.rows % 4).tolist()
        long = batch.rows % 5 != 0
        assert (frame[long] // 2 == [0, 1, 2]).all()
        assert (frame[~long] < 2).all()
        assert batch.mask is not None or not (~long).any()
        if batch.mask is not None:
            assert batch.mask[torch.from_numpy(long)].all()
            assert batch.mask[torch.from_numpy(~long)].sum(1).eq(2).all()
        seen += batch.rows.tolist()
    assert sorted(seen) == list(range(3, 40))


def test_every_frame_and_view_is_drawn(features):
    drawn = set()
    for epoch in range(100):
        for batch in features.train_batches(epoch=epoch, frames=3, batch_size=37, seed=0):
            drawn |= {tuple(at) for at in batch.x.reshape(-1, 3).int().tolist()}
    expected = {
        (v, w, t)
        for v in range(3, 40)
        for w in range(3)
        for t in range(2 if v % 5 == 0 else FRAMES)
    }
    assert drawn == expected


def test_a_draw_is_a_function_of_seed_epoch_and_place(store):
    def drawn(rows, epoch, seed, batch_size=5):
        features = StoredFeatures(store, np.arange(rows), training=True)
        batches = features.train_batches(epoch=epoch, frames=3, batch_size=batch_size, seed=seed)
        return {
            int(row): x.tolist()
            for batch in batches
            for row, x in zip(batch.rows, batch.x, strict=True)
        }

    same = drawn(20, 1, 0)
    assert drawn(20, 1, 0, batch_size=7) == same
    assert {row: x for row, x in drawn(40, 1, 0).items() if row < 20} == same
    assert drawn(20, 2, 0) != same
    assert drawn(20, 1, 1) != same


def test_a_test_sees_the_middles_in_order_and_every_view(features):
    batches = list(features.test_batches(frames=3, batch_size=10))
    assert np.concatenate([views[0].rows for views in batches]).tolist() == list(range(3, 40))
    for views in batches:
        assert len(views) == 3
        for number, batch in enumerate(views):
            video, view, frame = batch.x.numpy().astype(int).transpose(2, 0, 1)
            assert (view == number).all()
            assert (frame[video[:, 0] % 5 != 0] == [1, 3, 5]).all()
            assert (frame[video[:, 0] % 5 == 0] == [0, 1, 1]).all()


def test_all_frames_mask_the_padding(features):
    for views in features.test_batches(frames=FRAMES, batch_size=40):
        for batch in views:
            assert batch.mask.sum(1).tolist() == [
                2 if row % 5 == 0 else FRAMES for row in batch.rows
            ]


def test_a_store_without_short_videos_needs_no_mask(tmp_path):
    arrays = {"labels": np.zeros(4, int), "classes": ["a"], "lengths": np.full(4, 2)}
    store = FeatureStore.from_arrays(tmp_path / "s.zarr", np.ones((4, 2, 3)), **arrays)
    (views,) = StoredFeatures(store, np.arange(4)).test_batches(frames=2, batch_size=4)
    assert views[0].mask is None


def test_augmented_passes_are_for_training_and_crops_for_tests(store, monkeypatch):
    monkeypatch.setitem(store.__dict__, "views", ("center", "augment_0", "augment_1"))
    assert training_views(store).tolist() == [1, 2]
    assert evaluation_views(store).tolist() == [0]


def test_a_store_larger_than_memory_is_read_without_reading_ahead(store, monkeypatch):
    monkeypatch.setattr("aggregate.data.features.memory_available", lambda: 1000)
    fresh = FeatureStore.open(store.path)
    features = StoredFeatures(fresh, np.arange(40), placement="mmap")
    assert "larger than memory" in features.placement_note
    plain = StoredFeatures(store, np.arange(40), placement="memory")
    (views,), (expected,) = (
        one.test_batches(frames=FRAMES, batch_size=40) for one in (features, plain)
    )
    assert all(torch.equal(view.x, same.x) for view, same in zip(views, expected, strict=True))


def test_more_frames_than_stored_and_no_rows_are_refused(store):
    with pytest.raises(InputError, match="holds 6 frames per video"):
        StoredFeatures(store, np.arange(4)).train_batches(epoch=0, frames=7, batch_size=2, seed=0)
    with pytest.raises(InputError, match="no video is left"):
        StoredFeatures(store, np.array([], int))


def test_a_pending_video_is_named(tmp_path):
    classes_store(tmp_path / "s.zarr")
    store = FeatureStore.open(tmp_path / "s.zarr", writable=True)
    store.set_status(np.array([7]), PENDING)
    with pytest.raises(RunError, match=r"v/0007\.mp4 and 0 more are not extracted yet"):
        StoredFeatures(store, np.arange(60))


def test_failed_videos_are_left_to_the_caller(tmp_path):
    classes_store(tmp_path / "s.zarr")
    fail_rows(tmp_path / "s.zarr", [3])
    assert FeatureStore.open(tmp_path / "s.zarr").status[3] == 3


def test_items_are_made_ahead_and_errors_come_over():
    made = []

    def items():
        for number in range(5):
            made.append(number)
            yield number
        raise ValueError("the source broke")

    stream = prefetched(items(), depth=2)
    assert next(stream) == 0
    deadline = time.monotonic() + 60
    while len(made) < 3 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert len(made) >= 3
    with pytest.raises(ValueError, match="the source broke"):
        list(stream)


def test_leaving_early_ends_the_thread():
    stream = prefetched(iter(range(1000)), depth=2)
    next(stream)
    stream.close()
    assert not any(thread.name == "batches-ahead" for thread in threading.enumerate())
