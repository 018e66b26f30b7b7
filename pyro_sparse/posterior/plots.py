"""Plots: each takes a matplotlib Axes, draws on it and returns it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator
from torch import Tensor

if TYPE_CHECKING:
    from pyro_sparse.distributions import TruncatedLogNormal

    from .contraction import Curve
    from .pruning import Pass

__all__ = [
    "COLOURS",
    "contraction_curve",
    "free_energy_path",
    "inclusion_probabilities",
    "noise_signal",
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
    ax.axhspan(0.05, 0.95, color="0.5", alpha=0.08, linewidth=0)
    ax.set_ylim(-0.03, 1.03)
    ax.set_xlabel("unit, by rank")
    ax.set_ylabel("inclusion probability")
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.set_title("which units are in (shaded: undecided)")
    ax.legend(frameon=False)
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
    ax.invert_xaxis()
    ax.set_xlabel("weights left")
    ax.set_ylabel("free energy (nats, lower is better)")
    ax.set_title("model reduction")
    ax.legend(frameon=False)
    return ax
