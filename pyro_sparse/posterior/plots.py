"""Plots: each takes a matplotlib Axes, draws on it and returns it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.collections import LineCollection
from matplotlib.lines import Line2D
from matplotlib.ticker import (
    EngFormatter,
    LogLocator,
    MaxNLocator,
    NullFormatter,
    PercentFormatter,
    StrMethodFormatter,
)
from torch import Tensor

from pyro_sparse.names import UNDECIDED

if TYPE_CHECKING:
    from pyro_sparse.distributions import TruncatedLogNormal

    from .contraction import Curve
    from .inclusion import MergedInclusion
    from .metrics import ReliabilityCurve
    from .pruning import Pass

__all__ = [
    "COLOURS",
    "accuracy_against_cost",
    "accuracy_size_curve",
    "co_inclusion",
    "contraction_curve",
    "free_energy_path",
    "inclusion_over_seeds",
    "inclusion_probabilities",
    "inclusion_strips",
    "network",
    "noise_signal",
    "pit_histogram",
    "receptive_fields",
    "reliability_diagram",
    "training_curve",
    "units_kept",
]

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
"""Okabe and Ito's palette, which colour-blind readers can tell apart."""


def training_curve(history: Sequence[Mapping[str, Any]], ax: Axes) -> Axes:
    """ELBO and log-likelihood per example over epochs, and validation accuracy where recorded."""
    epochs = [entry["epoch"] for entry in history]
    lines: list[Line2D] = []
    for key, label, colour in (
        ("log_likelihood_per_datum", "log-likelihood", COLOURS[2]),
        ("elbo_per_datum", "ELBO", COLOURS[0]),
    ):
        lines += ax.plot(epochs, [entry[key] for entry in history], color=colour, label=label)
    ax.set_xlabel("epoch")
    ax.set_ylabel("nats per example")
    # The first epochs, with all weights still at their initial scale, would flatten the rest.
    settled = [entry["elbo_per_datum"] for entry in history[len(history) // 4 :]]
    top = max(entry["log_likelihood_per_datum"] for entry in history)
    low = min(settled)
    ax.set_ylim(low - 0.3 * (top - low), top + 0.1 * (top - low) + 1e-9)
    if "validation_accuracy" in history[0]:
        right = ax.twinx()
        lines += right.plot(
            epochs,
            [entry["validation_accuracy"] for entry in history],
            color=COLOURS[1],
            label="validation accuracy, units kept",
        )
        right.set_ylabel("accuracy")
        right.set_ylim(top=1.0)
    ax.legend(handles=lines, loc="lower right", frameon=False)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.set_title("training")
    return ax


def contraction_curve(curve: Curve, ax: Axes) -> Axes:
    """Posterior radius over n on log axes: repeats (dots), fitted rate (line), theory (dashed)."""
    sizes = list(curve.sizes)
    for row in curve.radii:
        ax.plot(sizes, row.tolist(), "o", color=COLOURS[0], alpha=0.6, markersize=4)
    # The line of the fitted slope through the middle of the dots.
    logs = torch.tensor(sizes, dtype=torch.float64).log()
    line = (curve.mean.log().mean() + curve.slope * (logs - logs.mean())).exp()
    interval = f"{curve.low:.2f} to {curve.high:.2f}"
    label = f"rate $n^{{{curve.slope:.2f}}}$ ({interval})"
    ax.plot(sizes, line.tolist(), color=COLOURS[0], label=label)
    theory = curve.scaled_theory
    if theory is not None:
        label = f"theory, scaled: $n^{{{curve.theory_slope:.2f}}}$"
        ax.plot(sizes, theory.tolist(), "--", color=COLOURS[1], label=label)
    ax.set_xscale("log")
    ax.set_yscale("log")
    ax.set_xticks(sizes, [str(size) for size in sizes])
    ax.minorticks_off()
    _log_ticks(ax.yaxis)
    ax.set_xlabel("training examples")
    ax.set_ylabel(f"radius ({curve.kind})")
    ax.set_title("posterior contraction")
    ax.legend(frameon=False)
    return ax


def inclusion_probabilities(inclusion: Mapping[str, Tensor], ax: Axes) -> Axes:
    """Posterior inclusion probabilities of every group, sorted; the dashed line is the rule ½."""
    for index, (name, pip) in enumerate(inclusion.items()):
        values = pip.sort(descending=True).values.tolist()
        kept = sum(value > 0.5 for value in values)
        colour = COLOURS[index % len(COLOURS)]
        ranks = range(1, len(values) + 1)
        ax.plot(ranks, values, color=colour, linewidth=1, alpha=0.5)
        ax.scatter(
            ranks, values, s=14, color=colour, label=f"{name}: {kept} of {len(values)}", zorder=3
        )
    ax.axhline(0.5, color="0.5", linestyle="--", linewidth=1)
    ax.axhspan(*UNDECIDED, color="0.5", alpha=0.08, linewidth=0)
    ax.set_ylim(-0.03, 1.03)
    ax.set_xlabel("unit, by rank")
    ax.set_ylabel("inclusion probability")
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.set_title("which units are in (shaded: undecided)")
    ax.legend(frameon=False)
    return ax


def inclusion_strips(inclusion: Mapping[str, Tensor], ax: Axes) -> Axes:
    """A strip a layer, a bar a unit by falling inclusion probability: dark is in, white is out.

    All strips are equally long, whatever the number of units.
    """
    for row, pip in enumerate(inclusion.values()):
        values = pip.sort(descending=True).values.reshape(1, -1).numpy()
        image = ax.imshow(
            values,
            cmap="Blues",
            vmin=0,
            vmax=1,
            aspect="auto",
            interpolation="nearest",
            extent=(0, 1, row + 0.4, row - 0.4),
        )
        for edge in (row - 0.4, row + 0.4):
            ax.plot([0, 1], [edge, edge], color="0.6", linewidth=0.6)
    labels = [f"{name} ({len(pip)})" for name, pip in inclusion.items()]
    ax.set_yticks(range(len(labels)), labels)
    ax.set_ylim(len(labels) - 0.5, -0.5)
    ax.set_xlim(0, 1)
    ax.xaxis.set_major_formatter(PercentFormatter(1.0))
    ax.set_xlabel("units, by rank")
    ax.set_title("inclusion probability by layer")
    ax.figure.colorbar(image, ax=ax)
    return ax


def inclusion_over_seeds(merged: MergedInclusion, ax: Axes) -> Axes:
    """Inclusion probabilities averaged over seeds, sorted, with two standard errors as bars."""
    errors = merged.standard_error
    for index, (name, mean) in enumerate(merged.mean.items()):
        order = mean.argsort(descending=True)
        ranks = torch.arange(1, len(order) + 1).tolist()
        colour = COLOURS[index % len(COLOURS)]
        ax.errorbar(
            ranks,
            mean[order].tolist(),
            yerr=(2 * errors[name][order]).tolist(),
            fmt=".",
            color=colour,
            elinewidth=0.8,
            label=name,
        )
    ax.axhline(0.5, color="0.5", linestyle="--", linewidth=1)
    ax.set_ylim(-0.03, 1.03)
    ax.set_xlabel("unit, by rank")
    ax.set_ylabel("inclusion probability")
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    runs = len(next(iter(merged.probabilities.values())))
    ax.set_title(f"mean of {runs} seeds ± 2 standard errors")
    ax.legend(frameon=False)
    return ax


def co_inclusion(merged: MergedInclusion, group: str, ax: Axes, most: int = 40) -> Axes:
    """How far pairs of units come together over seeds: C_ij less what independence would give.

    Orange: together more often than that, purple: one stands in for the other.

    Args:
        merged: of several seeds.
        group: whose units.
        ax: to draw on.
        most: units that are shown, those whose inclusion differs most over seeds.
    """
    values = merged.probabilities[group]
    chosen = values.std(0).argsort(descending=True)[:most].sort().values
    mean = merged.mean[group][chosen]
    pairs = merged.co_inclusion(group)[chosen][:, chosen] - mean.outer(mean)
    pairs.fill_diagonal_(0)
    bound = max(0.05, float(pairs.abs().max()))
    image = ax.imshow(
        pairs.numpy(), cmap="PuOr_r", vmin=-bound, vmax=bound, interpolation="nearest"
    )
    step = max(1, len(chosen) // 10)
    ticks = range(0, len(chosen), step)
    ax.set_xticks(ticks, [str(int(chosen[i])) for i in ticks])
    ax.set_yticks(ticks, [str(int(chosen[i])) for i in ticks])
    ax.set_xlabel("unit (in the first run's order)")
    ax.set_title(f"{group}: pairs in together, less independence")
    ax.figure.colorbar(image, ax=ax)
    return ax


def network(weights: Sequence[Tensor], keep: Sequence[Tensor], ax: Axes, *, most: int = 40) -> Axes:
    """Units of a chain of linear layers as dots, weights as lines; small ones are transparent.

    The opacity is the square of a weight over the layer's largest one. Units that are not kept are
    hollow; of wide layers a part is shown, kept ones first and those with the largest weights to
    the next layer, and its size is written below.

    Args:
        weights: of the layers, from the input on.
            Shape: (units, units of the layer before) each.
        keep: masks of the inputs, of every layer's units and of the outputs.
            Shape: (units,) each.
        ax: to draw on.
        most: units shown of a layer.

    Raises:
        ValueError: shapes do not form a chain.
    """
    sizes = [len(mask) for mask in keep]
    if [tuple(w.shape) for w in weights] != [(b, a) for a, b in pairwise(sizes)]:
        raise ValueError(
            f"expected weights between layers of {sizes} units, got shapes "
            f"{[tuple(w.shape) for w in weights]}"
        )
    norms = [*(weight.double().norm(dim=0) for weight in weights), weights[-1].new_zeros(sizes[-1])]
    shown = []
    for mask, norm in zip(keep, norms, strict=True):
        order = norm.argsort(descending=True, stable=True)
        order = torch.cat([order[mask[order]], order[~mask[order]]])
        shown.append(order[:most].sort().values)
    heights = [torch.linspace(0, 1, len(units) + 2)[1:-1].flip(0) for units in shown]
    for column, weight in enumerate(weights):
        part = weight[shown[column + 1]][:, shown[column]].abs().double()
        opacity = (part / part.max().clamp_min(1e-12)).square()
        ends, starts = (opacity > 0.02).nonzero(as_tuple=True)
        if not len(ends):  # nothing is left between these layers
            continue
        lines = torch.stack(
            [
                torch.stack([torch.full_like(heights[0][:1], column).expand(len(starts)),
                             heights[column][starts]], 1),
                torch.stack([torch.full_like(heights[0][:1], column + 1).expand(len(ends)),
                             heights[column + 1][ends]], 1),
            ],
            1,
        )  # fmt: skip
        ax.add_collection(
            LineCollection(
                list(lines.numpy()),
                colors="#1b1f24",
                linewidths=0.6,
                alpha=opacity[ends, starts].numpy(),
                zorder=1,
            )
        )
    for column, (units, mask) in enumerate(zip(shown, keep, strict=True)):
        inside = mask[units].tolist()
        faces = [COLOURS[0] if kept else "white" for kept in inside]
        edges = [COLOURS[0] if kept else "0.65" for kept in inside]
        ax.scatter(
            [column] * len(units),
            heights[column].tolist(),
            s=16,
            c=faces,
            edgecolors=edges,
            linewidths=0.7,
            zorder=2,
        )
        text = f"{int(mask.sum())} of {len(mask)}"
        if len(units) < len(mask):
            text += f"\n({len(units)} shown)"
        ax.text(column, -0.02, text, ha="center", va="top", fontsize="small")
    ax.set_xlim(-0.4, len(sizes) - 0.6)
    ax.set_ylim(-0.12, 1)
    ax.set_axis_off()
    return ax


def receptive_fields(images: Tensor, ax: Axes, *, most: int = 64) -> Axes:
    """What units read from an image, in a grid; each is scaled to its largest weight.

    Orange: positive, purple: negative, white: nothing.

    Args:
        images: weights into the units, over channels for images of several.
            Shape: (units, height, width) or (units, channels, height, width), of which the channels
            are summed.
        ax: to draw on.
        most: units shown, those with the largest weights.
    """
    if images.dim() == 4:
        images = images.sum(1)
    norms = images.flatten(1).norm(dim=1)
    chosen = norms.argsort(descending=True)[:most]
    images = (
        images[chosen] / images[chosen].flatten(1).abs().amax(1).clamp_min(1e-12)[:, None, None]
    )
    count, height, width = images.shape
    columns = math.ceil(math.sqrt(1.6 * count))
    rows = math.ceil(count / columns)
    # A gap of one pixel between images; what no image covers is left out.
    grid = torch.full((rows * (height + 1) - 1, columns * (width + 1) - 1), math.nan)
    for index, image in enumerate(images):
        top, left = index // columns * (height + 1), index % columns * (width + 1)
        grid[top : top + height, left : left + width] = image
    ax.imshow(grid.numpy(), cmap="PuOr_r", vmin=-1, vmax=1, interpolation="nearest")
    ax.set_facecolor("0.8")
    ax.set_xticks([])
    ax.set_yticks([])
    rest = "" if count == len(norms) else f", {count} of {len(norms)} shown"
    ax.set_title(f"what the kept units read, by norm{rest}")
    return ax


def noise_signal(noise: Mapping[str, TruncatedLogNormal], ax: Axes) -> Axes:
    """Signal-to-noise ratio against mean of every unit's noise; the dashed line is the rule 1."""
    for index, (name, law) in enumerate(noise.items()):
        signal = law.signal_to_noise.clamp(max=1e6)
        kept = int((signal > 1).sum())
        ax.scatter(
            law.mean.tolist(),
            signal.tolist(),
            s=12,
            alpha=0.6,
            color=COLOURS[index % len(COLOURS)],
            label=f"{name}: {kept} of {len(signal)}",
        )
    ax.axhline(1, color="0.5", linestyle="--", linewidth=1)
    ax.set_xscale("log")
    ax.set_yscale("log")
    ax.set_xlabel("E θ")
    ax.set_ylabel("signal-to-noise ratio of θ")
    ax.set_title("noise on units")
    ax.legend(frameon=False)
    return ax


def units_kept(history: Sequence[Mapping[str, Any]], ax: Axes) -> Axes:
    """Units by group over epochs: kept by the rule (dots), expected under q (line)."""
    epochs = [entry["epoch"] for entry in history]
    for index, name in enumerate(history[0]["kept"]):
        colour = COLOURS[index % len(COLOURS)]
        ax.plot(epochs, [entry["kept"][name] for entry in history], ".", color=colour, label=name)
        if name in history[0]["expected"]:
            expected = [entry["expected"][name] for entry in history]
            ax.plot(epochs, expected, color=colour)
    ax.set_ylim(bottom=0)
    ax.set_xlabel("epoch")
    ax.set_ylabel("units")
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    expects = bool(history[0]["expected"])
    ax.set_title("units: kept (dots), expected (line)" if expects else "units kept")
    ax.legend(frameon=False)
    return ax


def free_energy_path(path: Sequence[Pass], ax: Axes) -> Axes:
    """Free energy along :func:`~.pruning.iterate`: before, right after and long after each pass."""
    left = [step.left for step in path]
    ax.plot(left, [step.free_energy for step in path], "o-", color=COLOURS[0], label="retrained")
    passes = path[1:]
    for before, step in zip(path, passes, strict=False):
        ax.plot(
            [before.left, step.left, step.left],
            [before.free_energy, step.pruned, step.free_energy],
            color=COLOURS[1],
            linewidth=1,
            linestyle=":",
        )
    ax.plot(
        left[1:],
        [step.pruned for step in passes],
        "s",
        color=COLOURS[1],
        label="right after pruning",
    )
    predicted = [(step.left, step.predicted) for step in passes if step.predicted is not None]
    if predicted:
        ax.plot(*zip(*predicted, strict=True), "x", color=COLOURS[2], label="predicted, F − ΣΔF")
    # Later passes take ever fewer: on a logarithmic axis each has its place.
    ax.set_xscale("log")
    _log_ticks(ax.xaxis)
    ax.invert_xaxis()
    ax.set_xlabel("weights left")
    ax.set_ylabel("free energy (nats, lower is better)")
    ax.set_title("model reduction")
    ax.legend(frameon=False)
    return ax


def reliability_diagram(curves: Mapping[str, ReliabilityCurve], ax: Axes) -> Axes:
    """Accuracy against confidence, a line a predictor; the dashed line is perfect calibration.

    Dots grow with the share of examples in their bin.

    Args:
        curves: by :func:`~.metrics.reliability_curve`, under the names of the predictors.
        ax: to draw on.
    """
    ax.plot([0, 1], [0, 1], color="0.5", linestyle="--", linewidth=1)
    lowest = 1.0
    for index, (name, curve) in enumerate(curves.items()):
        confidence, accuracy = curve.confidence.tolist(), curve.accuracy.tolist()
        colour = COLOURS[index % len(COLOURS)]
        ax.plot(confidence, accuracy, color=colour, linewidth=1, alpha=0.6, label=name)
        sizes = (10 + 120 * curve.examples / curve.examples.sum()).tolist()
        ax.scatter(confidence, accuracy, s=sizes, color=colour, zorder=3)
        lowest = min(lowest, *confidence, *accuracy)
    low = max(0.0, lowest - 0.05)
    ax.set_xlim(low, 1.02)
    ax.set_ylim(low, 1.02)
    ax.set_xlabel("confidence")
    ax.set_ylabel("accuracy")
    ax.set_title("reliability (below the line: too sure)")
    ax.legend(frameon=False, loc="upper left")
    return ax


def pit_histogram(transforms: Mapping[str, Tensor], ax: Axes, bins: int = 20) -> Axes:
    """Density of F(y), a step line a predictor; calibrated predictions are flat at 1.

    Piled up at both ends: too narrow; in the middle: too wide. Shaded: where 95 % of the bins of a
    calibrated predictor lie, by the normal approximation of a count.

    Args:
        transforms: by :func:`~.metrics.probability_integral_transform`, under predictors' names.
            Shape: (N,) each.
        ax: to draw on.
        bins: of equal width.
    """
    highest = 0.0
    for index, (name, values) in enumerate(transforms.items()):
        colour = COLOURS[index % len(COLOURS)]
        heights, _, _ = ax.hist(
            values.tolist(),
            bins=bins,
            range=(0, 1),
            density=True,
            histtype="step",
            linewidth=1.5,
            color=colour,
            label=name,
        )
        highest = max(highest, *(float(height) for height in heights))
    count = min(len(values) for values in transforms.values())
    spread = 1.96 * ((bins - 1) / count) ** 0.5
    ax.axhspan(max(0.0, 1 - spread), 1 + spread, color="0.5", alpha=0.15, linewidth=0)
    ax.axhline(1, color="0.5", linestyle="--", linewidth=1)
    ax.set_xlim(0, 1)
    ax.set_ylim(0, 1.25 * max(highest, 1 + spread))
    ax.set_xlabel("F(y), the predicted probability of at most the observed value")
    ax.set_ylabel("density")
    ax.set_title("probability integral transform")
    ax.legend(frameon=False)
    return ax


def _log_ticks(axis: Axis) -> None:
    """Ticks of a logarithmic axis, as 0.05, 200k or 3M; the shorter it is, the more of them."""
    low, high = sorted(axis.get_view_interval())
    if high < 100 * low:
        axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    form = EngFormatter(sep="") if high > 10 else StrMethodFormatter("{x:g}")
    axis.set_major_formatter(form)
    axis.set_minor_formatter(form if high < 3 * low else NullFormatter())


def _cost_axis(ax: Axes) -> None:
    """MACs on a logarithmic axis."""
    ax.set_xscale("log")
    _log_ticks(ax.xaxis)
    ax.set_xlabel("MACs of the compact network")


def accuracy_against_cost(entries: Mapping[str, Sequence[Mapping[str, Any]]], ax: Axes) -> Axes:
    """Accuracy, or RMSE, against MACs of several models, and the Pareto front of compact networks.

    Filled: the compact network; hollow: the ensemble, at the same place on the axis of cost though
    it costs a full-size network a draw. Of several seeds, each is a small point, the mean a large
    one, and the front joins the means.

    Args:
        entries: runs by model, see :func:`pyro_sparse.runs.table.by_entry`, with
            ``macs_compact`` and ``accuracy_…`` or ``rmse_…`` as in summary.json; at least one.
        ax: to draw on.
    """
    score = "accuracy" if "accuracy_compact" in next(iter(entries.values()))[0] else "rmse"
    better = 1 if score == "accuracy" else -1
    points = []
    for index, (entry, runs) in enumerate(entries.items()):
        colour, marker = COLOURS[index % len(COLOURS)], "osD^vP*X"[index // len(COLOURS) % 8]
        keys = ("macs_compact", f"{score}_compact", f"{score}_ensemble")
        columns = [[run[key] for run in runs] for key in keys]
        macs, compact, ensemble = (sum(column) / len(column) for column in columns)
        if len(runs) > 1:
            xs, filled, hollow = columns
            style: dict[str, Any] = {"s": 12, "alpha": 0.6, "marker": marker}
            ax.scatter(xs, filled, color=colour, linewidths=0, **style)
            ax.scatter(xs, hollow, facecolors="none", edgecolors=colour, linewidths=0.8, **style)
        ax.plot([macs, macs], [compact, ensemble], color=colour, linewidth=1, alpha=0.5)
        ax.scatter([macs], [compact], s=45, color=colour, marker=marker, zorder=3)
        ax.scatter(
            [macs], [ensemble], s=45, facecolors="none", edgecolors=colour, marker=marker, zorder=3
        )
        ax.plot([], [], marker, color=colour, label=entry)
        points.append((macs, compact))
    front: list[tuple[float, float]] = []
    for macs, value in sorted(points, key=lambda point: (point[0], -better * point[1])):
        if not front or better * value > better * front[-1][1]:
            front.append((macs, value))
    ax.plot(*zip(*front, strict=True), color="0.6", linewidth=1, zorder=1)
    _cost_axis(ax)
    ax.set_ylabel("accuracy" if score == "accuracy" else "RMSE")
    ax.set_title("filled: compact network, hollow: ensemble")
    ax.grid(alpha=0.25)
    # Beside the points, whatever their number; long names would leave no room there.
    if max(map(len, entries)) <= 12:
        ax.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    else:
        ax.legend(frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.18), ncols=2)
    return ax


def accuracy_size_curve(curve: Sequence[Mapping[str, Any]], score: str, ax: Axes) -> Axes:
    """Score of the compact network against its MACs as the threshold moves; a ring marks the run's.

    Args:
        curve: points with ``macs``, ``own`` (whether it is what the run keeps) and the score.
        score: ``"accuracy"`` or ``"rmse"``.
        ax: to draw on.
    """
    points = sorted((point["macs"], point[score]) for point in curve)
    ax.plot(*zip(*points, strict=True), "o-", color=COLOURS[0], markersize=4, linewidth=1)
    own = [(point["macs"], point[score]) for point in curve if point["own"]]
    if own:
        ax.scatter(
            [macs for macs, _ in own],
            [value for _, value in own],
            s=120,
            facecolors="none",
            edgecolors=COLOURS[1],
            linewidths=2,
            label="this run",
            zorder=3,
        )
        ax.legend(frameon=False)
    _cost_axis(ax)
    ax.set_ylabel("accuracy" if score == "accuracy" else "RMSE")
    ax.set_title("compact networks of other sizes")
    ax.grid(alpha=0.25)
    return ax
