"""The backbone alone on this machine's CPU, against the limit of its matrix product, in one run.

SE-ResNeXt101 has random weights, frames are noise, and there is one thread or stream per core. All
contenders take turns for several rounds, and the best time of each counts: it is the one that other
work disturbed least. The limit is the larger of the fp32 and bf16 peaks of a 4096 x 4096 product,
divided by the operations of one frame as PyTorch counts them (convolutions and matrix products, a
multiply-add counted as two).
"""

import copy
from collections.abc import Callable

import numpy as np
import torch

from extract.backbone.frozen import load_backbone
from extract.backbone.model import load_trunk
from timing import best_seconds, flops_per_frame

NAME = "legacy_seresnext101_32x4d"
ROUNDS = 6
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
BATCH = 8
FRAMES = np.random.default_rng(0).integers(
    0, 256, (8 * BATCH, 224, 224, 3), dtype=np.uint8
)  # several for each stream


def product(dtype: torch.dtype, *, size: int = 4096) -> Callable[[], object]:
    left, right = (torch.randn(size, size).to(dtype) for _ in range(2))
    return lambda: left @ right


def as_timm_built_it(
    module: torch.nn.Module, dtype: torch.dtype, batch: int
) -> Callable[[], object]:
    plain = copy.deepcopy(module).to(dtype).to(memory_format=torch.channels_last)
    x = torch.randn(batch, 3, 224, 224).to(dtype).to(memory_format=torch.channels_last)
    return torch.inference_mode()(lambda: plain(x))


def test_share_of_the_matrix_peak() -> None:
    work: dict[str, Callable[[], object]] = {}
    trunk = load_trunk(NAME, weights="random")
    for precision, dtype in DTYPES.items():
        work[f"product {precision}"] = product(dtype)
        work[f"timm {precision}"] = as_timm_built_it(trunk.module, dtype, BATCH)
        for engine in ("openvino", "torch"):
            backbone = load_backbone(
                NAME, weights="random", device="cpu", precision=precision, engine=engine
            )
            work[f"{engine} {precision}"] = lambda backbone=backbone: backbone(FRAMES)
    seconds = best_seconds(work, rounds=ROUNDS)

    flops = flops_per_frame(trunk)
    peak = {precision: 2 * 4096**3 / seconds[f"product {precision}"] for precision in DTYPES}
    allowed = max(peak.values()) / flops
    print(f"\n{NAME}, {flops / 1e9:.2f} GFLOP per frame, {torch.get_num_threads()} threads")
    print(
        f"{'':5} {'product GFLOP/s':>16} {'allows':>7} {'timm, frames/s':>15} {'torch':>7} {'openvino':>9} {'share':>6}"
    )
    speed = {
        name: (BATCH if name.startswith("timm") else len(FRAMES)) / took
        for name, took in seconds.items()
    }
    for precision in DTYPES:
        own = peak[precision] / flops
        print(
            f"{precision:5} {peak[precision] / 1e9:16.0f} {own:7.1f} {speed[f'timm {precision}']:15.1f} "
            f"{speed[f'torch {precision}']:7.1f} {speed[f'openvino {precision}']:9.1f} "
            f"{speed[f'openvino {precision}'] / own:6.2f}"
        )
    share = max(speed[f"openvino {precision}"] for precision in DTYPES) / allowed
    print(f"OpenVINO in the faster precision runs at {share:.2f} of what the faster product allows")
    assert share >= 0.60
