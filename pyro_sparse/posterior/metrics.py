"""Scores of predictions; each takes plain tensors, and returns a float or a number an example."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = [
    "ReliabilityCurve",
    "accuracy",
    "brier_score",
    "calibration_error",
    "crps",
    "interval_coverage",
    "mixture_log_density",
    "mixture_quantile",
    "mutual_information",
    "negative_log_likelihood",
    "out_of_distribution_auroc",
    "predictive_entropy",
    "probability_integral_transform",
    "reliability_curve",
    "rmse",
]


def _check_targets(shape: torch.Size, y: Tensor) -> None:
    """One target an example: others would be broadcast, to a number of something else."""
    if not isinstance(y, Tensor):
        raise ValueError(f"expected targets as a tensor, got {y!r}")
    if y.shape != shape:
        raise ValueError(
            f"expected targets of shape {tuple(shape)}, one for each prediction, got "
            f"{tuple(y.shape)}; squeeze or reshape them"
        )


def _check_classes(probabilities: Tensor, y: Tensor) -> None:
    if not isinstance(probabilities, Tensor):
        raise ValueError(f"expected probabilities as a tensor, got {probabilities!r}")
    _check_targets(probabilities.shape[:-1], y)
    if not bool(probabilities.isfinite().all()):
        raise ValueError("expected finite probabilities, got NaN or infinite ones")
    classes = probabilities.shape[-1]
    if len(y) and not 0 <= int(y.min()) <= int(y.max()) < classes:
        raise ValueError(
            f"expected labels 0 to {classes - 1}, one for each column of the probabilities, got "
            f"{int(y.min())} to {int(y.max())}"
        )


def accuracy(probabilities: Tensor, y: Tensor) -> float:
    """Fraction in [0, 1] of examples whose most probable class is the label.

    Args:
        probabilities: class probabilities.
            Shape: (N, classes).
        y: labels.
            Shape: (N,).
    """
    _check_classes(probabilities, y)
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
    _check_classes(probabilities, y)
    confidence, predicted = probabilities.double().max(-1)
    gap = (predicted == y).double() - confidence
    index = _bins(confidence, bins)
    sums = torch.zeros(bins, dtype=torch.float64).index_add_(0, index.cpu(), gap.cpu())
    return float(sums.abs().sum() / len(y))


def mixture_log_density(log_likelihood: Tensor) -> Tensor:
    """Log predictive density of every example, nats: draws are averaged as densities.

    Args:
        log_likelihood: log p(y | x, draw) of every draw.
            Shape: (draws, N).

    Returns:
        ``(N,)``, float64.
    """
    return log_likelihood.double().logsumexp(0) - math.log(len(log_likelihood))


def negative_log_likelihood(log_likelihood: Tensor) -> float:
    """Mean negative log predictive density per example, nats; see `mixture_log_density`."""
    return -float(mixture_log_density(log_likelihood).mean())


def rmse(mean: Tensor, y: Tensor) -> float:
    """Root mean squared error, in the unit of ``y``.

    Args:
        mean: predictive mean.
            Shape: (N,).
        y: targets.
            Shape: (N,).
    """
    if not isinstance(mean, Tensor):
        raise ValueError(f"expected predictive means as a tensor, got {mean!r}")
    _check_targets(mean.shape, y)
    return float((mean - y).double().square().mean().sqrt())


# -- probabilities of classes ----------------------------------------------------------------------


def brier_score(probabilities: Tensor, y: Tensor) -> float:
    r"""Mean of :math:`Σ_k (p_k - 1[y = k])²`, in [0, 2]; 0 is certain and right.

    Args:
        probabilities: class probabilities.
            Shape: (N, classes).
        y: labels.
            Shape: (N,).

    Source: Brier (Monthly Weather Review 78, 1950), the form over all classes.
    """
    _check_targets(probabilities.shape[:-1], y)
    probabilities = probabilities.double()
    label = torch.nn.functional.one_hot(y.long(), probabilities.shape[-1]).to(probabilities)
    return float((probabilities - label).square().sum(-1).mean())


class ReliabilityCurve(NamedTuple):
    """Accuracy against confidence of the most probable class; bins without examples are left out.

    confidence: mean confidence in each bin, ``(bins,)``
    accuracy:   share of right answers, ``(bins,)``
    examples:   how many there are, ``(bins,)``
    """

    confidence: Tensor
    accuracy: Tensor
    examples: Tensor


def reliability_curve(probabilities: Tensor, y: Tensor, bins: int = 15) -> ReliabilityCurve:
    """What `calibration_error` sums up: the same bins of equal width on (0, 1].

    Args:
        probabilities: class probabilities.
            Shape: (N, classes).
        y: labels.
            Shape: (N,).
    """
    _check_targets(probabilities.shape[:-1], y)
    confidence, predicted = probabilities.double().cpu().max(-1)
    right = (predicted == y.cpu()).double()
    index = _bins(confidence, bins)
    count = torch.bincount(index, minlength=bins)
    filled = count > 0

    def mean(values: Tensor) -> Tensor:
        sums = torch.zeros(bins, dtype=torch.float64).index_add_(0, index, values)
        return sums[filled] / count[filled]

    return ReliabilityCurve(mean(confidence), mean(right), count[filled])


def _bins(confidence: Tensor, bins: int) -> Tensor:
    """Index of the bin of equal width on (0, 1] that each confidence falls into."""
    return (confidence * bins).ceil().long().clamp(1, bins) - 1


def predictive_entropy(probabilities: Tensor) -> Tensor:
    r"""Entropy of the ensemble's prediction, :math:`H(E_s p_s)`, nats: all uncertainty.

    Args:
        probabilities: of every draw.
            Shape: (draws, N, classes).

    Returns:
        ``(N,)``, float64.
    """
    return torch.special.entr(probabilities.double().mean(0)).sum(-1)


def mutual_information(probabilities: Tensor) -> Tensor:
    r"""Of label and weights, :math:`H(E_s p_s) - E_s H(p_s)`, nats: what the draws disagree on.

    Args:
        probabilities: of every draw.
            Shape: (draws, N, classes).

    Returns:
        ``(N,)``, float64, at least 0.

    Source: Houlsby et al. (BALD, arXiv 1112.5745, 2011).
    """
    probabilities = probabilities.double()
    expected = torch.special.entr(probabilities).sum(-1).mean(0)
    return (predictive_entropy(probabilities) - expected).clamp_min(0)


def out_of_distribution_auroc(inside: Tensor, outside: Tensor) -> float:
    """Chance that a score is larger outside than inside, ties counting ½.

    Area under the ROC curve of telling both kinds of inputs apart by their uncertainty.

    Args:
        inside: uncertainty of inputs like the training data.
            Shape: (N,).
        outside: of others.
            Shape: (M,).

    Raises:
        ValueError: one of them is empty.
    """
    from sklearn.metrics import roc_auc_score

    if not len(inside) or not len(outside):
        raise ValueError(f"expected scores of both kinds, got {len(inside)} and {len(outside)}")
    label = torch.cat([torch.zeros(len(inside)), torch.ones(len(outside))])
    return float(roc_auc_score(label.numpy(), torch.cat([inside, outside]).cpu().numpy()))


# -- mixtures of normals: regression ---------------------------------------------------------------
#
# The ensemble's prediction of one target is F = mean_s N(m_s, σ_s²): a component a draw of the
# posterior. Shapes: m (draws, N), σ (draws, N) or (draws, 1), y (N,); float64 inside.


def crps(mean: Tensor, scale: Tensor, y: Tensor) -> float:
    r"""Continuous ranked probability score of mixtures of normals, in the unit of ``y``.

    :math:`∫ (F(t) - 1[t ≥ y])² dt = E|Y - y| - ½ E|Y - Y'|` with independent Y, Y' ∼ F. Both are
    sums of :math:`A(d, v) = E|N(d, v)| = d (2Φ(d/\sqrt v) - 1) + 2\sqrt v φ(d/\sqrt v)`, hence
    exact: :math:`\text{mean}_s A(y - m_s, σ_s²) - ½ \text{mean}_{s,t} A(m_s - m_t, σ_s² + σ_t²)`.

    Args:
        mean: of every draw.
            Shape: (draws, N).
        scale: standard deviation of the observation noise of every draw.
            Shape: (draws, N) or (draws, 1).
        y: targets.
            Shape: (N,).

    Source: Grimit, Gneiting, Berrocal, Johnson (QJRMS 132, 2006), eqs. 5 and 6.
    """
    mean, scale, y = _mixture(mean, scale, y)
    total = torch.zeros_like(y)
    for m, s in zip(mean, scale, strict=True):  # one draw against all: memory stays draws · N
        total += _mean_distance(y - m, s.square())
        total -= _mean_distance(mean - m, scale.square() + s.square()).mean(0) / 2
    return float(total.mean() / len(mean))


def _mean_distance(difference: Tensor, variance: Tensor) -> Tensor:
    """E|N(difference, variance)|."""
    deviation = variance.sqrt()
    z = difference / deviation
    density = (-z.square() / 2).exp() * math.sqrt(2 / math.pi)
    return difference * torch.special.erf(z / math.sqrt(2)) + deviation * density


def probability_integral_transform(mean: Tensor, scale: Tensor, y: Tensor) -> Tensor:
    """F(y) of every target under its mixture: uniform on [0, 1] if predictions are calibrated.

    Arguments as of `crps`.

    Returns:
        ``(N,)``, float64.

    Source: Dawid (JRSS A 147, 1984).
    """
    mean, scale, y = _mixture(mean, scale, y)
    return torch.special.ndtr((y - mean) / scale).mean(0)


def interval_coverage(transformed: Tensor, level: float) -> float:
    """Share of targets in the central predictive interval between exact quantiles of the mixture.

    A target lies between the quantiles at (1 ∓ level)/2 exactly where its F(y) lies between these
    two numbers.

    Args:
        transformed: by `probability_integral_transform`.
            Shape: (N,).
        level: in (0, 1).

    Raises:
        ValueError: the level is not.
    """
    if not 0 < level < 1:
        raise ValueError(f"expected a level in (0, 1), got {level}")
    return float(((transformed - 0.5).abs() <= level / 2).double().mean())


def mixture_quantile(mean: Tensor, scale: Tensor, probability: float) -> Tensor:
    """The q with F(q) = probability, by bisection to rounding.

    Args:
        mean, scale: as of `crps`.
        probability: in (0, 1).

    Returns:
        ``(N,)``, float64.

    Raises:
        ValueError: the probability is not in (0, 1).
    """
    if not 0 < probability < 1:
        raise ValueError(f"expected a probability in (0, 1), got {probability}")
    mean, scale = mean.double(), scale.double().expand_as(mean)
    # Some component's quantile is below the mixture's, another's above.
    z = torch.special.ndtri(torch.tensor(probability, dtype=torch.float64))
    quantiles = mean + z * scale
    low, high = quantiles.amin(0), quantiles.amax(0)
    for _ in range(60):
        middle = (low + high) / 2
        below = torch.special.ndtr((middle - mean) / scale).mean(0) < probability
        low, high = torch.where(below, middle, low), torch.where(below, high, middle)
    return (low + high) / 2


def _mixture(mean: Tensor, scale: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """All in float64, with the scale expanded; raises where the shapes do not fit."""
    if mean.dim() != 2 or mean.shape[1:] != y.shape or scale.shape[:1] != mean.shape[:1]:
        raise ValueError(
            "expected means (draws, N), scales (draws, N) or (draws, 1) and targets (N,), got "
            f"{tuple(mean.shape)}, {tuple(scale.shape)} and {tuple(y.shape)}"
        )
    return mean.double(), scale.double().expand_as(mean), y.double()
