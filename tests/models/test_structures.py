"""All models on networks with streams, normalisations and attention."""

import pyro
import pytest
import torch
from torch import nn

import pyro_sparse as ps
from pyro_sparse import data, guides, models
from pyro_sparse.nets import resnet, vit

MODELS = [
    models.SpikeSlabGaussian,
    models.SpikeSlabGroupLasso,
    models.SpikeSlabGroupHorseshoe,
    models.ReducibleGaussian,
    models.GroupNormalJeffreys,
    models.GroupHorseshoe,
    models.TurboMarkov,
    models.Deterministic,
]
NETS = {
    "resnet-a": lambda: resnet(8, widths=(4, 6, 8), classes=3),
    "resnet-b": lambda: resnet(8, option="B", widths=(4, 6, 8), classes=3),
    "vit": lambda: vit(size=8, width=16, depth=1, heads=4, hidden=12, classes=3),
}


def images():
    return torch.randn(12, 3, 8, 8), torch.arange(12) % 3


def options(cls):
    spike = issubclass(cls, models.base.SpikeSlabModel)
    return {"inclusion_probability": 0.2} if spike else {}


@pytest.mark.parametrize("cls", [*MODELS, models.LogNormalNoise])
@pytest.mark.parametrize("net", NETS)
def test_train_prune_and_compare(cls, net):
    x, y = images()
    model = cls(NETS[net](), x, num_data=len(x), **options(cls))
    guide = guides.for_model(model)
    statistics = {n: b.clone() for n, b in model.net.named_buffers() if n.endswith("running_mean")}
    run = ps.fit(model, guide, data.Batches(x, y, 6), epochs=2, progress=False)
    assert run.history[-1]["loss"] < float("inf")
    # The network keeps its running statistics, and training moves them.
    assert bool(statistics) == (net != "vit")
    for name, before in statistics.items():
        assert not torch.equal(model.net.get_buffer(name), before)
    posterior = ps.Posterior(model, guide)
    keep = {}
    for group in posterior.prunable_groups():
        keep[group.name] = torch.rand(group.size) < 0.6
        keep[group.name][0] = True
    assert keep
    small = ps.compact(posterior, keep)
    with torch.no_grad():
        masked = posterior.masked(x, keep)
        assert (masked - small(x)).abs().max() <= 1e-5 * max(1, float(masked.abs().max()))
    # Neither prediction nor pruning moves them.
    moved = {name: model.net.get_buffer(name).clone() for name in statistics}
    posterior.predict(x, num_samples=2)
    assert all(torch.equal(model.net.get_buffer(name), value) for name, value in moved.items())


@pytest.mark.parametrize("cls", MODELS)
def test_guides_start_at_the_network(cls):
    x, _ = images()
    net = resnet(8, widths=(4, 6, 8), classes=3)
    with torch.no_grad():
        for module in net.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.weight.uniform_(0.5, 1.5)
                module.bias.normal_()
    model = cls(net, x, num_data=12, **options(cls))
    rows = guides.for_model(model).mean_rows()
    means = model.graph.parameters(rows)
    own = dict(net.named_parameters())
    assert means.keys() == own.keys()
    assert all(torch.allclose(means[name], own[name], atol=1e-5) for name in own)
    assert torch.allclose(
        ps.Posterior(model, guides.for_model(model)).masked(x), net.eval()(x), atol=1e-4
    )


def test_one_inclusion_governs_a_stream():
    x, y = images()
    model = models.SpikeSlabGroupLasso(resnet(8, option="B", widths=(4, 6, 8)), x, num_data=12)
    guide = guides.for_model(model)
    assert guide.inclusion_logits()["conv"].shape == (4,)
    rows = pyro.poutine.trace(model).get_trace(x).nodes["conv.rows"]["value"]
    writers = model.graph["conv"].writers
    assert [w.parameter for w in writers] == [
        *("conv.weight", "norm.weight", "norm.bias"),
        *("stage1.0.conv2.weight", "stage1.0.norm2.weight", "stage1.0.norm2.bias"),
    ]
    assert rows.shape == (4, 27 + 2 + 36 + 2)
    stock = pyro.infer.TraceMeanField_ELBO().loss(model, guide, x, y)
    assert stock == stock
