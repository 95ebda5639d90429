"""Small backbones, registered with timm: for tests of the stages after a backbone, and of kinds of
backbones."""

from typing import Any

import timm
import torch
from torch import Tensor, nn

CONVOLUTION = "hgnl_test_convolution"


class Convolution(nn.Module):
    """Maps normalized frames of 160 x 160 to 96 features, as timm's `test_resnet` does."""

    def __init__(self) -> None:
        super().__init__()
        self.pretrained_cfg = {"input_size": (3, 160, 160), "architecture": CONVOLUTION}
        self.convolution = nn.Conv2d(3, 96, 16, stride=16)

    def forward(self, pixels: Tensor) -> Tensor:
        return torch.relu(self.convolution(pixels)).mean((2, 3))


@timm.models.register_model
def hgnl_test_convolution(**_: Any) -> nn.Module:
    return Convolution()


@timm.models.register_model
def hgnl_test_swin(**options: Any) -> nn.Module:
    """With shifted windows and without."""
    small = {"embed_dim": 24, "depths": (2, 2), "num_heads": (1, 2)}
    return timm.create_model("swin_tiny_patch4_window7_224", **small, **options)


@timm.models.register_model
def hgnl_test_levit(**options: Any) -> nn.Module:
    small = {"embed_dim": (32, 48, 64), "depth": (1, 1, 1), "num_heads": (2, 3, 4)}
    return timm.create_model("levit_128s", **small, **options)


@timm.models.register_model
def hgnl_test_gemma(**options: Any) -> nn.Module:
    """With layers whose outputs are clipped to bounds, which are infinite at first."""
    small = {"img_size": 96, "depth": 1, "embed_dim": 32, "intermediate_size": 64, "num_heads": 2}
    return timm.create_model("gemma4_vit_167m", **small, **options)
