"""Everything one asks after training: what is in, what to keep, how good, in numbers and plots."""

from . import arviz, diagnostics, importance, metrics, precision, pruning, reduction, selection
from .calibration import PredictiveCalibration
from .comparison import GuideComparison, compare_guides
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
from .fitted import Fitted, NotOfferedError
from .inclusion import (
    InputSelection,
    InputSets,
    MergedInclusion,
    false_discovery_rate,
    input_probability,
    input_sets,
    merge,
    reaching_inputs,
    select_inputs,
)
from .metrics import accuracy, calibration_error, negative_log_likelihood, rmse
from .network import FittedNetwork
from .posterior import Posterior
from .precision import suggested_bits
from .seeds import SeedEnsemble, fit_seeds
from .selection import (
    BMRS,
    Connected,
    ExpectedCost,
    FalseDiscovery,
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
from .sites import SiteContraction, SitePosterior
from .summary import Summary

__all__ = [
    "BMRS",
    "Calibration",
    "Connected",
    "Contraction",
    "Curve",
    "ExpectedCost",
    "FalseDiscovery",
    "Fitted",
    "FittedNetwork",
    "GuideComparison",
    "InputSelection",
    "InputSets",
    "KHat",
    "LogAlpha",
    "LogScale",
    "MACBudget",
    "MedianProbability",
    "MergedInclusion",
    "ModelReduction",
    "NotOfferedError",
    "Posterior",
    "PredictiveCalibration",
    "Radius",
    "SeedEnsemble",
    "SelectionRule",
    "SignalToNoise",
    "SiteContraction",
    "SitePosterior",
    "Summary",
    "Threshold",
    "TopK",
    "accuracy",
    "arviz",
    "calibration_error",
    "compare_guides",
    "contraction_curve",
    "diagnostics",
    "false_discovery_rate",
    "fit_seeds",
    "importance",
    "importance_weighted_elbo",
    "input_probability",
    "input_sets",
    "khat",
    "log_weights",
    "merge",
    "metrics",
    "negative_log_likelihood",
    "pareto_k",
    "precision",
    "pruning",
    "reaching_inputs",
    "reduction",
    "rmse",
    "sbc",
    "select_inputs",
    "selection",
    "suggested_bits",
    "theoretical_rate",
]
