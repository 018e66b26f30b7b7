"""Inference: the ELBO, local reparameterisation, and `fit`."""

from .elbo import ELBO
from .fit import Run, fit
from .local_reparameterisation import LocalReparameterisation

__all__ = ["ELBO", "LocalReparameterisation", "Run", "fit"]
