"""VGG with batch normalisation, in the form that the pruning literature uses on CIFAR."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

from torch import nn

from ._mlp import activation_module

__all__ = ["vgg"]

VGG16 = (64, 64, "M", 128, 128, "M", 256, 256, 256, "M", 512, 512, 512, "M", 512, 512, 512)


def vgg(
    activation: str = "relu",
    *,
    in_channels: int = 3,
    classes: int = 10,
    layers: Sequence[int | str] = VGG16,
    hidden: int | None = 512,
) -> nn.Sequential:
    """3×3 convolutions, each with batch normalisation; global pooling; one or two linear layers.

    ``conv1``, ``norm1``, ``act1``, ``conv2``, ..., ``pool``, ``flatten``, ``fc``, ``normfc``,
    ``actfc``, ``out``. The default is VGG-16 for images of 32×32 pixels: 13 convolutions, one
    hidden layer of 512 units, 14,987,210 parameters and 313,463,808 MACs.

    Source: Simonyan and Zisserman, ICLR 2015; the CIFAR form: Li et al., *Pruning filters for
    efficient ConvNets* (ICLR 2017).

    Args:
        activation: one of :data:`pyro_sparse.nets.ACTIVATIONS`.
        layers: channels of each convolution, and ``"M"`` for a 2×2 max-pooling.
        hidden: units of the hidden linear layer; None for none.
    """
    modules: OrderedDict[str, nn.Module] = OrderedDict()
    width, number = in_channels, 0
    for layer in layers:
        if isinstance(layer, str):
            modules[f"pool{number}"] = nn.MaxPool2d(2)
            continue
        number += 1
        modules[f"conv{number}"] = nn.Conv2d(width, layer, 3, padding=1, bias=False)
        modules[f"norm{number}"] = nn.BatchNorm2d(layer)
        modules[f"act{number}"] = activation_module(activation)
        width = layer
    modules["pool"] = nn.AdaptiveAvgPool2d(1)
    modules["flatten"] = nn.Flatten()
    if hidden is not None:
        modules["fc"] = nn.Linear(width, hidden, bias=False)
        modules["normfc"] = nn.BatchNorm1d(hidden)
        modules["actfc"] = activation_module(activation)
        width = hidden
    modules["out"] = nn.Linear(width, classes)
    return nn.Sequential(modules)
