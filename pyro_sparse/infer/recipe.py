"""How parameters move: optimiser, learning rates by kind of parameter, schedules, the KL's weight.

`fit` and the Lightning module share it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pyro_sparse.guides import GroupGuide
from pyro_sparse.models import SparseModel

from .elbo import ELBO
from .schedules import Schedule, cheap, constant, cosine, delayed, ramp

__all__ = ["OPTIMIZERS", "FusedAdam", "Recipe", "sgd"]

MakeOptimizer = Callable[[list[dict[str, Any]]], torch.optim.Optimizer]


class FusedAdam(torch.optim.Adam):
    """torch's Adam in one pass over the parameters: the same numbers, state and options.

    In every step torch's own asks for a GPU, sorts tensors by device and type and looks for other
    variants, for as long as the update of a small network takes. A guide's parameters lie on one
    device and have one type.
    """

    def __init__(self, params: Any, lr: float | Tensor = 1e-3, **options: Any) -> None:
        super().__init__(params, lr=lr, fused=True, **options)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update of every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        # A gradient scaler's, which leaves both to optimisers that can.
        scaling: dict[str, Any] = {
            name: getattr(self, name, None) for name in ("grad_scale", "found_inf")
        }
        for group in self.param_groups:
            lists: list[list[Tensor]] = [[] for _ in range(6)]
            self._init_group(group, *lists)
            *_, steps = lists
            if not steps:
                continue
            torch._foreach_add_(steps, 1)
            beta1, beta2 = group["betas"]
            decoupled = group["decoupled_weight_decay"]
            update = torch._fused_adamw_ if decoupled else torch._fused_adam_
            update(
                *lists, lr=group["lr"], beta1=beta1, beta2=beta2, eps=group["eps"],
                weight_decay=group["weight_decay"], amsgrad=group["amsgrad"],
                maximize=group["maximize"], **scaling,
            )  # fmt: skip
            if scaling["found_inf"] is not None:
                torch._foreach_sub_(steps, [scaling["found_inf"]] * len(steps))
        return loss


def sgd(groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    """Stochastic gradient descent with momentum 0.9, as residual networks are trained."""
    return torch.optim.SGD(groups, momentum=0.9)


OPTIMIZERS: dict[str, MakeOptimizer] = {"adam": FusedAdam, "sgd": sgd}
"""By the names of the command line."""


class Recipe:
    """An optimiser of a guide's parameters, whose rates are set by progress.

    Args:
        model, guide: what is trained.
        lr, inclusion_lr, scale_lr, optimizer, schedule, inclusion_schedule, kl_weight, clip_norm:
            see :func:`~pyro_sparse.infer.fit`, also for their defaults.

    Attributes:
        optimizer: with one group of parameters a kind.
        clip_norm: as given.

    Raises:
        ValueError: a rate or norm is not positive.
    """

    def __init__(
        self,
        model: SparseModel,
        guide: GroupGuide,
        *,
        lr: float = 3e-3,
        inclusion_lr: float | None = None,
        scale_lr: float | None = None,
        optimizer: MakeOptimizer = FusedAdam,
        schedule: Schedule | None = None,
        inclusion_schedule: Schedule | None = None,
        kl_weight: Schedule | None = None,
        clip_norm: float | None = None,
    ) -> None:
        for name, value in {
            "lr": lr,
            "inclusion_lr": inclusion_lr,
            "scale_lr": scale_lr,
            "clip_norm": clip_norm,
        }.items():
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"expected a positive {name}, got {value}")
        schedule = schedule or cosine(hold=0.4)
        inclusion_factor = 10.0
        if model.asks_for_probabilities:
            # No cheap KL: what opens while it is cheap saturates, and does not close again. Instead
            # the logits wait until the weights have learnt what the inputs and units are good for.
            inclusion_factor = 4.0
            inclusion_schedule = inclusion_schedule or delayed(schedule, 0.1, 0.2)
            kl_weight = kl_weight or constant()
        how = {
            "weights": (lr, schedule),
            "inclusion": (inclusion_lr or inclusion_factor * lr, inclusion_schedule or schedule),
            "scales": (scale_lr or 5 * lr, schedule),
        }
        kinds = {kind: chosen for kind, chosen in guide.parameters_by_kind().items() if chosen}
        self.optimizer = optimizer([{"params": kinds[kind], "lr": how[kind][0]} for kind in kinds])
        self.clip_norm = clip_norm
        self._how = {kind: how[kind] for kind in kinds}
        self._guide = guide
        self._kl_weight = kl_weight or ramp(cheap(model.num_data), hold=0.2, change=0.4)

    def described(self) -> dict[str, Any]:
        """Rates and weights over training, as numbers: two recipes that differ, differ here."""
        at = [place / 8 for place in range(9)]
        described: dict[str, Any] = {
            f"rate {number}": [rate * schedule(place) for place in at]
            for number, (rate, schedule) in enumerate(self._how.values())
        }
        described["kl_weight"] = [self._kl_weight(place) for place in at]
        described["clip_norm"] = self.clip_norm
        described["optimizer"] = type(self.optimizer).__name__
        return described

    def set(self, progress: float, elbo: ELBO, factor: float = 1.0) -> None:
        """Set the learning rates and the KL's weight.

        Args:
            progress: of training, in [0, 1].
            elbo: whose ``kl_weight`` is set.
            factor: on all learning rates.
        """
        elbo.kl_weight = self._kl_weight(progress)
        groups = zip(self.optimizer.param_groups, self._how.items(), strict=True)
        for group, (kind, (rate, schedule)) in groups:
            share = schedule(progress)
            group["lr"] = factor * rate * share
            if kind == "inclusion" and share > 0.01:
                self._guide.note_kl_weight(elbo.kl_weight)
