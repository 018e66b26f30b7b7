"""What a fitted guide says: which units are in, which network they leave, how good it is."""

import itertools
import math
from functools import partial

import numpy as np
import pyro
import pytest
import torch
from scipy import stats
from torch import nn

import pyro_sparse as ps
from pyro_sparse import guides, likelihoods, models
from pyro_sparse.nets import lenet5_caffe, mlp
from pyro_sparse.posterior import MedianProbability, Posterior
from pyro_sparse.posterior.draws import ExactDraws
from pyro_sparse.posterior.summary import GroupSummary, cautions

SPARSE = [
    models.SpikeSlabGaussian,
    models.SpikeSlabGroupLasso,
    models.SpikeSlabGroupHorseshoe,
]


def fitted(net, example, cls=models.SpikeSlabGaussian, guide_options=None, **options):
    """A posterior as training could have left it: random inclusions, at least one unit a layer."""
    model = cls(net, example, num_data=100, **options)
    guide = guides.for_model(model, **(guide_options or {}))
    with torch.no_grad():
        for logits in guide.inclusion_logits().values():
            logits.normal_(0, 3)
            logits[0] = 3.0
    return Posterior(model, guide)


def set_inclusion(posterior, **probabilities):
    with torch.no_grad():
        for name, values in probabilities.items():
            posterior.guide.inclusion_logits()[name].copy_(torch.tensor(values).logit())


def small(**options):
    return fitted(mlp([3, 5, 4, 2]), torch.randn(4, 3), **options)


# -- which units ---------------------------------------------------------------------------------


def test_inclusion_and_the_median_probability_rule():
    posterior = small(prune_inputs=True)
    fc1 = [0.9, 0.5, 0.4, 0.51, 1e-6]
    set_inclusion(posterior, fc1=fc1, input=[0.2, 0.7, 0.6])
    inclusion = posterior.inclusion()
    assert list(inclusion) == ["input", "fc1", "fc2"]
    assert inclusion["fc1"].tolist() == pytest.approx(fc1)
    assert inclusion["fc1"].dtype == torch.float64
    keep = posterior.keep()
    assert keep["fc1"].tolist() == [True, False, False, True, False]
    assert keep["input"].tolist() == [False, True, True]
    # Groups that are never pruned keep all.
    assert list(keep) == [group.name for group in posterior.model.graph]
    assert keep["out"].tolist() == [True, True]
    assert posterior.keep(MedianProbability(0.05))["fc1"].tolist() == [True] * 4 + [False]
    assert MedianProbability(0.6)(posterior)["fc1"].tolist() == [True] + [False] * 4


def test_any_function_is_a_rule():
    posterior = small()
    keep = posterior.keep(lambda p: {"fc1": torch.arange(5) < 2})
    assert {name: int(mask.sum()) for name, mask in keep.items()} == {
        "input": 3,
        "fc1": 2,
        "fc2": 4,
        "out": 2,
    }


@pytest.mark.parametrize("threshold", [-0.1, 1.0, float("nan")])
def test_threshold_out_of_range(threshold):
    with pytest.raises(ValueError, match=r"threshold in \[0, 1\)"):
        MedianProbability(threshold)


def test_a_dense_model_keeps_everything():
    model = models.Deterministic(mlp([3, 5, 2]), torch.randn(4, 3), num_data=9)
    posterior = Posterior(model, guides.for_model(model))
    assert posterior.inclusion() == {}
    assert all(mask.all() for mask in posterior.keep().values())
    (group,) = posterior.summary().groups
    assert (group.group, group.units, group.kept) == ("fc1", 5, 5)
    assert group.expected is None
    assert group.undecided is None
    assert "–" in str(posterior.summary())


def test_summary_against_brute_force():
    posterior = fitted(mlp([3, 8, 2]), torch.randn(4, 3))
    pips = [0.99, 0.9, 0.6, 0.5, 0.3, 0.06, 0.04, 0.001]
    set_inclusion(posterior, fc1=pips)
    (group,) = posterior.summary().groups
    assert (group.group, group.units, group.kept, group.undecided) == ("fc1", 8, 3, 5)
    assert group.expected == pytest.approx(sum(pips), rel=1e-6)
    assert group.entropy == pytest.approx(sum(stats.bernoulli(p).entropy() for p in pips), rel=1e-5)
    # The law of the number of units by all 2^8 outcomes.
    law = np.zeros(9)
    for z in itertools.product([0, 1], repeat=8):
        law[sum(z)] += math.prod(p if one else 1 - p for p, one in zip(pips, z, strict=True))
    cumulative = law.cumsum()
    assert group.low == int(np.argmax(cumulative >= 0.025))
    assert group.high == int(np.argmax(cumulative >= 0.975))
    assert law[group.low : group.high + 1].sum() >= 0.95


def test_summary_of_certain_units():
    posterior = fitted(mlp([3, 4, 2]), torch.randn(4, 3))
    with torch.no_grad():
        posterior.guide.inclusion_logits()["fc1"].copy_(torch.tensor([60.0, 60, -60, -60]))
    (group,) = posterior.summary().groups
    assert (group.kept, group.low, group.high, group.undecided) == (2, 2, 2, 0)
    assert group.expected == pytest.approx(2)
    assert group.entropy == pytest.approx(0, abs=1e-12)


def test_summary_prints_a_table():
    posterior = small()
    set_inclusion(posterior, fc1=[0.9, 0.5, 0.4, 0.51, 1e-6], fc2=[0.999] * 4)
    lines = str(posterior.summary()).splitlines()
    assert lines[0].split()[:3] == ["group", "units", "kept"]
    assert lines[1].split()[:3] == ["fc1", "5", "2"]
    assert lines[2].split()[:4] == ["fc2", "4", "4", "4.0"]
    assert len({len(line) for line in lines[:3]}) == 1
    assert lines[3].startswith("inclusion probabilities"), lines[3]


def test_cautions():
    """What one has to know before shipping is said; a good network is not blamed."""
    line = partial(GroupSummary, expected=1.0, low=0, high=2, entropy=0.1)
    decided = line("fc1", 48, 10, undecided=3)
    assert cautions([decided]) == []
    assert "47 of 48 units are undecided" in cautions([line("fc1", 48, 20, undecided=47)])[0]
    assert "nothing was pruned" in cautions([line("fc1", 48, 48, undecided=0)])[0]
    # Undecided inputs are an answer, undecided units a question.
    assert cautions([line("input", 9, 4, undecided=9), decided]) == []
    scores = {"accuracy_ensemble": 0.57, "accuracy_compact": 0.29, "accuracy_compact_error": 0.02}
    assert "accuracy 0.29 against 0.57" in cautions([decided], scores)[0]
    assert cautions([decided], {**scores, "accuracy_compact": 0.56}) == []
    assert cautions([decided], {**scores, "accuracy_compact_error": 0.1}) == []
    scores = {"rmse_ensemble": 1.0, "rmse_compact": 1.5, "rmse_compact_error": 0.05}
    assert "rmse 1.5 against 1" in cautions([decided], scores)[0]
    assert cautions([decided], {**scores, "rmse_compact": 1.1}) == []
    posterior = small()
    set_inclusion(posterior, fc1=[0.5] * 5, fc2=[0.4] * 4)
    assert "caution: 9 of 9 units are undecided" in str(posterior.summary())


# -- the network they leave ----------------------------------------------------------------------


@pytest.mark.parametrize("activation", ["relu", "silu", "tanh", "sigmoid"])
@pytest.mark.parametrize("prune_inputs", [False, True])
@pytest.mark.parametrize("cls", SPARSE)
def test_masked_equals_compact_mlp(cls, activation, prune_inputs):
    x = torch.randn(64, 1, 8, 8)
    net = mlp([64, 40, 30, 10], activation)
    posterior = fitted(net, x[:2], cls, prune_inputs=prune_inputs)
    compact = ps.compact(posterior)
    kept = {name: int(mask.sum()) for name, mask in posterior.keep().items()}
    assert compact.fc2.weight.shape == (kept["fc2"], kept["fc1"])
    assert kept["fc1"] < 40
    assert (kept["input"] < 64) == prune_inputs
    assert (posterior.masked(x) - compact(x)).abs().max() <= 1e-5


@pytest.mark.parametrize("activation", ["relu", "silu", "tanh", "sigmoid"])
def test_masked_equals_compact_lenet(activation):
    x = torch.randn(16, 1, 28, 28)
    posterior = fitted(lenet5_caffe(activation), x[:2], models.SpikeSlabGroupHorseshoe)
    compact = ps.compact(posterior)
    assert len(compact.fc1.weight) < 500
    assert (posterior.masked(x) - compact(x)).abs().max() <= 1e-5


def test_masked_equals_compact_with_channels_pruned():
    x = torch.randn(16, 3, 28, 28)
    net = lenet5_caffe("sigmoid", in_channels=3, widths=(6, 8, 20))
    posterior = fitted(net, x[:2], prune_inputs=True)
    set_inclusion(posterior, input=[0.1, 0.9, 0.1])
    assert (posterior.masked(x) - ps.compact(posterior)(x)).abs().max() <= 1e-5


def test_masked_is_the_network_with_rows_at_zero():
    net, x = mlp([3, 5, 2], "sigmoid"), torch.randn(7, 3)
    posterior = fitted(net, x)
    keep = posterior.keep()
    with torch.no_grad():
        net.fc1.weight[~keep["fc1"]] = 0
        net.fc1.bias[~keep["fc1"]] = 0
        assert torch.allclose(posterior.masked(x), net(x), atol=1e-6)


def test_compact_follows_rule_and_masks():
    posterior = small()
    set_inclusion(posterior, fc1=[0.9, 0.5, 0.4, 0.51, 1e-6], fc2=[0.9] * 4)
    assert len(ps.compact(posterior, rule=MedianProbability(0.05)).fc1.weight) == 4
    keep = posterior.keep() | {"fc1": torch.tensor([False, False, True, False, False])}
    compact = ps.compact(posterior, keep)
    assert compact.compaction["kept"]["fc1"] == [2]
    x = torch.randn(5, 3)
    assert (posterior.masked(x, keep) - compact(x)).abs().max() <= 1e-5


@pytest.mark.parametrize("layer", ["fc1", "fc2"])
def test_a_layer_that_keeps_nothing(layer):
    posterior = small()
    with torch.no_grad():
        posterior.guide.inclusion_logits()[layer].fill_(-10)
    with pytest.raises(ValueError, match=f"(?s)layer '{layer}' would keep none.*lower"):
        ps.compact(posterior)


def test_an_input_that_keeps_nothing():
    posterior = small(prune_inputs=True)
    set_inclusion(posterior, input=[0.1] * 3)
    with pytest.raises(ValueError, match="the input would keep none of its 3 units"):
        ps.compact(posterior)


# -- predictions ---------------------------------------------------------------------------------


@pytest.mark.parametrize("cls", SPARSE)
@pytest.mark.parametrize("prune_inputs", [False, True])
def test_predictions_are_class_probabilities(cls, prune_inputs):
    posterior = small(cls=cls, prune_inputs=prune_inputs)
    draws = posterior.predict(torch.randn(7, 3), num_samples=6)
    assert draws.shape == (6, 7, 2)
    assert torch.allclose(draws.sum(-1), torch.ones(6, 7))
    assert not draws.requires_grad
    # Different draws, each one for all examples: batching changes nothing.
    assert draws.std(0).min() > 0
    x = torch.randn(7, 3)
    torch.manual_seed(0)
    whole = posterior.predict(x, num_samples=2)
    torch.manual_seed(0)
    assert torch.allclose(posterior.predict(x, num_samples=2, batch_size=3), whole, atol=1e-6)


@pytest.mark.parametrize(
    ("likelihood", "positive"),
    [(likelihoods.Normal, False), (likelihoods.Bernoulli, True), (likelihoods.Poisson, True)],
)
def test_predictions_of_a_number(likelihood, positive):
    posterior = fitted(mlp([3, 5, 1]), torch.randn(4, 3), likelihood=likelihood())
    draws = posterior.predict(torch.randn(7, 3), num_samples=6)
    assert draws.shape == (6, 7)
    assert bool((draws > 0).all()) or not positive


@pytest.mark.parametrize("inclusion", ["straight-through", "soft", "score"])
def test_draws_are_hard(inclusion):
    """One ReLU unit and one input: the output is 1 with both in, and 0 otherwise."""
    posterior = fitted(
        mlp([1, 1, 1], "relu"),
        torch.ones(2, 1),
        guide_options={"inclusion": inclusion, "initial_scale": 1e-9},
        likelihood=likelihoods.Normal(),
        prune_inputs=True,
    )
    with torch.no_grad():
        for family in (posterior.guide.row_families["fc1"], posterior.guide.row_families["out"]):
            family.loc.copy_(torch.tensor([[1.0, 0.0]]))
    set_inclusion(posterior, fc1=[0.6], input=[0.5])
    draws = posterior.predict(torch.ones(1, 1), num_samples=400).squeeze(-1)
    rounded = draws.round()
    assert torch.allclose(draws, rounded, atol=1e-6)
    assert set(rounded.tolist()) == {0.0, 1.0}
    # 4.5 standard errors of a Bernoulli(0.3)
    assert float(rounded.mean()) == pytest.approx(0.3, abs=0.1)


@pytest.mark.parametrize("training", [True, False])
def test_dropout_is_off_and_comes_back(training):
    net = nn.Sequential(nn.Linear(3, 20), nn.ReLU(), nn.Dropout(0.5), nn.Linear(20, 2))
    x = torch.randn(7, 3)
    model = models.Deterministic(net, x, num_data=9)
    posterior = Posterior(model, guides.for_model(model))
    model.train(training)
    expected = net.eval()(x).softmax(-1)
    assert torch.allclose(posterior.predict(x, 3), expected.expand(3, 7, 2), atol=1e-6)
    assert torch.allclose(posterior.masked(x).softmax(-1), expected, atol=1e-6)
    assert all(module.training == training for module in model.net.modules())
    # ... also when something goes wrong.
    with pytest.raises(RuntimeError):
        posterior.masked(torch.zeros(7, 3, dtype=torch.int64))
    assert all(module.training == training for module in model.net.modules())


def test_stock_svi_and_own_parameters_give_the_same_posterior():
    """The setting under which the user trained does not matter to what is read."""
    posterior = small()
    x = torch.randn(7, 3)
    draws = []
    for local in (True, False):
        with pyro.settings.context(module_local_params=local):
            torch.manual_seed(0)
            draws.append(posterior.predict(x, 3))
    assert torch.equal(*draws)
    assert not list(pyro.get_param_store().keys())


# -- scores --------------------------------------------------------------------------------------


def test_classification_scores_by_hand():
    x, y = torch.randn(50, 3), torch.randint(2, (50,))
    posterior = small()
    torch.manual_seed(3)
    draws = posterior.predict(x, num_samples=6).double()
    torch.manual_seed(3)
    scores = posterior.evaluate(x, y, num_samples=6)
    compact = posterior.masked(x).softmax(-1).double()
    for name, prediction in (("ensemble", draws.mean(0)), ("compact", compact)):
        chosen = prediction[torch.arange(50), y]
        assert scores[f"nll_{name}"] == pytest.approx(float(-chosen.log().mean()), rel=1e-5)
        error = stats.sem(chosen.log().numpy())
        assert scores[f"nll_{name}_error"] == pytest.approx(error, rel=1e-4)
        hits = (prediction.argmax(-1) == y).double()
        assert scores[f"accuracy_{name}"] == pytest.approx(float(hits.mean()))
        assert scores[f"accuracy_{name}_error"] == pytest.approx(stats.sem(hits.numpy()))
        assert scores[f"ece_{name}"] == pytest.approx(
            ps.posterior.calibration_error(prediction, y), abs=1e-6
        )
    assert set(scores) == {
        f"{score}_{name}"
        for score in ("accuracy", "nll", "ece")
        for name in ("ensemble", "compact", "ensemble_error", "compact_error")
    } - {"ece_ensemble_error", "ece_compact_error"}


def test_scores_of_two_classes_with_one_output():
    x, y = torch.randn(50, 3), torch.randint(2, (50,)).float()
    posterior = fitted(mlp([3, 5, 1]), x, likelihood=likelihoods.Bernoulli())
    scores = posterior.evaluate(x, y, num_samples=2)
    probability = posterior.masked(x).squeeze(-1).sigmoid()
    assert scores["accuracy_compact"] == pytest.approx(
        float(((probability > 0.5) == y.bool()).double().mean())
    )
    chosen = probability.where(y.bool(), 1 - probability)
    assert scores["nll_compact"] == pytest.approx(-float(chosen.log().mean()), rel=1e-5)
    assert 0 <= scores["ece_ensemble"] <= 1
    assert not any(key.startswith("rmse") for key in scores)


@pytest.mark.parametrize("num_samples", [0, -1])
def test_no_draws(num_samples):
    with pytest.raises(ValueError, match="num_samples to be a whole number"):
        small().predict(torch.randn(7, 3), num_samples)


@pytest.mark.parametrize("noise_scale", [None, 0.4])
def test_regression_scores_by_hand(noise_scale):
    """RMSE and NLL in the target's own unit: y = 3 + 250 · standardised y."""
    mean, scale = 3.0, 250.0
    x, y = torch.randn(50, 3), torch.randn(50)
    likelihood = likelihoods.Normal(noise_scale)
    posterior = fitted(mlp([3, 5, 1]), x, likelihood=likelihood)
    if noise_scale is None:
        with torch.no_grad():
            posterior.guide.noise_precision.log_concentration.fill_(math.log(8.0))
            posterior.guide.noise_precision.log_rate.fill_(math.log(2.5))
    torch.manual_seed(3)
    outputs, precisions = [], []
    for output, latents in posterior.draws(x, num_samples=6):
        outputs.append(output.squeeze(-1).double().numpy())
        precision = noise_scale**-2 if noise_scale else float(latents["noise_precision"])
        precisions.append(precision)
    torch.manual_seed(3)
    scores = posterior.evaluate(x, y, num_samples=6, target_scale=scale)

    raw = mean + scale * y.double().numpy()
    predicted = mean + scale * np.stack(outputs)
    deviations = scale / np.sqrt(precisions)[:, None]
    density = stats.norm.pdf(raw, predicted, deviations).mean(0)
    assert scores["nll_ensemble"] == pytest.approx(-np.log(density).mean(), rel=1e-5)
    error = np.sqrt(np.square(predicted.mean(0) - raw).mean())
    assert scores["rmse_ensemble"] == pytest.approx(error, rel=1e-5)

    compact = mean + scale * posterior.masked(x).squeeze(-1).double().numpy()
    # One network has one precision: the mean of Gamma(8, 2.5).
    precision = noise_scale**-2 if noise_scale else 8 / 2.5
    deviation = scale / math.sqrt(precision)
    nll = -stats.norm.logpdf(raw, compact, deviation).mean()
    assert scores["nll_compact"] == pytest.approx(nll, rel=1e-5)
    squares = np.square(compact - raw)
    assert scores["rmse_compact"] == pytest.approx(np.sqrt(squares.mean()), rel=1e-5)
    # The delta method, checked by moving the mean square by its standard error.
    low, high = (np.sqrt(squares.mean() + sign * 1e-3 * stats.sem(squares)) for sign in (-1, 1))
    assert scores["rmse_compact_error"] == pytest.approx((high - low) / 2e-3, rel=1e-4)
    assert set(scores) == {
        f"{score}_{name}"
        for score in ("nll", "rmse")
        for name in ("ensemble", "compact", "ensemble_error", "compact_error")
    }


def test_temperature_of_the_ensemble():
    """p ∝ mean^(1/T), in its draws' mean and in its scores; T by the rows it is fitted on."""
    x = torch.randn(400, 3)
    posterior = fitted(mlp([3, 5, 3]), x)

    def drawn(**options):
        torch.manual_seed(4)
        return posterior.predict(x, 10, **options)

    mean = drawn().double().mean(0)
    powered = mean.square() / mean.square().sum(-1, keepdim=True)
    tempered = drawn(temperature=0.5)
    torch.testing.assert_close(tempered.mean(0).double(), powered, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(tempered.sum(-1), torch.ones(10, 400))
    assert bool((tempered >= 0).all())
    assert float(tempered.var(0).sum()) > 0  # they still differ
    # Labels that the ensemble's square predicts: that is what is found.
    y = torch.distributions.Categorical(powered).sample()
    torch.manual_seed(4)
    found = posterior.temperature(x, y, num_samples=10)
    loss = -(mean.log() / found).log_softmax(-1).gather(1, y[:, None]).mean()
    for other in (0.8 * found, 1.25 * found, 1.0):
        assert -(mean.log() / other).log_softmax(-1).gather(1, y[:, None]).mean() >= loss
    torch.manual_seed(4)
    scores = posterior.evaluate(x, y, num_samples=10, temperature=0.5)
    nll = -powered.gather(1, y[:, None]).log().mean()
    assert scores["nll_ensemble"] == pytest.approx(float(nll), rel=1e-5)
    torch.manual_seed(4)
    calibration = posterior.calibration(x, y, num_samples=10, temperature=0.5)
    assert calibration["ensemble"].scores["ece"] == pytest.approx(scores["ece_ensemble"], abs=1e-6)
    with pytest.raises(ValueError, match="positive, finite temperature"):
        posterior.predict(x, 2, temperature=0.0)
    with pytest.raises(ValueError, match="got none"):
        posterior.temperature(x[:0], y[:0], 2)
    numbers = fitted(mlp([3, 5, 1]), x, likelihood=likelihoods.Normal())
    for attempt in (numbers.predict, numbers.calibration, numbers.evaluate):
        data = (x,) if attempt == numbers.predict else (x, x[:, 0])
        with pytest.raises(ValueError, match=r"classes"):
            attempt(*data, num_samples=2, temperature=0.5)


@pytest.mark.parametrize("cls", [models.SpikeSlabGaussian, models.LogNormalNoise])
def test_inputs_that_were_pruned_for_good_have_no_influence(cls):
    """Whatever masks are asked for, and in draws as well."""
    x = torch.randn(6, 3)
    posterior = fitted(mlp([3, 5, 2]), x, cls, prune_inputs=True)
    inside = torch.tensor([True, False, True])
    before = posterior.masked(x, {"input": inside})
    assert posterior.prune(lambda p: {"input": inside}) == 1
    other = x.clone()
    other[:, 1] = 100.0
    for keep in ({}, {"fc1": torch.arange(5) < 3}):
        assert torch.equal(posterior.masked(x, keep), posterior.masked(other, keep))
    torch.testing.assert_close(posterior.masked(other, {}), before)
    parameters = posterior.mean_parameters()
    assert not parameters["fc1.weight"][:, 1].any()
    assert not any(value.requires_grad for value in parameters.values())
    pyro.set_rng_seed(1)
    draws = posterior.predict(x, num_samples=2)
    pyro.set_rng_seed(1)
    torch.testing.assert_close(posterior.predict(other, num_samples=2), draws)


# -- batch normalisation -------------------------------------------------------------------------


def normalised(inputs=None):
    """A network with batch normalisation whose running statistics are those of other weights."""
    torch.manual_seed(0)
    net = nn.Sequential(
        *(nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU()),
        *(nn.Conv2d(6, 5, 3, padding=1), nn.BatchNorm2d(5), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(5, 3)),
    )
    posterior = fitted(
        net, torch.zeros(2, 3, 6, 6), guide_options={"variance": "full", "initial_scale": 0.3}
    )
    return Posterior(posterior.model, posterior.guide, inputs)


def buffers(posterior):
    return {name: value.clone() for name, value in posterior.model.net.named_buffers()}


def test_statistics_of_the_masked_network_are_shipped():
    inputs = torch.randn(300, 3, 6, 6) * 2 + 1
    posterior = normalised(inputs)
    keep = posterior.keep()
    assert not all(bool(mask.all()) for mask in keep.values())
    before = posterior.masked(inputs, keep)
    posterior.refresh_statistics(keep)
    masked = posterior.masked(inputs, keep)
    assert float((masked - before).abs().max()) > 0.1
    # Activations of the second layer's kept channels have mean 0 and variance 1 before scaling.
    seen = []
    handle = posterior.model.net[4].register_forward_hook(lambda _, x, y: seen.append(x[0]))
    posterior.masked(inputs, keep)
    handle.remove()
    layer = posterior.model.net[4]
    own = seen[0].transpose(0, 1).flatten(1)
    torch.testing.assert_close(layer.running_mean, own.mean(1), rtol=0.05, atol=0.05)
    torch.testing.assert_close(layer.running_var, own.var(1), rtol=0.05, atol=0.05)
    small = ps.compact(posterior, keep)
    torch.testing.assert_close(small(inputs), masked, rtol=0, atol=1e-5)


def test_draws_have_statistics_of_their_own():
    inputs = torch.randn(256, 3, 6, 6) * 2 + 1
    posterior = normalised(inputs)
    before = buffers(posterior)
    torch.manual_seed(1)
    draws = [output for output, _ in posterior.draws(inputs, 4)]
    assert all(torch.equal(v, before[n]) for n, v in buffers(posterior).items())
    # What training computes: the same draw, normalised by the batch itself.
    model = posterior.model
    model.net[1].train()
    model.net[4].train()
    torch.manual_seed(1)
    for output in draws:
        with ps.modules.own_parameters(model, posterior.guide), ExactDraws():
            trace = pyro.poutine.trace(posterior.guide).get_trace()
        with pyro.poutine.replay(trace=trace), torch.no_grad():
            trained = model.run(inputs, model.rows())
        torch.testing.assert_close(output, trained, rtol=0.02, atol=0.02)


def test_without_inputs_statistics_stay_as_they_are():
    x = torch.randn(40, 3, 6, 6)
    posterior = normalised()
    before = buffers(posterior)
    posterior.refresh_statistics()
    posterior.predict(x, 2)
    assert all(torch.equal(v, before[n]) for n, v in buffers(posterior).items())
    # Nor does a network without batch normalisation cost anything more.
    plain = Posterior(small().model, small().guide, torch.randn(9, 3))
    assert plain._normalising == ()
