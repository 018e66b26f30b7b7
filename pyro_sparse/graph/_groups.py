"""From a network to its groups: units gathered into groups, and what they cost."""

from __future__ import annotations

import contextlib
import copy
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from pyro_sparse.inputs import Example, Inputs

from .analysis import Analysis, analyse, varying
from .capture import Output, capture, without_weight_norm
from .operations import operation_of
from .structure import OF_NO_UNITS, Graph, Group, ParameterSlice, Product, ReaderSlice, Width
from .walk import Weight

__all__ = ["groups"]

INPUT = "input"
EXAMPLES = 16
"""Examples of the input that a graph keeps, to check smaller networks on."""


def groups(net: nn.Module, example: Example, output: Output | None = None) -> Graph:
    """Find the groups of a network.

    Every parameter that is trained stands in one: rows of units that can be removed together, or of
    units that cannot, with the reason. The input features are the group ``"input"``: channels for a
    network that starts with a convolution, features for one that starts with a linear layer,
    flattened or not. The structure is that of eval mode, with weight normalisations as the plain
    weights that they are.

    Args:
        net: any network that ``torch.export`` can trace; not changed.
        example: what it is called with: an input ``(batch, ...)``, a tuple of inputs, or a
            dictionary of keyword inputs.
        output: which of several outputs matters, see :class:`.capture.Output`; all of them when
            absent.

    Raises:
        UntraceableError: where ``net`` cannot be traced.
        ValueError: where ``net`` does not accept ``example``, or a layer is named ``"input"``.
    """
    if isinstance(getattr(net, INPUT, None), nn.Module):
        raise ValueError(
            f"a layer is named {INPUT!r}, which is the name of the group of input features: rename"
        )
    inputs = Inputs.of(net, example)
    tensors = (*net.parameters(), *net.buffers(), *inputs.tensors)
    if any(value.device.type != "cpu" for value in tensors):
        # Labels live on the CPU.
        net, inputs = copy.deepcopy(net).cpu(), inputs.map(lambda value: value.cpu())
    net = without_weight_norm(net)
    inputs = inputs.map(lambda value: value.detach().clone())
    captured = None
    if inputs.batch > EXAMPLES:
        with contextlib.suppress(ValueError):  # not all tensors of this length are examples
            captured = capture(net, inputs.rows(slice(EXAMPLES)), output)
    captured = captured or capture(net, inputs, output)
    return _Gathered(net, analyse(net, captured)).graph()


# -- units gathered into groups ------------------------------------------------------------------


class _Gathered:
    """The units of an analysis, as groups of those with rows of the same make-up."""

    def __init__(self, net: nn.Module, analysis: Analysis) -> None:
        self.net, self.analysis, self.walk = net, analysis, analysis.walk
        self.blocked = analysis.walk.atoms.blocked()
        marked = torch.cat([torch.zeros(0, dtype=torch.int64), *analysis.walk.marked])
        self.gating = torch.zeros(len(analysis.walk.atoms.parent), dtype=torch.bool)
        self.gating[marked] = True
        self.parameters = dict(net.named_parameters())
        self.frozen = {n for n, value in self.parameters.items() if not value.requires_grad}
        attended = torch.cat([torch.zeros(0, dtype=torch.int64), *self.walk.attended])
        paired = torch.cat([torch.zeros(0, dtype=torch.int64), *self.walk.paired])
        self.attended = set(self.walk.atoms.find(attended).tolist())
        self.paired = set(self.walk.atoms.find(paired).tolist())
        # How often each parameter is used, in the order of the forward pass.
        self.calls: Counter[str] = Counter()
        for node in analysis.captured.graph.nodes:
            for source in node.all_input_nodes:
                value = self.walk.values.get(source) if source.op == "get_attr" else None
                if isinstance(value, Weight):
                    self.calls[value.name] += 1

    def graph(self) -> Graph:
        # Entries by unit: {unit: {(parameter, dim, gates): [entries]}}.
        rows: dict[int, dict[Any, list[int]]] = defaultdict(lambda: defaultdict(list))
        readers: dict[int, dict[Any, list[int]]] = defaultdict(lambda: defaultdict(list))
        owners: dict[str, str] = {}
        layers: dict[str, str] = {}
        taken = set()
        for use in self.walk.uses:
            # Of rows along two dimensions, which are never removed, the first ones stand for both.
            along = None if use.kind == "row" else use.dim
            frozen = use.kind == "row" and use.name in self.frozen
            if use.kind == "buffer" or frozen or (use.name, along, use.kind) in taken:
                continue
            taken.add((use.name, along, use.kind))
            if use.kind == "row":
                owners.setdefault(use.name, use.owner)
                layers.setdefault(use.name, use.layer)
            gates = self.gating[use.labels.clamp(min=0)].tolist()
            for entry, unit in enumerate(self.analysis.unit(use).tolist()):
                if use.kind == "column" and unit >= 0:
                    readers[unit][use.name, use.dim].append(entry)
                elif use.kind == "row":
                    rows[unit][use.name, use.dim, gates[entry]].append(entry)
        made: dict[Any, list[tuple[int, dict[Any, list[int]]]]] = {}
        kind: tuple[Any, ...]
        inputs = set(self.analysis.input_units().tolist())
        for unit, slices in rows.items():
            if unit in self.blocked or unit in inputs:
                # Nothing ties what is never removed: each module's rows are its own.
                parts: dict[str, dict[Any, list[int]]] = defaultdict(dict)
                for key, entries in slices.items():
                    parts[owners[key[0]]][key[0], key[1], True] = sorted(
                        entries + parts[owners[key[0]]].get((key[0], key[1], True), [])
                    )
                for owner, part in parts.items():
                    kind = (owner, self.blocked[unit], *((k, len(v)) for k, v in part.items()))
                    made.setdefault(kind, []).append((unit, part))
                continue
            read = readers.get(unit, {})
            kind = (
                None,
                *((k, len(v)) for k, v in slices.items()),
                *((k, len(v)) for k, v in read.items()),
            )
            made.setdefault(kind, []).append((unit, dict(slices)))
        self.layers = layers
        found = [self._group(kind, units, readers, owners) for kind, units in made.items()]
        found += self._left_over(set(owners))
        place = {name: i for i, name in enumerate(self._order())}
        found.sort(key=lambda group: place.get(group.writers[0].parameter, 0))
        named = self._named(found, owners)
        covered = {writer.parameter for group in named for writer in group.writers}
        aliases = {}
        for name, value in self.net.named_parameters(remove_duplicate=False):
            first = self.walk.names[id(value)]
            if first != name:
                aliases[name] = first
        everything = (self._input_group(readers), *named)
        return Graph(
            everything,
            {name: value.shape for name, value in self.parameters.items() if name in covered},
            {name: self._why(name) for name in self.parameters if name not in covered},
            aliases,
            self.analysis.captured.inputs,
            tuple(_products(self.analysis, everything)),
            self.analysis.captured.hollow(self.net),
        )

    def _why(self, name: str) -> str:
        """Why a parameter stands in no group."""
        if name in self.frozen:
            return "frozen (requires_grad=False)"
        if name not in self.calls:
            return "not used by the forward pass"
        return "not a floating-point number"

    def _order(self) -> Iterator[str]:
        """Parameters in the order of the forward pass."""
        return iter(self.calls)

    def _group(
        self,
        kind: Any,
        units: list[tuple[int, dict[Any, list[int]]]],
        readers: dict[int, dict[Any, list[int]]],
        owners: dict[str, str],
    ) -> Group:
        first = next(iter(units[0][1]))
        units.sort(key=lambda unit: unit[1][first][0])
        writers = []
        for key in units[0][1]:
            name, dim, gates = key
            entries = [entry for _, slices in units for entry in slices[key]]
            writers.append(self._slice(ParameterSlice, name, dim, entries, len(units), gates=gates))
        reading = []
        if kind[0] is None:
            for name, dim in readers.get(units[0][0], {}):
                entries = [entry for unit, _ in units for entry in readers[unit][name, dim]]
                constant = self._constant(name, dim, torch.tensor(entries).reshape(len(units), -1))
                reading.append(
                    self._slice(ReaderSlice, name, dim, entries, len(units), constant=constant)
                )
        reason = "" if kind[0] is None else kind[1]
        owner = owners[first[0]]
        return Group(
            owner,
            len(units),
            self._kind(first[0], {unit for unit, _ in units}),
            tuple(writers),
            tuple(reading),
            not reason,
            reason,
            shared=any(self.calls[writer.parameter] > 1 for writer in writers),
            paired=any(unit in self.paired for unit, _ in units),
        )

    def _slice(
        self, make: Any, name: str, dim: int, entries: list[int], size: int, **more: Any
    ) -> Any:
        whole = entries == list(range(self.parameters[name].shape[dim]))
        index = None if whole else tuple(entries)
        return make(name, dim, len(entries) // size, index, **more)

    def _constant(self, name: str, dim: int, entries: Tensor) -> tuple[float, ...] | None:
        """What excluded units emit at a reader, where that is the same for all of them."""
        constants = None
        for read in self.walk.reads:
            if (read.name, read.dim) == (name, dim):
                found = read.constants()[entries]
                if constants is not None and not torch.equal(found, constants):
                    return None
                constants = found
        if constants is None or constants.isnan().any() or (constants != constants[:1]).any():
            return None
        return tuple(constants[0].tolist())

    def _kind(self, parameter: str, units: set[int]) -> str:
        """Heads, or what kind of layer writes them first."""
        return "heads" if units & self.attended else self.layers[parameter]

    def _left_over(self, done: set[str]) -> list[Group]:
        """Parameters without units, which are trained all the same: a group a layer."""
        by_owner: dict[str, list[str]] = {}
        for name in self.calls:
            value = self.parameters.get(name)
            trained = value is not None and name not in self.frozen and name not in done
            if trained and value is not None and value.is_floating_point():
                by_owner.setdefault(name.rpartition(".")[0] or name, []).append(name)
        found = []
        for owner, members in by_owner.items():
            shapes = [self.parameters[name].shape for name in members]
            sizes = {shape[0] if shape else 0 for shape in shapes}
            size = sizes.pop() if len(sizes) == 1 and owner not in members and len(shapes[0]) else 1
            writers = tuple(
                ParameterSlice(name, 0, (shape[0] if shape else 1) // size)
                for name, shape in zip(members, shapes, strict=True)
            )
            reasons = [self.walk.failures[n] for n in members if n in self.walk.failures]
            reason = (reasons or [OF_NO_UNITS])[0]
            layer = owner if owner not in members else ""
            norm = "Norm" in type(self.net.get_submodule(layer)).__name__
            found.append(
                Group(owner, size, "norm" if norm else "parameter", writers, (), False, reason)
            )
        return found

    def _named(self, found: list[Group], owners: dict[str, str]) -> list[Group]:
        """Names that are unique: a number where a module has several groups."""
        counts = Counter(group.name for group in found)
        numbers: Counter[str] = Counter()
        named = []
        for group in found:
            name = group.name
            if counts[name] > 1:
                numbers[name] += 1
                name = f"{name}:{numbers[name] - 1}"
            named.append(
                Group(
                    **{**{f: getattr(group, f) for f in group.__dataclass_fields__}, "name": name}
                )
            )
        return named

    def _input_group(self, readers: dict[int, dict[Any, list[int]]]) -> Group:
        analysis = self.analysis
        examples = analysis.captured.inputs.tensors
        if not len(analysis.inputs):
            reason = f"the network takes {len(examples)} inputs"
            if len(examples) == 1:
                reason = "the input is not one tensor of numbers with a batch dimension"
            return Group(INPUT, 0, "input", (), (), False, reason)
        units = analysis.input_units().tolist()
        reasons = [self.blocked[unit] for unit in units if unit in self.blocked]
        shape, anchor = examples[0].shape, analysis.anchor
        dim = 1
        if anchor is not None:
            dims = varying(self.walk, self.walk.values[anchor])
            dim = dims[0] if dims else 1
        size = len(units)
        if not reasons and anchor is not None:
            features = size == shape[1:].numel()
            if not features and shape[dim] != size:
                reasons = ["the input's units lie in no dimension of their own"]
        reading = []
        keys = [tuple((key, len(v)) for key, v in readers.get(unit, {}).items()) for unit in units]
        if not reasons and len(set(keys)) == 1:
            for (name, column), _ in keys[0]:
                entries = [entry for unit in units for entry in readers[unit][name, column]]
                constant = self._constant(name, column, torch.tensor(entries).reshape(size, -1))
                reading.append(
                    self._slice(ReaderSlice, name, column, entries, size, constant=constant)
                )
        reason = reasons[0] if reasons else ""
        return Group(INPUT, size, "input", (), tuple(reading), not reason, reason, dim)


# -- what they cost ------------------------------------------------------------------------------


def _products(analysis: Analysis, groups: tuple[Group, ...]) -> Iterator[Product]:
    """What costs multiplications, for one input, and fewer where units of the groups are removed.

    A layer's, or those of a product within an attention, are a constant times the entries of one
    dimension times those of another, each of them some that always stay and some for every unit.
    So a network's cost is known for any masks without making the smaller network.
    """
    walk, batch = analysis.walk, analysis.captured.inputs.batch
    units: dict[int, str] = {}
    for group in groups:
        if not group.prunable:
            continue
        if group.writers:
            writer = group.writers[0]
            use = next(
                use
                for use in walk.uses
                if (use.name, use.dim, use.kind) == (writer.parameter, writer.dim, "row")
            )
            labels = analysis.unit(use)[writer.entries(group.size)]
        else:
            labels = analysis.input_units()
        units |= dict.fromkeys(labels.tolist(), group.name)
    sizes = {group.name: group.size for group in groups}
    depends = set()  # on the input, so that it is computed for every one
    for node in analysis.captured.graph.nodes:
        if node.op == "placeholder" or any(source in depends for source in node.all_input_nodes):
            depends.add(node)

    def width(labels: Tensor, entries: int) -> Width:
        """Of a dimension of so many entries, with a label each, or one for all of them."""
        flat = walk.atoms.find(labels.reshape(-1)).tolist()
        names = Counter(units[label] for label in flat if label in units)
        if entries % max(len(flat), 1) or any(n % sizes[name] for name, n in names.items()):
            return Width(entries, {})
        each = entries // max(len(flat), 1)
        inside = {name: each * count // sizes[name] for name, count in names.items()}
        return Width(each * (len(flat) - sum(names.values())), inside)

    for step in analysis.steps:
        operation = operation_of(step.node.target)
        if operation is None or step.node in walk.refused:
            continue
        each = batch if step.node in depends else 1
        for product in operation.products(step, width):
            if product.rows.units or product.columns.units:
                yield replace(product, factor=product.factor // each)
