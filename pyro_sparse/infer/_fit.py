"""`fit`: stochastic variational inference, one short loop on Lightning Fabric."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich import get_console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
)
from torch import Tensor

from pyro_sparse.data import Batches, check
from pyro_sparse.guides import GroupGuide, as_guide
from pyro_sparse.inputs import Inputs, Several, as_rows, has_rows, tensors_of
from pyro_sparse.models import SparseModel
from pyro_sparse.ranges import whole

from ._lower_bound import lower_bound
from .checkpoint import State, write_checkpoint
from .divergence import Divergence
from .elbo import ELBO
from .folder import RunFolder
from .identity import identity
from .memory import check_memory, kept_bytes, memory_need
from .processes import launch, make_fabric, on_first, share, unify
from .recipe import FusedAdam, Recipe
from .schedules import Schedule
from .stopping import StopRequest
from .supports import keep_supports
from .training import RETRY_FACTOR, Run, Training, length

if TYPE_CHECKING:
    from lightning_fabric import Fabric

__all__ = ["check_data", "fit"]

SILENT = 30.0
"""Seconds after which training says where it is, without a terminal."""
VALIDATION_DRAWS = 4
"""Draws of the guide, for each batch, in the evidence lower bound of validation data."""
VALIDATION_BATCH = 1000
"""Most examples of validation data that are looked at together."""


def check_data(model: SparseModel, x: Any, y: Tensor, where: str) -> None:
    """Raise ``ValueError`` unless the model can be trained on ``x`` and ``y``."""
    x = as_rows(x)
    _check(model, x, y, where)
    BatchCheck(model, x)(x, y, where)


def _check(model: SparseModel, x: Tensor | Several, y: Tensor, where: str) -> None:
    example = model.graph.example
    if isinstance(x, Several):
        if not example.like(model.net, x):
            raise ValueError(
                f"{where}: expected inputs as in the model's example ({example.described}), got "
                f"{Inputs.of(model.net, x).described}"
            )
    elif len(example.tensors) > 1:
        got = f"shape {tuple(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
        raise ValueError(
            f"{where}: expected inputs as in the model's example ({example.described}), a tuple or "
            f"dictionary of them, got {got}"
        )
    own, rows = model.output_scale.dtype, example.batch
    for number, (value, like) in enumerate(zip(tensors_of(x), example.tensors, strict=True)):
        place = f"{where}, input {number + 1}" if isinstance(x, Several) else where
        if isinstance(x, Several) and not has_rows(like, rows):
            continue  # no rows: one for all examples
        check(
            value,
            y,
            classes=None,
            features=like.shape[1:],
            integers=not like.is_floating_point(),
            one_target=model.likelihood.one_target,
            where=place,
        )
        if value.is_floating_point() and value.dtype != own:
            raise ValueError(
                f"{place}: expected x of the network's dtype, {own}, got {value.dtype}"
            )


class BatchCheck:
    """Raises ``ValueError`` unless a batch fits the model: shapes, types and ranges.

    Args:
        model: its likelihood knows what targets are.
        x: a couple of examples, which reveal what the network makes of one.
    """

    def __init__(self, model: SparseModel, x: Any) -> None:
        self.model = model
        with torch.no_grad():
            rows = model.initial_rows()
            output = model.run(x[:2].to(next(iter(rows.values())).device), rows)
        self.output = output[:1]

    def __call__(self, x: Tensor | Several, y: Tensor, where: str) -> None:
        _check(self.model, x, y, where)
        output = self.output.expand(len(x), *self.output.shape[1:])
        try:
            self.model.likelihood.check(output, y.to(output.device))
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None


def fit(
    model: SparseModel,
    guide: GroupGuide | Callable[..., Any],
    loader: Iterable[tuple[Tensor, Tensor]],
    *,
    epochs: int = 60,
    lr: float = 3e-3,
    inclusion_lr: float | None = None,
    scale_lr: float | None = None,
    optimizer: Callable[[list[dict[str, Any]]], torch.optim.Optimizer] = FusedAdam,
    schedule: Schedule | None = None,
    inclusion_schedule: Schedule | None = None,
    kl_weight: Schedule | None = None,
    clip_norm: float | None = None,
    num_particles: int = 1,
    local_reparameterisation: bool = True,
    seed: int = 0,
    out: str | Path | None = None,
    resume: bool = False,
    validation: tuple[Tensor, Tensor] | Iterable[tuple[Tensor, Tensor]] | None = None,
    retries: int = 0,
    tape: bool = True,
    progress: bool = True,
    fabric: Fabric | None = None,
    on_epoch: Callable[[dict[str, Any]], None] | None = None,
) -> Run:
    """Fit ``guide`` to ``model`` by stochastic gradient ascent of the ELBO.

    Args:
        model: see :mod:`pyro_sparse.models`.
        guide: see :mod:`pyro_sparse.guides`; or a Pyro callable of your own, see
            :class:`~pyro_sparse.guides.HandWritten`. Trained in place.
        loader: gives ``(x, y)`` batches, an epoch each time it is iterated;
            :class:`pyro_sparse.data.Batches` or a ``DataLoader``. Of networks with several inputs x
            is a tuple or dictionary of tensors, as the model's example.
        epochs: passes over the data.
        lr: learning rate of the weights' locations and variances.
        inclusion_lr: learning rate of the inclusion logits, 10 ``lr`` by default: they have to move
            by several units while the weights move by hundredths; 4 ``lr`` where probabilities are
            the question, see ``kl_weight``.
        scale_lr: learning rate of log-normal scales and precisions, 5 ``lr`` by default.
        optimizer: makes the optimiser from parameter groups that have their ``lr``; Adam by
            default.
        schedule: factor on the learning rates by progress in [0, 1], see
            :mod:`pyro_sparse.infer.schedules`; ``cosine(hold=0.4)`` by default.
        inclusion_schedule: the same for the inclusion logits. One that ends early decides the units
            early and keeps them.
        kl_weight: weight of the KL by progress in [0, 1]. Where probabilities are the question
            (inputs are selected, or data are few: ``model.asks_for_probabilities``) it is 1
            throughout by default, the evidence lower bound, and the inclusion logits' rate rises
            from 0 to ``schedule`` between a tenth and three tenths of training. Elsewhere it is
            ``ramp(cheap(num_data), hold=0.2, change=0.4)``: units polarise while the KL is cheap,
            and the last 40 % of training maximise the bound.
        clip_norm: largest norm of the gradient of the loss per example.
        num_particles: draws of the guide a step.
        local_reparameterisation: see :mod:`pyro_sparse.infer.local_reparameterisation`.
        seed: of the noise; the caller's random state is left as it was.
        out: run folder: metrics.jsonl (a line an epoch) and checkpoint/ are written there, see
            :mod:`pyro_sparse.infer.folder`.
        resume: go on from the checkpoint in ``out``, or start where there is none yet. The run
            ends as one that was never stopped, bit for bit, if everything else is given as before.
        validation: examples ``(x, y)``, or a loader of them, that training does not see. Their
            evidence lower bound at full weight of the KL, (N/n) Σ log p(y) − KL over ``num_data``,
            is recorded after each epoch and ``on_epoch`` as ``validation_elbo_per_datum``, and
            decides which epoch is the best; without them ``elbo_per_datum`` does.
        retries: how often training may go back to the last whole epoch (or the start) when
            something is no longer finite, each time with half the learning rates.
        tape: after some steps, run the operations of a step without the Python around them, see
            :mod:`pyro_sparse.infer.tape`: the same numbers to the bit, in less time. One process on
            the CPU does, in full precision. False for Python that has to run in every step: hooks,
            prints, debuggers.
        progress: show a progress bar.
        fabric: a ``lightning_fabric.Fabric`` for other devices, precisions or strategies, see
            :func:`~pyro_sparse.infer.make_fabric`; one device, chosen automatically, by default.
            Of several processes each sees its share of every batch and draws noise of its own; see
            :mod:`~pyro_sparse.infer.processes`.
        on_epoch: called with each epoch's metrics, to which it may add, before the epoch is saved.
            Of several processes each calls it; what it does to model and guide in the first one
            counts.

    Returns:
        The metrics of every epoch.

    Raises:
        ValueError: an option is out of range, the data do not fit the model or its ``num_data``,
            they cannot be shared among the processes, ``out`` already holds a run, or the
            checkpoint to resume is damaged or of another model.
        FileNotFoundError: ``resume`` finds metrics in ``out``, but not their checkpoint.
        MemoryError: training cannot fit into the memory there is, with numbers; see
            :mod:`pyro_sparse.infer.memory`.
        OSError: ``out`` cannot be written, or has no room: before training, or when a checkpoint
            is written; those before it are untouched.
        Divergence: a `FloatingPointError`: the loss, a gradient or a parameter is no longer
            finite; it names the first that is not, the step, and the last good checkpoint.
        Interrupted: a `KeyboardInterrupt`: Ctrl-C or SIGTERM; the step was finished and everything
            saved. A second one stops at once.
    """
    whole(epochs=epochs)
    guide = as_guide(model, guide)
    if retries < 0:
        raise ValueError(f"expected at least 0 retries, got {retries}")
    recipe = Recipe(
        model, guide, lr=lr, inclusion_lr=inclusion_lr, scale_lr=scale_lr, optimizer=optimizer,
        schedule=schedule, inclusion_schedule=inclusion_schedule, kl_weight=kl_weight,
        clip_norm=clip_norm,
    )  # fmt: skip
    folder = None if out is None else RunFolder(Path(out))
    if folder is not None and folder.started and not resume:
        raise ValueError(
            f"{out} already holds a run; choose another folder, or pass resume=True to go on"
        )
    if resume and folder is None:
        raise ValueError("resume=True needs out=, the run folder to go on with")
    # A DataLoader draws from the global generator when it is iterated, and so does dropout.
    with torch.random.fork_rng([]):
        x, y, batch_size = _check_loader(model, loader)
        # Loaders that do not hold their data are looked at as their batches come.
        batch_check = None if _holds_data(loader) else BatchCheck(model, x)
        held_out = None if validation is None else _validation_batches(model, validation)

    if fabric is None:
        fabric = make_fabric()
    launch(fabric)
    shared = share(loader, fabric)
    elbo = ELBO(num_particles, local_reparameterisation=local_reparameterisation)
    if fabric.strategy.precision.precision == "32-true":  # as the estimate is made
        device = model.output_scale.device
        own = batch_size // (fabric.world_size if isinstance(loader, Batches) else 1)
        need = memory_need(elbo, model, guide, x.to(device), y.to(device), own)
        check_memory(need, fabric.device, need.parameters if device == fabric.device else 0)
    devices = range(torch.cuda.device_count())
    shown = progress and fabric.is_global_zero
    bar = _progress_bar(shown and _is_live())
    lines = _Lines(epochs) if shown and not _is_live() else None
    run_of = None
    if folder is not None:
        options = {"epochs": epochs, "num_particles": num_particles, **recipe.described()}
        run_of = identity(model, guide, loader, options)
    with (
        torch.random.fork_rng(devices),
        bar,
        _alone(folder, fabric),
        StopRequest() as stop,
    ):
        torch.manual_seed(seed + fabric.global_rank)
        training = Training(
            model, guide, elbo, shared, recipe, fabric, stop,
            Run(out=None if folder is None else folder.path), epochs=epochs, tape=tape,
            identity=run_of, check=batch_check,
        )  # fmt: skip
        run = training.run
        unify(fabric, model, guide)
        # The state to go back to: the start, then the last epoch that is done.
        good = training.state() if retries else None
        if folder is not None:
            needed = sum(kept_bytes(model, guide))
            on_first(fabric, partial(folder.prepare, needed))
            if resume:
                good = _resume(training, folder) or good
        task = bar.add_task("", total=epochs, completed=len(run.history), state="")
        while len(run.history) < epochs:
            try:
                metrics = training.epoch()
            except Divergence as error:
                if good is None or training.retried >= retries:
                    raise _given_up(error, training, folder) from None
                training.retry(good, error)
                if shown:
                    factor = RETRY_FACTOR**training.retried
                    line = f"{error}; going back, learning rates times {factor:g}"
                    bar.console.print(line, markup=False)
                continue
            if metrics is None:
                if folder is not None and training.running is not None:
                    state = training.state()
                    on_first(fabric, partial(write_checkpoint, folder.interrupted, state))
                raise training.interrupted()
            if on_epoch is not None:
                on_epoch(metrics)
                training.changed()
                unify(fabric, model, guide)
            if held_out is not None:
                bound = lower_bound(model, guide, held_out, draws=VALIDATION_DRAWS, seed=seed)
                metrics["validation_elbo_per_datum"] = bound.value / model.num_data
            if metrics["epoch"] == epochs:
                keep_supports(model, guide, loader, seed)
            training.keep(metrics)
            if retries or folder is not None:
                state = training.state()
                good = state if retries else None
                if folder is not None:
                    best = run.best is metrics
                    on_first(fabric, partial(folder.save, state, run.history, best=best))
            bar.update(task, advance=1, state=_progress_line(metrics, brief=bar.console.width < 90))
            if lines is not None:
                lines(metrics["epoch"], metrics)
        if training.stopping():
            raise training.interrupted()
    return run


def _resume(training: Training, folder: RunFolder) -> State | None:
    """Go on where the folder's run stopped; the state after its last whole epoch, if any."""
    last, interrupted = on_first(training.fabric, folder.load)
    if last is not None:
        training.install(last, folder.last)
        if training.fabric.is_global_zero:
            folder.rewrite_metrics(training.run.history)
    if interrupted is not None:
        training.install(interrupted, folder.interrupted)
    return last


@contextlib.contextmanager
def _alone(folder: RunFolder | None, fabric: Fabric) -> Iterator[None]:
    """Context in which no other process writes to the folder; of several processes one looks."""
    if folder is None or not fabric.is_global_zero:
        yield
        return
    with folder.alone():
        yield


def _given_up(error: Divergence, training: Training, folder: RunFolder | None) -> Divergence:
    """The same error with what to do, and what there is."""
    done = len(training.run.history)
    left = "No checkpoint was written"
    if folder is not None and done:
        left = f"The last good checkpoint is {folder.last}, of epoch {done}"
    tried = f" after {training.retried} retries" if training.retried else ""
    advice = (
        f"{tried}; lower the learning rate, clip the gradient (clip_norm=1) or check the data's "
        f"scale. {left}"
    )
    return Divergence(error.what, error.epoch, error.step, advice)


def _validation_batches(
    model: SparseModel, validation: Iterable[tuple[Tensor, Tensor]] | tuple[Tensor, Tensor]
) -> Iterable[tuple[Tensor, Tensor]]:
    """Checked batches of the validation data."""
    pair = tuple(validation) if isinstance(validation, tuple | list) else ()
    if len(pair) == 2 and isinstance(pair[1], Tensor):
        x, y = as_rows(pair[0]), pair[1]
        check_data(model, x, y, "validation data")
        # Even shares: no last batch of one example, which no batch normalisation can take.
        size = math.ceil(len(x) / math.ceil(len(x) / VALIDATION_BATCH))
        return Batches(x, y, size, shuffle=False)
    batches: Iterable[tuple[Tensor, Tensor]] = validation  # type: ignore[assignment]
    _check_loader(model, batches, "validation data")
    return batches


def _check_loader(
    model: SparseModel,
    loader: Iterable[tuple[Tensor, Tensor]],
    what: str = "training data",
) -> tuple[Tensor, Tensor, int]:
    """Look at all data where the loader holds them, at the first batch otherwise.

    Returns:
        A few examples, and how many a batch has.
    """
    if length(loader) == 0:
        raise ValueError("the loader is empty; expected at least one batch of (x, y)")
    if what == "training data":
        _check_size(model, loader)
    held: Any = loader
    if _holds_data(loader):
        check_data(model, held.x, held.y, what)
        size = getattr(loader, "batch_size", len(held.x))
        return held.x[:4], held.y[:4], min(size, len(held.x))
    batch = next(iter(loader), None)
    if batch is None:
        raise ValueError("the loader is empty; expected at least one batch of (x, y)")
    if not (isinstance(batch, tuple | list) and len(batch) == 2):
        parts = f" of {len(batch)}" if isinstance(batch, tuple | list) else ""
        raise ValueError(
            f"expected the loader to give batches (x, y), got a {type(batch).__name__}{parts}"
        )
    x, y = as_rows(batch[0]), batch[1]
    check_data(model, x, y, f"first batch of the {what}")
    return x[:4], y[:4], len(x)


def _holds_data(loader: Any) -> bool:
    return hasattr(loader, "x") and hasattr(loader, "y")


def _check_size(model: SparseModel, loader: Any) -> None:
    """Raise ``ValueError`` where the loader has another number of examples than the model.

    The likelihood of a batch is scaled to ``num_data`` examples: a wrong number tempers the
    posterior without a word.
    """
    # Of a DataLoader, a sampler may choose fewer examples than there are; a stream has none.
    names = ["x", "dataset", "sampler"]
    if isinstance(getattr(loader, "dataset", None), torch.utils.data.IterableDataset):
        names = ["dataset"]
    sizes = [size for name in names if (size := length(getattr(loader, name, None))) is not None]
    if sizes and model.num_data not in sizes:
        raise ValueError(
            f"the model has num_data={model.num_data}, but the loader {sizes[0]} examples; the "
            f"likelihood would count {model.num_data / sizes[0]:.3g} times. Make the model with "
            f"num_data={sizes[0]}; to weigh the KL otherwise, use kl_weight"
        )


def _progress_bar(enabled: bool) -> Progress:
    return Progress(
        TextColumn("epoch"),
        MofNCompleteColumn(),
        BarColumn(bar_width=8),
        TextColumn("{task.fields[state]}"),
        TimeRemainingColumn(),
        disable=not enabled,
    )


def _is_live() -> bool:
    """Whether what is printed can be overwritten, as in a terminal or a notebook."""
    console = get_console()
    return console.is_terminal or console.is_jupyter


class _Lines:
    """Where there is no terminal: a line every tenth of training, or every half minute.

    Args:
        epochs: of training.
    """

    def __init__(self, epochs: int) -> None:
        self.epochs, self.every = epochs, max(1, epochs // 10)
        self.last = time.monotonic()

    def __call__(self, epoch: int, metrics: dict[str, Any]) -> None:
        now = time.monotonic()
        if epoch % self.every == 0 or epoch == self.epochs or now - self.last > SILENT:
            self.last = now
            print(f"epoch {epoch}/{self.epochs} {_progress_line(metrics)}", flush=True)


def _progress_line(metrics: dict[str, Any], brief: bool = False) -> str:
    if brief:
        return f"loss {metrics['loss']:.3f}"
    expected = " ".join(f"{n}:{v:.0f}" for n, v in metrics["expected"].items())
    line = f"loss {metrics['loss']:.3f} ELBO/datum {metrics['elbo_per_datum']:.3f}"
    return line + (f" units {expected}" * bool(expected))
