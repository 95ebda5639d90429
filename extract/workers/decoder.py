"""Decode on another node: child processes that work for a remote worker. Starts without torch."""

import hashlib
import importlib.metadata
import os
import socket
import threading
from functools import cache
from pathlib import Path
from typing import Any

from extract import RunError
from extract.decode.jobs import Job, Plan, used_bytes
from extract.decode.pool import Function, JobResult
from extract.options import Options
from extract.workers.rows import start_pool


@cache
def code_version() -> str:
    """`0.1.0 (sources 3f2a90c1)`: the nodes of a run must have the same version and sources."""
    sources = sorted(Path(__file__).parents[1].rglob("*.py"))
    digest = hashlib.sha256(b"\0".join(path.read_bytes() for path in sources)).hexdigest()[:8]
    return f"{importlib.metadata.version('hgnl-video')} (sources {digest})"


def check_node(version: str, video: str) -> str:
    """The name of this node. RunError if it has other code or cannot read the videos."""
    node = socket.gethostname()
    if code_version() != version:
        raise RunError(
            f"the worker on {node} has hgnl-video {code_version()}, the driver {version}; install "
            "the same everywhere"
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
    """Decode children on a node of the cluster, for a worker on another node."""

    def __init__(self, options: Options, function: Function, plan: Plan, cores: int):
        self._pool = start_pool(
            plan, workers=cores, timeout=options.video_timeout, function=function
        )

    def check(self, video: str, version: str) -> None:
        check_node(version, video)

    def decode(self, job: Job) -> JobResult:
        result = self._pool.submit(job).result()
        _, _, plan = job
        return result.detach(used_bytes(plan, result.result or []))

    def wait_forever(self) -> None:
        """Never returns, so the call fails when this decoder is lost."""
        threading.Event().wait()


def decode_elsewhere(decoder: Any, job: Job) -> JobResult:
    import ray

    # The frames stay in Ray's object store, and are not copied here.
    return ray.get(decoder.decode.remote(job))
