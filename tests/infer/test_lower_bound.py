"""The evidence lower bound of validation data, and which epoch it makes the best."""

import math

import pytest
import torch

from pyro_sparse.data import Batches
from pyro_sparse.infer import (
    ELBO,
    checkpoint_file,
    lower_bound,
    restore,
    schedules,
    without_evidence,
)
from pyro_sparse.posterior import Posterior, log_weights


def test_it_is_scaled_to_the_training_data(tiny):
    """(N/n) Σ log p(y | draw) − KL, at full weight: for one draw of weights, by hand."""
    model, guide = tiny.problem("dense")
    x, y = tiny.data(24)
    bound = lower_bound(model, guide, [(x, y)], draws=1)
    kl = ELBO().estimate(model, guide, x, y).kl
    # The dense baseline's draws are its parameters, so any draw is the posterior mean.
    log_probs = Posterior(model, guide).masked(x).log_softmax(-1)
    expected = 60 / 24 * log_probs.gather(1, y[:, None]).sum()
    assert bound.log_likelihood == pytest.approx(float(expected), rel=1e-5)
    assert bound.kl == pytest.approx(float(kl), rel=1e-5)
    assert bound.value == bound.log_likelihood - bound.kl
    uneven = lower_bound(model, guide, [(x[:5], y[:5]), (x[5:], y[5:])], draws=3)
    assert uneven.value == pytest.approx(bound.value, rel=1e-5)
    with pytest.raises(ValueError, match="at least one batch"):
        lower_bound(model, guide, [])


@pytest.mark.parametrize("name", ["bc-gnj", "ss-ghs"])
def test_by_closed_forms_or_by_draws_it_is_one_number(tiny, name):
    """The constant that an improper prior leaves open is the same in KL and density."""
    model, guide = tiny.problem(name)
    x, y = tiny.data(60)
    bound = lower_bound(model, guide, [(x, y)], draws=400)
    ratios = log_weights(model, guide, x, y, num_samples=400)
    error = math.hypot(bound.error, float(ratios.std()) / 20)
    # The KL of a Jeffreys scale is an approximation, within 0.01 nats a unit.
    assert bound.value == pytest.approx(float(ratios.mean()), abs=4 * error + 0.2)
    assert error < 3


@pytest.mark.parametrize(
    ("name", "reason"),
    [("bc-gnj", "improper"), ("dense", "point estimate"), ("sbp", "point estimate")]
    + [(name, None) for name in ("ss-ig", "ss-gl", "ss-ghs", "bmr", "bc-ghs")],
)
def test_which_models_have_an_evidence(tiny, name, reason):
    found = without_evidence(*tiny.problem(name), *tiny.data(4))
    assert found is None if reason is None else reason in found


def test_a_seed_decides_the_draws(tiny):
    model, guide = tiny.problem("ss-ghs")
    x, y = tiny.data()
    loader = Batches(x, y, 20)
    before = torch.get_rng_state(), loader.generator.get_state()
    first = lower_bound(model, guide, loader, draws=2, seed=1)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert torch.equal(loader.generator.get_state(), before[1])
    torch.rand(3)
    assert lower_bound(model, guide, loader, draws=2, seed=1) == first
    assert lower_bound(model, guide, loader, draws=2, seed=2) != first


class TestBest:
    @pytest.mark.parametrize("as_loader", [False, True])
    def test_validation_does_not_disturb_training(self, tiny, as_loader):
        held_out = tiny.data(40)
        model, plain = tiny.problem("ss-gl")
        run = tiny.train(model, plain)
        model, guide = tiny.problem("ss-gl")
        validation = Batches(*held_out, 16) if as_loader else held_out
        other = tiny.train(model, guide, validation=validation)
        tiny.assert_equal(tiny.state(guide), tiny.state(plain))
        bounds = [entry.pop("validation_elbo_per_datum") for entry in other.history]
        assert tiny.without_seconds(other.history) == tiny.without_seconds(run.history)
        assert all(math.isfinite(bound) for bound in bounds)
        assert len(set(bounds)) == 3

    def test_the_recorded_bound_is_that_of_the_saved_state(self, tiny, tmp_path):
        held_out = tiny.data(40)

        def worsen(metrics):
            """The second epoch is spoilt, and with it what follows."""
            if metrics["epoch"] == 2:
                with torch.no_grad():
                    guide.row_families["out"].loc.mul_(-20)

        model, guide = tiny.problem()
        run = tiny.train(
            model, guide, validation=held_out, on_epoch=worsen, out=tmp_path, lr=1e-3, seed=3
        )
        bounds = [entry["validation_elbo_per_datum"] for entry in run.history]
        assert max(bounds) == bounds[0]
        assert run.best is run.history[0]
        for which, epoch in (("best", 1), ("last", 3)):
            model, guide = tiny.problem()
            done = restore(checkpoint_file(tmp_path, which), model, guide)
            assert len(done["history"]) == epoch
            bound = lower_bound(model, guide, [held_out], draws=4, seed=3).value / 60
            assert bound == pytest.approx(bounds[epoch - 1], rel=1e-6)

    def test_a_cheap_kl_does_not_win(self, tiny):
        """Without validation data: the bound at full weight, not the loss as it was weighted."""
        run = tiny.train(
            *tiny.problem(), epochs=8, lr=0.02, kl_weight=schedules.ramp(1e-3, 0.5, 0.0)
        )
        losses = [entry["loss"] for entry in run.history]
        assert losses.index(min(losses)) < 4
        assert run.best["epoch"] == max(run.history, key=lambda e: e["elbo_per_datum"])["epoch"] > 4

    def test_what_is_not_finite_is_never_the_best(self, tiny):
        run = tiny.train(*tiny.problem())
        run.history[1]["validation_elbo_per_datum"] = math.nan
        assert run.best is not run.history[1]

    def test_validation_data_are_checked(self, tiny):
        x, y = tiny.data()
        with pytest.raises(ValueError, match="validation data: expected labels"):
            tiny.train(*tiny.problem(), validation=(x, y + 5))
        with pytest.raises(ValueError, match="validation data: expected labels"):
            tiny.train(*tiny.problem(), validation=[(x, y + 5)])
