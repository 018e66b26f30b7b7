"""Everything one asks after training: what is in, what to keep, how good, in numbers and plots."""

from .metrics import accuracy, calibration_error, negative_log_likelihood, rmse
from .posterior import Posterior
from .selection import MedianProbability, SelectionRule
from .summary import Summary

__all__ = [
    "MedianProbability",
    "Posterior",
    "SelectionRule",
    "Summary",
    "accuracy",
    "calibration_error",
    "negative_log_likelihood",
    "rmse",
]
