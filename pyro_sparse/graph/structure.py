"""Groups, and how their parameters become rows and back.

Convention: unit ``j`` of a slice owns ``block`` entries of the parameter's dimension ``dim``: those
numbered ``j·block … (j+1)·block − 1``, or, of a slice with an ``index``, the entries that these
places of the index name. A group's *rows* are the writers' slices, one unit a row, in the order of
the forward pass: weight, bias, the scale and shift of a normalisation, further writers.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyro_sparse.inputs import Inputs

from .capture import Captured

__all__ = ["Graph", "Group", "ParameterSlice", "Product", "ReaderSlice", "Width"]


OUTPUT_UNITS = "units of the network's output"
OF_NO_UNITS = "these parameters belong to no units"
NO_UNITS = (OUTPUT_UNITS, OF_NO_UNITS)


@dataclass(frozen=True)
class ParameterSlice:
    """A group's units along dimension ``dim`` of a parameter, ``block`` entries each.

    block: 1 but where channels were flattened before a linear layer (height times width), or a unit
        is a head or a group of a grouped convolution.
    index: the entries in the units' order; None where they are all entries in order.
    gates: whether multiplying the slice multiplies the unit's output: true of the last layer and
        of the scale and shift of a normalisation; not of a convolution before a normalisation,
        which divides any factor out again.
    """

    parameter: str
    dim: int
    block: int = 1
    index: tuple[int, ...] | None = None
    gates: bool = True

    def __str__(self) -> str:
        return self.parameter if self.block == 1 else f"{self.parameter} (×{self.block})"

    def entries(self, size: int) -> Tensor:
        """The entries of a group of ``size`` units, ``(size · block,)``."""
        if self.index is None:
            return torch.arange(size * self.block)
        return torch.tensor(self.index)


@dataclass(frozen=True)
class ReaderSlice(ParameterSlice):
    """The columns with which a layer reads a group's units.

    ``constant`` is what an excluded unit (its row all zero) emits at this reader in eval mode, one
    number an entry of its block: all 0 after ReLU or SiLU, ½ after a sigmoid. Columns times
    constant may move into the reader's bias, exactly. It is None where they may not, because the
    emission meets the reader with zero padding or varies over positions: then one constant unit
    has to stay.
    """

    constant: tuple[float, ...] | None = (0.0,)


@dataclass(frozen=True)
class Group:
    """Units that are written by the same layers, and everything that they touch.

    A residual stream is one group, whose rows hold the parameters of all layers that write to it.
    Where a layer's units are written by different sets of layers (a shortcut with fewer channels),
    each set has a group of its own.

    name: dotted name of the first writing module, with ``:0``, ``:1``, ... where it has several
        groups; ``"input"`` for the input features.
    size: number of units.
    kind: ``"heads"`` of an attention, else what writes them first: ``"linear"``, ``"conv"``,
        ``"recurrent"``, ``"norm"``, ``"embedding"``, ``"input"``, or ``"parameter"``, which may
        be trained but have no units.
    writers: slices that make up the rows; none for the input.
    readers: slices that read the units.
    prunable: whether single units can be removed.
    reason: why not, in one sentence; empty if prunable.
    dim: of the input, the dimension in which its units lie where the first layer reads them.
    shared: whether its parameters are used more than once in a forward pass.
    paired: whether units are read by one another, as queries and keys are, and not only by weights.
    """

    name: str
    size: int
    kind: str
    writers: tuple[ParameterSlice, ...]
    readers: tuple[ReaderSlice, ...]
    prunable: bool
    reason: str
    dim: int = 1
    shared: bool = False
    paired: bool = False


class _Part(NamedTuple):
    """Numbers of a parameter: slice ``number`` of a group's rows, its units first in ``shape``."""

    group: str
    number: int
    shape: torch.Size
    writer: ParameterSlice


@dataclass(frozen=True)
class Width:
    """How many entries of a dimension are left: ``fixed``, and some for every unit that is kept.

    units: entries of one unit, by group.
    """

    fixed: int
    units: Mapping[str, int]

    def left(self, kept: Mapping[str, int]) -> int:
        """With so many units of the groups."""
        return self.fixed + sum(each * kept[name] for name, each in self.units.items())


@dataclass(frozen=True)
class Product:
    """A layer, or a product within an attention: ``factor · rows · columns`` MACs for one input."""

    factor: int
    rows: Width
    columns: Width

    def macs(self, kept: Mapping[str, int]) -> int:
        """With so many units of the groups."""
        return self.factor * self.rows.left(kept) * self.columns.left(kept)


@dataclass(frozen=True)
class Graph:
    """The groups of a network, in the order of its forward pass.

    shapes: shape of every parameter that stands in some group's rows.
    ungrouped: the parameters that stand in none and stay as they are, and why: those that are
        frozen, and those that the forward pass does not read.
    aliases: further names of grouped parameters (tied weights), and the name used here.
    example: the inputs that the network was traced with, at most 16 examples.
    products: what costs MACs, and fewer of them where units are removed.
    captured: what they were found in, without the network's numbers. Copies are without it.
    """

    groups: tuple[Group, ...]
    shapes: Mapping[str, torch.Size]
    ungrouped: Mapping[str, str]
    aliases: Mapping[str, str]
    example: Inputs = field(default_factory=Inputs)
    products: tuple[Product, ...] = ()
    captured: Captured | None = field(default=None, repr=False, compare=False)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "captured": None}

    def __iter__(self) -> Iterator[Group]:
        return iter(self.groups)

    def __len__(self) -> int:
        return len(self.groups)

    def __contains__(self, name: object) -> bool:
        return any(group.name == name for group in self.groups)

    def __getitem__(self, name: str) -> Group:
        for group in self.groups:
            if group.name == name:
                return group
        raise KeyError(f"no group {name!r}; there are {', '.join(g.name for g in self.groups)}")

    @functools.cached_property
    def _layout(self) -> dict[str, list[tuple[int, int, ParameterSlice]]]:
        """First and last column of every slice in its group's rows, by group."""
        layout = {}
        for group in self:
            start, columns = 0, []
            for writer in group.writers:
                shape = self.shapes[writer.parameter]
                each = shape.numel() // shape[writer.dim] * writer.block if shape else 1
                columns.append((start, start + each, writer))
                start += each
            layout[group.name] = columns
        return layout

    @functools.cached_property
    def _widths(self) -> dict[str, tuple[int, list[int]]]:
        """Units, and columns of every writer, by group."""
        return {
            name: (self[name].size, [stop - start for start, stop, _ in columns])
            for name, columns in self._layout.items()
        }

    @functools.cached_property
    def _places(self) -> dict[str, list[_Part]]:
        """Where the numbers of every parameter stand."""
        parts: dict[str, list[_Part]] = {}
        for name, columns in self._layout.items():
            for number, (_, _, writer) in enumerate(columns):
                shape = list(self.shapes[writer.parameter])
                if shape:
                    shape.pop(writer.dim)
                    shape.insert(0, self[name].size * writer.block)
                part = _Part(name, number, torch.Size(shape), writer)
                parts.setdefault(writer.parameter, []).append(part)
        return parts

    @functools.cached_property
    def _order(self) -> dict[str, Tensor]:
        """For parameters in several parts or out of order: their entries' places in the parts."""
        order = {}
        for parameter, parts in self._places.items():
            if len(parts) > 1 or parts[0].writer.index is not None:
                entries = [part.writer.entries(self[part.group].size) for part in parts]
                order[parameter] = torch.cat(entries).argsort()
        return order

    def row_length(self, name: str) -> int:
        """Numbers in a row of group ``name``: weights, biases, scales and shifts of all writers."""
        columns = self._layout[self[name].name]
        return columns[-1][1] if columns else 0

    def rows(self, parameters: Mapping[str, Tensor], name: str) -> Tensor:
        """The rows of group ``name``, shape ``(units, row length)``.

        Args:
            parameters: the network's tensors by name, in the shapes of :attr:`shapes`.

        Raises:
            ValueError: for the input features, which have no parameters.
        """
        group = self[name]
        if not group.writers:
            raise ValueError(f"group {name!r} has no parameters of its own, hence no rows")
        parts = []
        for writer in group.writers:
            value = parameters[writer.parameter]
            value = value.movedim(writer.dim, 0) if value.ndim else value.reshape(1)
            if writer.index is not None:
                value = value[writer.entries(group.size).to(value.device)]
            parts.append(value.reshape(group.size, -1))
        return torch.cat(parts, dim=1)

    def parameters(self, rows: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The parameters with the given rows, by name: the inverse of :meth:`rows`.

        Where a parameter stands in one group and in order, it is only sliced and reshaped, so that
        tensor subclasses pass.

        Args:
            rows: for any of the groups, a tensor ``(units, row length)``; parameters that stand in
                a group that is not given as well are left out.

        Raises:
            ValueError: where a shape is another.
        """
        columns = {}
        for name, value in rows.items():
            size, widths = self._widths[name]
            expected = (size, sum(widths))
            if tuple(value.shape) != expected:
                raise ValueError(
                    f"expected rows of shape {expected} (units, row length) for group {name!r}, "
                    f"got {tuple(value.shape)}"
                )
            columns[name] = value.split_with_sizes(widths, 1) if len(widths) > 1 else (value,)
        parameters = {}
        for parameter, parts in self._places.items():
            if not all(part.group in columns for part in parts):
                continue
            values = []
            for part in parts:
                value = columns[part.group][part.number]
                values.append(value if value.shape == part.shape else value.reshape(part.shape))
            value = values[0]
            if parameter in self._order:
                order = _moved(self._order, parameter, value.device)
                value = torch.cat(values) if len(values) > 1 else value
                value = value.index_select(0, order)
            dim = parts[0].writer.dim
            parameters[parameter] = value.movedim(0, dim) if dim else value
        for alias, name in self.aliases.items():
            if name in parameters:
                parameters[alias] = parameters[name]
        return parameters

    @functools.cached_property
    def _gates(self) -> dict[str, Tensor]:
        """Which columns of the rows a gate multiplies, ``(row length,)`` bool, where not all."""
        gates = {}
        for name, columns in self._layout.items():
            gating = torch.zeros(self.row_length(name), dtype=torch.bool)
            for start, stop, writer in columns:
                gating[start:stop] = writer.gates
            if not gating.all():
                gates[name] = gating
        return gates

    def gate_rows(self, name: str, rows: Tensor, gate: Tensor) -> Tensor:
        """``rows`` of group ``name`` such that the units' outputs are multiplied by ``gate``.

        Only the slices that gate are multiplied (:attr:`ParameterSlice.gates`).

        Args:
            rows: ``(units, row length)``.
            gate: ``(units,)``.
        """
        name, gate = self[name].name, gate.unsqueeze(-1)
        if name not in self._gates:
            return rows * gate
        gating = _moved(self._gates, name, gate.device)
        return rows * torch.where(gating, gate, torch.ones_like(gate))

    def scale_columns(
        self, parameters: Mapping[str, Tensor], name: str, scale: Tensor
    ) -> dict[str, Tensor]:
        """``parameters`` with the columns that read the units of ``name`` multiplied by ``scale``.

        The readers then see each unit as if its output were multiplied.

        Args:
            parameters: tensors by name, those of all readers among them.
            scale: ``(units,)``.
        """
        scaled = dict(parameters)
        for reader in self[name].readers:
            value = scaled[reader.parameter]
            shape = [1] * value.dim()
            shape[reader.dim] = -1
            factor = value.new_ones(value.shape[reader.dim])
            entries = reader.entries(self[name].size).to(value.device)
            factor[entries] = scale.to(value).repeat_interleave(reader.block)
            scaled[reader.parameter] = value * factor.reshape(shape)
        return scaled

    def gate_inputs(self, inputs: Tensor, gate: Tensor) -> Tensor:
        """``inputs`` times a gate on the units of the group ``"input"``.

        Args:
            inputs: a batch of the network's inputs, ``(batch, ...)``.
            gate: ``(units,)`` or ``(batch, units)``.
        """
        group = self["input"]
        if gate.shape[-1] != group.size:
            raise ValueError(
                f"expected a gate on {group.size} input units, got shape {tuple(gate.shape)}"
            )
        if inputs[0].numel() == group.size:  # features: all entries of an input, flattened
            return (inputs.flatten(1) * gate).reshape(inputs.shape)
        trailing = inputs.ndim - 1 - group.dim
        return inputs * gate.reshape(*gate.shape, *[1] * trailing)

    def check_keep(self, keep: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Masks as boolean CPU tensors for every group; groups not mentioned keep all units.

        Args:
            keep: for any of the groups, a boolean mask ``(units,)``.

        Raises:
            ValueError: for an unknown group, a mask of another shape or type, or a mask that drops
                units of a group that is not prunable.
        """
        if not isinstance(keep, Mapping):
            raise ValueError(f"expected boolean masks by group, got {keep!r}")
        names = [group.name for group in self]
        unknown = [name for name in keep if name not in names]
        if unknown:
            raise ValueError(f"no group {unknown[0]!r}; there are {', '.join(names)}")
        masks = {}
        for group in self:
            mask = keep.get(group.name)
            if mask is None:
                mask = torch.ones(group.size, dtype=torch.bool)
            if not isinstance(mask, Tensor):
                raise ValueError(
                    f"expected a boolean mask of shape ({group.size},) for group {group.name!r}, "
                    f"a tensor, got {type(mask).__name__}"
                )
            if mask.dtype != torch.bool or tuple(mask.shape) != (group.size,):
                raise ValueError(
                    f"expected a boolean mask of shape ({group.size},) for group {group.name!r}, "
                    f"got {mask.dtype} of shape {tuple(mask.shape)}"
                )
            if not group.prunable and not mask.all():
                raise ValueError(
                    f"the mask drops {int((~mask).sum())} units of group {group.name!r}, which is "
                    f"not prunable: {group.reason}"
                )
            masks[group.name] = mask.cpu()
        return masks

    def masked_parameters(
        self, parameters: Mapping[str, Tensor], keep: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """``parameters`` with the rows of excluded units set to 0.

        With them the full network is the *masked* network, which a compact network must equal. An
        excluded unit then emits f(0) through its activation f. Input units have no row: gate them
        with :meth:`gate_inputs`.

        Args:
            parameters: tensors by name; those of other names pass unchanged.
            keep: boolean masks by group, as in :meth:`check_keep`.
        """
        masks = self.check_keep(keep)
        masked = dict(parameters)
        for group in self:
            for writer in group.writers:
                if writer.parameter not in masked:
                    continue
                value = masked[writer.parameter]
                if masks[group.name].all():
                    continue
                mask = torch.ones(value.shape[writer.dim], dtype=torch.bool)
                kept = masks[group.name].repeat_interleave(writer.block)
                mask[writer.entries(group.size)] = kept
                shape = [1] * value.ndim
                shape[writer.dim] = -1
                # where, not a product: an excluded unit's infinite weight must not become NaN.
                masked[writer.parameter] = value.where(mask.reshape(shape).to(value.device), 0)
        for alias, name in self.aliases.items():
            if alias in masked and name in masked:
                masked[alias] = masked[name]
        return masked

    def sizes(self, keep: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
        """Shape that each grouped parameter has once excluded units are cut out.

        Args:
            keep: boolean masks by group, as in :meth:`check_keep`.
        """
        sizes = {name: list(shape) for name, shape in self.shapes.items()}
        for name, mask in self.check_keep(keep).items():
            excluded = int((~mask).sum())
            for part in (*self[name].writers, *self[name].readers):
                sizes[part.parameter][part.dim] -= excluded * part.block
        return {name: tuple(size) for name, size in sizes.items()}

    def macs_saved(self, keep: Mapping[str, Tensor]) -> int:
        """Multiply-accumulate operations of one input that go with the excluded units.

        Args:
            keep: boolean masks by group, as in :meth:`check_keep`.
        """
        kept = {name: int(mask.sum()) for name, mask in self.check_keep(keep).items()}
        full = {group.name: group.size for group in self}
        return sum(product.macs(full) - product.macs(kept) for product in self.products)

    def connected(self, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Masks of the units through which anything flows, for every prunable group.

        A unit whose row is all 0, or reads only units that are out, emits what its activation
        makes of 0; one whose columns are 0 in every reader, or whose readers' units are themselves
        not connected, is read by nobody. The network with connected units only computes the same:
        a unit with a bias is something, and so is what one that is out emits where that is not 0.

        Args:
            parameters: the network's parameters by name.
        """
        masks = {group.name: torch.ones(group.size, dtype=torch.bool) for group in self}
        # Forwards: a row that reads only units that are out is a constant, too. Backwards: units
        # that nothing reads. Each pass can only take units out, so this ends.
        while True:
            masked = self.masked_parameters(parameters, self._prunable(masks))
            for group in self:
                for reader in group.readers:
                    # Columns of a unit that is out count where it emits a constant other than 0.
                    emits = torch.ones(reader.block, dtype=torch.bool)
                    if reader.constant is not None:
                        emits = (torch.tensor(reader.constant) != 0).expand(reader.block)
                    inside = masks[group.name].unsqueeze(1) | emits
                    value = masked[reader.parameter]
                    flows_in = torch.ones(value.shape[reader.dim], dtype=torch.bool)
                    flows_in[reader.entries(group.size)] = inside.reshape(-1)
                    shape = [1] * value.dim()
                    shape[reader.dim] = -1
                    masked[reader.parameter] = value * flows_in.reshape(shape).to(value.device)
            changed = False
            for group in self:
                if not group.prunable:
                    continue
                flows = masks[group.name].clone()
                if group.writers:
                    flows &= (self.rows(masked, group.name) != 0).any(1).cpu()
                read = torch.full_like(flows, group.paired)
                for reader in group.readers:
                    value = masked[reader.parameter].movedim(reader.dim, 0)
                    value = value[reader.entries(group.size).to(value.device)]
                    read |= (value.reshape(group.size, -1) != 0).any(1).cpu()
                flows &= read
                changed |= bool((flows != masks[group.name]).any())
                masks[group.name] = flows
            if not changed:
                return self._prunable(masks)

    def _prunable(self, masks: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: mask for name, mask in masks.items() if self[name].prunable}

    def obstacles(self) -> dict[str, float]:
        """Why units stay that are not the network's output, with their share of all units.

        The share is of the units of layers, most frequent reasons first; parameters that belong to
        no unit do not count.
        """
        layers = [group for group in self if group.writers and group.reason not in NO_UNITS]
        total = sum(group.size for group in layers)
        shares: dict[str, float] = {}
        for group in layers:
            if not group.prunable:
                shares[group.reason] = shares.get(group.reason, 0.0) + group.size / total
        return dict(sorted(shares.items(), key=lambda item: -item[1]))

    def explain(self) -> str:
        """A table of the groups, and of the parameters that stand in none, with the reasons."""
        header = ("group", "kind", "units", "row", "read by", "prunable")
        table: list[Sequence[str]] = [header]
        for group in self:
            readers = ", ".join(str(reader) for reader in group.readers[:2]) or "–"
            if len(group.readers) > 2:
                readers += f" and {len(group.readers) - 2} more"
            row = str(self.row_length(group.name)) if group.writers else "–"
            verdict = "yes" if group.prunable else f"no: {group.reason}"
            table.append((group.name, group.kind, str(group.size), row, readers, verdict))
        widths = [max(len(line[i]) for line in table) for i in range(len(header) - 1)]
        text = [
            "  ".join(
                [
                    # numbers to the right, words to the left
                    cell.rjust(width) if header[i] in ("units", "row") else cell.ljust(width)
                    for i, (cell, width) in enumerate(zip(line, widths, strict=False))
                ]
                + [line[-1]]
            )
            for line in table
        ]
        if self.ungrouped:
            text += ["", "parameters in no group:"]
            text += [f"  {name}: {reason}" for name, reason in self.ungrouped.items()]
        return "\n".join(text)


def _moved(tensors: dict[str, Tensor], name: str, device: torch.device) -> Tensor:
    """The tensor of that name on ``device``, where it stays: no step of training copies it."""
    if tensors[name].device != device:
        tensors[name] = tensors[name].to(device)
    return tensors[name]
