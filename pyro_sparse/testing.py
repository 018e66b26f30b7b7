"""The cases that every model and every law pass; subclass them to test your own.

::

    from pyro_sparse.testing import ModelTestCase

    class TestMyModel(ModelTestCase):
        def make_model(self, net, example, **shared):
            return MyModel(net, example, **shared)

pytest collects the methods; nothing here needs pytest, so each also runs by hand. A guide is made
with :func:`pyro_sparse.guides.for_model`, for which yours must be registered; override
:meth:`ModelTestCase.make_guide` where it is not.
"""

from __future__ import annotations

import math
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import pyro
import pyro.poutine as poutine
import torch
from torch import Tensor, nn

from pyro_sparse import guides, likelihoods, nets
from pyro_sparse.export import compact
from pyro_sparse.guides import GroupGuide
from pyro_sparse.infer import ELBO
from pyro_sparse.models import SparseModel
from pyro_sparse.modules import own_parameters
from pyro_sparse.posterior import Posterior

__all__ = ["DistributionTestCase", "ModelTestCase"]


def _raises(function: Callable[[], Any]) -> Exception | None:
    try:
        function()
    except Exception as error:
        return error
    return None


class ModelTestCase:
    """What holds for every model and its guide, on small networks of linear layers and channels.

    Attributes:
        proper: whether the prior can be sampled; flat priors set it to False.
        tolerance: largest allowed difference of masked and compact network, float32.
    """

    proper: bool = True
    tolerance: float = 1e-5

    def make_model(self, net: nn.Module, example: Tensor, **shared: Any) -> SparseModel:
        """The model under test.

        Args:
            net: the network.
            example: an input ``(batch, ...)``.
            **shared: ``num_data``, ``likelihood`` and such, as of every model.
        """
        raise NotImplementedError

    def make_guide(self, model: SparseModel) -> GroupGuide:
        """The guide that matches it."""
        return guides.for_model(model)

    # -- what the tests run on -----------------------------------------------------------------

    def cases(
        self, dtype: torch.dtype = torch.float32
    ) -> Iterator[tuple[Any, Any, Tensor, Tensor]]:
        """Model, guide, inputs and targets: classes of vectors and of images, and a regression."""
        for net, shape, likelihood in (
            (nets.mlp([6, 9, 7, 3]), (6,), likelihoods.Categorical()),
            (nets.lenet5_caffe(widths=(3, 4, 8), size=16), (1, 16, 16), likelihoods.Categorical()),
            (nets.mlp([5, 8, 1], activation="relu"), (5,), likelihoods.Normal()),
        ):
            with torch.random.fork_rng([]):
                torch.manual_seed(7)
                x = torch.randn(11, *shape, dtype=dtype)
                classes = isinstance(likelihood, likelihoods.Categorical)
                y = torch.randint(3, (11,)) if classes else torch.randn(11, dtype=dtype)
            model = self.make_model(
                net.to(dtype), x[:2], likelihood=likelihood.to(dtype), num_data=40
            )
            yield model, self.make_guide(model), x, y

    @staticmethod
    def _trace(model: SparseModel, guide: GroupGuide, *args: Any) -> tuple[Any, Any]:
        guide_trace = poutine.trace(guide).get_trace(*args)
        return poutine.trace(poutine.replay(model, trace=guide_trace)).get_trace(*args), guide_trace

    @staticmethod
    def _sites(trace: Any) -> dict[str, Any]:
        return {
            name: site
            for name, site in trace.nodes.items()
            if site["type"] == "sample" and not poutine.util.site_is_subsample(site)
        }

    # -- model and guide -----------------------------------------------------------------------

    def test_guide_has_the_sites_of_the_model(self) -> None:
        """Same names in the same order, same shapes; what the guide draws the prior allows."""
        for model, guide, x, y in self.cases():
            model_trace, guide_trace = self._trace(model, guide, x, y)
            ours, theirs = self._sites(model_trace), self._sites(guide_trace)
            assert [*theirs, "y"] == list(ours), f"guide {list(theirs)}, model {list(ours)}"
            for name, site in theirs.items():
                assert site["fn"].event_shape == ours[name]["fn"].event_shape, name
                assert site["fn"].batch_shape == ours[name]["fn"].batch_shape, name
                assert bool(ours[name]["fn"].support.check(site["value"]).all()), name

    def test_the_prior_can_be_sampled(self) -> None:
        """Forward runs without data, with finite outputs."""
        for model, _, x, _ in self.cases():
            if self.proper:
                assert bool(model(x).isfinite().all())

    def test_every_kl_is_closed(self) -> None:
        """No latent site falls back to sampling its KL."""
        for model, guide, x, y in self.cases():
            sampled = [n for n, closed in ELBO().analytic(model, guide, x, y).items() if not closed]
            assert not sampled, f"no closed KL for {sampled}"

    def test_agrees_with_stock_pyro(self) -> None:
        """The ELBO is that of Pyro's TraceMeanField_ELBO to rounding, in float64."""
        for model, guide, x, y in self.cases(torch.float64):
            losses = []
            for elbo in (ELBO(local_reparameterisation=False), pyro.infer.TraceMeanField_ELBO()):
                pyro.set_rng_seed(3)
                with pyro.validation_enabled(self.proper):
                    losses.append(float(elbo.loss(model, guide, x, y)))
            assert math.isclose(*losses, rel_tol=1e-9), losses

    def test_gradients_are_finite(self) -> None:
        """Every parameter of the guide gets one, with local reparameterisation and without."""
        for local in (True, False):
            for model, guide, x, y in self.cases():
                elbo = ELBO(local_reparameterisation=local)(model, guide)
                elbo(x, y).backward()
                for name, parameter in guide.named_parameters():
                    assert parameter.grad is not None, name
                    assert bool(parameter.grad.isfinite().all()), name

    def test_trains_in_stock_svi(self) -> None:
        """``pyro.infer.SVI`` takes steps and moves the parameters."""
        for model, guide, x, y in self.cases():
            pyro.clear_param_store()
            optimisers: Any = pyro.optim  # whose names are made at run time
            optimizer = optimisers.Adam({"lr": 1e-2})
            svi = pyro.infer.SVI(model, guide, optimizer, pyro.infer.TraceMeanField_ELBO())
            before = [parameter.detach().clone() for parameter in guide.parameters()]
            with pyro.validation_enabled(self.proper):
                assert all(math.isfinite(svi.step(x, y)) for _ in range(3))
            after = list(guide.parameters())
            assert any(not torch.equal(a, b) for a, b in zip(before, after, strict=True))
            pyro.clear_param_store()

    def test_starts_from_the_network(self) -> None:
        """The initial posterior means are the network's own weights, or 0 where a prior says so."""
        for model, guide, _, _ in self.cases():
            initial, mean = model.initial_rows(), guide.mean_rows()
            assert any(bool(rows.any()) for rows in mean.values())
            for group in model.layers:
                assert mean[group.name].shape == tuple(model.row_shape(group))
                inside = mean[group.name] != 0
                cosine = torch.cosine_similarity(mean[group.name], initial[group.name] * inside)
                assert bool((cosine > 1 - 1e-4)[inside.any(1)].all()), group.name

    def test_state_dict_round_trip(self) -> None:
        """A second model and guide take up the first one's state, and predict alike."""
        for (model, guide, x, y), (other, copy, _, _) in zip(
            self.cases(), self.cases(), strict=True
        ):
            ELBO()(model, guide)(x, y).backward()
            with torch.no_grad():
                for parameter in guide.parameters():
                    parameter.add_(0.01 * torch.randn_like(parameter))
            other.load_state_dict(model.state_dict())
            copy.load_state_dict(guide.state_dict())
            everything: dict[str, Tensor] = {}
            first = Posterior(model, guide).masked(x, everything)
            assert torch.equal(first, Posterior(other, copy).masked(x, everything))

    # -- errors --------------------------------------------------------------------------------

    def test_refuses_what_cannot_be(self) -> None:
        """No training examples, or a network without layers, are errors that say so."""
        x = torch.randn(4, 3)
        error = _raises(lambda: self.make_model(nets.mlp([3, 4, 2]), x, num_data=0))
        assert isinstance(error, ValueError)
        assert "num_data" in str(error)
        empty = nn.Sequential(nn.Flatten())
        error = _raises(lambda: self.make_model(empty, x, num_data=9))
        assert isinstance(error, ValueError)
        assert "layer" in str(error)

    # -- the posterior -------------------------------------------------------------------------

    def test_predicts(self) -> None:
        """Draws have the shape of the likelihood's natural output, and differ or are equal."""
        for model, guide, x, _ in self.cases():
            posterior = Posterior(model, guide)
            draws = posterior.predict(x, num_samples=3)
            natural = model.likelihood.natural(posterior.masked(x, {}))
            assert draws.shape == (3, *natural.shape)
            assert bool(draws.isfinite().all())

    def test_default_rule(self) -> None:
        """It gives a mask of units for every group, and the summary counts them."""
        for model, guide, _, _ in self.cases():
            posterior = Posterior(model, guide)
            keep = posterior.keep()
            assert list(keep) == [group.name for group in model.graph]
            for group in model.graph:
                assert keep[group.name].dtype == torch.bool
                assert keep[group.name].shape == (group.size,)
                assert group.prunable or bool(keep[group.name].all())
            for group in posterior.summary().groups:
                assert group.kept == int(keep[group.group].sum())

    def _masks(self, model: SparseModel, seed: int) -> dict[str, Tensor]:
        """About half of the units of every prunable layer, at least one."""
        generator = torch.Generator().manual_seed(seed)
        masks = {}
        for group in model.layers:
            if group.prunable:
                mask = torch.rand(group.size, generator=generator) < 0.5
                mask[int(torch.randint(group.size, (), generator=generator))] = True
                masks[group.name] = mask
        return masks

    def test_compact_equals_masked(self) -> None:
        """For random masks and inputs; and it really is smaller."""
        for model, guide, x, _ in self.cases():
            posterior = Posterior(model, guide)
            dense = nets.count_parameters(compact(posterior, {}))
            for seed in range(3):
                keep = self._masks(model, seed)
                small = compact(posterior, keep)
                for inputs in (x, x[:1]):
                    with torch.no_grad():
                        difference = (small(inputs) - posterior.masked(inputs, keep)).abs().max()
                    assert float(difference) <= self.tolerance, float(difference)
                assert nets.count_macs(small, x) == posterior.macs(keep)
                if not all(bool(mask.all()) for mask in keep.values()):
                    assert nets.count_parameters(small) < dense

    def test_what_is_pruned_stays_out(self) -> None:
        """Pruned units have no influence, get no gradient and pay no KL; training goes on."""
        for model, guide, x, y in self.cases():
            posterior = Posterior(model, guide)
            keep = self._masks(model, 5)
            removed = model.support.restrict(keep)
            guide.reduced()
            assert removed > 0
            assert model.support.restrict(keep) == 0
            for group in posterior.prunable_groups():
                if group.name in keep:
                    assert not bool(posterior.keep()[group.name][~keep[group.name]].any())
            assert torch.equal(posterior.masked(x, {}), posterior.masked(x, keep))
            with own_parameters(model, guide):
                loss = ELBO(local_reparameterisation=False).differentiable_loss(model, guide, x, y)
                loss.backward()
            for group, family in guide.layers():
                out = ~keep.get(group.name, torch.ones(group.size, dtype=torch.bool))
                for name, parameter in family.named_parameters():
                    if parameter.shape[:1] == (group.size,) and parameter.grad is not None:
                        assert not bool(parameter.grad[out].any()), f"{group.name}: {name}"


class DistributionTestCase:
    """What holds for every law of single numbers; subclass it to test your own.

    ::

        class TestMyLaw(DistributionTestCase):
            parameters = {"loc": [0.3, -1.0], "scale": [0.5, 2.0]}
            grid = (-20.0, 20.0)

            def make_law(self, **parameters):
                return MyLaw(**parameters, validate_args=False)

    Attributes:
        parameters: numbers of each parameter, all of one length: the batch.
        grid: an interval that holds all but 1e-6 of every member's mass.
        atoms: points that have a probability of their own.
        values: points inside the support at which derivatives are compared, one a member.
    """

    parameters: dict[str, list[float]]
    grid: tuple[float, float]
    atoms: tuple[float, ...] = ()
    values: list[float]

    def make_law(self, **parameters: Tensor) -> Any:
        """The law under test, without validation of its arguments."""
        raise NotImplementedError

    def _inputs(self, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
        return {name: torch.tensor(v, dtype=dtype) for name, v in self.parameters.items()}

    def _expectation(self, law: Any, function: Callable[[Tensor], Tensor]) -> Tensor:
        """By quadrature between the atoms, and by the mass on them."""
        edges = torch.linspace(*self.grid, 200_001, dtype=torch.float64)
        x = (0.5 * (edges[1:] + edges[:-1])).unsqueeze(-1)
        total = (law.log_prob(x).exp() * function(x)).sum(0) * (edges[1] - edges[0])
        for atom in self.atoms:
            point = torch.full(law.batch_shape, atom, dtype=torch.float64)
            total = total + law.log_prob(point).exp() * function(point)
        return total

    def test_density_and_moments(self) -> None:
        """It integrates to 1; mean and variance are its, and those of 20 000 draws."""
        law = self.make_law(**self._inputs())
        close = torch.testing.assert_close
        mean = self._expectation(law, lambda x: x)
        variance = self._expectation(law, lambda x: (x - mean).square())
        close(self._expectation(law, torch.ones_like), torch.ones_like(mean), rtol=0, atol=1e-5)
        close(law.mean, mean, rtol=1e-4, atol=1e-5)
        close(law.variance, variance, rtol=1e-4, atol=1e-5)
        with torch.random.fork_rng([]):
            torch.manual_seed(0)
            draws = law.sample((20_000,))
        assert bool(((draws.mean(0) - mean).abs() < 5 * (variance / len(draws)).sqrt()).all())

    def test_quantiles(self) -> None:
        """Where they are offered: icdf and cdf are inverse, and the density is the slope."""
        law = self.make_law(**self._inputs())
        value = torch.tensor(self.values, dtype=torch.float64, requires_grad=True)
        try:
            probability = law.cdf(value)
        except NotImplementedError:
            return
        torch.testing.assert_close(law.icdf(probability.detach()), value.detach())
        (slope,) = torch.autograd.grad(probability.sum(), value)
        torch.testing.assert_close(slope, law.log_prob(value.detach()).exp())

    def test_shapes(self) -> None:
        """``expand``, ``mask``, ``to_event`` and a pickled copy have the same density."""
        law = self.make_law(**self._inputs())
        value = torch.tensor(self.values, dtype=torch.float64)
        expected, (size,) = law.log_prob(value), law.batch_shape
        assert law.sample((3,)).shape == (3, size)
        wide = law.expand([4, size])
        assert wide.sample().shape == (4, size)
        assert torch.equal(wide.log_prob(value), expected.expand(4, size))
        mask = torch.arange(size) > 0
        assert torch.equal(law.mask(mask).log_prob(value), expected * mask)
        event = law.to_event(1)
        assert event.event_shape == (size,)
        torch.testing.assert_close(event.log_prob(value), expected.sum())
        assert torch.equal(pickle.loads(pickle.dumps(law)).log_prob(value), expected)
        assert self.make_law(**self._inputs(torch.float32)).sample().dtype == torch.float32

    def test_derivatives(self) -> None:
        """Of densities to second order, of draws with fixed noise, and under ``torch.func``."""
        inputs = [*self._inputs().values(), torch.tensor(self.values, dtype=torch.float64)]

        def log_prob(*inputs: Tensor) -> Tensor:
            *parameters, value = inputs
            law = self.make_law(**dict(zip(self.parameters, parameters, strict=True)))
            return law.log_prob(value)

        batched = torch.func.vmap(log_prob)(*inputs)
        torch.testing.assert_close(batched, log_prob(*inputs))
        leaves = [value.clone().requires_grad_() for value in inputs]
        assert torch.autograd.gradcheck(log_prob, leaves, rtol=1e-4)
        assert torch.autograd.gradgradcheck(log_prob, leaves, rtol=1e-3, atol=1e-4)
        if not self.make_law(**dict(zip(self.parameters, leaves[:-1], strict=True))).has_rsample:
            return

        def draw(*parameters: Tensor) -> Tensor:
            with torch.random.fork_rng([]):
                torch.manual_seed(0)
                law = self.make_law(**dict(zip(self.parameters, parameters, strict=True)))
                return law.rsample((5,))

        assert torch.autograd.gradcheck(draw, leaves[:-1], rtol=1e-4)
