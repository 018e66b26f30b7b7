"""The guide of SBP."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from pyro_sparse.distributions import TruncatedLogNormal
from pyro_sparse.models import LogNormalNoise as Model
from pyro_sparse.ranges import finite

from .base import key
from .deterministic import Deterministic
from .families import check_draws
from .offer import Offer

__all__ = ["LogNormalNoise"]


class Noise(nn.Module):
    """Truncated log-normals on the multiplicative noise of a group's units."""

    low: Tensor
    high: Tensor

    def __init__(self, template: Tensor, loc: float, log_scale: float, model: Model) -> None:
        super().__init__()
        self.noise_loc = nn.Parameter(torch.full_like(template, loc))
        self.noise_log_scale = nn.Parameter(torch.full_like(template, log_scale))
        self.register_buffer("low", model.low.clone())
        self.register_buffer("high", model.high.clone())

    def forward(self) -> TruncatedLogNormal:
        return TruncatedLogNormal(self.noise_loc, self.noise_log_scale.exp(), self.low, self.high)


class LogNormalNoise(Deterministic):
    r"""Guide of :class:`pyro_sparse.models.LogNormalNoise`.

    .. math:: \log θ_j ∼ \text{TruncatedNormal}(μ_j, σ_j²; [a, b]), \qquad w \text{ a point}.

    The KL is :math:`\log(b−a)` minus the entropy of the truncated normal, in float64.

    Args:
        initial_loc: initial μ of every unit; at :math:`b`, the paper's start, the noise is just
            below 1.
        initial_log_scale: initial log σ.
        noise_draws: ``"batch"``: one draw of θ a unit for the whole batch; ``"example"``: one an
            example, in :class:`pyro_sparse.infer.ELBO` (stock Pyro draws one for the batch).

    Raises:
        ValueError: for another ``noise_draws``.
    """

    def __init__(
        self,
        model: Model,
        *,
        initial_loc: float = 0.0,
        initial_log_scale: float = -5.0,
        noise_draws: str = "batch",
    ) -> None:
        super().__init__(model)
        check_draws(noise_draws=noise_draws)
        finite(initial_loc=initial_loc, initial_log_scale=initial_log_scale)
        self.noise_draws = noise_draws
        self.noises: Any = nn.ModuleDict()  # Noise by group
        self._gate_rows = model.graph.gate_rows
        names = [group.name for group in self._groups if group.prunable]
        for name in [*names, *(["input"] if model.prune_inputs else [])]:
            group = model.graph[name]
            template = model.low.expand(group.size)
            self.noises[key(group)] = Noise(template, initial_loc, initial_log_scale, model)

    def forward(self, *args: Any, **kwargs: Any) -> None:
        for group, family in self.layers():
            self.sample_rows(group, family)
        for name, law in self.laws().items():
            # A layer that is applied more than once sees one draw.
            alone = not any(group.shared for group in self._groups if group.name == name)
            by_example = alone and self.noise_draws == "example"
            self.sample_units(f"{name}.noise", name, law, by_example=by_example)
        self.sample_likelihood()

    def families(self) -> Iterator[tuple[str, Noise]]:
        """The noise family of every group that has one, the input last."""
        for name, noise in self.noises.items():
            yield name.replace("/", "."), noise

    def laws(self) -> dict[str, TruncatedLogNormal]:
        """The noise of every group that has one, drawn together and with their KL together."""
        families = dict(self.families())
        if not families:
            return {}
        first, *_ = families.values()
        loc = torch.cat([noise.noise_loc for noise in families.values()])
        log_scale = torch.cat([noise.noise_log_scale for noise in families.values()])
        whole = TruncatedLogNormal(loc, log_scale.exp(), first.low, first.high)
        parts = whole.split([len(noise.noise_loc) for noise in families.values()])
        return dict(zip(families, parts, strict=True))

    def offers(self) -> dict[str, Offer]:
        """With ``noise``: laws ``(units,)`` of the multiplicative noise by group, in float64.

        The measure is E θ / sd θ (Neklyudov et al. 2017, eq. 15), above which units are kept where
        E θ itself is above 1e-3: a unit with θ constant at 3e-7 has a ratio of any size.
        """
        noise = Offer(
            "signal-to-noise ratio of the noise",
            self._noise,
            measure=lambda law: law.signal_to_noise,
            cut=1.0,
            candidate=lambda law: law.mean > 1e-3,
        )
        return {**super().offers(), **({"noise": noise} if len(self.noises) else {})}

    def _noise(self) -> dict[str, TruncatedLogNormal]:
        return {
            name: TruncatedLogNormal(
                noise.noise_loc.detach().double(),
                noise.noise_log_scale.detach().double().exp(),
                noise.low.double(),
                noise.high.double(),
            )
            for name, noise in self.families()
        }

    def mean_rows(self) -> dict[str, Tensor]:
        """Point estimates times E θ."""
        rows = super().mean_rows()
        for name, noise in self.families():
            if name in rows:
                rows[name] = self._gate_rows(name, rows[name], noise().mean)
        return rows

    def mean_input(self) -> Tensor | None:
        """E θ of the input features."""
        noise = dict(self.families()).get("input")
        return None if noise is None else noise().mean
