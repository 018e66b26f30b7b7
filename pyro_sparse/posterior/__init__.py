"""Everything one asks after training: what is in, what to keep, how good, in numbers and plots."""

from . import diagnostics, importance, precision, pruning, reduction, selection
from .contraction import (
    Contraction,
    Curve,
    Radius,
    contraction_curve,
    theoretical_rate,
)
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
    "Contraction",
    "Curve",
    "KHat",
    "LogAlpha",
    "LogScale",
    "MACBudget",
    "MedianProbability",
    "ModelReduction",
    "Posterior",
    "Radius",
    "SelectionRule",
    "SignalToNoise",
    "Summary",
    "Threshold",
    "TopK",
    "accuracy",
    "calibration_error",
    "contraction_curve",
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
    "theoretical_rate",
]
