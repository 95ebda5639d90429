"""The backbone alone on this machine's CPU, against what its matrix product would allow, in one run.

Method: SE-ResNeXt101 with random weights, frames of noise, 2 threads or as many as there are cores. Everything is
measured in turns, several rounds, and the best of each is taken: the turns see the same machine, the best the least of
what else runs on it. The limit is the larger of the fp32 and bf16 peaks of a 4096 x 4096 product, divided by the
operations of one frame as PyTorch counts them (convolutions and matrix products, a multiply-add counted as two).
"""

import copy
from collections.abc import Callable

import numpy as np
import pytest
import torch

from extract.backbone.frozen import load_backbone
from timing import best_seconds, flops_per_frame

NAME = "legacy_seresnext101_32x4d"
ROUNDS = 6
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def product(dtype: torch.dtype, *, size: int = 4096) -> Callable[[], object]:
    left, right = (torch.randn(size, size).to(dtype) for _ in range(2))
    return lambda: left @ right


def as_timm_built_it(module: torch.nn.Module, dtype: torch.dtype, batch: int) -> Callable[[], object]:
    plain = copy.deepcopy(module).to(dtype).to(memory_format=torch.channels_last)
    x = torch.randn(batch, 3, 224, 224).to(dtype).to(memory_format=torch.channels_last)
    return torch.inference_mode()(lambda: plain(x))


def test_share_of_the_matrix_peak() -> None:
    work: dict[str, Callable[[], object]] = {}
    backbones = {}
    for precision, dtype in DTYPES.items():
        backbone = backbones[precision] = load_backbone(NAME, weights="random", device="cpu", precision=precision)
        frames = np.random.default_rng(0).integers(0, 256, (backbone.batch_size, 224, 224, 3), dtype=np.uint8)
        work[f"product {precision}"] = product(dtype)
        work[f"backbone {precision}"] = lambda backbone=backbone, frames=frames: backbone(frames)
        work[f"timm {precision}"] = as_timm_built_it(backbone.module, dtype, backbone.batch_size)
    seconds = best_seconds(work, rounds=ROUNDS)

    flops = flops_per_frame(backbones["fp32"])
    batch = backbones["fp32"].batch_size
    peak = {precision: 2 * 4096**3 / seconds[f"product {precision}"] for precision in DTYPES}
    allowed = max(peak.values()) / flops
    print(f"\n{NAME}, {flops / 1e9:.2f} GFLOP a frame, {torch.get_num_threads()} threads, batches of {batch}")
    print(f"{'':5} {'product GFLOP/s':>16} {'allows':>7} {'timm, frames/s':>15} {'backbone':>9} {'share':>6}")
    speed = {precision: batch / seconds[f"backbone {precision}"] for precision in DTYPES}
    for precision in DTYPES:
        own = peak[precision] / flops
        plain = batch / seconds[f"timm {precision}"]
        print(
            f"{precision:5} {peak[precision] / 1e9:16.0f} {own:7.1f} {plain:15.1f} {speed[precision]:9.1f} "
            f"{speed[precision] / own:6.2f}"
        )
    share = max(speed.values()) / allowed
    print(f"the faster precision runs at {share:.2f} of what the faster product allows")
    assert share >= 0.60


@pytest.mark.parametrize("name", [NAME, "tf_efficientnet_lite0"])
def test_batch_size(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The constant batch is no worse than others by more than 10 % (and small, so that little is padded)."""
    backbones = {}
    for size in (8, 16, 32, 64):
        monkeypatch.setattr("extract.backbone.model._BATCH", {"cpu": size})
        backbones[size] = load_backbone(name, weights="random", device="cpu", precision="bf16")
    frames = np.random.default_rng(0).integers(0, 256, (64, 224, 224, 3), dtype=np.uint8)
    seconds = best_seconds(
        {str(size): lambda backbone=backbone: backbone(frames) for size, backbone in backbones.items()}, rounds=2
    )
    print(f"\n{name}, bf16, frames/s by batch size: " + ", ".join(f"{k}: {64 / s:.1f}" for k, s in seconds.items()))
    assert seconds["16"] <= 1.1 * min(seconds.values())
