"""Ray: several raylets on this machine, one of them killed in the middle; workers that cannot see store or videos."""

import os
import shutil
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from extract.__main__ import Options, main
from extract.cli import RunError
from extract.store import OK, FeatureStore, RunLog
from extract.workers.actor_pool import RayActorPool
from extract.workers.worker import Settings, Worker
from stores import store_digest

pytestmark = [pytest.mark.ray, pytest.mark.timeout(240)]


@pytest.fixture(scope="module")
def clips(tmp_path_factory, demo_clips) -> Path:
    root = tmp_path_factory.mktemp("clips")
    for label in ("barbell", "cable"):
        (root / label).mkdir()
        for clip in sorted((demo_clips / "exercise_mini" / "clips" / label).glob("*.mp4"))[:12]:
            shutil.copy(clip, root / label / clip.name)
    return root


def options(videos: Path, out: Path, **changed) -> Options:
    tiny = {"backbone": "test_resnet", "weights": "random", "precision": "fp32", "frames": 3, "block_size": 2}
    return Options(videos=videos, out=str(out), **(tiny | changed))


@pytest.fixture(scope="module")
def cluster():
    """Three nodes: a head without cores for workers, and two with one each."""
    import ray
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    yield cluster
    ray.shutdown()
    cluster.shutdown()


def disturbed(clips: Path, cluster, out: Path, disturb: Callable[[list, int], None]) -> None:
    """Extract over two nodes; when the first block is handed in, `disturb(nodes, process of the worker that did it)`.

    That worker has its next block in hand. The store must be the one a single process makes.
    """
    import ray

    nodes = [cluster.add_node(num_cpus=1) for _ in range(2)]
    cluster.wait_for_nodes()
    result: list[object] = []

    def run() -> None:
        try:
            result.append(main(options(clips, out, workers=2, address=cluster.address)))
        except BaseException as error:
            result.append(error)

    def blocks() -> list[dict]:
        return [record for record in RunLog.records(out) if record["event"] == "block"]

    thread = threading.Thread(target=run)
    thread.start()
    try:
        while thread.is_alive() and not blocks():
            time.sleep(0.01)
        disturb(nodes, int(blocks()[0]["node"].rpartition("/")[2]))  # a worker is named HOST/PROCESS
        assert len(blocks()) < 12, "the run was over before it was disturbed"
        thread.join(timeout=120)
    finally:
        ray.shutdown()
        for node in nodes:
            if node in cluster.worker_nodes:
                cluster.remove_node(node)
    assert result == [0]
    here = out.with_name("here.zarr")
    assert main(options(clips, here)) == 0
    assert store_digest(out) == store_digest(here)
    assert FeatureStore.open(out).status.tolist() == [OK] * 24


def test_a_killed_node_costs_nothing_but_time(clips, cluster, tmp_path):
    def kill(nodes: list, worker: int) -> None:
        raylet = psutil.Process(worker).ppid()
        (node,) = [node for node in nodes if node.all_processes["raylet"][0].process.pid == raylet]
        cluster.remove_node(node, allow_graceful=False)

    disturbed(clips, cluster, tmp_path / "ray.zarr", kill)


def test_a_killed_worker_costs_nothing_but_time(clips, cluster, tmp_path):
    disturbed(clips, cluster, tmp_path / "ray.zarr", lambda _, worker: os.kill(worker, signal.SIGKILL))


def test_a_worker_that_cannot_see_the_store_or_the_videos_fails_naming_its_node(clips, tmp_path):
    out = tmp_path / "a.zarr"
    assert main(options(clips, out, limit=1)) == 0
    nonce = RunLog.records(out)[0]["nonce"]
    clip = next(clips.rglob("*.mp4"))

    def worker(store: Path) -> Worker:
        return Worker(
            Settings(
                store=str(store),
                backbone="test_resnet",
                weights="random",
                device="cpu",
                precision="fp32",
                frames=3,
                crops=1,
                augment_passes=0,
                seed=0,
                decoder="pyav",
                decode_workers=1,
                video_timeout=9.0,
                threads=1,
            )
        )

    assert worker(out).check(nonce, str(clip))
    with pytest.raises(RunError, match=r"the worker on \S+ does not see the store .*b\.zarr"):
        worker(tmp_path / "b.zarr").check(nonce, str(clip))
    with pytest.raises(RunError, match=r"the worker on \S+ sees another .*a\.zarr than this run's"):
        worker(out).check("another nonce", str(clip))
    with pytest.raises(RunError, match=r"the worker on \S+ cannot read the videos: .*gone\.mp4"):
        worker(out).check(nonce, str(tmp_path / "gone.mp4"))


def test_no_cluster_at_the_address(clips, tmp_path):
    with pytest.raises(RunError, match=r"--address 127\.0\.0\.1:1"):
        main(options(clips, tmp_path / "a.zarr", address="127.0.0.1:1"))
    assert not (tmp_path / "a.zarr").exists()


def test_a_crew_that_never_gets_a_worker_says_so(monkeypatch):
    monkeypatch.setattr("extract.workers.actor_pool.SECONDS_WITHOUT_WORKERS", 1.0)
    pool = object.__new__(RayActorPool)

    class Nobody:
        @staticmethod
        def cluster_resources() -> dict[str, float]:
            return {"CPU": 2.0}

    pool._ray, pool._request = Nobody(), {"num_cpus": 64}
    with pytest.raises(RunError, match=r"asks for \{'num_cpus': 64\}, the cluster has \{'CPU': 2.0, 'GPU': 0\}"):
        pool._complain(2.0)
