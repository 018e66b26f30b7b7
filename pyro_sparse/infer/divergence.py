"""Numbers that are no longer finite: noticed in the step, and traced to where they arose."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pyro
import torch
from torch import Tensor, nn

from pyro_sparse.modules import own_parameters

from .elbo import ELBO

__all__ = ["Divergence", "broken_gradient", "broken_parameter", "broken_site", "gradient_sums"]

_SMALL = 4096


class Divergence(FloatingPointError):
    """Training left the finite numbers.

    Attributes:
        what: the parameter, gradient or term of the ELBO that did, in words.
        epoch, step: when, counted from 1.
    """

    def __init__(self, what: str, epoch: int, step: int, advice: str = "") -> None:
        super().__init__(f"diverged in step {step} of epoch {epoch}: {what}{advice}")
        self.what, self.epoch, self.step = what, epoch, step


def gradient_sums(gradients: Iterable[Tensor | None]) -> list[Tensor]:
    """Numbers that are finite only if all entries of all gradients are.

    Small gradients have one together: an operation takes microseconds, whatever its size.
    Sums cost 0.2 to 0.5 % of a step of a 784-400-400-10 network, 2-norms twice that, and maximum
    norms ten times.
    """
    found = [gradient for gradient in gradients if gradient is not None]
    small = [gradient.reshape(-1) for gradient in found if gradient.numel() <= _SMALL]
    large = [gradient.sum() for gradient in found if gradient.numel() > _SMALL]
    return [torch.cat(small).sum(), *large] if small else large


def broken_parameter(guide: nn.Module) -> str | None:
    """The first parameter that is not finite."""
    for name, value in guide.named_parameters():
        if not bool(value.isfinite().all()):
            return f"the parameter {name} is no longer finite"
    return None


def broken_gradient(guide: nn.Module) -> str | None:
    """The first parameter whose gradient is not finite."""
    for name, value in guide.named_parameters():
        if value.grad is not None and not bool(value.grad.isfinite().all()):
            return f"the gradient of {name} is not finite"
    return None


@torch.no_grad()
def broken_site(elbo: ELBO, model: Any, guide: Any, x: Tensor, y: Tensor) -> str | None:
    """The first site whose draw, KL or log-likelihood is not finite, at a new draw."""
    if not bool(x.isfinite().all()):
        return "the batch of inputs is not finite"
    with own_parameters(model, guide), pyro.validation_enabled(False):
        model_sites, _ = elbo._get_trace(model, guide, (x, y), {})
    for name, site in model_sites.items():
        terms: dict[str, Tensor] = {}
        if site["is_observed"]:
            terms["log-likelihood"] = site["fn"].log_prob(site["value"])
        else:
            terms["draw"] = site["value"]
            terms["KL"] = site["kl"]
        for term, value in terms.items():
            if not bool(value.isfinite().all()):
                return f"the {term} of the site {name} is not finite"
    return None
