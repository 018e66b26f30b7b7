"""The compact network equals the masked one whatever units go, and has the sizes it claims."""

import copy

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from pyro_sparse import Posterior, guides, models
from pyro_sparse.export import GatherInputs, compact, compact_network, equivalence
from pyro_sparse.graph import groups
from pyro_sparse.nets import count_parameters, lenet5_caffe, mlp

ACTIVATIONS = ["relu", "silu", "tanh", "sigmoid", "softplus"]
TOLERANCE = 1e-5  # float32


def probes(*shape, dtype=torch.float32):
    """Inputs that tell borders from the middle: random ones, constants, a frame, a corner."""
    frame, corner = torch.ones(shape), torch.zeros(shape)
    if len(shape) > 1:
        frame[..., 1:-1, 1:-1] = 0
    corner.view(-1)[0] = 3
    parts = [torch.randn(3, *shape), torch.stack([frame, corner, 2 * torch.ones(shape)])]
    return torch.cat(parts).to(dtype)


def random_keep(graph, share=0.4, inputs=False):
    keep = {}
    for group in graph:
        if group.prunable and (inputs or group.name != "input"):
            keep[group.name] = torch.rand(group.size) < share
            keep[group.name][torch.randint(group.size, ())] = True
    return keep


def check(net, x, keep=None, tolerance=TOLERANCE, **options):
    """Compact under a random mask, compare, and return the compact network."""
    graph = groups(net, x)
    keep = random_keep(graph, **options) if keep is None else keep
    parameters = dict(net.named_parameters())
    before = copy.deepcopy(net.state_dict())
    small = compact_network(net, graph, parameters, keep)
    for batch in (x, x[:1], x[-3:]):
        assert equivalence(net, graph, parameters, keep, small, batch) <= tolerance
    assert not small.training
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert small.compaction["kept"] == {
        name: mask.nonzero().squeeze(1).tolist() for name, mask in graph.check_keep(keep).items()
    }
    return small


def only_one(graph, name):
    keep = torch.zeros(graph[name].size, dtype=torch.bool)
    keep[-1] = True
    return {name: keep}


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("inputs", [True, False])
def test_mlp(activation, bias, inputs):
    net = mlp([64, 40, 30, 10], activation, bias=bias)
    small = check(net, probes(1, 8, 8), inputs=inputs)
    kept = {name: len(units) for name, units in small.compaction["kept"].items()}
    assert small.fc2.weight.shape == (kept["fc2"], kept["fc1"])
    assert (small.fc2.out_features, small.fc2.in_features) == (kept["fc2"], kept["fc1"])
    # Only a constant that has no bias to go to makes one.
    assert (small.out.bias is not None) == (bias or activation in ("sigmoid", "softplus"))


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("channels", [1, 3])
def test_lenet(activation, bias, channels):
    net = lenet5_caffe(activation, bias=bias, in_channels=channels, widths=(8, 9, 30))
    small = check(net, probes(channels, 28, 28), inputs=channels > 1)
    kept = {name: len(units) for name, units in small.compaction["kept"].items()}
    assert small.fc1.weight.shape == (kept["fc1"], 16 * kept["conv2"])
    assert isinstance(small, nn.Sequential)


def test_full_size_lenet():
    small = check(lenet5_caffe("sigmoid"), probes(1, 28, 28), share=0.1)
    kept = {name: len(units) for name, units in small.compaction["kept"].items()}
    first, second, third = kept["conv1"], kept["conv2"], kept["fc1"]
    assert count_parameters(small) == (
        26 * first + (25 * first + 1) * second + (16 * second + 1) * third + (third + 1) * 10
    )


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_a_single_unit(activation):
    net = lenet5_caffe(activation, widths=(4, 5, 6))
    graph = groups(net, probes(1, 28, 28))
    for names in (["conv1"], ["conv2"], ["fc1"], ["conv1", "conv2", "fc1"]):
        keep = {}
        for name in names:
            keep |= only_one(graph, name)
        small = check(net, probes(1, 28, 28), keep)
        assert all(len(small.get_submodule(name).weight) == 1 for name in names)


def test_excluded_units_carried_weight():
    """The comparison would notice: the full network is far from the masked one."""
    net = mlp([8, 6, 2], "sigmoid")
    x = probes(8)
    small = check(net, x, only_one(groups(net, x), "fc1"))
    assert (small(x) - net(x)).abs().max() > 0.05


@pytest.mark.parametrize("activation", [nn.Sigmoid(), nn.Softplus()])
@pytest.mark.parametrize(
    ("reader", "constants"),
    [
        (nn.Conv2d(6, 4, 3, padding=1), 1),
        (nn.Conv2d(6, 4, 3, padding=2, stride=2, bias=False), 1),
        (nn.Conv2d(6, 4, 3, padding="same"), 1),
        (nn.Conv2d(6, 4, 3, padding=1, padding_mode="circular"), 0),
        (nn.Conv2d(6, 4, 3, dilation=2), 0),
        (nn.Conv2d(6, 4, 1, bias=False), 0),
    ],
)
@pytest.mark.parametrize("pool", [nn.Identity(), nn.MaxPool2d(3, 2, 1), nn.AvgPool2d(3, 2)])
def test_constants_before_a_convolution(activation, reader, constants, pool):
    net = nn.Sequential(
        *(nn.Conv2d(2, 6, 3), activation, pool, reader, activation, nn.Flatten()),
        nn.LazyLinear(3),
    )
    x = probes(2, 14, 14)
    net(x)
    small = check(net, x)
    kept, constant = small.compaction["kept"], small.compaction["constant"]
    assert len(constant) == constants
    assert len(small[0].weight) == len(kept["0"]) + constants
    if constants:
        assert constant["0"] not in kept["0"]


def test_constant_that_varies_over_positions():
    net = nn.Sequential(
        *(nn.Conv2d(1, 6, 3), nn.Sigmoid(), nn.AvgPool2d(3, 1, 1), nn.Conv2d(6, 3, 3)),
        *(nn.Flatten(), nn.Linear(3 * 36, 2)),
    )
    assert list(check(net, probes(1, 10, 10)).compaction["constant"]) == ["0"]
    # Read entry by entry, it moves into the bias as well.
    net = nn.Sequential(
        *(nn.Conv2d(1, 6, 3), nn.Sigmoid(), nn.AvgPool2d(3, 2, 1), nn.Flatten()),
        nn.Linear(6 * 16, 2, bias=False),
    )
    assert check(net, probes(1, 10, 10)).compaction["constant"] == {}


class Branches(nn.Module):
    """Functional forms, two readers of one layer, and a part that cannot be pruned."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.left, self.right = nn.Conv2d(8, 6, 3), nn.Conv2d(8, 6, 3, padding=1)
        self.norm = nn.BatchNorm2d(6)
        self.fc = nn.Linear(6 * 9, 10)
        self.out = nn.Linear(10, 4)

    def forward(self, x):
        x = F.sigmoid(self.stem(x))
        left, right = torch.relu(self.left(x)), self.norm(self.right(x)).tanh()
        x = F.adaptive_avg_pool2d(left, 3) + F.adaptive_avg_pool2d(right, 3)
        return self.out(F.dropout(F.softplus(self.fc(x.flatten(1))), training=self.training))


def test_branches():
    net = Branches()
    net.norm.running_mean.normal_()
    net.norm.running_var.uniform_(0.5, 2)
    x = probes(3, 8, 8)
    graph = groups(net, x)
    assert [g.name for g in graph if g.prunable] == ["input", "stem", "left", "fc"]
    assert [w.parameter for w in graph["left"].writers] == [
        *("left.weight", "left.bias", "right.weight", "right.bias", "norm.weight", "norm.bias"),
    ]
    small = check(net, x, inputs=True, share=0.5)
    # Both readers take the constant unit that one of them needs.
    stem = len(small.get_parameter("stem.weight"))
    assert {small.get_parameter(f"{name}.weight").shape[1] for name in ("left", "right")} == {stem}


def test_inputs_of_a_network_that_is_no_sequential():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(9, 5), nn.Linear(9, 5)

        def forward(self, x):
            x = torch.flatten(x, 1)
            return self.a(x) * self.b(x)

    small = check(Net(), probes(3, 3), inputs=True)
    left = {small.get_parameter(f"{name}.weight").shape for name in "ab"}
    (gather,) = (part for part in small.modules() if isinstance(part, GatherInputs))
    assert left == {(5, gather.indices.numel())}
    assert gather.indices.numel() < 9


def test_gather_comes_after_the_flatten():
    small = check(mlp([9, 4, 2]), probes(3, 3), inputs=True)
    assert list(dict(small.named_children()))[:3] == ["flatten", "gather", "fc1"]
    small = check(
        nn.Sequential(nn.Linear(9, 4), nn.ReLU(), nn.Linear(4, 2)), probes(9), inputs=True
    )
    assert isinstance(small[0], GatherInputs)


def test_given_parameters_replace_the_networks_own():
    net, x = mlp([6, 5, 2]), probes(6)
    graph = groups(net, x)
    # As from a posterior: of another type, some only, and requiring gradients.
    parameters = {"fc1.weight": torch.randn(5, 6, dtype=torch.float64, requires_grad=True)}
    keep = only_one(graph, "fc1")
    small = compact_network(net, graph, parameters, keep)
    assert small.fc1.weight.dtype == torch.float32
    assert torch.equal(small.fc1.weight[0], parameters["fc1.weight"][-1].float())
    assert torch.equal(small.out.bias, net.out.bias)
    assert all(isinstance(value, nn.Parameter) for value in small.parameters())


def test_parameters_that_are_buffers_become_parameters():
    """The models keep their network as a template, whose parameters are buffers."""
    net, x = mlp([6, 5, 2]), probes(6)
    graph, template = groups(net, x), copy.deepcopy(net)
    for module in template.modules():
        for name, value in list(module._parameters.items()):
            del module._parameters[name]
            module.register_buffer(name, value.detach())
    keep = only_one(graph, "fc1")
    small = compact_network(template, graph, {}, keep)
    assert count_parameters(small) == 7 + 4
    assert not list(small.buffers())
    assert all(value.requires_grad for value in small.parameters())
    assert equivalence(template, graph, dict(net.named_parameters()), keep, small, x) <= TOLERANCE


def test_tied_weights_stay_tied():
    net = nn.Sequential(
        *(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 5)),
        *(nn.Tanh(), nn.Linear(5, 2)),
    )
    net[2].weight = net[0].weight
    small = check(net, probes(4))
    assert small[2].weight is small[0].weight


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_types(dtype):
    net = lenet5_caffe("sigmoid", widths=(4, 5, 6)).to(dtype)
    tolerance = 1e-12 if dtype == torch.float64 else 0.03
    small = check(net, probes(1, 28, 28, dtype=dtype), tolerance=tolerance)
    assert {value.dtype for value in small.parameters()} == {dtype}


def test_other_networks_are_refused():
    net, x = mlp([6, 5, 2]), probes(6)
    graph = groups(net, x)
    with pytest.raises(ValueError, match=r"(?s)layer 'fc1' would keep none of its 5.*lower the"):
        compact_network(net, graph, {}, {"fc1": torch.zeros(5, dtype=torch.bool)})
    with pytest.raises(ValueError, match=r"the input would keep none"):
        compact_network(net, graph, {}, {"input": torch.zeros(6, dtype=torch.bool)})
    with pytest.raises(ValueError, match=r"group 'out', which is not prunable"):
        compact_network(net, graph, {}, {"out": torch.tensor([True, False])})
    with pytest.raises(ValueError, match=r"expected shape \(5, 6\), got \(6, 5\)"):
        compact_network(net, graph, {"fc1.weight": torch.zeros(6, 5)}, {})
    with pytest.raises(ValueError, match=r"no parameter 'fc9\.weight'"):
        compact_network(net, graph, {"fc9.weight": torch.zeros(6, 5)}, {})


# -- over random networks ------------------------------------------------------------------------

POINTWISE = [nn.ReLU, nn.SiLU, nn.Tanh, nn.Sigmoid, nn.Softplus, nn.Hardsigmoid, nn.LeakyReLU]
POOLS = [
    nn.Identity,
    lambda: nn.MaxPool2d(2),
    lambda: nn.MaxPool2d(3, 2, 1),
    lambda: nn.AvgPool2d(2, ceil_mode=True),
    lambda: nn.AvgPool2d(3, 1, 1),
    lambda: nn.AdaptiveAvgPool2d(3),
    lambda: nn.AdaptiveMaxPool2d(2),
    nn.Dropout2d,
]


@st.composite
def chains(draw):
    """A chain of convolutions (perhaps none) and linear layers, with its input's shape."""

    def pick(options):
        return draw(st.sampled_from(options))

    layers: list[nn.Module] = []
    shape = pick([(5,), (2, 6, 7), (1, 9, 8)])
    channels = shape[0]
    if len(shape) == 3:
        for _ in range(draw(st.integers(0, 3))):
            width = draw(st.integers(1, 5))
            layers.append(
                nn.Conv2d(
                    *(channels, width, pick([1, 2, 3])),
                    padding=pick([0, 1, 2]),
                    padding_mode=pick(["zeros", "replicate"]),
                    bias=pick([True, False]),
                )
            )
            layers += [pick(POINTWISE)(), *([pick(POOLS)()] if draw(st.booleans()) else [])]
            channels = width
        layers.append(nn.Flatten())
    try:
        features = nn.Sequential(*layers)(torch.zeros(1, *shape)).shape[1]
    except RuntimeError:  # the images have become smaller than a kernel
        layers, features = [nn.Flatten()], torch.Size(shape).numel()
    for _ in range(draw(st.integers(0, 2))):
        width = draw(st.integers(1, 6))
        layers.append(nn.Linear(features, width, bias=pick([True, False])))
        layers += [pick(POINTWISE)(), *([nn.Dropout()] if draw(st.booleans()) else [])]
        features = width
    layers.append(nn.Linear(features, 3, bias=pick([True, False])))
    return nn.Sequential(*layers), shape


@settings(
    max_examples=150,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.too_slow],
)
@given(chain=chains(), seed=st.integers(0, 1000), share=st.sampled_from([0.0, 0.3, 0.7]))
def test_random_chains(chain, seed, share):
    net, shape = chain
    torch.manual_seed(seed)
    net = net.double()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.normal_(0, 0.7)
    check(net, probes(*shape, dtype=torch.float64), tolerance=1e-9, share=share, inputs=True)


@pytest.mark.parametrize("output", [0, 1])
def test_one_of_several_outputs_of_a_network_that_becomes_a_graph(output):
    """Input features go, which its class does not allow; only the output that is read is left."""

    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.policy, self.value = nn.Linear(6, 8), nn.Linear(8, 3), nn.Linear(8, 2)

        def forward(self, x):
            h = self.body(x).relu()
            return self.policy(h), self.value(h)

    torch.manual_seed(0)
    x = torch.randn(5, 6)
    with pytest.warns(UserWarning, match="not used by the forward pass"):
        model = models.SpikeSlabGaussian(Both(), x, num_data=9, output=output, prune_inputs=True)
    posterior = Posterior(model, guides.for_model(model))
    keep = {g.name: torch.arange(g.size) % 2 == 0 for g in model.graph if g.prunable}
    small = compact(posterior, keep)
    assert (small(x) - posterior.masked(x, keep)).abs().max() <= 1e-6
