"""From a run folder to what one ships: an exported folder, and how fast its network is."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from pyro_sparse import export, infer, nets
from pyro_sparse.export import compact, plots
from pyro_sparse.posterior.calibration import class_probabilities, fitted_temperature
from pyro_sparse.runs import page
from pyro_sparse.runs.experiment import (
    Constant,
    Settings,
    dense_network,
    ensemble_temperature,
    load,
    masked_difference,
    pruned_network,
    run_keep,
)
from pyro_sparse.runs.table import SCORES

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor

    from pyro_sparse import data
    from pyro_sparse.likelihoods import Likelihood
    from pyro_sparse.posterior import Posterior

__all__ = ["bench", "is_exported", "write_export"]

CALIBRATION = 512
"""Training inputs from which int8 takes the ranges of activations."""


def write_export(
    folder: str | Path,
    out: str | Path,
    *,
    root: str | Path | None = None,
    rule: str | None = None,
    onnx: bool = False,
    int8: bool = False,
    pt2: bool = True,
    draws: int = 0,
    dense: str | Path | None = None,
    checkpoint: str = "last",
    trust: bool = False,
) -> dict[str, Any]:
    """Prune the run in ``folder`` and save its compact network to ``out``; returns the summary.

    Args:
        folder: the run.
        out: the new folder.
        root: of the data.
        rule: a selection rule, see :func:`pyro_sparse.posterior.selection.parse`; that of the run
            when absent.
        onnx, int8: further formats, see :func:`pyro_sparse.export.save`; int8 takes the ranges of
            activations from training inputs.
        pt2: always written; taken for scripts of earlier versions.
        draws: compact networks drawn from the posterior, in place of the one at its means.
        dense: run folder of the dense baseline, for the model card; the folder ``dense`` beside the
            run when absent, as `compare` writes it, if it is of the same data and net.
        checkpoint: ``"last"`` or ``"best"``, see `load`.
        trust: whether to call code that the folder names, see `load`.

    Raises:
        FileExistsError: ``out`` is not empty.
        FileNotFoundError: a run is not where it should be.
        ModuleNotFoundError: for ``onnx`` without its packages.
        ValueError: a layer would keep no unit; ``dense`` is no baseline of this run.
    """
    export.check_target(out, onnx=onnx or int8)
    settings, dataset, posterior = load(folder, root, checkpoint, trust=trust)
    baseline = _dense_scores(Path(folder), settings, dense)
    keep = run_keep(settings, posterior, dataset, rule)
    if rule is not None:
        posterior.refresh_statistics(keep)
    small = pruned_network(posterior, keep, dataset.test.x)
    if isinstance(small, Constant):
        raise ValueError(
            f"{folder}: nothing is selected (a layer or the input would keep none of its units); "
            "the network is a constant and there is nothing to export; take another --rule, or "
            "train again with a larger prior inclusion probability"
        )
    scale = dataset.target_scale
    test = dataset.test
    done: dict[str, Any] = {
        "kept": {name: int(mask.sum()) for name, mask in keep.items()},
        "units": {group.name: group.size for group in posterior.model.graph},
        "max_abs_diff_masked_compact": masked_difference(posterior, keep, small, dataset),
    }
    likelihood = posterior.model.likelihood
    latents = {name: mean.reshape(1).cpu() for name, mean in posterior.mean_latents().items()}
    one = export.Ensemble([small], latents)
    done["scores"] = {
        "dense": baseline,
        "ensemble": _ensemble_scores(
            Path(folder) if checkpoint == "last" else None, settings, posterior, dataset, keep
        ),
        "compact": export.ensemble_scores(one, likelihood, test.x, test.y, scale),
    }
    if draws:
        small = export.compact_draws(posterior, keep, draws=draws, seed=settings.seed)
        latents = small.latents
        temperature = _exported_temperature(settings, small, likelihood, dataset)
        if dataset.classes:
            done["temperature"] = temperature
        done["scores"]["exported"] = export.ensemble_scores(
            small, likelihood, test.x, test.y, scale, temperature=temperature
        )
    if latents:
        done["noise_scale"] = (scale * latents["noise_precision"].rsqrt()).tolist()
    export.save(
        small,
        out,
        onnx=onnx,
        int8=int8,
        example=test.x[:64],
        calibration=dataset.train.x[:CALIBRATION],
        test=(test.x, test.y),
        dense=dense_network(posterior),
        preprocessing=dataset.preprocessing,
        metadata={
            **{
                name: getattr(settings, name) for name in ("model", "net", "data", "epochs", "seed")
            },
            "settings": dataclasses.asdict(settings),
            "checkpoint": checkpoint,
            "taken": dataset.taken,
            "target": dataset.target,
            "features": dataset.feature_names,
            **_kept_by_name(dataset, keep),
            **done,
        },
    )
    return {
        "model": settings.model,
        "parameters": nets.count_parameters(small),
        "macs": nets.count_macs(small, dataset.test.x[:1]),
        **done,
    }


def _kept_by_name(dataset: data.Dataset, keep: Mapping[str, Tensor]) -> dict[str, Any]:
    """Names of the inputs that the network reads, where they have any."""
    if dataset.feature_names is None or len(dataset.feature_names) != len(keep["input"]):
        return {}
    pairs = zip(dataset.feature_names, keep["input"].tolist(), strict=True)
    return {"features_kept": [name for name, kept in pairs if kept]}


@torch.no_grad()
def _exported_temperature(
    settings: Settings, ensemble: export.Ensemble, likelihood: Likelihood, dataset: data.Dataset
) -> float:
    """That of the draws that are shipped: their units are those of one mask, so it is their own."""
    rows = dataset.validation
    if settings.ensemble_temperature != "validation" or not dataset.classes or not len(rows):
        given = settings.ensemble_temperature
        return 1.0 if isinstance(given, str) or not dataset.classes else given
    natural = likelihood.natural(ensemble(rows.x).flatten(0, 1))
    probabilities = class_probabilities(likelihood, natural).unflatten(0, (ensemble.draws, -1))
    return fitted_temperature(probabilities, rows.y)


def _scores_of(summary: Mapping[str, Any], network: str) -> dict[str, float]:
    """What summary.json says of ``ensemble`` or ``compact``."""
    keys = {score.key: f"{score.key}_{network}" for score in SCORES}
    return {name: summary[key] for name, key in keys.items() if key in summary}


def _ensemble_scores(
    folder: Path | None,
    settings: Settings,
    posterior: Posterior,
    dataset: data.Dataset,
    keep: Mapping[str, Tensor],
) -> dict[str, float]:
    """Scores of the posterior's draws: those of a run, which do not depend on what is kept."""
    if folder is not None and (folder / "summary.json").is_file():
        return _scores_of(infer.read_json(folder / "summary.json"), "ensemble")
    scale = dataset.target_scale
    with torch.random.fork_rng([]):
        torch.manual_seed(settings.seed)
        scores = posterior.evaluate(
            *(dataset.test.x, dataset.test.y),
            keep=keep,
            target_scale=scale,
            temperature=ensemble_temperature(settings, posterior, dataset),
        )
    return _scores_of(scores, "ensemble")


def _dense_scores(
    folder: Path, settings: Settings, given: str | Path | None
) -> dict[str, float] | None:
    """Scores of the dense baseline of the run in ``folder``; None where there is none at hand."""
    here = folder.resolve()
    beside = here.parent / "dense"
    if here.name.startswith("seed-"):
        beside = here.parent.parent / "dense" / here.name
    baseline = beside if given is None else Path(given)
    config, summary = baseline / "config.json", baseline / "summary.json"
    if not (config.is_file() and summary.is_file()):
        if given is None:
            return None
        raise FileNotFoundError(f"{baseline} holds no finished run (config.json and summary.json)")
    there = infer.read_json(config)
    expected = {
        "model": "dense",
        **{key: getattr(settings, key) for key in ("data", "net", "split", "target", "task")},
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
    return _scores_of(infer.read_json(summary), "compact")


def bench(
    folder: str | Path,
    *,
    root: str | Path | None = None,
    batches: Sequence[int] = (1, 16, 256),
    threads: int = 1,
    seconds: float = 5.0,
    trust: bool = False,
) -> export.Benchmark:
    """Time the compact network of a run or an exported folder beside the dense one.

    Writes bench.json and bench.png into the folder, and into an exported folder's model card. The
    dense network of an exported folder has the recorded architecture and random weights.

    Args:
        folder: a run, or what `write_export` made of one.
        root: of a run's data.
        batches, threads, seconds: see :func:`pyro_sparse.export.bench`.
        trust: whether to call code that a run names, see `load`.

    Raises:
        FileNotFoundError: the folder is neither.
        ValueError: it does not say what the dense network was; more threads than the machine has
            cores for.
    """
    folder = Path(folder)
    cores = os.cpu_count() or 1
    if not 1 <= threads <= cores:
        raise ValueError(
            f"expected 1 to {cores} threads, as many as there are cores, got {threads}"
        )
    exported = is_exported(folder)
    example: Any
    if exported:
        with torch.random.fork_rng([]):
            torch.manual_seed(0)
            dense = export.reference(folder)
        small = export.load(folder)
        example = export.example_of(folder)
        int8 = folder / "model-int8.onnx"
    else:
        settings, dataset, posterior = load(folder, root, trust=trust)
        small = compact(posterior, run_keep(settings, posterior, dataset))
        dense = dense_network(posterior)
        example, int8 = dataset.test.x[:64], folder / "none"
    result = export.bench(
        dense,
        small,
        example,
        int8=int8 if int8.is_file() else None,
        batches=batches,
        threads=threads,
        seconds=seconds,
    )
    infer.write_json(folder / "bench.json", result.to_dict())
    page.write_figure(
        folder / "bench.png",
        lambda ax: plots.latencies(result, ax),
        lambda ax: plots.speed_ups(result, ax),
    )
    if exported:
        export.refresh_card(folder)
    return result


def is_exported(folder: Path) -> bool:
    """Whether a folder holds an exported network, and not a run."""
    config = folder / "config.json"
    if not config.is_file():
        raise FileNotFoundError(f"{folder} holds neither a run nor an exported network")
    try:
        return "format" in infer.read_json(config)
    except ValueError as error:
        raise ValueError(f"{config} is not valid JSON: {error}") from error
