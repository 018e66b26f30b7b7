"""The ELBO against exact evidences, against Pyro's own, and its gradient estimators."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Predictive, Trace_ELBO, TraceMeanField_ELBO
from torch import nn

from pyro_sparse import guides, models, nets
from pyro_sparse.infer import ELBO
from pyro_sparse.likelihoods import Normal
from pyro_sparse.modules import own_parameters

SPARSE = ["ss-ig", "ss-gl", "ss-ghs"]


def within(draws: torch.Tensor, expected, errors: float = 5.0) -> bool:
    """Whether the mean over the first dimension is the expected one, to so many standard errors."""
    standard_error = draws.std(0) / math.sqrt(len(draws))
    return bool(((draws.mean(0) - expected).abs() <= errors * standard_error + 1e-9).all())


def gradients(loss: torch.Tensor, module: nn.Module) -> torch.Tensor:
    parameters = list(module.parameters())
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters)])


class TestAgainstTheExactPosterior:
    @pytest.mark.parametrize("orthogonal", [True, False])
    @pytest.mark.parametrize(("groups", "length"), [(10, 1), (5, 3)])
    def test_never_above_the_log_evidence(
        self, linear_problem, linear_guide, groups, length, orthogonal
    ):
        problem = linear_problem(groups, length, orthogonal, size=20)
        evidence, _ = problem.posterior()
        guide = linear_guide(problem)
        with torch.no_grad():
            for spread in torch.linspace(0.01, 3, 30):
                guide.randomise(float(spread))
                assert problem.elbo(guide.law()) <= evidence
        guide.randomise(0.1)
        start = float(problem.elbo(guide.law()).detach())
        if orthogonal:
            guide.warm_start(problem)
        optimizer = torch.optim.Adam(guide.parameters(), lr=0.1)
        for _ in range(200):
            optimizer.zero_grad()
            loss = -problem.elbo(guide.law())
            loss.backward()
            optimizer.step()
        gap, first = evidence - float(problem.elbo(guide.law()).detach()), evidence - start
        assert -1e-9 <= gap < first / 2
        if orthogonal:  # the family contains the posterior
            assert gap < 0.05

    @pytest.mark.parametrize("temperature", [None, 0.5])
    def test_estimates_the_closed_form(self, linear_problem, linear_guide, temperature):
        problem = linear_problem(4, 2, orthogonal=False)
        guide = linear_guide(problem, temperature)
        guide.randomise(0.5)
        elbo = ELBO()
        losses = torch.tensor([elbo.loss(problem, guide) for _ in range(200)]).double()
        assert within(-losses, float(problem.elbo(guide.law()).detach()))
        assert elbo.analytic(problem, guide) == {"beta": True}

    @pytest.mark.parametrize(("groups", "length"), [(6, 1), (3, 2)])
    def test_orthogonal_design_reaches_the_exact_posterior(
        self, linear_problem, linear_guide, groups, length
    ):
        problem = linear_problem(groups, length, orthogonal=True)
        evidence, exact = problem.posterior()
        assert exact.min() < 0.1
        assert exact.max() > 0.9
        assert ((exact > 0.15) & (exact < 0.85)).any()
        guide, steps = linear_guide(problem), 250
        guide.warm_start(problem)
        slab = [guide.loc, guide.log_scale]
        groups = [{"params": [guide.logits], "lr": 0.15}, {"params": slab, "lr": 0.02}]
        optimizer = torch.optim.Adam(groups)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        elbo = ELBO(num_particles=8)
        with pyro.validation_enabled(False):
            for _ in range(steps):
                optimizer.zero_grad()
                elbo.differentiable_loss(problem, guide).backward()
                optimizer.step()
                scheduler.step()
        assert (guide.logits.sigmoid() - exact).abs().max() < 0.05
        assert evidence - 0.1 < float(problem.elbo(guide.law()).detach()) <= evidence

    @pytest.mark.parametrize("particles", [1, 3])
    def test_score_gradient_is_unbiased(self, linear_problem, linear_guide, particles):
        problem = linear_problem(3, 2, orthogonal=False, size=12)
        guide = linear_guide(problem)
        guide.randomise(0.3)
        exact = gradients(-problem.elbo(guide.law()), guide)
        elbo = ELBO(particles)
        draws = [
            gradients(elbo.differentiable_loss(problem, guide), guide)
            for _ in range(360 // particles)
        ]
        assert within(torch.stack(draws), exact)

    def test_stock_trace_elbo_is_unbiased_with_the_same_guide(self, linear_problem, linear_guide):
        problem = linear_problem(3, 2, orthogonal=False, size=12)
        guide = linear_guide(problem)
        guide.randomise(0.3)
        exact = gradients(-problem.elbo(guide.law()), guide)
        elbo = Trace_ELBO()
        draws = [gradients(elbo.differentiable_loss(problem, guide), guide) for _ in range(400)]
        assert within(torch.stack(draws), exact)

    def test_other_particles_as_baseline_lower_the_variance(self, linear_problem, linear_guide):
        problem = linear_problem(3, 2, orthogonal=False, size=12)
        guide = linear_guide(problem)
        guide.randomise(0.3)

        def variance(elbo: ELBO, count: int) -> torch.Tensor:
            draws = [
                gradients(elbo.differentiable_loss(problem, guide), guide)[:3] for _ in range(count)
            ]
            return torch.stack(draws).var(0).sum()

        # Four particles without a baseline would have a quarter of the variance.
        assert variance(ELBO(4), 60) < 0.25 * variance(ELBO(1), 240)


class TestAgainstPyro:
    @pytest.mark.parametrize("variance", ["tied", "full"])
    @pytest.mark.parametrize("name", SPARSE)
    def test_equals_trace_mean_field(self, classifier, name, variance):
        model, guide, x, y = classifier(name, variance=variance)
        results = []
        for elbo in (ELBO(2, local_reparameterisation=False), TraceMeanField_ELBO(2)):
            torch.manual_seed(0)
            with own_parameters(model, guide):
                loss = elbo.differentiable_loss(model, guide, x, y)
            results.append((loss.detach(), gradients(loss, guide)))
        (ours, our_gradient), (stock, stock_gradient) = results
        torch.testing.assert_close(ours, stock, rtol=1e-10, atol=0)
        torch.testing.assert_close(our_gradient, stock_gradient, rtol=1e-8, atol=1e-10)

    @pytest.mark.parametrize("name", SPARSE)
    def test_equals_trace_mean_field_in_float32(self, classifier, name):
        model, guide, x, y = classifier(name)
        losses = []
        for elbo in (ELBO(local_reparameterisation=False), TraceMeanField_ELBO()):
            torch.manual_seed(0)
            losses.append(elbo.loss(model.float(), guide.float(), x.float(), y))
        assert losses[0] == pytest.approx(losses[1], rel=1e-5)

    @pytest.mark.parametrize("name", SPARSE)
    def test_trace_elbo_agrees_in_expectation(self, classifier, name):
        model, guide, x, y = classifier(name)
        ours, stock = ELBO(local_reparameterisation=False), Trace_ELBO()
        differences = []
        for seed in range(60):
            pair = []
            for elbo in (ours, stock):
                torch.manual_seed(seed)
                pair.append(elbo.loss(model, guide, x, y))
            differences.append(pair[0] - pair[1])
        # The same draws, so that only the KL's sampling noise is left to average out.
        assert within(torch.tensor(differences), 0.0)
        assert torch.tensor(differences).std() > 0

    @pytest.mark.parametrize("name", SPARSE)
    @pytest.mark.parametrize("style", ["ours", "mean field", "trace"])
    def test_stock_svi(self, classifier, name, style):
        # Draws of a relaxed inclusion have no density, which Trace_ELBO needs.
        options = {"inclusion": "score"} if style == "trace" and name[:2] == "ss" else {}
        model, guide, x, y = classifier(name, **options)
        elbo = {"ours": ELBO, "mean field": TraceMeanField_ELBO, "trace": Trace_ELBO}[style]()
        svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.03}), elbo)
        losses = [svi.step(x, y) for _ in range(30)]
        assert sum(losses[-10:]) < sum(losses[:10])

    def test_stock_svi_on_functions(self, linear_problem, linear_guide):
        problem = linear_problem(3, 1, orthogonal=True)

        def guide() -> None:
            logits = pyro.param("logits", torch.zeros(3).double())
            loc = pyro.param("loc", torch.zeros(3, 1).double())
            law = linear_guide(problem)
            law.logits, law.loc = None, None
            law._parameters.update(logits=logits, loc=loc)
            law()

        svi = SVI(problem, guide, pyro.optim.Adam({"lr": 0.05}), ELBO(4))
        losses = [svi.step() for _ in range(60)]
        assert sum(losses[-10:]) < sum(losses[:10])
        assert set(pyro.get_param_store()) == {"logits", "loc"}

    @pytest.mark.parametrize("name", SPARSE)
    @pytest.mark.parametrize("elbo", [ELBO, TraceMeanField_ELBO, Trace_ELBO])
    def test_module_style(self, classifier, name, elbo):
        options = {"inclusion": "score"} if elbo is Trace_ELBO and name[:2] == "ss" else {}
        model, guide, x, y = classifier(name, **options)
        with pyro.settings.context(module_local_params=True):
            loss = elbo()(model, guide)
            assert {id(p) for p in loss.parameters()} == {id(p) for p in guide.parameters()}
            optimizer = torch.optim.Adam(loss.parameters(), lr=0.03)
            losses = []
            for _ in range(40):
                optimizer.zero_grad()
                value = loss(x, y)
                value.backward()
                optimizer.step()
                losses.append(float(value.detach()))
        assert sum(losses[-10:]) < sum(losses[:10])
        assert len(pyro.get_param_store()) == 0

    def test_module_style_needs_no_setting(self, classifier):
        model, guide, x, y = classifier("ss-gl")
        ELBO()(model, guide)(x, y).backward()
        assert all(parameter.grad is not None for parameter in guide.parameters())
        assert len(pyro.get_param_store()) == 0

    def test_score_and_relaxed_guides_share_their_parameters(self, classifier):
        """So training may go on with the other estimator; stock mean field has no score term."""
        model, guide, x, y = classifier("ss-gl", inclusion="score")
        _, relaxed, _, _ = classifier("ss-gl", initial_inclusion=0.6)
        guide.load_state_dict(relaxed.state_dict())
        with own_parameters(model, guide), pytest.raises(NotImplementedError, match="fully rep"):
            TraceMeanField_ELBO().differentiable_loss(model, guide, x, y)

    def test_relaxed_guides_are_refused_where_their_density_is_needed(self, classifier):
        model, guide, x, y = classifier("ss-ig")
        svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.03}), Trace_ELBO())
        with pytest.raises(RuntimeError, match="have no density"):
            svi.step(x, y)

    @pytest.mark.parametrize("name", SPARSE)
    def test_predictive(self, classifier, name):
        model, guide, x, _ = classifier(name)
        draws = Predictive(model, guide=guide, num_samples=5)(x)
        assert draws["y"].shape[0] == 5
        assert draws["y"].shape[-1] == len(x)
        assert draws["fc1.rows"].shape[-2:] == (4, 4)


class TestSites:
    @pytest.mark.parametrize("options", [{}, {"prune_inputs": True}])
    @pytest.mark.parametrize("name", ["SpikeSlabGaussian", "SpikeSlabGroupLasso",
                                      "SpikeSlabGroupHorseshoe"])  # fmt: skip
    @pytest.mark.parametrize("inclusion", ["straight-through", "score"])
    def test_every_kl_is_closed(self, name, options, inclusion):
        x = torch.randn(6, 3)
        model = getattr(models, name)(
            nets.mlp([3, 4, 1]), x[:1], num_data=6, likelihood=Normal(), **options
        )
        guide = guides.for_model(model, inclusion=inclusion)
        closed = ELBO().analytic(model, guide, x, torch.randn(6))
        assert {"fc1.rows", "out.rows", "noise_precision"} <= set(closed)
        assert all(closed.values())

    @pytest.mark.parametrize("prior_scale", [None, 0.7])
    def test_point_masses(self, prior_scale):
        """A flat prior costs nothing, a normal one its log-density."""
        torch.manual_seed(0)
        x, y = torch.randn(6, 3), torch.randint(2, (6,))
        net = nets.mlp([3, 4, 2])
        model = models.Deterministic(net, x[:1], num_data=6, prior_scale=prior_scale)
        guide = guides.for_model(model)
        with torch.no_grad():
            estimate = ELBO().estimate(model, guide, x, y)
        weights = torch.cat([p.detach().flatten() for p in net.parameters()])
        expected = 0.0
        if prior_scale is not None:
            expected = -float(dist.Normal(0.0, prior_scale).log_prob(weights).sum())
        assert float(estimate.kl) == pytest.approx(expected, rel=1e-5, abs=1e-12)
        with torch.no_grad():
            cross_entropy = nn.functional.cross_entropy(net(x), y, reduction="sum")
        assert float(-estimate.log_likelihood) == pytest.approx(float(cross_entropy), rel=1e-5)
        assert set(ELBO().analytic(model, guide, x, y)) == {"fc1.rows", "out.rows"}

    def test_sampled_where_no_kl_is_known(self):
        """A Laplace guide of a Cauchy latent: log q - log p at the draw, as Trace_ELBO has it."""

        def model() -> None:
            pyro.sample("z", dist.Cauchy(0.0, 1.0))

        def guide() -> None:
            pyro.sample("z", dist.Laplace(0.3, 2.0))

        assert ELBO().analytic(model, guide) == {"z": False}
        losses = []
        for elbo in (ELBO(), Trace_ELBO()):
            torch.manual_seed(0)
            losses.append(elbo.loss(model, guide))
        assert losses[0] == pytest.approx(losses[1], rel=1e-6)

    def test_masked_and_scaled_sites(self):
        def law(loc: float) -> dist.Distribution:
            return dist.Normal(torch.full((3,), loc), 1.0).mask(torch.tensor([True, False, True]))

        def model() -> None:
            with pyro.poutine.scale(scale=2.0):
                pyro.sample("z", law(0.0).to_event(1))

        def guide() -> None:
            with pyro.poutine.scale(scale=2.0):
                pyro.sample("z", law(1.0).to_event(1))

        # Two of three, each with a KL of ½, twice.
        assert ELBO().loss(model, guide) == pytest.approx(2.0)

    def test_sites_that_do_not_match(self, linear_problem, linear_guide):
        problem = linear_problem(2, 1, orthogonal=True)

        def nothing() -> None:
            pass

        def more() -> None:
            linear_guide(problem)()
            pyro.sample("gamma", dist.Normal(0.0, 1.0))

        with pytest.raises(ValueError, match="samples the site 'beta', the guide does not"):
            ELBO().loss(problem, nothing)
        with pytest.raises(ValueError, match=r"guide samples \['gamma'\], the model does not"):
            ELBO().loss(problem, more)

    def test_weight_of_the_kl(self, classifier):
        model, guide, x, y = classifier("ss-ghs")
        elbo = ELBO(kl_weight=0.25)
        estimate = elbo.estimate(model, guide, x, y)
        expected = 0.25 * estimate.kl - estimate.log_likelihood
        torch.testing.assert_close(estimate.loss, expected)

    def test_minibatches_stand_for_all_data(self, classifier):
        model, guide, x, y = classifier("ss-ig")
        terms = []
        for batch in (slice(None), slice(0, 12), slice(12, 24)):
            torch.manual_seed(0)
            elbo = ELBO(local_reparameterisation=False)
            terms.append(elbo.estimate(model, guide, x[batch], y[batch]).log_likelihood)
        torch.testing.assert_close(terms[0], (terms[1] + terms[2]) / 2)

    def test_particles_are_counted(self):
        with pytest.raises(ValueError, match="num_particles to be a whole number"):
            ELBO(0)
