"""Scores against scikit-learn and against cases made by hand."""

import math

import pytest
import torch
from sklearn.metrics import accuracy_score, log_loss, root_mean_squared_error

from pyro_sparse.posterior import accuracy, calibration_error, negative_log_likelihood, rmse


def test_against_scikit_learn():
    probabilities = torch.randn(200, 4, dtype=torch.float64).softmax(-1)
    y = torch.randint(4, (200,))
    assert accuracy(probabilities, y) == pytest.approx(
        accuracy_score(y.numpy(), probabilities.argmax(-1).numpy())
    )
    chosen = probabilities[torch.arange(200), y].log().unsqueeze(0)
    assert negative_log_likelihood(chosen) == pytest.approx(
        log_loss(y.numpy(), probabilities.numpy(), labels=range(4))
    )
    mean, target = torch.randn(200, dtype=torch.float64), torch.randn(200, dtype=torch.float64)
    assert rmse(mean, target) == pytest.approx(
        root_mean_squared_error(target.numpy(), mean.numpy())
    )


def test_draws_are_averaged_as_densities():
    log_likelihood = torch.tensor([[0.2, 0.5], [0.6, 0.1]]).log()
    expected = -(math.log(0.4) + math.log(0.3)) / 2
    assert negative_log_likelihood(log_likelihood) == pytest.approx(expected, rel=1e-6)
    # One draw that excludes the target does not make the mixture infinite.
    certain = torch.tensor([[0.0], [-math.inf]])
    assert negative_log_likelihood(certain) == pytest.approx(math.log(2))


def test_calibration_error_of_known_cases():
    y = torch.tensor([0, 1, 0, 1])
    right = torch.nn.functional.one_hot(y, 2).double()
    assert calibration_error(right, y) == 0  # certain and right
    assert calibration_error(1 - right, y) == 1  # certain and wrong
    # Three of four right at confidence 3/4.
    calibrated = torch.tensor([[0.75, 0.25]], dtype=torch.float64).expand(4, 2)
    assert calibration_error(calibrated, torch.tensor([0, 0, 0, 1])) == pytest.approx(0)
    assert calibration_error(calibrated, torch.tensor([0, 1, 1, 1])) == pytest.approx(0.5)


def test_calibration_error_weights_its_bins():
    """Ten examples at 0.95 with 9 right, thirty at 0.55 with 30 right."""
    confidence = torch.tensor([0.95] * 10 + [0.55] * 30, dtype=torch.float64)
    probabilities = torch.stack([confidence, 1 - confidence], -1)
    y = torch.tensor([0] * 9 + [1] + [0] * 30)
    expected = 10 / 40 * abs(0.9 - 0.95) + 30 / 40 * abs(1 - 0.55)
    assert calibration_error(probabilities, y) == pytest.approx(expected)
    # In one bin, errors of opposite sign cancel.
    assert calibration_error(probabilities, y, bins=1) == pytest.approx(abs(39 / 40 - 0.65))


def test_edges_of_the_bins_belong_to_the_lower_one():
    probabilities = torch.tensor([[0.5, 0.5], [0.6, 0.4]], dtype=torch.float64)
    # Bins (0, ½] and (½, 1].
    assert calibration_error(probabilities, torch.tensor([0, 0]), bins=2) == pytest.approx(0.45)
