"""From a posterior to a plain, physically smaller torch network, and to a folder that ships it."""

from .compact import GatherInputs, compact_network, equivalence

__all__ = ["GatherInputs", "compact_network", "equivalence"]
