"""Several seeds of one model: independent, repeatable, and scored as a mixture."""

import math

import pytest
import torch

from pyro_sparse import data, fit_seeds, guides, models, nets
from pyro_sparse.likelihoods import Normal
from pyro_sparse.posterior import Posterior, SeedEnsemble
from pyro_sparse.posterior.calibration import predictive_scores


@pytest.fixture(scope="module")
def batches():
    torch.manual_seed(0)
    x = torch.randn(40, 3)
    return data.Batches(x, x[:, 0] + 0.1 * torch.randn(40), 20)


def make():
    net = nets.mlp([3, 5, 1])
    model = models.SpikeSlabGaussian(net, torch.zeros(2, 3), likelihood=Normal(), num_data=40)
    return model, guides.for_model(model)


@pytest.fixture(scope="module")
def ensemble(batches, tmp_path_factory):
    out = tmp_path_factory.mktemp("seeds")
    state = torch.get_rng_state()
    found = fit_seeds(make, batches, seeds=2, seed=4, out=out, epochs=2, progress=False)
    assert torch.equal(torch.get_rng_state(), state)
    assert sorted(path.name for path in out.iterdir()) == ["seed-4", "seed-5"]
    return found


def test_seeds_differ_and_are_merged(ensemble):
    first, second = (one.guide.mean_rows()["fc1"] for one in ensemble.posteriors)
    assert not torch.allclose(first, second)
    assert [len(run.history) for run in ensemble.runs] == [2, 2]
    assert ensemble.inclusion.probabilities["fc1"].shape == (2, 5)


def test_initial_weights_depend_on_the_seed_alone(ensemble, batches):
    torch.manual_seed(123)
    other = fit_seeds(make, batches, seeds=1, seed=4, epochs=1, progress=False)
    rows = [one.posteriors[0].model.initial_rows()["fc1"] for one in (ensemble, other)]
    assert torch.equal(*rows)
    with pytest.raises(ValueError, match="at least one seed, got 0"):
        fit_seeds(make, batches, seeds=0)


def test_predictions_are_of_the_mixture(ensemble, batches):
    x, y = batches.x, batches.y
    torch.manual_seed(1)
    draws = ensemble.predict(x, 3)
    assert draws.shape[:2] == (6, 40)
    torch.manual_seed(1)
    scores = ensemble.evaluate(x, y, 3, target_scale=2.0)
    error = (draws.mean(0) - y).square().mean().sqrt()
    assert scores["rmse"] == pytest.approx(2 * float(error), rel=1e-5)
    assert set(scores) == {"rmse", "nll", "rmse_error", "nll_error"}


def test_scores_of_a_mixture_by_hand():
    """Two draws of known normals: the log of the mean density, in the target's own unit."""
    likelihood, y = Normal(noise_scale=1.0), torch.tensor([0.0, 1.0])
    outputs = [torch.tensor([0.0, 1.0]), torch.tensor([2.0, 1.0])]
    found = predictive_scores(likelihood, [(output, {}) for output in outputs], y, 3.0)
    density = torch.stack([torch.distributions.Normal(o, 1.0).log_prob(y).exp() for o in outputs])
    nll = -density.mean(0).log().mean() + math.log(3)
    assert found["nll"] == pytest.approx(float(nll), rel=1e-5)
    assert found["rmse"] == pytest.approx(3 * math.sqrt(0.5), rel=1e-5)


def test_one_seed_is_its_posterior(ensemble, batches):
    one = SeedEnsemble(ensemble.posteriors[:1])
    assert isinstance(one.posteriors[0], Posterior)
    torch.manual_seed(2)
    mixture = one.evaluate(batches.x, batches.y, 4)
    torch.manual_seed(2)
    own = one.posteriors[0].evaluate(batches.x, batches.y, 4)
    for key in ("nll", "rmse"):
        assert mixture[key] == pytest.approx(own[f"{key}_ensemble"])
        assert mixture[f"{key}_error"] == pytest.approx(own[f"{key}_ensemble_error"])
