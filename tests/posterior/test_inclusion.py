"""Runs merged up to permutation, active paths, variable selection with its expected errors."""

import itertools
import math

import pytest
import torch

from pyro_sparse import guides, models
from pyro_sparse.nets import lenet5_caffe, mlp
from pyro_sparse.posterior import (
    ExpectedCost,
    FalseDiscovery,
    MedianProbability,
    Posterior,
    false_discovery_rate,
    input_probability,
    input_sets,
    merge,
    reaching_inputs,
    select_inputs,
    selection,
)
from pyro_sparse.posterior.importance import NotOfferedError
from pyro_sparse.posterior.inclusion import within_false_discovery_rate


def posterior_of(net, example, **options):
    model = models.SpikeSlabGaussian(net, example, num_data=50, **options)
    posterior = Posterior(model, guides.for_model(model, variance="full"))
    with torch.no_grad():
        for logits in posterior.guide.inclusion_logits().values():
            logits.normal_(0, 3)
    return posterior


def set_inclusion(posterior, **probabilities):
    with torch.no_grad():
        for name, values in probabilities.items():
            posterior.guide.inclusion_logits()[name].copy_(torch.tensor(values).logit())


@torch.no_grad()
def shuffled(posterior, net, seed):
    """The same posterior with its hidden units in another order, inclusion logits nudged."""
    graph = posterior.model.graph
    generator = torch.Generator().manual_seed(seed)
    parameters = graph.parameters(posterior.guide.mean_rows())
    orders = {}
    for group in graph:
        if group.writers and group.prunable:
            order = orders[group.name] = torch.randperm(group.size, generator=generator)
            for part in (*group.writers, *group.readers):
                entries = (order.unsqueeze(1) * part.block + torch.arange(part.block)).flatten()
                parameters[part.parameter] = parameters[part.parameter].index_select(
                    part.dim, entries
                )
    model = models.SpikeSlabGaussian(
        net, torch.zeros(posterior.model.example_shape), num_data=50,
        prune_inputs=posterior.model.prune_inputs,
    )  # fmt: skip
    copy = Posterior(model, guides.for_model(model, variance="full"))
    for group, family in copy.guide.layers():
        family.loc.copy_(graph.rows(parameters, group.name))
    for name, logits in posterior.guide.inclusion_logits().items():
        order = orders.get(name, torch.arange(len(logits)))
        nudge = 0.1 * torch.randn(len(logits), generator=generator)
        copy.guide.inclusion_logits()[name].copy_(logits[order] + nudge)
    return copy, orders


# -- several runs ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("net", "shape"), [(mlp([3, 9, 8, 2]), (4, 3)), (lenet5_caffe(), (2, 1, 28, 28))]
)
def test_merge_undoes_permutations(net, shape):
    first = posterior_of(net, torch.randn(shape), prune_inputs=len(shape) == 2)
    runs = [first] + [shuffled(first, net, seed)[0] for seed in (1, 2)]
    merged = merge(runs)
    assert list(merged.probabilities) == list(first.inclusion())
    for name, pip in first.inclusion().items():
        assert merged.probabilities[name].shape == (3, len(pip))
        # Nudges of 0.1 in the logit move a probability by at most a few hundredths.
        assert (merged.probabilities[name] - pip).abs().max() < 0.12, name
        raw = torch.stack([run.inclusion()[name] for run in runs])
        if name != "input":
            assert (raw - pip).abs().max() > 0.5
    _, orders = shuffled(first, net, 1)
    included = first.inclusion()["fc1" if "fc1" in orders else "conv1"] > 0.2
    name = "fc1" if "fc1" in orders else "conv1"
    # What stands at place i is the unit that came from i.
    assert (orders[name][merged.orders[1][name]] == torch.arange(len(included)))[included].all()


def test_means_errors_and_pairs_of_merged_runs():
    net = mlp([2, 3, 1])
    first = posterior_of(net, torch.randn(4, 2))
    second, _ = shuffled(first, net, 0)
    set_inclusion(first, fc1=[0.9, 0.9, 0.01])
    merged = merge([first, second])
    values = merged.probabilities["fc1"]
    assert torch.allclose(merged.mean["fc1"], values.mean(0))
    assert torch.allclose(
        merged.standard_error["fc1"], (values[0] - values[1]).abs() / 2, atol=1e-12
    )
    count, error = merged.expected["fc1"]
    assert count == pytest.approx(float(values.sum() / 2))
    assert error == pytest.approx(float((values[0].sum() - values[1].sum()).abs() / 2))
    pairs = merged.co_inclusion("fc1")
    assert torch.equal(pairs, pairs.T)
    assert float(pairs[0, 2]) == pytest.approx(
        float((values[0, 0] * values[0, 2] + values[1, 0] * values[1, 2]) / 2)
    )
    assert torch.allclose(pairs.diagonal(), merged.mean["fc1"])
    assert str(merged).splitlines()[1].split()[:2] == ["fc1", "3"]


def test_highest_probability_subnetwork_of_a_mixture():
    runs = [posterior_of(mlp([2, 3, 1]), torch.randn(4, 2)) for _ in range(2)]
    runs[1].guide.load_state_dict(runs[0].guide.state_dict())
    # The averages say (in, in, out); no run does.
    set_inclusion(runs[0], fc1=[0.98, 0.2, 0.1])
    set_inclusion(runs[1], fc1=[0.3, 0.95, 0.1])
    merged = merge(runs)
    values = merged.probabilities["fc1"]

    def probability(mask):
        return float(torch.where(torch.tensor(mask), values, 1 - values).prod(1).mean())

    keep, log_probability = merged.highest_probability()
    assert math.exp(log_probability) == pytest.approx(probability(keep["fc1"].tolist()))
    best = max(itertools.product([False, True], repeat=3), key=probability)
    assert tuple(keep["fc1"].tolist()) == best
    assert tuple((merged.mean["fc1"] > 0.5).tolist()) != best


def test_merge_refuses():
    first = posterior_of(mlp([2, 3, 1]), torch.randn(4, 2))
    with pytest.raises(ValueError, match="at least two runs"):
        merge([first])
    with pytest.raises(ValueError, match="runs of one network"):
        merge([first, posterior_of(mlp([2, 4, 1]), torch.randn(4, 2))])
    dense = models.Deterministic(mlp([2, 3, 1]), torch.randn(4, 2), num_data=5)
    with pytest.raises(NotOfferedError):
        merge([Posterior(dense, guides.for_model(dense))] * 2)


# -- inputs that reach the output ------------------------------------------------------------------


def test_probability_of_a_path_is_that_of_its_links():
    posterior = posterior_of(mlp([3, 2, 2, 1]), torch.randn(4, 3), prune_inputs=True)
    set_inclusion(posterior, input=[0.9, 0.5, 0.1], fc1=[0.5, 0.5], fc2=[0.8, 0.1])
    # Some unit of each layer has to be in.
    through = (1 - 0.25) * (1 - 0.2 * 0.9)
    found = input_probability(posterior, 400)
    expected = torch.tensor([0.9, 0.5, 0.1], dtype=torch.float64) * through
    # Five standard errors.
    assert (found - expected).abs().max() < 5 * 0.025
    with pytest.raises(ValueError, match="num_samples to be a whole number"):
        input_probability(posterior, 0)


def test_inputs_reach_the_output_through_kept_units():
    posterior = posterior_of(mlp([3, 2, 1]), torch.randn(4, 3), prune_inputs=True)
    set_inclusion(posterior, input=[0.9, 0.8, 0.1], fc1=[0.9, 0.9])
    assert reaching_inputs(posterior).tolist() == [True, True, False]
    with torch.no_grad():
        posterior.guide.row_families["fc1"].loc[:, 1] = 0
    assert reaching_inputs(posterior).tolist() == [True, False, False]
    set_inclusion(posterior, fc1=[0.1, 0.1])
    assert reaching_inputs(posterior).tolist() == [False] * 3


def test_pruned_weights_cut_paths():
    model = models.ReducibleGaussian(mlp([3, 2, 1]), torch.randn(4, 3), num_data=9)
    posterior = Posterior(model, guides.for_model(model))
    assert reaching_inputs(posterior).all()
    assert input_probability(posterior, 5).tolist() == [1.0] * 3
    first = torch.ones(2, 4, dtype=torch.bool)
    first[0, 0] = first[:, 2] = False
    # The unit that reads input 0 is not read.
    last = torch.tensor([[True, False, True]])
    posterior.prune(lambda p: {"fc1": first, "out": last})
    assert reaching_inputs(posterior).tolist() == [False, True, False]
    assert input_probability(posterior, 5).tolist() == [0.0, 1.0, 0.0]


def test_bayesian_false_discovery_rate():
    p = torch.tensor([0.99, 0.2, 0.9, 0.95, 0.6])
    assert false_discovery_rate(p, p > 0.5) == pytest.approx((0.01 + 0.1 + 0.05 + 0.4) / 4)
    assert false_discovery_rate(p, p > 1) == 0
    # Sorted: mean of 1 − p is 0.01, 0.03, 0.0533, 0.14, 0.272.
    assert within_false_discovery_rate(p, 0.05).tolist() == [True, False, False, True, False]
    assert within_false_discovery_rate(p, 0.15).tolist() == [True, False, True, True, True]
    assert not within_false_discovery_rate(p, 0.0).any()
    with pytest.raises(ValueError, match=r"level in \[0, 1\)"):
        within_false_discovery_rate(p, 1.0)


def test_false_discovery_rate_holds_where_probabilities_are_right():
    p = torch.rand(20_000, dtype=torch.float64)
    matters = torch.rand(20_000, dtype=torch.float64) < p
    for level in (0.05, 0.2):
        chosen = within_false_discovery_rate(p, level)
        actual = float((~matters[chosen]).double().mean())
        error = math.sqrt(level / int(chosen.sum()))
        assert false_discovery_rate(p, chosen) == pytest.approx(level, abs=1e-3)
        assert actual == pytest.approx(level, abs=5 * error)


def test_selection_of_inputs():
    p = torch.tensor([0.2, 0.99, 0.6, 0.97])
    chosen = select_inputs(p)
    assert chosen.indices == [1, 3, 2]
    assert chosen.missed == pytest.approx(0.2)
    assert chosen.false_discovery_rate == pytest.approx(0.44 / 3)
    strict = select_inputs(p, level=0.05)
    assert strict.indices == [1, 3]
    assert str(strict).startswith("2 of 4 inputs selected, expected false discovery rate 0.020")


# -- rules -----------------------------------------------------------------------------------------


def test_false_discovery_rule():
    posterior = posterior_of(mlp([2, 5, 1]), torch.randn(4, 2))
    set_inclusion(posterior, fc1=[0.99, 0.2, 0.9, 0.95, 0.6])
    assert FalseDiscovery()(posterior)["fc1"].tolist() == [True, False, False, True, False]
    assert posterior.keep(FalseDiscovery(0.15))["fc1"].tolist() == [True, False, True, True, True]
    with pytest.raises(ValueError, match="level"):
        FalseDiscovery(-0.1)


def test_least_expected_cost_against_all_subnetworks():
    posterior = posterior_of(mlp([2, 5, 1]), torch.randn(4, 2))
    pips = [0.99, 0.2, 0.7, 0.95, 0.6]
    set_inclusion(posterior, fc1=pips)

    def cost(keep):
        pairs = zip(keep, pips, strict=True)
        return sum(2.0 * (1 - p) if kept else p for kept, p in pairs)

    best = min(itertools.product([False, True], repeat=5), key=cost)
    for rule in (ExpectedCost(wrong=2.0), ExpectedCost(wrong={"fc1": 2.0})):
        assert tuple(rule(posterior)["fc1"].tolist()) == best
    even = ExpectedCost()(posterior)
    assert torch.equal(even["fc1"], MedianProbability()(posterior)["fc1"])
    for prices in ({"wrong": 0.0}, {"missed": -1.0}, {"wrong": {"fc1": math.inf}}):
        with pytest.raises(ValueError, match="positive prices"):
            ExpectedCost(**prices)


def test_rules_by_name():
    x, y = torch.randn(4, 2), torch.randn(4)
    assert selection.parse("fdr:0.1", x, y, 10) == FalseDiscovery(0.1)
    assert selection.parse("fdr", x, y, 10) == FalseDiscovery()
    assert selection.parse("cost:3", x, y, 10) == ExpectedCost(3.0)


def gated(seed=0, inputs=4):
    torch.manual_seed(seed)
    x = torch.randn(5, inputs)
    model = models.SpikeSlabGaussian(mlp([inputs, 3, 1]), x, num_data=5, prune_inputs=True)
    return Posterior(model, guides.for_model(model))


def test_selection_knows_what_probabilities_belong_to():
    posterior = gated()
    posterior.guide.note_kl_weight(1.0)
    chosen = select_inputs([posterior, posterior], level=0.05)
    assert chosen.objective.seeds == 2
    assert "2 seeds" in str(chosen)
    posterior.guide.note_kl_weight(0.26)
    with pytest.raises(ValueError, match=r"at a KL weight of 0\.26"):
        select_inputs(posterior)
    # Back at the bound, but what saturated before may never have come back.
    posterior.guide.note_kl_weight(1.0)
    with pytest.raises(ValueError, match=r"decided from a KL weight of 0\.26 on"):
        select_inputs(posterior)
    dense = models.Deterministic(mlp([2, 3, 1]), torch.randn(5, 2), num_data=5)
    with pytest.raises(ValueError, match="no gates on its inputs"):
        select_inputs(Posterior(dense, guides.for_model(dense)))


def test_near_copies_are_one_set():
    """Supports with exactly one of two copies: each at one half, the set certain."""
    posterior = gated()
    draws = torch.zeros(400, 4, dtype=torch.bool)
    draws[::2, 0] = draws[1::2, 1] = True
    draws[:100, 3] = True
    posterior.guide.input_gate.keep_chain(draws.double().mean(0), draws)
    x = torch.randn(50, 4)
    x[:, 1] = x[:, 0] + 0.05 * torch.randn(50)
    sets = input_sets(posterior, x)
    found = {tuple(sorted(one)): i for i, one in enumerate(sets.members)}
    assert set(found) == {(0, 1), (2,), (3,)}
    copies = found[0, 1]
    assert float(sets.probability[copies]) == 1.0
    assert float(sets.expected[copies]) == pytest.approx(1.0)
    assert float(sets.probability[found[3,]]) == pytest.approx(0.25)
    assert [tuple(sorted(one)) for one in sets.select(0.05)] == [(0, 1)]
    assert not select_inputs(posterior.inclusion()["input"], level=0.05).indices
    with pytest.raises(ValueError, match=r"\(N, 4\), got \(50, 3\)"):
        input_sets(posterior, x[:, :3])
