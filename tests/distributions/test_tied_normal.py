"""Rows of weights whose scales factorise."""

import pyro.distributions as dist
import pytest
import torch

from pyro_sparse.distributions import TiedNormal


@pytest.fixture
def tied() -> TiedNormal:
    torch.manual_seed(0)
    return TiedNormal(
        torch.randn(3, 4).double(), torch.rand(3).double() + 0.5, torch.rand(4).double() + 0.5
    )


def test_equals_an_independent_normal(tied: TiedNormal) -> None:
    full = dist.Normal(tied.loc, tied.row_scale[:, None] * tied.column_scale).to_event(1)
    value = torch.randn(2, 3, 4).double()
    torch.testing.assert_close(tied.log_prob(value), full.log_prob(value))
    torch.testing.assert_close(tied.entropy(), full.entropy())
    torch.testing.assert_close(tied.mean, full.mean)
    torch.testing.assert_close(tied.variance, full.variance)


def test_samples_have_the_stated_moments(tied: TiedNormal) -> None:
    count = 40_000
    samples = tied.rsample((count,))
    assert ((samples.mean(0) - tied.mean).abs() < 5 * tied.scale / count**0.5).all()
    torch.testing.assert_close(samples.var(0), tied.variance, rtol=0.05, atol=0.0)


def test_expand_and_broadcast(tied: TiedNormal) -> None:
    wide = tied.expand((5, 3))
    assert (wide.batch_shape, wide.event_shape) == ((5, 3), (4,))
    assert wide.sample((2,)).shape == (2, 5, 3, 4)
    assert wide.log_prob(wide.sample()).shape == (5, 3)
    assert wide.to_event(2).log_prob(wide.sample()).shape == ()
    one = TiedNormal(torch.zeros(4), torch.ones(3), torch.ones(4))
    assert one.batch_shape == (3,)
    assert TiedNormal(torch.zeros(3, 4), 0.1, torch.ones(4)).batch_shape == (3,)


def test_gradients(tied: TiedNormal) -> None:
    value = torch.randn(3, 4).double()

    def sample(*arguments: torch.Tensor) -> torch.Tensor:
        torch.manual_seed(1)
        return TiedNormal(*arguments).rsample()

    leaves = [tied.loc, tied.row_scale, tied.column_scale]
    leaves = [leaf.detach().clone().requires_grad_() for leaf in leaves]
    assert torch.autograd.gradcheck(sample, leaves)
    assert torch.autograd.gradcheck(lambda *a: TiedNormal(*a).log_prob(value), leaves)


@pytest.mark.parametrize(
    ("loc", "row", "column", "message"),
    [
        ((3, 4), (3,), (5,), r"column_scale \(5,\)"),
        ((3, 4), (3,), (2, 3, 4), "column_scale"),
        ((3, 4), (3,), (2, 4), r"rank 2 needs row_scale \(..., 2\)"),
        ((3, 4), (2,), (4,), "broadcast with the rows"),
    ],
)
def test_wrong_shapes_are_named(loc: tuple, row: tuple, column: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TiedNormal(torch.zeros(loc), torch.ones(row), torch.ones(column))


def test_scales_must_be_positive() -> None:
    with pytest.raises(ValueError, match="row_scale"):
        TiedNormal(torch.zeros(4), torch.tensor(-1.0), torch.ones(4))
    with pytest.raises(ValueError, match="column_scale"):
        TiedNormal(torch.zeros(4), torch.tensor(1.0), torch.zeros(4))


def test_rank(tied: TiedNormal) -> None:
    """Variances add up over the terms; one term in matrices is the k-tied normal."""
    rows, columns = torch.rand(3, 2).double() + 0.5, torch.rand(2, 4).double() + 0.5
    law = TiedNormal(tied.loc, rows, columns)
    assert (law.rank, tied.rank) == (2, None)
    variance = sum(torch.outer(rows[:, r].square(), columns[r].square()) for r in range(2))
    torch.testing.assert_close(law.variance, variance)
    full = dist.Normal(tied.loc, variance.sqrt()).to_event(1)
    value = torch.randn(3, 4).double()
    torch.testing.assert_close(law.log_prob(value), full.log_prob(value))
    prior = dist.Normal(torch.zeros(3, 4).double(), 0.7).to_event(1)
    kl = torch.distributions.kl_divergence
    torch.testing.assert_close(kl(law, prior), kl(full, prior))
    torch.testing.assert_close(
        kl(law, tied), kl(full, dist.Normal(tied.loc, tied.scale).to_event(1))
    )
    samples = law.expand((3,)).rsample((40_000,))
    torch.testing.assert_close(samples.var(0), variance, rtol=0.05, atol=0.0)
    one = TiedNormal(tied.loc, tied.row_scale.unsqueeze(-1), tied.column_scale.unsqueeze(0))
    torch.testing.assert_close(one.scale, tied.scale)


def test_from_logs(tied: TiedNormal) -> None:
    other = TiedNormal.from_logs(tied.loc, tied.row_scale.log(), tied.column_scale.log())
    torch.testing.assert_close(other.scale, tied.scale)
    torch.testing.assert_close(other.entropy(), tied.entropy())
    assert other.batch_shape == tied.batch_shape
