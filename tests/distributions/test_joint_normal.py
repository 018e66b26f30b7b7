"""The joint normal of a matrix against torch's MultivariateNormal of its entries."""

import pyro.distributions as dist
import pytest
import torch
from torch.autograd import gradcheck
from torch.distributions import MultivariateNormal, kl_divergence

from pyro_sparse.distributions import JointNormal, LogUniform

ROWS, COLUMNS = 2, 3
SIZE = ROWS * COLUMNS


def parameters(seed=0):
    generator = torch.Generator().manual_seed(seed)
    loc = torch.randn(ROWS, COLUMNS, generator=generator, dtype=torch.float64)
    factor = torch.randn(SIZE, SIZE, generator=generator, dtype=torch.float64).tril(-1)
    diagonal = 0.3 + torch.rand(SIZE, generator=generator, dtype=torch.float64)
    return loc, factor + diagonal.diag()


@pytest.fixture
def law():
    return JointNormal(*parameters())


@pytest.fixture
def reference():
    loc, factor = parameters()
    return MultivariateNormal(loc.flatten(), scale_tril=factor)


def prior(mask=None):
    scale = torch.linspace(0.5, 2.0, SIZE, dtype=torch.float64).reshape(ROWS, COLUMNS)
    law = dist.Normal(torch.full_like(scale, 0.2), scale)
    return (law if mask is None else law.mask(mask)).to_event(2)


def test_density_entropy_and_moments(law, reference):
    values = torch.randn(5, ROWS, COLUMNS, dtype=torch.float64)
    torch.testing.assert_close(law.log_prob(values), reference.log_prob(values.flatten(1)))
    torch.testing.assert_close(law.log_prob(values[0]), reference.log_prob(values[0].flatten()))
    torch.testing.assert_close(law.entropy(), reference.entropy())
    torch.testing.assert_close(law.mean, reference.mean.reshape(ROWS, COLUMNS))
    torch.testing.assert_close(law.variance, reference.variance.reshape(ROWS, COLUMNS))


def test_samples(law, reference):
    draws = law.rsample((40_000,))
    assert draws.shape == (40_000, ROWS, COLUMNS)
    assert law.rsample().shape == (ROWS, COLUMNS)
    assert law.rsample((2, 3)).shape == (2, 3, ROWS, COLUMNS)
    flat, covariance = draws.flatten(1), reference.covariance_matrix
    error = (covariance.diagonal() / len(flat)).sqrt()
    assert ((flat.mean(0) - reference.mean).abs() < 5 * error).all()
    # Variance of a product of normals about their means: s_ii s_jj + s_ij².
    spread = torch.outer(covariance.diagonal(), covariance.diagonal()) + covariance.square()
    assert ((flat.T.cov() - covariance).abs() < 5 * (spread / len(flat)).sqrt()).all()


def test_kl_against_torch(law, reference):
    independent = prior().base_dist
    scale = independent.scale.flatten()
    other = MultivariateNormal(independent.loc.flatten(), scale_tril=scale.diag())
    torch.testing.assert_close(kl_divergence(law, prior()), kl_divergence(reference, other))
    everything = torch.ones(ROWS, COLUMNS, dtype=torch.bool)
    torch.testing.assert_close(
        kl_divergence(law, prior(everything)), kl_divergence(reference, other)
    )


@pytest.mark.parametrize(
    "kept", [[0], [5], [0, 3, 4], [1, 2, 3, 4, 5], [0, 1, 2, 3, 4, 5]], ids=str
)
def test_kl_with_a_mask_is_that_of_the_marginal(law, reference, kept):
    mask = torch.zeros(SIZE, dtype=torch.bool)
    mask[kept] = True
    marginal = MultivariateNormal(reference.mean[mask], reference.covariance_matrix[mask][:, mask])
    independent = prior().base_dist
    other = MultivariateNormal(
        independent.loc.flatten()[mask], scale_tril=independent.scale.flatten()[mask].diag()
    )
    value = kl_divergence(law, prior(mask.reshape(ROWS, COLUMNS)))
    torch.testing.assert_close(value, kl_divergence(marginal, other))


def test_kl_with_everything_out_is_nothing(law):
    value = kl_divergence(law, prior(torch.zeros(ROWS, COLUMNS, dtype=torch.bool)))
    assert float(value) == 0


def test_a_diagonal_factor_is_a_mean_field():
    loc, factor = parameters()
    scale = factor.diagonal()
    joint = JointNormal(loc, scale.diag())
    single = dist.Normal(loc, scale.reshape(ROWS, COLUMNS)).to_event(2)
    value = torch.randn(ROWS, COLUMNS, dtype=torch.float64)
    torch.testing.assert_close(joint.log_prob(value), single.log_prob(value))
    mask = torch.tensor([[True, False, True], [False, True, True]])
    torch.testing.assert_close(
        kl_divergence(joint, prior(mask)),
        kl_divergence(single.base_dist, prior().base_dist)[mask].sum(),
    )


@pytest.mark.parametrize("masked", [False, True])
def test_gradients(masked):
    loc, factor = parameters()
    value = torch.randn(ROWS, COLUMNS, dtype=torch.float64)
    mask = torch.tensor([[True, False, True], [False, True, True]]) if masked else None
    state = torch.get_rng_state()

    def statistics(loc, below, log_diagonal):
        torch.set_rng_state(state)
        law = JointNormal(loc, below.tril(-1) + log_diagonal.exp().diag())
        return (
            law.log_prob(value),
            law.entropy(),
            law.rsample((2,)),
            kl_divergence(law, prior(mask)),
        )

    leaves = (loc, factor.tril(-1), factor.diagonal().log())
    assert gradcheck(statistics, [leaf.clone().requires_grad_() for leaf in leaves])


def test_shapes(law):
    assert law.batch_shape == ()
    assert law.event_shape == (ROWS, COLUMNS)
    assert law.expand(()) is law
    with pytest.raises(NotImplementedError, match="no batch shape"):
        law.expand((2,))


@pytest.mark.parametrize(
    ("loc", "factor"), [((3,), (3, 3)), ((2, 3), (3, 3)), ((2, 3), (6, 5)), ((1, 2, 3), (6, 6))]
)
def test_shapes_that_do_not_fit(loc, factor):
    with pytest.raises(ValueError, match=r"loc \(K, m\)"):
        JointNormal(torch.zeros(loc), torch.ones(factor))


def test_validation():
    loc, factor = parameters()
    with pytest.raises(ValueError, match="scale_tril"):
        JointNormal(loc, factor + factor.T, validate_args=True)
    with pytest.raises(ValueError, match="support"):
        JointNormal(loc, factor, validate_args=True).log_prob(torch.full((2, 3), torch.nan))


def test_other_priors_have_no_closed_kl(law):
    for other in (
        LogUniform(torch.full((2, 3), -2.0), torch.zeros(2, 3)).to_event(2),
        dist.Normal(torch.zeros(3, 2), 1.0).to_event(2),
    ):
        with pytest.raises(NotImplementedError):
            kl_divergence(law, other)
