"""A timm module made ready for inference: batch norm folded into convolutions, and on a CPU weights packed for oneDNN.

On SE-ResNeXt101 and 2 CPU cores, bf16, this makes 21 frames/s of 17 (LOG.md). Both steps are checked on a frame.
"""

import copy
from collections import Counter
from typing import Any

import torch
from timm.layers import BatchNormAct2d
from torch import Tensor, fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

# Activations that oneDNN computes with the convolution before them, by its names.
_POST_OPS: dict[type[nn.Module], tuple[str, list[float]]] = {nn.ReLU: ("relu", []), nn.ReLU6: ("hardtanh", [0.0, 6.0])}

# How far a folded or packed network may be from the module it was made of, relative (2-norm of the features):
# fp32 differs by the order of its sums; bf16 has 8 bits and loses 0.2 to 0.4 % in a network of this depth.
_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 5e-2, torch.float16: 5e-2}


@torch.inference_mode()
def folded(module: nn.Module, frame: Tensor) -> fx.GraphModule | None:
    """`module` (in evaluation mode) as a graph in which every batch norm right after a convolution is part of it.

    frame: float32 [1, 3, size, size]. Returns None where torch.fx cannot trace the module, or where the graph's
    answer differs from the module's (a path that depends on the data); the module itself is never changed.
    """
    try:
        graph = fx.GraphModule(module, _Tracer().trace(module))
        _fold_batch_norms(graph)
        if relative_error(graph(frame), module(frame)) > _TOLERANCE[torch.float32]:
            return None
    except Exception:  # tracing can fail in any way; without a graph the module runs as it is
        return None
    return graph


@torch.inference_mode()
def packed(graph: fx.GraphModule, frame: Tensor, *, batch: int) -> fx.GraphModule | None:
    """`graph` with its convolutions in oneDNN's own weight layout, a following ReLU or ReLU6 computed with them.

    Eager PyTorch reorders every weight at every call. frame: [1, 3, size, size] in the graph's precision;
    batch: the batch size that the layout is chosen for. Packing changes no byte; two sums of fewer roundings do.
    Returns None where this build of PyTorch has no such operators or where the answer differs.
    """
    try:
        fast = copy.deepcopy(graph)
        shapes = _InputShapes(fast)
        shapes.run(frame)
        _pack_convolutions(fast, shapes.of, batch=batch)
        # Squeeze-and-excitation: a mean for which PyTorch first copies bf16 into fp32, and a gate with the sum after it
        # in one pass over memory and with one rounding less.
        fx.replace_pattern(fast, lambda x: x.mean((2, 3), keepdim=True), lambda x: _spatial_mean(x))
        fx.replace_pattern(fast, lambda x, gate, z: x * gate + z, lambda x, gate, z: torch.addcmul(z, x, gate))
        if relative_error(fast(frame), graph(frame)) > _TOLERANCE[frame.dtype]:
            return None
    except Exception:  # these operators are not public: whatever a build of PyTorch lacks, the graph is right without
        return None
    return fast


def relative_error(got: Tensor, expected: Tensor) -> float:
    """2-norm of the difference over the 2-norm of what was expected; infinite where something is not finite."""
    got, expected = got.float(), expected.float()
    error = ((got - expected).norm() / expected.norm().clamp_min(torch.finfo(torch.float32).tiny)).item()
    return error if error == error else float("inf")


class _Tracer(fx.Tracer):
    # timm's own subclasses of convolutions and batch norms are to stay whole, like torch's.
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, nn.Conv2d | nn.BatchNorm2d) or super().is_leaf_module(m, module_qualified_name)


def _fold_batch_norms(graph: fx.GraphModule) -> None:
    modules = dict(graph.named_modules())
    for node, norm in _called(graph, modules, nn.BatchNorm2d, BatchNormAct2d):
        before = node.args[0]
        if not (isinstance(before, fx.Node) and before.op == "call_module" and len(before.users) == 1):
            continue
        convolution = modules[str(before.target)]
        if not isinstance(convolution, nn.Conv2d) or norm.running_mean is None:
            continue
        graph.set_submodule(str(before.target), fuse_conv_bn_eval(convolution, norm))
        # timm's norm-and-activation layers leave their activation (their dropout does nothing in evaluation).
        graph.set_submodule(str(node.target), norm.act if isinstance(norm, BatchNormAct2d) else nn.Identity())
        if type(norm) is nn.BatchNorm2d:
            node.replace_all_uses_with(before)
            graph.graph.erase_node(node)
    graph.recompile()


def _called(graph: fx.GraphModule, modules: dict[str, nn.Module], *wanted: type) -> list[tuple[fx.Node, Any]]:
    """The calls of those modules that are of a wanted type and are called once (a shared one has two meanings)."""
    calls = [node for node in graph.graph.nodes if node.op == "call_module"]
    times = Counter(node.target for node in calls)
    once = [(node, modules[node.target]) for node in calls if times[node.target] == 1]
    return [(node, module) for node, module in once if type(module) in wanted]


class _InputShapes(fx.Interpreter):
    """Runs a graph and notes in `of` what shape each module is given. torch's own ShapeProp imports sympy: 0.3 s."""

    def __init__(self, graph: fx.GraphModule):
        super().__init__(graph)
        self.of: dict[str, list[int]] = {}

    def call_module(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self.of[target] = list(args[0].shape)
        return super().call_module(target, args, kwargs)


class _PackedConvolution(nn.Module):
    """A convolution, and the activation after it, by the operator that torch.compile uses on a CPU."""

    def __init__(self, convolution: nn.Conv2d, shape: list[int], *, activation: type[nn.Module] | None):
        super().__init__()
        where = (convolution.padding, convolution.stride, convolution.dilation, convolution.groups)
        weight = convolution.weight.detach().contiguous()
        # Plain attributes: an oneDNN tensor can neither be cast nor saved.
        self._weight = torch.ops.mkldnn._reorder_convolution_weight(weight, *where, shape)
        self._rest = (convolution.bias, *where, *(_POST_OPS[activation] if activation else ("none", [])), "")

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.mkldnn._convolution_pointwise(x, self._weight, *self._rest)


def _pack_convolutions(graph: fx.GraphModule, shapes: dict[str, list[int]], *, batch: int) -> None:
    modules = dict(graph.named_modules())
    for node, convolution in _called(graph, modules, nn.Conv2d):
        if isinstance(convolution.padding, str) or convolution.padding_mode != "zeros":
            continue
        users = list(node.users)
        after = type(modules[str(users[0].target)]) if len(users) == 1 and users[0].op == "call_module" else None
        activation = after if after in _POST_OPS else None
        frames, *rest = shapes[str(node.target)]
        new = _PackedConvolution(convolution, [frames * batch, *rest], activation=activation)
        graph.set_submodule(str(node.target), new)
        if activation:
            users[0].replace_all_uses_with(node)
            graph.graph.erase_node(users[0])


@fx.wrap
def _spatial_mean(x: Tensor) -> Tensor:
    """[batch, channels, height, width] -> [batch, channels, 1, 1]; oneDNN sums in fp32."""
    batch, channels, height, width = x.shape
    pixels = x.permute(0, 2, 3, 1).reshape(batch, height * width, channels)  # a view, in channels-last
    total = torch.bmm(pixels.new_ones(batch, 1, height * width), pixels)
    return (total / (height * width)).reshape(batch, channels, 1, 1)
