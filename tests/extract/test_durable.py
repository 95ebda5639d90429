"""Temporary names are unique to the program, one process holds a folder, and leftovers of killed
runs are found."""

import os
import signal
import subprocess
import sys

import pytest

from aggregate import train
from extract import RunError
from extract.durable import LOCK, locked, replace_file, replacing
from extract.export import Options as ExportOptions
from extract.export import main as export
from extract.store import FeatureStore
from extract.store.locks import lock_store
from processes import running
from stores import classes_store


def test_two_writers_of_one_file_do_not_touch_each_others_work(tmp_path):
    with replacing(tmp_path / "a") as one, replacing(tmp_path / "a") as other:
        assert one != other
        one.write_text("one")
        other.write_text("other")
    assert (tmp_path / "a").read_text() == "one"  # renamed last
    assert os.listdir(tmp_path) == ["a"]


def test_an_export_leaves_a_folder_of_the_users_alone(tmp_path):
    classes_store(tmp_path / "f.zarr", videos=6)
    (tmp_path / "X.partial").mkdir()
    (tmp_path / "X.partial" / "thesis.txt").write_text("my only copy")
    assert export(ExportOptions(str(tmp_path / "f.zarr"), tmp_path / "X")) == 0
    assert (tmp_path / "X.partial" / "thesis.txt").read_text() == "my only copy"
    with locked(tmp_path):
        assert (tmp_path / "X.partial" / "thesis.txt").exists()


def test_what_a_killed_run_left_goes_with_the_next_lock(tmp_path):
    program = (
        "import os, signal, sys; from extract.durable import replacing\n"
        "with replacing(sys.argv[1]) as partial:\n"
        "    partial.mkdir(); (partial / 'x').write_text('half'); os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    ended = subprocess.run([sys.executable, "-c", program, str(tmp_path / "f.zarr")], check=False)
    assert ended.returncode == -signal.SIGKILL
    (tmp_path / "best.pt.partial").write_text("a name that only a user would choose")
    assert len(os.listdir(tmp_path)) == 2
    with lock_store(tmp_path / "other.zarr"):
        assert len(os.listdir(tmp_path)) == 3
    with lock_store(tmp_path / "f.zarr"):
        assert sorted(os.listdir(tmp_path)) == ["best.pt.partial", "f.zarr.log", "other.zarr.log"]
    (tmp_path / f"last.pt.{'0' * 32}.partial").write_text("half")
    with locked(tmp_path):
        assert sorted(os.listdir(tmp_path)) == [
            LOCK,
            "best.pt.partial",
            "f.zarr.log",
            "other.zarr.log",
        ]
    assert sorted(os.listdir(tmp_path)) == ["best.pt.partial", "f.zarr.log", "other.zarr.log"]


def test_a_folder_is_held_by_one_process_and_not_left_behind_empty(tmp_path):
    folder = tmp_path / "runs" / "a"
    message = rf"runs/a is being written by process {os.getpid()} on "
    with locked(folder), pytest.raises(RunError, match=message), locked(folder):
        pass
    assert not folder.exists()
    with locked(folder):
        replace_file(folder / "x", "x")
    assert os.listdir(folder) == ["x"]
    (tmp_path / "mine").mkdir()
    with locked(tmp_path / "mine"):
        pass
    assert (tmp_path / "mine").is_dir()


def test_two_trainings_in_one_folder_are_kept_apart(tmp_path):
    """The second is refused while the first runs, with any options. After a kill -9 the folder is
    free again."""
    classes_store(tmp_path / "f.zarr")
    out = tmp_path / "run"
    command = f"aggregate.train --agg tsn --features {tmp_path / 'f.zarr'} --out {out} --epochs 100000 --batch-size 8"
    wanted = train.Options(
        agg="tsn", features=str(tmp_path / "f.zarr"), out=out, epochs=100000, batch_size=8
    )
    with running(command, until=(out / "last.pt").exists) as process:
        with pytest.raises(
            RunError,
            match=rf"is being written by process {process.pid} on .*; wait for it, stop it",
        ):
            train.main(wanted)
        process.kill()
        process.wait()
    assert FeatureStore.open(tmp_path / "f.zarr").status.all()
    with locked(out):
        names = {path.name.split(".tfevents")[0] for path in out.iterdir()} - {LOCK}
    assert names <= {
        "best.pt",
        "last.pt",
        "metrics.csv",
        "options.json",
        "videos.csv",
        "events.out",
    }
