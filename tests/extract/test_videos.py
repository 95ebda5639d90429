"""Listings of sources: folders in every layout, CSVs with every header, single files; everything
that is left out is named."""

import csv
import errno
import gc
import hashlib
import os
import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from extract import InputError
from extract.listing.folders import VIDEO_EXTENSIONS, scan
from extract.listing.labels import kinetics700_labels, spellings
from extract.listing.leaks import describe_leaks
from extract.listing.tables import Row
from extract.listing.videos import (
    Listing,
    Video,
    list_videos,
    shared_youtube_ids,
    youtube_id,
)
from listings import labeled, touch, write

# Rows of the four kinds of CSV that Kinetics comes with, header and quoting as they are.
K700_VALIDATE = (
    b"label,youtube_id,time_start,time_end,split\r\nabseiling,OMK0OJ4f_TI,0,10,validate\r\n"
    b"acting in play,4E53JZXxxhU,94,104,validate\r\nmassaging person's head,jJxxABipmmU,64,74,validate\r\n"
)
K400_VAL = (
    b"label,youtube_id,time_start,time_end,split,is_cc\nlunge,g-XXUD65DyI,3,13,val,0\n"
    b'"balloon blowing",BJlHsunMcME,296,306,val,0\n'
)
K600_VAL = (
    b"label,youtube_id,time_start,time_end,split\nacting in play,-u8W9n8IOks,11,21,val\n"
    b"adjusting glasses,-5ZUl3Z5yW0,0,10,val\n"
)
K600_TEST = (
    b"youtube_id,time_start,time_end,split\numKmQmKT5WA,41,51,test\nvNOfR6tsnUY,199,209,test\n"
)

CLIPS = (  # split, label, clip: the classes whose folders torchvision's names would sort differently
    ("train", "curling (sport)", "-aaaaaaaaaa_000000_000010.mp4"),
    ("train", "curling eyelashes", "b_b_b_b_b_b_000001_000011.mp4"),
    ("train", "hugging (not baby)", "ccccccccccc_000100_000110.mp4"),
    ("val", "hugging baby", "-_-_-_-_-_-_001000_001010.mp4"),
    ("val", "massaging person's head", "eeeeeeeeeee_000002_000012.mp4"),
)


def ids(listing: Listing) -> list[str]:
    return [video.id for video in listing.videos]


def underscored(label: str) -> str:
    return label.replace(" ", "_")


def without_marks(label: str) -> str:
    return re.sub(r"['()]", "", underscored(label))


def kinetics_csv(path: Path, clips=CLIPS) -> Path:
    lines = ["label,youtube_id,time_start,time_end,split"]
    for split, label, clip in clips:
        lines.append(f"{label},{clip[:11]},{int(clip[12:18])},{int(clip[19:25])},{split}")
    return write(path, "\n".join(lines) + "\n")


# -- labels ----------------------------------------------------------------------------------------------------


def test_the_kinetics_700_list_is_the_one_everybody_has():
    labels = kinetics700_labels()
    assert hashlib.sha256(("\n".join(labels) + "\n").encode()).hexdigest() == (
        "2f265d35aa76060219f7e83aff12f5aaba9d1fe27360aa83f11aad7a3648fc51"
    )
    assert list(labels) == sorted(labels)


def test_no_two_kinetics_labels_share_a_spelling():
    assert sum(len(spellings(label)) for label in kinetics700_labels()) == len(
        set().union(*map(spellings, kinetics700_labels()))
    )


def test_auto_takes_the_sorted_names_and_says_why_not_kinetics(tmp_path):
    touch(tmp_path, "zumba/a.mp4", "abseilling/b.mp4", "yoga/c.mp4", "archery/d.mp4")
    listing = list_videos(tmp_path)
    assert listing.classes == ("abseilling", "archery", "yoga", "zumba")
    assert [video.label for video in listing.videos] == [0, 1, 2, 3]
    assert (
        "sorted names (1 are not in the Kinetics-700 list: 'abseilling' (nearest: 'abseiling'))"
        in listing.report()
    )


def test_forced_kinetics_names_what_is_not_in_it_and_the_nearest(tmp_path):
    touch(tmp_path, "abseilling/b.mp4", "yoga/c.mp4", "qqqq/d.mp4")
    with pytest.raises(
        InputError, match=r"2 of 3 names .* 'abseilling' \(nearest: 'abseiling'\), 'qqqq'$"
    ):
        list_videos(tmp_path, labels="kinetics700")


def test_labels_of_a_file_give_the_indices_in_any_spelling(tmp_path):
    labels = write(tmp_path / "labels.txt", "﻿walk the dog\r\nit's (art)\r\nabsent\r\n")
    touch(tmp_path / "data", "walk_the_dog/a.mp4", "its_art/b.mp4", "it's (art)/c.mp4")
    listing = list_videos(tmp_path / "data", labels=labels)
    assert listing.classes == ("walk the dog", "it's (art)", "absent")
    assert labeled(listing) == {
        "walk_the_dog/a.mp4": "walk the dog",
        "its_art/b.mp4": "it's (art)",
        "it's (art)/c.mp4": "it's (art)",
    }
    assert "classes without a video: 1 (absent)" in listing.report()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"a\n\nb\n", "line 2 is empty"),
        (b"", "line 1 is empty"),
        (b"a\nb\na\n", "names 'a' twice, in lines 1 and 3"),
        (b"\xff\xfe", r"labels\.txt is not UTF-8"),
        (b"a b\na_b\n", "'a b' and 'a_b' cannot be told apart: both may be written 'a_b'"),
        (b"b\n", "1 of 1 names are not in the labels of .*labels.txt: 'a'"),
    ],
)
def test_labels_that_cannot_be_meant(tmp_path, content, message):
    touch(tmp_path, "data/a/x.mp4")
    with pytest.raises(InputError, match=message):
        list_videos(tmp_path / "data", labels=write(tmp_path / "labels.txt", content))


def test_an_unknown_choice_of_labels_is_answered_with_the_known(tmp_path):
    with pytest.raises(
        InputError, match="kinetics800: there is no such file; expected auto, kinetics700"
    ):
        list_videos(touch(tmp_path, "a/x.mp4"), labels="kinetics800")


def test_two_spellings_of_one_class_in_folders_are_an_error(tmp_path):
    touch(tmp_path, "train/my class/x.mp4", "val/my_class/y.mp4")
    with pytest.raises(InputError, match="'my class' and 'my_class' cannot be told apart"):
        list_videos(tmp_path)


def test_auto_takes_kinetics_only_if_the_listing_looks_like_it(tmp_path):
    own = list_videos(touch(tmp_path / "own", "crying/1.mp4", "laughing/2.mp4", "yawning/3.mp4"))
    assert own.classes == ("crying", "laughing", "yawning")
    assert (
        "they are classes of Kinetics-700 too: --labels kinetics700 takes all 700" in own.report()
    )
    clips = list_videos(touch(tmp_path / "clips", "yawning/aaaaaaaaaaa_000000_000010.mp4"))
    assert clips.classes == kinetics700_labels()
    most = list_videos(
        touch(tmp_path / "most", *(f"{name}/1.mp4" for name in kinetics700_labels()[:351]))
    )
    assert most.classes == kinetics700_labels()


def test_integers_sort_as_integers(tmp_path):
    touch(tmp_path, *(f"{number}.mp4" for number in range(12)))
    table = "path,label\n" + "".join(f"{number}.mp4,{number}\n" for number in reversed(range(12)))
    listing = list_videos(write(tmp_path / "l.csv", table))
    assert listing.classes == tuple(map(str, range(12)))
    assert all(video.id == f"{video.label}.mp4" for video in listing.videos)
    with_holes = list_videos(write(tmp_path / "h.csv", "path,label\n1.mp4,10\n2.mp4,9\n"))
    assert with_holes.classes == ("9", "10")
    assert "of 0 to 10, 9 are absent: the index is not the integer" in with_holes.report()


@pytest.mark.parametrize(
    ("content", "numbers", "classes"),
    [
        ("run\nwalk\n", (0, 1), ("run", "walk")),
        ("1 run\n2 walk\n", (1, 2), ("run", "walk")),
        ("1,walk\n0,run\n", (0, 1), ("run", "walk")),
        ("3 point shot\n9 pin bowling\n", (0, 1), ("3 point shot", "9 pin bowling")),
    ],
)
def test_a_label_map_names_integers(tmp_path, content, numbers, classes):
    touch(tmp_path, "a.mp4", "b.mp4")
    table = write(tmp_path / "l.csv", "path,label\na.mp4,{:02d}\nb.mp4,{}\n".format(*numbers))
    labels = write(tmp_path / "labels.txt", content)
    listing = list_videos(table, labels=labels)
    assert listing.classes == classes
    assert labeled(listing) == {"a.mp4": classes[0], "b.mp4": classes[1]}
    assert f"by number ({numbers[0]} to {numbers[1]})" in listing.report()
    by_name = write(tmp_path / "n.csv", "path,label\na.mp4,{}\nb.mp4,{}\n".format(*classes))
    assert labeled(list_videos(by_name, labels=labels)) == {
        "a.mp4": classes[0],
        "b.mp4": classes[1],
    }


def test_integers_that_a_label_map_lacks_are_named(tmp_path):
    touch(tmp_path, "a.mp4")
    table = write(tmp_path / "l.csv", "path,label\na.mp4,2\n")
    with pytest.raises(InputError, match=r"1 of 1 names are not in .*by number \(0 to 1\): '2'"):
        list_videos(table, labels=write(tmp_path / "labels.txt", "run\nwalk\n"))
    with pytest.raises(InputError, match="gives the name 'run' to several numbers"):
        list_videos(table, labels=write(tmp_path / "labels.txt", "0 run\n1 run\n"))


# -- leaks between splits --------------------------------------------------------------------------------------


def test_one_file_under_two_names_in_two_splits_is_said(tmp_path):
    touch(tmp_path, "train/a/x.mp4", "train/a/y.mp4", "test/a/z.mp4", "train/b/w.mp4")
    (tmp_path / "test" / "a" / "hard.mp4").hardlink_to(tmp_path / "train" / "a" / "x.mp4")
    (tmp_path / "test" / "a" / "soft.mp4").symlink_to("../../train/a/y.mp4")
    (tmp_path / "train" / "a" / "harmless.mp4").symlink_to("y.mp4")
    (tmp_path / "train" / "b" / "dangling.mp4").symlink_to("nowhere")
    report = list_videos(tmp_path).report()
    line = next(line for line in report.splitlines() if line.startswith("ONE FILE IN TWO SPLITS"))
    assert "2 (" in line
    assert "test/a/hard.mp4 in test = train/a/x.mp4 in train" in line
    assert "test/a/soft.mp4 in test = train/a/" in line
    (tmp_path / "test" / "a" / "hard.mp4").unlink()
    (tmp_path / "test" / "a" / "soft.mp4").unlink()
    assert "TWO SPLITS" not in list_videos(tmp_path).report()


def test_equal_numbers_of_two_file_systems_are_not_one_file(tmp_path):
    touch(tmp_path, "a.mp4", "b.mp4")
    rows = [
        Row("", 0, name, "", split, file=name)
        for name, split in (("a.mp4", "train"), ("b.mp4", "test"))
    ]
    assert describe_leaks(rows, str(tmp_path), {"a.mp4": 7, "b.mp4": 7}) == []


def test_spans_that_overlap_in_two_splits_are_said(tmp_path):
    touch(tmp_path, "m.mp4", "n.mp4")
    rows = "m.mp4,0,9,train\nm.mp4,1,2,train\nm.mp4,8,10,test\nm.mp4,10,12,val\nn.mp4,0,5,train\nn.mp4,5,9,test\n"
    rows = "".join(f"{row.split(',')[0]},a,{row.split(',', 1)[1]}\n" for row in rows.splitlines())
    listing = list_videos(write(tmp_path / "l.csv", f"path,label,start,end,split\n{rows}"))
    assert (
        "SPANS THAT OVERLAP in two splits: 1 (m.mp4#0-9000 in train and m.mp4#8000-10000 in test)"
        in listing.report()
    )
    whole = list_videos(
        write(tmp_path / "w.csv", "path,label,start,end,split\nm.mp4,a,,,train\nm.mp4,a,3,4,test\n")
    )
    assert (
        "SPANS THAT OVERLAP in two splits: 1 (m.mp4 in train and m.mp4#3000-4000 in test)"
        in whole.report()
    )


# -- folders ---------------------------------------------------------------------------------------------------


def test_a_tree_of_splits_and_classes_in_the_order_of_ids(tmp_path):
    touch(tmp_path, "val/b/x.mp4", "train/a/x.mp4", "train/b/x.MKV", "test/y.webm")
    listing = list_videos(str(tmp_path) + "/")
    assert [(v.id, v.label, v.split) for v in listing.videos] == [
        ("test/y.webm", -1, "test"),
        ("train/a/x.mp4", 0, "train"),
        ("train/b/x.MKV", 1, "train"),
        ("val/b/x.mp4", 1, "val"),
    ]
    assert all(Path(video.path) == tmp_path / video.id for video in listing.videos)
    assert listing.splits == ("train", "val", "test")
    assert listing.class_counts("train") == (1, 1)
    assert listing.class_counts("val") == (0, 1)


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("training", "train"),
        ("validate", "val"),
        ("validation", "val"),
        ("Val", "val"),
        ("testing", "test"),
    ],
)
def test_other_names_of_splits(tmp_path, name, split):
    assert list_videos(touch(tmp_path, f"{name}/a/x.mp4")).videos[0].split == split


def test_classes_without_splits_and_a_flat_folder(tmp_path):
    classes = list_videos(touch(tmp_path / "classes", "a/x.mp4", "b/x.mp4"))
    assert [(v.label, v.split) for v in classes.videos] == [(0, ""), (1, "")]
    flat = list_videos(touch(tmp_path / "flat", "x.mp4", "y.mp4"))
    assert [(v.id, v.label, v.split) for v in flat.videos] == [("x.mp4", -1, ""), ("y.mp4", -1, "")]
    assert flat.classes == ()
    assert "a flat folder" in flat.report()


def test_an_outer_folder_says_nothing_and_a_deeper_one_belongs_to_its_class(tmp_path):
    outer = list_videos(touch(tmp_path / "outer", "clips/a/x.mp4", "clips/b/x.mp4"))
    assert labeled(outer) == {"clips/a/x.mp4": "a", "clips/b/x.mp4": "b"}
    deeper = list_videos(touch(tmp_path / "deeper", "a/g1/x.mp4", "a/g2/x.mp4", "b/x.mp4"))
    assert labeled(deeper) == {"a/g1/x.mp4": "a", "a/g2/x.mp4": "a", "b/x.mp4": "b"}


def test_splits_beside_other_folders_are_an_error(tmp_path):
    with pytest.raises(
        InputError, match=r"like splits \(train\) are next to others \(car, replacement\)"
    ):
        list_videos(
            touch(tmp_path, "train/a/x.mp4", "car/y.mp4", "replacement/z.mp4", "notes/readme.txt")
        )


@pytest.mark.parametrize("spelled", [str, underscored, without_marks])
def test_class_folders_of_kinetics_in_three_spellings(tmp_path, spelled):
    touch(tmp_path, *(f"{split}/{spelled(label)}/{clip}" for split, label, clip in CLIPS))
    listing = list_videos(tmp_path)
    assert listing.classes == kinetics700_labels()
    assert "the Kinetics-700 list" in listing.report()
    assert {
        v.id.rpartition("/")[2]: (v.split, listing.classes[v.label]) for v in listing.videos
    } == {clip: (split, label) for split, label, clip in CLIPS}


@settings(max_examples=30)
@given(
    st.sets(
        st.tuples(
            st.sampled_from(["train", "val", "test"]),
            st.sampled_from(kinetics700_labels()),
            st.integers(0, 9),
        ),
        min_size=1,
        max_size=12,
    )
)
def test_all_five_layouts_of_kinetics_list_the_same(tmp_path_factory, drawn):
    clips = [
        (
            split,
            label,
            f"{hashlib.md5(repr((split, label, i)).encode()).hexdigest()[:11]}_{i:06d}_{i + 10:06d}.mp4",
        )
        for split, label, i in sorted(drawn)
    ]
    layouts = {
        "raw": lambda split, label, clip: f"{split}/{label}/{clip}",
        "underscores": lambda split, label, clip: f"{split}/{underscored(label)}/{clip}",
        "torchvision": lambda split, label, clip: f"{split}/{without_marks(label)}/{clip}",
        "flat": lambda split, label, clip: f"{split}/{clip}",
        "volumes": lambda split, label, clip: f"videos/vol_{int(clip[:2], 16) % 3:02d}/{clip}",
    }
    expected = {clip: (split, kinetics700_labels().index(label)) for split, label, clip in clips}
    for place in layouts.values():
        root = tmp_path_factory.mktemp("layout")
        touch(root, *(place(*clip) for clip in clips))
        table = kinetics_csv(root.with_suffix(".csv"), clips)
        for listing in (
            list_videos(table, root=root),
            list_videos(table, root=root, labels="kinetics700"),
        ):
            assert {v.id.rpartition("/")[2]: (v.split, v.label) for v in listing.videos} == expected
            assert not listing.missing
            assert not listing.unlisted


def test_flat_and_volume_layouts_take_labels_from_the_csvs_in_the_folder(tmp_path):
    root = touch(tmp_path, *(f"{split}/{clip}" for split, _, clip in CLIPS), "train/extra.mp4")
    without = list_videos(root)
    assert {(v.split, v.label) for v in without.videos} == {("train", -1), ("val", -1)}
    kinetics_csv(root / "annotations" / "train.csv", [c for c in CLIPS if c[0] == "train"])
    kinetics_csv(root / "validate.csv", [c for c in CLIPS if c[0] == "val"])
    write(root / "prices.csv", "item,price\nx,1\n")
    listing = list_videos(root)
    assert labeled(listing) == {f"{split}/{clip}": label for split, label, clip in CLIPS}
    assert listing.unlisted == ("train/extra.mp4",)
    assert listing.ignored == {"not a video by its extension": ("prices.csv",)}
    assert "validate.csv and train.csv, files below" in listing.report()


def test_volumes_are_no_classes_and_take_labels_from_the_csv_in_the_folder(tmp_path):
    touch(tmp_path, *(f"videos/vol_{i % 2:02d}/{clip}" for i, (_, _, clip) in enumerate(CLIPS)))
    assert set(labeled(list_videos(tmp_path)).values()) == {""}
    kinetics_csv(tmp_path / "kinetics700.csv")
    listing = list_videos(tmp_path)
    by_name = {v.id.rpartition("/")[2]: listing.classes[v.label] for v in listing.videos}
    assert by_name == {clip: label for _, label, clip in CLIPS}
    assert [v.split for v in listing.videos] == [split for split, _, _ in CLIPS]


def test_folders_that_name_classes_are_believed_and_a_csv_in_them_is_ignored_by_name(tmp_path):
    touch(tmp_path, "train/yoga/aaaaaaaaaaa_000000_000010.mp4", "val/yoga/x.mp4")
    kinetics_csv(tmp_path / "train.csv", [("train", "zumba", "aaaaaaaaaaa_000000_000010.mp4")])
    listing = list_videos(tmp_path)
    assert set(labeled(listing).values()) == {"yoga"}
    assert len(listing.videos) == 2
    assert listing.ignored == {"not a video by its extension": ("train.csv",)}


def test_what_is_no_video_is_named_with_the_reason(tmp_path):
    touch(
        tmp_path,
        "a/x.mp4",
        "a/._x.mp4",
        "a/._y.mp4",
        "a/.hidden.mp4",
        ".git/config.mp4",
        "a/notes.txt",
        "a/README",
    )
    touch(tmp_path, "a/y.mp4.part", "a/folder.mp4/inside.mp4", "a/動作.mp4")
    touch(tmp_path, os.fsdecode(b"a/caf\xe9.mp4"))
    os.mkfifo(tmp_path / "a" / "pipe.mp4")
    (tmp_path / "a" / "dangling.mp4").symlink_to("nowhere.mp4")
    (tmp_path / "a" / "itself.mp4").symlink_to("itself.mp4")
    (tmp_path / "a" / "dangling").symlink_to("nowhere")
    (tmp_path / "a" / "back").symlink_to(tmp_path)
    listing = list_videos(tmp_path)
    # A dangling link is listed, so it fails with a reason instead of disappearing.
    assert ids(listing) == ["a/dangling.mp4", "a/itself.mp4", "a/x.mp4", "a/動作.mp4"]
    assert listing.ignored == {
        "hidden": (".git", "a/._x.mp4", "a/._y.mp4", "a/.hidden.mp4"),
        "not a video by its extension": (
            *("a/README", "a/dangling", "a/folder.mp4 (a folder)", "a/notes.txt", "a/y.mp4.part"),
        ),
        "cannot be read": (
            *("a/back (link to a folder around it)", "a/caf\\xe9.mp4 (name is not UTF-8)"),
            "a/pipe.mp4 (neither a file nor a folder)",
        ),
    }
    assert "ignored, hidden: 4 (.git, a/._x.mp4, a/._y.mp4, ...)" in listing.report()


def test_linked_folders_are_followed(tmp_path):
    touch(tmp_path, "disk/a/x.mp4", "disk/b/y.mp4", "source/keep/z.mp4")
    (tmp_path / "source" / "linked").symlink_to(tmp_path / "disk" / "a")
    assert ids(list_videos(tmp_path / "source")) == ["keep/z.mp4", "linked/x.mp4"]


def test_a_folder_that_cannot_be_read_is_named(tmp_path, monkeypatch):
    touch(tmp_path, "a/x.mp4", "b/y.mp4")
    real = os.scandir

    def scandir(path):
        if os.path.basename(path) == "b":
            raise PermissionError(errno.EACCES, "Permission denied", path)
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
    assert list_videos(tmp_path).ignored == {"cannot be read": ("b (Permission denied)",)}


def test_no_file_is_asked_for_its_size_or_opened(tmp_path, monkeypatch):
    root = touch(tmp_path, *(f"train/{name}/{i}.mp4" for name in "ab" for i in range(20)))
    asked = []
    monkeypatch.setattr(os, "stat", lambda *a, **k: asked.append(a))
    monkeypatch.setattr("builtins.open", lambda *a, **k: asked.append(a))
    files = scan(str(root)).videos
    monkeypatch.undo()
    assert len(files) == 40
    assert asked == []


def test_equal_stems_do_not_collide(tmp_path):
    touch(tmp_path, "train/a/x.mp4", "train/b/x.mp4", "val/a/x.mp4", "val/a/x.mkv")
    assert len(set(ids(list_videos(tmp_path)))) == 4


def test_an_empty_folder_says_what_it_ignored(tmp_path):
    with pytest.raises(InputError, match=r"contains no video; it is empty"):
        list_videos(tmp_path)
    touch(tmp_path, "a/notes.txt", "a/._x.mp4")
    with pytest.raises(
        InputError, match=r"not a video by its extension: 1 \(a/notes.txt\)"
    ) as raised:
        list_videos(tmp_path)
    assert "hidden: 1 (a/._x.mp4)" in str(raised.value)


def test_one_video(tmp_path):
    path = touch(tmp_path, "clip.webm") / "clip.webm"
    assert list_videos(path).videos == (Video(id="clip.webm", path=str(path), label=-1),)
    assert len(list_videos(path, labels="kinetics700").classes) == 700


def test_sources_that_are_none(tmp_path):
    with pytest.raises(InputError, match=r"there is no .*gone"):
        list_videos(tmp_path / "gone")
    (tmp_path / "link.mp4").symlink_to("away.mp4")
    with pytest.raises(InputError, match=r"there is no .*link.mp4 \(it is a link to away.mp4\)"):
        list_videos(tmp_path / "link.mp4")
    touch(tmp_path, "notes.png", "clip.mp4", os.fsdecode(b"caf\xe9.mp4"))
    with pytest.raises(
        InputError, match=r"notes.png is not a folder, a list or, .* known are 264 .* webm"
    ):
        list_videos(tmp_path / "notes.png")
    with pytest.raises(InputError, match=r"caf\\xe9.mp4 is not UTF-8"):
        list_videos(os.fspath(tmp_path) + os.fsdecode(b"/caf\xe9.mp4"))
    for source in (tmp_path, tmp_path / "clip.mp4"):
        with pytest.raises(InputError, match="--root elsewhere is the folder of a list's videos"):
            list_videos(source, root="elsewhere")


@pytest.mark.parametrize("on", [True, False])
def test_the_cycle_collector_is_as_before_also_after_an_error(tmp_path, on):
    was_on = gc.isenabled()
    try:
        (gc.enable if on else gc.disable)()
        with pytest.raises(InputError):
            list_videos(tmp_path)
        assert gc.isenabled() is on
    finally:
        (gc.enable if was_on else gc.disable)()


def test_common_containers_are_videos():
    assert {
        "mp4",
        "mkv",
        "webm",
        "avi",
        "mov",
        "mpg",
        "ts",
        "wmv",
        "flv",
        "3gp",
        "gif",
        "ogv",
    } <= VIDEO_EXTENSIONS
    assert not VIDEO_EXTENSIONS & {
        "jpg",
        "png",
        "wav",
        "mp3",
        "txt",
        "csv",
        "json",
        "part",
        "zip",
        "npy",
    }


# -- CSVs of Kinetics ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "files", "expected"),
    [
        (
            K700_VALIDATE,
            [
                "OMK0OJ4f_TI_000000_000010.mp4",
                "4E53JZXxxhU_000094_000104.mp4",
                "jJxxABipmmU_000064_000074.webm",
            ],
            [("val", "abseiling"), ("val", "acting in play"), ("val", "massaging person's head")],
        ),
        (
            b"\xef\xbb\xbf" + K400_VAL,
            ["g-XXUD65DyI_000003_000013.mp4", "BJlHsunMcME_000296_000306.mp4"],
            [("val", "lunge"), ("val", "balloon blowing")],
        ),
        (
            K600_VAL,
            ["-u8W9n8IOks_000011_000021.mp4", "-5ZUl3Z5yW0_000000_000010.mp4"],
            [("val", "acting in play"), ("val", "adjusting glasses")],
        ),
        (
            K600_TEST,
            ["umKmQmKT5WA_000041_000051.mp4", "vNOfR6tsnUY_000199_000209.mp4"],
            [("test", ""), ("test", "")],
        ),
    ],
)
def test_csvs_of_kinetics_as_they_come(tmp_path, content, files, expected):
    touch(tmp_path / "videos", *files)
    listing = list_videos(write(tmp_path / "list.csv", content), root=tmp_path / "videos")
    assert ids(listing) == files  # in the CSV's order
    assert [(v.split, labeled(listing)[v.id]) for v in listing.videos] == expected


def test_columns_go_by_name_and_times_may_be_floats(tmp_path):
    touch(tmp_path, "aaaaaaaaaaa_000003_000013.mp4")
    content = (
        "Split, time_end,extra,time_start,label,youtube_id\ntrain,13.9,x,3.0,yoga,aaaaaaaaaaa\n\n"
    )
    table = write(tmp_path / "l.csv", content)
    assert [(v.id, v.split) for v in list_videos(table).videos] == [
        ("aaaaaaaaaaa_000003_000013.mp4", "train")
    ]


def test_missing_and_unlisted_files_are_named(tmp_path):
    touch(
        tmp_path,
        *(f"{split}/{label}/{clip}" for split, label, clip in CLIPS[1:]),
        "val/yoga/fffffffffff_000000_000010.mp4",
    )
    listing = list_videos(kinetics_csv(tmp_path / "all.csv"))
    assert [(v.id, v.split, listing.classes[v.label]) for v in listing.missing] == [
        ("-aaaaaaaaaa_000000_000010", "train", "curling (sport)")
    ]
    assert listing.unlisted == ("val/yoga/fffffffffff_000000_000010.mp4",)
    assert len(listing.videos) == 4
    report = listing.report()
    assert "5 videos listed, 4 found, 1 missing (-aaaaaaaaaa_000000_000010)" in report
    assert "left out, in no row of the CSV: 1 (val/yoga/fffffffffff_000000_000010.mp4)" in report
    assert re.search(r"^train +3 +2 +0 +2   1, 1, 1$", report, re.MULTILINE)


def test_missing_videos_count_for_the_classes(tmp_path):
    rows = [
        ("train", "zz", "aaaaaaaaaaa_000000_000010.mp4"),
        ("train", "aa", "bbbbbbbbbbb_000000_000010.mp4"),
    ]
    touch(tmp_path, rows[0][2])
    listing = list_videos(kinetics_csv(tmp_path / "l.csv", rows))
    assert listing.classes == ("aa", "zz")
    assert listing.videos[0].label == 1


def test_a_row_is_never_given_a_file_of_another_split(tmp_path):
    clip = "aaaaaaaaaaa_000000_000010.mp4"
    touch(tmp_path, f"train/{clip}")
    table = kinetics_csv(tmp_path / "l.csv", [("train", "yoga", clip), ("val", "yoga", clip)])
    listing = list_videos(table)
    assert [(v.id, v.split) for v in listing.videos] == [(f"train/{clip}", "train")]
    assert [v.split for v in listing.missing] == ["val"]
    touch(tmp_path, f"validate/{clip}")
    assert ids(list_videos(table)) == [f"train/{clip}", f"validate/{clip}"]


def test_a_clip_under_two_classes_is_its_rows_own(tmp_path):
    clip = "aaaaaaaaaaa_000000_000010.mp4"
    touch(tmp_path, f"train/yoga/{clip}", f"train/curling_sport/{clip}")
    rows = [("train", "curling (sport)", clip), ("train", "yoga", clip)]
    assert ids(list_videos(kinetics_csv(tmp_path / "l.csv", rows))) == [
        f"train/curling_sport/{clip}",
        f"train/yoga/{clip}",
    ]


def test_two_files_for_one_row_are_an_error(tmp_path):
    touch(tmp_path, "a/aaaaaaaaaaa_000000_000010.mp4", "b/aaaaaaaaaaa_000000_000010.mkv")
    table = kinetics_csv(tmp_path / "l.csv", [("train", "yoga", "aaaaaaaaaaa_000000_000010.mp4")])
    with pytest.raises(
        InputError, match=r"line 2: a/aaaaaaaaaaa\S+.mp4 and b/aaaaaaaaaaa\S+.mkv could both be"
    ):
        list_videos(table)


@pytest.mark.parametrize("there", [True, False])
def test_a_video_in_two_rows_is_an_error_that_names_both_lines(tmp_path, there):
    touch(tmp_path, *(clip for _, _, clip in CLIPS[not there :]))
    with pytest.raises(
        InputError, match=r"l\.csv line 2 and \S*l\.csv line 7 both list -aaaaaaaaaa_000000_000010"
    ):
        list_videos(kinetics_csv(tmp_path / "l.csv", [*CLIPS, CLIPS[0]]))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            "yoga,aaaaaaaaaaa,0,10,dev",
            r"l\.csv line 3: the split 'dev' is unknown; known are train",
        ),
        ("yoga,tooshort,0,10,train", "line 3: 'tooshort' is not a youtube id"),
        ("yoga,aaaaaaaaaaa,zero,10,train", "line 3: 'zero' to '10' are not times"),
        ("yoga,aaaaaaaaaaa,0,inf,train", "line 3: '0' to 'inf' are not times"),
        (",aaaaaaaaaaa,0,10,train", "line 3: aaaaaaaaaaa has no label"),
        ("yoga,aaaaaaaaaaa,0", "line 3 has 3 values and the header 5"),
        ("yo,ga,aaaaaaaaaaa,0,10,train", "line 3 has 6 values and the header 5"),
        (
            '"yoga,aaaaaaaaaaa,0,10,train',
            r"l\.csv cannot be read as a CSV after line 2: unexpected end of data",
        ),
    ],
)
def test_rows_that_are_wrong_are_named_by_line(tmp_path, row, message):
    touch(tmp_path, "bbbbbbbbbbb_000000_000010.mp4")
    head = "label,youtube_id,time_start,time_end,split\nyoga,bbbbbbbbbbb,0,10,train\n"
    with pytest.raises(InputError, match=message):
        list_videos(write(tmp_path / "l.csv", head + row + "\n"))


def test_a_test_row_may_lack_its_label(tmp_path):
    touch(tmp_path, "bbbbbbbbbbb_000000_000010.mp4")
    table = write(
        tmp_path / "l.csv", "label,youtube_id,time_start,time_end,split\n,bbbbbbbbbbb,0,10,test\n"
    )
    assert list_videos(table).videos[0].label == -1


def test_an_unknown_label_of_a_csv_is_named(tmp_path):
    touch(tmp_path, "aaaaaaaaaaa_000000_000010.mp4")
    table = kinetics_csv(tmp_path / "l.csv", [("train", "yogaa", "aaaaaaaaaaa_000000_000010.mp4")])
    with pytest.raises(
        InputError,
        match=r"1 of 1 names are not in the Kinetics-700 list: 'yogaa' \(nearest: 'yoga'\)",
    ):
        list_videos(table, labels="kinetics700")


def test_csvs_that_are_no_list_of_videos(tmp_path):
    with pytest.raises(
        InputError,
        match=r"columns name, class; needed are those of one of: .*; label, path; or lines `path label`",
    ):
        list_videos(write(tmp_path / "a.csv", "name,class\nx,y\n"))
    with pytest.raises(InputError, match=r"b\.csv has the columns \(none\)"):
        list_videos(write(tmp_path / "b.csv", ""))
    with pytest.raises(InputError, match=r"c\.csv has a header and no rows"):
        list_videos(write(tmp_path / "c.csv", "path,label\n"))
    with pytest.raises(InputError, match=r"d\.csv is not UTF-8"):
        list_videos(write(tmp_path / "d.csv", "path,label\ncafé.mp4,x\n".encode("latin-1")))


def test_a_root_without_the_videos_says_what_was_looked_for(tmp_path):
    table = kinetics_csv(tmp_path / "l.csv")
    with pytest.raises(InputError, match="looked for -aaaaaaaaaa_000000_000010, there is no video"):
        list_videos(table)
    touch(tmp_path / "other", "x.mp4")
    with pytest.raises(
        InputError, match=r"none of the 5 videos .* is below \S+other .* there are x.mp4"
    ):
        list_videos(table, root=tmp_path / "other")
    with pytest.raises(InputError, match=r"--root .*nowhere is not a folder"):
        list_videos(table, root=tmp_path / "nowhere")


# -- CSVs of paths ---------------------------------------------------------------------------------------------


def test_a_csv_of_paths(tmp_path):
    touch(
        tmp_path,
        "d/x.mp4",
        "d/y.mp4",
        "d/odd name.dat",
        "top.mp4",
        "d/extra.mp4",
        "unnamed/z.mp4",
        ".h/w.mp4",
    )
    listing = list_videos(
        write(
            tmp_path / "list.csv",
            f"path,label,split,group\nd/y.mp4,walk,train,p1\n./d//x.mp4,,validate,\n{tmp_path}/top.mp4,run,,p2\n"
            "d/odd name.dat,run,test,p2\nd/gone.mp4,run,test,p2\n.h/w.mp4,run,test,p3\n",
        )
    )
    assert [(v.id, v.label, v.split, v.group) for v in listing.videos] == [
        ("d/y.mp4", 1, "train", "p1"),
        ("d/x.mp4", -1, "val", ""),
        ("top.mp4", 0, "", "p2"),
        ("d/odd name.dat", 0, "test", "p2"),
        (".h/w.mp4", 0, "test", "p3"),
    ]
    assert all(Path(video.path) == tmp_path / video.id for video in listing.videos)
    assert [video.id for video in listing.missing] == ["d/gone.mp4"]
    assert listing.unlisted == ("d/extra.mp4",)  # in the folders that the CSV names
    assert "groups: the column `group`" in listing.report()


def test_paths_below_a_root_and_the_subject_as_group(tmp_path):
    touch(tmp_path / "clips", "a/x.mp4")
    table = write(
        tmp_path / "labels.csv", ",path,label,subject\n0,a/x.mp4,a,s1\n"
    )  # as pandas writes it
    listing = list_videos(table, root=tmp_path / "clips")
    assert listing.videos == (Video("a/x.mp4", str(tmp_path / "clips" / "a/x.mp4"), 0, "", "s1"),)
    assert "groups: the column `subject`" in listing.report()


def test_an_unnamed_column_is_no_group(tmp_path):
    touch(tmp_path, "x.mp4")
    assert list_videos(write(tmp_path / "l.csv", ",path,label\n7,x.mp4,a\n")).videos[0].group == ""


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (",a", "line 3: its path is empty"),
        ("../x.mp4,a", r"line 3: \.\./x\.mp4 is not below .*; give --root"),
        ("a/..,a", r"line 3: a/\.\. is not below"),
        ("/elsewhere/x.mp4,a", "line 3: /elsewhere/x.mp4 is not below"),
        ("a/../x.mp4,a", r"l\.csv line 2 and \S*l\.csv line 3 both list x\.mp4"),
    ],
)
def test_paths_that_are_wrong_are_named_by_line(tmp_path, row, message):
    touch(tmp_path, "x.mp4")
    with pytest.raises(InputError, match=message):
        list_videos(write(tmp_path / "l.csv", f"path,label\nx.mp4,b\n{row}\n"))


def test_a_missing_path_in_two_rows_is_an_error_too(tmp_path):
    touch(tmp_path, "x.mp4")
    with pytest.raises(InputError, match=r"line 3 and \S+ line 4 both list gone\.mp4"):
        list_videos(write(tmp_path / "l.csv", "path,label\nx.mp4,b\ngone.mp4,b\ngone.mp4,c\n"))


def test_the_clips_that_the_project_ships(demo_clips):
    daily = list_videos(
        demo_clips / "daily_actions" / "labels.csv", root=demo_clips / "daily_actions" / "clips"
    )
    assert len(daily.videos) == 43
    assert {video.group for video in daily.videos} == {"1", "2", "3", "4"}
    exercise = list_videos(
        demo_clips / "exercise_mini" / "labels.csv", root=demo_clips / "exercise_mini" / "clips"
    )
    assert [sum(exercise.class_counts(split)) for split in exercise.splits] == [96, 24, 24]
    for listing in (daily, exercise):
        assert not listing.missing
        assert not listing.unlisted
        assert all(name.startswith(f"{label}/") for name, label in labeled(listing).items())
    assert labeled(list_videos(demo_clips / "daily_actions" / "clips")) == labeled(daily)


# -- youtube ids and the report --------------------------------------------------------------------------------


@given(
    st.from_regex(r"[A-Za-z0-9_-]{11}", fullmatch=True),
    st.integers(0, 10**6),
    st.sampled_from(["", "val/my_class_000/"]),
)
def test_a_youtube_id_is_cut_from_the_right(name, start, folder):
    assert youtube_id(f"{folder}{name}_{start:06d}_{start + 10:06d}.mp4") == name


@pytest.mark.parametrize(
    "name", ["clip.mp4", "tooshort_000000_000010.mp4", "aaaaaaaaaaa_0_10.mp4", "x/aaaaaaaaaaa.mp4"]
)
def test_other_names_hold_no_youtube_id(name):
    with pytest.raises(InputError, match=re.escape(repr(name))):
        youtube_id(name)


def test_youtube_ids_in_two_splits_are_named_and_found_between_listings(tmp_path):
    touch(
        tmp_path,
        "train/yoga/aaaaaaaaaaa_000000_000010.mp4",
        "val/zumba/aaaaaaaaaaa_000050_000060.mp4",
    )
    touch(
        tmp_path, "train/yoga/bbbbbbbbbbb_000000_000010.mp4", "train/yoga/x.mp4", "val/yoga/x.mp4"
    )
    listing = list_videos(tmp_path)
    assert listing.youtube_ids_in_two_splits() == {"aaaaaaaaaaa": ("train", "val")}
    assert "youtube ids in two splits: 1 (aaaaaaaaaaa: train, val)" in listing.report()
    train, val = ([v for v in listing.videos if v.split == split] for split in ("train", "val"))
    assert shared_youtube_ids(train, val) == ("aaaaaaaaaaa",)


def test_the_report_counts_by_split_and_class(tmp_path):
    touch(
        tmp_path,
        *(
            f"train/{name}/{i}.mp4"
            for name, count in (("a", 5), ("b", 2), ("c", 1))
            for i in range(count)
        ),
    )
    touch(tmp_path, "val/a/0.mp4", "test/t.mp4")
    report = list_videos(tmp_path).report()
    assert report.splitlines()[1:] == [
        "10 videos listed, 10 found, 0 missing",
        "3 classes: the sorted names",
        "split    listed    found   unlabeled  classes   min, median, max per class",
        "train         8        8           0        3   1, 2, 5",
        "val           1        1           0        1   1, 1, 1",
        "test          1        1           1        0   -",
        "classes without a video in val: 2 (b, c)",
    ]


@pytest.mark.shared
def test_the_real_clips_beside_the_project(shared_clips):
    assert len(list_videos(shared_clips / "odd").videos) == 21
    assert len(list_videos(shared_clips / "kinetics_like").videos) == 11


@pytest.mark.shared
@pytest.mark.parametrize(
    ("name", "rows", "labels", "with_label"),
    [
        ("k700style_validate_1perclass", 596, "kinetics700", 596),
        ("kinetics-400_val_sample", 120, "label_map_k400.txt", 120),
        ("kinetics-600_val_sample", 240, "label_map_k600.txt", 240),
        ("kinetics-600_test_sample", 120, "kinetics700", 0),
    ],
)
def test_real_csvs_with_a_file_for_each_row(shared_clips, tmp_path, name, rows, labels, with_label):
    folder = shared_clips.parent / "labels"
    with open(folder / f"{name}.csv", newline="", encoding="utf-8") as file:
        clips = [
            f"{row['youtube_id']}_{int(row['time_start']):06d}_{int(row['time_end']):06d}.mp4"
            for row in csv.DictReader(file)
        ]
    touch(tmp_path, *clips[1:])
    labels = labels if labels == "kinetics700" else folder / labels
    listing = list_videos(folder / f"{name}.csv", root=tmp_path, labels=labels)
    assert ids(listing) == clips[1:]
    assert len(listing.missing) == 1
    assert len(clips) == rows
    assert sum(video.label >= 0 for video in (*listing.videos, *listing.missing)) == with_label
