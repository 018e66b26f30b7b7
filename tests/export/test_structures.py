"""Exact removal in networks of every structure: streams, concatenations, gates, heads, norms."""

import copy
import functools
import json

import pytest
import torch
import torch.nn.functional as F
import torchvision
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch import nn

from pyro_sparse.export import compact_network, equivalence, save
from pyro_sparse.export._load import load
from pyro_sparse.graph import groups
from pyro_sparse.nets import count_macs, count_parameters, mlp, resnet, vgg, vit

TOLERANCE = 1e-5  # float32


def unsettled(net):
    """Normalisations with statistics, scales and shifts as training leaves them; no zero layers."""
    with torch.no_grad():
        for module in net.modules():
            if getattr(module, "running_mean", None) is not None:
                module.running_mean.normal_(0, 0.3)
                module.running_var.uniform_(0.5, 2)
            norm = isinstance(module, nn.modules.batchnorm._NormBase | nn.GroupNorm | nn.LayerNorm)
            if norm and module.weight is not None:
                module.weight.uniform_(0.5, 1.5)
                module.bias.normal_(0, 0.3)
        for parameter in net.parameters():
            if not parameter.any():
                parameter.normal_(0, 0.1)
    return net


def bordered(*shape, dtype=torch.float32):
    """Inputs that tell borders from the middle."""
    x = torch.randn(3, *shape, dtype=dtype)
    if len(shape) > 1:
        x[1, ..., 0] = 2
        x[2, ..., -1:, :] = -2
    return x


def random_keep(graph, share=0.5, inputs=True):
    keep = {}
    for group in graph:
        if group.prunable and (inputs or group.name != "input"):
            keep[group.name] = torch.rand(group.size) < share
            keep[group.name][torch.randint(group.size, ())] = group.name == "input"
            keep[group.name][torch.randint(group.size, ())] = True
    return keep


def check(net, x, keep=None, tolerance=TOLERANCE, graph=None, **options):
    """Compact under a random mask, compare, and return the compact network."""
    graph = groups(net, x) if graph is None else graph
    keep = random_keep(graph) if keep is None else keep
    parameters = dict(net.named_parameters())
    before = copy.deepcopy(net.state_dict())
    small = compact_network(net, graph, parameters, keep, **options)
    for batch in (x, x[:1]):
        size = max(1.0, float(small(batch).detach().abs().max()))
        assert equivalence(net, graph, parameters, keep, small, batch) <= tolerance * size
    assert not small.training
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    report = small.compaction
    assert json.loads(json.dumps(report)) == report
    return small


# -- small networks, one structure each ----------------------------------------------------------


class Program(nn.Module):
    """A network of some layers with its forward given as a function of (self, x)."""

    def __init__(self, run, **layers):
        super().__init__()
        self._run = run
        for name, layer in layers.items():
            setattr(self, name, layer)

    def forward(self, x):
        return self._run(self, x)


def conv(inputs, outputs, size=3, **options):
    return nn.Conv2d(inputs, outputs, size, padding=size // 2, **options)


def head(width, outputs=4):
    return nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(4 * width, outputs))


def residual(activation=None, norm=nn.BatchNorm2d):
    """A stream with two branches, normalised inside and outside."""

    def run(self, x):
        x = self.act(self.n0(self.c0(x)))
        x = x + self.n2(self.c2(self.act(self.n1(self.c1(x)))))
        x = self.act(x)
        x = x + self.c4(self.act(self.n3(self.c3(x))))
        return self.out(x)

    return Program(
        run,
        **{"c0": conv(3, 8), "c1": conv(8, 6), "c2": conv(6, 8), "c3": conv(8, 10)},
        **{
            "act": activation or nn.ReLU(),
            "c4": conv(10, 8),
            "n0": norm(8),
            "n1": norm(6),
            "n2": norm(8),
            "n3": norm(10),
        },
        out=head(8),
    )


def preactivation():
    def run(self, x):
        x = self.c0(x)
        x = x + self.c2(F.relu(self.n2(self.c1(F.relu(self.n1(x))))))
        return self.out(F.relu(self.n3(x)))

    return Program(
        run,
        **{"c0": conv(3, 8), "c1": conv(8, 6), "c2": conv(6, 8)},
        **{"n1": nn.BatchNorm2d(8), "n2": nn.BatchNorm2d(6), "n3": nn.BatchNorm2d(8)},
        out=head(8),
    )


def densenet():
    def run(self, x):
        features = [self.c0(x)]
        for i in (1, 2, 3):
            joined = torch.cat(features, 1)
            features.append(getattr(self, f"c{i}")(F.relu(getattr(self, f"n{i}")(joined))))
        return self.out(torch.cat(features, 1))

    layers = {f"c{i}": conv(6 + 4 * (i - 1), 4) for i in (1, 2, 3)}
    layers |= {f"n{i}": nn.BatchNorm2d(6 + 4 * (i - 1)) for i in (1, 2, 3)}
    return Program(run, c0=conv(3, 6), **layers, out=head(18))


def squeeze_excite(activation=torch.sigmoid):
    def run(self, x):
        x = F.silu(self.n(self.c(x)))
        gate = activation(self.up(F.relu(self.down(x.mean((2, 3))))))
        return self.out(x * gate[:, :, None, None])

    return Program(
        run,
        c=conv(3, 8),
        n=nn.BatchNorm2d(8),
        down=nn.Linear(8, 4),
        up=nn.Linear(4, 8),
        out=head(8),
    )


def inverted_residual():
    def run(self, x):
        x = F.hardswish(self.c0(x))
        inner = F.relu6(self.n1(self.expand(x)))
        inner = F.relu6(self.n2(self.depthwise(inner)))
        return self.out(x + self.n3(self.project(inner)))

    return Program(
        run,
        **{"c0": conv(3, 6), "expand": conv(6, 12, 1), "n1": nn.BatchNorm2d(12)},
        **{"depthwise": conv(12, 12, groups=12), "n2": nn.BatchNorm2d(12)},
        **{"project": conv(12, 6, 1), "n3": nn.BatchNorm2d(6), "out": head(6)},
    )


def u_net():
    """Transposed convolution, interpolation, concatenation."""

    def run(self, x):
        left = F.relu(self.a(x))
        low = F.relu(self.b(F.max_pool2d(left, 2)))
        up = F.softplus(self.up(low))
        again = F.interpolate(low, scale_factor=2, mode="bilinear")
        return self.out(F.relu(self.c(torch.cat([left, up, again], 1))))

    return Program(
        run,
        **{"a": conv(3, 6), "b": conv(6, 8), "up": nn.ConvTranspose2d(8, 5, 2, stride=2)},
        **{"c": conv(19, 7), "out": conv(7, 2, 1)},
    )


def transposed(groups=1):
    return nn.Sequential(
        *(nn.Conv2d(3, 8, 3), nn.Sigmoid(), nn.ConvTranspose2d(8, 12, 3, 2, groups=groups)),
        *(nn.BatchNorm2d(12), nn.ReLU(), nn.Conv2d(12, 2, 3)),
    )


def split():
    """A gated linear unit, and halves that go separate ways."""

    def run(self, x):
        value, gate = self.a(x.flatten(1)).chunk(2, dim=1)
        left, right = torch.split(self.b(value * torch.sigmoid(gate)), [4, 6], 1)
        return self.c(F.relu(left)) + self.d(F.elu(right[:, 1:5]))

    return Program(
        run, a=nn.Linear(12, 16), b=nn.Linear(8, 10), c=nn.Linear(4, 3), d=nn.Linear(4, 3)
    )


def attention_by_hand(dims=8, count=4):
    """Queries, keys and values from one layer, as transformers are often written."""

    def run(self, x):
        x = self.embed(x)
        b, n, _ = x.shape
        qkv = self.qkv(x).reshape(b, n, 3, count, dims).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        weights = (q @ k.transpose(-2, -1) * dims**-0.5).softmax(dim=-1)
        x = x + self.project((weights @ v).transpose(1, 2).reshape(b, n, count * dims))
        return self.out((x + self.down(F.gelu(self.up(x)))).mean(1))

    return Program(
        run,
        **{"embed": nn.Linear(5, 12), "qkv": nn.Linear(12, 3 * count * dims)},
        **{"project": nn.Linear(count * dims, 12), "up": nn.Linear(12, 20)},
        **{"down": nn.Linear(20, 12), "out": nn.Linear(12, 3)},
    )


def attention_function():
    def run(self, x):
        x = self.norm(self.embed(x))
        parts = [
            layer(x).view(x.size(0), -1, 4, 8).transpose(1, 2) for layer in (self.q, self.k, self.v)
        ]
        attended = F.scaled_dot_product_attention(*parts)
        return self.out(self.project(attended.transpose(1, 2).flatten(2)).mean(1))

    return Program(
        run,
        **{"embed": nn.Linear(5, 12), "norm": nn.LayerNorm(12), "q": nn.Linear(12, 32)},
        **{"k": nn.Linear(12, 32), "v": nn.Linear(12, 32, bias=False)},
        **{"project": nn.Linear(32, 12), "out": nn.Linear(12, 3)},
    )


def torch_attention(batch_first=True, bias=True, norm=nn.LayerNorm):
    def run(self, x):
        x = self.embed(x)
        if not batch_first:
            x = x.transpose(0, 1)
        normed = self.norm(x)
        x = x + self.attention(normed, normed, normed, need_weights=False)[0]
        if not batch_first:
            x = x.transpose(0, 1)
        return self.out(x.mean(1))

    return Program(
        run,
        embed=nn.Linear(5, 12),
        norm=norm(12),
        attention=nn.MultiheadAttention(12, 4, bias=bias, batch_first=batch_first),
        out=nn.Linear(12, 3),
    )


def layer_scale():
    def run(self, x):
        x = self.a(x)
        x = x + self.scale * self.b(F.gelu(x - self.centre))
        return self.out(F.relu(x + self.shift).amax((2, 3)))

    net = Program(
        run,
        **{"a": conv(3, 6), "b": conv(6, 6), "out": nn.Linear(6, 3)},
        scale=nn.Parameter(torch.rand(6, 1, 1)),
        shift=nn.Parameter(torch.randn(1, 6, 1, 1)),
    )
    net.register_buffer("centre", torch.rand(6, 1, 1))
    return net


def shared_modules():
    """One layer called three times; one normalisation called twice."""

    def run(self, x):
        x = F.relu(self.n(self.a(x)))
        for _ in range(3):
            x = torch.tanh(self.again(x))
        return self.out(self.n(x))

    return Program(
        run, a=nn.Linear(5, 7), n=nn.BatchNorm1d(7), again=nn.Linear(7, 7), out=nn.Linear(7, 3)
    )


def one_dimensional():
    return nn.Sequential(
        *(nn.Conv1d(2, 6, 3, padding=1), nn.BatchNorm1d(6), nn.PReLU(6), nn.MaxPool1d(2)),
        *(nn.Conv1d(6, 12, 3, padding=1, groups=6), nn.InstanceNorm1d(12, affine=True), nn.GELU()),
        *(nn.AdaptiveAvgPool1d(2), nn.Flatten(), nn.Linear(24, 3)),
    )


def three_dimensional():
    return nn.Sequential(
        *(nn.Conv3d(2, 6, 2), nn.BatchNorm3d(6), nn.Sigmoid(), nn.AvgPool3d(2)),
        *(nn.Conv3d(6, 8, 1), nn.GroupNorm(4, 8), nn.ReLU(inplace=True)),
        *(nn.AdaptiveMaxPool3d(1), nn.Flatten(), nn.Linear(8, 3)),
    )


def without_scale():
    return nn.Sequential(
        *(nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6, affine=False), nn.ReLU()),
        *(nn.Conv2d(6, 5, 3), nn.InstanceNorm2d(5), nn.ReLU(), head(5)),
    )


def reordered():
    """Channels last, flattened in another order, stacked, shuffled."""

    def run(self, x):
        x = F.softplus(self.a(x)).permute(0, 2, 3, 1)
        x = torch.stack([x, 2 * x], dim=1).flatten(1, 3)
        x = self.b(x).transpose(1, 2).unsqueeze(-1)
        return self.out(F.elu(x).squeeze(-1).flip(1).flatten(1))

    return Program(run, a=conv(3, 6), b=nn.Linear(6, 5), out=nn.Linear(5 * 2 * 36, 3))


def padded_shortcut():
    def run(self, x):
        x = F.relu(self.a(x))
        y = self.b(x)
        return self.out(F.relu(y + F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 1, 4))))

    return Program(run, a=conv(3, 5), b=conv(5, 10, stride=2), out=head(10))


IMAGE = (3, 6, 6)
STRUCTURES = {
    "residual": (residual, IMAGE),
    "residual-sigmoid": (lambda: residual(nn.Sigmoid()), IMAGE),
    "residual-softplus-inputs": (lambda: residual(nn.Softplus(), nn.InstanceNorm2d), IMAGE),
    "residual-group-norm": (lambda: residual(norm=lambda c: nn.GroupNorm(2, c)), IMAGE),
    "preactivation": (preactivation, IMAGE),
    "densenet": (densenet, IMAGE),
    "squeeze-excite": (squeeze_excite, IMAGE),
    "squeeze-excite-hardsigmoid": (lambda: squeeze_excite(F.hardsigmoid), IMAGE),
    "inverted-residual": (inverted_residual, IMAGE),
    "u-net": (u_net, IMAGE),
    "transposed": (transposed, IMAGE),
    "transposed-grouped": (lambda: transposed(4), IMAGE),
    "split": (split, (12,)),
    "attention-by-hand": (attention_by_hand, (6, 5)),
    "attention-function": (attention_function, (6, 5)),
    "torch-attention": (torch_attention, (6, 5)),
    "torch-attention-tokens-first": (lambda: torch_attention(False, False), (6, 5)),
    "torch-attention-stream": (lambda: torch_attention(norm=nn.Identity), (6, 5)),
    "layer-scale": (layer_scale, IMAGE),
    "shared-modules": (shared_modules, (5,)),
    "one-dimensional": (one_dimensional, (2, 9)),
    "three-dimensional": (three_dimensional, (2, 5, 5, 5)),
    "without-scale": (without_scale, IMAGE),
    "reordered": (reordered, IMAGE),
    "padded-shortcut": (padded_shortcut, IMAGE),
    "resnet-a": (lambda: resnet(14, widths=(4, 6, 9)), (3, 8, 8)),
    "resnet-b": (lambda: resnet(14, option="B", widths=(4, 6, 9)), (3, 8, 8)),
    "vgg": (lambda: vgg(layers=(4, "M", 8, 8), hidden=10), (3, 8, 8)),
    "vit": (lambda: vit(size=8, width=16, depth=2, heads=4, hidden=24), (3, 8, 8)),
}


# Their code says how many units there are, and no attribute of theirs does.
INSISTING = ("split", "attention-by-hand", "attention-function", "padded-shortcut", "resnet-a")


@functools.cache
def built(name):
    """A network with its input and its groups; checks leave it as it is."""
    make, shape = STRUCTURES[name]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net, x = unsettled(make()), bordered(*shape)
    return net, x, groups(net, x)


@pytest.mark.parametrize("name", STRUCTURES)
@pytest.mark.parametrize("inputs", [True, False], ids=["inputs", "units"])
@pytest.mark.parametrize(
    ("share", "options"),
    [(0.2, {}), (0.6, {"fold": True}), (0.4, {"align": 2})],
    ids=["plain", "fold", "align"],
)
def test_structures(name, inputs, share, options):
    net, x, graph = built(name)
    keep = random_keep(graph, share, inputs)
    small = check(net, x, keep, graph=graph, **options)
    if not inputs:
        form = "graph" if name in INSISTING else "own class"
        assert small.compaction["form"] == form, small.compaction["why"]
    removed = small.compaction["removed"]
    assert {n: len(units) for n, units in removed.items()} == {
        n: int((~m).sum()) for n, m in keep_of(graph, small).items() if not m.all()
    }
    # The networks that come in have something to remove in each of their parts.
    assert any(len(units) for units in removed.values())


def keep_of(graph, small):
    masks = {g.name: torch.zeros(g.size, dtype=torch.bool) for g in graph}
    for name, units in small.compaction["kept"].items():
        masks[name][units] = True
    return masks


@pytest.mark.parametrize("name", STRUCTURES)
def test_in_double_precision(name):
    make, shape = STRUCTURES[name]
    net = unsettled(make().double())
    check(net, bordered(*shape, dtype=torch.float64), tolerance=1e-12)


@pytest.mark.parametrize("name", ["residual", "resnet-a", "densenet", "vit", "squeeze-excite"])
def test_in_bfloat16(name):
    make, shape = STRUCTURES[name]
    net = unsettled(make().bfloat16())
    small = check(net, bordered(*shape, dtype=torch.bfloat16), tolerance=0.05)
    assert {value.dtype for value in small.parameters()} == {torch.bfloat16}


def test_in_place_sums_and_activations():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.n = conv(3, 6), conv(6, 6), nn.BatchNorm2d(6)
            self.act, self.out = nn.ReLU(inplace=True), head(6)

        def forward(self, x):
            x = self.act(self.a(x))
            y = self.n(self.b(x))
            y += x
            return self.out(self.act(y))

    net, x = unsettled(Net()), bordered(*IMAGE)
    assert groups(net, x)["a"].size == 6
    check(net, x)
    # What an operation changes is what it returns: both terms are the activation.
    net = Program(
        lambda self, x: self.out(F.relu(h := self.a(x), inplace=True) + h),
        a=conv(3, 6),
        out=head(6),
    )
    assert groups(net, x)["a"].prunable
    check(net, x)


def halved(self, x):
    x = self.a(x)
    x[:, :3].relu_()
    return self.out(x)


def viewed(self, x):
    x = self.a(x)
    flat = x.flatten(2)
    F.relu(x, inplace=True)
    return self.out(x + flat.view(x.shape))


@pytest.mark.parametrize("run", [halved, viewed])
def test_memory_that_is_overwritten_and_read_again_is_left_alone(run):
    net, x = Program(run, a=conv(3, 6), out=head(6)), bordered(*IMAGE)
    assert "changes in place" in groups(net, x)["a"].reason
    check(net, x)


def test_which_groups_are_found():
    """What is tied to what, in a few of them."""

    def found(name):
        return {g.name: g for g in built(name)[2] if g.prunable}

    stream = found("residual")["c0"]
    assert [w.parameter for w in stream.writers] == [
        f"{layer}.{part}" for layer in ("c0", "n0", "c2", "n2", "c4") for part in ("weight", "bias")
    ]
    assert [w.gates for w in stream.writers] == [False] * 2 + [True] * 2 + [False] * 2 + [True] * 4
    assert set(found("densenet")) == {"input", "c0", "c1", "c2", "c3"}
    assert [w.parameter for w in found("densenet")["c2"].writers] == [
        *("c2.weight", "c2.bias", "n3.weight", "n3.bias"),
    ]
    assert {n: g.size for n, g in found("attention-by-hand").items()} == {
        **{"input": 5, "embed": 12, "qkv": 4, "up": 20},
    }
    writers = found("attention-by-hand")["qkv"].writers
    assert [(w.parameter, w.block, w.gates) for w in writers] == [
        *(("qkv.weight", 16, False), ("qkv.weight", 8, True)),
        *(("qkv.bias", 16, False), ("qkv.bias", 8, True)),
    ]
    assert {n: g.size for n, g in found("split").items()} == {
        **{"input": 12, "a": 8, "b:0": 4, "b:1": 2, "b:2": 4},  # two that nobody reads
    }
    assert found("one-dimensional")["0"].size == 6
    # Halves of five and ten channels, of which five have a shortcut.
    assert {n: g.size for n, g in found("padded-shortcut").items()} == {
        **{"input": 3, "a": 5, "b": 5},
    }
    assert found("padded-shortcut")["a"].writers[2].index == (1, 2, 3, 4, 5)
    assert found("transposed-grouped")["0"].size == 4
    assert found("torch-attention")["attention"].kind == "heads"


# -- torchvision ---------------------------------------------------------------------------------


def big(name):
    """Torchvision's architectures, with fewer repetitions of what repeats."""
    models = torchvision.models
    if name == "vit":
        return models.VisionTransformer(32, 16, 3, 12, 192, 768), (3, 32, 32)
    if name == "densenet":
        return models.DenseNet(8, (3, 3), 16), (3, 32, 32)
    if name == "mobilenet_v2":
        blocks = [[1, 16, 1, 1], [6, 24, 2, 2], [6, 32, 2, 2], [6, 64, 1, 1]]
        return models.MobileNetV2(inverted_residual_setting=blocks), (3, 64, 64)
    if name == "shufflenet_v2":
        return models.ShuffleNetV2([2, 3, 2], [24, 48, 96, 192, 1024]), (3, 64, 64)
    return getattr(models, name)(), (3, 64, 64)


@pytest.mark.parametrize(
    ("name", "units"),
    [
        ("resnet18", 3 + (64 + 128 + 256 + 512) * 3),
        ("mobilenet_v2", None),
        ("mobilenet_v3_small", None),
        ("vit", 3 + 3 * (12 + 768)),
        ("densenet", None),
        ("shufflenet_v2", None),
    ],
)
def test_torchvision(name, units):
    net, shape = big(name)
    net, x = unsettled(net), bordered(*shape)
    graph = groups(net, x)
    if units is not None:
        assert sum(group.size for group in graph if group.prunable) == units
    assert not graph.ungrouped
    for group in graph:
        if not group.prunable:
            assert group.reason
    small = check(net, x, random_keep(graph), fold=True, graph=graph)
    assert count_parameters(small) < 0.75 * count_parameters(net)


# -- sizes ---------------------------------------------------------------------------------------


def test_parameters_and_macs_to_the_integer():
    """Of a residual network whose streams have lost channels, counted by hand from the masks."""
    net, x = unsettled(resnet(14, option="B", widths=(8, 12, 16))), bordered(3, 16, 16)
    graph = groups(net, x)
    keep = random_keep(graph, inputs=False)
    small = check(net, x, keep)
    left = {name: int(mask.sum()) for name, mask in graph.check_keep(keep).items()}
    streams = [left["conv"], left["stage2.0.conv2"], left["stage3.0.conv2"]]
    parameters, macs, size = 27 * streams[0] + 2 * streams[0], 27 * streams[0] * 256, 256
    inputs = streams[0]
    for stage, outputs in enumerate(streams, start=1):
        if stage > 1:
            size //= 4
            parameters += inputs * outputs + 2 * outputs
            macs += inputs * outputs * size
        for block in range(2):
            inner = left[f"stage{stage}.{block}.conv1"]
            parameters += 9 * inner * (inputs + outputs) + 2 * (inner + outputs)
            macs += 9 * inner * (inputs + outputs) * size
            inputs = outputs
    assert count_parameters(small) == parameters + 10 * (inputs + 1)
    assert count_macs(small, x[:1]) == macs + 10 * inputs


@pytest.mark.parametrize("multiple", [4, 8, 16])
def test_align_readmits_the_next_best(multiple):
    net, x = mlp([9, 50, 40, 3]), bordered(9)
    keep = {"fc1": torch.arange(50) < 5, "fc2": torch.arange(40) >= 38}
    scores = {"fc1": -torch.arange(50.0), "fc2": torch.arange(40.0)}
    small = check(net, x, keep, align=multiple, scores=scores)
    first, second = -(-5 // multiple) * multiple, multiple
    assert small.compaction["kept"]["fc1"] == list(range(first))
    assert small.compaction["readmitted"]["fc1"] == list(range(5, first))
    assert small.compaction["kept"]["fc2"] == list(range(40 - second, 40))
    assert small.fc2.weight.shape == (second, first)
    assert small.compaction["align"] == multiple


def test_align_counts_constants_and_heads():
    net = nn.Sequential(conv(3, 16), nn.Sigmoid(), conv(16, 9), nn.ReLU(), head(9))
    x = bordered(*IMAGE)
    keep = {"0": torch.arange(16) < 6}
    small = check(net, x, keep, align=4)
    # Six channels and the constant one make seven; one more comes back.
    assert small[0].out_channels == 8
    assert len(small.compaction["kept"]["0"]) == 7
    net, x = attention_by_hand(), bordered(6, 5)
    keep = {"qkv": torch.arange(4) == 2}
    assert check(net, x, keep, align=8).compaction["readmitted"] == {}
    assert len(check(net, x, keep, align=16).compaction["readmitted"]["qkv"]) == 1


def test_align_refuses_nonsense():
    net, x = mlp([4, 3, 2]), bordered(4)
    graph = groups(net, x)
    keep = {"fc1": torch.tensor([True, False, False])}
    with pytest.raises(ValueError, match="align"):
        compact_network(net, graph, {}, keep, align=0)
    with pytest.raises(ValueError, match="expected 3 scores for group 'fc1', got 2"):
        compact_network(net, graph, {}, keep, align=2, scores={"fc1": torch.zeros(2)})


def test_fold_leaves_no_normalisation():
    net, x = unsettled(resnet(8, widths=(4, 6, 8))), bordered(3, 8, 8)
    small = check(net, x, fold=True)
    assert len(small.compaction["folded"]) == 7
    assert not any(isinstance(m, nn.BatchNorm2d) for m in small.modules())
    net = unsettled(nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 2)))
    assert check(net, bordered(4), fold=True).compaction["folded"] == ["1"]


# -- branches ------------------------------------------------------------------------------------


def nothing(graph, *names):
    return {name: torch.zeros(graph[name].size, dtype=torch.bool) for name in names}


def test_a_branch_that_reads_nothing_goes():
    net, x = unsettled(resnet(14, widths=(4, 6, 8))), bordered(3, 8, 8)
    graph = groups(net, x)
    small = check(net, x, nothing(graph, "stage1.0.conv1", "stage2.0.conv1", "stage2.1.conv1"))
    assert small.compaction["branches"] == [f"stage{i}.conv2" for i in ("1.0", "2.0", "2.1")]
    assert small.compaction["form"] == "graph"
    assert "reads nothing any more" in small.compaction["why"]
    names = {name.rpartition(".")[0] for name in small.state_dict()}
    assert not names & {"stage1.0.conv1", "stage1.0.conv2", "stage2.0.norm2", "stage2.1.norm2"}
    assert {"stage1.1.conv2", "stage1.1.norm2"} <= names
    # Without a shift, nothing is added at all.
    for norm in (net.stage1[0].norm2, net.stage2[0].norm2, net.stage2[1].norm2):
        with torch.no_grad():
            norm.weight.fill_(1)
            norm.bias.zero_()
            norm.running_mean.zero_()
    small = check(net, x, nothing(graph, "stage1.0.conv1", "stage2.0.conv1", "stage2.1.conv1"))
    assert not [name for name in small.state_dict() if name.startswith("constant")]


@pytest.mark.parametrize(
    ("name", "lost"),
    [
        ("attention-by-hand", ["qkv"]),
        ("attention-by-hand", ["qkv", "up"]),
        ("attention-function", ["up"]),
        ("torch-attention", ["attention"]),
        ("vit", ["blocks.0.attention.query", "blocks.1.fc1"]),
        ("squeeze-excite", ["down"]),
        ("inverted-residual", ["expand"]),
        ("residual", ["c1", "c3"]),
        ("residual-sigmoid", ["c1"]),
        ("densenet", ["c1"]),
        ("densenet", ["c1", "c3"]),
        ("u-net", ["up"]),
        ("split", ["b:0"]),
        ("layer-scale", []),
    ],
)
def test_branches_that_keep_nothing(name, lost):
    net, x, graph = built(name)
    lost = [n for n in lost if n in graph]
    small = check(net, x, random_keep(graph) | nothing(graph, *lost), graph=graph)
    assert all(small.compaction["kept"][name] == [] for name in lost)


@pytest.mark.parametrize("lost", ["conv", "stage3.0.conv2"])
def test_a_stream_that_keeps_nothing_is_an_error(lost):
    net, x = resnet(8, option="B", widths=(4, 6, 8)), bordered(3, 8, 8)
    graph = groups(net, x)
    with pytest.raises(ValueError, match=f"layer '{lost}' would keep none"):
        compact_network(net, graph, {}, nothing(graph, lost))


# -- gates ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("option", ["A", "B"])
def test_a_gate_multiplies_what_readers_see(option, training):
    """Scaling units by positive numbers is scaling their readers' columns: ReLU lets them pass."""
    net, x = unsettled(resnet(14, option=option, widths=(4, 6, 8))).double(), bordered(3, 8, 8)
    x = x.double()
    graph = groups(net, x)
    own = dict(net.named_parameters())
    rows = {g.name: graph.rows(own, g.name) for g in graph if g.writers}
    gated, scaled = dict(rows), {n: v.detach().clone() for n, v in own.items()}
    for group in graph:
        if not group.prunable or not group.writers:
            continue
        gate = torch.rand(group.size, dtype=torch.float64) + 0.5
        gated[group.name] = graph.gate_rows(group.name, rows[group.name], gate)
        for reader in group.readers:
            factor = torch.ones(scaled[reader.parameter].shape[1], dtype=torch.float64)
            factor[reader.entries(group.size)] = gate.repeat_interleave(reader.block)
            factor = factor.reshape(-1, *[1] * (scaled[reader.parameter].ndim - 2))
            scaled[reader.parameter] = scaled[reader.parameter] * factor
    net.train(training)
    ours = torch.func.functional_call(net, graph.parameters(gated), (x,))
    theirs = torch.func.functional_call(net, scaled, (x,))
    assert torch.allclose(ours, theirs, atol=1e-9)
    assert not torch.allclose(ours, net(x), atol=1e-3)


@pytest.mark.parametrize("name", ["attention-by-hand", "attention-function", "torch-attention"])
def test_gates_of_heads_multiply_the_values_only(name):
    """Scaled queries and keys would change where a head looks, not how much it says."""
    make, shape = STRUCTURES[name]
    net, x = make().double(), bordered(*shape, dtype=torch.float64)
    graph = groups(net, x)
    (heads,) = [group for group in graph if group.kind == "heads"]
    own = {n: v.detach() for n, v in net.named_parameters()}
    gate = torch.rand(heads.size, dtype=torch.float64) + 0.5
    rows = {g.name: graph.rows(own, g.name) for g in graph if g.writers}
    rows[heads.name] = graph.gate_rows(heads.name, rows[heads.name], gate)
    (reader,) = heads.readers
    scaled = own[reader.parameter].clone()
    scaled[:, reader.entries(heads.size)] *= gate.repeat_interleave(reader.block)
    ours = torch.func.functional_call(net, graph.parameters(rows), (x,))
    theirs = torch.func.functional_call(net, {reader.parameter: scaled}, (x,))
    assert torch.allclose(ours, theirs, atol=1e-12)
    assert not torch.allclose(ours, net(x), atol=1e-4)


# -- random networks -----------------------------------------------------------------------------


@st.composite
def graphs(draw):
    """Networks of convolutions, norms, activations, sums, concatenations and halves at random."""

    def pick(options):
        return draw(st.sampled_from(options))

    steps, layers = [], {}
    widths = [2]  # of the values so far; all of the same size

    def layer(module):
        name = f"m{len(layers)}"
        layers[name] = module
        return name

    for _ in range(draw(st.integers(2, 9))):
        kind = pick(["conv", "conv", "depthwise", "norm", "act", "add", "cat", "half", "gate"])
        at = draw(st.integers(max(0, len(widths) - 3), len(widths) - 1))
        width = widths[at]
        if kind == "conv":
            outputs = pick([2, 4, 6])
            groups_ = pick([1, 1, 2]) if width % 2 == 0 and outputs % 2 == 0 else 1
            padding = pick(["zeros", "circular"])
            steps.append(
                ("layer", at, layer(conv(width, outputs, groups=groups_, padding_mode=padding)))
            )
            widths.append(outputs)
        elif kind == "depthwise":
            steps.append(("layer", at, layer(conv(width, width, groups=width))))
            widths.append(width)
        elif kind == "norm":
            halves = nn.GroupNorm(1 + (width % 2 == 0), width)
            norm = pick([nn.BatchNorm2d(width), nn.InstanceNorm2d(width), halves])
            steps.append(("layer", at, layer(norm)))
            widths.append(width)
        elif kind == "act":
            act = pick([nn.ReLU, nn.Sigmoid, nn.Softplus, nn.SiLU, lambda: nn.MaxPool2d(3, 1, 1)])
            steps.append(("layer", at, layer(act())))
            widths.append(width)
        elif kind in ("add", "cat", "gate"):
            other = draw(st.integers(0, len(widths) - 1))
            if kind != "cat" and widths[other] != width:
                continue
            steps.append((kind, at, other))
            widths.append(width + widths[other] if kind == "cat" else width)
        elif width % 2 == 0:
            steps.append((kind, at, pick([0, 1])))
            widths.append(width // 2)

    def run(self, x):
        values = [x]
        for kind, at, what in steps:
            value = values[at]
            if kind == "layer":
                values.append(getattr(self, what)(value))
            elif kind == "add":
                values.append(value + values[what])
            elif kind == "gate":
                values.append(value * torch.sigmoid(values[what].mean((2, 3), keepdim=True)))
            elif kind == "cat":
                values.append(torch.cat([value, values[what]], 1))
            else:
                values.append(value.chunk(2, 1)[what])
        return self.out(values[-1])

    return Program(run, out=conv(widths[-1], 2, 1), **layers)


@settings(
    max_examples=100,
    deadline=None,
    derandomize=True,
    database=None,
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)
@given(net=graphs(), seed=st.integers(0, 1000), share=st.sampled_from([0.2, 0.6]))
def test_random_networks(net, seed, share):
    torch.manual_seed(seed)
    net = unsettled(net.double())
    x = bordered(2, 5, 5, dtype=torch.float64)
    graph = groups(net, x)
    keep, failed = random_keep(graph, share), ""
    try:
        check(net, x, keep, tolerance=1e-9, graph=graph, fold=seed % 2 == 0)
    except ValueError as error:
        failed = str(error)
    if failed:
        # All that the output depends on may have been excluded: then the masked output is constant.
        assert "would read no units" in failed or "would keep none" in failed
        masked = graph.masked_parameters(dict(net.named_parameters()), keep)
        gated = graph.gate_inputs(x, keep.get("input", torch.ones(2)).double())
        output = torch.func.functional_call(net.eval(), masked, (gated,))
        assert torch.allclose(output, output[:1])


# -- folders -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [n for n in STRUCTURES if n != "one-dimensional"])
def test_the_exported_folder_computes_the_same(name, tmp_path):
    net, x, graph = built(name)
    small = check(net, x, graph=graph)
    loaded = load(save(small, tmp_path / "out", example=x))
    with torch.no_grad():
        assert torch.allclose(loaded(x), small(x), rtol=0, atol=1e-12)


def test_torchs_encoder_layer():
    """Its heads and its hidden units go; its stream is layer-normalised, and stays."""
    net = nn.Sequential(
        *(nn.Linear(3, 8), nn.TransformerEncoderLayer(8, 4, 16, batch_first=True)),
        *(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 2)),
    ).eval()
    x = torch.randn(4, 5, 3)
    graph = groups(net, x)
    sizes = {group.name: group.size for group in graph if group.prunable and group.writers}
    assert sizes == {"1.self_attn": 4, "1.linear1": 16, "2": 6}
    assert "normalises over several units" in graph["0"].reason
    keep = {name: torch.arange(size) % 2 == 0 for name, size in sizes.items()}
    small = check(net, x, keep)
    assert small.compaction["form"] == "own class"
    assert small[1].linear1.out_features == 8
    assert small[2].out_features == 3
