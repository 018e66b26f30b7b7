"""The total KL of guide and model is the formula of the paper, in float64."""

import math

import numpy as np
import pyro.poutine as poutine
import pytest
import torch
from scipy.special import gammaln
from torch.distributions import kl_divergence

from pyro_sparse import guides, models
from pyro_sparse.infer import ELBO
from pyro_sparse.nets import mlp

INCLUSION, SLAB_SCALE, OUTPUT_SCALE = 0.07, 0.7, 1.3
LOG_2_PI_E = math.log(2 * math.pi * math.e)


def build(cls, variance="full", **options):
    """Model of 3-5-4-2 and a guide with random parameters."""
    model = cls(
        mlp([3, 5, 4, 2]).double(),
        torch.zeros(2, 3, dtype=torch.float64),
        num_data=9,
        inclusion_probability=INCLUSION,
        slab_scale=SLAB_SCALE,
        output_scale=OUTPUT_SCALE,
        **options,
    )
    guide = guides.for_model(model, variance=variance)
    with torch.no_grad():
        for parameter in guide.parameters():
            parameter.normal_(0, 0.7)
    return model, guide


def site_kls(model, guide, **fixed):
    """KL of every latent site, given its parents' values in the guide's draw or in ``fixed``."""
    with torch.no_grad():
        guide_trace = poutine.trace(guide).get_trace()
        with poutine.replay(trace=guide_trace), poutine.condition(data=fixed):
            model_trace = poutine.trace(model.rows).get_trace()
        return {
            name: kl_divergence(guide_trace.nodes[name]["fn"], site["fn"]).sum().item()
            for name, site in model_trace.nodes.items()
            if site["type"] == "sample"
        }


def rows_kl(guide):
    """Σ KL(Bern(γ) ‖ Bern(λ)) + Σ γ Σ [log σ0/σ + (σ² + μ²)/2σ0² − ½], and the output's KL."""
    total = 0.0
    for group, family in guide.layers():
        loc = family.loc.detach().numpy()
        if family.variance_kind == "tied":
            log_scale = family.row_log_scale.unsqueeze(-1) + family.column_log_scale
        else:
            log_scale = family.log_scale
        scale = log_scale.exp().detach().numpy()
        prior = SLAB_SCALE if group.prunable else OUTPUT_SCALE
        gaussian = np.log(prior / scale) + (scale**2 + loc**2) / (2 * prior**2) - 0.5
        if group.prunable:
            gamma = family.inclusion_logits.sigmoid().detach().numpy()
            total += (gamma * np.log(gamma / INCLUSION)).sum()
            total += ((1 - gamma) * np.log((1 - gamma) / (1 - INCLUSION))).sum()
            total += (gamma * gaussian.sum(-1)).sum()
        else:
            total += gaussian.sum()
    return total


def parameters(family):
    return family.loc.detach().numpy(), family.log_scale.exp().detach().numpy()


def total(kls, ending):
    return sum(value for name, value in kls.items() if name.endswith(ending))


@pytest.mark.parametrize("variance", ["full", "tied"])
def test_spike_slab_gaussian(variance):
    model, guide = build(models.SpikeSlabGaussian, variance)
    assert sum(site_kls(model, guide).values()) == pytest.approx(rows_kl(guide), rel=1e-6)


@pytest.mark.parametrize("variance", ["full", "tied"])
def test_spike_slab_group_lasso(variance):
    c, d = 3.0, 1.5
    model, guide = build(models.SpikeSlabGroupLasso, variance, varsigma2_shape=c, varsigma2_rate=d)
    kls = site_kls(model, guide)
    assert total(kls, ".rows") == pytest.approx(rows_kl(guide), rel=1e-6)

    m_v, s_v = (float(value) for value in parameters(guide.varsigma2))
    expected = -c * math.log(d) + math.lgamma(c) - c * m_v + d * math.exp(m_v + s_v**2 / 2)
    expected -= math.log(s_v) + 0.5 * LOG_2_PI_E
    assert kls["varsigma2"] == pytest.approx(expected, rel=1e-6)

    # E_q KL(τ² | ς²): Gauss–Hermite over ς², against the closed form.
    nodes, weights = np.polynomial.hermite_e.hermegauss(40)
    averaged = sum(
        weight
        * total(site_kls(model, guide, varsigma2=torch.tensor(math.exp(m_v + s_v * node))), "tau2")
        for node, weight in zip(nodes, weights / weights.sum(), strict=True)
    )
    expected = 0.0
    for name, length in (("fc1", 4), ("fc2", 6)):
        a = (length + 1) / 2
        m, s = parameters(guide.tau2[name])
        product = np.exp(m_v + s_v**2 / 2) * np.exp(m + s**2 / 2)
        kl = a * (math.log(2) - m_v - m) + gammaln(a) + 0.5 * product
        expected += (kl - np.log(s) - 0.5 * LOG_2_PI_E).sum()
    assert averaged == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(("global_scale", "local_scale"), [(1.0, 1.0), (0.2, 3.0)])
def test_spike_slab_group_horseshoe(global_scale, local_scale):
    model, guide = build(
        models.SpikeSlabGroupHorseshoe, global_scale=global_scale, local_scale=local_scale
    )

    def factors_kl(family, scale):
        """LogNormal against Gamma(½, scale θ), θ = scale², and against InverseGamma(½, 1)."""
        (m_a, m_b), (s_a, s_b) = (value.T for value in parameters(family))
        theta = scale**2
        first = 0.5 * math.log(theta) + gammaln(0.5) - 0.5 * m_a + np.exp(m_a + s_a**2 / 2) / theta
        second = gammaln(0.5) + 0.5 * m_b + np.exp(s_b**2 / 2 - m_b)
        return (first + second - np.log(s_a) - np.log(s_b) - LOG_2_PI_E).sum()

    kls = site_kls(model, guide)
    assert total(kls, ".rows") == pytest.approx(rows_kl(guide), rel=1e-6)
    expected = factors_kl(guide.global_scale, global_scale)
    assert kls["global_scale"] == pytest.approx(expected, rel=1e-6)
    expected = sum(factors_kl(guide.local_scale[name], local_scale) for name in ("fc1", "fc2"))
    assert total(kls, ".local_scale") == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(
    "cls", [models.SpikeSlabGaussian, models.SpikeSlabGroupLasso, models.SpikeSlabGroupHorseshoe]
)
def test_every_term_is_closed(cls):
    model, guide = build(cls, prune_inputs=True)
    x, y = torch.randn(4, 3, dtype=torch.float64), torch.randint(2, (4,))
    analytic = ELBO().analytic(model, guide, x, y)
    assert set(analytic.values()) == {True}
    assert "input.gate" in analytic
    assert {"fc1.rows", "fc2.rows", "out.rows"} <= set(analytic)


def test_input_gate():
    model, guide = build(models.SpikeSlabGaussian, prune_inputs=True)
    with torch.no_grad():
        q = poutine.trace(guide).get_trace().nodes["input.gate"]["fn"]
        p = poutine.trace(model.input_gate).get_trace().nodes["input.gate"]["fn"]
        gamma = guide.input_gate.inclusion_logits.sigmoid()
        expected = gamma * (gamma / 0.5).log() + (1 - gamma) * ((1 - gamma) / 0.5).log()
        assert torch.allclose(kl_divergence(q, p), expected.sum())
