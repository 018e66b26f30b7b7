"""Everything one asks after training: what is in, what to keep, how good, in numbers and plots."""

from . import arviz, importance, metrics, precision, pruning, reduction, selection
from .calibration import PredictiveCalibration
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
    "Connected",
    "LogAlpha",
    "LogScale",
    "MACBudget",
    "MedianProbability",
    "ModelReduction",
    "Posterior",
    "PredictiveCalibration",
    "SelectionRule",
    "SignalToNoise",
    "Summary",
    "Threshold",
    "TopK",
    "accuracy",
    "arviz",
    "calibration_error",
    "importance",
    "metrics",
    "negative_log_likelihood",
    "precision",
    "pruning",
    "reduction",
    "rmse",
    "selection",
    "suggested_bits",
]
