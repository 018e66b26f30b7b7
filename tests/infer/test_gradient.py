"""The noise of the gradient, against what it must be."""

import pytest
import torch

from pyro_sparse import guides, models, nets
from pyro_sparse.infer import ELBO, gradient_variance
from pyro_sparse.likelihoods import Normal
from pyro_sparse.modules import own_parameters


@pytest.fixture
def data():
    torch.manual_seed(0)
    x = torch.randn(16, 3)
    return x, x[:, 0] + 0.1 * torch.randn(16)


def made(cls, **options):
    torch.manual_seed(1)
    model = cls(
        nets.mlp([3, 5, 1]), torch.zeros(2, 3), likelihood=Normal(noise_scale=0.5), num_data=64
    )
    return model, guides.for_model(model, **options)


def test_moments_are_those_of_repeated_gradients(data):
    """By hand: a list of gradients of the loss per example, and their sample moments."""
    model, guide = made(models.SpikeSlabGaussian)
    found = gradient_variance(model, guide, *data, draws=7, seed=3)
    torch.manual_seed(3)
    gradients = []
    with own_parameters(model, guide):
        for _ in range(7):
            guide.zero_grad()
            (ELBO().estimate(model, guide, *data).loss / 64).backward()
            gradients.append({n: p.grad.double().clone() for n, p in guide.named_parameters()})
    for name, variance in found.by_parameter.items():
        several = torch.stack([one[name] for one in gradients])
        assert variance == pytest.approx(float(several.var(0).sum()), rel=1e-5), name
    assert set(found.by_parameter) == set(gradients[0])
    flat = torch.stack([torch.cat([g.flatten() for g in one.values()]) for one in gradients])
    assert found.total == pytest.approx(float(flat.var(0).sum()), rel=1e-5)
    norm = float(flat.mean(0).square().sum()) - found.total / 7
    assert found.squared_norm == pytest.approx(norm, rel=1e-4)
    assert found.relative == pytest.approx(found.total / norm, rel=1e-4)


def test_particles_divide_the_variance(data):
    model, guide = made(models.SpikeSlabGaussian)
    one = gradient_variance(model, guide, *data, draws=400)
    four = gradient_variance(model, guide, *data, draws=400, num_particles=4)
    assert one.total / four.total == pytest.approx(4, rel=0.3)
    assert four.squared_norm == pytest.approx(one.squared_norm, rel=0.1)


def test_the_score_estimator_is_noisier_in_the_inclusions(data):
    totals = {}
    for inclusion in ("straight-through", "score"):
        model, guide = made(models.SpikeSlabGaussian, inclusion=inclusion)
        (name,) = [n for n, _ in guide.named_parameters() if n.endswith("inclusion_logits")]
        totals[inclusion] = gradient_variance(model, guide, *data, draws=100).by_parameter[name]
    assert totals["score"] > 2 * totals["straight-through"] > 0


def test_point_estimates_have_no_noise(data):
    model, guide = made(models.Deterministic)
    found = gradient_variance(model, guide, *data, draws=3)
    assert found.total == 0
    assert found.relative == 0
    assert found.squared_norm > 0


def test_nothing_is_left_behind(data):
    model, guide = made(models.SpikeSlabGaussian)
    before = {name: value.clone() for name, value in guide.state_dict().items()}
    state = torch.get_rng_state()
    gradient_variance(model, guide, *data, draws=2)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(p.grad is None for p in guide.parameters())
    for name, value in guide.state_dict().items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=0, equal_nan=True)
    with pytest.raises(ValueError, match="at least two draws, got 1"):
        gradient_variance(model, guide, *data, draws=1)
