"""Functions with gradients of their own: values by the plain formula, gradients by differences."""

import math

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck

from pyro_sparse.distributions import analytic


def leaf(*shape: int, scale: float = 1.0) -> Tensor:
    return (scale * torch.randn(*shape).double()).requires_grad_()


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def test_spike_and_slab_kl():
    logits, prior, slab = leaf(7, scale=3.0), leaf(7), leaf(7)
    included, excluded = torch.sigmoid(logits), torch.sigmoid(-logits)
    expected = included * (included.log() - torch.sigmoid(prior).log() + slab)
    expected = expected + excluded * (excluded.log() - torch.sigmoid(-prior).log())
    torch.testing.assert_close(analytic.spike_and_slab_kl(logits, prior, slab), expected)
    assert gradcheck(analytic.spike_and_slab_kl, (logits, prior, slab))


def test_spike_and_slab_kl_where_saturated():
    logits = torch.tensor([-math.inf, -800.0, 800.0, math.inf]).double().requires_grad_()
    slab = torch.tensor([math.inf, 3.0, 3.0, 3.0]).double().requires_grad_()
    kl = analytic.spike_and_slab_kl(logits, torch.zeros(4).double(), slab)
    torch.testing.assert_close(kl.detach(), math.log(2) + torch.tensor([0.0, 0, 3, 3]).double())
    gradients = torch.autograd.grad(kl.sum(), [logits, slab])
    torch.testing.assert_close(gradients[0], torch.zeros(4).double())
    torch.testing.assert_close(gradients[1], torch.tensor([0.0, 0, 1, 1]).double())


def test_tied_rows_kl():
    loc, rows, columns = leaf(3, 4), leaf(3), leaf(4)
    log_scale = rows.unsqueeze(1) + columns
    each = analytic.normal_kl(loc, log_scale, 0.7)
    tied = analytic.tied_rows_kl(loc, rows, columns, 0.7)
    torch.testing.assert_close(tied, each.sum(-1))
    assert gradcheck(lambda *a: analytic.tied_rows_kl(*a, 0.7), (loc, rows, columns))


@pytest.mark.parametrize("by_row", [False, True])
def test_normal_kl(by_row: bool):
    loc, log_scale = leaf(3, 4), leaf(3, 4)

    def kl(loc: Tensor, log_scale: Tensor) -> Tensor:
        return analytic.normal_kl(loc, log_scale, 0.7, by_row)

    law = torch.distributions.Normal(loc, log_scale.exp())
    expected = torch.distributions.kl_divergence(law, torch.distributions.Normal(0.0, 0.7))
    torch.testing.assert_close(kl(loc, log_scale), expected.sum(-1) if by_row else expected)
    # By differences σ moves with log σ.
    assert gradcheck(lambda *a: kl(*a), (loc, log_scale))


def test_factorised_rows_kl():
    loc, rows, columns = leaf(4, 5), leaf(4, 2), leaf(2, 5)
    variance = (2 * rows).exp() @ (2 * columns).exp()
    law = torch.distributions.Normal(loc, variance.sqrt())
    expected = torch.distributions.kl_divergence(law, torch.distributions.Normal(0.0, 0.7)).sum(1)
    torch.testing.assert_close(analytic.factorised_rows_kl(loc, rows, columns, 0.7), expected)
    assert gradcheck(lambda *a: analytic.factorised_rows_kl(*a, 0.7), (loc, rows, columns))


def test_log_normal_gamma_kl():
    arguments = (leaf(5), (leaf(5).exp()).detach().requires_grad_(),
                 leaf(5).exp().detach().requires_grad_(), leaf(5))  # fmt: skip
    assert gradcheck(analytic.log_normal_gamma_kl, arguments)


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("shape", [(3, 4), (2, 3, 4)])
def test_normal_draw(shape: tuple, tied: bool, gated: bool):
    loc, gate = leaf(*shape), leaf(*shape[:-1]) if gated else None
    logs = (leaf(3), leaf(4)) if tied else (leaf(3, 4),)

    def draw(loc: Tensor, gate: Tensor | None, *logs: Tensor) -> Tensor:
        torch.manual_seed(1)
        return analytic.normal_draw(loc, torch.randn_like(loc), gate, *logs)

    assert gradcheck(draw, (loc, gate, *logs))
    log_scale = logs[0].unsqueeze(-1) + logs[1] if tied else logs[0]
    value = draw(loc, gate, *logs)
    assert value.shape == shape
    again = draw(torch.zeros_like(loc), None, *logs) / log_scale.exp()
    expected = loc + log_scale.exp() * again
    torch.testing.assert_close(value, expected if gate is None else expected * gate.unsqueeze(-1))
    assert again.abs().max() < 5


@pytest.mark.parametrize("hard", [False, True])
def test_straight_through(hard: bool):
    logits, noise = leaf(6), torch.randn(6).double()
    temperature = torch.tensor(0.4).double().requires_grad_()
    soft = torch.sigmoid((logits + noise) / temperature)
    value = analytic.straight_through(logits, noise, temperature, hard)
    torch.testing.assert_close(value, (soft > 0.5).double() if hard else soft)
    for one, other in zip(
        torch.autograd.grad(
            value.square().sum() if not hard else value.sum(), [logits, temperature]
        ),
        torch.autograd.grad(soft.square().sum() if not hard else soft.sum(), [logits, temperature]),
        strict=True,
    ):
        torch.testing.assert_close(one, other)
