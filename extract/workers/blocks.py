"""Blocks of videos, and what a worker returns for one."""

from dataclasses import dataclass, field
from typing import Any

from extract.decode.jobs import Plan
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
    plan: of the decode jobs.
    frames_per_video: pictures that the backbone sees.
    description: weights, device and precision, for the screen.
    """

    provenance: dict[str, Any]
    frames: int
    dim: int
    plan: Plan
    frames_per_video: int
    description: str
