"""Networks of the kinds that others write: what can go, goes exactly, and costs what is said."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import pyro_sparse as ps
from pyro_sparse.graph import Pointwise, groups, register


class Net(nn.Module):
    """Layers by name, and a function of them and the inputs."""

    def __init__(self, run, **layers):
        super().__init__()
        self.run = run
        for name, layer in layers.items():
            if isinstance(layer, torch.Tensor) and not isinstance(layer, nn.Parameter):
                self.register_buffer(name, layer)
            else:
                setattr(self, name, layer)

    def forward(self, *args, **kwargs):
        return self.run(self, *args, **kwargs)


def linear(run, **more):
    return Net(run, a=nn.Linear(4, 8), b=nn.Linear(8, 2), **more)


def recurrent(kind, **options):
    wide = 12 if options.get("bidirectional") else 6

    def run(self, x):
        states = self.a(x)[0]
        return self.b(states[:, -1])

    return Net(run, a=kind(4, 6, batch_first=True, **options), b=nn.Linear(wide, 2))


def convolutional_attention(self, x):
    x = torch.relu(self.a(x))
    q, k, v = (layer(x).flatten(2) for layer in (self.q, self.k, self.v))
    weights = (q.transpose(1, 2) @ k / 2).softmax(-1)
    return self.b((v @ weights.transpose(1, 2)).mean(2))


class Rotary(nn.Module):
    """Rotary attention of four query heads that share two of keys and values."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(6, n * 4, bias=False) for n in (4, 2, 2))
        self.o, self.b = nn.Linear(16, 6), nn.Linear(6, 2)
        self.register_buffer("speed", torch.tensor([1.0, 0.1]))

    def turned(self, x, cos, sin):
        first, second = x.chunk(2, -1)
        return x * cos + torch.cat([-second, first], -1) * sin

    def forward(self, x):
        split = (x.size(0), x.size(1), -1, 4)
        angles = torch.arange(x.size(1))[:, None] * self.speed
        angles = torch.cat([angles, angles], -1)
        q, k, v = (layer(x).view(split).transpose(1, 2) for layer in (self.q, self.k, self.v))
        q, k = (self.turned(part, angles.cos(), angles.sin()) for part in (q, k))
        k, v = (part.repeat_interleave(2, 1) for part in (k, v))
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.b(self.o(attended.transpose(1, 2).reshape(x.size(0), x.size(1), -1)).mean(1))


x, sequence, image = torch.rand(3, 4) + 0.1, torch.randn(3, 5, 4), torch.randn(2, 4, 5, 5)
ENCODER = nn.TransformerEncoderLayer(4, 2, 8, batch_first=True)
KINDS = {
    "shift": (linear(lambda s, x: s.b(torch.relu(s.a(x) + s.g)), g=nn.Parameter(torch.rand(8))), x),
    "scale": (linear(lambda s, x: s.b(torch.relu(s.a(x) * s.g)), g=torch.rand(8)), x),
    "logarithm": (linear(lambda s, x: s.b(torch.relu(s.a(x.log())))), x),
    "axis": (linear(lambda s, x: s.b(torch.relu(s.a(x)).mean(axis=1))), sequence),
    "erf": (linear(lambda s, x: s.b(torch.erf(s.a(x)))), x),
    "where": (linear(lambda s, x: s.b(torch.where((h := s.a(x)) > 0, h, h / 10))), x),
    "maximum": (linear(lambda s, x: s.b(torch.maximum(h := s.a(x), h * 2))), x),
    "max": (linear(lambda s, x: s.b(s.a(x).max(1)[0])), sequence),
    "einsum": (linear(lambda s, x: s.b(torch.einsum("bti->bit", s.a(x)).mean(2))), sequence),
    "roll": (linear(lambda s, x: s.b(s.a(x).roll(1, 1).mean(1))), sequence),
    "repeat": (linear(lambda s, x: s.b(s.a(x).repeat(1, 2, 1).mean(1))), sequence),
    "zeros": (linear(lambda s, x: s.b(s.a(x) + torch.zeros(x.size(0), 8))), x),
    "number": (linear(lambda s, x: s.b((h := s.a(x)) / h.size(1))), x),
    "graph": (
        linear(lambda s, x: s.b((s.A @ s.a(x)).relu().mean(1)), A=torch.rand(5, 5)),
        sequence,
    ),
    "table": (
        linear(
            lambda s, x: s.b((s.a(x) + s.t[s.index]).relu().mean(1)),
            t=nn.Parameter(torch.randn(9, 8)),
            index=torch.tensor([1, 3, 3, 0, 2]),
        ),
        sequence,
    ),
    "gated": (
        Net(lambda s, x: s.b(F.glu(s.a(x))), a=nn.Linear(4, 16), b=nn.Linear(8, 2)),
        x,
    ),
    "masked weight": (
        linear(
            lambda s, x: s.b(F.linear(x, s.a.weight * s.m, s.a.bias).relu()),
            m=torch.ones(8, 4).tril(),
        ),
        x,
    ),
    "weight norm": (
        Net(
            lambda s, x: s.b(s.a(x).relu()),
            a=nn.utils.parametrizations.weight_norm(nn.Linear(4, 8)),
            b=nn.Linear(8, 2),
        ),
        x,
    ),
    "LSTM": (recurrent(nn.LSTM), sequence),
    "LSTM, layers": (recurrent(nn.LSTM, num_layers=2, bidirectional=True), sequence),
    "GRU": (recurrent(nn.GRU), sequence),
    "encoder layer": (nn.Sequential(ENCODER, nn.Flatten(), nn.Linear(20, 2)), sequence),
    "convolutional attention": (
        Net(
            convolutional_attention,
            **{name: nn.Conv2d(4, 4, 1) for name in "aqkv"},
            b=nn.Linear(4, 2),
        ),
        image,
    ),
    "rotary": (Rotary(), torch.randn(2, 5, 6)),
}


@pytest.mark.parametrize("kind", KINDS)
def test_kinds(kind):
    net, example = KINDS[kind]
    model = ps.models.SpikeSlabGaussian(net, example, num_data=20)
    posterior = ps.Posterior(model, ps.guides.for_model(model))
    keep = {}
    for place, group in enumerate(model.graph):
        if group.prunable and group.writers:
            keep[group.name] = torch.arange(group.size) % 2 == place % 2
    assert keep
    small = ps.compact(posterior, keep)
    torch.testing.assert_close(
        small(example).detach(), posterior.masked(example, keep).detach(), rtol=1e-5, atol=1e-6
    )
    assert ps.nets.count_parameters(small) < ps.nets.count_parameters(net)
    if kind not in ("LSTM", "LSTM, layers", "GRU"):  # torch counts none for them
        assert posterior.macs(keep) == ps.nets.count_macs(small, example)
    assert small.compaction["form"] == ("graph" if kind in ("zeros", "number") else "own class")


def test_heads_that_share_keys_are_one_unit():
    graph = groups(*KINDS["rotary"])
    assert (graph["q"].size, graph["q"].kind) == (2, "heads")


def test_several_inputs_and_outputs():
    def run(self, a, b, scale=None):
        hidden = torch.relu(self.a(a) + self.c(b))
        return {"mean": self.b(hidden if scale is None else hidden * scale), "more": hidden}

    net = Net(run, a=nn.Linear(4, 8), c=nn.Linear(3, 8), b=nn.Linear(8, 2))
    example = (torch.randn(3, 4), torch.randn(3, 3))
    with pytest.raises(ValueError, match=r"several tensors \('mean', 'more'\).*output="):
        ps.models.SpikeSlabGaussian(net, example, num_data=20)
    with pytest.raises(ValueError, match="no output 'median'"):
        ps.models.SpikeSlabGaussian(net, example, num_data=20, output="median")
    model = ps.models.SpikeSlabGaussian(net, example, num_data=20, output="mean")
    posterior = ps.Posterior(model, ps.guides.for_model(model))
    small = ps.compact(posterior, {"a": torch.arange(8) < 3})
    parameters = posterior.masked_parameters({"a": torch.arange(8) < 3})
    torch.testing.assert_close(small(*example)["mean"], model.network_output(example, parameters))


def test_integers_come_in():
    net = Net(
        lambda s, x: s.b(torch.relu(s.a(s.e(x).mean(1)))),
        e=nn.Embedding(9, 4),
        a=nn.Linear(4, 8),
        b=nn.Linear(8, 2),
    )
    example = torch.randint(0, 9, (3, 5))
    model = ps.models.SpikeSlabGaussian(net, example, num_data=20)
    posterior = ps.Posterior(model, ps.guides.for_model(model))
    keep = {"e": torch.arange(4) < 3, "a": torch.arange(8) < 5}
    small = ps.compact(posterior, keep)
    assert posterior.macs(keep) == ps.nets.count_macs(small, example)


def test_frozen_parameters_stay():
    net = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 2))
    net[0].requires_grad_(False)
    model = ps.models.SpikeSlabGaussian(net, torch.randn(4, 3), num_data=20)
    assert [group.name for group in model.graph if group.prunable and group.writers] == ["2"]
    assert model.graph.ungrouped["0.weight"] == "frozen (requires_grad=False)"
    parameters = ps.Posterior(model, ps.guides.for_model(model)).mean_parameters()
    assert torch.equal(parameters["0.weight"], net[0].weight)


def test_a_tied_embedding_is_never_pruned():
    net = Net(
        lambda s, x: s.h(s.g(torch.relu(s.f(s.e(x)))).mean(1)),
        e=nn.Embedding(20, 8),
        f=nn.Linear(8, 16),
        g=nn.Linear(16, 8),
        h=nn.Linear(8, 20, bias=False),
    )
    net.h.weight = net.e.weight
    example = torch.randint(0, 20, (3, 6))
    model = ps.models.SpikeSlabGaussian(net, example, num_data=20)
    assert [group.name for group in model.graph if group.prunable] == ["f"]
    posterior = ps.Posterior(model, ps.guides.for_model(model))
    assert posterior.predict(example, 2).shape == (2, 3, 20)


def test_nothing_to_prune_is_said_at_construction():
    spectral = nn.utils.parametrizations.spectral_norm
    net = nn.Sequential(spectral(nn.Linear(3, 8)), nn.ReLU(), nn.Linear(8, 2))
    with pytest.raises(ValueError, match=r"nothing of Sequential can be pruned.*parametrisation"):
        ps.models.SpikeSlabGaussian(net, torch.randn(4, 3), num_data=20)


def test_an_operation_of_ones_own():
    @torch.library.custom_op("pyro_sparse_tests::twice", mutates_args=())
    def twice(x: torch.Tensor) -> torch.Tensor:
        return 2 * x

    twice.register_fake(lambda x: torch.empty_like(x))
    net = linear(lambda s, x: s.b(torch.ops.pyro_sparse_tests.twice(s.a(x))))
    assert "'pyro_sparse_tests" in groups(net, x)["a"].reason
    register(torch.ops.pyro_sparse_tests.twice, operation=Pointwise())
    assert groups(net, x)["a"].prunable
