"""From a network to its groups: tracing, the walk over the nodes, units gathered into groups."""

from __future__ import annotations

import contextlib
import copy
import functools
import itertools
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from .functions import with_layers
from .products import found_products
from .removal import Removal, varying
from .rules import MOVEMENTS, Step, Unsupported, Use, Walk, passing, pointwise, rule_of
from .structure import Graph, Group, ParameterSlice, ReaderSlice
from .units import KEPT, Value, compressed

__all__ = ["Analysis", "UntraceableError", "analyse", "evaluating", "groups", "trace"]

INPUT = "input"
TRIALS = 3
LARGEST_DIRECT = 2**18
"""Entries of a parameter that is used outside of a layer, up to which its units are followed."""


class UntraceableError(ValueError):
    """The network's forward cannot be recorded as a graph."""


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
            graph = fx.Tracer().trace(net)
        except Exception as error:  # whatever the network's own code does with a proxy
            raise UntraceableError(
                f"torch.fx cannot trace {type(net).__name__}: {error} (its forward must not branch "
                "or loop on values or shapes of tensors, and must take tensors only)"
            ) from error
        for node in list(graph.nodes):
            # Checks of shapes are done with, and x.shape is a call that can be written down.
            if node.op == "call_function" and node.target is torch._assert:
                _erase(graph, node)
            elif node.op == "call_function" and node.target is getattr and node.args[1] == "shape":
                node.op, node.target, node.args = "call_method", "size", node.args[:1]
        return with_layers(fx.GraphModule(net, graph))


def _erase(graph: fx.Graph, node: fx.Node) -> None:
    """Erase a check, and the numbers that were computed for it alone."""
    sources = node.all_input_nodes
    graph.erase_node(node)
    for source in sources:
        number = source.target in (getattr, "size") or (
            getattr(source.target, "__module__", "") == "_operator"
        )
        if number and not source.users:
            _erase(graph, source)


@dataclass
class Analysis:
    """A network with everything that the rules found in it.

    traced: the network as a graph; it shares the network's modules.
    walk: values, ties, uses and reads.
    steps: the nodes with their inputs, in order.
    outside: nodes before the one at which the input's units lie in one dimension; they are not cut.
    anchor: that node, or None.
    inputs: atoms of the input's entries, in order; empty where there are none.
    """

    traced: fx.GraphModule
    walk: Walk
    steps: list[Step]
    outside: set[fx.Node]
    anchor: fx.Node | None
    inputs: Tensor

    def unit(self, use: Use) -> Tensor:
        """The unit of each entry of a use, as a label."""
        return self.walk.atoms.find(use.labels)

    def input_units(self) -> Tensor:
        """The input's units as labels, in the order of its entries."""
        return self.walk.atoms.find(self.inputs).unique()


def groups(net: nn.Module, example: Tensor | tuple[Tensor, ...]) -> Graph:
    """Find the groups of a network.

    Every parameter stands in one: rows of units that can be removed together, or of units that
    cannot, with the reason. The input features are the group ``"input"``: channels for a network
    that starts with a convolution, features for one that starts with a linear layer, flattened or
    not. The structure is that of eval mode.

    :param net: any network that ``torch.fx`` can trace; not changed.
    :param example: an input ``(batch, ...)``, or a tuple of inputs.
    :raises UntraceableError: where ``net`` cannot be traced.
    :raises ValueError: where ``net`` does not accept ``example``, or a layer is named ``"input"``.
    """
    if isinstance(getattr(net, INPUT, None), nn.Module):
        raise ValueError(
            f"a layer is named {INPUT!r}, which is the name of the group of input features: rename"
        )
    examples = example if isinstance(example, tuple) else (example,)
    if any(value.device.type != "cpu" for value in (*net.parameters(), *net.buffers(), *examples)):
        # Labels live on the CPU.
        net, examples = copy.deepcopy(net).cpu(), tuple(value.cpu() for value in examples)
    traced = trace(net)
    with evaluating(net):
        analysis = analyse(net, traced, tuple(value.clone() for value in examples))
    return _Gathered(net, analysis).graph(examples)


# -- the walk ------------------------------------------------------------------------------------


def analyse(net: nn.Module, traced: fx.GraphModule, examples: tuple[Tensor, ...]) -> Analysis:
    """Apply the rules to a traced network, and check that what they allow can be done.

    The network must be in eval mode, see :func:`evaluating`.

    :raises ValueError: where the network does not accept the examples.
    """
    names: dict[int, str] = {}
    for name, tensor in itertools.chain(net.named_parameters(), net.named_buffers()):
        names.setdefault(id(tensor), name)
    walk = Walk(names)
    run = _Run(traced, walk)
    try:
        run.run(*examples)
    except _WalkError as error:
        raise error.args[0] from None
    except Exception as error:
        shapes = ", ".join(str(tuple(value.shape)) for value in examples)
        raise ValueError(
            f"{type(net).__name__} does not accept the example input of shape {shapes}: {error}"
        ) from error
    _finish_direct(walk, run)
    analysis = Analysis(traced, walk, run.steps, set(), None, run.inputs)
    _place_input(analysis)
    _check(analysis)
    return analysis


class _WalkError(Exception):
    """Wraps an error of a rule, which is not the network's."""


class _Run(fx.Interpreter):
    """Runs the network on the example, and the rules beside it."""

    def __init__(self, traced: fx.GraphModule, walk: Walk) -> None:
        super().__init__(traced)
        self.extra_traceback = False  # the network's own message says more
        self.walk = walk
        self.steps: list[Step] = []
        self.inputs = torch.zeros(0, dtype=torch.int64)
        # Entries of parameters and buffers that are used directly, by name.
        self.direct: dict[str, tuple[Tensor, Tensor, str]] = {}
        placeholders = [node for node in traced.graph.nodes if node.op == "placeholder"]
        self.single_input = len(placeholders) == 1
        self.number_of_inputs = len(placeholders)

    def run_node(self, n: fx.Node) -> Any:
        output = super().run_node(n)
        try:
            self._note(n, output)
        except Exception as error:
            raise _WalkError(error) from error
        return output

    def _note(self, node: fx.Node, output: Any) -> None:
        walk = self.walk
        if node.op == "placeholder":
            if isinstance(output, Tensor):
                walk.values[node] = self._input(output)
            else:
                walk.numbers[node] = output
            return
        if node.op == "get_attr":
            walk.values[node] = self._attribute(node, output)
            return
        inputs = list(_tensors(node, walk))
        if node.op == "output":
            for value in inputs:
                walk.atoms.block(value.labels, "units of the network's output")
                walk.mark(value)
            return
        module = self.module.get_submodule(str(node.target)) if node.op == "call_module" else None
        step = Step(node, module, walk, inputs, output)
        if not _has_tensors(output):
            self._number(step, output)
            return
        self.steps.append(step)
        found: Any
        try:
            found = self._apply(step)
        except Unsupported as unsupported:
            walk.failures[str(node.target)] = str(unsupported)
            for value in inputs:
                walk.atoms.block(value.labels, str(unsupported))
            found = _without_units(output)
        if found is None:
            walk.numbers[node] = None
        else:
            walk.values[node] = found

    def _apply(self, step: Step) -> Any:
        rule, module = rule_of(step.node, step.module), step.module
        if module is not None and (module._forward_hooks or module._forward_pre_hooks):
            raise Unsupported(f"{step} has hooks, which may change what it computes")
        if rule is None or not step.inputs:
            raise Unsupported(f"{step} is not supported")
        if module is not None:
            self._check_parameters(step, module)
        for argument in step.node.all_input_nodes:
            if argument in self.walk.sizes and rule not in MOVEMENTS:
                reason = f"{step} computes with the number of units"
                self.walk.atoms.block(self.walk.sizes[argument], reason)
        return rule(step)

    def _check_parameters(self, step: Step, module: nn.Module) -> None:
        """Whether what the rules take for parameters are the module's own."""
        kind = type(module)
        if kind.__module__.startswith("torch.nn.utils.parametri") or any(
            name not in module._parameters and name not in module._buffers
            for name in ("weight", "bias")
            if isinstance(getattr(module, name, None), Tensor)
        ):
            raise Unsupported(f"the weight of {step} is not a parameter of its own")

    def _input(self, value: Tensor) -> Value:
        shape = [1, *value.shape[1:]]
        labels = torch.full([1] * value.ndim, KEPT)
        if self.single_input and value.ndim > 1:
            self.inputs = self.walk.atoms.new(torch.Size(shape).numel(), loose=True)
            labels = self.inputs.reshape(shape)
        return Value(value.shape, labels, torch.zeros([1] * value.ndim).to(value))

    def _attribute(self, node: fx.Node, value: Any) -> Value:
        """A parameter, whose entries may become units' rows; a buffer, whose may be cut."""
        name = self.walk.names.get(id(value))
        # What adds to a stream or scales it is small; a matrix is read by functions without a rule.
        if name is None or value.numel() > LARGEST_DIRECT:
            return Value(value.shape, torch.full([1] * value.ndim, KEPT), compressed(value))
        trained = isinstance(value, nn.Parameter)
        if name not in self.direct:
            labels = self.walk.atoms.new(value.numel(), loose=True).reshape(value.shape)
            self.direct[name] = (value, labels, "row" if trained else "buffer")
        labels = self.direct[name][1]
        emission = torch.zeros([1] * value.ndim).to(value) if trained else compressed(value)
        opened = labels.unique() if trained else labels.reshape(-1)[:0]
        return Value(value.shape, labels, emission, opened)

    def _number(self, step: Step, output: Any) -> None:
        """A number, or several: it may depend on how many units there are."""
        walk, node = self.walk, step.node
        walk.numbers[node] = output
        labels = [walk.sizes[source] for source in node.all_input_nodes if source in walk.sizes]
        for value in step.inputs:
            if step.node.target in ("size", "dim", len, "numel"):
                dims: Any = range(value.labels.ndim)
                if step.node.target == "size" and isinstance(output, int):
                    dims = [step.node.args[1] if len(step.node.args) > 1 else 0]
                labels += [value.labels.reshape(-1) for dim in dims if value.labels.shape[dim] > 1]
            else:
                walk.atoms.block(value.labels, f"{step} is not supported")
        source = node.args[0] if node.args else None
        if (
            getattr(node.target, "__name__", "") == "getitem"
            and isinstance(source, fx.Node)
            and source.target == "size"
            and isinstance(node.args[1], int)
        ):
            # One of the sizes: only that dimension matters.
            of = walk.values[source.args[0]]  # type: ignore[index]
            labels = [of.labels.reshape(-1)] if of.labels.shape[node.args[1]] > 1 else []
        if labels:
            together = torch.cat(labels)
            walk.sizes[node] = together[together >= 0].unique()


def _tensors(node: fx.Node, walk: Walk) -> Iterator[Value]:
    for source in node.all_input_nodes:
        value = walk.values.get(source)
        if isinstance(value, Value):
            yield value
        elif isinstance(value, tuple):
            yield from (part for part in value if isinstance(part, Value))


def _has_tensors(output: Any) -> bool:
    if isinstance(output, tuple | list):
        return any(isinstance(part, Tensor) for part in output)
    return isinstance(output, Tensor)


def _without_units(output: Any) -> Any:
    if isinstance(output, Tensor):
        ones = [1] * output.ndim
        return Value(output.shape, torch.full(ones, KEPT), torch.zeros(ones).to(output))
    return tuple(_without_units(part) if isinstance(part, Tensor) else None for part in output)


def _finish_direct(walk: Walk, run: _Run) -> None:
    """Parameters and buffers that are used directly: rows where units lie along one dimension."""
    used = {use.name for use in walk.uses}
    called: set[str] = set()
    for step in run.steps:
        if step.module is not None:
            called |= {walk.names[id(value)] for value in step.module.parameters()}
    for name, (value, labels, kind) in run.direct.items():
        if name in called or name in used:
            reason = f"{name!r} is used outside of a layer"
            walk.atoms.block(labels, reason)
            for use in walk.uses:
                if use.name == name:
                    walk.atoms.block(use.labels, reason)
            continue
        roots = walk.atoms.find(labels)
        dims = varying(walk, Value(value.shape, labels, labels), walk.atoms.blocked())
        if len(dims) != 1:
            walk.atoms.block(labels, f"{name!r} has no dimension of units")
            continue
        along = roots.movedim(dims[0], 0).flatten(1)
        first = walk.atoms.tie_along(along, f"{name!r} has units along several dimensions")
        walk.uses.append(Use(name, dims[0], first, kind, name))


def _place_input(analysis: Analysis) -> None:
    """Find the node at whose output the input's units lie in one dimension."""
    walk = analysis.walk
    placeholders = [node for node in analysis.traced.graph.nodes if node.op == "placeholder"]
    if not len(analysis.inputs):
        return
    node = placeholders[0]
    steps = {step.node: step for step in analysis.steps}
    while isinstance(walk.values[node], tuple) or len(varying(walk, walk.values[node])) > 1:
        users = list(node.users)
        step = steps.get(users[0]) if len(users) == 1 else None
        rule = None if step is None else rule_of(step.node, step.module)
        moves = rule in (*MOVEMENTS, pointwise, passing)
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


def _check(analysis: Analysis) -> None:
    """Block what the rules allow but cannot be done; never the other way round."""
    walk = analysis.walk
    _check_input(analysis)
    values = [
        (str(step), value)
        for step in analysis.steps
        if step.node not in analysis.outside
        for value in _parts(walk.values.get(step.node))
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
    for _ in range(TRIALS):
        free = _removable(analysis)
        gone = free[torch.rand(len(free), generator=generator) < 0.5]
        while True:
            removal = Removal(walk, gone)
            for step in analysis.steps:
                if step.node in analysis.outside or step.node is analysis.anchor:
                    continue
                try:
                    removal.rewritten(step)
                except ValueError as error:
                    parts = [*step.inputs, *_parts(walk.values[step.node])]
                    for value in parts:
                        walk.atoms.block(value.labels, str(error))
                    break
            else:
                break
            blocked = walk.atoms.blocked()
            gone = gone[~blocked.among(gone)]


def _parts(value: Any) -> tuple[Value, ...]:
    if isinstance(value, Value):
        return (value,)
    return tuple(part for part in value or () if isinstance(part, Value))


def _removable(analysis: Analysis) -> Tensor:
    """Units with rows, and the input's, that are not blocked."""
    walk = analysis.walk
    rows = [analysis.unit(use) for use in walk.uses if use.kind == "row"]
    units = torch.cat([analysis.input_units(), *rows]).unique()
    return units[~walk.atoms.blocked().among(units)]


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
        constants = read.constants()
        bad = torch.isin(walk.atoms.find(read.labels), inputs) & constants.isnan()
        # One excluded unit would have to stay as a constant, but an input is not ours to set.
        reason = "an excluded input emits a constant that meets zero padding"
        walk.atoms.block(read.labels[bad], reason)
    sizes = walk.atoms.find(analysis.inputs).unique(return_counts=True)[1]
    if len(sizes.unique()) > 1:
        walk.atoms.block(analysis.inputs, "the input's units are of different sizes")


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
        self.calls = Counter(
            node.target for node in analysis.traced.graph.nodes if node.op == "call_module"
        )

    def graph(self, examples: tuple[Tensor, ...]) -> Graph:
        # Entries by unit: {unit: {(parameter, dim, gates): [entries]}}.
        rows: dict[int, dict[Any, list[int]]] = defaultdict(lambda: defaultdict(list))
        readers: dict[int, dict[Any, list[int]]] = defaultdict(lambda: defaultdict(list))
        owners: dict[str, str] = {}
        taken = set()
        for use in self.walk.uses:
            if use.kind == "buffer" or (use.name, use.dim, use.kind) in taken:
                continue
            taken.add((use.name, use.dim, use.kind))
            if use.kind == "row":
                owners.setdefault(use.name, use.owner)
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
        found = [self._group(kind, units, readers, owners) for kind, units in made.items()]
        found += self._left_over({name for name in owners if self._has_rows(name)})
        place = {name: i for i, name in enumerate(self._order())}
        found.sort(key=lambda group: place.get(group.writers[0].parameter, 0))
        named = self._named(found, owners)
        covered = {writer.parameter for group in named for writer in group.writers}
        aliases = {}
        for name, value in self.net.named_parameters(remove_duplicate=False):
            first = self.walk.names[id(value)]
            if first != name:
                aliases[name] = first
        everything = (self._input_group(readers, examples), *named)
        return Graph(
            everything,
            {name: value.shape for name, value in self.parameters.items() if name in covered},
            {
                name: "not used by the forward pass"
                for name in self.parameters
                if name not in covered
            },
            aliases,
            tuple((value.shape, value.dtype) for value in examples),
            found_products(
                self.analysis, everything, examples[0].shape[0] if examples[0].ndim else 1
            ),
        )

    def _has_rows(self, name: str) -> bool:
        return any(use.name == name and use.kind == "row" for use in self.walk.uses)

    def _order(self) -> Iterator[str]:
        """Parameters in the order of the forward pass."""
        for node in self.analysis.traced.graph.nodes:
            if node.op == "call_module":
                for value in self.analysis.traced.get_submodule(str(node.target)).parameters():
                    yield self.walk.names[id(value)]
            elif node.op == "get_attr":
                path = str(node.target).split(".")
                direct: Any = functools.reduce(getattr, path, self.analysis.traced)
                if id(direct) in self.walk.names:
                    yield self.walk.names[id(direct)]

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
            self._kind(owner, first[0]),
            tuple(writers),
            tuple(reading),
            not reason,
            reason,
            shared=any(self._shared(writer.parameter) for writer in writers),
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

    def _kind(self, owner: str, parameter: str) -> str:
        if owner == parameter:
            return "parameter"
        module = self.analysis.traced.get_submodule(owner.removesuffix(".out_proj"))
        if isinstance(module, nn.MultiheadAttention):
            return "linear" if owner.endswith(".out_proj") else "heads"
        name = type(module).__name__
        for part, kind in (("Conv", "conv"), ("Linear", "linear"), ("Norm", "norm")):
            if part in name:
                return kind
        return "embedding" if isinstance(module, nn.Embedding) else "parameter"

    def _shared(self, parameter: str) -> bool:
        calls = 0
        for target, count in self.calls.items():
            module = self.analysis.traced.get_submodule(str(target))
            calls += count * any(self.walk.names[id(p)] == parameter for p in module.parameters())
        return calls > 1

    def _left_over(self, done: set[str]) -> list[Group]:
        """Parameters without units, which are trained all the same: a group a module."""
        used = dict.fromkeys(self._order())
        names = [n for n in self.parameters if n in used and n not in done]
        by_owner: dict[str, list[str]] = {}
        called = {str(target) for target in self.calls}
        for name in names:
            if not self.parameters[name].is_floating_point():
                continue
            module = name.rpartition(".")[0]
            while module and module not in called:
                module = module.rpartition(".")[0]
            by_owner.setdefault(module or name, []).append(name)
        found = []
        for owner, members in by_owner.items():
            shapes = [self.parameters[name].shape for name in members]
            sizes = {shape[0] if shape else 0 for shape in shapes}
            size = sizes.pop() if len(sizes) == 1 and owner not in members and len(shapes[0]) else 1
            writers = tuple(
                ParameterSlice(name, 0, (shape[0] if shape else 1) // size)
                for name, shape in zip(members, shapes, strict=True)
            )
            reason = self.walk.failures.get(owner, "these parameters belong to no units")
            kind = self._kind(owner, members[0])
            found.append(Group(owner, size, kind, writers, (), False, reason))
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

    def _input_group(
        self, readers: dict[int, dict[Any, list[int]]], examples: tuple[Tensor, ...]
    ) -> Group:
        analysis = self.analysis
        if not len(analysis.inputs):
            count = sum(1 for n in analysis.traced.graph.nodes if n.op == "placeholder")
            reason = f"the network takes {count} inputs"
            if count == 1:
                reason = "the input is not one tensor with a batch dimension"
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
        node = anchor.name if anchor is not None else ""
        return Group(INPUT, size, "input", (), tuple(reading), not reason, reason, node, dim)
