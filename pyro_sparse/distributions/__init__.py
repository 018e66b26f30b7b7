"""Distributions for structured sparsity; importing this registers their closed-form KLs."""

from pyro_sparse.distributions import kl as kl
from pyro_sparse.distributions.gated_columns import GatedColumns
from pyro_sparse.distributions.half_cauchy import HalfCauchyFactors
from pyro_sparse.distributions.joint_normal import JointNormal
from pyro_sparse.distributions.log_scale_normal import LogScaleNormal
from pyro_sparse.distributions.markov_chain import MarkovChain
from pyro_sparse.distributions.normal_jeffreys import NormalJeffreys
from pyro_sparse.distributions.spike_and_slab import (
    RelaxedSpikeAndSlab,
    SpikeAndSlab,
    TrapeziumSpikeAndSlab,
)
from pyro_sparse.distributions.tied_normal import TiedNormal
from pyro_sparse.distributions.truncated import LogUniform, TruncatedLogNormal, TruncatedNormal

__all__ = [
    "GatedColumns",
    "HalfCauchyFactors",
    "JointNormal",
    "LogScaleNormal",
    "LogUniform",
    "MarkovChain",
    "NormalJeffreys",
    "RelaxedSpikeAndSlab",
    "SpikeAndSlab",
    "TiedNormal",
    "TrapeziumSpikeAndSlab",
    "TruncatedLogNormal",
    "TruncatedNormal",
]
