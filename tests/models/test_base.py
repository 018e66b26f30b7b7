"""What all models share: groups of any network, plain parameters in, errors before training."""

import copy
import math

import pyro
import pyro.distributions as dist
import pyro.poutine as poutine
import pytest
import torch
from torch import nn

from pyro_sparse import guides, likelihoods, models
from pyro_sparse.nets import lenet5_caffe, mlp

SPARSE = [
    models.SpikeSlabGaussian,
    models.SpikeSlabGroupLasso,
    models.SpikeSlabGroupHorseshoe,
]
ALL = [*SPARSE, models.Deterministic]


def sites(function, *args):
    """Names of the sample statements, in order; the data's plate left out."""
    if isinstance(function, models.Deterministic):  # a flat prior has no draws
        guide = poutine.trace(guides.for_model(function)).get_trace(*args)
        function = poutine.replay(function, trace=guide)
    trace = poutine.trace(function).get_trace(*args)
    return [
        name
        for name, site in trace.nodes.items()
        if site["type"] == "sample" and not poutine.util.site_is_subsample(site)
    ]


class Nested(nn.Module):
    """Dotted module names."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(3, 5), nn.ReLU())
        self.head = nn.ModuleDict({"hidden": nn.Linear(5, 4), "out": nn.Linear(4, 2)})

    def forward(self, x):
        return self.head["out"](self.head["hidden"](self.body(x)).tanh())


# -- sites ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("cls", SPARSE)
@pytest.mark.parametrize("prune_inputs", [False, True])
@pytest.mark.parametrize("likelihood", [likelihoods.Categorical, likelihoods.Normal])
def test_guide_has_the_sites_of_the_model_in_its_order(cls, prune_inputs, likelihood):
    x, y = torch.randn(4, 3), torch.randint(2, (4,))
    net = mlp([3, 5, 4, 2])
    if likelihood is likelihoods.Normal:
        net, y = mlp([3, 5, 4, 1]), torch.randn(4)
    model = cls(net, x, likelihood=likelihood(), num_data=9, prune_inputs=prune_inputs)
    guide = guides.for_model(model)
    assert [*sites(guide, x, y), "y"] == sites(model, x, y)
    # The stock check of both traces: same sites, shapes, order. It warns, so it fails.
    with pyro.validation_enabled():
        loss = pyro.infer.TraceMeanField_ELBO().loss(model, guide, x, y)
    assert math.isfinite(loss)


def test_dense_guide_has_the_sites_of_the_model():
    x, y = torch.randn(4, 3), torch.randint(2, (4,))
    model = models.Deterministic(mlp([3, 5, 2]), x, num_data=9)
    assert [*sites(guides.for_model(model), x, y), "y"] == sites(model, x, y)


@pytest.mark.parametrize("cls", ALL)
def test_dotted_names(cls):
    x = torch.randn(4, 3)
    model = cls(Nested(), x, num_data=9)
    guide = guides.for_model(model)
    rows = [name for name in sites(model, x) if name.endswith(".rows")]
    assert rows == ["body.0.rows", "head.hidden.rows", "head.out.rows"]
    assert [*sites(guide, x), "y"] == sites(model, x)
    assert {name for name, _ in model.net.named_buffers()} == {
        name for name, _ in Nested().named_parameters()
    }


@pytest.mark.parametrize("cls", ALL)
def test_convolutions(cls):
    x = torch.randn(3, 1, 28, 28)
    model = cls(lenet5_caffe(widths=(3, 4, 6)), x, num_data=9)
    assert {group.name: tuple(model.row_shape(group)) for group in model.layers} == {
        "conv1": (3, 26),
        "conv2": (4, 76),
        "fc1": (6, 65),
        "out": (10, 7),
    }
    output = model.run(x, model.initial_rows())
    assert torch.allclose(output, model.net(x))
    if cls is not models.Deterministic:
        assert model(x).shape == (3, 10)


@pytest.mark.parametrize(
    ("cls", "name"),
    [(models.SpikeSlabGroupLasso, "varsigma2"), (models.SpikeSlabGroupHorseshoe, "global_scale")],
)
def test_the_network_wide_scale_is_one_site(cls, name):
    x = torch.randn(4, 3)
    model = cls(mlp([3, 5, 4, 2]), x, num_data=9)
    assert sites(model, x).count(name) == 1
    unit_scale = {"varsigma2": "tau2", "global_scale": "local_scale"}[name]
    assert [s for s in sites(model, x) if s.endswith(f".{unit_scale}")] == [
        f"fc1.{unit_scale}",
        f"fc2.{unit_scale}",
    ]
    trace = poutine.trace(model).get_trace(x)
    assert trace.nodes[name]["value"].shape == ((2,) if name == "global_scale" else ())


# -- the network ---------------------------------------------------------------------------------


@pytest.mark.parametrize("cls", ALL)
def test_the_users_network_is_not_changed(cls):
    net, x = mlp([3, 5, 2]), torch.randn(4, 3)
    before = copy.deepcopy(net.state_dict())
    model = cls(net, x, num_data=9)
    guide = guides.for_model(model)
    elbo = pyro.infer.SVI(
        model, guide, pyro.optim.Adam({"lr": 0.1}), pyro.infer.TraceMeanField_ELBO()
    )
    elbo.step(x, torch.randint(2, (4,)))
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert len(list(net.parameters())) == 4
    assert net.training
    # Nothing in the model is trained: the guide holds the parameters.
    assert not list(model.parameters())


@pytest.mark.parametrize("cls", ALL)
@pytest.mark.parametrize("when", ["before", "after"])
def test_double_precision(cls, when):
    x, y = torch.randn(4, 3, dtype=torch.float64), torch.randint(2, (4,))
    net = mlp([3, 5, 2])
    if when == "before":
        model = cls(net.double(), x, num_data=9)
    else:
        model = cls(net, x.float(), num_data=9).to(torch.float64)
    guide = guides.for_model(model)
    assert {value.dtype for value in guide.parameters()} == {torch.float64}
    loss = pyro.infer.TraceMeanField_ELBO().differentiable_loss(model, guide, x, y)
    assert loss.dtype == torch.float64
    if cls is not models.Deterministic:
        assert model(x).dtype == torch.float64


@pytest.mark.parametrize("cls", ALL)
def test_state_dict_round_trip(cls):
    x = torch.randn(4, 3)
    options = {"prior_scale": 2.0} if cls is models.Deterministic else {"slab_scale": 2.0}
    first = cls(mlp([3, 5, 2]), x, num_data=9, output_scale=3.0, **options)
    second = cls(mlp([3, 5, 2]), x, num_data=9, **dict.fromkeys(options, 1.0))
    second.load_state_dict(first.state_dict())
    assert torch.equal(second.net(x), first.net(x))
    assert all(
        torch.equal(a, b)
        for a, b in zip(first.state_dict().values(), second.state_dict().values(), strict=True)
    )
    assert float(second.output_scale) == 3.0


def test_prior_draws_have_the_prior_inclusion_probability():
    model = models.SpikeSlabGaussian(
        mlp([2, 4000, 2]), torch.zeros(2, 2), num_data=9, inclusion_probability=0.3
    )
    included = (model.rows()["fc1"] != 0).any(-1)
    # 4 standard errors
    assert float(included.double().mean()) == pytest.approx(0.3, abs=4 * (0.21 / 4000) ** 0.5)


@pytest.mark.parametrize("cls", SPARSE)
def test_input_gate(cls):
    x = torch.randn(4, 6)
    net = mlp([6, 5, 2])
    assert cls(net, x, num_data=9).input_gate() is None
    model = cls(net, x, num_data=9, prune_inputs=True, input_inclusion_probability=0.2)
    trace = poutine.trace(model).get_trace(x)
    site = trace.nodes["input.gate"]
    assert set(site["value"].tolist()) <= {0.0, 1.0}
    # Included or not: a Bernoulli's log mass, with nothing from the point mass at 1.
    gate = torch.tensor([1.0, 0, 0, 1, 0, 0])
    expected = 2 * torch.tensor(0.2).log() + 4 * torch.tensor(0.8).log()
    assert torch.allclose(site["fn"].log_prob(gate), expected)
    # A feature that is off has no influence.
    rows = model.initial_rows()
    other = torch.where(gate.bool(), x, x + 10)
    assert torch.allclose(model.run(x, rows, gate), model.run(other, rows, gate))
    assert not torch.allclose(model.run(x, rows), model.run(other, rows))


def test_input_gate_on_channels():
    x = torch.randn(2, 3, 28, 28)
    net = lenet5_caffe(in_channels=3, widths=(2, 2, 3))
    model = models.SpikeSlabGaussian(net, x, num_data=9, prune_inputs=True)
    rows = model.initial_rows()
    gate = torch.tensor([1.0, 0.0, 1.0])
    expected = model.net(x * gate.reshape(3, 1, 1))
    assert torch.allclose(model.run(x, rows, gate), expected, atol=1e-6)


def test_constant_inclusion_probability():
    x = torch.zeros(2, 3)
    model = models.SpikeSlabGaussian(mlp([3, 5, 4, 2]), x, num_data=9, inclusion_probability=1e-4)
    assert model.inclusion_logits.sigmoid().tolist() == pytest.approx([1e-4] * 3)


# -- errors --------------------------------------------------------------------------------------


@pytest.mark.parametrize("cls", ALL)
def test_parameters_that_nothing_reads_are_left_alone(cls):
    net = mlp([3, 5, 2])
    net.register_parameter("unused", nn.Parameter(torch.full((2,), 7.0)))
    with pytest.warns(UserWarning, match="'unused' of .* not used by the forward pass"):
        model = cls(net, torch.randn(4, 3), num_data=9)
    assert "unused" in model.graph.ungrouped
    assert model.net.unused.tolist() == [7.0, 7.0]


def test_a_network_without_layers_is_refused():
    with pytest.raises(ValueError, match="at least one linear or convolution layer"):
        models.SpikeSlabGaussian(nn.Sequential(nn.Flatten()), torch.randn(4, 3), num_data=9)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_data": 0}, "num_data"),
        ({"num_data": float("nan")}, "num_data"),
        ({"inclusion_constant": -1.0}, "inclusion constant, got -1"),
        ({"inclusion_constant": float("nan")}, "inclusion constant"),
        ({"output_scale": 0.0}, "output_scale"),
        ({"slab_scale": -1.0}, "slab_scale"),
        ({"slab_scale": float("inf")}, "slab_scale"),
        ({"inclusion_probability": 0.0}, "inclusion_probability"),
        ({"inclusion_probability": 1.0}, "inclusion_probability"),
        ({"inclusion_probability": float("nan")}, "inclusion_probability"),
        ({"inclusion_probability": "layer-wise"}, "'layerwise', got 'layer-wise'"),
        ({"input_inclusion_probability": 1.5}, "input_inclusion_probability"),
    ],
)
@pytest.mark.parametrize("cls", SPARSE)
def test_numbers_out_of_range(cls, options, message):
    options = {"num_data": 9, **options}
    with pytest.raises(ValueError, match=message):
        cls(mlp([3, 5, 2]), torch.randn(4, 3), **options)


@pytest.mark.parametrize(
    ("cls", "option"),
    [
        (models.SpikeSlabGroupLasso, "varsigma2_shape"),
        (models.SpikeSlabGroupLasso, "varsigma2_rate"),
        (models.SpikeSlabGroupHorseshoe, "global_scale"),
        (models.SpikeSlabGroupHorseshoe, "local_scale"),
        (models.SpikeSlabGroupHorseshoe, "regularisation"),
        (models.Deterministic, "prior_scale"),
    ],
)
@pytest.mark.parametrize("value", [0.0, -2.0, float("nan")])
def test_scales_out_of_range(cls, option, value):
    with pytest.raises(ValueError, match=f"positive.* {option}"):
        cls(mlp([3, 5, 2]), torch.randn(4, 3), num_data=9, **{option: value})


class TestFixedLaws:
    """Priors without parents are kept from step to step, as long as they are true."""

    @staticmethod
    def law(model, x):
        return poutine.trace(model).get_trace(x).nodes["fc1.rows"]["fn"]

    def test_made_once(self):
        x = torch.randn(4, 3)
        model = models.SpikeSlabGaussian(mlp([3, 5, 2]), x, num_data=4)
        assert self.law(model, x) is self.law(model, x)

    def test_made_anew_when_a_constant_moves(self):
        x = torch.randn(4, 3)
        model = models.SpikeSlabGaussian(mlp([3, 5, 2]), x, num_data=4)
        before = self.law(model, x)
        model.slab_scale.fill_(3.0)
        slab = self.law(model, x).base_dist.slab.base_dist
        assert float(slab.scale[0, 0]) == 3.0
        assert self.law(model.double(), x.double()).base_dist.logits.dtype == torch.float64
        model.float()
        model.support.restrict({"fc1": torch.arange(5) > 1})
        assert isinstance(self.law(model, x).base_dist, dist.MaskedDistribution)
        assert before is not self.law(model, x)

    def test_a_copy_has_its_own(self):
        x = torch.randn(4, 3)
        model = models.SpikeSlabGaussian(mlp([3, 5, 2]), x, num_data=4)
        kept = self.law(model, x)
        assert self.law(copy.deepcopy(model), x) is not kept

    def test_a_scale_that_is_drawn_is_not_kept(self):
        class Hierarchical(models.SparseModel):
            def rows(self):
                scale = pyro.sample("scale", dist.HalfNormal(1.0))
                return {group.name: self.gaussian_rows(group, scale) for group in self.layers}

        x = torch.randn(4, 3)
        model = Hierarchical(mlp([3, 5, 2]), x, num_data=4)
        for _ in range(2):
            trace = poutine.trace(model).get_trace(x)
            normal = trace.nodes["fc1.rows"]["fn"].base_dist
            assert float(normal.scale[0, 0]) == float(trace.nodes["scale"]["value"])
