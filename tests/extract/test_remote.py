"""A store on object storage: written, resumed and used for training on a local S3 server; and two
drivers at once."""

import contextlib
import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from extract import RunError
from extract.__main__ import main
from extract.store import OK, FeatureStore, remote
from extract.store.remote import Lease, LocalCopy
from extractions import options, start_held
from stores import classes_store

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def s3(tmp_path_factory):
    """A local S3 server with a bucket `videos`, found through environment variables, as for
    users."""
    import boto3
    import s3fs
    from moto.server import ThreadedMotoServer

    with pytest.MonkeyPatch.context() as patch:
        server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
        server.start()
        host, port = server.get_host_and_port()
        patch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        patch.setenv("AWS_ACCESS_KEY_ID", "test")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "test")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        patch.setenv("HGNL_CACHE", str(tmp_path_factory.mktemp("cache")))
        boto3.client("s3").create_bucket(Bucket="videos")
        yield s3fs.S3FileSystem()
        server.stop()


@pytest.fixture(scope="module")
def clips(tmp_path_factory, demo_clips) -> Path:
    root = tmp_path_factory.mktemp("clips") / "barbell"
    root.mkdir()
    for clip in sorted((demo_clips / "exercise_mini" / "clips" / "barbell").glob("*.mp4"))[:8]:
        shutil.copy(clip, root / clip.name)
    return root.parent


@pytest.fixture
def quick(monkeypatch):
    """Leases with ten heartbeats per second."""
    monkeypatch.setattr(remote, "HEARTBEAT_SECONDS", 0.1)


@pytest.fixture
def impatient(quick):
    """A holder without heartbeats is waited for 1.5 s until `undo()`, because on a busy machine a
    live holder needs longer."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(remote, "LEASE_TIMEOUT", 1.5)
        yield patch


def objects(s3, url: str) -> dict[str, bytes]:
    return {path.partition(".zarr/")[2]: s3.cat_file(path) for path in s3.find(url)}


def files(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


@pytest.fixture(scope="module")
def undisturbed(clips, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("undisturbed") / "feats.zarr"
    assert main(options(clips, out)) == 0
    return out


def test_a_store_on_s3_is_the_store_on_a_disk(s3, clips, undisturbed, capsys):
    assert main(options(clips, "s3://videos/feats.zarr")) == 0
    assert objects(s3, "s3://videos/feats.zarr") == files(undisturbed)
    assert main(options(clips, "s3://videos/feats.zarr")) == 0
    assert "to do     0 videos" in capsys.readouterr().out


def test_a_killed_run_is_taken_over_and_ends_with_the_same_bytes(
    s3, clips, impatient, monkeypatch, tmp_path
):
    acquire = Lease._acquire

    def acquire_and_be_patient(self):
        number = acquire(self)
        impatient.undo()
        return number

    last = sorted(clips.rglob("*.mp4"))[-1].name
    with (tmp_path / "log").open("w") as log:
        run = start_held(clips, "s3://videos/killed.zarr", tmp_path, last, output=log, frames=16)
        while run.poll() is None and not committed("s3://videos/killed.zarr"):
            time.sleep(0.2)
        run.kill()
        run.wait()
    assert 0 < committed("s3://videos/killed.zarr") < 8
    monkeypatch.setattr(Lease, "_acquire", acquire_and_be_patient)
    assert main(options(clips, "s3://videos/killed.zarr", frames=16)) == 0
    assert main(options(clips, tmp_path / "whole.zarr", frames=16)) == 0
    assert objects(s3, "s3://videos/killed.zarr") == files(tmp_path / "whole.zarr")


def committed(url: str) -> int:
    with contextlib.suppress(Exception):  # not there yet, or half of its metadata
        return int((FeatureStore.open(url).status == OK).sum())
    return 0


def test_of_two_drivers_one_wins(s3, clips, quick):
    results: list[object] = []

    def run() -> None:
        try:
            results.append(main(options(clips, "s3://videos/both.zarr")))
        except RunError as error:
            results.append(str(error))

    threads = [threading.Thread(target=run) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert 0 in results
    (refused,) = [result for result in results if result != 0]
    assert f"s3://videos/both.zarr is being written by process {os.getpid()} on" in str(refused)


def test_many_who_create_the_same_lease(s3, impatient):
    """A race for the conditional put itself, after a dead holder: only the first one wins."""
    dead = Lease("s3://videos/race.zarr")
    dead._released.set()  # it has no heartbeat any more, and did not release the lease
    held, refused = [], []

    def take() -> None:
        try:
            held.append(Lease("s3://videos/race.zarr"))
        except RunError as error:
            refused.append(str(error))

    threads = [threading.Thread(target=take) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    impatient.undo()
    assert len(held) == 1
    assert len(refused) == 7
    held[0].ensure_held()
    held[0].close()


def test_a_driver_that_slept_has_lost(s3, impatient):
    sleeper = Lease("s3://videos/slept.zarr")
    sleeper._released.set()
    with contextlib.closing(Lease("s3://videos/slept.zarr")) as other:
        impatient.undo()
        other.ensure_held()
        sleeper._renewed -= remote.LEASE_TIMEOUT
        with pytest.raises(RunError, match=r"s3://videos/slept.zarr: this run has lost its lease"):
            sleeper.ensure_held()  # it has not renewed for too long
        sleeper._renew()
        with pytest.raises(RunError, match="has lost its lease"):
            sleeper.ensure_held()  # now it sees the other
        other.ensure_held()
    with contextlib.closing(Lease("s3://videos/slept.zarr")):  # released: no wait
        pass


def test_training_reads_a_checked_local_copy(s3, undisturbed):
    s3.put(str(undisturbed), "videos/copied.zarr", recursive=True)
    rows, frames = np.arange(8), np.arange(3)
    expected = FeatureStore.open(undisturbed).gather(rows, frames)
    store = FeatureStore.open("s3://videos/copied.zarr")
    np.testing.assert_array_equal(store.gather(rows[:2], frames), expected[:2])
    folder = LocalCopy("s3://videos/copied.zarr", store.layout).folder
    assert len(list(folder.iterdir())) == 1  # the requested shard
    np.testing.assert_array_equal(store.gather(rows, frames), expected)
    fetched = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert len(fetched) == 4
    np.testing.assert_array_equal(
        FeatureStore.open("s3://videos/copied.zarr").gather(rows, frames), expected
    )
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == fetched

    name = "videos/copied.zarr/features/c.1.0.0.0"
    good = s3.cat_file(name)
    s3.pipe_file(name, good[:10] + bytes([good[10] ^ 1]) + good[11:])
    with pytest.raises(
        RunError, match=r"c\.1\.0\.0\.0 is damaged: the checksum of its video 0 does not match"
    ):
        FeatureStore.open("s3://videos/copied.zarr").gather(rows, frames)
    s3.pipe_file(name, good)  # another version of the object: fetched again, and the older one goes
    np.testing.assert_array_equal(
        FeatureStore.open("s3://videos/copied.zarr").gather(rows, frames), expected
    )
    assert len(list(folder.iterdir())) == 4
    s3.rm_file(name)
    shutil.rmtree(folder)
    with pytest.raises(RunError, match=r"c\.1\.0\.0\.0 is missing"):
        FeatureStore.open("s3://videos/copied.zarr").gather(rows, frames)


def test_a_classifier_is_trained_and_tested_on_a_remote_store(s3, tmp_path):
    from aggregate import evaluate, train

    local = tmp_path / "feats.zarr"
    classes_store(local)
    s3.put(str(local), "videos/classes.zarr", recursive=True)
    chosen = train.Options(
        agg="tsn", features="s3://videos/classes.zarr", out=tmp_path / "run", epochs=2
    )
    assert not train.main(chosen)
    asked = evaluate.Options(
        checkpoint=tmp_path / "run" / "best.pt",
        features="s3://videos/classes.zarr",
        segments=(3,),
        out=tmp_path / "val.h5",
    )
    assert not evaluate.main(asked)


def test_a_lease_whose_put_succeeded_without_an_answer_is_ours(s3, quick, monkeypatch):
    """If the answer to a put is lost, S3 clients send the put again. The second put is refused
    because the first one succeeded."""
    real = Lease._put

    def put(self, number, record, mode="overwrite"):
        real(self, number, record, mode)
        if mode == "create":
            raise FileExistsError("At least one of the pre-conditions you specified did not hold")

    monkeypatch.setattr(Lease, "_put", put)
    with contextlib.closing(Lease("s3://videos/answer.zarr")) as lease:
        lease.ensure_held()


def test_a_lease_outlives_a_gap_of_the_network(s3, quick, monkeypatch):
    from botocore.exceptions import EndpointConnectionError

    monkeypatch.setattr(remote, "LEASE_TIMEOUT", 60.0)
    real, gap, lost, renewed = (
        Lease._put,
        threading.Event(),
        threading.Semaphore(0),
        threading.Semaphore(0),
    )

    def put(self, number, record, mode="overwrite"):
        if gap.is_set():
            lost.release()
            raise EndpointConnectionError(endpoint_url="https://s3.example")
        real(self, number, record, mode)
        renewed.release()

    monkeypatch.setattr(Lease, "_put", put)
    with contextlib.closing(Lease("s3://videos/gap.zarr")) as lease:
        gap.set()
        for _ in range(5):
            assert lost.acquire(timeout=60)
        assert lease._thread.is_alive()
        lease.ensure_held()
        before = lease._renewed
        while renewed.acquire(blocking=False):
            pass
        gap.clear()
        for _ in range(2):  # once the second has begun, the first is recorded
            assert renewed.acquire(timeout=60)
        assert lease._renewed > before
        while lost.acquire(blocking=False):
            pass
        gap.set()
        for _ in range(2):
            assert lost.acquire(timeout=60)
        lease._renewed -= 100
        with pytest.raises(
            RunError,
            match=r"lost its lease, with its network \(EndpointConnectionError: .*s3\.example",
        ):
            lease.ensure_held()


@pytest.mark.parametrize("command", ["status", "train", "extract"])
def test_without_a_network_one_sentence_is_said(command, clips, tmp_path):
    arguments = {
        "status": ["-m", "extract.status", "s3://videos/none.zarr"],
        "train": [
            "-m",
            "aggregate.train",
            "--agg",
            "tsn",
            "--features",
            "s3://videos/n.zarr",
            "--out",
            str(tmp_path),
        ],
        "extract": ["-m", "extract", "--videos", str(clips), "--out", "s3://videos/none.zarr"],
    }
    keys = {
        "AWS_ACCESS_KEY_ID": "x",
        "AWS_SECRET_ACCESS_KEY": "x",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    nowhere = {
        "AWS_ENDPOINT_URL": "http://127.0.0.1:9",
        "AWS_MAX_ATTEMPTS": "1",
        "PYTHONPATH": str(ROOT),
    }
    run = subprocess.run(
        [sys.executable, *arguments[command]],
        env=os.environ | keys | nowhere,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert run.returncode == 1, run.stderr
    assert "Traceback" not in run.stderr
    assert "cannot be reached (EndpointConnectionError" in run.stderr
    assert "check network, address and credentials" in run.stderr


def test_the_cache_is_listed_once_for_many_shards(s3, undisturbed, monkeypatch, tmp_path):
    monkeypatch.setenv("HGNL_CACHE", str(tmp_path))
    s3.put(str(undisturbed), "videos/listed.zarr", recursive=True)
    store = FeatureStore.open("s3://videos/listed.zarr")
    folder = LocalCopy("s3://videos/listed.zarr", store.layout).folder
    folder.mkdir(parents=True)
    (folder / f"c.1.0.0.0.{'0' * remote.TAG}").write_bytes(b"an older version")
    listings = []
    real = os.listdir
    monkeypatch.setattr(os, "listdir", lambda path=".": listings.append(path) or real(path))
    store.gather(np.arange(8), np.arange(3))
    assert [path for path in listings if Path(path) == folder] == [folder]
    assert len(list(folder.iterdir())) == 4
