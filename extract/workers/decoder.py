"""Decoding on another node: children that work for a worker elsewhere. Starts without torch."""

import hashlib
import importlib.metadata
import os
import socket
import threading
from functools import cache
from pathlib import Path
from typing import Any

from extract import RunError
from extract.decode.jobs import Job, used_bytes
from extract.decode.pool import Finished, SubprocessPool
from extract.options import Options


@cache
def code_version() -> str:
    """`0.1.0 (sources 3f2a90c1)`: nodes of one run must not differ in the version, nor in a
    line."""
    sources = sorted(Path(__file__).parents[1].rglob("*.py"))
    digest = hashlib.sha256(b"\0".join(path.read_bytes() for path in sources)).hexdigest()[:8]
    return f"{importlib.metadata.version('hgnl-video')} (sources {digest})"


def check_node(version: str, video: str) -> str:
    """This node's name, if it has the same code and can read the videos; else RunError naming
    it."""
    node = socket.gethostname()
    if code_version() != version:
        raise RunError(
            f"the worker on {node} has hgnl-video {code_version()}, the driver {version}; install the same everywhere"
        )
    try:
        if os.path.isdir(video):
            os.listdir(video)
        else:
            with open(video, "rb") as file:
                file.read(1)
    except OSError as error:
        raise RunError(
            f"the worker on {node} cannot read the videos: {error}; mount them at the same path"
        ) from None
    return node


class Decoder:
    """Decode children on a node of the cluster, for a worker on another."""

    def __init__(self, options: Options, decode_job: Any, slot_bytes: int, cores: int):
        self._pool = SubprocessPool(
            decode_job, slot_bytes=slot_bytes, workers=cores, timeout=options.video_timeout
        )

    def check(self, video: str, version: str) -> None:
        check_node(version, video)

    def decode(self, job: Job) -> Finished:
        _, _, plan = job
        finished = self._pool.submit(job).result()
        return finished.taken(used_bytes(plan, finished.result or []))  # a slot may hold more rows

    def stay(self) -> None:
        """Never returns: the call fails when this decoder is lost."""
        threading.Event().wait()


def decode_elsewhere(decoder: Any, job: Job) -> Finished:
    import ray

    return ray.get(
        decoder.decode.remote(job)
    )  # its frames are seen in the object store, not copied
