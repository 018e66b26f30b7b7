"""Inference: the ELBO, local reparameterisation, and `fit`."""

from . import schedules
from .checkpoint import checkpoint_file, restore, save_checkpoint
from .divergence import Divergence
from .elbo import ELBO
from .fit import OPTIMIZERS, check_data, fit
from .folder import RunFolder, write_text
from .local_reparameterisation import LocalReparameterisation
from .lower_bound import LowerBound, lower_bound
from .stopping import Interrupted
from .training import Run

__all__ = [
    "ELBO",
    "OPTIMIZERS",
    "Divergence",
    "Interrupted",
    "LocalReparameterisation",
    "LowerBound",
    "Run",
    "RunFolder",
    "check_data",
    "checkpoint_file",
    "fit",
    "lower_bound",
    "restore",
    "save_checkpoint",
    "schedules",
    "write_text",
]
