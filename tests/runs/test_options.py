"""Options come from constructors: every one of the zoo is reached, and one's own without more."""

import dataclasses
import typing

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn

from pyro_sparse import data, guides, infer, models
from pyro_sparse.posterior import Posterior
from pyro_sparse.runs import experiment, options
from pyro_sparse.runs.comparison import entry_settings
from pyro_sparse.runs.zoo import ZOO

BAYESIAN = [entry for entry in ZOO.values() if entry.bayesian or entry.name == "dense"]
WORDS = {
    "output": "1",
    "variance": "row",
    "initial_scale": "0.05",
    "inclusion_probability": "0.3",
    "inclusion": "soft",
    "inclusion_draws": "example",
    "scale_draws": "example",
    "noise_draws": "example",
    "last_layer": "joint",
    "initial_unit_scale": "0.04",
    "block_size": "2",
    "prior_scale": "0.7",
    "low": "-15",
    "high": "-0.5",
    "regularisation": "10",
}
"""A value that is not the default, of options of which half the default plus a little is none."""


def another(option: options.Option) -> str:
    """A valid value of an option that is not its default, as one writes it."""
    if option.name in WORDS:
        return WORDS[option.name]
    if option.hint is bool:
        return str(not option.default).lower()
    assert isinstance(option.default, (int, float)), f"say a value for {option.name}"
    if isinstance(option.default, int):
        return str(option.default + 1)
    return repr(option.default * 0.85 + 0.013)


def cases():
    for entry in BAYESIAN:
        for of in (options.of_model(entry), options.of_guide("matched", entry)):
            for one in of.known.values():
                yield pytest.param(entry, one, id=f"{entry.name}-{one.name}")


class Two(nn.Module):
    """A network of two outputs."""

    def __init__(self, features, outputs):
        super().__init__()
        self.hidden, self.out = nn.Linear(features, 4), nn.Linear(4, outputs)

    def forward(self, x):
        hidden = self.hidden(x).relu()
        return hidden, self.out(hidden)


def two(input_shape, outputs):
    return Two(*input_shape, outputs)


@pytest.fixture(scope="module")
def table():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(40, 4, generator=generator)
    part = data.Split(x, (x[:, 0] > 0).long())
    return data.Dataset("tiny", "classification", part, part, part, 2, None, {"inputs": {}})


@pytest.mark.parametrize(("entry", "option"), list(cases()))
def test_every_option_is_reached_and_trains(entry, option, table):
    value = another(option)
    net = f"{__name__}:two" if option.name == "output" else "mlp:4"
    written = f"{entry.name}:{option.name.replace('_', '-')}={value},net={net},epochs=1"
    settings = entry_settings(written, table)
    chosen = {**settings.model_options, **settings.guide_options}[option.name]
    assert str(chosen).lower() == value or chosen == pytest.approx(float(value))
    assert chosen != option.default
    model, guide, _ = experiment.prepare(settings, table)
    batches = data.Batches(table.train.x, table.train.y, 40, seed=0)
    fitted = infer.fit(model, guide, batches, epochs=1, seed=0, progress=False)
    assert len(fitted.history) == 1


@pytest.mark.parametrize("entry", BAYESIAN, ids=lambda entry: entry.name)
def test_every_option_is_documented(entry):
    for of in (options.of_model(entry), options.of_guide("matched", entry)):
        assert not of.open
        for name, one in of.known.items():
            assert one.text, f"the docstring of {entry.name} says nothing of {name}"


class Mine(models.SpikeSlabGaussian):
    """A model of one's own.

    Args:
        sharpness: how sharp. Nothing else.
        steps: how many, if any.
    """

    def __init__(
        self, net, example, *, sharpness: float = 1.0, steps: "int | None" = None, **shared
    ):
        super().__init__(net, example, **shared)
        self.sharpness, self.steps = sharpness, steps


class MyGuide(guides.SpikeSlabGaussian):
    """A guide of one's own, for any spike-and-slab model."""

    def __init__(self, model, *, width=3, mode: typing.Literal["a", "b"] = "a", **options):
        super().__init__(model, **options)
        self.width, self.mode = width, mode


@pytest.fixture
def mine(monkeypatch):
    entry = dataclasses.replace(ZOO["ss-ig"], name="mine", model=f"{__name__}:Mine")
    monkeypatch.setitem(ZOO, "mine", entry)
    return entry


def test_options_of_ones_own(mine, table):
    found = options.of_model(mine).known
    assert (found["sharpness"].default, found["sharpness"].text) == (1.0, "how sharp")
    settings = entry_settings("mine:sharpness=3,steps=none,slab-scale=2,variance=full", table)
    model, guide = experiment.build(settings, table)
    assert (model.sharpness, model.steps, float(model.slab_scale)) == (3.0, None, 2.0)
    assert settings.guide_options["variance"] == "full"
    assert isinstance(guide, guides.SpikeSlabGaussian)


def test_a_guide_of_ones_own(table):
    written = f"ss-ig:guide={__name__}:MyGuide,width=5,mode=b,variance=full"
    settings = entry_settings(written, table)
    _, guide = experiment.build(settings, table)
    assert (type(guide), guide.width, guide.mode) == (MyGuide, 5, "b")
    with pytest.raises(ValueError, match=r"mode must be one of a, b, got 'c'"):
        entry_settings(f"ss-ig:guide={__name__}:MyGuide,mode=c", table)
    with pytest.raises(ValueError, match="expected package"):
        entry_settings("ss-ig:guide=no.such:Class", table)


def test_a_function_that_makes_the_guide(mine, table, monkeypatch):
    """Its ``**options`` tell nothing: they are taken, and what the guide refuses is an error."""
    made = guides.for_model.dispatch(Mine)
    function = lambda model, **chosen: MyGuide(model, **chosen)  # noqa: E731
    guides.for_model.register(Mine, function)
    try:
        settings = entry_settings("mine:width=5,variance=full", table)
        _, guide = experiment.build(settings, table)
        assert guide.width == 5
        with pytest.raises(ValueError, match="unexpected keyword argument 'wdth'"):
            experiment.build(entry_settings("mine:wdth=5", table), table)
    finally:
        guides.for_model.register(Mine, made)


def point_guide(model, *, spread=0.1):
    """A guide that is a function, of any model whose latents are rows."""
    start = model.initial_rows()

    def guide(x=None, y=None):
        for group in model.layers:
            loc = pyro.param(f"{group.name}.loc", start[group.name].clone())
            pyro.sample(f"{group.name}.rows", dist.Normal(loc, spread).to_event(2))

    return guide


def test_a_guide_that_is_a_function(table):
    with pyro.get_param_store().scope():
        written = f"bmr:guide={__name__}:point_guide,spread=0.2"
        model, guide = experiment.build(entry_settings(written, table), table)
        assert isinstance(guide, guides.HandWritten)
        loader = data.Batches(table.train.x, table.train.y, 50)
        run = infer.fit(model, guide, loader, epochs=1, progress=False)
        assert len(run.history) == 1


class Clashing(models.SpikeSlabGaussian):
    """An option that every run has."""

    def __init__(self, net, example, *, seed=0, **shared):
        super().__init__(net, example, **shared)


def test_an_option_with_the_name_of_a_setting_is_refused(monkeypatch, table):
    entry = dataclasses.replace(ZOO["ss-ig"], name="clash", model=f"{__name__}:Clashing")
    monkeypatch.setitem(ZOO, "clash", entry)
    with pytest.raises(ValueError, match="option seed, as every run; rename it"):
        entry_settings("clash", table)


@pytest.mark.parametrize(
    ("hint", "text", "value"),
    [
        (float, "1e-3", 1e-3),
        (float | str, "balanced", "balanced"),
        (int | None, "none", None),
        (bool, "yes", True),
        (typing.Optional[int], "3", 3),  # noqa: UP045
        (None, "3", 3),
        (None, "true", True),
        (None, "word", "word"),
    ],
)
def test_values(hint, text, value):
    assert options.parse_value(hint, text) == value
    assert type(options.parse_value(hint, text)) is type(value)


def test_networks_without_hidden_layers_are_kept_whole(table):
    settings = entry_settings("ss-ig:net=mlp:,epochs=1", table)
    model, guide, _ = experiment.prepare(settings, table)
    assert all(bool(mask.all()) for mask in Posterior(model, guide).keep().values())
