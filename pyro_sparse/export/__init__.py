"""From a posterior to a plain, physically smaller torch network, and to a folder that ships it."""

from .compact import GatherInputs, compact_network, equivalence
from .load import load
from .save import save
from .shipping import compact

__all__ = ["GatherInputs", "compact", "compact_network", "equivalence", "load", "save"]
