"""Workers as Ray actors on one or many machines, and decoders on nodes without a GPU.

    GPU node:   Worker: own children --+-> batches -> backbone -> shard      driver: assigns blocks,
    CPU nodes:  Decoder: children  ----+  (frames, through Ray's object store)       commits results

The videos of a worker are decoded by its own children and by the decoders that are assigned to it,
whichever is free. Each decoding core, on any node, holds the frames of at most four videos that the
backbone has not used yet, which bounds the memory. Nodes may join and leave: another worker gets
the blocks of a lost worker, and a worker decodes the videos of a lost decoder itself.
"""

import contextlib
import logging
import math
import signal
import socket
import sys
import threading
import time
from collections import Counter, deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from extract import RunError
from extract.options import Options
from extract.workers.blocks import BackboneInfo, Block, BlockResult
from extract.workers.calibration import CalibrationSample
from extract.workers.decoder import Decoder, decode_elsewhere
from extract.workers.worker import Worker

if TYPE_CHECKING:
    import ray

# If this many workers die while they work on a block, the block is taken for the cause.
MAX_FAILURES = 3
SECONDS_WITHOUT_WORKERS = 600.0
NODE_POLL_SECONDS = 2.0
COALESCE_SECONDS = 0.05  # the driver handles calls together that end within this time
COMMIT_SECONDS = 0.5  # blocks that finish within this time are committed together: it takes 30 ms
CORES_PER_DECODER = 4  # a large node runs several decoders, which may work for different workers


def connect(address: str | None) -> bool:
    """Join the Ray cluster at `address`, or start Ray here.

    Returns whether the caller has to shut it down. Raises RunError at once if nothing answers at
    `host:port`; Ray itself would try for minutes.
    """
    import ray

    if ray.is_initialized():
        return False
    try:
        if address not in (None, "auto", "local"):
            host, _, port = address.removeprefix("ray://").rpartition(":")
            socket.create_connection((host, int(port)), timeout=10).close()
        sigterm_handler = signal.getsignal(signal.SIGTERM)
        ray.init(
            address=address or "local",
            job_config=job_config(),
            include_dashboard=False,
            log_to_driver=False,
            logging_level=logging.ERROR,
        )
        # Ray's own handler would end the process at once with status 1.
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, sigterm_handler)
    except (OSError, ValueError, RuntimeError) as error:  # ConnectionError is an OSError
        if address is None:
            raise RunError(f"Ray does not start on this machine: {error}") from None
        raise RunError(f"--address {address}: no Ray cluster answers there ({error})") from None
    return True


def job_config() -> "ray.job_config.JobConfig":
    """Ray's settings for this package: workers import it from where this process does.

    By default Ray puts the working folder first on the path of its workers, and a user's own
    extract.py there would be imported instead.
    """
    import ray

    root = Path(__file__).parents[2]
    paths = [] if root.name == "site-packages" else [str(root)]
    # With _client_job, Ray does not add the working folder.
    return ray.job_config.JobConfig(_client_job=True, _py_driver_sys_path=paths)


def plan_actors(
    nodes: Sequence[Mapping[str, float]], num_workers: int | None, *, use_gpu: bool
) -> tuple[int, dict[str, float]]:
    """Choose how many workers to start, and which resources each one requests from Ray.

    With GPUs: one worker per GPU, each with an equal share of its node's cores.
    Without: one worker per node, each with all of the node's cores.
    Every worker requests the same amount, so the smallest node sets it.

    Args:
        nodes: resources of each live node, e.g. {"CPU": 16, "GPU": 2}.
        num_workers: the user's --workers, or None for the default above.

    Returns:
        the number of workers, and keyword arguments for `ray.remote`.
    """
    if use_gpu:
        gpu_nodes = [node for node in nodes if node.get("GPU", 0) >= 1]
        if not gpu_nodes:  # none has joined yet: request one, and Ray waits for it
            gpu_nodes = [{"GPU": 1, "CPU": 1}]
        num_gpus = int(sum(node["GPU"] for node in gpu_nodes))
        cores_per_gpu = min(node.get("CPU", 0) // node["GPU"] for node in gpu_nodes)
        return num_workers or num_gpus, {"num_gpus": 1, "num_cpus": cores_per_gpu}

    cpu_nodes = [node for node in nodes if node.get("CPU", 0) >= 1] or [{"CPU": 1}]
    num_workers = num_workers or len(cpu_nodes)
    workers_per_node = math.ceil(num_workers / len(cpu_nodes))
    cores_per_worker = min(node["CPU"] for node in cpu_nodes) / workers_per_node
    # Ray takes whole cores, or a fraction below one.
    num_cpus = math.floor(cores_per_worker) or cores_per_worker
    return num_workers, {"num_cpus": num_cpus}


@dataclass(eq=False)
class _WorkerHandle:
    """A worker: an actor, its calls in flight, and its unfinished blocks."""

    actor: Any
    calls: "list[ray.ObjectRef]" = field(default_factory=list)  # the first is its check
    ready: bool = False  # it has passed the check
    blocks: list[Block] = field(default_factory=list)
    upcoming: Block | None = None  # the one of `blocks` that it decodes ahead
    settled: int = 0  # frames, when it was last polled
    settled_call: "ray.ObjectRef | None" = None
    finished_videos: int = 0


@dataclass(eq=False)
class _DecoderHandle:
    """A decoder, its call in flight, and the worker that it decodes for.

    The call is its check. Once it is ready, the call never ends unless the decoder is lost.
    """

    actor: Any
    calls: "list[ray.ObjectRef]"
    node: str
    cores: int
    ready: bool = False
    worker: _WorkerHandle | None = None


class RayActorPool:
    """Assigns blocks to workers, and keeps as many workers as the cluster has room for."""

    def __init__(
        self,
        options: Options,
        sample: CalibrationSample | None = None,
        worker: type[Worker] = Worker,
    ):
        import ray

        self._ray = ray
        self._started_ray = connect(options.address)
        self._options, self._sample, self._worker_class = options, sample, worker
        # Decided once: if the last GPU leaves, the run waits for another and does not use CPUs.
        has_gpu = ray.cluster_resources().get("GPU", 0) >= 1
        self._use_gpu = options.device in ("auto", "cuda") and has_gpu
        self._workers: list[_WorkerHandle] = []
        self._decoders: list[_DecoderHandle] = []
        self._refreshed = 0.0
        self._block_failures: Counter[int] = Counter()  # workers that died, by block
        self._idle_failures = 0  # workers that died without a block, in a row
        self._decoder_failures: Counter[str] = Counter()  # by node
        self._check_arguments: tuple[str, str, str] = ("", "", "")  # nonce, video, version
        self._info: BackboneInfo | None = None
        self._lost_frames = 0  # that workers had settled before they were lost
        self._refresh_nodes()
        self._first_actor = self._start_worker()

    @property
    def _handles(self) -> list[_WorkerHandle | _DecoderHandle]:
        return [*self._workers, *self._decoders]

    def _start_worker(self) -> Any:
        cores = self._options.threads or max(1, int(self._request["num_cpus"]))
        remote: Any = self._ray.remote  # Ray's types lack concurrency groups
        actor = remote(concurrency_groups={"control": 1})(self._worker_class)
        # The pool replaces a lost actor. With Ray's own retries, calls to it would go on failing
        # with ActorUnavailableError.
        actor = actor.options(max_restarts=0, max_task_retries=0, **self._request)
        return actor.remote(self._options, cores, self._sample)

    def describe(self) -> BackboneInfo:
        info = self._get(self._first_actor.describe.remote())
        # The other workers use the same precision and engine, or fail.
        precision = info.provenance["precision"]
        engine: Any = "openvino" if "engine" in info.provenance else "torch"
        self._options = replace(self._options, precision=precision, engine=engine)
        self._info = info
        return info

    def check(self, nonce: str, video: str, version: str) -> None:
        self._check_arguments = nonce, video, version
        self._get(self._first_actor.check.remote(*self._check_arguments))
        self._workers.append(_WorkerHandle(self._first_actor, ready=True))

    def close(self) -> None:
        for actor in {self._first_actor, *(handle.actor for handle in self._handles)}:
            self._ray.kill(actor)
        if self._started_ray:
            self._ray.shutdown()

    def _get(self, call: "ray.ObjectRef") -> Any:
        """The result of a call. An error inside the worker is raised here."""
        waited = 0.0
        while not self._ray.wait([call], timeout=30)[0]:
            waited += 30
            self._warn_waiting(waited)
        try:
            return self._ray.get(call)
        except self._ray.exceptions.RayTaskError as error:
            raise error.cause if isinstance(error.cause, Exception) else error from None

    def _warn_waiting(self, seconds: float) -> None:
        have = {name: self._ray.cluster_resources().get(name, 0) for name in ("CPU", "GPU")}
        text = (
            f"no worker for {seconds:.0f} s: each asks for {self._request}, the cluster has {have}"
        )
        if seconds >= SECONDS_WITHOUT_WORKERS:
            raise RunError(f"{text}; add nodes, or ask for fewer --workers or --decode-workers")
        print(f"waiting: {text}", file=sys.stderr)

    # -- the run -----------------------------------------------------------------------------------

    def extract(self, blocks: list[Block]) -> Iterator[list[BlockResult]]:
        """Extract all blocks in any order. Those that finish close together are one list."""
        queue, results = deque(blocks), list[BlockResult]()
        unfinished = {block.number for block in blocks}
        last_sign = last_yield = time.monotonic()
        while unfinished:
            self._schedule(queue, len(unfinished))
            calls = {call: handle for handle in self._handles for call in handle.calls}
            timeout = COMMIT_SECONDS if results else NODE_POLL_SECONDS
            self._ray.wait(list(calls), timeout=timeout)
            # Handle the calls of many workers together: polling them all has a cost, and each
            # worker has another block to go on with.
            ready, _ = self._ray.wait(list(calls), num_returns=len(calls), timeout=COALESCE_SECONDS)
            for call in ready:
                for result in self._collect(calls[call], call, queue):
                    # A block may come twice, with the same bytes, if it was assigned again.
                    if result.number in unfinished:
                        unfinished.remove(result.number)
                        results.append(result)
            if results and (not unfinished or time.monotonic() - last_yield > COMMIT_SECONDS):
                yield results
                results, last_yield = [], time.monotonic()
            silent = time.monotonic() - last_sign
            if ready or any(worker.ready for worker in self._workers):
                last_sign = time.monotonic()
            elif silent > 30:
                self._warn_waiting(silent)

    def _collect(
        self, handle: "_WorkerHandle | _DecoderHandle", call: "ray.ObjectRef", queue: deque[Block]
    ) -> list[BlockResult]:
        """The blocks that a finished call returns."""
        if handle not in self._handles:  # it was just lost
            return []
        exceptions = self._ray.exceptions
        try:
            result = self._get(call)
        except (exceptions.RayActorError, exceptions.ActorUnavailableError) as error:
            self._on_failure(handle, queue, error)
            return []
        handle.calls.remove(call)
        if isinstance(handle, _DecoderHandle):
            handle.calls.append(handle.actor.wait_forever.remote())
        if isinstance(handle, _DecoderHandle) or not handle.ready:
            handle.ready = True
            return []
        self._idle_failures = 0
        numbers = {block.number for block in result}
        handle.finished_videos += sum(len(block.outcome.rows) for block in result)
        handle.blocks = [block for block in handle.blocks if block.number not in numbers]
        return result

    # -- scheduling --------------------------------------------------------------------------------

    def _refresh_nodes(self) -> None:
        """Poll the nodes: plan the workers, and start decoders on nodes without a GPU."""
        self._refreshed = time.monotonic()
        nodes = {node["NodeID"]: node["Resources"] for node in self._ray.nodes() if node["Alive"]}
        self._num_workers, self._request = plan_actors(
            list(nodes.values()), self._options.workers, use_gpu=self._use_gpu
        )
        if self._info is None or not self._use_gpu:
            return
        for name, resources in nodes.items():
            cores = 0 if resources.get("GPU", 0) else int(resources.get("CPU", 0))
            cores -= sum(decoder.cores for decoder in self._decoders if decoder.node == name)
            while cores > 0 and self._decoder_failures[name] < MAX_FAILURES:
                self._decoders.append(self._start_decoder(name, min(cores, CORES_PER_DECODER)))
                cores -= CORES_PER_DECODER

    def _start_decoder(self, node: str, cores: int) -> _DecoderHandle:
        assert self._info is not None
        strategies = self._ray.util.scheduling_strategies
        remote = self._ray.remote(Decoder).options(
            scheduling_strategy=strategies.NodeAffinitySchedulingStrategy(node, soft=False),
            num_cpus=cores,
            # The endless call, and two videos per core, so that no child waits for the next one.
            max_concurrency=2 * cores + 1,
            max_restarts=0,
            max_task_retries=0,
        )
        function, plan = self._worker_class.decode_job, self._info.plan
        actor: Any = remote.remote(self._options, function, plan, cores)
        return _DecoderHandle(actor, [actor.check.remote(*self._check_arguments[1:])], node, cores)

    def _schedule(self, queue: deque[Block], num_unfinished: int) -> None:
        """Start workers, assign decoders to them, and keep two calls per worker in flight, so that
        it never waits for the driver."""
        if time.monotonic() - self._refreshed > NODE_POLL_SECONDS:
            self._refresh_nodes()
            self._poll_progress()
        while len(self._workers) < min(self._num_workers, num_unfinished):
            actor = self._start_worker()
            check = actor.check.remote(*self._check_arguments)
            self._workers.append(_WorkerHandle(actor, [check]))
        ready = [worker for worker in self._workers if worker.ready]
        for decoder in self._decoders:
            if decoder.ready and decoder.worker not in self._workers and ready:
                num_decoders = Counter(decoder.worker for decoder in self._decoders)
                decoder.worker = min(ready, key=lambda worker: num_decoders[worker])
                # In another concurrency group than the block that the worker extracts.
                add_decoder = decoder.worker.actor.add_decoder.options(concurrency_group="control")
                decode = partial(decode_elsewhere, decoder.actor)
                add_decoder.remote(decode, concurrency=2 * decoder.cores)
        for worker in ready:
            while len(worker.calls) < 2 and self._assign(worker, queue):
                pass

    def _poll_progress(self) -> None:
        """Request the progress of each worker, and take the answers to the last request."""
        for worker in self._workers:
            if worker.settled_call and self._ray.wait([worker.settled_call], timeout=0)[0]:
                # Other calls notice if a worker is lost.
                with contextlib.suppress(self._ray.exceptions.RayError):
                    worker.settled = self._ray.get(worker.settled_call)
                worker.settled_call = None
            if worker.ready and worker.settled_call is None:
                settled = worker.actor.settled.options(concurrency_group="control")
                worker.settled_call = settled.remote()

    def settled(self) -> int:
        """Frames that all workers have settled (see Worker.settled), as of a few seconds ago."""
        return self._lost_frames + sum(worker.settled for worker in list(self._workers))

    @staticmethod
    def _assign(worker: _WorkerHandle, queue: deque[Block]) -> bool:
        """Give a worker its next block, and one to decode ahead. False if there is none."""
        block = worker.upcoming or (queue.popleft() if queue else None)
        if block is None:
            if worker.blocks and not worker.calls:
                worker.calls.append(worker.actor.drain.remote())
            return False
        upcoming = queue.popleft() if queue else None
        worker.blocks += [new for new in (block, upcoming) if new and new not in worker.blocks]
        worker.upcoming = upcoming
        worker.calls.append(worker.actor.run.remote(block, upcoming))
        return True

    def _on_failure(
        self, handle: "_WorkerHandle | _DecoderHandle", queue: deque[Block], error: Exception
    ) -> None:
        """Forget a lost decoder, or a lost worker, whose blocks return to the queue."""
        kind = type(error).__name__
        if isinstance(handle, _DecoderHandle):
            print(f"a decoder was lost ({kind})", file=sys.stderr)
            self._decoders.remove(handle)
            self._decoder_failures[handle.node] += 1
            return
        self._workers.remove(handle)
        if self._info is not None:
            self._lost_frames += handle.finished_videos * self._info.frames_per_video
        self._ray.kill(handle.actor)  # it may only be unreachable, and must not write any more
        blocks = sorted(handle.blocks, key=lambda block: block.number)
        print(f"a worker was lost ({kind}); {len(blocks)} blocks go to another", file=sys.stderr)
        if blocks:
            first = blocks[0]
            self._block_failures[first.number] += 1
            failures = self._block_failures[first.number]
            culprit = f"block {first.number} (from {first.videos[0].id} on) was"
        else:
            self._idle_failures += 1
            failures, culprit = self._idle_failures, "no block was"
        if failures >= MAX_FAILURES:
            raise RunError(
                f"{culprit} in hand when {MAX_FAILURES} workers died; the last error: "
                f"{str(error).splitlines()[0]}"
            )
        queue.extendleft(replace(block, failures=block.failures + 1) for block in reversed(blocks))
