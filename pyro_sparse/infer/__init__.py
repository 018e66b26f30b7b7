"""Inference: the ELBO, local reparameterisation, and `fit`."""

from . import schedules
from .checkpoint import checkpoint_file, restore, save_checkpoint
from .elbo import ELBO
from .fit import Run, check_data, fit
from .local_reparameterisation import LocalReparameterisation

__all__ = [
    "ELBO",
    "LocalReparameterisation",
    "Run",
    "check_data",
    "checkpoint_file",
    "fit",
    "restore",
    "save_checkpoint",
    "schedules",
]
