"""LeNet-5 in the form of the Caffe library, which the pruning literature reports."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

from torch import nn

from ._mlp import activation_module

__all__ = ["lenet5_caffe"]


def lenet5_caffe(
    activation: str = "relu",
    *,
    in_channels: int = 1,
    classes: int = 10,
    size: int = 28,
    widths: Sequence[int] = (20, 50, 500),
    bias: bool = True,
) -> nn.Sequential:
    """Two 5×5 convolutions with 2×2 max-pooling, then two linear layers.

    ``conv1``, ``act1``, ``pool1``, ``conv2``, ``act2``, ``pool2``, ``flatten``, ``fc1``, ``act3``,
    ``out``: 20-50-800-500-10 on 28×28 images, 431,080 parameters and 2,293,000 MACs. The
    convolutions have no padding.

    Args:
        activation: one of :data:`pyro_sparse.nets.ACTIVATIONS`.
        size: height and width of the images, in pixels.
        widths: channels of the two convolutions and units of the linear layer.

    Raises:
        ValueError: for images smaller than 16×16, or an unknown activation.
    """
    if size < 16:
        raise ValueError(f"lenet5-caffe needs images of at least 16×16 pixels, got {size}×{size}")
    first, second, units = widths
    side = ((size - 4) // 2 - 4) // 2
    return nn.Sequential(
        OrderedDict(
            conv1=nn.Conv2d(in_channels, first, 5, bias=bias),
            act1=activation_module(activation),
            pool1=nn.MaxPool2d(2),
            conv2=nn.Conv2d(first, second, 5, bias=bias),
            act2=activation_module(activation),
            pool2=nn.MaxPool2d(2),
            flatten=nn.Flatten(),
            fc1=nn.Linear(second * side * side, units, bias=bias),
            act3=activation_module(activation),
            out=nn.Linear(units, classes, bias=bias),
        )
    )
