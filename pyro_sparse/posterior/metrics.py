"""Scores of predictions; each takes plain tensors and returns a float."""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["accuracy", "calibration_error", "negative_log_likelihood", "rmse"]


def accuracy(probabilities: Tensor, y: Tensor) -> float:
    """Fraction in [0, 1] of examples whose most probable class is the label.

    Args:
        probabilities: class probabilities.
            Shape: (N, classes).
        y: labels.
            Shape: (N,).
    """
    return float((probabilities.argmax(-1) == y).double().mean())


def calibration_error(probabilities: Tensor, y: Tensor, bins: int = 15) -> float:
    r"""Expected calibration error of the most probable class.

    :math:`Σ_b \frac{n_b}{N} |\text{accuracy}_b - \text{confidence}_b|` over ``bins`` bins of equal
    width on (0, 1] (Guo et al., ICML 2017, eq. 3, who use 15).

    Args:
        probabilities: class probabilities.
            Shape: (N, classes).
        y: labels.
            Shape: (N,).
    """
    confidence, predicted = probabilities.double().max(-1)
    gap = (predicted == y).double() - confidence
    index = (confidence * bins).ceil().long().clamp(1, bins) - 1
    sums = torch.zeros(bins, dtype=torch.float64).index_add_(0, index.cpu(), gap.cpu())
    return float(sums.abs().sum() / len(y))


def negative_log_likelihood(log_likelihood: Tensor) -> float:
    """Mean negative log predictive density per example, in nats.

    Args:
        log_likelihood: log p(y | x, draw) of every draw; the draws are averaged as densities.
            Shape: (draws, N).
    """
    mixture = log_likelihood.double().logsumexp(0) - math.log(len(log_likelihood))
    return -float(mixture.mean())


def rmse(mean: Tensor, y: Tensor) -> float:
    """Root mean squared error, in the unit of ``y``.

    Args:
        mean: predictive mean.
            Shape: (N,).
        y: targets.
            Shape: (N,).
    """
    return float((mean - y).double().square().mean().sqrt())
