"""torch's compiler, kept from being loaded by commands that compile nothing: half of their start-up otherwise."""

import importlib
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

COMPILER, ITS_TOOLS = "torch._dynamo", "torch._dynamo.utils"


class _Postponed(ModuleType):
    """Stands in for a module of the compiler; whatever else is asked of it loads the real one in its place."""

    def __getattr__(self, name: str) -> Any:
        # A package is asked for its __path__ when one of its modules is imported.
        if name.startswith("__") and (name, self.__name__) != ("__path__", COMPILER):
            raise AttributeError(name)
        return getattr(_loaded(self.__name__), name)


def postpone_compiler() -> None:
    """Call it before an optimizer is made or torchvision imported, which import torch._dynamo for nothing.

    It is then loaded by the first to ask it for more than they do, such as torch.compile or torch.export.
    """
    if COMPILER in sys.modules:
        return
    compiler, tools = _Postponed(COMPILER), _Postponed(ITS_TOOLS)
    # Optimizers mark their functions as not to be compiled, and where a graph ends: nothing to do where none is made.
    compiler.disable = _as_it_is  # type: ignore[attr-defined]
    compiler.graph_break = lambda *_, **__: None  # type: ignore[attr-defined]
    tools.is_compile_supported = lambda kind: _loaded(ITS_TOOLS).is_compile_supported(kind)  # type: ignore[attr-defined]
    sys.modules |= {COMPILER: compiler, ITS_TOOLS: tools}


def _as_it_is(function: Callable, *_: Any, **__: Any) -> Callable:
    return function


def _loaded(name: str) -> Any:
    for one in (COMPILER, ITS_TOOLS):
        if isinstance(sys.modules.get(one), _Postponed):
            del sys.modules[one]
    return importlib.import_module(name)
