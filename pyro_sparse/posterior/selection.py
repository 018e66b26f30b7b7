"""Selection rules: small objects that turn a posterior into masks of units to keep.

A rule is called with a :class:`~pyro_sparse.posterior.Posterior` and returns a boolean mask
``(units,)`` for every group that it speaks of; groups that it leaves out are kept. Rules about
single weights return ``(units, row length)``. A rule works on any posterior that offers what it
needs, and raises :class:`~pyro_sparse.posterior.importance.NotOfferedError` on any other.

A model's default is the cut of its guide's own first offer (:class:`pyro_sparse.guides.Offer`).
To add one, write a class with ``__call__(posterior) -> dict[str, Tensor]``; for a new measure of
importance write a function (:mod:`.importance`), and :class:`Threshold`, :class:`TopK` and
:class:`MACBudget` can use it. To make it a model's default::

    @selection.default_rule.register
    def _(model: MyModel):
        return MyRule()
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from pyro_sparse.guides import Reducible
from pyro_sparse.names import nearest

from . import importance
from .importance import Importance, Random, Shapley
from .inclusion import within_false_discovery_rate
from .network import FittedNetwork, SelectionRule, default_rule
from .reduction import delta_evidence, delta_evidence_joint, delta_evidence_noise

__all__ = [
    "BMRS",
    "Connected",
    "ExpectedCost",
    "FalseDiscovery",
    "LogAlpha",
    "LogScale",
    "MACBudget",
    "MedianProbability",
    "ModelReduction",
    "SelectionRule",
    "SignalToNoise",
    "Threshold",
    "TopK",
    "default_rule",
    "parse",
]


# -- rules that belong to a kind of posterior ------------------------------------------------------


@dataclass(frozen=True)
class MedianProbability:
    """Keep the units with inclusion probability above a threshold, ½ by default.

    At ½ this is the median-probability model of Barbieri and Berger (Annals of Statistics 32,
    2004), which predicts best among single models under conditions they state.

    Raises:
        ValueError: the threshold is outside [0, 1).
    """

    threshold: float = 0.5

    def __post_init__(self) -> None:
        if not 0 <= self.threshold < 1:
            raise ValueError(f"expected a threshold in [0, 1), got {self.threshold}")

    def __call__(self, posterior: FittedNetwork) -> dict[str, Tensor]:
        return posterior.offer("inclusion", "the median-probability rule").kept(self.threshold)


@dataclass(frozen=True)
class FalseDiscovery:
    """Keep as many units of each group as a Bayesian false-discovery rate allows.

    The most probable ones, while the mean of 1 − γ over those kept is at most the level; see
    :func:`~pyro_sparse.posterior.inclusion.within_false_discovery_rate`.

    Raises:
        ValueError: the level is outside [0, 1).
    """

    level: float = 0.05

    def __post_init__(self) -> None:
        if not 0 <= self.level < 1:
            raise ValueError(f"expected a level in [0, 1), got {self.level}")

    def __call__(self, posterior: FittedNetwork) -> dict[str, Tensor]:
        inclusion = posterior.offer("inclusion", "the false-discovery rule").laws
        return {
            name: within_false_discovery_rate(pip, self.level) for name, pip in inclusion.items()
        }


@dataclass(frozen=True)
class ExpectedCost:
    r"""The subnetwork of least expected cost, where both kinds of errors have a price.

    .. math:: \min_{\text{keep}} Σ_j \left[ 1[\text{keep}_j]\, (1 − γ_j)\, a
              + 1[\text{drop}_j]\, γ_j\, b \right]:
              \quad \text{keep}_j \iff γ_j > \tfrac{a}{a + b}

    Attributes:
        wrong: a, the price of a kept unit that is out: one number, or by group.
        missed: b, the price of a dropped unit that is in.

    At equal prices this is the median-probability network, which under independent inclusions is
    the most probable one, too.

    Raises:
        ValueError: a price is not positive.
    """

    wrong: float | Mapping[str, float] = 1.0
    missed: float = 1.0

    def __post_init__(self) -> None:
        prices = list(self.wrong.values()) if isinstance(self.wrong, Mapping) else [self.wrong]
        if not all(0 < price < math.inf for price in [*prices, self.missed]):
            raise ValueError(f"expected positive prices, got {self}")

    def __call__(self, posterior: FittedNetwork) -> dict[str, Tensor]:
        inclusion = posterior.offer("inclusion", "the rule of least expected cost").laws
        keep = {}
        for name, pip in inclusion.items():
            wrong = self.wrong.get(name, 1.0) if isinstance(self.wrong, Mapping) else self.wrong
            keep[name] = pip * self.missed > (1 - pip) * wrong
        return keep


@dataclass(frozen=True)
class SignalToNoise:
    """Keep the units whose noise has a signal-to-noise ratio and a mean above thresholds.

    A collapsed unit (posterior = prior on [−20, 0]) has a ratio of 1/3. The ratio alone is not
    importance: a unit with θ constant at 3e-7 has a ratio of any size and does nothing.

    Attributes:
        threshold: least E θ / sd θ (1: Neklyudov et al. 2017).
        mean: least E θ.

    Raises:
        ValueError: a threshold is negative.
    """

    threshold: float = 1.0
    mean: float = 1e-3

    def __post_init__(self) -> None:
        if not (self.threshold >= 0 and self.mean >= 0):
            raise ValueError(f"expected thresholds of at least 0, got {self}")

    def __call__(self, posterior: FittedNetwork) -> dict[str, Tensor]:
        noise = posterior.offer("noise", "the signal-to-noise rule").laws
        return {
            name: (law.signal_to_noise > self.threshold) & (law.mean > self.mean)
            for name, law in noise.items()
        }


@dataclass(frozen=True)
class LogAlpha:
    """Keep the units whose scale has a log dropout rate log α = log σ² − log μ² below a threshold.

    Attributes:
        threshold: 0 by default: the noise of the scale is as large as its mean, as at the
            signal-to-noise ratio of 1 that `SignalToNoise` asks for. Units that the data need have
            their α near the relative precision of a weight, far below. The others rise without
            end, because the KL falls in α, but slowly, since it flattens out: 3, the number of
            Molchanov, Ashukha, Vetrov (ICML 2017) for weights (a dropout rate of 0.95), keeps units
            for thousands of steps that have long ceased to carry anything.

    Raises:
        ValueError: the threshold is not a number.
    """

    threshold: float = 0.0

    def __post_init__(self) -> None:
        if math.isnan(self.threshold):
            raise ValueError("expected a number as threshold, got nan")

    def __call__(self, posterior: FittedNetwork) -> dict[str, Tensor]:
        return posterior.offer("log_alpha", "the rule on dropout rates").kept(-self.threshold)


@dataclass(frozen=True)
class LogScale:
    """Keep the units whose mean log scale, E log(s τ_j), is close to the largest of their layer.

    Units that the data need have a scale near the size of their weights; the others' falls until
    what is left of it is lost in the noise. Layers differ in the size of their weights, by fan-in,
    as much as the two kinds of units do, hence the comparison within the layer, which also keeps
    at least one unit of each.

    Attributes:
        threshold: least log scale, minus the layer's largest where ``relative``. −2 by default: a
            unit goes when its weights are expected below 14 % of the size of the layer's largest.
            On LeNet-5 and MNIST the gap between both kinds of units lay between −1.4 and −2.6 in
            all layers; look at the sorted ``Posterior.log_scales()`` of your own run.
        relative: compare with the layer's largest; otherwise with 0.

    Raises:
        ValueError: the threshold is not a number.
    """

    threshold: float = -2.0
    relative: bool = True

    def __post_init__(self) -> None:
        if math.isnan(self.threshold):
            raise ValueError("expected a number as threshold, got nan")

    def __call__(self, posterior: FittedNetwork) -> dict[str, Tensor]:
        scales = posterior.offer("log_scales", "the rule on scales")
        return replace(scales, relative=self.relative).kept(self.threshold)


@dataclass(frozen=True)
class BMRS:
    r"""Bayesian model reduction of a multiplicative noise: drop units that the evidence is for.

    A unit goes where :math:`ΔF ≥ −\log ω`, with ΔF of
    :func:`~pyro_sparse.posterior.reduction.delta_evidence_noise` and prior odds ω of being out.
    At ω = 1 a collapsed unit (posterior = prior, ΔF = 0 for every reduced prior) sits exactly on
    the boundary, and rounding decides; hence ω > 1.

    Attributes:
        kind: ``"n"``: the reduced prior is a point at θ = exp(a); ``"u"``: log-uniform between
            2⁻²³ (what single precision can resolve beside 1) and 2^−bits.
        bits: of ``"u"``: a noise below 2^−bits counts as off (8 or 4 in the paper).
        prior_odds: ω of being out against being in.

    Raises:
        ValueError: another kind, or a number out of range.

    Source: Wright, Igel, Selvan (NeurIPS 2024, arXiv 2406.01345); the prior odds are ours.
    """

    kind: str = "n"
    bits: int = 4
    prior_odds: float = 20.0

    def __post_init__(self) -> None:
        if self.kind not in ("n", "u"):
            raise ValueError(f"expected kind 'n' or 'u', got {self.kind!r}")
        if not 0 < self.bits < 23:
            raise ValueError(f"expected bits between 1 and 22, got {self.bits}")
        if not 0 < self.prior_odds < math.inf:
            raise ValueError(f"expected positive, finite prior odds, got {self.prior_odds}")

    def __call__(self, posterior: FittedNetwork) -> dict[str, Tensor]:
        noise = posterior.offer("noise", "BMRS").laws
        window = None
        if self.kind == "u":
            window = (-23 * math.log(2), -self.bits * math.log(2))
        bound = -math.log(self.prior_odds)
        return {name: delta_evidence_noise(law, window) < bound for name, law in noise.items()}


@dataclass(frozen=True)
class ModelReduction:
    """Bayesian model reduction of Gaussian weights: drop what the evidence is against keeping.

    Attributes:
        by: what goes together where ΔF ≥ 0: single ``"weights"``; ``"rows"``, the weights that
            write a unit, of every layer with units to prune; or ``"columns"``, the weights with
            which a layer reads a unit. Under independent weights the ΔF of a group is the sum; of
            a layer with a joint posterior it is the joint one, with its covariances.
        margin: least loss of evidence −ΔF, in nats, for which a group stays.

    Raises:
        ValueError: another ``by``.

    Source: Beckers et al. (arXiv 2210.09134).
    """

    by: str = "weights"
    margin: float = 0.0

    def __post_init__(self) -> None:
        if self.by not in ("weights", "rows", "columns"):
            raise ValueError(f"expected by 'weights', 'rows' or 'columns', got {self.by!r}")

    def __call__(self, posterior: FittedNetwork) -> dict[str, Tensor]:
        laws = posterior.offer("gaussians", "model reduction").laws
        support = posterior.model.support
        keep = {}
        for name, law in laws.items():
            mask = support[name].cpu().clone()
            if self.by == "weights":
                gain = delta_evidence(law.loc, law.variance, law.prior_variance)
                keep[name] = mask & (gain < -self.margin).cpu()
                continue
            for entries in self._groups(posterior, name):
                # What was pruned before is no part of the group any more.
                entries = entries[mask.flatten()[entries]]
                if len(entries) and _gain(law, entries) >= -self.margin:
                    mask.view(-1)[entries] = False
            keep[name] = mask
        return keep

    def _groups(self, posterior: FittedNetwork, name: str) -> Iterator[Tensor]:
        """The groups of a layer as indices of its rows' entries, ``(entries,)`` each."""
        model = posterior.model
        shape = model.row_shape(model.graph[name])
        index = torch.arange(shape.numel()).reshape(shape)
        if self.by == "rows":
            yield from index if model.graph[name].prunable else ()
        else:
            parameters = model.graph.parameters({name: index})
            for group in model.graph:
                for reader in group.readers if group.prunable else ():
                    if reader.parameter in parameters:
                        columns = parameters[reader.parameter].movedim(reader.dim, 0)
                        columns = columns[reader.entries(group.size)]
                        yield from columns.reshape(group.size, -1)


def _gain(law: Reducible, entries: Tensor) -> float:
    """ΔF of fixing these entries of a layer's rows, given by their flat indices, at 0."""
    loc, entries = law.loc.flatten(), entries.to(law.loc.device)
    if law.covariance is None:
        variance = law.variance.flatten()[entries]
        return float(delta_evidence(loc[entries], variance, law.prior_variance).sum())
    block = law.covariance[entries][:, entries]
    return float(delta_evidence_joint(loc[entries], block, law.prior_variance))


@dataclass(frozen=True)
class Connected:
    """Keep the units through which anything flows: those with a row and with weights out.

    The rule of models whose posterior says nothing about units, after single weights were pruned
    (:meth:`Posterior.prune <pyro_sparse.posterior.Posterior.prune>`). A unit whose incoming weights
    and bias are all 0 is a constant that its readers' biases take up, one that nobody reads is
    nothing. What the network computes at posterior means stays the same.
    """

    def __call__(self, posterior: FittedNetwork) -> dict[str, Tensor]:
        return posterior.model.graph.connected(posterior.mean_parameters())


# -- rules for any measure of importance -----------------------------------------------------------


@dataclass(frozen=True)
class Threshold:
    """Keep what a measure puts above a threshold."""

    measure: Importance
    threshold: float

    def __post_init__(self) -> None:
        if math.isnan(self.threshold):
            raise ValueError("expected a threshold that is a number, got nan")

    def __call__(self, posterior: FittedNetwork) -> dict[str, Tensor]:
        return {name: value > self.threshold for name, value in self.measure(posterior).items()}


@dataclass(frozen=True)
class TopK:
    """Keep the best by a measure: a number of units a group, or a share of all.

    Attributes:
        measure: of units, or of weights.
        k: how many to keep: of each group a number (one for all, or by group; groups without one
            keep all), or with a float in (0, 1] this share of all together, at least one unit a
            group.

    Raises:
        ValueError: a number below 1, or a share outside (0, 1].
    """

    measure: Importance
    k: int | float | Mapping[str, int]

    def __post_init__(self) -> None:
        numbers = list(self.k.values()) if isinstance(self.k, Mapping) else [self.k]
        whole = (not isinstance(number, float) and number >= 1 for number in numbers)
        share = isinstance(self.k, float) and 0 < self.k <= 1
        if not share and not all(whole):
            raise ValueError(f"expected numbers of at least 1 or a share in (0, 1], got {self.k}")

    def __call__(self, posterior: FittedNetwork) -> dict[str, Tensor]:
        values = self.measure(posterior)
        if isinstance(self.k, float):
            total = sum(value.numel() for value in values.values())
            return _above_rank(values, max(1, round(self.k * total)))
        if isinstance(self.k, Mapping) and not self.k.keys() <= values.keys():
            unknown = sorted(self.k.keys() - values.keys())
            raise ValueError(nearest("group", unknown[0], values))
        keep = {}
        for name, value in values.items():
            k = self.k.get(name, value.numel()) if isinstance(self.k, Mapping) else self.k
            mask = torch.zeros(value.numel(), dtype=torch.bool)
            mask[value.flatten().topk(min(k, value.numel())).indices] = True
            keep[name] = mask.reshape(value.shape)
        return keep


@dataclass(frozen=True)
class MACBudget:
    """Keep the best units by a measure, as many as the compact network may cost.

    Units of all groups stand in one ranking; the longest prefix whose network costs at most the
    budget is kept, and of every group at least its best unit.

    Attributes:
        macs: multiply-accumulate operations for one input.
        measure: of units; the inclusion probability by default.

    Raises:
        ValueError: the budget is not positive, or below what one unit a group costs.
    """

    macs: float
    measure: Importance = importance.inclusion_probability

    def __post_init__(self) -> None:
        if not self.macs > 0:
            raise ValueError(f"expected a positive budget, got {self.macs}")

    def __call__(self, posterior: FittedNetwork) -> dict[str, Tensor]:
        values = self.measure(posterior)
        low, high = 1, sum(value.numel() for value in values.values())
        if posterior.macs(_above_rank(values, low)) > self.macs:
            least = posterior.macs(_above_rank(values, low))
            raise ValueError(
                f"one unit a group already costs {least:,.0f} MACs, more than the budget of "
                f"{self.macs:,.0f}"
            )
        while low < high:
            middle = (low + high + 1) // 2
            if posterior.macs(_above_rank(values, middle)) <= self.macs:
                low = middle
            else:
                high = middle - 1
        return _above_rank(values, low)


def _above_rank(values: Mapping[str, Tensor], count: int) -> dict[str, Tensor]:
    """Masks of the ``count`` largest of all, and of the largest of each group."""
    order = torch.cat([value.flatten().double().cpu() for value in values.values()])
    mask = torch.zeros(len(order), dtype=torch.bool)
    mask[order.sort(descending=True, stable=True).indices[:count]] = True
    keep = {}
    parts = mask.split([value.numel() for value in values.values()])
    for (name, value), part in zip(values.items(), parts, strict=True):
        part = part.clone()
        part[value.flatten().argmax()] = True
        keep[name] = part.reshape(value.shape)
    return keep


# -- names -----------------------------------------------------------------------------------------

MEASURES: dict[str, Callable[[Tensor, Tensor], Importance]] = {
    "inclusion": lambda x, y: importance.inclusion_probability,
    "noise-signal": lambda x, y: importance.noise_signal,
    "retention": lambda x, y: importance.retention,
    "log-scale": lambda x, y: importance.log_scale,
    "magnitude": lambda x, y: importance.magnitude,
    "random": lambda x, y: Random(),
    "shapley": Shapley,
}
"""Measures of units by the names of the command line; each is made from data to score on."""

RULES = {
    "median[:γ]": "inclusion probability above ½, or above γ",
    "fdr[:α]": "as many units as a Bayesian false-discovery rate of 0.05, or α, allows",
    "cost[:a]": "least expected cost: a unit kept in vain costs 1, or a, one missed 1",
    "snr[:t]": "signal-to-noise ratio of the noise above 1, or t",
    "log-alpha[:t]": "log dropout rate of the unit's scale below 0, or t",
    "log-scale[:t]": "mean log of the unit's scale at most 2, or −t, below the layer's largest",
    "bmrs-n[:ω]": "BMRS with a point as reduced prior, prior odds ω",
    "bmrs-u4[:ω], bmrs-u8[:ω]": "BMRS with a uniform reduced prior below 2⁻⁴ or 2⁻⁸",
    "macs:N[:MEASURE]": "as many units as N MACs allow (N below 1: a share of the dense network's)",
    "top:K[:MEASURE]": "K units a layer (K below 1: a share of all)",
    "connected": "units with anything in and weights out",
}
"""What `parse` takes."""


def parse(text: str, x: Tensor, y: Tensor, dense_macs: int) -> SelectionRule:
    """A rule from its command-line name.

    Args:
        text: one of :data:`RULES`, with MEASURE one of :data:`MEASURES`.
        x: examples that a measure may score on.
        y: their targets.
        dense_macs: cost of the network with all units, for budgets given as a share.

    Raises:
        ValueError: an unknown name, or numbers that do not fit it.
    """
    head, *arguments = text.split(":")
    form = f"the rule {text!r} does not have the form of {', '.join(RULES)}"
    try:
        if head in ("macs", "top"):
            if len(arguments) not in (1, 2) or not _is_number(arguments[0]):
                raise ValueError(form)
            number, name = (*arguments, "inclusion")[:2]
            if name not in MEASURES:
                raise ValueError(nearest("measure", name, MEASURES))
            measure, size = MEASURES[name](x, y), float(number)
            if head == "macs":
                return MACBudget(size * dense_macs if size < 1 else size, measure)
            return TopK(measure, int(size) if size >= 1 and size.is_integer() else size)
        simple: dict[str, Callable[..., SelectionRule]] = {
            "median": MedianProbability,
            "fdr": FalseDiscovery,
            "cost": ExpectedCost,
            "snr": SignalToNoise,
            "log-alpha": LogAlpha,
            "log-scale": LogScale,
            "bmrs-n": lambda *odds: BMRS("n", **_odds(odds)),
            "bmrs-u4": lambda *odds: BMRS("u", 4, **_odds(odds)),
            "bmrs-u8": lambda *odds: BMRS("u", 8, **_odds(odds)),
            "connected": Connected,
        }
        if head not in simple:
            raise ValueError(nearest("rule", head, [*simple, "macs", "top"]))
        if len(arguments) > 1 or not all(_is_number(argument) for argument in arguments):
            raise ValueError(form)
        return simple[head](*(float(argument) for argument in arguments))
    except TypeError as error:
        raise ValueError(form) from error


def _odds(odds: tuple[float, ...]) -> dict[str, Any]:
    return {"prior_odds": odds[0]} if odds else {}


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
