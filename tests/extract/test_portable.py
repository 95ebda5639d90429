"""The whole pipeline without features that only Linux has (memfd, prctl, madvise, /proc), and each
of the replacements alone."""

import json
import mmap
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from extract import portable
from extract.cores import has_native_bf16

ROOT = Path(__file__).parents[2]
PORTABLE = os.environ | {"HGNL_PORTABLE": "1", "PYTHONPATH": str(ROOT)}


@pytest.fixture
def elsewhere(monkeypatch):
    """A system other than Linux: calls of functions that only Linux has fail."""
    monkeypatch.setattr(portable, "ON_LINUX", False)
    monkeypatch.delattr(os, "memfd_create", raising=False)


def test_memory_is_shared_through_a_file_without_a_name(elsewhere):
    descriptor = portable.shared_memory(3 * mmap.PAGESIZE)
    try:
        ours, theirs = (mmap.mmap(descriptor, 3 * mmap.PAGESIZE) for _ in range(2))
        ours[-3:] = b"abc"
        assert theirs[-3:] == b"abc"
        assert os.fstat(descriptor).st_nlink == 0, "it goes with the last process that has it"
    finally:
        os.close(descriptor)


def test_memory_and_the_cpu_without_proc(elsewhere):
    assert portable.read_proc("meminfo") == ""
    assert (
        portable.memory_available() == os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    )
    assert not has_native_bf16()


@pytest.mark.skipif(sys.platform != "linux", reason="tests glibc's malloc")
def test_freed_memory_is_kept_for_later_allocations():
    script = """
import resource, sys
import numpy as np
from extract.portable import keep_freed_memory
if sys.argv[1] == "keep":
    keep_freed_memory()
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
np.ones(4_000_000)
before = faults()
for _ in range(10):
    np.ones(4_000_000)  # 32 MB, 7,813 pages
print(faults() - before)
"""

    def count(*arguments):
        command = [sys.executable, "-c", script, *arguments]
        env = PORTABLE | {"HGNL_PORTABLE": "0"}
        return int(subprocess.run(command, env=env, check=True, capture_output=True).stdout)

    assert count("keep") < 1000
    assert count("keep") < count("no") / 10


def test_no_advice_where_there_is_none(elsewhere):
    portable.advise(None, 0, 0, 0)  # nothing is called


@pytest.mark.parametrize(
    "environment", [PORTABLE, PORTABLE | {"HGNL_PORTABLE": "0"}], ids=["portable", "as it is"]
)
def test_a_process_ends_with_its_parent(environment):
    child = (
        "import time; from extract.portable import end_with_parent\n"
        "end_with_parent(); print(1, flush=True); time.sleep(60)"
    )
    parent = (
        "import subprocess, sys\n"
        f"child = subprocess.Popen([sys.executable, '-c', {child!r}], stdout=subprocess.PIPE)\n"
        "child.stdout.readline()\nprint(child.pid)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", parent], env=environment, capture_output=True, text=True, check=True
    )
    deadline = time.monotonic() + 30
    while _runs(int(done.stdout)):
        assert time.monotonic() < deadline, "it outlived its parent"
        time.sleep(0.05)


def _runs(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return "zombie" not in portable.read_proc(f"{pid}/status")


def test_extract_train_report_and_predict_without_what_only_linux_has(tmp_path):
    """They run in one process and its children, in which no Linux-only function can be called."""
    for number, clip in enumerate(
        sorted((ROOT / "pipelines/clips/exercise_mini/clips").rglob("*.mp4"))[:8]
    ):
        folder = (
            tmp_path / "videos" / ("val" if number % 4 == 3 else "train") / f"class {number % 2}"
        )
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{number}.mp4").symlink_to(clip)
    clip = next((tmp_path / "videos" / "val").rglob("*.mp4"))
    small = [
        "--backbone",
        "test_resnet",
        "--weights",
        "random",
        "--frames",
        "3",
        "--decode-workers",
        "1",
    ]
    train = [
        "--features",
        "feats.zarr",
        "--out",
        "runs/weighted",
        "--epochs",
        "1",
        "--placement",
        "mmap",
    ]
    commands = [
        ["extract", "--videos", "videos", "--out", "feats.zarr", *small],
        ["train", "--agg", "weighted", *train, "--allow-missing-classes"],
        ["report", "runs", "--out", "report.html"],
        ["predict", str(clip), "--checkpoint", "runs/weighted/best.pt"],
    ]
    code = (
        "import json, os, sys\ndel os.memfd_create\n"
        "from pipelines.__main__ import main\n"
        "for arguments in json.loads(sys.argv[1]):\n"
        "    assert main(arguments) == 0, arguments\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, json.dumps(commands)],
        env=PORTABLE,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "report.html").exists()
    assert "class " in done.stdout
