"""timm's image models: one of each kind, names on the hub, other image sizes, and outputs that are
not a vector."""

import re
import socket
import time
from functools import partial
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import timm
import torch
from torch import Tensor, nn
from torchvision.transforms.functional import normalize as tv_normalize

import tiny_backbones  # noqa: F401 registers small models of these kinds
from extract import InputError
from extract.backbone.frozen import load_backbone
from extract.backbone.model import load_trunk

# One small model of each kind that once crashed, printed or was refused: attention with buffers
# that are not 4-D (Swin), parameters that are not (lambda), a graph that torch.fx traces wrongly
# (LeViT), infinite bounds (Gemma 4).
KINDS = [
    "hgnl_test_swin",
    "lambda_resnet26t",
    "hgnl_test_levit",
    "hgnl_test_gemma",
    "test_vit",
    "mixer_s32_224",
    "edgenext_xx_small",
]


@pytest.mark.parametrize("name", KINDS)
def test_a_model_of_each_kind_gives_timms_features(name: str, capfd: pytest.CaptureFixture) -> None:
    backbone = load_backbone(name, weights="random", device="cpu", precision="fp32")
    trunk = load_trunk(name, weights="random")
    frames = np.random.default_rng(0).integers(0, 256, (2, *trunk.input_shape), dtype=np.uint8)
    normalize = partial(tv_normalize, mean=trunk.preprocessing.mean, std=trunk.preprocessing.std)
    with torch.inference_mode():
        expected = trunk.module(
            normalize(torch.from_numpy(frames).permute(0, 3, 1, 2).float() / 255)
        ).numpy()
    difference = np.linalg.norm(backbone(frames).astype(np.float64) - expected) / np.linalg.norm(
        expected
    )
    assert difference < 1e-3
    assert "Traceback" not in capfd.readouterr().err


def test_names_as_the_hub_has_them() -> None:
    for name in ("timm/resnet10t.c3_in1k", "hf-hub:timm/resnet10t.c3_in1k", "resnet10t.c3_in1k"):
        assert load_trunk(name, weights="random").name == "resnet10t.c3_in1k"
    with pytest.raises(
        InputError, match=r"timm/resnet10x: timm .* has no such model; did you mean resnet10t"
    ):
        load_trunk("timm/resnet10x", weights="random")


def test_the_hub_without_a_network_is_one_sentence_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_network(*_: object, **__: object) -> None:
        raise socket.gaierror("no network in this test")

    monkeypatch.setattr(socket, "getaddrinfo", no_network)
    monkeypatch.setattr("extract.backbone.weights.getproxies", dict)
    waits: list[float] = []  # between two attempts
    monkeypatch.setattr(time, "sleep", waits.append)
    with pytest.raises(InputError) as raised:
        load_trunk("hf-hub:someone/resnet10t", weights="pretrained")
    with pytest.raises(InputError, match=r"the weights of resnet10t\.c3_in1k cannot be downloaded"):
        load_trunk("timm/resnet10t.c3_in1k", weights="pretrained")
    assert not waits
    assert re.fullmatch(
        r"--backbone hf-hub:someone/resnet10t: cannot be downloaded .*[^.]", str(raised.value)
    )
    assert ". " not in str(raised.value)


def test_another_image_size(tmp_path: Path) -> None:
    """Position embeddings are resampled as timm does when it loads weights into a model of that
    size."""
    state = timm.create_model("test_vit").state_dict()
    torch.save(state, tmp_path / "w.pth")
    trunk = load_trunk("test_vit", weights=tmp_path / "w.pth", image_size=96)
    assert trunk.preprocessing.size == 96
    theirs = timm.create_model("test_vit", num_classes=0, img_size=96).eval()
    resampled = timm.models.vision_transformer.checkpoint_filter_fn(dict(state), theirs)
    theirs.load_state_dict(resampled, strict=False)
    frame = torch.randn(2, 3, 96, 96, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        torch.testing.assert_close(trunk.module(frame), theirs(frame))


def test_image_sizes_are_recorded() -> None:
    trunks = [
        load_trunk("test_resnet", weights="random", image_size=size) for size in (None, 160, 96)
    ]
    sizes = [trunk.preprocessing.record() for trunk in trunks]
    assert sizes[0] == sizes[1] != sizes[2]
    assert sizes[2]["size"] == 96


@pytest.mark.parametrize(
    ("name", "size", "message"),
    [
        ("test_vit", 100, "test_vit takes multiples of its patch size, 16 pixels"),
        ("test_vit", 0, "test_vit takes multiples of its patch size"),
        ("levit_128s", 256, "levit_128s takes 224 x 224 pixels only"),
    ],
)
def test_image_sizes_that_a_model_does_not_take(name: str, size: int, message: str) -> None:
    with pytest.raises(InputError, match=f"--image-size {size}: {message}"):
        load_trunk(name, weights="random", image_size=size)


def test_an_image_size_that_fails_in_the_model() -> None:
    with pytest.raises(InputError, match="--backbone edgenext_xx_small: does not take 1 x 1"):
        load_trunk("edgenext_xx_small", weights="random", image_size=1)


class NoVector(nn.Module):
    pretrained_cfg: ClassVar = {"input_size": (3, 8, 8)}

    def forward(self, x: Tensor) -> object:
        return {"features": x}


class Identity(nn.Identity):
    pretrained_cfg: ClassVar = NoVector.pretrained_cfg


def test_an_unknown_output_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("extract.backbone.image_models.create", lambda name: NoVector())
    with pytest.raises(
        InputError, match="--backbone test_vit: its output is a dict, expected vectors"
    ):
        load_trunk("test_vit", weights="random")
    monkeypatch.setattr("extract.backbone.image_models.create", lambda name: Identity())
    with pytest.raises(
        InputError, match=r"--backbone test_vit: its output per frame is \[3, 8, 8\], expected one"
    ):
        load_trunk("test_vit", weights="random")
