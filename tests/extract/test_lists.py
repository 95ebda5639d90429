"""Lists of videos in the layouts of public data sets. Every reader reports what it read and what it
left out."""

import json
import time

import pytest

from extract import InputError
from extract.listing.videos import Listing, list_videos
from listings import labeled, touch, write


def rows(listing: Listing) -> list[tuple[str, str, str, str]]:
    """The id, class, split and group of each video."""
    classes = [*listing.classes, ""]
    return [(video.id, classes[video.label], video.split, video.group) for video in listing.videos]


# -- separators, columns, times ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("separator", "name"), [(";", "semicolons"), ("\t", "tabs")])
def test_other_separators_are_read_and_said(tmp_path, separator, name):
    touch(tmp_path, "a,b.mp4")
    table = (
        "path,label,split".replace(",", separator)
        + "\n"
        + separator.join(("a,b.mp4", "run", "val"))
        + "\n"
    )
    listing = list_videos(write(tmp_path / "l.csv", table))
    assert rows(listing) == [("a,b.mp4", "run", "val", "")]
    assert f"l.csv: columns are separated by {name}" in listing.report()


def test_columns_that_are_not_used_are_said(tmp_path):
    touch(tmp_path, "a.mp4")
    listing = list_videos(
        write(tmp_path / "l.csv", "path,width,label,Comment\na.mp4,320,run,nice\n")
    )
    assert "l.csv: columns that are not used: width, comment" in listing.report()


def test_an_id_is_a_path(tmp_path):
    touch(tmp_path, "a.mp4")
    assert rows(list_videos(write(tmp_path / "l.csv", "id,label\na.mp4,run\n"))) == [
        ("a.mp4", "run", "", "")
    ]
    both = list_videos(write(tmp_path / "b.csv", "id,path,label\n17,a.mp4,run\n"))
    assert "columns that are not used: id" in both.report()


@pytest.mark.parametrize(
    ("start", "end", "span"),
    [
        ("00:00:00.14", "00:00:03.370", (0.14, 3.37)),
        ("01:02:03", "1:02:04.5", (3723, 3724.5)),
        ("0:30", "90", (30, 90)),
    ],
)
def test_times_with_colons(tmp_path, start, end, span):
    touch(tmp_path, "a.mp4")
    listing = list_videos(
        write(tmp_path / "l.csv", f"path,label,start,end\na.mp4,run,{start},{end}\n")
    )
    assert listing.videos[0].span == span


def test_a_table_that_fits_two_layouts_is_not_guessed(tmp_path):
    columns = "youtube_id,time_start,time_end,split,label,video_id,start_timestamp,stop_timestamp"
    with pytest.raises(InputError, match="fit Kinetics and EPIC-KITCHENS; remove those of one"):
        list_videos(write(tmp_path / "l.csv", f"{columns}\n"))


def test_backslashes_are_named(tmp_path):
    with pytest.raises(
        InputError, match=r"line 2: a\\b\.mp4 is written with backslashes; write it with /"
    ):
        list_videos(write(tmp_path / "l.csv", "path,label\na\\b.mp4,run\n"))
    touch(tmp_path, "a\\c.mp4")
    assert len(list_videos(write(tmp_path / "l.csv", "path,label\na\\c.mp4,run\n")).videos) == 1


# -- text lists --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "line", "written"),
    [
        ("kinetics400_val_list.txt", "a b/x.mp4 12", "a space"),
        ("val.csv", "a b/x.mp4 12", "a space"),
        ("val.csv", "a b/x.mp4,12", ","),
        ("val.list", "a b/x.mp4;12", ";"),
        ("val.tsv", "a b/x.mp4\t12", "a tab"),
    ],
)
def test_a_path_and_a_label_per_line(tmp_path, name, line, written):
    touch(tmp_path, "a b/x.mp4", "y.mp4")
    content = f"{line}\ny.mp4{line[9]}3\n"
    listing = list_videos(write(tmp_path / name, content))
    assert rows(listing) == [("a b/x.mp4", "12", "val", ""), ("y.mp4", "3", "val", "")]
    assert (
        f"path and label separated by {written}; split val, by the list's name" in listing.report()
    )


def test_a_label_map_names_the_integers_of_a_list(tmp_path):
    touch(tmp_path, "x.mp4", "y.mp4")
    table = write(tmp_path / "train.txt", "x.mp4 1\ny.mp4 0\n")
    listing = list_videos(table, labels=write(tmp_path / "map.txt", "run\nwalk\n"))
    assert labeled(listing) == {"x.mp4": "walk", "y.mp4": "run"}


def test_paths_alone_have_no_label(tmp_path):
    touch(tmp_path, "x.mp4", "y z.mp4")
    assert rows(list_videos(write(tmp_path / "test.txt", "x.mp4\ny z.mp4\n"))) == [
        ("x.mp4", "", "test", ""),
        ("y z.mp4", "", "test", ""),
    ]


def test_three_fields_are_asked_about(tmp_path):
    touch(tmp_path, "x.mp4")
    with pytest.raises(
        InputError, match=r"'frames/x 250 3': is that `folder frames label` .* several labels\?"
    ):
        list_videos(write(tmp_path / "train.txt", "frames/x 250 3\n"))
    touch(tmp_path, "frames/y/img_00001.jpg")
    with pytest.raises(
        InputError,
        match=r"train\.txt lists folders, such as frames/y; .* or a CSV path,label, to `extract",
    ):
        list_videos(write(tmp_path / "train.txt", "frames/y 250 3\n"))
    with pytest.raises(
        InputError,
        match=r"ignored: .*\(y/img_00001\.jpg\)\. A folder is a video if it holds numbered",
    ):
        list_videos(tmp_path / "frames")
    with pytest.raises(
        InputError, match=r"line 2: 'x\.mp4 3 4' has several labels; a video has one"
    ):
        list_videos(write(tmp_path / "train.txt", "x.mp4 3\nx.mp4 3 4\n"))
    with pytest.raises(InputError, match=r"line 2: 'nothing' is not a path and a label"):
        list_videos(write(tmp_path / "train.txt", "x.mp4 3\nnothing\n"))


def test_a_text_that_is_no_list(tmp_path):
    with pytest.raises(
        InputError, match=r"notes\.txt has the columns once upon a time; needed are"
    ):
        list_videos(write(tmp_path / "notes.txt", "once upon a time\n"))


def test_a_folder_of_lists_with_a_root(tmp_path):
    touch(tmp_path / "videos", "x.mp4", "y.mp4")
    write(tmp_path / "lists" / "train.txt", "x.mp4 0\n")
    write(tmp_path / "lists" / "val.txt", "y.mp4 0\n")
    listing = list_videos(tmp_path / "lists", root=tmp_path / "videos")
    assert rows(listing) == [("x.mp4", "0", "train", ""), ("y.mp4", "0", "val", "")]


# -- UCF101 and HMDB51 -------------------------------------------------------------------------------------------------


def ucf(tmp_path):
    touch(
        tmp_path / "UCF-101",
        *(f"Archery/v_Archery_g0{g}_c0{c}.avi" for g in (1, 8) for c in (1, 2)),
    )
    for number, (train, test) in {1: (8, 1), 2: (1, 8)}.items():
        for name, group, label in (("train", train, " 3"), ("test", test, "")):
            lines = "".join(f"Archery/v_Archery_g0{group}_c0{c}.avi{label}\n" for c in (1, 2))
            write(tmp_path / "split" / f"{name}list0{number}.txt", lines)
    write(tmp_path / "split" / "classInd.txt", "3 Archery\n")
    return tmp_path / "split"


def test_ucf101_has_both_sides_and_its_groups(tmp_path):
    listing = list_videos(ucf(tmp_path) / "trainlist01.txt", root=tmp_path / "UCF-101")
    assert rows(listing) == [
        ("Archery/v_Archery_g01_c01.avi", "Archery", "test", "v_Archery_g01"),
        ("Archery/v_Archery_g01_c02.avi", "Archery", "test", "v_Archery_g01"),
        ("Archery/v_Archery_g08_c01.avi", "Archery", "train", "v_Archery_g08"),
        ("Archery/v_Archery_g08_c02.avi", "Archery", "train", "v_Archery_g08"),
    ]
    assert "testlist01.txt and trainlist01.txt" in listing.report()


def test_several_protocols_are_asked_about(tmp_path):
    with pytest.raises(
        InputError,
        match=r"several protocols, such as trainlist01.txt and trainlist02.txt; give one",
    ):
        list_videos(ucf(tmp_path), root=tmp_path / "UCF-101")
    for name in ("trainlist02.txt", "testlist02.txt"):
        (tmp_path / "split" / name).unlink()
    assert len(list_videos(tmp_path / "split", root=tmp_path / "UCF-101").videos) == 4


def test_ucf101_without_a_folder_is_named(tmp_path):
    with pytest.raises(
        InputError, match=r"trainlist01\.txt line 1: 'x\.avi' has no folder, which is the class"
    ):
        list_videos(write(tmp_path / "trainlist01.txt", "x.avi 1\n"))
    with pytest.raises(InputError, match=r"trainlist01\.txt line 1: \.\./x/y\.avi is not below"):
        list_videos(write(tmp_path / "trainlist01.txt", "../x/y.avi 1\n"))


def test_hmdb51_reads_all_its_classes(tmp_path):
    touch(
        tmp_path / "hmdb51", "wave/w#1.avi", "wave/w2.avi", "brush_hair/b1.avi", "brush_hair/b2.avi"
    )
    write(tmp_path / "split" / "wave_test_split1.txt", "w#1.avi 1 \nw2.avi 0 \n")
    write(tmp_path / "split" / "brush_hair_test_split1.txt", "b1.avi 2 \nb2.avi 1 \n")
    write(tmp_path / "split" / "wave_test_split2.txt", "w#1.avi 2 \nw2.avi 2 \n")
    listing = list_videos(tmp_path / "split" / "wave_test_split1.txt", root=tmp_path / "hmdb51")
    assert rows(listing) == [
        ("brush_hair/b1.avi", "brush_hair", "test", ""),
        ("brush_hair/b2.avi", "brush_hair", "train", ""),
        ("wave/w#1.avi", "wave", "train", ""),
    ]
    assert "wave_test_split1.txt: 1 rows of neither train nor test" in listing.report()
    write(tmp_path / "split" / "wave_test_split1.txt", "w#1.avi 3\n")
    with pytest.raises(InputError, match=r"line 1: 'w#1\.avi 3' is not a file and 0, 1 or 2"):
        list_videos(tmp_path / "split" / "wave_test_split1.txt", root=tmp_path / "hmdb51")


# -- JSON --------------------------------------------------------------------------------------------------------------


def test_something_something(tmp_path):
    touch(tmp_path / "videos", "78687.webm", "1.webm", "2.webm")
    entry = {
        "id": "78687",
        "label": "holding potato",
        "template": "Holding [something]",
        "placeholders": ["potato"],
    }
    write(tmp_path / "lists" / "something-something-v2-train.json", json.dumps([entry]))
    write(
        tmp_path / "lists" / "something-something-v2-validation.json",
        json.dumps([{**entry, "id": "1"}]),
    )
    write(tmp_path / "lists" / "something-something-v2-test.json", json.dumps([{"id": "2"}]))
    assert rows(list_videos(tmp_path / "lists", root=tmp_path / "videos")) == [
        ("2.webm", "", "test", ""),
        ("78687.webm", "Holding something", "train", ""),
        ("1.webm", "Holding something", "val", ""),
    ]


def activitynet(**videos) -> str:
    return json.dumps({"version": "VERSION 1.3", "taxonomy": [], "database": videos})


def test_activitynet_lists_spans(tmp_path):
    touch(tmp_path / "videos", "v_aaa.mp4", "bbb.mkv", "ccc.mp4")
    annotations = [
        {"segment": [5.25, 9], "label": "Fencing"},
        {"segment": [0.5, 2], "label": "Archery"},
    ]
    content = activitynet(
        aaa={"duration": 12.0, "subset": "training", "url": "u", "annotations": annotations},
        bbb={"duration": 3.0, "subset": "validation", "annotations": annotations[1:]},
        ccc={"subset": "testing", "annotations": []},
    )
    listing = list_videos(write(tmp_path / "activity_net.json", content), root=tmp_path / "videos")
    assert rows(listing) == [
        ("v_aaa.mp4#500-2000", "Archery", "train", "v_aaa.mp4"),
        ("v_aaa.mp4#5250-9000", "Fencing", "train", "v_aaa.mp4"),
        ("bbb.mkv#500-2000", "Archery", "val", "bbb.mkv"),
        ("ccc.mp4", "", "test", ""),
    ]


@pytest.mark.parametrize("present", [True, False])
def test_a_span_with_two_labels_is_refused_by_name(tmp_path, present):
    touch(tmp_path, "aaa.mp4" if present else "bbb.mp4")
    annotations = [{"segment": [1, 2], "label": "Fencing"}, {"segment": [1, 2], "label": "Archery"}]
    content = activitynet(aaa={"subset": "training", "annotations": annotations})
    with pytest.raises(
        InputError, match=r"both list aaa\S*#1000-2000 as 'Fencing' and as 'Archery'; .* one label"
    ):
        list_videos(write(tmp_path / "a.json", content))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[1, 2", "is not JSON"),
        ("[1, 2]", "is not a list of videos in a known format"),
        ('{"a": 1}', "is not a list of videos in a known format"),
        (
            '[{"id": "1"}, {"label": "x"}]',
            r"entry 2: expected an object with an id, found \{'label': 'x'\}",
        ),
        (activitynet(a={"subset": "dev"}), r"entry 1 \(a\): the split 'dev' is unknown"),
        (
            activitynet(a={"annotations": [{"segment": [2, 1], "label": "x"}]}),
            "2 to 1 s is not a span",
        ),
        (
            activitynet(a={"annotations": [{"label": "x"}]}),
            "has no subset and annotations as expected",
        ),
        (activitynet(a=[1]), "has no subset and annotations as expected"),
    ],
)
def test_json_that_is_no_list(tmp_path, content, message):
    with pytest.raises(InputError, match=message):
        list_videos(write(tmp_path / "a.json", content))


# -- HACS and EPIC-KITCHENS --------------------------------------------------------------------------------------------


def test_hacs_clips(tmp_path):
    touch(tmp_path, "Archery/v_aaaaaaaaaaa.mp4")
    lines = "Archery,aaaaaaaaaaa,training,7.5,9.5,1\nArchery,aaaaaaaaaaa,training,20,22,-1\n"
    content = f"classname,youtube_id,subset,start,end,label\n{lines}"
    listing = list_videos(write(tmp_path / "HACS_clips.csv", content))
    assert rows(listing) == [
        ("Archery/v_aaaaaaaaaaa.mp4#7500-9500", "Archery", "train", "Archery/v_aaaaaaaaaaa.mp4")
    ]
    assert "HACS_clips.csv: 1 rows with label -1 left out" in listing.report()
    with pytest.raises(InputError, match=r"line 4: the label '0' of HACS is neither 1 nor -1"):
        list_videos(
            write(tmp_path / "HACS_clips.csv", f"{content}Archery,bbbbbbbbbbb,training,1,3,0\n")
        )


def test_epic_kitchens_asks_for_the_label(tmp_path):
    touch(tmp_path, "P01/videos/P01_01.MP4")
    columns = (
        "narration_id,participant_id,video_id,start_timestamp,stop_timestamp,verb,verb_class,noun"
    )
    row = "P01_01_0,P01,P01_01,00:00:00.14,00:00:03.37,open,3,door"
    with pytest.raises(
        InputError,
        match=r"several labels \(verb, noun, verb_class\); rename the one to learn to `label`",
    ):
        list_videos(write(tmp_path / "EPIC_100_train.csv", f"{columns}\n{row}\n"))
    listing = list_videos(
        write(tmp_path / "EPIC_100_train.csv", f"{columns.replace('verb,', 'label,')}\n{row}\n")
    )
    assert rows(listing) == [("P01/videos/P01_01.MP4#140-3370", "open", "", "P01")]
    assert "columns that are not used: narration_id, verb_class, noun" in listing.report()


# -- speed -------------------------------------------------------------------------------------------------------------


def test_a_long_list_takes_seconds(tmp_path):
    """A tenth of Kinetics-700's 650,000 lines takes tenths of seconds on a busy machine."""
    touch(tmp_path, "0.mp4")
    content = "path;label;split\n" + "".join(
        f"{i % 500}/{i}.mp4;{i % 700};train\n" for i in range(65_000)
    )
    table = write(tmp_path / "l.csv", content.replace("0/0.mp4", "0.mp4", 1))
    started = time.process_time()
    assert len(list_videos(table).missing) == 64_999
    assert time.process_time() - started < 3
