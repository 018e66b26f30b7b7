"""A picture of a network's groups: which layers write and read each."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .structure import Graph

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["draw"]

WRITES, READS, STAYS = "#0072B2", "#E69F00", "#BBBBBB"


def draw(graph: Graph, ax: Axes) -> Axes:
    """Draw the groups into ``ax``, and return it.

    One line a group, one column a layer in the order of the forward pass. A filled mark is a layer
    that writes the group's units, an open one a layer that reads them; a residual stream is a line
    with many filled marks. Grey groups stay as they are.
    """
    layers: dict[str, int] = {}
    groups = [group for group in graph if group.size]
    for group in groups:
        for part in (*group.writers, *group.readers):
            layers.setdefault(_layer(part.parameter), 0)
    order = {name: place for place, name in enumerate(_in_order(graph, list(layers)))}
    for line, group in enumerate(groups):
        colour = WRITES if group.prunable else STAYS
        writes = sorted({order[_layer(part.parameter)] for part in group.writers})
        reads = sorted({order[_layer(part.parameter)] for part in group.readers})
        if not writes:
            writes = [-1]
        ax.plot([min(writes), max([*writes, *reads])], [line, line], color=colour, lw=1, zorder=1)
        ax.scatter(writes, [line] * len(writes), s=34, color=colour, zorder=3)
        ax.scatter(
            reads, [line] * len(reads), s=34, facecolor="white", edgecolor=READS, lw=1.5, zorder=2
        )
    labels = [f"{group.name} ({group.size})" for group in groups]
    ax.set_yticks(range(len(groups)), labels, fontsize=7)
    ax.set_xticks(range(-1, len(order)), ["input", *order], rotation=90, fontsize=7)
    ax.set_xlim(-1.5, len(order) - 0.5)
    ax.set_ylim(len(groups) - 0.5, -0.5)
    ax.grid(axis="x", color="#EEEEEE", zorder=0)
    for side in ("top", "right"):
        ax.spines[side].set_visible(False)
    ax.scatter([], [], s=34, color=WRITES, label="writes units that can be removed")
    ax.scatter([], [], s=34, color=STAYS, label="writes units that stay")
    ax.scatter([], [], s=34, facecolor="white", edgecolor=READS, lw=1.5, label="reads units")
    ax.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=3, frameon=False, fontsize=8)
    return ax


def _layer(parameter: str) -> str:
    return parameter.rpartition(".")[0] or parameter


def _in_order(graph: Graph, layers: list[str]) -> list[str]:
    """Layers in the order of the forward pass, which that of the parameters' shapes is."""
    place = {_layer(name): i for i, name in reversed(list(enumerate(graph.shapes)))}
    return sorted(layers, key=lambda name: place.get(name, len(place)))
