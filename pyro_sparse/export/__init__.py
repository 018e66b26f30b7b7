"""From a posterior to a plain, physically smaller torch network, and to a folder that ships it."""

from .card import refresh_card
from .check import input_of
from .compact import GatherInputs, compact_network, equivalence
from .ensemble import Ensemble, compact_draws, ensemble_scores
from .latency import Benchmark, bench
from .load import load, read_config, reference
from .save import check_target, save
from .shipping import compact

__all__ = [
    "Benchmark",
    "Ensemble",
    "GatherInputs",
    "bench",
    "check_target",
    "compact",
    "compact_draws",
    "compact_network",
    "ensemble_scores",
    "equivalence",
    "input_of",
    "load",
    "read_config",
    "reference",
    "refresh_card",
    "save",
]
