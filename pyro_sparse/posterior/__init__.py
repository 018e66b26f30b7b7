"""Everything one asks after training: what is in, what to keep, how good, in numbers and plots."""

from . import diagnostics, importance, precision, pruning, reduction, selection
from .diagnostics import (
    Calibration,
    KHat,
    importance_weighted_elbo,
    khat,
    log_weights,
    pareto_k,
    sbc,
)
from .metrics import accuracy, calibration_error, negative_log_likelihood, rmse
from .posterior import Posterior
from .precision import suggested_bits
from .selection import (
    BMRS,
    Connected,
    LogAlpha,
    LogScale,
    MACBudget,
    MedianProbability,
    ModelReduction,
    SelectionRule,
    SignalToNoise,
    Threshold,
    TopK,
)
from .summary import Summary

__all__ = [
    "BMRS",
    "Calibration",
    "Connected",
    "KHat",
    "LogAlpha",
    "LogScale",
    "MACBudget",
    "MedianProbability",
    "ModelReduction",
    "Posterior",
    "SelectionRule",
    "SignalToNoise",
    "Summary",
    "Threshold",
    "TopK",
    "accuracy",
    "calibration_error",
    "diagnostics",
    "importance",
    "importance_weighted_elbo",
    "khat",
    "log_weights",
    "negative_log_likelihood",
    "pareto_k",
    "precision",
    "pruning",
    "reduction",
    "rmse",
    "sbc",
    "selection",
    "suggested_bits",
]
