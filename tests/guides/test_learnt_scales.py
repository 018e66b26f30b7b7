"""Prior scales of layers that are learnt: closed terms, where they end, what refuses."""

import pyro
import pytest
import torch
from pyro.infer import SVI, TraceMeanField_ELBO
from torch.distributions import Gamma, LogNormal, kl_divergence

import pyro_sparse as ps
from pyro_sparse import guides, likelihoods, models
from pyro_sparse.infer import ELBO
from pyro_sparse.modules import own_parameters
from pyro_sparse.nets import mlp


def made(cls=models.SpikeSlabGaussian, **options):
    x = torch.randn(60, 3)
    model = cls(
        mlp([3, 5, 1], "tanh"), x[:2], num_data=60, likelihood=likelihoods.Normal(0.1), **options
    )
    return model, guides.for_model(model), x


@pytest.mark.parametrize("variance", ["tied", "full"])
def test_the_kl_by_hand(variance):
    """Given the drawn precisions: KL of rows from N(0, 1/precision), of those from Gamma."""
    model, _, x = made(output_scale="learnt", slab_scale="learnt")
    guide = guides.for_model(model, variance=variance, initial_inclusion=0.7)
    assert model.learnt_scales == ["out", "fc1"]
    elbo = ELBO()
    assert all(elbo.analytic(model, guide, x, x[:, 0]).values())
    with torch.no_grad(), own_parameters(model, guide):
        torch.manual_seed(1)
        _, q = elbo._get_trace(model, guide, (x, x[:, 0]), {})
        torch.manual_seed(1)
        kl = elbo.estimate(model, guide, x, x[:, 0]).kl
    expected = 0.0
    for group, gamma in (("fc1", 0.7), ("out", 1.0)):
        precision = q[f"{group}.prior_precision"]["value"]
        law = {g.name: f for g, f in guide.layers()}[group].slab()
        moments = law.mean.square() + law.variance
        rows = 0.5 * (precision * moments - 1 - (precision * law.variance).log()).sum()
        expected = expected + gamma * rows
        own = guide.prior_precisions[group]
        expected = expected + kl_divergence(
            LogNormal(own.loc, own.log_scale.exp()), Gamma(torch.tensor(2.0), torch.tensor(2.0))
        )
    inclusion = kl_divergence(
        torch.distributions.Bernoulli(0.7 * torch.ones(5)),
        torch.distributions.Bernoulli(logits=model.inclusion_logits[0].expand(5)),
    ).sum()
    torch.testing.assert_close(kl, (expected + inclusion).detach(), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize(
    "cls", [models.SpikeSlabGroupHorseshoe, models.GroupNormalJeffreys, models.TurboMarkov]
)
def test_it_goes_where_the_weights_are(cls):
    """Rows of size 4: their precision's optimum is near (2 + 3) / (2 + 6 · 16 / 2)."""
    model, guide, x = made(cls, output_scale="learnt")
    (out,) = (family for group, family in guide.layers() if group.name == "out")
    with torch.no_grad():
        out.loc.fill_(4.0)
    out.loc.requires_grad_(False)
    own = guide.prior_precisions["out"]
    optimizer = torch.optim.Adam(own.parameters(), lr=0.05)
    elbo = ELBO()
    for _ in range(150):
        optimizer.zero_grad()
        with own_parameters(model, guide):
            elbo.estimate(model, guide, x, x[:, 0]).kl.backward()
        optimizer.step()
    assert float(own().mean.detach()) == pytest.approx(5 / 50, rel=0.35)


def test_stock_pyro_and_fit():
    model, guide, x = made(models.SpikeSlabGroupLasso, output_scale="learnt")
    pyro.clear_param_store()
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 1e-2}), TraceMeanField_ELBO())
    assert svi.step(x, x[:, 0]) > 0
    before = guide.prior_precisions["out"].loc.item()
    loader = ps.data.Batches(x, 5 * x[:, 0], 20)
    ps.fit(model, guide, loader, epochs=3, progress=False)
    assert guide.prior_precisions["out"].loc.item() != before
    kinds = guide.parameters_by_kind()
    scales = {id(one) for one in kinds["scales"]}
    assert {id(one) for one in guide.prior_precisions.parameters()} <= scales


def test_what_has_none_refuses():
    for cls in (models.ReducibleGaussian, models.LogNormalNoise, models.Deterministic):
        with pytest.raises(ValueError, match="no prior of its own on the output layer"):
            made(cls, output_scale="learnt")
    with pytest.raises(ValueError, match="positive output_scale or 'learnt', got 'free'"):
        made(output_scale="free")
    with pytest.raises(ValueError, match="positive, finite slab_scale, got -1"):
        made(slab_scale=-1.0)
    with pytest.raises(ValueError, match="columns are gated with the inputs"):
        made(slab_scale="learnt", prune_inputs=True)
    model, _, _ = made(output_scale="learnt", prune_inputs=True)
    assert model.learnt_scales == ["out"]
