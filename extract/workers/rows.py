"""Decode rows, which are videos or spans of them, in child processes: one after the other."""

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager
from functools import cached_property, partial
from typing import Any, NamedTuple

from extract.decode.container import VideoError
from extract.decode.jobs import Job, Plan, Prepared, decode_job, remaining_jobs
from extract.decode.packets import Span
from extract.decode.pool import Function, JobResult, SubprocessPool
from extract.listing.videos import Video
from extract.sources import Source

Submitted = tuple[Job, "Future[JobResult]"]


class DecodedRow(NamedTuple):
    """A decoded row; or a part of it, if its clips did not all fit into a buffer.

    prepared: what was decoded, or why nothing was.
    pictures: uint8 [P, height, width, 3], valid until the next row; None for a failure.
    first_clip: of those in this part, per view.
    source: the file that was read.
    waited, cpu_seconds: since the row before: of this process for a job, and of its children.
    """

    id: str
    span: Span | None
    prepared: Prepared | VideoError
    pictures: Any
    first_clip: int
    source: Source
    waited: float
    cpu_seconds: float


def start_pool(plan: Plan, function: Function = decode_job, **settings: Any) -> SubprocessPool:
    """Child processes for the jobs of a plan. settings: of `SubprocessPool`."""
    return SubprocessPool(function, slot_bytes=plan.slot_bytes, **settings)


def make_jobs(videos: Iterable[Video], plan: Plan) -> list[Job]:
    """Decode jobs for videos.

    A whole file is a job. Adjacent spans of one file share a job, as many as fit into its buffer.
    """
    groups: list[list[Video]] = []
    for video in videos:
        previous = groups[-1][-1] if groups else None
        continues = previous and previous.path == video.path and previous.span and video.span
        if continues and len(groups[-1]) < plan.rows_per_job:
            groups[-1].append(video)
        else:
            groups.append([video])
    return [(group[0].path, [(video.id, video.span) for video in group], plan) for group in groups]


class RowDecoder(AbstractContextManager["RowDecoder"]):
    """Decodes rows in child processes.

    pool: runs their jobs.
    more: starts another pool, for rows that did not fit into a buffer or are tried again. In the
        first one, the results of later jobs might fill all slots, and such a row would wait for a
        slot forever.
    """

    def __init__(self, pool: SubprocessPool, more: Callable[[], SubprocessPool]):
        self.pool, self._more = pool, more

    @classmethod
    def start(cls, plan: Plan, **settings: Any) -> "RowDecoder":
        """With pools of `start_pool`."""
        start = partial(start_pool, plan, **settings)
        return cls(start(), start)

    @cached_property
    def _leftovers(self) -> SubprocessPool:
        return self._more()

    def submit(self, videos: Iterable[Video], plan: Plan) -> list[Submitted]:
        return [(job, self.pool.submit(job)) for job in make_jobs(videos, plan)]

    def read(self, submitted: Sequence[Submitted]) -> Iterator[DecodedRow]:
        """Wait for jobs, and yield their rows in order.

        If the process of a job of several rows dies or hangs, each row is tried on its own.
        """
        waiting: deque[tuple[Job, Future[JobResult] | None]] = deque(submitted)
        waited = cpu_seconds = 0.0
        while waiting:
            job, future = waiting.popleft()
            path, rows, plan = job
            if future is None:
                future = self._leftovers.submit(job)
            started = time.perf_counter()
            with future.result() as finished:
                waited += time.perf_counter() - started
                cpu_seconds += finished.cpu_seconds
                if finished.failure and len(rows) > 1:
                    # One after the other: only one may be the cause.
                    waiting.extendleft(((path, [row], plan), None) for row in reversed(rows))
                    continue
                results = finished.result
                if finished.failure:
                    results = [VideoError(path, finished.failure)]
                for rest in reversed(remaining_jobs(job, results)):
                    waiting.appendleft((rest, self._leftovers.submit(rest)))
                for (row_id, span), prepared in zip(rows, results, strict=True):
                    if prepared is None:
                        continue
                    pictures = None
                    if isinstance(prepared, Prepared):
                        pictures = prepared.pictures(finished.buffer, plan)
                    yield DecodedRow(
                        row_id,
                        span,
                        prepared,
                        pictures,
                        plan.first_clip,
                        finished.source,
                        waited,
                        cpu_seconds,
                    )
                    waited = cpu_seconds = 0.0

    def close(self) -> None:
        self.pool.close()
        if "_leftovers" in self.__dict__:
            self._leftovers.close()

    def __exit__(self, *_: object) -> None:
        self.close()
