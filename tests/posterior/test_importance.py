"""Measures of importance by hand on small posteriors, and the axioms of the Shapley value."""

import math

import pytest
import torch

from pyro_sparse import guides, likelihoods, models
from pyro_sparse.nets import lenet5_caffe, mlp
from pyro_sparse.posterior import Posterior, importance
from pyro_sparse.posterior.importance import NotOfferedError, Random, Shapley


def posterior(cls, net=None, example=None, guide_options=None, **options):
    net = mlp([3, 5, 4, 2]) if net is None else net
    example = torch.randn(4, 3) if example is None else example
    model = cls(net, example, num_data=50, **options)
    return Posterior(model, guides.for_model(model, **(guide_options or {})))


def test_inclusion_probability():
    of = posterior(models.SpikeSlabGaussian)
    with torch.no_grad():
        of.guide.inclusion_logits()["fc1"].copy_(torch.tensor([0.0, 1.0, -1.0, 20.0, -20.0]))
    value = importance.inclusion_probability(of)
    assert list(value) == ["fc1", "fc2"]
    expected = [0.5, 1 / (1 + math.exp(-1)), 1 / (1 + math.e), 1, 0]
    assert value["fc1"].tolist() == pytest.approx(expected, abs=1e-7)


def test_noise_signal():
    of = posterior(models.LogNormalNoise, prune_inputs=True)
    noise = of.guide.noises
    with torch.no_grad():
        noise["fc1"].noise_loc.fill_(-15.0)
        noise["fc1"].noise_log_scale.fill_(math.log(0.05))
        noise["fc2"].noise_log_scale.fill_(18.0)
    value = importance.noise_signal(of)
    assert set(value) == {"input", "fc1", "fc2"}
    # Far from both ends a log-normal: 1/√expm1(σ²). Flat on [−20, 0]: 1/√(20/2 − 1).
    assert value["fc1"].tolist() == pytest.approx([math.expm1(0.05**2) ** -0.5] * 5, rel=1e-5)
    assert value["fc2"].tolist() == pytest.approx([1 / 3] * 4, rel=1e-6)


def test_measures_of_weights():
    of = posterior(models.ReducibleGaussian, prior_scale=2.0)
    with torch.no_grad():
        for _, family in of.guide.layers():
            family.loc.normal_()
            family.log_scale.normal_(-1.0, 0.5)
    for group, family in of.guide.layers():
        mean, scale = family.loc.detach().double(), family.log_scale.detach().double().exp()
        name = group.name
        close = {"rtol": 1e-5, "atol": 1e-6}
        signal = importance.weight_signal(of)[name]
        torch.testing.assert_close(signal, mean.abs() / scale, **close)
        robust = importance.weight_signal_plus_robustness(of)[name]
        torch.testing.assert_close(robust, mean.abs() + scale, **close)
        evidence = importance.weight_evidence(of)[name]
        expected = 0.5 * ((mean / scale) ** 2 - (4.0 / scale**2).log())
        torch.testing.assert_close(evidence, expected, **close)
    # All layers, the output's included.
    signal = importance.weight_signal(of)
    assert list(signal) == ["fc1", "fc2", "out"]
    assert signal["out"].shape == (2, 5)


def test_magnitude():
    """Norms of the rows at posterior means, noise included, relative to their layer."""
    for cls in (models.Deterministic, models.LogNormalNoise):
        of = posterior(cls)
        if cls is models.LogNormalNoise:
            with torch.no_grad():
                of.guide.noises["fc1"].noise_loc.copy_(torch.linspace(-6, 0, 5))
        value = importance.magnitude(of)
        assert list(value) == ["fc1", "fc2"]
        assert not any(part.requires_grad for part in value.values())
        rows = of.guide.mean_rows()["fc1"].detach()
        norm = rows.norm(dim=1)
        torch.testing.assert_close(value["fc1"], norm / norm.square().mean().sqrt())
        assert float(value["fc1"].square().mean()) == pytest.approx(1)


def test_magnitude_of_nothing_is_0():
    of = posterior(models.Deterministic)
    of.model.support.restrict({"fc1": torch.zeros(5, dtype=torch.bool)})
    assert importance.magnitude(of)["fc1"].tolist() == [0.0] * 5


def test_random():
    of = posterior(models.Deterministic)
    state = torch.get_rng_state()
    first, again, other = Random(1)(of), Random(1)(of), Random(2)(of)
    assert torch.equal(torch.get_rng_state(), state)
    assert list(first) == ["fc1", "fc2"]
    for name in first:
        assert torch.equal(first[name], again[name])
        assert not torch.equal(first[name], other[name])
        assert ((first[name] >= 0) & (first[name] < 1)).all()


@pytest.mark.parametrize(
    ("measure", "need"),
    [
        (importance.inclusion_probability, "inclusion"),
        (importance.noise_signal, "noise"),
        (importance.retention, "log_alpha"),
        (importance.log_scale, "log_scales"),
        (importance.weight_signal, "gaussians"),
        (importance.weight_signal_plus_robustness, "gaussians"),
        (importance.weight_evidence, "gaussians"),
    ],
)
def test_what_is_not_offered(measure, need):
    """The error says what is needed, who offers it, and what there is instead."""
    with pytest.raises(NotOfferedError) as caught:
        measure(posterior(models.Deterministic))
    assert importance.OFFERS[need] in str(caught.value)
    assert "Deterministic" in str(caught.value)
    assert "point estimates only" in str(caught.value)
    for cls, has in (
        (models.SpikeSlabGaussian, "inclusion"),
        (models.LogNormalNoise, "noise"),
        (models.ReducibleGaussian, "gaussians"),
        (models.GroupNormalJeffreys, "log_alpha"),
        (models.GroupHorseshoe, "log_scales"),
        (models.TurboMarkov, "inclusion"),
    ):
        of = posterior(cls)
        if has == need:
            assert measure(of)
            continue
        with pytest.raises(NotOfferedError) as caught:
            measure(of)
        text = str(caught.value)
        assert cls.__name__ in text
        assert importance.OFFERS[need] in text
        assert importance.OFFERS[has] in text


# -- Shapley ---------------------------------------------------------------------------------------


def regression(width=4):
    """A linear network whose log-likelihood of any subset is easily had."""
    net = mlp([3, width, 1])
    x = torch.randn(30, 3)
    y = x[:, 0] - 0.5 * x[:, 1]
    of = posterior(models.Deterministic, net, x[:2], likelihood=likelihoods.Normal(0.7))
    return of, x, y


@torch.no_grad()
def value_of(of, x, y, mask):
    """Mean log-likelihood with these units of fc1 in, from the weights."""
    rows = of.guide.mean_rows()
    weight, bias = rows["fc1"][:, :-1], rows["fc1"][:, -1]
    hidden = torch.nn.functional.silu(x @ (weight * mask[:, None]).T + bias * mask)
    out = hidden @ rows["out"][0, :-1] + rows["out"][0, -1]
    return float(torch.distributions.Normal(out, 0.7).log_prob(y).double().mean())


def test_shapley_values_of_two_units_are_exact():
    """Both orders are walked: the mean of joining an empty and a full layer."""
    of, x, y = regression(width=2)
    v = {
        mask: value_of(of, x, y, torch.tensor(mask, dtype=torch.float32))
        for mask in ((0, 0), (0, 1), (1, 0), (1, 1))
    }
    value = Shapley(x, y, orders=1)(of)["fc1"]
    first = ((v[1, 0] - v[0, 0]) + (v[1, 1] - v[0, 1])) / 2
    second = ((v[0, 1] - v[0, 0]) + (v[1, 1] - v[1, 0])) / 2
    assert value.tolist() == pytest.approx([first, second], abs=1e-5)


def test_shapley_values_of_a_layer_share_out_the_whole():
    of, x, y = regression()
    everything, nothing = torch.ones(4), torch.zeros(4)
    whole = value_of(of, x, y, everything) - value_of(of, x, y, nothing)
    for seed in range(3):
        value = Shapley(x, y, orders=2, seed=seed)(of)["fc1"]
        assert float(value.sum()) == pytest.approx(whole, abs=1e-5)
    assert abs(whole) > 1e-3


def test_shapley_value_of_a_unit_without_a_use():
    of, x, y = regression()
    with torch.no_grad():
        of.guide.row_families["out"].loc[0, 2] = 0.0
    value = Shapley(x, y, orders=3)(of)["fc1"]
    assert float(value[2]) == 0
    assert all(float(value[j]) != 0 for j in (0, 1, 3))


def test_shapley_values_of_twins_are_equal_in_expectation():
    of, x, y = regression()
    with torch.no_grad():
        of.guide.row_families["fc1"].loc[1] = of.guide.row_families["fc1"].loc[0]
        of.guide.row_families["out"].loc[0, 1] = of.guide.row_families["out"].loc[0, 0]
    draws = torch.stack([Shapley(x, y, orders=1, seed=seed)(of)["fc1"] for seed in range(60)])
    gap = draws[:, 0] - draws[:, 1]
    assert abs(gap.mean()) <= 5 * gap.std() / math.sqrt(len(gap)) + 1e-6


def test_shapley_on_images_leaves_random_state_alone():
    net, x = lenet5_caffe(widths=(2, 3, 4), size=16), torch.randn(5, 1, 16, 16)
    of = posterior(models.Deterministic, net, x[:1])
    y = torch.randint(3, (5,))
    state = torch.get_rng_state()
    value = Shapley(x, y, orders=1)(of)
    assert torch.equal(torch.get_rng_state(), state)
    assert {name: len(part) for name, part in value.items()} == {"conv1": 2, "conv2": 3, "fc1": 4}
    assert all(part.isfinite().all() for part in value.values())
