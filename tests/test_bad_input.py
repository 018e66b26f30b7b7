"""What is wrong is refused before any work, in words of ours: a table over the public API.

Every row is one wrong value of one argument. Right is an error of a documented class that this
package raises, and not what it calls: somebody has looked at the value before anything was done.
"""

import math
import traceback
import warnings
from functools import cache, partial
from pathlib import Path

import pytest
import torch
from torch import nn

import pyro_sparse as ps

ROOT = Path(__file__).parents[1]
NAN, INF = math.nan, math.inf
X, Y = torch.randn(12, 5, generator=torch.Generator().manual_seed(0)), torch.arange(12) % 3
NUMBERS = torch.linspace(-1, 1, 12)

# -- makers ------------------------------------------------------------------------------------


def net():
    return ps.nets.mlp([5, 4, 3])


def model(name="SpikeSlabGaussian", **options):
    given = {"num_data": 12, **options}
    made = given.pop("net") if "net" in given else net()
    return getattr(ps.models, name)(made, given.pop("example", X), **given)


def guide(name="SpikeSlabGaussian", **options):
    return ps.guides.for_model(model(name), **options)


@cache
def posterior():
    return ps.Posterior(one := model(), ps.guides.for_model(one))


def fit(x=X, y=Y, batch_size=4, **options):
    loader = options.pop("loader") if "loader" in options else ps.data.Batches(x, y, batch_size)
    chosen = {"epochs": 1, "progress": False, **options}
    return ps.fit(posterior().model, posterior().guide, loader, **chosen)


def posterior_of(method, *given, **options):
    return getattr(posterior(), method)(*given, **options)


def regression(y, **options):
    one = model(net=ps.nets.mlp([5, 4, 1]), likelihood=ps.likelihoods.Normal(), **options)
    return ps.Posterior(one, ps.guides.for_model(one)).evaluate(X, y)


# -- the table ---------------------------------------------------------------------------------

POSITIVE = (0.0, -1.0, NAN, INF, "wide", [1.0])
PROBABILITY = (0.0, 1.0, -0.1, 1.5, NAN, "often", [0.5], None)
COUNT = (0, -3, 2.5, NAN, "many", None, True)
WORD = ("", "nonesuch", 3, None)

MODELS = {
    "SpikeSlabGaussian": {
        "num_data": COUNT,
        "inclusion_probability": (0.0, 1.0, -0.1, 1.5, NAN, "often"),
        "slab_scale": (0.0, -1.0, NAN, INF, "wide"),
        "output_scale": (0.0, -1.0, NAN, INF, "wide"),
        "input_inclusion_probability": (0.0, 1.0, NAN, "often"),
        "inclusion_constant": (-1.0, NAN, INF, "small", [1.0]),
        "inclusion_floor": (-0.1, 1.0, NAN, "low"),
        "prune_inputs": ("maybe", 2, None),
        "likelihood": ("categorical", 3, nn.Linear(2, 2)),
        "output": ("nonesuch", 7),
        "sharpness": (1.0,),
    },
    "SpikeSlabGroupLasso": {"varsigma2_shape": POSITIVE, "varsigma2_rate": POSITIVE},
    "SpikeSlabGroupHorseshoe": {
        "global_scale": POSITIVE,
        "local_scale": POSITIVE,
        "regularisation": (0.0, -1.0, NAN, "wide"),
    },
    "GroupHorseshoe": {"global_scale": POSITIVE, "local_scale": POSITIVE},
    "LogNormalNoise": {"low": (1.0, NAN, -INF, "low"), "high": (-30.0, NAN, INF, "high")},
    "ReducibleGaussian": {"prior_scale": POSITIVE},
    "Deterministic": {"prior_scale": (0.0, -1.0, NAN, INF, "wide")},
    "TurboMarkov": {
        "density": PROBABILITY,
        "persistence": (-0.5, 1.5, NAN, "long"),
        "shape": POSITIVE,
        "norm": POSITIVE,
        "off_shape": POSITIVE,
        "off_norm": POSITIVE,
        "block_size": (0, -2, 2.5, "big"),
    },
}
GUIDES = {
    "SpikeSlabGaussian": {
        "variance": ("diagonal", "rank-0", "rank-x", 3, None),
        "initial_scale": (0.0, -1.0, NAN, INF, "wide"),
        "initial_inclusion": PROBABILITY,
        "inclusion": ("gumbel", 3),
        "temperature": POSITIVE,
        "inclusion_draws": WORD,
        "sharpness": (1.0,),
    },
    "SpikeSlabGroupLasso": {"initial_tau2": POSITIVE, "initial_log_scale": POSITIVE},
    "SpikeSlabGroupHorseshoe": {"initial_local_scale": POSITIVE, "initial_log_scale": POSITIVE},
    "LogNormalNoise": {
        "initial_loc": (NAN, INF, "here"),
        "initial_log_scale": (NAN, INF, "wide"),
        "noise_draws": WORD,
    },
    "ReducibleGaussian": {"variance": WORD, "initial_scale": POSITIVE, "last_layer": WORD},
    "GroupNormalJeffreys": {"initial_unit_scale": POSITIVE, "scale_draws": WORD},
    "GroupHorseshoe": {"initial_log_scale": POSITIVE},
    "TurboMarkov": {"update_every": COUNT},
}
FIT = {
    "epochs": COUNT,
    "lr": POSITIVE,
    "inclusion_lr": (0.0, -1.0, NAN, INF, "fast"),
    "scale_lr": (0.0, -1.0, NAN, INF, "fast"),
    "clip_norm": (0.0, -1.0, NAN, "short"),
    "num_particles": (0, -1, 1.5, "few"),
    "schedule": ("cosine", 3.0),
    "kl_weight": ("ramp", 1.0),
    "resume": ("yes",),
    "patience": (1,),
    "validation": (3,),
    "x": (X[:, :4], X[:6], X.double(), X * NAN, X.long(), X[0], None),
    "y": (Y + 1, Y - 1, Y[:6], Y.float(), Y[:, None], NUMBERS, None),
    "batch_size": COUNT,
    "loader": (
        [],
        [(X, Y + 7)],
        [(X,)],
        [X],
        [(X, Y), (X[:, :3], Y)],
        [(X, Y), (X, Y[:, None])],
        3,
    ),
}
BATCHES = {
    "x": (X[:6], None, [1, 2], X[0, 0]),
    "y": (Y[:6], None, "labels"),
    "batch_size": COUNT,
    "seed": ("one", 1.5, None),
    "generator": (3,),
}
LOAD = {
    "name": ("digitz", "", "csv:", "csv:nowhere.csv", 3, None),
    "validation": (1.0, -0.1, NAN, "some"),
    "split": (99, -1, "first"),
    "seed": ("one", 1.5),
    "target": ("y",),
    "task": ("ranking",),
    "drop": (["y"],),
    "missing": ("guess",),
    "root": ("/nowhere/at/all",),
}
KEEP = {group: torch.ones(4, dtype=torch.bool) for group in ("fc1",)}
RULES = ps.posterior

MAGNITUDE = RULES.importance.magnitude
OF_RULES = {
    ("MedianProbability", "threshold", RULES.MedianProbability): (NAN, -0.1, 1.5, "half", None),
    ("FalseDiscovery", "level", RULES.FalseDiscovery): (NAN, -0.1, 1.5, "half", None),
    ("MACBudget", "macs", RULES.MACBudget): (NAN, -3.0, "many", None),
    ("TopK", "k", partial(RULES.TopK, MAGNITUDE)): (
        *(NAN, -3, "many", None, 1.5),
        *({"fc7": 2}, {"fc1": -1}),
    ),
    ("LogAlpha", "threshold", RULES.LogAlpha): (NAN, "large", None),
    ("SignalToNoise", "threshold", RULES.SignalToNoise): (NAN, "large", None),
    ("Threshold", "threshold", partial(RULES.Threshold, MAGNITUDE)): (NAN, "large", None),
}


def rows():
    """(name, call) of every row."""
    for name, options in MODELS.items():
        for option, values in options.items():
            for value in values:
                yield (
                    f"models.{name}",
                    option,
                    value,
                    partial(model, name, **{option: value}),
                )
    for name, options in GUIDES.items():
        for option, values in options.items():
            for value in values:
                yield (
                    f"guides.{name}",
                    option,
                    value,
                    partial(guide, name, **{option: value}),
                )
    for option, values in FIT.items():
        for value in values:
            yield "fit", option, value, partial(fit, **{option: value})
    for option, values in BATCHES.items():
        for value in values:
            given = {"x": X, "y": Y, "batch_size": 4, option: value}
            yield "data.Batches", option, value, lambda g=given: ps.data.Batches(**g)
    for option, values in LOAD.items():
        for value in values:
            given = {"name": "yacht" if option in ("root", "split") else "digits", option: value}
            yield "data.load", option, value, lambda g=given: ps.data.load(**g)
    for one in (nn.Sequential(), nn.Flatten(), nn.ReLU(), 3, None, ps.nets.mlp):
        yield "model", "net", one, partial(model, net=one)
    for one in (X[:, :3], X[0], X.long(), None, 3, "rows", X[:0]):
        yield (
            "model",
            "example",
            one,
            partial(model, example=one),
        )
    for one in (3, None, net(), ps.models.SpikeSlabGaussian):
        yield "guides.for_model", "model", one, lambda v=one: ps.guides.for_model(v)
    for one in (3, None, net()):
        yield "Posterior", "model", one, lambda v=one: ps.Posterior(v, guide())
        yield "Posterior", "guide", one, lambda v=one: ps.Posterior(model(), v)
    for method in ("evaluate", "calibration", "khat"):
        for option, values in {
            "x": (X[:, :4], X[:6], X * NAN, X[0], None),
            "y": (Y + 1, Y - 1, Y[:6], Y[:, None], Y.float() + 0.5, Y[:1], None),
            "num_samples": COUNT,
        }.items():
            for value in values:
                given = {"x": X, "y": Y, "num_samples": 2, option: value}
                yield method, option, value, lambda m=method, g=given: posterior_of(m, **g)
    for value in (NUMBERS[:, None], NUMBERS[:1], NUMBERS[:5], NUMBERS.repeat(2), NUMBERS * NAN):
        yield "evaluate", "numbers", value, lambda v=value: regression(v)
    for method in ("predict", "masked"):
        for value in (X[:, :4], X[0], None, "rows", 3):
            yield method, "x", value, lambda m=method, v=value: posterior_of(m, v)
    for value in COUNT:
        yield "predict", "num_samples", value, lambda v=value: posterior_of("predict", X, v)
    masks = (
        {"fc7": torch.ones(4, dtype=torch.bool)},
        {"fc1": torch.ones(3, dtype=torch.bool)},
        {"fc1": torch.ones(4)},
        {"fc1": torch.full((4,), NAN)},
        {"fc1": [True] * 4},
        3,
    )
    for value in masks:
        yield "compact", "keep", value, lambda v=value: ps.compact(posterior(), v)
        yield "masked", "keep", value, lambda v=value: posterior_of("masked", X, v)
    yield "compact", "rule", "both", lambda: ps.compact(posterior(), KEEP, rule=RULES.Connected())
    for value in (0, -1, 2.5, "eight"):
        yield "compact", "align", value, lambda v=value: ps.compact(posterior(), align=v)
    for value in (3, None, net(), model()):
        yield "compact", "posterior", value, lambda v=value: ps.compact(v)
    for (name, argument, rule), values in OF_RULES.items():
        for value in values:
            yield name, argument, value, lambda r=rule, v=value: posterior_of("keep", r(v))
    for value in (-0.5, 1.5, NAN, "low"):
        yield (
            "select_inputs",
            "level",
            value,
            lambda v=value: RULES.select_inputs(torch.tensor([0.2, 0.9]), level=v),
        )
    for value in (torch.tensor([0.2, 1.9]), torch.tensor([NAN, 0.5]), torch.ones(2, 2), 3, None):
        yield (
            "select_inputs",
            "probability",
            value,
            lambda v=value: RULES.select_inputs(v, level=0.1),
        )
    normal = {"x": X, "y": NUMBERS, "likelihood": ps.likelihoods.Normal(0.5)}
    for name in ("gibbs", "enumerate_supports"):
        few = {"num_samples": 5, "warmup": 2, "num_chains": 1} if name == "gibbs" else {}
        for option, values in {
            "x": (X[:6], X * NAN, X[0], None, "rows"),
            "y": (NUMBERS[:6], NUMBERS * NAN, NUMBERS[:, None], None),
            "likelihood": (None, 3, "normal"),
            "inclusion": (-0.1, 1.1, NAN, "often", [0.5, 0.5], torch.full((7,), 0.5)),
            "slab_scale": (0.0, -1.0, NAN, "wide", [1.0, 1.0]),
            "groups": ([0, 1], ["a"] * 7, 3),
        }.items():
            for value in values:
                given = {**normal, **few, option: value}
                yield name, option, value, lambda n=name, g=given: getattr(ps.infer, n)(**g)
    for option, values in {"num_samples": COUNT, "warmup": (-1, 2.5), "num_chains": COUNT}.items():
        for value in values:
            given = {**normal, "num_samples": 5, "warmup": 2, "num_chains": 1, option: value}
            yield "gibbs", option, value, lambda g=given: ps.infer.gibbs(**g)
    for option, values in {
        "num_particles": COUNT,
        "kl_weight": (-0.1, NAN, "one", None),
    }.items():
        for value in values:
            yield "ELBO", option, value, lambda o=option, v=value: ps.infer.ELBO(**{o: v})
    for value in (0.0, -1.0, NAN, "wide"):
        yield "Normal", "noise_scale", value, lambda v=value: ps.likelihoods.Normal(v)
        yield "Normal", "shape", value, lambda v=value: ps.likelihoods.Normal(shape=v)
        yield "Normal", "rate", value, lambda v=value: ps.likelihoods.Normal(rate=v)
    for value in ([5], [5, 0, 3], [5, -2, 3], [5, 2.5, 3], [], "5-3", None, 5):
        yield "nets.mlp", "widths", value, lambda v=value: ps.nets.mlp(v)
    for value in ("swishy", 3, None):
        yield "nets.mlp", "activation", value, lambda v=value: ps.nets.mlp([5, 4, 3], v)
    for value in ("mpl:4", "mlp:x", "mlp:0", "nowhere:build", "math:nothing", "", 3, None):
        yield "nets.build", "spec", value, lambda v=value: ps.nets.build(v, (5,), 3)
    normal_slab = torch.distributions.Normal(0.0, 1.0)
    for value in (-0.1, 1.5, NAN, "often"):
        yield (
            "SpikeAndSlab",
            "probs",
            value,
            lambda v=value: ps.distributions.SpikeAndSlab(v, normal_slab),
        )
    for value in (None, 3, "normal"):
        yield "SpikeAndSlab", "slab", value, lambda v=value: ps.distributions.SpikeAndSlab(0.5, v)
    for value in (0.0, -1.0, NAN, "cold"):
        yield (
            "RelaxedSpikeAndSlab",
            "temperature",
            value,
            lambda v=value: ps.distributions.RelaxedSpikeAndSlab(v, 0.5, normal_slab),
        )
    for value in (-1.0, 0.0, NAN, "wide"):
        yield (
            "HalfCauchyFactors",
            "scale",
            value,
            lambda v=value: ps.distributions.HalfCauchyFactors(v),
        )
        yield (
            "TruncatedNormal",
            "scale",
            value,
            lambda v=value: ps.distributions.TruncatedNormal(0.0, v, -1.0, 1.0),
        )
        yield (
            "TruncatedNormal",
            "bounds",
            value,
            lambda v=value: ps.distributions.TruncatedNormal(0.0, 1.0, 1.0, v),
        )
    for value in (torch.randn(12, 2), torch.full((12, 3), NAN), torch.rand(5, 3), None):
        yield "accuracy", "probabilities", value, lambda v=value: RULES.accuracy(v, Y)
        yield (
            "calibration_error",
            "probabilities",
            value,
            lambda v=value: RULES.calibration_error(v, Y),
        )
    for value in (NUMBERS[:, None], NUMBERS[:5], None):
        yield "rmse", "mean", value, lambda v=value: RULES.rmse(v, NUMBERS)


def shown(value) -> str:
    if isinstance(value, torch.Tensor):
        return f"{value.dtype}{list(value.shape)}".removeprefix("torch.")
    plain = isinstance(value, str | int | float | None)
    return repr(value) if plain else getattr(value, "__name__", type(value).__name__)


ROWS = [
    pytest.param(call, id=f"{who}-{argument}-{shown(value)}")
    for who, argument, value, call in rows()
]
OWN = tuple(f"{ROOT / folder}/" for folder in ("pyro_sparse", "models", "guides"))


def test_the_table_is_large():
    assert len(ROWS) >= 400


@pytest.mark.parametrize("call", ROWS)
def test_refused_before_any_work(call):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises((ValueError, TypeError, OSError)) as caught:
            call()
    message = str(caught.value)
    own = traceback.extract_tb(caught.tb)[-1].filename.startswith(OWN)
    # A misspelt keyword is Python's to refuse, a distribution's parameter torch's: both name it.
    named = "unexpected keyword argument" in message or message.startswith("Expected parameter")
    assert own or named, message
    assert len(message.split()) > 3, message
