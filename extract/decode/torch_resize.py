"""torch's antialiased resizing of uint8 pictures, bit for bit, in processes without torch.

transformers prepares videos with it, and it differs from Pillow's by up to one level of 255. It is
`interpolate(..., antialias=True)` of a CPU: first the width, then the height, with rounding to
uint8 in between. Weights are 16-bit integers in units of 2**-bits, and sums are 32-bit integers
(HelperInterpBase::_compute_index_ranges_int16_weights in ATen/native/cpu/UpSampleKernel.cpp).
"""

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import numpy as np

_MAX_BITS, _MAX_WEIGHT = 22, 1 << 15


def _triangle(x: np.ndarray) -> np.ndarray:
    return np.maximum(1 - np.abs(x), 0)


def _cubic(x: np.ndarray, a: float = -0.5) -> np.ndarray:
    x = np.abs(x)
    near = ((a + 2) * x - (a + 3)) * x * x + 1
    far = (((x - 5) * x + 8) * x - 4) * a
    return np.where(x < 1, near, np.where(x < 2, far, 0))


def _lanczos(x: np.ndarray) -> np.ndarray:
    return np.where(np.abs(x) < 3, np.sinc(x) * np.sinc(x / 3), 0)


# Each filter, and how many pixels of the smaller picture it reaches to either side.
_FILTERS: dict[str, tuple[Callable[[np.ndarray], np.ndarray], int]] = {
    "bilinear": (_triangle, 1),
    "bicubic": (_cubic, 2),
    "lanczos": (_lanczos, 3),
}
INTERPOLATIONS = tuple(_FILTERS)


def resize(frame: np.ndarray, size: tuple[int, int], interpolation: str) -> np.ndarray:
    """Resize uint8 [H, W, 3] to `size` (width, height): uint8 [height, width, 3]."""
    turned = _resized_rows(frame.transpose(1, 0, 2), size[0], interpolation)
    return _resized_rows(turned.transpose(1, 0, 2), size[1], interpolation)


def _resized_rows(frame: np.ndarray, count: int, interpolation: str) -> np.ndarray:
    """uint8 [n, m, 3] -> [count, m, 3]"""
    if len(frame) == count:
        return frame
    weights, bits = _weights(len(frame), count, interpolation)
    sums = weights @ frame.reshape(len(frame), -1).astype(np.int32)
    sums += 1 << (bits - 1)
    sums >>= bits
    return np.clip(sums, 0, 255).astype(np.uint8).reshape(count, *frame.shape[1:])


@lru_cache(maxsize=8)
def _weights(length: int, count: int, interpolation: str) -> tuple[Any, int]:
    """The weights of `length` pixels in each of `count`, and their number of bits.

    Returns a sparse matrix, int32 [count, length].
    """
    from scipy.sparse import csr_array

    function, reach = _FILTERS[interpolation]
    scale = length / count
    width = max(scale, 1.0)
    centers = scale * (np.arange(count) + 0.5)
    first = np.maximum((centers - reach * width + 0.5).astype(int), 0)
    stop = np.minimum((centers + reach * width + 0.5).astype(int), length)
    pixels = first[:, None] + np.arange((stop - first).max())
    weights = function((pixels - centers[:, None] + 0.5) * (1 / width))
    weights[pixels >= stop[:, None]] = 0
    weights /= weights.sum(axis=1, keepdims=True)
    bits = 0
    while bits < _MAX_BITS and int(0.5 + weights.max() * (1 << (bits + 1))) < _MAX_WEIGHT:
        bits += 1
    integers = np.trunc(weights * (1 << bits) + np.copysign(0.5, weights)).astype(np.int32)
    row, position = integers.nonzero()
    entries = integers[row, position], (row, pixels[row, position])
    return csr_array(entries, shape=(count, length)), bits
