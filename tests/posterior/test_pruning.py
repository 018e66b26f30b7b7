"""Loops of training and pruning: free energies, the path of a sparse regression, prunings in the
midst of training."""

import copy
import itertools
import math

import pytest
import torch
from matplotlib.figure import Figure
from torch import nn
from torch.distributions import MultivariateNormal

import pyro_sparse as ps
from pyro_sparse import guides, likelihoods, models
from pyro_sparse.data import Batches
from pyro_sparse.infer import ELBO, Run, schedules
from pyro_sparse.modules import own_parameters
from pyro_sparse.nets import mlp
from pyro_sparse.posterior import Posterior, plots, pruning
from pyro_sparse.posterior.pruning import Pass, PruneEvery, free_energy, iterate
from pyro_sparse.posterior.selection import ModelReduction, SignalToNoise, TopK

# -- free energies of a linear model with known noise ----------------------------------------------

NOISE, PRIOR = 0.5, 1.5


def linear(size=60, features=4, orthogonal=False):
    """A conjugate model: y = Xw + b with Gaussian prior and noise, all weights in one row."""
    x = torch.randn(size, features, dtype=torch.float64)
    if orthogonal:
        # The constant column, too.
        basis = torch.linalg.qr(torch.cat([torch.ones(size, 1).double(), x], 1)).Q
        x = basis[:, 1:] * math.sqrt(size)
    effect = torch.zeros(features, dtype=torch.float64)
    effect[0], effect[1] = 1.0, -0.7
    y = x @ effect + 0.2 + NOISE * torch.randn(size, dtype=torch.float64)
    model = models.ReducibleGaussian(
        nn.Sequential(nn.Linear(features, 1)).double(),
        x[:1],
        prior_scale=PRIOR,
        num_data=size,
        likelihood=likelihoods.Normal(NOISE).double(),
    )
    return Posterior(model, guides.for_model(model)), x, y


def design(x):
    return torch.cat([x, torch.ones(len(x), 1, dtype=x.dtype)], 1)


def by_hand(of, x, y):
    """−ELBO of the Gaussian guide, in closed form."""
    (law,) = of.gaussians().values()
    (inside,) = (of.model.support[name].flatten() for name in of.model.support)
    loc, variance = law.loc.flatten() * inside, law.variance.flatten() * inside
    matrix = design(x)
    squares = (y - matrix @ loc).square().sum() + (matrix.square() @ variance).sum()
    expected = -squares / (2 * NOISE**2) - len(y) * math.log(NOISE * math.sqrt(2 * math.pi))
    loc, variance = loc[inside], variance[inside]
    ratio = (variance + loc.square()) / PRIOR**2
    kl = 0.5 * (ratio - 1 - (variance / PRIOR**2).log()).sum()
    return float(kl - expected)


def optimal(of, x, y):
    """Set the guide to the best mean field, which for an orthogonal design is the posterior."""
    matrix = design(x)
    precision = matrix.T @ matrix / NOISE**2 + torch.eye(matrix.shape[1]).double() / PRIOR**2
    (family,) = (family for _, family in of.guide.layers())
    with torch.no_grad():
        family.loc.copy_(torch.linalg.solve(precision, matrix.T @ y / NOISE**2).unsqueeze(0))
        family.log_scale.copy_(-0.5 * precision.diagonal().log().unsqueeze(0))


def evidence(x, y, inside):
    matrix = design(x)[:, inside]
    covariance = PRIOR**2 * matrix @ matrix.T + NOISE**2 * torch.eye(len(y)).double()
    return float(MultivariateNormal(torch.zeros_like(y), covariance).log_prob(y))


def test_free_energy_by_hand():
    of, x, y = linear()
    with torch.no_grad():
        for _, family in of.guide.layers():
            family.log_scale.uniform_(-4, -2)
    everything, batches = Batches(x, y, 60), Batches(x, y, 15)
    truth = by_hand(of, x, y)
    for loader in (everything, batches):
        draws = torch.tensor([free_energy(of, loader, draws=10, seed=s) for s in range(16)])
        error = float(draws.std()) / 4
        assert abs(float(draws.mean()) - truth) < 5 * error
        assert error < 0.01 * abs(truth)
    # Without noise there is nothing to average over.
    with torch.no_grad():
        for _, family in of.guide.layers():
            family.log_scale.fill_(-20.0)
    for loader in (everything, batches):
        assert free_energy(of, loader, draws=1) == pytest.approx(by_hand(of, x, y), rel=1e-6)


def test_the_choice_of_a_support_is_paid_for():
    """A bound after pruning stays below the evidence of the mixture of all 2^5 supports.

    That is by enumeration; the guide is exact given the support, so the bound is its term.
    """
    of, x, y = linear(orthogonal=True)
    supports = [torch.tensor(inside) for inside in itertools.product([False, True], repeat=5)]
    assert pruning.lower_bound(of.model, of.guide, [(x, y)]).choice == 0  # nothing was chosen
    log_priors, evidences = [], []
    for inside in supports:
        copied = copy.deepcopy(of)
        copied.model.support.restrict({"0": inside.unsqueeze(0)})
        optimal(copied, x, y)
        log_priors.append(copied.model.support.log_prior())
        evidences.append(evidence(x, y, inside))
        if not bool(inside.all()):
            bound = pruning.lower_bound(copied.model, copied.guide, [(x, y)], draws=50)
            ratios = ps.posterior.log_weights(copied.model, copied.guide, x, y, num_samples=50)
            expected = log_priors[-1] + evidences[-1]
            assert bound.value == pytest.approx(expected, abs=5 * bound.error + 1e-6)
            assert bound.given_support == pytest.approx(evidences[-1], abs=5 * bound.error + 1e-6)
            assert float(ratios.mean()) == pytest.approx(expected, abs=1e-6)
    # All but the one in which nothing was chosen: a law of all supports.
    log_priors[-1] = -math.log(6)
    assert sum(map(math.exp, log_priors)) == pytest.approx(1)
    # Of data that no weight helps with, the best support's evidence is above the mixture's ...
    mixture = torch.logsumexp(torch.tensor(log_priors) + torch.tensor(evidences), 0)
    assert max(evidences) > float(mixture)
    # ... and what is reported of it is not.
    assert max(a + b for a, b in zip(log_priors, evidences, strict=True)) < float(mixture)


def test_free_energy_is_the_mean_of_the_loss():
    of, x, y = linear()
    elbo = ELBO(3)
    torch.manual_seed(5)
    with own_parameters(of.model, of.guide):
        expected = elbo.loss(of.model, of.guide, x, y)
    assert free_energy(of, [(x, y)], draws=3, seed=5) == pytest.approx(expected, rel=1e-12)


def test_free_energy_leaves_everything_as_it_was():
    """The order of the batches, random state, modes; twice gives the same number."""
    of, x, y = linear()
    loader = Batches(x, y, 7)
    state, order = torch.get_rng_state(), loader.generator.get_state()
    first = free_energy(of, loader)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(loader.generator.get_state(), order)
    next(iter(loader))
    assert free_energy(of, loader) == first
    assert free_energy(of, loader, seed=1) != first
    assert of.model.training
    assert of.guide.training
    turbo = models.TurboMarkov(mlp([4, 5, 1]), x[:1].float(), num_data=60)
    guide = guides.for_model(turbo)
    before = copy.deepcopy(guide.state_dict())
    free_energy(Posterior(turbo, guide), [(x.float(), torch.zeros(60, dtype=torch.long))])
    after = guide.state_dict()
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_prediction_of_a_pass_is_exact_for_an_exact_posterior(monkeypatch):
    """F − ΣΔF is the free energy of the reduced model: minus its evidence."""
    of, x, y = linear(orthogonal=True)
    optimal(of, x, y)
    everything = torch.ones(5, dtype=torch.bool)
    assert by_hand(of, x, y) == pytest.approx(-evidence(x, y, everything), rel=1e-9)
    monkeypatch.setattr(pruning, "fit", lambda *args, **options: Run())
    path = iterate(of, [(x, y)], epochs=1, draws=2)
    inside = of.model.support["0"].flatten()
    assert inside.tolist()[:2] == [True, True]
    assert not inside.all()
    assert [step.number for step in path] == [0, 1]
    assert path[1].removed == int((~inside).sum())
    truth = -evidence(x, y, inside)
    assert truth < -evidence(x, y, everything)
    assert by_hand(of, x, y) == pytest.approx(truth, rel=1e-9)
    gain = path[0].free_energy - path[1].predicted
    expected = evidence(x, y, inside) - evidence(x, y, everything)
    assert gain == pytest.approx(expected, rel=1e-9)


# -- the iterated algorithm ------------------------------------------------------------------------

SUPPORT = [0, 3, 7]
FAST = {"lr": 3e-2, "scale_lr": 3e-2, "progress": False}


@pytest.fixture(scope="module")
def regression():
    """Three of ten features matter; trained, then pruned along the path."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(150, 10, generator=generator)
    effect = torch.zeros(10)
    effect[SUPPORT] = torch.tensor([1.0, -0.8, 0.6])
    y = x @ effect + 0.3 * torch.randn(150, generator=generator)
    torch.manual_seed(0)
    model = models.ReducibleGaussian(
        nn.Sequential(nn.Linear(10, 1)), x[:1], num_data=150, likelihood=likelihoods.Normal()
    )
    guide = guides.for_model(model)
    loader = Batches(x, y, 150)
    ps.fit(model, guide, loader, epochs=200, kl_weight=schedules.constant(), **FAST)
    of = Posterior(model, guide)
    return of, loader, iterate(of, loader, epochs=40, draws=20, **FAST)


def test_the_support_is_recovered(regression):
    of, _, _ = regression
    mask = of.model.support["0"].flatten()
    assert mask[:10].nonzero().flatten().tolist() == SUPPORT
    (rows,) = of.guide.mean_rows().values()
    assert rows.flatten()[SUPPORT].tolist() == pytest.approx([1.0, -0.8, 0.6], abs=0.1)


def test_the_path_goes_down(regression):
    of, loader, path = regression
    assert [step.number for step in path] == list(range(len(path)))
    assert path[0] == Pass(0, 0, 11, None, path[0].free_energy, path[0].free_energy)
    assert path[-1].free_energy < path[0].free_energy
    for before, step in itertools.pairwise(path):
        assert step.removed > 0
        assert step.left == before.left - step.removed
        assert step.predicted < before.free_energy
        # Nearly exact: the posterior is nearly the true one.
        assert step.pruned == pytest.approx(step.predicted, abs=1.5)
    assert path[-1].left == int(of.model.support["0"].sum())
    # It ended by itself: another pass finds nothing.
    assert len(path) <= 30
    again = iterate(of, loader, epochs=1, draws=5, **FAST)
    assert [step.number for step in again] == [0]


def test_what_is_out_stays_at_0(regression):
    of, loader, _ = regression
    model, guide = copy.deepcopy((of.model, of.guide))
    assert guide.support is model.support
    # The guide's own numbers of what is out may be anything.
    out = ~model.support["0"]
    with torch.no_grad():
        for _, family in guide.layers():
            family.loc[out] = 5.0
    ps.fit(model, guide, loader, epochs=2, **FAST)
    posterior = Posterior(model, guide)
    rows = model.graph.rows(posterior.mean_parameters(), "0")
    assert not rows[out].any()
    assert rows[~out].all()
    x = torch.zeros(1, 10)
    x[0, int(out.flatten()[:10].nonzero()[0])] = 1e6
    for draw in posterior.predict(x, num_samples=3):
        assert draw.abs().max() < 10


def test_masks_survive_a_state_dict(regression):
    of, loader, _ = regression
    x = loader.x
    model = models.ReducibleGaussian(
        nn.Sequential(nn.Linear(10, 1)), x[:1], num_data=150, likelihood=likelihoods.Normal()
    )
    guide = guides.for_model(model)
    guide.load_state_dict(of.guide.state_dict())
    assert torch.equal(model.support["0"], of.model.support["0"])
    assert model.support.restricted
    assert torch.equal(Posterior(model, guide).masked(x, {}), of.masked(x, {}))


def test_iterate_with_a_rule_about_units():
    """Any rule, any model; predictions are for Gaussian weights only."""
    x = torch.randn(40, 3)
    y = (x[:, 0] > 0).long()
    model = models.LogNormalNoise(mlp([3, 8, 2]), x[:1], num_data=40)
    guide = guides.for_model(model)
    with torch.no_grad():
        guide.noises["fc1"].noise_log_scale[:3] = 6.0
    of = Posterior(model, guide)
    path = iterate(
        of, Batches(x, y, 20), epochs=1, rule=SignalToNoise(), draws=2, lr=1e-3, progress=False
    )
    assert [(step.removed, step.left, step.predicted) for step in path] == [
        (0, 8, None),
        (3, 5, None),
    ]
    assert of.keep()["fc1"].tolist() == [False] * 3 + [True] * 5
    # The default rule of the model, with the passes limited.
    with torch.no_grad():
        guide.noises["fc1"].noise_log_scale[3:5] = 6.0
    path = iterate(of, Batches(x, y, 20), epochs=1, max_passes=1, draws=1, progress=False)
    assert [step.removed for step in path] == [0, 2]


def test_the_bound_itself_is_trained_on(monkeypatch):
    """No warm-up of the KL after a pruning, unless it is asked for."""
    of, x, y = linear()
    seen = []

    def record(*args, **options) -> Run:
        seen.append(options)
        return Run()

    monkeypatch.setattr(pruning, "fit", record)
    iterate(of, [(x, y)], epochs=3, rule=TopK(lambda p: {"0": torch.arange(5.0)[None]}, 3))
    iterate(of, [(x, y)], epochs=3, rule=TopK(lambda p: {"0": torch.arange(5.0)[None]}, 2), lr=0.1)
    assert [options["kl_weight"](0.0) for options in seen] == [1.0, 1.0]
    assert [options["epochs"] for options in seen] == [3, 3]
    assert seen[1]["lr"] == 0.1


# -- in the midst of training ----------------------------------------------------------------------


class Counting:
    """Stands for a posterior; counts its prunings."""

    def __init__(self):
        self.rules = []

    def prune(self, rule):
        self.rules.append(rule)
        return len(self.rules)


@pytest.mark.parametrize(
    ("options", "epochs"),
    [
        ({"every": 3}, [3, 6, 9, 12]),
        ({"every": 1, "start": 10}, [10, 11, 12]),
        ({"every": 3, "start": 4, "stop": 9}, [6, 9]),
        ({"every": 5, "stop": 4}, []),
        ({}, [5, 10]),
    ],
)
def test_epochs_of_prunings(options, epochs):
    posterior, rule = Counting(), object()
    prune = PruneEvery(posterior, rule, **options)
    history = [{"epoch": epoch} for epoch in range(1, 13)]
    for metrics in history:
        prune(metrics)
    assert [m["epoch"] for m in history if "removed" in m] == epochs
    assert posterior.rules == [rule] * len(epochs)


def test_an_epoch_at_least():
    with pytest.raises(ValueError, match="at least one epoch"):
        PruneEvery(Counting(), object(), every=0)


def test_pruning_in_the_midst_of_training():
    x = torch.randn(40, 3)
    y = (x[:, 0] > 0).long()
    model = models.LogNormalNoise(mlp([3, 8, 2]), x[:1], num_data=40)
    guide = guides.for_model(model)
    with torch.no_grad():
        guide.noises["fc1"].noise_log_scale[:3] = 6.0
    of = Posterior(model, guide)
    run = ps.fit(
        model,
        guide,
        Batches(x, y, 20),
        epochs=4,
        lr=1e-3,
        progress=False,
        on_epoch=PruneEvery(of, SignalToNoise(), every=2),
    )
    assert [entry.get("removed") for entry in run.history] == [None, 3, None, 0]
    assert model.support["fc1"].tolist() == [False] * 3 + [True] * 5


# -- plots -----------------------------------------------------------------------------------------

PATH = [
    Pass(0, 0, 10, None, 50.0, 50.0),
    Pass(1, 6, 4, 44.0, 47.0, 43.0),
    Pass(2, 1, 3, None, 43.5, 42.0),
]


def test_free_energy_path():
    ax = Figure().subplots()
    assert plots.free_energy_path(PATH, ax) is ax
    drawn = {line.get_label(): line.get_xydata().tolist() for line in ax.lines}
    assert drawn["retrained"] == [[10, 50], [4, 43], [3, 42]]
    assert drawn["right after pruning"] == [[4, 47], [3, 43.5]]
    assert drawn["predicted, F − ΣΔF"] == [[4, 44]]
    # Pruned to the right: fewer weights.
    left, right = ax.get_xlim()
    assert left > right
    dotted = [line.get_xydata().tolist() for line in ax.lines if line.get_linestyle() == ":"]
    assert dotted == [[[10, 50], [4, 47], [4, 43]], [[4, 43], [3, 43.5], [3, 42]]]


def test_free_energy_of_a_path_that_pruned_nothing():
    ax = Figure().subplots()
    plots.free_energy_path(PATH[:1], ax)
    assert [text.get_text() for text in ax.get_legend().get_texts()] == [
        "retrained",
        "right after pruning",
    ]


def test_noise_signal():
    model = models.LogNormalNoise(mlp([3, 4, 2]), torch.zeros(1, 3), num_data=9, prune_inputs=True)
    guide = guides.for_model(model)
    with torch.no_grad():
        guide.noises["fc1"].noise_log_scale.copy_(torch.tensor([-30.0, -3.0, 0.5, 9.0]))
    noise = Posterior(model, guide).noise()
    ax = Figure().subplots()
    assert plots.noise_signal(noise, ax) is ax
    labels = [text.get_text() for text in ax.get_legend().get_texts()]
    kept = int((noise["fc1"].signal_to_noise > 1).sum())
    assert labels == [f"fc1: {kept} of 4", "input: 3 of 3"]
    points = ax.collections[0].get_offsets()
    torch.testing.assert_close(torch.tensor(points[:, 0]), noise["fc1"].mean)
    expected = noise["fc1"].signal_to_noise.clamp(max=1e6)
    torch.testing.assert_close(torch.tensor(points[:, 1]), expected)
    assert (ax.get_xscale(), ax.get_yscale()) == ("log", "log")


def test_reduction_in_a_hidden_layer_lowers_the_free_energy():
    """A small network, its own algorithm from start to end."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(120, 4, generator=generator)
    y = torch.tanh(2 * x[:, 0]) + 0.2 * torch.randn(120, generator=generator)
    torch.manual_seed(1)
    model = models.ReducibleGaussian(
        mlp([4, 6, 1], "relu"), x[:1], num_data=120, likelihood=likelihoods.Normal()
    )
    guide = guides.for_model(model)
    loader = Batches(x, y, 120)
    ps.fit(model, guide, loader, epochs=120, kl_weight=schedules.constant(), **FAST)
    of = Posterior(model, guide)
    path = iterate(of, loader, epochs=25, draws=10, max_passes=3, rule=ModelReduction(), **FAST)
    assert path[-1].left < path[0].left
    assert path[-1].free_energy < path[0].free_energy
    small = ps.compact(of)
    with torch.no_grad():
        torch.testing.assert_close(small(x), of.masked(x), rtol=1e-4, atol=1e-5)
