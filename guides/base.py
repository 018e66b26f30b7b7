"""What all guides share: a family for every group's rows, the input gate, the noise precision."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import pyro
import torch
from pyro.distributions.torch_distribution import TorchDistributionMixin
from torch import Tensor, nn

from pyro_sparse.distributions import GatedColumns
from pyro_sparse.graph import Group
from pyro_sparse.likelihoods import Normal
from pyro_sparse.models import SparseModel
from pyro_sparse.modules import LocalPyroModule
from pyro_sparse.ranges import positive

from .families import (
    GammaFamily,
    GaussianRows,
    InclusionGate,
    LogNormalFamily,
    NormalFamily,
    SpikeSlabRows,
    check_draws,
    check_variance,
)
from .offer import Offer

__all__ = ["GroupGuide", "Reducible", "SpikeSlabGuide"]


class Reducible(NamedTuple):
    """Gaussian posterior and prior of a group's rows.

    loc:            ``(units, row length)``
    variance:       ``(units, row length)``; marginal where the posterior is a joint one
    prior_variance: a number; the prior's mean is 0
    covariance:     ``(units · row length)²`` of a joint posterior, None for independent weights
    """

    loc: Tensor
    variance: Tensor
    prior_variance: Tensor
    covariance: Tensor | None = None


def key(group: Group) -> str:
    """A group's name as a key of ``nn.ModuleDict``, which forbids dots."""
    return group.name.replace(".", "/")


class GroupGuide(LocalPyroModule):
    """Base class of guides.

    Subclasses fill ``self.row_families`` (one family a layer) and write ``forward``; the base
    samples the input gate and the likelihood's latents last, as models do.

    Args:
        model: the model to match; its network's weights are the initial locations.
    """

    inclusion_draws = "batch"

    def __init__(self, model: SparseModel) -> None:
        super().__init__()
        self._groups = tuple(model.layers)
        # The same module as the model's: what is pruned there is out here.
        self.support = model.support
        self.row_families = nn.ModuleDict()
        self.prior_precisions: Any = nn.ModuleDict()  # where the model learns prior scales
        for name in model.learnt_scales:
            zero = torch.zeros_like(model.output_scale)
            self.prior_precisions[name.replace(".", "/")] = LogNormalFamily(zero, 0.1)
        likelihood = model.likelihood
        self.noise_precision: GammaFamily | None = None
        if isinstance(likelihood, Normal) and likelihood.noise_scale is None:
            # The law of the closed optimum, where `fit` sets it (pyro_sparse.infer.noise).
            self.noise_precision = GammaFamily(likelihood.rate)

    def make_rows(
        self,
        model: SparseModel,
        variance: str,
        initial_scale: float | str,
        prunable: Callable[[Tensor, float], nn.Module] | None = None,
    ) -> None:
        """Gaussian families around the network's own rows, for guides that have them.

        Args:
            variance: kind of the scales, see :class:`~.families.GaussianRows`.
            initial_scale: initial σ of every weight, or ``"balanced"``: by layer, such that a
                unit of any layer starts with the same KL, see :func:`balanced_scales`.
            prunable: makes the family of a layer that may be pruned from its rows and their
                initial σ; Gaussian as the others by default.

        Raises:
            ValueError: for an unknown option or a number out of range.
        """
        check_variance(variance)
        if initial_scale != "balanced" and not (
            isinstance(initial_scale, int | float) and 0 < initial_scale < math.inf
        ):
            raise ValueError(
                f"expected a positive initial_scale or 'balanced', got {initial_scale!r}"
            )
        start = model.initial_rows()
        balanced = balanced_scales(
            [start[group.name].shape[1] for group in self._groups],
            [group.prunable for group in self._groups],
        )
        for group, own in zip(self._groups, balanced, strict=True):
            rows = start[group.name]
            scale = own if isinstance(initial_scale, str) else float(initial_scale)
            self.row_families[key(group)] = (
                prunable(rows, scale)
                if prunable is not None and group.prunable
                else GaussianRows(rows, variance, scale)
            )

    def match_network(self) -> None:
        """Divide the locations by the initial scales, so that training starts at the network."""
        scales = self.scales()
        with torch.no_grad():
            for group, family in self.layers():
                if group.name in scales:
                    family.loc.div_(scales[group.name].unsqueeze(-1))

    def layers(self) -> Iterator[tuple[Group, Any]]:
        """Every layer's group with its family of :mod:`.families`, in the model's order."""
        families = self.row_families
        for group in self._groups:
            yield group, families[key(group)]

    def sample_units(
        self, site: str, name: str, law: TorchDistributionMixin, **infer: Any
    ) -> Tensor:
        """A site with an event for every unit of the group ``name``; pruned ones pay no KL."""
        if law.batch_shape:  # a joint law of all units pays for what the prior's mask leaves in
            law = self.support.law(name, law)
        options: Any = infer
        return pyro.sample(site, law.to_event(len(law.batch_shape)), infer=options)

    def sample_rows(self, group: Group, family: nn.Module, gate: Tensor | None = None) -> None:
        """``{group}.rows``; a drawn ``gate`` on the inputs is for guides whose rows know it."""
        if key(group) in self.prior_precisions:
            pyro.sample(f"{group.name}.prior_precision", self.prior_precisions[key(group)]())
        # Marks the sites that local reparameterisation may replace (see infer).
        alone = not group.shared
        by_example = alone and group.prunable and self.inclusion_draws == "example"
        self.sample_units(
            f"{group.name}.rows",
            group.name,
            self.row_law(group, family, gate),
            local_reparameterisation=alone,
            by_example=by_example,
        )

    def row_law(
        self, group: Group, family: nn.Module, gate: Tensor | None
    ) -> TorchDistributionMixin:
        """The law of a group's rows, ``(units,)`` of ``(row length,)``."""
        law: TorchDistributionMixin = family()
        return law

    def sample_likelihood(self) -> None:
        if self.noise_precision is not None:
            pyro.sample("noise_precision", self.noise_precision())

    def forward(self, *args: Any, **kwargs: Any) -> None:
        for group, family in self.layers():
            self.sample_rows(group, family)
        self.sample_likelihood()

    def reduced(self) -> None:
        """Called after the support was restricted: q becomes q̃ ∝ q p̃ / p of what is left.

        Nothing to do where the numbers are independent under q.
        """

    def parameters_by_kind(self) -> dict[str, list[nn.Parameter]]:
        """``inclusion`` logits, ``scales`` and noises, ``weights``; each has its own rate."""
        kinds: dict[str, list[nn.Parameter]] = {"weights": [], "inclusion": [], "scales": []}
        scales = {
            id(parameter)
            for module in self.modules()
            if isinstance(module, LogNormalFamily | NormalFamily | GammaFamily)
            for parameter in module.parameters()
        }
        for name, parameter in self.named_parameters():
            if id(parameter) in scales or name.rpartition(".")[2].startswith("noise_"):
                kinds["scales"].append(parameter)
            elif name.endswith("inclusion_logits"):
                kinds["inclusion"].append(parameter)
            else:
                kinds["weights"].append(parameter)
        return kinds

    def keep_kl_weights(self) -> None:
        """Have `note_kl_weight` keep the smallest and the last weight at which logits moved.

        For guides with inclusions: summaries say what their probabilities belong to.
        """
        self.register_buffer("inclusion_kl_weights", torch.full((2,), math.nan))
        self._kl_weights: tuple[float, float] | None = None

    def note_kl_weight(self, weight: float) -> None:
        """The inclusion logits move at this weight of the KL."""
        if "inclusion_kl_weights" not in self._buffers:
            return
        if self._kl_weights is None:
            lowest, last = self.inclusion_kl_weights.tolist()
            self._kl_weights = (math.inf, last) if math.isnan(lowest) else (lowest, last)
        now = min(self._kl_weights[0], weight), weight
        if now != self._kl_weights:
            self._kl_weights = now
            # Past the counter of versions: no step reads it, and a recorded one goes on.
            self.inclusion_kl_weights.data.copy_(self.inclusion_kl_weights.new_tensor(now))

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._kl_weights = None

    # -- what the posterior reads ----------------------------------------------------------------

    def inclusion_logits(self) -> dict[str, Tensor]:
        """Logits of q(unit is in) for every group that has inclusions, ``(units,)`` each."""
        logits = {
            group.name: family.inclusion_logits
            for group, family in self.layers()
            if hasattr(family, "inclusion_logits")
        }
        if getattr(self, "input_gate", None) is not None:
            logits = {"input": self.input_gate.inclusion_logits, **logits}
        return logits

    def chain(self) -> tuple[Tensor, Tensor] | None:
        """Probabilities of inputs and draws of supports, see `InclusionGate`; None without."""
        gate = getattr(self, "input_gate", None)
        if gate is None or not gate.has_chain:
            return None
        return gate.chain_probability, gate.chain_draws

    def offers(self) -> dict[str, Offer]:
        """What this guide says of units, by name; what decides about them by default comes first.

        ``inclusion`` has probabilities, ``row_variances`` the posterior variance of every weight of
        *included* units, ``(units, row length)``, marginal over the units' scales. Guides add their
        own; see :class:`Offer`. Of inputs the probabilities are the guide's own, whatever a chain
        over supports says of them: the network that is kept is the guide's, whose weights belong to
        the inputs that it has.
        """
        found = {}
        if self.inclusion_logits():
            found["inclusion"] = Offer("inclusion probability", self._inclusion, cut=0.5)
        families = [family for _, family in self.layers()]
        if families and all(isinstance(family, GaussianRows) for family in families):
            found["row_variances"] = Offer("posterior variance", self._row_variances)
        return found

    def _inclusion(self) -> dict[str, Tensor]:
        return {
            name: logits.detach().double().sigmoid().cpu()
            for name, logits in self.inclusion_logits().items()
        }

    def scales(self) -> dict[str, Tensor]:
        """Posterior mean of each included unit's scale, ``(units,)``, for groups that have one."""
        return {}

    def squared_scales(self) -> dict[str, Tensor]:
        """Posterior mean of the square of what `scales` has, by the same groups."""
        return {}

    def mean_rows(self) -> dict[str, Tensor]:
        """Posterior mean of the effective rows of *included* units, ``(units, row length)``."""
        scales = self.scales()
        rows = {}
        for group, family in self.layers():
            rows[group.name] = family.loc
            if group.name in scales:
                # Under q a unit's scale is independent of its non-centred row.
                rows[group.name] = family.loc * scales[group.name].unsqueeze(-1)
        return rows

    def _row_variances(self) -> dict[str, Tensor]:
        scales, squares = self.scales(), self.squared_scales()
        variances = {}
        for group, family in self.layers():
            slab: Any = family.slab()
            variance = slab.variance
            if group.name in scales:
                # Var(ρ w̃) = E ρ² Var w̃ + Var ρ (E w̃)²
                square = squares[group.name].unsqueeze(-1)
                spread = square - scales[group.name].square().unsqueeze(-1)
                variance = square * variance + spread.clamp_min(0) * family.loc.square()
            variances[group.name] = variance.detach()
        return variances

    def mean_input(self) -> Tensor | None:
        """Posterior mean of a multiplicative noise on the inputs, ``(units,)``, where one is."""
        return None


def balanced_scales(
    lengths: Sequence[int], prunable: Sequence[bool], mean: float = 0.01, spread: float = 4.0
) -> list[float]:
    r"""Initial standard deviations by layer that charge units of all layers alike.

    The KL of a slab of ``m`` weights near 0 from a unit Gaussian is about
    :math:`m (\log 1/σ − ½)`. With one σ for all layers a unit with long rows pays more and goes
    first, whatever it is worth. Here :math:`\log σ = −½ − P/m` with one price P.

    Args:
        lengths: ``m`` by layer.
        prunable: whether the layer's units compete; P is set by these.
        mean: geometric mean of σ over the prunable layers.
        spread: σ stays within ``mean`` times or divided by this.
    """
    log_mean = math.log(mean)
    inverse = [1 / m for m, competes in zip(lengths, prunable, strict=True) if competes] or [
        1 / m for m in lengths
    ]
    price = (-0.5 - log_mean) / (sum(inverse) / len(inverse))
    low, high = mean / spread, mean * spread
    return [min(high, max(low, math.exp(-0.5 - price / m))) for m in lengths]


def _columns_key(name: str) -> str:
    """The name of the buffer with the inputs that a group's columns read."""
    return "columns_" + name.replace(".", "/")


class SpikeSlabGuide(GroupGuide):
    r"""Shared by the guides of SS-IG, SS-GL and SS-GHS.

    .. math::
        z_j ∼ \text{Bernoulli}(γ_j), \qquad
        \tilde w_j \mid z_j = 1 ∼ N(μ_j, \text{diag } σ_j²)

    as one joint :class:`~pyro_sparse.distributions.SpikeAndSlab` a layer. With gates on the inputs
    a weight is given both its unit and its input, whose inclusions cross in the first layer:

    .. math::
        z_i ∼ \text{Bernoulli}(γ_i), \qquad \tilde w_{ji} \mid z_j = 1, z_i ∼
        \begin{cases} N(μ_{ji}, σ_{ji}²) & z_i = 1 \\ p(\tilde w_{ji}) & z_i = 0, \end{cases}

    see :class:`~pyro_sparse.distributions.GatedColumns`: it is charged
    :math:`γ_j γ_i \text{KL}(N(μ_{ji}, σ_{ji}²) ‖ p)`, as an input's columns live and die with it.
    (Where the network does something to its input first, or rows of one layer read different
    inputs, columns are not an input's own, and weights are independent of the gate.)

    Args:
        variance: ``"tied"`` (σ_ji = u_j v_i), ``"row"`` (one a unit), ``"rank-K"`` or ``"full"``
            (one a weight; the papers' family), see :class:`~.families.GaussianRows`.
        initial_scale: initial σ of every weight, or ``"balanced"``: by layer, such that a unit
            of any layer starts with the same KL of its slab, see :func:`balanced_scales`.
        initial_inclusion: initial γ of every unit.
        inclusion: gradient estimator of the inclusions, ``"trapezium"``, ``"straight-through"``,
            ``"soft"`` or ``"score"``, see :func:`~pyro_sparse.guides.families.spike_and_slab`. By
            default ``"trapezium"`` where probabilities are the question
            (:attr:`~pyro_sparse.models.\
base.SparseModel.asks_for_probabilities`), ``"straight-through"`` elsewhere.

    Args:
        temperature: of the binary-concrete relaxation.
        inclusion_draws: ``"batch"``: one draw of a unit's inclusion for the whole batch;
            ``"example"``: one an example, in :class:`pyro_sparse.infer.ELBO` with local
            reparameterisation (stock Pyro draws one for the batch), with ``inclusion`` other than
            ``"score"``. Layers that are applied more than once have one for the batch.

    Raises:
        ValueError: for an unknown option or a number out of range.
    """

    def __init__(
        self,
        model: SparseModel,
        *,
        variance: str = "tied",
        initial_scale: float | str = "balanced",
        initial_inclusion: float = 0.99,
        inclusion: str | None = None,
        temperature: float = 0.5,
        inclusion_draws: str = "batch",
    ) -> None:
        super().__init__(model)
        check_draws(inclusion_draws=inclusion_draws)
        if inclusion_draws == "example" and inclusion == "score":
            raise ValueError(
                "the score-function estimator needs one draw of the inclusions for the batch; pass "
                "inclusion_draws='batch', or inclusion='straight-through' or 'soft'"
            )
        self.inclusion_draws = inclusion_draws
        if inclusion is None:
            inclusion = "trapezium" if model.asks_for_probabilities else "straight-through"
        if inclusion not in ("trapezium", "straight-through", "soft", "score"):
            raise ValueError(
                "expected inclusion 'trapezium', 'straight-through', 'soft' or 'score', got "
                f"{inclusion!r}"
            )
        self.inclusion = inclusion
        positive(temperature=temperature)
        if not 0 < initial_inclusion < 1:
            raise ValueError(f"expected initial_inclusion in (0, 1), got {initial_inclusion}")
        self.make_rows(
            model,
            variance,
            initial_scale,
            lambda rows, scale: SpikeSlabRows(
                rows, variance, scale, initial_inclusion, inclusion, temperature
            ),
        )
        if model.prune_inputs:
            template = model.output_scale.expand(model.graph["input"].size)
            self.input_gate = InclusionGate(template, initial_inclusion, inclusion, temperature)
            for name, columns in model.input_columns().items():
                self.register_buffer(_columns_key(name), columns.to(template.device), False)
        self.keep_kl_weights()
        # Not a module of this one: the priors of columns are its, whatever becomes of them.
        self._column_prior = model.column_prior

    def sample_gate(self) -> Tensor | None:
        """``input.gate``, where there is one; it comes first, since rows are given it."""
        gate = getattr(self, "input_gate", None)
        return None if gate is None else self.sample_units("input.gate", "input", gate())

    def row_law(
        self, group: Group, family: nn.Module, gate: Tensor | None
    ) -> TorchDistributionMixin:
        columns = self._buffers.get(_columns_key(group.name))
        if gate is None or columns is None:
            return super().row_law(group, family, gate)
        # The last number is that of columns that read no input, which are always in.
        always = gate.new_ones(1)
        drawn = torch.cat([gate.detach(), always])[columns]
        probability = torch.cat([self.input_gate.inclusion_logits.sigmoid(), always])[columns]

        def given(slab: TorchDistributionMixin) -> TorchDistributionMixin:
            return GatedColumns(slab, self._column_prior(group), drawn, probability)

        return family(given) if isinstance(family, SpikeSlabRows) else given(family())

    def forward(self, *args: Any, **kwargs: Any) -> None:
        gate = self.sample_gate()
        for group, family in self.layers():
            self.sample_rows(group, family, gate)
        self.sample_likelihood()
