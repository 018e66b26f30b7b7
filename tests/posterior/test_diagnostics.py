"""k-hat, importance-weighted bound, simulation-based calibration: where answers are known."""

import math
import warnings

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from scipy import stats

from pyro_sparse import guides, likelihoods, models
from pyro_sparse.nets import mlp
from pyro_sparse.posterior import (
    Calibration,
    Posterior,
    importance_weighted_elbo,
    khat,
    log_weights,
    pareto_k,
    sbc,
)

# -- the generalised Pareto fit --------------------------------------------------------------------


@pytest.mark.parametrize("shape", [0.2, 0.5, 1.0, 2.0])
def test_pareto_k_of_pareto_ratios(shape):
    # 40 000 ratios with tail index 1/k; the prior pulls towards ½ by 10 of 610 observations.
    exponential = -torch.rand(40_000, dtype=torch.float64).log()
    k = pareto_k(shape * exponential)
    # Standard error of the fit: (1 + k)/√600.
    assert k == pytest.approx((600 * shape + 5) / 610, abs=5 * (1 + shape) / math.sqrt(600))


@pytest.mark.parametrize("scale", [0.1, 0.7, 1.5, 4.0])
def test_pareto_k_agrees_with_arviz(scale):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import arviz
    ratios = scale * torch.randn(1500, dtype=torch.float64)
    psislw = getattr(arviz, "psislw", None)
    if psislw is None:
        pytest.skip("this ArviZ has its Pareto fit elsewhere")
    _, expected = psislw(ratios.numpy().copy(), reff=1.0)
    assert pareto_k(ratios) == pytest.approx(float(np.asarray(expected)), abs=1e-6)


def test_pareto_k_depends_on_the_ratios_shape_only():
    ratios = 2 * torch.randn(500, dtype=torch.float64)
    k = pareto_k(ratios)
    assert pareto_k(ratios + 900) == pytest.approx(k, abs=1e-9)
    assert pareto_k(ratios - 9e4) == pytest.approx(k, abs=1e-6)
    assert pareto_k(ratios.flip(0)) == k


def test_pareto_k_of_bounded_ratios():
    assert pareto_k(torch.full((100,), -3.0)) == -math.inf
    # Two values, the larger one fills the tail.
    assert pareto_k(torch.arange(100.0).ge(50).double()) == -math.inf
    # Draws without weight are no obstacle.
    ratios = torch.randn(500, dtype=torch.float64)
    ratios[::2] = -math.inf
    assert math.isfinite(pareto_k(ratios))


@pytest.mark.parametrize("bad", [torch.randn(24), torch.full((99,), math.nan), torch.ones(5, 9)])
def test_pareto_k_refuses(bad):
    with pytest.raises(ValueError, match="expected"):
        pareto_k(bad)


# -- ratios and bounds -----------------------------------------------------------------------------


def test_ratios_of_an_exact_guide_are_the_log_evidence(conjugate, separable):
    y = conjugate.y
    ratios = log_weights(conjugate.model, conjugate.guide(y), y, num_samples=30)
    assert ratios.shape == (30,)
    assert ratios.tolist() == pytest.approx([conjugate.log_evidence(y)] * 30, abs=1e-9)
    for relaxed in (True, False):
        ratios = log_weights(separable.model, separable.guide(relaxed=relaxed), num_samples=30)
        assert ratios.tolist() == pytest.approx([separable.log_evidence()] * 30, abs=1e-9)


def test_importance_weighted_elbo_rises_to_the_log_evidence(conjugate):
    y = conjugate.y
    guide = conjugate.guide(y, scale=1.5)
    ratios = log_weights(conjugate.model, guide, y, num_samples=2000)
    # KL(N(m, 1.5² S) ‖ N(m, S)) in three dimensions.
    kl = 1.5 * (1.5**2 - 1 - 2 * math.log(1.5))
    elbo, error = importance_weighted_elbo(ratios, 1)
    assert elbo == pytest.approx(conjugate.log_evidence(y) - kl, abs=5 * error)
    bounds = [importance_weighted_elbo(ratios, k)[0] for k in (1, 5, 50)]
    assert bounds == sorted(bounds)
    assert bounds[-1] == pytest.approx(conjugate.log_evidence(y), abs=0.05)
    assert bounds[0] < bounds[-1] - 0.3
    assert math.isnan(importance_weighted_elbo(ratios, 2000)[1])
    for k in (0, 2001):
        with pytest.raises(ValueError, match="between 1 and the number of ratios 2000"):
            importance_weighted_elbo(ratios, k)


# -- k-hat -----------------------------------------------------------------------------------------


def test_khat_of_exact_and_wrong_guides(conjugate):
    y = conjugate.y
    exact = khat(conjugate.model, conjugate.guide(y), y, blocks={})
    assert exact.joint < 0.1
    assert exact.trusted
    assert exact.blocks == {}
    # Halved scales: index 1 − ¼ in theory, more at this number of draws.
    wrong = khat(conjugate.model, conjugate.guide(y, scale=0.5), y, blocks={})
    assert wrong.joint > 0.7
    assert not wrong.trusted
    assert wrong.importance_weighted_elbo > wrong.elbo
    # Too wide costs draws, but its ratios are bounded.
    assert khat(conjugate.model, conjugate.guide(y, scale=2.0), y, blocks={}).joint < 0.5
    # So does a guide next to the exact one pass.
    assert khat(conjugate.model, conjugate.guide(y, scale=0.98), y, blocks={}).joint < 0.4


def test_khat_of_spike_and_slab_guides(separable):
    exact = khat(separable.model, separable.guide(), num_samples=200, contexts=2)
    assert exact.joint < 0.1
    assert list(exact.blocks) == ["beta"]
    assert max(exact.blocks.values()) < 0.1
    narrow = khat(separable.model, separable.guide(scale=0.4), num_samples=600, contexts=1)
    assert narrow.joint > 0.7
    assert narrow.blocks["beta"] > 0.7


def test_khat_sees_wrong_inclusions_by_their_true_mass():
    """One coefficient, PIP ½, guide 1/4: two values of the ratio, one for each inclusion."""

    def model():
        law = models_law(torch.zeros(1), 0.0)
        pyro.sample("beta", law)

    def models_law(loc, logit, relaxed=False):
        from pyro_sparse.distributions import RelaxedSpikeAndSlab, SpikeAndSlab

        slab = dist.Normal(loc.double().unsqueeze(1), 1.0).to_event(1)
        logits = torch.full((1,), logit, dtype=torch.float64)
        if relaxed:
            return RelaxedSpikeAndSlab(0.5, logits=logits, slab=slab).to_event(1)
        return SpikeAndSlab(logits=logits, slab=slab).to_event(1)

    guide = lambda: pyro.sample("beta", models_law(torch.zeros(1), -math.log(3.0), True))  # noqa: E731
    ratios = log_weights(model, guide, num_samples=2000).exp()
    values = sorted(set(np.round(ratios.numpy(), 9)))
    assert values == pytest.approx([0.5 / 0.75, 0.5 / 0.25])
    assert float((ratios > 1).double().mean()) == pytest.approx(0.25, abs=5 * 0.0097)


def test_khat_of_chosen_blocks(separable):
    both = khat(separable.model, separable.guide(0.7), num_samples=50, blocks={"all": ["beta"]})
    assert list(both.blocks) == ["all"]
    text = str(both)
    assert text.splitlines()[1].split()[0] == "joint"
    assert "importance-weighted" in text
    with pytest.raises(ValueError, match="no site 'gamma'; there are beta"):
        khat(separable.model, separable.guide(), num_samples=50, blocks={"a": ["gamma"]})


def test_blocks_without_inclusions(conjugate):
    y = conjugate.y
    with pytest.raises(ValueError, match="has no inclusions"):
        khat(
            conjugate.model, conjugate.guide(y), y, num_samples=50, blocks={"a": ["beta:inclusion"]}
        )
    result = khat(conjugate.model, conjugate.guide(y, 0.5), y, num_samples=300, contexts=1)
    assert list(result.blocks) == ["beta"]


@pytest.mark.parametrize(
    ("cls", "blocks"),
    [
        (
            models.SpikeSlabGroupLasso,
            ["varsigma2", "fc1.tau2", "fc1.rows", "out.rows", "noise_precision"],
        ),
        (models.LogNormalNoise, ["fc1.noise", "input.noise", "noise_precision"]),
    ],
)  # fmt: skip
def test_khat_of_a_posterior(cls, blocks):
    x, y = torch.randn(12, 3), torch.randn(12)
    model = cls(mlp([3, 4, 1]), x, likelihood=likelihoods.Normal(), num_data=12, prune_inputs=True)
    posterior = Posterior(model, guides.for_model(model))
    result = posterior.khat(x, y, num_samples=50, contexts=1)
    assert sorted(result.blocks) == sorted(blocks)
    assert bool(result.ratios.isfinite().all())
    with pytest.raises(ValueError, match="all 12 training examples, got 5"):
        posterior.khat(x[:5], y[:5])


def test_khat_charges_nothing_for_what_was_pruned():
    x, y = torch.randn(12, 3), torch.randn(12)
    model = models.SpikeSlabGaussian(
        mlp([3, 4, 1]), x, likelihood=likelihoods.Normal(0.5), num_data=12
    )
    posterior = Posterior(model, guides.for_model(model, initial_scale=1e-3))
    posterior.prune(lambda p: {"fc1": torch.zeros(4, dtype=torch.bool)})
    before = posterior.khat(x, y, num_samples=30, blocks={}).ratios
    with torch.no_grad():
        # A unit that is out could be anything.
        posterior.guide.inclusion_logits()["fc1"].fill_(9.0)
        posterior.guide.row_families["fc1"].loc.fill_(30.0)
    after = posterior.khat(x, y, num_samples=30, blocks={}).ratios
    assert abs(float(before.mean() - after.mean())) < 5


# -- simulation-based calibration ------------------------------------------------------------------


def run_sbc(conjugate, **guide):
    return sbc(
        conjugate.model,
        lambda y: conjugate.guide(y, **guide),
        lambda latents: {"beta": latents["beta"], "norm": latents["beta"].norm()},
        num_simulations=200,
        seed=1,
    )


def test_sbc_accepts_an_exact_guide(conjugate):
    state = torch.get_rng_state()
    result = run_sbc(conjugate)
    assert bool((torch.get_rng_state() == state).all())
    assert list(result.ranks) == ["beta[0]", "beta[1]", "beta[2]", "norm"]
    assert all(int(ranks.min()) >= 0 and int(ranks.max()) <= 63 for ranks in result.ranks.values())
    # The seed is fixed; at this level one seed in a thousand fails.
    assert result.uniform(level=1e-3)
    assert "beta[1]" in str(result)


@pytest.mark.parametrize("wrong", [{"scale": 0.5}, {"scale": 2.0}, {"shift": 0.7}])
def test_sbc_rejects_wrong_guides(conjugate, wrong):
    result = run_sbc(conjugate, **wrong)
    assert not result.uniform(level=1e-6)
    assert max(result.p_values()[f"beta[{i}]"] for i in range(3)) < 1e-4


def test_sbc_breaks_ties_at_random():
    def model():
        z = pyro.sample("z", dist.Bernoulli(torch.tensor(0.3)))
        pyro.sample("y", dist.Normal(z, 1.0))

    def fit(y):
        log_ratio = dist.Normal(1.0, 1.0).log_prob(y) - dist.Normal(0.0, 1.0).log_prob(y)
        odds = 0.3 / 0.7 * log_ratio.exp()
        return lambda: pyro.sample("z", dist.Bernoulli(odds / (1 + odds)))

    def never(y):
        return lambda: pyro.sample("z", dist.Bernoulli(torch.tensor(0.02)))

    quantities = lambda latents: {"z": latents["z"]}  # noqa: E731
    assert sbc(model, fit, quantities, num_simulations=400, num_draws=31).uniform(1e-3)
    assert not sbc(model, never, quantities, num_simulations=400, num_draws=31).uniform(1e-6)


def test_sbc_of_a_posterior():
    """Ranks of a network's fitted guide: runs, with x for both model and guide."""
    x = torch.randn(8, 2)
    model = models.SpikeSlabGaussian(
        mlp([2, 3, 1]), x, likelihood=likelihoods.Normal(), num_data=8, prune_inputs=True
    )
    result = sbc(
        model,
        lambda y: Posterior(model, guides.for_model(model)),
        lambda latents: {"precision": latents["noise_precision"], "gate": latents["input.gate"]},
        x,
        num_simulations=3,
        num_draws=7,
    )
    assert {name: len(ranks) for name, ranks in result.ranks.items()} == {
        "precision": 3, "gate[0]": 3, "gate[1]": 3,
    }  # fmt: skip


def test_sbc_refuses(conjugate):
    fit, quantities = conjugate.guide, lambda latents: {"beta": latents["beta"]}
    with pytest.raises(ValueError, match="no site 'target'; there are beta, y"):
        sbc(conjugate.model, fit, quantities, observed="target")
    with pytest.raises(ValueError, match="at least one simulation"):
        sbc(conjugate.model, fit, quantities, num_simulations=0)


def test_p_values_of_ranks():
    ranks = torch.arange(8).repeat(20)
    ranks[:5] = 0
    result = Calibration({"a": ranks}, num_draws=7)
    counts = np.bincount(ranks.numpy(), minlength=8)
    assert result.p_values(8)["a"] == pytest.approx(stats.chisquare(counts).pvalue)
    assert result.p_values(2)["a"] == pytest.approx(
        stats.chisquare(counts.reshape(2, 4).sum(1)).pvalue
    )
    assert result.p_values() == result.p_values(8)
    with pytest.raises(ValueError, match="divides the 8 possible ranks"):
        result.p_values(3)
