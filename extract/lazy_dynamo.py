"""Import torch._dynamo on first use only: it takes half of the start-up of commands that compile
nothing."""

import importlib
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

DYNAMO, DYNAMO_UTILS = "torch._dynamo", "torch._dynamo.utils"


class _LazyModule(ModuleType):
    """A stand-in for a module of torch, which is imported once an attribute is missing here."""

    def __getattr__(self, name: str) -> Any:
        # The import system reads the __path__ of a package to import a submodule.
        if name.startswith("__") and (name, self.__name__) != ("__path__", DYNAMO):
            raise AttributeError(name)
        return getattr(_import_really(self.__name__), name)


def defer_dynamo_import() -> None:
    """Call this before an optimizer is made or torchvision is imported: both import torch._dynamo
    without compiling anything.

    Other uses, such as torch.compile or torch.export, then import it.
    """
    if DYNAMO in sys.modules:
        return
    dynamo, utils = _LazyModule(DYNAMO), _LazyModule(DYNAMO_UTILS)
    # Optimizers exclude functions from compilation and mark graph breaks: no-ops without dynamo.
    dynamo.disable = _identity  # type: ignore[attr-defined]
    dynamo.graph_break = lambda *_, **__: None  # type: ignore[attr-defined]

    def is_compile_supported(kind: str) -> bool:
        return _import_really(DYNAMO_UTILS).is_compile_supported(kind)  # type: ignore[attr-defined]

    utils.is_compile_supported = is_compile_supported  # type: ignore[attr-defined]
    sys.modules |= {DYNAMO: dynamo, DYNAMO_UTILS: utils}


def _identity(function: Callable, *_: Any, **__: Any) -> Callable:
    return function


def _import_really(name: str) -> Any:
    for module in (DYNAMO, DYNAMO_UTILS):
        if isinstance(sys.modules.get(module), _LazyModule):
            del sys.modules[module]
    return importlib.import_module(name)
