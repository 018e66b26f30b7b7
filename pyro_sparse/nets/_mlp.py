"""Fully connected networks."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from itertools import pairwise

from torch import nn

from pyro_sparse.names import nearest

__all__ = ["ACTIVATIONS", "activation_module", "mlp"]

ACTIVATIONS: dict[str, type[nn.Module]] = {
    "elu": nn.ELU,
    "gelu": nn.GELU,
    "relu": nn.ReLU,
    "sigmoid": nn.Sigmoid,
    "silu": nn.SiLU,
    "softplus": nn.Softplus,
    "tanh": nn.Tanh,
}


def activation_module(name: str) -> nn.Module:
    """The activation of this name.

    Raises:
        ValueError: for an unknown one, naming the nearest.
    """
    if name not in ACTIVATIONS:
        raise ValueError(nearest("activation", name, ACTIVATIONS))
    return ACTIVATIONS[name]()


def mlp(widths: Sequence[int], activation: str = "silu", *, bias: bool = True) -> nn.Sequential:
    """A fully connected network: ``flatten``, ``fc1``, ``act1``, ``fc2``, ..., ``out``.

    Weights start as torch's layers do (Kaiming-uniform).

    Args:
        widths: inputs, hidden layers, outputs: ``[784, 400, 400, 10]``.
        activation: one of :data:`ACTIVATIONS`, after every hidden layer.
        bias: whether the layers have biases.

    Raises:
        ValueError: for fewer than two widths, a width below 1, or an unknown activation.
    """
    if len(widths) < 2 or not all(isinstance(width, int) and width >= 1 for width in widths):
        raise ValueError(f"expected at least two widths, each at least 1, got {list(widths)}")
    modules: OrderedDict[str, nn.Module] = OrderedDict(flatten=nn.Flatten())
    for i, (inputs, outputs) in enumerate(pairwise(widths[:-1]), start=1):
        modules[f"fc{i}"] = nn.Linear(inputs, outputs, bias=bias)
        modules[f"act{i}"] = activation_module(activation)
    modules["out"] = nn.Linear(widths[-2], widths[-1], bias=bias)
    return nn.Sequential(modules)
