"""Reference networks: their sizes as published, and their command-line names."""

import sys
import types

import pytest
import torch
from torch import nn

from pyro_sparse.nets import (
    Attention,
    build,
    count_macs,
    count_parameters,
    lenet5_caffe,
    mlp,
    resnet,
    vit,
)


@pytest.mark.parametrize(
    ("net", "shape", "macs", "parameters"),
    [
        (lenet5_caffe(), (1, 28, 28), 2_293_000, 431_080),
        (mlp([784, 500, 300, 10]), (1, 28, 28), 545_000, 545_810),
        (mlp([784, 400, 400, 10]), (784,), 477_600, 478_410),
    ],
)
def test_cost_as_published(net, shape, macs, parameters):
    # The batch must not count.
    assert count_macs(net, torch.zeros(3, *shape)) == macs
    assert count_parameters(net) == parameters


def test_counting_leaves_the_network_alone():
    net = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3)).train()
    before = net[1].running_mean.clone()
    count_macs(net, torch.randn(2, 4))
    assert net.training
    assert net[1].training
    assert torch.equal(net[1].running_mean, before)


def test_module_names():
    assert list(dict(mlp([4, 3, 3, 2]).named_children())) == [
        *("flatten", "fc1", "act1", "fc2", "act2", "out"),
    ]
    assert list(dict(lenet5_caffe().named_children())) == [
        *("conv1", "act1", "pool1", "conv2", "act2", "pool2", "flatten", "fc1", "act3", "out"),
    ]


def test_options():
    net = mlp([4, 3, 2], "tanh", bias=False)
    assert isinstance(net.act1, nn.Tanh)
    assert net.fc1.bias is None
    net = lenet5_caffe("silu", in_channels=3, classes=7, size=32, widths=(4, 5, 6))
    assert isinstance(net.act2, nn.SiLU)
    assert net(torch.zeros(2, 3, 32, 32)).shape == (2, 7)
    assert net.fc1.in_features == 125


@pytest.mark.parametrize("widths", [[4], [4, 0, 2]])
def test_mlp_refuses_widths(widths):
    with pytest.raises(ValueError, match="at least"):
        mlp(widths)


def test_unknown_activation_names_the_nearest():
    with pytest.raises(ValueError, match=r"(?i)did you mean relu"):
        mlp([4, 3, 2], "rulu")


def test_lenet_refuses_small_images():
    with pytest.raises(ValueError, match="at least 16×16"):
        lenet5_caffe(size=8)


def test_build_named_nets():
    assert [m.out_features for m in build("mlp:40-30", (1, 8, 8), 10) if hasattr(m, "weight")] == [
        *(40, 30, 10)
    ]
    assert build("mlp:", (6,), 2).out.in_features == 6
    assert isinstance(build("mlp:5", (6,), 2, activation="relu").act1, nn.ReLU)
    assert build("lenet5-caffe", (3, 32, 32), 10)(torch.zeros(1, 3, 32, 32)).shape == (1, 10)


@pytest.fixture
def factories(monkeypatch):
    module = types.ModuleType("my_nets")
    module.full = lambda input_shape, outputs: nn.Linear(input_shape[0], outputs)
    module.torchvision_like = lambda num_classes: nn.LazyLinear(num_classes)
    module.fixed = lambda: nn.Linear(7, 5)
    module.no_net = lambda: 3
    module.greedy = lambda depth: nn.Linear(depth, depth)
    monkeypatch.setitem(sys.modules, "my_nets", module)


@pytest.mark.usefixtures("factories")
def test_build_from_factory():
    assert build("my_nets:full", (7,), 3).out_features == 3
    assert build("my_nets:torchvision_like", (7,), 3).out_features == 3
    assert build("my_nets:fixed", (7,), 5).out_features == 5


@pytest.mark.usefixtures("factories")
@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("lenet5", "(?i)did you mean .*lenet5-caffe"),
        ("mlp", "unknown net 'mlp'.*mlp:400-400"),
        ("mlp:a-b", "expected widths such as mlp:400-400"),
        ("mlp:0", "expected widths such as mlp:400-400"),
        ("lenet5-caffe", "needs square images"),
        ("no_such_package.nets:f", "no module 'no_such_package'"),
        ("my_nets:ful", "(?i)did you mean full"),
        ("my_nets:no_net", "return a torch.nn.Module, got int"),
        ("my_nets:greedy", "cannot be called without further arguments.*depth"),
        ("my_nets:fixed", r"return \(2, 3\) for two inputs, got \(2, 5\)"),
    ],
)
def test_build_refuses(spec, message):
    with pytest.raises(ValueError, match=message):
        build(spec, (7,), 3)


@pytest.mark.usefixtures("factories")
def test_build_refuses_data_that_does_not_fit():
    with pytest.raises(ValueError, match=r"does not accept inputs of shape \(8,\)"):
        build("my_nets:fixed", (8,), 5)


@pytest.mark.parametrize(
    ("spec", "macs", "parameters"),
    [
        ("vgg", 313_463_808, 14_987_210),
        ("resnet20", 40_551_040, 269_722),
        ("resnet32", 68_862_592, 464_154),
        ("resnet56", 125_485_696, 853_018),
        ("resnet20-b", 40_813_184, 272_474),
        ("vit", 123_275_136, 1_806_154),
    ],
)
def test_networks_for_small_images(spec, macs, parameters):
    net = build(spec, (3, 32, 32), 10)
    assert count_parameters(net) == parameters
    assert count_macs(net, torch.zeros(1, 3, 32, 32)) == macs
    assert build(spec, (1, 32, 32), 7, activation="silu")(torch.zeros(2, 1, 32, 32)).shape == (2, 7)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: resnet(21), "depth of 6n"),
        (lambda: resnet(20, option="C"), "option 'A' or 'B'"),
        (lambda: vit(size=30), "patches that tile 30×30"),
        (lambda: vit(heads=5), "heads that divide the width 192"),
        (lambda: build("vgg", (3, 8, 8), 10), "at least 16×16"),
        (lambda: build("resnet20", (3, 8, 9), 10), "needs square images"),
    ],
)
def test_networks_for_images_refuse(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("batch_first", [True, False])
def test_attention_is_that_of_torch(batch_first):
    torchs = nn.MultiheadAttention(12, 3, batch_first=batch_first).eval()
    ours = Attention(12, 3, 4, batch_first=batch_first)
    with torch.no_grad():
        torchs.in_proj_bias.normal_()
        parts = zip(torchs.in_proj_weight.chunk(3), torchs.in_proj_bias.chunk(3), strict=True)
        for layer, (weight, bias) in zip((ours.query, ours.key, ours.value), parts, strict=True):
            layer.weight.copy_(weight)
            layer.bias.copy_(bias)
        ours.out.load_state_dict(torchs.out_proj.state_dict())
        query, key = torch.randn(5, 7, 12), torch.randn(5, 7, 12)
        expected = torchs(query, key, key, need_weights=False)[0]
        assert torch.allclose(ours(query, key, key)[0], expected, atol=1e-6)
