"""Features of other tools become stores: every format, every kind of bad input, killed and
continued runs."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from extract import InputError
from extract.cli import run_command
from extract.feature_files import UnusableError, open_features
from extract.ingest import Options, main
from extract.store import FAILED, OK, FeatureStore
from listings import write
from stores import store_digest

VIDEOS = 12


def arrays(videos: int = VIDEOS, dim: int = 4) -> dict[str, np.ndarray]:
    """Features [T, D] by name, with T from 1 to 6. Every value tells its video, row and channel."""
    lengths = {f"c{i % 3}/v{i}": 1 + i % 6 for i in range(videos)}
    return {
        name: 100 * i
        + 10 * np.arange(length, dtype=np.float32)[:, None]
        + np.arange(dim, dtype=np.float32)
        for i, (name, length) in enumerate(lengths.items())
    }


def list_of(path: Path, names, extension: str = ".mp4") -> Path:
    rows = [
        f"{name}{extension},class {name[1]},{'val' if i % 4 == 3 else 'train'},g{i // 2}"
        for i, name in enumerate(names)
    ]
    return write(path, "\n".join(["id,label,split,group", *rows]) + "\n")


def save_folder(folder: Path, features: dict[str, np.ndarray]) -> Path:
    for name, values in features.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        np.save(folder / f"{name}.npy", values)
    return folder


def ingest(tmp_path: Path, features: Path, names=(), **changed) -> FeatureStore:
    out = tmp_path / changed.pop("out", "x.zarr")
    labels = changed.pop("labels", None) or list_of(tmp_path / "l.csv", names or arrays())
    assert main(Options(features, labels, str(out), **changed)) == 0
    return FeatureStore.open(out)


def check(store: FeatureStore, features: dict[str, np.ndarray], frames: int) -> None:
    """Every video has the middles of `frames` equal segments, and repeats are masked."""
    assert (store.status == OK).all()
    assert store.frames_per_video == frames
    for row, video_id in enumerate(store.ids):
        values = features[video_id.removesuffix(".mp4")]
        middles = [(2 * k + 1) * len(values) // (2 * frames) for k in range(frames)]
        slots = np.arange(frames)
        assert np.array_equal(store.gather([row], slots)[0], values[middles])
        assert store.mask([row], slots).sum() == len(set(middles))
        assert store.num_frames[row] == len(values)


# -- formats -----------------------------------------------------------------------------------------------------------


def as_npy(folder: Path, features) -> Path:
    return save_folder(folder / "features", features)


def as_npz(folder: Path, features) -> Path:
    for name, values in features.items():
        (folder / "features" / name).parent.mkdir(parents=True, exist_ok=True)
        np.savez_compressed(folder / "features" / name, fps=np.array(25.0), features=values)
    return folder / "features"


def as_torch(folder: Path, features) -> Path:
    for i, (name, values) in enumerate(features.items()):
        (folder / "features" / name).parent.mkdir(parents=True, exist_ok=True)
        tensor = (
            torch.from_numpy(values).bfloat16()[None]
            if i % 2
            else {"feats": torch.from_numpy(values).double()}
        )
        torch.save(tensor, folder / "features" / f"{name}.pt")
    return folder / "features"


def as_pairs(folder: Path, features) -> Path:
    for name, values in features.items():
        base = folder / "features" / name
        base.parent.mkdir(parents=True, exist_ok=True)
        np.save(f"{base}_c.npy", values)
        np.save(f"{base}_v.npy", values.mean(axis=0))
        base.with_suffix(".json").write_text("{}")
    return folder / "features"


def as_hdf5(folder: Path, features) -> Path:
    with h5py.File(folder / "features.h5", "w") as file:
        for name, values in features.items():
            file[name] = values
    return folder / "features.h5"


def as_hdf5_groups(folder: Path, features) -> Path:
    with h5py.File(folder / "features.h5", "w") as file:
        for name, values in features.items():
            file[f"{name}/c3d_features"] = values
    return folder / "features.h5"


def as_parquet(folder: Path, features) -> Path:
    columns = {
        "id": list(features),
        "label": ["x"] * len(features),
        "features": [v.tolist() for v in features.values()],
    }
    pq.write_table(pa.table(columns), folder / "features.parquet", row_group_size=5)
    return folder / "features.parquet"


@pytest.mark.parametrize(
    "save",
    [as_npy, as_npz, as_torch, as_pairs, as_hdf5, as_hdf5_groups, as_parquet],
    ids=lambda save: save.__name__,
)
def test_every_format_makes_the_same_store(tmp_path, save):
    features = arrays(dim=4)
    features = {
        name: values.astype(np.int32).astype(np.float32) // 10 for name, values in features.items()
    }  # bf16 holds it
    store = ingest(tmp_path, save(tmp_path, features), frames=4)
    check(store, features, 4)
    assert store.classes == ("class 0", "class 1", "class 2")
    by_id = dict(
        zip(
            store.ids.tolist(),
            zip(store.labels, store.splits, store.groups, strict=True),
            strict=True,
        )
    )
    assert by_id["c1/v7.mp4"] == (1, "val", "g3")


def test_tables_of_vectors_and_of_frames(tmp_path):
    names = list(arrays())
    table = np.arange(VIDEOS * 3 * 4, dtype=np.float16).reshape(VIDEOS, 3, 4)
    np.save(tmp_path / "frames.npy", table)
    write(tmp_path / "frames.txt", "\n".join(names))
    check(ingest(tmp_path, tmp_path / "frames.npy"), dict(zip(names, table, strict=True)), 3)
    np.save(tmp_path / "vectors.npy", table[:, 0])
    list_of(tmp_path / "vectors.csv", names)
    vectors = ingest(tmp_path, tmp_path / "vectors.npy", out="v.zarr")
    check(vectors, dict(zip(names, table[:, :1], strict=True)), 1)
    pq.write_table(
        pa.table(
            {
                "path": names,
                "v": pa.array(list(table[:, 0].astype(np.float32)), pa.list_(pa.float32(), 4)),
            }
        ),
        tmp_path / "v.parquet",
    )
    same = ingest(tmp_path, tmp_path / "v.parquet", out="p.zarr")
    assert np.array_equal(
        same.gather(np.arange(VIDEOS), [0]), vectors.gather(np.arange(VIDEOS), [0])
    )


def test_our_own_export_comes_back(tmp_path):
    from extract.export import Options as ExportOptions
    from extract.export import main as export

    store = ingest(tmp_path, as_npy(tmp_path, arrays()), frames=4)
    export(ExportOptions(store.path, tmp_path / "out.h5"))
    back = ingest(tmp_path, tmp_path / "out.h5", out="back.zarr")
    rows = np.arange(len(store))
    assert back.ids.tolist() == store.ids.tolist()
    assert np.array_equal(back.gather(rows, np.arange(4)), store.gather(rows, np.arange(4)))


# -- joining by name ---------------------------------------------------------------------------------------------------


def test_the_next_command_trains_in_a_folder_that_is_not_in_use(tmp_path, monkeypatch, capsys):
    (tmp_path / "runs" / "tsn").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    ingest(tmp_path, save_folder(tmp_path / "f", arrays()), frames=2)
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith("Next: ")
    assert last.endswith("x.zarr --out runs/x_tsn")


def test_names_are_joined_by_what_finds_most_and_it_is_said(tmp_path, capsys):
    features = {name: np.ones((2, 4), np.float32) * i for i, name in enumerate(arrays())}
    save_folder(tmp_path / "exact", {f"{name}.mp4": values for name, values in features.items()})
    ingest(tmp_path, tmp_path / "exact", out="a.zarr")
    assert "features joined by the id\n" in capsys.readouterr().out
    flat = {name.rpartition("/")[2]: values for name, values in features.items()}
    ingest(tmp_path, save_folder(tmp_path / "flat", flat), out="b.zarr")
    assert "joined by the file name without extension" in capsys.readouterr().out
    ended = {f"{name}_resnet": values for name, values in flat.items()}
    ended |= {f"{name}_fps": np.array(25.0) for name in flat}
    check(ingest(tmp_path, save_folder(tmp_path / "ended", ended), out="c.zarr"), features, 2)
    assert "joined by the file name with the ending _resnet" in capsys.readouterr().out
    save_folder(tmp_path / "ended", {f"{name}_flow": values for name, values in flat.items()})
    with pytest.raises(
        InputError, match="v0 has the features _flow, _resnet; move all but one kind away"
    ):
        ingest(tmp_path, tmp_path / "ended", out="d.zarr")


def test_what_is_on_one_side_only_is_named(tmp_path, capsys):
    features = arrays()
    save_folder(
        tmp_path / "f",
        {**{name: v[:1] for name, v in list(features.items())[1:]}, "extra": np.ones((1, 4))},
    )
    store = ingest(tmp_path, tmp_path / "f")
    out = capsys.readouterr().out
    assert "12 videos listed, 11 found, 1 missing (c0/v0.mp4)" in out
    assert "left out, in no row of the CSV: 1 (extra)" in out
    assert len(store) == 11
    with pytest.raises(
        InputError, match=r"of the 1 videos .* has features: it lists nobody.mp4, and there are c0"
    ):
        ingest(
            tmp_path, tmp_path / "f", labels=write(tmp_path / "n.csv", "id,label\nnobody.mp4,a\n")
        )


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ("a.mp4,x\na.mp4,y\n", r"line 2 and \S+ line 3 both list a\.mp4 as 'x' and as 'y'"),
        ("a.mp4,x\na.webm,x\n", r"a\.mp4 and a\.webm would both have the features a"),
        ("../a.mp4,x\n", r"line 2: \.\./a\.mp4 is not below"),
        ("", "has a header and no rows"),
    ],
)
def test_ids_that_cannot_be_joined(tmp_path, rows, message):
    save_folder(tmp_path / "f", {"a": np.ones((1, 4))})
    with pytest.raises(InputError, match=message):
        ingest(tmp_path, tmp_path / "f", labels=write(tmp_path / "l.csv", f"id,label\n{rows}"))


def test_two_files_of_one_name(tmp_path):
    save_folder(tmp_path / "f", {"a": np.ones((1, 4))})
    np.savez(tmp_path / "f" / "a.npz", np.ones((1, 4)))
    with pytest.raises(InputError, match=r"a\.npy and a\.npz are both features of a"):
        open_features(tmp_path / "f")


# -- bad input ---------------------------------------------------------------------------------------------------------


class Attack:
    """An object that would create a file if it were unpickled."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_bad_arrays_fail_by_name_and_the_others_are_taken(tmp_path, capsys):
    good = {f"c0/v{i}": np.ones((2, 4), np.float32) for i in range(9)}
    folder = save_folder(tmp_path / "f", good)
    bad = {
        "nan": np.array([[1, 2, 3, 4], [1, np.nan, 3, 4]]),
        "large": np.full((2, 4), 1e6),
        "wide": np.ones((2, 5)),
        "empty": np.ones((0, 4)),
        "cube": np.ones((2, 3, 4)),
        "text": np.array(["a", "b"]),
    }
    save_folder(folder, bad)
    np.save(
        folder / "object.npy", np.array([Attack(tmp_path / "attacked")], object), allow_pickle=True
    )
    torch.save(Attack(tmp_path / "attacked"), folder / "unsafe.pt")
    np.savez(folder / "several.npz", rgb=np.ones((2, 4)), flow=np.ones((2, 4)))
    (folder / "nothing.npy").touch()
    names = [*good, *bad, "object", "unsafe", "several", "nothing"]
    labels = list_of(tmp_path / "l.csv", names)
    options = Options(folder, labels, str(tmp_path / "x.zarr"), frames=2)
    assert main(options) == 3
    assert not (tmp_path / "attacked").exists()
    store = FeatureStore.open(tmp_path / "x.zarr")
    reasons = {
        name.removesuffix(".mp4"): reason
        for name, reason in zip(store.ids, store.errors, strict=True)
        if reason
    }
    for name, reason in {
        "nan": "row 1 holds nan",
        "large": "row 0 holds 1000000.0, expected a value in the range of float16",
        "wide": "its width is 5, the store's 4",
        "empty": "it is empty: its shape is [0, 4]",
        "cube": "its shape is [2, 3, 4], expected [T, D] or [D]",
        "text": "it holds <U1, which is not numbers",
        "object": "Python objects (a pickle), which are never loaded",
        "unsafe": "Python objects (a pickle), which are never loaded",
        "several": "it holds the arrays rgb, flow; call the right one `features`",
        "nothing": "it cannot be read",
    }.items():
        assert reason in reasons.pop(name), name
    assert not reasons
    out = capsys.readouterr().out
    assert "WIDTHS DIFFER: 4 (" in out
    assert "unusable: cube.mp4: its shape is [2, 3, 4]" in out
    for name in bad:  # repaired: the same command continues
        np.save(folder / f"{name}.npy", np.ones((2, 4)))
    assert main(Options(folder, labels, str(tmp_path / "x.zarr"), max_failed=0.5)) == 0
    assert (FeatureStore.open(tmp_path / "x.zarr").status == FAILED).sum() == 4


def test_empty_datasets_of_hdf5_are_unusable_and_the_others_are_read(tmp_path):
    with h5py.File(tmp_path / "datasets.h5", "w") as file:
        file["null"], file["rows"] = h5py.Empty("f4"), np.zeros((0, 4), np.float32)
        file["good"] = np.ones((2, 4), np.float32)
    files = open_features(tmp_path / "datasets.h5")
    for name, reason in (("null", "it has no shape"), ("rows", r"its shape is \[0, 4\]")):
        for read in (files.shape, files.load):
            with pytest.raises(UnusableError, match=f"^it is empty: {reason}$"):
                read(name)
    assert files.load("good").shape == (2, 4)
    with h5py.File(tmp_path / "table.h5", "w") as file:
        file["ids"], file["features"] = ["a"], h5py.Empty("f4")
    with pytest.raises(InputError, match="holds 0 rows, and 1 ids are given for them"):
        open_features(tmp_path / "table.h5")


@pytest.mark.parametrize(
    ("save", "message"),
    [
        (
            lambda path: (path / "f").mkdir(),
            "holds no features; expected npy, npz, pt, pth; pickles are never read",
        ),
        (lambda path: write(path / "f" / "a.pkl", "x"), "holds no features; expected npy"),
        (lambda path: None, "f does not exist"),
        (
            lambda path: write(path / "f", "x"),
            r"expected a folder, \.h5, \.npy with its ids, or \.parquet",
        ),
    ],
)
def test_folders_without_features(tmp_path, save, message):
    save(tmp_path)
    with pytest.raises(InputError, match=message):
        ingest(tmp_path, tmp_path / "f")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("f.h5", b"no", "is not an HDF5 file that can be read"),
        ("f.npy", b"no", r"f\.npy: it cannot be read"),
        ("f.parquet", b"no", "is not a Parquet file that can be read"),
    ],
)
def test_tables_that_cannot_be_read(tmp_path, name, content, message):
    write(tmp_path / "f.txt", "a\n")
    with pytest.raises(InputError, match=message):
        ingest(tmp_path, write(tmp_path / name, content))


def test_tables_without_their_ids(tmp_path):
    np.save(tmp_path / "f.npy", np.ones((2, 4)))
    with pytest.raises(
        InputError, match="does not name the videos of its rows; write their ids, one per"
    ):
        open_features(tmp_path / "f.npy")
    write(tmp_path / "f.csv", "name,label\na,b\n")
    with pytest.raises(InputError, match=r"f\.csv has no column id or path"):
        open_features(tmp_path / "f.npy")
    write(tmp_path / "f.txt", "a\n")
    with pytest.raises(InputError, match="holds 2 rows, and 1 ids are given"):
        open_features(tmp_path / "f.npy")
    write(tmp_path / "f.txt", "a\na\n")
    with pytest.raises(InputError, match="the id 'a' is given for two rows"):
        open_features(tmp_path / "f.npy")
    pq.write_table(pa.table({"id": ["a"], "x": [1.0]}), tmp_path / "f.parquet")
    with pytest.raises(
        InputError, match=r"the columns id \(string\), x \(double\); needed are id or path, and one"
    ):
        open_features(tmp_path / "f.parquet")


def test_cells_of_parquet_that_are_no_array(tmp_path):
    cells = [[[1.0], [2.0]], None, [[1.0], [2.0, 3.0]], []]
    pq.write_table(pa.table({"id": list("abcd"), "features": cells}), tmp_path / "f.parquet")
    files = open_features(tmp_path / "f.parquet")
    assert files.shape("a") == (2, 1)
    for name, message in {
        "b": "it is null",
        "c": "lists of different lengths",
        "d": "it is empty",
    }.items():
        with pytest.raises(UnusableError, match=message):
            files.shape(name)
        with pytest.raises(UnusableError, match=message):
            files.load(name)
    assert files.load("a").tolist() == [[1.0], [2.0]]


def test_lengths_that_differ_need_frames(tmp_path, capsys):
    with pytest.raises(InputError, match=r"videos have 1 to 6 rows each; give --frames N"):
        ingest(tmp_path, as_npy(tmp_path, arrays()))
    required = ["--features", "f", "--labels", "l.csv", "--out", "x.zarr"]
    assert run_command(main, Options, prog="ingest", args=[*required, "--frames", "0"]) == 2
    assert "--frames 0: expected at least 1" in capsys.readouterr().err


# -- continuing --------------------------------------------------------------------------------------------------------


def test_a_store_is_continued_corrected_and_its_changes_are_named(tmp_path, capsys):
    features = arrays()
    folder = as_npy(tmp_path, features)
    names = list(features)
    ingest(tmp_path, folder, names[:8], frames=4, name="net")
    capsys.readouterr()
    labels = list_of(tmp_path / "l.csv", names)
    write(labels, labels.read_text().replace("c0/v0.mp4,class 0,train", "c0/v0.mp4,class 9,val"))
    store = ingest(tmp_path, folder, labels=labels)  # frames and name come from the store
    out = capsys.readouterr().out
    assert "corrected 1 labels, 1 splits (c0/v0.mp4: class 0 -> class 9" in out
    check(store, features, 4)
    assert store.classes[store.labels[0]] == "class 9"
    assert store.provenance["backbone"] == "net"
    np.save(folder / "c0/v0.npy", features["c0/v0"] + 1)
    old = store_digest(tmp_path / "x.zarr")
    ingest(tmp_path, folder, labels=labels)
    assert "files are not those that were extracted: 1 (c0/v0.mp4)" in capsys.readouterr().out
    assert store_digest(tmp_path / "x.zarr") == old
    store = ingest(tmp_path, folder, labels=labels, retry_changed=True)
    check(store, {**features, "c0/v0": features["c0/v0"] + 1}, 4)


def test_a_store_whose_integers_were_sorted_as_text_continues(tmp_path, capsys):
    names = [f"v{number}" for number in (0, 1, 2, 10)]
    folder = save_folder(tmp_path / "f", {name: np.ones((1, 4)) for name in names})
    labels = write(
        tmp_path / "l.csv", "id,label\n" + "".join(f"{name},{name[1:]}\n" for name in names)
    )
    earlier = str(write(tmp_path / "earlier.txt", "0\n1\n10\n2\n"))
    assert ingest(tmp_path, folder, labels=labels, classes=earlier).labels.tolist() == [
        0,
        1,
        2,
        3,
    ]  # v0 v1 v10 v2
    store = ingest(tmp_path, folder, labels=labels)
    assert store.classes == ("0", "1", "2", "10")
    assert [store.classes[label] for label in store.labels] == [
        video_id[1:] for video_id in store.ids
    ]
    assert (
        "the same names in the order of the listing; labels are renumbered"
        in capsys.readouterr().out
    )
    labels = write(tmp_path / "l.csv", "id,label\nv0,yawning\nv1,crying\n")
    kinetics = ingest(tmp_path, folder, labels=labels, out="k.zarr", classes="kinetics700")
    assert len(kinetics.classes) == 700
    kinetics = ingest(tmp_path, folder, labels=labels, out="k.zarr")
    assert [kinetics.classes[label] for label in kinetics.labels] == ["yawning", "crying"]


def test_a_store_behind_a_link_is_continued(tmp_path):
    folder = as_npy(tmp_path, arrays())
    ingest(tmp_path, folder, list(arrays())[:5], frames=2)
    (tmp_path / "link.zarr").symlink_to("x.zarr")
    assert (
        len(ingest(tmp_path, folder, labels=list_of(tmp_path / "l.csv", arrays()), out="link.zarr"))
        == VIDEOS
    )
    assert not (tmp_path / "link.zarr.log").exists()
    assert len(FeatureStore.open(tmp_path / "x.zarr")) == VIDEOS


def test_other_settings_are_refused(tmp_path):
    folder = as_npy(tmp_path, arrays())
    ingest(tmp_path, folder, frames=4, name="net")
    with pytest.raises(InputError, match="backbone: net in the store, other now"):
        ingest(tmp_path, folder, name="other")
    with pytest.raises(InputError, match=r"sampling\.frames: 4 in the store, 3 now"):
        ingest(tmp_path, folder, frames=3)
    with pytest.raises(InputError, match="width: 4 in the store, 5 now"):
        ingest(tmp_path, save_folder(tmp_path / "wide", arrays(dim=5)))


DIES_IN_THE_THIRD_BLOCK = """
import itertools, os, signal, sys
from extract import ingest

calls, read_rows = itertools.count(), ingest._read_rows

def read_and_die(*arguments):
    if next(calls) == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    return read_rows(*arguments)

ingest._read_rows, ingest._SECONDS_PER_COMMIT = read_and_die, 0
ingest.main(ingest.Options(*map(ingest.Path, sys.argv[1:3]), sys.argv[3]))
"""


def test_killed_and_continued_it_is_the_same_to_the_byte(tmp_path):
    features = {f"c{i % 3}/v{i}": np.full((16, 2048), i, np.float32) for i in range(200)}
    folder, labels = save_folder(tmp_path / "f", features), list_of(tmp_path / "l.csv", features)
    arguments = [
        sys.executable,
        "-c",
        DIES_IN_THE_THIRD_BLOCK,
        folder,
        labels,
        tmp_path / "killed.zarr",
    ]
    process = subprocess.run(list(map(str, arguments)), env=os.environ, stdout=subprocess.DEVNULL)
    assert process.returncode == -signal.SIGKILL
    assert (FeatureStore.open(tmp_path / "killed.zarr").status == OK).sum() == 128
    for name in ("killed.zarr", "whole.zarr"):
        check(ingest(tmp_path, folder, labels=labels, out=name), features, 16)
    assert store_digest(tmp_path / "killed.zarr") == store_digest(tmp_path / "whole.zarr")


# -- what comes after --------------------------------------------------------------------------------------------------


def test_an_ingested_store_trains_cross_validates_and_is_reported(tmp_path, monkeypatch):
    from aggregate import crossval, evaluate, train
    from ensemble import __main__ as ensemble
    from pipelines.report import __main__ as report

    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    features = {}
    for i in range(48):
        noise = rng.normal(size=(rng.integers(1, 7), 16))
        features[f"c{i % 3}/v{i}"] = (3 * np.eye(3, 16)[i % 3] + noise).astype(np.float32)
    ingest(tmp_path, save_folder(tmp_path / "f", features), features, frames=4, name="net")

    def run(module, *arguments) -> None:
        assert run_command(module.main, module.Options, prog="test", args=arguments) == 0

    store = ("--features", "x.zarr")
    run(train, "--agg", "nl", *store, "--epochs", "2", "--out", "runs/nl")
    run(evaluate, "--checkpoint", "runs/nl/best.pt", *store, "--out", "runs/nl.h5")
    run(evaluate, "--checkpoint", "runs/nl/baseline.pt", *store, "--out", "runs/tsn.h5")
    run(crossval, "--agg", "tsn", *store, "--folds", "3", "--epochs", "2", "--out", "runs/cv")
    run(ensemble, "--scores", "runs/nl.h5", "runs/tsn.h5", "--out", "runs/fused.h5")
    run(report, "runs", "--out", "report.html")
    assert json.loads((tmp_path / "runs" / "fused.json").read_text())["models"] == ["nl", "tsn"]
    ingest(tmp_path, tmp_path / "f", features, frames=4, name="other", out="other.zarr")
    with pytest.raises(
        InputError, match="was made with backbone other, the checkpoint was trained on net"
    ):
        evaluate.main(evaluate.Options(checkpoint=Path("runs/nl/best.pt"), features="other.zarr"))
