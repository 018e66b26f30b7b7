"""Layers written as functions of a network's own parameters, such as ``F.linear(x, self.weight)``.

In the traced graph each becomes the layer that it is, with the very same parameters, so that no
rule has to know of both. These must be named ``weight`` (or ``..._weight``) and ``bias`` beside it,
as layers name them: what a removed unit leaves behind is folded into the bias, which must be found.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch.nn.functional as F
from torch import fx, nn

__all__ = ["layers_of_functions", "with_layers"]

CONVOLUTIONS: dict[Any, Any] = {F.conv1d: nn.Conv1d, F.conv2d: nn.Conv2d, F.conv3d: nn.Conv3d}
ARGUMENTS = {
    F.linear: ("input", "weight", "bias"),
    F.layer_norm: ("input", "normalized_shape", "weight", "bias", "eps"),
    **dict.fromkeys(
        CONVOLUTIONS, ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
    ),
}
MADE = "layers_of_functions"


def layers_of_functions(traced: fx.GraphModule) -> dict[str, tuple[str, str]]:
    """The layers that `with_layers` has made: names of their weight and bias in the network."""
    made: dict[str, tuple[str, str]] = traced.meta.get(MADE, {})
    return made


def with_layers(traced: fx.GraphModule) -> fx.GraphModule:
    """The same graph, with a layer for every function of a weight and bias of the network's own."""
    made: dict[str, tuple[str, str]] = {}
    settings: dict[str, Any] = {}
    for node in list(traced.graph.nodes):
        names = ARGUMENTS.get(node.target) if node.op == "call_function" else None
        if names is None:
            continue
        given = dict(zip(names, node.args, strict=False)) | node.kwargs
        inputs, weight, bias = (given.pop(name, None) for name in ("input", "weight", "bias"))
        found = _parameters(traced, weight, bias)
        numbers = all(not isinstance(value, fx.Node) for value in given.values())
        if found is None or not numbers or not isinstance(inputs, fx.Node):
            continue
        name, beside, tensors = found
        stem = name.removesuffix("weight") + node.target.__name__
        # One layer for all calls with the same settings: its parameters are shared.
        path = stem
        while path in settings and settings[path] != given:
            path += "_"
        if path not in settings:
            if _taken(traced, path):
                continue
            settings[path] = given
            made[path] = (name, beside)
            traced.add_submodule(path, _layer(node.target, given, **tensors))
        node.op, node.target, node.args, node.kwargs = "call_module", path, (inputs,), {}
        for source in (weight, bias):
            if isinstance(source, fx.Node) and not source.users:
                traced.graph.erase_node(source)
    if made:
        traced.recompile()
        traced.meta[MADE] = made
    return traced


def _parameters(
    traced: fx.GraphModule, weight: Any, bias: Any
) -> tuple[str, str, dict[str, Any]] | None:
    """Names and tensors of a weight and a bias, where they are parameters named as a layer's."""
    if not isinstance(weight, fx.Node) or weight.op != "get_attr":
        return None
    name = str(weight.target)
    beside = name.removesuffix("weight") + "bias"
    if not name.endswith("weight"):
        return None
    if bias is None:
        if _taken(traced, beside):
            return None
    elif not isinstance(bias, fx.Node) or bias.op != "get_attr" or bias.target != beside:
        return None
    tensors = {
        "weight": _found(traced, name),
        "bias": None if bias is None else _found(traced, beside),
    }
    if not all(value is None or isinstance(value, nn.Parameter) for value in tensors.values()):
        return None
    return name, beside, tensors


def _found(traced: fx.GraphModule, name: str) -> Any:
    owner, _, leaf = name.rpartition(".")
    return getattr(traced.get_submodule(owner), leaf, None)


def _taken(traced: fx.GraphModule, name: str) -> bool:
    try:
        return _found(traced, name) is not None
    except AttributeError:  # no such owner
        return False


def _layer(function: Any, given: Mapping[str, Any], weight: Any, bias: Any) -> nn.Module:
    """The layer that computes the function, with these parameters."""
    layer: nn.Module
    if function is F.linear:
        layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    elif function is F.layer_norm:
        layer = nn.LayerNorm(**given, bias=bias is not None, device="meta")
    else:
        groups = given.get("groups", 1)
        layer = CONVOLUTIONS[function](
            weight.shape[1] * groups,
            weight.shape[0],
            tuple(weight.shape[2:]),
            bias=bias is not None,
            device="meta",
            **given,
        )
    layer.weight, layer.bias = weight, bias
    return layer.eval()
