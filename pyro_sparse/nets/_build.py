"""Networks by the names of the command line."""

from __future__ import annotations

import importlib
import inspect
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from pyro_sparse.inputs import named_tensors
from pyro_sparse.names import nearest

from ._mlp import mlp
from ._resnet import resnet
from ._vgg import vgg
from ._vit import vit
from .lenet import lenet5_caffe

__all__ = ["build"]

RESNETS = {
    f"resnet{depth}{option}": (depth, "B" if option else "A")
    for depth in (20, 32, 44, 56, 110)
    for option in ("", "-b")
}
NAMES = (
    *("mlp:400-400", "lenet5-caffe", "vgg", "resnet20", "resnet32", "resnet56", "resnet20-b"),
    *("vit", "package.module:factory"),
)


def build(
    spec: str, input_shape: Sequence[int], outputs: int, *, activation: str | None = None
) -> nn.Module:
    """The network that a command-line name means.

    * ``mlp:400-400``: hidden layers of these widths (``mlp:`` alone has none);
    * ``lenet5-caffe``: for square images;
    * ``vgg``: VGG-16 with batch normalisation, in the form for images of 32×32 pixels;
    * ``resnet20``, ``resnet32``, ``resnet44``, ``resnet56``, ``resnet110``: shortcuts that pad with
      zeros; ``resnet20-b``, ...: projections;
    * ``vit``: a small vision transformer, for square images whose size is a multiple of 4;
    * ``package.module:factory``: whatever the function returns. Of the keywords ``input_shape``,
      ``outputs``, ``num_classes`` and ``activation`` it is given those that it names.

    Args:
        input_shape: shape of one input: ``(features,)`` or ``(channels, height, width)``.
        outputs: classes, or numbers predicted.
        activation: the network's default when None.

    Raises:
        ValueError: for an unknown name (naming the nearest), widths that are no numbers, a factory
            that cannot be found, or a network that does not fit the data's shapes.
    """
    head, colon, tail = str(spec).partition(":")
    chosen: dict[str, Any] = {} if activation is None else {"activation": activation}
    if head == "mlp" and colon:
        widths = tail.split("-") if tail else []
        if not all(width.isdecimal() and int(width) > 0 for width in widths):
            raise ValueError(f"expected widths such as mlp:400-400, got {spec!r}")
        return mlp([math.prod(input_shape), *map(int, widths), outputs], **chosen)
    if spec in ("lenet5-caffe", "vgg", "vit", *RESNETS):
        if len(input_shape) != 3 or input_shape[1] != input_shape[2]:
            raise ValueError(
                f"{spec} needs square images (channels, size, size), the data's inputs have "
                f"shape {tuple(input_shape)}"
            )
        channels, size, _ = input_shape
        shared = {"in_channels": channels, "classes": outputs, **chosen}
        if spec == "lenet5-caffe":
            return lenet5_caffe(size=size, **shared)
        if spec == "vit":
            return vit(size=size, **shared)
        if spec == "vgg":
            if size < 16:
                raise ValueError(f"vgg needs images of at least 16×16 pixels, got {size}×{size}")
            return vgg(**shared)
        depth, option = RESNETS[spec]
        return resnet(depth, option=option, **shared)
    if colon and tail and head.replace(".", "_").isidentifier() and tail.isidentifier():
        return _from_factory(spec, head, tail, input_shape, outputs, chosen)
    raise ValueError(nearest("net", spec, NAMES))


def _from_factory(
    spec: str,
    package: str,
    name: str,
    input_shape: Sequence[int],
    outputs: int,
    chosen: dict[str, Any],
) -> nn.Module:
    try:
        module = importlib.import_module(package)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{package}.".startswith(f"{error.name}."):
            raise  # the module is there, but something that it imports is not
        raise ValueError(f"{nearest('net', spec, NAMES)} (no module {error.name!r})") from error
    factory = getattr(module, name, None)
    if not callable(factory):
        functions = [key for key, value in vars(module).items() if callable(value)]
        raise ValueError(nearest(f"function of {package}", name, functions))
    given = {
        "input_shape": tuple(input_shape),
        "outputs": outputs,
        "num_classes": outputs,
        **chosen,
    }
    signature = inspect.signature(factory)
    given = {key: value for key, value in given.items() if key in signature.parameters}
    try:
        signature.bind(**given)
    except TypeError as error:
        raise ValueError(f"{spec} cannot be called without further arguments: {error}") from error
    net = factory(**given)
    if not isinstance(net, nn.Module):
        raise ValueError(f"expected {spec} to return a torch.nn.Module, got {type(net).__name__}")
    example = torch.zeros(2, *input_shape)
    training = net.training
    try:
        with torch.no_grad():
            output = net.eval()(example)
    except Exception as error:  # whatever the user's network raises
        raise ValueError(
            f"{spec} does not accept inputs of shape {tuple(input_shape)}: {error}"
        ) from error
    finally:
        net.train(training)
    shapes = [tuple(value.shape) for value in named_tensors(output).values()]
    if (2, outputs) not in shapes:
        got = ", ".join(map(str, shapes)) or type(output).__name__
        raise ValueError(f"expected {spec} to return (2, {outputs}) for two inputs, got {got}")
    return net
