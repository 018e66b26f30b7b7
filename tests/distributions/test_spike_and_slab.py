"""The spike-and-slab laws: densities, samples, gradients and their behaviour inside Pyro."""

import itertools
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO, TraceMeanField_ELBO
from torch import Tensor
from torch.distributions import kl_divergence

from pyro_sparse.distributions import (
    HalfCauchyFactors,
    RelaxedSpikeAndSlab,
    SpikeAndSlab,
    TiedNormal,
    TrapeziumSpikeAndSlab,
    TruncatedLogNormal,
)

SATURATED = [-100.0, -40.0, -1.0, 0.0, 2.0, 40.0, 100.0]


def double(values: list) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def rows(units: int = 3, length: int = 4) -> dist.Distribution:
    loc = torch.linspace(-1, 1, units * length, dtype=torch.float64).reshape(units, length)
    return dist.Normal(loc, 0.5).to_event(1)


# Shapes


@pytest.mark.parametrize("family", ["hard", "relaxed"])
@pytest.mark.parametrize(
    ("inclusion", "slab", "batch", "event"),
    [
        ((), dist.Normal(torch.zeros(3, 4), 1.0).to_event(1), (3,), (4,)),
        ((3,), dist.Normal(torch.zeros(4), 1.0).to_event(1), (3,), (4,)),
        ((2, 1), dist.Normal(torch.zeros(3, 4), 1.0).to_event(1), (2, 3), (4,)),
        ((3,), dist.Normal(0.0, 1.0), (3,), ()),
        ((), dist.Normal(torch.zeros(5, 3, 4), 1.0).to_event(2), (5,), (3, 4)),
        ((5,), dist.MultivariateNormal(torch.zeros(4), torch.eye(4)), (5,), (4,)),
        ((3,), TiedNormal(torch.zeros(3, 4), torch.ones(3), torch.ones(4)), (3,), (4,)),
    ],
)
def test_shapes_and_broadcasting(
    family: str, inclusion: tuple, slab: dist.Distribution, batch: tuple, event: tuple
) -> None:
    logits = torch.zeros(inclusion)
    if family == "hard":
        law = SpikeAndSlab(logits=logits, slab=slab)
    else:
        law = RelaxedSpikeAndSlab(0.5, logits=logits, slab=slab)
    wide = law.expand((7, *batch))
    assert type(wide) is type(law)
    assert law.batch_shape == batch
    for law in [law, wide]:  # noqa: B020
        batch = law.batch_shape
        assert law.event_shape == event
        value = law.rsample((2,))
        assert value.shape == (2, *batch, *event)
        assert law.rsample_inclusion((2,)).shape == (2, *batch)
        assert law.log_prob(value).shape == (2, *batch)
        assert law.mean.shape == law.variance.shape == (*batch, *event)
        assert law.to_event().log_prob(value).shape == (2,)
        assert law.to_event(1).to_event(-1).batch_shape == batch
        assert law.mask(torch.ones(batch).bool()).log_prob(value).shape == (2, *batch)
        assert law.support.event_dim == len(event)


def test_the_example_of_the_docstring() -> None:
    beta = pyro.sample("beta", SpikeAndSlab(0.1, dist.Normal(0, 1).expand([20, 5]).to_event(1)))
    assert beta.shape == (20, 5)


def test_numbers_follow_the_slab_in_dtype() -> None:
    law = SpikeAndSlab(0.1, rows())
    assert law.logits.dtype == torch.float64
    torch.testing.assert_close(law.logits, double([math.log(0.1 / 0.9)]).expand(3))
    assert SpikeAndSlab(0.1, dist.Normal(0.0, 1.0)).logits.dtype == torch.float32


def test_tiny_prior_probabilities_are_not_clamped() -> None:
    law = SpikeAndSlab(torch.tensor(1e-30), dist.Normal(0.0, 1.0))
    assert law.logits.item() == pytest.approx(math.log(1e-30), rel=1e-6)


@pytest.mark.parametrize(
    ("probability", "spike", "slab"), [(0.0, 0.0, -math.inf), (1.0, -math.inf, 0)]
)
def test_certain_inclusion_and_exclusion(probability: float, spike: float, slab: float) -> None:
    law = SpikeAndSlab(probability, dist.Uniform(double([-0.5]), double([0.5])))
    torch.testing.assert_close(law.log_prob(double([[0.0], [0.1]])), double([[spike], [slab]]))
    assert torch.isfinite(law.mean).all()
    assert torch.isfinite(law.variance).all()


# Density


def test_density_integrates_to_one() -> None:
    law = SpikeAndSlab(double([0.3]).squeeze(), dist.Normal(double([0.7]).squeeze(), 1.3))
    grid = torch.linspace(-12, 14, 20_002, dtype=torch.float64)
    grid = grid[grid != 0]
    slab = torch.trapezoid(law.log_prob(grid).exp(), grid)
    spike = law.log_prob(double([0.0]).squeeze()).exp()
    assert slab.item() == pytest.approx(0.3, rel=1e-6)
    assert (slab + spike).item() == pytest.approx(1.0, rel=1e-6)


def test_only_a_zero_event_is_the_spike() -> None:
    law = SpikeAndSlab(double([0.2, 0.2]), dist.Normal(torch.zeros(2, 2).double(), 1.0).to_event(1))
    log_prob = law.log_prob(double([[0.0, 0.0], [0.0, 1.0]]))
    inside = math.log(0.2) - math.log(2 * math.pi) - 0.5
    torch.testing.assert_close(log_prob, double([math.log(0.8), inside]))


@pytest.mark.parametrize("logit", SATURATED)
@pytest.mark.parametrize(
    "make_slab",
    [
        lambda a, b: dist.Normal(a, b),
        lambda a, b: dist.LogNormal(a, b),
        lambda a, b: dist.Gamma(a.exp(), b),
        lambda a, b: dist.HalfCauchy(b),
        lambda a, b: dist.InverseGamma(a.exp(), b),
        lambda a, b: TruncatedLogNormal(a, b, -20.0, 0.0),
        lambda a, b: HalfCauchyFactors(b),
    ],
)
def test_log_prob_is_differentiable_at_zero(logit: float, make_slab) -> None:
    logits = torch.tensor(logit, requires_grad=True)
    a, b = torch.tensor(0.4, requires_grad=True), torch.tensor(1e-3, requires_grad=True)
    law = SpikeAndSlab(logits=logits, slab=make_slab(a, b))
    value = torch.zeros(law.shape(), requires_grad=True)
    log_prob = law.log_prob(value)
    torch.testing.assert_close(log_prob, torch.nn.functional.logsigmoid(-torch.tensor(logit)))
    gradients = torch.autograd.grad(log_prob, [logits, a, b, value], allow_unused=True)
    assert gradients[0].item() == pytest.approx(-torch.sigmoid(torch.tensor(logit)).item())
    for gradient in gradients[1:]:
        assert gradient is None or (gradient == 0).all()


def test_gradients_of_log_prob() -> None:
    value = double([[0.0, 0.0], [0.3, -0.2], [1.0, 0.0]])

    def log_prob(logits: Tensor, loc: Tensor, scale: Tensor) -> Tensor:
        return SpikeAndSlab(logits=logits, slab=dist.Normal(loc, scale).to_event(1)).log_prob(value)

    arguments = [
        double([-1.0, 0.5, 3.0]),
        torch.randn(3, 2).double(),
        torch.rand(3, 2).double() + 1,
    ]
    assert torch.autograd.gradcheck(log_prob, [a.requires_grad_() for a in arguments])


# Moments and samples


@pytest.mark.parametrize(
    "law",
    [
        SpikeAndSlab(double([0.1, 0.5, 0.9]), rows()),
        RelaxedSpikeAndSlab(0.5, double([0.1, 0.5, 0.9]), rows()),
        SpikeAndSlab(double([0.7]), dist.Gamma(double([2.0]), 1.5)),
    ],
)
def test_samples_have_the_stated_moments(law: SpikeAndSlab) -> None:
    count = 40_000
    samples = law.sample((count,))
    error = 5 * (law.variance / count).sqrt()
    assert ((samples.mean(0) - law.mean).abs() < error).all()
    torch.testing.assert_close(samples.var(0), law.variance, rtol=0.06, atol=0.0)


@pytest.mark.parametrize("logit", [-40.0, -3.0, 0.0, 1.0, 40.0])
def test_straight_through_inclusion_is_hard_with_frequency_gamma(logit: float) -> None:
    law = RelaxedSpikeAndSlab(0.3, logits=torch.tensor(logit), slab=dist.Normal(0.0, 1.0))
    count = 40_000
    inclusion = law.rsample_inclusion((count,))
    assert ((inclusion == 0) | (inclusion == 1)).all()
    gamma = law.probs.item()
    assert abs(inclusion.mean().item() - gamma) <= 5 * math.sqrt(gamma * (1 - gamma) / count)
    # Excluded events are exactly zero, so that their density is the spike's.
    value = law.rsample((100,))
    assert torch.isfinite(law.log_prob(value)).all()


def test_soft_inclusion_is_the_concrete_distribution() -> None:
    logits = double([0.7]).squeeze().requires_grad_()
    law = RelaxedSpikeAndSlab(
        0.5, logits=logits, slab=dist.Normal(0.0, 1.0), straight_through=False
    )
    ours = law.rsample_inclusion((20_000,)).sort().values
    concrete = dist.RelaxedBernoulli(double([0.5]).squeeze(), logits=logits)
    theirs = concrete.sample((20_000,)).sort().values
    assert (ours - theirs).abs().mean() < 0.015
    (gradient,) = torch.autograd.grad(ours.mean(), logits)
    assert gradient > 0


def test_relaxed_gradient_of_a_linear_function() -> None:
    """d E[soft] / dlogit by the sample path against a quadrature of the concrete distribution."""
    temperature, logit = 0.5, 0.8
    uniform = (torch.arange(200_000, dtype=torch.float64) + 0.5) / 200_000

    def mean(shift: float) -> float:
        noisy = logit + shift + torch.logit(uniform)
        return torch.sigmoid(noisy / temperature).mean().item()

    expected = (mean(1e-4) - mean(-1e-4)) / 2e-4
    for straight_through in (False, True):
        logits = torch.full((40_000,), logit, dtype=torch.float64, requires_grad=True)
        law = RelaxedSpikeAndSlab(
            temperature, logits=logits, slab=rows(1, 1), straight_through=straight_through
        )
        (gradient,) = torch.autograd.grad(law.rsample_inclusion().sum(), logits)
        error = gradient.std().item() / math.sqrt(len(logits))
        assert abs(gradient.mean().item() - expected) < 5 * error


def test_pathwise_gradient_of_a_linear_function_is_unbiased() -> None:
    """E[z w] = γ loc, hence d/dloc = γ; and the scale does not matter."""
    count = 40_000
    loc = torch.full((count,), 0.4, dtype=torch.float64, requires_grad=True)
    scale = torch.full((count,), 0.7, dtype=torch.float64, requires_grad=True)
    law = SpikeAndSlab(double([0.3]).squeeze(), dist.Normal(loc, scale))
    for gradient, expected in zip(
        torch.autograd.grad(law.rsample().sum(), [loc, scale]), [0.3, 0.0], strict=True
    ):
        error = gradient.std().item() / math.sqrt(count)
        assert abs(gradient.mean().item() - expected) < 5 * error


@pytest.mark.parametrize("logit", [-100.0, -40.0, 40.0, 100.0])
@pytest.mark.parametrize("straight_through", [True, False])
def test_saturated_samples_have_finite_gradients(logit: float, straight_through: bool) -> None:
    logits = torch.full((50,), logit, requires_grad=True)
    law = RelaxedSpikeAndSlab(
        0.1, logits=logits, slab=dist.Normal(1.0, 1.0), straight_through=straight_through
    )
    law.rsample((10,)).sum().backward()
    assert torch.isfinite(logits.grad).all()


def test_infinite_draws_of_the_slab_do_not_leak() -> None:
    slab = dist.LogNormal(torch.full((1000,), 200.0), 1.0)  # overflows float32
    value = SpikeAndSlab(torch.tensor(0.5), slab).sample()
    assert not value.isnan().any()
    assert (value == 0).any()


# Validation


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SpikeAndSlab(slab=rows()), "exactly one of probs and logits, got neither"),
        (lambda: SpikeAndSlab(0.1, rows(), logits=0.0), "got both"),
        (lambda: SpikeAndSlab(0.1), "continuous distribution as slab, got None"),
        (lambda: SpikeAndSlab(0.1, dist.Bernoulli(0.1)), "continuous distribution as slab"),
        (lambda: SpikeAndSlab(torch.rand(7), rows()), r"shape \(7,\) does not broadcast"),
        (lambda: SpikeAndSlab(1.1, rows()), "parameter probs"),
        (lambda: SpikeAndSlab(logits=math.nan, slab=rows()), "parameter logits"),
        (lambda: RelaxedSpikeAndSlab(0.0, 0.1, rows()), "parameter temperature"),
        (lambda: RelaxedSpikeAndSlab(0.5, 0.1, dist.VonMises(0.0, 1.0)), "slab with rsample"),
        (lambda: SpikeAndSlab(0.1, rows()).to_event(-1), "cannot remove 1 event dim"),
    ],
)
def test_wrong_arguments_are_named(make, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_values_are_validated_against_the_slab_or_zero() -> None:
    law = SpikeAndSlab(0.5, dist.LogNormal(torch.zeros(2), 1.0).to_event(1))
    assert torch.isfinite(law.log_prob(torch.tensor([[0.0, 0.0], [1.0, 2.0]]))).all()
    for wrong in ([-1.0, 1.0], [0.0, 1.0]):
        with pytest.raises(ValueError, match="within the support"):
            law.log_prob(torch.tensor(wrong))
    with pytest.raises(ValueError, match="event_shape"):
        law.log_prob(torch.zeros(3))


# Inside Pyro


def test_closed_form_is_the_joint_kl() -> None:
    """Four units, enumerated over z; independent z and w sites pay the slab's KL regardless."""
    logits = double([-2.0, -1.0, 0.0, 3.0])
    guide = dist.Normal(double([[0.5, -1.0]] * 4), 0.1).to_event(1)
    prior = dist.Normal(torch.zeros(4, 2).double(), 1.0).to_event(1)
    inclusion = torch.sigmoid(logits)
    slab = kl_divergence(guide, prior)
    enumerated = 0.0
    for z in itertools.product([0, 1], repeat=4):
        z = double(list(z))
        mass = torch.where(z == 1, inclusion, 1 - inclusion).prod()
        prior_mass = torch.where(z == 1, double([0.3]), double([0.7])).prod()
        enumerated += mass * ((mass / prior_mass).log() + (z * slab).sum())
    q = RelaxedSpikeAndSlab(0.5, logits=logits, slab=guide)
    p = SpikeAndSlab(0.3, prior)
    joint = kl_divergence(q.to_event(1), p.to_event(1))
    torch.testing.assert_close(joint, enumerated, rtol=1e-12, atol=0.0)
    torch.testing.assert_close(joint, kl_divergence(q, p).sum())
    separate = kl_divergence(
        dist.Bernoulli(logits=logits).to_event(1),
        dist.Bernoulli(double([0.3] * 4)).to_event(1),
    ) + kl_divergence(guide.to_event(1), prior.to_event(1))
    assert separate > 1.3 * joint


OBSERVED = double([1.1, -0.4])


def toy_model() -> None:
    prior = dist.Normal(torch.zeros(2, 2).double(), 1.0).to_event(1)
    w = pyro.sample("w", SpikeAndSlab(double([0.4, 0.4]), prior).to_event(1))
    pyro.sample("y", dist.Normal(w.sum(-1), 0.8).to_event(1), obs=OBSERVED)


PARAMETERS = {
    "logits": double([0.5, -1.0]),
    "loc": double([[0.4, -0.2], [0.1, -0.6]]),
    "log_scale": double([[-0.5, -0.3], [-1.0, 0.2]]),
}


def exact_loss(logits: Tensor, loc: Tensor, log_scale: Tensor) -> Tensor:
    """Minus the ELBO of the toy, by enumeration of the two inclusions; all else is Gaussian."""
    prior = dist.Normal(torch.zeros(2, 2).double(), 1.0).to_event(1)
    gamma, variance = torch.sigmoid(logits), (2 * log_scale).exp()
    expected_log_likelihood = 0.0
    for unit in range(2):
        for z, mass in [(0, 1 - gamma[unit]), (1, gamma[unit])]:
            mean = z * loc[unit].sum()
            square = (OBSERVED[unit] - mean).square() + z * variance[unit].sum()
            log_likelihood = -0.5 * square / 0.64 - math.log(0.8) - 0.5 * math.log(2 * math.pi)
            expected_log_likelihood = expected_log_likelihood + mass * log_likelihood
    bernoulli = kl_divergence(dist.Bernoulli(logits=logits), dist.Bernoulli(double([0.4, 0.4])))
    slab = kl_divergence(dist.Normal(loc, log_scale.exp()).to_event(1), prior)
    return (bernoulli + gamma * slab).sum() - expected_log_likelihood


@pytest.mark.parametrize("shape", ["to_event", "masked", "plate"])
def test_stock_trace_elbo_has_an_unbiased_gradient(shape: str) -> None:
    """Many particles at once, by an outer vectorised plate; one gradient a particle."""
    count = 20_000
    leaves = {
        name: value.expand(count, *value.shape).clone().requires_grad_()
        for name, value in PARAMETERS.items()
    }

    def law(logits: Tensor, slab: dist.Distribution) -> SpikeAndSlab:
        whole = SpikeAndSlab(logits=logits, slab=slab)
        if shape == "masked":
            return whole.mask(torch.tensor(True)).to_event(1)
        return whole.to_event(1) if shape == "to_event" else whole

    def model() -> None:
        prior = dist.Normal(torch.zeros(2, 2).double(), 1.0).to_event(1)
        with pyro.plate("particles", count, dim=-1 if shape != "plate" else -2):
            if shape == "plate":
                with pyro.plate("units", 2, dim=-1):
                    w = pyro.sample("w", law(double([-0.4054651081081643] * 2), prior))
                    pyro.sample("y", dist.Normal(w.sum(-1), 0.8), obs=OBSERVED)
            else:
                w = pyro.sample("w", law(double([-0.4054651081081643] * 2), prior))
                pyro.sample("y", dist.Normal(w.sum(-1), 0.8).to_event(1), obs=OBSERVED)

    def guide() -> None:
        slab = dist.Normal(leaves["loc"], leaves["log_scale"].exp()).to_event(1)
        with pyro.plate("particles", count, dim=-1 if shape != "plate" else -2):
            if shape == "plate":
                with pyro.plate("units", 2, dim=-1):
                    pyro.sample("w", law(leaves["logits"], slab))
            else:
                pyro.sample("w", law(leaves["logits"], slab))

    loss = Trace_ELBO().differentiable_loss(model, guide)
    gradients = torch.autograd.grad(loss, list(leaves.values()))

    exact = {name: value.clone().requires_grad_() for name, value in PARAMETERS.items()}
    expected = torch.autograd.grad(exact_loss(**exact), list(exact.values()))
    assert loss.item() / count == pytest.approx(exact_loss(**exact).item(), rel=0.02)
    for gradient, truth in zip(gradients, expected, strict=True):
        error = gradient.std(0) / math.sqrt(count)
        assert ((gradient.mean(0) - truth).abs() < 5 * error).all()


def test_trace_mean_field_elbo_with_the_relaxed_guide() -> None:
    def guide() -> None:
        logits = pyro.param("logits", PARAMETERS["logits"].clone())
        loc = pyro.param("loc", PARAMETERS["loc"].clone())
        log_scale = pyro.param("log_scale", PARAMETERS["log_scale"].clone())
        slab = dist.Normal(loc, log_scale.exp()).to_event(1)
        pyro.sample("w", RelaxedSpikeAndSlab(0.5, logits=logits, slab=slab).to_event(1))

    elbo = TraceMeanField_ELBO(num_particles=2000, vectorize_particles=True, max_plate_nesting=0)
    assert elbo.loss(toy_model, guide) == pytest.approx(exact_loss(**PARAMETERS).item(), rel=0.05)
    svi = SVI(toy_model, guide, pyro.optim.Adam({"lr": 0.01}), TraceMeanField_ELBO())
    before = pyro.param("logits").clone()
    svi.step()
    assert not torch.equal(before, pyro.param("logits"))


def test_trace_mean_field_elbo_refuses_the_hard_guide() -> None:
    """Its inclusion has no pathwise gradient: Pyro's check sees the score term."""

    def guide() -> None:
        logits = PARAMETERS["logits"].clone().requires_grad_()
        slab = dist.Normal(PARAMETERS["loc"], 1.0).to_event(1)
        pyro.sample("w", SpikeAndSlab(logits=logits, slab=slab).to_event(1))

    with pytest.raises(NotImplementedError, match="fully reparameterized"):
        TraceMeanField_ELBO().differentiable_loss(toy_model, guide)


def test_a_slab_without_rsample_falls_back_to_the_score_function() -> None:
    law = SpikeAndSlab(0.5, dist.VonMises(torch.zeros(3), 1.0))
    assert not law.has_rsample
    parts = law.score_parts(law())
    assert parts.entropy_term == 0
    torch.testing.assert_close(parts.score_function, parts.log_prob)


def test_trapezium_gradient_is_unbiased_for_quadratic_functions():
    """Exact by enumeration, three inclusions that interact; straight-through is not."""
    logits = torch.tensor([-1.5, 0.3, 2.0], requires_grad=True)
    slab = dist.Delta(torch.ones(3))
    generator = torch.Generator().manual_seed(0)
    matrix, linear = (torch.randn(*shape, generator=generator) for shape in ((3, 3), (3,)))

    def value(z):
        return ((z @ matrix) * z).sum(-1) + z @ linear

    exact = torch.zeros(())
    for z in itertools.product([0.0, 1.0], repeat=3):
        z = torch.tensor(z)
        chance = dist.Bernoulli(logits=logits).log_prob(z).sum().exp()
        exact = exact + chance * value(z)
    (expected,) = torch.autograd.grad(exact, logits)
    torch.manual_seed(0)
    draws = TrapeziumSpikeAndSlab(logits=logits, slab=slab).rsample(torch.Size([200_000]))
    assert set(draws.unique().tolist()) == {0.0, 1.0}
    assert torch.allclose(draws.mean(0), logits.sigmoid(), atol=5e-3)
    (found,) = torch.autograd.grad(value(draws).mean(), logits)
    assert torch.allclose(found, expected, atol=0.01)
    relaxed = RelaxedSpikeAndSlab(0.5, logits=logits, slab=slab).rsample(torch.Size([200_000]))
    (biased,) = torch.autograd.grad(value(relaxed).mean(), logits)
    assert (biased - expected).abs().max() > 0.05
