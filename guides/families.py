"""Variational families, one small ``nn.Module`` each: parameters in, a distribution out.

The batch shape is that of the units, ``(units,)``: what belongs to one unit is the event.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import pyro.distributions as dist
import torch
from pyro.distributions.torch_distribution import TorchDistributionMixin
from torch import Tensor, nn

from pyro_sparse.distributions import (
    LogScaleNormal,
    RelaxedSpikeAndSlab,
    SpikeAndSlab,
    TiedNormal,
    TrapeziumSpikeAndSlab,
)

__all__ = [
    "GammaFamily",
    "GaussianRows",
    "InclusionGate",
    "LogNormalFamily",
    "NormalFamily",
    "Read",
    "SpikeSlabRows",
    "spike_and_slab",
]


class Read(nn.Module):
    """A law that is known elsewhere, and is asked for there each time.

    Args:
        law: gives it.
    """

    def __init__(self, law: Callable[[], TorchDistributionMixin]) -> None:
        super().__init__()
        self.law = law

    def forward(self) -> TorchDistributionMixin:
        return self.law()


def spike_and_slab(
    logits: Tensor, slab: TorchDistributionMixin, inclusion: str, temperature: Tensor
) -> SpikeAndSlab:
    """The spike-and-slab law, with the gradient estimator of its inclusion.

    ``"trapezium"``: exact draws with a gradient by the trapezium rule (unbiased where the
    log-likelihood is quadratic in an inclusion, low variance); ``"straight-through"``: hard
    binary-concrete draws with the soft gradient (biased, low variance); ``"soft"``: soft draws
    (biased); ``"score"``: exact draws, whose inclusion gradient is the score function's (unbiased,
    high variance: use several particles).
    """
    if inclusion == "score":
        return SpikeAndSlab(logits=logits, slab=slab)
    if inclusion == "trapezium":
        return TrapeziumSpikeAndSlab(logits=logits, slab=slab)
    return RelaxedSpikeAndSlab(
        temperature, logits=logits, slab=slab, straight_through=inclusion == "straight-through"
    )


def check_variance(variance: str) -> int:
    """The rank of a factorised variance, 0 for ``"full"``.

    ``"tied"`` and ``"row"`` have rank 1, ``"rank-K"`` has K.

    Raises:
        ValueError: for another kind.
    """
    if variance in ("tied", "row", "full"):
        return int(variance != "full")
    kind, _, rank = str(variance).partition("-")
    if kind == "rank" and rank.isdecimal() and int(rank) >= 1:
        return int(rank)
    raise ValueError(
        f"expected variance 'tied', 'row', 'full' or 'rank-K' with K of 1 or more, got {variance!r}"
    )


def check_draws(**options: str) -> None:
    """Raise ``ValueError`` unless every named option is ``"batch"`` or ``"example"``."""
    for name, value in options.items():
        if value not in ("batch", "example"):
            raise ValueError(f"expected {name} 'batch' or 'example', got {value!r}")


class GaussianRows(nn.Module):
    r"""Independent Gaussians on a layer's rows ``(units, row length)``.

    ``"full"``
        A scale :math:`σ_{ji}` for every weight.
    ``"tied"``
        :math:`σ_{ji} = u_j v_i`, the k-tied normal of Swiatkowski et al. (ICML 2020) with k = 1.
    ``"rank-K"``
        :math:`σ_{ji}² = Σ_{r=1}^K u_{jr}² v_{ri}²`; see
        :class:`~pyro_sparse.distributions.TiedNormal`.
    ``"row"``
        :math:`σ_{ji} = u_j`, one a unit.

    Args:
        rows: initial locations.
        variance: one of these.
        scale: initial standard deviation of every weight.
    """

    column_log_scale: Tensor

    def __init__(self, rows: Tensor, variance: str, scale: float) -> None:
        super().__init__()
        self.loc = nn.Parameter(rows.detach().clone())
        rank = check_variance(variance)
        self.variance_kind = variance
        units, length = rows.shape
        if not rank:
            self.log_scale = nn.Parameter(torch.full_like(rows, math.log(scale)))
        elif variance == "row":
            self.row_log_scale = nn.Parameter(rows.new_full((units,), math.log(scale)))
            self.register_buffer("column_log_scale", rows.new_zeros(length), persistent=False)
        else:
            # The scale is split evenly between both factors.
            start = 0.5 * (math.log(scale) - 0.5 * math.log(rank))
            shape = (rank,) if variance.startswith("rank") else ()
            self.row_log_scale = nn.Parameter(rows.new_full((units, *shape), start))
            self.column_log_scale = nn.Parameter(rows.new_full((*shape, length), start))
            if shape:
                # Terms that start alike have the same gradient, and stay alike for ever.
                position = (torch.arange(length) + 0.5) / length
                waves = 0.5 * torch.cos(math.pi * torch.arange(rank).unsqueeze(1) * position)
                waves = waves - 0.5 * (2 * waves).exp().mean(0).log()
                with torch.no_grad():
                    self.column_log_scale.add_(waves.to(rows))

    def slab(self) -> TorchDistributionMixin:
        """Batch shape ``(units,)``, event shape ``(row length,)``."""
        if self.variance_kind == "full":
            return LogScaleNormal(self.loc, self.log_scale).to_event(1)
        return TiedNormal.from_logs(self.loc, self.row_log_scale, self.column_log_scale)

    def forward(self) -> TorchDistributionMixin:
        return self.slab()


def _constant_logits(like: Tensor, probability: float) -> Tensor:
    start = math.log(probability) - math.log1p(-probability)
    return torch.full_like(like, start)


class SpikeSlabRows(GaussianRows):
    """Spike-and-slab with a Gaussian slab on a layer's rows: an inclusion logit a unit."""

    temperature: Tensor

    def __init__(
        self,
        rows: Tensor,
        variance: str,
        scale: float,
        inclusion_probability: float,
        inclusion: str,
        temperature: float,
    ) -> None:
        super().__init__(rows, variance, scale)
        start = _constant_logits(rows[:, 0], inclusion_probability)
        self.inclusion_logits = nn.Parameter(start)
        self.inclusion = inclusion
        self.register_buffer("temperature", start.new_tensor(temperature), persistent=False)

    def forward(
        self, given: Callable[[TorchDistributionMixin], TorchDistributionMixin] | None = None
    ) -> TorchDistributionMixin:
        """

        Args:
            given: makes of the slab its law given what was drawn before.
        """
        slab = self.slab() if given is None else given(self.slab())
        return spike_and_slab(self.inclusion_logits, slab, self.inclusion, self.temperature)


class InclusionGate(nn.Module):
    """A gate in {0, 1} on every input feature.

    With what a chain over supports says of them after training, see
    :mod:`pyro_sparse.infer.supports`: buffers, hence part of checkpoints.
    """

    DRAWS = 500
    """Supports that are kept."""

    temperature: Tensor
    chain_probability: Tensor
    chain_draws: Tensor
    chain_logits: Tensor

    def __init__(
        self, template: Tensor, inclusion_probability: float, inclusion: str, temperature: float
    ) -> None:
        super().__init__()
        start = _constant_logits(template, inclusion_probability)
        self.inclusion_logits = nn.Parameter(start)
        self.inclusion = inclusion
        self.register_buffer("temperature", start.new_tensor(temperature), persistent=False)

        for name in ("chain_probability", "chain_logits"):
            self.register_buffer(name, torch.full_like(start, math.nan))
        shape = self.DRAWS, len(start)
        self.register_buffer("chain_draws", torch.zeros(shape, dtype=torch.bool))

    @torch.no_grad()
    def keep_chain(self, probability: Tensor, draws: Tensor) -> None:
        """Keep what a chain says, for as long as the guide stays as it is.

        Args:
            probability: of every input.
            draws: supports, ``(draws, inputs)``; some are left out evenly, or come twice.
        """
        which = torch.arange(self.DRAWS) * len(draws) // self.DRAWS
        self.chain_probability.copy_(probability)
        self.chain_draws.copy_(draws[which])
        self.chain_logits.copy_(self.inclusion_logits)

    @property
    def has_chain(self) -> bool:
        """Whether there is one, of the guide as it is now."""
        return torch.equal(self.chain_logits, self.inclusion_logits.detach())

    def forward(self) -> TorchDistributionMixin:
        one = dist.Delta(torch.ones_like(self.inclusion_logits))
        return spike_and_slab(self.inclusion_logits, one, self.inclusion, self.temperature)


class LogNormalFamily(nn.Module):
    """Independent log-normals on positive latents of the given shape.

    Args:
        loc: initial means of the logs.
        scale: initial standard deviation of the logs.
        event_dim: how many of the last dimensions of ``loc`` are one event.
    """

    def __init__(self, loc: Tensor, scale: float, event_dim: int = 0) -> None:
        super().__init__()
        self.event_dim = event_dim
        self.loc = nn.Parameter(loc.detach().clone())
        self.log_scale = nn.Parameter(torch.full_like(loc, math.log(scale)))

    def forward(self) -> TorchDistributionMixin:
        return dist.LogNormal(self.loc, self.log_scale.exp()).to_event(self.event_dim)

    def log_moments(self) -> tuple[Tensor, Tensor]:
        """Mean and variance of the log."""
        return self.loc, (2 * self.log_scale).exp()


class GammaFamily(nn.Module):
    """Independent gammas on positive latents.

    Args:
        like: a tensor of the latents' shape; the law starts at mean 1.
        concentration: initial shape parameter.
    """

    def __init__(self, like: Tensor, concentration: float = 100.0) -> None:
        super().__init__()
        start = torch.full_like(like, math.log(concentration))
        self.log_concentration = nn.Parameter(start)
        self.log_rate = nn.Parameter(start.clone())

    def forward(self) -> TorchDistributionMixin:
        return dist.Gamma(self.log_concentration.exp(), self.log_rate.exp())


class NormalFamily(nn.Module):
    """Independent normals on real latents of the given shape.

    Args:
        loc: initial means.
        scale: initial standard deviation.
    """

    def __init__(self, loc: Tensor, scale: float) -> None:
        super().__init__()
        self.loc = nn.Parameter(loc.detach().clone())
        self.log_scale = nn.Parameter(torch.full_like(loc, math.log(scale)))

    def forward(self) -> TorchDistributionMixin:
        return dist.Normal(self.loc, self.log_scale.exp())
