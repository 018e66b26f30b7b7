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
    "predictive_scores",
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


@torch.no_grad()
def predictive_scores(
    likelihood: Likelihood,
    draws: Iterable[tuple[Tensor, dict[str, Tensor]]],
    y: Tensor,
    target_scale: float = 1.0,
) -> dict[str, float]:
    """Scores of the mean prediction of draws, and the log density of their mixture.

    Args:
        likelihood: any.
        draws: see `calibrate`.
        y: targets.
            Shape: (N,).
        target_scale: standard deviation that the targets were divided by.

    Returns:
        ``nll`` (nats per example), and ``accuracy`` and ``ece`` for classes, ``rmse`` for numbers;
        RMSE and NLL are in the target's own unit.
    """
    natural, logs = [], []
    for output, latents in draws:
        if not natural:
            likelihood.check(output, y)
        natural.append(likelihood.natural(output))
        logs.append(likelihood.distribution(output, **latents).log_prob(y))
    prediction = torch.stack(natural).mean(0)
    nll = metrics.negative_log_likelihood(torch.stack(logs))
    probabilities = likelihood.class_probabilities(prediction)
    if probabilities is None:
        # A density per standardised unit, turned into one per unit of the target.
        return {
            "nll": nll + math.log(target_scale),
            "rmse": metrics.rmse(prediction, y) * target_scale,
        }
    return {
        "nll": nll,
        "accuracy": metrics.accuracy(probabilities, y),
        "ece": metrics.calibration_error(probabilities, y),
    }


@torch.no_grad()
def calibrate(
    likelihood: Likelihood,
    draws: Iterable[tuple[Tensor, dict[str, Tensor]]],
    y: Tensor,
    target_scale: float = 1.0,
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

    Raises:
        ValueError: another likelihood, or no draws.
    """
    if isinstance(likelihood, Normal):
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
            "calibration is for classes and for numbers with normal noise, got the likelihood "
            f"{type(likelihood).__name__}"
        )
    probabilities = class_probabilities(likelihood, torch.stack(natural))
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
