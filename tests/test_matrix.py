"""What happens when something changes between two commands: every cell of the table in
CONTRIBUTING.md.

A row is the command that continues or reads something. A column is what changed since. Each cell is
refused (the message names the difference and what to do), applied and reported, or harmless: then
the second command gives the same result as without the change.
"""

import importlib.metadata
import json
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import tiny_backbones
from aggregate import ablate, crossval, evaluate, finetune, train
from aggregate.scores import Scores
from aggregate.training.checkpoint import Checkpoint
from aggregate.training.run import Run
from ensemble import __main__ as fusing
from extract import InputError, verify
from extract import export as export_features
from extract.__main__ import Options as ExtractOptions
from extract.__main__ import main as extract
from extract.backbone.model import load_trunk
from extract.store import FeatureStore
from pipelines import export, predict, steps
from pipelines.report import __main__ as report
from pipelines.report.find import find
from small_models import cached, tuned
from stores import classes_store, store_digest

ROOT = Path(__file__).parent.parent
CLIPS = ROOT / "pipelines" / "clips" / "exercise_mini" / "clips"
COLUMNS = (
    "file replaced",
    "video removed or renamed",
    "label, split, group or span corrected",
    "class added",
    "class order",
    "store grown",
    "store re-made",
    "checkpoint replaced",
    "option",
    "package version",
    "path only",
)
TOUCHED = 53  # the row of a validation video
QUICK = {"epochs": 2, "batch_size": 16}
OTHER_DATA = "was trained on other data than .* holds now"
REMEDY = "give another --out to train on the current data"
VERSION = r"note      started with version 0\.0\.1 of this program, continues with "


@dataclass(frozen=True)
class Cell:
    """`outcome` is refused, said (reported) or harmless; `text` is a pattern of the printed text or
    of the error."""

    outcome: str
    text: str = ""


refused, said, harmless = (lambda text, o=o: Cell(o, text) for o in ("refused", "said", "harmless"))


CELLS: dict[str, dict[str, Cell]] = {}


def sorted_clips(label: str) -> list[Path]:
    return sorted((CLIPS / label).glob("*.mp4"))


# -- what changes --------------------------------------------------------------------------------------------------


def remade(path: Path, **changes: Any) -> None:
    """Make a store again under its name, with other columns, with some of its `rows`, or with other
    features."""
    old = FeatureStore.open(path)
    rows = changes.pop("rows", np.arange(len(old)))
    features = changes.pop("features", old.read(slice(0, len(old))))[rows]
    columns = {
        name: getattr(old, name)[rows].tolist() for name in ("ids", "splits", "groups", "labels")
    }
    columns |= {"classes": old.classes, "lengths": old.num_frames[rows]} | changes
    shutil.rmtree(path)
    FeatureStore.from_arrays(path, features, **columns)


def grown(path: Path) -> None:
    """Add twelve videos, of all splits."""
    old = FeatureStore.open(path)
    rows = np.concatenate([np.arange(len(old)), np.arange(12)])
    ids = [*old.ids.tolist(), *(f"new/{row}.mp4" for row in range(12))]
    remade(path, rows=rows, ids=ids)


def changed_store(path: Path, column: str) -> None:
    """Apply the change of a column to a store."""
    store = FeatureStore.open(path)
    if column == "file replaced":  # and extracted again: other features under the same id
        remade(path, features=store.read(slice(0, len(store))) + 0.5)
    elif column == "video removed or renamed":
        remade(path, rows=np.delete(np.arange(len(store)), TOUCHED))
    elif column == "label, split, group or span corrected":
        labels = store.labels.tolist()
        labels[TOUCHED] = (labels[TOUCHED] + 1) % 3
        remade(path, labels=labels)
    elif column == "class added":
        remade(path, classes=[*store.classes, "juggling"])
    elif column == "class order":
        remade(path, classes=store.classes[::-1], labels=(2 - store.labels).tolist())
    elif column == "store grown":
        grown(path)
    elif column == "store re-made":
        classes_store(path.with_name("new.zarr"), noise=0.9, seed=1)
        shutil.rmtree(path)
        path.with_name("new.zarr").rename(path)


def older(folder: Path) -> None:
    """Change the files in `folder` as if an earlier version of the program had started the run."""
    file = folder / "last.pt"
    if file.exists():
        last = Checkpoint.load(file)
        replace(last, data={**last.data, "version": "0.0.1"}).save(file)
    else:
        options = json.loads((folder / "options.json").read_text())
        (folder / "options.json").write_text(json.dumps(options | {"version": "0.0.1"}))


def stopped_after_an_epoch(command: Callable[[], object]) -> None:
    ended = Run.end_epoch

    def stops(self, *measured):
        ended(self, *measured)
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Run, "end_epoch", stops)
        with pytest.raises(KeyboardInterrupt):
            command()


def check(cell: Cell, command: Callable[[], object], capsys) -> None:
    """Run the second command. It is refused as the cell says, or it succeeds; for a `said` cell it
    also prints the cell's text."""
    capsys.readouterr()
    if cell.outcome == "refused":
        with pytest.raises(InputError, match=cell.text):
            command()
    else:
        assert not command()
        printed = capsys.readouterr().out
        if cell.outcome == "said":
            assert re.search(cell.text, printed), printed


# -- extraction ----------------------------------------------------------------------------------------------------

CELLS["extract, continued"] = {
    "file replaced": said(
        r"replaced  files are not those that were extracted: 1 \(a\.mp4\)\n +--retry-changed extracts"
    ),
    "video removed or renamed": said(
        r"unlisted  1 videos of the store are no longer listed \(a\.mp4\)"
    ),
    "label, split, group or span corrected": said(
        r"corrected 1 labels \(a\.mp4: push -> pull\); nothing was decoded"
    ),
    "class added": said(r"classes   3 now: 1 new \(juggling\)"),
    "class order": said("the same names in the order of the listing; labels are renumbered"),
    "store grown": said("to do     1 videos"),
    "store re-made": refused(
        "holds features that were made elsewhere .* cannot continue it, give another --out"
    ),
    "checkpoint replaced": refused(
        r"was made with other settings:\n  weights(.|\n)*use those, or another --out"
    ),
    "option": refused(
        r"was made with other settings:\n  frames: 2 in the store, 3 now\nuse those, or another --out"
    ),
    "package version": harmless("settings and the format are recorded, not the version"),
    "path only": harmless("a link is followed"),
}


@pytest.fixture(scope="module")
def extracted(tmp_path_factory) -> Path:
    """Three clips with a CSV and a file of classes, and their store."""
    here = tmp_path_factory.mktemp("extracted")
    (here / "clips").mkdir()
    for name, clip in zip("abc", sorted_clips("barbell"), strict=False):
        shutil.copy(clip, here / "clips" / f"{name}.mp4")
    (here / "clips" / "v.csv").write_text("path,label\na.mp4,push\nb.mp4,pull\nc.mp4,push\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(here)
        assert extract(EXTRACT) == 0
    return here


EXTRACT = ExtractOptions(
    videos=Path("clips/v.csv"),
    out="f.zarr",
    backbone="test_resnet",
    weights="random",
    precision="fp32",
    frames=2,
)


@pytest.mark.parametrize("column", COLUMNS)
def test_an_extraction_goes_on(column, extracted, tmp_path, monkeypatch, capsys):
    here, options = tmp_path / "here", EXTRACT
    shutil.copytree(extracted, here)
    monkeypatch.chdir(here)
    table = here / "clips" / "v.csv"
    text = table.read_text()
    if column == "file replaced":
        shutil.copy(sorted_clips("barbell")[7], here / "clips" / "a.mp4")
    elif column == "video removed or renamed":
        table.write_text(text.replace("a.mp4,push\n", ""))
    elif column == "label, split, group or span corrected":
        table.write_text(text.replace("a.mp4,push", "a.mp4,pull"))
    elif column == "class added":
        table.write_text(text.replace("a.mp4,push", "a.mp4,juggling"))
    elif column == "class order":
        (here / "classes.txt").write_text("push\npull\n")
        options = replace(options, labels="classes.txt")
    elif column == "store grown":
        shutil.copy(sorted_clips("barbell")[8], here / "clips" / "d.mp4")
        table.write_text(f"{text}d.mp4,pull\n")
    elif column == "store re-made":
        shutil.rmtree("f.zarr")
        classes_store(here / "f.zarr", videos=6)
    elif column == "checkpoint replaced":
        options = replace(options, weights=str(tuned(here / "tuned", "tsn")))
    elif column == "option":
        options = replace(options, frames=3)
    elif column == "package version":
        monkeypatch.setattr("extract.workers.driver.code_version", lambda: "99")
        monkeypatch.setattr("extract.workers.worker.code_version", lambda: "99", raising=False)
    elif column == "path only":
        (here / "f.zarr").rename(here / "g.zarr")
        (here / "f.zarr").symlink_to("g.zarr")
    before = store_digest(here / "f.zarr")
    cell = CELLS["extract, continued"][column]
    check(cell, lambda: extract(options), capsys)
    if cell.outcome != "said":
        assert store_digest(here / "f.zarr") == before


# -- runs on a store -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def begun(tmp_path_factory) -> Path:
    """A folder with a store, a TSN, another TSN, a run that was stopped, and a finished grid and
    cross-validation."""
    here = tmp_path_factory.mktemp("begun")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(here)
        classes_store(here / "f.zarr", splits=True)
        train.main(train.Options(agg="tsn", features="f.zarr", out=Path("tsn"), **QUICK))
        train.main(train.Options(agg="tsn", features="f.zarr", out=Path("other"), lr=0.3, **QUICK))
        stopped_after_an_epoch(lambda: train.main(TRAIN))
        ablate.main(ABLATE)
        crossval.main(CROSSVAL)
        evaluate.main(EVALUATE)
    return here


@pytest.fixture
def here(begun, tmp_path, monkeypatch) -> Path:
    shutil.copytree(begun, tmp_path / "here")
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "here"


TRAIN = train.Options(
    agg="max", features="f.zarr", out=Path("run"), init=Path("tsn/best.pt"), **QUICK
)
LISTS: dict[str, Any] = {"epochs": (1,), "batch_size": (16,), "seeds": (0,)}
ABLATE = ablate.Options(
    agg=("tsn",), features="f.zarr", out=Path("grid"), init=Path("tsn/best.pt"), **LISTS
)
CROSSVAL = crossval.Options(agg=("tsn",), features="f.zarr", out=Path("cv"), folds="2", **LISTS)
EVALUATE = evaluate.Options(Path("tsn/best.pt"), "f.zarr", segments=(3,), out=Path("s.h5"))

CHANGED = f"{OTHER_DATA}:(.|\n)*{{}}(.|\n)*{REMEDY}"
TRAIN_CELLS = {
    "file replaced": refused(
        CHANGED.format("contents: [0-9a-f]+ when it was trained, [0-9a-f]+ now")
    ),
    "video removed or renamed": refused(
        CHANGED.format(r"1 of its videos are no longer there: v/0053\.mp4")
    ),
    "label, split, group or span corrected": refused(
        CHANGED.format(r"v/0053\.mp4: label 'class 2' when it was trained, 'class 0' now")
    ),
    "class added": refused(
        CHANGED.format(r"3 classes when it was trained, 4 now \(new: juggling; gone: \)")
    ),
    "class order": refused(
        CHANGED.format("3 classes when it was trained, 3 now .the same names in another order.")
    ),
    "store grown": said(
        "12 new videos of f.zarr are left out: give another --out to train on them too"
    ),
    "store re-made": refused(CHANGED.format("contents: ")),
    "checkpoint replaced": refused(
        CHANGED.format("the checkpoint of --init: [0-9a-f]+ when it was trained")
    ),
    "option": refused(
        r"holds a run with other options or data:\n  lr: None in the folder, 0\.5 now\nuse those"
    ),
    "package version": said(VERSION),
    "path only": harmless(""),
}
RECORDS = (
    "holds a run with other options or data:\n  the store's {} changed (.|\n)*give another --out"
)
RECORDS_CELLS = {
    "file replaced": refused(RECORDS.format("features")),
    "video removed or renamed": refused(RECORDS.format("videos, ids, .*")),
    "label, split, group or span corrected": refused(RECORDS.format("labels")),
    "class added": refused("1 of 4 classes have no video to train on: juggling; extract some"),
    "class order": refused(RECORDS.format("classes, labels")),
    "store grown": refused(RECORDS.format("videos, ids, .*") + "|60 videos then, 72 now"),
    "store re-made": refused(RECORDS.format("features")),
    "checkpoint replaced": refused("contents_of_init: [0-9a-f]+ in the folder, [0-9a-f]+ now"),
    "option": refused(r"lr: \[\] in the folder, \[0\.5\] now"),
    "package version": said(VERSION),
    "path only": harmless(""),
}
RUNS = {
    "train, resumed": (train, TRAIN, TRAIN_CELLS, {"lr": 0.5}),
    "ablate, resumed": (ablate, ABLATE, RECORDS_CELLS, {"lr": (0.5,)}),
    "crossval, resumed": (
        crossval,
        CROSSVAL,
        RECORDS_CELLS | {"checkpoint replaced": harmless("it starts from none")},
        {"lr": (0.5,)},
    ),
}
CELLS.update({row: cells for row, (_, _, cells, _) in RUNS.items()})


@pytest.mark.parametrize("column", COLUMNS)
@pytest.mark.parametrize("row", RUNS)
def test_a_run_on_a_store_goes_on(row, column, here, capsys):
    command, options, cells, other_option = RUNS[row]
    changed_store(here / "f.zarr", column)
    if column == "checkpoint replaced":
        shutil.copy(here / "other" / "best.pt", here / "tsn" / "best.pt")
    elif column == "option":
        options = replace(options, **other_option)
    elif column == "package version":
        older(here / options.out)
    elif column == "path only":
        (here / "moved").mkdir()
        (here / "f.zarr").rename(here / "moved" / "g.zarr")
        (here / "link.zarr").symlink_to(here / "moved" / "g.zarr")
        options = replace(options, features="link.zarr")
    before = {path: path.read_bytes() for path in (here / options.out).rglob("*") if path.is_file()}
    check(cells[column], lambda: command.main(options), capsys)
    if cells[column].outcome == "refused":
        assert before == {
            path: path.read_bytes() for path in (here / options.out).rglob("*") if path.is_file()
        }


def test_a_store_that_grew_leaves_the_run_as_it_would_have_been(here):
    """One run ends on the store as it was, the other after the store grew between two epochs: same
    weights and table."""
    shutil.copytree("run", "kept")
    train.main(TRAIN)
    grown(here / "f.zarr")
    train.main(replace(TRAIN, out=Path("kept")))
    for name in ("best.pt", "last.pt"):
        one, two = (Checkpoint.load(Path(folder) / name).state_dict for folder in ("run", "kept"))
        assert all(np.array_equal(one[key], two[key]) for key in one)
    assert Path("run/results.json").read_bytes() == Path("kept/results.json").read_bytes()
    # A finished run on a store that has grown since: the table shows the videos of its validation.
    train.main(TRAIN)
    assert Path("run/results.json").read_bytes() == Path("kept/results.json").read_bytes()
    assert not any("new/" in line for line in Path("run/videos.csv").read_text().splitlines())


@pytest.mark.parametrize("column", ["splits", "groups"])
def test_a_split_or_group_that_was_corrected_is_named(column, here):
    store = FeatureStore.open("f.zarr")
    values = getattr(store, column).tolist()
    old, values[0] = values[0], "test"
    remade(here / "f.zarr", **{column: values})
    with pytest.raises(
        InputError, match=rf"v/0000\.mp4: {column[:-1]} '{old}' when it was trained, 'test' now"
    ):
        train.main(TRAIN)


def test_files_of_another_run_in_the_folder_are_named(here):
    shutil.copy("other/best.pt", "run/best.pt")
    other = Checkpoint.load("run/best.pt")
    replace(other, data={**other.data, "videos": "0"}).save("run/best.pt")
    with pytest.raises(
        InputError,
        match=r"run/best\.pt is not of the run in run; restore it, or give another --out",
    ):
        train.main(TRAIN)
    Path("run/videos.csv").write_text("id,label\n")
    with pytest.raises(
        InputError,
        match=r"run/videos\.csv is not the list of videos that run was trained on; restore",
    ):
        train.main(TRAIN)


# -- fine-tuning ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tuning(tmp_path_factory) -> Path:
    """Clips of two classes, and a fine-tuning on them that was stopped after an epoch."""
    here = tmp_path_factory.mktemp("tuning")
    for number, (label, clip) in enumerate(
        (n, c) for n in ("barbell", "kettlebells") for c in sorted_clips(n)[:5]
    ):
        target = here / "clips" / ("val" if number % 5 == 4 else "train") / label / clip.name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(clip, target)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(here)
        init = tuned(here / "init", "tsn")
        shutil.copy(init, here / "init.pt")
        stopped_after_an_epoch(lambda: finetune.main(FINETUNE))
    return here


FINETUNE = finetune.Options(
    model="tsn", videos=Path("clips"), out=Path("run"), backbone="test_resnet", init=Path("init.pt"), epochs=2,
    batch_size=4, frames=2, decode_workers=1,
)  # fmt: skip
CELLS["finetune, resumed"] = {
    "file replaced": refused(
        CHANGED.format(
            r"\.mp4: file '\d+ bytes, [-0-9a-f]+' when it was trained, '\d+ bytes, [-0-9a-f]+' now"
        )
    ),
    "video removed or renamed": refused(
        CHANGED.format("1 of its videos are no longer there: train/barbell/")
    ),
    "label, split, group or span corrected": refused(
        CHANGED.format("1 of its videos are no longer there|: label ")
    ),
    "class added": refused(CHANGED.format(r"2 classes when it was trained, 3 now \(new: juggling")),
    "class order": refused(CHANGED.format("the same names in another order")),
    "store grown": said("1 new videos of clips are left out"),
    "store re-made": harmless("the same files, listed again"),
    "checkpoint replaced": refused(CHANGED.format("the checkpoint of --init")),
    "option": refused(r"lr: None in the folder, 0\.5 now"),
    "package version": said(VERSION),
    "path only": harmless(""),
}


@pytest.mark.parametrize("column", COLUMNS)
def test_a_fine_tuning_goes_on(column, tuning, tmp_path, monkeypatch, capsys):
    here, options = tmp_path / "here", FINETUNE
    shutil.copytree(tuning, here)
    monkeypatch.chdir(here)
    clips = sorted((here / "clips" / "train" / "barbell").glob("*.mp4"))
    if column == "file replaced":
        shutil.copy(sorted_clips("barbell")[7], clips[0])
    elif column == "video removed or renamed":
        clips[0].rename(clips[0].with_name("renamed.mp4"))
    elif column == "label, split, group or span corrected":
        clips[0].rename(here / "clips" / "train" / "kettlebells" / clips[0].name)
    elif column == "class added":
        (here / "clips" / "train" / "juggling").mkdir()
        shutil.copy(clips[0], here / "clips" / "train" / "juggling" / "a.mp4")
    elif column == "class order":
        (here / "classes.txt").write_text("kettlebells\nbarbell\n")
        options = replace(options, labels="classes.txt")
    elif column == "store grown":
        shutil.copy(sorted_clips("barbell")[8], clips[0].with_name("new.mp4"))
    elif column == "checkpoint replaced":
        init = Checkpoint.load("init.pt")
        replace(init, frames=7).save("init.pt")
    elif column == "option":
        options = replace(options, lr=0.5)
    elif column == "package version":
        older(here / "run")
    elif column == "path only":
        (here / "clips").rename(here / "moved")
        (here / "link").symlink_to(here / "moved")
        options = replace(options, videos=Path("link"))
    check(CELLS["finetune, resumed"][column], lambda: finetune.main(options), capsys)


# -- scores --------------------------------------------------------------------------------------------------------

NOTE = (
    r"note: the label, split or group of 1 of these videos has changed since "
    r"the model was trained \(v/0053\.mp4\)"
)
CELLS["evaluate"] = {
    "file replaced": harmless(
        "features are scored as they are stored; the scores record their digest"
    ),
    "video removed or renamed": said("17 videos of split 'val'"),
    "label, split, group or span corrected": said(NOTE),
    "class added": harmless("labels are matched by name; refused if a video has the class"),
    "class order": harmless("labels are matched by name"),
    "store grown": said("21 videos of split 'val'"),
    "store re-made": harmless("scores record the digest; another backbone is refused"),
    "checkpoint replaced": harmless("scores record its SHA-256"),
    "option": harmless("scores record them"),
    "package version": harmless("checkpoints have a version of their own"),
    "path only": harmless(""),
}


@pytest.mark.parametrize("column", COLUMNS)
def test_evaluate_reads_what_there_is_and_says_what_changed(column, here, capsys):
    asked = EVALUATE
    changed_store(here / "f.zarr", column)
    before = Scores.load("s.h5")
    if column == "checkpoint replaced":
        shutil.copy("other/best.pt", "tsn/best.pt")
    elif column == "option":
        asked = replace(asked, batch_size=7)
    elif column == "package version":
        best = Checkpoint.load("tsn/best.pt")
        replace(best, data={**best.data, "version": "0.0.1"}).save("tsn/best.pt")
    elif column == "path only":
        (here / "f.zarr").rename(here / "g.zarr")
        (here / "tsn").rename(here / "moved")
        asked = replace(asked, features="g.zarr", checkpoint=Path("moved/best.pt"))
    check(CELLS["evaluate"][column], lambda: evaluate.main(asked), capsys)
    now = Scores.load("s.h5")
    recorded = [scores.source["inputs"] for scores in (before, now)]
    same = column in ("path only", "option")
    assert (recorded[0] == recorded[1]) == same
    if column in ("class added", "class order", "path only", "package version"):
        np.testing.assert_allclose(now.logits, before.logits, rtol=1e-5)
        assert now.labels.tolist() == before.labels.tolist()


def test_a_video_of_a_class_that_the_checkpoint_does_not_know_is_refused(here):
    store = FeatureStore.open("f.zarr")
    labels = store.labels.tolist()
    labels[TOUCHED] = 3
    remade(here / "f.zarr", classes=[*store.classes, "juggling"], labels=labels)
    with pytest.raises(
        InputError, match="has class 'juggling', which is not one of the checkpoint's 3"
    ):
        evaluate.main(EVALUATE)


def test_held_out_videos_are_the_very_ones_that_validated(here, capsys):
    """Also on a store that grew. If one of them is gone, the error names it."""
    remade(here / "f.zarr", splits=[""] * 60)
    train.main(train.Options(agg="tsn", features="f.zarr", out=Path("held"), **QUICK))
    line = capsys.readouterr().out.splitlines()[-1]
    assert (
        line
        == "Next: hgnl evaluate --checkpoint held/best.pt --features f.zarr --split held-out --out held.h5"
    )
    validated = [
        row.split(",")[0]
        for row in Path("held/videos.csv").read_text().splitlines()
        if row.endswith("validate")
    ]
    held_out = replace(EVALUATE, checkpoint=Path("held/best.pt"), split="held-out")
    for change in (lambda: None, lambda: grown(here / "f.zarr")):
        change()
        evaluate.main(held_out)
        scores = Scores.load("s.h5")
        assert sorted(scores.ids) == sorted(validated)
        assert scores.source["trained_on"] == 0
    rows = [row for row, name in enumerate(FeatureStore.open("f.zarr").ids) if name != validated[0]]
    remade(here / "f.zarr", rows=np.array(rows))
    count = len(validated)
    with pytest.raises(
        InputError,
        match=rf"holds {count - 1} of the {count} videos that held/best\.pt was validated on",
    ):
        evaluate.main(held_out)


def test_scores_of_training_videos_are_no_result(here, capsys):
    evaluate.main(replace(EVALUATE, split="all"))
    printed = capsys.readouterr().out
    assert (
        "NOT A RESULT: the model was trained on 42 of these 60 videos; --split held-out scores those"
        in printed
    )
    assert "Next:" not in printed
    assert Scores.load("s.h5").source["trained_on"] == 42
    with pytest.raises(
        InputError,
        match="s holds scores of 42 videos that the model was trained on, which is not a",
    ):
        fusing.main(fusing.Options((Path("s.h5"),), Path("fused.h5")))
    problems = find(here).problems
    assert [
        line
        for line in problems
        if "s.h5: s.h5 holds scores of 42 videos that the model was trained on" in line
    ]


# -- the ensemble --------------------------------------------------------------------------------------------------

CELLS["ensemble"] = {
    "file replaced": harmless("each scores file records what it was made of"),
    "video removed or renamed": refused(
        r"'v/0053\.mp4' is in one and not in two.*--missing drop leaves them out"
    ),
    "label, split, group or span corrected": refused("the scores were made with different labels"),
    "class added": refused("two has other classes than one .*'juggling' is in two and not in one"),
    "class order": harmless("joined by name"),
    "store grown": refused("is in two and not in one"),
    "store re-made": harmless("models of other features may be fused"),
    "checkpoint replaced": harmless("a scores file records the SHA-256 of its own"),
    "option": harmless("the summary records them"),
    "package version": refused("schema 'hgnl-scores/99', expected 'hgnl-scores/1'"),
    "path only": harmless("one file under two names is refused"),
}


@pytest.mark.parametrize("column", COLUMNS)
def test_the_ensemble_joins_what_belongs_together(column, here, capsys):
    shutil.copy("s.h5", "one.h5")
    changed_store(here / "f.zarr", column)
    model = "other" if column == "checkpoint replaced" else "tsn"
    if column == "class added":  # a model of the new class too
        labels = FeatureStore.open("f.zarr").labels.tolist()
        labels[0] = 3
        remade(here / "f.zarr", labels=labels)
        train.main(train.Options(agg="tsn", features="f.zarr", out=Path("new"), **QUICK))
        model = "new"
    evaluate.main(replace(EVALUATE, checkpoint=Path(model) / "best.pt", out=Path("two.h5")))
    if column == "package version":
        content = Path("two.h5").read_bytes()
        Path("two.h5").write_bytes(content[512:].replace(b"hgnl-scores/1", b"hgnl-scores/9"))
        cell = refused("schema 'hgnl-scores/9', expected 'hgnl-scores/1'")
    else:
        cell = CELLS["ensemble"][column]
    if column == "path only":
        (here / "two.h5").rename(here / "moved.h5")
        (here / "two.h5").symlink_to("moved.h5")
        (here / "again.h5").symlink_to("moved.h5")
        twice = fusing.Options((Path("moved.h5"), Path("again.h5")), Path("fused.h5"))
        with pytest.raises(InputError, match="is given twice"):
            fusing.main(twice)
    wanted = fusing.Options(
        (Path("one.h5"), Path("two.h5")), Path("fused.h5"), seed=int(column == "option")
    )
    check(cell, lambda: fusing.main(wanted), capsys)
    if column == "class order":
        one = Scores.load("one.h5")
        np.testing.assert_allclose(Scores.load("fused.h5").logits.argmax(1), one.logits.argmax(1))


# -- steps that are skipped ----------------------------------------------------------------------------------------

AGAIN = said(
    "scores/tsn_val.h5 was made of another checkpoint, or of other videos or labels, than there are now"
)
CELLS["kinetics700, skipped steps"] = dict.fromkeys(COLUMNS, AGAIN) | {
    "option": AGAIN,
    "package version": harmless("the same checkpoint and features give the same scores"),
    "path only": harmless(""),
}


@pytest.mark.parametrize("column", COLUMNS)
def test_scores_are_made_again_if_what_they_are_made_of_changed(column, here, capsys):
    """Extraction, training and the report are not skipped: they run, by their own rows of the
    table."""
    common: dict[str, Any] = {
        "models": {"tsn": {"features": "f.zarr"}},
        "split": "val",
        "weights": "equal",
    }
    steps.fuse(Path(), **common, segments=(3,))
    changed_store(here / "f.zarr", column)
    if column == "checkpoint replaced":
        shutil.copy("other/best.pt", "tsn/best.pt")
    elif column == "package version":
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(importlib.metadata, "version", lambda name: "99")
            capsys.readouterr()
            steps.fuse(Path(), **common, segments=(3,))
            assert "== aggregate.evaluate" not in capsys.readouterr().out
            return
    elif column == "path only":
        (here / "f.zarr").rename(here / "g.zarr")
        common["models"] = {"tsn": {"features": "g.zarr"}}
    segments = (6,) if column == "option" else (3,)
    cell = CELLS["kinetics700, skipped steps"][column]
    check(cell, lambda: steps.fuse(Path(), **common, segments=segments) and None, capsys)
    if cell.outcome == "said":
        capsys.readouterr()
        steps.fuse(Path(), **common, segments=segments)
        assert "== aggregate.evaluate" not in capsys.readouterr().out


# -- what reads a checkpoint only ----------------------------------------------------------------------------------

_NOT_READ = harmless("it reads a checkpoint and a video, no store or list")
CELLS["predict"] = dict.fromkeys(COLUMNS, _NOT_READ) | {
    "checkpoint replaced": refused(
        "holds its own backbone; drop it|are not those .* was trained on"
    ),
    "package version": refused("has version 99; this program reads 1 to 2"),
}
CELLS["export"] = CELLS["predict"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    return tuned(tmp_path_factory.mktemp("tuned"), "tsn")


def outputs(command: str, checkpoint: Path, folder: Path) -> Any:
    """The output of predict or export for a checkpoint. Opening a store or a listing would fail."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FeatureStore, "open", lambda *_: pytest.fail("a store was opened"))
        patch.setattr(
            "extract.listing.videos.list_videos", lambda *_, **__: pytest.fail("videos were listed")
        )
        if command == "predict":
            clip = sorted_clips("barbell")[0]
            file = folder / "answer.json"
            predict.main(predict.Options((clip,), checkpoint, segments=2, json=str(file)))
            return json.loads(file.read_text())["videos"]
        export.main(export.Options(checkpoint, folder / "model.onnx"))
        return (folder / "model.onnx").read_bytes()


@pytest.mark.parametrize("command", ["predict", "export"])
def test_predict_and_export_depend_on_the_checkpoint_alone(command, checkpoint, tmp_path):
    """They read the checkpoint through a link, and no store and no list. So all columns but those
    of the checkpoint are harmless."""
    if command == "export":
        trunk = load_trunk(tiny_backbones.CONVOLUTION, weights="random", seed=3)
        checkpoint = cached(tmp_path / "tiny", "tsn", trunk=trunk)
    link = tmp_path / "link.pt"
    link.symlink_to(checkpoint)
    made = outputs(command, link, tmp_path)
    if command == "predict":
        assert outputs(command, checkpoint, tmp_path) == made
    else:
        assert len(made) > 1000


@pytest.mark.parametrize("command", [predict, export])
def test_a_checkpoint_that_does_not_fit_is_refused(command, checkpoint, tmp_path):
    def run(path: Path, **more: Any) -> None:
        given = {"checkpoint": path, **more}
        given |= (
            {"videos": (sorted_clips("barbell")[0],)}
            if command is predict
            else {"out": tmp_path / "m.onnx"}
        )
        command.main(command.Options(**given))

    with pytest.raises(InputError, match="holds its own backbone; drop it"):
        run(checkpoint, weights=checkpoint)
    content = torch.load(checkpoint, weights_only=True)
    torch.save(content | {"version": 99}, tmp_path / "new.pt")
    with pytest.raises(InputError, match="has version 99; this program reads 1 to 2"):
        run(tmp_path / "new.pt")


# -- the report ----------------------------------------------------------------------------------------------------

CELLS["report"] = dict.fromkeys(COLUMNS, harmless("it shows what is there")) | {
    "store grown": harmless("a run's videos are those that it recorded"),
    "package version": said("schema 'hgnl-scores/9', expected 'hgnl-scores/1'"),
}


@pytest.mark.parametrize("column", COLUMNS)
def test_the_report_shows_what_is_there(column, here, monkeypatch, capsys):
    """Of a run it shows the recorded videos, of a store its current content. It names what does not
    fit."""
    # Drawing takes most of the time. tests/pipelines/test_report.py tests the figures.
    monkeypatch.setattr(
        "matplotlib.figure.Figure.savefig", lambda self, file, **_: file.write(b"<svg></svg>")
    )
    changed_store(here / "f.zarr", column)
    if column == "checkpoint replaced":
        shutil.copy("other/best.pt", "tsn/best.pt")
    elif column == "package version":
        content = Path("s.h5").read_bytes()
        Path("s.h5").write_bytes(content[512:].replace(b"hgnl-scores/1", b"hgnl-scores/9"))
    elif column == "path only":
        shutil.move(here, here.with_name("moved"))
        (here.parent / "here").symlink_to(here.with_name("moved"))
    assert report.main(report.Options(here, out=here / "report.html")) == 0
    errors = capsys.readouterr().err
    if column == "package version":
        assert re.search(CELLS["report"][column].text, errors)
    else:
        assert not errors
        assert "tsn" in (here / "report.html").read_text()


# -- a store that is checked and exported --------------------------------------------------------------------------

SCHEMA = "has the schema 'hgnl-features/99', which this version does not read"
CELLS["extract.verify"] = dict.fromkeys(COLUMNS, harmless("it checks what is stored")) | {
    "file replaced": said(r"replaced: a\.mp4 has [0-9,]+ bytes, [0-9,]+ were recorded"),
    "video removed or renamed": said(r"lost: a\.mp4 cannot be read below"),
    "package version": refused(SCHEMA),
}
CELLS["extract.export"] = dict.fromkeys(COLUMNS, harmless("it writes what is stored")) | {
    "option": refused("already exists and is left as it is"),
    "package version": refused(SCHEMA),
}


@pytest.fixture
def a_store(extracted, tmp_path, monkeypatch) -> Path:
    shutil.copytree(extracted, tmp_path / "here")
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "here"


def change_videos_or_store(column: str) -> None:
    if column == "file replaced":
        shutil.copy(sorted_clips("cable")[0], "clips/a.mp4")
    elif column == "video removed or renamed":
        Path("clips/a.mp4").unlink()
    elif column == "store re-made":
        shutil.rmtree("f.zarr")
        classes_store(Path("f.zarr"), videos=9)
    elif column == "package version":
        other_schema()
    elif column == "path only":
        Path("f.zarr").rename("g.zarr")
        Path("f.zarr").symlink_to("g.zarr")
    elif column in (
        "label, split, group or span corrected",
        "class added",
        "class order",
        "store grown",
    ):
        table = Path("clips/v.csv")
        rows = {"class added": "a.mp4,juggling", "store grown": "d.mp4,pull\na.mp4,push"}.get(
            column, "a.mp4,pull"
        )
        shutil.copy(sorted_clips("barbell")[8], "clips/d.mp4")
        table.write_text(table.read_text().replace("a.mp4,push", rows))
        Path("classes.txt").write_text("pull\npush\n")
        assert (
            extract(replace(EXTRACT, labels="classes.txt" if column == "class order" else "auto"))
            == 0
        )


def other_schema() -> None:
    attributes = json.loads(Path("f.zarr/zarr.json").read_text())
    attributes["attributes"]["schema"] = "hgnl-features/99"
    Path("f.zarr/zarr.json").write_text(json.dumps(attributes))


@pytest.mark.parametrize("column", COLUMNS)
def test_a_store_is_verified(column, a_store, capsys):
    change_videos_or_store(column)
    capsys.readouterr()
    cell = CELLS["extract.verify"][column]
    if column == "package version":
        with pytest.raises(InputError, match=cell.text):
            verify.main(verify.Options("f.zarr"))
        return
    found = verify.main(verify.Options("f.zarr", sources=True, root=Path("clips")))
    assert found == (cell.outcome == "said")
    assert re.search(cell.text if found else "0 damaged", capsys.readouterr().out)


@pytest.mark.parametrize("column", COLUMNS)
def test_a_store_is_exported(column, a_store, capsys):
    change_videos_or_store(column)
    if column == "option":
        Path("out").mkdir()
        Path("out/mine.npy").write_text("mine")
    command = lambda: export_features.main(export_features.Options("f.zarr", Path("out")))  # noqa: E731
    check(CELLS["extract.export"][column], command, capsys)
    if CELLS["extract.export"][column].outcome == "harmless":
        store = FeatureStore.open("f.zarr")
        assert sorted(
            path.relative_to("out").as_posix() for path in Path("out").rglob("*.npy")
        ) == sorted(f"{name}.npy" for name in store.ids[store.usable])


# -- the table -----------------------------------------------------------------------------------------------------


def test_the_table_in_contributing_says_the_same():
    """One line per row, one cell per column; the first word of each is its outcome."""
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    section = text[text.index("## What happens when something changes between two commands") :]
    lines = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in section.splitlines()
        if line[:1] == "|"
    ]
    assert lines[0][1:] == [*COLUMNS]
    table = {line[0]: dict(zip(COLUMNS, line[1:], strict=True)) for line in lines[2:]}
    outcome = {"refused": "refused", "said": "applied", "harmless": "harmless"}
    for row, cells in CELLS.items():
        for column, cell in cells.items():
            assert table[row][column].split(",")[0].split(":")[0] == outcome[cell.outcome], (
                row,
                column,
            )
