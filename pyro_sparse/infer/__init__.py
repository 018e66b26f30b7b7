"""Inference: the ELBO, local reparameterisation, `fit`; regressions by enumeration and sampling."""

from . import schedules
from ._fit import check_data, fit
from ._lower_bound import LowerBound, lower_bound, without_evidence
from .checkpoint import checkpoint_file, restore, save_checkpoint
from .divergence import Divergence
from .elbo import ELBO
from .folder import RunFolder, read_json, write_json, write_text
from .gradient import GradientVariance, gradient_variance
from .local_reparameterisation import LocalReparameterisation
from .memory import MemoryNeed, available_memory, memory_need
from .processes import launch, make_fabric, on_first
from .recipe import OPTIMIZERS
from .regression import Enumeration, SupportDraws, enumerate_supports, gibbs
from .stopping import Interrupted
from .svi import SVI
from .training import Run

__all__ = [
    "ELBO",
    "OPTIMIZERS",
    "SVI",
    "Divergence",
    "Enumeration",
    "GradientVariance",
    "Interrupted",
    "LocalReparameterisation",
    "LowerBound",
    "MemoryNeed",
    "Run",
    "RunFolder",
    "SupportDraws",
    "available_memory",
    "check_data",
    "checkpoint_file",
    "enumerate_supports",
    "fit",
    "gibbs",
    "gradient_variance",
    "launch",
    "lower_bound",
    "make_fabric",
    "memory_need",
    "on_first",
    "read_json",
    "restore",
    "save_checkpoint",
    "schedules",
    "without_evidence",
    "write_json",
    "write_text",
]
