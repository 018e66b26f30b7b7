"""BC-GNJ and BC-GHS: KLs by hand, where a guide starts, what is pruned, what the posterior says."""

import math

import numpy as np
import pyro
import pyro.poutine as poutine
import pytest
import torch
from scipy.special import gammaln
from torch import nn
from torch.distributions import Normal, kl_divergence

import pyro_sparse as ps
from pyro_sparse import guides, likelihoods, models
from pyro_sparse.guides.half_cauchy import settled_factors
from pyro_sparse.infer import ELBO
from pyro_sparse.nets import lenet5_caffe, mlp
from pyro_sparse.posterior import LogAlpha, LogScale, Posterior

BOTH = [models.GroupNormalJeffreys, models.GroupHorseshoe]
LOG_2_PI_E = math.log(2 * math.pi * math.e)
K1, K2, K3 = 0.63576, 1.87320, 1.48695


def build(cls, net=None, example=None, double=True, random=False, guide_options=None, **options):
    """A model and its guide; with ``random`` parameters that are nowhere special."""
    net = mlp([3, 5, 4, 2], "tanh") if net is None else net
    example = torch.randn(4, 3) if example is None else example
    model = cls(net, example, num_data=9, **options)
    model = model.double() if double else model
    guide = guides.for_model(model, **(guide_options or {}))
    if random:
        with torch.no_grad():
            for parameter in guide.parameters():
                parameter.normal_(0, 0.7)
    return model, guide


def batch(dtype=torch.float64):
    return torch.randn(4, 3, dtype=dtype), torch.randint(2, (4,))


def site_kls(model, guide):
    """KL of every latent site, at one draw of the guide."""
    with torch.no_grad():
        guide_trace = poutine.trace(guide).get_trace()
        with poutine.replay(trace=guide_trace):
            model_trace = poutine.trace(lambda: (model.rows(), model.input_gate())).get_trace()
        return {
            name: kl_divergence(guide_trace.nodes[name]["fn"], site["fn"]).sum().item()
            for name, site in model_trace.nodes.items()
            if site["type"] == "sample"
        }


def numbers(family):
    return family.loc.detach().numpy(), family.log_scale.exp().detach().numpy()


def gaussian_kl(family, prior=1.0):
    loc = family.loc.detach().numpy()
    if family.variance_kind == "tied":
        scale = (family.row_log_scale.unsqueeze(-1) + family.column_log_scale).exp()
    else:
        scale = family.log_scale.exp()
    scale = scale.detach().numpy()
    return (np.log(prior / scale) + (scale**2 + loc**2) / (2 * prior**2) - 0.5).sum()


# -- the KL ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("variance", ["full", "tied"])
def test_kl_of_the_normal_jeffreys(variance):
    model, guide = build(
        models.GroupNormalJeffreys,
        random=True,
        output_scale=1.3,
        prune_inputs=True,
        guide_options={"variance": variance},
    )
    kls = site_kls(model, guide)
    expected = {}
    for group, family in guide.layers():
        expected[f"{group.name}.rows"] = gaussian_kl(family, 1.0 if group.prunable else 1.3)
    for name in ("fc1", "fc2", "input"):
        loc, scale = numbers(guide.unit_scale(name))
        log_alpha = np.log(scale**2 / loc**2)
        negative = K1 / (1 + np.exp(-(K2 + K3 * log_alpha)))
        negative -= 0.5 * np.log1p(np.exp(-log_alpha)) + K1
        expected[f"{name}.scale"] = -negative.sum()
    # output_scale was a float32 when the model was made.
    assert kls == pytest.approx(expected, rel=1e-6)


def test_non_centred_rows_have_the_kl_of_centred_ones():
    """KL(N(zμ, z²σ²) ‖ N(0, z²)) at any z, the paper's form, is KL(N(μ, σ²) ‖ N(0, 1))."""
    model, guide = build(models.GroupNormalJeffreys, random=True)
    family = guide.row_families["fc1"]
    z = torch.tensor([0.1, -2.0, 1e-4, 30.0, 1.0], dtype=torch.float64).unsqueeze(1)
    centred = Normal(z * family.loc, z.abs() * family.log_scale.exp())
    kl = kl_divergence(centred, Normal(torch.zeros_like(z), z.abs())).sum()
    assert site_kls(model, guide)["fc1.rows"] == pytest.approx(kl.item(), rel=1e-12)


@pytest.mark.parametrize("variance", ["full", "tied"])
@pytest.mark.parametrize(("global_scale", "local_scale"), [(1.0, 1.0), (1e-2, 3.0)])
def test_kl_of_the_horseshoe(variance, global_scale, local_scale):
    model, guide = build(
        models.GroupHorseshoe,
        random=True,
        output_scale=1.3,
        prune_inputs=True,
        global_scale=global_scale,
        local_scale=local_scale,
        guide_options={"variance": variance},
    )

    def factors_kl(family, scale):
        """LogNormal against Gamma(½, scale θ), θ = scale², and against InverseGamma(½, 1)."""
        (m_a, m_b), (s_a, s_b) = (value.T for value in numbers(family))
        theta = scale**2
        first = 0.5 * math.log(theta) + gammaln(0.5) - 0.5 * m_a + np.exp(m_a + s_a**2 / 2) / theta
        second = gammaln(0.5) + 0.5 * m_b + np.exp(s_b**2 / 2 - m_b)
        return (first + second - np.log(s_a) - np.log(s_b) - LOG_2_PI_E).sum()

    expected = {}
    for group, family in guide.layers():
        expected[f"{group.name}.rows"] = gaussian_kl(family, 1.0 if group.prunable else 1.3)
    for name in ("fc1", "fc2", "input"):
        expected[f"{name}.global_scale"] = factors_kl(guide.global_family(name), global_scale)
        expected[f"{name}.local_scale"] = factors_kl(guide.local_family(name), local_scale)
    assert site_kls(model, guide) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("cls", BOTH)
def test_every_term_is_closed_and_the_bound_is_the_stock_one(cls):
    model, guide = build(cls, random=True, prune_inputs=True)
    x, y = batch()
    assert set(ELBO().analytic(model, guide, x, y).values()) == {True}
    losses = []
    for elbo in (ELBO(local_reparameterisation=False), pyro.infer.TraceMeanField_ELBO()):
        pyro.set_rng_seed(1)
        with pyro.validation_enabled():  # the stock check of both traces warns, so it fails
            losses.append(elbo.loss(model, guide, x, y))
    assert losses[0] == pytest.approx(losses[1], rel=1e-10)
    assert math.isfinite(losses[0])


@pytest.mark.parametrize("cls", BOTH)
def test_gradients_of_the_kl(cls):
    # Not the default global scale of the horseshoe: its KL of 1e10 here would hide differences.
    options = {"global_scale": 0.5} if cls is models.GroupHorseshoe else {}
    model, guide = build(cls, mlp([2, 2, 2]), torch.zeros(2, 2), random=True, **options)
    names = [name for name, _ in guide.named_parameters()]

    def total(*values):
        with torch.no_grad():
            trace = poutine.trace(guide).get_trace()

        def run():
            with poutine.replay(trace=trace):
                return model.rows()

        prior = poutine.trace(run).get_trace()
        laws = torch.func.functional_call(
            _Laws(guide), {f"guide.{n}": v for n, v in zip(names, values, strict=True)}
        )
        return sum(kl_divergence(laws[name], prior.nodes[name]["fn"]).sum() for name in laws)

    leaves = [value.detach().clone().requires_grad_() for value in guide.parameters()]
    assert torch.autograd.gradcheck(total, leaves)


class _Laws(nn.Module):
    """The guide's laws by site, as a function of its parameters."""

    def __init__(self, guide):
        super().__init__()
        self.guide = guide

    def forward(self):
        trace = poutine.trace(self.guide).get_trace()
        return {n: s["fn"] for n, s in trace.nodes.items() if s["type"] == "sample"}


@pytest.mark.parametrize("cls", BOTH)
@pytest.mark.parametrize("value", [-25.0, -8.0, 8.0])
def test_float32_is_finite_at_extreme_scales(cls, value):
    model, guide = build(cls, double=False, prune_inputs=True)
    with torch.no_grad():
        for parameter in guide.parameters_by_kind()["scales"]:
            parameter.fill_(value)
    x, y = batch(torch.float32)
    loss = ELBO()(model, guide)
    # exp(exp(16)) is no float32: scales of scales as large as e⁸ are infinitely unlikely.
    if cls is models.GroupHorseshoe and value > 0:
        with torch.no_grad():
            for family in [*guide.local_scale.values(), *guide.global_scale.values()]:
                family.log_scale.fill_(0.0)
    total = loss(x, y)
    total.backward()
    assert torch.isfinite(total)
    for name, parameter in guide.named_parameters():
        assert torch.isfinite(parameter.grad).all(), name


# -- where training starts -------------------------------------------------------------------------


@pytest.mark.parametrize("cls", BOTH)
@pytest.mark.parametrize("net", ["mlp", "dotted", "convolutions"])
def test_a_fresh_guide_is_the_network(cls, net):
    example = torch.randn(2, 1, 28, 28) if net == "convolutions" else torch.randn(4, 3)
    net = {
        "mlp": lambda: mlp([3, 5, 4, 2]),
        "dotted": lambda: nn.Sequential(mlp([3, 5, 4]), nn.Tanh(), nn.Linear(4, 2)),
        "convolutions": lambda: lenet5_caffe(widths=(3, 4, 6)),
    }[net]()
    model, guide = build(cls, net, example, prune_inputs=True)
    posterior = Posterior(model, guide)
    parameters = posterior.mean_parameters()
    for name, value in net.double().named_parameters():
        assert torch.allclose(parameters[name], value, rtol=1e-10, atol=1e-15)
    names = [group.name for group in model.graph if group.prunable]
    offered = posterior.log_alpha() or posterior.log_scales()
    assert sorted(offered) == sorted(names)


def test_rows_start_at_unit_size():
    model, guide = build(models.GroupHorseshoe, guide_options={"initial_log_scale": 1e-6})
    for group, family in guide.layers():
        if group.prunable:
            size = family.loc.square().mean(1).sqrt()
            assert torch.allclose(size, torch.ones_like(size), rtol=1e-5)
            own = model.initial_rows()[group.name].square().mean(1).log() / 2
            assert torch.allclose(guide.offers()["log_scales"].laws[group.name], own, rtol=1e-6)
    _, guide = build(models.GroupHorseshoe, guide_options={"initial_unit_scale": 0.2})
    expected = torch.full((5,), math.log(0.2), dtype=torch.float64)
    assert torch.allclose(guide.offers()["log_scales"].laws["fc1"], expected)


@pytest.mark.parametrize("prior_scale", [1e-5, 1.0, 30.0])
@pytest.mark.parametrize("log_scale", [-12.0, -1.0, 3.0])
def test_settled_factors_have_the_least_kl(prior_scale, log_scale):
    log_scale = torch.tensor(log_scale, dtype=torch.float64)
    prior_scale = torch.tensor(prior_scale, dtype=torch.float64)
    first, second = settled_factors(log_scale, prior_scale)
    assert float(first + second) == pytest.approx(2 * float(log_scale))

    def kl(a, b):
        law = torch.distributions.LogNormal(torch.stack([a, b]), 1e-3)
        prior = ps.distributions.HalfCauchyFactors(prior_scale)
        return kl_divergence(pyro.distributions.Independent(law, 1), prior).item()

    least = kl(first, second)
    assert all(kl(first + step, second - step) > least for step in (-0.1, 0.1))


@pytest.mark.parametrize("cls", BOTH)
def test_posterior_moments_of_the_effective_rows(cls):
    """Means and variances are those of draws of guide and model."""
    model, guide = build(cls, guide_options={"initial_scale": 0.3})
    with torch.no_grad():
        for parameter in guide.parameters_by_kind()["scales"]:
            parameter.add_(torch.randn_like(parameter) * 0.3)
        draws = []
        for _ in range(2000):
            trace = poutine.trace(guide).get_trace()
            with poutine.replay(trace=trace):
                draws.append(model.rows())
        variances = guide.offers()["row_variances"].laws
        for name, mean in guide.mean_rows().items():
            values = torch.stack([draw[name] for draw in draws])
            error = (values.mean(0) - mean).abs() / (variances[name] / len(values)).sqrt()
            assert error.max() < 5
            squares = (values - mean).square()
            error = (squares.mean(0) - variances[name]).abs() / (squares.std(0) / 2000**0.5)
            assert error.max() < 6


# -- draws -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("net", ["mlp", "convolutions"])
def test_a_scale_an_example_has_the_same_expected_likelihood(net):
    """One z a batch or one an example: equal in expectation, as the likelihood is a sum."""
    x, y = batch()
    net, x = (mlp([3, 5, 4, 2], "tanh"), x) if net == "mlp" else (lenet5_caffe(), None)
    if x is None:
        x = torch.randn(4, 1, 28, 28, dtype=torch.float64)
        net = lenet5_caffe("tanh", widths=(2, 2, 3))
    values = {}
    for draws in ("batch", "example"):
        pyro.set_rng_seed(0)
        model, guide = build(
            models.GroupNormalJeffreys,
            net,
            x[:2].float(),
            guide_options={"scale_draws": draws, "initial_unit_scale": 0.5},
        )
        with torch.no_grad():
            estimates = [ELBO().estimate(model, guide, x, y).log_likelihood for _ in range(500)]
        values[draws] = torch.stack(estimates)
    difference = values["batch"].mean() - values["example"].mean()
    error = sum(value.var() / len(value) for value in values.values()).sqrt()
    assert abs(difference) < 4 * error


def test_scales_are_drawn_as_asked():
    x, y = batch()
    for draws, rows in (("batch", 1), ("example", 4)):
        _, guide = build(models.GroupNormalJeffreys, guide_options={"scale_draws": draws})
        with ps.infer.LocalReparameterisation(4):
            trace = poutine.trace(guide).get_trace(x, y)
        value = trace.nodes["fc1.scale"]["value"]
        drawn = value.law.multiplier if draws == "example" else value
        assert (1 if drawn.dim() == 1 else len(drawn)) == rows


# -- pruning ---------------------------------------------------------------------------------------


def fitted(cls, net, example, **options):
    """A posterior that could be: every third unit is needed, the others have lost their scale."""
    model, guide = build(cls, net, example, double=False, **options)
    with torch.no_grad():
        for name in model.support:
            out = torch.arange(model.graph[name].size) % 3 > 0
            if cls is models.GroupHorseshoe:
                guide.local_family(name).loc[out] -= 30.0
            else:
                guide.unit_scale(name).log_scale[out] += 5.0
    return Posterior(model, guide)


@pytest.mark.parametrize("cls", BOTH)
@pytest.mark.parametrize("prune_inputs", [False, True])
def test_default_rules(cls, prune_inputs):
    posterior = fitted(cls, mlp([6, 9, 6, 2]), torch.randn(4, 6), prune_inputs=prune_inputs)
    keep = posterior.keep()
    assert keep["fc1"].tolist() == [True, False, False] * 3
    assert keep["fc2"].tolist() == [True, False, False] * 2
    assert keep["input"].tolist() == ([True, False, False] if prune_inputs else [True] * 3) * 2
    assert keep["out"].all()
    rule = {models.GroupHorseshoe: LogScale, models.GroupNormalJeffreys: LogAlpha}[cls]
    assert all(torch.equal(mask, keep[name]) for name, mask in posterior.keep(rule()).items())
    everything = rule(math.inf if cls is models.GroupNormalJeffreys else -math.inf)
    assert all(mask.all() for mask in posterior.keep(everything).values())
    other = {LogScale: LogAlpha, LogAlpha: LogScale}[rule]
    with pytest.raises(ps.posterior.importance.NotOfferedError, match=r"needs .*of units \(bc-"):
        posterior.keep(other())
    with pytest.raises(ValueError, match="expected a number"):
        rule(float("nan"))


def test_log_scales_within_the_layer_or_not():
    posterior = fitted(models.GroupHorseshoe, mlp([6, 9, 6, 2]), torch.randn(4, 6))
    with torch.no_grad():
        posterior.guide.global_family("fc1").loc.sub_(10.0)
    scales = posterior.log_scales()["fc1"]
    assert posterior.keep()["fc1"].tolist() == [True, False, False] * 3
    absolute = LogScale(float(scales.max()) - 0.01, relative=False)(posterior)
    assert int(absolute["fc1"].sum()) == 1
    assert not LogScale(float(scales.max()), relative=False)(posterior)["fc1"].any()
    assert int(LogScale(-1e-6)(posterior)["fc1"].sum()) == 1


@pytest.mark.parametrize("cls", BOTH)
def test_measures_order_units_as_the_rules_do(cls):
    posterior = fitted(cls, mlp([6, 9, 6, 2]), torch.randn(4, 6))
    measure = {
        models.GroupHorseshoe: ps.posterior.importance.log_scale,
        models.GroupNormalJeffreys: ps.posterior.importance.retention,
    }[cls]
    rule = ps.posterior.TopK(measure, {"fc1": 3, "fc2": 2})
    assert all(torch.equal(mask, posterior.keep()[name]) for name, mask in rule(posterior).items())


@pytest.mark.parametrize("cls", BOTH)
@pytest.mark.parametrize("prune_inputs", [False, True])
def test_masked_equals_compact(cls, prune_inputs):
    x = torch.randn(16, 1, 28, 28)
    posterior = fitted(cls, lenet5_caffe(widths=(6, 9, 12)), x[:2])
    small = ps.compact(posterior)
    assert small.conv2.weight.shape == (3, 2, 5, 5)
    assert (posterior.masked(x) - small(x)).abs().max() <= 1e-5
    x = torch.randn(16, 12)
    posterior = fitted(cls, mlp([12, 9, 6, 2]), x[:2], prune_inputs=prune_inputs)
    small = ps.compact(posterior)
    assert (posterior.masked(x) - small(x)).abs().max() <= 1e-5


@pytest.mark.parametrize("cls", BOTH)
def test_pruned_units_pay_no_kl(cls):
    posterior = fitted(cls, mlp([6, 9, 6, 2]), torch.randn(4, 6), prune_inputs=True)
    model, guide = posterior.model.double(), posterior.guide.double()
    assert posterior.prune() == 6 + 4 + 4
    kls = site_kls(model, guide)
    keep = posterior.keep()
    for name in ("fc1", "fc2", "input"):
        kept = keep[name]
        if cls is models.GroupHorseshoe:
            law, prior = guide.local_family(name)(), model.local_scale.expand(len(kept))
            single = kl_divergence(law, ps.distributions.HalfCauchyFactors(prior))
            site = f"{name}.local_scale"
        else:
            prior = ps.distributions.NormalJeffreys((len(kept),))
            single = kl_divergence(guide.unit_scale(name)(), prior)
            site = f"{name}.scale"
        assert kls[site] == pytest.approx(single[kept].sum().item(), rel=1e-9)
        if name != "input":
            row = guide.row_families[name]
            law = Normal(row.loc, row.log_scale.exp())
            expected = kl_divergence(law, Normal(0.0, 1.0)).sum(1)[kept].sum()
            assert kls[f"{name}.rows"] == pytest.approx(expected.item(), rel=1e-9)
    # What was pruned moves nothing any more.
    x, y = torch.randn(4, 6, dtype=torch.float64), torch.randint(2, (4,))
    ELBO()(model, guide)(x, y).backward()
    assert (guide.row_families["fc1"].loc.grad[~keep["fc1"]] == 0).all()
    assert (guide.row_families["fc1"].loc.grad[keep["fc1"]] != 0).any()


# -- training --------------------------------------------------------------------------------------


@pytest.mark.parametrize("cls", BOTH)
def test_training_drops_units_without_a_use(cls):
    """y depends on one feature: a few units do, and the network stays right."""
    x = torch.randn(512, 4)
    y = (x[:, 0] > 0).long()
    model = cls(mlp([4, 16, 2]), x[:2], num_data=len(x))
    guide = guides.for_model(model)
    loader = ps.data.Batches(x, y, 64, seed=0)
    ps.fit(model, guide, loader, epochs=150, lr=2e-2, progress=False)
    posterior = Posterior(model, guide)
    values = posterior.log_scales() or {n: -v for n, v in posterior.log_alpha().items()}
    best = values["fc1"].argmax()
    keep = {"fc1": values["fc1"] >= values["fc1"].sort().values[-4]}
    assert keep["fc1"][best]
    accuracy = (posterior.masked(x, keep).argmax(1) == y).double().mean()
    assert accuracy > 0.95


@pytest.mark.parametrize("cls", BOTH)
def test_stock_svi(cls):
    x, y = batch(torch.float32)
    model, guide = build(cls, double=False, prune_inputs=True)
    before = {name: value.clone() for name, value in guide.state_dict().items()}
    svi = pyro.infer.SVI(
        model, guide, pyro.optim.Adam({"lr": 0.1}), pyro.infer.TraceMeanField_ELBO()
    )
    assert math.isfinite(svi.step(x, y))
    moved = [n for n, v in guide.named_parameters() if not torch.equal(v, before[n])]
    assert len(moved) == len(list(guide.parameters()))


@pytest.mark.parametrize("cls", BOTH)
def test_regression_has_a_precision(cls):
    x, y = torch.randn(4, 3), torch.randn(4)
    model = cls(mlp([3, 5, 1]), x, likelihood=likelihoods.Normal(), num_data=9)
    guide = guides.for_model(model)
    assert math.isfinite(pyro.infer.TraceMeanField_ELBO().loss(model, guide, x, y))


# -- errors ----------------------------------------------------------------------------------------


class Centred(nn.Module):
    """Subtracts the input's own mean before the first layer."""

    def __init__(self):
        super().__init__()
        self.fc = mlp([3, 5, 2])

    def forward(self, x):
        return self.fc(x - x.mean(1, keepdim=True))


@pytest.mark.parametrize("cls", BOTH)
def test_inputs_that_the_first_layer_does_not_read(cls):
    with pytest.raises(ValueError, match=r"prune_inputs|not prunable|input"):
        cls(Centred(), torch.randn(4, 3), num_data=9, prune_inputs=True)


@pytest.mark.parametrize(
    ("cls", "options", "message"),
    [
        (models.GroupHorseshoe, {"variance": "diagonal"}, "'tied', 'row', 'full' or 'rank-K'"),
        (models.GroupHorseshoe, {"initial_scale": 0.0}, "positive initial_scale"),
        (models.GroupHorseshoe, {"initial_unit_scale": "ones"}, "initial_unit_scale or 'rows'"),
        (models.GroupHorseshoe, {"initial_unit_scale": -1.0}, "initial_unit_scale or 'rows'"),
        (models.GroupHorseshoe, {"initial_log_scale": 0.0}, "initial_log_scale"),
        (models.GroupNormalJeffreys, {"variance": "diagonal"}, "'tied', 'row', 'full' or 'rank-K'"),
        (models.GroupNormalJeffreys, {"scale_draws": "unit"}, "'batch' or 'example', got 'unit'"),
        (models.GroupNormalJeffreys, {"initial_unit_scale": 0.0}, "initial_unit_scale"),
    ],
)
def test_guide_options_are_checked(cls, options, message):
    with pytest.raises(ValueError, match=message):
        build(cls, guide_options=options)


@pytest.mark.parametrize("option", ["global_scale", "local_scale", "regularisation"])
@pytest.mark.parametrize("value", [0.0, -2.0, float("nan")])
def test_scales_out_of_range(option, value):
    with pytest.raises(ValueError, match=f"positive.* {option}"):
        build(models.GroupHorseshoe, **{option: value})
