"""Likelihoods: densities, their scaling to all data, natural outputs, and checks of targets."""

import math

import pyro
import pyro.poutine as poutine
import pytest
import torch
from scipy import stats

from pyro_sparse.likelihoods import Bernoulli, Categorical, Normal, Poisson

OUTPUT = torch.tensor([[0.3], [-1.2], [2.0]], dtype=torch.float64)
CASES = [
    (
        Categorical(),
        torch.tensor([[0.1, 0.5, -1], [2, 0, 0], [0, 0, 3.0]], dtype=torch.float64),
        torch.tensor([1, 0, 2]),
    ),
    (Bernoulli(), OUTPUT, torch.tensor([1.0, 0.0, 1.0], dtype=torch.float64)),
    (Normal(0.7), OUTPUT, torch.tensor([0.1, -1.0, 3.0], dtype=torch.float64)),
    (Normal(), OUTPUT, torch.tensor([0.1, -1.0, 3.0], dtype=torch.float64)),
    (Poisson(), OUTPUT, torch.tensor([0.0, 1.0, 9.0], dtype=torch.float64)),
]
IDS = ["Categorical", "Bernoulli", "Normal fixed", "Normal learnt", "Poisson"]


def by_hand(likelihood, output, y, precision):
    """Log-likelihood of the batch."""
    if isinstance(likelihood, Categorical):
        return output.log_softmax(-1)[torch.arange(len(y)), y].sum().item()
    f, y = output.squeeze(-1).numpy(), y.numpy()
    if isinstance(likelihood, Bernoulli):
        return stats.bernoulli.logpmf(y, 1 / (1 + math.e ** (-f))).sum()
    if isinstance(likelihood, Poisson):
        return stats.poisson.logpmf(y, math.e**f).sum()
    scale = 0.7 if likelihood.noise_scale is not None else precision**-0.5
    return stats.norm.logpdf(y, f, scale).sum()


@pytest.mark.parametrize(("likelihood", "output", "y"), CASES, ids=IDS)
@pytest.mark.parametrize("num_data", [3, 60])
def test_the_batch_stands_for_all_data(likelihood, output, y, num_data):
    likelihood = likelihood.double()
    condition = {"noise_precision": torch.tensor(2.5, dtype=torch.float64)}
    with poutine.condition(data=condition):
        trace = poutine.trace(likelihood).get_trace(output, y, num_data)
    trace.compute_log_prob()
    expected = num_data / 3 * by_hand(likelihood, output, y, 2.5)
    assert trace.nodes["y"]["log_prob_sum"].item() == pytest.approx(expected, rel=1e-6)
    assert trace.nodes["y"]["is_observed"]
    learnt = isinstance(likelihood, Normal) and likelihood.noise_scale is None
    assert ("noise_precision" in trace.nodes) == learnt
    if learnt:
        log_prob = trace.nodes["noise_precision"]["log_prob_sum"].item()
        assert log_prob == pytest.approx(stats.gamma.logpdf(2.5, 1.0, scale=1.0), rel=1e-6)


@pytest.mark.parametrize(("likelihood", "output", "y"), CASES, ids=IDS)
def test_targets_are_drawn_where_none_are_given(likelihood, output, y):
    trace = poutine.trace(likelihood).get_trace(output, None, 60)
    site = trace.nodes["y"]
    assert not site["is_observed"]
    assert site["value"].shape == y.shape
    likelihood.check(output, site["value"])
    # The output passes through.
    assert trace.nodes["_RETURN"]["value"] is output


def test_natural_outputs():
    logits = torch.tensor([[0.0, math.log(3.0)]])
    assert Categorical().natural(logits).tolist() == [pytest.approx([0.25, 0.75])]
    column = torch.tensor([[0.0], [math.log(3.0)]])
    assert Bernoulli().natural(column).tolist() == pytest.approx([0.5, 0.75])
    assert Poisson().natural(column).tolist() == pytest.approx([1.0, 3.0])
    assert Normal().natural(column).tolist() == pytest.approx([0.0, math.log(3.0)])
    assert Normal().natural(column.squeeze(-1)).shape == (2,)


def test_class_probabilities():
    probabilities = torch.tensor([[0.2, 0.8], [0.5, 0.5]])
    assert Categorical().class_probabilities(probabilities) is probabilities
    two = Bernoulli().class_probabilities(torch.tensor([0.8, 0.5]))
    assert torch.allclose(two, probabilities)
    assert Normal().class_probabilities(torch.zeros(2)) is None
    assert Poisson().class_probabilities(torch.ones(2)) is None


@pytest.mark.parametrize("likelihood", [Bernoulli(), Normal(), Normal(1.0), Poisson()])
def test_several_outputs_where_one_is_expected(likelihood):
    output = torch.zeros(3, 2)
    with pytest.raises(ValueError, match=r"one output per example.*got \(3, 2\)"):
        likelihood.natural(output)
    with pytest.raises(ValueError, match="one output per example"):
        likelihood.check(output, torch.zeros(3))


@pytest.mark.parametrize("likelihood", [Bernoulli(), Categorical(), Normal(), Poisson()])
def test_unequal_lengths(likelihood):
    output = torch.zeros(3, 2 if isinstance(likelihood, Categorical) else 1)
    with pytest.raises(ValueError, match="one target per example"):
        likelihood.check(output, torch.zeros(4))


@pytest.mark.parametrize(
    ("likelihood", "y", "message"),
    [
        (Categorical(), torch.tensor([0, 1, 2]), r"labels in 0\.\.1.*from 0 to 2"),
        (Categorical(), torch.tensor([0, -1, 1]), r"labels in 0\.\.1.*from -1 to 1"),
        (Categorical(), torch.tensor([0.0, 1.0, 1.0]), r"integer class labels.*y\.long"),
        (Categorical(), torch.tensor([[0], [1], [1]]), "integer class labels"),
        (Categorical(), torch.tensor([True, False, True]), "integer class labels"),
        (Bernoulli(), torch.tensor([0.0, 1.0, 2.0]), "0 or 1, got values from 0 to 2"),
        (Bernoulli(), torch.tensor([0.0, 1.0, float("nan")]), "0 or 1"),
        (Bernoulli(), torch.tensor([0, 1, 1]), r"y\.float"),
        (Normal(), torch.tensor([0.0, float("nan"), 1.0]), "finite targets"),
        (Normal(), torch.tensor([0.0, float("inf"), 1.0]), "finite targets"),
        (Normal(), torch.zeros(3, 1), r"shape \(3,\), got \(3, 1\)"),
        (Poisson(), torch.tensor([0.0, -1.0, 1.0]), "non-negative whole counts"),
        (Poisson(), torch.tensor([0.0, 0.5, 1.0]), "non-negative whole counts"),
    ],
)
def test_targets_that_cannot_be(likelihood, y, message):
    output = torch.zeros(3, 2 if isinstance(likelihood, Categorical) else 1)
    with pytest.raises(ValueError, match=message):
        likelihood.check(output, y)


@pytest.mark.parametrize(
    "options",
    [{"noise_scale": 0.0}, {"noise_scale": -1.0}, {"shape": 0.0}, {"rate": float("inf")}],
)
def test_normal_needs_positive_numbers(options):
    with pytest.raises(ValueError, match=f"positive {next(iter(options))}"):
        Normal(**options)


def test_buffers_move_with_the_module():
    likelihood = Normal(0.5).double()
    assert likelihood.noise_scale.dtype == torch.float64
    assert set(likelihood.state_dict()) == {"shape", "rate", "noise_scale"}
    assert not list(likelihood.parameters())


def test_gamma_prior_of_the_precision():
    likelihood = Normal(shape=3.0, rate=2.0)
    law = poutine.trace(likelihood).get_trace(OUTPUT.float(), None, 3).nodes["noise_precision"]
    assert isinstance(law["fn"], pyro.distributions.Gamma)
    assert float(law["fn"].mean) == pytest.approx(1.5)


@pytest.mark.parametrize("targets", [(6, 1), (1,), (6, 6), ()])
def test_targets_are_never_broadcast(targets):
    """Whoever runs the model, stock SVI and importance sampling included."""
    likelihood = Normal(1.0)
    with pytest.raises(ValueError, match=r"expected targets of shape \(6,\).*squeeze or reshape y"):
        likelihood(torch.zeros(6, 1), torch.zeros(targets), 6)
