"""Blocks of videos, the decode jobs of a block, and what a worker returns for one."""

from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from extract.decode.jobs import Job, Plan
from extract.decode.pool import JobResult
from extract.listing.videos import Video
from extract.store import Outcomes


@dataclass(frozen=True)
class Block:
    """A unit of work: the videos of one shard that are still to do."""

    number: int
    rows: tuple[int, ...]
    videos: tuple[Video, ...] = field(repr=False)
    failures: int = 0  # workers that died while they worked on it


@dataclass(frozen=True)
class BlockResult:
    """A block whose shard is written, ready to be committed."""

    number: int
    outcome: Outcomes
    node: str
    frames: int  # that the backbone computed
    # decode: CPU seconds of the children; wait, device, write: seconds of the worker.
    seconds: dict[str, float]


@dataclass(frozen=True)
class BackboneInfo:
    """The features that a worker makes, for the driver and the store.

    frames: rows of features per view, of `dim` channels each.
    slot_bytes: size of the buffer of a decode job.
    frames_per_video: pictures that the backbone sees.
    description: weights, device and precision, for the screen.
    """

    provenance: dict[str, Any]
    frames: int
    dim: int
    slot_bytes: int
    frames_per_video: int
    description: str


Submitted = tuple[Job, "Future[JobResult]"]


def make_jobs(videos: Sequence[Video], plan: Plan) -> list[Job]:
    """Decode jobs for the videos of a block.

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
