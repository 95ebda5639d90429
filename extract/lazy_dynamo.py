"""torch's compiler, not imported until something needs it: half of the start-up of commands that
compile nothing."""

import importlib
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

DYNAMO, DYNAMO_UTILS = "torch._dynamo", "torch._dynamo.utils"


class _LazyModule(ModuleType):
    """Takes the place of a module of the compiler, which is imported when any other of its names is
    used."""

    def __getattr__(self, name: str) -> Any:
        # The import system looks at the __path__ of a package when one of its modules is imported.
        if name.startswith("__") and (name, self.__name__) != ("__path__", DYNAMO):
            raise AttributeError(name)
        return getattr(_import_really(self.__name__), name)


def defer_dynamo_import() -> None:
    """Call it before an optimizer is made or torchvision imported: both import torch._dynamo
    without compiling.

    It is then imported by the first use of more than they use, such as torch.compile or
    torch.export.
    """
    if DYNAMO in sys.modules:
        return
    dynamo, utils = _LazyModule(DYNAMO), _LazyModule(DYNAMO_UTILS)
    # Optimizers mark functions that are not to be compiled, and the ends of graphs: nothing to do
    # without it.
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
