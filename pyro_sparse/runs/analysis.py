"""What one asks of a finished run: calibration, certainty about units, and other sizes.

`analyse` reads a run folder, computes everything again from the checkpoint, writes analysis.json
and two figures, and brings report.html up to date. `analyse_seeds` merges runs of several seeds.
"""

from __future__ import annotations

import dataclasses
import os
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from pyro_sparse import export, infer, nets
from pyro_sparse.posterior import (
    MergedInclusion,
    Posterior,
    SeedEnsemble,
    TopK,
    importance,
    plots,
    select_inputs,
)
from pyro_sparse.posterior.calibration import PredictiveCalibration, calibrate
from pyro_sparse.runs import experiment, page
from pyro_sparse.runs.table import tabulate

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from pyro_sparse import data
    from pyro_sparse.posterior.importance import Importance

__all__ = ["analyse", "analyse_seeds", "seed_folders", "size_curve", "unit_measure"]


def unit_measure(posterior: Posterior) -> tuple[str, Importance]:
    """The measure of units that the posterior's own selection rule thresholds, and its name.

    The Euclidean norm of rows at posterior means where it has none, as BMR and the dense baseline.
    """
    for name, offer in posterior.offers().items():
        if offer.cut is not None:
            return offer.title, importance.Offered(name)
    return "norm of the weights at posterior means", importance.magnitude


def size_curve(
    posterior: Posterior,
    split: data.Split,
    measure: Importance,
    own: dict[str, Tensor] | None = None,
    shares: Sequence[float] = (1.0, 0.8, 0.6, 0.45, 0.3, 0.2, 0.15, 0.1, 0.05, 0.03),
    target_scale: float = 1.0,
) -> list[dict[str, Any]]:
    """The compact network at other numbers of units, by moving the threshold of one measure.

    Units of all layers stand in one ranking, and every layer keeps its best one, so that each point
    is a network (:class:`~pyro_sparse.posterior.TopK`).

    Args:
        posterior: to be pruned; what was taken out for good stays out.
        split: examples to score on.
        measure: of units.
        own: masks of the run itself, which become a point of their own.
        shares: of units that are kept, in (0, 1].
        target_scale: standard deviation that the targets were divided by.

    Returns:
        By falling MACs, each with ``kept`` by layer, ``params``, ``macs``, ``nll``, ``accuracy`` or
        ``rmse``, and ``own``.
    """
    masks = [(posterior.keep(TopK(measure, float(share))), False) for share in shares]
    if own is not None:
        masks.append((own, True))
    names = [group.name for group in posterior.prunable_groups()]
    points: dict[Any, dict[str, Any]] = {}
    for keep, is_own in masks:
        key = tuple((name, *mask.nonzero().flatten().tolist()) for name, mask in keep.items())
        if is_own or (key not in points and all(bool(mask.any()) for mask in keep.values())):
            scores = _compact_scores(posterior, keep, split, target_scale)
            kept = {name: int(keep[name].sum()) for name in names}
            points[key] = {"kept": kept, **scores, "own": is_own}
    return sorted(points.values(), key=lambda point: (-point["macs"], -point["params"]))


@torch.no_grad()
def _compact_scores(
    posterior: Posterior, keep: dict[str, Tensor], split: data.Split, scale: float
) -> dict[str, Any]:
    """Size and scores of the one compact network of these units."""
    with posterior.statistics_of(posterior.mean_parameters(), keep):
        small = experiment.pruned_network(posterior, keep, split.x)
    likelihood = posterior.model.likelihood
    latents = {name: value.cpu() for name, value in posterior.mean_latents().items()}
    one = export.Ensemble([small], {name: value.reshape(1) for name, value in latents.items()})
    return {
        "params": nets.count_parameters(small),
        "macs": nets.count_macs(small, split.x[:1]),
        **export.ensemble_scores(one, likelihood, split.x, split.y, scale),
    }


def analyse(
    folder: str | Path,
    *,
    root: str | Path | None = None,
    draws: int = 100,
    members: int = 10,
    outside: str | None = None,
    checkpoint: str = "last",
    trust: bool = False,
) -> dict[str, Any]:
    """Everything one asks of the run in ``folder``, on its test set.

    Writes analysis.json and figures/calibration.png and figures/size.png into the folder, and
    report.html anew.

    Args:
        folder: a finished run.
        root: of the data.
        draws: of the ensemble.
        members: compact networks drawn from the posterior, as `export --draws` ships them.
        outside: name of another data set with inputs of the same shape, to be told from the run's.
        checkpoint: ``"last"`` or ``"best"``, see :func:`pyro_sparse.runs.experiment.load`.
        trust: whether to call code that the folder names, see the same.

    Returns:
        ``groups`` (the summary by layer), ``scores`` of ensemble and compact network,
        ``calibration`` of these and of the members, ``measure`` and ``curve`` (see `size_curve`),
        ``score`` (``"accuracy"`` or ``"rmse"``), ``outside`` where asked, and ``inputs``, see
        :func:`~pyro_sparse.runs.experiment.inputs_by_name`.

    Raises:
        FileNotFoundError: the folder holds no finished run, or the data are not found.
        ValueError: ``outside`` has inputs of another shape, or targets are not classes.
    """
    folder = Path(folder)
    settings, dataset, posterior = experiment.load(folder, root, checkpoint, trust=trust)
    temperature = _summary(folder).get("temperature", 1.0)
    test, likelihood = dataset.test, posterior.model.likelihood
    scale = dataset.target_scale
    other = None if outside is None else _inputs(settings, outside, root, dataset)
    keep = experiment.run_keep(settings, posterior, dataset)
    title, measure = unit_measure(posterior)
    with torch.random.fork_rng([]):
        torch.manual_seed(settings.seed)
        how: dict[str, Any] = {"num_samples": draws, "keep": keep, "target_scale": scale}
        scores = posterior.evaluate(test.x, test.y, **how, temperature=temperature)
        both = posterior.calibration(test.x, test.y, **how, temperature=temperature)
        apart = None
        if other is not None:
            apart = {"data": outside, **posterior.out_of_distribution(test.x, other)}
    small = experiment.pruned_network(posterior, keep, test.x)
    if isinstance(small, experiment.Constant):
        # Nothing is selected: there is one network to draw.
        means = {name: value.reshape(1).cpu() for name, value in posterior.mean_latents().items()}
        drawn, members = export.Ensemble([small], means), 1
    else:
        drawn = export.compact_draws(posterior, keep, draws=members, seed=settings.seed)
    with torch.no_grad():
        outputs = drawn(test.x)
    several = calibrate(
        likelihood,
        [
            (output, {name: values[draw] for name, values in drawn.latents.items()})
            for draw, output in enumerate(outputs)
        ],
        test.y,
        scale,
    )
    scores |= {
        f"{key}_members": value
        for key, value in export.ensemble_scores(drawn, likelihood, test.x, test.y, scale).items()
    }
    score = "accuracy" if "accuracy_compact" in scores else "rmse"
    curve = size_curve(posterior, test, measure, keep, target_scale=scale)
    all_of_them = {**both, "members": several}
    overview = posterior.summary(lambda _: keep)
    result = {
        "checkpoint": checkpoint,
        "draws": draws,
        "members": members,
        "groups": [dataclasses.asdict(group) for group in overview.groups],
        "scores": scores,
        "calibration": {
            which: {**one.to_dict(), "draws": {"ensemble": draws, "compact": 1}.get(which, members)}
            for which, one in all_of_them.items()
        },
        "measure": title,
        "score": score,
        "curve": curve,
        "outside": apart,
        "inputs": experiment.inputs_by_name([posterior], dataset),
        "objective": None if overview.objective is None else str(overview.objective),
    }
    infer.write_json(folder / "analysis.json", result)
    _write_figures(folder / "figures", all_of_them, curve, score)
    page.write_run(folder)
    return result


def _summary(folder: Path) -> dict[str, Any]:
    """summary.json of a finished run.

    Raises:
        FileNotFoundError: the run is not finished.
    """
    path = folder / "summary.json"
    if not path.is_file():
        raise FileNotFoundError(
            f"{folder} holds no finished run (no summary.json): it could not be pruned"
        )
    found: dict[str, Any] = infer.read_json(path)
    return found


def seed_folders(folders: Sequence[str | Path]) -> list[Path]:
    """Run folders among ``folders``: themselves, and those of the seeds below them."""
    found: list[Path] = []
    for folder in map(Path, folders):
        below = [path.parent for path in folder.glob("seed-*/config.json")]
        own = (folder / "config.json").is_file() or not below
        found += [folder] if own else sorted(below, key=lambda path: (len(path.name), path.name))
    return found


def analyse_seeds(
    folders: Sequence[str | Path],
    out: str | Path,
    *,
    root: str | Path | None = None,
    draws: int = 20,
    trust: bool = False,
) -> dict[str, Any]:
    """What several runs of one model say together, on their test set.

    Writes seeds.json, report.html and, with inclusion probabilities,
    figures/inclusion_over_seeds.png and figures/co_inclusion.png into ``out``.

    Args:
        folders: of at least two finished runs that differ in nothing but their seeds.
        out: a folder, such as the one that holds them.
        root: of the data.
        draws: of every run's posterior.
        trust: see `analyse`.

    Returns:
        ``runs`` (folder and seed of each), ``scores`` (mean and standard error over runs by key of
        summary.json), ``mixture`` (scores of the draws of all runs together), and for models with
        inclusion probabilities ``groups`` (see `_merged_groups`) and, where inputs are selected,
        ``inputs``: those within a Bayesian false-discovery rate of 5 %.

    Raises:
        FileNotFoundError: a folder holds no finished run, or the data are not found.
        ValueError: fewer than two runs, or runs that differ in more than their seeds.
    """
    paths = [Path(folder) for folder in folders]
    if len(paths) < 2:
        raise ValueError(f"expected at least two runs to merge, got {len(paths)}")
    # Before any data are read: settings and summaries are small.
    settings_of = [experiment.read_settings(folder, trust) for folder in paths]
    first, seeds = settings_of[0], [settings.seed for settings in settings_of]
    summaries = []
    for folder, settings in zip(paths, settings_of, strict=True):
        there, here = dataclasses.asdict(first), dataclasses.asdict(settings)
        differ = [name for name in here if here[name] != there[name] and name != "seed"]
        if differ:
            raise ValueError(
                f"expected runs that differ in their seeds only, but {folder} and {paths[0]} "
                f"differ in {', '.join(differ)}"
            )
        summaries.append(_summary(folder))
    if len(set(seeds)) < len(seeds):
        raise ValueError(f"expected runs of different seeds, got the seeds {seeds}")
    loaded = [experiment.load(folder, root, trust=trust) for folder in paths]
    _, dataset, _ = loaded[0]
    (cells,) = tabulate([{**one, "entry": first.model} for one in summaries]).rows.values()
    ensemble = SeedEnsemble([posterior for _, _, posterior in loaded])
    scale = dataset.target_scale
    with torch.random.fork_rng([]):
        torch.manual_seed(first.seed)
        mixture = ensemble.evaluate(dataset.test.x, dataset.test.y, draws, scale)
    result: dict[str, Any] = {
        "model": first.model,
        "data": first.data,
        "runs": [
            {"folder": str(folder), "seed": seed} for folder, seed in zip(paths, seeds, strict=True)
        ],
        "draws": draws,
        "scores": {
            key: {"mean": cell.mean, "standard_error": cell.standard_error}
            for key, cell in cells.items()
        },
        "mixture": mixture,
        "groups": [],
        "inputs": None,
    }
    out = Path(out)
    if ensemble.posteriors[0].inclusion():
        merged = ensemble.inclusion
        result["groups"] = _merged_groups(merged)
        if "input" in merged.probabilities:
            result["inputs"] = _selected_inputs(ensemble.posteriors, dataset)
        figures = out / "figures"
        page.write_figure(
            figures / "inclusion_over_seeds.png", lambda ax: plots.inclusion_over_seeds(merged, ax)
        )
        panels = [partial(plots.co_inclusion, merged, name) for name in merged.probabilities]
        page.write_figure(figures / "co_inclusion.png", *panels[:4])
    out.mkdir(parents=True, exist_ok=True)
    infer.write_json(out / "seeds.json", result)
    names = [os.path.relpath(folder, out) for folder in paths]
    page.write_seeds(
        out, [{**one, "run": name} for one, name in zip(summaries, names, strict=True)]
    )
    return result


def _selected_inputs(posteriors: Sequence[Posterior], dataset: data.Dataset) -> dict[str, Any]:
    """What is selected at a false-discovery rate of 5 %, and ``said``, in one sentence.

    ``names`` of all inputs, and ``variables``, see `experiment.inputs_by_name`.
    """
    names = None if dataset.feature_names is None else list(dataset.feature_names)
    about = {"names": names, "variables": experiment.inputs_by_name(posteriors, dataset)}
    try:
        chosen = select_inputs(posteriors, level=0.05)
    except ValueError as error:
        return {"selected": None, "said": f"No inputs are selected: {error}.", **about}
    called = [str(index) if names is None else names[index] for index in chosen.indices]
    return {
        "selected": chosen.indices,
        "selected_names": called,
        "false_discovery_rate": chosen.false_discovery_rate,
        "missed": chosen.missed,
        "said": f"Inputs within a false-discovery rate of 5 %: "
        f"{', '.join(called) or 'none'}; expected missed: {chosen.missed:.2f} "
        f"({chosen.objective}).",
        **about,
    }


def _merged_groups(merged: MergedInclusion) -> list[dict[str, Any]]:
    """A dict a group: PIPs over seeds, units matched (see `merge`), and what seeds agree on.

    ``expected`` and its ``standard_error``; ``always``, ``sometimes``: units with a probability
    above ½ in all runs, and in some but not all; ``largest_error``: largest standard error of a
    PIP; ``highest``: units of the most probable subnetwork; ``pair``: the two units whose joint
    inclusion is farthest from independence, and by how much; ``probability`` and ``error`` of every
    unit in the first run's order.
    """
    highest, _ = merged.highest_probability()
    groups = []
    for name, values in merged.probabilities.items():
        inside = values > 0.5
        mean, error = merged.mean[name], merged.standard_error[name]
        expected, spread = merged.expected[name]
        apart = merged.co_inclusion(name) - mean.outer(mean)
        apart.fill_diagonal_(0)
        first, second = divmod(int(apart.abs().argmax()), len(mean))
        groups.append(
            {
                "group": name,
                "units": len(mean),
                "expected": expected,
                "standard_error": spread,
                "always": int(inside.all(0).sum()),
                "sometimes": int((inside.any(0) & ~inside.all(0)).sum()),
                "largest_error": float(error.max()),
                "highest": int(highest[name].sum()),
                "pair": [first, second, float(apart[first, second])],
                "probability": mean.tolist(),
                "error": error.tolist(),
            }
        )
    return groups


def _inputs(
    settings: experiment.Settings, name: str, root: str | Path | None, dataset: data.Dataset
) -> Tensor:
    """Test inputs of another data set, scaled like the run's own."""
    other_settings = dataclasses.replace(settings, data=name, split=0)
    if name.partition(":")[0] not in ("csv", "parquet"):
        none: dict[str, Any] = {"target": None, "task": None, "drop": [], "missing": "impute"}
        other_settings = dataclasses.replace(other_settings, **none)
    other = experiment.load_data(other_settings, root)
    if other.input_shape != dataset.input_shape:
        raise ValueError(
            f"expected inputs of shape {dataset.input_shape} as those of {settings.data}, got "
            f"{other.input_shape} from {name}"
        )
    here, there = dataset.preprocessing["inputs"], other.preprocessing["inputs"]

    def tensor(value: Any) -> Tensor:
        return torch.as_tensor(value, dtype=torch.float32)

    raw = (other.test.x * tensor(there["std"]) + tensor(there["mean"])) * there["divide_by"]
    return (raw / here["divide_by"] - tensor(here["mean"])) / tensor(here["std"])


def _write_figures(
    folder: Path,
    calibration: dict[str, PredictiveCalibration],
    curve: list[dict[str, Any]],
    score: str,
) -> None:
    curves = {
        name: one.reliability for name, one in calibration.items() if one.reliability is not None
    }
    transforms = {name: one.pit for name, one in calibration.items() if one.pit is not None}
    page.write_figure(
        folder / "calibration.png",
        (lambda ax: plots.reliability_diagram(curves, ax))
        if curves
        else (lambda ax: plots.pit_histogram(transforms, ax)),
    )
    # A constant needs no multiplication, which a logarithm cannot show.
    shown = [{**point, "macs": max(1, point["macs"])} for point in curve]
    page.write_figure(folder / "size.png", lambda ax: plots.accuracy_size_curve(shown, score, ax))
