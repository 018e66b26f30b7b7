"""The walk over a network's graph: what is known of each value, and what operations do with it.

Every operation is an :class:`~pyro_sparse.graph.operations.Operation`, which sees its node as a
:class:`Step`: it may write rows (:meth:`Step.rows`), read columns (:meth:`Step.read`), tie units,
or raise :class:`Unsupported`, which blocks all units that come in. So what nobody has described
costs sparsity, never correctness.

What an excluded unit emits is computed, not assumed: the operations run on a tensor that holds, for
each entry, the value that it has when its unit is excluded (``Value.emission``). NaN there is a
number that depends on the data; only where nothing else can be told does it matter, and a unit that
emits it to a layer is blocked.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from .units import KEPT, Atoms, Value, compressed

__all__ = ["Read", "Step", "Unsupported", "Use", "Walk", "Weight", "shape_of", "unknown"]

LARGEST_DIRECT = 2**18
"""Entries of a parameter that is used outside of a layer, up to which its units are followed."""


class Unsupported(Exception):
    """Raised by an operation: the incoming units cannot be followed through this use of it."""


@dataclass(frozen=True)
class Use:
    """Units along dimension ``dim`` of a parameter or buffer.

    kind: ``"row"`` (it is part of the units' rows), ``"column"`` (it reads them) or ``"buffer"``.
    labels: ``(size of dim,)``.
    owner: the layer, by its dotted name, or the parameter's own name.
    layer: what kind of layer: ``"linear"``, ``"conv"``, ...
    """

    name: str
    dim: int
    labels: Tensor
    kind: str
    owner: str
    layer: str


@dataclass(frozen=True)
class Read:
    """One time that a layer reads units.

    node: the layer.
    name, dim: the parameter that it reads with, and that parameter's dimension of columns.
    labels: atom of each column.
    emission: what its columns read from excluded units, ``(columns, entries)``, compressed.
    padded: whether the layer pads with zeros, so that a constant is not one at the borders.
    bias: the parameter that takes what constant columns add; None where there is no place for one.
    """

    node: fx.Node
    name: str
    dim: int
    labels: Tensor
    emission: Tensor
    padded: bool
    bias: str | None

    def constants(self) -> Tensor:
        """The constant of each column, ``(columns,)``; NaN where it is none that a bias can take.

        A bias imitates what is the same wherever it is read, and not cut off by zero padding.
        """
        emission = self.emission.expand(len(self.labels), -1)
        first = emission[:, 0].double()
        free = self.bias is not None and not self.padded
        alike = (emission == emission[:, :1]).all(1) & ((first == 0) | free)
        return first.where(alike, torch.nan)


@dataclass(frozen=True)
class Weight:
    """A parameter or buffer before anything has been computed with it, its dimensions in any order.

    dims: dimension of the tensor that each of these is.
    mask: a buffer of the same shape and order that it is multiplied by.
    """

    name: str
    tensor: Tensor
    dims: tuple[int, ...]
    mask: Weight | None = None

    @property
    def shape(self) -> torch.Size:
        return torch.Size(self.tensor.shape[dim] for dim in self.dims)


def shape_of(value: Any) -> torch.Size:
    """The shape that a node's tensor had in the example, batches of any size included."""
    return torch.Size(_number(size) for size in value.shape)


def _number(value: Any) -> Any:
    """A number of the graph, as it was in the example."""
    if isinstance(value, torch.SymInt | torch.SymFloat | torch.SymBool):
        return value.node.hint
    return value


def unknown(rank: int) -> Tensor:
    """An emission that depends on the data."""
    return torch.full([1] * rank, torch.nan)


@dataclass
class Walk:
    """What is found while the graph is walked.

    names: the first name of every parameter and buffer, by the identity of the tensor.
    parameters: the names of the parameters.
    values: the value of every node that is a tensor, or the values of one that is several.
    numbers: what every node is that is no tensor.
    direct: tensors that are used outside of a layer, by name, with the atoms of their entries.
    marked: what scales units that are read.
    attended, paired: units that are heads, and those that a sum of products takes in pairs.
    """

    names: dict[int, str]
    parameters: set[str]
    atoms: Atoms = field(default_factory=Atoms)
    uses: list[Use] = field(default_factory=list)
    reads: list[Read] = field(default_factory=list)
    marked: list[Tensor] = field(default_factory=list)
    attended: list[Tensor] = field(default_factory=list)
    paired: list[Tensor] = field(default_factory=list)
    written: dict[tuple[str, int], Tensor] = field(default_factory=dict)
    values: dict[fx.Node, Any] = field(default_factory=dict)
    numbers: dict[fx.Node, Any] = field(default_factory=dict)
    direct: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)
    refused: set[fx.Node] = field(default_factory=set)
    made: dict[fx.Node, Value] = field(default_factory=dict)

    def value(self, node: fx.Node) -> Any:
        """The value of a node; of a weight, that of its entries, used one by one."""
        found = self.values[node]
        if not isinstance(found, Weight):
            return found
        if node not in self.made:
            self.made[node] = self.entries(found)
        return self.made[node]

    def entries(self, weight: Weight) -> Value:
        """A tensor's entries as a value: a parameter's may be rows, a buffer's may be cut."""
        tensor, rank = weight.tensor, weight.tensor.ndim
        trained = weight.name in self.parameters
        known = unknown(rank) if trained else compressed(tensor)
        labels = torch.full([1] * rank, KEPT)
        opened = labels.reshape(-1)[:0]
        # What adds to a stream or scales it is small; a matrix is read by what is no layer.
        if tensor.numel() <= LARGEST_DIRECT and tensor.is_floating_point():
            if weight.name not in self.direct:
                atoms = self.atoms.new(tensor.numel(), loose=True).reshape(tensor.shape)
                self.direct[weight.name] = (tensor, atoms)
            labels = self.direct[weight.name][1]
            if trained:
                known, opened = torch.zeros([1] * rank, dtype=tensor.dtype), labels.unique()
        order = weight.dims
        value = Value(weight.shape, labels.permute(order), known.permute(order), opened)
        if weight.mask is not None:  # of a masked weight that no layer reads
            mask = self.entries(weight.mask)
            self.tie(value.labels, mask.labels, f"{weight.name!r} is masked")
        return value

    def use(self, name: str, dim: int, labels: Tensor, kind: str, owner: str, layer: str) -> None:
        """Units lie along a dimension of a parameter or buffer, which is one thing for all uses."""
        for other in self.uses:
            if other.name != name:
                continue
            if other.dim == dim:
                self.tie(other.labels, labels, f"{name!r} is used for units that cannot be tied")
            elif other.kind == kind == "row":
                for part in (other.labels, labels):
                    self.atoms.block(part, f"{name!r} holds units along two of its dimensions")
        self.uses.append(Use(name, dim, labels, kind, owner, layer))

    def tie(self, left: Tensor, right: Tensor, reason: str) -> None:
        """Tie label by label; what meets a kept entry is kept."""
        left, right = torch.broadcast_tensors(left, right)
        both = (left >= 0) & (right >= 0)
        self.atoms.tie(left[both], right[both])
        self.atoms.block(left[right < 0], reason)
        self.atoms.block(right[left < 0], reason)

    def mark(self, value: Value) -> None:
        """The units of ``value`` are read: what is open scales them."""
        self.marked.append(value.open)

    def varies(self, labels: Tensor, dims: Sequence[int]) -> bool:
        """Whether the units differ along some of these dimensions."""
        roots = self.atoms.find(labels)
        return any(
            roots.shape[dim] > 1 and not bool((roots == roots.narrow(dim, 0, 1)).all())
            for dim in dims
        )

    def tied_along(self, labels: Tensor, dims: Sequence[int], reason: str) -> Tensor:
        """Labels of size 1 in ``dims``: the units that differ along these are tied, or blocked."""
        dims = sorted(dim % labels.ndim for dim in dims)
        if not dims:
            return labels
        last = list(range(-len(dims), 0))
        front = labels.movedim(dims, last)
        outer = front.shape[: -len(dims)]
        tied = self.atoms.tie_along(front.reshape(outer.numel(), -1), reason)
        return tied.reshape([*outer, *[1] * len(dims)]).movedim(last, dims)


class Step:
    """One node: the operation, what comes in, and what comes out.

    given: its arguments by the names that torch has for them, defaults included.
    output: what comes out, as tensors without numbers.
    """

    def __init__(self, node: fx.Node, walk: Walk) -> None:
        self.node, self.walk, self.output = node, walk, node.meta["val"]
        self.schema = node.target._schema  # type: ignore[union-attr]
        self.given: dict[str, Any] = {}
        self.met: dict[int, Value] = {}  # inputs as an elementwise operation has taken them
        for place, argument in enumerate(self.schema.arguments):
            default = argument.default_value if argument.has_default_value() else None
            self.given[argument.name] = (
                node.args[place]
                if place < len(node.args)
                else node.kwargs.get(argument.name, default)
            )

    def __str__(self) -> str:
        stack = list(self.node.meta.get("nn_module_stack", {}).values())
        name = str(self.node.target).removeprefix("aten.").partition(".")[0]
        if not stack:
            return f"'{name}'"
        path, kind = stack[-1]
        path = path.removeprefix("L['self'].").removeprefix(self.node.meta.get("prefix", ""))
        kind = kind if isinstance(kind, str) else f"{kind.__module__}.{kind.__qualname__}"
        within = f"{kind.rpartition('.')[2]} {path!r}" if path else ""
        if within and kind.startswith("torch.nn.modules"):
            return within
        return f"'{name}' in {within}" if within else f"'{name}'"

    @property
    def layer(self) -> str:
        """The dotted name of the innermost module in which this is."""
        stack = list(self.node.meta.get("nn_module_stack", {}).values())
        return stack[-1][0].removeprefix(self.node.meta.get("prefix", "")) if stack else ""

    @property
    def mutates(self) -> bool:
        return bool(self.schema.is_mutable)

    # -- arguments -------------------------------------------------------------------------------

    def number(self, name: str) -> Any:
        """An argument that is no tensor, as it was in the example."""
        return fx.map_arg(self.given[name], lambda node: _number(self.walk.numbers[node]))

    def value(self, name: str) -> Value | None:
        """A tensor argument; None where it is not given."""
        node = self.given.get(name)
        found = self.walk.value(node) if isinstance(node, fx.Node) else None
        return found if isinstance(found, Value) else None

    def weight(self, name: str) -> Weight | None:
        """An argument that has to be a parameter or buffer itself."""
        node = self.given.get(name)
        if node is None:
            return None
        found = self.walk.values.get(node)
        if not isinstance(found, Weight):
            raise Unsupported(f"the {name} of {self} is {self._made(node)}")
        return found

    def _made(self, node: fx.Node) -> str:
        """How what ought to be a parameter is made."""
        names, seen, todo = [], set(), [node]
        while todo:
            source = todo.pop()
            if source.op == "get_attr":
                names.append(str(source.target))
            todo += [n for n in source.all_input_nodes if n not in seen]
            seen.update(source.all_input_nodes)
        parametrised = [name for name in names if "parametrizations." in name]
        if parametrised:
            return "computed by a parametrisation: remove it, or train without"
        listed = " and ".join(repr(name) for name in sorted(set(names))[:2])
        how = str(node.target).removeprefix("aten.").partition(".")[0]
        return f"computed ('{how}' of {listed})" if listed else "computed from the data"

    @property
    def inputs(self) -> list[Value]:
        """The values of all tensor arguments, in order."""
        found = []
        for node in self.node.all_input_nodes:
            value = self.walk.value(node) if node in self.walk.values else None
            if isinstance(value, Value):
                found.append(value)
            elif isinstance(value, tuple):
                found += [part for part in value if isinstance(part, Value)]
        return found

    @property
    def followed(self) -> list[Value]:
        """The same without weights, of whose entries nothing is said."""
        known, made = self.walk.values, self.walk.made
        return [
            value
            for node in self.node.all_input_nodes
            if node in known and (node in made or not isinstance(known[node], Weight))
            for value in parts(self.walk.value(node))
        ]

    @property
    def source(self) -> Value:
        return self.inputs[0]

    @property
    def shape(self) -> torch.Size:
        if not isinstance(self.output, Tensor):
            raise Unsupported(f"{self} returns more than one tensor, which is not supported")
        return shape_of(self.output)

    # -- running it ------------------------------------------------------------------------------

    def arguments(self, **changed: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Arguments for the node, some of them replaced."""
        given = self.given | changed
        args = tuple(given[a.name] for a in self.schema.arguments if not a.kwarg_only)
        return args, {a.name: given[a.name] for a in self.schema.arguments if a.kwarg_only}

    def call(self, substitute: Callable[[Value], Tensor], call: Any = None) -> Any:
        """The operation with each tensor input replaced.

        Args:
            call: target, arguments and keyword arguments; the node's own when absent.
        """

        def argument(node: fx.Node) -> Any:
            if node not in self.walk.values:
                return _number(self.walk.numbers[node])
            value = self.walk.value(node)
            if isinstance(value, tuple):
                return tuple(substitute(part) for part in value)
            return substitute(value)

        target, args, kwargs = call or (self.node.target, self.node.args, self.node.kwargs)
        assert callable(target)
        return target(*fx.map_arg(args, argument), **fx.map_arg(kwargs, argument))

    def emitted(self, *, full: bool = False) -> Tensor:
        """The operation's output where every unit is excluded, compressed.

        Args:
            full: run it on tensors of the true shapes, not only on what varies.
        """
        rank = len(self.shape)
        values = self.inputs
        doubtful = any(bool(value.emission.isnan().any()) for value in values)
        if doubtful and not self.output.is_floating_point():
            return unknown(rank)
        if full and doubtful and all(bool(v.emission.isnan().all()) for v in values):
            return unknown(rank)
        try:
            output = self.call(
                lambda value: (value.full_emission() if full else value.emission).clone()
            )
        except (RuntimeError, TypeError, IndexError):
            if doubtful:  # of integers, NaN is none
                return unknown(rank)
            raise
        return compressed(output)

    def result(self, labels: Tensor, emission: Tensor, open: Tensor) -> Value:
        """The output's value; units whose emission is not finite are blocked."""
        bad = emission.isinf()
        if not any(bool(v.emission.isnan().any()) for v in (*self.followed, *self.met.values())):
            bad |= emission.isnan()
        if bad.any():
            labels = self.refuse(
                labels,
                bad.expand(self.shape) & (labels >= 0).expand(self.shape),
                f"{self} maps what an excluded unit emits to a number not finite",
            )
        return Value(self.shape, labels, emission, open)

    def opened(self, labels: Tensor) -> Tensor:
        """What scales these units, of all that scales the inputs'."""
        find = self.walk.atoms.find
        opened = torch.cat([value.open for value in self.inputs])
        before = torch.cat([find(value.labels).reshape(-1) for value in self.inputs])
        lost = ~torch.isin(before, find(labels).reshape(-1))
        return opened[~torch.isin(find(opened), before[lost])]

    def refuse(self, labels: Tensor, where: Tensor, reason: str) -> Tensor:
        """Block the units of some entries, and keep these entries."""
        if not where.any():
            return labels
        full = labels.expand(self.shape)
        self.walk.atoms.block(full[where], reason)
        return compressed(full.masked_fill(where, KEPT))

    def kept(self) -> Any:
        """An output without units, whose entries depend on the data."""
        return without_units(self.output)

    # -- layers ----------------------------------------------------------------------------------

    def owner(self, weight: Weight) -> str:
        """The name of a layer with this weight."""
        owner, _, leaf = weight.name.rpartition(".")
        return owner if owner and leaf.endswith("weight") else weight.name

    def rows(
        self,
        layer: str,
        weight: Weight,
        dim: int,
        *further: Weight | None,
        owner: str | None = None,
    ) -> Tensor:
        """Atoms of the rows that parameters hold, one an entry of dimension ``dim``.

        The first weight's dimension ``dim``, and dimension 0 of the further ones.
        """
        key = (weight.name, weight.dims[dim])
        if key not in self.walk.written:
            self.walk.written[key] = self.walk.atoms.new(weight.shape[dim])
        atoms, owner = self.walk.written[key], owner or self.owner(weight)
        for part, place in ((weight, dim), *((other, 0) for other in further if other)):
            self.along_weight(part, place, atoms, "row", owner, layer)
        return atoms

    def along_weight(
        self, weight: Weight, dim: int, labels: Tensor, kind: str, owner: str, layer: str
    ) -> None:
        """Units lie along a dimension of a weight, and of the mask that it is multiplied by."""
        if weight.name not in self.walk.parameters:
            if kind == "row":
                # It stays what it is, so that an excluded unit would go on emitting something.
                self.walk.atoms.block(labels, f"{weight.name!r} is a buffer, which is not trained")
            kind = "buffer"
        self.walk.use(weight.name, weight.dims[dim], labels, kind, owner, layer)
        if weight.mask is not None:
            mask = weight.mask
            self.walk.use(mask.name, mask.dims[dim], labels, "buffer", owner, layer)

    def columns(self, value: Value, dim: int) -> Tensor:
        """The units along ``dim`` of a value, ``(size,)``, whatever the other dimensions."""
        return self.walk.atoms.tie_along(
            value.along(dim)[0],
            f"{self} works along another dimension than that of the units",
        )

    def read(
        self,
        layer: str,
        value: Value,
        dim: int,
        weight: Weight,
        column: int,
        bias: str | None,
        padded: bool = False,
    ) -> None:
        """A weight reads the units along ``dim`` of a value by its dimension ``column``.

        Args:
            bias: the parameter that adds to the same outputs, whether or not there is one.
        """
        labels = self.columns(value, dim)
        emission = compressed(value.along(dim)[1].expand(len(labels), -1))
        self.read_units(layer, labels, emission, weight, column, bias, padded)
        self.walk.mark(value)

    def read_units(
        self,
        layer: str,
        labels: Tensor,
        emission: Tensor,
        weight: Weight,
        column: int,
        bias: str | None,
        padded: bool = False,
        owner: str | None = None,
    ) -> None:
        """A weight reads units that emit this, ``(columns, entries)``, when they are excluded."""
        walk = self.walk
        self.along_weight(weight, column, labels, "column", owner or self.owner(weight), layer)
        hidden = emission.isnan().any(1).expand(len(labels)) & (labels >= 0)
        walk.atoms.block(
            labels[hidden], f"{self} reads what depends on the data where a unit is excluded"
        )
        constant = (emission != 0).any(1).expand(len(labels)) & (labels >= 0) & ~hidden
        if weight.mask is not None or weight.name not in walk.parameters:
            # Nothing may move from one column to another, or into a bias.
            walk.atoms.block(
                labels[constant],
                f"{self} reads a constant of an excluded unit by a weight that is masked or fixed",
            )
        walk.reads.append(
            Read(self.node, weight.name, weight.dims[column], labels, emission, padded, bias)
        )

    def written(self, atoms: Tensor, dim: int) -> Value:
        """An output whose units along ``dim`` have just been written: excluded, they emit 0."""
        shape = [1] * len(self.shape)
        labels = atoms.reshape([*shape[:dim], len(atoms), *shape[dim + 1 :]])
        zero = torch.zeros(shape, dtype=self.output.dtype)
        return Value(self.shape, labels, zero, atoms.unique())


def without_units(output: Any) -> Any:
    """What is known of tensors without units, whose entries depend on the data."""
    if isinstance(output, Tensor):
        rank = output.ndim
        return Value(shape_of(output), torch.full([1] * rank, KEPT), unknown(rank))
    if isinstance(output, tuple | list):
        return tuple(without_units(part) for part in output)
    return None


def positions(shape: Sequence[int]) -> int:
    return math.prod(shape)


def parts(value: Any) -> Iterator[Value]:
    """The values of a node that is one tensor, or several."""
    if isinstance(value, Value):
        yield value
    elif isinstance(value, tuple):
        for part in value:
            yield from parts(part)
