"""Loads a network that pyro-sparse exported. Needs torch and safetensors, nothing else.

A copy of this file lies in every exported folder::

    import sys; sys.path.insert(0, "path/to/folder")
    from load import load
    net = load()

The folder holds ``config.json`` (the network as a list of operations, every one from the lists
below, and whatever was said about preprocessing) and ``model.safetensors`` (its numbers). Nothing
in it is code but this file, and no pickle is read.
"""

from __future__ import annotations

import json
import operator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import fx, nn

FORMAT = "pyro-sparse-network"
FORMAT_VERSION = 1

# Layers, by their names in torch.nn.
MODULES = frozenset(
    [
        "Linear",
        "Conv1d",
        "Conv2d",
        "Conv3d",
        "ConvTranspose1d",
        "ConvTranspose2d",
        "ConvTranspose3d",
        "Embedding",
        "BatchNorm1d",
        "BatchNorm2d",
        "BatchNorm3d",
        "InstanceNorm1d",
        "InstanceNorm2d",
        "InstanceNorm3d",
        "GroupNorm",
        "LayerNorm",
        "LocalResponseNorm",
        "RMSNorm",
        "ReLU",
        "ReLU6",
        "LeakyReLU",
        "PReLU",
        "ELU",
        "SELU",
        "CELU",
        "GELU",
        "SiLU",
        "Mish",
        "Softplus",
        "Softsign",
        "Softshrink",
        "Hardshrink",
        "Tanh",
        "Tanhshrink",
        "Hardtanh",
        "Hardsigmoid",
        "Hardswish",
        "Sigmoid",
        "LogSigmoid",
        "Threshold",
        "Softmax",
        "LogSoftmax",
        "Identity",
        "Dropout",
        "Dropout1d",
        "Dropout2d",
        "Dropout3d",
        "AlphaDropout",
        "FeatureAlphaDropout",
        "MaxPool1d",
        "MaxPool2d",
        "MaxPool3d",
        "AvgPool1d",
        "AvgPool2d",
        "AvgPool3d",
        "AdaptiveAvgPool1d",
        "AdaptiveAvgPool2d",
        "AdaptiveAvgPool3d",
        "AdaptiveMaxPool1d",
        "AdaptiveMaxPool2d",
        "AdaptiveMaxPool3d",
        "Flatten",
        "Unflatten",
        "Upsample",
        "ZeroPad1d",
        "ZeroPad2d",
        "ZeroPad3d",
        "ConstantPad1d",
        "ConstantPad2d",
        "ConstantPad3d",
        "ReflectionPad1d",
        "ReflectionPad2d",
        "ReplicationPad1d",
        "ReplicationPad2d",
        "PixelShuffle",
    ]
)

# Functions, by their names here.
FUNCTIONS = {
    f"{prefix}.{name}": getattr(module, name)
    for prefix, module, names in (
        (
            "torch.nn.functional",
            F,
            """
            relu relu6 leaky_relu elu selu celu gelu silu mish softplus softsign softshrink
            hardshrink tanh tanhshrink hardtanh hardsigmoid hardswish sigmoid logsigmoid threshold
            softmax log_softmax dropout dropout1d dropout2d dropout3d linear conv1d conv2d conv3d
            max_pool1d max_pool2d max_pool3d avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool1d
            adaptive_avg_pool2d adaptive_avg_pool3d adaptive_max_pool1d adaptive_max_pool2d
            adaptive_max_pool3d batch_norm layer_norm group_norm interpolate pad normalize
            scaled_dot_product_attention pixel_shuffle
            """,
        ),
        (
            "torch",
            torch,
            """
            relu sigmoid tanh selu sin cos exp log softmax log_softmax flatten reshape permute
            transpose squeeze unsqueeze cat stack chunk split add sub mul div neg abs sqrt rsqrt
            mean sum amax amin clamp matmul max_pool1d max_pool2d max_pool3d unbind unflatten
            swapaxes movedim concat flip square bmm pow maximum minimum select narrow
            """,
        ),
        (
            "operator",
            operator,
            "add sub mul truediv floordiv mod neg pow matmul getitem iadd isub imul itruediv",
        ),
    )
    for name in names.split()
}

# Methods and attributes of tensors.
METHODS = frozenset(
    [
        "relu",
        "sigmoid",
        "tanh",
        "softmax",
        "log_softmax",
        "flatten",
        "reshape",
        "view",
        "permute",
        "transpose",
        "squeeze",
        "unsqueeze",
        "contiguous",
        "index_select",
        "chunk",
        "split",
        "unbind",
        "unflatten",
        "swapaxes",
        "movedim",
        "flip",
        "select",
        "narrow",
        "square",
        "expand_as",
        "bmm",
        "size",
        "dim",
        "add",
        "sub",
        "mul",
        "div",
        "neg",
        "abs",
        "sqrt",
        "rsqrt",
        "exp",
        "log",
        "mean",
        "sum",
        "amax",
        "amin",
        "clamp",
        "matmul",
        "expand",
        "to",
        "float",
        "double",
        "half",
        "bfloat16",
    ]
)


class FormatError(ValueError):
    """The folder does not hold what this loader reads."""


def read_config(directory: str | Path) -> dict[str, Any]:
    """The folder's ``config.json``.

    :raises FileNotFoundError: where there is none.
    :raises FormatError: where it is of another format or version.
    """
    path = Path(directory) / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: is {directory} an exported network?")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise FormatError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(config, dict) or config.get("format") != FORMAT:
        raise FormatError(f"{path} does not describe an exported network ({FORMAT})")
    version = config.get("format_version")
    if version != FORMAT_VERSION:
        raise FormatError(
            f"{path} has format version {version}, this loader reads version {FORMAT_VERSION}: use "
            "the load.py of the same folder"
        )
    return config


def load(directory: str | Path = Path(__file__).parent) -> nn.Module:
    """The exported network, in eval mode and on the CPU.

    :param directory: the exported folder; that of this file by default.
    :raises FileNotFoundError: where a file is missing.
    :raises FormatError: where the folder is of another version, names an operation outside of the
        lists above, or its two files do not belong together.
    """
    directory = Path(directory)
    config = read_config(directory)
    weights = directory / "model.safetensors"
    if not weights.is_file():
        raise FileNotFoundError(f"{weights} is missing")
    # Copies, since memory mapped from a file is not aligned as torch aligns it: slower, and rounded
    # otherwise than in the network that was saved.
    tensors = {name: value.clone() for name, value in load_file(weights).items()}
    architecture = config["architecture"]
    for name in architecture["tensors"]:
        if name not in tensors:
            raise FormatError(f"{weights} has no tensor {name!r}")
    with torch.device("meta"):  # shapes only: the numbers follow
        net = _network(architecture, tensors)
    try:
        net.load_state_dict(tensors, assign=True)
    except RuntimeError as error:
        raise FormatError(f"{weights} does not fit config.json: {error}") from error
    return net.eval()


def reference(directory: str | Path = Path(__file__).parent) -> nn.Module:
    """The full-size network that the exported one was cut out of, with *random* weights.

    It is there to measure what the removal saves, nothing else: its weights were not exported.

    :param directory: the exported folder; that of this file by default.
    :raises FormatError: where the folder does not describe it.
    """
    architecture = read_config(directory).get("dense")
    if architecture is None:
        raise FormatError(f"{directory} does not say which full-size network it was cut out of")
    shapes = architecture["shapes"]
    tensors = {name: torch.randn(shapes[name]) for name in architecture["tensors"]}
    net = _network(architecture, tensors)
    return net.to(getattr(torch, architecture["dtype"])).eval()


def _network(architecture: dict[str, Any], tensors: dict[str, torch.Tensor]) -> fx.GraphModule:
    """A network with newly made layers, and ``tensors`` where its forward names one itself."""
    parts: dict[str, Any] = {
        name: nn.Parameter(tensors[name]) if kind == "parameter" else tensors[name]
        for name, kind in architecture["tensors"].items()
    }
    for name, module in architecture["modules"].items():
        arguments = {key: _decode(value, {}) for key, value in module["arguments"].items()}
        parts[name] = getattr(nn, _listed(module["class"], MODULES, "layer"))(**arguments)
    return fx.GraphModule(parts, _graph(architecture["nodes"]), class_name="ExportedNetwork")


def _graph(nodes: list[dict[str, Any]]) -> fx.Graph:
    """The operations as a graph. Names become source code, so they are checked."""
    graph = fx.Graph()
    known: dict[str, fx.Node] = {}
    for node in nodes:
        op, target = node["op"], node["target"]
        if op == "call_function":
            target = FUNCTIONS[_listed(target, FUNCTIONS, "function")]
        elif op == "call_method":
            _listed(target, METHODS, "method")
        elif op not in ("placeholder", "output", "call_module", "get_attr"):
            raise FormatError(f"unknown kind of operation {op!r}")
        elif not all(part.isidentifier() or part.isdecimal() for part in target.split(".")):
            raise FormatError(f"{target!r} is no name of a part of a network")
        args = tuple(_decode(value, known) for value in node["args"])
        kwargs = {key: _decode(value, known) for key, value in node["kwargs"].items()}
        known[node["name"]] = graph.create_node(op, target, args, kwargs, name=node["name"])
    graph.lint()
    return graph


def _listed(name: str, names: Any, kind: str) -> str:
    if name not in names:
        raise FormatError(f"the {kind} {name!r} is not among those that this loader knows")
    return name


def _decode(value: Any, nodes: dict[str, fx.Node]) -> Any:
    """JSON as an argument: anything that JSON cannot say is an object with one key."""
    if isinstance(value, list):
        return [_decode(item, nodes) for item in value]
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    if kind == "node":
        return nodes[content]
    if kind == "tuple":
        return tuple(_decode(item, nodes) for item in content)
    if kind == "dict":
        return {key: _decode(item, nodes) for key, item in content.items()}
    if kind == "slice":
        return slice(*(_decode(item, nodes) for item in content))
    if kind == "float":
        return float(content)
    if kind == "dtype" and isinstance(getattr(torch, content, None), torch.dtype):
        return getattr(torch, content)
    if kind == "ellipsis":
        return ...
    raise FormatError(f"unknown kind of argument {kind!r}")
