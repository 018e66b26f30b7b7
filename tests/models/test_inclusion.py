"""The layer-wise prior inclusion probability."""

import math

import pytest
import torch

from pyro_sparse import models
from pyro_sparse.models.inclusion import logit
from pyro_sparse.nets import mlp


def test_reference_figures():
    """784-400-400-10 and n = 60 000, as the authors' code gives them."""
    logits = models.layerwise_inclusion_logits([784, 400, 400], [400, 400, 10], 60_000)
    first, second, _ = torch.tensor(logits, dtype=torch.float64).sigmoid().tolist()
    assert first == pytest.approx(0.0015411, abs=5e-8)
    assert second == pytest.approx(0.0023438, abs=5e-8)


def test_the_model_applies_the_rule_to_its_layers():
    model = models.SpikeSlabGaussian(mlp([784, 400, 400, 10]), torch.zeros(2, 784), num_data=60_000)
    probabilities = model.inclusion_logits.sigmoid()
    assert probabilities[:2].tolist() == pytest.approx([0.0015411, 0.0023438], abs=5e-8)


def test_without_penalty_one_unit_a_layer_is_expected():
    logits = models.layerwise_inclusion_logits([3, 5], [5, 2], 100, constant=0.0)
    assert torch.tensor(logits).sigmoid().tolist() == pytest.approx([1 / 5, 1 / 2])
    # A single unit would be certain: the logit stays finite.
    assert math.isfinite(models.layerwise_inclusion_logits([3], [1], 100, constant=0.0)[0])


def test_a_larger_constant_is_sparser():
    small, large = (
        models.layerwise_inclusion_logits([20, 30], [30, 2], 1000, constant)[0]
        for constant in (1e-9, 1e-4)
    )
    assert large < small


@pytest.mark.parametrize("log_probability", [-1e-12, -1e-3, -0.7, -20.0, -700.0])
def test_logit_from_a_log_probability(log_probability):
    value = logit(log_probability)
    back = torch.nn.functional.logsigmoid(torch.tensor(value, dtype=torch.float64))
    assert float(back) == pytest.approx(log_probability, rel=1e-12)
