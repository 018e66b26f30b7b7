"""Rows whose columns are in or out: density, draws, and the divergence averaged over columns."""

import itertools

import pyro.distributions as dist
import pytest
import torch
from torch.distributions import kl_divergence

from pyro_sparse.distributions import (
    GatedColumns,
    LogScaleNormal,
    RelaxedSpikeAndSlab,
    SpikeAndSlab,
    TiedNormal,
)

UNITS, COLUMNS = 3, 4


def slabs():
    torch.manual_seed(0)
    loc = torch.randn(UNITS, COLUMNS)
    rows, columns = 0.3 * torch.randn(UNITS), 0.3 * torch.randn(COLUMNS)
    ranked = TiedNormal.from_logs(loc, torch.randn(UNITS, 2), torch.randn(2, COLUMNS))
    return {
        "tied": TiedNormal.from_logs(loc, rows, columns),
        "rank": ranked,
        "full": LogScaleNormal(loc, 0.3 * torch.randn(UNITS, COLUMNS)).to_event(1),
        "normal": dist.Normal(loc, 0.7).to_event(1),
    }


def prior():
    return dist.Normal(torch.zeros(()), 1.5).expand([UNITS, COLUMNS]).to_event(1)


@pytest.mark.parametrize("kind", ["tied", "rank", "full", "normal"])
def test_divergence_of_units_and_columns_is_that_of_the_joint_law(kind):
    """Enumerated: E over units and columns of the divergence of what is in, and its gradients."""
    slab, own = slabs()[kind], torch.tensor([0.4, -1.0, 2.0], requires_grad=True)
    crossing = torch.tensor([0.9, -0.5, 0.1], requires_grad=True)
    always = torch.ones(1)
    probability = torch.cat([crossing.sigmoid(), always])
    # Whatever was drawn.
    drawn = torch.tensor([0.0, 1.0, 0.0, 1.0])
    law = RelaxedSpikeAndSlab(0.5, logits=own, slab=GatedColumns(slab, prior(), drawn, probability))
    found = kl_divergence(law, SpikeAndSlab(logits=torch.zeros(UNITS), slab=prior())).sum()
    expected = torch.zeros(())
    weights = dist.Normal(slab.mean, slab.variance.sqrt())
    single = kl_divergence(weights, dist.Normal(torch.zeros(UNITS, COLUMNS), 1.5))
    for z in itertools.product([0.0, 1.0], repeat=UNITS + COLUMNS - 1):
        units = torch.tensor(z[:UNITS])
        columns = torch.tensor([*z[UNITS:], 1.0])
        chance = dist.Bernoulli(logits=own).log_prob(units).sum()
        chance = chance + dist.Bernoulli(logits=crossing).log_prob(columns[:-1]).sum()
        expected = expected + chance.exp() * (units.unsqueeze(1) * columns * single).sum()
    inclusion = kl_divergence(dist.Bernoulli(logits=own), dist.Bernoulli(0.5)).sum()
    expected = expected + inclusion
    assert torch.allclose(found, expected, rtol=1e-5)
    for mine, exact in zip(
        torch.autograd.grad(found, [own, crossing], retain_graph=True),
        torch.autograd.grad(expected, [own, crossing]),
        strict=True,
    ):
        assert torch.allclose(mine, exact, rtol=1e-4, atol=1e-6)


def test_columns_that_are_out_are_the_priors():
    drawn = torch.tensor([0.0, 1.0, 1.0, 0.0])
    law = GatedColumns(slabs()["tied"], prior(), drawn, torch.full((COLUMNS,), 0.5))
    torch.manual_seed(1)
    draws = law.rsample(torch.Size([20_000]))
    out, inside = drawn == 0, slabs()["tied"]
    assert torch.allclose(draws.mean(0)[:, out], torch.zeros(UNITS, 2), atol=0.05)
    assert torch.allclose(draws.std(0)[:, out], torch.full((UNITS, 2), 1.5), rtol=0.03)
    assert torch.allclose(draws.mean(0)[:, ~out], inside.mean[:, ~out], atol=0.05)
    value = draws[0]
    each = torch.where(
        out,
        dist.Normal(0.0, 1.5).log_prob(value),
        dist.Normal(inside.mean, inside.scale).log_prob(value),
    )
    assert torch.allclose(law.log_prob(value), each.sum(-1), rtol=1e-5)
    assert torch.allclose(law.expand([2, UNITS]).log_prob(value)[1], each.sum(-1), rtol=1e-5)
