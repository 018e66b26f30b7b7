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


def test_wide_layers_have_a_floor_and_say_so():
    """At 10 000 inputs the rule's log-odds are −1004 nats: no data could include a unit."""
    rule = models.layerwise_inclusion_logits([10_000, 20], [20, 1], 200)
    assert rule[0] < -1000
    x = torch.zeros(2, 10_000)
    with pytest.warns(UserWarning, match="units of fc1 a prior inclusion probability below 0.0001"):
        model = models.SpikeSlabGaussian(mlp([10_000, 20, 1]), x, num_data=200)
    assert float(model.inclusion_logits[0].sigmoid()) == pytest.approx(1e-4)
    # What the rule gives where it is above, and everywhere without a floor, is as it was.
    assert float(model.inclusion_logits[1]) == pytest.approx(rule[1])
    plain = models.SpikeSlabGaussian(mlp([10_000, 20, 1]), x, num_data=200, inclusion_floor=0.0)
    assert plain.inclusion_logits.tolist() == pytest.approx(rule)
    # One of very many units: 1/K is no underflow.
    many = models.layerwise_inclusion_logits([3], [50_000], 100, floor=1e-4)[0]
    assert many == pytest.approx(models.layerwise_inclusion_logits([3], [50_000], 100)[0])
    with pytest.raises(ValueError, match=r"floor in \[0, 1\), got 2"):
        models.layerwise_inclusion_logits([3], [5], 100, floor=2)
