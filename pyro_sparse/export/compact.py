"""The physically smaller network: rows and columns of excluded units cut out, exactly.

An excluded unit of the *masked* network has an all-zero row, so it emits f(0) through whatever f
lies between it and its readers. Where f(0) = 0 its columns can go. Otherwise columns times f(0)
move into the readers' biases, or, before zero padding (which a bias cannot imitate at the borders),
one excluded unit stays and its columns are the sum of all excluded ones'. A layer that reads no
unit any more emits its bias: a residual branch becomes a constant, or goes. Either way the compact
network computes what the masked one does, up to rounding.
"""

from __future__ import annotations

import copy
from collections import OrderedDict, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.func import functional_call
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval

from pyro_sparse.graph import Graph, Group, evaluating, trace
from pyro_sparse.graph.functions import layers_of_functions
from pyro_sparse.graph.removal import Removal
from pyro_sparse.graph.rules import Step, elementwise, rule_of
from pyro_sparse.graph.trace import Analysis, analyse
from pyro_sparse.graph.units import Value, compressed
from pyro_sparse.nets.attention import Attention

__all__ = ["GatherInputs", "compact_network", "equivalence"]


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
) -> nn.Module:
    """The network with the kept units only, on the CPU and in eval mode.

    It takes the same inputs as ``net``; where input features are dropped, it begins with a
    :class:`GatherInputs`. It is of ``net``'s class where removing rows and columns is enough, a
    ``torch.fx.GraphModule`` where the forward pass had to be rewritten.

    Its attribute ``compaction``, in JSON's types, says what went:

    * ``"kept"``: for every group, the indices in ``net`` of its units that are left;
    * ``"removed"``: for the groups that lost any, the indices of these;
    * ``"constant"``: for groups with some, the indices of excluded units that stay, to emit a
      constant (see the module's text);
    * ``"readmitted"``: the indices of units that ``align`` brought back;
    * ``"branches"``: layers that read nothing any more, and became a constant or went;
    * ``"folded"``: normalisations that went into the layer before them;
    * ``"align"``.

    :param net: the full network; not changed.
    :param graph: its groups.
    :param parameters: values by name; the network's own for those not mentioned.
    :param keep: boolean masks ``(units,)`` by group; groups not mentioned keep all units.
    :param align: bring units back until each layer's width is a multiple of this (4, 8 or 16),
        those of highest score first.
    :param scores: ``(units,)`` by group; norms of the rows for groups not mentioned.
    :param fold: let batch normalisations go into the linear layer or convolution before them.
    :raises ValueError: for masks that leave the network constant or that
        :meth:`~pyro_sparse.graph.Graph.check_keep` refuses; for parameters of other names or
        shapes; for an ``align`` below 1.
    """
    if align is not None and align < 1:
        raise ValueError(f"expected align, the multiple of widths, to be at least 1, got {align}")
    masks = graph.check_keep(keep)
    if len(masks["input"]) and not masks["input"].any():
        raise ValueError(_nothing_left("the input", len(masks["input"])))
    small = copy.deepcopy(net).cpu().eval()
    tensors = _parameters(small, graph, parameters)
    for name, value in tensors.items():
        _place(small, graph, name, value)
    work = _Compaction(small, graph, tensors)
    readmitted = work.align(masks, align, scores or {}) if align else {}
    report: dict[str, Any] = {
        "kept": _indices(masks),
        "removed": {n: i for n, i in _indices({n: ~m for n, m in masks.items()}).items() if i},
        "constant": {},
        "readmitted": readmitted,
        "branches": [],
        "folded": [],
        "align": align,
    }
    small = work.carry_out(masks, report)
    if fold:
        small = _fold_normalisations(small, report)
    small.compaction = report  # type: ignore[assignment]
    return small.eval()


def _indices(masks: Mapping[str, Tensor]) -> dict[str, list[int]]:
    return {name: mask.nonzero().squeeze(1).tolist() for name, mask in masks.items()}


def _nothing_left(what: str, units: int) -> str:
    return (
        f"{what} would keep none of its {units} units, which leaves the network constant: lower "
        "the threshold of the selection rule or take a rule that keeps at least one unit, or train "
        "again with a larger prior inclusion probability or for fewer epochs"
    )


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


@dataclass
class _Compaction:
    """A network that is being made smaller.

    small: a copy of the network, to be changed.
    tensors: its parameters.
    """

    small: nn.Module
    graph: Graph
    tensors: dict[str, Tensor]

    def __post_init__(self) -> None:
        types = [value.dtype for value in self.tensors.values() if value.is_floating_point()]
        examples = tuple(
            torch.zeros(shape, dtype=types[0] if types and dtype.is_floating_point else dtype)
            for shape, dtype in self.graph.example
        )
        self.examples = examples
        self.traced = trace(self.small)
        self.analysis: Analysis = analyse(self.small, self.traced, examples)
        self.walk = self.analysis.walk
        self.units = {group.name: self._units(group) for group in self.graph}
        self.needs = self._needs_a_constant()
        self.changed = False

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

    # -- constants -------------------------------------------------------------------------------

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

    # -- widths ----------------------------------------------------------------------------------

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
            block = group.writers[0].block
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

    # -- removal ---------------------------------------------------------------------------------

    def carry_out(self, masks: dict[str, Tensor], report: dict[str, Any]) -> nn.Module:
        """Remove what the masks exclude."""
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
        self.tensors = self.graph.masked_parameters(self.tensors, masks)
        for name, value in self.tensors.items():
            _place(self.small, self.graph, name, value)
        stand_ins = self._stand_ins(masks)
        for group in self.graph:
            units = self.units[group.name].tolist()
            stay = sorted(units.index(u) for u in set(stand_ins.values()) & set(units))
            if stay:
                report["constant"][group.name] = stay
        gone = sorted(set(excluded) - set(stand_ins.values()))
        removal = Removal(self.walk, torch.tensor(gone, dtype=torch.int64))
        status = self._status(removal)
        constants = self._constants(removal, status)
        report["branches"] = [
            str(step.node.target)
            for step in self.analysis.steps
            if status.get(step.node) == "constant" and self._reads(step)
        ]
        self._move_columns(set(excluded), stand_ins)
        self._cut(removal)
        self._fit_modules(removal, status)
        self._rewrite(removal, status)
        self._replace_constants(status, constants, masks)
        small = self.small
        if not masks["input"].all():
            small = self._gather(removal)
        if self.changed:
            self._erase(status)
            self.traced.graph.lint()
            small = fx.GraphModule(self.traced, self.traced.graph)
        return small.eval()

    def _move_columns(self, excluded: set[int], stand_ins: Mapping[int, int]) -> None:
        """Move what excluded units emit into the reader's bias, or onto the one that stays."""
        done = set()
        for read in self.walk.reads:
            if (read.name, read.dim) in done:
                continue
            done.add((read.name, read.dim))
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
                bias = _bias(read.name)
                before = self.tensors.get(bias, weight.new_zeros(outputs))
                self.tensors[bias] = (before.double() + constants[folded] @ summed).to(before)

    def _cut(self, removal: Removal) -> None:
        """Cut parameters and buffers."""
        cuts: dict[str, dict[int, Tensor]] = defaultdict(dict)
        for use in self.walk.uses:
            cuts[use.name][use.dim] = removal.stays(use.labels).nonzero().squeeze(1)
        for name, value in self.tensors.items():
            known = name in self.graph.shapes or name in self.graph.ungrouped
            for dim, entries in cuts[name].items():
                value = value.index_select(dim, entries)
            if not known:  # a bias that the folding has made is cut as its layer's weight
                weight = _weight(name)
                if 0 in cuts[weight]:
                    value = value.index_select(0, cuts[weight][0])
            _place(self.small, self.graph, name, value)
        for use in {use.name: use for use in self.walk.uses}.values():
            if use.kind == "buffer":
                value = _own(self.small, use.name).index_select(use.dim, cuts[use.name][use.dim])
                owner, _, leaf = use.name.rpartition(".")
                self.small.get_submodule(owner)._buffers[leaf] = value
        # The graph holds copies of what it uses directly.
        for node in self.traced.graph.nodes:
            if node.op == "get_attr":
                owner, _, leaf = str(node.target).rpartition(".")
                setattr(self.traced.get_submodule(owner), leaf, _own(self.small, str(node.target)))
        for path, names in layers_of_functions(self.traced).items():
            layer = self.traced.get_submodule(path)
            for leaf, name in names.items():
                if name in self.tensors or leaf in layer._buffers:
                    setattr(layer, leaf, _own(self.small, name))
            self.changed = True

    def _fit_modules(self, removal: Removal, status: Mapping[fx.Node, str]) -> None:
        """The modules' own record of their sizes."""
        done = set()
        for step in self.analysis.steps:
            module = step.module
            if module is None or id(module) in done or status.get(step.node):
                continue
            done.add(id(module))
            value = self.walk.values[step.node]
            if isinstance(module, nn.MultiheadAttention):
                if self._reads(step):
                    self._fit_attention(str(step.node.target), module)
            elif isinstance(value, Value):
                _fit(module, removal.left_shape(value))

    def _fit_attention(self, name: str, module: nn.MultiheadAttention) -> None:
        """Torch's attention cannot have fewer heads at the same width, nor be written: ours can."""
        rows, columns = module.in_proj_weight.shape
        out = module.out_proj
        inner = rows // 3
        small = Attention(
            columns,
            inner // module.head_dim,
            module.head_dim,
            outputs=len(out.weight),
            batch_first=module.batch_first,
        ).to(out.weight)
        biases = [None] * 3 if module.in_proj_bias is None else module.in_proj_bias.chunk(3)
        parts = (small.query, small.key, small.value)
        for layer, weight, bias in zip(parts, module.in_proj_weight.chunk(3), biases, strict=True):
            layer.weight = nn.Parameter(weight.clone())
            layer.bias = None if bias is None else nn.Parameter(bias.clone())
        small.out.weight, small.out.bias = out.weight, out.bias
        for node in self.traced.graph.nodes:
            if node.op == "call_module" and node.target == name:
                node.kwargs = {}
        owner, _, leaf = name.rpartition(".")
        for root in (self.small, self.traced):
            setattr(root.get_submodule(owner), leaf, small)
        self.changed = True

    def _rewrite(self, removal: Removal, status: Mapping[fx.Node, str]) -> None:
        for step in self.analysis.steps:
            inside = step.node not in self.analysis.outside and step.node != self.analysis.anchor
            if not inside or status.get(step.node):
                continue
            call = removal.rewritten(step)
            if call is not None:
                node = step.node
                node.op, node.target = call.op, call.target
                node.args, node.kwargs = call.args, call.kwargs
                self.changed = True

    # -- branches that read nothing --------------------------------------------------------------

    def _reads(self, step: Step) -> bool:
        """Whether a node reads columns of a weight."""
        return any(read.node is step.node for read in self.walk.reads)

    def _status(self, removal: Removal) -> dict[fx.Node, str]:
        """Nodes of which nothing is left, ``"empty"``, or that are ``"constant"`` now."""
        status: dict[fx.Node, str] = {}
        for step in self.analysis.steps:
            node = step.node
            found = self.walk.values[node]
            parts = found if isinstance(found, tuple) else (found,)
            sources = [status.get(source) for source in _tensor_nodes(node, self.walk)]
            fixed = [
                status.get(source) == "constant" or source.op == "get_attr"
                for source in _tensor_nodes(node, self.walk)
            ]
            if all(removal.empty(part) for part in parts if isinstance(part, Value)):
                status[node] = "empty"
                continue
            reads_nothing = "empty" in sources or self._blind(step, removal)
            if ("constant" in sources and all(fixed)) or (reads_nothing and self._reads(step)):
                status[node] = "constant"
        return status

    def _blind(self, step: Step, removal: Removal) -> bool:
        """Whether an attention has lost all its heads."""
        if not isinstance(step.module, nn.MultiheadAttention):
            return False
        heads = [read.labels for read in self.walk.reads if read.node is step.node]
        return bool(heads) and not removal.stays(heads[-1]).any()

    def _constants(self, removal: Removal, status: Mapping[fx.Node, str]) -> dict[fx.Node, Tensor]:
        """The values of constant nodes, from the masked network."""
        wanted = {node for node, kind in status.items() if kind == "constant"}
        if not wanted:
            return {}
        values: dict[fx.Node, Tensor] = {}
        walk = self.walk

        class Noting(fx.Interpreter):
            def run_node(self, n: fx.Node) -> Any:
                output = super().run_node(n)
                value = walk.values.get(n)
                if n in wanted and isinstance(value, Value):
                    cut = removal.cut(value)
                    left = output if cut is None else output.index_select(*cut)
                    values[n] = compressed(left)
                return output

        Noting(self.traced).run(*self.examples)
        return values

    def _replace_constants(
        self,
        status: Mapping[fx.Node, str],
        constants: Mapping[fx.Node, Tensor],
        masks: Mapping[str, Tensor],
    ) -> None:
        """Where a constant meets what is not, put its value, or leave it out if it adds 0."""
        lost = [g for g in self.graph if len(masks[g.name]) and not masks[g.name].any()]
        steps = {step.node: step for step in self.analysis.steps}
        for number, (node, value) in enumerate(constants.items()):
            users = [user for user in node.users if not status.get(user)]
            for user in users:
                step = steps.get(user)
                if step is None or rule_of(user, step.module) is not elementwise or len(value) > 1:
                    raise ValueError(
                        _nothing_left(f"layer {lost[0].name!r}", lost[0].size)
                        if lost
                        else f"{node.target!r} would read no units, and {user.target!r} needs it"
                    )
                others = [source for source in user.all_input_nodes if source is not node]
                adds = str(getattr(user.target, "__name__", user.target)) in ("add", "iadd", "add_")
                same = others and self.walk.values[others[0]].shape == step.shape
                self.changed = True
                if adds and same and not value.any():
                    user.replace_all_uses_with(others[0])
                    self.traced.graph.erase_node(user)
                    continue
                name = f"constant_{number}"
                self.traced.register_buffer(name, value)
                with self.traced.graph.inserting_before(user):
                    user.replace_input_with(node, self.traced.graph.get_attr(name))

    def _erase(self, status: Mapping[fx.Node, str]) -> None:
        """Erase what is empty or constant, and numbers that nobody asks for any more."""
        for node in reversed(list(self.traced.graph.nodes)):
            if node.users or node.op in ("placeholder", "output"):
                continue
            if status.get(node) or node in self.walk.numbers or node.op == "get_attr":
                self.traced.graph.erase_node(node)

    # -- inputs ----------------------------------------------------------------------------------

    def _gather(self, removal: Removal) -> nn.Module:
        """Insert a :class:`GatherInputs` where the input's units first lie in one dimension."""
        node = self.analysis.anchor
        assert node is not None
        cut = removal.cut(self.walk.values[node])
        assert cut is not None
        gather = GatherInputs(cut[1], cut[0])
        small, name = self.small, "gather"
        while hasattr(small, name):
            name += "_"
        in_sequence = node.op == "placeholder" or str(node.target) in small._modules
        if type(small) is nn.Sequential and in_sequence and not self.changed:
            children = list(small.named_children())
            place = 0
            if node.op != "placeholder":
                place = 1 + [child for child, _ in children].index(str(node.target))
            children.insert(place, (name, gather))
            return nn.Sequential(OrderedDict(children)).eval()
        self.traced.add_submodule(name, gather)
        with self.traced.graph.inserting_after(node):
            gathered = self.traced.graph.call_module(name, (node,))
        node.replace_all_uses_with(gathered, delete_user_cb=lambda user: user is not gathered)
        self.changed = True
        return self.traced


def _tensor_nodes(node: fx.Node, walk: Any) -> list[fx.Node]:
    return [source for source in node.all_input_nodes if source in walk.values]


def _bias(weight: str) -> str:
    """The bias of the same module: of ``weight``, or of an attention's ``in_proj_weight``."""
    owner, dot, leaf = weight.rpartition(".")
    return f"{owner}{dot}{leaf.removesuffix('weight')}bias"


def _weight(bias: str) -> str:
    owner, dot, leaf = bias.rpartition(".")
    return f"{owner}{dot}{leaf.removesuffix('bias')}weight"


def _own(net: nn.Module, name: str) -> Tensor:
    owner, _, leaf = name.rpartition(".")
    value = getattr(net.get_submodule(owner), leaf)
    assert isinstance(value, Tensor)
    return value


def _place(net: nn.Module, graph: Graph, name: str, value: Tensor) -> None:
    """Make ``value`` the network's parameter ``name`` (also where that was a buffer)."""
    first = None
    for alias in [name, *(a for a, target in graph.aliases.items() if target == name)]:
        owner, _, leaf = alias.rpartition(".")
        module = net.get_submodule(owner)
        if first is None:
            before = module._parameters.get(leaf)
            trainable = before is None or before.requires_grad
            first = nn.Parameter(value.contiguous(), trainable and value.is_floating_point())
        module._buffers.pop(leaf, None)
        module.__dict__.pop(leaf, None)  # a bias that was set to None
        module._parameters[leaf] = first


def _fit(module: nn.Module, shape: torch.Size) -> None:
    """Set a module's sizes to those of its parameters, or of its output."""
    if isinstance(module, nn.Linear):
        module.out_features, module.in_features = module.weight.shape
    elif isinstance(module, nn.modules.conv._ConvNd):
        rows, columns = module.weight.shape[:2]
        if module.groups > 1:
            whole = module.in_channels if module.transposed else module.out_channels
            module.groups = rows // (whole // module.groups)
        if module.transposed:
            module.in_channels, module.out_channels = rows, columns * module.groups
        else:
            module.out_channels, module.in_channels = rows, columns * module.groups
    elif isinstance(module, nn.GroupNorm):
        together = module.num_channels // module.num_groups
        module.num_channels, module.num_groups = shape[1], shape[1] // together
    elif isinstance(module, nn.modules.batchnorm._NormBase):
        module.num_features = shape[1]
    elif isinstance(module, nn.PReLU):
        module.num_parameters = module.weight.numel()
    elif isinstance(module, nn.Embedding):
        module.embedding_dim = module.weight.shape[1]


def _fold_normalisations(net: nn.Module, report: dict[str, Any]) -> nn.Module:
    """The network with batch normalisations in the layers before them, which nobody else reads."""
    traced = trace(net)
    calls: dict[str, int] = defaultdict(int)
    for node in traced.graph.nodes:
        if node.op == "call_module":
            calls[str(node.target)] += 1
    for node in list(traced.graph.nodes):
        if node.op != "call_module" or not node.args or not isinstance(node.args[0], fx.Node):
            continue
        norm, source = traced.get_submodule(str(node.target)), node.args[0]
        if not isinstance(norm, nn.modules.batchnorm._BatchNorm) or norm.running_mean is None:
            continue
        if source.op != "call_module" or len(source.users) > 1:
            continue
        layer = traced.get_submodule(str(source.target))
        if calls[str(source.target)] > 1 or calls[str(node.target)] > 1:
            continue
        if type(layer) is nn.Linear and type(norm) is nn.BatchNorm1d:
            if len(source.meta.get("shape", ())) == 3:
                continue
            fused: nn.Module = fuse_linear_bn_eval(layer, norm)
        elif isinstance(layer, nn.modules.conv._ConvNd):
            if layer.transposed and layer.groups > 1:
                continue
            fused = fuse_conv_bn_eval(layer, norm, transpose=layer.transposed)
        else:
            continue
        owner, _, leaf = str(source.target).rpartition(".")
        setattr(traced.get_submodule(owner), leaf, fused)
        node.replace_all_uses_with(source)
        traced.graph.erase_node(node)
        report["folded"].append(str(node.target))
    return fx.GraphModule(traced, traced.graph).eval() if report["folded"] else net


def equivalence(
    net: nn.Module,
    graph: Graph,
    parameters: Mapping[str, Tensor],
    keep: Mapping[str, Tensor],
    small: nn.Module,
    inputs: Tensor,
) -> float:
    """Largest absolute difference between the masked network's and the compact one's output.

    :param net: the full network, with ``graph``, ``parameters`` and ``keep`` as in
        :func:`compact_network`; units that ``align`` has readmitted are taken from ``small``.
    :param small: what that returned.
    :param inputs: a batch ``(batch, ...)``, where the network is.
    """
    keep = readmitting(keep, small)
    gate = graph.check_keep(keep)["input"].to(inputs.device)
    gated = inputs if gate.all() else graph.gate_inputs(inputs, gate.to(inputs))
    with evaluating(net), evaluating(small):
        masked = functional_call(net, graph.masked_parameters(parameters, keep), (gated,))
        return float((masked.cpu() - small(inputs.cpu())).abs().max())


def readmitting(keep: Mapping[str, Tensor], small: nn.Module) -> dict[str, Tensor]:
    """The masks together with the units that ``align`` has brought back into a compact network."""
    masks = {name: mask.clone() for name, mask in keep.items()}
    report: Any = getattr(small, "compaction", {})
    for name, units in report.get("readmitted", {}).items():
        masks[name][units] = True
    return masks
