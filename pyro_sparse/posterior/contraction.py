r"""Has the posterior contracted: against its prior, around the truth, and as fast as theory says.

Three answers, each with its own definition:

- `contraction`: :math:`1 − \text{Var}_q/\text{Var}_p` of every parameter given that its unit is in,
  z-scores, and how sure the inclusions are;
- `radius`, `contraction_curve`: how far draws' *predictions* are from a reference, and how fast
  that falls in n. Predictions, not weights: units may be permuted, so weights have no truth;
- `theoretical_rate`: :math:`ε_n` of the spike-and-slab theorems, up to a constant that theory does
  not give.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pyro_sparse.infer.moments import Moments
from pyro_sparse.models.inclusion import complexities
from pyro_sparse.names import text_table

from .draws import Included
from .fitted import NotOfferedError
from .network import FittedNetwork, NetworkDraw

__all__ = [
    "Contraction",
    "Curve",
    "GroupContraction",
    "Radius",
    "contraction",
    "contraction_curve",
    "distances",
    "fitted_rate",
    "radius",
    "theoretical_rate",
]

# -- against the prior -----------------------------------------------------------------------------


@dataclass(frozen=True)
class GroupContraction:
    """One group of parameters; all tensors are of one shape, ``(units, row length)`` for rows.

    Attributes:
        group: name of the group of rows, ``"input"`` for the gate or noise on the inputs, or
            ``"noise_precision"``.
        prior_variance: Var_p of every number, given that its unit is in.
        posterior_variance: Var_q of every number, given that its unit is in.
        contraction: 1 − Var_q / Var_p of every number; 1 is known exactly, 0 is nothing learnt,
            negative is less certain than the prior. A gate is 1 given that it is in: 1.
        z: (E_q − reference) / sd_q of every number, inclusion and all; 0 where both are 0.
        probability: posterior inclusion probability; 1 where units cannot be excluded, or their
            inclusions do not multiply the rows.
            Shape: (units,), or () of a number without units.
        entropy: of each inclusion under q, nats: 0 is decided, log 2 is a coin.
            Shape: as ``probability``.
    """

    group: str
    prior_variance: Tensor
    posterior_variance: Tensor
    contraction: Tensor
    z: Tensor
    probability: Tensor
    entropy: Tensor

    @property
    def total(self) -> float:
        """Contraction of the summed variance, 1 − Σ Var_q / Σ Var_p.

        Units count by their inclusion probability: what a unit that is out would weigh does not
        matter.
        """
        weight = self.probability.reshape(-1, *[1] * (self.z.dim() - 1))
        prior = float((weight * self.prior_variance).sum())
        return 1 - float((weight * self.posterior_variance).sum()) / prior if prior else 1.0

    @property
    def rms_z(self) -> float:
        """Root mean square of the z-scores."""
        return float(self.z.square().mean().sqrt())


@dataclass(frozen=True)
class Contraction:
    """Prior-to-posterior contraction by group; ``str()`` prints a table."""

    groups: tuple[GroupContraction, ...]

    def __getitem__(self, name: str) -> GroupContraction:
        for group in self.groups:
            if group.group == name:
                return group
        raise KeyError(f"no group {name!r}; there are {', '.join(g.group for g in self.groups)}")

    def __str__(self) -> str:
        header = (
            *("group", "numbers", "prior sd", "posterior sd", "contraction", "rms z"),
            *("units in", "entropy"),
        )
        lines = [header] + [
            (
                g.group,
                str(g.z.numel()),
                f"{float(g.prior_variance.mean().sqrt()):.3g}",
                f"{float(g.posterior_variance.mean().sqrt()):.3g}",
                f"{g.total:.4f}",
                f"{g.rms_z:.2f}",
                f"{float(g.probability.sum()):.1f} of {g.probability.numel()}",
                f"{float(g.entropy.sum()):.2f}",
            )
            for g in self.groups
        ]
        return text_table(lines)


def _on_cpu(draw: NetworkDraw) -> dict[str, Tensor]:
    return {name: value.cpu() for name, value in draw.numbers.items()}


def _site_probabilities(sites: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """By group, from the names of the sites."""
    return {
        site.removesuffix(".rows").removesuffix(".gate"): value for site, value in sites.items()
    }


def _gated(probability: Tensor | None, mean: Tensor, variance: Tensor) -> tuple[Tensor, Tensor]:
    """Moments of z·w from those of w, z ~ Bernoulli of one probability a unit."""
    if probability is None:
        return mean, variance
    p = probability.reshape(-1, *[1] * (mean.dim() - 1))
    return p * mean, p * variance + p * (1 - p) * mean.square()


@torch.no_grad()
def contraction(
    posterior: FittedNetwork,
    truth: Mapping[str, Tensor] | None = None,
    num_samples: int = 1000,
) -> Contraction:
    r"""Prior-to-posterior contraction of the effective parameters, and z-scores.

    .. math:: c = 1 − \frac{\text{Var}_q θ}{\text{Var}_p θ}, \qquad
              z = \frac{E_q θ − θ_0}{\text{sd}_q θ}

    for every entry θ of the rows (scale times weight), of the gate on the inputs and of the noise
    precision. Both variances are *given that the unit is in*: what was learnt of a weight is one
    question, whether it is there another, which the entropy of the inclusions answers beside it. Of
    both together, 1 − Var_q / Var_p of inclusion times weight, nothing can be read: at a prior
    inclusion probability of 1/400 a unit that is known to 1 % would count as less certain than
    under the prior. Posterior moments are closed where the guide offers them, by draws elsewhere;
    the prior's are by draws, pooled over the units of a group, which are exchangeable. Where the
    prior has no finite variance (an unregularised horseshoe), so has its estimate no limit, and c
    only tends to 1. z has the moments of inclusion times weight, γ m and γ v + γ(1−γ) m².

    Args:
        posterior: of a model with a proper prior.
        truth: θ₀ by group, where weights have one (a linear model, not hidden units, which may be
            permuted); the prior mean, which is 0 for rows, when absent: z of a weight is then its
            signal-to-noise ratio.
        num_samples: draws of the prior, and of the guide where no closed form is offered.

    Raises:
        NotOfferedError: the prior is improper, so that it has no variance.
        ValueError: fewer than two draws, or a truth of another shape.

    Source: Betancourt, *Towards a principled Bayesian workflow* (2018), the two numbers (recalled).
    """
    if num_samples < 2:
        raise ValueError(f"expected at least two draws, got num_samples={num_samples}")
    model = posterior.model
    prior, q = Moments(), Moments()
    included = Included()
    inclusion, closed = posterior.inclusion(), posterior.row_variances()
    try:
        for one in posterior.network_draws(num_samples, prior=True, handler=included):
            prior.add(_on_cpu(one))
    except NotImplementedError as error:
        raise NotOfferedError(
            f"the prior of {type(model).__name__} is improper: it has no variance to contract "
            "from; models with a prior_scale are proper once that is given"
        ) from error
    for one in () if closed else posterior.network_draws(num_samples, handler=Included()):
        q.add(_on_cpu(one))
    moments = (
        dict(_closed_moments(posterior, closed))
        if closed
        else {name: (mean, q.variance(name)) for name, mean in q.mean.items()}
    )
    # Inclusions that do not multiply the rows (a support above precisions) do not enter z.
    gated = _site_probabilities(included.probabilities)
    groups = []
    for name, given_inclusion in prior.mean.items():
        # Units are exchangeable: their own moments, averaged.
        shape = given_inclusion.shape
        prior_mean, prior_variance = given_inclusion, prior.variance(name)
        if shape:
            prior_mean, prior_variance = (
                value.mean(0, keepdim=True).expand(shape) for value in (prior_mean, prior_variance)
            )
        mean, variance = moments[name]
        probability = torch.ones(shape[:1], dtype=torch.float64)
        if name in gated:
            probability = inclusion[name]
        if name in model.support and model.support.restricted:
            probability = probability * model.support.units(name).cpu()
        # Rows have prior mean 0 in every model: that of the draws is noise.
        reference = torch.zeros_like(mean) if name in model.graph else prior_mean
        if name == "input":
            reference = prior_mean
            if name in gated:
                reference = gated[name].expand(shape)
        if truth is not None and name in truth:
            reference = truth[name].double().cpu()
            if reference.shape != shape:
                raise ValueError(
                    f"expected a truth of shape {tuple(shape)} for {name!r}, got "
                    f"{tuple(reference.shape)}"
                )
        q_mean, q_variance = _gated(probability if name in gated else None, mean, variance)
        shift = q_mean - reference
        groups.append(
            GroupContraction(
                name,
                prior_variance,
                variance,
                torch.where(prior_variance > 0, 1 - variance / prior_variance, 1.0),
                torch.where(shift == 0, shift, shift / q_variance.sqrt()),
                probability,
                torch.special.entr(probability) + torch.special.entr(1 - probability),
            )
        )
    return Contraction(tuple(groups))


def _closed_moments(
    posterior: FittedNetwork, variances: Mapping[str, Tensor]
) -> Iterator[tuple[str, tuple[Tensor, Tensor]]]:
    """Mean and variance under q given inclusion, where rows have them in closed form."""
    means, support = posterior.guide.mean_rows(), posterior.model.support
    for name, variance in variances.items():
        mean, variance = (
            support.rows(name, value.detach()).double().cpu() for value in (means[name], variance)
        )
        yield name, (mean, variance)
    if "input" in posterior.inclusion():
        gate = torch.ones(posterior.model.graph["input"].size, dtype=torch.float64)
        yield "input", (gate, torch.zeros_like(gate))
    family = posterior.guide.noise_precision
    if family is not None:
        law = family()
        yield "noise_precision", (law.mean.double().cpu(), law.variance.double().cpu())


# -- around a reference ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Radius:
    """Distances of posterior draws' predictions from a reference.

    Attributes:
        distances: of every draw.
            Shape: (draws,).
        kind: ``"L2"`` or ``"Hellinger"``.
    """

    distances: Tensor
    kind: str

    def quantile(self, level: float = 0.95) -> float:
        """The smallest radius around the reference that holds ``level`` of the posterior mass."""
        return float(self.distances.quantile(level))

    def __str__(self) -> str:
        parts = [f"{100 * level:.0f} %: {self.quantile(level):.4g}" for level in (0.05, 0.5, 0.95)]
        return f"{self.kind} radius  " + "  ".join(parts)


def distances(predictions: Tensor, reference: Tensor, kind: str) -> Tensor:
    r"""Distance of each draw's predictions from the reference, over the empirical law of inputs.

    .. math::
        d_{L2}² = \frac1N Σ_i (f(x_i) − f_0(x_i))², \qquad
        d_H² = \frac1N Σ_i \tfrac12 Σ_c \left( \sqrt{p_c(x_i)} − \sqrt{p_{0c}(x_i)} \right)²

    Args:
        predictions: means, or class probabilities.
            Shape: (draws, N) or (draws, N, classes).
        reference: the same of the reference.
            Shape: (N,) or (N, classes).
        kind: ``"L2"`` or ``"Hellinger"``, which is at most 1.

    Returns:
        ``(draws,)``, float64.

    Raises:
        ValueError: shapes do not fit, or another kind.
    """
    if predictions.shape[1:] != reference.shape:
        raise ValueError(
            f"expected a reference of shape {tuple(predictions.shape[1:])}, one prediction for "
            f"each input, got {tuple(reference.shape)}"
        )
    p, q = predictions.double(), reference.double()
    if kind == "L2":
        return (p - q).square().flatten(1).mean(1).sqrt()
    if kind == "Hellinger":
        return (0.5 * (p.sqrt() - q.sqrt()).square().sum(-1)).mean(1).sqrt()
    raise ValueError(f"expected kind 'L2' or 'Hellinger', got {kind!r}")


def radius(
    posterior: FittedNetwork,
    x: Tensor,
    reference: Tensor | None = None,
    num_samples: int = 200,
) -> Radius:
    """How far draws are from a reference in what they predict: L2, or Hellinger for classes.

    Args:
        posterior: any.
        x: inputs, new ones if the distance is to be that of the inputs' law.
            Shape: (N, ...).
        reference: the truth, as `Posterior.predict` gives it (means or class probabilities;
            probabilities of 1 for a Bernoulli likelihood); the mean of the draws when absent, which
            measures spread without error.
            Shape: (N, ...).
        num_samples: draws.

    Raises:
        ValueError: the reference has another shape.
    """
    predictions = posterior.predict(x, num_samples).double().cpu()
    centre = predictions.mean(0) if reference is None else reference.double().cpu()
    probabilities = posterior.model.likelihood.class_probabilities
    classes = probabilities(predictions)
    if classes is None:
        return Radius(distances(predictions, centre, "L2"), "L2")
    known = probabilities(centre)
    assert known is not None
    return Radius(distances(classes, known, "Hellinger"), "Hellinger")


@dataclass(frozen=True)
class Curve:
    """Posterior radius over the number of examples, with its rate; see `contraction_curve`.

    Attributes:
        sizes: n₁ < n₂ < …
        radii: radius by repeat and size.
            Shape: (repeats, sizes).
        slope: d log radius / d log n; −½ is the parametric rate.
        low, high: its 95 % interval.
        kind: ``"L2"`` or ``"Hellinger"``.
        theory: ε_n of `theoretical_rate` by size, without its constant; None where not known.
    """

    sizes: tuple[int, ...]
    radii: Tensor
    slope: float
    low: float
    high: float
    kind: str = "L2"
    theory: tuple[float, ...] | None = None

    @property
    def mean(self) -> Tensor:
        """Geometric mean over repeats, ``(sizes,)``."""
        return self.radii.log().mean(0).exp()

    @property
    def scaled_theory(self) -> Tensor | None:
        """Theory times the constant that fits the radii best, ``(sizes,)``."""
        if self.theory is None:
            return None
        theory = torch.tensor(self.theory, dtype=torch.float64)
        return theory * (self.mean.log() - theory.log()).mean().exp()

    @property
    def theory_slope(self) -> float | None:
        """The slope of theory over these sizes: above −½, by its powers of log n."""
        if self.theory is None:
            return None
        return fitted_rate(self.sizes, torch.tensor([self.theory], dtype=torch.float64))[0]

    def __str__(self) -> str:
        lines = [f"{'n':>8}  {self.kind} radius" + ("  theory, scaled" if self.theory else "")]
        scaled = self.scaled_theory
        for i, size in enumerate(self.sizes):
            line = f"{size:>8}  {float(self.mean[i]):.4g}"
            lines.append(line if scaled is None else f"{line}  {float(scaled[i]):.4g}")
        rate = f"rate n^{self.slope:.2f} (95 %: {self.low:.2f} to {self.high:.2f})"
        theory = "" if self.theory is None else f", theory n^{self.theory_slope:.2f}"
        return "\n".join([*lines, rate + theory])


def fitted_rate(sizes: Sequence[int], radii: Tensor) -> tuple[float, float, float]:
    """Slope of log radius on log n with its 95 % interval, least squares.

    Each repeat has an intercept of its own, since its radii share data and, in simulations, a
    truth. The interval is Student's; it is infinite where no residual is left to judge by.

    Args:
        sizes: n, at least two different ones.
        radii: positive.
            Shape: (repeats, sizes).

    Returns:
        Slope, low, high.

    Raises:
        ValueError: shapes do not fit, a radius is not positive, or sizes do not differ.
    """
    repeats, count = radii.shape
    if count != len(sizes) or len(set(sizes)) < 2 or not bool((radii > 0).all()):
        raise ValueError(
            f"expected positive radii (repeats, {len(sizes)}) at two or more different sizes, got "
            f"shape {tuple(radii.shape)}, sizes {list(sizes)}"
        )
    x = torch.tensor(sizes, dtype=torch.float64).log()
    x = x - x.mean()
    y = radii.double().log()
    y = y - y.mean(1, keepdim=True)
    spread = repeats * float(x.square().sum())
    slope = float((y * x).sum()) / spread
    freedom = repeats * count - repeats - 1
    if freedom < 1:
        return slope, -math.inf, math.inf
    from scipy import stats

    deviation = math.sqrt(float((y - slope * x).square().sum()) / freedom / spread)
    half = float(stats.t.ppf(0.975, freedom)) * deviation
    return slope, slope - half, slope + half


def contraction_curve(
    fit: Callable[[Tensor, Tensor], FittedNetwork],
    x: Tensor,
    y: Tensor,
    sizes: Sequence[int],
    inputs: Tensor,
    reference: Tensor | None = None,
    *,
    level: float = 0.95,
    num_samples: int = 200,
    repeats: int = 1,
    seed: int = 0,
) -> Curve:
    r"""Refit on nested subsets n₁ < n₂ < …: how fast does the posterior contract?

    At each size the radius is the smallest that holds ``level`` of the posterior's draws around the
    reference (`radius`); the rate is the slope of its log on log n (`fitted_rate`). Posterior
    contraction at rate :math:`ε_n` means that the mass beyond :math:`M ε_n` of the *truth* vanishes
    (Ghosal, Ghosh, van der Vaart, Annals of Statistics 28, 2000): with the posterior mean in the
    truth's place the curve shows the spread only.

    Args:
        fit: from a subset to the posterior fitted to it; the model's ``num_data`` must be the
            subset's size.
        x, y: the pool.
            Shape: (N, ...) and (N,).
        sizes: increasing, at most N.
        inputs: where predictions are compared.
            Shape: (M, ...).
        reference: the truth there; each posterior's own mean when absent.
            Shape: (M, ...).
        level: of the radius.
        num_samples: draws of each posterior.
        repeats: random orders of the pool; subsets of one order are nested.
        seed: of the orders; the fits' own seeds are theirs.

    Raises:
        ValueError: sizes do not increase or are beyond the pool, or the reference does not fit.
    """
    if list(sizes) != sorted(set(sizes)) or not sizes or not 1 <= sizes[0] <= sizes[-1] <= len(x):
        raise ValueError(f"expected increasing sizes from 1 to {len(x)}, got {list(sizes)}")
    if len(sizes) < 2 or repeats < 1:
        raise ValueError(
            f"expected two or more sizes and one or more repeats, got {list(sizes)} and {repeats}"
        )
    generator = torch.Generator().manual_seed(seed)
    radii = torch.zeros(repeats, len(sizes), dtype=torch.float64)
    theory = torch.zeros_like(radii)
    kind = "L2"
    for repeat in range(repeats):
        order = torch.randperm(len(x), generator=generator)
        for i, size in enumerate(sizes):
            chosen = order[:size].to(x.device)
            posterior = fit(x[chosen], y[chosen])
            found = radius(posterior, inputs, reference, num_samples)
            radii[repeat, i], kind = found.quantile(level), found.kind
            theory[repeat, i] = theoretical_rate(posterior, size)
    rate = fitted_rate(sizes, radii)
    return Curve(tuple(sizes), radii, *rate, kind, tuple(theory.log().mean(0).exp().tolist()))


# -- in theory -------------------------------------------------------------------------------------


@torch.no_grad()
def theoretical_rate(
    posterior: FittedNetwork,
    num_data: int | None = None,
    *,
    active: Mapping[str, float] | None = None,
    bounds: Mapping[str, float] | None = None,
    approximation: float = 0.0,
) -> float:
    r"""ε_n of the contraction theorem of layer-wise spike-and-slab networks.

    With L + 1 layers of :math:`k_l` inputs and :math:`K_l` units, :math:`s_l` of them active, with
    rows of norm at most :math:`B_l`,

    .. math::
        ε_n² &= \left( Σ_l r_l + ξ \right) Σ_l u_l, \qquad
        r_l = s_l (k_l + 1) ϑ_l / n, \\
        u_l &= (L+1)² [\log n + \log(L+1) + \log(k_l+1) + \log K_l], \\
        ϑ_l &= \tfrac{B_l²}{k_l+1} + Σ_{m≠l} \log(k_m+1) + L + \log K_l + \log(k_l+1) + \log n
               + \log Σ_m u_m.

    The theorem bounds the mass beyond a constant times :math:`ε_n`, and the constant is not known;
    by itself ε_n is far above 1 for any real network. What it says is how the radius goes with n
    (:math:`n^{-1/2}` times powers of log n) and with the active units of each layer.

    Args:
        posterior: its network gives k_l and K_l (a convolution's filter counts as a unit).
        num_data: n; the model's when absent.
        active: s_l by group; when absent the expected number of units under q, all units where they
            cannot be excluded.
        bounds: B_l by group; when absent the largest norm of a posterior-mean row times √PIP.
        approximation: ξ, squared sup-norm distance of the truth from the class.

    Returns:
        ε_n.

    Raises:
        ValueError: a number is out of range.

    Source: Jantre, Bhattacharya, Maiti (Neural Networks 167, 2023, arXiv 2108.11000), line by line:

    - :math:`u_l`, and all of :math:`ϑ_l` but its first term: *read* in the authors' code, which
      sets the prior inclusion probabilities by them (:mod:`pyro_sparse.models.inclusion`);
    - the first term :math:`B_l²/(k_l+1)`: *recalled*; the code has :math:`(k_l+1)²` there, which is
      it at :math:`B_l² = (k_l+1)³`;
    - :math:`r_l = s_l (k_l+1) ϑ_l / n`: *recalled*; that the code's exponent is
      :math:`(k_l+1) ϑ_l` supports it;
    - :math:`ε_n² = (Σ_l r_l + ξ) Σ_l u_l`, and that it bounds the rate of the variational
      posterior where :math:`−\log λ_l = O((k_l+1) ϑ_l)` and
      :math:`−\log(1−λ_l) = O(s_l (k_l+1) ϑ_l / K_l)`: *recalled*.
    """
    model = posterior.model
    n = model.num_data if num_data is None else num_data
    if n < 1 or not approximation >= 0:
        raise ValueError(
            f"expected num_data ≥ 1 and a non-negative approximation, got {n} and {approximation}"
        )
    inclusion, rows = posterior.inclusion(), posterior.guide.mean_rows()
    fan_ins, widths, units, firsts = [], [], [], []
    for group in model.layers:
        name = group.name
        pip = inclusion.get(name, torch.ones(group.size, dtype=torch.float64))
        if name in model.support and model.support.restricted:
            pip = pip * model.support.units(name).cpu()
        k = model.graph.row_length(name) - 1
        norms = rows[name].detach().double().cpu().norm(dim=1) * pip.sqrt()
        bound = float(norms.max()) if bounds is None or name not in bounds else bounds[name]
        count = float(pip.sum()) if active is None or name not in active else active[name]
        if not (0 <= bound < math.inf and 0 <= count <= group.size):
            raise ValueError(
                f"expected a finite bound and between 0 and {group.size} active units for "
                f"{name!r}, got {bound} and {count}"
            )
        fan_ins.append(k)
        widths.append(group.size)
        units.append(count)
        firsts.append(bound**2 / (k + 1))
    theta, u = complexities(fan_ins, widths, n, firsts)
    complexity = sum(
        s * (k + 1) * value / n for s, k, value in zip(units, fan_ins, theta, strict=True)
    )
    return math.sqrt((complexity + approximation) * sum(u))
