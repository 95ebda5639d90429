"""Who does the work of an extraction: one worker in this process, or Ray actors on one machine or many.

Both answer `describe`, `check`, `run` (blocks in, written blocks out, in any order) and `close`.
"""

import logging
import socket
import sys
import time
from collections import Counter, deque
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from extract.cli import RunError
from extract.workers.worker import Block, Done, Settings, Worker

if TYPE_CHECKING:
    import ray

DEATHS_A_BLOCK = 3  # a block that was in hand when so many workers died is taken for the cause
SECONDS_WITHOUT_WORKERS = 600.0


class LocalWorker:
    """One worker in this process: no Ray, whose start costs 5 to 13 s."""

    def __init__(self, settings: Settings):
        self._worker = Worker(settings)

    def describe(self) -> dict[str, Any]:
        return self._worker.describe()

    def check(self, nonce: str, video: str) -> None:
        self._worker.check(nonce, video)

    def run(self, blocks: list[Block]) -> Iterator[Done]:
        for block, upcoming in zip(blocks, [*blocks[1:], None], strict=True):
            yield from self._worker.run(block, upcoming)
        yield from self._worker.drain()

    def close(self) -> None:
        self._worker.close()


def connect(address: str | None) -> bool:
    """Join the Ray cluster at `address`, or start one here; True where this call did, so that the caller shuts it down.

    Raises RunError where nobody answers at `host:port`, at once: Ray itself would try for minutes.
    """
    import ray

    if ray.is_initialized():
        return False
    try:
        if address not in (None, "auto", "local"):
            host, _, port = address.removeprefix("ray://").rpartition(":")
            socket.create_connection((host, int(port)), timeout=10).close()
        ray.init(address=address or "local", include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    except (OSError, ValueError, RuntimeError) as error:  # ConnectionError is an OSError
        if address is None:
            raise RunError(f"Ray does not start on this machine: {error}") from None
        raise RunError(f"--address {address}: no Ray cluster answers there ({error})") from None
    return True


@dataclass(eq=False)
class _Member:
    """A worker of the pool: an actor, its calls in flight, and the blocks it has been given and not handed in."""

    actor: Any
    ready: "ray.ObjectRef | None"  # its check, until that has ended
    calls: "list[ray.ObjectRef]" = field(default_factory=list)
    given: list[Block] = field(default_factory=list)
    upcoming: Block | None = None  # of `given`, the one it decodes ahead for


class RayActorPool:
    """Workers as Ray actors. Nodes may come and go: blocks of a lost worker are given to another."""

    def __init__(self, settings: Settings, *, workers: int | None, address: str | None):
        import ray

        self._ray = ray
        self._started = connect(address)
        resources = ray.cluster_resources()
        gpus = int(resources.get("GPU", 0)) if settings.device in ("auto", "cuda") else 0
        self._size = workers or gpus or max(1, len([node for node in ray.nodes() if node["Alive"]]))
        cores = max(1, int(resources.get("CPU", 1)) // self._size)
        self._settings = replace(
            settings, decode_workers=settings.decode_workers or cores, threads=settings.threads or cores
        )
        # An actor asks for the cores it uses, its decoding children's included; by default it would have one.
        self._request: dict[str, float] = {"num_cpus": min(cores, float(resources.get("CPU", 1)) / self._size)}
        if gpus:
            self._request["num_gpus"] = 1
        self._members: list[_Member] = []
        self._nonce, self._video = "", ""
        self._first = self._actor()

    def _actor(self) -> Any:
        # A lost actor is replaced by us: Ray's own retries leave calls failing with ActorUnavailableError.
        return (
            self._ray.remote(Worker).options(max_restarts=0, max_task_retries=0, **self._request).remote(self._settings)
        )

    def describe(self) -> dict[str, Any]:
        made = self._get(self._first.describe.remote())
        # The others take the precision that the first one measured to be the faster.
        self._settings = replace(self._settings, precision=made["precision"])
        return made

    def check(self, nonce: str, video: str) -> None:
        self._nonce, self._video = nonce, video
        self._get(self._first.check.remote(nonce, video))
        self._members.append(_Member(self._first, ready=None))

    def close(self) -> None:
        for actor in {id(a): a for a in [self._first, *(member.actor for member in self._members)]}.values():
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
        text = f"no worker for {waited:.0f} s: each asks for {self._request}, the cluster has {have}"
        if waited >= SECONDS_WITHOUT_WORKERS:
            raise RunError(f"{text}; add nodes, or ask for fewer --workers or --decode-workers")
        print(f"waiting: {text}", file=sys.stderr)

    def run(self, blocks: list[Block]) -> Iterator[Done]:
        queue = deque(blocks)
        left = {block.number for block in blocks}
        deaths: Counter[int] = Counter()
        heard = time.monotonic()
        while left:
            self._fill(queue, left)
            calls = {call: member for member in self._members for call in self._pending(member)}
            ready, _ = self._ray.wait(list(calls), timeout=5)
            for call in ready:
                member = calls[call]
                if member not in self._members:
                    continue  # lost a moment ago
                try:
                    result = self._get(call)
                except (self._ray.exceptions.RayActorError, self._ray.exceptions.ActorUnavailableError) as error:
                    self._lose(member, queue, deaths, error)
                    continue
                heard = time.monotonic()
                if call == member.ready:
                    member.ready = None
                    continue
                member.calls.remove(call)
                for done in result:
                    member.given = [block for block in member.given if block.number != done.number]
                    if done.number in left:  # or another worker was given it meanwhile, and wrote the same bytes
                        left.remove(done.number)
                        yield done
            if not ready and not any(member.ready is None for member in self._members):
                silent = time.monotonic() - heard
                if silent > 30:
                    self._complain(silent)

    @staticmethod
    def _pending(member: _Member) -> "list[ray.ObjectRef]":
        return [member.ready] if member.ready is not None else member.calls

    def _fill(self, queue: deque[Block], left: set[int]) -> None:
        """Keep the pool complete, and two calls in flight with each worker so that it never waits for the driver."""
        while len(self._members) < min(self._size, len(left)):
            actor = self._actor()
            self._members.append(_Member(actor, ready=actor.check.remote(self._nonce, self._video)))
        for member in self._members:
            while member.ready is None and len(member.calls) < 2:
                block = member.upcoming or (queue.popleft() if queue else None)
                member.upcoming = None
                if block is None:
                    if member.given and not member.calls:
                        member.calls.append(member.actor.drain.remote())
                    break
                if block not in member.given:
                    member.given.append(block)
                if queue:
                    member.upcoming = queue.popleft()
                    member.given.append(member.upcoming)
                member.calls.append(member.actor.run.remote(block, member.upcoming))

    def _lose(self, member: _Member, queue: deque[Block], deaths: Counter[int], error: Exception) -> None:
        self._members.remove(member)
        self._ray.kill(member.actor)  # if it was only unreachable, it must not go on beside its successor
        again = sorted(member.given, key=lambda block: block.number)
        print(f"a worker was lost ({type(error).__name__}); {len(again)} blocks go to another", file=sys.stderr)
        deaths.update(block.number for block in again[:1])
        for block in again:
            if deaths[block.number] >= DEATHS_A_BLOCK:
                raise RunError(
                    f"block {block.number} ({block.ids[0]} ... {block.ids[-1]}) was in hand when {DEATHS_A_BLOCK} "
                    f"workers died; the last said: {str(error).splitlines()[0]}"
                )
        queue.extendleft(reversed(again))
