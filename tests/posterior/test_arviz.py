"""ArviZ objects from a posterior, and leave-one-out against cases with known answers."""

import math

import arviz as az
import numpy as np
import pyro
import pytest
import torch
from scipy import stats

from pyro_sparse import guides, likelihoods, models
from pyro_sparse.infer import fit
from pyro_sparse.nets import mlp
from pyro_sparse.posterior import Posterior, arviz
from pyro_sparse.posterior.draws import ExactDraws
from pyro_sparse.runs.zoo import ZOO


def names(data):
    return {str(name).strip("/") for name in (data.groups() if hasattr(data, "_groups") else data)}


def posterior_of(model="SpikeSlabGroupHorseshoe", likelihood=None, outputs=2, **options):
    torch.manual_seed(1)
    x = torch.randn(20, 3)
    made = getattr(models, model)(
        mlp([3, 5, 4, outputs]), x[:2], likelihood=likelihood, num_data=20, **options
    )
    posterior = Posterior(made, guides.for_model(made))
    with torch.no_grad():
        for logits in posterior.guide.inclusion_logits().values():
            logits.copy_(torch.linspace(-3, 3, len(logits)))
    return posterior, x


# -- what is in it -------------------------------------------------------------------------------


def test_groups_names_and_coordinates():
    posterior, x = posterior_of(prune_inputs=True)
    y = torch.randint(2, (20,))
    data = posterior.to_arviz(x, y, num_samples=150, rows=True)
    assert names(data) == {
        *("posterior", "posterior_predictive", "prior", "prior_predictive"),
        *("log_likelihood", "sample_stats", "observed_data", "constant_data"),
    }
    drawn = data["posterior"]
    assert dict(drawn.sizes) == {
        **{"chain": 1, "draw": 150, "group": 3, "input.unit": 3},
        **{"fc1.unit": 5, "fc1.weight": 4, "fc2.unit": 4, "fc2.weight": 6},
        **{"out.unit": 2, "out.weight": 5},
        **{"global_scale.0": 2, "fc1.local_scale.1": 2, "fc2.local_scale.1": 2},
    }
    assert drawn["group"].values.tolist() == ["input", "fc1", "fc2"]
    assert drawn["fc1.local_scale"].dims[2:] == ("fc1.unit", "fc1.local_scale.1")
    # Inclusions have their exact law, and excluded units have a row of zeros.
    inside = drawn["fc1.inclusion"].values[0]
    pip = data["constant_data"]["fc1.inclusion_probability"].values
    assert pip == pytest.approx(torch.linspace(-3, 3, 5).sigmoid().numpy(), rel=1e-5)
    assert np.abs(inside.mean(0) - pip).max() < 4 * 0.5 / math.sqrt(150)
    assert ((drawn["fc1.rows"].values[0] != 0).any(-1) == (inside == 1)).all()
    norms = np.linalg.norm(drawn["fc1.rows"].values, axis=-1)
    assert drawn["fc1.norm"].values == pytest.approx(norms, rel=1e-5)
    counts = drawn["units_included"].values[0]
    assert (counts[:, 1] == inside.sum(1)).all()
    # The prior has the same variables, and its own probabilities.
    assert set(data["prior"].data_vars) == set(drawn.data_vars)
    assert data["prior"]["input.inclusion"].values.mean() == pytest.approx(0.5, abs=0.1)
    assert data["observed_data"]["y"].values.tolist() == y.tolist()
    assert np.array_equal(data["constant_data"]["x"].values, x.numpy())
    assert data["constant_data"]["x"].dims == ("observation", "input.unit")
    assert data.attrs["num_data"] == 20


def test_predictive_of_classes_is_that_of_the_posterior():
    posterior, x = posterior_of()
    y = torch.randint(2, (20,))
    data = posterior.to_arviz(x, y, num_samples=100)
    predictive = data["posterior_predictive"]
    probability = predictive["probability"].values[0]
    assert predictive["probability"].dims == ("chain", "draw", "observation", "class")
    assert probability.sum(-1) == pytest.approx(np.ones((100, 20)), abs=1e-5)
    expected = posterior.predict(x, 100).mean(0).numpy()
    assert np.abs(probability.mean(0) - expected).max() < 0.2
    chosen = np.take_along_axis(probability, y.numpy()[None, :, None], -1)[..., 0]
    log_likelihood = data["log_likelihood"]["y"].values[0]
    assert log_likelihood == pytest.approx(np.log(chosen), abs=1e-4)
    # The targets are drawn from these probabilities.
    drawn = predictive["y"].values[0]
    assert drawn.mean() == pytest.approx(probability[..., 1].mean(), abs=4 * 0.5 / 44)


def test_of_numbers():
    posterior, x = posterior_of(likelihood=likelihoods.Normal(), outputs=1)
    data = posterior.to_arviz(x, torch.randn(20), num_samples=60)
    drawn, predictive = data["posterior"], data["posterior_predictive"]
    noise = drawn["noise_scale"].values[0]
    assert noise == pytest.approx(drawn["noise_precision"].values[0] ** -0.5, rel=1e-5)
    residual = (predictive["y"].values - predictive["mean"].values)[0] / noise[:, None]
    assert stats.kstest(residual.ravel(), "norm").pvalue > 1e-3
    law = stats.norm(predictive["mean"].values[0], noise[:, None])
    observed = data["observed_data"]["y"].values
    expected = law.logpdf(observed)
    assert data["log_likelihood"]["y"].values[0] == pytest.approx(expected, rel=1e-3, abs=1e-4)


def test_densities_are_those_of_pyro():
    """log p and log q of each draw, against stock traces replayed at the recorded sites."""
    posterior, x = posterior_of(likelihood=likelihoods.Normal(), outputs=1)
    y = torch.randn(20)
    torch.manual_seed(5)
    data = posterior.to_arviz(x, y, num_samples=1)
    torch.manual_seed(5)
    with ExactDraws(), pyro.settings.context(module_local_params=True):
        trace = pyro.poutine.trace(posterior.guide).get_trace()
        replayed = pyro.poutine.replay(posterior.model, trace=trace)
        joint = pyro.poutine.trace(replayed).get_trace(x, y)
    p, q = float(joint.log_prob_sum().detach()), float(trace.log_prob_sum().detach())
    got = data["sample_stats"]
    assert float(got["log_q"].values[0, 0]) == pytest.approx(q, rel=1e-5)
    assert float(got["log_p"].values[0, 0]) == pytest.approx(p, rel=1e-5)


def test_only_what_is_given():
    posterior, x = posterior_of()
    assert names(posterior.to_arviz(num_samples=2)) == {"posterior", "prior", "constant_data"}
    data = posterior.to_arviz(x, num_samples=2)
    assert "observed_data" not in names(data)
    assert "posterior_predictive" in names(data)
    # Part of the data: their likelihood, but not the posterior's joint density.
    data = posterior.to_arviz(x[:7], torch.zeros(7).long(), num_samples=2)
    assert "log_likelihood" in names(data)
    assert "sample_stats" not in names(data)
    with pytest.raises(ValueError, match="log_likelihood and sample_stats"):
        arviz.loo(data)


@pytest.mark.parametrize("name", sorted({entry.model for entry in ZOO.values()}))
def test_every_model(name, tmp_path):
    posterior, x = posterior_of(name)
    data = posterior.to_arviz(x, torch.zeros(20).long(), num_samples=3)
    improper = {"Deterministic", "LogNormalNoise", "GroupNormalJeffreys"}
    assert ("prior" in names(data)) == (name not in improper)
    for group in ("log_likelihood", "sample_stats"):
        for values in data[group].data_vars.values():
            assert np.isfinite(values.values).all()
    arviz.save(data, tmp_path / "data.nc")
    assert names(arviz.load(tmp_path / "data.nc")) == names(data)


def test_prior_draws_leave_the_posteriors_as_they_are():
    """The check whether the prior is proper takes no random number from the draws."""
    posterior, _ = posterior_of("SpikeSlabGaussian")
    torch.manual_seed(0)
    first = posterior.to_arviz(num_samples=2, rows=True)["posterior"]["fc1.rows"].values
    torch.manual_seed(0)
    again = posterior.to_arviz(num_samples=2, rows=True)["posterior"]["fc1.rows"].values
    assert np.array_equal(first, again)


def test_wrong_arguments():
    posterior, x = posterior_of()
    with pytest.raises(ValueError, match="num_samples to be a whole number"):
        posterior.to_arviz(x, num_samples=0)
    with pytest.raises(ValueError, match="expected the inputs x"):
        posterior.to_arviz(y=torch.zeros(3))
    with pytest.raises(ValueError, match="got 3 for 20"):
        posterior.to_arviz(x, torch.zeros(3))


# -- what ArviZ makes of it ----------------------------------------------------------------------


def test_save_and_load(tmp_path):
    posterior, x = posterior_of(prune_inputs=True)
    data = posterior.to_arviz(x, torch.randint(2, (20,)), num_samples=5, rows=True)
    arviz.save(data, tmp_path / "data.nc")
    back = arviz.load(tmp_path / "data.nc")
    assert names(back) == names(data)
    for group in names(data):
        for name, values in data[group].data_vars.items():
            assert np.array_equal(back[group][name].values, values.values), name
            assert back[group][name].dims == values.dims
    assert back.attrs["model"] == "SpikeSlabGroupHorseshoe"
    with pytest.raises(FileNotFoundError, match="is no file"):
        arviz.load(tmp_path / "none.nc")


@pytest.mark.filterwarnings("ignore:Passing a dict or None as alias_mapping")
def test_arviz_summarises_and_plots_it():
    posterior, x = posterior_of(likelihood=likelihoods.Normal(), outputs=1)
    data = posterior.to_arviz(x, torch.randn(20), num_samples=50)
    table = az.summary(data, var_names=["fc1.inclusion", "noise_scale"], kind="stats")
    assert table.loc["noise_scale", "mean"] == pytest.approx(
        float(data["posterior"]["noise_scale"].mean()), abs=1e-3
    )
    assert len(table) == 6
    if hasattr(az, "plot_ppc"):
        import matplotlib.pyplot as plt

        axes = az.plot_forest(data, var_names=["fc1.local_scale"], combined=True)
        assert len(axes) == 1
        assert az.plot_ppc(data, var_names=["y"], num_pp_samples=10) is not None
        plt.close("all")


# -- leave-one-out -------------------------------------------------------------------------------


def conjugate(rng, shift, draws=4000, count=12):
    """y_i ~ N(θ, 1), θ ~ N(0, 100), draws of q = N(posterior mean + shift, posterior variance).

    Returns the ArviZ object, the exact Σ log p(y_i | y_−i), and by how much the fit exceeds it.
    """
    y = rng.normal(1.0, 1.0, count)
    variance = 1 / (count + 0.01)
    mean = variance * y.sum()
    theta = rng.normal(mean + shift, math.sqrt(variance), draws)
    log_likelihood = stats.norm.logpdf(y, theta[:, None], 1)
    log_p = stats.norm.logpdf(theta, 0, 10) + log_likelihood.sum(1)
    log_q = stats.norm.logpdf(theta, mean + shift, math.sqrt(variance))
    exact = 0.0
    for i in range(count):
        left = 1 / (count - 1 + 0.01)
        predicted = left * np.delete(y, i).sum()
        exact += stats.norm.logpdf(y[i], predicted, math.sqrt(1 + left))
    data = arviz.build(
        {
            "posterior": {"theta": theta},
            "log_likelihood": {"y": log_likelihood},
            "sample_stats": {"log_p": log_p, "log_q": log_q},
            "observed_data": {"y": y},
        },
        {},
        {"y": ["observation"]},
    )
    fitted = stats.norm.logpdf(y, mean + shift, math.sqrt(1 + variance)).sum()
    return data, exact, fitted - exact


@pytest.mark.parametrize("shift", [0.0, 0.2])
def test_loo_of_a_conjugate_model(shift):
    """Exact draws and shifted ones give the exact value; without correction the shift shows."""
    data, exact, surplus = conjugate(np.random.default_rng(0), shift)
    found = arviz.loo(data)
    assert found.elpd == pytest.approx(exact, abs=0.05)
    assert found.pareto_k.max() < 0.7
    assert found.p == pytest.approx(surplus, abs=0.05)
    assert found.se > 0
    assert found.elpd_i.sum() == pytest.approx(found.elpd)
    uncorrected = az.loo(data, var_name="y")
    plain = float(getattr(uncorrected, "elpd_loo", getattr(uncorrected, "elpd", None)))
    assert (abs(plain - exact) < 0.1) == (shift == 0)


def test_loo_knows_a_guide_that_is_wrong():
    data, _, _ = conjugate(np.random.default_rng(0), 3.0)
    assert arviz.loo(data).pareto_k.min() > 0.7


def test_loo_of_a_fitted_network():
    x = torch.linspace(-1, 1, 30).unsqueeze(-1)
    y = 2 * x.squeeze(-1) + 0.3 * torch.randn(30)
    model = models.SpikeSlabGaussian(
        mlp([1, 2, 1]), x[:2], likelihood=likelihoods.Normal(0.3), num_data=30
    )
    guide = guides.for_model(model)
    fit(model, guide, [(x, y)], epochs=150, lr=4e-2, progress=False, seed=0)
    posterior = Posterior(model, guide)
    found = arviz.loo(posterior.to_arviz(x, y, num_samples=300))
    # New data are predicted a little worse than those that were fitted.
    score = -posterior.evaluate(x, y, num_samples=200)["nll_ensemble"]
    assert score - 0.5 < found.elpd / 30 < score + 0.05
