"""The physically smaller network: rows and columns of excluded units cut out, exactly.

An excluded unit of the *masked* network has an all-zero row, so it emits f(0) through whatever f
lies between it and its readers. Where f(0) = 0 its columns can go. Otherwise columns times f(0)
move into the readers' biases, or, before zero padding (which a bias cannot imitate at the borders),
one excluded unit stays and its columns are the sum of all excluded ones'. Either way the compact
network computes what the masked one does, up to rounding.

It is of the network's own class wherever the class's code allows that: its parameters are cut and
the sizes that its modules keep are set, and it is run beside the masked network on the user's own
examples. Where its code insists on the old sizes, or a layer reads nothing any more, the network's
graph (:mod:`pyro_sparse.graph.capture`) is rewritten instead.
"""

from __future__ import annotations

import copy
import re
from collections import OrderedDict, defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.func import functional_call
from torch.nn.utils.fusion import fuse_conv_bn_weights, fuse_linear_bn_weights
from torch.utils._pytree import tree_leaves

from pyro_sparse.graph import Graph, Group, Output, evaluating, without_weight_norm
from pyro_sparse.graph.analysis import Analysis, analyse
from pyro_sparse.graph.capture import Captured, capture, changes_something
from pyro_sparse.graph.operations import Contraction, Elementwise, operation_of
from pyro_sparse.graph.removal import Removal
from pyro_sparse.graph.units import Value, compressed
from pyro_sparse.graph.walk import Step, Weight, parts
from pyro_sparse.inputs import Inputs
from pyro_sparse.nets.attention import NarrowAttention

__all__ = ["GatherInputs", "compact_network", "equivalence"]

AGREEMENT = 1e-5
"""How far two networks may be apart, relative to their output: folded biases are rounded once."""


class GatherInputs(nn.Module):
    """Keeps the entries ``indices`` along dimension ``dim``: the inputs that are still read."""

    def __init__(self, indices: Tensor, dim: int) -> None:
        super().__init__()
        self.dim = dim
        self.indices: Tensor
        self.register_buffer("indices", indices)

    def forward(self, inputs: Tensor) -> Tensor:
        return inputs.index_select(self.dim, self.indices)

    def extra_repr(self) -> str:
        return f"{len(self.indices)} entries along dimension {self.dim}"


@torch.no_grad()
def compact_network(
    net: nn.Module,
    graph: Graph,
    parameters: Mapping[str, Tensor],
    keep: Mapping[str, Tensor],
    *,
    align: int | None = None,
    scores: Mapping[str, Tensor] | None = None,
    fold: bool = False,
    output: Output | None = None,
    inputs: Inputs | None = None,
) -> nn.Module:
    """The network with the kept units only, on the CPU and in eval mode.

    It takes the same inputs as ``net``; where input features are dropped, it begins with a
    :class:`GatherInputs`. Parameters have the names that they have in ``net``.

    Its attribute ``compaction``, in JSON's types, says what went:

    * ``"form"``: ``"own class"``, the network's class with narrower layers, or ``"graph"``, a
      ``torch.fx.GraphModule`` of its operations;
    * ``"why"``: why it is a graph, and why one of a single batch size if it is; empty otherwise;
    * ``"kept"``: for every group, the indices in ``net`` of its units that are left;
    * ``"removed"``: for the groups that lost any, the indices of these;
    * ``"constant"``: for groups with some, the indices of excluded units that stay, to emit a
      constant (see the module's text);
    * ``"readmitted"``: the indices of units that ``align`` brought back;
    * ``"branches"``: layers that read nothing any more, and became a constant or went;
    * ``"folded"``: normalisations that went into the layer before them;
    * ``"align"``.

    Its attribute ``example`` holds the inputs on which it was checked.

    Args:
        net: the full network; not changed.
        graph: its groups.
        parameters: values by name; the network's own for those not mentioned.
        keep: boolean masks ``(units,)`` by group; groups not mentioned keep all units.
        align: bring units back until each layer's width is a multiple of this (4, 8 or 16), those
            of highest score first.
        scores: ``(units,)`` by group; norms of the rows for groups not mentioned.
        fold: let batch normalisations go into the linear layer or convolution before them.
        output: which of several outputs has to be the same; all of them when absent.
        inputs: to check it on, those of ``graph`` when absent.

    Raises:
        ValueError: for masks that leave the network constant or that
            :meth:`~pyro_sparse.graph.Graph.check_keep` refuses; for parameters of other names or
            shapes; for an ``align`` below 1.
    """
    if align is not None and align < 1:
        raise ValueError(f"expected align, the multiple of widths, to be at least 1, got {align}")
    masks = graph.check_keep(keep)
    if len(masks["input"]) and not masks["input"].any():
        raise ValueError(_nothing_left("the input", len(masks["input"])))
    full = copy.deepcopy(without_weight_norm(net)).cpu().eval()
    tensors = _parameters(full, graph, parameters)
    for name, value in tensors.items():
        _place(full, graph, name, value)
    types = [value.dtype for value in tensors.values() if value.is_floating_point()]
    example = (inputs or graph.example).map(
        lambda v: v.cpu().to(types[0]) if types and v.is_floating_point() else v.cpu()
    )
    gathers = not masks["input"].all()
    only_graph = gathers and type(full) is not nn.Sequential
    if not fold and all(bool(mask.all()) for mask in masks.values()):
        return _noted(full, _report(masks, align), example)
    captured = None
    if graph.captured is not None and not only_graph:
        captured = graph.captured.of(full, example, output)
    captured = captured or capture(full, example, output, any_batch=only_graph)
    work = _Compaction(full, graph, tensors, captured)
    readmitted = work.align(masks, align, scores or {}) if align else {}
    report = {**_report(masks, align), "readmitted": readmitted}
    work.plan(masks, report)
    small: nn.Module
    try:
        if only_graph:
            raise _Obstacle("input features go, and the network is no nn.Sequential")
        reference = _Reference(full, graph, work.masked, masks, example, output)
        folded = list(_foldable(work)) if fold else []
        small = _own_class(work, masks, report, reference, folded)
    except _Obstacle as obstacle:
        report["form"], report["why"] = "graph", str(obstacle)
        if not only_graph:
            captured = capture(full, example, output, any_batch=True)
            work = _Compaction(full, graph, tensors, captured)
            report["constant"], report["branches"] = {}, []
            work.plan(masks, report)
        if captured.fixed:
            report["why"] += f"; {captured.fixed}"
        small = work.as_graph(masks, report, list(_foldable(work)) if fold else [])
    return _noted(small, report, example)


def _report(masks: Mapping[str, Tensor], align: int | None) -> dict[str, Any]:
    return {
        "form": "own class",
        "why": "",
        "kept": _indices(masks),
        "removed": {n: i for n, i in _indices({n: ~m for n, m in masks.items()}).items() if i},
        "constant": {},
        "readmitted": {},
        "branches": [],
        "folded": [],
        "align": align,
    }


def _noted(small: nn.Module, report: dict[str, Any], example: Inputs) -> nn.Module:
    small.compaction = report  # type: ignore[assignment]
    small.example = example  # type: ignore[assignment]
    return small.eval()


class _Obstacle(Exception):
    """Why the network's own class cannot be made narrower."""


def _indices(masks: Mapping[str, Tensor]) -> dict[str, list[int]]:
    return {name: mask.nonzero().squeeze(1).tolist() for name, mask in masks.items()}


def _nothing_left(what: str, units: int) -> str:
    return (
        f"{what} would keep none of its {units} units, which leaves the network constant: lower "
        "the threshold of the selection rule or take a rule that keeps at least one unit, or train "
        "again with a larger prior inclusion probability or for fewer epochs"
    )


# -- parameters in their places ------------------------------------------------------------------


def _parameters(
    small: nn.Module, graph: Graph, parameters: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """The values of all parameters, on the CPU and of the network's types."""
    own = {name: _own(small, name) for name in [*graph.shapes, *graph.ungrouped]}
    tensors = {name: value.detach().clone() for name, value in own.items()}
    for name, value in parameters.items():
        if name in graph.aliases:
            continue
        if name not in own:
            raise ValueError(f"no parameter {name!r}; there are {', '.join(own)}")
        if value.shape != own[name].shape:
            raise ValueError(
                f"{name!r}: expected shape {tuple(own[name].shape)}, got {tuple(value.shape)}"
            )
        tensors[name] = value.detach().to(own[name], copy=True)
    return tensors


def _own(net: nn.Module, name: str) -> Tensor:
    owner, _, leaf = name.rpartition(".")
    value = getattr(net.get_submodule(owner), leaf)
    assert isinstance(value, Tensor)
    return value


def _place(net: nn.Module, graph: Graph, name: str, value: Tensor) -> None:
    """Make ``value`` the network's parameter ``name`` (also where that was a buffer)."""
    first = None
    frozen = graph.ungrouped.get(name, "").startswith("frozen")
    for alias in [name, *(a for a, target in graph.aliases.items() if target == name)]:
        owner, _, leaf = alias.rpartition(".")
        module = net.get_submodule(owner)
        if first is None:
            trainable = value.is_floating_point() and not frozen
            first = nn.Parameter(value.contiguous(), trainable)
        module._buffers.pop(leaf, None)
        module.__dict__.pop(leaf, None)  # a bias that was set to None
        module._parameters[leaf] = first
        if isinstance(module, nn.RNNBase):
            module._init_flat_weights()


# -- what goes, what stays, what moves -----------------------------------------------------------


@dataclass
class _Compaction:
    """A network that is being made smaller.

    full: the network, of full size.
    tensors: its parameters.
    captured: its graph.
    """

    full: nn.Module
    graph: Graph
    tensors: dict[str, Tensor]
    captured: Captured

    def __post_init__(self) -> None:
        self.analysis: Analysis = analyse(self.full, self.captured)
        self.walk = self.analysis.walk
        self.units = {group.name: self._units(group) for group in self.graph}
        self.needs = self._needs_a_constant()

    def _units(self, group: Group) -> Tensor:
        """The walk's label of every unit of a group."""
        if group.name == "input":
            units = self.analysis.input_units()
        elif not group.writers:
            return torch.zeros(0, dtype=torch.int64)
        else:
            writer = group.writers[0]
            units = torch.full((group.size,), -1)
            for use in self.walk.uses:
                if (use.name, use.dim, use.kind) == (writer.parameter, writer.dim, "row"):
                    entries = writer.entries(group.size).reshape(group.size, -1)[:, 0]
                    units = self.analysis.unit(use)[entries]
                    break
        if len(units) != group.size:
            raise ValueError(
                f"group {group.name!r} has {group.size} units, but {len(units)} in this network: "
                "the groups are those of another network"
            )
        return units

    def _needs_a_constant(self) -> dict[int, tuple[Any, ...]]:
        """What units emit that no bias can imitate: by unit, what tells different ones apart."""
        needs, emitted = set(), defaultdict(list)
        seen: dict[tuple[str, int], Tensor] = {}
        for read in self.walk.reads:
            constants = read.constants()
            key = (read.name, read.dim)
            # A layer that is called twice has one bias for both.
            differs = torch.zeros(len(constants), dtype=torch.bool)
            if key in seen:
                differs = seen[key] != constants
            seen[key] = constants
            units = self.walk.atoms.find(read.labels)
            emission = read.emission.expand(len(units), -1)
            if not (emission != 0).any() and not differs.any():
                continue
            for column, unit in enumerate(units.tolist()):
                emitted[unit].append(tuple(emission[column].tolist()))
                if constants[column].isnan() or differs[column]:
                    needs.add(unit)
        return {unit: tuple(emitted[unit]) for unit in needs}

    def _stand_ins(self, masks: Mapping[str, Tensor]) -> dict[int, int]:
        """For excluded units that need a constant, the one of them that stays to emit it."""
        stand_ins: dict[int, int] = {}
        for name, mask in masks.items():
            alike: dict[Any, int] = {}
            for unit in self.units[name][~mask].tolist():
                if unit in self.needs:
                    stand_ins[unit] = alike.setdefault(self.needs[unit], unit)
        return stand_ins

    def align(
        self, masks: dict[str, Tensor], multiple: int, scores: Mapping[str, Tensor]
    ) -> dict[str, list[int]]:
        """Bring units back into the masks, those of highest score first; returns which."""
        readmitted = {}
        for group in self.graph:
            mask = masks[group.name]
            if not group.prunable or not group.writers or mask.all() or not mask.any():
                continue
            score = scores.get(group.name)
            if score is None:
                score = self.graph.rows(self.tensors, group.name).double().norm(dim=1)
            if len(score) != group.size:
                raise ValueError(
                    f"expected {group.size} scores for group {group.name!r}, got {len(score)}"
                )
            first = group.writers[0].parameter  # of heads, values may stand apart in it
            block = sum(writer.block for writer in group.writers if writer.parameter == first)
            order = [
                unit
                for unit in score.detach().cpu().argsort(descending=True, stable=True).tolist()
                if not mask[unit]
            ]
            back: list[int] = []
            while not mask.all():
                stay = len(set(self._stand_ins({group.name: mask}).values()))
                if (int(mask.sum()) + stay) * block % multiple == 0:
                    break
                back.append(order.pop(0))
                mask[back[-1]] = True
            if back:
                readmitted[group.name] = sorted(back)
        return readmitted

    def plan(self, masks: dict[str, Tensor], report: dict[str, Any]) -> None:
        """Say what is gone, and make the parameters of what is left.

        Afterwards ``removal`` is what goes, ``masked`` the masked network's parameters,
        ``tensors`` those of the compact one, of full size still, and ``cut`` of their new sizes.
        """
        blocked = self.walk.atoms.blocked()
        excluded: list[int] = []
        for group in self.graph:
            for unit in self.units[group.name][~masks[group.name]].tolist():
                if unit in blocked:
                    raise ValueError(
                        f"units of group {group.name!r} cannot be removed at these parameters: "
                        f"{blocked[unit]}"
                    )
                excluded.append(unit)
        self.masked = self.graph.masked_parameters(self.tensors, masks)
        self.tensors = {name: value.clone() for name, value in self.masked.items()}
        stand_ins = self._stand_ins(masks)
        for group in self.graph:
            units = self.units[group.name].tolist()
            stay = sorted(units.index(u) for u in set(stand_ins.values()) & set(units))
            if stay:
                report["constant"][group.name] = stay
        gone = sorted(set(excluded) - set(stand_ins.values()))
        self.removal = Removal(self.walk, torch.tensor(gone, dtype=torch.int64))
        self.biases: dict[str, Tensor] = {}
        self._move_columns(set(excluded), stand_ins)
        self._cut()
        self.status = self._status()
        report["branches"] = [
            self._layer(step)
            for step in self.analysis.steps
            if self.status.get(step.node) == "constant" and self._reads(step)
        ]

    def _layer(self, step: Step) -> str:
        read = next(read for read in self.walk.reads if read.node is step.node)
        return step.layer or read.name.rpartition(".")[0] or read.name

    def _move_columns(self, excluded: set[int], stand_ins: Mapping[int, int]) -> None:
        """Move what excluded units emit into the reader's bias, or onto the one that stays."""
        done = set()
        for read in self.walk.reads:
            if (read.name, read.dim) in done or read.name not in self.tensors:
                continue
            done.add((read.name, read.dim))
            if not (read.emission != 0).any():
                continue
            units = self.walk.atoms.find(read.labels).tolist()
            columns: dict[int, list[int]] = defaultdict(list)
            for column, unit in enumerate(units):
                if unit in excluded:
                    columns[unit].append(column)
            weight = self.tensors[read.name].movedim(read.dim, 0)  # a view
            for unit, of_unit in columns.items():
                if stand_ins.get(unit, unit) != unit:
                    weight[columns[stand_ins[unit]]] += weight[of_unit]
            constants = read.constants()
            folded = [
                column
                for unit, of_unit in columns.items()
                if unit not in stand_ins
                for column in of_unit
                if constants[column] != 0
            ]
            if folded:
                outputs = weight.shape[1]
                summed = weight[folded].reshape(len(folded), outputs, -1).double().sum(2)
                assert read.bias is not None
                before = self.tensors.get(read.bias)
                added = constants[folded] @ summed
                if before is None:  # is cut as the rows of its layer's weight
                    self.biases[read.bias] = added.to(weight)
                    (rows,) = [u for u in self.walk.uses if u.name == read.name and u.kind == "row"]
                    self.biases[read.bias] = self.biases[read.bias][self.removal.stays(rows.labels)]
                else:
                    self.tensors[read.bias] = (before.double() + added).to(before)

    def _cut(self) -> None:
        """Cut parameters and buffers."""
        self.cut: dict[str, Tensor] = {}
        cuts: dict[str, dict[int, Tensor]] = defaultdict(dict)
        for use in self.walk.uses:
            stays = self.removal.stays(use.labels)
            if not stays.all():
                cuts[use.name][use.dim] = stays.nonzero().squeeze(1)
        for name, by_dim in cuts.items():
            value = self.tensors.get(name)
            if value is None:
                value = self.captured.tensors.get(name)
            if value is None:
                value = _own(self.full, name)
            for dim, entries in by_dim.items():
                value = value.index_select(dim, entries)
            self.cut[name] = value
        for name, value in self.tensors.items():
            self.cut.setdefault(name, value)
        self.cut |= self.biases

    # -- branches that read nothing --------------------------------------------------------------

    def _reads(self, step: Step) -> bool:
        """Whether a node reads columns of a weight."""
        return any(read.node is step.node for read in self.walk.reads)

    def _status(self) -> dict[fx.Node, str]:
        """Nodes of which nothing is left, ``"empty"``, or that are ``"constant"`` now."""
        status: dict[fx.Node, str] = {}
        walk, removal = self.walk, self.removal
        steps = {step.node: step for step in self.analysis.steps}
        if not len(removal.gone) or not removal.gone.any():
            return status
        reading = {read.node for read in walk.reads}
        for node in self.captured.graph.nodes:
            known = walk.values.get(node)
            if node.op != "call_function" or known is None or isinstance(known, Weight):
                continue
            sources = [n for n in node.all_input_nodes if n in walk.values]
            if all(removal.empty(part) for part in parts(known)):
                status[node] = "empty"
                continue
            operation = operation_of(node.target) if node in steps else None
            lost = any(status.get(source) == "empty" for source in sources)
            sums = node in reading or isinstance(operation, Contraction)
            fixed = all(status.get(n) == "constant" or n.op == "get_attr" for n in sources)
            constant = any(status.get(source) == "constant" for source in sources)
            if (constant and fixed) or (lost and sums):
                status[node] = "constant"
        return status

    # -- the graph, rewritten --------------------------------------------------------------------

    def as_graph(
        self, masks: dict[str, Tensor], report: dict[str, Any], folded: list[_Fold]
    ) -> nn.Module:
        """The network's graph with the numbers of what is left, as a module."""
        graph = self.captured.graph
        root: dict[str, Any] = dict(self.captured.tensors)
        names = {node: self._name(node) for node in graph.nodes if node.op == "get_attr"}
        constants = self._constants()
        for step in self.analysis.steps:
            inside = step.node not in self.analysis.outside and step.node != self.analysis.anchor
            call = None
            if inside and not self.status.get(step.node):
                call = self.removal.rewritten(step, operation_of(step.node.target))
            if call is not None:
                step.node.target, step.node.args, step.node.kwargs = call
        for read in self.walk.reads:
            if read.bias in self.biases and not self.status.get(read.node):
                with graph.inserting_before(read.node):
                    names[bias := graph.get_attr(read.bias)] = read.bias
                read.node.args = (*read.node.args[:2], bias, *read.node.args[3:])
        for node, name in names.items():
            if name in self.cut:
                value = self.cut[name]
                frozen = self.graph.ungrouped.get(name, "").startswith("frozen")
                trained = name in self.walk.parameters or name in self.biases
                root[str(node.target)] = (
                    nn.Parameter(value.contiguous(), value.is_floating_point() and not frozen)
                    if trained
                    else value
                )
        self._replace_constants(constants, masks, root)
        for pair in folded:
            self._fold(pair, root)
            report["folded"].append(pair.norm)
        if not masks["input"].all():
            name = "gather"
            while any(str(target).split(".")[0] == name for target in root):
                name += "_"
            root[name] = self._gather()
            node = self.analysis.anchor
            assert node is not None
            with graph.inserting_after(node):
                gathered = graph.call_module(name, (node,))
            node.replace_all_uses_with(gathered, delete_user_cb=lambda user: user is not gathered)
        for node in reversed(list(graph.nodes)):
            unread = not node.users and node.op not in ("placeholder", "output")
            if unread and (self.status.get(node) or node.op == "get_attr"):
                graph.erase_node(node)
        graph.eliminate_dead_code(changes_something)
        graph.lint()
        used = {str(node.target) for node in graph.nodes if node.op in ("get_attr", "call_module")}
        kept = {name: value for name, value in root.items() if name in used}
        small = fx.GraphModule(kept, graph, class_name=type(self.full).__name__)
        for node in small.graph.nodes:  # of the full network, and large
            node.meta = {}
        return small

    def _name(self, node: fx.Node) -> str:
        tensor = self.captured.tensors.get(str(node.target))
        return self.walk.names.get(id(tensor), str(node.target))

    def _gather(self) -> GatherInputs:
        node = self.analysis.anchor
        assert node is not None
        cut = self.removal.cut(self.walk.values[node])
        assert cut is not None
        return GatherInputs(cut[1], cut[0])

    def _constants(self) -> dict[fx.Node, Tensor]:
        """The values of constant nodes, from the masked network."""
        wanted = {node for node, kind in self.status.items() if kind == "constant"}
        if not wanted:
            return {}
        values: dict[fx.Node, Tensor] = {}
        walk, removal = self.walk, self.removal
        root = {
            target: self.masked.get(walk.names.get(id(tensor), ""), tensor)
            for target, tensor in self.captured.tensors.items()
        }

        class Noting(fx.Interpreter):
            def run_node(self, n: fx.Node) -> Any:
                output = super().run_node(n)
                value = walk.values.get(n)
                if n in wanted and isinstance(value, Value):
                    cut = removal.cut(value)
                    left = output if cut is None else output.index_select(*cut)
                    values[n] = compressed(left)
                return output

        noting = Noting(fx.GraphModule(root, self.captured.graph))
        inputs = self.captured.inputs
        noting.run(*tree_leaves((inputs.args, inputs.kwargs)), enable_io_processing=False)
        self.captured.graph.owning_module = None  # which would have to hold what nodes name
        return values

    def _replace_constants(
        self, constants: Mapping[fx.Node, Tensor], masks: Mapping[str, Tensor], root: dict[str, Any]
    ) -> None:
        """Where a constant meets what is not, put its value, or leave it out if it adds 0."""
        lost = [g for g in self.graph if len(masks[g.name]) and not masks[g.name].any()]
        steps = {step.node: step for step in self.analysis.steps}
        graph = self.captured.graph
        for number, (node, value) in enumerate(constants.items()):
            users = [user for user in node.users if not self.status.get(user)]
            for user in users:
                step = steps.get(user)
                operation = None if step is None else operation_of(user.target)
                if step is None or not isinstance(operation, Elementwise) or len(value) > 1:
                    raise ValueError(
                        _nothing_left(f"layer {lost[0].name!r}", lost[0].size)
                        if lost
                        else f"{node.target!r} would read no units, and {user.target!r} needs it"
                    )
                others = [source for source in user.all_input_nodes if source is not node]
                adds = str(user.target).startswith(("aten.add.", "aten.add_."))
                same = others and self.walk.value(others[0]).shape == step.shape
                if adds and same and not value.any():
                    user.replace_all_uses_with(others[0])
                    graph.erase_node(user)
                    continue
                name = f"constant_{number}"
                root[name] = value
                with graph.inserting_before(user):
                    user.replace_input_with(node, graph.get_attr(name))

    def _fold(self, pair: _Fold, root: dict[str, Any]) -> None:
        """A normalisation goes, and its layer has other weights."""
        weight, bias = pair.fused(self.cut, self.captured.tensors)
        layer, norm = pair.layer_node, pair.norm_node
        root[pair.weight] = nn.Parameter(weight)
        name = pair.bias or f"{pair.weight.removesuffix('weight')}bias"
        root[name] = nn.Parameter(bias)
        with self.captured.graph.inserting_before(layer):
            node = self.captured.graph.get_attr(name)
        layer.args = (*layer.args[:2], node, *layer.args[3:])
        norm.replace_all_uses_with(layer)
        self.captured.graph.erase_node(norm)


# -- the network's own class ---------------------------------------------------------------------


def _own_class(
    work: _Compaction,
    masks: Mapping[str, Tensor],
    report: dict[str, Any],
    reference: _Reference,
    folded: list[_Fold],
) -> nn.Module:
    """The network itself with narrower layers.

    Raises:
        _Obstacle: where its code does not allow that.
    """
    lost = [name for name, mask in masks.items() if len(mask) and not mask.any()]
    if work.status or lost:
        raise _Obstacle(
            f"{report['branches'][0]!r} reads nothing any more"
            if report["branches"]
            else f"nothing is left of {lost[0]!r}"
            if lost
            else "a branch is empty"
        )
    gathers = not masks["input"].all()
    if gathers and _place_in(work) is None:
        raise _Obstacle("input features go that lie in no dimension between two of its modules")
    tried = []
    for some in _attempts(list(_sizes(work))):
        small = copy.deepcopy(work.full)
        try:
            _cut_in_place(work, small, some)
            if gathers:
                small = _gathering(work, small)
            for pair in folded:
                pair.in_place(small, work.graph)
            difference = reference.difference(small)
        except Exception as error:  # whatever code says that insists on other sizes
            tried.append(
                f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
            )
            continue
        if difference <= AGREEMENT:
            report["folded"] = [pair.norm for pair in folded]
            return small
        tried.append(f"its outputs differ by {difference:.2g} of their size")
    raise _Obstacle(f"the code of {type(work.full).__name__} does not fit fewer units: {tried[0]}")


def _cut_in_place(work: _Compaction, small: nn.Module, sizes: tuple[_Size, ...]) -> None:
    for step in work.analysis.steps:
        _fit(work, small, step)
    for name, value in work.cut.items():
        owner, _, leaf = name.rpartition(".")
        module = small.get_submodule(owner)
        if name in work.walk.parameters or name in work.biases:
            if not hasattr(module, leaf):
                raise _Obstacle(f"{name!r} would be a new parameter")
            _place(small, work.graph, name, value)
        elif leaf in module._buffers:
            module._buffers[leaf] = value
        elif value.shape != work.captured.tensors[name].shape:
            raise _Obstacle(f"{name!r} is made by its code")
    for module in small.modules():
        _fit_to_parameters(module)
    for size in sizes:
        size.set(small)
    for path, module in list(small.named_modules()):
        if type(module) is nn.MultiheadAttention and path:
            rows = module.in_proj_weight
            if rows is not None and len(rows) != 3 * module.embed_dim:
                narrow = NarrowAttention(module, len(rows) // 3 // module.head_dim).eval()
                owner, _, leaf = path.rpartition(".")
                setattr(small.get_submodule(owner), leaf, narrow)


def _fit(work: _Compaction, small: nn.Module, step: Step) -> None:
    """Numbers of groups and of normalised channels, which no parameter need tell."""
    operation = operation_of(step.node.target)
    if operation is None or not {"num_groups", "groups", "running_mean"} & set(step.given):
        return
    try:
        module: Any = small.get_submodule(step.layer)
    except AttributeError:
        return
    left = work.removal.left_shape(work.walk.values[step.node])[1]
    changed = operation.shrunk(step, work.removal) or {}
    if isinstance(module, nn.GroupNorm):
        module.num_channels = left
        module.num_groups = changed.get("num_groups", module.num_groups)
    elif isinstance(module, nn.modules.conv._ConvNd):
        module.groups = changed.get("groups", module.groups)
    elif isinstance(module, nn.modules.batchnorm._NormBase):
        module.num_features = left


def _fit_to_parameters(module: Any) -> None:
    """Set a module's sizes to those of its parameters."""
    weight: Any = getattr(module, "weight", None)
    if isinstance(module, nn.Linear) and isinstance(weight, Tensor):
        module.out_features, module.in_features = weight.shape
    elif isinstance(module, nn.modules.conv._ConvNd) and isinstance(weight, Tensor):
        rows, columns = weight.shape[:2]
        columns *= module.groups
        if module.transposed:
            rows, columns = weight.shape[0], weight.shape[1] * module.groups
            module.in_channels, module.out_channels = rows, columns
        else:
            module.out_channels, module.in_channels = rows, columns
    elif isinstance(module, nn.PReLU):
        module.num_parameters = module.weight.numel()
    elif isinstance(module, nn.Embedding):
        module.embedding_dim = module.weight.shape[1]
    elif isinstance(module, nn.RNNBase) and not module.proj_size:
        recurrent: Any = module.weight_hh_l0
        incoming: Any = module.weight_ih_l0
        module.hidden_size = recurrent.shape[1]
        module.input_size = incoming.shape[1]
        module._init_flat_weights()


COUNTED = re.compile(
    r"head|channel|feature|hidden|embed|width|inner|size|dim|planes|groups|split|n_"
)
NOT_COUNTED = re.compile(
    r"kernel|patch|image|window|vocab|head_dim|head_size|stride|layer|eps|drop"
)


ATTEMPTS = 12


@dataclass(frozen=True)
class _Size:
    """An attribute of a module that counts units.

    sure: whether an operation of this module had the old number for an argument.
    """

    path: str
    name: str
    old: Any
    new: Any
    sure: bool

    @property
    def kind(self) -> tuple[str, str]:
        """The same for layers that stand in the same place of their blocks."""
        return self.path.rpartition(".")[2], self.name

    def set(self, net: nn.Module) -> None:
        setattr(net.get_submodule(self.path), self.name, self.new)


def _sizes(work: _Compaction) -> Iterator[_Size]:
    """Attributes that count what has become less, where one can tell to how many.

    They are found by their values, in the modules whose parameters are cut or whose operations
    have other arguments; whether they are the right ones is seen when the network is run.
    """
    changes: dict[str, dict[int, set[int]]] = defaultdict(lambda: defaultdict(set))
    sure: set[tuple[str, int]] = set()

    def note(path: str, old: Any, new: Any) -> None:
        for a, b in zip(tree_leaves(old), tree_leaves(new), strict=False):
            if type(a) is int and type(b) is int and a != b:
                changes[path][a].add(b)

    paths = {path for path, _ in work.full.named_modules()}
    for step in work.analysis.steps:
        inside = step.node not in work.analysis.outside and step.node is not work.analysis.anchor
        call = work.removal.rewritten(step, operation_of(step.node.target)) if inside else None
        if call is None or step.layer not in paths:
            continue
        note(
            step.layer,
            [a for a in step.node.args if not isinstance(a, fx.Node)],
            [a for a in call[1] if not isinstance(a, fx.Node)],
        )
        sure |= {(step.layer, old) for old in changes[step.layer]}
        if call[0] is not step.node.target:  # a split has one size, or one for each part
            sizes = call[1][1]
            if len(set(sizes)) == 1:
                for old in [a for a in step.node.args[1:2] if type(a) is int and a > len(sizes)]:
                    changes[step.layer][old] = {sizes[0]}
                    sure.add((step.layer, old))
    for group in work.graph:
        left = int(work.removal.stays(work.units[group.name]).sum())
        for part in (*group.writers, *group.readers):
            owner = part.parameter.rpartition(".")[0]
            for path in {owner, owner.rpartition(".")[0]} & paths:
                before, after = (
                    work.graph.shapes.get(part.parameter),
                    work.cut[part.parameter].shape,
                )
                note(path, group.size, left)
                note(path, [group.size * part.block], [left * part.block])
                if before is not None:
                    note(path, list(before), list(after))
    for path, by_old in changes.items():
        for name, value in vars(work.full.get_submodule(path)).items():
            counts = COUNTED.search(name) and not NOT_COUNTED.search(name)
            if type(value) is int and len(by_old.get(value, ())) == 1:
                (new,), certain = by_old[value], (path, value) in sure
                if counts or certain:
                    yield _Size(path, name, value, new, certain)
            elif isinstance(value, tuple) and all(type(v) is int for v in value):
                new_tuple = tuple(
                    next(iter(by_old[v])) if len(by_old.get(v, ())) == 1 else v for v in value
                )
                if new_tuple != value:
                    yield _Size(path, name, value, new_tuple, True)


def _attempts(sizes: list[_Size]) -> Iterator[tuple[_Size, ...]]:
    """Attributes to set: all of them, all but those of one name, the sure ones, none."""
    kinds = dict.fromkeys(size.kind for size in sizes)
    some = [tuple(sizes), *(tuple(s for s in sizes if s.kind != kind) for kind in kinds)]
    some = [*some[:ATTEMPTS], tuple(size for size in sizes if size.sure), ()]
    yield from dict.fromkeys(some)


def _place_in(work: _Compaction) -> str | None:
    """The child of an nn.Sequential at whose output the input's units lie; "" for the input."""
    node = work.analysis.anchor
    if node is None:
        return None
    if node.op == "placeholder":
        return ""
    step = next(step for step in work.analysis.steps if step.node is node)
    return step.layer if step.layer in work.full._modules else None


def _gathering(work: _Compaction, small: nn.Module) -> nn.Module:
    """The sequence with a :class:`GatherInputs` where the input's units lie in one dimension."""
    name = "gather"
    while hasattr(small, name):
        name += "_"
    children, child = list(small.named_children()), _place_in(work)
    place = 0 if not child else 1 + [path for path, _ in children].index(child)
    children.insert(place, (name, work._gather()))
    return nn.Sequential(OrderedDict(children)).eval()


# -- normalisations that go into the layer before them ---------------------------------------------


@dataclass(frozen=True)
class _Fold:
    """A batch normalisation behind a layer that nobody else reads, both used once."""

    norm: str
    weight: str
    bias: str | None
    layer_node: fx.Node
    norm_node: fx.Node
    parts: tuple[str | None, ...]
    eps: float
    transposed: bool

    def fused(
        self, tensors: Mapping[str, Tensor], others: Mapping[str, Tensor]
    ) -> tuple[Tensor, Tensor]:
        def get(name: str | None) -> Any:
            if name is None:
                return None
            return tensors[name] if name in tensors else others[name]

        scale, shift, mean, variance = (get(name) for name in self.parts)
        weight, bias = get(self.weight), get(self.bias)
        fuse: Any = fuse_linear_bn_weights if weight.ndim == 2 else fuse_conv_bn_weights
        more = {} if weight.ndim == 2 else {"transpose": self.transposed}
        fused: tuple[Tensor, Tensor] = fuse(
            weight, bias, mean, variance, self.eps, scale, shift, **more
        )
        return fused

    def in_place(self, net: nn.Module, graph: Graph) -> None:
        own = dict(net.named_parameters()) | dict(net.named_buffers())
        weight, bias = self.fused(own, own)
        _place(net, graph, self.weight, weight.detach())
        _place(net, graph, f"{self.weight.removesuffix('weight')}bias", bias.detach())
        owner, _, leaf = self.norm.rpartition(".")
        module = net.get_submodule(self.norm)
        if not isinstance(module, nn.modules.batchnorm._BatchNorm):
            raise _Obstacle(f"{self.norm!r} is no batch normalisation of torch")
        setattr(net.get_submodule(owner), leaf, nn.Identity())


def _foldable(work: _Compaction) -> Iterator[_Fold]:
    """Batch normalisations whose normalised dimension is that of the layer before them."""
    steps = {step.node: step for step in work.analysis.steps}
    for step in work.analysis.steps:
        if not str(step.node.target).startswith("aten.batch_norm"):
            continue
        source = step.given["input"]
        before = steps.get(source)
        if before is None or len(source.users) > 1 or work.status.get(source):
            continue
        kind = str(source.target).removeprefix("aten.").partition(".")[0]
        groups = before.given.get("groups", 1)
        linear = kind == "linear" and len(step.shape) == 2
        conv = kind.startswith("conv") and not (kind.startswith("conv_t") and groups > 1)
        if not (linear or conv):
            continue
        nodes = [before.given["weight"], before.given.get("bias")]
        nodes += [step.given[n] for n in ("weight", "bias", "running_mean", "running_var")]
        once = all(
            node is None or (node.op == "get_attr" and len(node.users) == 1) for node in nodes
        )
        if not once or step.given["running_mean"] is None:
            continue
        names = [None if node is None else work._name(node) for node in nodes]
        weight, bias = names[0], names[1]
        assert weight is not None
        if not weight.endswith("weight"):
            continue
        if bias is None and f"{weight.removesuffix('weight')}bias" in work.biases:
            bias = f"{weight.removesuffix('weight')}bias"
        yield _Fold(
            step.layer, weight, bias, source, step.node, tuple(names[2:]),
            step.number("eps"), kind.startswith("conv_t"),
        )  # fmt: skip


# -- what it must equal --------------------------------------------------------------------------


class _Reference:
    """The masked network's outputs on examples, in double precision where its code allows that."""

    def __init__(
        self,
        full: nn.Module,
        graph: Graph,
        masked: Mapping[str, Tensor],
        masks: Mapping[str, Tensor],
        inputs: Inputs,
        output: Output | None,
    ) -> None:
        self.output = output
        net = copy.deepcopy(full)
        for name, value in masked.items():
            if name not in graph.aliases:
                _place(net, graph, name, value)
        gate = masks["input"]

        def gated(value: Tensor) -> Tensor:
            return graph.gate_inputs(value, gate.to(value))

        self.inputs, self.double = inputs.map(_doubled), True
        try:
            self.expected = self._run(
                net.double(), self.inputs.map(gated) if not gate.all() else self.inputs
            )
        except Exception:  # code that names a type
            self.inputs, self.double = inputs, False
            net = copy.deepcopy(full)
            for name, value in masked.items():
                if name not in graph.aliases:
                    _place(net, graph, name, value)
            self.expected = self._run(net, inputs.map(gated) if not gate.all() else inputs)

    def _run(self, net: nn.Module, inputs: Inputs) -> list[Tensor]:
        with evaluating(net):
            outputs = inputs.call(net)
        return [value.double() for value in tensors_of(outputs, self.output)]

    def difference(self, small: nn.Module) -> float:
        """The largest difference of an output, relative to the largest of its entries."""
        net = copy.deepcopy(small).double() if self.double else small
        found = self._run(net, self.inputs)
        if [v.shape for v in found] != [v.shape for v in self.expected]:
            raise ValueError("outputs of other shapes")
        apart = 0.0
        for given, expected in zip(found, self.expected, strict=True):
            if expected.numel():
                same = (given == expected) | (given.isnan() & expected.isnan())
                gap = (given - expected).abs().masked_fill(same, 0)
                finite = expected[expected.isfinite()].abs()
                size = float(finite.max()) if len(finite) else 1.0
                apart = (
                    max(apart, float(gap.max()) / max(size, 1e-12))
                    if not gap.isnan().any()
                    else float("inf")
                )
        return apart


def _doubled(value: Tensor) -> Tensor:
    return value.double() if value.is_floating_point() else value


def tensors_of(outputs: Any, output: Output | None) -> list[Tensor]:
    """What of a network's outputs has to be the same."""
    if output is not None and not isinstance(outputs, Tensor):
        return [output(outputs)]
    found = [value for value in tree_leaves(outputs) if isinstance(value, Tensor)]
    return [value for value in found if value.is_floating_point()]


def equivalence(
    net: nn.Module,
    graph: Graph,
    parameters: Mapping[str, Tensor],
    keep: Mapping[str, Tensor],
    small: nn.Module,
    inputs: Any,
    output: Output | None = None,
) -> float:
    """Largest absolute difference between the masked network's and the compact one's output.

    Args:
        net: the full network, with ``graph``, ``parameters`` and ``keep`` as in
            :func:`compact_network`; units that ``align`` has readmitted are taken from ``small``.
        small: what that returned.
        inputs: what the network is called with, where it is.
        output: which of several outputs.
    """
    net = without_weight_norm(net)
    given, keep = Inputs.of(net, inputs), readmitting(keep, small)
    gate = graph.check_keep(keep)["input"]
    gated = given
    if not gate.all():
        gated = given.map(lambda value: graph.gate_inputs(value, gate.to(value)))
    with evaluating(net), evaluating(small):
        parameters = graph.masked_parameters(parameters, keep)
        masked = functional_call(net, parameters, gated.args, gated.kwargs)
        compact = given.map(lambda value: value.cpu()).call(small)
        pairs = zip(tensors_of(masked, output), tensors_of(compact, output), strict=True)
        return max(float((a.cpu() - b).abs().max()) for a, b in pairs if a.numel())


def readmitting(keep: Mapping[str, Tensor], small: nn.Module) -> dict[str, Tensor]:
    """The masks together with the units that ``align`` has brought back into a compact network."""
    masks = {name: mask.clone() for name, mask in keep.items()}
    report: Any = getattr(small, "compaction", {})
    for name, units in report.get("readmitted", {}).items():
        masks[name][units] = True
    return masks
