"""Timing of work for benchmarks: in turns, alone or next to busy processes, and its floating-point
operations."""

import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import torch

from extract.backbone.model import Trunk


def best_seconds(work: dict[str, Callable[[], object]], *, rounds: int) -> dict[str, float]:
    """The shortest time of each; they take turns. The first round, which makes the kernels, does
    not count."""
    best = dict.fromkeys(work, float("inf"))
    for turn in range(rounds + 1):
        for name, call in work.items():
            start = time.perf_counter()
            call()
            if turn:
                best[name] = min(best[name], time.perf_counter() - start)
    return best


@contextmanager
def busy_neighbors(count: int) -> Iterator[None]:
    """N processes that each keep a core busy until the end of the block."""
    with ExitStack() as stack:
        for _ in range(count):
            process = subprocess.Popen([sys.executable, "-c", "while True: pass"])
            stack.callback(process.wait)
            stack.callback(process.kill)
        time.sleep(0.5)
        yield


def flops_per_frame(trunk: Trunk) -> int:
    """Floating-point operations of convolutions and matrix products, a multiply-add counted as two."""
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        trunk.module(trunk.example())
    return counter.get_total_flops()
