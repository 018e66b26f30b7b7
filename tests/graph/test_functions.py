"""Layers written as functions, and attention with masks: removed exactly, or with a reason."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from pyro_sparse import guides, models, nets
from pyro_sparse.export import compact, load, save
from pyro_sparse.graph import groups
from pyro_sparse.posterior import Posterior


class Own(nn.Module):
    """A linear layer of its own making; σ(0) = ½ has to be folded."""

    def __init__(self, inputs, outputs, bias=True):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(outputs, inputs) / inputs**0.5)
        self.bias = nn.Parameter(torch.randn(outputs)) if bias else None

    def forward(self, x):
        return F.linear(x, self.weight, self.bias).sigmoid()


class Functions(nn.Module):
    """Convolutions by position and by name, and a layer normalisation."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6, 3, 3, 3) / 5)
        self.bias = nn.Parameter(torch.randn(6))
        self.second_weight = nn.Parameter(torch.randn(4, 6, 3, 3) / 7)
        self.norm_weight = nn.Parameter(torch.randn(64))
        self.norm_bias = nn.Parameter(torch.randn(64))
        self.out = nn.Linear(4 * 64, 3)

    def forward(self, x):
        x = F.conv2d(x, self.weight, self.bias, padding=1).tanh()
        x = F.relu(F.conv2d(x, self.second_weight, None, 1, 1)).flatten(2)
        return self.out(F.layer_norm(x, (64,), self.norm_weight, self.norm_bias).flatten(1))


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(7, 7)), nn.Parameter(torch.randn(7))
        self.first, self.out = nn.Linear(5, 7), nn.Linear(7, 3)

    def forward(self, x):
        x = self.first(x)
        for _ in range(2):
            x = torch.relu(F.linear(x, self.weight, self.bias))
        return self.out(x)


class Masked(nn.Module):
    """A causal attention: by a mask that is a buffer, or by its flag."""

    def __init__(self, how):
        super().__init__()
        self.how = how
        self.qkv, self.out = nn.Linear(6, 3 * 4 * 5), nn.Linear(20, 6)
        self.head = nn.Linear(6, 2)
        mask = torch.zeros(7, 7).masked_fill(torch.ones(7, 7).triu(1).bool(), -torch.inf)
        self.register_buffer("mask", mask.expand(4, 7, 7) if how == "each" else mask)

    def forward(self, x):
        parts = self.qkv(x).reshape(-1, 7, 3, 4, 5).permute(2, 0, 3, 1, 4)
        query, key, value = parts[0], parts[1], parts[2]
        if self.how == "flag":
            attended = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        elif self.how == "position":
            attended = F.scaled_dot_product_attention(query, key, value, self.mask)
        else:
            attended = F.scaled_dot_product_attention(query, key, value, attn_mask=self.mask)
        return self.head(self.out(attended.transpose(1, 2).flatten(2)).relu().mean(1))


def check(net, x, tmp_path):
    """Compact equals masked for random masks, costs what is said, and can be written and read."""
    model = models.SpikeSlabGaussian(net.eval(), x, num_data=10)
    posterior = Posterior(model, guides.for_model(model))
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        keep = {}
        for group in model.graph:
            if group.prunable and group.writers:
                keep[group.name] = torch.rand(group.size, generator=generator) < 0.5
                keep[group.name][seed % group.size] = True
        small = compact(posterior, keep)
        for inputs in (x, x[:1]):
            with torch.no_grad():
                difference = (small(inputs) - posterior.masked(inputs, keep)).abs().max()
            assert float(difference) <= 1e-5
        assert nets.count_macs(small, x) == posterior.macs(keep)
    assert nets.count_parameters(small) < nets.count_parameters(net)
    save(small, tmp_path / "small", example=x)
    torch.testing.assert_close(load(tmp_path / "small")(x), small(x))
    return model.graph


def test_linear_functions(tmp_path):
    net = nn.Sequential(Own(5, 9), Own(9, 8, bias=False), nn.Linear(8, 3))
    graph = check(net, torch.randn(4, 5), tmp_path)
    assert [group.name for group in graph if group.prunable] == ["input", "0", "1"]
    # The network itself is as it was.
    assert [name for name, _ in net.named_modules()] == ["", "0", "1", "2"]


class Shifted(nn.Linear):
    """A subclass of a layer, whose forward is followed."""

    def forward(self, x):
        return super().forward(x) + 1


def test_a_subclass_of_a_layer(tmp_path):
    net = nn.Sequential(Shifted(5, 9), nn.ReLU(), nn.Linear(9, 3))
    assert check(net, torch.randn(4, 5), tmp_path)["0"].prunable


def test_other_functions(tmp_path):
    graph = check(Functions(), torch.randn(4, 3, 8, 8), tmp_path)
    prunable = {group.name for group in graph if group.prunable and group.writers}
    # What a layer normalisation sees stays, whether it is a module or a function.
    assert prunable == {"weight"}


class Normed(nn.Module):
    """A batch normalisation of its own making behind a layer; σ(0) = ½ has to be folded."""

    LAYERS = {"linear": (2, nn.Linear), "conv1d": (3, nn.Conv1d), "conv2d": (4, nn.Conv2d)}

    def __init__(self, kind, size=6, training=False, activation=None):
        super().__init__()
        self.dims, layer = self.LAYERS[kind]
        self.layer = layer(3, size) if kind == "linear" else layer(3, size, 3, padding=1)
        self.norm_weight = nn.Parameter(torch.rand(size) + 0.5)
        self.norm_bias = nn.Parameter(torch.randn(size))
        self.register_buffer("mean", torch.randn(size))
        self.register_buffer("variance", torch.rand(size) + 0.5)
        self.always, self.activation = training, activation
        self.out = nn.Linear(size, 3)

    def forward(self, x):
        x = self.layer(x)
        x = F.batch_norm(
            x if self.activation is None else self.activation(x),
            self.mean,
            self.variance,
            self.norm_weight,
            bias=self.norm_bias,
            training=self.always or self.training,
            eps=1e-3,
        ).sigmoid()
        return self.out(x.flatten(2).mean(2) if self.dims > 2 else x)


@pytest.mark.parametrize("kind", Normed.LAYERS)
def test_batch_normalisations(kind, tmp_path):
    net = Normed(kind)
    x = torch.randn(4, 3, *[5] * (net.dims - 2))
    before = {name: value.clone() for name, value in net.state_dict().items()}
    graph = check(net, x, tmp_path)
    assert graph["layer"].prunable
    assert net.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    model = models.SpikeSlabGaussian(net, x, num_data=10)
    posterior = Posterior(model, guides.for_model(model))
    keep = {"layer": torch.arange(6) % 2 == 0}
    folded = compact(posterior, keep, fold=True)
    assert not any(isinstance(part, nn.modules.batchnorm._BatchNorm) for part in folded.modules())
    torch.testing.assert_close(folded(x), posterior.masked(x, keep).detach())


def test_a_batch_normalisation_by_the_batch_keeps_its_channels():
    group = groups(Normed("conv2d", training=True), torch.zeros(2, 3, 5, 5))["layer"]
    assert "running statistics" in group.reason


def test_a_batch_normalisation_behind_an_activation(tmp_path):
    graph = check(Normed("conv2d", activation=nn.ReLU()), torch.randn(4, 3, 5, 5), tmp_path)
    assert graph["layer"].prunable


def test_a_weight_that_is_used_twice(tmp_path):
    graph = check(Twice(), torch.randn(4, 5), tmp_path)
    assert graph["first"].shared


def test_a_weight_of_another_name(tmp_path):
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.w, self.out = nn.Parameter(torch.randn(7, 5)), nn.Linear(7, 3)

        def forward(self, x):
            return self.out(F.relu(F.linear(x, self.w)))

    assert check(Odd(), torch.randn(4, 5), tmp_path)["w"].prunable


@pytest.mark.parametrize("how", ["flag", "position", "name"])
def test_a_mask_for_all_heads(how, tmp_path):
    graph = check(Masked(how), torch.randn(3, 7, 6), tmp_path)
    assert graph["qkv"].size == 4
    assert graph["qkv"].prunable


def test_a_mask_for_each_head_keeps_them():
    graph = groups(Masked("each"), torch.randn(3, 7, 6))
    assert not graph["qkv"].prunable
    assert "a mask for each head" in graph["qkv"].reason


@pytest.mark.parametrize("name", ["attn_mask", "key_padding_mask"])
def test_masks_of_torchs_attention(name, tmp_path):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = nn.MultiheadAttention(6, 2, batch_first=True)
            self.out = nn.Linear(6, 2)
            shape = (7, 7) if name == "attn_mask" else (2, 7)
            self.register_buffer("mask", torch.ones(shape, dtype=torch.bool).triu(1))

        def forward(self, x):
            mask = self.mask if name == "attn_mask" else self.mask[: len(x)]
            return self.out(self.attention(x, x, x, need_weights=False, **{name: mask})[0])

    if name == "attn_mask":
        assert check(Net(), torch.randn(2, 7, 6), tmp_path)["attention"].prunable
    else:  # torch repeats it for every head
        group = groups(Net().eval(), torch.randn(2, 7, 6))["attention"]
        assert "a mask for each head" in group.reason
