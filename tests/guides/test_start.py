"""A fresh guide is the network it was made from, and its options are what they say."""

import math

import pyro.poutine as poutine
import pytest
import torch
from pyro.distributions import Independent
from torch import nn

from pyro_sparse import guides, likelihoods, models
from pyro_sparse.distributions import RelaxedSpikeAndSlab, SpikeAndSlab, TiedNormal
from pyro_sparse.nets import lenet5_caffe, mlp

SPARSE = [
    models.SpikeSlabGaussian,
    models.SpikeSlabGroupLasso,
    models.SpikeSlabGroupHorseshoe,
]


def fresh(cls, net=None, example=None, prune_inputs=False, double=True, **options):
    net = mlp([3, 5, 4, 2]) if net is None else net
    example = torch.randn(4, 3) if example is None else example
    shared = {} if cls is models.Deterministic else {"prune_inputs": prune_inputs}
    model = cls(net, example, num_data=9, **shared)
    model = model.double() if double else model
    return model, guides.for_model(model, **options)


def law(family):
    """The family's distribution without the wrapping in `Independent`."""
    distribution = family()
    while isinstance(distribution, Independent):
        distribution = distribution.base_dist
    return distribution


# -- where training starts -----------------------------------------------------------------------


@pytest.mark.parametrize("cls", [*SPARSE, models.Deterministic])
@pytest.mark.parametrize("net", ["mlp", "dotted", "convolutions"])
def test_mean_rows_are_the_networks_own(cls, net):
    example = torch.randn(2, 1, 28, 28) if net == "convolutions" else torch.randn(4, 3)
    net = {
        "mlp": lambda: mlp([3, 5, 4, 2]),
        "dotted": lambda: nn.Sequential(mlp([3, 5, 4]), nn.Tanh(), nn.Linear(4, 2)),
        "convolutions": lambda: lenet5_caffe(widths=(3, 4, 6)),
    }[net]()
    model, guide = fresh(cls, net, example)
    mean = guide.mean_rows()
    assert list(mean) == [group.name for group in model.layers]
    for name, rows in model.initial_rows().items():
        assert torch.allclose(mean[name], rows, rtol=1e-10, atol=0)
    # ... so that the network at posterior means is the network.
    output = model.run(example.double(), mean)
    assert torch.allclose(output, net.double()(example.double()), rtol=1e-9)


@pytest.mark.parametrize(
    ("cls", "options"),
    [
        (models.SpikeSlabGroupLasso, {"initial_tau2": 3.0, "initial_log_scale": 0.7}),
        (models.SpikeSlabGroupHorseshoe, {"initial_local_scale": 3.0, "initial_log_scale": 0.7}),
    ],
)
def test_other_initial_scales_start_at_the_network_too(cls, options):
    model, guide = fresh(cls, **options)
    assert all((scale != 1).all() for scale in guide.scales().values())
    for name, rows in model.initial_rows().items():
        assert torch.allclose(guide.mean_rows()[name], rows, rtol=1e-10, atol=0)


@pytest.mark.parametrize("cls", SPARSE)
@pytest.mark.parametrize("variance", ["tied", "full"])
def test_initial_scale_and_inclusion(cls, variance):
    _, guide = fresh(cls, variance=variance, initial_scale=0.03, initial_inclusion=0.8)
    for group, family in guide.layers():
        scale = family.slab().scale if variance == "tied" else family.slab().base_dist.scale
        assert torch.allclose(scale, torch.full_like(family.loc, 0.03), rtol=1e-10)
        assert hasattr(family, "inclusion_logits") == group.prunable
    for logits in guide.inclusion_logits().values():
        assert torch.allclose(logits.sigmoid(), torch.full_like(logits, 0.8))


@pytest.mark.parametrize("cls", SPARSE)
def test_posterior_mean_of_the_effective_rows(cls):
    """`mean_rows` is what draws of guide and model average to, with every unit included."""
    model, guide = fresh(cls, initial_scale=0.3, initial_inclusion=1 - 1e-12)
    with torch.no_grad():
        for parameter in guide.parameters_by_kind()["scales"]:
            parameter.add_(torch.randn_like(parameter) * 0.3)
        draws = []
        for _ in range(300):
            trace = poutine.trace(guide).get_trace()
            with poutine.replay(trace=trace):
                draws.append(model.rows())
        for name, mean in guide.mean_rows().items():
            values = torch.stack([draw[name] for draw in draws])
            error = (values.mean(0) - mean).abs() / (values.std(0) / len(values) ** 0.5)
            assert error.max() < 5


# -- the mean of a unit's scale ------------------------------------------------------------------


def test_group_lasso_scale_against_monte_carlo():
    _, guide = fresh(models.SpikeSlabGroupLasso)
    family = guide.tau2["fc1"]
    with torch.no_grad():
        family.loc.normal_()
        family.log_scale.copy_(torch.linspace(-3, 0, 5))
        draws = family().sample((200_000,)).sqrt()
    error = (draws.mean(0) - guide.scales()["fc1"]).abs() / (draws.std(0) / len(draws) ** 0.5)
    assert error.max() < 5


@pytest.mark.parametrize("regularisation", [1.0, 0.3, math.inf])
def test_group_horseshoe_scale_against_monte_carlo(regularisation):
    model = models.SpikeSlabGroupHorseshoe(
        mlp([3, 5, 2]), torch.randn(4, 3), num_data=9, regularisation=regularisation
    ).double()
    guide = guides.for_model(model)
    with torch.no_grad():
        guide.global_scale.loc.normal_()
        guide.global_scale.log_scale.fill_(math.log(0.3))
        guide.local_scale["fc1"].loc.normal_()
        guide.local_scale["fc1"].log_scale.normal_(-1, 0.5)
        size = (200_000,)
        squares = guide.global_scale().sample(size).prod(-1, keepdim=True)
        rho = (squares * guide.local_scale["fc1"]().sample(size).prod(-1)).sqrt()
        draws = rho / (1 + (rho / regularisation) ** 2).sqrt()
    error = (draws.mean(0) - guide.scales()["fc1"]).abs() / (draws.std(0) / len(draws) ** 0.5)
    assert error.max() < 5


def test_group_horseshoe_scale_against_quadrature():
    """The Gauss–Hermite rule has settled: against 40 001 points, for the widths that occur."""
    model, guide = fresh(models.SpikeSlabGroupHorseshoe)
    x = torch.linspace(-12, 12, 40_001, dtype=torch.float64)
    density = (-0.5 * x**2).exp()
    for loc in (-4.0, 0.0, 2.0):
        for deviation in (0.05, 0.3, 1.0):
            with torch.no_grad():
                guide.global_scale.loc.fill_(0.0)
                guide.local_scale["fc1"].loc.fill_(loc)
                for family in (guide.global_scale, guide.local_scale["fc1"]):
                    family.log_scale.fill_(math.log(deviation))
            # log ρ is half the sum of four factors' logs: mean loc, deviation that of one factor.
            values = model.regularised(loc + deviation * x)
            exact = float((values * density).sum() / density.sum())
            assert guide.scales()["fc1"].tolist() == pytest.approx([exact] * 5, rel=1e-6)


def test_models_without_scales_have_none():
    for cls in (models.SpikeSlabGaussian, models.Deterministic):
        assert fresh(cls)[1].scales() == {}


# -- parameters ----------------------------------------------------------------------------------


@pytest.mark.parametrize("cls", SPARSE)
def test_inclusions_are_named_inclusion_logits(cls):
    _, guide = fresh(cls, prune_inputs=True)
    named = {
        name: tuple(value.shape)
        for name, value in guide.named_parameters()
        if name.endswith("inclusion_logits")
    }
    assert named == {
        "row_families.fc1.inclusion_logits": (5,),
        "row_families.fc2.inclusion_logits": (4,),
        "input_gate.inclusion_logits": (3,),
    }
    assert {name: len(v) for name, v in guide.inclusion_logits().items()} == {
        "input": 3,
        "fc1": 5,
        "fc2": 4,
    }


def test_dense_guide_has_no_inclusions():
    _, guide = fresh(models.Deterministic)
    assert guide.inclusion_logits() == {}
    assert sum(value.numel() for value in guide.parameters()) == 20 + 24 + 10


def test_tied_and_full_variances():
    def shapes(variance):
        family = fresh(models.SpikeSlabGaussian, variance=variance)[1].row_families["fc1"]
        return {name: tuple(value.shape) for name, value in family.named_parameters()}

    assert shapes("full") == {"loc": (5, 4), "log_scale": (5, 4), "inclusion_logits": (5,)}
    assert shapes("tied") == {
        "loc": (5, 4),
        "row_log_scale": (5,),
        "column_log_scale": (4,),
        "inclusion_logits": (5,),
    }
    _, guide = fresh(models.SpikeSlabGaussian, variance="tied")
    assert isinstance(law(guide.row_families["fc1"]).slab, TiedNormal)
    assert isinstance(law(guide.row_families["out"]), TiedNormal)


def test_gradient_estimators():
    def inclusion_law(inclusion, temperature=0.5):
        options = {"inclusion": inclusion, "temperature": temperature}
        _, guide = fresh(models.SpikeSlabGaussian, prune_inputs=True, **options)
        assert type(law(guide.input_gate)) is type(law(guide.row_families["fc1"]))
        return law(guide.row_families["fc1"])

    assert type(inclusion_law("score")) is SpikeAndSlab
    hard, soft = inclusion_law("straight-through"), inclusion_law("soft", 0.2)
    assert isinstance(hard, RelaxedSpikeAndSlab)
    assert isinstance(soft, RelaxedSpikeAndSlab)
    assert (hard.straight_through, soft.straight_through) == (True, False)
    assert float(soft.temperature) == pytest.approx(0.2)


@pytest.mark.parametrize("cls", [*SPARSE, models.Deterministic])
def test_every_parameter_has_one_kind(cls):
    net = mlp([3, 5, 1])
    shared = {} if cls is models.Deterministic else {"prune_inputs": True}
    model = cls(net, torch.randn(4, 3), likelihood=likelihoods.Normal(), num_data=9, **shared)
    guide = guides.for_model(model)
    kinds = guide.parameters_by_kind()
    listed = [id(value) for values in kinds.values() for value in values]
    assert len(listed) == len(set(listed))
    assert set(listed) == {id(value) for value in guide.parameters()}
    assert len(kinds["inclusion"]) == (0 if cls is models.Deterministic else 2)
    noise = {id(value) for value in guide.noise_precision.parameters()}
    assert noise <= {id(value) for value in kinds["scales"]}


@pytest.mark.parametrize("cls", [*SPARSE, models.Deterministic])
def test_state_dict_round_trip(cls):
    model, first = fresh(cls)
    second = guides.for_model(model)
    with torch.no_grad():
        for parameter in first.parameters():
            parameter.normal_()
    second.load_state_dict(first.state_dict())
    for name, rows in first.mean_rows().items():
        assert torch.equal(second.mean_rows()[name], rows)


# -- options and registration --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"variance": "diagonal"}, "'tied', 'row', 'full' or 'rank-K'.*got 'diagonal'"),
        ({"inclusion": "gumbel"}, "'straight-through', 'soft' or 'score', got 'gumbel'"),
        ({"initial_scale": 0.0}, "positive initial_scale"),
        ({"initial_scale": float("nan")}, "positive initial_scale"),
        ({"temperature": -0.5}, "temperature"),
        ({"initial_inclusion": 1.0}, "initial_inclusion"),
        ({"initial_inclusion": 0.0}, "initial_inclusion"),
    ],
)
@pytest.mark.parametrize("cls", SPARSE)
def test_options_are_checked(cls, options, message):
    with pytest.raises(ValueError, match=message):
        fresh(cls, **options)


@pytest.mark.parametrize(
    ("cls", "option"),
    [
        (models.SpikeSlabGroupLasso, "initial_tau2"),
        (models.SpikeSlabGroupLasso, "initial_log_scale"),
        (models.SpikeSlabGroupHorseshoe, "initial_local_scale"),
        (models.SpikeSlabGroupHorseshoe, "initial_log_scale"),
    ],
)
def test_scale_options_are_checked(cls, option):
    with pytest.raises(ValueError, match=f"positive.* {option}"):
        fresh(cls, **{option: -1.0})


def test_every_model_has_a_guide_of_the_same_name():
    for cls in [*SPARSE, models.Deterministic]:
        assert type(fresh(cls)[1]) is getattr(guides, cls.__name__)


class Shifted(models.SparseModel):
    """A user's own model."""

    def rows(self):
        return {group.name: self.gaussian_rows(group) for group in self.layers}


def test_a_users_model_is_registered():
    model = Shifted(mlp([3, 5, 2]), torch.randn(4, 3), num_data=9)
    with pytest.raises(TypeError, match=r"no guide is registered for Shifted.*SpikeSlabGaussian"):
        guides.for_model(model)

    class Guide(guides.GroupGuide):
        def __init__(self, model):
            super().__init__(model)
            for name, rows in model.initial_rows().items():
                self.row_families[name] = guides.families.GaussianRows(rows, "full", 0.1)

    @guides.for_model.register
    def _(model: Shifted, **options):
        return Guide(model, **options)

    guide = guides.for_model(model)
    assert isinstance(guide, Guide)
    # A class that inherits from a registered one has its parent's guide.
    child = type("Child", (Shifted,), {})
    assert isinstance(guides.for_model(child(mlp([3, 2]), torch.randn(4, 3), num_data=9)), Guide)
    x = torch.randn(4, 3)
    trace = poutine.trace(guide).get_trace()
    with poutine.replay(trace=trace):
        assert model(x).shape == (4, 2)
    assert torch.allclose(model.run(x, guide.mean_rows()), model.net(x))
