"""The walk over a captured network, and the check that what it allows can be done."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from .capture import Captured
from .operations import Movement, Passing, Pointwise, operation_of
from .removal import Removal
from .structure import OUTPUT_UNITS
from .units import KEPT, Blocked, Value, compressed
from .walk import Step, Unsupported, Use, Walk, Weight, parts, shape_of, unknown, without_units

__all__ = ["Analysis", "analyse", "varying"]

TRIALS = 3
LARGEST_CONSTANT = 2**20
"""Entries of a tensor that does not depend on the data, up to which it is computed."""


@dataclass
class Analysis:
    """A network with everything that was found in it.

    captured: its graph.
    walk: values, ties, uses and reads.
    steps: the operations with their inputs, in order.
    outside: nodes before the one at which the input's units lie in one dimension; they are not cut.
    anchor: that node, or None.
    inputs: atoms of the input's entries, in order; empty where there are none.
    """

    captured: Captured
    walk: Walk
    steps: list[Step] = field(default_factory=list)
    outside: set[fx.Node] = field(default_factory=set)
    anchor: fx.Node | None = None
    inputs: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.int64))

    def unit(self, use: Use) -> Tensor:
        """The unit of each entry of a use, as a label."""
        return self.walk.atoms.find(use.labels)

    def input_units(self) -> Tensor:
        """The input's units as labels, in the order of its entries."""
        return self.walk.atoms.find(self.inputs).unique()


def analyse(net: nn.Module, captured: Captured) -> Analysis:
    """Follow the units through a network's graph.

    Args:
        net: whose names the graph has.
    """
    names: dict[int, str] = {}
    for name, tensor in itertools.chain(net.named_parameters(), net.named_buffers()):
        names.setdefault(id(tensor), name)
    frozen = {name for name, value in net.named_parameters() if not value.requires_grad}
    analysis = Analysis(captured, Walk(names, {name for name, _ in net.named_parameters()}))
    for node in captured.graph.nodes:
        _note(analysis, node)
    walk = analysis.walk
    _finish_direct(walk)
    for use in walk.uses:
        if use.kind == "row" and use.name in frozen:
            walk.atoms.block(use.labels, f"{use.name!r} is frozen (requires_grad=False)")
    _place_input(analysis)
    _check(analysis)
    return analysis


def _note(analysis: Analysis, node: fx.Node) -> None:
    walk = analysis.walk
    if node.op == "placeholder":
        _input(analysis, node)
    elif node.op == "get_attr":
        tensor = analysis.captured.tensors.get(str(node.target))
        if isinstance(tensor, Tensor):
            name = walk.names.get(id(tensor), str(node.target))
            walk.values[node] = Weight(name, tensor, tuple(range(tensor.ndim)))
    elif node.op == "output":
        for source in node.all_input_nodes:
            for value in parts(walk.value(source) if source in walk.values else None):
                walk.atoms.block(value.labels, OUTPUT_UNITS)
                walk.mark(value)
    elif getattr(node.target, "__name__", "") == "getitem" and node.args[0] in walk.values:
        walk.values[node] = walk.values[node.args[0]][node.args[1]]  # type: ignore[index]
    elif _has_tensors(node.meta.get("val")):
        walk.values[node] = _operation(analysis, node)
    else:
        walk.numbers[node] = node.meta.get("val")


def _has_tensors(output: Any) -> bool:
    if isinstance(output, tuple | list):
        return any(isinstance(part, Tensor) for part in output)
    return isinstance(output, Tensor)


def _input(analysis: Analysis, node: fx.Node) -> None:
    """An input: the entries of the only one are units, where they are numbers."""
    walk, value = analysis.walk, node.meta.get("val")
    if not isinstance(value, Tensor):
        walk.numbers[node] = value
        return
    shape = shape_of(value)
    labels = torch.full([1] * len(shape), KEPT)
    emission = unknown(len(shape))
    single = len(analysis.captured.inputs.tensors) == 1
    if single and len(shape) > 1 and value.is_floating_point():
        rest = torch.Size([1, *shape[1:]])
        analysis.inputs = walk.atoms.new(rest.numel(), loose=True)
        labels = analysis.inputs.reshape(rest)
        emission = torch.zeros([1] * len(shape), dtype=value.dtype)
    walk.values[node] = Value(shape, labels, emission)


def _operation(analysis: Analysis, node: fx.Node) -> Any:
    walk = analysis.walk
    if not isinstance(node.target, torch._ops.OpOverload):
        for source in node.all_input_nodes:
            for value in parts(walk.value(source) if source in walk.values else None):
                walk.atoms.block(value.labels, f"'{node.target}' is not supported")
        return without_units(node.meta["val"])
    step = Step(node, walk)
    analysis.steps.append(step)
    operation = operation_of(node.target)
    layer = operation is not None and operation.layer
    try:
        if step.mutates:
            _refuse_overwriting(step)
        lazy = [walk.values.get(source) for source in node.all_input_nodes]
        constant = not layer and not any(isinstance(value, Weight) for value in lazy)
        if constant and not any(value.units for value in step.inputs):
            found = _constant(step)
        elif operation is None:
            raise Unsupported(f"{step} is not supported")
        else:
            found = operation.follow(step)
            if not operation.moves and any(value.units for value in step.followed):
                found = _honest(found)
    except Unsupported as unsupported:
        reason = str(unsupported)
        walk.refused.add(node)
        for source in node.all_input_nodes:
            if source.op == "get_attr":
                walk.failures[str(source.target)] = reason
        for value in step.followed:
            walk.atoms.block(value.labels, reason)
        found = step.kept()
        if step.mutates:
            _taint(step, reason)
    return found


def _honest(found: Any) -> Any:
    """Without an emission where units have come to an end: what is there depends on the data."""
    if isinstance(found, tuple):
        return tuple(_honest(part) for part in found)
    if not isinstance(found, Value) or bool((found.labels >= 0).all()):
        return found
    emission = found.emission if found.emission.is_floating_point() else found.emission.float()
    return replace(found, emission=compressed(emission.where(found.labels >= 0, torch.nan)))


def _constant(step: Step) -> Any:
    """The output of an operation without units: a constant where it does not depend on the data."""
    output = step.output
    random = torch.Tag.nondeterministic_seeded in step.node.target.tags  # type: ignore[union-attr]
    if (
        random
        or step.mutates
        or not isinstance(output, Tensor)
        or shape_of(output).numel() > LARGEST_CONSTANT
        or any(bool(value.emission.isnan().any()) for value in step.inputs)
    ):
        return step.kept()
    try:
        found = step.call(lambda value: value.full_emission().clone())
    except Exception:  # whatever it does with numbers that are not laid out as torch's
        return step.kept()
    shape = shape_of(output)
    if found.shape != shape:
        return step.kept()
    return Value(shape, torch.full([1] * len(shape), KEPT), compressed(found))


# -- memory that is written twice ----------------------------------------------------------------


def _views(node: fx.Node) -> Iterator[fx.Node]:
    """A node, and those that it is a view of."""
    while True:
        yield node
        operation = operation_of(node.target) if node.op == "call_function" else None
        getitem = getattr(node.target, "__name__", "") == "getitem"
        if not isinstance(operation, Movement | Passing) and not getitem and not _aliases(node):
            return
        if not node.all_input_nodes:
            return
        node = node.all_input_nodes[0]


def _aliases(node: fx.Node) -> bool:
    """Whether an operation returns a view of its input."""
    schema = getattr(node.target, "_schema", None)
    return schema is not None and any(result.alias_info is not None for result in schema.returns)


def _refuse_overwriting(step: Step) -> None:
    """Refuse to overwrite memory that another node reads later."""
    source, later = step.node.all_input_nodes[0], set()
    node = step.node.next
    while node.op != "root":
        later.add(node)
        node = node.next
    child = step.node
    for node in _views(source):
        if node.op in ("placeholder", "get_attr") and node is source and node.op == "get_attr":
            raise Unsupported(f"{step} changes a parameter or buffer")
        for user in node.users:
            if user is not child and (user in later or _aliases(user)):
                raise Unsupported(f"{step} changes in place a value that is also used elsewhere")
        child = node


def _taint(step: Step, reason: str) -> None:
    """What memory holds that was overwritten is not known any more."""
    walk = step.walk
    for node in _views(step.node.all_input_nodes[0]):
        for seen in (node, *(user for user in node.users if _aliases(user))):
            for value in parts(walk.value(seen) if seen in walk.values else None):
                walk.atoms.block(value.labels, reason)
            if seen in walk.values and not isinstance(walk.values[seen], Weight):
                walk.values[seen] = without_units(seen.meta["val"])


# -- tensors that are used outside of a layer ----------------------------------------------------


def _finish_direct(walk: Walk) -> None:
    """Parameters and buffers that are used directly: rows where units lie along one dimension."""
    used = {use.name for use in walk.uses}
    for name, (value, labels) in walk.direct.items():
        if name in used:
            reason = f"{name!r} is used outside of a layer"
            walk.atoms.block(labels, reason)
            for use in walk.uses:
                if use.name == name:
                    walk.atoms.block(use.labels, reason)
            continue
        roots = walk.atoms.find(labels)
        dims = varying(walk, Value(value.shape, labels, labels), walk.atoms.blocked())
        if len(dims) > 1:  # entries that nobody reads are no units, and go with the others
            dims = [dim for dim in dims if _lie_along(roots, walk.atoms.firm(labels), dim)]
        if len(dims) != 1:
            walk.atoms.block(labels, f"{name!r} has no dimension of units")
            continue
        along = roots.movedim(dims[0], 0).reshape(value.shape[dims[0]], -1)
        first = walk.atoms.tie_along(along, f"{name!r} has units along several dimensions")
        kind = "row" if name in walk.parameters else "buffer"
        walk.uses.append(Use(name, dims[0], first, kind, name, "parameter"))


def _lie_along(roots: Tensor, firm: Tensor, dim: int) -> bool:
    """Whether every index of a dimension has one unit of a layer, and no other one."""
    size = roots.shape[dim]
    roots, firm = roots.movedim(dim, 0).reshape(size, -1), firm.movedim(dim, 0).reshape(size, -1)
    largest = roots.masked_fill(~firm, -1).amax(1)
    smallest = roots.masked_fill(~firm, torch.iinfo(roots.dtype).max).amin(1)
    return bool((largest == smallest).all())


def varying(walk: Walk, value: Value, blocked: Blocked | None = None) -> list[int]:
    """The dimensions along which the units of a value vary, the blocked ones all taken as one."""
    if value.labels.numel() == 1:
        return []
    roots = walk.atoms.find(value.labels)
    if blocked is not None:
        roots = roots.masked_fill(blocked.among(roots), KEPT)
    return [
        dim
        for dim in range(roots.ndim)
        if roots.shape[dim] > 1 and not bool((roots == roots.narrow(dim, 0, 1)).all())
    ]


# -- the input -----------------------------------------------------------------------------------


def _place_input(analysis: Analysis) -> None:
    """Find the node at whose output the input's units lie in one dimension."""
    walk = analysis.walk
    if not len(analysis.inputs):
        return
    node = next(
        n for n in analysis.captured.graph.nodes if n.op == "placeholder" and n in walk.values
    )
    steps = {step.node: step for step in analysis.steps}
    while isinstance(walk.values[node], tuple) or len(varying(walk, walk.values[node])) > 1:
        users = list(node.users)
        step = steps.get(users[0]) if len(users) == 1 else None
        moves = step and isinstance(operation_of(step.node.target), Movement | Pointwise)
        if (
            step is None
            or not moves
            or len(step.inputs) > 1
            or isinstance(walk.values[node], tuple)
        ):
            walk.atoms.block(analysis.inputs, "the input's units lie in several dimensions")
            return
        analysis.outside.add(node)
        node = step.node
    analysis.anchor = node


def _check_input(analysis: Analysis) -> None:
    """Input units have no rows, so they may not be tied to any; and nothing can be set for them."""
    walk = analysis.walk
    if not len(analysis.inputs):
        return
    inputs = analysis.input_units()
    for use in walk.uses:
        if use.kind == "row":
            tied = torch.isin(analysis.unit(use), inputs)
            walk.atoms.block(use.labels[tied], "units that are tied to the network's input")
    firm = walk.atoms.firm(analysis.inputs)
    walk.atoms.block(analysis.inputs[firm], "units that are tied to the network's input")
    for read in walk.reads:
        among = torch.isin(walk.atoms.find(read.labels), inputs)
        if among.any():
            bad = among & read.constants().isnan()
            # One excluded unit would have to stay as a constant, but an input is not ours to set.
            reason = "an excluded input emits a constant that meets zero padding"
            walk.atoms.block(read.labels[bad], reason)
    sizes = walk.atoms.find(analysis.inputs).unique(return_counts=True)[1]
    if len(sizes.unique()) > 1:
        walk.atoms.block(analysis.inputs, "the input's units are of different sizes")


# -- the check -----------------------------------------------------------------------------------


def _check(analysis: Analysis) -> None:
    """Block what was allowed but cannot be done; never the other way round."""
    walk = analysis.walk
    _check_input(analysis)
    values = [
        (str(step), value)
        for step in analysis.steps
        if step.node not in analysis.outside
        for value in parts(walk.values.get(step.node))
        if value.labels.numel() > 1
    ]
    while True:
        blocked = walk.atoms.blocked()
        for name, value in values:
            if len(varying(walk, value, blocked)) > 1:
                walk.atoms.block(value.labels, f"{name} has units in several dimensions")
        if len(walk.atoms.blocked()) == len(blocked):
            break
    # Try to remove some units, several times: what moves entries must move those that are left.
    generator = torch.Generator().manual_seed(0)
    inside = [
        step
        for step in analysis.steps
        if step.node not in analysis.outside and step.node is not analysis.anchor
    ]
    for _ in range(TRIALS):
        free = removable(analysis)
        gone = free[torch.rand(len(free), generator=generator) < 0.5]
        while True:
            removal, failed = Removal(walk, gone), False
            for step in inside:
                try:
                    removal.rewritten(step, operation_of(step.node.target))
                except ValueError as error:
                    failed = True
                    for value in (*step.followed, *parts(walk.values[step.node])):
                        walk.atoms.block(value.labels, str(error))
            if not failed:
                break
            gone = gone[~walk.atoms.blocked().among(gone)]


def removable(analysis: Analysis) -> Tensor:
    """Units with rows, and the input's, that are not blocked."""
    walk = analysis.walk
    rows = [analysis.unit(use) for use in walk.uses if use.kind == "row"]
    units = torch.cat([analysis.input_units(), *rows]).unique()
    return units[~walk.atoms.blocked().among(units)]
