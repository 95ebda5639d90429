"""A simulated GPU: PyTorch's `cuda` is the CPU, a graph repeats the recorded calls, and streams and
events do nothing.

    HGNL_GPU=pretended python -m pytest tests/gpu

It proves nothing about CUDA. It runs the lines that would run on a GPU, with every decision that
depends on the device: pinned memory, precision, slots, the decoder, and the calls that a graph may
not repeat. `calls` are the last calls, in order and with their streams. Streams are numbered from 1
in the order in which they are made.
"""

import itertools
import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

CPU = torch.device("cpu")
calls: deque[str] = deque(maxlen=1000)
_current = ["the default stream"]  # the last one is in use
_numbers = itertools.count(1)


class CudaIsTheCpu(TorchFunctionMode):
    """Every call that names a CUDA device gets the CPU."""

    def __torch_function__(
        self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        if function is torch.device:
            return function(*args, **(kwargs or {}))
        changed = {name: here(value) for name, value in (kwargs or {}).items()}
        changed.pop("pin_memory", None)
        return function(*map(here, args), **changed)


def here(value: Any) -> Any:
    if isinstance(value, str) and (value == "cuda" or value.startswith("cuda:")):
        return "cpu"
    return CPU if isinstance(value, torch.device) and value.type == "cuda" else value


class Stream:
    def __init__(self, device: Any = None):
        self.device, self.name = CPU, f"stream {next(_numbers)}"

    def synchronize(self) -> None:
        calls.append(f"the host waits for {self.name}")


class Event:
    def __init__(self, enable_timing: bool = False):
        self.recorded = False

    def record(self) -> None:
        self.recorded = True
        calls.append(f"record on {_current[-1]}")

    def wait(self) -> None:
        assert self.recorded
        calls.append(f"wait on {_current[-1]}")

    def synchronize(self) -> None:
        assert self.recorded
        calls.append("the host waits")

    def elapsed_time(self, other: "Event") -> float:
        assert self.recorded
        assert other.recorded
        return 1500.0


@contextmanager
def stream(one: Stream) -> Iterator[None]:
    _current.append(one.name)
    try:
        yield
    finally:
        _current.pop()


def compute(run: Callable) -> Callable:
    """Call `run`, and add a line to `calls`."""

    def called(*arguments: Any) -> Any:
        calls.append(f"compute on {_current[-1]}")
        return run(*arguments)

    return called


class CUDAGraph:
    """Repeats the recorded calls on the same memory, and nothing else: it runs no Python and sees
    no new value of the host."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, tuple, dict, Any]] = []

    def replay(self) -> None:
        with torch.inference_mode():
            for function, args, kwargs, before in self.calls:
                pairs = zip(
                    tree_leaves(before), tree_leaves(function(*args, **kwargs)), strict=True
                )
                for old, new in pairs:
                    if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                        old.copy_(new)


class Recording(TorchDispatchMode):
    def __init__(self, graph: CUDAGraph):
        super().__init__()
        self.graph = graph

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        self.graph.calls.append((function, args, kwargs or {}, result))
        return result


def graph(one: CUDAGraph, stream: Stream, capture_error_mode: str) -> Recording:
    return Recording(one)


def begin(replace: Callable[[Any, str, Any], object] = setattr) -> None:
    """Simulate a GPU for the rest of this process, or with `replace=monkeypatch.setattr` for a test
    that uses `CudaIsTheCpu` itself."""
    global _numbers
    _numbers = itertools.count(1)
    calls.clear()
    fakes: dict[str, Any] = {
        "is_available": lambda: True,
        "device_count": lambda: 1,
        "get_device_name": lambda device=None: "a pretended GPU",
        "mem_get_info": lambda device=None: (8 << 30, 8 << 30),
        "synchronize": lambda device=None: calls.append("all is done"),
        "current_stream": lambda device=None: Stream(),
        "empty_cache": lambda: None,
        "manual_seed_all": lambda seed: None,
        "current_device": lambda: 0,
        "is_bf16_supported": lambda: True,
        "get_rng_state": lambda device=None: torch.zeros(16, dtype=torch.uint8),
        "set_rng_state": lambda state, device=None: None,
        "set_per_process_memory_fraction": lambda share: None,
        "is_current_stream_capturing": lambda: False,
        "_lazy_init": lambda: None,
        "Stream": Stream,
        "Event": Event,
        "stream": stream,
        "CUDAGraph": CUDAGraph,
        "graph": graph,
    }
    for name, fake in fakes.items():
        replace(torch.cuda, name, fake)
    # It needs a real CUDA; tests/extract/test_batches.py tests the compiler.
    replace(torch, "compile", lambda run, **how: run)
    replace(torch.accelerator, "current_accelerator", lambda check_available=False: None)
    replace(torch.Tensor, "pin_memory", lambda tensor, device=None: tensor.clone())
    replace(torch.Tensor, "record_stream", lambda tensor, one: calls.append(f"kept for {one.name}"))
    if replace is not setattr:
        return
    run = threading.Thread.run

    def pretending(thread: threading.Thread) -> None:
        with CudaIsTheCpu():
            run(thread)

    threading.Thread.run = pretending  # type: ignore[method-assign]
    CudaIsTheCpu().__enter__()
