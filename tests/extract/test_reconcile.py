"""A store that is continued after its videos, its listing, its options or its files have
changed."""

import contextlib
import csv
import json
import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from extract import InputError, RunError
from extract.__main__ import Options, main
from extract.export import Options as ExportOptions
from extract.export import main as export
from extract.listing.videos import Video
from extract.sources import END_BYTES, UNKNOWN, file_of, read_source
from extract.store import DROPPED, FAILED, OK, PENDING, FeatureStore, RunLog, lock_store
from extract.store.corrections import complete_correction, correct
from extract.store.damage import damaged_columns
from extract.store.layout import store_attributes
from extract.verify import Options as VerifyOptions
from extract.verify import main as verify
from extract.workers.reconcile import append_new, merge_classes
from extract.workers.worker import Worker
from extractions import command, options
from stores import classes_store, store_digest

CLIPS = Path(__file__).parents[2] / "pipelines" / "clips" / "exercise_mini" / "clips"
TABLE = (
    ("a.mp4", "push", "train"),
    ("b.mp4", "pull", "train"),
    ("c.mp4", "push", "val"),
    ("d.mp4", "pull", "test"),
)


def write_table(folder: Path, rows=TABLE, columns=("path", "label", "split")) -> Path:
    with (folder / "videos.csv").open("w", newline="") as file:
        csv.writer(file).writerows([columns, *rows])
    return folder / "videos.csv"


@pytest.fixture(scope="module")
def extracted(tmp_path_factory) -> Path:
    """A folder with four clips, their CSV, and their store."""
    here = tmp_path_factory.mktemp("extracted")
    (here / "clips").mkdir()
    for name, clip in zip("abcd", sorted((CLIPS / "barbell").glob("*.mp4")), strict=False):
        shutil.copy(clip, here / "clips" / f"{name}.mp4")
    assert main(options(write_table(here / "clips"), here / "f.zarr")) == 0
    return here


@pytest.fixture
def here(extracted, tmp_path, monkeypatch) -> Path:
    shutil.copytree(extracted, tmp_path / "here")  # with modification times
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "here"


@pytest.fixture
def nothing_is_decoded(monkeypatch):
    monkeypatch.setattr(Worker, "extract", lambda *_: pytest.fail("a video was decoded"))


def again(here: Path, **changed) -> int:
    return main(options(here / "clips" / "videos.csv", here / "f.zarr", **changed))


def opened(here: Path) -> FeatureStore:
    return FeatureStore.open(here / "f.zarr")


# -- corrections ---------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("nothing_is_decoded")
def test_labels_splits_and_groups_are_corrected_without_decoding(here, capsys):
    rows = [
        ("a.mp4", "pull", "train", "s1"),
        ("b.mp4", "jump", "test", "s1"),
        *[(*row, "s2") for row in TABLE[2:]],
    ]
    write_table(here / "clips", rows, ("path", "label", "split", "group"))
    features = opened(here).read(slice(0, 4))
    assert again(here) == 0
    said = capsys.readouterr().out
    assert (
        "corrected 2 labels, 1 splits, 4 groups (a.mp4: push -> pull; b.mp4: pull -> jump; b.mp4: "
        in said
    )
    assert "classes   3 now: 1 new (jump)" in said
    store = opened(here)
    assert store.classes == ("jump", "pull", "push")
    assert [store.classes[label] for label in store.labels] == ["pull", "jump", "push", "pull"]
    assert store.splits.tolist() == ["train", "test", "val", "test"]
    assert store.groups.tolist() == ["s1", "s1", "s2", "s2"]
    np.testing.assert_array_equal(store.read(slice(0, 4)), features)
    assert not damaged_columns(store)
    assert again(here) == 0
    assert "corrected" not in capsys.readouterr().out


def test_a_corrected_store_is_the_store_of_the_corrected_listing(here):
    write_table(here / "clips", [("a.mp4", "lift", "val"), ("b.mp4", "pull", "train"), *TABLE[2:]])
    assert again(here) == 0
    assert main(options(here / "clips" / "videos.csv", here / "fresh.zarr")) == 0
    assert store_digest(here / "f.zarr") == store_digest(here / "fresh.zarr")


@pytest.mark.usefixtures("nothing_is_decoded")
def test_labels_that_come_after_extraction(here, capsys):
    shutil.rmtree(here / "f.zarr")
    write_table(here / "clips", [(name, "", "") for name, _, _ in TABLE])
    store = FeatureStore.create(
        here / "f.zarr", ids=[name for name, _, _ in TABLE], classes=[], views=["center"], frames=3, dim=4,
        block_size=2, provenance={"precision": "fp32"},
    )  # fmt: skip
    correct_labels(store, here)
    assert opened(here).classes == ("pull", "push")
    assert opened(here).labels.tolist() == [1, 0, 1, 0]
    # A listing without labels does not erase them.
    write_table(here / "clips", [(name, "", "") for name, _, _ in TABLE])
    correct_labels(FeatureStore.open(here / "f.zarr", writable=True), here, TABLE=None)
    assert opened(here).labels.tolist() == [1, 0, 1, 0]
    assert (
        "kept      4 labels, 4 splits of the store, which the listing does not name"
        in capsys.readouterr().out
    )


def correct_labels(store: FeatureStore, here: Path, TABLE=TABLE) -> None:
    from extract.listing.videos import list_videos
    from extract.workers.reconcile import correct_rows

    if TABLE:
        write_table(here / "clips", TABLE)
    listing = list_videos(here / "clips" / "videos.csv")
    rows = {name: row for row, name in enumerate(store.ids.tolist())}
    correct_rows(store, [(rows[video.id], video) for video in listing.videos], listing.classes)


@pytest.mark.parametrize(
    ("stored", "listed", "before", "after", "merged"),
    [
        (["a", "b"], ["b", "a"], "ab", "ab", ["b", "a"]),  # the listing knows all: its order
        (["a", "b"], ["a", "b", "c"], "ab", "abc", ["a", "b", "c"]),
        (["b", "c"], ["a"], "bc", "abc", ["b", "c", "a"]),  # a part of the videos is listed
        (["a", "typo"], ["a", "b"], ["a", "typo"], "ab", ["a", "b"]),  # a class without videos
        (
            ["a", "b", "empty"],
            ["a"],
            "ab",
            "ab",
            ["a", "b", "empty"],
        ),  # never had one: a list of classes
        (["a", "b"], [], "ab", "ab", ["a", "b"]),
        ([], ["a"], [""], "a", ["a"]),
    ],
)
def test_classes_of_a_store_and_a_listing(stored, listed, before, after, merged):
    assert list(merge_classes(stored, listed, set(before), set(after))) == merged


def test_a_correction_that_is_killed_is_seen_whole_or_not_at_all(tmp_path, monkeypatch):
    """At every step of writing, readers see all of the old or all of the new, and the next run
    completes it."""
    classes_store(tmp_path / "f.zarr", videos=9)
    old = FeatureStore.open(tmp_path / "f.zarr")
    before = [*map(str, old.classes)], old.labels.tolist(), old.splits.tolist()
    labels = np.array([(label + 1) % 3 for label in old.labels], "<i4")
    after = ["z", "y", "x"], labels.tolist(), ["test"] * 9

    class Killed(BaseException):
        pass

    from extract import durable

    real, steps, seen = os.replace, 0, []
    while True:
        shutil.copytree(tmp_path / "f.zarr", tmp_path / "cut.zarr")
        left = [steps]

        def replace(*paths, left=left):
            left[0] -= 1
            if left[0] < 0:
                raise Killed
            return real(*paths)

        with monkeypatch.context() as patch:
            patch.setattr(durable.os, "replace", replace)
            try:
                store = FeatureStore.open(tmp_path / "cut.zarr", writable=True)
                correct(store, after[0], {"labels": labels, "splits": np.array(after[2], object)})
                ended = True
            except Killed:
                ended = False
        reader = FeatureStore.open(tmp_path / "cut.zarr")
        state = [*reader.classes], reader.labels.tolist(), reader.splits.tolist()
        assert state in (before, after)
        seen.append(state == after)
        writer = FeatureStore.open(tmp_path / "cut.zarr", writable=True)
        complete_correction(writer)
        final = FeatureStore.open(tmp_path / "cut.zarr")
        assert ([*final.classes], final.labels.tolist(), final.splits.tolist()) == state
        assert not (tmp_path / "cut.zarr" / "correction.json").exists()
        shutil.rmtree(tmp_path / "cut.zarr")
        if ended:
            break
        steps += 1
    assert seen[0] is False
    assert seen[-1] is True
    assert len(seen) >= 4


def test_a_reader_that_was_opened_before_a_correction_does_not_mix(tmp_path):
    classes_store(tmp_path / "f.zarr", videos=9)
    reader = FeatureStore.open(tmp_path / "f.zarr")
    writer = FeatureStore.open(tmp_path / "f.zarr", writable=True)
    correct(writer, ["x", *writer.classes], {"labels": writer.labels + 1})
    with pytest.raises(RunError, match="its classes were corrected meanwhile"):
        _ = reader.labels


def test_a_damaged_correction_is_named(tmp_path):
    classes_store(tmp_path / "f.zarr", videos=9)
    (tmp_path / "f.zarr" / "correction.json").write_text(
        '{"classes": ["a"], "columns": {}, "checksum": "0"}'
    )
    with pytest.raises(InputError, match=r"correction\.json is damaged"):
        FeatureStore.open(tmp_path / "f.zarr")


# -- settings ------------------------------------------------------------------------------------------------------


def test_settings_are_taken_from_the_store(here, capsys):
    assert main(Options(here / "clips" / "videos.csv", str(here / "f.zarr"))) == 0
    said = capsys.readouterr().out
    assert "--backbone test_resnet" in said
    assert "--frames 3" in said
    assert "--weights random" in said
    assert "4 done before" in said


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"backbone": "resnet18"}, "backbone: test_resnet in the store, resnet18 now"),
        ({"weights": "pretrained"}, "weights: random weights, seed 0 in the store, pretrained now"),
        ({"crops": 3}, "crops: 1 in the store, 3 now"),
        ({"block_size": 5}, "block_size: 2 in the store, 5 now"),
        ({"decoder": "decord"}, "decoder: pyav in the store, decord now"),
        ({"window": 2.0}, "window: None in the store, 2.0 now"),
        ({"fps": 4.0}, "window: None in the store, 0.75 now"),
        ({"precision": "bf16"}, "precision: fp32 in the store, bf16 now"),
    ],
)
def test_a_setting_that_differs_is_refused_before_weights_are_loaded(
    here, changed, message, monkeypatch
):
    monkeypatch.setattr(Worker, "describe", lambda _: pytest.fail("a backbone was loaded"))
    before = store_digest(here / "f.zarr")
    with pytest.raises(InputError, match=message):
        again(here, **changed)
    assert store_digest(here / "f.zarr") == before


@pytest.mark.parametrize(
    ("part", "name", "value"),
    [
        ("decoder", "version", "0.1"),
        ("preprocessing", "resize", 999),
        ("preprocessing", "interpolation", "box"),
    ],
)
def test_what_only_the_loaded_backbone_tells_is_compared_too(part, name, value, here):
    store = FeatureStore.open(here / "f.zarr", writable=True)
    provenance = store.provenance | {part: store.provenance[part] | {name: value}}
    store.group.attrs.put(store_attributes(store.classes, provenance))
    before = store_digest(here / "f.zarr")
    with pytest.raises(InputError, match=rf"{part}\.{name}: {value} in the store, .* now"):
        again(here)
    assert store_digest(here / "f.zarr") == before


def test_weights_in_a_file_are_found_again_or_asked_for(here, capsys):
    import timm
    import torch

    module = timm.create_model("test_resnet", num_classes=0)
    torch.save(module.state_dict(), here / "w.pth")
    table = here / "clips" / "videos.csv"
    assert main(options(table, here / "w.zarr", weights="w.pth")) == 0
    assert main(Options(table, str(here / "w.zarr"))) == 0
    assert f"--weights {here / 'w.pth'}" in capsys.readouterr().out
    torch.save(timm.create_model("test_resnet", num_classes=0).state_dict(), here / "w.pth")
    with pytest.raises(
        InputError, match=r"made with the weights w\.pth \(SHA-256 .*give them with --weights FILE"
    ):
        main(Options(table, str(here / "w.zarr")))
    with pytest.raises(InputError, match=r"weights\.sha256: [0-9a-f]+ in the store, [0-9a-f]+ now"):
        main(Options(table, str(here / "w.zarr"), weights="w.pth"))


def test_features_made_elsewhere_are_not_continued(here):
    classes_store(here / "arrays.zarr", videos=9)
    before = store_digest(here / "arrays.zarr")
    with pytest.raises(
        InputError,
        match=r"made elsewhere \(FeatureStore\.from_arrays\); `extract` cannot continue it",
    ):
        main(options(here / "clips" / "videos.csv", here / "arrays.zarr"))
    assert store_digest(here / "arrays.zarr") == before


# -- files that were replaced --------------------------------------------------------------------------------------


def test_a_source_is_its_size_and_both_ends(tmp_path):
    path = tmp_path / "a.mp4"
    sources = set()
    content = bytearray(3 * END_BYTES)
    for place in (0, END_BYTES - 1, 2 * END_BYTES, 3 * END_BYTES - 1):
        changed = bytearray(content)
        changed[place] = 1
        path.write_bytes(changed)
        sources.add(read_source(path)[:2])
    path.write_bytes(content)
    assert read_source(path)[:2] not in sources
    assert len(sources) == 4
    assert read_source(path).size == 3 * END_BYTES
    path.write_bytes(b"x")
    assert read_source(path).size == 1
    os.mkfifo(tmp_path / "pipe.mp4")
    assert read_source(tmp_path / "pipe.mp4") == read_source(tmp_path / "none.mp4") == UNKNOWN
    assert file_of("a.mp4#0-1000") == file_of("a.mp4") == "a.mp4"
    assert file_of("a#b.mp4") == "a#b.mp4"


def test_a_replaced_video_is_named_and_extracted_again_when_asked(here, capsys):
    before = opened(here).read(slice(0, 4))
    shutil.copy(sorted((CLIPS / "cable").glob("*.mp4"))[0], here / "clips" / "b.mp4")
    assert again(here) == 0
    said = capsys.readouterr().out
    assert "replaced  files are not those that were extracted: 1 (b.mp4)" in said
    assert "--retry-changed extracts them again" in said
    assert verify(VerifyOptions(str(here / "f.zarr"), sources=True)) == 1
    assert "replaced: b.mp4 has " in capsys.readouterr().out
    assert again(here, retry_changed=True) == 0
    after = opened(here).read(slice(0, 4))
    assert (after[1] != before[1]).any()
    np.testing.assert_array_equal(after[[0, 2, 3]], before[[0, 2, 3]])
    assert again(here) == 0
    assert (
        "replaced  files"
        not in capsys.readouterr().out.split("extracted again")[-1].split("done before")[-1]
    )
    assert verify(VerifyOptions(str(here / "f.zarr"), sources=True)) == 0


def test_a_file_of_the_same_size_is_told_by_its_content_and_read_once(here, capsys, monkeypatch):
    path = here / "clips" / "a.mp4"
    os.utime(path, (1, 1))  # as in a copy of the folder
    assert again(here) == 0
    assert "replaced" not in capsys.readouterr().out
    with monkeypatch.context() as patch:
        patch.setattr(
            "extract.workers.changed.read_source", lambda path: pytest.fail(f"{path} is read again")
        )
        assert again(here) == 0
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    assert again(here) == 0
    assert "not those that were extracted: 1 (a.mp4)" in capsys.readouterr().out


def test_a_copy_of_the_folder_gives_the_same_bytes(here):
    shutil.copytree(here / "clips", here / "copy", copy_function=shutil.copyfile)
    assert main(options(here / "copy" / "videos.csv", here / "g.zarr")) == 0
    assert store_digest(here / "f.zarr") == store_digest(here / "g.zarr")


def test_lost_sources_are_named_by_verify(here, capsys):
    assert again(here) == 0  # the log names this folder
    (here / "clips" / "c.mp4").unlink()
    assert verify(VerifyOptions(str(here / "f.zarr"), sources=True)) == 1
    assert "lost: c.mp4 cannot be read below" in capsys.readouterr().out
    RunLog.path(here / "f.zarr").unlink()
    with pytest.raises(InputError, match="give the folder of the videos with --root"):
        verify(VerifyOptions(str(here / "f.zarr"), sources=True))
    assert verify(VerifyOptions(str(here / "f.zarr"), sources=True, root=here / "clips")) == 1


# -- videos that are no longer listed ------------------------------------------------------------------------------


def test_unlisted_videos_are_named_and_taken_out_when_asked_until_they_are_listed_again(
    here, capsys
):
    whole = store_digest(here / "f.zarr")
    write_table(here / "clips", TABLE[1:])
    assert again(here) == 0
    said = capsys.readouterr().out
    assert "unlisted  1 videos of the store are no longer listed (a.mp4)" in said
    assert "1 are still trained on and scored; --drop-unlisted takes them out" in said
    assert opened(here).listed.all()
    assert again(here, drop_unlisted=True) == 0
    store = opened(here)
    assert store.listed.tolist() == [False, True, True, True]
    assert store.usable.tolist() == [False, True, True, True]
    assert "no longer listed" in capsys.readouterr().out.split("to do")[-1]  # a column of the table
    assert again(here) == 0  # it survives a run without the option
    assert opened(here).status[0] == OK + DROPPED
    assert verify(VerifyOptions(str(here / "f.zarr"))) == 0
    write_table(here / "clips", TABLE)
    assert again(here) == 0
    assert "again     1 videos are listed again (a.mp4)" in capsys.readouterr().out
    assert store_digest(here / "f.zarr") == whole


def test_labels_of_new_rows_go_by_the_names_of_classes(tmp_path):
    classes_store(tmp_path / "f.zarr", videos=9)
    store = FeatureStore.open(tmp_path / "f.zarr", writable=True)
    new = [Video(f"new/{label}.mp4", "", label) for label in (0, 1, -1)]
    append_new(store, new, ["class 2", "class 0"])
    names = [*store.classes, ""]
    assert [names[label] for label in store.labels[9:]] == ["class 2", "class 0", ""]


def test_no_row_that_was_taken_out_is_listed(tmp_path):
    classes_store(tmp_path / "f.zarr", videos=9)
    store = FeatureStore.open(tmp_path / "f.zarr", writable=True)
    store.set_status(np.arange(8), np.array([s + d for d in (0, DROPPED) for s in range(4)]))
    assert store.listed.tolist() == [True] * 4 + [False] * 4 + [True]
    assert store.usable.tolist() == [False, True, True, False] + [False] * 4 + [True]


def test_readers_leave_out_what_was_dropped(tmp_path):
    from aggregate.ablation.folds import rows_of
    from aggregate.ablation.options import FoldOptions
    from aggregate.evaluate import rows_to_score
    from aggregate.training.options import SplitOptions
    from aggregate.training.splits import choose_rows

    classes_store(tmp_path / "f.zarr")
    store = FeatureStore.open(tmp_path / "f.zarr", writable=True)
    train, val, _ = choose_rows(store, SplitOptions(), 0)
    dropped = np.array([train[0], val[0]])
    store.set_status(dropped, store.status[dropped] + DROPPED)
    again_train, again_val, _ = choose_rows(store, SplitOptions(), 0)
    np.testing.assert_array_equal(again_train, train[1:])
    np.testing.assert_array_equal(again_val, val[1:])
    assert not set(dropped) & set(rows_of(store, FoldOptions()).tolist())
    assert callable(rows_to_score)


def test_a_pending_video_that_is_gone_fails_by_name_and_the_rest_goes_on(here, capsys):
    """Such a row blocked a store forever: it waited for a file that was deleted."""
    features = opened(here).read(slice(0, 4))
    FeatureStore.open(here / "f.zarr", writable=True).set_status(np.arange(4), PENDING)
    write_table(here / "clips", [TABLE[0], TABLE[2], TABLE[3]])
    assert again(here, max_failed=0.5) == 0
    store = opened(here)
    assert store.status.tolist() == [OK, FAILED, OK, OK]
    assert store.errors[1] == "no longer listed"
    assert again(here, max_failed=0.5, retry_failed=True) == 0  # there is nothing to try
    assert opened(here).status.tolist() == [OK, FAILED, OK, OK]
    assert not store.read(np.array([1])).any()
    np.testing.assert_array_equal(store.read(np.array([0, 2, 3])), features[[0, 2, 3]])
    assert verify(VerifyOptions(str(here / "f.zarr"))) == 0
    write_table(here / "clips")
    assert again(here) == 0
    assert "again     1 videos are listed again (b.mp4)" in capsys.readouterr().out
    np.testing.assert_array_equal(opened(here).read(slice(0, 4)), features)


def test_a_listed_video_without_a_file_fails_with_that_reason(here):
    FeatureStore.open(here / "f.zarr", writable=True).set_status(np.arange(4), PENDING)
    (here / "clips" / "b.mp4").rename(here / "b.mp4")
    assert again(here, max_failed=0.5, drop_unlisted=True) == 0
    assert opened(here).errors[1] == "listed, but its file is missing"
    assert opened(here).listed.all()
    (here / "b.mp4").rename(here / "clips" / "b.mp4")
    assert again(here) == 0
    assert opened(here).status.tolist() == [OK] * 4


def test_rows_beyond_a_limit_stay_pending(here, capsys):
    FeatureStore.open(here / "f.zarr", writable=True).set_status(np.arange(4), PENDING)
    assert again(here, limit=2, drop_unlisted=True) == 0
    assert opened(here).status.tolist() == [OK, OK, PENDING, PENDING]
    assert (
        "to do     2 videos (6 frames) in 1 blocks, 0 done before, 2 beyond --limit"
        in capsys.readouterr().out
    )
    assert again(here) == 0
    assert opened(here).status.tolist() == [OK] * 4


def test_windows_beyond_a_limit_are_not_unlisted(here, capsys):
    flat, out = here / "flat", here / "w.zarr"
    shutil.copytree(here / "clips", flat)
    (flat / "videos.csv").unlink()
    assert main(options(flat, out, window=1.0)) == 0
    before = FeatureStore.open(out).status.tolist()
    assert main(options(flat, out, limit=1, drop_unlisted=True)) == 0
    assert FeatureStore.open(out).status.tolist() == before
    (flat / "d.mp4").unlink()
    assert main(options(flat, out, drop_unlisted=True)) == 0
    store = FeatureStore.open(out)
    assert {file_of(name) for name in store.ids[~store.listed]} == {"d.mp4"}


# -- damage, locks, logs, ids --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["ids", "labels", "splits", "groups", "errors", "frame_indices", "sources", "ends"]
)
def test_a_lost_chunk_is_damage_for_verify_and_for_every_reader(name, here, capsys):
    chunks = [path for path in (here / "f.zarr" / name).iterdir() if path.name != "zarr.json"]
    assert len(chunks) == 1
    chunks[0].unlink()
    with pytest.raises(
        InputError,
        match=rf"f\.zarr is not complete: {name}/c\.0.* is missing; copy the store again",
    ):
        getattr(opened(here), name)
    assert verify(VerifyOptions(str(here / "f.zarr"))) == 1
    assert f"{name}/c.0" in capsys.readouterr().out


def test_a_lost_chunk_of_status_is_damage_and_reads_as_pending(here, capsys):
    (here / "f.zarr" / "status" / "c.0").unlink()
    assert verify(VerifyOptions(str(here / "f.zarr"))) == 1
    assert "status/c.0 is missing, although features of its rows exist" in capsys.readouterr().out
    assert again(here) == 0
    assert verify(VerifyOptions(str(here / "f.zarr"))) == 0


def test_every_flipped_byte_of_the_columns_is_found(here):
    for name in ("labels", "splits", "frame_indices", "status", "num_frames"):
        path = next(path for path in (here / "f.zarr" / name).iterdir() if path.name != "zarr.json")
        good, values = path.read_bytes(), getattr(opened(here), name)
        for place in range(0, len(good), 3):
            path.write_bytes(good[:place] + bytes([good[place] ^ 0x10]) + good[place + 1 :])
            try:
                np.testing.assert_array_equal(
                    getattr(opened(here), name), values
                )  # a bit that means nothing
            except InputError:
                assert verify(VerifyOptions(str(here / "f.zarr"))) == 1
        path.write_bytes(good)


def test_a_lost_shard_is_not_exported_as_zeros(here):
    opened(here).shard_path(1).unlink()
    with pytest.raises(RunError, match=r"c\.1\.0\.0\.0 is missing"):
        export(ExportOptions(store=str(here / "f.zarr"), to=here / "npy"))
    assert not (here / "npy").exists()


def test_a_shard_of_fewer_videos_than_are_finished_is_not_read(here):
    store = FeatureStore.open(here / "f.zarr", writable=True)
    features = store.read(slice(2, 3))
    short = FeatureStore.create(
        here / "short.zarr", ids=["x", "y", "z"], classes=[], views=["center"], frames=3, dim=store.dim,
        block_size=2, provenance={},
    )  # fmt: skip
    short.write_block(1, features)
    shutil.copy(short.shard_path(1), store.shard_path(1))
    with pytest.raises(RunError, match="holds 1 videos, 2 are finished"):
        opened(here).gather(np.array([3]), np.array([0]))


def test_a_store_behind_a_link_is_continued_and_locked_by_any_name(here, capsys):
    (here / "link.zarr").symlink_to(here / "f.zarr")
    opened(here)
    FeatureStore.open(here / "f.zarr", writable=True).set_status(np.arange(2), PENDING)
    assert main(options(here / "clips" / "videos.csv", here / "link.zarr")) == 0
    assert f"link.zarr is a link to {here}/f.zarr" in capsys.readouterr().out
    assert not (here / "link.zarr.log").exists()
    assert opened(here).status.tolist() == [OK] * 4
    before = store_digest(here / "f.zarr")
    with lock_store(here / "f.zarr"), pytest.raises(RunError, match="is being written by process"):
        main(options(here / "clips" / "videos.csv", here / "link.zarr"))
    with (
        lock_store(here / "link.zarr"),
        pytest.raises(RunError, match="is being written by process"),
    ):
        again(here)
    assert store_digest(here / "f.zarr") == before


class LostLock:
    """A lock that is held for some calls of `ensure_held` and then lost, as a lease on object
    storage may be."""

    def __init__(self, calls: int):
        self._calls = calls

    def ensure_held(self) -> None:
        self._calls -= 1
        if self._calls < 0:
            raise RunError("another run has taken the store")


@pytest.mark.parametrize("calls", [0, 1])
def test_a_run_that_lost_the_store_writes_nothing_into_it(calls, here, monkeypatch):
    """It writes neither a correction nor extracted rows."""
    write_table(here / "clips", [("a.mp4", "pull", "train"), *TABLE[1:]] if not calls else TABLE)
    FeatureStore.open(here / "f.zarr", writable=True).set_status(np.arange(2), PENDING)
    before = store_digest(here / "f.zarr")
    monkeypatch.setattr(
        "extract.workers.driver.lock_store", lambda _: contextlib.nullcontext(LostLock(calls))
    )
    with pytest.raises(RunError, match="another run has taken the store"):
        again(here)
    assert store_digest(here / "f.zarr") == before


def test_a_cut_last_line_of_the_log_does_no_harm(here):
    log = RunLog.path(here / "f.zarr")
    log.write_bytes(log.read_bytes() + b'[1, 2]\n7\n"start"\n{"event": 3}\n{"event": "blo')
    FeatureStore.open(here / "f.zarr", writable=True).set_status(np.arange(4), PENDING)
    assert again(here) == 0
    assert all(isinstance(record, dict) for record in RunLog.records(here / "f.zarr"))
    assert json.loads(log.read_text().splitlines()[-1])["event"] == "end"
    log.write_bytes(b'{"event": "block", "frames": 3}\n\xff\xfe\n')
    from extract.status import Options as StatusOptions
    from extract.status import main as status

    assert not status(StatusOptions(str(here / "f.zarr")))


@pytest.mark.parametrize(
    "unsafe",
    [
        "../a.mp4",
        "a/../../b",
        "/etc/a",
        "..",
        ".",
        "",
        "a//b",
        "a/",
        "./a",
        "C:\\a",
        "c:/a",
        "..\\a",
        "\\\\host\\a",
        "a\0b",
    ],
)
def test_ids_that_leave_the_folder_are_refused(unsafe, tmp_path):
    columns = {"lengths": [1], "labels": [0], "classes": ["a"]}
    with pytest.raises(InputError, match="not paths below a folder"):
        FeatureStore.from_arrays(tmp_path / "f.zarr", np.zeros((1, 1, 2)), ids=[unsafe], **columns)
    assert not (tmp_path / "f.zarr").exists()
    FeatureStore.from_arrays(
        tmp_path / "f.zarr", np.zeros((1, 1, 2)), ids=["a..b/..c/d:e"], **columns
    )
    store = FeatureStore.open(tmp_path / "f.zarr", writable=True)
    with pytest.raises(InputError, match="not paths below a folder"):
        store.append(ids=[unsafe])
    if unsafe.strip("\0") and "\0" not in unsafe:  # Zarr stores neither
        store.array("ids")[:] = np.array([unsafe], object)  # written by another program
        for to in (
            {"to": tmp_path / "npy"},
            {"to": tmp_path / "e.h5"},
            {"to": Path("npy"), "out": tmp_path / "d"},
        ):
            with pytest.raises(InputError, match="not paths below a folder"):
                export(ExportOptions(store=str(tmp_path / "f.zarr"), **to))


def test_of_two_corrections_at_once_one_is_refused(here):
    write_table(here / "clips", [("a.mp4", "pull", "train"), *TABLE[1:]])
    words = command("clips/videos.csv", "f.zarr")
    runs = [
        subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        for _ in range(2)
    ]
    ended = sorted((run.wait(), run.communicate()[0]) for run in runs)
    assert ended[0][0] == 0
    assert ended[1][0] == 0 or "is being written by process" in ended[1][1]
    assert sum("corrected 1 labels" in text for _, text in ended) == 1
    assert opened(here).classes == ("pull", "push")
