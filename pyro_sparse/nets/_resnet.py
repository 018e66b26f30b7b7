"""Residual networks for small images: ResNet-20, -32 and -56."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from ._mlp import activation_module

__all__ = ["resnet"]


class Pad(nn.Module):
    """The shortcut without parameters (option A): every other pixel, new channels of zeros."""

    def __init__(self, channels: int, stride: int) -> None:
        super().__init__()
        self.channels, self.stride = channels, stride

    def forward(self, x: Tensor) -> Tensor:
        x = x[:, :, :: self.stride, :: self.stride]
        half = self.channels // 2
        return F.pad(x, (0, 0, 0, 0, half, self.channels - half))


class Block(nn.Module):
    """Two 3×3 convolutions with batch normalisation, beside a shortcut."""

    def __init__(
        self, inputs: int, outputs: int, stride: int, option: str, activation: str
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(outputs)
        self.act1 = activation_module(activation)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(outputs)
        self.act2 = activation_module(activation)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            if option == "A":
                self.shortcut = Pad(outputs - inputs, stride)
            else:
                self.shortcut = nn.Sequential(
                    nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs)
                )

    def forward(self, x: Tensor) -> Tensor:
        inner = self.act1(self.norm1(self.conv1(x)))
        return self.act2(self.norm2(self.conv2(inner)) + self.shortcut(x))


def resnet(
    depth: int = 20,
    activation: str = "relu",
    *,
    option: str = "A",
    in_channels: int = 3,
    classes: int = 10,
    widths: Sequence[int] = (16, 32, 64),
) -> nn.Sequential:
    """A convolution, three stages of residual blocks, global pooling, a linear layer.

    ``conv``, ``norm``, ``act``, ``stage1``, ``stage2``, ``stage3``, ``pool``, ``flatten``, ``out``.
    ResNet-20 with shortcuts of option A has 269,722 parameters and 40,551,040 MACs on 32×32 images.

    Source: He et al., *Deep residual learning for image recognition* (CVPR 2016), section 4.2.

    Args:
        depth: 6n + 2: 20, 32, 44, 56, 110.
        activation: one of :data:`pyro_sparse.nets.ACTIVATIONS`.
        option: ``"A"``, shortcuts that pad with zeros, or ``"B"``, projections by a 1×1 convolution
            where the width changes.
        widths: channels of the three stages.

    Raises:
        ValueError: for another depth or option.
    """
    blocks, rest = divmod(depth - 2, 6)
    if rest or blocks < 1:
        raise ValueError(f"expected a depth of 6n + 2, such as 20, 32 or 56, got {depth}")
    if option not in ("A", "B"):
        raise ValueError(f"expected option 'A' or 'B', got {option!r}")
    net = nn.Sequential()
    net.add_module("conv", nn.Conv2d(in_channels, widths[0], 3, padding=1, bias=False))
    net.add_module("norm", nn.BatchNorm2d(widths[0]))
    net.add_module("act", activation_module(activation))
    inputs = widths[0]
    for number, outputs in enumerate(widths, start=1):
        stage = nn.Sequential()
        for block in range(blocks):
            stride = 2 if number > 1 and block == 0 else 1
            stage.append(Block(inputs, outputs, stride, option, activation))
            inputs = outputs
        net.add_module(f"stage{number}", stage)
    net.add_module("pool", nn.AdaptiveAvgPool2d(1))
    net.add_module("flatten", nn.Flatten())
    net.add_module("out", nn.Linear(inputs, classes))
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out")
    return net
