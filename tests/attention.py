"""Slow, obvious references of NL and HG-NL: loops over frames and channels, written from eq. 3-8
without torch's products."""

import math

import numpy as np
import torch

from aggregate.hgnl import HGNonLocal


def some_mask(batch: int, time: int) -> torch.Tensor:
    """A random mask with at least one valid frame per row."""
    mask = torch.rand(batch, time) < 0.5
    mask[torch.arange(batch), torch.randint(time, (batch,))] = True
    return mask


def attention_by_loops(module: HGNonLocal, video: torch.Tensor) -> np.ndarray:
    """F_v of one video `[time, dim]` in float64; every frame counts."""
    frames = video.detach().double().numpy()
    n, m = frames.shape
    g1, g2 = module.g1, module.g2
    asked = np.array([normalized(frame) for frame in frames]) if module.normalize else frames
    Q, K = convolve(asked, module.query, g1), convolve(asked, module.key, g1)
    V = convolve(frames, module.value, g2)
    inner, F_o = Q.shape[1] // g2, np.zeros((n, m))
    for h in range(g2):
        A = np.zeros((n, n))
        for i in range(n):
            for j in range(n):
                for c in range(h * inner, (h + 1) * inner):
                    A[i, j] += Q[i, c] * K[j, c]
        A *= module.score_factor
        if module.attention == "softmax":
            for j in range(n):
                total = sum(math.exp(A[i, j]) for i in range(n))
                A[:, j] = [math.exp(A[i, j]) / total for i in range(n)]
        else:
            factor = {"none": 1, "n": 1 / n, "n_over_train": module.train_frames / n}[module.norm]
            A = np.where(A > 0, A, 0) * factor
        for j in range(n):  # column j of F_o = V A
            for i in range(n):
                for c in range(h * m // g2, (h + 1) * m // g2):
                    F_o[j, c] += V[i, c] * A[i, j]
    F_weight = module.scale.item() * F_o + frames
    return sum(F_weight[j] for j in range(n)) / n


def normalized(frame: np.ndarray) -> list[float]:
    mean = sum(frame) / len(frame)
    variance = sum((value - mean) ** 2 for value in frame) / len(frame)
    return [(value - mean) / math.sqrt(variance + 1e-5) for value in frame]


def convolve(frames: np.ndarray, layer: torch.nn.Module, groups: int) -> np.ndarray:
    """A 1x1 convolution with contiguous groups; shared weights are used for every group."""
    weight, bias = layer.weight.detach().double().numpy(), layer.bias.detach().double().numpy()
    if getattr(layer, "shared", False):
        weight, bias = np.concatenate([weight] * groups), np.concatenate([bias] * groups)
    per_group_out, per_group_in = len(weight) // groups, weight.shape[1]
    out = np.zeros((len(frames), len(weight)))
    for t, frame in enumerate(frames):
        for o in range(len(weight)):
            start = (o // per_group_out) * per_group_in
            out[t, o] = bias[o] + sum(weight[o, c] * frame[start + c] for c in range(per_group_in))
    return out


def gradients(
    module: torch.nn.Module, x: torch.Tensor, out: torch.Tensor, cotangent: torch.Tensor
) -> list[torch.Tensor]:
    """Gradients of `(out * cotangent).sum()` with respect to `x` and all parameters of `module`;
    zeros if there is none."""
    wanted = [x, *module.parameters()]
    found = torch.autograd.grad((out * cotangent).sum(), wanted, allow_unused=True)
    return [torch.zeros_like(w) if f is None else f for w, f in zip(wanted, found, strict=True)]
