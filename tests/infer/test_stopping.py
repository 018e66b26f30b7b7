"""Ctrl-C and SIGTERM: the step is finished, everything is saved, and resuming is exact."""

import os
import signal
import threading

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from pyro_sparse.data import Batches
from pyro_sparse.infer import Interrupted, restore
from pyro_sparse.infer.stopping import StopRequest

SIGNALS = [signal.SIGINT, signal.SIGTERM]


class Signalling:
    """A loader that sends a signal to its own process with the given batch of all."""

    def __init__(self, loader, batch: int, signum: int) -> None:
        self.loader, self.left, self.signum = loader, batch, signum
        self.x, self.y = loader.x, loader.y  # so that the check of the data takes no batch

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self):
        for batch in self.loader:
            self.left -= 1
            if self.left == 0:
                os.kill(os.getpid(), self.signum)
            yield batch

    def state_dict(self):
        return self.loader.state_dict()

    def load_state_dict(self, state):
        self.loader.load_state_dict(state)


def noisy(x: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    return x + 0.1 * torch.randn(x.shape, generator=generator)


class TestResuming:
    # Twelve batches in four epochs: in the first epoch, at the ends of epochs, at the last.
    @pytest.mark.parametrize("batch", [1, 2, 3, 5, 9, 11, 12])
    @pytest.mark.parametrize("signum", SIGNALS)
    def test_goes_on_bit_for_bit(self, tiny, tmp_path, batch, signum):
        def loader():
            return Batches(*tiny.data(), 20, seed=1, augment=noisy)

        options = {"epochs": 4, "lr": 0.02, "validation": tiny.data(30)}
        model, whole = tiny.problem("ss-gl")
        expected = tiny.train(model, whole, loader=loader(), out=tmp_path / "whole", **options)
        out = tmp_path / "cut"
        with pytest.raises(Interrupted, match="--resume") as caught:
            tiny.train(
                *tiny.problem("ss-gl"), loader=Signalling(loader(), batch, signum), out=out,
                **options,
            )  # fmt: skip
        assert caught.value.exit_code == 128 + signum
        assert signal.Signals(signum).name in str(caught.value)
        assert len(caught.value.run.history) == (batch - 1) // 3
        model, resumed = tiny.problem("ss-gl")
        torch.rand(5)
        run = tiny.train(model, resumed, loader=loader(), out=out, resume=True, **options)
        assert tiny.without_seconds(run.history) == tiny.without_seconds(expected.history)
        tiny.assert_equal(tiny.state(resumed), tiny.state(whole))
        assert tiny.without_seconds(tiny.lines(out)) == tiny.without_seconds(expected.history)
        for which in ("last", "best"):
            saved = []
            for folder in (out, tmp_path / "whole"):
                model, guide = tiny.problem("ss-gl")
                restore(folder / "checkpoint" / f"{which}.safetensors", model, guide)
                saved.append(tiny.state(guide))
            tiny.assert_equal(*saved)
        assert not (out / "checkpoint" / "interrupted.safetensors").exists()

    def test_a_data_loader_of_torch(self, tiny, tmp_path):
        """Its order comes from the global generator, as the noise does."""

        def loader():
            return DataLoader(TensorDataset(*tiny.data()), 20, shuffle=True)

        model, whole = tiny.problem()
        expected = tiny.train(model, whole, loader=loader())

        class Cut(DataLoader):
            def __iter__(self):
                for number, batch in enumerate(super().__iter__()):
                    if number == 1:
                        os.kill(os.getpid(), signal.SIGTERM)
                    yield batch

        cut = Cut(TensorDataset(*tiny.data()), 20, shuffle=True)
        with pytest.raises(Interrupted, match="after step 2"):
            tiny.train(*tiny.problem(), loader=cut, out=tmp_path)
        model, resumed = tiny.problem()
        run = tiny.train(model, resumed, loader=loader(), out=tmp_path, resume=True)
        assert tiny.without_seconds(run.history) == tiny.without_seconds(expected.history)
        tiny.assert_equal(tiny.state(resumed), tiny.state(whole))

    def test_stopped_twice_in_one_epoch(self, tiny, tmp_path):
        model, whole = tiny.problem()
        expected = tiny.train(model, whole)
        for batch in (1, 2):
            loader = Signalling(Batches(*tiny.data(), 20, seed=1), batch, signal.SIGINT)
            with pytest.raises(Interrupted, match=f"in epoch 1 of 3, after step {batch};"):
                tiny.train(*tiny.problem(), loader=loader, out=tmp_path, resume=True)
        model, resumed = tiny.problem()
        run = tiny.train(model, resumed, out=tmp_path, resume=True)
        assert tiny.without_seconds(run.history) == tiny.without_seconds(expected.history)
        tiny.assert_equal(tiny.state(resumed), tiny.state(whole))

    def test_one_of_another_epoch_is_ignored(self, tiny, tmp_path):
        """A kill between the write of the last checkpoint and the removal of the other."""
        loader = Signalling(Batches(*tiny.data(), 20, seed=1), 2, signal.SIGINT)
        with pytest.raises(Interrupted):
            tiny.train(*tiny.problem(), loader=loader, out=tmp_path)
        left = tmp_path / "checkpoint" / "interrupted.safetensors"
        content = left.read_bytes()
        model, whole = tiny.problem()
        run = tiny.train(model, whole, out=tmp_path, resume=True)
        left.write_bytes(content)
        model, guide = tiny.problem()
        assert tiny.train(model, guide, out=tmp_path, resume=True).history == run.history
        tiny.assert_equal(tiny.state(guide), tiny.state(whole))

    def test_without_a_folder(self, tiny):
        loader = Signalling(Batches(*tiny.data(), 20), 5, signal.SIGINT)
        with pytest.raises(Interrupted, match="nothing was saved") as caught:
            tiny.train(*tiny.problem(), loader=loader)
        assert [entry["epoch"] for entry in caught.value.run.history] == [1]


class TestHandlers:
    def test_they_are_restored(self, tiny):
        before = [signal.getsignal(signum) for signum in SIGNALS]
        tiny.train(*tiny.problem(), epochs=1)
        assert [signal.getsignal(signum) for signum in SIGNALS] == before
        loader = Signalling(Batches(*tiny.data(), 20), 1, signal.SIGINT)
        with pytest.raises(Interrupted):
            tiny.train(*tiny.problem(), loader=loader)
        assert [signal.getsignal(signum) for signum in SIGNALS] == before

    def test_a_second_one_stops_at_once(self):
        before = signal.getsignal(signal.SIGINT)
        with StopRequest() as stop:
            os.kill(os.getpid(), signal.SIGTERM)
            assert stop.signum == signal.SIGTERM
            with pytest.raises(KeyboardInterrupt):
                os.kill(os.getpid(), signal.SIGINT)
            assert signal.getsignal(signal.SIGINT) == before

    def test_the_callers_own_stay(self):
        seen = []
        before = signal.signal(signal.SIGTERM, lambda signum, frame: seen.append(signum))
        try:
            with StopRequest() as stop:
                os.kill(os.getpid(), signal.SIGTERM)
            assert seen == [signal.SIGTERM]
            assert stop.signum is None
        finally:
            signal.signal(signal.SIGTERM, before)

    def test_other_threads_may_train(self, tiny):
        histories = []
        thread = threading.Thread(
            target=lambda: histories.append(tiny.train(*tiny.problem(), epochs=1).history)
        )
        thread.start()
        thread.join()
        assert len(histories[0]) == 1
