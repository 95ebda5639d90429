"""Workers as Ray actors on one machine or many, and children on nodes without a GPU that decode for
them.

    GPU node:   Worker: own children --+-> batches -> backbone -> shard      driver: blocks out, commits in
    CPU nodes:  Decoder: children  ----+  (frames, through Ray's object store)

A worker's queue of videos is emptied by its own children and by the decoders lent to it, whoever is
free. Each decoding core, near or far, holds the frames of at most four videos that the backbone has
not taken: that bounds the memory. Nodes may come and go: blocks of a lost worker are given to
another; videos of a lost decoder are decoded by the worker.
"""

import contextlib
import logging
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
from extract.workers.blocks import Block, Done
from extract.workers.calibration import CalibrationSample
from extract.workers.decoder import Decoder, decode_elsewhere
from extract.workers.worker import Worker

if TYPE_CHECKING:
    import ray

DEATHS_A_BLOCK = 3  # a block that was in hand when so many workers died is taken for the cause
SECONDS_WITHOUT_WORKERS = 600.0
SECONDS_BETWEEN_LOOKS = 2.0  # at which nodes there are
SECONDS_TOGETHER = 0.05
SECONDS_A_COMMIT = (
    0.5  # blocks that are handed in within this time are committed together: one takes 30 ms
)
CORES_A_DECODER = 4  # a large node becomes several, so that they can be shared out among workers


def connect(address: str | None) -> bool:
    """Join the Ray cluster at `address`, or start one here; True where this call did, so that the
    caller shuts it down.

    Raises RunError where nobody answers at `host:port`, at once: Ray itself would try for minutes.
    """
    import ray

    if ray.is_initialized():
        return False
    try:
        if address not in (None, "auto", "local"):
            host, _, port = address.removeprefix("ray://").rpartition(":")
            socket.create_connection((host, int(port)), timeout=10).close()
        quiet: Any = {
            "include_dashboard": False,
            "log_to_driver": False,
            "logging_level": logging.ERROR,
        }
        with _sigterm_kept():
            ray.init(address=address or "local", job_config=job_config(), **quiet)
    except (OSError, ValueError, RuntimeError) as error:  # ConnectionError is an OSError
        if address is None:
            raise RunError(f"Ray does not start on this machine: {error}") from None
        raise RunError(f"--address {address}: no Ray cluster answers there ({error})") from None
    return True


def job_config() -> "ray.job_config.JobConfig":
    """Ray's settings for this package: workers find it as this process does.

    By itself Ray puts the working folder first on the path of its workers, and a user's own
    extract.py there would be imported instead of this package.
    """
    import ray

    root = Path(__file__).parents[2]
    paths = [] if root.name == "site-packages" else [str(root)]
    return ray.job_config.JobConfig(
        _client_job=True, _py_driver_sys_path=paths
    )  # Ray skips the folder for clients


@contextlib.contextmanager
def _sigterm_kept() -> Iterator[None]:
    """`ray.init` sets a handler of its own, which ends the process at once and with status 1."""
    handler = signal.getsignal(signal.SIGTERM)
    yield
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, handler)


def places(
    nodes: Sequence[Mapping[str, float]], workers: int | None, *, gpu: bool
) -> tuple[int, dict[str, float]]:
    """How many workers, and what each asks of its node, from the nodes' resources (`CPU`, `GPU`).

    With `gpu` one a GPU, with its share of its node's cores; else one a node, with its cores. The
    smallest node counts.
    """
    if gpu:
        hosts = [node for node in nodes if node.get("GPU", 0) >= 1] or [{"GPU": 1, "CPU": 1}]
        size = workers or int(sum(node["GPU"] for node in hosts))
        return size, {
            "num_gpus": 1,
            "num_cpus": min(node.get("CPU", 0) // node["GPU"] for node in hosts),
        }
    hosts = [node for node in nodes if node.get("CPU", 0) >= 1] or [{"CPU": 1}]
    size = workers or len(hosts)
    cores = min(node["CPU"] for node in hosts) / -(-size // len(hosts))
    return size, {"num_cpus": cores // 1 or cores}


@dataclass(eq=False)
class _Member:
    """A worker of the pool: an actor, its calls in flight, and the blocks it has been given and not
    handed in."""

    actor: Any
    calls: "list[ray.ObjectRef]" = field(default_factory=list)  # first its check, then it is ready
    ready: bool = False
    given: list[Block] = field(default_factory=list)
    upcoming: Block | None = None  # of `given`, the one it decodes ahead for
    settled: int = 0  # frames, when it was last asked
    settled_call: "ray.ObjectRef | None" = None
    handed_in: int = 0  # videos


@dataclass(eq=False)
class _Helper:
    """A decoder, its check or (`ready`) its endless call, and the worker it is lent to."""

    actor: Any
    calls: "list[ray.ObjectRef]"
    node: str
    cores: int
    ready: bool = False
    member: _Member | None = None


class RayActorPool:
    """Hands blocks to workers and keeps the pool as large as the cluster allows."""

    def __init__(
        self,
        options: Options,
        sample: CalibrationSample | None = None,
        worker: type[Worker] = Worker,
    ):
        import ray

        self._ray = ray
        self._started = connect(options.address)
        self._options, self._worker, self._sample = options, worker, sample
        # Decided once: where the last GPU goes, the run waits for another and does not fall back to
        # CPUs.
        self._gpu = (
            options.device in ("auto", "cuda") and ray.cluster_resources().get("GPU", 0) >= 1
        )
        self._members: list[_Member] = []
        self._helpers: list[_Helper] = []
        self._looked = 0.0
        self._deaths: Counter[Any] = (
            Counter()
        )  # of workers by the block in hand (or None), of decoders by node
        self._check: tuple[str, str, str] = ("", "", "")  # nonce, video, version
        self._slot_bytes = 0
        self._handed_in_by_lost = 0  # frames
        self._look()
        self._first = self._actor()

    def _actor(self) -> Any:
        # A lost actor is replaced by us: Ray's own retries leave calls failing with
        # ActorUnavailableError.
        cores = self._options.threads or max(1, int(self._request["num_cpus"]))
        remote: Any = self._ray.remote  # Ray's own types know no concurrency groups
        actor = remote(concurrency_groups={"help": 1})(self._worker)
        return actor.options(max_restarts=0, max_task_retries=0, **self._request).remote(
            self._options, cores, self._sample
        )

    def describe(self) -> dict[str, Any]:
        made = self._get(self._first.describe.remote())
        # The others compute as the first one does, or fail.
        engine: Any = "openvino" if "engine" in made["provenance"] else "torch"
        self._options = replace(
            self._options, precision=made["provenance"]["precision"], engine=engine
        )
        self._slot_bytes, self._frames_per_video = made["slot_bytes"], made["frames_per_video"]
        return made

    def check(self, nonce: str, video: str, version: str) -> None:
        self._check = nonce, video, version
        self._get(self._first.check.remote(*self._check))
        self._members.append(_Member(self._first, ready=True))

    def close(self) -> None:
        parts: list[_Member | _Helper] = [*self._members, *self._helpers]
        actors = [self._first, *(part.actor for part in parts)]
        for actor in {id(one): one for one in actors}.values():
            self._ray.kill(actor)
        if self._started:
            self._ray.shutdown()

    def _get(self, call: "ray.ObjectRef") -> Any:
        """A call's result; an error inside the worker comes out as what it was there."""
        waited = 0.0
        while not self._ray.wait([call], timeout=30)[0]:
            waited += 30
            self._complain(waited)
        try:
            return self._ray.get(call)
        except self._ray.exceptions.RayTaskError as error:
            raise error.cause if isinstance(error.cause, Exception) else error from None

    def _complain(self, waited: float) -> None:
        have = {name: self._ray.cluster_resources().get(name, 0) for name in ("CPU", "GPU")}
        text = (
            f"no worker for {waited:.0f} s: each asks for {self._request}, the cluster has {have}"
        )
        if waited >= SECONDS_WITHOUT_WORKERS:
            raise RunError(f"{text}; add nodes, or ask for fewer --workers or --decode-workers")
        print(f"waiting: {text}", file=sys.stderr)

    # -- the run ---------------------------------------------------------------------------------------------------

    def extract(self, blocks: list[Block]) -> Iterator[list[Done]]:
        """All blocks, in any order; those that are handed in soon after each other come
        together."""
        queue, held = deque(blocks), list[Done]()
        left = {block.number for block in blocks}
        heard = yielded = time.monotonic()
        while left:
            self._fill(queue, left)
            parts: list[_Member | _Helper] = [*self._members, *self._helpers]
            calls = {call: part for part in parts for call in part.calls}
            self._ray.wait(list(calls), timeout=SECONDS_A_COMMIT if held else SECONDS_BETWEEN_LOOKS)
            # Many workers are heard together: each has another block, and asking after them all is
            # not free.
            ready = self._ray.wait(list(calls), num_returns=len(calls), timeout=SECONDS_TOGETHER)[0]
            for done in (done for call in ready for done in self._hear(calls[call], call, queue)):
                if (
                    done.number in left
                ):  # else another worker was given it meanwhile, and wrote the same bytes
                    left.remove(done.number)
                    held.append(done)
            if held and (not left or time.monotonic() - yielded > SECONDS_A_COMMIT):
                yield held
                held, yielded = [], time.monotonic()
            silent = time.monotonic() - heard
            if ready or any(member.ready for member in self._members):
                heard = time.monotonic()
            elif silent > 30:
                self._complain(silent)

    def _hear(
        self, part: "_Member | _Helper", call: "ray.ObjectRef", queue: deque[Block]
    ) -> list[Done]:
        if part not in self._members and part not in self._helpers:
            return []  # lost a moment ago
        try:
            result = self._get(call)
        except (
            self._ray.exceptions.RayActorError,
            self._ray.exceptions.ActorUnavailableError,
        ) as error:
            self._lose(part, queue, error)
            return []
        part.calls.remove(call)
        if isinstance(part, _Helper):
            part.calls.append(part.actor.stay.remote())
        if isinstance(part, _Helper) or not part.ready:
            part.ready = True
            return []
        self._deaths[None] = 0
        numbers = {done.number for done in result}
        part.handed_in += sum(len(done.outcome.rows) for done in result)
        part.given = [block for block in part.given if block.number not in numbers]
        return result

    # -- who works -------------------------------------------------------------------------------------------------

    def _look(self) -> None:
        """See which nodes there are: how many workers fit, and who decodes for them."""
        self._looked = time.monotonic()
        nodes = {node["NodeID"]: node["Resources"] for node in self._ray.nodes() if node["Alive"]}
        self._size, self._request = places(
            list(nodes.values()), self._options.workers, gpu=self._gpu
        )
        if not self._slot_bytes or not self._gpu:
            return
        for name, resources in nodes.items():
            cores = 0 if resources.get("GPU", 0) else int(resources.get("CPU", 0))
            cores -= sum(helper.cores for helper in self._helpers if helper.node == name)
            while cores > 0 and self._deaths[name] < DEATHS_A_BLOCK:
                self._helpers.append(self._helper(name, min(cores, CORES_A_DECODER)))
                cores -= CORES_A_DECODER

    def _helper(self, node: str, cores: int) -> _Helper:
        here = self._ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy(node, soft=False)
        # Besides its endless call, two videos a core are on their way, so that no child waits for
        # the next.
        limits = {
            "num_cpus": cores,
            "max_concurrency": 2 * cores + 1,
            "max_restarts": 0,
            "max_task_retries": 0,
        }
        remote = self._ray.remote(Decoder).options(scheduling_strategy=here, **limits)
        actor: Any = remote.remote(self._options, self._worker.decode_job, self._slot_bytes, cores)
        return _Helper(actor, [actor.check.remote(*self._check[1:])], node, cores)

    def _fill(self, queue: deque[Block], left: set[int]) -> None:
        """Keep the pool complete, and two calls in flight with each worker so that it never waits
        for the driver."""
        if time.monotonic() - self._looked > SECONDS_BETWEEN_LOOKS:
            self._look()
            self._ask_how_far()
        while len(self._members) < min(self._size, len(left)):
            actor = self._actor()
            self._members.append(_Member(actor, [actor.check.remote(*self._check)]))
        ready = [member for member in self._members if member.ready]
        for helper in self._helpers:
            if helper.ready and helper.member not in self._members and ready:
                lent = Counter(id(other.member) for other in self._helpers)
                helper.member = min(ready, key=lambda member: lent[id(member)])
                lend = helper.member.actor.help.options(
                    concurrency_group="help"
                )  # beside the block in hand
                lend.remote(partial(decode_elsewhere, helper.actor), at_once=2 * helper.cores)
        for member in ready:
            while len(member.calls) < 2 and self._give(member, queue):
                pass

    def _ask_how_far(self) -> None:
        """Without waiting: an answer is taken the next time."""
        for member in self._members:
            if member.settled_call and self._ray.wait([member.settled_call], timeout=0)[0]:
                with contextlib.suppress(
                    self._ray.exceptions.RayError
                ):  # a lost worker is noticed by its other calls
                    member.settled = self._ray.get(member.settled_call)
                member.settled_call = None
            if member.ready and member.settled_call is None:
                member.settled_call = member.actor.settled.options(
                    concurrency_group="help"
                ).remote()

    def settled(self) -> int:
        """Frames that all workers have settled (see Worker.settled), as of some seconds ago."""
        return self._handed_in_by_lost + sum(member.settled for member in list(self._members))

    @staticmethod
    def _give(member: _Member, queue: deque[Block]) -> bool:
        block = member.upcoming or (queue.popleft() if queue else None)
        if block is None:
            if member.given and not member.calls:
                member.calls.append(member.actor.drain.remote())
            return False
        member.upcoming = queue.popleft() if queue else None
        member.given += [one for one in (block, member.upcoming) if one and one not in member.given]
        member.calls.append(member.actor.run.remote(block, member.upcoming))
        return True

    def _lose(self, part: "_Member | _Helper", queue: deque[Block], error: Exception) -> None:
        if isinstance(part, _Helper):
            print(f"a decoder was lost ({type(error).__name__})", file=sys.stderr)
            self._helpers.remove(part)
            self._deaths[part.node] += 1
            return
        self._members.remove(part)
        self._handed_in_by_lost += part.handed_in * self._frames_per_video
        self._ray.kill(
            part.actor
        )  # if it was only unreachable, it must not go on beside its successor
        again = [
            replace(block, deaths=block.deaths + 1)
            for block in sorted(part.given, key=lambda one: one.number)
        ]
        print(
            f"a worker was lost ({type(error).__name__}); {len(again)} blocks go to another",
            file=sys.stderr,
        )
        cause = again[0] if again else None
        number = cause.number if cause else None
        self._deaths[number] += 1
        if self._deaths[number] >= DEATHS_A_BLOCK:
            what = (
                f"block {cause.number} (from {cause.videos[0].id} on) was"
                if cause
                else "no block was"
            )
            words = str(error).splitlines()[0]
            raise RunError(
                f"{what} in hand when {DEATHS_A_BLOCK} workers died; the last said: {words}"
            )
        queue.extendleft(reversed(again))
