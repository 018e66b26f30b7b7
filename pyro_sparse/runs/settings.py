"""Everything that decides a run, and what it is where the user does not say."""

from __future__ import annotations

import dataclasses
import types
import typing
from dataclasses import dataclass
from typing import Any

from pyro_sparse.names import nearest
from pyro_sparse.runs import zoo

__all__ = ["Settings", "parse_entry", "settings_for"]

# Where the user says nothing, settings depend on the size of the data and on the model's kind;
# docs/schedule.md has the reasons. Spike-and-slab models on much data: units are decided in the
# first epochs and stay, training goes on for the rest.
LARGE: dict[str, Any] = {
    "net": "mlp:400-400",
    "epochs": 60,
    "batch_size": 256,
    "lr": 6e-3,
    "lr_hold": 0.5,
    "inclusion_lr": 6e-2,
    "inclusion_hold": 0.1,
    "inclusion_stop": 0.22,
    "kl_hold": 0.13,
    "kl_rise": 0.5,
}
# Little data: a step teaches little, and the KL weighs much against each example.
SMALL: dict[str, Any] = {
    "epochs": 300,
    "batch_size": 32,
    "lr": 5e-3,
    "lr_hold": 0.4,
    "inclusion_lr": 3e-2,
    "inclusion_hold": 0.4,
    "inclusion_stop": 1.0,
    "kl_hold": 0.2,
    "kl_rise": 0.4,
}
BY_DATA: dict[str, dict[str, Any]] = {
    "digits": {**SMALL, "net": "mlp:100-100", "epochs": 120, "batch_size": 64},
    "mnist": LARGE,
    "fashion-mnist": LARGE,
}
# The bound itself from the first step on.
PLAIN: dict[str, Any] = {"kl_start": 1.0, "kl_hold": 0.0, "kl_rise": 0.0}
# Probabilities are the question: what opens while the KL is cheap does not close again. Instead the
# logits' rate is low, and waits until the weights have learnt something.
PROBABILITIES: dict[str, Any] = {
    **PLAIN,
    "inclusion_lr": 2e-2,
    "inclusion_start": 0.1,
    "inclusion_rise": 0.2,
    "inclusion_hold": 0.4,
    "inclusion_stop": 1.0,
}
TABLE: dict[str, Any] = {**SMALL, **PROBABILITIES, "net": "mlp:50"}
# Residual networks on small images, as the authors of SS-GL and SS-GHS train ResNet-20.
RESNET: dict[str, Any] = {
    **LARGE,
    **PLAIN,
    "net": "resnet20",
    "epochs": 300,
    "batch_size": 128,
    "optimizer": "sgd",
    "augment": True,
    "lr": 0.1,
    "inclusion_lr": 0.1,
    "scale_lr": 0.1,
    "schedule": "steps",
    "lr_hold": 0.5,
    "inclusion_hold": 0.5,
    "inclusion_stop": 1.0,
    "clip_norm": 1.0,
    "slab_scale": 0.2,
    "inclusion_probability": 1e-4,
}
BY_DATA["cifar10"] = RESNET
BY_KIND = {"folder": RESNET}
"""Defaults of data sets that are named with an argument."""

NOISE: dict[str, Any] = {
    **PLAIN,
    "lr": 1e-3,
    "scale_lr": 4e-2,
    "schedule": "cosine",
    "lr_hold": 0.3,
}
BY_MODEL: dict[str, dict[str, Any]] = {
    "sbp": NOISE,
    "bmrs": NOISE,
    "turbo-vbi": {"lr": 8e-3, "kl_start": 0.03, "kl_hold": 0.3, "kl_rise": 0.4},
    "bmr": {**PLAIN, "lr": 1e-2, "scale_lr": 1e-2, "lr_hold": 0.5},
}
"""What overrides the data's defaults, for models of other kinds than spike-and-slab."""


@dataclass(frozen=True)
class Settings:
    """Everything that decides a run; config.json holds it.

    `settings_for` fills in what depends on the data set.

    Attributes:
        model: a name of the zoo.
        data: a name that `pyro_sparse.data.load` knows.
        net: a name that `pyro_sparse.nets.build` knows.
        epochs, batch_size, lr, inclusion_lr, scale_lr, clip_norm, num_particles: see `fit`.
        schedule, lr_hold: how the learning rates fall, and the share of training before they do.
        inclusion_start, inclusion_rise: share of training before the inclusion logits move, and the
            share over which their rate then rises.
        inclusion_hold, inclusion_stop: shares of training at which that rate begins to fall and at
            which it is 0.
        kl_start, kl_hold, kl_rise: the KL's weight, see
            :func:`pyro_sparse.infer.schedules.ramp`; ``kl_start`` is
            :func:`~pyro_sparse.infer.schedules.cheap` when None, and 1 the paper's objective
            throughout.
        guide: ``"matched"``, the model's own, or one of
            :data:`pyro_sparse.names.AUTOGUIDES`, for models with continuous latents;
            nothing is pruned then.
        variance, initial_scale, inclusion, inclusion_draws, noise_draws, last_layer: see the
            guides.
        inclusion_probability, slab_scale, output_scale, prior_scale, prune_inputs: see the models;
            each takes those that its entry in the zoo lists.
        noise_rate: of regressions: rate of the prior Gamma(1, rate) of the noise precision, of
            targets with standard deviation 1. It adds ``2 · noise_rate`` to their sum of squared
            errors, so where n of them have errors of ε, make it small beside n ε².
        pretrain: epochs of training the dense network that the model starts from.
        rule: selection rule, see :func:`pyro_sparse.posterior.selection.parse`; the model's
            default when None.
        budget: of the reference pruners: MACs of the pruned network, or below 1 the share of the
            dense one's. When None, `compare` takes the median of the other models', `run` 0.1.
        passes: how often, at most, to prune and train on after training.
        retrain: epochs of training after each pass, as a share of ``epochs``.
        prune_every: epochs between prunings in the midst of training; 0: never.
        validation: share of the training set that is held out for the validation curve.
        temperature: of the ensemble's class probabilities: ``"validation"``, by which it predicts
            the held-out rows best (1 where there are none), or a number; 1 is that of the
            posterior. See :meth:`pyro_sparse.posterior.Posterior.temperature`.
        augment: shift and mirror training images at random.
        optimizer: ``"adam"``, or ``"sgd"`` with momentum 0.9.
        precision: of the network's forward pass in training, see `pyro_sparse.names`.
        retries: how often training may go back after a divergence, see `fit`.
        split: of data sets that come with several.
        seed: of the validation split, the initial weights, the batches and the noise.
    """

    model: str
    data: str
    net: str
    epochs: int
    batch_size: int
    lr: float
    lr_hold: float
    inclusion_lr: float
    inclusion_hold: float
    inclusion_stop: float
    kl_hold: float
    kl_rise: float
    scale_lr: float = 2e-2
    schedule: str = "cosine"
    inclusion_start: float = 0.0
    inclusion_rise: float = 0.0
    kl_start: float | None = None
    clip_norm: float | None = None
    num_particles: int = 1
    guide: str = "matched"
    variance: str = "tied"
    initial_scale: float | str = "balanced"
    inclusion: str | None = None
    inclusion_draws: str = "batch"
    noise_draws: str = "batch"
    last_layer: str = "mean-field"
    inclusion_probability: float | str = "layerwise"
    slab_scale: float | str = 1.0
    output_scale: float | str = 1.0
    prior_scale: float | None = None
    noise_rate: float = 1.0
    prune_inputs: bool = False
    pretrain: int = 0
    rule: str | None = None
    budget: float | None = None
    passes: int = 0
    retrain: float = 0.2
    prune_every: int = 0
    validation: float = 0.05
    temperature: float | str = "validation"
    augment: bool = False
    optimizer: str = "adam"
    precision: str = "32-true"
    retries: int = 0
    split: int = 0
    seed: int = 0


def settings_for(model: str, data: str, *, strict: bool = False, **given: Any) -> Settings:
    """Settings with the defaults for a data set and a model; None counts as not given.

    Args:
        model: a name of the zoo.
        data: a name of a data set.
        strict: refuse options that the model does not take, instead of leaving them out.
        **given: any of the attributes of `Settings`.

    Raises:
        ValueError: the model is not known, or does not take an option.
    """
    entry = zoo.find(model)
    chosen = {name: value for name, value in given.items() if value is not None}
    taken = {*entry.model_options, *entry.guide_options}
    optional = {
        name for one in zoo.ZOO.values() for name in (*one.model_options, *one.guide_options)
    }
    defaults = {field.name: field.default for field in dataclasses.fields(Settings)}
    for name in optional - taken:
        if name in chosen and chosen.pop(name) != defaults[name] and strict:
            raise ValueError(
                f"{model} has no --{name.replace('_', '-')}; it takes "
                f"{', '.join('--' + one.replace('_', '-') for one in sorted(taken)) or 'none'}"
            )
    combined = {
        **BY_DATA.get(data, BY_KIND.get(data.partition(":")[0], TABLE)),
        **BY_MODEL.get(model, {}),
        **(PROBABILITIES if chosen.get("prune_inputs") and "inclusion" in taken else {}),
        **entry.settings,
        **chosen,
    }
    if combined.get("guide", "matched") != "matched":
        if entry.settings.get("passes") and not entry.bayesian:
            raise ValueError(f"{model} is a pruner of the dense network: take dense with a guide")
        # Rules and passes select units by what the model's own guide knows.
        combined |= {"rule": chosen.get("rule"), "passes": chosen.get("passes", 0)}
        combined["initial_scale"] = chosen.get("initial_scale", 0.01)
    return Settings(model=model, data=data, **combined)


def parse_entry(text: str) -> tuple[str, dict[str, Any]]:
    """Model and settings of ``MODEL`` or ``MODEL:setting=value,setting=value``.

    ``ss-ghs:variance=full,num-particles=4`` is ss-ghs with two settings of its own. Every attribute
    of `Settings` may be named but ``model``, ``data``, ``split`` and ``seed``, which the entries of
    a comparison share.

    Raises:
        ValueError: the model or a setting is not known, or a value is not of its type.
    """
    model, _, rest = text.partition(":")
    zoo.find(model)
    hints = typing.get_type_hints(Settings)
    known = [name for name in hints if name not in ("model", "data", "split", "seed")]
    given: dict[str, Any] = {}
    for part in rest.split(",") if rest else []:
        name, equals, value = part.partition("=")
        name = name.strip().replace("-", "_")
        if name not in known:
            raise ValueError(f"{text}: {nearest('setting', name, known)}")
        if not equals:
            raise ValueError(f"{text}: expected {name}=VALUE, got {part!r}")
        try:
            given[name] = _parse_value(hints[name], value.strip())
        except ValueError as error:
            raise ValueError(f"{text}: {name} must be {error}, got {value!r}") from None
    return model, given


BOOLEANS = {"true": True, "yes": True, "false": False, "no": False}


def _parse_value(hint: Any, text: str) -> Any:
    """``text`` as the first type of ``hint`` that it can be; ``ValueError`` says what it may be."""
    kinds = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    if type(None) in kinds and text == "none":
        return None
    if bool in kinds and text in BOOLEANS:
        return BOOLEANS[text]
    for kind in (int, float):
        if kind in kinds:
            try:
                return kind(text)
            except ValueError:
                continue
    if str in kinds:
        return text
    names = {int: "a whole number", float: "a number", bool: "true or false", type(None): "none"}
    raise ValueError(" or ".join(names[kind] for kind in kinds))
