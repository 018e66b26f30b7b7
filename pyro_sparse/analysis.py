"""What one asks of a finished run: calibration, certainty about units, and other sizes.

`analyse` reads a run folder, computes everything again from the checkpoint, writes analysis.json
and two figures, and brings report.html up to date.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from pyro_sparse import experiment, export, nets, page
from pyro_sparse.export import compact
from pyro_sparse.posterior import Posterior, TopK, importance, plots
from pyro_sparse.posterior.calibration import PredictiveCalibration, calibrate

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from pyro_sparse import data
    from pyro_sparse.posterior.importance import Importance

__all__ = ["analyse", "size_curve", "unit_measure"]


def unit_measure(posterior: Posterior) -> tuple[str, Importance]:
    """The measure of units that the posterior's own selection rule thresholds, and its name.

    The Euclidean norm of rows at posterior means where it has none, as BMR and the dense baseline.
    """
    for offers, title, measure in (
        (posterior.inclusion, "inclusion probability", importance.inclusion_probability),
        (posterior.noise, "signal-to-noise ratio of the noise", importance.noise_signal),
        (posterior.log_alpha, "retention (−log α)", importance.retention),
        (posterior.log_scales, "scale of the unit", importance.log_scale),
    ):
        if offers():
            return title, measure
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
        small = compact(posterior, keep)
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
        checkpoint: ``"last"`` or ``"best"``, see :func:`pyro_sparse.experiment.load`.

    Returns:
        ``groups`` (the summary by layer), ``scores`` of ensemble and compact network,
        ``calibration`` of these and of the members, ``measure`` and ``curve`` (see `size_curve`),
        ``score`` (``"accuracy"`` or ``"rmse"``), and ``outside`` where asked.

    Raises:
        FileNotFoundError: the folder holds no finished run, or the data are not found.
        ValueError: ``outside`` has inputs of another shape, or targets are not classes.
    """
    folder = Path(folder)
    settings, dataset, posterior = experiment.load(folder, root, checkpoint)
    if not (folder / "summary.json").is_file():
        raise FileNotFoundError(
            f"{folder} holds no finished run (no summary.json): it could not be pruned"
        )
    test, likelihood = dataset.test, posterior.model.likelihood
    scale = float(dataset.preprocessing.get("target", {}).get("std", 1.0))
    other = None if outside is None else _inputs(settings, outside, root, dataset)
    keep = experiment.run_keep(settings, posterior, dataset)
    title, measure = unit_measure(posterior)
    with torch.random.fork_rng([]):
        torch.manual_seed(settings.seed)
        scores = posterior.evaluate(
            test.x, test.y, num_samples=draws, keep=keep, target_scale=scale
        )
        both = posterior.calibration(
            test.x, test.y, num_samples=draws, keep=keep, target_scale=scale
        )
        apart = None
        if other is not None:
            apart = {"data": outside, **posterior.out_of_distribution(test.x, other)}
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
    result = {
        "checkpoint": checkpoint,
        "draws": draws,
        "members": members,
        "groups": [dataclasses.asdict(group) for group in posterior.summary(lambda _: keep).groups],
        "scores": scores,
        "calibration": {
            which: {**one.to_dict(), "draws": {"ensemble": draws, "compact": 1}.get(which, members)}
            for which, one in all_of_them.items()
        },
        "measure": title,
        "score": score,
        "curve": curve,
        "outside": apart,
    }
    experiment.write_json(folder / "analysis.json", result)
    _write_figures(folder / "figures", all_of_them, curve, score)
    page.write_run(folder)
    return result


def _inputs(
    settings: experiment.Settings, name: str, root: str | Path | None, dataset: data.Dataset
) -> Tensor:
    """Test inputs of another data set, scaled like the run's own."""
    other = experiment.load_data(dataclasses.replace(settings, data=name, split=0), root)
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
    folder.mkdir(exist_ok=True)
    page.write_figure(
        folder / "calibration.png",
        (lambda ax: plots.reliability_diagram(curves, ax))
        if curves
        else (lambda ax: plots.pit_histogram(transforms, ax)),
    )
    page.write_figure(folder / "size.png", lambda ax: plots.accuracy_size_curve(curve, score, ax))
