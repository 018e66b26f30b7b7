"""Which units of a torch network can be removed together, found by ``torch.fx``.

A *group* is all parameters that live and die with one unit: the unit's row in the layers that
write it, and its columns in the layers that read it. :func:`groups` follows a network's graph,
one rule an operation (:mod:`pyro_sparse.graph.rules`). What no rule covers is never guessed: the
groups that it touches are marked as not prunable, with the reason (:meth:`Graph.explain`).
"""

from .structure import Graph, Group, ParameterSlice, ReaderSlice
from .trace import UntraceableError, evaluating, groups, trace

__all__ = [
    "Graph",
    "Group",
    "ParameterSlice",
    "ReaderSlice",
    "UntraceableError",
    "evaluating",
    "groups",
    "trace",
]
