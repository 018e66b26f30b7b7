"""One run from a data set's name to a run folder: what the command line does.

A run folder has config.json (the settings), data.json (what the data were), metrics.jsonl (a line
an epoch), checkpoint/, summary.json, figures/ and report.html, which is written last; pretrain/ and
pass-1/, pass-2/, ... are run folders of training before and after. `load` gives the fitted
posterior back.
"""

from __future__ import annotations

import dataclasses
import json
import math
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from pyro_sparse import data, guides, infer, likelihoods, models, nets
from pyro_sparse.export import compact
from pyro_sparse.infer.identity import digest
from pyro_sparse.posterior import Posterior, accuracy, plots, pruning, rmse, selection
from pyro_sparse.posterior.summary import cautions
from pyro_sparse.runs import options, page, zoo
from pyro_sparse.runs.settings import OF_TABLES, Settings, settings_for

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from lightning_fabric import Fabric
    from torch import Tensor

__all__ = [
    "Constant",
    "PruningError",
    "Settings",
    "build",
    "check_same_data",
    "describe",
    "ensemble_temperature",
    "load",
    "load_data",
    "masked_difference",
    "posterior_of",
    "prepare",
    "pruned_network",
    "read_settings",
    "run",
    "run_keep",
    "settings_for",
]

SCORED = 1000
"""Examples on which measures such as the Shapley value score units."""


class PruningError(ValueError):
    """Passes of pruning and training leave no network, as where a layer would keep no unit."""


class Constant(nn.Module):
    """What is left where nothing is selected: the same output for every input.

    Args:
        output: of the network, without a batch's dimension.
    """

    def __init__(self, output: Tensor) -> None:
        super().__init__()
        self.output = nn.Parameter(output.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        return self.output.expand(len(x), *self.output.shape)


def pruned_network(posterior: Posterior, keep: Mapping[str, Tensor], x: Tensor) -> nn.Module:
    """The compact network, or a `Constant` where no unit is left that passes anything on.

    Args:
        posterior: of the run.
        keep: masks by group.
        x: inputs, of which the first `SCORED` show whether anything is passed on.
            Shape: (N, ...).

    Raises:
        ValueError: the masks do not fit the network.
    """
    if any(len(mask) and not bool(mask.any()) for mask in keep.values()):
        outputs = posterior.masked(x[:SCORED], keep).cpu()
        if torch.allclose(outputs, outputs[:1].expand_as(outputs), rtol=1e-5, atol=1e-6):
            return Constant(outputs[0])
    return compact(posterior, keep)


def build(
    settings: Settings,
    dataset: data.Dataset,
    net: nn.Module | None = None,
    likelihood: likelihoods.Likelihood | None = None,
) -> tuple[models.SparseModel, Any]:
    """Model and guide of a run, before training.

    Args:
        settings: of the run.
        dataset: its data.
        net: the network to start from; a new one when absent.
        likelihood: of the targets; of classes or normal, as they are, when absent.

    Raises:
        ValueError: the network does not fit the data, or an option its model or guide.
    """
    entry = zoo.find(settings.model)
    if net is None:
        with torch.random.fork_rng([]):
            torch.manual_seed(settings.seed)
            net = nets.build(settings.net, dataset.input_shape, dataset.outputs)
    make_model = options.model_class(entry)
    make_guide = options.guide_maker(settings.guide, make_model)
    # Defaults are left to the constructors: a class may decide one of its parent's options itself.
    for_model = options.of_model(entry).chosen(settings.model_options)
    for_guide = options.of_guide(settings.guide, entry).chosen(settings.guide_options)
    if likelihood is None:
        numbers = likelihoods.Normal(rate=settings.noise_rate)
        likelihood = likelihoods.Categorical() if dataset.classes else numbers
    try:
        model = make_model(
            net,
            dataset.train.x[:2],
            likelihood=likelihood,
            num_data=len(dataset.train),
            **for_model,
        )
        if make_guide is guides.Automatic:
            own = guides.for_model(model)
            return model, make_guide(model, settings.guide, own, **for_guide)
        return model, guides.as_guide(model, make_guide(model, **for_guide))
    except TypeError as error:
        given = {**for_model, **for_guide}
        raise ValueError(f"{settings.model} cannot be made with {given}: {error}") from error


def selection_rule(
    settings: Settings, posterior: Posterior, split: data.Split
) -> selection.SelectionRule:
    """The rule of a run: the one that is named, or the model's default.

    Args:
        settings: of the run.
        posterior: to be pruned.
        split: examples for measures that score on data.
    """
    rule = settings.rule
    if rule is None and not zoo.find(settings.model).bayesian and settings.passes:
        budget = 0.1 if settings.budget is None else settings.budget
        rule = f"macs:{budget}:{settings.model}"
    if rule is None and settings.guide != "matched":
        return selection.Connected()
    if rule is None:
        return selection.default_rule(posterior.model)
    return selection.parse(rule, split.x[:SCORED], split.y[:SCORED], posterior.macs({}))


def load_data(settings: Settings, root: str | Path | None, download: bool = False) -> data.Dataset:
    """The data of a run; errors name what to do."""
    return data.load(
        settings.data,
        root,
        download=download,
        validation=settings.validation,
        split=settings.split,
        seed=settings.seed,
        **{name: getattr(settings, name) for name in OF_TABLES},
    )


def run(
    settings: Settings,
    out: str | Path,
    *,
    dataset: data.Dataset,
    resume: bool = False,
    progress: bool = True,
    figures: bool = True,
    fabric: Fabric | None = None,
) -> dict[str, Any]:
    """Train, analyse, prune and write the run folder; returns the summary.

    Args:
        settings: as by `settings_for`.
        out: the run folder, which must not hold a run, unless it is resumed.
        dataset: the data, by `load_data`.
        resume: go on with the run in ``out``, wherever it was stopped; start it where there is none
            yet, and return the summary of one that is finished. It ends as a run that was never
            stopped, bit for bit.
        progress: show a progress bar.
        figures: write figures/.
        fabric: devices and precision, by :func:`pyro_sparse.infer.make_fabric`; one device, at the
            settings' precision, when absent. Of several processes the first one writes.

    Raises:
        ValueError: before any training, where settings or data are wrong, ``out`` is taken, or the
            run to resume was begun with other settings.
        Interrupted: see :func:`pyro_sparse.fit`; ``resume`` goes on.
    """
    out = Path(out)
    begun = (out / "config.json").exists()
    if begun and not resume:
        raise ValueError(
            f"{out} already holds a run; choose another folder with --out, or go on with --resume"
        )
    about = describe(dataset)
    if begun:
        _check_settings(settings, out)
        check_same_data(about, out)
        if (out / "report.html").is_file():
            return infer.read_json(out / "summary.json")
    fabric = fabric or infer.make_fabric(precision=settings.precision)
    model, guide, rule = prepare(settings, dataset)
    # Where they are used: a step then waits for no copy.
    split, held_out = (part.to(fabric.device) for part in (dataset.train, dataset.validation))
    loader = data.Batches(
        split.x,
        split.y,
        min(settings.batch_size, len(split)),
        seed=settings.seed,
        augment=data.crop_and_flip() if settings.augment else None,
    )
    infer.launch(fabric)
    infer.on_first(fabric, partial(_begin, settings, about, out))
    try:
        seconds = 0.0
        if settings.pretrain:
            net, seconds = _pretrained(settings, dataset, loader, out, resume, progress, fabric)
            model, guide = build(settings, dataset, net)
        posterior = Posterior(model, guide, split.x)
        fitted = infer.fit(
            model,
            guide,
            loader,
            out=out,
            resume=resume,
            num_particles=settings.num_particles,
            validation=(held_out.x, held_out.y) if len(held_out) else None,
            on_epoch=_EpochMetrics(settings, posterior, rule, held_out),
            fabric=fabric,
            **fit_options(settings, settings.epochs, len(split), progress),
        )
    except ValueError:
        folders = (out, out / "pretrain")
        if not begun and not any(infer.RunFolder(one).started for one in folders):
            # Refused before it began: the folder holds no run, and may be used again.
            (out / "config.json").unlink(missing_ok=True)
            (out / "data.json").unlink(missing_ok=True)
        raise
    seconds += fitted.seconds
    path: list[pruning.Pass] = []
    if settings.passes:
        epochs = max(1, round(settings.retrain * settings.epochs))
        try:
            path = pruning.iterate(
                posterior,
                loader,
                rule=None if settings.rule is None and posterior.gaussians() else rule,
                max_passes=settings.passes,
                out=out,
                resume=resume,
                fabric=fabric,
                **fit_options(settings, epochs, len(split), progress, retrain=True),
            )
        except ValueError as error:
            # As where one unit a group costs more than the budget that the others left.
            raise PruningError(f"{error}. The run is kept in {out}") from error
        seconds += sum(step.seconds for step in path)
        # What was pruned is out for good; what is left is kept where anything flows through it.
        rule = selection.default_rule(model)
        posterior.refresh_statistics(posterior.keep(rule))
        pruned = infer.checkpoint_file(out, "pruned")
        progress_made = {"passes": len(path) - 1}
        infer.on_first(
            fabric, partial(infer.save_checkpoint, pruned, model, guide, progress=progress_made)
        )

    def finish() -> dict[str, Any]:
        try:
            summary = summarise(settings, posterior, dataset, rule)
        except ValueError as error:
            # As where a network that is no chain of layers cannot do without one.
            raise PruningError(f"{error}. The run is kept in {out}") from error
        summary |= {
            "train_seconds": round(seconds, 3),
            "seconds_per_epoch": round(fitted.seconds / len(fitted.history), 4),
        }
        if path:
            summary["path"] = [dataclasses.asdict(step) for step in path]
        infer.write_json(out / "summary.json", summary)
        if figures:
            write_figures(posterior, fitted.history, out / "figures", path, posterior.keep(rule))
        page.write_run(out)
        return summary

    return infer.on_first(fabric, finish)


def prepare(
    settings: Settings, dataset: data.Dataset
) -> tuple[models.SparseModel, Any, selection.SelectionRule]:
    """Model, guide and rule of a run, after everything was checked that training does not change.

    Raises:
        ValueError: an option, the rule, the network or the data are wrong.
    """
    model, guide = build(settings, dataset)
    fit_options(settings, settings.epochs, len(dataset.train), progress=False)
    for name in ("validation", "test"):
        part = getattr(dataset, name)
        if len(part):
            infer.check_data(model, part.x, part.y, f"{name} data")
    posterior = Posterior(model, guide)
    rule = selection_rule(settings, posterior, dataset.train)
    if not settings.passes:
        # Whether the guide says what the rule reads; two examples are enough for that.
        two = data.Split(dataset.train.x[:2], dataset.train.y[:2])
        posterior.keep(selection_rule(settings, posterior, two))
    return model, guide, rule


def _begin(settings: Settings, about: dict[str, Any], out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    infer.write_json(out / "config.json", dataclasses.asdict(settings))
    infer.write_json(out / "data.json", about)


def describe(dataset: data.Dataset) -> dict[str, Any]:
    """What data.json holds: what the data of a run are, and digests of all rows in their order."""
    splits = {
        name: {"rows": len(part), "digest": digest(part.x, part.y)}
        for name in ("train", "validation", "test")
        for part in [getattr(dataset, name)]
    }
    about = {
        "name": dataset.name,
        "task": dataset.task,
        "classes": dataset.classes,
        "features": dataset.feature_names,
        "input_shape": dataset.input_shape,
        "preprocessing": dataset.preprocessing,
        **splits,
    }
    if dataset.target is not None:
        # Of tables alone: what older runs of other data have stays enough.
        about |= {
            "target": dataset.target,
            "variables": dataset.variables,
            "taken": dataset.taken,
            "notes": dataset.notes,
        }
    return json.loads(json.dumps(about))


def check_same_data(about: dict[str, Any], folder: Path) -> None:
    """Raise ``ValueError`` unless the run in ``folder`` was trained on these data.

    Args:
        about: by `describe`.
        folder: of the run; one without data.json, which older versions wrote, is refused.
    """
    if not (folder / "data.json").is_file():
        raise ValueError(
            f"{folder} has no data.json, which says what data the run was trained on; train it anew"
        )
    there = infer.read_json(folder / "data.json")
    differ = [name for name, value in about.items() if there.get(name) != value]
    if differ:
        raise ValueError(
            f"the data of {folder} are not those that it was trained on; they differ in "
            f"{'; '.join(_difference(name, there.get(name), about[name]) for name in differ)}. "
            "Give it the data as they were, or train anew"
        )


def _difference(name: str, was: Any, value: Any) -> str:
    if isinstance(was, dict) and isinstance(value, dict):
        inner = [key for key in value if was.get(key) != value[key]]
        return f"{name}: {', '.join(inner)}"
    if isinstance(was, list) and isinstance(value, list) and len(was) == len(value):
        first = next(i for i, (a, b) in enumerate(zip(was, value, strict=True)) if a != b)
        return f"{name}: {was[first]!r} is {value[first]!r}"
    return f"{name}: {was!r} is {value!r}"


def _check_settings(settings: Settings, out: Path) -> None:
    """Raise ``ValueError`` unless the run in ``out`` was begun with these settings."""
    # Nothing is made of what stands there, so that it may name anything.
    there, here = _flat(read_settings(out, trust=True)), _flat(settings)
    differ = [
        f"--{name.replace('_', '-')} was {there.get(name)!r}, is {here.get(name)!r}"
        for name in dict.fromkeys([*here, *there])
        if there.get(name) != here.get(name)
    ]
    if differ:
        raise ValueError(
            f"{out} was begun with other settings: {'; '.join(differ)}. A run goes on as it was "
            "begun (its schedules depend on --epochs, too); repeat its command, or choose another "
            "folder with --out"
        )


def _flat(settings: Settings) -> dict[str, Any]:
    """All names with their values, as the command line has them."""
    values = dataclasses.asdict(settings)
    return {**values.pop("model_options"), **values.pop("guide_options"), **values}


def read_settings(folder: Path, trust: bool = False) -> Settings:
    """The settings of a run folder.

    Args:
        folder: the run.
        trust: whether its network and guide may be code of one's own, ``package.module:factory``,
            that is imported and called.

    Raises:
        FileNotFoundError: the folder holds no run.
        ValueError: config.json does not hold settings, or names code without ``trust``.
    """
    config = folder / "config.json"
    if not config.is_file():
        raise FileNotFoundError(
            f"{folder} holds no run (no config.json); make one with pyro-sparse fit --out {folder}"
        )
    try:
        values = infer.read_json(config)
        if isinstance(values, dict) and "epochs" in values and "model_options" not in values:
            raise ValueError(
                "it is of an older version, in which options of models and guides stood among the "
                "others; train the run anew"
            )
        settings = Settings(**values)
        for name in ("model", "net", "guide", "data"):
            if not isinstance(getattr(settings, name), str):
                raise ValueError(f"expected {name} to be a name, got {values[name]!r}")
    except (ValueError, TypeError, OverflowError) as error:
        raise ValueError(f"{config} does not hold the settings of a run: {error}") from error
    # Networks that are built in have numbers behind the colon.
    net = settings.net if not settings.net.startswith("mlp:") else ""
    for name, value in (("net", net), ("guide", settings.guide)):
        if ":" in value and not trust:
            raise ValueError(
                f"{config} names code to import and call, {name} {value!r}; say that you trust it "
                "with trust=True, on the command line with --trust"
            )
    return settings


def fit_options(
    settings: Settings, epochs: int, num_data: int, progress: bool, retrain: bool = False
) -> dict[str, Any]:
    """Arguments of `fit` for the main training, or for training on after a pruning."""
    start = settings.kl_start
    if start is None:
        start = infer.schedules.cheap(num_data)
    ramp = infer.schedules.ramp(start, settings.kl_hold, settings.kl_rise)
    return {
        "epochs": epochs,
        "lr": settings.lr,
        "inclusion_lr": settings.inclusion_lr,
        "scale_lr": settings.scale_lr,
        "schedule": infer.schedules.LEARNING_RATES[settings.schedule](settings.lr_hold),
        "inclusion_schedule": infer.schedules.delayed(
            infer.schedules.cosine(settings.inclusion_hold, settings.inclusion_stop),
            settings.inclusion_start,
            settings.inclusion_rise,
        ),
        "kl_weight": infer.schedules.constant() if retrain else ramp,
        "clip_norm": settings.clip_norm,
        "optimizer": infer.OPTIMIZERS[settings.optimizer],
        "seed": settings.seed,
        "retries": settings.retries,
        "progress": progress,
    }


def _pretrained(
    settings: Settings,
    dataset: data.Dataset,
    loader: data.Batches,
    out: Path,
    resume: bool,
    progress: bool,
    fabric: Fabric,
) -> tuple[nn.Module, float]:
    """The dense network after ``pretrain`` epochs, and the seconds that took."""
    dense = dataclasses.replace(
        settings, model="dense", model_options={}, guide="matched", guide_options={}
    )
    model, guide = build(dense, dataset)
    options = fit_options(settings, settings.pretrain, len(dataset.train), progress)
    folder = out / "pretrain"
    fitted = infer.fit(model, guide, loader, out=folder, resume=resume, fabric=fabric, **options)
    posterior = Posterior(model, guide, dataset.train.x)
    posterior.refresh_statistics()
    return dense_network(posterior), fitted.seconds


class _EpochMetrics:
    """After each epoch: prune where it is due, and say how good the pruned network would be."""

    def __init__(
        self,
        settings: Settings,
        posterior: Posterior,
        rule: selection.SelectionRule,
        split: data.Split,
    ) -> None:
        self.posterior, self.split = posterior, split
        # A rule that costs forward passes, or keeps a share whatever the posterior says, would
        # not tell anything about training.
        self.rule = selection.default_rule(posterior.model) if settings.passes else rule
        self.prune = None
        if settings.prune_every:
            stop = round(settings.epochs * (1 - settings.retrain))
            self.prune = pruning.PruneEvery(posterior, rule, settings.prune_every, stop=stop)

    def __call__(self, metrics: dict[str, Any]) -> None:
        if self.prune is not None:
            self.prune(metrics)
        keep = self.posterior.keep(self.rule)
        self.posterior.refresh_statistics(keep)
        names = [group.name for group in self.posterior.prunable_groups()]
        metrics["kept"] = {name: int(keep[name].sum()) for name in names}
        if len(self.split):
            prediction = self.posterior.model.likelihood.natural(
                self.posterior.masked(self.split.x, keep)
            )
            if self.split.y.is_floating_point():
                metrics["validation_rmse"] = rmse(prediction, self.split.y)
            else:
                metrics["validation_accuracy"] = accuracy(prediction, self.split.y)


def summarise(
    settings: Settings,
    posterior: Posterior,
    dataset: data.Dataset,
    rule: selection.SelectionRule | None = None,
) -> dict[str, Any]:
    """The numbers of summary.json, on the test set, for the units that ``rule`` keeps."""
    keep = posterior.keep(rule)
    overview = posterior.summary(rule)
    groups = overview.groups
    small = pruned_network(posterior, keep, dataset.test.x)
    example = dataset.test.x[:1]
    temperature = ensemble_temperature(settings, posterior, dataset)
    with torch.random.fork_rng([]):
        torch.manual_seed(settings.seed)
        scores = posterior.evaluate(
            *(dataset.test.x, dataset.test.y),
            keep=keep,
            target_scale=dataset.target_scale,
            temperature=temperature,
        )
    said = cautions(groups, scores) if posterior.model.prunes else []
    dense = dense_network(posterior)
    # Inputs that nothing reads are gone, too, wherever a rule finds them.
    names = [group.name for group in posterior.prunable_groups()]
    if "input" not in names and not bool(keep["input"].all()):
        names = ["input", *names]
    undecided = {group.group: group.undecided or 0 for group in groups}
    support = posterior.model.support
    weights = {name: int(support[name].sum()) for name in support if support[name].dim() == 2}
    return {
        "model": settings.model,
        "net": settings.net,
        "data": settings.data,
        "seed": settings.seed,
        "epochs": settings.epochs,
        "params_dense": nets.count_parameters(dense),
        "params_compact": nets.count_parameters(small),
        "macs_dense": nets.count_macs(dense, example),
        "macs_compact": nets.count_macs(small, example),
        "units": {name: posterior.model.graph[name].size for name in names},
        "kept": {name: int(keep[name].sum()) for name in names},
        "undecided": {name: undecided.get(name, 0) for name in names},
        **({"weights_left": weights} if weights else {}),
        "max_abs_diff_masked_compact": masked_difference(posterior, keep, small, dataset),
        **({"temperature": temperature} if dataset.classes else {}),
        **scores,
        "task": dataset.task,
        "target": dataset.target,
        "classes": dataset.labels,
        "rows": {name: len(getattr(dataset, name)) for name in ("train", "validation", "test")},
        "taken": dataset.taken,
        "notes": list(dataset.notes),
        **(
            {"inputs": found, "objective": str(overview.objective)}
            if (found := inputs_by_name([posterior], dataset))
            else {}
        ),
        **(
            {"said": _nothing_selected(keep)} if isinstance(small, Constant) else {"cautions": said}
        ),
    }


def _nothing_selected(keep: Mapping[str, Tensor]) -> str:
    """A result in a sentence: the network is a constant, and why."""
    empty = [name for name, mask in keep.items() if len(mask) and not bool(mask.any())]
    called = ["the input" if name == "input" else f"layer {name!r}" for name in empty]
    verb = "keeps" if len(empty) == 1 else "keep"
    return (
        f"Nothing is selected: {' and '.join(called)} {verb} no unit, so the "
        "pruned network predicts the same for every row. If that is not believed, train with a "
        "larger --inclusion-probability, for more epochs, or at another --lr."
    )


def inputs_by_name(
    posteriors: Sequence[Posterior], dataset: data.Dataset
) -> list[dict[str, Any]] | None:
    """Inclusion of the variables of a table, the most probable first; None without gates on inputs.

    A variable of several inputs (categories, a mark of missing values) is in where any of them is,
    which are independent in the guide, as in the prior.

    Args:
        posteriors: of one model, of one or several seeds.
        dataset: its data.

    Returns:
        Of each variable ``variable``, ``inputs`` (how many it has), ``probability`` (mean over
        seeds), ``error`` (standard error over seeds, None of one) and ``prior``.
    """
    found = [posterior.inclusion().get("input") for posterior in posteriors]
    if len(dataset.input_shape) != 1 or any(one is None for one in found):
        return None
    size = dataset.input_shape[0]
    names = dataset.variables or dataset.feature_names or tuple(str(i) for i in range(size))
    prior = posteriors[0].model.input_inclusion_logit.detach().sigmoid().double().cpu().expand(size)
    rows = []
    for name in dict.fromkeys(names):
        own = torch.tensor([one == name for one in names])
        each = [1 - (1 - one.detach().double().cpu()[own]).prod() for one in found]  # type: ignore[union-attr]
        values = torch.stack(each)
        error = float(values.std() / math.sqrt(len(values))) if len(values) > 1 else None
        rows.append(
            {
                "variable": name,
                "inputs": int(own.sum()),
                "probability": float(values.mean()),
                "error": error,
                "prior": float(1 - (1 - prior[own]).prod()),
            }
        )
    return sorted(rows, key=lambda row: -row["probability"])


def ensemble_temperature(settings: Settings, posterior: Posterior, dataset: data.Dataset) -> float:
    """The temperature of a run's ensemble, see `Settings`; 1 of numbers and of point estimates."""
    rows = dataset.validation
    if not dataset.classes or not zoo.find(settings.model).bayesian:
        return 1.0
    if isinstance(settings.ensemble_temperature, str):
        if settings.ensemble_temperature != "validation":
            raise ValueError(
                "expected ensemble_temperature to be a number or 'validation', got "
                f"{settings.ensemble_temperature!r}"
            )
        if not len(rows):
            return 1.0
        with torch.random.fork_rng([]):
            torch.manual_seed(settings.seed)
            return posterior.temperature(rows.x, rows.y)
    return settings.ensemble_temperature


@torch.no_grad()
def masked_difference(
    posterior: Posterior, keep: Mapping[str, Tensor], small: nn.Module, dataset: data.Dataset
) -> float:
    """Largest absolute difference between masked and compact network on test inputs."""
    inputs = dataset.test.x[:1024]
    return float((posterior.masked(inputs, keep) - small(inputs)).abs().max())


def dense_network(posterior: Posterior) -> nn.Module:
    """The network with all units, as `compact` builds it: for its size and its speed.

    What it computes is nobody's business: where few units are in, batch normalisations have the
    statistics of these few, by which the others' outputs may overflow.
    """
    everything = {
        group.name: torch.ones(group.size, dtype=torch.bool) for group in posterior.model.graph
    }
    return compact(posterior, everything, check=False)


def write_figures(
    posterior: Posterior,
    history: list[dict[str, Any]],
    folder: Path,
    path: Sequence[pruning.Pass] = (),
    keep: Mapping[str, Tensor] | None = None,
) -> None:
    """training.png, and what else applies.

    With inclusion probabilities inclusion.png and strips.png, with a noise noise.png, with either
    units.png; after passes free_energy.png; of a chain of linear layers network.png, where the
    first layer reads images fields.png.
    """
    figures: dict[str, list[Callable[[Any], Any]]] = {
        "training": [lambda ax: plots.training_curve(history, ax)]
    }
    inclusion = posterior.inclusion()
    if inclusion:
        figures["inclusion"] = [lambda ax: plots.inclusion_probabilities(inclusion, ax)]
        figures["strips"] = [lambda ax: plots.inclusion_strips(inclusion, ax)]
    noise = posterior.noise()
    if noise:
        figures["noise"] = [lambda ax: plots.noise_signal(noise, ax)]
    if inclusion or noise:
        figures["units"] = [lambda ax: plots.units_kept(history, ax)]
    if path:
        figures["free_energy"] = [lambda ax: plots.free_energy_path(path, ax)]
    figures |= _network_figures(posterior, posterior.keep() if keep is None else keep)
    for name, panels in figures.items():
        page.write_figure(folder / f"{name}.png", *panels)


def _network_figures(
    posterior: Posterior, keep: Mapping[str, Tensor]
) -> dict[str, list[Callable[[Any], Any]]]:
    """network.png and fields.png, where the network is of the kind that they can show."""
    figures: dict[str, list[Callable[[Any], Any]]] = {}
    parameters = {name: value.cpu() for name, value in posterior.mean_parameters().items()}
    graph = posterior.model.graph
    layers = posterior.model.layers
    weights = [parameters[group.writers[0].parameter] for group in layers]
    sizes = [graph["input"].size, *(group.size for group in layers)]
    if [tuple(w.shape) for w in weights] == [(b, a) for a, b in pairwise(sizes)]:
        masks = [keep["input"], *(keep[group.name] for group in layers)]
        after = [mask.outer(before) for before, mask in pairwise(masks)]
        left = [weight * mask for weight, mask in zip(weights, after, strict=True)]
        everything = [torch.ones_like(mask) for mask in masks]
        figures["network"] = [
            lambda ax: plots.network(weights, everything, ax).set_title("before"),
            lambda ax: plots.network(left, masks, ax).set_title("after"),
        ]
    shape = posterior.model.example_shape[1:]
    first, kept = weights[0], keep[layers[0].name]
    if first.dim() == 4 and min(first.shape[2:]) > 1:
        images = first
    elif first.dim() == 2 and len(shape) == 3 and first.shape[1] == math.prod(shape):
        images = first.reshape(-1, *shape)
    else:
        return figures
    if bool(kept.any()):
        figures["fields"] = [lambda ax: plots.receptive_fields(images[kept], ax)]
    return figures


def load(
    folder: str | Path,
    root: str | Path | None = None,
    checkpoint: str = "last",
    *,
    trust: bool = False,
) -> tuple[Settings, data.Dataset, Posterior]:
    """Settings, data and fitted posterior of a run folder.

    Args:
        folder: the run.
        root: of its data.
        checkpoint: ``"last"``, as training and pruning passes ended, or ``"best"``, of the epoch
            with the largest evidence lower bound on the validation data.
        trust: see `read_settings`.

    Raises:
        FileNotFoundError: the folder holds no run, or its data are not found.
        ValueError: the data are not those of training; the checkpoint does not fit; ``"best"`` of a
            run with pruning passes, which come after it.
    """
    folder = Path(folder)
    settings = read_settings(folder, trust)
    dataset = load_data(settings, root)
    check_same_data(describe(dataset), folder)
    return settings, dataset, posterior_of(folder, settings, dataset, checkpoint)


def posterior_of(
    folder: Path, settings: Settings, dataset: data.Dataset, checkpoint: str = "last"
) -> Posterior:
    """The fitted posterior of the run in ``folder``, given its settings and data; see `load`."""
    if checkpoint == "best" and settings.passes:
        raise ValueError(
            f"{folder} was pruned after training, and its best checkpoint is from before; "
            "take the last"
        )
    model, guide = build(settings, dataset)
    path = infer.checkpoint_file(folder, checkpoint)
    pruned = infer.checkpoint_file(folder, "pruned")
    infer.restore(pruned if settings.passes and pruned.is_file() else path, model, guide)
    return Posterior(model, guide, dataset.train.x)


def run_keep(
    settings: Settings, posterior: Posterior, dataset: data.Dataset, rule: str | None = None
) -> dict[str, Tensor]:
    """The units that a finished run keeps, by ``rule`` or its own."""
    if rule is not None:
        settings = dataclasses.replace(settings, rule=rule, passes=0)
    elif settings.passes:
        # What the passes pruned is out; what is left follows from that.
        settings = dataclasses.replace(settings, rule="connected")
    return posterior.keep(selection_rule(settings, posterior, dataset.train))
