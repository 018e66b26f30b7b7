"""Gradients of a spike-and-slab guide by every stock estimator: right, or refused."""

import math

import pyro
import pyro.distributions as dist
import pyro.poutine as poutine
import pytest
import torch
from pyro.infer import (
    RenyiELBO,
    Trace_ELBO,
    TraceEnum_ELBO,
    TraceGraph_ELBO,
    TraceMeanField_ELBO,
    TraceTMC_ELBO,
)

from pyro_sparse.distributions import RelaxedSpikeAndSlab, SpikeAndSlab
from pyro_sparse.infer import ELBO

Y = torch.tensor([0.2, 3.0], dtype=torch.float64)
START = {"logits": torch.tensor([0.4, -0.7]), "loc": torch.tensor([0.3, 1.0])}
START = {name: value.double() for name, value in START.items()}
SCALE, WEIGHT = 0.6, 0.3


def exact(scale: float) -> dict[str, torch.Tensor]:
    """The ELBO is closed: normal slabs, N(x, 1) likelihood, prior inclusion 0.3."""
    logits, loc = (value.clone().requires_grad_() for value in START.values())
    law = SpikeAndSlab(logits=logits, slab=dist.Normal(loc, SCALE))
    kl = torch.distributions.kl_divergence(
        law, SpikeAndSlab(0.3, dist.Normal(torch.zeros_like(Y), 1.0))
    )
    fit = 0.5 * (Y.square() - 2 * Y * law.mean + law.variance + law.mean.square())
    gradients = torch.autograd.grad((scale * kl + fit).sum(), [logits, loc])
    return dict(zip(START, gradients, strict=True))


WRAPPERS = {
    "law": lambda law: law,
    "mask": lambda law: law.mask(True),
    "stock independent": lambda law: dist.Independent(law, 0),
    "stock mask": lambda law: dist.MaskedDistribution(law, torch.tensor(True)),
    "stock expanded": lambda law: dist.ExpandedDistribution(law, law.batch_shape),
    "identity": lambda law: dist.TransformedDistribution(law, []),
}


def programs(wrap, subsample, scale):
    def model():
        with pyro.plate("data", 2, subsample=subsample) as index:
            with poutine.scale(scale=scale):
                x = pyro.sample(
                    "x", SpikeAndSlab(0.3, dist.Normal(torch.zeros_like(Y[index]), 1.0))
                )
            pyro.sample("y", dist.Normal(x, 1.0), obs=Y[index])

    def guide():
        logits, loc = (pyro.param(name, value.clone()) for name, value in START.items())
        with pyro.plate("data", 2, subsample=subsample) as index, poutine.scale(scale=scale):
            slab = dist.Normal(loc[index], SCALE)
            pyro.sample("x", wrap(SpikeAndSlab(logits=logits[index], slab=slab)))

    return model, guide


def mean_gradients(elbo, wrap, subsamples, scale, repeats):
    """Over all subsamples; with the standard errors over repeats."""
    pyro.clear_param_store()
    pyro.set_rng_seed(1)
    found = {name: [] for name in START}
    for _ in range(repeats):
        total = {name: torch.zeros_like(Y) for name in START}
        for subsample in subsamples:
            elbo.loss_and_grads(*programs(wrap, subsample, scale))
            for name, parameter in pyro.get_param_store()._params.items():
                total[name] += parameter.grad / len(subsamples)
                parameter.grad = None
        for name, value in total.items():
            found[name].append(value)
    pyro.clear_param_store()
    return {name: torch.stack(values) for name, values in found.items()}


def check(elbo, wrap=WRAPPERS["law"], subsampled=False, scale=1.0, repeats=30):
    subsamples = [torch.tensor([0]), torch.tensor([1])] if subsampled else [torch.arange(2)]
    found = mean_gradients(elbo, wrap, subsamples, scale, repeats)
    for name, expected in exact(scale).items():
        error = found[name].std(0) / math.sqrt(repeats)
        assert bool((error < 0.2).all()), error
        assert bool(((found[name].mean(0) - expected).abs() < 5 * error + 1e-9).all()), name


MANY = {"num_particles": 200, "vectorize_particles": True, "max_plate_nesting": 1}


@pytest.mark.parametrize("scale", [1.0, WEIGHT])
@pytest.mark.parametrize("subsampled", [False, True])
@pytest.mark.parametrize("kind", [Trace_ELBO, TraceGraph_ELBO, TraceEnum_ELBO])
def test_stock_estimators(kind, subsampled, scale):
    options = {"strict_enumeration_warning": False} if kind is TraceEnum_ELBO else {}
    check(kind(**MANY, **options), subsampled=subsampled, scale=scale)


@pytest.mark.parametrize("scale", [1.0, WEIGHT])
@pytest.mark.parametrize("subsampled", [False, True])
def test_own_estimator(subsampled, scale):
    check(ELBO(num_particles=8), subsampled=subsampled, scale=scale, repeats=80)


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_wrappers_keep_the_score(wrapper):
    check(Trace_ELBO(**MANY), WRAPPERS[wrapper])


def test_refused():
    law = WRAPPERS["law"]
    for elbo, kind in ((TraceMeanField_ELBO(), "fully reparam"), (RenyiELBO(), None)):
        with pytest.raises(NotImplementedError, match=kind):
            elbo.loss_and_grads(*programs(law, torch.arange(2), 1.0))
    pyro.clear_param_store()

    def relaxed(law):
        return RelaxedSpikeAndSlab(0.5, logits=law.logits, slab=law.slab)

    for kind in (Trace_ELBO, TraceGraph_ELBO, RenyiELBO, TraceTMC_ELBO):
        options = {"strict_enumeration_warning": False} if kind is TraceTMC_ELBO else {}
        elbo = kind(num_particles=2, max_plate_nesting=1, **options)
        with pytest.raises(RuntimeError, match="no density"):
            elbo.loss_and_grads(*programs(relaxed, torch.arange(2), 1.0))
        pyro.clear_param_store()


def test_has_rsample_can_be_taken_away():
    """Then the whole log-density is the score, which any estimator of Pyro's understands."""

    def detached(law):
        return law.has_rsample_(False)

    check(Trace_ELBO(**MANY), detached)
    with pytest.raises(ValueError, match="cannot be made reparameterised"):
        SpikeAndSlab(
            logits=torch.zeros(1, requires_grad=True), slab=dist.Normal(0.0, 1.0)
        ).has_rsample_(True)


def test_an_atom_has_no_jacobian_and_no_bijection():
    law = SpikeAndSlab(0.3, dist.Normal(0.0, 1.0))
    scaled = dist.TransformedDistribution(law, [dist.transforms.AffineTransform(0.0, 10.0)])
    with pytest.raises(NotImplementedError, match="transform the slab"):
        scaled.log_prob(torch.tensor(0.0))
    with pytest.raises(NotImplementedError, match="guide of its own"):
        torch.distributions.biject_to(law.expand([2]).to_event(1).support)
    with pytest.raises(ValueError, match="needs the same atom"):
        torch.distributions.kl_divergence(law, dist.Normal(0.0, 1.0))


def test_a_slab_without_a_closed_kl():
    """KL(Bernoulli) exactly, γ times the slabs' by a draw: right on average, in gradients too."""
    logit = torch.tensor(0.4, dtype=torch.float64, requires_grad=True)
    q = dist.Normal(torch.tensor(0.5, dtype=torch.float64), 0.7)
    p = dist.StudentT(4.0, torch.tensor(0.0, dtype=torch.float64), 1.0)
    x = torch.linspace(-8, 8, 4001, dtype=torch.float64)
    slab = torch.trapezoid(q.log_prob(x).exp() * (q.log_prob(x) - p.log_prob(x)), x)
    torch.manual_seed(0)
    many = q.expand([20_000])
    law = SpikeAndSlab(logits=logit, slab=many)
    kl = torch.distributions.kl_divergence(law, SpikeAndSlab(0.2, p.expand([20_000])))
    gamma = logit.sigmoid()
    expected = gamma * (gamma / 0.2).log() + (1 - gamma) * ((1 - gamma) / 0.8).log() + gamma * slab
    assert abs(kl.mean() - expected) < 5 * kl.std() / math.sqrt(len(kl))
    (found,), (right,) = (torch.autograd.grad(v.mean(), logit) for v in (kl, expected))
    assert abs(found - right) < 0.02


def test_a_mixture_as_slab():
    slab = dist.MixtureSameFamily(
        dist.Categorical(torch.ones(2)), dist.Normal(torch.zeros(2), torch.tensor([0.5, 3.0]))
    )
    law = SpikeAndSlab(0.2, slab)
    x = torch.tensor([0.0, 0.5])
    expected = torch.tensor([0.8, 0.2]).log() + torch.stack([torch.zeros(()), slab.log_prob(x[1])])
    torch.testing.assert_close(law.log_prob(x), expected)
