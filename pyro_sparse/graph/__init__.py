"""Which units of a torch network can be removed together, found by ``torch.export``.

A *group* is all parameters that live and die with one unit: the unit's row in every layer that
writes it, with the scale and shift of the normalisations that follow, and its columns in the layers
that read it. :func:`groups` follows the graph of torch's operations that a network runs, one object
an operation (:mod:`pyro_sparse.graph.operations`), with a label on every entry of every value
(:mod:`pyro_sparse.graph.units`). What nobody has described is never guessed: the units that it
touches are marked as not prunable, with the reason (:func:`explain`). :func:`register` describes
operations of one's own.
"""

from __future__ import annotations

from torch import nn

from pyro_sparse.inputs import Example

from ._groups import groups
from .capture import Output, UntraceableError, evaluating, without_weight_norm
from .operations import Elementwise, Mixing, Movement, Operation, Pointwise, register
from .picture import draw
from .structure import Graph, Group, ParameterSlice, ReaderSlice

__all__ = [
    "Elementwise",
    "Graph",
    "Group",
    "Mixing",
    "Movement",
    "Operation",
    "Output",
    "ParameterSlice",
    "Pointwise",
    "ReaderSlice",
    "UntraceableError",
    "draw",
    "evaluating",
    "explain",
    "groups",
    "register",
    "without_weight_norm",
]


def explain(net: nn.Module, example: Example) -> str:
    """A table of a network's groups, and of what cannot be pruned and why; see :func:`groups`."""
    return groups(net, example).explain()
