"""From a network to its groups: tracing, shapes, and the walk over the nodes."""

from __future__ import annotations

import contextlib
import functools
from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, fx, nn

from .rules import (
    LAYERS,
    Builder,
    Step,
    Units,
    Unsupported,
    flatten,
    flattens_features,
    linear,
    passing,
    pointwise,
    rule_of,
)
from .structure import Graph, Group

__all__ = ["UntraceableError", "evaluating", "groups", "trace"]

INPUT = "input"


class UntraceableError(ValueError):
    """The network's forward cannot be recorded as a graph."""


class _Shapes(fx.Interpreter):
    """Runs a graph and notes the shape and type of every value that is one tensor."""

    def __init__(self, traced: fx.GraphModule) -> None:
        super().__init__(traced)
        self.extra_traceback = False  # the network's own message says more

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if isinstance(value, Tensor):
            n.meta["shape"], n.meta["dtype"] = value.shape, value.dtype
        return value


@contextlib.contextmanager
def evaluating(net: nn.Module) -> Iterator[nn.Module]:
    """``net`` in eval mode and without gradients, every module's own mode restored afterwards."""
    modes = [(module, module.training) for module in net.modules()]
    net.eval()
    try:
        with torch.no_grad():
            yield net
    finally:
        for module, mode in modes:
            module.training = mode


def trace(net: nn.Module) -> fx.GraphModule:
    """The network in eval mode as a ``torch.fx`` graph; it shares the network's modules.

    :raises UntraceableError: where the forward depends on the data, or ``net`` itself has hooks.
    """
    if net._forward_hooks or net._forward_pre_hooks:
        raise UntraceableError(
            f"{type(net).__name__} has hooks, which a graph of its forward does not show"
        )
    with evaluating(net):
        try:
            return fx.GraphModule(net, fx.Tracer().trace(net))
        except Exception as error:  # whatever the network's own code does with a proxy
            raise UntraceableError(
                f"torch.fx cannot trace {type(net).__name__}: {error} (its forward must not branch "
                "or loop on values or shapes of tensors, and must take tensors only)"
            ) from error


def groups(net: nn.Module, example: Tensor | tuple[Tensor, ...]) -> Graph:
    """Find the groups of a network.

    Every linear layer and convolution with parameters gets one, the input features another, named
    ``"input"``: channels for a network that starts with a convolution, features for one that
    starts with a linear layer, flattened or not. The structure is that of eval mode.

    :param net: any network that ``torch.fx`` can trace; not changed.
    :param example: an input ``(batch, ...)``, or a tuple of inputs.
    :raises UntraceableError: where ``net`` cannot be traced.
    :raises ValueError: where ``net`` does not accept ``example``, or a layer is named ``"input"``.
    """
    if isinstance(getattr(net, INPUT, None), nn.Module):
        raise ValueError(
            f"a layer is named {INPUT!r}, which is the name of the group of input features: rename"
        )
    traced = trace(net)
    examples = example if isinstance(example, tuple) else (example,)
    with evaluating(net):
        try:
            _Shapes(traced).run(*(value.clone() for value in examples))
        except Exception as error:
            shapes = ", ".join(str(tuple(value.shape)) for value in examples)
            raise ValueError(
                f"{type(net).__name__} does not accept the example input of shape {shapes}: {error}"
            ) from error
        return _walk(net, traced, examples[0].device)


def _walk(net: nn.Module, traced: fx.GraphModule, device: torch.device) -> Graph:
    """Apply the rules to a traced network whose nodes carry their shapes."""
    names: dict[int, str] = {}
    aliases: dict[str, str] = {}
    for name, parameter in net.named_parameters(remove_duplicate=False):
        first = names.setdefault(id(parameter), name)
        if first != name:
            aliases[name] = first
    builder = Builder(names, _doubts(net, traced, names, aliases))
    builder.groups[INPUT], anchor = _input_group(traced)
    units: dict[fx.Node, Units] = {}
    failures: dict[str, str] = {}
    for node in traced.graph.nodes:
        if anchor is not None and node is anchor:
            units[node] = _input_units(node, builder.groups[INPUT], device)
            continue
        if node.op in ("placeholder", "get_attr"):
            continue
        sources = [units[value] for value in node.all_input_nodes if value in units]
        if node.op == "output":
            for source in sources:
                builder.block(source.group, "units of the network's output")
            continue
        step = Step(node, _module(node), sources[0] if sources else None, _shape(node), builder)
        try:
            output = _apply(step)
        except Unsupported as unsupported:
            failures[str(node.target)] = str(unsupported)
            for source in sources:
                builder.block(source.group, str(unsupported))
        else:
            if output is not None:
                units[node] = output
    if any(reader.constant is None for reader in builder.groups[INPUT].readers):
        # One excluded unit would have to stay as a constant, but an input is not ours to set.
        builder.block(INPUT, "an excluded input emits a constant that meets zero padding")
    parameters = dict(net.named_parameters())
    return Graph(
        tuple(builder.groups.values()),
        {name: parameters[name].shape for name in builder.owned},
        {
            name: _why_ungrouped(name, traced, failures)
            for name in parameters
            if name not in builder.owned
        },
        aliases,
    )


def _apply(step: Step) -> Units | None:
    rule, module = rule_of(step.node, step.module), step.module
    if module is not None and (module._forward_hooks or module._forward_pre_hooks):
        raise Unsupported(f"{step} has hooks, which may change what it computes")
    if rule is None or len(step.node.all_input_nodes) != 1:
        raise Unsupported(f"{step} is not supported")
    if rule in LAYERS and (module is None or module._parameters.get("weight") is None):
        raise Unsupported(f"the weight of {step} is not a parameter of its own")
    return rule(step) if step.source is not None or rule in LAYERS else None


def _module(node: fx.Node) -> nn.Module | None:
    root = node.graph.owning_module
    assert root is not None
    return root.get_submodule(str(node.target)) if node.op == "call_module" else None


def _shape(node: fx.Node) -> torch.Size | None:
    return node.meta.get("shape")


def _doubts(
    net: nn.Module, traced: fx.GraphModule, names: dict[int, str], aliases: dict[str, str]
) -> dict[str, str]:
    """Why a parameter may not be cut: something else uses it too."""
    doubts = {}
    for alias, name in aliases.items():
        owners = [net.get_submodule(path.rpartition(".")[0]) for path in (alias, name)]
        if owners[0] is not owners[1]:
            doubts[name] = f"{name!r} and {alias!r} are one tied tensor"
    calls = Counter(node.target for node in traced.graph.nodes if node.op == "call_module")
    for target, count in calls.items():
        if count > 1:
            for parameter in traced.get_submodule(str(target)).parameters():
                doubts[names[id(parameter)]] = f"module {target!r} is called {count} times"
    for node in traced.graph.nodes:
        if node.op == "get_attr":
            value = functools.reduce(getattr, str(node.target).split("."), traced)
            if id(value) in names:
                doubts[names[id(value)]] = f"{node.target!r} is used outside of a layer"
    return doubts


def _why_ungrouped(name: str, traced: fx.GraphModule, failures: dict[str, str]) -> str:
    for node in traced.graph.nodes:
        target = str(node.target)
        if node.op == "get_attr" and target == name:
            return "used outside of a layer"
        if node.op == "call_module" and name.startswith(f"{target}."):
            kind = type(traced.get_submodule(target)).__name__
            return failures.get(target, f"{kind} {target!r} has no rows of its own")
    return "not used by the forward pass"


def _input_group(traced: fx.GraphModule) -> tuple[Group, fx.Node | None]:
    """The group of the input features, and the node at whose output its units are followed from.

    An image that is flattened before anything reads it has single features as units, any other
    its channels.
    """
    placeholders = [node for node in traced.graph.nodes if node.op == "placeholder"]
    shape = _shape(placeholders[0]) if placeholders else None
    if len(placeholders) != 1 or shape is None or len(shape) < 2:
        reason = f"the network takes {len(placeholders)} inputs"
        if len(placeholders) == 1:
            reason = "the input is not one tensor with a batch dimension"
        return Group(INPUT, 0, "input", (), (), False, reason, "", 1), None
    anchor, dim = placeholders[0], 1
    untouched, node = True, placeholders[0]
    while node.users:
        untouched = untouched and len(node.users) == 1
        user = next(iter(node.users))
        rule = rule_of(user, _module(user))
        if rule is linear:
            dim = len(shape) - 1
        elif rule is flatten and untouched and flattens_features(user, _module(user), len(shape)):
            anchor, dim = user, 1
        elif rule in (passing, pointwise):
            untouched = untouched and rule is passing
            node = user
            continue
        break
    size = _shape(anchor)
    assert size is not None
    return Group(INPUT, size[dim], "input", (), (), True, "", anchor.name, dim), anchor


def _input_units(node: fx.Node, group: Group, device: torch.device) -> Units:
    shape = [1, *node.meta["shape"][1:]]
    shape[group.dim] = 1
    return Units(INPUT, group.dim, torch.zeros(shape, dtype=node.meta["dtype"], device=device))
