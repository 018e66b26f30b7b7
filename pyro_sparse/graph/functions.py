"""Layers written as functions of a network's own parameters, such as ``F.linear(x, self.weight)``.

In the traced graph each becomes the layer that it is, with the very same parameters, so that no
rule has to know of both. These must be named ``weight`` (or ``..._weight``) and ``bias`` beside it,
as layers name them: what a removed unit leaves behind is folded into the bias, which must be found.
``F.batch_norm`` must follow a linear layer or a convolution, which say how many dimensions it sees.
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
    F.batch_norm: (
        *("input", "running_mean", "running_var", "weight", "bias"),
        *("training", "momentum", "eps"),
    ),
    **dict.fromkeys(
        CONVOLUTIONS, ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
    ),
}
STATISTICS = ("running_mean", "running_var")
NORMS: dict[Any, Any] = {
    nn.Linear: nn.BatchNorm1d,
    nn.Conv1d: nn.BatchNorm1d,
    nn.Conv2d: nn.BatchNorm2d,
    nn.Conv3d: nn.BatchNorm3d,
}
"""The batch normalisation behind a layer."""
MADE = "layers_of_functions"


def layers_of_functions(traced: fx.GraphModule) -> dict[str, dict[str, str]]:
    """The layers that `with_layers` has made: names of their tensors in the network."""
    made: dict[str, dict[str, str]] = traced.meta.get(MADE, {})
    return made


def with_layers(traced: fx.GraphModule) -> fx.GraphModule:
    """The same graph, with a layer for every function of a weight and bias of the network's own."""
    made: dict[str, dict[str, str]] = {}
    settings: dict[str, Any] = {}
    for node in list(traced.graph.nodes):
        arguments = ARGUMENTS.get(node.target) if node.op == "call_function" else None
        if arguments is None:
            continue
        given: dict[str, Any] = dict(zip(arguments, node.args, strict=False)) | node.kwargs
        inputs, weight, bias = (given.pop(name, None) for name in ("input", "weight", "bias"))
        sources = {"weight": weight, "bias": bias}
        if node.target is F.batch_norm:
            sources |= {name: given.pop(name, None) for name in STATISTICS}
        found = _tensors(traced, sources)
        numbers = all(not isinstance(value, fx.Node) for value in given.values())
        if found is None or not numbers or not isinstance(inputs, fx.Node):
            continue
        names, tensors = found
        layer = _layer(node.target, given, tensors, _module(traced, inputs))
        if layer is None:
            continue
        name = names["weight"]
        stem = name.removesuffix("weight") + node.target.__name__
        # One layer for all calls with the same settings and tensors, which are shared.
        path, setting = stem, (given, names)
        while path in settings and settings[path] != setting:
            path += "_"
        if path not in settings:
            if _taken(traced, path):
                continue
            settings[path] = setting
            made[path] = names
            traced.add_submodule(path, layer)
        node.op, node.target, node.args, node.kwargs = "call_module", path, (inputs,), {}
        for source in sources.values():
            if isinstance(source, fx.Node) and not source.users:
                traced.graph.erase_node(source)
    if made:
        traced.recompile()
        traced.meta[MADE] = made
    return traced


def _tensors(
    traced: fx.GraphModule, sources: Mapping[str, Any]
) -> tuple[dict[str, str], dict[str, Any]] | None:
    """Names and tensors of a layer's, where they are the network's own, and named as a layer's.

    :param sources: what the function is given, by the layer's names for it.
    """
    weight, bias = sources["weight"], sources["bias"]
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
    names = {"weight": name, "bias": beside}
    for statistic in (leaf for leaf in STATISTICS if leaf in sources):
        node = sources[statistic]
        if not isinstance(node, fx.Node) or node.op != "get_attr":
            return None
        names[statistic] = str(node.target)
    tensors = {
        leaf: None if sources[leaf] is None else _found(traced, own) for leaf, own in names.items()
    }
    for leaf, value in tensors.items():
        if value is not None and isinstance(value, nn.Parameter) == (leaf in STATISTICS):
            return None
    return names, tensors


def _module(traced: fx.GraphModule, node: fx.Node) -> nn.Module | None:
    """The layer whose output a node is."""
    return traced.get_submodule(str(node.target)) if node.op == "call_module" else None


def _found(traced: fx.GraphModule, name: str) -> Any:
    owner, _, leaf = name.rpartition(".")
    return getattr(traced.get_submodule(owner), leaf, None)


def _taken(traced: fx.GraphModule, name: str) -> bool:
    try:
        return _found(traced, name) is not None
    except AttributeError:  # no such owner
        return False


def _layer(
    function: Any, given: Mapping[str, Any], tensors: Mapping[str, Any], before: nn.Module | None
) -> nn.Module | None:
    """The layer that computes the function of these tensors; None where there is none.

    :param before: the layer whose output it is given.
    """
    layer: nn.Module
    weight, bias = tensors["weight"], tensors["bias"]
    if function is F.linear:
        layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    elif function is F.layer_norm:
        layer = nn.LayerNorm(**given, bias=bias is not None, device="meta")
    elif function is F.batch_norm:
        norm = NORMS.get(type(before))
        missing = any(value is None for value in tensors.values())
        if norm is None or missing or given.get("training"):
            return None
        layer = norm(len(weight), eps=given.get("eps", 1e-5))
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
    for leaf, value in tensors.items():
        setattr(layer, leaf, value)
    return layer.eval()
