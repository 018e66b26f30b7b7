"""A LightningModule for those who train with the Lightning Trainer.

:func:`~pyro_sparse.infer.fit` needs no Trainer, whose own work costs 2 to 3 ms a step, half of a
small network's. What is here has the same objective, parameter groups and
schedules; checkpoints, devices, precision and logging are the Trainer's::

    from lightning.pytorch import Trainer
    from pyro_sparse.infer.lightning import SparseModule

    Trainer(max_epochs=60).fit(SparseModule(model, guide), loader)
    posterior = pyro_sparse.Posterior(model, guide)

It needs ``pip install "pyro-sparse[lightning]"``.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
from torch import Tensor

from pyro_sparse.guides import GroupGuide
from pyro_sparse.models import SparseModel

from .elbo import ELBO
from .recipe import Recipe
from .training import Objective

try:
    from lightning.pytorch import LightningModule
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        'pyro_sparse.infer.lightning needs Lightning; install it with pip install "pyro-sparse'
        '[lightning]", or use pyro_sparse.fit, which does not'
    ) from error

__all__ = ["SparseModule"]


class SparseModule(LightningModule):
    """Model and guide, trained by the evidence lower bound.

    It logs ``loss`` (nats per example, KL weighted as trained), ``elbo_per_datum``, ``kl`` (nats)
    and ``kl_weight``, and with validation data ``validation_elbo_per_datum``, at full weight of the
    KL, for callbacks that look for the best epoch. Progress, which the schedules are functions of,
    is that towards the Trainer's ``max_epochs`` or ``max_steps``.

    Args:
        model: see :mod:`pyro_sparse.models`; ``num_data`` is the number of training examples.
        guide: its guide; trained in place.
        num_particles, local_reparameterisation: see :class:`~pyro_sparse.infer.ELBO`.
        **recipe: ``lr``, ``inclusion_lr``, ``scale_lr``, ``optimizer``, ``schedule``,
            ``inclusion_schedule``, ``kl_weight`` and ``clip_norm``, see
            :func:`~pyro_sparse.infer.fit`. The Trainer's ``gradient_clip_val`` goes before
            ``clip_norm``.

    Raises:
        ValueError: a rate, norm or number is out of range; in training, neither ``max_epochs`` nor
            ``max_steps`` says when it ends.
    """

    def __init__(
        self,
        model: SparseModel,
        guide: GroupGuide,
        *,
        num_particles: int = 1,
        local_reparameterisation: bool = True,
        **recipe: Any,
    ) -> None:
        super().__init__()
        elbo = ELBO(num_particles, local_reparameterisation=local_reparameterisation)
        self.objective = Objective(model, guide, elbo)
        self._make_recipe = partial(Recipe, model, guide, **recipe)
        self.recipe = self._make_recipe()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        self.recipe = self._make_recipe()
        return self.recipe.optimizer

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        self.recipe.set(self._progress(batch_idx), self.objective.elbo)

    def _progress(self, step: int) -> float:
        """Share of training that is done, in [0, 1]."""
        trainer = self.trainer
        if trainer.max_steps < 0 and (trainer.max_epochs or -1) > 0:
            assert trainer.max_epochs is not None
            steps = float(trainer.num_training_batches)
            within = step / steps if math.isfinite(steps) else 0.0
            return (trainer.current_epoch + within) / trainer.max_epochs
        steps = float(trainer.estimated_stepping_batches)
        if not math.isfinite(steps):
            raise ValueError("schedules need an end of training: give the Trainer max_epochs")
        return trainer.global_step / steps

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        loss, log_likelihood, kl = self.objective(x, y)
        # Per example: step sizes and the clipping norm do not depend on the size of the data.
        size = self.objective.model.num_data
        loss = loss / size
        self.log_dict(
            {
                "loss": loss.detach(),
                "elbo_per_datum": (log_likelihood - kl) / size,
                "kl": kl,
                "kl_weight": self.objective.elbo.kl_weight,
            },
            on_step=False,
            on_epoch=True,
            batch_size=len(x),
        )
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        x, y = batch
        _, log_likelihood, kl = self.objective(x, y)
        bound = (log_likelihood - kl) / self.objective.model.num_data
        self.log("validation_elbo_per_datum", bound, batch_size=len(x), sync_dist=True)

    def configure_gradient_clipping(
        self,
        optimizer: Any,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        value = self.recipe.clip_norm if gradient_clip_val is None else gradient_clip_val
        self.clip_gradients(optimizer, value, gradient_clip_algorithm or "norm")
