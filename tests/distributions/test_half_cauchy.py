"""The product form of the half-Cauchy."""

import math

import pyro.distributions as dist
import pytest
import torch
from scipy import stats

from pyro_sparse.distributions import HalfCauchyFactors


@pytest.mark.parametrize("scale", [0.1, 1.0, 10.0])
def test_root_of_the_product_is_half_cauchy(scale: float) -> None:
    torch.manual_seed(0)
    law = HalfCauchyFactors(torch.tensor(scale, dtype=torch.float64))
    a, b = law.sample((20_000,)).unbind(-1)
    assert stats.kstest((a * b).sqrt().numpy(), stats.halfcauchy(scale=scale).cdf).pvalue > 1e-3
    assert stats.kstest(a.numpy(), stats.gamma(0.5, scale=scale**2).cdf).pvalue > 1e-3
    assert stats.kstest(b.numpy(), stats.invgamma(0.5).cdf).pvalue > 1e-3


def test_log_prob_is_the_formula_of_the_docstring() -> None:
    law = HalfCauchyFactors(torch.tensor([0.5, 3.0], dtype=torch.float64))
    a, b = torch.tensor(0.7).double(), torch.tensor(2.0).double()
    expected = (
        -a / law.scale**2
        - 1 / b
        - math.log(math.pi)
        - law.scale.log()
        - 0.5 * a.log()
        - 1.5 * b.log()
    )
    torch.testing.assert_close(law.log_prob(torch.stack([a, b])), expected)


def test_moments_shapes_and_gradients() -> None:
    scale = torch.tensor([0.5, 3.0], dtype=torch.float64, requires_grad=True)
    law = HalfCauchyFactors(scale)
    torch.testing.assert_close(law.mean[:, 0], scale**2 / 2)
    torch.testing.assert_close(law.variance[:, 0], scale**4 / 2)
    assert torch.isinf(law.mean[:, 1]).all()
    wide = law.expand((4, 2))
    assert wide.rsample((3,)).shape == (3, 4, 2, 2)
    assert wide.to_event(1).log_prob(wide.sample()).shape == (4,)
    torch.manual_seed(0)
    value = law.rsample((5,))
    (gradient,) = torch.autograd.grad(value[..., 0].sum(), scale)
    torch.testing.assert_close(gradient, 2 * value[..., 0].sum(0).detach() / scale.detach())
    point = value.detach()
    assert torch.autograd.gradcheck(lambda s: HalfCauchyFactors(s).log_prob(point), [scale])


def test_samples_stay_in_the_support_in_float32() -> None:
    law = HalfCauchyFactors(torch.tensor(1e-6)).expand((100_000,))
    assert torch.isfinite(law.log_prob(law.sample())).all()


def test_validation() -> None:
    with pytest.raises(ValueError, match="scale"):
        HalfCauchyFactors(-1.0)
    with pytest.raises(ValueError, match="support"):
        HalfCauchyFactors(1.0).log_prob(torch.tensor([1.0, -1.0]))
    assert isinstance(HalfCauchyFactors(1.0).to_event(0), HalfCauchyFactors)
    assert isinstance(HalfCauchyFactors(torch.ones(2)).to_event(1), dist.Independent)
