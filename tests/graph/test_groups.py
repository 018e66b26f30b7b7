"""Groups of networks: what is found, what is refused and why, rows and back."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from pyro_sparse.graph import ReaderSlice, UntraceableError, groups
from pyro_sparse.nets import lenet5_caffe, mlp


class Net(nn.Module):
    """A network of some layers with its forward given as a function of (self, x)."""

    def __init__(self, run, **layers):
        super().__init__()
        self._run = run
        for name, layer in layers.items():
            setattr(self, name, layer)

    def forward(self, x):
        return self._run(self, x)


def prunable(graph):
    return [group.name for group in graph if group.prunable]


# -- what is found -------------------------------------------------------------------------------


def test_lenet():
    graph = groups(lenet5_caffe(), torch.randn(2, 1, 28, 28))
    assert [(g.name, g.kind, g.size) for g in graph] == [
        ("input", "input", 1),
        ("conv1", "conv", 20),
        ("conv2", "conv", 50),
        ("fc1", "linear", 500),
        ("out", "linear", 10),
    ]
    assert [graph.row_length(g.name) for g in graph] == [0, 26, 501, 801, 501]
    assert graph["conv2"].readers == (ReaderSlice("fc1.weight", 1, 16, constant=(0.0,) * 16),)
    assert prunable(graph) == ["input", "conv1", "conv2", "fc1"]
    assert graph["out"].reason == "units of the network's output"
    assert not graph.ungrouped


def test_mlp_has_features_as_inputs():
    for shape in [(30,), (1, 5, 6), (2, 3, 5)]:
        graph = groups(mlp([30, 20, 4]), torch.randn(2, *shape))
        assert graph["input"].size == 30
        assert graph["input"].readers == (ReaderSlice("fc1.weight", 1),)
        assert prunable(graph) == ["input", "fc1"]


@pytest.mark.parametrize(
    ("net", "shape", "size", "dim"),
    [
        (nn.Sequential(nn.Linear(5, 4)), (7, 5), 5, 2),
        (nn.Sequential(nn.Conv1d(3, 4, 2)), (3, 9), 3, 1),
        (nn.Sequential(nn.Dropout(), nn.Flatten(), nn.Linear(12, 4)), (3, 4), 12, 1),
        # channels, since the pooling comes before the features are single
        (nn.Sequential(nn.MaxPool2d(2), nn.Flatten(), nn.Linear(12, 4)), (3, 4, 4), 3, 1),
    ],
)
def test_input_units(net, shape, size, dim):
    group = groups(net, torch.randn(2, *shape))["input"]
    assert (group.size, group.dim, group.prunable) == (size, dim, True)


@pytest.mark.parametrize(
    ("activation", "function", "constant"),
    [
        (nn.ReLU(), F.relu, 0.0),
        (nn.SiLU(), F.silu, 0.0),
        (nn.Tanh(), torch.tanh, 0.0),
        (nn.Sigmoid(), torch.sigmoid, 0.5),
        (nn.Softplus(), F.softplus, math.log(2)),
        (nn.Hardsigmoid(), F.hardsigmoid, 0.5),
        (nn.Threshold(0.1, 3.0), lambda x: F.threshold(x, 0.1, 3.0), 3.0),
        (nn.Hardtanh(1.0, 2.0), lambda x: F.hardtanh(x, 1.0, 2.0), 1.0),
        (nn.PReLU(), torch.cos, None),
    ],
)
def test_emission_is_computed(activation, function, constant):
    for net in (
        nn.Sequential(nn.Linear(3, 4), activation, nn.Linear(4, 2)),
        Net(lambda self, x: self.b(function(self.a(x))), a=nn.Linear(3, 4), b=nn.Linear(4, 2)),
    ):
        graph = groups(net, torch.randn(2, 3))
        found = graph[next(g.name for g in graph if g.size == 4)]
        assert found.prunable
        if constant is not None:
            assert found.readers[0].constant == pytest.approx((constant,))


def test_method_forms():
    net = Net(
        lambda self, x: self.out(self.fc(self.conv(x).relu().flatten(1)).sigmoid()),
        conv=nn.Conv2d(1, 3, 3),
        fc=nn.Linear(12, 5),
        out=nn.Linear(5, 2),
    )
    graph = groups(net, torch.randn(2, 1, 4, 4))
    assert prunable(graph) == ["input", "conv", "fc"]
    assert graph["conv"].readers[0].block == 4
    assert graph["fc"].readers[0].constant == (0.5,)


@pytest.mark.parametrize(
    ("between", "reader", "constant"),
    [
        ([nn.Sigmoid()], nn.Conv2d(4, 2, 3), (0.5,)),
        ([nn.Sigmoid(), nn.MaxPool2d(2)], nn.Conv2d(4, 2, 3), (0.5,)),
        ([nn.Sigmoid()], nn.Conv2d(4, 2, 3, padding=1), None),
        ([nn.Sigmoid()], nn.Conv2d(4, 2, 3, padding="same"), None),
        ([nn.Sigmoid()], nn.Conv2d(4, 2, 3, padding="valid"), (0.5,)),
        ([nn.Sigmoid()], nn.Conv2d(4, 2, 1, padding="same"), (0.5,)),
        ([nn.Sigmoid()], nn.Conv2d(4, 2, 3, padding=1, padding_mode="reflect"), (0.5,)),
        ([nn.ReLU()], nn.Conv2d(4, 2, 3, padding=1), (0.0,)),
        ([nn.Sigmoid(), nn.AvgPool2d(3, 1, padding=1)], nn.Conv2d(4, 2, 3), None),
    ],
)
def test_which_constants_may_move_into_a_bias(between, reader, constant):
    graph = groups(nn.Sequential(nn.Conv2d(1, 4, 3), *between, reader), torch.randn(2, 1, 12, 12))
    assert graph["0"].readers[0].constant == constant
    assert graph["0"].prunable


def test_constants_that_vary_over_positions_fold_behind_a_flatten():
    net = nn.Sequential(
        nn.Conv2d(1, 4, 1), nn.Sigmoid(), nn.AvgPool2d(2, 2, 1), nn.Flatten(), nn.Linear(16, 2)
    )
    graph = groups(net, torch.randn(2, 1, 2, 2))
    assert graph["0"].readers[0].constant == (0.125,) * 4


def test_two_readers():
    def run(self, x):
        hidden = self.a(x)
        return self.b(F.relu(hidden)), self.c(torch.sigmoid(hidden))

    net = Net(run, a=nn.Linear(3, 4), b=nn.Linear(4, 2), c=nn.Linear(4, 2))
    graph = groups(net, torch.randn(2, 3))
    assert graph["a"].readers == (
        ReaderSlice("b.weight", 1, constant=(0.0,)),
        ReaderSlice("c.weight", 1, constant=(0.5,)),
    )
    assert graph["a"].prunable


# -- what is refused -----------------------------------------------------------------------------


def two_layers(run, **layers):
    return Net(run, a=nn.Linear(4, 4), b=nn.Linear(4, 2), **layers)


class Scaled(nn.Linear):
    """A subclass that computes something else than its base."""

    def forward(self, x):
        return nn.functional.linear(x, 2 * self.weight, self.bias)


def hooked():
    net = two_layers(lambda self, x: self.b(self.act(self.a(x))), act=nn.ReLU())
    net.act.register_forward_hook(lambda module, args, output: output + 1)
    return net


@pytest.mark.parametrize(
    ("net", "reason"),
    [
        (two_layers(lambda self, x: self.b(self.a(x) + x)), "tied to the network's input"),
        (two_layers(lambda self, x: self.b(self.a(x) + x.sum())), "depends on the data"),
        (two_layers(lambda self, x: self.b(self.a(x)[:, [3, 1, 0, 2]])), "cannot be made to fit"),
        (two_layers(lambda self, x: self.b((h := self.a(x)) - h.mean(1, True))), "'mean' works"),
        (
            two_layers(lambda self, x: self.b(self.n(self.a(x))), n=nn.LayerNorm(4)),
            "LayerNorm 'n' normalises over several units",
        ),
        (
            two_layers(lambda self, x: self.b(self.s(self.a(x))), s=nn.Softmax(1)),
            "Softmax 's' works along the dimension of the units",
        ),
        (two_layers(lambda self, x: self.b(1 / self.a(x))), "to a number not finite"),
        (two_layers(lambda self, x: self.b(self.a(self.a(x)))), "tied to the network's input"),
        (
            two_layers(lambda self, x: self.b(F.relu(self.a(x))) * self.a.bias.sum()),
            "'a.bias' is used outside of a layer",
        ),
        (
            two_layers(lambda self, x: self.b(F.relu(self.a(x))) * self.b.weight.sum()),
            "'b.weight' is used outside of a layer",
        ),
        (two_layers(lambda self, x: self.b(F.dropout(self.a(x)))), "drops units at random"),
        (two_layers(lambda self, x: (self.b(self.a(x)), self.a.weight)), "outside of a layer"),
        (two_layers(lambda self, x: (self.b(self.a(x)), self.a(x))), "the network's output"),
        (two_layers(lambda self, x: self.a(x).relu()), "units of the network's output"),
        (
            two_layers(lambda self, x: self.b(self.a(x).log_softmax(1))),
            "'log_softmax' works along the dimension of the units",
        ),
        (
            Net(lambda self, x: self.b(self.a(x)), a=nn.Linear(4, 4), b=Scaled(4, 2)),
            "the weight of 'linear' in Scaled 'b' is computed",
        ),
    ],
)
def test_not_prunable(net, reason):
    graph = groups(net, torch.randn(2, 4))
    assert not graph["a"].prunable
    assert reason in graph["a"].reason
    assert reason in graph.explain()
    # The layer has rows all the same.
    assert graph.row_length("a") == 5


def test_in_place_on_a_shared_value():
    def run(self, x):
        hidden = self.a(x)
        self.act(hidden.view(2, 4))
        return self.b(hidden)

    layers = {"a": nn.Linear(4, 4), "b": nn.Linear(4, 2), "drop": nn.Dropout()}
    graph = groups(Net(run, act=nn.ReLU(inplace=True), **layers), torch.randn(2, 4))
    assert "changes in place" in graph["a"].reason
    graph = groups(Net(run, act=nn.ReLU(), **layers), torch.randn(2, 4))
    assert graph["a"].prunable
    # In a chain nobody else looks.
    chain = nn.Sequential(nn.Linear(4, 4), nn.Dropout(), nn.ReLU(inplace=True), nn.Linear(4, 2))
    assert groups(chain, torch.randn(2, 4))["0"].prunable


def test_tied_weights_tie_units():
    net = Net(
        lambda self, x: self.out(F.relu(self.b(F.relu(self.a(F.relu(self.stem(x))))))),
        stem=nn.Linear(3, 4),
        a=nn.Linear(4, 4),
        b=nn.Linear(4, 4),
        out=nn.Linear(4, 2),
    )
    net.b.weight = net.a.weight
    graph = groups(net, torch.randn(2, 3))
    # The columns of the one weight are read by a from the stem, by b from a.
    assert prunable(graph) == ["input", "stem"]
    assert [w.parameter for w in graph["stem"].writers] == [
        *("stem.weight", "stem.bias", "a.weight", "a.bias", "b.bias"),
    ]
    assert graph["stem"].shared
    rows = {
        group.name: graph.rows(dict(net.named_parameters()), group.name)
        for group in graph
        if group.writers
    }
    parameters = graph.parameters(rows)
    assert parameters["b.weight"] is parameters["a.weight"]
    torch.func.functional_call(net, parameters, (torch.randn(2, 3),))


def test_a_weight_with_units_along_two_dimensions():
    """An embedding and the layer that undoes it, as in language models."""
    net = Net(lambda self, x: self.out(F.relu(self.a(self.e(x)))), e=nn.Embedding(5, 3))
    net.a, net.out = nn.Linear(3, 5, bias=False), nn.Linear(5, 2)
    net.a.weight = net.e.weight
    graph = groups(net, torch.zeros(2, dtype=torch.int64))
    assert prunable(graph) == []
    assert "units along two of its dimensions" in graph.explain()


def test_one_layer_under_two_names_is_not_tied():
    net = two_layers(lambda self, x: self.b(F.relu(self.a(x))))
    net.also_a = net.a
    assert prunable(groups(net, torch.randn(2, 4))) == ["input", "a"]


def test_grouped_convolution():
    net = nn.Sequential(
        nn.Conv2d(2, 6, 1), nn.ReLU(), nn.Conv2d(6, 12, 1, groups=3), nn.Conv2d(12, 2, 1)
    )
    graph = groups(net, torch.randn(2, 2, 1, 1))
    assert prunable(graph) == ["input", "0"]
    # Two channels in, four out: one unit of three.
    assert [(str(w), w.dim) for w in graph["0"].writers] == [
        *(("0.weight (×2)", 0), ("0.bias (×2)", 0), ("2.weight (×4)", 0), ("2.bias (×4)", 0)),
    ]
    assert graph["0"].size == 3


def test_linear_along_another_dimension():
    net = nn.Sequential(nn.Conv1d(3, 4, 1), nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 2))
    graph = groups(net, torch.randn(2, 3, 5))
    assert "another dimension" in graph["0"].reason
    assert prunable(graph) == ["input", "1"]


def test_pooling_across_units():
    net = nn.Sequential(nn.Linear(5, 6), nn.MaxPool1d(2), nn.Linear(3, 2))
    graph = groups(net, torch.randn(2, 4, 5))
    assert graph["0"].reason == "MaxPool1d '1' pools along the dimension of the units"


def test_parameters_without_units_are_groups_that_stay():
    net = two_layers(
        lambda self, x: self.b(self.p(self.n(self.a(x)))) * self.scale,
        n=nn.LayerNorm(4),
        p=nn.PReLU(),
        unused=nn.Linear(1, 1),
        scale=nn.Parameter(torch.tensor(2.0)),
    )
    graph = groups(net, torch.randn(2, 4))
    assert [(g.name, g.kind, g.size) for g in graph if g.name not in ("input", "a", "b")] == [
        *(("n", "norm", 4), ("p", "parameter", 1), ("scale", "parameter", 1)),
    ]
    assert "normalises over several units" in graph["n"].reason
    assert graph.ungrouped == {
        "unused.weight": "not used by the forward pass",
        "unused.bias": "not used by the forward pass",
    }
    parameters = dict(net.named_parameters())
    rows = {group.name: graph.rows(parameters, group.name) for group in graph if group.writers}
    assert rows["scale"].tolist() == [[2.0]]
    assert all(torch.equal(parameters[n], v) for n, v in graph.parameters(rows).items())


def test_parametrised_layers():
    norm, spectral = nn.utils.parametrizations.weight_norm, nn.utils.parametrizations.spectral_norm
    net = nn.Sequential(norm(nn.Linear(4, 4)), nn.Linear(4, 2))
    assert groups(net, torch.randn(2, 4))["0"].writers[0].parameter == "0.weight"
    assert "parametrizations" in dict(net[0].named_children())  # the user's own is as it was
    assert net(torch.randn(2, 4)).shape == (2, 2)
    graph = groups(nn.Sequential(spectral(nn.Linear(4, 4)), nn.Linear(4, 2)), torch.randn(2, 4))
    assert prunable(graph) == []
    assert "computed by a parametrisation" in graph["input"].reason


def test_several_inputs():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(3, 4), nn.Linear(4, 2)

        def forward(self, x, y):
            return self.b(F.relu(self.a(x))) + y

    graph = groups(Two(), (torch.randn(2, 3), torch.randn(2, 2)))
    assert graph["input"].reason == "the network takes 2 inputs"
    assert prunable(graph) == ["a"]


def test_untraceable():
    net = two_layers(lambda self, x: self.b(self.a(x)) if x.sum() > 0 else self.b(x))
    with pytest.raises(UntraceableError, match=r"cannot trace Net: .*must not branch"):
        groups(net, torch.randn(2, 4))


def test_hooks_are_followed():
    net = mlp([4, 3, 2])
    net.register_forward_pre_hook(lambda module, args: (args[0] + 1,))
    assert groups(net, torch.randn(2, 4))["input"].readers[0].constant == (1.0,)
    net = hooked()
    assert groups(net, torch.randn(2, 4))["a"].readers[0].constant == (1.0,)


def test_example_of_another_shape():
    with pytest.raises(ValueError, match=r"does not accept the example input of shape \(2, 5\)"):
        groups(mlp([4, 3, 2]), torch.randn(2, 5))


def test_layer_named_input():
    with pytest.raises(ValueError, match="a layer is named 'input'"):
        groups(Net(lambda self, x: self.input(x), input=nn.Linear(4, 2)), torch.randn(2, 4))


def test_network_is_not_changed():
    net = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.ReLU(inplace=True), nn.Dropout())
    net[3].eval()
    example = torch.randn(2, 4)
    before, seen = {k: v.clone() for k, v in net.state_dict().items()}, example.clone()
    groups(net, example)
    assert [module.training for module in net] == [True, True, True, False]
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert torch.equal(example, seen)


# -- rows, gates and masks -----------------------------------------------------------------------


@pytest.mark.parametrize("bias", [True, False])
def test_rows_round_trip(bias):
    net = lenet5_caffe(bias=bias)
    graph = groups(net, torch.randn(2, 1, 28, 28))
    parameters = dict(net.named_parameters())
    rows = {group.name: graph.rows(parameters, group.name) for group in graph if group.writers}
    assert rows["conv2"].shape == (50, 500 + bias)
    assert torch.equal(rows["conv2"][7, :500], net.conv2.weight[7].flatten())
    if bias:
        assert torch.equal(rows["conv2"][:, 500], net.conv2.bias)
    back = graph.parameters(rows)
    assert back.keys() == parameters.keys()
    assert all(torch.equal(back[name], value) for name, value in parameters.items())


def test_rows_of_other_shapes_are_refused():
    graph = groups(mlp([4, 3, 2]), torch.randn(2, 4))
    with pytest.raises(ValueError, match=r"expected rows of shape \(3, 5\) .* got \(3, 4\)"):
        graph.parameters({"fc1": torch.zeros(3, 4)})
    with pytest.raises(ValueError, match="no parameters of its own"):
        graph.rows({}, "input")
    with pytest.raises(KeyError, match="no group 'fc2'; there are input, fc1, out"):
        graph["fc2"]


def test_gate_on_features_channels_and_last_dimension():
    images = torch.randn(2, 3, 4, 5)
    graph = groups(mlp([60, 3, 2]), images)
    gate = torch.rand(60)
    assert torch.equal(graph.gate_inputs(images, gate), images * gate.reshape(3, 4, 5))
    gates = torch.rand(2, 60)
    assert torch.equal(graph.gate_inputs(images, gates), images * gates.reshape(2, 3, 4, 5))
    graph, gate = groups(nn.Sequential(nn.Conv2d(3, 2, 1)), images), torch.rand(3)
    assert torch.equal(graph.gate_inputs(images, gate), images * gate[:, None, None])
    graph, gate = groups(nn.Sequential(nn.Linear(5, 2)), images), torch.rand(5)
    assert torch.equal(graph.gate_inputs(images, gate), images * gate)
    with pytest.raises(ValueError, match="a gate on 5 input units"):
        graph.gate_inputs(images, torch.rand(4))


def test_masked_parameters():
    net = lenet5_caffe(widths=(3, 4, 5))
    graph = groups(net, torch.randn(2, 1, 28, 28))
    parameters = dict(net.named_parameters())
    keep = {"conv1": torch.tensor([True, False, True]), "fc1": torch.arange(5) < 2}
    with torch.no_grad():
        parameters["conv1.weight"] = parameters["conv1.weight"].clone()
        parameters["conv1.weight"][1] = math.inf
    masked = graph.masked_parameters(parameters, keep)
    assert masked["conv1.weight"][1].eq(0).all()
    assert masked["conv1.bias"][1] == 0
    assert torch.equal(masked["conv1.weight"][2], parameters["conv1.weight"][2])
    assert masked["fc1.weight"][2:].eq(0).all()
    assert torch.equal(masked["conv2.weight"], parameters["conv2.weight"])


@pytest.mark.parametrize(
    ("keep", "message"),
    [
        ({"fc2": torch.ones(3, dtype=torch.bool)}, "no group 'fc2'"),
        ({"fc1": torch.ones(4, dtype=torch.bool)}, r"shape \(3,\) for group 'fc1'"),
        ({"fc1": torch.ones(3)}, "expected a boolean mask"),
        ({"out": torch.tensor([True, False])}, "drops 1 units of group 'out'.*not prunable"),
    ],
)
def test_masks_that_are_refused(keep, message):
    graph = groups(mlp([4, 3, 2]), torch.randn(2, 4))
    with pytest.raises(ValueError, match=message):
        graph.check_keep(keep)


def test_explain_is_a_table():
    text = groups(lenet5_caffe(), torch.randn(2, 1, 28, 28)).explain()
    lines = text.splitlines()
    assert lines[0].split() == ["group", "kind", "units", "row", "read", "by", "prunable"]
    assert lines[3].split() == ["conv2", "conv", "50", "501", "fc1.weight", "(×16)", "yes"]
    assert lines[5].endswith("no: units of the network's output")
