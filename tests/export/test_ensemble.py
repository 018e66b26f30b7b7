"""Draws of a posterior as plain networks: the same law, the same units, no Pyro."""

import pytest
import torch
from torch import nn

from pyro_sparse import guides, likelihoods, models
from pyro_sparse.export import Ensemble, compact_draws, ensemble_scores, load, save
from pyro_sparse.export.ensemble import _included_draws
from pyro_sparse.nets import lenet5_caffe, mlp
from pyro_sparse.posterior import Posterior, accuracy, calibration_error

SPARSE = [
    models.SpikeSlabGaussian,
    models.SpikeSlabGroupLasso,
    models.SpikeSlabGroupHorseshoe,
]


def posterior_of(net, example, cls=models.SpikeSlabGaussian, decided=8.0, **options):
    """Every other unit is in, as sure as ``decided`` says."""
    guide_options = options.pop("guide_options", {"initial_scale": 0.2})
    model = cls(net, example, num_data=100, **options)
    guide = guides.for_model(model, **guide_options)
    with torch.no_grad():
        for logits in guide.inclusion_logits().values():
            logits.copy_(torch.where(torch.arange(len(logits)) % 2 == 0, decided, -decided))
    return Posterior(model, guide)


@pytest.mark.parametrize("cls", SPARSE)
def test_the_average_is_that_of_the_networks_and_near_the_posteriors(cls):
    posterior = posterior_of(mlp([4, 8, 6, 3]), torch.randn(5, 4), cls)
    ensemble = compact_draws(posterior, draws=400, seed=1)
    x = torch.randn(7, 4)
    with torch.no_grad():
        outputs = ensemble(x)
        assert outputs.shape == (400, 7, 3)
        for net, output in zip(ensemble.nets, outputs, strict=True):
            assert torch.equal(net(x), output)
    mean = sum(net(x).softmax(-1) for net in ensemble.nets) / 400
    torch.testing.assert_close(outputs.softmax(-1).mean(0), mean)
    # All units are decided, so that the posterior's own draws have the same law.
    theirs = posterior.predict(x, num_samples=400)
    error = (theirs.var(0) / 400 + outputs.softmax(-1).var(0) / 400).sqrt()
    assert ((theirs.mean(0) - mean).abs() < 5 * error + 2e-3).all()
    assert outputs.softmax(-1).std(0) == pytest.approx(theirs.std(0), rel=0.35, abs=0.01)


@pytest.mark.parametrize("cls", SPARSE)
def test_draws_have_the_guides_moments(cls):
    # Undecided: draws are given that the units are in, whatever the inclusion probability.
    posterior = posterior_of(mlp([3, 4, 2]), torch.randn(5, 3), cls, decided=0.3)
    draws = [parameters for parameters, _ in _included_draws(posterior, 3000)]
    for name, mean in posterior.mean_parameters().items():
        values = torch.stack([draw[name] for draw in draws])
        error = values.std(0) / 3000**0.5
        assert ((values.mean(0) - mean).abs() < 5 * error).all(), name
        assert (values.std(0) > 0).all()
    if cls is models.SpikeSlabGaussian:
        weights = torch.stack([draw["fc1.weight"] for draw in draws])
        family = posterior.guide.row_families["fc1"]
        scale = family.slab().variance.sqrt()[:, :-1]
        torch.testing.assert_close(weights.std(0), scale, rtol=0.1, atol=0)


OTHERS = {
    "noise": (models.LogNormalNoise, {"low": -3.0}),
    "noise on inputs": (models.LogNormalNoise, {"low": -3.0, "prune_inputs": True}),
    "gaussian": (models.ReducibleGaussian, {}),
}


@pytest.mark.parametrize("name", OTHERS)
def test_models_without_a_spike(name):
    cls, options = OTHERS[name]
    model = cls(mlp([3, 4, 2]), torch.randn(5, 3), num_data=100, **options)
    posterior = Posterior(model, guides.for_model(model))
    # One unit, and where the model allows one weight, is out for good.
    out = {"fc1": torch.tensor([True, True, False, True])}
    posterior.prune(lambda p: out)
    draws = [parameters for parameters, _ in _included_draws(posterior, 2000)]
    for parameter, mean in posterior.mean_parameters().items():
        values = torch.stack([draw[parameter] for draw in draws])
        error = values.std(0) / 2000**0.5
        assert ((values.mean(0) - mean).abs() <= 5 * error + 1e-6).all(), parameter
    assert all((draw["fc1.weight"][2] == 0).all() for draw in draws)
    ensemble = compact_draws(posterior, posterior.keep(lambda p: out), draws=2)
    assert ensemble.nets[0].fc1.out_features == 3
    x = torch.randn(6, 3)
    assert not torch.equal(*ensemble(x))


def test_all_draws_have_the_units_of_one_mask():
    net = lenet5_caffe("sigmoid", size=16, widths=(4, 6, 5))
    posterior = posterior_of(net, torch.randn(2, 1, 16, 16), decided=0.3)
    keep = {name: torch.tensor(mask) for name, mask in (("conv1", [True, False, False, True]),)}
    ensemble = compact_draws(posterior, {**posterior.keep(), **keep}, draws=3)
    assert ensemble.compaction["kept"]["conv1"] == [0, 3]
    assert ensemble.input_shape == (1, 16, 16)
    for small in ensemble.nets:
        assert small.compaction == ensemble.compaction
        assert small.conv1.out_channels == 2
        assert small.conv2.out_channels == 3
    weights = [small.conv1.weight for small in ensemble.nets]
    assert not torch.equal(weights[0], weights[1])
    # By rule.
    none = compact_draws(posterior, rule=lambda p: {}, draws=1)
    assert none.nets[0].conv1.out_channels == 4


def test_seed_and_global_generator():
    posterior = posterior_of(mlp([3, 4, 2]), torch.randn(5, 3))
    x = torch.randn(2, 3)
    before = torch.random.get_rng_state()
    first = compact_draws(posterior, draws=2, seed=3)(x)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert torch.equal(compact_draws(posterior, draws=2, seed=3)(x), first)
    assert not torch.equal(compact_draws(posterior, draws=2, seed=4)(x), first)


def test_selected_inputs():
    posterior = posterior_of(mlp([4, 5, 2]), torch.randn(5, 4), prune_inputs=True)
    ensemble = compact_draws(posterior, draws=2)
    x = torch.randn(3, 4)
    changed = x.clone()
    changed[:, 1::2] += 1
    assert torch.equal(ensemble(x), ensemble(changed))


def test_batch_normalisation_of_each_draw():
    """Every network has the statistics of its own weights, as `Posterior.predict` has."""
    net = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 2))
    inputs = torch.randn(256, 4) * 3 + 2
    first = posterior_of(net, inputs[:5])
    posterior = Posterior(first.model, first.guide, inputs)
    with torch.no_grad():
        posterior.guide.row_families["0"].row_log_scale.fill_(0.0)
    before = posterior.model.net[1].running_mean.clone()
    nets = compact_draws(posterior, {}, draws=2).nets
    assert torch.equal(posterior.model.net[1].running_mean, before)
    for small in nets:
        hidden = small[0](inputs)
        torch.testing.assert_close(small[1].running_mean, hidden.mean(0), rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(small[1].running_var, hidden.var(0), rtol=1e-3, atol=1e-3)
    assert float((nets[0][1].running_var - nets[1][1].running_var).abs().max()) > 0.1


def test_a_dense_model():
    model = models.Deterministic(mlp([3, 5, 2]), torch.randn(4, 3), num_data=9)
    posterior = Posterior(model, guides.for_model(model))
    outputs = compact_draws(posterior, draws=2)(torch.randn(3, 3))
    assert torch.equal(outputs[0], outputs[1])


def test_refused():
    posterior = posterior_of(mlp([3, 4, 2]), torch.randn(5, 3))
    with pytest.raises(ValueError, match="expected at least one draw, got draws=0"):
        compact_draws(posterior, draws=0)
    with pytest.raises(ValueError, match="layer 'fc1' would keep none"):
        compact_draws(posterior, rule=lambda p: {"fc1": torch.zeros(4, dtype=torch.bool)})
    with pytest.raises(ValueError, match="at least one network"):
        Ensemble([])


def test_round_trip_in_every_format(tmp_path):
    posterior = posterior_of(mlp([4, 8, 6, 3]), torch.randn(5, 4), models.SpikeSlabGroupLasso)
    ensemble = compact_draws(posterior, draws=3)
    folder = save(ensemble, tmp_path / "net", onnx=True)
    import onnxruntime

    session = onnxruntime.InferenceSession(str(folder / "model.onnx"))
    program = torch.export.load(folder / "model.pt2").module()
    for batch in (1, 3, 64):
        x = torch.randn(batch, 4)
        expected = ensemble(x)
        assert torch.equal(load(folder)(x), expected)
        assert (program(x) - expected).abs().max() <= 1e-5
        (output,) = session.run(None, {"input": x.numpy()})
        assert (torch.from_numpy(output) - expected).abs().max() <= 1e-5
    card = (folder / "README.md").read_text()
    assert "3 plain torch networks in one" in card
    assert "`outputs` has shape `(3, batch, ...)`" in card


# -- scores ----------------------------------------------------------------------------------------


def test_scores_of_classes():
    posterior = posterior_of(mlp([4, 8, 6, 3]), torch.randn(5, 4))
    ensemble = compact_draws(posterior, draws=5)
    x, y = torch.randn(40, 4), torch.randint(3, (40,))
    scores = ensemble_scores(ensemble, posterior.model.likelihood, x, y, batch_size=7)
    probabilities = sum(net(x).detach().softmax(-1) for net in ensemble.nets) / 5
    nll = nn.functional.nll_loss(probabilities.log(), y)
    assert scores == pytest.approx(
        {
            "accuracy": accuracy(probabilities, y),
            "ece": calibration_error(probabilities, y),
            "nll": float(nll),
        },
        rel=1e-4,
    )


def test_scores_of_numbers_use_each_draws_noise():
    net, x, y = mlp([4, 8, 1]), torch.randn(40, 4), torch.randn(40)
    posterior = posterior_of(net, x[:2], likelihood=likelihoods.Normal())
    ensemble = compact_draws(posterior, draws=3)
    precision = ensemble.latents["noise_precision"]
    assert precision.shape == (3,)
    assert len(precision.unique()) == 3
    # In the target's own unit, in which everything is four times as large.
    scores = ensemble_scores(ensemble, posterior.model.likelihood, x, y, 4.0)
    means = torch.stack([net(x).detach().squeeze(-1) for net in ensemble.nets])
    assert scores["rmse"] == pytest.approx(
        4 * float((means.mean(0) - y).square().mean().sqrt()), rel=1e-5
    )
    density = torch.distributions.Normal(4 * means, 4 * precision.rsqrt().unsqueeze(-1))
    expected = -density.log_prob(4 * y).exp().mean(0).log().mean()
    assert scores["nll"] == pytest.approx(float(expected), rel=1e-4)
