"""A capture is of one network, and stands for its copies where that is sure."""

import copy

import pytest
import torch
from torch import fx, nn

from pyro_sparse.export import _compact as compacting
from pyro_sparse.export import compact_network
from pyro_sparse.graph import Output, groups
from pyro_sparse.graph.capture import capture
from pyro_sparse.inputs import Inputs

X = torch.randn(3, 4)


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))


@pytest.fixture
def captures(monkeypatch):
    """Calls of `capture` while a network is made smaller."""
    made = []

    def noted(*arguments, **options):
        made.append(arguments[0])
        return capture(*arguments, **options)

    monkeypatch.setattr(compacting, "capture", noted)
    return made


KEEP = {"0": torch.arange(6) < 2}


def test_a_network_is_captured_once(captures):
    whole = net()
    graph = groups(whole, X)
    for parameters in ({}, {"0.bias": torch.ones(6)}):
        small = compact_network(whole, graph, parameters, KEEP)
        assert small[0].out_features == 2
        expected = torch.func.functional_call(
            whole,
            graph.masked_parameters({**dict(whole.named_parameters()), **parameters}, KEEP),
            X,
        )
        assert torch.allclose(small(X), expected, atol=1e-6)
    assert not captures


def test_of_nothing_that_goes_there_is_nothing_to_find(captures):
    whole = net()
    small = compact_network(whole, groups(whole, X), {"0.bias": torch.ones(6)}, {})
    assert not captures
    assert torch.equal(small[0].bias, torch.ones(6))
    assert not whole[0].bias.eq(1).any()
    assert small.compaction["form"] == "own class"
    assert small.compaction["kept"] == {"input": [*range(4)], "0": [*range(6)], "2": [0, 1]}
    assert small.compaction["removed"] == {}


@pytest.mark.parametrize("change", ["dtype", "rows", "copy"])
def test_what_may_be_another_graph_is_captured_anew(change, captures):
    whole = net()
    graph, more = groups(whole, X), {}
    if change == "dtype":
        whole = whole.double()
    elif change == "rows":
        more["inputs"] = Inputs((torch.randn(5, 4),))
    else:
        graph = copy.deepcopy(graph)
        assert graph.captured is None
    assert compact_network(whole, graph, {}, KEEP, **more)[0].out_features == 2
    assert len(captures) == 1


def test_a_capture_is_of_one_output_and_holds_no_numbers_of_the_network():
    whole = net()
    captured = groups(whole, X).captured
    assert all(value.is_meta for value in captured.tensors.values())
    again = captured.of(whole, Inputs((X,)), None)
    assert again.graph is captured.graph
    assert {id(value) for value in again.tensors.values()} == {id(v) for v in whole.parameters()}
    assert captured.of(whole, Inputs((X,)), Output(0)) is None
    assert captured.of(nn.Sequential(nn.Linear(4, 2)), Inputs((X,)), None) is None


def test_a_network_that_was_changed_since_is_seen_to_be_another(captures):
    """The groups still fit; what is between them is not what was captured."""
    whole = net()
    graph = groups(whole, X)
    whole[1] = nn.Sigmoid()
    small = compact_network(whole, graph, {}, KEEP)
    masked = graph.masked_parameters(dict(whole.named_parameters()), KEEP)
    assert torch.allclose(small(X), torch.func.functional_call(whole, masked, X), atol=1e-6)
    assert len(captures) == 1


def test_torchs_settings_are_as_before():
    before = dict(vars(fx.config))
    groups(net(), X)
    with pytest.raises(ValueError, match="does not accept"):
        groups(net(), torch.randn(3, 5))
    assert vars(fx.config) == before
