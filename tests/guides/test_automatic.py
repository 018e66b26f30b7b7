"""Pyro's autoguides as guides of models: they start, train and are asked like others."""

import copy

import pyro
import pytest
import torch
from pyro.infer import Trace_ELBO

from pyro_sparse import data, fit, guides, models, nets
from pyro_sparse.guides import Automatic
from pyro_sparse.infer import ELBO, gradient_variance
from pyro_sparse.likelihoods import Normal
from pyro_sparse.modules import own_parameters
from pyro_sparse.names import AUTOGUIDES
from pyro_sparse.posterior import Posterior, log_weights
from pyro_sparse.runs import experiment
from pyro_sparse.runs.settings import settings_for

CONTINUOUS = ["ReducibleGaussian", "GroupHorseshoe", "GroupNormalJeffreys", "LogNormalNoise"]


@pytest.fixture(scope="module")
def batch():
    torch.manual_seed(0)
    x = torch.randn(30, 3)
    return x, x[:, 0] + 0.1 * torch.randn(30)


def made(name="auto-normal", cls="ReducibleGaussian", likelihood=None, **options):
    torch.manual_seed(1)
    net = nets.mlp([3, 5, 1])
    model = getattr(models, cls)(
        net, torch.zeros(2, 3), likelihood=likelihood or Normal(), num_data=30
    )
    return model, Automatic(model, name, guides.for_model(model), **options)


@pytest.mark.parametrize("name", AUTOGUIDES)
@pytest.mark.parametrize("cls", [*CONTINUOUS, "Deterministic"])
def test_starts_at_the_means_of_the_models_own_guide(cls, name):
    model, guide = made(name, cls)
    own = Posterior(model, guides.for_model(model)).mean_parameters()
    found = Posterior(model, guide).mean_parameters()
    for parameter, value in own.items():
        # Medians of noises and scales are near their means, since all variances start small.
        torch.testing.assert_close(found[parameter], value, rtol=0.2, atol=1e-3)


@pytest.mark.parametrize("name", AUTOGUIDES)
def test_the_bound_is_that_of_stock_pyro(name, batch):
    model, guide = made(name, "GroupHorseshoe", initial_scale=0.2)
    estimates = []
    for elbo in (ELBO(local_reparameterisation=False), Trace_ELBO()):
        torch.manual_seed(7)
        with own_parameters(model, guide):
            loss = elbo.differentiable_loss(model, guide, *batch)
        estimates.append(float(loss.detach()))
    assert estimates[0] == pytest.approx(estimates[1], rel=1e-5)


def test_at_the_same_law_it_has_the_bound_of_the_matched_guide(batch):
    """Mean-field Gaussians on a Gaussian prior: one family, in two ways."""
    model, guide = made(likelihood=Normal(noise_scale=0.5), initial_scale=0.1)
    matched = guides.for_model(model, initial_scale=0.1)
    torch.manual_seed(2)
    bounds = []
    for one in (guide, matched):
        ratios = log_weights(model, one, *batch, num_samples=600)
        bounds.append((float(ratios.mean()), float(ratios.std()) / 600**0.5))
    (first, error), (second, other) = bounds
    assert abs(first - second) < 4 * (error**2 + other**2) ** 0.5
    assert error < 1


def test_trains_and_is_asked(batch):
    model, guide = made()
    before = Posterior(model, copy.deepcopy(guide)).evaluate(*batch)
    fit(model, guide, data.Batches(*batch, 15), epochs=40, lr=2e-2, progress=False)
    posterior = Posterior(model, guide)
    after = posterior.evaluate(*batch, num_samples=50)
    assert after["rmse_ensemble"] < before["rmse_ensemble"]
    assert after["nll_compact"] < before["nll_compact"]
    # Nothing to select by: all units stay, and what has a family of its own is absent.
    assert all(bool(mask.all()) for mask in posterior.keep().values())
    assert posterior.inclusion() == posterior.gaussians() == posterior.row_variances() == {}
    assert posterior.mean_latents()["noise_precision"] > 1
    noise = gradient_variance(model, guide, *batch, draws=5)
    assert noise.total > 0
    assert pyro.get_param_store().keys() == set()


@pytest.mark.parametrize("cls", ["SpikeSlabGaussian", "SpikeSlabGroupHorseshoe", "TurboMarkov"])
def test_discrete_latents_have_no_bijection(cls):
    with pytest.raises(
        ValueError, match=r"fc1\.(rows|support)' of .* no bijection to real numbers"
    ):
        made(cls=cls)
    with pytest.raises(ValueError, match="expected a guide among auto-normal"):
        made("auto-ormal")


def test_a_run_and_its_folder(tmp_path):
    settings = settings_for("bmr", "diabetes", guide="auto-low-rank", net="mlp:4", epochs=2)
    # The passes of BMR need its own guide.
    assert settings.passes == 0
    dataset = data.load("diabetes", validation=settings.validation)
    summary = experiment.run(settings, tmp_path, dataset=dataset, progress=False, figures=False)
    assert summary["kept"] == summary["units"] == {"fc1": 4}
    _, _, posterior = experiment.load(tmp_path)
    x, y = dataset.test.x, dataset.test.y
    scale = dataset.preprocessing["target"]["std"]
    found = posterior.evaluate(x, y, num_samples=1, target_scale=scale)
    assert found["rmse_compact"] == pytest.approx(summary["rmse_compact"], rel=1e-5)
    with pytest.raises(ValueError, match="take dense with a guide"):
        settings_for("magnitude", "diabetes", guide="auto-delta")
