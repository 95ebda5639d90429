"""Folders of numbered pictures as videos: listing, decoding, damage, extraction, verification."""

import os
import shutil
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from decode_jobs import prepare_row
from extract import InputError, verify
from extract import __main__ as extract
from extract.cli import run_command
from extract.decode import VideoError, decode, decode_spans
from extract.decode import pictures as picture_reader
from extract.decode.container import time_limit
from extract.decode.jobs import Plan, Prepared
from extract.decode.nvdec import GpuDecoder
from extract.decode.pool import JobResult
from extract.decode.transform import Preprocessing
from extract.listing.videos import list_videos
from extract.listing.windows import file_lengths
from extract.numbered import gaps, numbered_pictures
from extract.sources import UNKNOWN, read_source, stat_source
from extract.store import FAILED, OK, PARTIAL, FeatureStore
from listings import labeled, touch
from pipelines.predict import videos_of
from videos import moving_pictures, write_video

RATE = 10.0
TINY = ("--backbone", "test_resnet", "--weights", "random", "--precision", "fp32")


def write_frames(
    folder: Path, numbers=range(1, 21), *, size=(48, 36), name="img_%05d.jpg", **how
) -> Path:
    """Write pictures that differ, one per number."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, picture in zip(numbers, moving_pictures(len(numbers), *size), strict=True):
        Image.fromarray(picture).save(folder / (name % number), **how)
    return folder


def opened(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path).convert("RGB"))


def every(count: int) -> np.ndarray:
    return np.arange(count)


def run(module, *arguments: object) -> int:
    return run_command(module.main, module.Options, prog="command", args=[*map(str, arguments)])


def extracted(videos: Path, out: Path, *more: object, status: int = 0) -> FeatureStore:
    arguments = ("--videos", videos, "--out", out, "--decode-workers", 1)
    begun = out.exists()
    assert run(extract, *arguments, *(() if begun else (*TINY, "--frames", 4)), *more) == status
    return FeatureStore.open(out)


# -- names ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("names", "numbers"),
    [
        ("img_00010.jpg img_00009.jpg img_00001.jpg", [1, 9, 10]),
        ("1.png 2.png 10.png", [1, 2, 10]),  # not in the order of their names
        ("a1.JPG a2.jpg .a3.txt .DS_Store n_frames", [1, 2]),
        ("img_1.jpg flow_1.jpg flow_2.jpg", []),  # two patterns
        ("1.jpg 2.jpeg", []),
        ("1.jpg 01.jpg 2.jpg", []),  # one number twice
        ("1.jpg 2.jpg cover.jpg", []),
        ("1.jpg", []),
        ("1.gif 2.gif", []),
    ],
)
def test_which_names_are_a_video(names, numbers):
    assert list(numbered_pictures(names.split())) == numbers


def test_gaps_in_the_numbers():
    assert gaps(dict.fromkeys([3, 4, 5], "")) == ""
    assert gaps(dict.fromkeys([3, 4, 7, 9], "")) == "3 of the numbers 3 to 9 are missing, from 5 on"


# -- listing -------------------------------------------------------------------------------------------------------


def test_a_folder_with_both_kinds(tmp_path):
    touch(tmp_path, "run/a.mp4", "run/x/1.jpg", "run/x/2.jpg", "run/x/n_frames", "run/x/.hidden")
    touch(tmp_path, "walk/y/f1.png", "walk/y/f3.png", "walk/z/only1.jpg", "walk/cover1.jpg")
    listing = list_videos(tmp_path, picture_folders=True)
    assert labeled(listing) == {"run/a.mp4": "run", "run/x": "run", "walk/y": "walk"}
    assert sorted(listing.picture_folders) == ["run/x", "walk/y"]
    report = listing.report()
    assert "folders of numbered pictures, a video each: 2" in report
    assert (
        "GAPS in the numbers of pictures: 1 (walk/y: 1 of the numbers 1 to 3 are missing" in report
    )
    assert "ignored, not a video by its extension: 3" in report


def test_pictures_beside_videos_are_no_video(tmp_path):
    touch(tmp_path, "run/a.mp4", "run/1.jpg", "run/2.jpg")
    listing = list_videos(tmp_path, picture_folders=True)
    assert labeled(listing) == {"run/a.mp4": "run"}
    assert listing.picture_folders == ()


def test_a_csv_names_folders_with_spans(tmp_path):
    write_frames(tmp_path / "frames" / "x")
    write_frames(tmp_path / "frames" / "unlisted")
    table = tmp_path / "videos.csv"
    table.write_text("path,label,start,end\nframes/x,run,0,1\nframes/x,walk,1,2\n")
    listing = list_videos(table, picture_folders=True)
    assert labeled(listing) == {"frames/x#0-1000": "run", "frames/x#1000-2000": "walk"}
    assert listing.picture_folders == ("frames/x",)
    assert listing.unlisted == ("frames/unlisted",)


def test_one_folder_under_two_names_in_two_splits_is_said(tmp_path):
    write_frames(tmp_path / "train" / "run" / "x", range(2))
    (tmp_path / "val" / "run").mkdir(parents=True)
    (tmp_path / "val" / "run" / "y").symlink_to(tmp_path / "train" / "run" / "x")
    listing = list_videos(tmp_path, picture_folders=True)
    assert "ONE FILE IN TWO SPLITS" in listing.report()


def test_commands_that_read_videos_themselves_refuse_folders(tmp_path):
    write_frames(tmp_path / "v" / "run" / "x", range(2))
    with pytest.raises(InputError, match=r"such as run/x; only `extract` reads them, with --frame"):
        list_videos(tmp_path / "v")
    with pytest.raises(InputError, match="folders of numbered pictures, such as run/x; only"):
        videos_of([tmp_path / "v"])


# -- decoding ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "mode"), [("img_%05d.jpg", "RGB"), ("%d.png", "RGBA"), ("f%d.JPEG", "L")]
)
def test_frames_are_those_of_opening_each_picture(tmp_path, name, mode):
    numbers = [*range(8, 15), 20]
    write_frames(tmp_path, numbers, name=name)
    for path in tmp_path.iterdir():
        Image.open(path).convert(mode).save(path)
    decoded = decode(tmp_path, every, frame_rate=RATE)
    wanted = np.stack([opened(tmp_path / (name % number)) for number in numbers])
    np.testing.assert_array_equal(decoded.frames, wanted)
    np.testing.assert_array_equal(decoded.indices, np.arange(8))
    np.testing.assert_array_equal(decoded.timestamps, (np.arange(8) / RATE).astype("f4"))
    assert decoded.end == 0.8
    assert (decoded.problem, decoded.num_frames) == ("", 8)
    assert decoded.note == (
        "5 of the numbers 8 to 20 are missing, from 15 on; times count the pictures that exist"
    )


def test_spans_are_read_by_time_and_one_picture_once(tmp_path, monkeypatch):
    write_frames(tmp_path, range(20))
    opens: list[str] = []
    real = Image.open
    monkeypatch.setattr(Image, "open", lambda path, **how: opens.append(path) or real(path, **how))
    spans = [((0.0, 0.5), lambda times: every(len(times))), ((0.25, 1.0), lambda _: [0, 0])]
    decoded = dict(decode_spans(tmp_path, spans, frame_rate=RATE))
    assert decoded[0].indices.tolist() == [0, 1, 2, 3, 4]
    assert decoded[1].indices.tolist() == [3]
    assert len(opens) == 6  # and the first once more, for its size
    [(_, beyond)] = decode_spans(tmp_path, [((2.0, 3.0), lambda _: [0])], frame_rate=RATE)
    assert "no frame of it is shown from 2 to 3 s (the file ends at 2.000 s" in str(beyond)


def test_pictures_are_turned_as_they_are_displayed(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    write_frames(tmp_path, range(3), exif=exif)
    decoded = decode(tmp_path, every, frame_rate=RATE)
    assert decoded.frames.shape == (3, 48, 36, 3)
    np.testing.assert_array_equal(
        decoded.frames[0], np.rot90(opened(tmp_path / "img_00000.jpg"), 3)
    )
    assert decoded.problem == ""


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-200])


def resize(path: Path) -> None:
    Image.open(path).resize((20, 10)).save(path)


def make_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def empty(path: Path) -> None:
    path.write_bytes(b"")


def enlarge(path: Path) -> None:
    """Change the header of a JPEG, so that it claims 65,000 x 65,000 pixels."""
    content = bytearray(path.read_bytes())
    place = content.index(b"\xff\xc0") + 5
    content[place : place + 4] = b"\xfd\xe8\xfd\xe8"
    path.write_bytes(content)


def stretch(path: Path) -> None:
    Image.new("RGB", (4000, 10)).save(path)


def deepen(path: Path) -> None:
    Image.fromarray(np.full((36, 48), 40_000, np.uint16)).save(path, format="PNG")


DAMAGE = {
    truncate: "img_00007.jpg cannot be decoded: image file is truncated",
    resize: "img_00007.jpg is 20 x 10, most pictures are 48 x 36",
    make_pipe: "img_00007.jpg is a pipe, a socket or a device, not a file",
    empty: "img_00007.jpg the file is empty (0 bytes)",
    enlarge: "img_00007.jpg has more than 67,108,864 pixels",
    stretch: "img_00007.jpg its pictures are 4000 x 10; expected at most",
    deepen: "img_00007.jpg has I;16 pixels; expected 8 bits per color",
}


@pytest.mark.parametrize("damage", DAMAGE, ids=lambda damage: damage.__name__)
def test_a_damaged_picture_in_the_middle(tmp_path, damage):
    write_frames(tmp_path, range(20))
    damage(tmp_path / "img_00007.jpg")
    decoded = decode(tmp_path, every, frame_rate=RATE)
    good = [number for number in range(20) if number != 7]
    assert decoded.indices.tolist() == good
    assert decoded.num_frames == 19
    assert decoded.problem.startswith(f"1 of 20 pictures are damaged ({DAMAGE[damage]}")
    np.testing.assert_array_equal(decoded.timestamps, (np.array(good) / RATE).astype("f4"))
    wanted = np.stack([opened(tmp_path / f"img_{number:05d}.jpg") for number in good])
    np.testing.assert_array_equal(decoded.frames, wanted)
    # Spans and frames that do not contain it are not affected.
    assert decode(tmp_path, every, span=(1.0, 2.0), frame_rate=RATE).problem == ""
    assert decode(tmp_path, lambda _: [6, 8], frame_rate=RATE).problem == ""
    spans = [((0.0, 1.0), lambda times: every(len(times))), ((1.0, 2.0), lambda _: [0])]
    together = dict(decode_spans(tmp_path, spans, frame_rate=RATE))
    assert together[0].problem.startswith("1 of 10 pictures are damaged (img_00007.jpg")
    assert together[1].problem == ""


@pytest.mark.parametrize("number", [0, 19])
def test_a_first_or_last_picture_that_is_damaged(tmp_path, number):
    write_frames(tmp_path, range(20))
    resize(tmp_path / f"img_{number:05d}.jpg")
    decoded = decode(tmp_path, every, frame_rate=RATE)
    assert decoded.frames.shape == (19, 36, 48, 3)
    assert decoded.problem.startswith("1 of 20 pictures are damaged (img_000")
    empty(tmp_path / f"img_{number:05d}.jpg")
    assert len(decode(tmp_path, every, frame_rate=RATE).frames) == 19


def test_nothing_can_be_decoded(tmp_path):
    write_frames(tmp_path / "x", range(3))
    for path in (tmp_path / "x").iterdir():
        path.write_bytes(b"nothing")
    with pytest.raises(
        VideoError, match=r"not one of its pictures .* \(img_00000.jpg cannot be dec"
    ):
        decode(tmp_path / "x", every, frame_rate=RATE)
    with pytest.raises(VideoError, match="not one of numbered pictures of one pattern"):
        decode(tmp_path, every, frame_rate=RATE)
    with pytest.raises(VideoError, match="is a folder, not a video"):
        decode(tmp_path / "x", every)


def test_a_folder_that_goes_away(tmp_path, monkeypatch):
    write_frames(tmp_path, range(3))

    def gone(path):
        raise FileNotFoundError(2, "No such file or directory")

    monkeypatch.setattr(picture_reader.os, "listdir", gone)
    with pytest.raises(VideoError, match="cannot be read: No such file"):
        decode(tmp_path, every, frame_rate=RATE)


def test_clips_of_a_rate_of_their_own(tmp_path):
    write_frames(tmp_path, range(40))
    see = Preprocessing(32, 36, "bilinear", (0.5,) * 3, (0.5,) * 3)
    plan = Plan(2, 1, 0, see, clip_length=4, clip_fps=5.0, frame_rate=RATE)
    prepared = prepare_row(str(tmp_path), "x", plan, np.empty(plan.row_bytes, np.uint8))
    assert prepared.frame_indices[prepared.clips[0]].tolist() == [[8, 10, 12, 14], [28, 30, 32, 34]]


def test_a_gpu_leaves_folders_to_the_children(tmp_path):
    class Children:
        def submit(self, job):
            self.job = job
            return self

        def result(self):
            return JobResult([Prepared(*np.zeros((3, 1, 1, 1), int), 20)])

    plan = Plan(2, 1, 0, Preprocessing(32, 36, "bilinear", (0.5,) * 3, (0.5,) * 3))
    decoder = GpuDecoder(children := Children(), print, "cuda:0", timeout=1.0)
    job = str(tmp_path), [("x", None)], Plan(**vars(plan) | {"decoder": "torchcodec-cuda"})
    [prepared] = decoder(job).result
    assert (prepared.num_frames, prepared.note) == (20, "")
    assert children.job == (str(tmp_path), [("x", None)], plan)


# -- what identifies a folder --------------------------------------------------------------------------------------


def test_the_source_of_a_folder(tmp_path):
    folder = write_frames(tmp_path / "x", range(5))
    source = read_source(folder)
    assert source.size == sum(path.stat().st_size for path in folder.iterdir())
    assert source.mtime_ns == max(path.stat().st_mtime_ns for path in folder.iterdir())
    assert stat_source(folder) == (source.size, source.mtime_ns)
    assert read_source(shutil.copytree(folder, tmp_path / "copy"))[:2] == source[:2]
    (folder / "n_frames").write_text("5")  # is not a picture
    assert read_source(folder)[:2] == source[:2]
    renamed = tmp_path / "copy" / "img_00004.jpg"
    renamed.rename(renamed.with_name("img_00006.jpg"))
    assert read_source(tmp_path / "copy")[:2] != source[:2]
    (folder / "img_00004.jpg").write_bytes((folder / "img_00004.jpg").read_bytes()[:-1] + b"\0")
    assert read_source(folder).size == source.size
    assert read_source(folder).digest != source.digest
    assert read_source(tmp_path) == UNKNOWN
    assert stat_source(tmp_path)[0] == 0


def test_time_grows_with_the_pictures(tmp_path):
    write_frames(tmp_path, range(2))
    for path in tmp_path.iterdir():
        os.truncate(path, 10_000_000)
    assert time_limit(60.0, tmp_path) == 70.0


def test_lengths(tmp_path):
    write_frames(tmp_path / "x", range(30))
    paths = [str(tmp_path / "x"), str(tmp_path)]
    assert file_lengths(paths, timeout=9, frame_rate=RATE) == {paths[0]: 3.0, paths[1]: None}
    assert file_lengths(paths, timeout=9) == dict.fromkeys(paths)


# -- extraction ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def both(tmp_path_factory) -> Path:
    """Two classes: two folders of PNGs, and a video that shows the frames of one of them."""
    root = tmp_path_factory.mktemp("both") / "v"
    write_frames(root / "run" / "x", range(1, 31), name="%04d.png")
    write_frames(root / "walk" / "y", range(1, 21), name="%04d.png")
    write_video(root / "walk" / "z.mp4", frames=20)
    return root


def statuses(store: FeatureStore) -> Mapping[str, int]:
    return dict(zip(store.ids.tolist(), store.status.tolist(), strict=True))


def test_extraction_of_both_kinds_and_continuing_it(both, tmp_path, capsys):
    out = tmp_path / "f.zarr"
    store = extracted(both, out, "--frame-rate", RATE)
    assert statuses(store) == {"run/x": OK, "walk/y": OK, "walk/z.mp4": OK}
    assert store.provenance["sampling"]["frame_rate"] == RATE
    assert "Pillow" in store.provenance["decoder"]["version"]
    np.testing.assert_allclose(store.timestamps[0, 0], np.array([3, 11, 18, 26]) / RATE, atol=0.11)
    assert [tuple(row) for row in store.sources] == [
        read_source(both / name)[:2] for name in store.ids
    ]
    capsys.readouterr()
    assert len(extracted(both, out)) == 3  # the rate comes from the store
    assert "--frame-rate 10.0" in capsys.readouterr().out
    extracted(both, out, "--frame-rate", 12, status=2)
    assert "frame_rate: 10.0 in the store, 12.0 now" in capsys.readouterr().err
    assert run(verify, out, "--sources") == 0
    assert "3 files below" in capsys.readouterr().out


def test_a_picture_that_is_replaced_is_noticed(both, tmp_path, capsys):
    videos = shutil.copytree(both, tmp_path / "v")
    out = tmp_path / "f.zarr"
    extracted(videos, out, "--frame-rate", RATE)
    write_frames(videos / "run" / "x", [30], name="%04d.png")
    capsys.readouterr()
    extracted(videos, out)
    assert "replaced  files are not those that were extracted: 1 (run/x)" in capsys.readouterr().out
    assert run(verify, out, "--sources") == 1
    assert "replaced: run/x has" in capsys.readouterr().out
    extracted(videos, out, "--retry-changed")
    assert run(verify, out, "--sources") == 0


def test_windows_of_pictures(both, tmp_path):
    store = extracted(both, tmp_path / "f.zarr", "--frame-rate", RATE, "--window", 1)
    by_id = statuses(store)
    assert [name for name in by_id if name.startswith("run/x")] == [
        "run/x#0-1000",
        "run/x#1000-2000",
        "run/x#2000-3000",
    ]
    assert set(by_id.values()) == {OK}
    assert store.num_frames[0] == 10
    assert store.frame_indices[1, 0].min() >= 10


def test_damage_is_partial_or_failed_by_name(tmp_path):
    for name in "xyz":
        write_frames(tmp_path / "v" / "run" / name, range(8))
    empty(tmp_path / "v" / "run" / "x" / "img_00003.jpg")
    for path in (tmp_path / "v" / "run" / "y").iterdir():
        empty(path)
    more = ("--frame-rate", RATE, "--max-failed", 1, "--frames", 8)
    store = extracted(tmp_path / "v", tmp_path / "f.zarr", *more)
    assert statuses(store) == {"run/x": PARTIAL, "run/y": FAILED, "run/z": OK}
    assert "1 of 8 pictures are damaged (img_00003.jpg the file is empty" in store.errors[0]
    assert "not one of its pictures can be decoded (img_00000.jpg" in store.errors[1]


def test_the_rate_is_required_and_never_needless(both, tmp_path, capsys):
    arguments = ("--videos", both, "--out", tmp_path / "f.zarr", *TINY)
    assert run(extract, *arguments) == 2
    error = capsys.readouterr().err
    assert "lists folders of numbered pictures (2, like " in error
    assert "give --frame-rate, how many are shown per second" in error
    assert run(extract, *arguments, "--frame-rate", 0) == 2
    assert "--frame-rate 0.0: expected more than 0" in capsys.readouterr().err
    only = ("--videos", both / "walk" / "z.mp4", "--out", tmp_path / "f.zarr", *TINY)
    assert run(extract, *only, "--frame-rate", 5) == 2
    assert "--frame-rate 5 is for folders of numbered pictures; " in capsys.readouterr().err
    assert not (tmp_path / "f.zarr").exists()


def test_a_clip_model_sees_pictures(tmp_path):
    write_frames(tmp_path / "v" / "run" / "x", range(20))
    clips = ("--backbone", "torchvision/r3d_18", "--clip-frames", 4, "--clip-fps", 5)
    store = extracted(tmp_path / "v", tmp_path / "f.zarr", "--frame-rate", RATE, *clips)
    assert store.status.tolist() == [OK]
