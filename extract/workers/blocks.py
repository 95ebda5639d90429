"""Units of work: blocks of videos, the decode jobs of a block, and what a worker made of one."""

from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, fields
from operator import attrgetter
from typing import Any

from extract.decode.jobs import Job, Plan
from extract.decode.pool import Finished
from extract.listing.videos import Video
from extract.store import Outcomes


@dataclass(frozen=True)
class Block:
    """A unit of work: the videos of one shard that are still to do."""

    number: int
    rows: tuple[int, ...]
    videos: tuple[Video, ...] = field(repr=False)
    deaths: int = 0  # of workers that had it in hand

    def __reduce__(self) -> tuple[Any, ...]:
        # Videos travel as plain tuples: Ray's pickler asks about every other object, in Python.
        return _block, (self.number, self.rows, tuple(map(_PLAIN, self.videos)), self.deaths)


_PLAIN = attrgetter(*(field.name for field in fields(Video)))


def _block(
    number: int, rows: tuple[int, ...], videos: tuple[tuple[Any, ...], ...], deaths: int
) -> Block:
    return Block(number, rows, tuple(Video(*video) for video in videos), deaths)


Submitted = tuple[
    list[int], Job, "Future[Finished]"
]  # rows of a block (their places), and who decodes them


@dataclass(frozen=True)
class Done:
    """A block whose shard is written, ready to be committed."""

    number: int
    outcome: Outcomes
    node: str
    frames: int  # that went through the backbone
    seconds: dict[
        str, float
    ]  # decode: CPU seconds of the children; wait, device, write: seconds of this worker


def jobs_of(videos: Sequence[Video], plan: Plan) -> list[tuple[list[int], Job]]:
    """What decode children are to do for n videos, and which of them (places) each job is for.

    A whole file is a job of its own. Spans of one file that stand side by side go together, as many
    as a slot holds.
    """
    together: list[list[int]] = []
    for place, video in enumerate(videos):
        before = videos[place - 1] if place else None
        beside = before and before.path == video.path and before.span and video.span
        if beside and len(together[-1]) < plan.rows_per_job:
            together[-1].append(place)
        else:
            together.append([place])
    return [
        (some, (videos[some[0]].path, [(videos[k].id, videos[k].span) for k in some], plan))
        for some in together
    ]
