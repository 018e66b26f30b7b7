"""The Lightning Trainer trains as `fit` does."""

import importlib
import logging
import sys
import warnings

import pytest
import torch

import pyro_sparse as ps
from pyro_sparse import guides, models, nets
from pyro_sparse.data import Batches
from pyro_sparse.infer import schedules

pytest.importorskip("lightning")


@pytest.fixture
def trainer():
    """``trainer(**options)``, quiet and without files."""
    from lightning.pytorch import Trainer

    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)

    def make(**options):
        quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
        return Trainer(
            **{"accelerator": "cpu", "devices": 1, "enable_model_summary": False, **quiet},
            **options,
        )

    # Of the Trainer's own advice on workers and intervals.
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="lightning")
        yield make


def problem():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(40, 3, generator=generator)
    y = (x[:, 0] > 0).long()
    torch.manual_seed(1)
    model = models.SpikeSlabGroupLasso(nets.mlp([3, 6, 2]), x[:2], num_data=40)
    return model, guides.for_model(model), x, y


def state(guide):
    return {name: value.detach().clone() for name, value in guide.named_parameters()}


@pytest.mark.parametrize("clip_norm", [None, 0.05])
def test_ends_where_fit_ends(trainer, clip_norm):
    from pyro_sparse.infer.lightning import SparseModule

    options = {
        "lr": 0.02,
        "schedule": schedules.cosine(),
        "kl_weight": schedules.ramp(0.1, change=0.5),
        "clip_norm": clip_norm,
    }
    model, guide, x, y = problem()
    start = state(guide)
    run = ps.fit(model, guide, Batches(x, y, 8), epochs=4, seed=5, progress=False, **options)
    expected = state(guide)

    model, guide, x, y = problem()
    module = SparseModule(model, guide, **options)
    trains = trainer(max_epochs=4)
    torch.manual_seed(5)
    trains.fit(module, Batches(x, y, 8))
    for name, value in state(guide).items():
        assert not torch.equal(value, start[name])
        torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=1e-6)
    last = run.history[-1]
    logged = {name: float(value) for name, value in trains.logged_metrics.items()}
    assert logged == pytest.approx({name: last[name] for name in logged}, rel=1e-4)
    assert logged.keys() == {"loss", "elbo_per_datum", "kl", "kl_weight"}


def test_progress_towards_max_steps(trainer):
    from pyro_sparse.infer.lightning import SparseModule

    model, guide, x, y = problem()
    seen = []

    def schedule(progress):
        seen.append(progress)
        return 1.0

    module = SparseModule(model, guide, kl_weight=schedule)
    trains = trainer(max_steps=8, limit_val_batches=2)
    trains.fit(module, Batches(x, y, 8), Batches(x, y, 8, shuffle=False))
    assert seen == pytest.approx([step / 8 for step in range(8)])
    assert float(trains.callback_metrics["validation_elbo_per_datum"]) < 0


def test_training_needs_an_end(trainer):
    from pyro_sparse.infer.lightning import SparseModule

    model, guide, x, y = problem()
    with pytest.raises(ValueError, match="give the Trainer max_epochs"):
        trainer(max_epochs=-1).fit(SparseModule(model, guide), Batches(x, y, 8))


def test_options_are_checked_at_once():
    from pyro_sparse.infer.lightning import SparseModule

    model, guide, _, _ = problem()
    with pytest.raises(ValueError, match="positive lr"):
        SparseModule(model, guide, lr=-1.0)


def test_without_lightning_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "lightning.pytorch", None)
    monkeypatch.delitem(sys.modules, "pyro_sparse.infer.lightning", raising=False)
    with pytest.raises(ModuleNotFoundError, match=r"pip install \"pyro-sparse\[lightning\]\""):
        importlib.import_module("pyro_sparse.infer.lightning")
