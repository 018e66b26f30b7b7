"""One run from a data set's name to a run folder: what the command line does.

A run folder has config.json (the settings), metrics.jsonl (a line an epoch), checkpoint/,
summary.json and figures/. `load` gives the fitted posterior back.
"""

from __future__ import annotations

import dataclasses
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from pyro_sparse import data, export, guides, infer, likelihoods, models, nets, zoo
from pyro_sparse.export import compact
from pyro_sparse.export import plots as export_plots
from pyro_sparse.posterior import MedianProbability, Posterior, accuracy, plots, rmse

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from torch import Tensor, nn

__all__ = [
    "PruningError",
    "Settings",
    "bench",
    "build",
    "compare",
    "load",
    "load_data",
    "run",
    "settings_for",
    "write_export",
]

# Settings that depend on the size of the data, where the user gives none; docs/schedule.md has the
# reasons. Much data: units are decided in the first epochs and stay, training goes on for the rest.
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
DEFAULTS: dict[str, dict[str, Any]] = {
    "digits": {**SMALL, "net": "mlp:100-100", "epochs": 120, "batch_size": 64},
    "mnist": LARGE,
    "fashion-mnist": LARGE,
}
TABLE: dict[str, Any] = {**SMALL, "net": "mlp:50"}


class PruningError(ValueError):
    """A trained posterior leaves no network, as where a layer would keep no unit."""


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
        inclusion_hold, inclusion_stop: shares of training at which the inclusion logits' rate
            begins to fall and at which it is 0.
        kl_start, kl_hold, kl_rise: the KL's weight, see
            :func:`pyro_sparse.infer.schedules.rising`; ``kl_start`` is
            :func:`~pyro_sparse.infer.schedules.cheap` when None, and 1 the paper's objective
            throughout.
        variance, initial_scale, inclusion: see the guides.
        inclusion_probability, slab_scale, prune_inputs: see the models.
        validation: share of the training set that is held out for the validation curve.
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
    kl_start: float | None = None
    clip_norm: float | None = None
    num_particles: int = 1
    variance: str = "tied"
    initial_scale: float | str = "balanced"
    inclusion: str = "straight-through"
    inclusion_probability: float | str = "layerwise"
    slab_scale: float = 1.0
    prune_inputs: bool = False
    validation: float = 0.05
    split: int = 0
    seed: int = 0


def settings_for(model: str, data: str, **given: Any) -> Settings:
    """Settings with the defaults for a data set; what is given as None counts as not given.

    Raises:
        ValueError: the model is not known.
    """
    zoo.find(model)
    chosen = {name: value for name, value in given.items() if value is not None}
    return Settings(model=model, data=data, **{**DEFAULTS.get(data, TABLE), **chosen})


def build(settings: Settings, dataset: data.Dataset) -> tuple[models.SparseModel, Any]:
    """Model and guide of a run, before training."""
    entry = zoo.find(settings.model)
    with torch.random.fork_rng([]):
        torch.manual_seed(settings.seed)
        net = nets.build(settings.net, dataset.input_shape, dataset.outputs)
    shared: dict[str, Any] = {
        "likelihood": likelihoods.Categorical() if dataset.classes else likelihoods.Normal(),
        "num_data": len(dataset.train),
    }
    options: dict[str, Any] = {}
    if entry.name != "dense":
        shared |= {
            "inclusion_probability": settings.inclusion_probability,
            "slab_scale": settings.slab_scale,
            "prune_inputs": settings.prune_inputs,
        }
        options = {
            "variance": settings.variance,
            "initial_scale": settings.initial_scale,
            "inclusion": settings.inclusion,
        }
    model = getattr(models, entry.model)(net, dataset.train.x[:2], **shared)
    return model, guides.for_model(model, **options)


def load_data(settings: Settings, root: str | Path | None, download: bool = False) -> data.Dataset:
    """The data of a run; errors name what to do."""
    return data.load(
        settings.data,
        root,
        download=download,
        validation=settings.validation,
        split=settings.split,
        seed=settings.seed,
    )


def _validation_score(posterior: Posterior, split: data.Split) -> dict[str, float]:
    """Score of the network that would be shipped now, on the held-out part of the training set."""
    if not len(split):
        return {}
    prediction = posterior.model.likelihood.natural(posterior.masked(split.x))
    if split.y.is_floating_point():
        return {"validation_rmse": rmse(prediction, split.y)}
    return {"validation_accuracy": accuracy(prediction, split.y)}


def run(
    settings: Settings,
    out: str | Path,
    *,
    dataset: data.Dataset,
    progress: bool = True,
    figures: bool = True,
) -> dict[str, Any]:
    """Train, analyse, prune and write the run folder; returns the summary.

    Args:
        settings: as by `settings_for`.
        out: the run folder, which must not hold a run.
        dataset: the data, by `load_data`.
        progress: show a progress bar.
        figures: write figures/.

    Raises:
        ValueError: before any training, where settings or data are wrong or ``out`` is taken.
    """
    out = Path(out)
    if (out / "config.json").exists():
        raise ValueError(f"{out} already holds a run; choose another folder with --out")
    model, guide = build(settings, dataset)
    posterior = Posterior(model, guide)
    split = dataset.train
    loader = data.Batches(
        split.x, split.y, min(settings.batch_size, len(split)), seed=settings.seed
    )
    for name in ("validation", "test"):
        part = getattr(dataset, name)
        if len(part):
            infer.check_data(model, part.x, part.y, f"{name} data")
    start = settings.kl_start
    if start is None:
        start = infer.schedules.cheap(len(split))
    out.mkdir(parents=True, exist_ok=True)
    _write_json(out / "config.json", dataclasses.asdict(settings))
    try:
        fitted = infer.fit(
            model,
            guide,
            loader,
            epochs=settings.epochs,
            lr=settings.lr,
            inclusion_lr=settings.inclusion_lr,
            scale_lr=settings.scale_lr,
            schedule=infer.schedules.LEARNING_RATES[settings.schedule](settings.lr_hold),
            inclusion_schedule=infer.schedules.cosine(
                settings.inclusion_hold, settings.inclusion_stop
            ),
            kl_weight=infer.schedules.rising(start, settings.kl_hold, settings.kl_rise),
            clip_norm=settings.clip_norm,
            num_particles=settings.num_particles,
            seed=settings.seed,
            out=out,
            progress=progress,
            on_epoch=lambda m: m.update(_validation_score(posterior, dataset.validation)),
        )
    except ValueError:
        # Refused before it began: the folder holds no run, and may be used again.
        (out / "config.json").unlink()
        raise
    try:
        summary = summarise(settings, posterior, dataset)
    except ValueError as error:
        raise PruningError(f"{error}. The run is kept in {out}") from error
    summary |= {
        "train_seconds": round(fitted.seconds, 3),
        "seconds_per_epoch": round(fitted.seconds / len(fitted.history), 4),
    }
    _write_json(out / "summary.json", summary)
    if figures:
        write_figures(posterior, fitted.history, out / "figures")
    return summary


def compare(
    settings: Sequence[Settings],
    out: str | Path,
    *,
    dataset: data.Dataset,
    progress: bool = True,
) -> list[dict[str, Any]]:
    """`run` for each of ``settings``, under ``out/MODEL``; writes compare.json after each.

    Raises:
        ValueError: before any training, where ``out`` already holds runs or a model is wrong.
    """
    out = Path(out)
    taken = [one.model for one in settings if (out / one.model / "config.json").exists()]
    if taken or (out / "compare.json").exists():
        raise ValueError(f"{out} already holds a comparison; choose another folder with --out")
    for one in settings:
        build(one, dataset)
    summaries = []
    for one in settings:
        if progress:
            print(zoo.find(one.model).title, flush=True)
        try:
            summary = run(one, out / one.model, dataset=dataset, progress=progress)
        except PruningError as error:
            # The others still have something to say; this one's run folder stays.
            print(f"{one.model}: {error}", flush=True)
            continue
        summaries.append(summary)
        _write_json(out / "compare.json", summaries)
    if not summaries:
        raise PruningError(f"no model could be pruned; the runs are kept under {out}")
    return summaries


def summarise(settings: Settings, posterior: Posterior, dataset: data.Dataset) -> dict[str, Any]:
    """The numbers of summary.json, on the test set."""
    keep = posterior.keep()
    groups = posterior.summary().groups
    small = compact(posterior, keep)
    example = dataset.test.x[:1]
    with torch.random.fork_rng([]):
        torch.manual_seed(settings.seed)
        scale = dataset.preprocessing.get("target", {}).get("std", 1.0)
        scores = posterior.evaluate(
            dataset.test.x, dataset.test.y, keep=keep, target_scale=float(scale)
        )
    dense = _dense_network(posterior)
    hidden = [group for group in posterior.model.layers if group.prunable]
    names = [group.group for group in groups] or [group.name for group in hidden]
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
        "undecided": {group.group: group.undecided for group in groups} or dict.fromkeys(names, 0),
        "max_abs_diff_masked_compact": _difference(posterior, keep, small, dataset),
        **scores,
    }


@torch.no_grad()
def _difference(
    posterior: Posterior, keep: Mapping[str, Tensor], small: nn.Module, dataset: data.Dataset
) -> float:
    """Largest absolute difference between masked and compact network on test inputs."""
    inputs = dataset.test.x[:1024]
    return float((posterior.masked(inputs, keep) - small(inputs)).abs().max())


def _dense_network(posterior: Posterior) -> nn.Module:
    """The network with all units, as `compact` builds it."""
    everything = {
        group.name: torch.ones(group.size, dtype=torch.bool) for group in posterior.model.graph
    }
    return compact(posterior, everything)


def write_figures(posterior: Posterior, history: list[dict[str, Any]], folder: Path) -> None:
    """training.png, and for sparse models inclusion.png and units.png."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figures: dict[str, Callable[[Any], Any]] = {
        "training": lambda ax: plots.training_curve(history, ax)
    }
    inclusion = posterior.inclusion()
    if inclusion:
        figures["inclusion"] = lambda ax: plots.inclusion_probabilities(inclusion, ax)
        figures["units"] = lambda ax: plots.units_kept(history, ax)
    folder.mkdir(parents=True, exist_ok=True)
    for name, draw in figures.items():
        # No pyplot: its global state belongs to the user.
        figure = Figure(figsize=(7, 4.2), layout="constrained")
        FigureCanvasAgg(figure)
        draw(figure.subplots())
        figure.savefig(folder / f"{name}.png", dpi=130)


def load(
    folder: str | Path, root: str | Path | None = None
) -> tuple[Settings, data.Dataset, Posterior]:
    """Settings, data and fitted posterior of a run folder.

    Raises:
        FileNotFoundError: the folder holds no run, or its data are not found.
        ValueError: the checkpoint does not fit.
    """
    folder = Path(folder)
    config = folder / "config.json"
    if not config.is_file():
        raise FileNotFoundError(
            f"{folder} holds no run (no config.json); make one with pyro-sparse fit --out {folder}"
        )
    try:
        settings = Settings(**json.loads(config.read_text()))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{config} does not hold the settings of a run: {error}") from error
    dataset = load_data(settings, root)
    model, guide = build(settings, dataset)
    infer.restore(folder / "checkpoint" / "last.safetensors", model, guide)
    return settings, dataset, Posterior(model, guide)


def write_export(
    folder: str | Path,
    out: str | Path,
    *,
    root: str | Path | None = None,
    threshold: float = 0.5,
    onnx: bool = False,
    pt2: bool = False,
    draws: int = 0,
    dense: str | Path | None = None,
) -> dict[str, Any]:
    """Prune the run in ``folder`` and save its compact network to ``out``; returns the summary.

    Args:
        folder: the run.
        out: the new folder.
        root: of the data.
        threshold: of the median-probability rule.
        onnx, pt2: further formats.
        draws: compact networks drawn from the posterior, in place of the one at its means.
        dense: run folder of the dense baseline, for the model card; the folder ``dense`` beside the
            run when absent, as `compare` writes it, if it is of the same data and net.

    Raises:
        FileExistsError: ``out`` is not empty.
        FileNotFoundError: a run is not where it should be.
        ModuleNotFoundError: for ``onnx`` without its packages.
        ValueError: a layer would keep no unit; ``dense`` is no baseline of this run.
    """
    export.check_target(out, onnx=onnx)
    settings, dataset, posterior = load(folder, root)
    baseline = _dense_scores(Path(folder), settings, dense)
    keep = posterior.keep(MedianProbability(threshold))
    small = compact(posterior, keep)
    scale = float(dataset.preprocessing.get("target", {}).get("std", 1.0))
    test = dataset.test
    done: dict[str, Any] = {
        "kept": {name: int(mask.sum()) for name, mask in keep.items()},
        "units": {group.name: group.size for group in posterior.model.graph},
        "max_abs_diff_masked_compact": _difference(posterior, keep, small, dataset),
    }
    likelihood, noise = posterior.model.likelihood, posterior.guide.noise_precision
    latents = {}
    if noise is not None:
        mean, variance = noise.log_moments()
        latents["noise_precision"] = (mean + variance / 2).detach().exp().reshape(1).cpu()
    one = export.Ensemble([small], latents)
    done["scores"] = {
        "dense": baseline,
        "ensemble": _ensemble_scores(Path(folder), settings, posterior, dataset, keep),
        "compact": export.ensemble_scores(one, likelihood, test.x, test.y, scale),
    }
    if draws:
        small = export.compact_draws(posterior, keep, draws=draws, seed=settings.seed)
        latents = small.latents
        done["scores"]["exported"] = export.ensemble_scores(
            small, likelihood, test.x, test.y, scale
        )
    if latents:
        done["noise_scale"] = (scale * latents["noise_precision"].rsqrt()).tolist()
    export.save(
        small,
        out,
        onnx=onnx,
        pt2=pt2,
        example=test.x[:64],
        dense=_dense_network(posterior),
        preprocessing=dataset.preprocessing,
        metadata={
            **{
                name: getattr(settings, name) for name in ("model", "net", "data", "epochs", "seed")
            },
            "settings": dataclasses.asdict(settings),
            **done,
        },
    )
    return {
        "model": settings.model,
        "parameters": nets.count_parameters(small),
        "macs": nets.count_macs(small, dataset.test.x[:1]),
        **done,
    }


SCORES = ("accuracy", "rmse", "nll", "ece")


def _scores_of(summary: Mapping[str, Any], network: str) -> dict[str, float]:
    """What summary.json says of ``ensemble`` or ``compact``."""
    names = [name for name in SCORES if f"{name}_{network}" in summary]
    return {name: summary[f"{name}_{network}"] for name in names}


def _ensemble_scores(
    folder: Path,
    settings: Settings,
    posterior: Posterior,
    dataset: data.Dataset,
    keep: Mapping[str, Tensor],
) -> dict[str, float]:
    """Scores of the posterior's draws: the run's own, which do not depend on what is kept."""
    summary = folder / "summary.json"
    if summary.is_file():
        return _scores_of(json.loads(summary.read_text()), "ensemble")
    scale = float(dataset.preprocessing.get("target", {}).get("std", 1.0))
    with torch.random.fork_rng([]):
        torch.manual_seed(settings.seed)
        scores = posterior.evaluate(dataset.test.x, dataset.test.y, keep=keep, target_scale=scale)
    return _scores_of(scores, "ensemble")


def _dense_scores(
    folder: Path, settings: Settings, given: str | Path | None
) -> dict[str, float] | None:
    """Scores of the dense baseline of the run in ``folder``; None where there is none at hand."""
    baseline = folder.resolve().parent / "dense" if given is None else Path(given)
    config, summary = baseline / "config.json", baseline / "summary.json"
    if not (config.is_file() and summary.is_file()):
        if given is None:
            return None
        raise FileNotFoundError(f"{baseline} holds no finished run (config.json and summary.json)")
    there = json.loads(config.read_text())
    expected = {
        "model": "dense",
        **{key: getattr(settings, key) for key in ("data", "net", "split")},
    }
    wrong = [
        f"{key} is {there.get(key)!r}, not {value!r}"
        for key, value in expected.items()
        if there.get(key) != value
    ]
    if wrong:
        if given is None:
            return None
        raise ValueError(f"{baseline} is no dense baseline of {folder}: {'; '.join(wrong)}")
    return _scores_of(json.loads(summary.read_text()), "compact")


def bench(
    folder: str | Path,
    *,
    root: str | Path | None = None,
    batches: Sequence[int] = (1, 16, 256),
    threads: int = 1,
    seconds: float = 5.0,
) -> export.Benchmark:
    """Time the compact network of a run or an exported folder beside the dense one.

    Writes bench.json and bench.png into the folder, and into an exported folder's model card. The
    dense network of an exported folder has the recorded architecture and random weights.

    Args:
        folder: a run, or what `write_export` made of one.
        root: of a run's data.
        batches, threads, seconds: see :func:`pyro_sparse.export.bench`.

    Raises:
        FileNotFoundError: the folder is neither.
        ValueError: it does not say what the dense network was.
    """
    folder = Path(folder)
    exported = _is_exported(folder)
    if exported:
        given = export.read_config(folder)["input"]
        if given is None:
            raise ValueError(f"{folder} does not say what its network takes: save it with example=")
        with torch.random.fork_rng([]):
            torch.manual_seed(0)
            dense = export.reference(folder)
        small = export.load(folder)
        example = torch.zeros(1, *given["shape"], dtype=getattr(torch, given["dtype"]))
    else:
        _, dataset, posterior = load(folder, root)
        dense, small = _dense_network(posterior), compact(posterior)
        example = dataset.test.x[:1]
    result = export.bench(dense, small, example, batches=batches, threads=threads, seconds=seconds)
    _write_json(folder / "bench.json", result.to_dict())
    _write_figure(
        folder / "bench.png",
        [
            lambda ax: export_plots.latencies(result, ax),
            lambda ax: export_plots.speed_ups(result, ax),
        ],
    )
    if exported:
        export.refresh_card(folder)
    return result


def _is_exported(folder: Path) -> bool:
    """Whether a folder holds an exported network, and not a run."""
    config = folder / "config.json"
    if not config.is_file():
        raise FileNotFoundError(f"{folder} holds neither a run nor an exported network")
    try:
        return "format" in json.loads(config.read_text())
    except ValueError as error:
        raise ValueError(f"{config} is not valid JSON: {error}") from error


def _write_figure(path: Path, panels: Sequence[Callable[[Any], Any]]) -> None:
    """A picture with the panels side by side."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    # No pyplot: its global state belongs to the user.
    figure = Figure(figsize=(6.2 * len(panels), 4.4), layout="constrained")
    FigureCanvasAgg(figure)
    for draw, ax in zip(panels, figure.subplots(1, len(panels)), strict=True):
        draw(ax)
    figure.savefig(path, dpi=130)


def _write_json(path: Path, value: Any) -> None:
    aside = path.with_name(path.name + ".tmp")
    aside.write_text(json.dumps(value, indent=2) + "\n")
    os.replace(aside, path)
