"""Export of one mean vector per video for other tools, and ingest of the result."""

import csv
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from extract import InputError, ingest
from extract.export import Options, main
from extract.store import FeatureStore
from stores import classes_store, fail_rows


@pytest.fixture
def store(tmp_path) -> FeatureStore:
    """60 videos. Every seventh has two frames and padding that is not zero, and one failed."""
    store = classes_store(tmp_path / "x.zarr")
    fail_rows(tmp_path / "x.zarr", [5])
    return FeatureStore.open(store.path)


def expected_means(store: FeatureStore) -> np.ndarray:
    features = store.read(np.arange(len(store)))[:, 0].astype(np.float32)
    lengths = np.minimum(store.num_frames, store.frames_per_video)
    return np.array(
        [
            video[:length].mean(axis=0)
            for video, length in zip(features, lengths, strict=True)
            if length
        ]
    )


def test_one_vector_per_video_and_repeats_count_once(store, tmp_path):
    assert main(Options(store.path, Path("npy"), tmp_path / "out", one_vector=True)) == 0
    vectors = np.load(tmp_path / "out" / "vectors.npy")
    assert vectors.dtype == np.float32
    np.testing.assert_allclose(vectors, expected_means(store), rtol=1e-5, atol=1e-6)
    with (tmp_path / "out" / "vectors.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    usable = np.flatnonzero(store.usable)
    assert [row["id"] for row in rows] == store.ids[usable].tolist()
    assert [row["label"] for row in rows] == [
        store.classes[label] for label in store.labels[usable]
    ]
    assert [row["split"] for row in rows] == store.splits[usable].tolist()
    assert [row["group"] for row in rows] == store.groups[usable].tolist()


def test_parquet_holds_the_same_and_both_come_back(store, tmp_path):
    main(Options(store.path, Path("npy"), tmp_path / "out", one_vector=True))
    assert main(Options(store.path, tmp_path / "x.parquet")) == 0
    table = pq.read_table(tmp_path / "x.parquet")
    vectors = np.load(tmp_path / "out" / "vectors.npy")
    assert np.array_equal(np.array(table["features"].to_pylist(), np.float32), vectors)
    assert table["label"].to_pylist()[0] == "class 0"
    for features, name in (
        (tmp_path / "out" / "vectors.npy", "n.zarr"),
        (tmp_path / "x.parquet", "p.zarr"),
    ):
        assert (
            ingest.main(
                ingest.Options(features, tmp_path / "out" / "vectors.csv", str(tmp_path / name))
            )
            == 0
        )
        back = FeatureStore.open(tmp_path / name)
        assert np.array_equal(
            back.gather(np.arange(len(back)), [0])[:, 0], vectors.astype(np.float16)
        )
        assert back.groups.tolist() == store.groups[store.usable].tolist()


def test_one_vector_belongs_to_npy(store, tmp_path):
    with pytest.raises(
        InputError, match=r"--one-vector needs --to npy; --to \S*out has its own form"
    ):
        main(Options(store.path, tmp_path / "out", one_vector=True))
