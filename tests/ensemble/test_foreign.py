"""Scores of other tools in an ensemble: probabilities are detected, and no pickle runs code."""

import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.special import softmax

from aggregate.scores import Scores
from ensemble import __main__ as ensemble
from ensemble.foreign import load_scores
from extract import InputError
from extract.cli import run_command
from listings import write

IDS, CLASSES = ["a.mp4", "b.mp4", "c.mp4"], ["run", "walk"]
LOGITS = np.array([[2.0, -1.0], [0.5, 1.5], [3.0, 0.0]], np.float32)


def as_npz(folder: Path) -> Path:
    np.savez(folder / "s.npz", scores=LOGITS, ids=IDS, classes=CLASSES, labels=["run", "", "walk"])
    return folder / "s.npz"


def as_npy(folder: Path) -> Path:
    np.save(folder / "s.npy", LOGITS)
    write(folder / "s.txt", "\n".join(IDS) + "\n")
    return folder / "s.npy"


def as_csv(folder: Path) -> Path:
    rows = [
        f"{name},{label},{a},{b}"
        for name, label, (a, b) in zip(IDS, ("run", "", "walk"), LOGITS, strict=True)
    ]
    return write(folder / "s.csv", "\n".join(["id,label,run,walk", *rows]) + "\n")


def as_pickle(folder: Path, content=None) -> Path:
    content = list(LOGITS) if content is None else content
    write(folder / "s.csv", "id,label\n" + "".join(f"{name},x\n" for name in IDS))
    (folder / "s.pkl").write_bytes(pickle.dumps(content, protocol=2))
    return folder / "s.pkl"


def as_dicts(folder: Path) -> Path:
    return as_pickle(folder, [{"pred_score": row, "gt_label": np.int64(0)} for row in LOGITS])


def as_nested_dicts(folder: Path) -> Path:
    return as_pickle(
        folder, [{"pred_scores": {"item": row.tolist()}, "gt_label": 0} for row in LOGITS]
    )


@pytest.fixture
def classes(tmp_path) -> str:
    return str(write(tmp_path / "classes.txt", "run\nwalk\n"))


@pytest.mark.parametrize(
    "save",
    [as_npz, as_npy, as_csv, as_pickle, as_dicts, as_nested_dicts],
    ids=lambda save: save.__name__,
)
def test_every_format_holds_the_same(tmp_path, classes, save):
    scores = load_scores(save(tmp_path), classes=classes)
    assert (scores.ids, scores.classes) == (IDS, CLASSES)
    assert np.array_equal(scores.logits, LOGITS)
    if save in (as_npz, as_csv):
        assert scores.labels.tolist() == [0, -1, 1]


def test_probabilities_are_noticed_and_said(tmp_path, capsys):
    probabilities = softmax(LOGITS, axis=1).astype(np.float16)
    np.savez(tmp_path / "p.npz", probabilities, ids=IDS, classes=CLASSES)
    Scores(IDS, CLASSES, probabilities, groups=["g"] * 3).save(tmp_path / "p.h5")
    for name in ("p.npz", "p.h5"):
        scores = load_scores(tmp_path / name)
        assert f"{name}: every row sums to 1, so these are probabilities" in capsys.readouterr().out
        np.testing.assert_allclose(softmax(scores.logits, axis=1), probabilities, atol=1e-3)
    assert list(scores.groups) == ["g"] * 3
    load_scores(as_npz(tmp_path))
    assert capsys.readouterr().out == ""


class Attack:
    """An object that would create a file if it were unpickled."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_a_pickle_runs_no_code(tmp_path, classes):
    attacked = tmp_path / "attacked"
    hidden = [{"pred_score": np.array([Attack(attacked)], object)}]
    for content, name in (
        ([Attack(attacked)], "getattr"),
        (hidden, "getattr"),
        ([torch.ones(2)], "torch"),
    ):
        with pytest.raises(
            InputError, match=rf"it holds \S*{name}\S*, which only running its code could read"
        ):
            load_scores(as_pickle(tmp_path, content), classes=classes)
    assert not attacked.exists()


@pytest.mark.parametrize(
    ("save", "message"),
    [
        (lambda d: as_pickle(d, {"a": 1}), r"s\.pkl: it holds a dict, expected a list of scores"),
        (lambda d: as_pickle(d, [{"score": 1}]), "entry 0 has no pred_score; it has score"),
        (lambda d: as_pickle(d, list(LOGITS[:2])), r"^\S+s\.pkl holds 2 rows, and 3 ids are given"),
        (lambda d: write(d / "s.pkl", b"\x80\x04no"), r"s\.pkl cannot be read \("),
        (lambda d: write(d / "s.npz", b"no"), r"s\.npz cannot be read \("),
        (lambda d: d / "gone.csv", r"the scores file \S*gone\.csv does not exist"),
        (
            lambda d: write(d / "s.csv", "name,run\nx,1\n"),
            r"its first column is \['name'\], expected id",
        ),
        (
            lambda d: write(d / "s.csv", "id,run,walk\nx,1\n"),
            "line 2 has 2 values and the header 3",
        ),
        (
            lambda d: write(d / "s.csv", "id,run,walk\nx,1,2\nx,1,2\n"),
            "the id 'x' is given for two rows",
        ),
        (
            lambda d: write(d / "s.csv", "id,run,label\nx,1,fly\n"),
            "the label 'fly' is none of its 1 classes",
        ),
        (
            lambda d: write(d / "s.csv", "id,run,walk\nx,one,2\n"),
            r"cannot be read \(ValueError: could not convert",
        ),
    ],
)
def test_files_that_are_no_scores(tmp_path, classes, save, message):
    with pytest.raises(InputError, match=message):
        load_scores(save(tmp_path), classes=classes)


def test_arrays_that_are_no_scores(tmp_path, classes):
    with pytest.raises(
        InputError,
        match="its classes are not named; give them in the order of its columns: --classes",
    ):
        load_scores(as_npy(tmp_path))
    with pytest.raises(InputError, match="2 columns, and 3 classes are named"):
        load_scores(as_npy(tmp_path), classes=str(write(tmp_path / "three.txt", "a\nb\nc\n")))
    np.savez(tmp_path / "n.npz", a=LOGITS, b=LOGITS, ids=IDS)
    with pytest.raises(
        InputError, match=r"holds a \[3, 2\], b \[3, 2\], ids \[3\]; needed are one array"
    ):
        load_scores(tmp_path / "n.npz", classes=classes)
    np.save(tmp_path / "s.npy", np.array([["a", "b"]] * 3))
    with pytest.raises(InputError, match=r"holds <U1 \[3, 2\], expected numbers"):
        load_scores(tmp_path / "s.npy", classes=classes)
    np.save(tmp_path / "s.npy", np.array([{}], object), allow_pickle=True)
    with pytest.raises(InputError, match="Object arrays cannot be loaded"):
        load_scores(tmp_path / "s.npy", classes=classes)


def test_an_ensemble_of_three_tools(tmp_path, classes, capsys):
    Scores(IDS, CLASSES, LOGITS, np.array([0, 1, 1])).save(tmp_path / "ours.h5")
    rows = [
        f"{name},{b},{a}"
        for name, (a, b) in zip(IDS[::-1], softmax(LOGITS, axis=1)[::-1], strict=True)
    ]
    theirs = write(tmp_path / "theirs.csv", "\n".join(["id,walk,run", *rows]) + "\n")
    arguments = [
        "--scores",
        str(tmp_path / "ours.h5"),
        str(theirs),
        str(as_pickle(tmp_path)),
        "--classes",
        classes,
    ]
    arguments += ["--out", str(tmp_path / "fused.h5")]
    assert run_command(ensemble.main, ensemble.Options, prog="ensemble", args=arguments) == 0
    fused = Scores.load(tmp_path / "fused.h5")
    np.testing.assert_allclose(softmax(fused.logits, axis=1), softmax(LOGITS, axis=1), atol=1e-5)
    assert "theirs.csv: every row sums to 1" in capsys.readouterr().out
