"""Shapes once units are out, units through which something flows, factors on units."""

import pytest
import torch
from torch import nn
from torch.func import functional_call

from pyro_sparse.graph import groups
from pyro_sparse.nets import lenet5_caffe, mlp


def traced(net, *shape):
    example = torch.randn(4, *shape)
    return groups(net, example), dict(net.named_parameters()), example


def masked_output(net, graph, parameters, keep, x):
    """The network with rows of units that are out at 0, and their inputs gated."""
    gate = keep.get("input")
    if gate is not None:
        x = graph.gate_inputs(x, gate.to(x))
    return functional_call(net, graph.masked_parameters(parameters, keep), (x,))


# -- sizes -----------------------------------------------------------------------------------------


def test_sizes_of_a_multilayer_perceptron():
    graph, parameters, _ = traced(mlp([5, 4, 3, 2]), 5)
    assert graph.sizes({}) == {name: tuple(value.shape) for name, value in parameters.items()}
    keep = {
        "input": torch.tensor([True, False, False, True, True]),
        "fc1": torch.tensor([True, False, True, True]),
        "fc2": torch.tensor([False, True, False]),
    }
    assert graph.sizes(keep) == {
        "fc1.weight": (3, 3),
        "fc1.bias": (3,),
        "fc2.weight": (1, 3),
        "fc2.bias": (1,),
        "out.weight": (2, 1),
        "out.bias": (2,),
    }


def test_sizes_behind_a_flatten():
    """A channel takes its block of columns along."""
    graph, _, _ = traced(lenet5_caffe(), 1, 28, 28)
    keep = {"conv1": torch.arange(20) < 5, "conv2": torch.arange(50) < 18}
    sizes = graph.sizes(keep)
    assert sizes["conv1.weight"] == (5, 1, 5, 5)
    assert sizes["conv2.weight"] == (18, 5, 5, 5)
    assert sizes["conv2.bias"] == (18,)
    assert sizes["fc1.weight"] == (500, 18 * 16)
    assert sizes["out.weight"] == (10, 500)


def test_sizes_check_their_masks():
    graph, _, _ = traced(mlp([3, 4, 2]), 3)
    with pytest.raises(ValueError, match="not prunable"):
        graph.sizes({"out": torch.tensor([True, False])})
    with pytest.raises(ValueError, match=r"shape \(4,\)"):
        graph.sizes({"fc1": torch.ones(3, dtype=torch.bool)})


# -- connected -------------------------------------------------------------------------------------


def counts(masks):
    return {name: mask.tolist() for name, mask in masks.items()}


def test_a_dense_network_is_connected():
    for net, shape in ((mlp([5, 4, 3, 2]), (5,)), (lenet5_caffe(), (1, 28, 28))):
        graph, parameters, _ = traced(net, *shape)
        masks = graph.connected(parameters)
        assert set(masks) == {group.name for group in graph if group.prunable}
        assert all(mask.all() for mask in masks.values())


def test_chains_of_units_without_input():
    """A dead unit takes along those that read nothing else, and their readers in turn."""
    graph, parameters, _ = traced(mlp([2, 3, 3, 3, 1], bias=False, activation="relu"), 2)
    with torch.no_grad():
        parameters["fc1.weight"][0] = 0  # nothing in
        parameters["fc2.weight"][1, 1:] = 0  # reads fc1[0] only
        parameters["fc3.weight"][2, [0, 2]] = 0  # reads fc2[1] only
    masks = graph.connected(parameters)
    assert counts(masks) == {
        "input": [True, True],
        "fc1": [False, True, True],
        "fc2": [True, False, True],
        "fc3": [True, True, False],
    }


def test_chains_of_units_without_readers():
    graph, parameters, _ = traced(mlp([2, 3, 3, 3, 1], activation="relu"), 2)
    with torch.no_grad():
        parameters["out.weight"][0, 0] = 0  # fc3[0] is not read
        parameters["fc3.weight"][1:, 1] = 0  # fc2[1] is read by fc3[0] only
        parameters["fc2.weight"][[0, 2], 2] = 0  # fc1[2] is read by fc2[1] only
        parameters["fc1.weight"][:2, 1] = 0  # the input 1 is read by fc1[2] only
    masks = graph.connected(parameters)
    assert counts(masks) == {
        "input": [True, False],
        "fc1": [True, True, False],
        "fc2": [True, False, True],
        "fc3": [False, True, True],
    }


def test_a_bias_alone_is_something():
    """A unit whose weights are all 0 emits what its bias says: leaving it out would change that."""
    graph, parameters, _ = traced(mlp([2, 3, 1], activation="relu"), 2)
    with torch.no_grad():
        parameters["fc1.weight"][0] = 0
        parameters["fc1.weight"][1] = 0
        parameters["fc1.bias"][0] = 0
        parameters["fc1.bias"][1] = 1
    assert graph.connected(parameters)["fc1"].tolist() == [False, True, True]


def test_blocks_behind_a_flatten_and_kernels():
    net = lenet5_caffe(widths=(3, 4, 5), size=16)
    graph, parameters, _ = traced(net, 1, 16, 16)
    block = graph["conv2"].readers[0].block
    assert block > 0
    with torch.no_grad():
        value = parameters["fc1.weight"]
        value[:, 0:block] = 0  # conv2[0] is not read
        value[:, block : 2 * block - 1] = 0  # of conv2[1] one position is
        parameters["conv2.weight"][1:, 2] = 0  # conv1[2] is read by conv2[0] only
    masks = graph.connected(parameters)
    if block > 1:
        assert masks["conv2"].tolist() == [False, True, True, True]
    assert masks["conv1"].tolist() == [True, True, False]
    assert masks["input"].tolist() == [True]


def test_nothing_flows():
    graph, parameters, _ = traced(mlp([2, 3, 1]), 2)
    with torch.no_grad():
        parameters["out.weight"].zero_()
    assert not any(mask.any() for mask in graph.connected(parameters).values())


@pytest.mark.parametrize("activation", ["relu", "silu", "tanh", "sigmoid"])
@pytest.mark.parametrize("bias", [True, False])
def test_leaving_out_what_is_not_connected_changes_nothing(activation, bias):
    """Also where a unit without input emits a constant other than 0."""
    found = 0
    for seed in range(20):
        torch.manual_seed(seed)
        net = mlp([4, 6, 6, 6, 2], activation, bias=bias)
        graph, parameters, x = traced(net, 4)
        with torch.no_grad():
            for value in parameters.values():
                value.mul_(torch.rand_like(value) < 0.25)
        masks = graph.connected(parameters)
        found += sum(int((~mask).sum()) for mask in masks.values())
        torch.testing.assert_close(masked_output(net, graph, parameters, masks, x), net(x))
    assert found > 100


# -- factors on units ------------------------------------------------------------------------------


def test_gated_rows_multiply_the_unit_before_its_activation():
    net = mlp([3, 4, 2], activation="tanh")
    graph, parameters, x = traced(net, 3)
    gate = torch.tensor([0.0, 0.5, 1.0, 2.0])
    rows = graph.gate_rows("fc1", graph.rows(parameters, "fc1"), gate)
    gated = functional_call(net, {**parameters, **graph.parameters({"fc1": rows})}, (x,))
    hidden = torch.tanh(gate * (x @ net.fc1.weight.T + net.fc1.bias))
    torch.testing.assert_close(gated, hidden @ net.out.weight.T + net.out.bias)


def test_gated_rows_of_channels():
    net = nn.Sequential(nn.Conv2d(2, 3, 3), nn.Flatten(), nn.Linear(3 * 9, 2))
    graph, parameters, x = traced(net, 2, 5, 5)
    gate = torch.tensor([0.5, 0.0, 3.0])
    rows = graph.gate_rows("0", graph.rows(parameters, "0"), gate)
    gated = functional_call(net, {**parameters, **graph.parameters({"0": rows})}, (x,))
    channels = net[0](x) * gate.reshape(3, 1, 1)
    torch.testing.assert_close(gated, net[2](channels.flatten(1)))


@pytest.mark.parametrize("name", ["input", "fc1", "fc2"])
def test_scaled_columns_multiply_what_is_read(name):
    """As if each unit's output were multiplied."""
    net = mlp([3, 4, 5, 2], activation="tanh")
    graph, parameters, x = traced(net, 3)
    scale = torch.linspace(0, 2, graph[name].size)
    scaled = functional_call(net, graph.scale_columns(parameters, name, scale), (x,))
    value = x
    for layer in ("input", "fc1", "fc2", "out"):
        if layer != "input":
            value = getattr(net, layer)(value)
        if layer in ("fc1", "fc2"):
            value = torch.tanh(value)
        if layer == name:
            value = value * scale
    torch.testing.assert_close(scaled, value)
    # What it was given stays.
    torch.testing.assert_close(dict(net.named_parameters())["fc1.weight"], parameters["fc1.weight"])


def test_scaled_columns_behind_a_flatten():
    net = nn.Sequential(nn.Conv2d(2, 3, 3), nn.Flatten(), nn.Linear(3 * 9, 2))
    graph, parameters, x = traced(net, 2, 5, 5)
    scale = torch.tensor([0.5, 0.0, 3.0])
    scaled = functional_call(net, graph.scale_columns(parameters, "0", scale), (x,))
    torch.testing.assert_close(scaled, net[2]((net[0](x) * scale.reshape(3, 1, 1)).flatten(1)))
    # Channels of the input, read by a convolution.
    scale = torch.tensor([0.5, 3.0])
    scaled = functional_call(net, graph.scale_columns(parameters, "input", scale), (x,))
    torch.testing.assert_close(scaled, net(x * scale.reshape(2, 1, 1)))
