"""Numbers that are no longer finite: named, never saved, and, if asked, tried again."""

import math

import pytest
import torch

from pyro_sparse.data import Batches
from pyro_sparse.infer import Divergence, checkpoint_file, restore
from pyro_sparse.infer.divergence import gradient_sums


class Breaking(Batches):
    """One batch, counted over all epochs, is replaced."""

    def __init__(self, *args, batch: int, by: float, **options) -> None:
        super().__init__(*args, **options)
        self.left, self.by = batch, by

    def __iter__(self):
        for x, y in super().__iter__():
            self.left -= 1
            yield (x.fill_(self.by) if self.left == 0 else x), y


class TestNames:
    def test_the_batch_and_its_step(self, tiny, tmp_path):
        model, guide = tiny.problem()
        loader = Breaking(*tiny.data(), 20, batch=8, by=math.nan)
        message = (
            r"diverged in step 2 of epoch 3: the batch of inputs is not finite; lower .*"
            r"The last good checkpoint is .*last.safetensors, of epoch 2"
        )
        with pytest.raises(FloatingPointError, match=message) as caught:
            tiny.train(model, guide, loader=loader, epochs=5, out=tmp_path)
        assert isinstance(caught.value, Divergence)
        assert (caught.value.epoch, caught.value.step) == (3, 2)
        # No update was made by it, and no checkpoint.
        assert all(parameter.isfinite().all() for parameter in guide.parameters())
        for which in ("last", "best"):
            model, guide = tiny.problem()
            done = restore(checkpoint_file(tmp_path, which), model, guide)
            assert len(done["history"]) <= 2
            assert all(parameter.isfinite().all() for parameter in guide.parameters())
        assert [entry["epoch"] for entry in tiny.lines(tmp_path)] == [1, 2]

    def test_the_log_likelihood(self, tiny):
        loader = Breaking(*tiny.data(), 20, batch=4, by=3e38)
        message = "step 1 of epoch 2: the log-likelihood of the site y is not"
        with pytest.raises(Divergence, match=message):
            tiny.train(*tiny.problem(), loader=loader)

    def test_the_kl_of_a_site(self, tiny):
        model, guide = tiny.problem()
        with torch.no_grad():
            guide.row_families["out"].loc.fill_(1e25)  # its square is not finite, a draw is
        with pytest.raises(Divergence, match=r"in step 1 of epoch 1: the KL of the site out\.rows"):
            tiny.train(model, guide)

    def test_a_gradient(self, tiny):
        """The loss is finite; an infinite gradient is not applied, with and without clipping."""
        for clip_norm in (None, 1.0):
            model, guide = tiny.problem()
            broken = guide.row_families["out"].loc
            before = tiny.state(guide)
            broken.register_hook(lambda gradient: gradient * math.inf)
            name = r"the gradient of row_families\.out\.loc is not finite"
            with pytest.raises(Divergence, match=f"in step 1 of epoch 1: {name}.*No checkpoint"):
                tiny.train(model, guide, clip_norm=clip_norm)
            tiny.assert_equal(tiny.state(guide), before)

    @pytest.mark.parametrize("steps", [2, 3])
    def test_an_update_that_overflows(self, tiny, tmp_path, steps):
        """In the midst of an epoch, and in its last step, which no loss follows."""

        class Overflowing(torch.optim.SGD):
            done = 0

            def step(self, closure=None):
                super().step(closure)
                self.done += 1
                if self.done == steps:
                    self.param_groups[0]["params"][0].data.fill_(math.inf)

        message = rf"step {steps} of epoch 1: the parameter row_families\.fc1\.loc is no longer"
        with pytest.raises(Divergence, match=message):
            tiny.train(*tiny.problem(), out=tmp_path, optimizer=Overflowing, lr=1e-4)
        assert [path.name for path in (tmp_path / "checkpoint").iterdir()] == ["lock"]

    @pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
    def test_every_entry_of_a_gradient_counts(self, value):
        for place in (0, 517, 1199):
            gradient = torch.randn(30, 40)
            assert gradient_sums([None, gradient])[0].isfinite()
            gradient.view(-1)[place] = value
            assert not gradient_sums([None, gradient])[0].isfinite()
        gradient[0, :2] = torch.tensor([math.inf, -math.inf])
        assert not gradient_sums([gradient])[0].isfinite()

    @pytest.mark.parametrize("broken", range(4))
    def test_every_gradient_counts(self, broken):
        """Small ones are summed together, large ones alone; a number, a matrix of either."""
        gradients = [torch.randn(()), torch.randn(3, 4), torch.randn(7), torch.randn(70, 80)]
        assert torch.stack(gradient_sums(gradients)).isfinite().all()
        assert len(gradient_sums(gradients)) == 2
        gradients[broken].view(-1)[-1] = math.nan
        assert not torch.stack(gradient_sums(gradients)).isfinite().all()
        assert gradient_sums([None]) == []


class Forward(Batches):
    """Breaks once in the fifth batch of all, and never again."""

    broken = 0

    def __iter__(self):
        for x, y in super().__iter__():
            self.broken += 1
            yield (x * math.nan if self.broken == 5 else x), y


class TestRetries:
    def test_from_the_last_good_epoch_with_half_the_rates(self, tiny, tmp_path, capsys):
        model, guide = tiny.problem()
        loader = Forward(*tiny.data(), 20, seed=1)
        run = tiny.train(
            model, guide, loader=loader, out=tmp_path, epochs=4, lr=0.01, retries=1, progress=True
        )
        assert "diverged in step 2 of epoch 2" in " ".join(capsys.readouterr().out.split())
        model, undisturbed = tiny.problem()
        other = tiny.train(model, undisturbed, epochs=4, lr=0.01)
        first, second, *rest = run.history
        assert tiny.without_seconds([first]) == tiny.without_seconds(other.history[:1])
        assert second["retries"] == [{"step": 2, "reason": "the batch of inputs is not finite"}]
        assert not any("retries" in entry for entry in rest)
        rates = [entry["lr"] for entry in run.history]
        expected = [entry["lr"] for entry in other.history]
        assert rates == [expected[0], *(0.5 * rate for rate in expected[1:])]
        assert tiny.lines(tmp_path) == run.history

    def test_what_is_tried_again_is_what_the_smaller_rates_give(self, tiny):
        """From the start: as a run with half the rates."""
        model, guide = tiny.problem()
        loader = Breaking(*tiny.data(), 20, seed=1, batch=2, by=math.nan)
        run = tiny.train(model, guide, loader=loader, epochs=2, lr=0.01, retries=3)
        model, half = tiny.problem()
        other = tiny.train(model, half, epochs=2, lr=0.005)
        tiny.assert_equal(tiny.state(guide), tiny.state(half))
        assert [entry["loss"] for entry in run.history] == [e["loss"] for e in other.history]

    def test_a_run_that_was_stopped_after_a_retry(self, tiny, tmp_path):
        def stop(metrics):
            if metrics["epoch"] == 3:
                raise KeyError

        results = []
        for cut in (False, True):
            model, guide = tiny.problem()
            loader = Forward(*tiny.data(), 20, seed=1)
            options = {"out": tmp_path / str(cut), "epochs": 4, "retries": 1}
            if cut:
                with pytest.raises(KeyError):
                    tiny.train(*tiny.problem(), loader=loader, on_epoch=stop, **options)
                loader = Batches(*tiny.data(), 20, seed=1)
            run = tiny.train(model, guide, loader=loader, resume=cut, **options)
            results.append((tiny.without_seconds(run.history), tiny.state(guide)))
        assert results[0][0] == results[1][0]
        tiny.assert_equal(results[0][1], results[1][1])

    def test_it_ends(self, tiny, tmp_path):
        x, y = tiny.data()
        calls = []

        class Always(Batches):
            def __iter__(self):
                calls.append(1)
                for bx, by in super().__iter__():
                    yield (bx if len(calls) == 1 else bx * math.nan), by

        model, guide = tiny.problem()
        with pytest.raises(Divergence, match=r"epoch 2: .* after 2 retries; lower .*of epoch 1"):
            tiny.train(model, guide, loader=Always(x, y, 20), out=tmp_path, retries=2)
        assert len(calls) == 1 + 3
        with pytest.raises(ValueError, match="at least 0 retries"):
            tiny.train(model, guide, retries=-1)
