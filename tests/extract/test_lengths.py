"""Lengths of files: measured once, in children that can be killed, and kept next to the store."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest

from decode_jobs import never_done
from extract import InputError
from extract.__main__ import Options, main
from extract.decode import decode
from extract.decode.pool import SubprocessPool
from extract.listing.videos import list_videos
from extract.listing.windows import cut_windows, file_lengths, window_spans
from extract.store import FAILED, OK, FeatureStore
from odd_files import write_pictures
from videos import write_video


def test_lengths_are_kept_beside_the_store_and_a_changed_file_is_opened_again(
    tmp_path, monkeypatch
):
    videos = [str(write_pictures(tmp_path / f"{n}.mp4", (64, 48), n)) for n in (10, 20)]
    broken = tmp_path / "broken.mp4"
    broken.write_bytes(b"no video")
    cache = tmp_path / "feats.zarr.lengths"
    expected = {
        videos[0]: 1.0,
        videos[1]: 2.0,
        str(broken): None,
        str(tmp_path / "absent.mp4"): None,
    }
    opened = []
    submit = SubprocessPool.submit
    monkeypatch.setattr(
        SubprocessPool, "submit", lambda pool, job: opened.append(job[0]) or submit(pool, job)
    )
    assert file_lengths(expected, timeout=60, cache=cache) == pytest.approx(expected, nan_ok=True)
    assert opened == [*videos, str(broken)]
    with cache.open("a") as file:
        file.write('["cut sho')  # by a kill
    opened.clear()
    assert file_lengths(expected, timeout=60, cache=cache) == pytest.approx(expected)
    assert opened == [str(broken)]
    write_pictures(Path(videos[0]), (64, 48), 30)
    opened.clear()
    assert file_lengths(videos, timeout=60, cache=cache) == pytest.approx(
        {videos[0]: 3.0, videos[1]: 2.0}
    )
    assert opened == [videos[0]]


def test_many_files_are_asked_a_few_at_a_time(tmp_path, monkeypatch):
    monkeypatch.setattr("extract.listing.windows._MAX_PENDING", 3)
    source = write_pictures(tmp_path / "a.mp4", (64, 48), 10)
    names = [tmp_path / f"{n}.mp4" for n in range(9)]
    for name in names:
        name.symlink_to(source)
    assert file_lengths(map(str, names), timeout=60) == pytest.approx(
        dict.fromkeys(map(str, names), 1.0)
    )


def test_a_file_that_would_be_millions_of_windows_is_refused_by_name(tmp_path):
    path = str(write_pictures(tmp_path / "a.mp4", (64, 48), 30))
    with pytest.raises(
        InputError, match=r"a\.mp4 lasts 3 s, which is 1,500,000 windows; expected at most"
    ):
        cut_windows(list_videos(tmp_path).videos, {path: 3.0}, 2e-6, 2e-6)


def test_files_whose_lengths_hang_are_given_up(tmp_path, monkeypatch):
    path = str(write_pictures(tmp_path / "a.mp4", (64, 48), 30))
    monkeypatch.setattr("extract.decode.jobs.decode_job", never_done)
    started = time.monotonic()
    lengths = file_lengths([path], timeout=0.5)
    windows = cut_windows(list_videos(tmp_path).videos, lengths, 1.0, 1.0)
    assert [video.id for video in windows] == ["a.mp4"]
    assert time.monotonic() - started < 30


@pytest.mark.parametrize("name", [signal.SIGTERM, signal.SIGINT])
def test_a_listing_ends_at_once(name, tmp_path):
    """It ends while a file that does not answer is being opened."""
    write_pictures(tmp_path / "a.mp4", (64, 48), 30)
    program = (
        f"import sys; sys.path.insert(0, {str(Path(__file__).parents[1])!r})\n"
        "from decode_jobs import never_done\n"
        "from extract.decode import jobs\n"
        "from extract.__main__ import main\n"
        "from extract.cli import run_command\n"
        "from extract.options import Options\n"
        "jobs.decode_job = never_done\n"
        "sys.exit(run_command(main, Options, prog='extract'))\n"
    )
    arguments = ["--videos", str(tmp_path), "--out", str(tmp_path / "x.zarr"), "--window", "1"]
    begun = tmp_path / "begun"
    command = [sys.executable, "-c", program, *arguments]
    environment = os.environ | {"HGNL_TEST_BEGUN": str(begun)}
    with subprocess.Popen(command, start_new_session=True, env=environment) as process:
        deadline = time.monotonic() + 100
        while not begun.exists():
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.05)
        children = psutil.Process(process.pid).children()
        assert children
        process.send_signal(name)
        started = time.monotonic()
        assert process.wait(60) == 130
        assert time.monotonic() - started < 30  # the file's own deadline is a minute
        assert not any(
            child.is_running() and child.status() != psutil.STATUS_ZOMBIE for child in children
        )


def test_a_window_that_the_tool_chose_is_no_alarm(tmp_path):
    """In every container, the last window ends when the file does."""
    for name in ("a.mp4", "a.mkv", "a.avi", "a.ts", "a.flv", "a.mpg"):
        codec = {"a.avi": "mpeg4", "a.mpg": "mpeg2video"}.get(name, "libx264")
        path = write_video(tmp_path / name, codec=codec, frames=33, fps=25, gop=10, bframes=2)
        seconds = file_lengths([str(path)], timeout=60)[str(path)]
        assert seconds == pytest.approx(33 / 25, abs=0.041), name
        for span in window_spans(seconds, 0.5, 0.5):
            assert decode(path, np.arange, span=span).problem == "", (name, span)


@pytest.mark.parametrize("window", [None, 1.0])
def test_one_bad_file_harms_only_itself(window, tmp_path, capsys):
    """One list has every odd file: each fails by name, in seconds, and the others are extracted."""
    videos = tmp_path / "videos"
    (videos / "sub").mkdir(parents=True)
    for name in ("good.mp4", "sub/other.mp4"):
        write_pictures(videos / name, (128, 96), 30)
    write_pictures(videos / "thin8.mp4", (4096, 8), 5)
    write_pictures(videos / "thin2.mkv", (8192, 2), 5, codec="ffv1")
    write_pictures(videos / "gap.mkv", (64, 48), 3, times=[0, 0.1, 3e6])
    os.mkfifo(videos / "pipe.mp4")
    (videos / "concat.mp4").write_text("ffconcat version 1.0\nfile sub/other.mp4\n")
    other = videos / "sub" / "other.mp4"
    (videos / "list.m3u8").write_text(
        f"#EXTM3U\n#EXT-X-TARGETDURATION:3\n#EXTINF:3,\nfile://{other}\n#EXT-X-ENDLIST\n"
    )
    names = [
        "good.mp4",
        "thin8.mp4",
        "thin2.mkv",
        "gap.mkv",
        "concat.mp4",
        "list.m3u8",
        "sub/other.mp4",
    ]
    table = tmp_path / "all.csv"
    table.write_text("path,label\n" + "".join(f"{name},a\n" for name in [*names, "pipe.mp4"]))
    small = {
        "backbone": "test_resnet",
        "weights": "random",
        "precision": "fp32",
        "frames": 3,
        "device": "cpu",
    }
    out = str(tmp_path / "feats.zarr")
    assert (
        main(Options(videos=table, root=videos, out=out, window=window, max_failed=1, **small)) == 0
    )
    store = FeatureStore.open(out)
    status = dict(
        zip(
            (name.partition("#")[0] for name in store.ids.tolist()),
            store.status.tolist(),
            strict=True,
        )
    )
    good = {"good.mp4", "sub/other.mp4"}
    assert {name for name, value in status.items() if value == OK} == good
    assert {name for name, value in status.items() if value == FAILED} >= set(names) - good
    shown = capsys.readouterr().out
    assert "pipe.mp4" in shown
    for reason in ("its pictures are", "its time stamps claim", "(concat)", "(hls)"):
        assert reason in shown
