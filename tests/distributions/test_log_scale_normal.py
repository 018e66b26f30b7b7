"""The normal that is given by the log of its scale."""

import pyro.distributions as dist
import pytest
import torch

from pyro_sparse.distributions import LogScaleNormal


def test_it_is_a_normal() -> None:
    loc, log_scale = torch.randn(3, 4).double(), torch.randn(3, 4).double()
    law, normal = LogScaleNormal(loc, log_scale), dist.Normal(loc, log_scale.exp())
    value = torch.randn(2, 3, 4).double()
    torch.testing.assert_close(law.log_prob(value), normal.log_prob(value))
    torch.testing.assert_close(law.entropy(), normal.entropy())
    wide = law.expand((5, 3, 4))
    assert type(wide) is LogScaleNormal
    assert wide.to_event(1).log_prob(value[:1].expand(5, 3, 4)).shape == (5, 3)
    samples = law.rsample((40_000,))
    assert ((samples.mean(0) - loc).abs() < 5 * normal.scale / 200).all()
    torch.testing.assert_close(samples.std(0), normal.scale, rtol=0.03, atol=0.0)


def test_gradients() -> None:
    leaves = [torch.randn(3).double().requires_grad_() for _ in range(2)]

    def draw(*arguments: torch.Tensor) -> torch.Tensor:
        torch.manual_seed(1)
        return LogScaleNormal(*arguments).rsample()

    assert torch.autograd.gradcheck(draw, leaves)


def test_shapes_must_agree() -> None:
    with pytest.raises(ValueError, match=r"one shape, got \(3,\) and \(4,\)"):
        LogScaleNormal(torch.zeros(3), torch.zeros(4))
