"""The physically smaller network: rows and columns of excluded units cut out, exactly.

An excluded unit of the *masked* network has an all-zero row, so it emits f(0) through whatever f
lies between it and its readers. Where f(0) = 0 its columns can go. Otherwise columns times f(0)
move into the readers' biases, or, before zero padding (which a bias cannot imitate at the borders),
one excluded unit stays and its columns are the sum of all excluded ones'. Either way the compact
network computes what the masked one does, up to rounding.
"""

from __future__ import annotations

import copy
from collections import OrderedDict, defaultdict
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.func import functional_call

from pyro_sparse.graph import Graph, Group, ParameterSlice, ReaderSlice, evaluating, trace

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
) -> nn.Module:
    """The network with the kept units only, on the CPU and in eval mode.

    It takes the same inputs as ``net``; where input features are dropped, it begins with a
    :class:`GatherInputs`. Its attribute ``compaction`` says which units it has: under ``"kept"``,
    for every group, their indices in ``net``; under ``"constant"`` the index of the unit that stays
    as a constant in their midst (see the module's text), for groups with one.

    :param net: the full network; not changed.
    :param graph: its groups.
    :param parameters: values by name; the network's own for those not mentioned.
    :param keep: boolean masks ``(units,)`` by group; groups not mentioned keep all units.
    :raises ValueError: for a layer that would keep no unit; for masks that
        :meth:`~pyro_sparse.graph.Graph.check_keep` refuses; for parameters of other names or
        shapes.
    """
    masks = graph.check_keep(keep)
    for name, mask in masks.items():
        if len(mask) and not mask.any():
            raise ValueError(
                f"{'the input' if name == 'input' else f'layer {name!r}'} would keep none of its "
                f"{len(mask)} units, which leaves the network constant: lower the threshold of the "
                "selection rule or take a rule that keeps at least one unit, or train again with a "
                "larger prior inclusion probability or for fewer epochs"
            )
    small = copy.deepcopy(net).cpu().eval()
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
    tensors = graph.masked_parameters(tensors, masks)

    selections: dict[str, list[tuple[int, Tensor]]] = defaultdict(list)
    constants: dict[str, int] = {}
    for group in graph:
        stays = masks[group.name].clone()
        excluded = ~stays
        if excluded.any():
            if any(reader.constant is None for reader in group.readers):
                constants[group.name] = stand_in = int(excluded.nonzero()[0])
                stays[stand_in] = True
                for reader in group.readers:
                    columns = _by_unit(tensors[reader.parameter], group, reader)
                    columns[stand_in] = columns[excluded].sum(0)
            else:
                for reader in group.readers:
                    _fold(tensors, group, reader, excluded)
            for part in (*group.writers, *group.readers):
                entries = stays.repeat_interleave(part.block).nonzero().squeeze(1)
                selections[part.parameter].append((part.dim, entries))
    for name, value in tensors.items():
        # A bias that the folding has made is cut as its layer's weight.
        weight = name if name in own else _sibling(name, "weight")
        for dim, entries in selections[weight]:
            if name in own or dim == 0:
                value = value.index_select(dim, entries)
        like = own[name] if name in own else own[weight]
        trainable = like.requires_grad or not isinstance(like, nn.Parameter)
        parameter = nn.Parameter(value.to(like.dtype).contiguous(), trainable)
        for alias in [name, *(a for a, first in graph.aliases.items() if first == name)]:
            _set(small, alias, parameter)
    if not masks["input"].all():
        small = _gather_inputs(small, graph["input"], masks["input"])
    small.compaction = {  # type: ignore[assignment]
        "kept": {name: mask.nonzero().squeeze(1).tolist() for name, mask in masks.items()},
        "constant": constants,
    }
    return small


def _by_unit(tensor: Tensor, group: Group, part: ParameterSlice) -> Tensor:
    """A view of a parameter as ``(units, block, ...)``."""
    return tensor.movedim(part.dim, 0).unflatten(0, (group.size, part.block))


def _fold(tensors: dict[str, Tensor], group: Group, reader: ReaderSlice, excluded: Tensor) -> None:
    """Move what excluded units emit into the reader's bias."""
    assert reader.constant is not None
    if not any(reader.constant):
        return
    weight = tensors[reader.parameter]
    columns = _by_unit(weight, group, reader)[excluded].double().sum(0)
    columns = columns.reshape(reader.block, len(weight), -1).sum(2)  # (block, outputs)
    shift = torch.tensor(reader.constant, dtype=torch.float64) @ columns
    bias = _sibling(reader.parameter, "bias")
    before = tensors.get(bias, weight.new_zeros(len(weight)))
    tensors[bias] = (before.double() + shift).to(weight.dtype)


def _sibling(name: str, leaf: str) -> str:
    """Another parameter of the same module."""
    owner, dot, _ = name.rpartition(".")
    return f"{owner}{dot}{leaf}"


def _own(net: nn.Module, name: str) -> Tensor:
    owner, _, leaf = name.rpartition(".")
    value = getattr(net.get_submodule(owner), leaf)
    assert isinstance(value, Tensor)
    return value


def _set(net: nn.Module, name: str, parameter: nn.Parameter) -> None:
    """Make ``parameter`` the network's ``name`` (also where that was a buffer), sizes included."""
    owner, _, leaf = name.rpartition(".")
    module = net.get_submodule(owner)
    module._buffers.pop(leaf, None)
    module._parameters[leaf] = parameter
    if leaf != "weight":
        return
    if isinstance(module, nn.Linear):
        module.out_features, module.in_features = parameter.shape
    elif isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        module.out_channels = parameter.shape[0]
        module.in_channels = parameter.shape[1] * module.groups


def _gather_inputs(net: nn.Module, group: Group, mask: Tensor) -> nn.Module:
    """``net`` with a :class:`GatherInputs` where the input's units first appear."""
    gather = GatherInputs(mask.nonzero().squeeze(1), group.dim)
    traced = trace(net)
    node = next(node for node in traced.graph.nodes if node.name == group.node)
    name = "gather"
    while hasattr(net, name):
        name += "_"
    if type(net) is nn.Sequential and (node.op == "placeholder" or node.target in net._modules):
        children = list(net.named_children())
        place = 0
        if node.op != "placeholder":
            place = 1 + [child for child, _ in children].index(str(node.target))
        children.insert(place, (name, gather))
        return nn.Sequential(OrderedDict(children)).eval()
    traced.add_submodule(name, gather)
    with traced.graph.inserting_after(node):
        gathered = traced.graph.call_module(name, (node,))
    node.replace_all_uses_with(gathered, delete_user_cb=lambda user: user is not gathered)
    traced.recompile()
    return traced.eval()


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
        :func:`compact_network`.
    :param small: what that returned.
    :param inputs: a batch ``(batch, ...)``, where the network is.
    """
    gate = graph.check_keep(keep)["input"].to(inputs)
    gated = inputs if gate.all() else graph.gate_inputs(inputs, gate)
    with evaluating(net), evaluating(small):
        masked = functional_call(net, graph.masked_parameters(parameters, keep), (gated,))
        return float((masked.cpu() - small(inputs.cpu())).abs().max())
