"""Models: one prior family a file, as plain Pyro statements.

Every model takes an ordinary ``torch.nn.Module`` and an example input, finds the groups that can be
removed together (:func:`pyro_sparse.graph.groups`), and puts its prior on each group's *row*: the
unit's incoming weights and bias as one vector. The network itself is run with the sampled
parameters; its code stays untouched.

To add a model, subclass :class:`SparseModel`, write ``rows()``: sample statements that return the
effective rows of every group, and register a guide for it in :mod:`pyro_sparse.guides`.
"""

from .base import SparseModel
from .deterministic import Deterministic
from .group_horseshoe import GroupHorseshoe
from .group_normal_jeffreys import GroupNormalJeffreys
from .inclusion import layerwise_inclusion_logits
from .log_normal_noise import LogNormalNoise
from .reducible_gaussian import ReducibleGaussian
from .spike_slab_gaussian import SpikeSlabGaussian
from .spike_slab_group_horseshoe import SpikeSlabGroupHorseshoe
from .spike_slab_group_lasso import SpikeSlabGroupLasso
from .support import Support
from .turbo_markov import TurboMarkov

__all__ = [
    "Deterministic",
    "GroupHorseshoe",
    "GroupNormalJeffreys",
    "LogNormalNoise",
    "ReducibleGaussian",
    "SparseModel",
    "SpikeSlabGaussian",
    "SpikeSlabGroupHorseshoe",
    "SpikeSlabGroupLasso",
    "Support",
    "TurboMarkov",
    "layerwise_inclusion_logits",
]
