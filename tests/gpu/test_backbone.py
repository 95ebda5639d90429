"""Backbones on a GPU: features against fp32 on the CPU, equal bytes on a rerun, batches under way,
and errors."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from device import DEVICE, PRECISIONS, PRETENDED
from extract import RunError
from extract.backbone.frozen import Backbone, load_backbone
from extract.decode import decode
from extract.sampling import segment_centers

pytestmark = pytest.mark.gpu

# Relative error of features (2-norm) against fp32, measured on a CPU in both half precisions
# (frames of 8 clips); a GPU sums in another order, so three times that is allowed.
NETWORKS = {
    "SE-ResNeXt": (
        "legacy_seresnet18" if PRETENDED else "legacy_seresnext101_32x4d",
        "random",
        {"fp16": 4.8e-4, "bf16": 3.5e-3},
    ),
    "EfficientNet-Lite0": ("tf_efficientnet_lite0", "pretrained", {"fp16": 5.3e-3, "bf16": 5.1e-2}),
    "ViT": (
        "test_vit" if PRETENDED else "vit_small_patch16_224",
        "random",
        {"fp16": 1.4e-3, "bf16": 1.1e-2},
    ),
}
CLIP = (
    Path(__file__).parents[2]
    / "pipelines"
    / "clips"
    / "exercise_mini"
    / "clips"
    / "barbell"
    / "Jerk_Balance.mp4"
)


def frames_of(backbone: Backbone, count: int) -> np.ndarray:
    """Frames of a real clip. Pretrained features of noise are small, so rounding them would look
    large."""
    size = backbone.preprocessing.size
    square = lambda frame: np.asarray(Image.fromarray(frame).resize((size, size)))  # noqa: E731
    return decode(CLIP, lambda found: segment_centers(found, count), resize=square).frames


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("network", NETWORKS)
def test_features_are_those_of_fp32_on_the_cpu(network: str, precision: str) -> None:
    name, weights, measured = NETWORKS[network]
    backbone = load_backbone(
        name, weights=weights, device=DEVICE, precision=precision, frames=4 if PRETENDED else 16
    )
    assert backbone.device.partition(":")[0] == torch.device(DEVICE).type
    frames = frames_of(backbone, 4)
    reference = load_backbone(name, weights=weights, device="cpu", precision="fp32", frames=4)(
        frames
    )
    got = backbone(frames).astype(np.float64)
    error = np.linalg.norm(got - reference) / np.linalg.norm(reference)
    print(f"{name} in {precision}: relative error {error:.2e}")
    assert error < 3 * measured[precision]


def test_auto_takes_the_gpu_in_half_precision_and_says_how_it_runs() -> None:
    backbone = load_backbone(
        "test_resnet" if PRETENDED else "resnet10t",
        weights="random",
        frames=8 if PRETENDED else 32,
    )
    assert (backbone.device.partition(":")[0], backbone.precision) == ("cuda", "fp16")
    assert "eager" in backbone.describe()
    assert "graphs" in backbone.describe()
    assert "timed on one batch" in backbone.describe()


@pytest.mark.parametrize("form", ["eager", "graphs"])
def test_the_same_bytes_again_whatever_is_beside_and_however_it_runs(form: str) -> None:
    """Several batches under way with a padded last one; another order; the network of another
    process; both forms."""
    made = [
        load_backbone(
            "test_resnet" if PRETENDED else "legacy_seresnet18",
            weights="random",
            device=DEVICE,
            form=one,
            frames=8,
            precision="bf16",
        )
        for one in (form, "eager")
    ]
    frames = frames_of(made[0], 45)
    features = made[0](frames)
    assert np.array_equal(made[0](frames), features)
    assert np.array_equal(made[0](frames[::-1]), features[::-1])
    assert np.array_equal(made[0](frames[3:4]), features[3:4])
    assert np.array_equal(made[1](frames), features)


def test_the_compiled_form_rounds_otherwise_and_is_recorded() -> None:
    """So a store is never continued with another form."""
    loaded = {"weights": "random", "device": DEVICE, "frames": 8, "precision": "bf16"}
    eager, compiled = (
        load_backbone("test_resnet", form=form, **loaded) for form in ("eager", "compiled")
    )
    frames = frames_of(eager, 20)
    expected, features = eager(frames).astype(np.float64), compiled(frames)
    assert np.linalg.norm(features - expected) / np.linalg.norm(expected) < 2e-2
    assert np.array_equal(compiled(frames), features)
    assert compiled.provenance() == {**eager.provenance(), "form": "compiled"}


def test_frames_that_come_bit_by_bit_and_those_that_are_on_the_device() -> None:
    backbone = load_backbone(
        "test_resnet", weights="random", device=DEVICE, precision="bf16", frames=8
    )
    frames = frames_of(backbone, 61)
    expected = backbone(frames)
    features = np.zeros_like(expected)
    batches = backbone.batches()
    for start in range(0, 61, 7):
        part = frames[start : start + 7].copy()
        batches.add(part if start % 2 else torch.from_numpy(part).to(DEVICE), features[start:])
        torch.cuda.synchronize()
        part[:] = 0
    batches.finish()
    assert np.array_equal(features, expected)
    assert batches.seconds > 0


def test_features_that_are_not_finite_and_then_good_ones() -> None:
    backbone = load_backbone(
        "test_resnet", weights="random", device=DEVICE, precision="bf16", frames=4
    )
    frames = frames_of(backbone, 30)
    expected = backbone(frames)
    scale = backbone.engine._network.scale
    before = scale.clone()
    scale.fill_(1e8)
    with pytest.raises(RunError, match="of 4 frames have features that are not finite in float16"):
        backbone(frames)
    scale.copy_(before)
    assert np.array_equal(backbone(frames), expected)


def test_out_of_memory_names_the_flag_that_helps(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    if PRETENDED:
        monkeypatch.setattr("extract.backbone.torch_engine.gpu_slots", full)
    else:
        torch.cuda.empty_cache()
        torch.cuda.set_per_process_memory_fraction(0.005)
    try:
        with pytest.raises(
            RunError, match=r"too little free memory to run resnet50 .* try --block-size 8"
        ):
            load_backbone("resnet50", weights="random", device=DEVICE, frames=512)
    finally:
        if not PRETENDED:
            torch.cuda.set_per_process_memory_fraction(1.0)
            torch.cuda.empty_cache()


def test_a_gpu_that_is_gone_is_named(tmp_path) -> None:
    """The CPU is never used silently."""
    command = [
        sys.executable,
        "-m",
        "extract",
        "--videos",
        str(tmp_path),
        "--out",
        str(tmp_path / "f.zarr"),
    ]
    (tmp_path / "a.mp4").write_bytes(b"")
    done = subprocess.run(
        [*command, "--device", "cuda", "--backbone", "test_resnet", "--weights", "random"],
        env=os.environ | {"CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert "--device cuda: PyTorch sees 0 GPUs on this machine; use cpu or auto" in done.stderr


WITHOUT_OPENVINO = """
import sys
sys.modules["openvino"] = None
if len(sys.argv) > 1:
    import pretend
    pretend.begin()
from extract.backbone.frozen import load_backbone
import numpy as np
backbone = load_backbone("test_resnet", weights="random", frames=4)
assert backbone.device.partition(":")[0] == "cuda"
backbone(np.zeros((3, 160, 160, 3), np.uint8))
"""


def test_a_gpu_needs_no_openvino() -> None:
    pretended = ["pretended"] if PRETENDED else []
    path = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_OPENVINO, *pretended],
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
