"""Frame features and their masks: types, and sums, batch norm and order over valid frames only.

A mask is False for frames that do not count: padding, and the repeated frames of short videos.
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn.functional import batch_norm

Frames = Float[Tensor, "batch time dim"]
Mask = Bool[Tensor, "batch time"] | None
Features = Float[Tensor, "batch dim"]  # F_v: one vector per video


def blank_masked(x: Frames, mask: Mask) -> Frames:
    """Set the masked frames of `x` to zero, so that not even a NaN in them reaches a sum.

    Raises ValueError for a mask of another shape and, on a CPU, for a video without a valid frame.
    On a GPU that check would wait for the device; there such a video gives NaN or infinity.
    """
    if mask is None:
        return x
    if mask.shape != x.shape[:2]:
        raise ValueError(
            f"the mask is {list(mask.shape)}; "
            f"for features {list(x.shape)} it must be {list(x.shape[:2])}"
        )
    # An exported graph cannot branch on values, so there the mask is not checked.
    if mask.is_cpu and not torch.compiler.is_compiling() and not (valid := mask.any(1)).all():
        rows = (~valid).nonzero().flatten().tolist()
        raise ValueError(
            f"no frame is valid in row {rows[0]} of the mask ({len(rows)} such rows of {len(mask)})"
        )
    return x.masked_fill(~mask[..., None], 0)


def frame_counts(x: Frames, mask: Mask) -> Tensor | int:
    """Count the valid frames (n of the equations).

    Returns an int without a mask, else `[batch, 1]` in the dtype of `x`.
    """
    return x.shape[1] if mask is None else mask.sum(1, keepdim=True).to(x.dtype)


def average(x: Frames, mask: Mask = None) -> Features:
    """Mean over the valid frames. Masked frames must be zero already (`blank_masked`)."""
    return x.mean(1) if mask is None else x.sum(1) / frame_counts(x, mask)


def valid_first(x: Frames, mask: Bool[Tensor, "batch time"]) -> tuple[Frames, Tensor]:
    """Move the valid frames of each video to its front, in their order; returns x and its mask."""
    order = mask.byte().argsort(dim=1, descending=True, stable=True)
    return x.gather(1, order[..., None].expand_as(x)), mask.gather(1, order)


def batch_norm_any_size(
    norm: nn.BatchNorm1d, rows: Float[Tensor, "rows dim"]
) -> Float[Tensor, "rows dim"]:
    """Batch norm that also takes a training batch of one row.

    One row, such as the last batch of an epoch, has no variance: the running statistics are used.
    """
    if norm.training and len(rows) == 1:
        return batch_norm(
            rows, norm.running_mean, norm.running_var, norm.weight, norm.bias, eps=norm.eps
        )
    return norm(rows)


def norm_valid_frames(norm: nn.BatchNorm1d, x: Frames, mask: Mask) -> Frames:
    """Batch norm over the valid frames of all videos; masked frames become 0."""
    if mask is None:
        return batch_norm_any_size(norm, x.flatten(0, 1)).unflatten(0, x.shape[:2])
    return x.new_zeros(x.shape).index_put((mask,), batch_norm_any_size(norm, x[mask]))
