"""A backbone of one convolution, registered with timm, for tests of the stages after a backbone."""

import timm
import torch
from torch import Tensor, nn

NAME = "hgnl_test_convolution"


class Convolution(nn.Module):
    """Maps normalized uint8 frames of 160 x 160 to 96 features, as timm's `test_resnet` does."""

    def __init__(self) -> None:
        super().__init__()
        self.pretrained_cfg = {"input_size": (3, 160, 160), "architecture": NAME}
        self.convolution = nn.Conv2d(3, 96, 16, stride=16)

    def forward(self, pixels: Tensor) -> Tensor:
        return torch.relu(self.convolution(pixels)).mean((2, 3))


@timm.models.register_model
def hgnl_test_convolution(**_: object) -> Convolution:
    return Convolution()
