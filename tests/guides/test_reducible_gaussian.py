"""The guide of BMR: its laws, and the joint one given that some weights are 0."""

import pytest
import torch
from torch.distributions import Gamma, MultivariateNormal, kl_divergence

from pyro_sparse import guides, likelihoods, models
from pyro_sparse.guides.reducible_gaussian import JointRows
from pyro_sparse.infer import ELBO
from pyro_sparse.modules import own_parameters
from pyro_sparse.nets import mlp
from pyro_sparse.posterior import Posterior


def build(last_layer="joint", likelihood=None, **options):
    net = mlp([3, 4, 2]).double()
    if likelihood is not None:
        likelihood = likelihood.double()
    model = models.ReducibleGaussian(
        net, torch.zeros(2, 3).double(), num_data=20, likelihood=likelihood, **options
    )
    return model, guides.for_model(model, last_layer=last_layer)


def joint_rows(seed=0):
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(2, 3, generator=generator, dtype=torch.float64)
    family = JointRows(rows, 0.4)
    with torch.no_grad():
        family.below.copy_(0.5 * torch.randn(6, 6, generator=generator, dtype=torch.float64))
        family.log_diagonal.add_(0.3 * torch.randn(6, generator=generator, dtype=torch.float64))
    return family


def conditional(loc, covariance, inside):
    """Mean and covariance of some numbers given that the others are 0, by precisions."""
    precision = torch.linalg.inv(covariance)
    block = precision[inside][:, inside]
    shift = torch.linalg.solve(block, precision[inside][:, ~inside] @ loc[~inside])
    return loc[inside] + shift, torch.linalg.inv(block)


@pytest.mark.parametrize("kept", [[0, 1, 3], [5], [1, 2, 3, 4, 5]], ids=str)
def test_conditioning(kept):
    family = joint_rows()
    inside = torch.zeros(6, dtype=torch.bool)
    inside[kept] = True
    mean, covariance = conditional(
        family.loc.detach().flatten(), family.covariance().detach(), inside
    )
    family.condition(inside.reshape(2, 3))
    torch.testing.assert_close(family.loc.detach().flatten()[inside], mean)
    after = family.covariance().detach()
    torch.testing.assert_close(after[inside][:, inside], covariance)
    torch.testing.assert_close(family.variance().detach().flatten(), after.diagonal())
    # What is out is at 0, apart from the rest.
    assert not family.loc.detach().flatten()[~inside].any()
    assert not after[inside][:, ~inside].any()


def test_conditioning_on_everything():
    family = joint_rows()
    family.condition(torch.zeros(2, 3, dtype=torch.bool))
    assert not family.loc.any()
    assert family.covariance().isfinite().all()


def test_conditioning_once_more_after_training():
    """What went before is no part of the law, whatever training did to its parameters."""
    family = joint_rows()
    first = torch.tensor([[True, False, True], [True, True, False]])
    family.condition(first)
    with torch.no_grad():
        for parameter in family.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    loc, covariance = family.loc.detach().flatten().clone(), family.covariance().detach()
    inside = first.flatten()
    second = inside.clone()
    second[0] = False
    mean, expected = conditional(loc[inside], covariance[inside][:, inside], second[inside])
    family.condition(second.reshape(2, 3))
    torch.testing.assert_close(family.loc.detach().flatten()[second], mean)
    torch.testing.assert_close(family.covariance().detach()[second][:, second], expected)


@pytest.mark.parametrize("last_layer", ["mean-field", "joint"])
def test_total_kl(last_layer):
    """The sum over layers of torch's own KL, before and after pruning of single weights."""
    model, guide = build(last_layer, prior_scale=1.3)
    x, y = torch.randn(5, 3).double(), torch.tensor([0, 1, 0, 1, 1])
    with torch.no_grad():
        for parameter in guide.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))

    def expected():
        total = torch.zeros((), dtype=torch.float64)
        for name, law in Posterior(model, guide).gaussians().items():
            inside = model.support[name].flatten()
            covariance = law.covariance
            if covariance is None:
                covariance = law.variance.flatten().diag()
            q = MultivariateNormal(law.loc.flatten()[inside], covariance[inside][:, inside])
            eye = torch.eye(int(inside.sum()), dtype=torch.float64)
            total += kl_divergence(q, MultivariateNormal(torch.zeros_like(q.mean), 1.69 * eye))
        return total

    def actual():
        with torch.no_grad(), own_parameters(model, guide):
            return ELBO().estimate(model, guide, x, y).kl

    torch.testing.assert_close(actual(), expected())
    generator = torch.Generator().manual_seed(0)
    masks = {
        name: torch.rand(model.support[name].shape, generator=generator) < 0.6
        for name in model.support
    }
    assert model.support.restrict(masks) == sum(int((~mask).sum()) for mask in masks.values())
    guide.reduced()
    torch.testing.assert_close(actual(), expected())


def test_noise_precision_is_a_gamma():
    """Gamma prior, gamma posterior, closed KL."""
    model, guide = build("mean-field", likelihoods.Normal(shape=2.0, rate=3.0))
    law = guide.noise_precision()
    assert isinstance(law, Gamma)
    assert float(law.mean.detach()) == pytest.approx(1.0)
    x, y = torch.randn(5, 3).double(), torch.randn(5, 2).double()
    net_out = mlp([3, 4, 1]).double()
    model = models.ReducibleGaussian(
        net_out, x[:1], num_data=20, likelihood=likelihoods.Normal(shape=2.0, rate=3.0).double()
    )
    guide = guides.for_model(model)
    with torch.no_grad(), own_parameters(model, guide):
        assert all(ELBO().analytic(model, guide, x, y[:, 0]).values())
        kl = ELBO().estimate(model, guide, x, y[:, 0]).kl
        q = guide.noise_precision()
    rows = sum(
        kl_divergence(
            torch.distributions.Normal(law.loc, law.variance.sqrt()),
            torch.distributions.Normal(0.0, torch.ones((), dtype=torch.float64)),
        ).sum()
        for law in guide.offers()["gaussians"].laws.values()
    )
    gamma = kl_divergence(Gamma(q.concentration, q.rate), Gamma(2.0, torch.tensor(3.0).double()))
    torch.testing.assert_close(kl, rows + gamma)
    latents = Posterior(model, guide).mean_latents()
    torch.testing.assert_close(latents["noise_precision"], q.mean)


def test_options_are_checked():
    model, _ = build()
    with pytest.raises(ValueError, match="last_layer"):
        guides.for_model(model, last_layer="full")
    with pytest.raises(ValueError, match="initial_scale"):
        guides.for_model(model, initial_scale=0.0)
    wide = models.ReducibleGaussian(mlp([2, 500, 9]), torch.zeros(2, 2), num_data=9)
    with pytest.raises(ValueError, match="up to 4000"):
        guides.for_model(wide, last_layer="joint")
    with pytest.raises(ValueError, match="no gate on the inputs"):
        models.ReducibleGaussian(mlp([3, 4, 2]), torch.zeros(2, 3), num_data=9, prune_inputs=True)


def test_weights_that_are_out_stay_at_0():
    """Also those of a joint law, whatever the optimiser does; draws, means and gradients."""
    model, guide = build()
    x, y = torch.randn(8, 3).double(), torch.randint(2, (8,))
    masks = {name: torch.rand(model.support[name].shape) < 0.5 for name in model.support}
    model.support.restrict(masks)
    guide.reduced()
    loss = ELBO()(model, guide)
    optimiser = torch.optim.Adam(guide.parameters(), lr=0.05)
    for _ in range(10):
        optimiser.zero_grad()
        loss(x, y).backward()
        optimiser.step()
    parameters = Posterior(model, guide).mean_parameters()
    for name, mask in masks.items():
        rows = model.graph.rows(parameters, name)
        assert not rows[~mask].any()
        assert rows[mask].all()
    for output, _ in Posterior(model, guide).draws(x, 2):
        assert output.isfinite().all()
