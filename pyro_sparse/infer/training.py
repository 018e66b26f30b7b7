"""The state of training: epochs of steps, which can be copied, brought back and gone on with."""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyro
import torch
from torch import Tensor, nn

from pyro_sparse.guides import GroupGuide
from pyro_sparse.inputs import Several, as_rows, tensors_of
from pyro_sparse.models import SparseModel
from pyro_sparse.modules import own_parameters
from pyro_sparse.names import UNDECIDED

from .checkpoint import OWN, State, capture, install, order_of, set_order
from .divergence import (
    Divergence,
    broken_gradient,
    broken_parameter,
    broken_site,
    gradient_sums,
)
from .elbo import ELBO
from .history import Run
from .noise import NoiseOptimum
from .processes import random_states, set_random_states
from .recipe import Recipe
from .stopping import Interrupted, StopRequest
from .tape import Taped

if TYPE_CHECKING:
    from lightning_fabric import Fabric

__all__ = ["RETRY_FACTOR", "Objective", "Run", "Training", "length"]

DRAWS, LAST_DRAWS = 4, 32
"""Draws for the errors that the noise precision is set by, after an epoch and after the last."""
SETTLE = 16
"""Steps before the noise precision is set anew, where epochs are shorter; fewer at the beginning,
when it moves fast, and decides with which noise units compete."""

RETRY_FACTOR = 0.5
"""All learning rates are multiplied by this when training goes back after a divergence."""


def length(loader: Any) -> int | None:
    """Batches of an epoch, where a loader knows; a ``DataLoader`` over a stream has no length."""
    try:
        return len(loader)
    except TypeError:
        return None


class Objective(nn.Module):
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


@dataclass
class _Running:
    """How far the running epoch has come.

    Attributes:
        order: random states and the loader's when it began, see
            :func:`~pyro_sparse.infer.checkpoint.order_of`.
        steps: done.
        totals: over these, of the loss per example, the log-likelihood and the KL.
        seconds: they took.
    """

    order: dict[str, Tensor]
    steps: int = 0
    totals: list[float] = field(default_factory=lambda: [0.0, 0.0, 0.0])
    seconds: float = 0.0


class Training:
    """Model, guide, optimiser and loader, and how far they have come.

    Args:
        model, guide, elbo, loader: what is trained, and on what.
        recipe: how parameters move.
        fabric: moves and runs them.
        stop: looked at after every step.
        run: is given the metrics.
        epochs: in all.
        identity: what the run is a run of, kept with its states.
        check: raises ``ValueError`` where a batch does not fit; None where all data were checked.
        tape: whether steps may run from tapes, see :mod:`pyro_sparse.infer.tape`; one process on
            the CPU does, in full precision.
    """

    def __init__(
        self,
        model: SparseModel,
        guide: GroupGuide,
        elbo: ELBO,
        loader: Iterable[tuple[Tensor, Tensor]],
        recipe: Recipe,
        fabric: Fabric,
        stop: StopRequest,
        run: Run,
        *,
        epochs: int,
        identity: Mapping[str, Any] | None = None,
        check: Callable[[Tensor, Tensor, str], None] | None = None,
        tape: bool = True,
    ) -> None:
        self.model, self.guide, self.elbo, self.loader = model, guide, elbo, loader
        self.recipe, self.fabric, self.stop, self.run = recipe, fabric, stop, run
        self.epochs, self.identity, self.check = epochs, identity, check
        objective = Objective(model, guide, elbo)
        self.objective, self.stepper = fabric.setup(objective, recipe.optimizer)
        # A gradient scaler meets infinite gradients in its search for a scale, and skips them.
        self.precision: Any = fabric.strategy.precision
        self.scaled = getattr(self.precision, "scaler", None) is not None
        self.retries: list[dict[str, Any]] = []  # of the running epoch
        self.running: _Running | None = None
        # What Fabric adds to a step, for several processes or lower precision, is not on a tape.
        plain = self.precision.precision == "32-true" and fabric.world_size == 1
        tape = tape and plain and fabric.device.type == "cpu"
        self.taped = Taped(self._terms_and_gradients, objective) if tape else None
        self._several: Several | None = None
        self.noise = NoiseOptimum(model, guide)
        self._parameters = list(guide.parameters())  # looking for them takes as long as an update
        self._weights = 1.0, model.output_scale.new_ones(())

    # -- going back and going on -----------------------------------------------------------------

    def state(self) -> State:
        """A copy of everything that decides how training goes on.

        Of several processes, all must ask for it.
        """
        progress: dict[str, Any] = {"history": self.run.history, "retries": self.retries}
        if self.scaled:
            progress["scaler"] = self.precision.state_dict()
        order = None
        if self.running is not None:
            progress["running"] = asdict(self.running)
            order = progress["running"].pop("order")
        state = capture(
            self.model, self.guide, optimizer=self.stepper.optimizer, loader=self.loader,
            order=order, progress=progress, identity=self.identity,
        )  # fmt: skip
        state.tensors.update(random_states(self.fabric))
        return state

    def install(self, state: State, origin: str | Path = OWN) -> None:
        """Go back, or on, to what `state` gave.

        Raises:
            ValueError: it does not fit.
        """
        progress = install(
            state, self.model, self.guide, optimizer=self.stepper.optimizer, loader=self.loader,
            identity=self.identity, origin=origin,
        )  # fmt: skip
        set_random_states(self.fabric, state.tensors)
        self.changed()
        self.run.history[:] = progress["history"]
        self.retries = progress.get("retries", [])
        if self.scaled and "scaler" in progress:
            self.precision.load_state_dict(progress["scaler"])
        running = progress.get("running")
        self.running = None if running is None else _Running(state.order(), **running)

    @property
    def retried(self) -> int:
        """How often training has gone back after a divergence."""
        return sum(len(one.get("retries", ())) for one in self.run.history) + len(self.retries)

    def retry(self, good: State, error: Divergence) -> None:
        """Go back to a good state with smaller learning rates; the epoch's metrics will say so."""
        before = self.retries
        self.install(good)
        self.retries = [*before, {"step": error.step, "reason": error.what}]

    def changed(self) -> None:
        """To be called when others had their hands on model, guide or ELBO."""
        if self.taped is not None:
            self.taped.doubt()

    def interrupted(self) -> Interrupted:
        """Says where training was stopped, and how it goes on."""
        name = signal.Signals(self.stop.signum or signal.SIGINT).name
        done, steps = len(self.run.history), self.running.steps if self.running else 0
        where = f"in epoch {done + 1} of {self.epochs}, after step {steps}"
        if not steps:
            where = f"after epoch {done} of {self.epochs}"
        how = "nothing was saved, as there is no run folder"
        if self.run.out is not None:
            how = f"go on in {self.run.out} with resume=True, on the command line with --resume"
        return Interrupted(f"stopped by {name} {where}; {how}", self.run, self.stop.signum or 2)

    # -- one epoch -------------------------------------------------------------------------------

    def stopping(self) -> bool:
        """Whether to stop, which all processes do after the same step."""
        asked = float(self.stop.signum is not None)
        return bool(self._mean(torch.tensor([asked], device=self.fabric.device))[0])

    def epoch(self) -> dict[str, Any] | None:
        """Train to the end of the running epoch; its metrics, or None when asked to stop before.

        Raises:
            Divergence: something is not finite.
            ValueError: the loader gives no batch.
        """
        if self.stopping():
            return None
        if self.running is None:
            self.running = _Running(order_of(self.loader))
        running, number = self.running, len(self.run.history) + 1
        started = time.perf_counter() - running.seconds
        if running.steps:  # what the last of them had is part of the metrics
            self._schedule(running.steps - 1)
        for x, y in self._batches(running):
            x = as_rows(x)
            if self.check is not None:
                self.check(x, y, f"batch {running.steps + 1} of epoch {number}")
            self._schedule(running.steps)
            x, y = x.to(self.fabric.device), y.to(self.fabric.device)
            *values, stop = self.step(x, y)
            self.noise.see(x, y)
            running.steps += 1
            running.totals = [a + b for a, b in zip(running.totals, values, strict=True)]
            running.seconds = time.perf_counter() - started
            if stop:
                return None
        if not running.steps:
            raise ValueError("the loader gave no batch in this epoch")
        # What the last update made shows in the parameters only.
        broken = broken_parameter(self.guide)
        if broken is not None:
            raise Divergence(broken, number, running.steps)
        if number == self.epochs:
            self.noise.settle(LAST_DRAWS, self._mean)
        elif number % max(1, min(SETTLE // running.steps, number // 10)) == 0:
            self.noise.settle(DRAWS, self._mean)
        loss, log_likelihood, kl = (total / running.steps for total in running.totals)
        return {
            "epoch": number,
            "loss": loss,
            "elbo_per_datum": (log_likelihood - kl) / self.model.num_data,
            "log_likelihood_per_datum": log_likelihood / self.model.num_data,
            "kl": kl,
            "kl_weight": self.elbo.kl_weight,
            "lr": self.stepper.param_groups[0]["lr"],
            "seconds": time.perf_counter() - started,
            **({"retries": self.retries} if self.retries else {}),
            **_inclusion_metrics(self.guide),
        }

    def keep(self, metrics: dict[str, Any]) -> None:
        """End the epoch that has these metrics."""
        self.run.history.append(metrics)
        self.running, self.retries = None, []

    def _batches(self, running: _Running) -> Iterator[tuple[Tensor, Tensor]]:
        """The rest of an epoch's batches."""
        self.noise.forget()
        if not running.steps:
            return iter(self.loader)
        # Drawn again as they were, and skipped; then the noise goes on where it was.
        now = order_of(None)
        set_order(running.order, self.loader)
        batches = iter(self.loader)
        for _ in range(running.steps):
            x, y = next(batches)
            self.noise.see(as_rows(x), y)
        set_order(now, None)
        return batches

    def _schedule(self, step: int) -> None:
        """Learning rates and weight of the KL for a step of the running epoch."""
        steps = length(self.loader) or 0
        done = (len(self.run.history) + (step / steps if steps else 0.0)) / self.epochs
        self.recipe.set(done, self.elbo, RETRY_FACTOR**self.retried)

    def step(self, x: Tensor, y: Tensor) -> list[float]:
        """One update; loss per example, log-likelihood and KL before it, and whether to stop."""
        terms = self._by_fabric(x, y) if self.taped is None else self._by_tape(self.taped, x, y)
        # One transfer from the device; an update by what is not finite is never made.
        stop = terms.new_full((1,), self.stop.signum is not None)
        *values, stop_all = self._mean(torch.cat([terms, stop]))
        if not all(map(math.isfinite, values)):
            raise self._divergence(x, y, *values[:3])
        norm = self.recipe.clip_norm
        if norm is not None:
            if self.scaled:  # Fabric refuses to, for optimisers that could do it in their step
                self.precision.scaler.unscale_(self.stepper.optimizer)
                torch.nn.utils.clip_grad_norm_(self.guide.parameters(), norm)
            else:
                self.fabric.clip_gradients(
                    self.objective, self.stepper, max_norm=norm, error_if_nonfinite=False
                )
        self.stepper.step()
        return [*values[:3], stop_all]

    def settled(self, x: Tensor, y: Tensor) -> bool:
        """Whether a step on such a batch costs what it will cost from now on."""
        return self.taped is None or self.taped.ready(*tensors_of(x), y, self._weight())

    @property
    def _first(self) -> bool:
        """The first step checks every distribution's arguments; later ones trust it."""
        return not self.run.history and not (self.running and self.running.steps)

    def _by_fabric(self, x: Tensor, y: Tensor) -> Tensor:
        """Loss per example, log-likelihood, KL, sums of gradients; these are in ``grad`` then."""
        with pyro.validation_enabled(self._first):
            loss, log_likelihood, kl = self.objective(x, y)
        # Per example: step sizes and the clipping norm do not depend on the size of the data.
        loss = loss / self.model.num_data
        self.stepper.zero_grad()
        self.fabric.backward(loss)
        gradients = [] if self.scaled else [value.grad for value in self._moving()]
        return torch.stack([loss.detach(), log_likelihood, kl, *gradient_sums(gradients)])

    def _by_tape(self, taped: Taped, x: Tensor, y: Tensor) -> Tensor:
        """As `_by_fabric`, without it."""
        moving = self._moving()
        for parameter in moving:  # two generations of gradients would lie there at the peak
            parameter.grad = None
        if isinstance(x, Several):  # of one structure in all batches, by the check of the data
            self._several = x
        terms, *gradients = taped(*tensors_of(x), y, self._weight())
        for parameter, gradient in zip(moving, gradients, strict=True):
            parameter.grad = gradient
        assert terms is not None
        return terms

    def _terms_and_gradients(self, *tensors: Tensor) -> list[Tensor | None]:
        """The same as a function of tensors, for tapes: inputs, targets, weight of the KL."""
        *inputs, y, kl_weight = tensors
        x: Any = inputs[0] if self._several is None else self._several.replaced(inputs)
        own = self.elbo.kl_weight
        try:
            self.elbo.kl_weight = kl_weight  # type: ignore[assignment]
            with pyro.validation_enabled(self._first):
                loss, log_likelihood, kl = self.objective.module(x, y)
        finally:
            self.elbo.kl_weight = own
        loss = loss / self.model.num_data
        gradients = torch.autograd.grad(loss, self._moving(), allow_unused=True)
        terms = [loss.detach(), log_likelihood, kl, *gradient_sums(gradients)]
        return [torch.stack(terms), *gradients]

    def _weight(self) -> Tensor:
        """The KL's, as a tensor, which is kept: making one takes longer than many an operation."""
        if self._weights[0] != self.elbo.kl_weight:
            value = self.elbo.kl_weight
            self._weights = value, self.model.output_scale.new_tensor(value)
        return self._weights[1]

    def _moving(self) -> list[nn.Parameter]:
        return [parameter for parameter in self._parameters if parameter.requires_grad]

    def _mean(self, values: Tensor) -> list[float]:
        """The mean over all processes, the same in each."""
        if self.fabric.world_size > 1:
            values = values / self.fabric.world_size
            torch.distributed.all_reduce(values)
        numbers: list[float] = values.tolist()
        return numbers

    def _divergence(
        self, x: Tensor, y: Tensor, loss: float, log_likelihood: float, kl: float
    ) -> Divergence:
        epoch, steps = len(self.run.history) + 1, self.running.steps if self.running else 0
        broken = broken_parameter(self.guide)
        if broken is not None:  # by the update before this step
            return Divergence(broken, epoch, steps)
        if all(map(math.isfinite, (loss, log_likelihood, kl))):
            what = broken_gradient(self.guide) or "a sum of gradients overflowed"
        else:
            part = "KL" if not math.isfinite(kl) else "log-likelihood"
            found = broken_site(self.elbo, self.model, self.guide, x, y)
            what = found or f"the {part} is not finite"
        return Divergence(what, epoch, steps + 1)


def _inclusion_metrics(guide: GroupGuide) -> dict[str, dict[str, Any]]:
    """Units by group: kept by the median-probability rule, expected under q, undecided."""
    metrics: dict[str, dict[str, Any]] = {"kept": {}, "expected": {}, "undecided": {}}
    offer = guide.offers().get("inclusion")
    for name, probabilities in offer.values.items() if offer is not None else ():
        metrics["kept"][name] = int((probabilities > 0.5).sum())
        metrics["expected"][name] = round(float(probabilities.sum()), 4)
        undecided = (probabilities > UNDECIDED[0]) & (probabilities < UNDECIDED[1])
        metrics["undecided"][name] = int(undecided.sum())
    return metrics
