"""Coordinate updates are maximisers of the exact bound; the guide's life under fit and pruning."""

import math

import pyro
import pyro.poutine as poutine
import pytest
import torch
from torch.distributions import Gamma, Normal, kl_divergence

import pyro_sparse as ps
from pyro_sparse import guides, models
from pyro_sparse.distributions import MarkovChain
from pyro_sparse.infer import ELBO
from pyro_sparse.nets import mlp
from pyro_sparse.posterior.selection import MedianProbability


def build(block_size=None, dtype=torch.float64, variance="full", **options):
    model = models.TurboMarkov(
        mlp([3, 6, 5, 2]).to(dtype),
        torch.zeros(2, 3, dtype=dtype),
        num_data=9,
        block_size=block_size,
        **{"density": 0.4, "persistence": 0.3, "shape": 1.0, "norm": 3.0}
        | {"off_shape": 3.0, "off_norm": 0.4}
        | options,
    )
    guide = guides.for_model(model, variance=variance)
    with torch.no_grad():
        # Rows of very different size, so that some are in, some out, some undecided.
        for group, family in guide.layers():
            size = torch.logspace(-2, 0.5, group.size, dtype=dtype).unsqueeze(-1)
            family.loc.mul_(size)
    guide.update()
    return model, guide


def negative_kl(model, guide, group, support, precisions, second_moments):
    """Exact E_q of every term of one layer that holds s and ρ, for any q(s) and q(ρ | s)."""
    total = -kl_divergence(support, model.chain(group)).sum()
    pi = support.mean
    sizes = model.sizes(group)
    sums = model.block_sums(second_moments)
    for weight, q, p in zip((pi, 1 - pi), precisions, model.gammas(group), strict=True):
        # E log N(w; 0, 1/ρ), over w and ρ
        mean_log, mean = torch.digamma(q.concentration) - q.rate.log(), q.mean
        fit = 0.5 * sizes * (mean_log - math.log(2 * math.pi)) - 0.5 * mean * sums
        total = total + (weight * (fit - kl_divergence(q, p))).sum()
    return total


def layer(guide, index=0):
    group, family = list(guide.layers())[index]
    return group, guide.hierarchies[group.name], guide.second_moments(family).detach()


@pytest.mark.parametrize("block_size", [None, 2])
def test_updates_maximise_the_bound(block_size):
    model, guide = build(block_size)
    group, hierarchy, moments = layer(guide)
    chain, (on, off) = hierarchy.support(), hierarchy.precisions()

    parts = [chain.initial_logits, chain.transition_logits]
    parts += [value for law in (on, off) for value in (law.concentration.log(), law.rate.log())]

    def bound(initial, transition, *logs):
        a, b, c, d = (value.exp() for value in logs)
        q = MarkovChain(initial, transition)
        return negative_kl(model, guide, group, q, (Gamma(a, b), Gamma(c, d)), moments)

    best = bound(*parts)
    for index, part in enumerate(parts):
        for step in (-0.1, 0.1, 1.0):
            moved = list(parts)
            moved[index] = part + step * torch.rand_like(part)
            assert bound(*moved) < best
    # Stationary: numerical optimisation from elsewhere arrives at the same bound.
    parts = [part.clone().requires_grad_() for part in parts]
    gradients = torch.autograd.grad(bound(*parts), parts)
    assert max(float(gradient.abs().max()) for gradient in gradients) < 1e-8
    with torch.no_grad():
        for part in parts:
            part.add_(0.5 * torch.randn_like(part))
    optimiser = torch.optim.LBFGS(parts, max_iter=2000, line_search_fn="strong_wolfe")

    def closure():
        optimiser.zero_grad()
        loss = -bound(*parts)
        loss.backward()
        return loss

    optimiser.step(closure)
    assert bound(*parts).item() == pytest.approx(best.item(), abs=1e-5)


@pytest.mark.parametrize("block_size", [None, 2])
def test_each_update_raises_the_bound(block_size):
    model, guide = build(block_size)
    group, hierarchy, _ = layer(guide)
    moments = torch.rand(model.row_shape(group), dtype=torch.float64)

    def bound():
        return negative_kl(
            model, guide, group, hierarchy.support(), hierarchy.precisions(), moments
        )

    values = [bound()]
    # q(ρ | s) first, q(s) as it was.
    hierarchy.moments.copy_(model.block_sums(moments))
    values.append(bound())
    hierarchy.update(model.block_sums(moments))
    values.append(bound())
    assert values[0] < values[1] < values[2]


def test_the_bound_is_the_log_normaliser_of_the_chain():
    model, guide = build()
    group, hierarchy, moments = layer(guide)
    reached = negative_kl(model, guide, group, hierarchy.support(), hierarchy.precisions(), moments)
    # log Σ_s p(s) Π_j ∫ p(ρ|s_j) exp E log N(w_j|ρ) dρ, the integral by quadrature over log ρ
    log_rho = torch.linspace(-25, 25, 40_001, dtype=torch.float64)
    rho = log_rho.exp()
    sizes, sums = model.sizes(group), model.block_sums(moments)
    integrals = []
    for law in model.gammas(group):
        each = []
        for j in range(group.size):
            prior = Gamma(law.concentration[j], law.rate[j]).log_prob(rho) + log_rho
            fit = 0.5 * sizes[j] * (log_rho - math.log(2 * math.pi)) - 0.5 * rho * sums[j]
            each.append((prior + fit).logsumexp(0) + (log_rho[1] - log_rho[0]).log())
        integrals.append(torch.stack(each))
    on, off = integrals
    assert torch.allclose(hierarchy.evidence(), on - off, atol=1e-8)
    expected = off.sum() + model.chain(group).log_normaliser(on - off)
    assert reached.item() == pytest.approx(expected.item(), rel=1e-9)


@pytest.mark.parametrize("variance", ["full", "tied"])
def test_mean_of_the_site_kls_is_the_exact_kl(variance):
    model, guide = build(variance=variance)
    guide.eval()
    exact = 0.0
    for index, (group, family) in enumerate(guide.layers()):
        slab = family.slab()
        entropy = Normal(slab.mean, slab.variance.sqrt()).entropy().sum()
        if group.prunable:
            _, hierarchy, moments = layer(guide, index)
            exact -= negative_kl(
                model, guide, group, hierarchy.support(), hierarchy.precisions(), moments
            )
            exact -= entropy
        else:
            exact += kl_divergence(
                Normal(slab.mean, slab.variance.sqrt()),
                Normal(torch.zeros_like(slab.mean), model.output_scale),
            ).sum()
    x, y = torch.randn(4, 3, dtype=torch.float64), torch.randint(2, (4,))
    with torch.no_grad():
        kls = torch.stack([ELBO().estimate(model, guide, x, y).kl for _ in range(250)])
    assert kls.mean().item() == pytest.approx(exact.item(), abs=5 * kls.std().item() / 250**0.5)


@pytest.mark.parametrize("block_size", [None, 2])
def test_stock_svi_and_closed_kls(block_size):
    model, guide = build(block_size)
    x, y = torch.randn(4, 3, dtype=torch.float64), torch.randint(2, (4,))
    assert set(ELBO().analytic(model, guide, x, y).values()) == {True}
    with pyro.validation_enabled(True):
        guide_sites = list(poutine.trace(guide).get_trace(x, y).nodes)
        model_sites = list(poutine.trace(model).get_trace(x, y).nodes)
        named = [name for name in model_sites if name in guide_sites]
        assert [name for name in guide_sites if name in model_sites] == named
        assert {"fc1.support", "fc1.precision", "fc1.rows", "out.rows"} <= set(named)
        svi = pyro.infer.SVI(
            model, guide, pyro.optim.Adam({"lr": 1e-3}), pyro.infer.TraceMeanField_ELBO()
        )
        before = guide.hierarchies["fc1"].moments.clone()
        svi.step(x, y)
        svi.step(x, y)
    assert not torch.equal(before, guide.hierarchies["fc1"].moments)


def test_updates_come_in_training_mode_every_so_many_calls():
    _, guide = build()
    guide.update_every = 3
    moments = guide.hierarchies["fc1"].moments
    changed = []
    for _ in range(6):
        with torch.no_grad():
            guide.row_families["fc1"].loc.mul_(1.1)
        before = moments.clone()
        guide()
        changed.append(not torch.equal(before, moments))
    assert changed == [True, False, False, True, False, False]
    guide.eval()
    before = moments.clone()
    guide()
    assert torch.equal(before, moments)
    assert guide.calls == 6


@pytest.mark.parametrize("block_size", [None, 2])
def test_inclusion_is_that_of_the_chain(block_size):
    model, guide = build(block_size)
    posterior = ps.Posterior(model, guide)
    pip = posterior.inclusion()
    keep = posterior.keep(MedianProbability())
    assert all(torch.equal(mask, keep[name]) for name, mask in posterior.keep().items())
    assert set(pip) == {"fc1", "fc2"}
    for name, value in pip.items():
        support = guide.hierarchies[name].support()
        draws = support.sample((20_000,))
        expected = draws.mean(0) if block_size is None else draws.amax(-1).mean(0)
        assert value.shape == (model.graph[name].size,)
        assert torch.allclose(value, expected, atol=0.02)
        assert value.min() < 0.3
        assert value.max() > 0.9


@pytest.mark.parametrize("block_size", [None, 2])
def test_compact_equals_masked(block_size):
    model, guide = build(block_size)
    posterior = ps.Posterior(model, guide)
    keep = posterior.keep()
    assert 0 < int(keep["fc1"].sum()) < 6
    x = torch.randn(7, 3, dtype=torch.float64)
    small = ps.compact(posterior)
    assert torch.allclose(small(x), posterior.masked(x), atol=1e-10)
    if block_size is not None:
        # One block of a unit that stays goes: its weights are 0 in the compact network, too.
        unit = int(keep["fc1"].nonzero()[0])
        with torch.no_grad():
            guide.row_families["fc1"].loc[unit, :2] *= 1e-6
            guide.row_families["fc1"].log_scale[unit, :2] = -9.0
        guide.update()
        inside = guide.hierarchies["fc1"].support().mean > 0.5
        assert inside[unit].tolist() == [False, True]
        assert posterior.keep()["fc1"][unit]
        rows = guide.mean_rows()["fc1"]
        assert torch.equal(rows != 0, model.spread(model.graph["fc1"], inside))
        assert torch.allclose(ps.compact(posterior)(x), posterior.masked(x), atol=1e-10)


@pytest.mark.parametrize("block_size", [None, 2])
def test_pruned_units_pay_nothing_and_stay_out(block_size):
    model, guide = build(block_size)
    x, y = torch.randn(4, 3, dtype=torch.float64), torch.randint(2, (4,))
    keep = torch.tensor([True, True, False, True, False, True])
    model.support.restrict({"fc1": keep})
    guide.reduced()
    guide.eval()
    pip = ps.Posterior(model, guide).inclusion()["fc1"]
    assert (pip[~keep] == 0).all()
    assert (pip[keep] > 0).all()
    torch.manual_seed(0)
    before = ELBO().estimate(model, guide, x, y)
    with torch.no_grad():
        guide.row_families["fc1"].loc[~keep] *= 50
    torch.manual_seed(0)
    after = ELBO().estimate(model, guide, x, y)
    assert before.kl.isfinite()
    assert after.kl.item() == pytest.approx(before.kl.item(), rel=1e-12)
    assert after.log_likelihood.item() == pytest.approx(before.log_likelihood.item(), rel=1e-9)
    if block_size is None:
        # Of the chain, what is left: p and q both know who is out.
        q, p = guide.hierarchies["fc1"].support(), model.chain(model.graph["fc1"])
        assert (q.mean[~keep] == 0).all()
        assert (p.mean[~keep] == 0).all()
        assert kl_divergence(q, p).isfinite()


def test_state_dict_round_trip():
    _, guide = build()
    _, other = build(density=0.2)
    other.load_state_dict(guide.state_dict())
    assert other.calls == guide.calls
    for name, value in guide.inclusion_logits().items():
        assert torch.equal(other.inclusion_logits()[name], value)
    assert any("moments" in name for name in guide.state_dict())


@pytest.mark.parametrize("block_size", [None, 64])
def test_float32_at_extremes(block_size):
    net, x = mlp([300, 40, 2]), torch.randn(5, 300)
    model = models.TurboMarkov(net, x, num_data=50, block_size=block_size)
    guide = guides.for_model(model)
    for scale in (0.0, 1e-6, 1e3):
        with torch.no_grad():
            guide.row_families["fc1"].loc.fill_(scale)
            guide.row_families["fc1"].row_log_scale.fill_(-12.0)
        loss = ELBO()(model, guide)(x, torch.zeros(5, dtype=torch.long))
        loss.backward()
        assert loss.isfinite()
        assert all(p.grad.isfinite().all() for p in guide.parameters())
        pip = ps.Posterior(model, guide).inclusion()["fc1"]
        assert pip.isfinite().all()
        if scale < 1:
            assert (pip < 0.01).all()


def test_rows_of_the_priors_norms_are_told_apart():
    model = models.TurboMarkov(mlp([300, 40, 2]), torch.randn(5, 300), num_data=50)
    guide = guides.for_model(model, initial_scale=1e-4)
    loc = guide.row_families["fc1"].loc
    for norm, inside in ((model.off_norm, False), (model.norm, True)):
        with torch.no_grad():
            loc.mul_(norm / loc.norm(dim=1, keepdim=True))
        guide.update()
        pip = ps.Posterior(model, guide).inclusion()["fc1"]
        assert (pip > 0.99).all() if inside else (pip < 0.01).all()


def test_with_the_tails_in_order_large_rows_are_in():
    options = {"shape": 0.2, "off_shape": 0.2}
    model = models.TurboMarkov(mlp([300, 40, 2]), torch.randn(5, 300), num_data=50, **options)
    guide = guides.for_model(model)
    with torch.no_grad():
        guide.row_families["fc1"].loc.fill_(1e3)
    guide.update()
    assert (ps.Posterior(model, guide).inclusion()["fc1"] > 0.99).all()


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"variance": "half"}, "'tied', 'row', 'full' or 'rank-K'"),
        ({"initial_scale": "even"}, "'balanced'"),
        ({"initial_scale": -1.0}, "initial_scale"),
        ({"update_every": 0}, "update_every"),
    ],
)
def test_errors(options, match):
    model, _ = build()
    with pytest.raises(ValueError, match=match):
        guides.for_model(model, **options)
