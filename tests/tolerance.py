"""Tolerances for comparing numbers, all in one place, each with its reason."""

import torch

# The largest error allowed, relative to the largest expected magnitude (sums cancel, so small elements carry the error
# of large ones).
TOLERANCE = {
    torch.float64: 1e-10,  # sums of up to 10^4 terms in another order: eps 2e-16 times the length, and room
    torch.float32: 2e-5,  # the same with eps 1.2e-7: 10^2 roundings that do not cancel
    torch.float16: 5e-3,  # eps 9.8e-4: the inputs are rounded once, intermediate results a few times
    torch.bfloat16: 4e-2,  # eps 7.8e-3, likewise
}


def assert_close(
    actual: torch.Tensor,
    expected: torch.Tensor,
    *,
    precision: torch.dtype | None = None,
    magnitude: float = 0.0,
) -> None:
    """Raises AssertionError unless shapes agree and every element is within the tolerance of
    `precision`.

    `precision` is the lowest precision that took part, by default that of `actual`. If `expected`
    is the result of cancellation, `magnitude` is the magnitude of the summed numbers. NaN is close
    to nothing.
    """
    assert actual.shape == expected.shape, (
        f"got {list(actual.shape)}, expected {list(expected.shape)}"
    )
    largest = max(
        magnitude, expected.detach().double().abs().amax().item() if expected.numel() else 0.0
    )
    allowed = TOLERANCE[precision or actual.dtype] * largest
    torch.testing.assert_close(actual.double(), expected.double(), rtol=0, atol=allowed)
