"""Likelihoods: what turns a network's output into a distribution of the observed target.

A likelihood owns the *data* part of a model: the observed sample statement, its own latent sites
(only :class:`Normal` has one), the natural output that users plot (class probabilities or a
mean), and the check of targets before any training starts.

To add one, write ``distribution(output, **latents)`` and ``natural(output)``; add ``sites()`` when
it has latents of its own, ``class_probabilities`` when targets are classes, and ``check`` when they
can be wrong.
"""

from __future__ import annotations

import math
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.distributions.torch_distribution import TorchDistributionMixin
from torch import Tensor, nn

from pyro_sparse.ranges import positive

__all__ = ["Bernoulli", "Categorical", "Likelihood", "Normal", "Poisson"]


class Likelihood(nn.Module):
    """Base class: one observed site ``"y"`` in a plate of the whole data's size.

    The minibatch stands for all ``num_data`` examples: its log-likelihood is scaled by
    ``num_data / batch``, so that the ELBO is always that of the full data.
    """

    one_target = False
    """Whether a row has one number as its target; otherwise targets ``(batch, ...)`` may have any
    shape, which is that of the distribution."""

    def sites(self) -> dict[str, Tensor]:
        """Sample the likelihood's own latents; ``{name: value}`` as `distribution` takes them."""
        return {}

    def distribution(self, output: Tensor, **latents: Tensor) -> TorchDistributionMixin:
        """Distribution of one example's target, batch shape ``(batch,)``; any event shape."""
        raise NotImplementedError

    def natural(self, output: Tensor) -> Tensor:
        """The output a user reads: class probabilities or the mean, ``(batch, ...)``."""
        raise NotImplementedError

    def class_probabilities(self, natural: Tensor) -> Tensor | None:
        """``(batch, classes)`` from the natural output; None where targets are numbers."""
        return None

    def check(self, output: Tensor, y: Tensor) -> None:
        """Raise ``ValueError`` when the targets ``y`` cannot come from this likelihood."""

    def forward(self, output: Tensor, y: Tensor | None, num_data: int) -> Tensor:
        latents = self.sites()
        # The plate never draws a subsample itself: the batch that was passed in is the subsample.
        batch = torch.arange(len(output), device=output.device)
        law = self.distribution(output, **latents)
        if y is not None and y.shape != law.shape():
            # They would be broadcast: a column (batch, 1) against (batch,) gives batch² terms.
            raise ValueError(
                f"expected targets of shape {tuple(law.shape())}, one for each output of shape "
                f"{tuple(output.shape)}, got {tuple(y.shape)}; squeeze or reshape y"
            )
        with pyro.plate("data", num_data, subsample=batch):
            pyro.sample("y", law, obs=y)
        return output


def _check_length(output: Tensor, y: Tensor) -> None:
    if y.shape[:1] != output.shape[:1]:
        raise ValueError(
            f"expected one target per example, got {tuple(y.shape)} targets for outputs of "
            f"shape {tuple(output.shape)}; pass x and y of equal length"
        )


def _check_shape(mean: Tensor, y: Tensor) -> None:
    # Broadcast against each other, (batch,) and (batch, 1) would give batch² terms.
    if y.shape != mean.shape:
        raise ValueError(
            f"expected targets of shape {tuple(mean.shape)}, got {tuple(y.shape)}; "
            "squeeze the last axis of y"
        )


def _scalar_output(output: Tensor, likelihood: str) -> Tensor:
    if output.dim() == 2 and output.shape[1] == 1:
        return output.squeeze(-1)
    if output.dim() == 1:
        return output
    raise ValueError(
        f"the {likelihood} likelihood expects a network with one output per example, shape "
        f"(batch, 1) or (batch,), got {tuple(output.shape)}; end the network in one unit"
    )


class _Softmax(dist.Categorical):
    """A categorical distribution, whose log-probabilities are made in one pass.

    Its base class makes them by four, each with an entry in autograd's graph.
    """

    def __init__(self, logits: Tensor) -> None:
        self._param = self.logits = logits.log_softmax(-1)
        self._num_events = logits.shape[-1]
        torch.distributions.Distribution.__init__(self, logits.shape[:-1])

    def expand(self, batch_shape: Any, _instance: Any = None) -> Any:
        return super().expand(batch_shape, self._get_checked_instance(_Softmax, _instance))


class Categorical(Likelihood):
    """``y | x ~ Categorical(softmax(f(x)))``; outputs ``(batch, classes)``, labels ``(batch,)``."""

    one_target = True

    def distribution(self, output: Tensor, **latents: Tensor) -> TorchDistributionMixin:
        return _Softmax(output)

    def natural(self, output: Tensor) -> Tensor:
        return output.softmax(-1)

    def class_probabilities(self, natural: Tensor) -> Tensor | None:
        return natural

    def check(self, output: Tensor, y: Tensor) -> None:
        _check_length(output, y)
        classes = output.shape[-1]
        if y.dtype.is_floating_point or y.dtype == torch.bool or y.dim() != 1:
            raise ValueError(
                f"expected integer class labels of shape (batch,), got {y.dtype} of shape "
                f"{tuple(y.shape)}; convert them with y.long()"
            )
        if len(y) and (int(y.min()) < 0 or int(y.max()) >= classes):
            raise ValueError(
                f"expected labels in 0..{classes - 1}, one for each of the network's {classes} "
                f"outputs, got labels from {int(y.min())} to {int(y.max())}; relabel the data or "
                "widen the output layer"
            )


class Bernoulli(Likelihood):
    """``y | x ~ Bernoulli(sigmoid(f(x)))``; outputs ``(batch, 1)`` or ``(batch,)``, y 0 or 1."""

    one_target = True

    def distribution(self, output: Tensor, **latents: Tensor) -> TorchDistributionMixin:
        return dist.Bernoulli(logits=_scalar_output(output, "Bernoulli"))

    def natural(self, output: Tensor) -> Tensor:
        return _scalar_output(output, "Bernoulli").sigmoid()

    def class_probabilities(self, natural: Tensor) -> Tensor | None:
        return torch.stack([1 - natural, natural], -1)

    def check(self, output: Tensor, y: Tensor) -> None:
        _check_length(output, y)
        _check_shape(_scalar_output(output, "Bernoulli"), y)
        if not bool(((y == 0) | (y == 1)).all()):
            raise ValueError(
                "expected targets that are 0 or 1, got values from "
                f"{float(y.min()):g} to {float(y.max()):g}; use Categorical for more classes"
            )
        if not y.dtype.is_floating_point:
            raise ValueError(f"expected floating-point 0/1 targets, got {y.dtype}; use y.float()")


class Normal(Likelihood):
    r"""``y | x ~ N(f(x), 1/β)`` with a learnt noise precision ``β ~ Gamma(shape, rate)``.

    Outputs ``(batch, 1)`` or ``(batch,)``. The latent site is ``noise_precision``; its guide is
    a gamma law. ``noise_scale`` fixes the noise's standard deviation instead.

    Raises:
        ValueError: where a shape, rate or scale is not positive.
    """

    one_target = True

    shape: Tensor
    rate: Tensor
    noise_scale: Tensor | None

    def __init__(
        self, noise_scale: float | None = None, *, shape: float = 1.0, rate: float = 1.0
    ) -> None:
        super().__init__()
        for name, value in {"noise_scale": noise_scale, "shape": shape, "rate": rate}.items():
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"expected a positive {name}, got {value}")
        self.register_buffer("shape", torch.tensor(float(shape)))
        self.register_buffer("rate", torch.tensor(float(rate)))
        scale = None if noise_scale is None else torch.tensor(float(noise_scale))
        self.register_buffer("noise_scale", scale)

    def sites(self) -> dict[str, Tensor]:
        if self.noise_scale is not None:
            return {}
        prior = dist.Gamma(self.shape, self.rate)
        return {"noise_precision": pyro.sample("noise_precision", prior)}

    def distribution(self, output: Tensor, **latents: Tensor) -> TorchDistributionMixin:
        mean = _scalar_output(output, "Normal")
        if self.noise_scale is not None:
            return dist.Normal(mean, self.noise_scale.to(mean.device))
        return dist.Normal(mean, latents["noise_precision"].rsqrt())

    def natural(self, output: Tensor) -> Tensor:
        return _scalar_output(output, "Normal")

    def check(self, output: Tensor, y: Tensor) -> None:
        _check_length(output, y)
        _check_shape(_scalar_output(output, "Normal"), y)
        if not bool(torch.isfinite(y).all()):
            raise ValueError("expected finite targets, got NaN or infinite values; remove them")


class Poisson(Likelihood):
    r"""``y | x ~ Poisson(s exp(f(x)))``; outputs ``(batch, 1)`` or ``(batch,)``, y a count.

    Args:
        scale: s, the rate at an output of 0: near the mean of the targets, so that the network's
            outputs are of the size that its prior expects.
        fractions: take targets that are no whole numbers as well. Their log-likelihood is the same
            formula, with Γ(y + 1) for y!, as of a quasi-Poisson regression (McCullagh and Nelder,
            *Generalized Linear Models*, 1989, chapter 9).

    Raises:
        ValueError: the scale is not positive.
    """

    one_target = True

    scale: Tensor

    def __init__(self, scale: float = 1.0, *, fractions: bool = False) -> None:
        super().__init__()
        positive(scale=scale)
        self.fractions = fractions
        self.register_buffer("scale", torch.tensor(float(scale)))

    def distribution(self, output: Tensor, **latents: Tensor) -> TorchDistributionMixin:
        checked = False if self.fractions else None  # whole numbers only
        return dist.Poisson(self.natural(output), validate_args=checked)

    def natural(self, output: Tensor) -> Tensor:
        return _scalar_output(output, "Poisson").exp() * self.scale.to(output)

    def check(self, output: Tensor, y: Tensor) -> None:
        _check_length(output, y)
        _check_shape(_scalar_output(output, "Poisson"), y)
        if not bool((torch.isfinite(y) & (y >= 0) & (self.fractions | (y == y.round()))).all()):
            kind = "numbers" if self.fractions else "whole counts"
            raise ValueError(f"expected non-negative {kind} as targets; check y")
