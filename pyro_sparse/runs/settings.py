"""Everything that decides a run, and what it is where the user does not say."""

from __future__ import annotations

import dataclasses
import math
import typing
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pyro_sparse.names import OPTIMIZERS, PRECISIONS, SCHEDULES, nearest
from pyro_sparse.runs import options, zoo

if TYPE_CHECKING:
    from pyro_sparse.data import Dataset

__all__ = ["Settings", "parse_entry", "settings_for", "training_defaults"]

# Spike-and-slab models on much data: units are decided in the first epochs and stay, training goes
# on for the rest; docs/schedule.md has the reasons.
LARGE: dict[str, Any] = {
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
# Probabilities are the question: what opens while the KL is cheap does not close again. Instead the
# logits' rate is low, and waits until the weights have learnt something.
PROBABILITIES: dict[str, Any] = {
    **zoo.PLAIN,
    "inclusion_lr": 2e-2,
    "inclusion_start": 0.1,
    "inclusion_rise": 0.2,
    "inclusion_hold": 0.4,
    "inclusion_stop": 1.0,
}
# Residual networks, as the authors of SS-GL and SS-GHS train ResNet-20.
RESIDUAL: dict[str, Any] = {
    **LARGE,
    **zoo.PLAIN,
    "epochs": 300,
    "batch_size": 128,
    "optimizer": "sgd",
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
MUCH = 10_000
"""Examples from which on an epoch has steps enough for the schedule of much data."""
FEW_NUMBERS = 50_000
"""Numbers (examples times inputs) below which passes cost so little that many can be made."""


def network_for(shape: Sequence[int]) -> str:
    """The network where none is named: as wide as the inputs are many, residual for colours."""
    if len(shape) == 3 and shape[0] > 1:
        return "resnet20"
    inputs = math.prod(shape)
    return "mlp:50" if inputs < 50 else "mlp:100-100" if inputs < 400 else "mlp:400-400"


def training_defaults(
    n: int, shape: Sequence[int], net: str, chosen: Mapping[str, Any], takes: Container[str]
) -> dict[str, Any]:
    """How to train, by the size of the data, the kind of the network, and what is asked.

    With `MUCH` data, 60 epochs are thousands of steps. With less, epochs are many and batches small
    enough that there are some thousands of steps, too: 120 epochs in batches of 64, and where there
    are less than `FEW_NUMBERS` to read, 300 in batches of 32. Of so few, and wherever inputs are
    selected, probabilities are the question. Residual networks have the schedule of their authors;
    colour images are then shifted and mirrored.

    Args:
        n: training examples, those for validation included.
        shape: of one input.
        net: name of the network.
        chosen: what the user has chosen, options of the model and the guide included.
        takes: names of the options that the model and the guide take.
    """
    if net.startswith("resnet"):
        found = {**RESIDUAL, "augment": len(shape) == 3 and shape[0] > 1}
    elif n >= MUCH:
        found = LARGE
    elif n * math.prod(shape) < FEW_NUMBERS:
        return {**SMALL, **PROBABILITIES}
    else:
        found = {**SMALL, "epochs": 120, "batch_size": 64}
    selects = chosen.get("prune_inputs") and "inclusion" in takes
    return {**found, **PROBABILITIES} if selects else found


@dataclass(frozen=True)
class Settings:
    """Everything that decides a run; config.json holds it.

    `settings_for` fills in what depends on the data, the model and the guide.

    Attributes:
        model: a name of the zoo.
        model_options: what its constructor takes, see `pyro_sparse.models`.
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
        guide: ``"matched"``, the model's own; one of :data:`pyro_sparse.names.AUTOGUIDES`, for
            models with continuous latents, where nothing is pruned; or ``package.module:Class``, or
            a function there that makes a guide, any Pyro callable, of a model.
        guide_options: what its constructor takes, see `pyro_sparse.guides`.
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
        ensemble_temperature: of the ensemble's class probabilities: ``"validation"``, by which it
            predicts the held-out rows best (1 where there are none), or a number; 1 is that of the
            posterior. See :meth:`pyro_sparse.posterior.Posterior.temperature`.
        augment: shift and mirror training images at random.
        optimizer: ``"adam"``, or ``"sgd"`` with momentum 0.9.
        precision: of the network's forward pass in training, see `pyro_sparse.names`.
        retries: how often training may go back after a divergence, see `fit`.
        split: of data sets that come with several.
        target, task, drop, missing: of tables, see :func:`pyro_sparse.data.load`.
        seed: of the validation split, the initial weights, the batches and the noise.

    Raises:
        ValueError: a number out of range, or an unknown name.
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
    noise_rate: float = 1.0
    pretrain: int = 0
    rule: str | None = None
    budget: float | None = None
    passes: int = 0
    retrain: float = 0.2
    prune_every: int = 0
    validation: float = 0.05
    ensemble_temperature: float | str = "validation"
    augment: bool = False
    optimizer: str = "adam"
    precision: str = "32-true"
    retries: int = 0
    split: int = 0
    target: str | None = None
    task: str | None = None
    drop: list[str] = field(default_factory=list)
    missing: str = "impute"
    seed: int = 0
    model_options: dict[str, Any] = field(default_factory=dict)
    guide_options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for names, holds, expected in _CHECKS:
            for name in names:
                value = getattr(self, name)
                if value is not None and not (_is_number(value) and holds(value)):
                    raise ValueError(f"expected {name} to be {expected}, got {value!r}")
        for name in _WHOLE:
            if not isinstance(getattr(self, name), int):
                raise ValueError(f"expected {name} to be whole, got {getattr(self, name)!r}")
        for name, known in _CHOICES.items():
            if getattr(self, name) not in known:
                raise ValueError(nearest(name, str(getattr(self, name)), known))
        if self.inclusion_hold > self.inclusion_stop:
            raise ValueError(
                f"expected inclusion_hold ≤ inclusion_stop, got {self.inclusion_hold} and "
                f"{self.inclusion_stop}"
            )
        if self.kl_hold + self.kl_rise > 1 + 1e-9:
            raise ValueError(
                f"expected kl_hold + kl_rise ≤ 1, got {self.kl_hold} and {self.kl_rise}"
            )


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


_WHOLE = (
    *("epochs", "batch_size", "num_particles", "pretrain", "passes", "prune_every", "retries"),
    *("split", "seed"),
)
_CHECKS: Any = (
    (("epochs", "batch_size", "num_particles"), lambda v: v >= 1, "at least 1"),
    (
        ("pretrain", "passes", "prune_every", "retries", "split", "seed", "kl_start"),
        lambda v: v >= 0,
        "at least 0",
    ),
    (
        ("lr", "inclusion_lr", "scale_lr", "clip_norm", "noise_rate", "budget"),
        lambda v: v > 0,
        "a positive number",
    ),
    (
        (
            "lr_hold",
            "inclusion_start",
            "inclusion_rise",
            "inclusion_hold",
            "inclusion_stop",
            "kl_hold",
            "kl_rise",
        ),
        lambda v: 0 <= v <= 1,
        "a share of training in [0, 1]",
    ),
    (("validation",), lambda v: 0 <= v < 1, "a share in [0, 1)"),
    (("retrain",), lambda v: 0 < v <= 1, "a share in (0, 1]"),
)
_CHOICES = {"schedule": SCHEDULES, "optimizer": OPTIMIZERS, "precision": PRECISIONS}


def settings_for(
    model: str,
    data: str | Dataset,
    *,
    root: str | Path | None = None,
    strict: bool = False,
    **given: Any,
) -> Settings:
    """Settings with the defaults for data and a model; None counts as not given.

    Args:
        model: a name of the zoo.
        data: the data, or their name.
        root: folder of the data's files, whose size decides.
        strict: refuse options that neither the model nor the guide takes, instead of leaving out
            those that others of the zoo do.
        **given: attributes of `Settings`, and options of the model and the guide by their names.

    Raises:
        ValueError: the model is not known, or does not take an option, or a value is out of range.
        FileNotFoundError: the data are not there.
    """
    entry = zoo.find(model)
    chosen = {name: value for name, value in given.items() if value is not None}
    guide = chosen.get("guide", entry.settings.get("guide", "matched"))
    matched = guide == "matched"
    if not matched and entry.settings.get("passes") and not entry.bayesian:
        raise ValueError(f"{model} is a pruner of the dense network: take dense with a guide")
    takes = {"model": options.of_model(entry), "guide": options.of_guide(guide, entry)}
    run = {one.name for one in dataclasses.fields(Settings)} - {"model_options", "guide_options"}
    for of, one in takes.items():
        for clash in run & one.known.keys():
            raise ValueError(f"the {of} of {model} has an option {clash}, as every run; rename it")
    for name in chosen:
        if name in run or any(name in one for one in takes.values()):
            continue
        known = [*run, *takes["model"], *takes["guide"]]
        if strict and name in options.anywhere():
            raise ValueError(
                f"{model} has no option {name}; it takes "
                f"{', '.join(sorted({*takes['model'], *takes['guide']})) or 'none'}"
            )
        if strict or name not in options.anywhere():
            raise ValueError(f"{model}: {nearest('option', name, sorted(known))}")
    name, n, shape = _size(data, root, {key: chosen[key] for key in OF_TABLES if key in chosen})
    names = {*takes["model"], *takes["guide"]}
    net = chosen.get("net") or entry.settings.get("net") or network_for(shape)
    defaults = {**training_defaults(n, shape, net, chosen, names), **entry.settings}
    # Rules and passes select units by what the model's own guide knows, and its options are its.
    foreign = set() if matched else {*takes["guide"], "rule", "passes"}
    combined = {
        **{key: value for key, value in defaults.items() if key not in foreign},
        **chosen,
    }
    own: dict[str, dict[str, Any]] = {}
    for of, one in takes.items():
        # What is in no signature goes where anything may.
        named = {key for key in combined if key in one.known}
        rest = {
            key for key in chosen if one.open and not any(key in o.known for o in takes.values())
        }
        taken = (named | rest) - run
        own[of] = one.resolved({key: combined[key] for key in taken})
    values = {key: value for key, value in combined.items() if key in run}
    return Settings(
        **{**values, "model": model, "data": name, "net": net},
        model_options=own["model"],
        guide_options=own["guide"],
    )


SIZES: dict[str, tuple[int, tuple[int, ...]]] = {
    "digits": (1438, (1, 8, 8)),
    "diabetes": (354, (10,)),
    "mnist": (60_000, (1, 28, 28)),
    "fashion-mnist": (60_000, (1, 28, 28)),
    "cifar10": (50_000, (3, 32, 32)),
}
"""Training examples and their shape, of data that need not be read to know them."""


OF_TABLES = ("target", "task", "drop", "missing")
"""Settings that say how a table is read; all entries of a comparison share them."""


def _size(
    data: str | Dataset, root: str | Path | None, of_tables: Mapping[str, Any]
) -> tuple[str, int, tuple[int, ...]]:
    """Name, training examples with those for validation, and shape of one."""
    if isinstance(data, str) and data in SIZES:
        return data, *SIZES[data]
    if isinstance(data, str):
        from pyro_sparse.data import load

        data = load(data, root, **of_tables)
    return data.name, len(data.train) + len(data.validation), data.input_shape


def parse_entry(text: str) -> tuple[str, dict[str, Any]]:
    """Model and settings of ``MODEL`` or ``MODEL:setting=value,setting=value``.

    ``ss-ghs:variance=full,num-particles=4`` is ss-ghs with two settings of its own. Every option of
    the model and of its guide may be named, and every attribute of `Settings` but ``model``,
    ``data``, ``split``, ``seed`` and `OF_TABLES`, which the entries of a comparison share.

    Raises:
        ValueError: the model or a setting is not known, or a value is not of its type.
    """
    model, _, rest = text.partition(":")
    entry = zoo.find(model)
    parts: dict[str, str] = {}
    for part in rest.split(",") if rest else []:
        name, equals, value = part.partition("=")
        name = name.strip().replace("-", "_")
        if not equals:
            raise ValueError(f"{text}: expected {name}=VALUE, got {part!r}")
        if name in parts:
            raise ValueError(f"{text}: {name} is there twice")
        parts[name] = value.strip()
    hints = typing.get_type_hints(Settings)
    for name in ("model", "data", "split", "seed", *OF_TABLES, "model_options", "guide_options"):
        del hints[name]
    takes: list[options.Options] = []
    if parts.keys() - hints.keys():
        guide = parts.get("guide", "matched")
        takes = [options.of_model(entry), options.of_guide(guide, entry)]
    given: dict[str, Any] = {}
    for name, value in parts.items():
        # What stands in no signature goes where anything may.
        owners = sorted(
            (one for one in takes if name in one), key=lambda one: name not in one.known
        )
        if name not in hints and not owners:
            known = [*hints, *(option for one in takes for option in one)]
            raise ValueError(f"{text}: {nearest('setting', name, known)}")
        try:
            given[name] = (
                options.parse_value(hints[name], value)
                if name in hints
                else owners[0].parse(name, value)
            )
        except ValueError as error:
            raise ValueError(f"{text}: {name} must be {error}, got {value!r}") from None
    return model, given
