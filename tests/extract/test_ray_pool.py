"""Ray: several raylets on this machine; workers, decoders and nodes that are lost during a run;
nodes that do not fit the run.

All tests, also training by several workers, share one cluster: a head without cores, to which each
test adds its nodes. A node may claim a GPU. What runs there uses the CPU, and the pool treats the
node as one with a GPU.
"""

import contextlib
import csv
import os
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest

from aggregate import finetune
from extract import RunError
from extract.__main__ import main
from extract.cli import run_command
from extract.store import OK, FeatureStore, RunLog
from extract.workers import driver
from extract.workers.decoder import code_version
from extract.workers.ray_pool import RayActorPool, plan_actors
from extract.workers.worker import Worker
from extractions import command_of, committed_blocks, decode_children, options, start_held
from ffmpeg import needs_torchcodec
from simulated import CrashingWorker, HeldPixelWorker, HeldWorker
from stores import store_digest

pytestmark = [pytest.mark.ray, pytest.mark.timeout(240)]

ROOT = Path(__file__).parents[2]
ONE_NODE = ({"num_cpus": 1},)
TWO_NODES = (*ONE_NODE, *ONE_NODE)
GPU_AND_CPU = ({"num_cpus": 1, "num_gpus": 1}, {"num_cpus": 2})


@pytest.fixture(autouse=True)
def _each_block_is_committed_at_once(monkeypatch) -> None:
    """So most blocks of a run are still to come when its first block is seen. New nodes are seen
    soon, too."""
    monkeypatch.setattr("extract.workers.ray_pool.COMMIT_SECONDS", 0.0)
    monkeypatch.setattr("extract.workers.ray_pool.NODE_POLL_SECONDS", 0.2)


@pytest.fixture(scope="module")
def clips(tmp_path_factory, demo_clips) -> Path:
    root = tmp_path_factory.mktemp("clips")
    for label in ("barbell", "cable"):
        (root / label).mkdir()
        for clip in sorted((demo_clips / "exercise_mini" / "clips" / label).glob("*.mp4"))[:12]:
            shutil.copy(clip, root / label / clip.name)
    return root


@pytest.fixture(scope="module")
def undisturbed(clips, tmp_path_factory) -> dict[str, str]:
    """The digest of the store that one worker makes in its own process."""
    out = tmp_path_factory.mktemp("undisturbed") / "feats.zarr"
    assert main(options(clips, out)) == 0
    return store_digest(out)


@pytest.fixture(scope="module")
def undisturbed_pixels(clips, tmp_path_factory) -> dict[str, str]:
    """The same with pixels instead of a backbone's features: workers with pixels start without
    torch."""
    out = tmp_path_factory.mktemp("undisturbed") / "pixels.zarr"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(driver, "Worker", HeldPixelWorker)
        assert main(options(clips, out)) == 0
    return store_digest(out)


class Nodes:
    """The nodes of a cluster besides its head: started when a test needs them, and kept for the
    next test."""

    def __init__(self, cluster: Any):
        self.cluster = cluster
        self._resources: dict[Any, dict[str, Any]] = {}

    def exactly(self, *resources: dict[str, Any]) -> list[Any]:
        """Have nodes with these resources and no others."""
        missing = list(resources)
        for node in [*self.cluster.worker_nodes]:
            if self._resources[node] in missing:
                missing.remove(self._resources[node])
            else:
                self.cluster.remove_node(node)
        return self.add(*missing)

    def add(self, *resources: dict[str, Any]) -> list[Any]:
        for each in resources:
            self._resources[self.cluster.add_node(**each)] = each
        self.cluster.wait_for_nodes()
        return [*self.cluster.worker_nodes]


@pytest.fixture(scope="module")
def told(tmp_path_factory) -> Path:
    """The folder in which a test tells a held worker how far to go."""
    return tmp_path_factory.mktemp("told")


@pytest.fixture(scope="module")
def nodes_of_cluster(told):
    import ray
    from ray.cluster_utils import Cluster

    with pytest.MonkeyPatch.context() as patch:
        # Actors of tests are found on every node.
        paths = [str(ROOT / "tests"), *filter(None, [os.environ.get("PYTHONPATH")])]
        patch.setenv("PYTHONPATH", os.pathsep.join(paths))
        patch.setenv("HGNL_TEST_HELD", str(told))
        # A killed node is noticed within seconds; the default takes 15. A slow one still has 10 s.
        checks = {"health_check_initial_delay_ms": 500, "health_check_period_ms": 300}
        head = {"num_cpus": 0, "include_dashboard": False, "_system_config": checks}
        cluster = Cluster(initialize_head=True, head_node_args=head)
        yield Nodes(cluster)
        ray.shutdown()
        cluster.shutdown()


@pytest.fixture
def cluster(nodes_of_cluster):
    return nodes_of_cluster.cluster


@pytest.fixture
def worker_nodes(nodes_of_cluster, told):
    """The cluster's nodes. After a test, no process of its run may be left on them."""
    (told / "hold").write_text("cable")
    yield nodes_of_cluster
    import ray

    ray.shutdown()
    wait_for(lambda: not decode_children() and not actors())


def actors(titles: tuple[str, ...] = ("ray::Worker", "ray::Decoder")) -> list[psutil.Process]:
    """Actor processes, found by the title that Ray gives them."""
    return [
        p
        for p in psutil.Process().children(recursive=True)
        if " ".join(command_of(p)).startswith(titles)
    ]


def decoders() -> list[psutil.Process]:
    return actors(("ray::Decoder",))


def wait_for(what: Callable[[], Any]) -> Any:
    deadline = time.monotonic() + 60
    while not (found := what()):
        assert time.monotonic() < deadline
        time.sleep(0.005)
    return found


def worker_of(out: Path) -> int:
    """The process of the worker that finished the first block; its name is HOST/PROCESS."""
    return int(committed_blocks(out)[0]["node"].rpartition("/")[2])


def raylet_of(nodes: list, process: int) -> Any:
    raylet = psutil.Process(process).ppid()
    (node,) = [node for node in nodes if node.all_processes["raylet"][0].process.pid == raylet]
    return node


@pytest.fixture
def disturbed(clips, cluster, told, monkeypatch) -> Callable[..., None]:
    """Extract over the cluster, and call `disturb()` when the first block is finished. The result
    must not change.

    The run cannot end earlier, since its workers wait at half of the videos until then.
    """

    def extract(
        out: Path, disturb: Callable[[], object], worker: type[Worker] = HeldPixelWorker
    ) -> None:
        result: list[object] = []
        monkeypatch.setattr(driver, "RayActorPool", partial(RayActorPool, worker=worker))
        asked = options(clips, out, address=cluster.address, video_timeout=200.0)

        def run() -> None:
            try:
                result.append(main(asked))
            except BaseException as error:
                result.append(error)

        thread = threading.Thread(target=run)
        thread.start()
        try:
            wait_for(lambda: committed_blocks(out) or not thread.is_alive())
            assert 0 < len(committed_blocks(out)) < 12, result
            disturb()
        finally:
            (told / "hold").unlink(missing_ok=True)
            thread.join(timeout=150)
        assert result == [0]

    return extract


def whole(out: Path, undisturbed: dict[str, str]) -> None:
    """The same bytes, and each block finished once."""
    assert store_digest(out) == undisturbed
    assert FeatureStore.open(out).status.tolist() == [OK] * 24
    assert sorted(block["number"] for block in committed_blocks(out)) == list(range(12))


def test_a_node_that_comes_late_takes_its_part(
    disturbed, worker_nodes, undisturbed, told, tmp_path
):
    """The first worker is stopped, while it holds blocks, until a second worker on the new node has
    finished one."""
    out = tmp_path / "ray.zarr"
    worker_nodes.exactly(*ONE_NODE)

    def disturb() -> None:
        first = psutil.Process(worker_of(out))
        first.suspend()
        (told / "hold").unlink()
        worker_nodes.add(*ONE_NODE)
        wait_for(
            lambda: (
                {block["node"] for block in committed_blocks(out)}
                - {committed_blocks(out)[0]["node"]}
            )
        )
        first.resume()

    disturbed(out, disturb, worker=HeldWorker)
    whole(out, undisturbed)


def test_a_killed_worker_costs_nothing_but_time(
    disturbed, worker_nodes, undisturbed_pixels, tmp_path
):
    out = tmp_path / "ray.zarr"
    worker_nodes.exactly(*TWO_NODES)

    def kill_while_it_writes() -> None:
        os.kill(worker_of(out), signal.SIGKILL)
        (out / "features" / "c.1.0.0.0.0123.partial").write_bytes(b"what such a worker leaves")

    disturbed(out, kill_while_it_writes)
    whole(out, undisturbed_pixels)


def test_a_killed_node_costs_nothing_but_time(
    disturbed, cluster, worker_nodes, undisturbed_pixels, tmp_path
):
    both, out = worker_nodes.exactly(*TWO_NODES), tmp_path / "ray.zarr"
    disturbed(
        out, lambda: cluster.remove_node(raylet_of(both, worker_of(out)), allow_graceful=False)
    )
    whole(out, undisturbed_pixels)


@needs_torchcodec()
def test_a_video_that_crashes_a_gpus_decoder_is_left_to_pyav_the_third_time(
    clips, cluster, worker_nodes, tmp_path, monkeypatch, capsys
):
    """Such a decoder runs in the process of its worker, which dies with it and loses all blocks
    that it holds."""
    few = tmp_path / "few"
    few.mkdir()
    for number, clip in enumerate(sorted(clips.rglob("*.mp4"))[:8]):
        (few / f"{number}{'-crash' if number == 1 else ''}.mp4").symlink_to(clip)
    worker_nodes.exactly(*ONE_NODE)
    monkeypatch.setattr(driver, "RayActorPool", partial(RayActorPool, worker=CrashingWorker))
    asked = options(
        few, tmp_path / "a.zarr", address=cluster.address, block_size=1, decoder="torchcodec-cpu"
    )
    assert main(asked) == 0
    store = FeatureStore.open(tmp_path / "a.zarr")
    assert store.status.tolist() == [OK] * 8
    assert store.errors[1] == "decoded by PyAV: workers died with it in hand"
    assert store.errors[7] == ""  # it was not held by a worker: at most five blocks are
    assert capsys.readouterr().err.count("a worker was lost") == 2


def driver_with_a_block(clips, out: Path, cluster, told, log) -> subprocess.Popen:
    """A driver in a separate process, which has committed a block or has ended. It waits at half of
    the videos."""
    run = start_held(clips, out, told, "cable", output=log, address=cluster.address)
    while run.poll() is None and not committed_blocks(out):
        time.sleep(0.005)
    return run


def test_a_polite_stop_under_ray_ends_as_ctrl_c_does(clips, cluster, worker_nodes, told, tmp_path):
    """Ray's own handler of SIGTERM would end a driver with status 1 and a dump."""
    out = tmp_path / "ray.zarr"
    worker_nodes.exactly(*ONE_NODE)
    with (tmp_path / "log").open("w") as log:
        run = driver_with_a_block(clips, out, cluster, told, log)
        run.terminate()
        assert run.wait(timeout=60) == 130
    assert (tmp_path / "log").read_text().splitlines()[-1].startswith("interrupted; ")
    assert 0 < len(committed_blocks(out)) < 12
    wait_for(lambda: not actors())


def test_a_killed_driver_goes_on_upon_the_same_cluster(
    clips, cluster, worker_nodes, undisturbed, told, tmp_path
):
    out = tmp_path / "ray.zarr"
    worker_nodes.exactly(*GPU_AND_CPU)
    with (tmp_path / "log").open("w") as log:
        run = driver_with_a_block(clips, out, cluster, told, log)
        run.kill()
        run.wait()
    before = len(committed_blocks(out))
    assert 0 < before < 12
    wait_for(lambda: not actors())  # of the driver that has ended
    (told / "hold").unlink()
    assert main(options(clips, out, address=cluster.address)) == 0
    assert store_digest(out) == undisturbed
    assert len(committed_blocks(out)) <= 12 + 1  # one may have been committed and not logged


@pytest.mark.parametrize("lost", ["decoder", "child", "node"])
def test_a_node_without_a_gpu_decodes_for_one_with_until_it_is_lost(
    lost, disturbed, cluster, worker_nodes, undisturbed_pixels, told, tmp_path
):
    """The worker's own child is stopped, so the worker needs the help. The helper is lost while it
    holds a video."""
    both, out = worker_nodes.exactly(*GPU_AND_CPU), tmp_path / "ray.zarr"

    def disturb() -> None:
        own = [
            child
            for child in psutil.Process(worker_of(out)).children()
            if child in decode_children()
        ]
        assert len(own) == 1
        own[0].suspend()
        (told / "stop").write_text("ray::Decoder")
        (told / "hold").unlink()
        wait_for(lambda: not (told / "stop").exists())
        (decoder,) = decoders()
        if lost == "decoder":
            decoder.kill()
        elif lost == "child":
            for child in decoder.children():
                child.kill()
        else:
            cluster.remove_node(raylet_of(both, decoder.pid), allow_graceful=False)
        own[0].resume()

    disturbed(out, disturb)
    whole(out, undisturbed_pixels)


def test_a_node_with_another_version_is_refused(clips, cluster, worker_nodes, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(ROOT / "extract", other / "extract")
    with (other / "extract" / "sampling.py").open("a") as file:
        file.write("# a line more\n")
    (other / "sitecustomize.py").write_text(
        "import extract\n"
    )  # before Ray puts the driver's folders first
    worker_nodes.exactly({"num_cpus": 1, "env_vars": {"PYTHONPATH": str(other)}})
    ours = code_version().replace("(", r"\(").replace(")", r"\)")
    with pytest.raises(
        RunError, match=rf"has hgnl-video 0\.1\.0 \(sources \w+\), the driver {ours}"
    ):
        main(options(clips, tmp_path / "a.zarr", address=cluster.address))


@pytest.mark.filterwarnings("default")  # Ray Train's own
def test_two_workers_that_train_give_the_loss_curve_of_one(
    clips, cluster, worker_nodes, tmp_path, monkeypatch
):
    """Global batches are the same. The backbone's first batch norm is frozen too, so nothing
    depends on which worker sees which video."""
    for number, clip in enumerate(sorted(clips.rglob("*.mp4"))[::2]):
        folder = tmp_path / "videos" / ("val" if number % 3 == 2 else "train") / clip.parent.name
        folder.mkdir(parents=True, exist_ok=True)
        (folder / clip.name).symlink_to(clip)
    worker_nodes.exactly({"num_cpus": 2})
    flags = f"--model tsn --videos {tmp_path / 'videos'} --epochs 2 --batch-size 8 --lr 0.01 --dropout 0"
    flags += " --backbone test_resnet --weights random --backbone-lr 0 --decode-workers 1 --out"
    monkeypatch.setenv("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.1")
    monkeypatch.setenv("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
    for out, more in (("two", ["--workers", "2", "--address", cluster.address]), ("one", [])):
        arguments = [*flags.split(), str(tmp_path / out), *more]
        assert run_command(finetune.main, finetune.Options, prog="finetune", args=arguments) == 0

    def curve(name: str) -> list[float]:
        rows = csv.DictReader((tmp_path / name / "metrics.csv").read_text().splitlines())
        return [float(row["loss"]) for row in rows]

    assert curve("two") == pytest.approx(curve("one"), rel=2e-2)


def test_a_worker_that_cannot_see_the_store_or_the_videos_fails_naming_its_node(clips, tmp_path):
    out = tmp_path / "a.zarr"
    assert main(options(clips, out, limit=1)) == 0
    nonce, version = RunLog.records(out)[0]["nonce"], code_version()
    clip = str(next(clips.rglob("*.mp4")))

    def check(store: Path, nonce: str, clip: str, version: str = version) -> None:
        with contextlib.closing(Worker(options(clips, store), 1)) as worker:
            worker.check(nonce, clip, version)

    check(out, nonce, clip)
    with pytest.raises(RunError, match=r"the worker on \S+ does not see the store .*b\.zarr"):
        check(tmp_path / "b.zarr", nonce, clip)
    with pytest.raises(RunError, match=r"the worker on \S+ sees another .*a\.zarr than this run's"):
        check(out, "another nonce", clip)
    with pytest.raises(RunError, match=r"the worker on \S+ cannot read the videos: .*gone\.mp4"):
        check(out, nonce, str(tmp_path / "gone.mp4"))
    with pytest.raises(
        RunError, match=r"has hgnl-video 0\.1\.0 \(sources \w+\), the driver 0\.0\.9"
    ):
        check(out, nonce, clip, "0.0.9")


def test_no_cluster_at_the_address(clips, tmp_path):
    with pytest.raises(RunError, match=r"--address 127\.0\.0\.1:1"):
        main(options(clips, tmp_path / "a.zarr", address="127.0.0.1:1"))
    assert not (tmp_path / "a.zarr").exists()


HEAD, SMALL, LARGE = {"CPU": 0.0}, {"CPU": 4.0}, {"CPU": 64.0}
GPUS = {"CPU": 32.0, "GPU": 8.0}


@pytest.mark.parametrize(
    ("nodes", "workers", "gpu", "expected"),
    [
        ([HEAD, SMALL, SMALL], None, False, (2, {"num_cpus": 4})),
        ([SMALL, LARGE], None, False, (2, {"num_cpus": 4})),
        ([SMALL], 3, False, (3, {"num_cpus": 1})),
        ([{"CPU": 1.0}], 2, False, (2, {"num_cpus": 0.5})),
        ([HEAD, GPUS, GPUS, LARGE], None, True, (16, {"num_gpus": 1, "num_cpus": 4})),
        ([HEAD, GPUS, LARGE], 2, True, (2, {"num_gpus": 1, "num_cpus": 4})),
        (
            [HEAD, LARGE],
            None,
            True,
            (1, {"num_gpus": 1, "num_cpus": 1}),
        ),  # the GPU's node is gone for a while
        ([HEAD], None, False, (1, {"num_cpus": 1})),
    ],
)
def test_how_many_workers_a_cluster_has_room_for(nodes, workers, gpu, expected):
    assert plan_actors(nodes, workers, use_gpu=gpu) == expected
