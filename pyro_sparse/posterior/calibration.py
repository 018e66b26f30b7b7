"""How far predictions can be believed: of an ensemble, of one network, of any draws."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pyro_sparse.likelihoods import Likelihood, Normal

from . import metrics

__all__ = [
    "LEVELS",
    "PredictiveCalibration",
    "calibrate",
    "class_probabilities",
    "fitted_temperature",
    "predictive_scores",
    "temper",
]

LEVELS = (0.5, 0.8, 0.9, 0.95)
"""Levels of the central predictive intervals."""


@dataclass(frozen=True)
class PredictiveCalibration:
    """How well predicted probabilities and observed frequencies agree.

    Attributes:
        scores: for classes ``brier``, ``ece``, ``entropy`` and ``mutual_information`` (means over
            examples, nats); for numbers ``crps``, ``coverage_50`` ... ``coverage_95`` (shares in
            [0, 1]) and ``width_95`` (mean width of the central 95 % interval), CRPS and width in
            the target's own unit.
        reliability: accuracy against confidence, for classes.
        pit: F(y) of every target, for numbers; see
            :func:`~pyro_sparse.posterior.metrics.probability_integral_transform`.
            Shape: (N,).
    """

    scores: dict[str, float]
    reliability: metrics.ReliabilityCurve | None = None
    pit: Tensor | None = None

    def to_dict(self) -> dict[str, Any]:
        """Numbers and lists, for JSON: the scores, and the reliability curve or counts of PITs."""
        out: dict[str, Any] = dict(self.scores)
        if self.reliability is not None:
            curve = self.reliability._asdict()
            out["reliability"] = {name: values.tolist() for name, values in curve.items()}
        if self.pit is not None:
            # Open at the top but for the last bin, as NumPy's histograms are.
            index = (self.pit * 20).long().clamp(0, 19)
            out["pit_counts"] = torch.bincount(index, minlength=20).tolist()
        return out


def temper(probabilities: Tensor, temperature: float) -> Tensor:
    r"""Draws of class probabilities, moved such that their mean has another temperature.

    With the mean :math:`\bar p` of the draws the tempered ensemble predicts
    :math:`p_T ∝ \bar p^{1/T}`. Below 1 it is surer. The draws become
    :math:`p_T + ρ (p_s − \bar p)`, with the largest ρ ≤ 1 by which all of an example's are
    probabilities: their mean is :math:`p_T`. Tempering the logits of single draws would leave the
    doubt in which draws contradict one another, and most of it is that.

    Args:
        probabilities: of every draw.
            Shape: (draws, N, classes).
        temperature: T > 0.

    Raises:
        ValueError: the temperature is not positive.

    Source: pooling before calibrating, Rahaman and Thiery, NeurIPS 2021 (recalled).
    """
    if not 0 < temperature < math.inf:
        raise ValueError(f"expected a positive, finite temperature, got {temperature}")
    if temperature == 1:
        return probabilities
    mean = probabilities.mean(0)
    tempered = _tempered_log(mean, temperature).exp()
    below = (mean - probabilities).clamp_min(torch.finfo(mean.dtype).tiny)
    share = (tempered / below).amin((0, -1)).clamp_max(1)
    return (tempered + share.unsqueeze(-1) * (probabilities - mean)).clamp_min(0)


def _tempered_log(mean: Tensor, temperature: float) -> Tensor:
    """``log p_T`` of average probabilities ``(N, classes)``."""
    return (mean.clamp_min(torch.finfo(mean.dtype).tiny).log() / temperature).log_softmax(-1)


def fitted_temperature(probabilities: Tensor, y: Tensor) -> float:
    """The temperature in [0.05, 20] with the least negative log-likelihood of the tempered mean.

    Args:
        probabilities: of every draw, on rows that neither training nor the final test sees.
            Shape: (draws, N, classes).
        y: their labels.
            Shape: (N,).

    Raises:
        ValueError: there are no rows.
    """
    from scipy.optimize import minimize_scalar

    if not len(y):
        raise ValueError("expected validation rows to fit a temperature on, got none")
    mean = probabilities.double().mean(0)

    def loss(log_temperature: float) -> float:
        log = _tempered_log(mean, math.exp(log_temperature))
        return -float(log.gather(1, y.long().unsqueeze(1)).mean())

    found = minimize_scalar(loss, bounds=(math.log(0.05), math.log(20)), method="bounded")
    return math.exp(float(found.x))


@torch.no_grad()
def predictive_scores(
    likelihood: Likelihood,
    draws: Iterable[tuple[Tensor, dict[str, Tensor]]],
    y: Tensor,
    target_scale: float = 1.0,
    temperature: float = 1.0,
) -> dict[str, float]:
    """Scores of the mean prediction of draws, and the log density of their mixture.

    Args:
        likelihood: any.
        draws: see `calibrate`.
        y: targets.
            Shape: (N,).
        target_scale: standard deviation that the targets were divided by.
        temperature: of the mean prediction of classes, see `temper`.

    Returns:
        ``nll`` (nats per example), and ``accuracy`` and ``ece`` for classes, ``rmse`` for numbers;
        RMSE and NLL are in the target's own unit. Beside each but ``ece`` its standard error by
        the rows, ``nll_error`` and so on; the RMSE's by the delta method. Where the prediction is
        neither a number nor probabilities for each target, ``nll`` alone.
    """
    natural: list[Tensor] = []
    logs: list[Tensor] = []
    for output, latents in draws:
        if not natural:
            likelihood.check(output, y)
        natural.append(likelihood.natural(output))
        logs.append(likelihood.distribution(output, **latents).log_prob(y))
    prediction = torch.stack(natural).mean(0)
    log_densities = metrics.mixture_log_density(torch.stack(logs))
    probabilities = likelihood.class_probabilities(prediction)
    if temperature != 1:
        probabilities = temper(class_probabilities(likelihood, prediction)[None], temperature)[0]
        log_densities = probabilities.gather(1, y.long().unsqueeze(1)).log().squeeze(1)
    scores = {"nll": -float(log_densities.mean()), "nll_error": _error(log_densities)}
    if probabilities is None:
        # A density per standardised unit, turned into one per unit of the target.
        scores["nll"] += math.log(target_scale) * y[:1].numel()
        if prediction.shape != y.shape:  # nothing that a target could be taken from
            return scores
        squares = (prediction - y).double().square().reshape(len(y), -1).mean(1)
        rmse = math.sqrt(float(squares.mean()))
        scores["rmse"] = rmse * target_scale
        scores["rmse_error"] = _error(squares) / (2 * rmse) * target_scale if rmse else 0.0
        return scores
    if probabilities.dim() != 2 or y.dim() != 1:
        return scores
    right = (probabilities.argmax(-1) == y).double()
    return scores | {
        "accuracy": float(right.mean()),
        "accuracy_error": _error(right),
        "ece": metrics.calibration_error(probabilities, y),
    }


def _error(values: Tensor) -> float:
    """Standard error of the mean of ``(N,)`` numbers; 0 of a single one, which has none."""
    return float(values.std() / math.sqrt(len(values))) if len(values) > 1 else 0.0


@torch.no_grad()
def calibrate(
    likelihood: Likelihood,
    draws: Iterable[tuple[Tensor, dict[str, Tensor]]],
    y: Tensor,
    target_scale: float = 1.0,
    temperature: float = 1.0,
) -> PredictiveCalibration:
    """Calibration of the mixture of draws, with the observation noise of each.

    Args:
        likelihood: Categorical, Bernoulli or Normal.
        draws: a network's output ``(N, ...)`` and the likelihood's latents, for every draw; as
            :meth:`Posterior.draws <pyro_sparse.posterior.Posterior.draws>` gives them. One draw
            is one network.
        y: targets.
            Shape: (N,).
        target_scale: standard deviation that the targets were divided by.
        temperature: of the mean prediction of classes, see `temper`.

    Raises:
        ValueError: another likelihood, no draws, or a temperature of numbers.
    """
    if isinstance(likelihood, Normal) and temperature == 1:
        laws = [likelihood.distribution(output, **latents) for output, latents in draws]
        if not laws:
            raise ValueError("expected at least one draw, got none")
        mean = torch.stack([law.mean for law in laws])
        scale = torch.stack([law.stddev for law in laws])
        pit = metrics.probability_integral_transform(mean, scale, y).cpu()
        low, high = (metrics.mixture_quantile(mean, scale, q) for q in (0.025, 0.975))
        scores = {"crps": metrics.crps(mean, scale, y) * target_scale}
        for level in LEVELS:
            scores[f"coverage_{round(100 * level)}"] = metrics.interval_coverage(pit, level)
        scores["width_95"] = float((high - low).mean()) * target_scale
        return PredictiveCalibration(scores, pit=pit)
    natural = [likelihood.natural(output) for output, _ in draws]
    if not natural:
        raise ValueError("expected at least one draw, got none")
    if likelihood.class_probabilities(natural[0]) is None:
        raise ValueError(
            "calibration is for classes and for numbers with normal noise, a temperature for "
            f"classes only; got the likelihood {type(likelihood).__name__}"
        )
    probabilities = temper(class_probabilities(likelihood, torch.stack(natural)), temperature)
    mixture = probabilities.mean(0)
    return PredictiveCalibration(
        {
            "brier": metrics.brier_score(mixture, y),
            "ece": metrics.calibration_error(mixture, y),
            "entropy": float(metrics.predictive_entropy(probabilities).mean()),
            "mutual_information": float(metrics.mutual_information(probabilities).mean()),
        },
        reliability=metrics.reliability_curve(mixture, y),
    )


def class_probabilities(likelihood: Likelihood, natural: Tensor) -> Tensor:
    """``(..., classes)`` of natural outputs, in float64.

    Raises:
        ValueError: the likelihood is not one of classes.
    """
    probabilities = likelihood.class_probabilities(natural)
    if probabilities is None:
        raise ValueError(
            f"expected a likelihood of classes, got {type(likelihood).__name__}, whose targets are "
            "numbers"
        )
    return probabilities.double()
