"""What each operation does to the units that pass through it: one rule an operation.

A rule is a function of a :class:`Step` (one node of the traced graph) that returns the
:class:`Units` of the node's output, or None where none can be followed from there on. It may
create a group (:meth:`Step.write`), add a reader to the incoming one (:meth:`Step.read`), or raise
:class:`Unsupported`. An operation without a rule is unsupported. Whatever unsupported touches a
group makes it not prunable, so a missing rule costs sparsity, never correctness.

To add one, write the function and register it for the module classes, functions and tensor
methods that it covers: ``@rule(nn.ReLU, torch.relu, "relu")``. Module classes match exactly, since
a subclass may compute something else.

What an excluded unit emits is computed, not assumed: a tensor of zeros, one unit wide, goes through
the same operations (:attr:`Units.emission`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from .structure import Group, ParameterSlice, ReaderSlice, blocked

__all__ = ["RULES", "Builder", "Rule", "Step", "Units", "Unsupported", "rule", "rule_of"]


class Unsupported(Exception):
    """Raised by a rule: the incoming units cannot be followed through this use of the operation."""


@dataclass(frozen=True)
class Units:
    """The units of ``group`` in a value, along its dimension ``dim``.

    ``emission`` is the value of one excluded unit: shaped as the value, but one example and, along
    ``dim``, the unit's block of consecutive entries only.
    """

    group: str
    dim: int
    emission: Tensor

    @property
    def block(self) -> int:
        return self.emission.shape[self.dim]


@dataclass
class Builder:
    """What the rules build while the graph is walked.

    names: the first name of every parameter, by the identity of the tensor.
    doubts: reasons why a parameter may not be cut (it is used twice), by first name.
    """

    names: Mapping[int, str]
    doubts: Mapping[str, str]
    groups: dict[str, Group] = field(default_factory=dict)
    owned: dict[str, str] = field(default_factory=dict)

    def block(self, name: str, reason: str) -> None:
        """Mark a group as not prunable."""
        self.groups[name] = blocked(self.groups[name], reason)


@dataclass
class Step:
    """One node: the operation, what comes in, and what it may do.

    source: the units of its only tensor input; None where none are followed.
    shape: of the output; None unless the output is one tensor.
    """

    node: fx.Node
    module: nn.Module | None
    source: Units | None
    shape: torch.Size | None
    builder: Builder

    def __str__(self) -> str:
        if self.module is not None:
            return f"{type(self.module).__name__} {self.node.target!r}"
        return f"'{getattr(self.node.target, '__name__', self.node.target)}'"

    def call(self, value: Tensor) -> Tensor:
        """The operation at ``value`` in place of its tensor input."""
        args = fx.map_arg(self.node.args, lambda _: value)
        kwargs = fx.map_arg(self.node.kwargs, lambda _: value)
        if self.module is not None:
            return self.module(*args, **kwargs)
        if isinstance(self.node.target, str):
            return getattr(args[0], self.node.target)(*args[1:], **kwargs)
        return self.node.target(*args, **kwargs)

    def passed(self) -> Units:
        """The incoming units after an operation that treats each alike and on its own."""
        assert self.source is not None
        emission = self.call(self.source.emission.clone())
        if not emission.isfinite().all():
            raise Unsupported(f"{self} maps what an excluded unit emits to a number not finite")
        return replace(self.source, emission=emission)

    def read(self, parameter: str, dim: int, constant: tuple[float, ...] | None) -> None:
        """This module reads the incoming units with columns of ``parameter``."""
        if self.source is None:
            return
        name = self.builder.names[id(getattr(self.module, parameter))]
        group = self.builder.groups[self.source.group]
        reader = ReaderSlice(name, dim, self.source.block, constant)
        self.builder.groups[group.name] = replace(group, readers=(*group.readers, reader))
        if name in self.builder.doubts:
            self.block(self.builder.doubts[name])

    def block(self, reason: str) -> None:
        """The incoming units are not prunable."""
        if self.source is not None:
            self.builder.block(self.source.group, reason)

    def write(self, kind: str, dim: int, reason: str = "") -> Units | None:
        """This module's weight and bias write a group of units along ``dim`` of the output.

        :param reason: why the group is not prunable, if it is not.
        """
        assert self.module is not None
        assert self.shape is not None
        name, groups = str(self.node.target), self.builder.groups
        writers, shared = [], False
        for parameter in ("weight", "bias"):
            tensor = getattr(self.module, parameter)
            if tensor is None:
                continue
            first = self.builder.names[id(tensor)]
            if self.builder.owned.setdefault(first, name) != name:
                return None  # tied: the rows stand in the group of the other layer
            writers.append(ParameterSlice(first, 0))
            doubt = self.builder.doubts.get(first, "")
            reason, shared = reason or doubt, shared or bool(doubt)
        shape = list(self.shape)
        if dim:
            shape[0] = 1
        size, shape[dim] = shape[dim], 1
        if name not in groups:
            groups[name] = Group(
                name,
                size,
                kind,
                tuple(writers),
                (),
                not reason,
                reason,
                self.node.name,
                dim,
                shared,
            )
        return Units(name, dim, self.module.get_parameter("weight").new_zeros(shape))


def argument(
    node: fx.Node, module: nn.Module | None, name: str, position: int, default: Any
) -> Any:
    """A setting: the module's attribute, or the function's argument of this name or position."""
    if module is not None:
        return getattr(module, name, default)
    if name in node.kwargs:
        return node.kwargs[name]
    return node.args[position] if len(node.args) > position else default


Rule: TypeAlias = Callable[[Step], Units | None]
RULES: dict[object, Rule] = {}


def rule(*targets: object) -> Callable[[Rule], Rule]:
    """Register a rule for module classes, functions and names of tensor methods."""

    def register(function: Rule) -> Rule:
        for target in targets:
            RULES[target] = function
        return function

    return register


def rule_of(node: fx.Node, module: nn.Module | None) -> Rule | None:
    """The rule for a node; None where there is none."""
    return RULES.get(node.target if module is None else type(module))


# -- layers --------------------------------------------------------------------------------------


@rule(nn.Linear)
def linear(step: Step) -> Units | None:
    """Reads and writes units along the last dimension."""
    source, shape = step.source, step.shape
    assert shape is not None
    if source is not None and source.dim != len(shape) - 1:
        step.block(f"{step} works along another dimension than that of the units")
    elif source is not None:
        emissions = source.emission.reshape(-1, source.block)
        alike = bool((emissions == emissions[0]).all())
        step.read("weight", 1, tuple(emissions[0].tolist()) if alike else None)
    return step.write("linear", len(shape) - 1)


@rule(nn.Conv1d, nn.Conv2d, nn.Conv3d)
def convolution(step: Step) -> Units | None:
    """Reads and writes channels, the first dimension after the batch."""
    source, shape, module = step.source, step.shape, step.module
    assert shape is not None
    assert isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d)
    reason = ""
    if module.groups != 1:
        reason = f"{step} is a grouped convolution, which is not supported"
    elif len(shape) != module.weight.ndim:
        reason = f"{step} runs on an input without a batch dimension"
    if reason:
        step.block(reason)
    elif source is not None and (source.dim != 1 or source.block != 1):
        step.block(f"{step} works along another dimension than that of the units")
    elif source is not None:
        emission = source.emission
        # Zero padding breaks a constant at the borders: there, less of it reaches the reader.
        alike = bool((emission == emission.reshape(-1)[0]).all())
        if module.padding_mode == "zeros" and pads(module) and emission.any():
            alike = False
        step.read("weight", 1, (emission.reshape(-1)[0].item(),) if alike else None)
    return step.write("conv", len(shape) - module.weight.ndim + 1, reason)


def pads(module: nn.Conv1d | nn.Conv2d | nn.Conv3d) -> bool:
    """Whether a convolution pads its input."""
    if isinstance(module.padding, str):
        return module.padding != "valid" and any(size > 1 for size in module.kernel_size)
    return any(module.padding)


# -- operations that leave every entry where it is -----------------------------------------------


@rule(
    *(nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.PReLU, nn.ELU, nn.SELU, nn.CELU, nn.GELU, nn.SiLU),
    *(nn.Mish, nn.Softplus, nn.Softsign, nn.Softshrink, nn.Hardshrink, nn.Tanh, nn.Tanhshrink),
    *(nn.Hardtanh, nn.Hardsigmoid, nn.Hardswish, nn.Sigmoid, nn.LogSigmoid, nn.Threshold),
    *(F.relu, F.relu6, F.leaky_relu, F.elu, F.selu, F.celu, F.gelu, F.silu, F.mish, F.softplus),
    *(F.softsign, F.softshrink, F.hardshrink, F.tanh, F.tanhshrink, F.hardtanh, F.hardsigmoid),
    *(F.hardswish, F.sigmoid, F.logsigmoid, F.threshold),
    *(torch.relu, torch.sigmoid, torch.tanh, torch.selu, torch.sin, torch.cos),
    *("relu", "sigmoid", "tanh"),
)
def pointwise(step: Step) -> Units | None:
    """An activation."""
    if isinstance(step.module, nn.PReLU) and step.module.num_parameters != 1:
        raise Unsupported(f"{step} has a slope of its own for every unit, which is not supported")
    # Which position is "inplace" depends on the function, but no other setting is ever True.
    inplace = argument(step.node, step.module, "inplace", len(step.node.args), False)
    if (inplace or any(value is True for value in step.node.args)) and overwrites_shared_value(
        step.node
    ):
        raise Unsupported(f"{step} changes in place a value that is also used elsewhere")
    return step.passed()


def overwrites_shared_value(node: fx.Node) -> bool:
    """Whether the memory that an in-place ``node`` overwrites may also be read by another node.

    Walks back to the layer that made the value, since what lies between may only be views of it.
    """
    made_by_layer = False
    while not made_by_layer and node.all_input_nodes:
        node = node.all_input_nodes[0]
        if len(node.users) > 1:
            return True
        root = node.graph.owning_module
        module = root.get_submodule(str(node.target)) if node.op == "call_module" and root else None
        made_by_layer = rule_of(node, module) in LAYERS
    return False


@rule(nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout)
@rule(nn.FeatureAlphaDropout, F.dropout, F.dropout1d, F.dropout2d, F.dropout3d)
def passing(step: Step) -> Units | None:
    """Nothing happens in eval mode."""
    if step.module is None and argument(step.node, None, "training", 2, True):
        raise Unsupported(f"{step} drops units at random in eval mode too")
    return step.passed()


# -- operations that move entries ----------------------------------------------------------------


@rule(nn.MaxPool1d, nn.AvgPool1d, nn.AdaptiveAvgPool1d, nn.AdaptiveMaxPool1d)
@rule(F.max_pool1d, F.avg_pool1d, F.adaptive_avg_pool1d, F.adaptive_max_pool1d, torch.max_pool1d)
def pooling_1d(step: Step) -> Units | None:
    """Pools over the last dimension."""
    return pooling(step, 1)


@rule(nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d)
@rule(F.max_pool2d, F.avg_pool2d, F.adaptive_avg_pool2d, F.adaptive_max_pool2d, torch.max_pool2d)
def pooling_2d(step: Step) -> Units | None:
    """Pools over the last two dimensions."""
    return pooling(step, 2)


@rule(nn.MaxPool3d, nn.AvgPool3d, nn.AdaptiveAvgPool3d, nn.AdaptiveMaxPool3d)
@rule(F.max_pool3d, F.avg_pool3d, F.adaptive_avg_pool3d, F.adaptive_max_pool3d, torch.max_pool3d)
def pooling_3d(step: Step) -> Units | None:
    """Pools over the last three dimensions."""
    return pooling(step, 3)


def pooling(step: Step, dims: int) -> Units | None:
    """Channels stay, whether or not what an excluded one emits still is the same everywhere."""
    source, shape = step.source, step.shape
    assert source is not None
    if shape is None:
        raise Unsupported(f"{step} returns indices too, which is not supported")
    if source.dim != 1 or source.block != 1 or len(shape) != dims + 2:
        raise Unsupported(f"{step} pools along the dimension of the units")
    return step.passed()


@rule(nn.Flatten, torch.flatten, "flatten")
def flatten(step: Step) -> Units | None:
    """Flattens everything but the batch: a channel becomes a block of consecutive features."""
    source = step.source
    assert source is not None
    if not flattens_features(step.node, step.module, source.emission.ndim):
        raise Unsupported(f"{step} flattens other dimensions than all those after the batch")
    if source.dim != 1:
        raise Unsupported(f"{step} mixes the units with another dimension")
    return step.passed()


def flattens_features(node: fx.Node, module: nn.Module | None, dims: int) -> bool:
    """Whether a flatten of a tensor of ``dims`` dimensions keeps the batch and joins all others."""
    start, end = argument(node, module, "start_dim", 1, 0), argument(node, module, "end_dim", 2, -1)
    return start == 1 and end in (-1, dims - 1)


LAYERS: tuple[Rule, ...] = (linear, convolution)
