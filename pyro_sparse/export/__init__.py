"""From a posterior to a plain, physically smaller torch network, and to a folder that ships it."""

from ._compact import GatherInputs, compact_network, equivalence
from ._load import example_of, load, read_config, reference
from ._save import check_target, save
from .archive import FormatError
from .card import refresh_card
from .check import input_of
from .ensemble import Ensemble, compact_draws, ensemble_scores
from .latency import Benchmark, bench
from .shipping import compact

__all__ = [
    "Benchmark",
    "Ensemble",
    "FormatError",
    "GatherInputs",
    "bench",
    "check_target",
    "compact",
    "compact_draws",
    "compact_network",
    "ensemble_scores",
    "equivalence",
    "example_of",
    "input_of",
    "load",
    "read_config",
    "reference",
    "refresh_card",
    "save",
]
