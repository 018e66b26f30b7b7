"""Which units of a torch network can be removed together, found by ``torch.fx``.

A *group* is all parameters that live and die with one unit: the unit's row in every layer that
writes it, with the scale and shift of the normalisations that follow, and its columns in the layers
that read it. :func:`groups` follows a network's graph, one rule an operation
(:mod:`pyro_sparse.graph.rules`), with a label on every entry of every value
(:mod:`pyro_sparse.graph.units`). What no rule covers is never guessed: the units that it touches
are marked as not prunable, with the reason (:func:`explain`).
"""

from __future__ import annotations

from torch import Tensor, nn

from .picture import draw
from .structure import Graph, Group, ParameterSlice, ReaderSlice
from .trace import UntraceableError, evaluating, groups, trace

__all__ = [
    "Graph",
    "Group",
    "ParameterSlice",
    "ReaderSlice",
    "UntraceableError",
    "draw",
    "evaluating",
    "explain",
    "groups",
    "trace",
]


def explain(net: nn.Module, example: Tensor | tuple[Tensor, ...]) -> str:
    """A table of a network's groups, and of what cannot be pruned and why; see :func:`groups`."""
    return groups(net, example).explain()
