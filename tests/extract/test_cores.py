"""The number of cores: affinity, a container's quota, OMP_NUM_THREADS, --threads."""

import os
import subprocess
import sys
import uuid
from pathlib import Path

import pytest

from extract.cores import available_cores


@pytest.fixture
def machine(monkeypatch):
    for function in ("joblib.cpu_count", "os.cpu_count"):
        monkeypatch.setattr(function, lambda: 64)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)


@pytest.mark.parametrize(
    ("threads", "limit", "expected"),
    [
        (None, None, 64),
        ("4", None, 4),
        ("128", None, 64),
        ("8,2", None, 8),
        ("0", None, 64),
        ("many", None, 64),
        ("4", 12, 12),
        ("4", 1000, 64),
    ],
)
def test_the_least_of_what_is_allowed(threads, limit, expected, machine, monkeypatch):
    if threads is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", threads)
    assert available_cores(limit) == expected


@pytest.mark.parametrize(
    ("quota", "expected"), [("400000 100000", 4), ("150000 100000", 2), ("max 100000", 64)]
)
def test_a_containers_quota(quota, expected, monkeypatch):
    """A fake cgroup of version 2, as joblib reads it."""
    real_open, real_exists = open, os.path.exists
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr("os.cpu_count", lambda: 64)
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: range(64))
    monkeypatch.setattr(
        "os.path.exists",
        lambda path: "cpu.max" in str(path) or ("cfs" not in str(path) and real_exists(path)),
    )

    def opened(path, *args, **kwargs):
        import io

        return (
            io.StringIO(quota)
            if str(path).endswith("cpu.max")
            else real_open(path, *args, **kwargs)
        )

    monkeypatch.setattr("builtins.open", opened)
    assert available_cores() == expected


COUNT = "from extract.cores import available_cores; print(available_cores())"


def test_a_real_quota():
    """A process whose cgroup root has a quota of one core, as in a container (version 1 or 2, needs
    root)."""
    root = next(
        (path for path in (Path("/sys/fs/cgroup/cpu"), Path("/sys/fs/cgroup")) if path.is_dir()),
        None,
    )
    if root is None:
        pytest.skip("no cgroups here")
    group = root / f"hgnl-{uuid.uuid4().hex[:8]}"
    env = {key: value for key, value in os.environ.items() if key != "OMP_NUM_THREADS"}
    seen = f"mount --bind {group} {root} && exec {sys.executable} -c '{COUNT}'"
    try:
        group.mkdir()
    except OSError as error:
        pytest.skip(f"no cgroup can be made here: {error}")
    try:
        if root.name == "cpu":
            (group / "cpu.cfs_quota_us").write_text("100000")  # per 100 ms
        else:
            (group / "cpu.max").write_text("100000 100000")
        subprocess.run(["unshare", "--mount", "true"], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"no quota can be set, or no mount be made here: {error}")
    else:
        done = subprocess.run(
            ["unshare", "--mount", "sh", "-c", seen], env=env, capture_output=True, text=True
        )
        assert done.stdout.strip() == "1", done.stderr
    finally:
        group.rmdir()


def test_threads_reach_the_worker_and_its_children(tmp_path, monkeypatch):
    from extract.options import Options
    from extract.workers import driver

    monkeypatch.setattr("os.cpu_count", lambda: 64)
    chosen = Options(
        videos=tmp_path, out=str(tmp_path / "a.zarr"), device="cpu", threads=3, weights="random"
    )
    assert driver.worker_pool(chosen, None, []).cores == 3


def test_decoding_processes_are_at_most_16_per_core(tmp_path, monkeypatch):
    from extract.options import Options
    from extract.workers import worker

    asked = []
    monkeypatch.setattr(worker, "start_pool", lambda *_, workers, **__: asked.append(workers))
    monkeypatch.setattr(worker, "available_cores", lambda limit=None: limit or 2)
    for count in (5, 1000):
        chosen = Options(videos=tmp_path, out=str(tmp_path / "a.zarr"), decode_workers=count)
        monkeypatch.setattr(worker.Worker, "_plan", None)
        worker.Worker(chosen, 2, None)._start_children()
    assert asked == [5, 32]
