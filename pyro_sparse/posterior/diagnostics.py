r"""Can the guide be trusted: importance ratios, the bounds made of them, calibration by simulation.

With draws :math:`θ_s ∼ q` everything here but `sbc` rests on the log importance ratios

.. math:: \log w_s = \log p(y, θ_s) − \log q(θ_s).

They are constant, at the log evidence, exactly where q is the posterior. Draws are hard: inclusions
come from their Bernoulli law and both densities are those against :math:`δ_0` + Lebesgue, so the
discrete mass of every inclusion counts and a relaxation that the guide trained with does not.

Model and guide are any Pyro callables with the same sites; a
:class:`~pyro_sparse.posterior.Posterior` has :meth:`~pyro_sparse.posterior.Posterior.khat`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyro.poutine as poutine
import torch
from pyro.distributions import Delta
from torch import Tensor

from pyro_sparse.distributions import SpikeAndSlab
from pyro_sparse.distributions.kl import base_law
from pyro_sparse.infer import without_evidence
from pyro_sparse.models import SparseModel
from pyro_sparse.names import text_table

from .draws import draw, exact_trace, log_density, measuring

__all__ = [
    "Calibration",
    "KHat",
    "importance_weighted_elbo",
    "khat",
    "log_weights",
    "pareto_k",
    "sbc",
]

# -- importance ratios -----------------------------------------------------------------------------


def pareto_k(log_ratios: Tensor) -> float:
    r"""k-hat: shape of the generalised Pareto law of the largest importance ratios.

    The ``min(S/5, 3√S)`` largest of S ratios, less the next one, are fitted by the estimator of
    Zhang and Stephens, with the weakly informative prior (ten observations' weight at ½) of
    Pareto-smoothed importance sampling. The ratios have :math:`1/k` finite moments: below ½ their
    mean is estimated well; above 0.7 no practicable number of draws will do. Ratios that are all
    equal, or whose tail is, are bounded in the strictest sense: −∞. A tail of fewer than five draws
    beside which all others underflow is infinite.

    Args:
        log_ratios: log importance ratios, up to a constant; −∞ is a draw without weight.
            Shape: (S,).

    Raises:
        ValueError: fewer than 25 ratios, or some that are NaN or +∞.

    Sources: Zhang and Stephens, Technometrics 51 (2009); Vehtari, Simpson, Gelman, Yao, Gabry,
    JMLR 25 (2024); for variational inference Yao, Vehtari, Simpson, Gelman, ICML 2018.
    """
    values = log_ratios.detach().double().cpu().sort().values
    count = len(values)
    if log_ratios.dim() != 1 or count < 25:
        raise ValueError(
            f"expected at least 25 log ratios, shape (S,), got shape {tuple(log_ratios.shape)}"
        )
    if bool(values.isnan().any()) or bool(values[-1] == math.inf):
        raise ValueError("expected log ratios below infinity, got NaN or infinite ones")
    size = math.ceil(min(count / 5, 3 * math.sqrt(count)))
    # Relative to the largest, so that the tail cannot overflow.
    tail = (values[-size:] - values[-1]).exp() - (values[-size - 1] - values[-1]).exp()
    # Rounding of log densities: what differs by less than this is equal.
    rounding = 1e-10 * max(1.0, float(values[-1].abs()))
    if float(values[-1] - values[-size - 1]) <= rounding:
        return -math.inf
    # Ties at the cut-off are draws on it, not above.
    tail = tail[tail > 0]
    if len(tail) >= 5:
        return _pareto_shape(tail)
    # A few draws that outweigh the cut-off beyond what a number can say are no sign of a bound.
    underflows = float((values[-size - 1] - values[-1]).exp()) == 0
    return math.inf if underflows else -math.inf


def _pareto_shape(tail: Tensor) -> float:
    """Shape of the generalised Pareto law of positive numbers in ascending order."""
    n = len(tail)
    points = 30 + math.isqrt(n)
    quartile = tail[max(0, math.floor(n / 4 + 0.5) - 1)]
    index = torch.arange(1, points + 1, dtype=tail.dtype) - 0.5
    theta = 1 / tail[-1] + (1 - (points / index).sqrt()) / (3 * quartile)
    shape = torch.log1p(-theta.unsqueeze(1) * tail).mean(1)
    profile = n * ((-theta / shape).log() - shape - 1)
    # A theta of 0, the exponential law, is a limit that no weight is given.
    weight = profile.nan_to_num(-math.inf).softmax(0)
    k = float(torch.log1p(-(theta * weight).sum() * tail).mean())
    return (n * k + 10 * 0.5) / (n + 10)


def log_weights(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    *args: Any,
    num_samples: int = 1000,
    **kwargs: Any,
) -> Tensor:
    """log p(y, θ) − log q(θ) for draws of the guide; their mean estimates the ELBO.

    Of a pruned `SparseModel`, less what the choice of its support costs, as
    :func:`pyro_sparse.infer.lower_bound`, which has the same mean.

    Args:
        model, guide: Pyro callables with the same latent sites.
        args, kwargs: what both are called with: all of the data.
        num_samples: draws.

    Returns:
        ``(num_samples,)``, float64.
    """
    with measuring(model, guide):
        draws = (draw(model, guide, *args, **kwargs) for _ in range(num_samples))
        ratios = [one.log_p - one.log_q for one in draws]
    choice = model.support.log_prior() if isinstance(model, SparseModel) else 0.0
    return torch.tensor(ratios, dtype=torch.float64) + choice


def importance_weighted_elbo(ratios: Tensor, k: int = 100) -> tuple[float, float]:
    r"""The bound :math:`E \log \frac1k Σ_{i ≤ k} w_i` on the log evidence, and its standard error.

    ``k = 1`` is the ELBO; the bound rises with k towards the log evidence (Burda, Grosse,
    Salakhutdinov, ICLR 2016). Estimated by the mean over the disjoint runs of k ratios.

    Args:
        ratios: log importance ratios of independent draws.
            Shape: (S,).
        k: draws a bound.

    Returns:
        Bound and standard error, nats; the error is NaN for a single run.

    Raises:
        ValueError: k is below 1, or above S.
    """
    if not 1 <= k <= len(ratios):
        raise ValueError(f"expected k between 1 and the number of ratios {len(ratios)}, got {k}")
    runs = ratios.double()[: len(ratios) // k * k].reshape(-1, k)
    bounds = runs.logsumexp(1) - math.log(k)
    error = float(bounds.std() / math.sqrt(len(bounds))) if len(bounds) > 1 else math.nan
    return float(bounds.mean()), error


# -- k-hat -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class KHat:
    """k-hat of the joint law and of blocks, with the bounds from the same draws; ``str()`` prints.

    Attributes:
        joint: k-hat of all latents together.
        blocks: k-hat by block, see `khat`; empty where none was asked for.
        ratios: log importance ratios of the joint draws, see `log_weights`.
            Shape: (S,).
        without_evidence: why the bounds are not of a log evidence, see
            :func:`pyro_sparse.infer.without_evidence`; None where they are.
    """

    joint: float
    blocks: dict[str, float]
    ratios: Tensor
    without_evidence: str | None = None

    @property
    def elbo(self) -> float:
        """The evidence lower bound, nats."""
        return importance_weighted_elbo(self.ratios, 1)[0]

    @property
    def elbo_error(self) -> float:
        """Standard error of `elbo` by the draws, nats."""
        return importance_weighted_elbo(self.ratios, 1)[1]

    @property
    def importance_weighted_elbo(self) -> float:
        """The bound with tenths of the draws, nats."""
        return importance_weighted_elbo(self.ratios, max(1, len(self.ratios) // 10))[0]

    @property
    def threshold(self) -> float:
        """Largest k-hat at which this many draws give reliable averages (Vehtari et al. 2024)."""
        return min(1 - 1 / math.log10(len(self.ratios)), 0.7)

    @property
    def trusted(self) -> bool:
        """Whether the joint k-hat is at most the threshold."""
        return self.joint <= self.threshold

    def __str__(self) -> str:
        values = {"joint": self.joint, **self.blocks}
        cells = [("block", "k-hat"), *((name, f"{k:.2f}") for name, k in values.items())]
        table = text_table(cells).splitlines()
        lines = [f"{table[0]}  (around the guide's draws; of no other mode)", *table[1:]]
        if self.without_evidence is None:
            lines.append(
                f"ELBO {self.elbo:.2f} ± {self.elbo_error:.2f}, importance-weighted "
                f"{self.importance_weighted_elbo:.2f}"
            )
        else:
            lines.append(f"no bound on an evidence: {self.without_evidence}")
        return "\n".join(lines)


INCLUSION = ":inclusion"
"""What a block of inclusions alone has after its site's name."""


def default_blocks(guide_trace: Any) -> dict[str, list[str]]:
    """A block a latent site; none of inclusions alone, of which a block says next to nothing.

    Given a draw of the weights, the inclusion of an input is certain whatever its probability is:
    such blocks read "reliable" beside errors of 0.7 (correlated inputs, one mode of many found).
    Point masses make no block.
    """
    blocks: dict[str, list[str]] = {}
    for name, site in guide_trace.nodes.items():
        if site["type"] != "sample" or poutine.util.site_is_subsample(site):
            continue
        law = base_law(site["fn"])
        # A gate is nothing but its inclusion.
        gate = isinstance(law, SpikeAndSlab) and isinstance(base_law(law.slab), Delta)
        if not gate and not isinstance(law, Delta):
            blocks[name] = [name]
    return blocks


def khat(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    *args: Any,
    num_samples: int = 1000,
    blocks: Mapping[str, Sequence[str]] | None = None,
    contexts: int = 3,
    block_samples: int | None = None,
    **kwargs: Any,
) -> KHat:
    r"""Pareto k-hat of the guide: of the joint law, and block by block.

    The joint k-hat judges :math:`q(θ)` against :math:`p(θ \mid y)`. In hundreds of dimensions it is
    large for every mean-field guide, so blocks say where it comes from: that of block B judges
    :math:`q(θ_B)` against the conditional :math:`p(θ_B \mid θ_{-B}, y)`, the rest at a draw of q,

    .. math:: \log w = \log p(y, θ_B, θ_{-B}) − \log q(θ_B), \qquad θ_B ∼ q,

    and is the median over several such contexts. It is high where the block is wrong near the
    guide's own draws. A low one says nothing of other modes, which such draws never see: it is no
    certificate of inclusion probabilities. A block ``"{site}:inclusion"`` redraws
    :math:`z` alone; the slab's draws stay, those of excluded units as well (with the guide's slab
    as pseudo-prior these are part of the target: Carlin and Chib 1995), so its ratio is the same
    expression. Conditional blocks are a choice of this package; Yao et al. (2018) have the joint.

    Args:
        model, guide: Pyro callables with the same latent sites; a guide's blocks are judged given
            the sites that come before them in it.
        args, kwargs: what both are called with: all of the data, not a minibatch.
        num_samples: draws of the joint.
        blocks: site names, or names with ``:inclusion``, by block; `default_blocks` when absent,
            ``{}`` for none. ``{"scales": ["fc1.tau2", "fc2.tau2"]}`` redraws both at once.
        contexts: draws of the rest that a block is judged in.
        block_samples: draws of a block in each context; ``num_samples`` when absent.

    Raises:
        ValueError: too few draws, or a block names a site that the guide does not have.
    """
    ratios = log_weights(model, guide, *args, num_samples=num_samples, **kwargs)
    joint = pareto_k(ratios)
    found: dict[str, list[float]] = {}
    with measuring(model, guide):
        for _ in range(contexts if blocks is None or blocks else 0):
            base = exact_trace(guide, *args, **kwargs)
            for name, parts in (default_blocks(base) if blocks is None else blocks).items():
                block_ratios = torch.tensor(
                    [
                        _block_ratio(model, base, parts, args, kwargs)
                        for _ in _fixed_slabs(base, parts, block_samples or num_samples)
                    ],
                    dtype=torch.float64,
                )
                found.setdefault(name, []).append(pareto_k(block_ratios))
    middle = {name: sorted(values)[len(values) // 2] for name, values in found.items()}
    return KHat(joint, middle, ratios, without_evidence(model, guide, *args, **kwargs))


def _fixed_slabs(base: Any, parts: Sequence[str], count: int) -> Iterator[int]:
    """Counts draws; while it runs, ``base`` has a slab draw for every unit of a block's sites."""
    sites = [part.removesuffix(INCLUSION) for part in parts]
    unknown = [site for site in sites if site not in base.nodes]
    if unknown:
        latent = [name for name, node in base.nodes.items() if node["type"] == "sample"]
        raise ValueError(f"the guide has no site {unknown[0]!r}; there are {', '.join(latent)}")
    before = {site: base.nodes[site]["value"] for site in sites}
    for part, site in zip(parts, sites, strict=True):
        law = base_law(base.nodes[site]["fn"])
        if part == site:
            continue
        if not isinstance(law, SpikeAndSlab):
            raise ValueError(f"the site {site!r} has no inclusions, its law is {law!r}")
        value = before[site]
        included = law._per_event((value != 0).flatten(-law.event_dim).any(-1))
        base.nodes[site]["slab"] = torch.where(included, value, law.slab.sample())
    yield from range(count)
    for site, value in before.items():
        base.nodes[site]["value"] = value


def _block_ratio(model: Any, base: Any, parts: Sequence[str], args: Any, kwargs: Any) -> float:
    """log p − log q of one redraw of a block; q of the block alone."""
    sites = []
    for part in parts:
        site = part.removesuffix(INCLUSION)
        node = base.nodes[site]
        if part == site:
            node["value"] = node["fn"].sample()
        else:
            law = base_law(node["fn"])
            included = law._per_event(law.rsample_inclusion()) > 0
            node["value"] = torch.where(included, node["slab"], torch.zeros_like(node["slab"]))
        sites.append(site)
    trace = poutine.trace(poutine.replay(model, trace=base)).get_trace(*args, **kwargs)
    return log_density(trace) - log_density(base, sites)


# -- simulation-based calibration ------------------------------------------------------------------


@dataclass(frozen=True)
class Calibration:
    """Ranks of prior draws among the draws of the guides fitted to their data.

    Attributes:
        ranks: by quantity, integers from 0 to ``num_draws``; uniform where guides are exact.
            Shape: (simulations,).
        num_draws: draws of a guide.
    """

    ranks: dict[str, Tensor]
    num_draws: int

    def p_values(self, bins: int | None = None) -> dict[str, float]:
        r"""p-values of the χ² test that ranks are uniform, by quantity.

        Args:
            bins: of equal width in ranks, a divisor of ``num_draws + 1``; by default the largest
                with ten or more simulations expected in each.

        Raises:
            ValueError: bins of unequal width, or fewer than 2.
        """
        possible = self.num_draws + 1
        simulations = len(next(iter(self.ranks.values())))
        if bins is None:
            divisors = [b for b in range(2, possible + 1) if possible % b == 0]
            bins = max([b for b in divisors if simulations >= 10 * b] or divisors[:1])
        if bins < 2 or possible % bins:
            raise ValueError(
                f"expected a number of bins that divides the {possible} possible ranks, got {bins}"
            )
        values = {}
        for name, ranks in self.ranks.items():
            counts = torch.bincount(ranks * bins // possible, minlength=bins).double()
            expected = simulations / bins
            statistic = (counts - expected).square().sum() / expected
            half = torch.tensor((bins - 1) / 2, dtype=torch.float64)
            values[name] = float(torch.special.gammaincc(half, statistic / 2))
        return values

    def uniform(self, level: float = 0.01, bins: int | None = None) -> bool:
        """Whether no quantity's ranks are rejected; ``level`` holds for all of them together."""
        values = self.p_values(bins)
        return min(values.values()) > level / len(values)

    def __str__(self) -> str:
        values = self.p_values()
        head = ("quantity", "p-value of uniform ranks")
        return text_table([head, *((name, f"{p:.3g}") for name, p in values.items())])


def sbc(
    model: Callable[..., Any],
    fit: Callable[[Tensor], Any],
    quantities: Callable[[dict[str, Tensor]], Mapping[str, Tensor]],
    *args: Any,
    observed: str = "y",
    num_simulations: int = 200,
    num_draws: int = 63,
    seed: int = 0,
) -> Calibration:
    r"""Simulation-based calibration: is the guide right on average over the prior?

    For each simulation draw :math:`θ^* ∼ p(θ)`, :math:`y^* ∼ p(y \mid θ^*)`, fit a guide to
    :math:`y^*` and count how many of ``num_draws`` draws of it are below :math:`θ^*` in each
    quantity. Under the exact posterior this rank is uniform on 0 … ``num_draws``; guides that are
    too narrow pile up ranks at both ends, too wide ones in the middle, biased ones at one. Ties, as
    at an exact 0, are broken at random, which keeps discrete quantities uniform.

    Args:
        model: a Pyro callable; the prior of every latent must be proper.
        fit: from a draw of the observed site to a fitted guide, or to a
            :class:`~pyro_sparse.posterior.Posterior`.
        quantities: from ``{latent site: value}`` to named tensors; every number is one quantity.
        args: what the model (without the observation) and the guide are called with: the inputs.
        observed: name of the observed site.
        num_simulations: fits.
        num_draws: draws of each fitted guide.
        seed: of everything random, the fits included; the caller's random state is left as it was.

    Raises:
        ValueError: there is no site of the observed name, or numbers are below 1.

    Sources: Talts, Betancourt, Simpson, Vehtari, Gelman, arXiv 1804.06788 (2018); random ties:
    Modrák et al., Bayesian Analysis (2023; recalled).
    """
    if min(num_simulations, num_draws) < 1:
        raise ValueError(
            "expected at least one simulation and one draw, got "
            f"num_simulations={num_simulations} and num_draws={num_draws}"
        )
    ranks: dict[str, list[int]] = {}
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        for _ in range(num_simulations):
            with measuring(model):
                trace = poutine.trace(model).get_trace(*args)
            if observed not in trace.nodes:
                raise ValueError(
                    f"the model has no site {observed!r}; there are "
                    f"{', '.join(n for n, s in trace.nodes.items() if s['type'] == 'sample')}"
                )
            latents = _latents(trace, without=observed)
            y: Any = trace.nodes[observed]["value"]
            fitted = fit(y)
            guide = getattr(fitted, "guide", fitted)
            truth = _numbers(quantities(latents))
            draws = []
            with measuring(guide):
                for _ in range(num_draws):
                    own = _latents(exact_trace(guide, *args))
                    draws.append(_numbers(quantities(own)))
            for name, value in truth.items():
                below = sum(one[name] < value for one in draws)
                ties = sum(one[name] == value for one in draws)
                rank = below + int(torch.randint(ties + 1, ()))
                ranks.setdefault(name, []).append(rank)
    return Calibration({name: torch.tensor(value) for name, value in ranks.items()}, num_draws)


def _latents(trace: Any, without: str = "") -> dict[str, Tensor]:
    return {
        name: site["value"]
        for name, site in trace.nodes.items()
        if site["type"] == "sample" and name != without and not poutine.util.site_is_subsample(site)
    }


def _numbers(quantities: Mapping[str, Tensor]) -> dict[str, float]:
    """Every number of every tensor, by name and index."""
    numbers = {}
    for name, value in quantities.items():
        value = torch.as_tensor(value)
        flat = value.flatten().tolist()
        if value.dim() == 0:
            numbers[name] = float(flat[0])
        else:
            numbers |= {f"{name}[{i}]": float(number) for i, number in enumerate(flat)}
    return numbers
