"""A timm module prepared for inference by PyTorch: batch norms are folded into convolutions."""

import contextlib
import io
from collections import Counter
from math import inf, isfinite
from typing import Any

import torch
from timm.layers import BatchNormAct2d
from torch import Tensor, fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

# The largest relative error of a changed network in fp32. Its sums are in another order.
TOLERANCE = 1e-3


@torch.inference_mode()
def fold_batch_norms(module: nn.Module, frame: Tensor) -> fx.GraphModule | None:
    """`module` (in evaluation mode) as a graph whose convolutions include the next batch norm.

    frame: float32 [1, 3, size, size], to compare both on. Returns None if torch.fx cannot trace the
    module, or if their features differ, because a path depends on the data. The module itself does
    not change.
    """
    try:
        graph = fx.GraphModule(module, _Tracer().trace(module))
        _fold_into_convolutions(graph)
        # A graph that fails prints its own traceback.
        with contextlib.redirect_stderr(io.StringIO()):
            features = graph(frame)
        if relative_error(features, module(frame)) > TOLERANCE:
            return None
    except Exception:  # tracing can fail in any way; without a graph the module runs as it is
        return None
    return graph


def relative_error(features: Tensor, expected: Tensor) -> float:
    """2-norm of the difference over the 2-norm of `expected`; infinite if a value is not finite."""
    features, expected = features.double(), expected.double()
    norm = expected.norm().clamp_min(torch.finfo(torch.float32).tiny)
    error = ((features - expected).norm() / norm).item()
    return error if isfinite(error) else inf


class _Tracer(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        # torch.fx would trace into timm's own subclasses of convolutions and batch norms.
        is_layer = isinstance(m, nn.Conv2d | nn.BatchNorm2d)
        return is_layer or super().is_leaf_module(m, module_qualified_name)


def _fold_into_convolutions(graph: fx.GraphModule) -> None:
    modules: dict[str, Any] = dict(graph.named_modules())
    calls = [node for node in graph.graph.nodes if node.op == "call_module"]
    num_calls = Counter(node.target for node in calls)
    for node in calls:
        norm = modules[node.target]
        # A module that is called twice cannot be changed for one of its calls.
        if type(norm) not in (nn.BatchNorm2d, BatchNormAct2d) or num_calls[node.target] > 1:
            continue
        before = node.args[0]
        if before not in calls or len(before.users) > 1 or norm.running_mean is None:
            continue
        convolution = modules[before.target]
        if not isinstance(convolution, nn.Conv2d):
            continue
        graph.set_submodule(before.target, fuse_conv_bn_eval(convolution, norm))
        # timm's norm-and-activation layers leave their activation. Their dropout does nothing in
        # evaluation mode.
        activation = norm.act if isinstance(norm, BatchNormAct2d) else nn.Identity()
        graph.set_submodule(node.target, activation)
        if type(norm) is nn.BatchNorm2d:
            node.replace_all_uses_with(before)
            graph.graph.erase_node(node)
    graph.recompile()
