"""A timm module made ready for inference by PyTorch: batch norm folded into convolutions, checked
on a frame."""

import contextlib
import io
from collections import Counter
from typing import Any

import torch
from timm.layers import BatchNormAct2d
from torch import Tensor, fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

# How far a changed network may be from the module it was made of, relative (2-norm of the features)
# in fp32: the order of its sums differs.
TOLERANCE = 1e-3


@torch.inference_mode()
def fold_batch_norms(module: nn.Module, frame: Tensor) -> fx.GraphModule | None:
    """`module` (in evaluation mode) as a graph in which every batch norm right after a convolution
    is part of it.

    frame: float32 [1, 3, size, size]. Returns None where torch.fx cannot trace the module, or where
    the graph's answer differs from the module's (a path that depends on the data); the module
    itself is never changed.
    """
    try:
        graph = fx.GraphModule(module, _Tracer().trace(module))
        _fold_into_convolutions(graph)
        with contextlib.redirect_stderr(
            io.StringIO()
        ):  # a graph that fails prints its own traceback
            answer = graph(frame)
        if relative_error(answer, module(frame)) > TOLERANCE:
            return None
    except Exception:  # tracing can fail in any way; without a graph the module runs as it is
        return None
    return graph


def relative_error(got: Tensor, expected: Tensor) -> float:
    """2-norm of the difference over the 2-norm of what was expected; infinite where something is
    not finite."""
    got, expected = got.float(), expected.float()
    error = (
        (got - expected).norm() / expected.norm().clamp_min(torch.finfo(torch.float32).tiny)
    ).item()
    return error if error == error else float("inf")


class _Tracer(fx.Tracer):
    # timm's own subclasses of convolutions and batch norms are to stay whole, like torch's.
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, nn.Conv2d | nn.BatchNorm2d) or super().is_leaf_module(
            m, module_qualified_name
        )


def _fold_into_convolutions(graph: fx.GraphModule) -> None:
    modules = dict(graph.named_modules())
    for node, norm in _called(graph, modules, nn.BatchNorm2d, BatchNormAct2d):
        before = node.args[0]
        if not (
            isinstance(before, fx.Node) and before.op == "call_module" and len(before.users) == 1
        ):
            continue
        convolution = modules[str(before.target)]
        if not isinstance(convolution, nn.Conv2d) or norm.running_mean is None:
            continue
        graph.set_submodule(str(before.target), fuse_conv_bn_eval(convolution, norm))
        # timm's norm-and-activation layers leave their activation (their dropout does nothing in
        # evaluation).
        graph.set_submodule(
            str(node.target), norm.act if isinstance(norm, BatchNormAct2d) else nn.Identity()
        )
        if type(norm) is nn.BatchNorm2d:
            node.replace_all_uses_with(before)
            graph.graph.erase_node(node)
    graph.recompile()


def _called(
    graph: fx.GraphModule, modules: dict[str, nn.Module], *wanted: type
) -> list[tuple[fx.Node, Any]]:
    """The calls of those modules that are of a wanted type and are called once (a shared one has
    two meanings)."""
    calls = [node for node in graph.graph.nodes if node.op == "call_module"]
    times = Counter(node.target for node in calls)
    once = [(node, modules[node.target]) for node in calls if times[node.target] == 1]
    return [(node, module) for node, module in once if type(module) in wanted]
