"""torch's resizing of uint8 pictures without torch: every bit, for all sizes and filters."""

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch.nn.functional import interpolate

from extract.decode import torch_resize
from extract.decode.transform import Preprocessing, crop_boxes

SIDES = st.integers(1, 300)
NEW_SIDES = st.integers(2, 300)  # torch fails on results of one pixel: an assertion of its own


def by_torch(frame: np.ndarray, size: tuple[int, int], interpolation: str) -> np.ndarray:
    pixels = torch.from_numpy(frame).permute(2, 0, 1)[None].contiguous()
    resized = interpolate(pixels, size[::-1], mode=interpolation, antialias=True)
    return resized[0].permute(1, 2, 0).numpy()


def picture(height: int, width: int, *, hard: bool = False) -> np.ndarray:
    rng = np.random.default_rng(height * width)
    levels = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
    return (levels > 127).astype(np.uint8) * 255 if hard else levels


@pytest.mark.skipif(
    torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"),
    reason="on other CPUs torchvision resizes in floating point",
)
@settings(max_examples=60)
@given(
    SIDES, SIDES, NEW_SIDES, NEW_SIDES, st.sampled_from(torch_resize.INTERPOLATIONS), st.booleans()
)
@example(1080, 1920, 292, 519, "bilinear", False)
@example(240, 320, 240, 100, "bicubic", True)
def test_every_bit_is_torchs(height, width, new_height, new_width, interpolation, hard) -> None:
    frame, size = picture(height, width, hard=hard), (new_width, new_height)
    ours = torch_resize.resize(frame, size, interpolation)
    np.testing.assert_array_equal(ours, by_torch(frame, size, interpolation))


def test_the_center_is_rounded_down() -> None:
    levels = {"mean": (0.5,) * 3, "std": (0.5,) * 3}
    see = Preprocessing(224, 227, "bilinear", **levels, processor="transformers")
    [((top, left, *_), _)] = crop_boxes(227, 231, see, 1)
    assert (top, left) == (1, 3)
