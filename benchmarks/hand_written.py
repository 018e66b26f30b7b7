"""Networks of the kinds that people write by hand, small and with random weights.

Each is a function of the module and its inputs, with the example rows and the layers beside it: the
forward pass of a class made of them. `NETWORKS` maps a name to a function that returns such a
network and its example: a tensor, a tuple of positional inputs or a dictionary.
"""

# ruff: noqa: D103 (names say it)

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm, weight_norm

NETWORKS: dict[str, Callable[[], tuple[nn.Module, Any]]] = {}

BATCH = 4
Linear, Conv = nn.Linear, nn.Conv2d


def rows(*shape: int) -> Callable[[], Tensor]:
    """Standard normal inputs."""
    return lambda: torch.randn(BATCH, *shape)


def whole(high: int, *shape: int) -> Callable[[], Tensor]:
    """Numbers from 0 to below ``high``: categories, words."""
    return lambda: torch.randint(high, (BATCH, *shape))


def positive(*shape: int) -> Callable[[], Tensor]:
    """Inputs of which a logarithm can be taken."""
    return lambda: torch.rand(BATCH, *shape) + 0.1


def written(example: Any, **parts: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register a forward pass.

    Args:
        example: makes the inputs: a function, a tuple or dictionary of such.
        parts: layers and tensors by attribute name: ``(class, *arguments)``, or a function.
    """

    def register(forward: Callable[..., Any]) -> Callable[..., Any]:
        def make() -> tuple[nn.Module, Any]:
            kind = type(forward.__name__.title().replace("_", ""), (nn.Module,), {})
            kind.forward = forward
            net = kind()
            for name, part in parts.items():
                value = part[0](*part[1:]) if isinstance(part, tuple) else part()
                if isinstance(value, Tensor) and not isinstance(value, nn.Parameter):
                    net.register_buffer(name, value)
                else:
                    setattr(net, name, value)
            return net.eval(), _made(example)

        NETWORKS[forward.__name__.replace("_", " ")] = make
        return forward

    return register


def _made(example: Any) -> Any:
    if isinstance(example, tuple):
        return tuple(_made(part) for part in example)
    if isinstance(example, dict):
        return {name: _made(part) for name, part in example.items()}
    return example()


def parameter(*shape: int) -> Callable[[], nn.Parameter]:
    """A parameter of the network itself."""
    return lambda: nn.Parameter(torch.randn(*shape) / math.sqrt(shape[-1]))


def block(inputs: int, outputs: int, stride: int = 1) -> nn.Sequential:
    """Convolution, normalisation, ReLU."""
    return nn.Sequential(
        Conv(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()
    )


# -- vectors ---------------------------------------------------------------------------------------


@written(rows(8), a=(Linear, 8, 16), b=(Linear, 16, 12), o=(Linear, 12, 3))
def perceptron(self, x):
    return self.o(torch.tanh(self.b(F.relu(self.a(x)))))


@written(rows(8), a=(Linear, 8, 32), o=(Linear, 16, 3))
def gated_linear_unit(self, x):
    return self.o(F.glu(self.a(x), -1))


@written(rows(8), a=(Linear, 8, 16), g=(Linear, 8, 16), o=(Linear, 16, 3))
def gated_by_a_second_layer(self, x):
    return self.o(self.a(x) * torch.sigmoid(self.g(x)))


@written(
    rows(8), gate=(Linear, 8, 32, False), up=(Linear, 8, 32, False), down=(Linear, 32, 8, False)
)
def swiglu(self, x):
    return self.down(F.silu(self.gate(x)) * self.up(x))


@written(
    rows(8),
    stem=(Linear, 8, 16),
    blocks=lambda: nn.ModuleList(
        nn.Sequential(nn.LayerNorm(16), Linear(16, 32), nn.GELU(), Linear(32, 16)) for _ in range(3)
    ),
    o=(Linear, 16, 3),
)
def residual_mlp(self, x):
    x = self.stem(x)
    for layer in self.blocks:
        x = x + layer(x)
    return self.o(x)


@written(rows(8), t=(Linear, 8, 8), h=(Linear, 8, 8), o=(Linear, 8, 3))
def highway(self, x):
    gate = torch.sigmoid(self.t(x))
    return self.o(gate * F.relu(self.h(x)) + (1 - gate) * x)


@written(rows(8), a=(Linear, 8, 20), o=(Linear, 10, 3))
def maxout(self, x):
    return self.o(self.a(x).reshape(x.shape[0], 10, 2).max(-1).values)


@written(rows(8), a=(Linear, 8, 16), b=(Linear, 8, 16), o=(Linear, 16, 3))
def larger_of_two(self, x):
    return self.o(torch.maximum(self.a(x), self.b(x)))


@written(rows(8), a=(Linear, 8, 16), o=(Linear, 16, 3))
def leaky_by_where(self, x):
    h = self.a(x)
    return self.o(torch.where(h > 0, h, 0.1 * h))


@written(positive(8), a=(Linear, 8, 16), o=(Linear, 16, 3))
def logarithms(self, x):
    return self.o(torch.erf(self.a(torch.log(x))))


@written(rows(8), mean=(torch.zeros, 8), std=(torch.ones, 8), a=(Linear, 8, 16), o=(Linear, 16, 3))
def standardising(self, x):
    return self.o(torch.relu(self.a((x - self.mean) / self.std)))


@written(rows(8), index=lambda: torch.tensor([1, 3, 5]), a=(Linear, 3, 16), o=(Linear, 16, 3))
def chosen_columns(self, x):
    return self.o(torch.relu(self.a(x[:, self.index])))


@written(rows(8), a=(Linear, 8, 16), b=(Linear, 24, 16), c=(Linear, 40, 16), o=(Linear, 56, 3))
def dense_mlp(self, x):
    for layer in (self.a, self.b, self.c):
        x = torch.cat([x, torch.relu(layer(x))], 1)
    return self.o(x)


@written(
    rows(8),
    experts=lambda: nn.ModuleList(
        nn.Sequential(Linear(8, 16), nn.ReLU(), Linear(16, 3)) for _ in range(4)
    ),
    gate=(Linear, 8, 4),
)
def mixture_of_experts(self, x):
    weights = self.gate(x).softmax(-1)
    outputs = torch.stack([expert(x) for expert in self.experts], -1)
    return (outputs * weights.unsqueeze(1)).sum(-1)


@written(rows(8), a=(Linear, 8, 16), mean=(Linear, 16, 1), scale=(Linear, 16, 1))
def mean_and_scale(self, x):
    h = torch.relu(self.a(x))
    return {"mean": self.mean(h), "scale": F.softplus(self.scale(h))}


@written(
    rows(8),
    body=lambda: nn.Sequential(Linear(8, 16), nn.ReLU()),
    p=(Linear, 16, 3),
    v=(Linear, 16, 1),
)
def policy_and_value(self, x):
    h = self.body(x)
    return self.p(h), self.v(h)


@written(rows(8), v=(Linear, 16, 1), a=(Linear, 16, 4), body=(Linear, 8, 16))
def duelling(self, x):
    h = F.relu(self.body(x))
    advantage = self.a(h)
    return self.v(h) + advantage - advantage.mean(1, keepdim=True)


@written(rows(8), e=(Linear, 8, 16), z=(Linear, 16, 4), d=(Linear, 4, 16), o=(Linear, 16, 8))
def autoencoder(self, x):
    return self.o(torch.relu(self.d(self.z(torch.relu(self.e(x))))))


@written(rows(8), e=(Linear, 8, 16), z=(Linear, 16, 8), d=(Linear, 4, 16), o=(Linear, 16, 8))
def variational_autoencoder(self, x):
    mean, scale = self.z(torch.relu(self.e(x))).chunk(2, -1)
    noise = torch.randn_like(mean) if self.training else torch.zeros_like(mean)
    return self.o(torch.relu(self.d(mean + noise * scale.exp())))


@written(
    rows(8), a=(Linear, 8, 16), drop=(nn.Dropout, 0.3), n=(nn.BatchNorm1d, 16), o=(Linear, 16, 3)
)
def normalised_with_dropout(self, x):
    return self.o(self.drop(torch.relu(self.n(self.a(x)))))


@written(rows(8), a=lambda: weight_norm(Linear(8, 16)), o=(Linear, 16, 3))
def weight_normed(self, x):
    return self.o(torch.relu(self.a(x)))


@written(rows(8), a=lambda: spectral_norm(Linear(8, 16)), b=(Linear, 16, 12), o=(Linear, 12, 3))
def spectral_normed(self, x):
    return self.o(torch.relu(self.b(torch.relu(self.a(x)))))


@written(rows(8), w=parameter(16, 8), b=parameter(16), v=parameter(3, 16))
def own_matrices(self, x):
    return F.relu(x @ self.w.t() + self.b) @ self.v.t()


@written(rows(8), w=parameter(16, 8), v=parameter(3, 16))
def einsum_matrices(self, x):
    return torch.einsum("bh,oh->bo", torch.einsum("bi,hi->bh", x, self.w).relu(), self.v)


@written(rows(8), a=(Linear, 8, 16), scale=parameter(16), shift=parameter(16), o=(Linear, 16, 3))
def scaled_and_shifted(self, x):
    return self.o(torch.relu(self.a(x)) * self.scale + self.shift)


@written(rows(4), f=(torch.randn, 4, 6), a=(Linear, 12, 16), o=(Linear, 16, 3))
def fourier_features(self, x):
    angles = 2 * math.pi * x @ self.f
    return self.o(torch.sin(self.a(torch.cat([angles.sin(), angles.cos()], -1))))


@written(rows(8), a=(Linear, 8, 16), b=(Linear, 16, 16), o=(Linear, 16, 3))
def applied_three_times(self, x):
    h = torch.relu(self.a(x))
    for _ in range(3):
        h = torch.relu(self.b(h)) + h
    return self.o(h)


@written(rows(8), c=(torch.randn, 6, 8), o=(Linear, 6, 3))
def radial_basis(self, x):
    return self.o(torch.exp(-(x.unsqueeze(1) - self.c).pow(2).sum(-1)))


@written(
    rows(8),
    a=(Linear, 8, 16),
    mask=lambda: (torch.rand(16, 16) > 0.5).float(),
    b=(Linear, 16, 16),
    o=(Linear, 16, 3),
)
def masked_layer(self, x):
    h = torch.relu(self.a(x))
    return self.o(torch.relu(F.linear(h, self.b.weight * self.mask, self.b.bias)))


# -- several inputs, categories --------------------------------------------------------------------


@written((rows(8), rows(8)), tower=lambda: nn.Sequential(Linear(8, 16), nn.ReLU(), Linear(16, 12)))
def siamese(self, first, second):
    return F.cosine_similarity(self.tower(first), self.tower(second), dim=1)


@written((rows(8), rows(5)), a=(Linear, 8, 16), b=(Linear, 5, 16), o=(Linear, 32, 3))
def two_towers(self, image, table):
    return self.o(torch.cat([self.a(image).relu(), self.b(table).relu()], 1))


@written((rows(8), rows(5)), a=(Linear, 8, 16), film=(Linear, 5, 32), o=(Linear, 16, 3))
def modulated(self, x, condition):
    scale, shift = self.film(condition).chunk(2, dim=1)
    return self.o(torch.relu(self.a(x) * (1 + scale) + shift))


@written({"wide": rows(8), "deep": rows(6)}, w=(Linear, 8, 3), a=(Linear, 6, 16), o=(Linear, 16, 3))
def wide_and_deep(self, wide, deep):
    return self.w(wide) + self.o(torch.relu(self.a(deep)))


@written(({"x": rows(8), "y": rows(5)},), a=(Linear, 8, 16), b=(Linear, 5, 16), o=(Linear, 16, 3))
def one_dictionary(self, batch):
    return {"logits": self.o(torch.relu(self.a(batch["x"]) + self.b(batch["y"])))}


@written(
    (rows(6), whole(5, 3)),
    tables=lambda: nn.ModuleList(nn.Embedding(5, 4) for _ in range(3)),
    a=(Linear, 18, 16),
    o=(Linear, 16, 3),
)
def categories_and_numbers(self, numbers, categories):
    parts = [table(categories[:, i]) for i, table in enumerate(self.tables)]
    return self.o(torch.relu(self.a(torch.cat([numbers, *parts], 1))))


@written(whole(30, 7), e=(nn.Embedding, 30, 12), a=(Linear, 12, 16), o=(Linear, 16, 3))
def bag_of_words(self, words):
    return self.o(torch.relu(self.a(self.e(words).mean(1))))


@written(
    (whole(30, 7), lambda: torch.arange(7).expand(BATCH, 7) < 5),
    e=(nn.Embedding, 30, 12),
    o=(Linear, 12, 3),
    a=(Linear, 12, 12),
)
def masked_mean_of_words(self, words, mask):
    h = torch.relu(self.a(self.e(words)))
    mask = mask.unsqueeze(-1).to(h.dtype)
    return self.o((h * mask).sum(1) / mask.sum(1))


@written(
    (whole(20, 1), whole(30, 1)),
    u=(nn.Embedding, 20, 8),
    i=(nn.Embedding, 30, 8),
    a=(Linear, 16, 12),
    o=(Linear, 12, 1),
)
def recommender(self, user, item):
    u, i = self.u(user).squeeze(1), self.i(item).squeeze(1)
    return (u * i).sum(1, keepdim=True) + self.o(torch.relu(self.a(torch.cat([u, i], 1))))


# -- images ----------------------------------------------------------------------------------------


@written(rows(3, 16, 16), a=(block, 3, 8), b=(block, 8, 12, 2), o=(Linear, 12, 3))
def convolutions(self, x):
    return self.o(F.adaptive_avg_pool2d(self.b(self.a(x)), 1).flatten(1))


@written(
    rows(1, 16, 16), a=(Conv, 1, 6, 5), b=(Conv, 6, 8, 3), f=(Linear, 32, 16), o=(Linear, 16, 3)
)
def lenet(self, x):
    x = F.max_pool2d(F.relu(self.a(x)), 2)
    x = F.max_pool2d(F.relu(self.b(x)), 2)
    return self.o(F.relu(self.f(x.view(x.size(0), -1))))


@written(
    rows(3, 16, 16),
    d1=(block, 3, 8),
    d2=(block, 8, 16),
    m=(block, 16, 24),
    t2=(nn.ConvTranspose2d, 24, 16, 2, 2),
    u2=(block, 32, 16),
    t1=(nn.ConvTranspose2d, 16, 8, 2, 2),
    u1=(block, 16, 8),
    o=(Conv, 8, 2, 1),
)
def u_net(self, x):
    first = self.d1(x)
    second = self.d2(F.max_pool2d(first, 2))
    x = self.m(F.max_pool2d(second, 2))
    x = self.u2(torch.cat([self.t2(x), second], 1))
    return self.o(self.u1(torch.cat([self.t1(x), first], 1)))


@written(rows(3, 16, 16), d=(block, 3, 8), m=(block, 8, 16), u=(block, 24, 8), o=(Conv, 8, 2, 1))
def u_net_by_interpolation(self, x):
    skip = self.d(x)
    x = self.m(F.max_pool2d(skip, 2))
    x = F.interpolate(x, size=skip.shape[-2:], mode="bilinear", align_corners=False)
    return self.o(self.u(torch.cat([x, skip], 1)))


@written(
    rows(3, 16, 16),
    stem=(block, 3, 8),
    a=(block, 8, 8),
    b=lambda: nn.Sequential(Conv(8, 8, 3, 1, 1), nn.BatchNorm2d(8)),
    short=lambda: nn.Sequential(Conv(8, 16, 1, 2), nn.BatchNorm2d(16)),
    c=(block, 8, 16, 2),
    o=(Linear, 16, 3),
)
def residual_convolutions(self, x):
    x = self.stem(x)
    x = F.relu(x + self.b(self.a(x)))
    x = F.relu(self.c(x) + self.short(x))
    return self.o(x.mean((2, 3)))


@written(
    rows(3, 16, 16),
    a=(block, 3, 8),
    d=(Conv, 8, 8, 3, 1, 1, 1, 8),
    p=(Conv, 8, 16, 1),
    o=(Linear, 16, 3),
)
def depthwise_separable(self, x):
    return self.o(torch.relu(self.p(F.relu6(self.d(self.a(x))))).mean((-2, -1)))


@written(
    rows(3, 16, 16),
    e=(block, 3, 24),
    d=(Conv, 24, 24, 3, 1, 1, 1, 24),
    s=(Conv, 24, 6, 1),
    x=(Conv, 6, 24, 1),
    p=(Conv, 24, 8, 1),
    o=(Linear, 8, 3),
)
def squeeze_and_excite(self, x):
    x = F.hardswish(self.d(self.e(x)))
    weight = F.hardsigmoid(self.x(F.relu(self.s(F.adaptive_avg_pool2d(x, 1)))))
    return self.o(self.p(x * weight).mean((2, 3)))


@written(
    rows(3, 16, 16),
    stem=(Conv, 3, 8, 3, 1, 1),
    layers=lambda: nn.ModuleList(
        nn.Sequential(nn.BatchNorm2d(8 + 4 * i), nn.ReLU(), Conv(8 + 4 * i, 4, 3, 1, 1))
        for i in range(3)
    ),
    o=(Linear, 20, 3),
)
def dense_block(self, x):
    features = [self.stem(x)]
    for layer in self.layers:
        features.append(layer(torch.cat(features, 1)))
    return self.o(torch.cat(features, 1).mean((2, 3)))


@written(
    rows(3, 16, 16),
    a=(Conv, 3, 4, 1),
    b=(Conv, 3, 4, 3, 1, 1),
    c=(Conv, 3, 4, 5, 1, 2),
    o=(Linear, 12, 3),
)
def inception(self, x):
    return self.o(torch.relu(torch.cat([self.a(x), self.b(x), self.c(x)], 1)).amax((2, 3)))


@written(rows(3, 16, 16), a=(block, 3, 8), c=(block, 8, 8), b=(block, 4, 4), o=(Linear, 12, 3))
def split_and_joined(self, x):
    first, second = self.c(self.a(x)).chunk(2, 1)
    return self.o(torch.cat([first, second, self.b(second)], 1).mean((2, 3)))


@written(rows(3, 16, 16), a=(block, 3, 8), g=(Conv, 8, 16, 3, 1, 1, 1, 4), o=(Linear, 16, 3))
def grouped_convolution(self, x):
    return self.o(torch.relu(self.g(self.a(x))).mean((2, 3)))


@written(
    rows(3, 16, 16),
    a=(block, 3, 8),
    g=(Conv, 8, 8, 1, 1, 0, 1, 2),
    d=(Conv, 8, 8, 3, 1, 1, 1, 8),
    o=(Linear, 8, 3),
)
def shuffled_channels(self, x):
    x = self.g(self.a(x))
    batch, channels, height, width = x.shape
    x = x.view(batch, 2, channels // 2, height, width).transpose(1, 2).reshape(x.shape)
    return self.o(torch.relu(self.d(x)).mean((2, 3)))


@written(
    rows(3, 16, 16), a=(block, 3, 8), n=(nn.GroupNorm, 2, 8), b=(Conv, 8, 16, 3), o=(Linear, 16, 3)
)
def group_norm(self, x):
    return self.o(F.silu(self.b(self.n(self.a(x)))).mean((2, 3)))


@written(
    rows(3, 16, 16),
    a=(Conv, 3, 8, 3),
    n=(nn.InstanceNorm2d, 8),
    b=(Conv, 8, 8, 3, 1, "same"),
    o=(Linear, 8, 3),
)
def instance_norm(self, x):
    return self.o(F.leaky_relu(self.b(F.elu(self.n(self.a(x)))), 0.2).mean((2, 3)))


@written(rows(3, 8, 8), a=(block, 3, 8), b=(Conv, 8, 12, 3, 1, 1), s=(nn.PixelShuffle, 2))
def super_resolution(self, x):
    return self.s(self.b(self.a(x))) + F.interpolate(x, scale_factor=2, mode="nearest")


@written(
    rows(3, 16, 16),
    d=(block, 3, 8),
    q=(Conv, 8, 4, 1),
    k=(Conv, 8, 4, 1),
    v=(Conv, 8, 8, 1),
    o=(Linear, 8, 3),
)
def convolutional_attention(self, x):
    x = F.max_pool2d(self.d(x), 4)
    q, k, v = (layer(x).flatten(2) for layer in (self.q, self.k, self.v))
    weights = (q.transpose(1, 2) @ k).softmax(-1)
    return self.o((x.flatten(2) + v @ weights.transpose(1, 2)).mean(2))


@written(
    rows(3, 4, 8, 8),
    a=(nn.Conv3d, 3, 6, 3, 1, 1),
    b=(nn.Conv3d, 6, 8, 3),
    n=(nn.BatchNorm3d, 8),
    o=(Linear, 8, 3),
)
def volumes(self, x):
    return self.o(torch.relu(self.n(self.b(torch.relu(self.a(x))))).mean((2, 3, 4)))


@written(
    rows(12),
    f=(Linear, 12, 64),
    t=(nn.ConvTranspose2d, 16, 8, 4, 2, 1),
    n=(nn.BatchNorm2d, 8),
    o=(nn.ConvTranspose2d, 8, 1, 4, 2, 1),
)
def generator(self, z):
    x = F.relu(self.f(z)).view(-1, 16, 2, 2)
    return torch.tanh(self.o(F.relu(self.n(self.t(x)))))


# -- sequences -------------------------------------------------------------------------------------


@written(
    rows(10, 6), r=lambda: nn.LSTM(6, 12, batch_first=True), a=(Linear, 12, 16), o=(Linear, 16, 3)
)
def lstm(self, x):
    outputs, (_hidden, _cell) = self.r(x)
    return self.o(torch.relu(self.a(outputs[:, -1])))


@written(
    rows(10, 6), r=lambda: nn.GRU(6, 12, batch_first=True, bidirectional=True), o=(Linear, 24, 3)
)
def bidirectional_gru(self, x):
    return self.o(self.r(x)[0].mean(1))


@written(
    whole(30, 9),
    e=(nn.Embedding, 30, 8),
    r=lambda: nn.LSTM(8, 12, num_layers=2, batch_first=True),
    o=(Linear, 12, 30),
)
def language_model(self, words):
    return self.o(self.r(self.e(words))[0])


@written(rows(6, 5), i=(Linear, 5, 12), h=(Linear, 12, 12), o=(Linear, 12, 3))
def recurrence_by_hand(self, x):
    h = torch.zeros(x.shape[0], 12, dtype=x.dtype, device=x.device)
    for step in x.unbind(1):
        h = torch.tanh(self.i(step) + self.h(h))
    return self.o(h)


@written(
    rows(4, 20), a=(nn.Conv1d, 4, 8, 3, 1, 0, 2), b=(nn.Conv1d, 8, 8, 3, 1, 0, 4), o=(Linear, 8, 3)
)
def temporal_convolutions(self, x):
    h = F.relu(self.a(F.pad(x, (4, 0))))
    h = F.relu(self.b(F.pad(h, (8, 0)))) + h
    return self.o(h[:, :, -1])


@written(
    rows(4, 20),
    f=(nn.Conv1d, 4, 8, 2),
    g=(nn.Conv1d, 4, 8, 2),
    r=(nn.Conv1d, 8, 4, 1),
    o=(Linear, 4, 3),
)
def wavenet(self, x):
    h = torch.tanh(self.f(F.pad(x, (1, 0)))) * torch.sigmoid(self.g(F.pad(x, (1, 0))))
    return self.o((x + self.r(h)).mean(-1))


@written(
    rows(6, 16),
    q=(Linear, 16, 16),
    k=(Linear, 16, 16),
    v=(Linear, 16, 16),
    p=(Linear, 16, 16),
    o=(Linear, 16, 3),
)
def attention_by_hand(self, x):
    batch, length, _ = x.shape
    q, k, v = (
        layer(x).view(batch, length, 4, 4).transpose(1, 2) for layer in (self.q, self.k, self.v)
    )
    weights = (q @ k.transpose(-2, -1) / 2).softmax(-1)
    return self.o(self.p((weights @ v).transpose(1, 2).reshape(batch, length, 16)).mean(1))


@written(rows(6, 16), qkv=(Linear, 16, 48), p=(Linear, 16, 16), o=(Linear, 16, 3))
def attention_in_one_matrix(self, x):
    batch, length, _width = x.shape
    qkv = self.qkv(x).reshape(batch, length, 3, 4, 4).permute(2, 0, 3, 1, 4)
    h = F.scaled_dot_product_attention(*qkv.unbind(0))
    return self.o(self.p(h.transpose(1, 2).flatten(2)).mean(1))


@written(rows(6, 16), q=(Linear, 16, 16), k=(Linear, 16, 16), v=(Linear, 16, 16), o=(Linear, 16, 3))
def attention_by_einsum(self, x):
    q, k, v = (layer(x).unflatten(-1, (4, 4)) for layer in (self.q, self.k, self.v))
    weights = torch.einsum("bihd,bjhd->bhij", q, k).div(2).softmax(-1)
    return self.o(torch.einsum("bhij,bjhd->bihd", weights, v).flatten(2).mean(1))


@written(rows(6, 16), m=lambda: nn.MultiheadAttention(16, 4, batch_first=True), o=(Linear, 16, 3))
def multihead_attention(self, x):
    return self.o((x + self.m(x, x, x, need_weights=False)[0]).mean(1))


@written(
    rows(6, 16),
    t=lambda: nn.TransformerEncoder(
        nn.TransformerEncoderLayer(16, 4, 32, 0.0, batch_first=True), 2, enable_nested_tensor=False
    ),
    o=(Linear, 16, 3),
)
def transformer_encoder(self, x):
    return self.o(self.t(x).mean(1))


@written(
    whole(30, 8),
    e=(nn.Embedding, 30, 16),
    p=parameter(1, 8, 16),
    n=(nn.LayerNorm, 16),
    qkv=(Linear, 16, 48),
    a=(Linear, 16, 32),
    b=(Linear, 32, 16),
    o=(Linear, 16, 30),
)
def causal_transformer(self, words):
    x = self.e(words) + self.p
    batch, length, width = x.shape
    q, k, v = (
        part.view(batch, length, 4, 4).transpose(1, 2)
        for part in self.qkv(self.n(x)).split(width, 2)
    )
    mask = torch.ones(length, length, dtype=torch.bool, device=x.device).tril()
    weights = (q @ k.mT / 2).masked_fill(~mask, float("-inf")).softmax(-1)
    x = x + (weights @ v).transpose(1, 2).reshape(batch, length, width)
    return self.o(x + self.b(F.gelu(self.a(x))))


@written(rows(5, 8), a=(Linear, 8, 16), w=(Linear, 16, 1), o=(Linear, 16, 3))
def attention_pooling(self, x):
    h = torch.relu(self.a(x))
    return self.o((h * self.w(torch.tanh(h)).softmax(1)).sum(1))


@written(
    rows(7, 8),
    phi=lambda: nn.Sequential(Linear(8, 16), nn.ReLU(), Linear(16, 12)),
    rho=(Linear, 12, 3),
)
def deep_set(self, x):
    return self.rho(torch.relu(self.phi(x).sum(dim=1)))


@written(
    rows(7, 8),
    t=(Linear, 7, 12),
    u=(Linear, 12, 7),
    c=(Linear, 8, 16),
    d=(Linear, 16, 8),
    o=(Linear, 8, 3),
)
def mlp_mixer(self, x):
    x = x + self.u(F.gelu(self.t(x.transpose(1, 2)))).transpose(1, 2)
    return self.o((x + self.d(F.gelu(self.c(x)))).mean(1))


# -- graphs ----------------------------------------------------------------------------------------


@written(rows(7, 5), A=lambda: torch.rand(7, 7).softmax(1), a=(Linear, 5, 16), b=(Linear, 16, 3))
def graph_convolution(self, x):
    return (self.A @ self.b(torch.relu(self.A @ self.a(x)))).mean(1)


@written(
    (rows(7, 5), lambda: torch.rand(BATCH, 7, 7)),
    a=(Linear, 5, 16),
    s=(Linear, 5, 16),
    o=(Linear, 16, 3),
)
def graph_with_given_edges(self, x, edges):
    return self.o(torch.relu(torch.bmm(edges, self.a(x)) + self.s(x)).amax(1))


@written(rows(7, 5), w=(Linear, 5, 16), s=(Linear, 16, 1), t=(Linear, 16, 1), o=(Linear, 16, 3))
def graph_attention(self, x):
    h = self.w(x)
    scores = F.leaky_relu(self.s(h) + self.t(h).transpose(1, 2), 0.2)
    return self.o(F.elu(scores.softmax(-1) @ h).mean(1))


@written(
    rows(7, 5),
    source=lambda: torch.tensor([0, 1, 2, 3, 4, 5]),
    target=lambda: torch.tensor([1, 2, 3, 4, 5, 6]),
    m=(Linear, 10, 16),
    u=(Linear, 21, 12),
    o=(Linear, 12, 3),
)
def message_passing(self, x):
    messages = torch.relu(self.m(torch.cat([x[:, self.source], x[:, self.target]], -1)))
    zero = torch.zeros(x.shape[0], 7, 16, dtype=x.dtype)
    received = zero.index_add(1, self.target, messages)
    return self.o(torch.relu(self.u(torch.cat([x, received], -1))).mean(1))


# -- written for a reader, not for a tracer --------------------------------------------------------


@written(rows(8), a=(Linear, 8, 16), o=(Linear, 16, 3))
def checks_its_input(self, x):
    assert x.ndim == 2, f"expected a matrix, got {x.ndim} dimensions"
    if x.shape[-1] != self.a.in_features or x.dtype not in (torch.float32, torch.float64):
        raise ValueError("expected eight numbers a row")
    return self.o(torch.relu(self.a(x)))


@written(rows(8), a=(Linear, 8, 16), b=(Linear, 16, 16), o=(Linear, 16, 3))
def optional_arguments(self, x, mask=None, *, features=False, scale=1.0):
    h = torch.relu(self.a(x))
    if mask is not None:
        h = h * mask
    h = torch.relu(self.b(h)) * scale
    return h if features else self.o(h)


@written(
    rows(8),
    layers=lambda: nn.ModuleDict({"a": Linear(8, 16), "b": Linear(16, 16)}),
    o=(Linear, 16, 3),
)
def layers_by_name(self, x):
    for name, layer in self.layers.items():
        x = torch.relu(layer(x)) if name == "a" else x + F.silu(layer(x))
    return self.o(x)


@written(
    rows(3, 16, 16),
    a=(Conv, 3, 8, 3, 2, 1),
    t=parameter(1, 1, 8),
    p=parameter(1, 65, 8),
    n=(nn.LayerNorm, 8),
    u=(Linear, 8, 16),
    d=(Linear, 16, 8),
    o=(Linear, 8, 3),
)
def class_token(self, x):
    x = self.a(x).flatten(2).transpose(1, 2)
    x = torch.cat([self.t.expand(x.shape[0], -1, -1), x], dim=1) + self.p
    x = x + self.d(F.gelu(self.u(self.n(x))))
    return self.o(x[:, 0])


@written(
    rows(8),
    frozen=lambda: Linear(8, 16).requires_grad_(False),
    a=(Linear, 16, 12),
    o=(Linear, 12, 3),
)
def head_on_a_frozen_body(self, x):
    return self.o(torch.relu(self.a(torch.relu(self.frozen(x)))))
