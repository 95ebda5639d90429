"""The pool of workers and decoders against the same extraction as two stages of Ray Data, on local
clusters of raylets.

Each contender extracts the same videos on the same fresh cluster (`ray.cluster_utils.Cluster`).
Videos per second are counted over the second half of the blocks. So the start of processes, which
takes minutes on a machine of two cores, does not count. The time to the first block is printed
separately. "Alone" is the pool without decoders, as it was before it had any.

If a cluster needs more cores than this machine has, decoding sleeps 0.2 s per video, and the
backbone sleeps as long as an H100 takes at 5,000 frames/s (`tests/simulated.py`). Frames travel as
they would in a real run.
"""

import contextlib
import os
import shutil
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from extract.decode.pool import JobResult
from extract.listing.videos import Video
from extract.options import Options
from extract.store import OK, FeatureStore, Outcomes, RunLog, lock_store
from extract.workers.blocks import Block, BlockResult
from extract.workers.decoder import code_version
from extract.workers.driver import _blocks, _run
from extract.workers.ray_pool import RayActorPool, _WorkerHandle
from extract.workers.reconcile import columns_of
from extract.workers.rows import make_jobs
from extract.workers.worker import Worker
from simulated import H100_FRAMES, SimulatedWorker

# Ray Data warns of settings of its own when it is imported.
pytestmark = [pytest.mark.timeout(1800), pytest.mark.filterwarnings("ignore::DeprecationWarning")]

ROOT = Path(__file__).parents[2]
TINY: dict[str, Any] = {
    "backbone": "test_resnet",
    "weights": "random",
    "precision": "fp32",
    "device": "auto",
}


class DecodeStage:
    """First stage of Ray Data: it takes a block and gives the frames of its videos, which children
    decode under deadlines as in the pool."""

    def __init__(self, worker: type[Worker], options: Options, cores: int):
        self._worker = worker(options, cores)

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        (block,) = batch["block"]
        frames, ends = [], []
        for (_, wanted, plan), future in self._worker._submit(block):
            with future.result() as finished:
                frames.append(finished.buffer[: len(wanted) * plan.row_bytes].copy())
                ends.append((finished.result, finished.failure, finished.cpu_seconds))
        return {"block": batch["block"], "ends": objects(ends), "frames": np.stack(frames)[None]}


class BackboneStage:
    """Second stage: it takes the frames of a block and writes the shard."""

    def __init__(self, worker: type[Worker], options: Options, cores: int):
        self._worker = worker(options, cores)

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        (block,), (frames,), (ends,) = batch["block"], batch["frames"], batch["ends"]
        worker = self._worker
        jobs = make_jobs(block.videos, worker._plan)
        worker._prefetched[block.number] = [
            (job, Ready(JobResult(result, buffer, failure, seconds)))  # type: ignore[misc]
            for job, buffer, (result, failure, seconds) in zip(jobs, frames, ends, strict=True)
        ]
        return {"done": objects(worker.run(block) + worker.drain())}


@dataclass
class Ready:
    finished: JobResult

    def result(self) -> JobResult:
        return self.finished


def objects(values: list) -> np.ndarray:
    """A single cell that holds a list of any objects."""
    cell = np.empty(1, object)
    cell[0] = values
    return cell


class RayData:
    """The contender: map_batches with an actor pool for each stage; `concurrency` ranges from one
    to the number that fits on the nodes."""

    def __init__(
        self,
        options: Options,
        worker: type[Worker],
        *,
        decoders: int,
        workers: int,
        cpus: float,
        gpu: bool,
    ):
        self._arguments = worker, options, max(1, int(cpus))
        self._decode = {"num_cpus": cpus, "concurrency": (decoders, decoders)}
        self._backbone = {
            "concurrency": (workers, workers),
            **({"num_gpus": 1} if gpu else {"num_cpus": cpus}),
        }

    def extract(self, blocks: list[Block]) -> Iterator[list[BlockResult]]:
        import ray

        context = ray.data.DataContext.get_current()
        context.target_max_block_size = 1 << 40  # a block's frames stay together
        context.enable_progress_bars = False
        data = ray.data.from_items(
            [{"block": block} for block in blocks], override_num_blocks=len(blocks)
        )
        data = data.map_batches(
            DecodeStage, fn_constructor_args=self._arguments, batch_size=1, **self._decode
        )
        data = data.map_batches(
            BackboneStage, fn_constructor_args=self._arguments, batch_size=1, **self._backbone
        )
        for batch in data.iter_batches(batch_size=None, prefetch_batches=0):
            yield [done for cell in batch["done"] for done in cell]

    def close(self) -> None:
        pass


class Alone(RayActorPool):
    """The pool as it was: every worker decodes for itself."""

    def _start_decoder(self, *_: Any) -> Any:
        raise AssertionError

    def _refresh_nodes(self) -> None:
        info, self._info = self._info, None
        super()._refresh_nodes()
        self._info = info


@contextlib.contextmanager
def cluster_of(nodes: list[dict[str, Any]]) -> Iterator[str]:
    import ray
    from ray.cluster_utils import Cluster

    ray.cloudpickle.register_pickle_by_value(
        sys.modules[__name__]
    )  # workers cannot import this file
    os.environ["PYTHONPATH"] = f"{ROOT}{os.pathsep}{ROOT / 'tests'}"
    cluster = Cluster(
        initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False}
    )
    try:
        for node in nodes:
            cluster.add_node(object_store_memory=800 << 20, **node)
        cluster.wait_for_nodes()
        ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
        yield cluster.address
    finally:
        ray.shutdown()
        cluster.shutdown()


def measure(pool: Any, store: FeatureStore, blocks: list[Block]) -> tuple[float, float]:
    """Videos per second over the second half of the blocks, and seconds until the first block is
    finished."""
    started, handed_in = time.perf_counter(), list[tuple[float, int]]()
    for together in pool.extract(blocks):
        for done in together:
            store.commit(done.outcome)
            handed_in.append((time.perf_counter(), len(done.outcome.rows)))
    assert (store.status == OK).all()
    half = len(handed_in) // 2
    seconds = handed_in[-1][0] - handed_in[half - 1][0]
    return sum(videos for _, videos in handed_in[half:]) / seconds, handed_in[0][0] - started


def contest(
    tmp_path: Path,
    videos: list[Video],
    nodes: list[dict[str, Any]],
    contenders: list[str],
    *,
    worker: type[Worker],
    block_size: int,
    cores: float,
) -> dict[str, float]:
    """Videos per second of each contender, each on a cluster of its own."""
    gpu = any("num_gpus" in node for node in nodes)
    speeds = {}
    for name in contenders:
        out = tmp_path / f"{name.replace(' ', '_')}.zarr"
        shutil.rmtree(out, ignore_errors=True)
        options = Options(
            Path(), str(out), block_size=block_size, decode_workers=max(1, int(cores)), **TINY
        )
        with cluster_of(nodes) as address:
            options = Options(**(vars(options) | {"address": address}))
            info = worker(options, 1).describe()
            FeatureStore.create(
                out,
                **columns_of(videos),
                classes=["a"],
                views=info.provenance["views"],
                frames=25,
                dim=info.dim,
                block_size=block_size,
                provenance=info.provenance,
            )
            store = FeatureStore.open(out, writable=True)
            blocks = _blocks(store, videos)
            if name == "Ray Data":
                # One decoder a node; without GPUs, each stage has half of its node.
                share = cores if gpu else cores / 2
                workers = 1 if gpu else len(nodes)
                pool: Any = RayData(
                    options, worker, decoders=len(nodes), workers=workers, cpus=share, gpu=gpu
                )
            else:
                pool = (Alone if name == "alone" else RayActorPool)(options, worker)
                pool.describe()
                RunLog(out).write("start", nonce="this run")
                pool.check("this run", videos[0].path, code_version())
            try:
                speeds[name], start = measure(pool, store, blocks)
            finally:
                pool.close()
        print(
            f"{name:>8}: {speeds[name]:6.1f} videos/s over {len(nodes)} nodes; {start:.0f} s to the first block"
        )
    ratios = [f"{name} {speed / speeds[contenders[0]]:.2f}" for name, speed in speeds.items()]
    print(f"of the first: {', '.join(ratios)}")
    return speeds


@pytest.fixture(scope="module")
def real_videos() -> list[Video]:
    """Real clips with real decoding: the Kinetics clips of ../shared if they exist, else those of
    the package."""
    source = sorted((ROOT.parent / "shared" / "clips" / "kinetics_like").glob("mmaction2*.mp4"))
    source = source or sorted((ROOT / "pipelines" / "clips" / "daily_actions").rglob("*.mp4"))[:8]
    return [
        Video(f"{copy}/{clip.name}", str(clip), 0, "train")
        for copy in range(48 // len(source))
        for clip in source
    ]


@pytest.mark.parametrize("count", [1, 2, 4])
def test_decoding_where_the_backbone_is(count, tmp_path, real_videos):
    """Nodes of one core with a real decoder and a small real backbone. More than two nodes share
    the two cores."""
    nodes = [{"num_cpus": 1}] * count
    speeds = contest(
        tmp_path,
        real_videos,
        nodes,
        ["alone", "pool", "Ray Data"],
        worker=Worker,
        block_size=4,
        cores=1,
    )
    assert speeds["pool"] >= 0.9 * speeds["alone"]


def test_two_nodes_without_a_gpu_help_one_with(tmp_path):
    """Simulated: a "GPU" node whose two cores decode 10 videos per second, while its GPU could take
    200, and two CPU nodes."""
    videos = [Video(f"{number:04d}.mp4", __file__, 0, "train") for number in range(256)]
    nodes: list[dict[str, Any]] = [{"num_cpus": 2, "num_gpus": 1}, {"num_cpus": 2}, {"num_cpus": 2}]
    speeds = contest(
        tmp_path,
        videos,
        nodes,
        ["alone", "pool", "Ray Data"],
        worker=SimulatedWorker,
        block_size=16,
        cores=2,
    )
    assert speeds["pool"] >= 1.8 * speeds["alone"]


# -- as many workers as a large cluster has ------------------------------------------------------------------------

WORKERS, PROCESSES, CORES = 64, 4, 16
VIDEOS, FRAMES, DIM, BLOCK, DECODE_SECONDS = (
    650_000,
    25,
    2048,
    64,
    0.105,
)  # Kinetics-700: 10,157 blocks
PART = int(os.environ.get("HGNL_PART", "1"))  # divides VIDEOS, for a busy machine


class Sleeper:
    """16 of the 64 workers. A block takes as long as an H100 with 16 cores takes, and no shard is
    written."""

    def __init__(self, seconds: float):
        self._seconds = seconds

    def run(self, block: Block, upcoming: Block | None) -> list[BlockResult]:
        time.sleep(self._seconds)
        rows = np.array(block.rows)
        shape = (len(rows), 1, FRAMES)
        outcome = Outcomes(
            rows,
            np.full(len(rows), OK, "i1"),
            [""] * len(rows),
            np.full(len(rows), 250, "<i4"),
            np.full(shape, 3, "<i4"),
            np.zeros(shape, "<f4"),
        )
        return [
            BlockResult(
                block.number,
                outcome,
                "here",
                shape[0] * shape[2],
                dict.fromkeys(("decode", "wait"), 0.0),
            )
        ]

    def drain(self) -> list[BlockResult]:
        return []


class Crowd(RayActorPool):
    """64 members, in four processes of 16 threads each: 64 processes do not fit on this machine."""

    def __init__(self, options: Options, seconds: float):
        import ray

        # Two calls are in flight with each member; a worker does one at a time.
        self._sleepers = [
            ray.remote(Sleeper)
            .options(max_concurrency=WORKERS // PROCESSES, num_cpus=0)
            .remote(seconds)
            for _ in range(PROCESSES)
        ]
        super().__init__(options)
        self._workers = [_WorkerHandle(self._start_worker(), ready=True) for _ in range(WORKERS)]

    def _start_worker(self) -> Any:
        self._made = getattr(self, "_made", -1) + 1
        return self._sleepers[self._made % PROCESSES]

    def _poll_progress(self) -> None:
        """Sleepers do not know."""


def test_the_driver_of_64_workers(tmp_path):
    """All 10,157 blocks of Kinetics-700, without scaling, in the 67 s that 64 H100s with 16 cores
    each would take."""
    import psutil
    import ray

    out = tmp_path / "feats.zarr"
    store = FeatureStore.create(
        out,
        **columns_of(
            [
                Video(f"train/class/{number:06d}.mp4", __file__, 0, "train")
                for number in range(VIDEOS // PART)
            ]
        ),
        classes=["a"],
        views=["center"],
        frames=FRAMES,
        dim=DIM,
        block_size=BLOCK,
        provenance={},
    )
    names = store.ids
    blocks = []
    for number in store.missing_blocks():
        rows = store.block_rows(number)
        listed = tuple(Video(name, f"/data/k700/{name}", 0) for name in names[rows].tolist())
        blocks.append(Block(number, tuple(rows.tolist()), listed))
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    seconds = max(BLOCK * DECODE_SECONDS / CORES, BLOCK * FRAMES / H100_FRAMES)
    ideal = len(blocks) * seconds / WORKERS
    ray.init(
        address="local",
        num_cpus=4,
        include_dashboard=False,
        log_to_driver=False,
        logging_level="ERROR",
    )
    try:
        pool = Crowd(Options(Path(), str(out), workers=WORKERS), seconds)
        ray.get([sleeper.drain.remote() for sleeper in pool._sleepers])
        started, before = time.perf_counter(), time.process_time()
        with lock_store(out) as lock:
            _run(pool, store, blocks, lock, RunLog(out))
        wall, cpu = time.perf_counter() - started, time.process_time() - before
        pool.close()
    finally:
        ray.shutdown()
    memory = psutil.Process().memory_info().rss / 1e9
    assert (FeatureStore.open(out).status == OK).all()
    print(
        f"\n{len(blocks):,} blocks of {seconds:.2f} s over {WORKERS} workers: {wall:.1f} s, {wall / ideal - 1:+.1%} of "
        f"the {ideal:.1f} s that they sleep; the driver used {cpu / wall:.0%} of a core ({1e3 * cpu / len(blocks):.2f} "
        f"ms a block) and {memory:.2f} GB"
    )
    assert memory < 2
