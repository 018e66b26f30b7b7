"""`fit`: stochastic variational inference, one short loop on Lightning Fabric."""

from __future__ import annotations

import json
import math
import time
import warnings
from collections.abc import Callable, Iterable, Sized
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyro
import torch
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
)
from torch import Tensor, nn

from pyro_sparse.data import check
from pyro_sparse.guides import GroupGuide
from pyro_sparse.models import SparseModel
from pyro_sparse.modules import own_parameters

from .checkpoint import checkpoint_file, restore, save_checkpoint
from .elbo import ELBO
from .schedules import Schedule, cheap, cosine, ramp

if TYPE_CHECKING:
    from lightning_fabric import Fabric

__all__ = ["Run", "check_data", "fit"]


@dataclass
class Run:
    """What `fit` returns: the metrics of every epoch, and where they lie.

    Attributes:
        history: one dict an epoch: ``epoch``, ``loss`` (nats per example, KL weighted as trained),
            ``elbo_per_datum``, ``log_likelihood_per_datum``, ``kl`` (nats), ``kl_weight``, ``lr``,
            ``seconds``, and ``kept``, ``expected``, ``undecided``: units by group.
        out: the run folder, or None.
    """

    history: list[dict[str, Any]] = field(default_factory=list)
    out: Path | None = None

    @property
    def seconds(self) -> float:
        """Wall-clock seconds of training."""
        return sum(entry["seconds"] for entry in self.history)


class _Objective(nn.Module):
    """Model, guide and ELBO as one module, so that Fabric moves and wraps them together."""

    model: SparseModel
    guide: GroupGuide
    elbo: ELBO

    def __init__(self, model: SparseModel, guide: GroupGuide, elbo: ELBO) -> None:
        super().__init__()
        self.model, self.guide, self.elbo = model, guide, elbo

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        with own_parameters(self.model, self.guide):
            estimate = self.elbo.estimate(self.model, self.guide, x, y)
        return estimate.loss, estimate.log_likelihood.detach(), estimate.kl.detach()


def _inclusion_metrics(guide: GroupGuide) -> dict[str, dict[str, Any]]:
    """Units by group: kept by the median-probability rule, expected under q, undecided."""
    metrics: dict[str, dict[str, Any]] = {"kept": {}, "expected": {}, "undecided": {}}
    for name, logits in guide.inclusion_logits().items():
        probabilities = logits.detach().double().sigmoid()
        metrics["kept"][name] = int((probabilities > 0.5).sum())
        metrics["expected"][name] = round(float(probabilities.sum()), 4)
        undecided = (probabilities > 0.05) & (probabilities < 0.95)
        metrics["undecided"][name] = int(undecided.sum())
    return metrics


def fused_adam(groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    """Adam in one pass over the parameters."""
    return torch.optim.Adam(groups, fused=True)


def check_data(model: SparseModel, x: Tensor, y: Tensor, where: str) -> None:
    """Raise ``ValueError`` unless the model can be trained on ``x`` and ``y``."""
    check(x, y, classes=None, features=model.example_shape[1:], where=where)
    with torch.no_grad():
        rows = model.initial_rows()
        output = model.run(x[:2].to(next(iter(rows.values())).device), rows)
    # Targets are checked against the network's outputs, which a couple of examples reveal.
    output = output[:1].expand(len(x), *output.shape[1:])
    try:
        model.likelihood.check(output, y.to(output.device))
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None


def fit(
    model: SparseModel,
    guide: GroupGuide,
    loader: Iterable[tuple[Tensor, Tensor]],
    *,
    epochs: int = 60,
    lr: float = 3e-3,
    inclusion_lr: float | None = None,
    scale_lr: float | None = None,
    optimizer: Callable[[list[dict[str, Any]]], torch.optim.Optimizer] = fused_adam,
    schedule: Schedule | None = None,
    inclusion_schedule: Schedule | None = None,
    kl_weight: Schedule | None = None,
    clip_norm: float | None = None,
    num_particles: int = 1,
    local_reparameterisation: bool = True,
    seed: int = 0,
    out: str | Path | None = None,
    resume: bool = False,
    progress: bool = True,
    fabric: Fabric | None = None,
    on_epoch: Callable[[dict[str, Any]], None] | None = None,
) -> Run:
    """Fit ``guide`` to ``model`` by stochastic gradient ascent of the ELBO.

    Args:
        model: see :mod:`pyro_sparse.models`.
        guide: see :mod:`pyro_sparse.guides`; trained in place.
        loader: gives ``(x, y)`` batches, an epoch each time it is iterated;
            :class:`pyro_sparse.data.Batches` or a ``DataLoader``.
        epochs: passes over the data.
        lr: learning rate of the weights' locations and variances.
        inclusion_lr: learning rate of the inclusion logits, 10 ``lr`` by default: they have to move
            by several units while the weights move by hundredths.
        scale_lr: learning rate of log-normal scales and precisions, 5 ``lr`` by default.
        optimizer: makes the optimiser from parameter groups that have their ``lr``; Adam by
            default.
        schedule: factor on the learning rates by progress in [0, 1], see
            :mod:`pyro_sparse.infer.schedules`; ``cosine(hold=0.4)`` by default.
        inclusion_schedule: the same for the inclusion logits, ``schedule`` by default. One that
            ends early decides the units early and keeps them.
        kl_weight: weight of the KL by progress in [0, 1], by default
            ``ramp(cheap(num_data), hold=0.2, change=0.4)``: units polarise while the KL is cheap,
            and the last 40 % of training maximise the evidence lower bound. ``constant()`` is that
            bound throughout.
        clip_norm: largest norm of the gradient of the loss per example.
        num_particles: draws of the guide a step.
        local_reparameterisation: see :mod:`pyro_sparse.infer.local_reparameterisation`.
        seed: of the noise; the caller's random state is left as it was.
        out: run folder: metrics.jsonl (a line an epoch) and checkpoint/ are written there.
        resume: go on from the checkpoint in ``out``.
        progress: show a progress bar.
        fabric: a ``lightning_fabric.Fabric`` for other devices, precisions or strategies; one
            device, chosen automatically, by default.
        on_epoch: called with each epoch's metrics, to which it may add.

    Returns:
        The metrics of every epoch.

    Raises:
        ValueError: an option is out of range, the data do not fit the model, ``out`` already
            holds a run, or the checkpoint to resume is damaged or of another model.
        FileNotFoundError: ``resume`` finds no checkpoint in ``out``.
        FloatingPointError: the loss or a parameter is no longer finite; the last checkpoint is
            left as it was.
    """
    if epochs < 1:
        raise ValueError(f"expected at least one epoch, got {epochs}")
    for name, value in {
        "lr": lr,
        "inclusion_lr": inclusion_lr,
        "scale_lr": scale_lr,
        "clip_norm": clip_norm,
    }.items():
        if value is not None and not 0 < value < math.inf:
            raise ValueError(f"expected a positive {name}, got {value}")
    schedule = schedule or cosine(hold=0.4)
    inclusion_schedule = inclusion_schedule or schedule
    kl_weight = kl_weight or ramp(cheap(model.num_data), hold=0.2, change=0.4)
    folder = None if out is None else Path(out)
    checkpoint = None if folder is None else checkpoint_file(folder)
    if checkpoint is not None and checkpoint.exists() and not resume:
        raise ValueError(
            f"{folder} already holds a run; choose another folder, or pass resume=True to go on"
        )
    if resume and checkpoint is None:
        raise ValueError("resume=True needs out=, the run folder to go on with")
    # A DataLoader draws from the global generator when it is iterated, and so does dropout.
    with torch.random.fork_rng([]):
        _check_loader(model, loader)

    if fabric is None:
        fabric = _default_fabric()
    elbo = ELBO(num_particles, local_reparameterisation=local_reparameterisation)
    how = {
        "weights": (lr, schedule),
        "inclusion": (inclusion_lr or 10 * lr, inclusion_schedule),
        "scales": (scale_lr or 5 * lr, schedule),
    }
    kinds = {kind: chosen for kind, chosen in guide.parameters_by_kind().items() if chosen}
    schedules = [how[kind][1] for kind in kinds]
    stepper = optimizer([{"params": kinds[kind], "lr": how[kind][0]} for kind in kinds])
    base_rates = [group["lr"] for group in stepper.param_groups]

    devices = range(torch.cuda.device_count())
    with torch.random.fork_rng(devices):
        torch.manual_seed(seed + fabric.global_rank)
        objective, stepper = fabric.setup(_Objective(model, guide, elbo), stepper)
        run = Run(out=folder)
        if resume and folder is not None and checkpoint is not None:
            done = restore(checkpoint, model, guide, optimizer=stepper.optimizer, loader=loader)
            run.history = done["history"]
            if fabric.is_global_zero:
                # A run that was stopped between writing both files has a line too many.
                _metrics_file(folder).write_text("".join(map(_line, run.history)))
        bar = _progress_bar(progress and fabric.is_global_zero)
        with bar:
            task = bar.add_task("", total=epochs, completed=len(run.history), state="")
            for epoch in range(len(run.history) + 1, epochs + 1):
                _train_epoch(
                    objective, stepper, loader, fabric, run,
                    epoch=epoch, epochs=epochs, rates=base_rates, schedules=schedules,
                    kl_weight=kl_weight, clip_norm=clip_norm,
                )  # fmt: skip
                metrics = run.history[-1]
                if on_epoch is not None:
                    on_epoch(metrics)
                if folder is not None and checkpoint is not None and fabric.is_global_zero:
                    folder.mkdir(parents=True, exist_ok=True)
                    with _metrics_file(folder).open("a" if epoch > 1 else "w") as file:
                        file.write(_line(metrics))
                    save_checkpoint(
                        checkpoint, model, guide, optimizer=stepper.optimizer, loader=loader,
                        progress={"history": run.history},
                    )  # fmt: skip
                expected = " ".join(f"{n}:{v:.0f}" for n, v in metrics["expected"].items())
                state = f"loss {metrics['loss']:.3f} ELBO/datum {metrics['elbo_per_datum']:.3f}"
                bar.update(task, advance=1, state=state + (f" units {expected}" * bool(expected)))
    return run


def _train_epoch(
    objective: _Objective,
    stepper: Any,
    loader: Iterable[tuple[Tensor, Tensor]],
    fabric: Fabric,
    run: Run,
    *,
    epoch: int,
    epochs: int,
    rates: list[float],
    schedules: list[Schedule],
    kl_weight: Schedule,
    clip_norm: float | None,
) -> None:
    model, guide, elbo = objective.model, objective.guide, objective.elbo
    started = time.perf_counter()
    steps = len(loader) if isinstance(loader, Sized) else 0
    totals = torch.zeros(2, dtype=torch.float64)
    count, loss_total = 0, torch.zeros((), dtype=torch.float64)
    for step, (x, y) in enumerate(loader):
        within = step / steps if steps else 0.0
        done = (epoch - 1 + within) / epochs
        for group, rate, schedule in zip(stepper.param_groups, rates, schedules, strict=True):
            group["lr"] = rate * schedule(done)
        elbo.kl_weight = kl_weight(done)
        x, y = x.to(fabric.device), y.to(fabric.device)
        # The first step checks every distribution's arguments; later ones trust it.
        with pyro.validation_enabled(epoch == 1 and step == 0):
            loss, log_likelihood, kl = objective(x, y)
        # Per example: step sizes and the clipping norm do not depend on the size of the data.
        loss = loss / model.num_data
        stepper.zero_grad()
        fabric.backward(loss)
        if clip_norm is not None:
            fabric.clip_gradients(objective, stepper, max_norm=clip_norm, error_if_nonfinite=False)
        stepper.step()
        loss_total += loss.detach().double().cpu()
        totals += torch.stack([log_likelihood, kl]).double().cpu()
        count += 1
    if not count:
        raise ValueError("the loader gave no batch in this epoch")
    # The last step's gradient shows in the parameters only.
    finite = all(bool(value.isfinite().all()) for value in guide.parameters())
    if not (math.isfinite(float(loss_total)) and finite):
        raise FloatingPointError(
            f"{'the loss is' if finite else 'parameters are'} no longer finite in epoch {epoch}; "
            "lower the learning rate, clip the gradient (clip_norm=1) or check the data's scale. "
            "The last checkpoint is untouched"
        )
    log_likelihood, kl = (totals / count).tolist()
    run.history.append(
        {
            "epoch": epoch,
            "loss": float(loss_total) / count,
            "elbo_per_datum": (log_likelihood - kl) / model.num_data,
            "log_likelihood_per_datum": log_likelihood / model.num_data,
            "kl": kl,
            "kl_weight": elbo.kl_weight,
            "lr": stepper.param_groups[0]["lr"],
            "seconds": time.perf_counter() - started,
            **_inclusion_metrics(guide),
        }
    )


def _check_loader(model: SparseModel, loader: Iterable[tuple[Tensor, Tensor]]) -> None:
    """Look at all data where the loader holds them, at the first batch otherwise."""
    if isinstance(loader, Sized) and len(loader) == 0:
        raise ValueError("the loader is empty; expected at least one batch of (x, y)")
    if hasattr(loader, "x") and hasattr(loader, "y"):
        check_data(model, loader.x, loader.y, "training data")
        return
    batch = next(iter(loader), None)
    if batch is None:
        raise ValueError("the loader is empty; expected at least one batch of (x, y)")
    check_data(model, *batch, "first batch")


def _metrics_file(folder: Path) -> Path:
    return folder / "metrics.jsonl"


def _line(metrics: dict[str, Any]) -> str:
    return json.dumps(metrics) + "\n"


def _default_fabric() -> Fabric:
    with warnings.catch_warnings():
        # Fabric's own start-up hints are about clusters.
        warnings.simplefilter("ignore")
        from lightning_fabric import Fabric
    return Fabric(devices=1)


def _progress_bar(enabled: bool) -> Progress:
    return Progress(
        TextColumn("epoch"),
        MofNCompleteColumn(),
        BarColumn(bar_width=8),
        TextColumn("{task.fields[state]}"),
        TimeRemainingColumn(),
        disable=not enabled,
    )
