r"""What is in, beyond one run's probabilities: several runs merged, inputs that reach the output.

**Runs are merged up to permutation.** Hidden units have no names: unit 3 of one run may do what
unit 7 of another does. `merge` therefore reorders the units of each run, layer by layer, until
their expected incoming weights :math:`γ_j m_j` lie closest to those of the first run (an assignment
problem with squared distances; columns follow the order of the layer below). Input features are
never reordered. Units that are out in both runs have rows near 0 and match arbitrarily, which
changes nothing. Signs are not matched: with an odd activation a unit and its mirror image count as
different.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pyro_sparse.graph import Graph
from pyro_sparse.names import text_table

from .network import FittedNetwork
from .summary import Objective
from .summary import objective as objective_of

__all__ = [
    "InputSelection",
    "InputSets",
    "MergedInclusion",
    "false_discovery_rate",
    "input_probability",
    "input_sets",
    "merge",
    "reaching_inputs",
    "select_inputs",
    "within_false_discovery_rate",
]

# -- several runs ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class MergedInclusion:
    """Inclusion probabilities of several runs of one model, units matched; see `merge`.

    Attributes:
        probabilities: γ by group, the units in the first run's order.
            Shape: (runs, units).
        orders: for every run, by group, which of its own units stands at each place.
            Shape: (units,).
    """

    probabilities: dict[str, Tensor]
    orders: tuple[dict[str, Tensor], ...]

    @property
    def mean(self) -> dict[str, Tensor]:
        """Inclusion probability of every unit, averaged over runs, ``(units,)``."""
        return {name: values.mean(0) for name, values in self.probabilities.items()}

    @property
    def standard_error(self) -> dict[str, Tensor]:
        """Of `mean`, by the spread over runs: sd / √runs, ``(units,)``."""
        return {
            name: values.std(0) / math.sqrt(len(values))
            for name, values in self.probabilities.items()
        }

    @property
    def expected(self) -> dict[str, tuple[float, float]]:
        """Expected number of included units by group, and its standard error over runs."""
        counts = {name: values.sum(1) for name, values in self.probabilities.items()}
        return {
            name: (float(count.mean()), float(count.std() / math.sqrt(len(count))))
            for name, count in counts.items()
        }

    def co_inclusion(self, group: str) -> Tensor:
        r"""Probability that both units of a pair are in, over runs and each run's q.

        .. math:: C_{ij} = \frac1R Σ_r γ_i^{(r)} γ_j^{(r)} \quad (i ≠ j), \qquad
                  C_{ii} = \frac1R Σ_r γ_i^{(r)}

        Within a run q has the units independent, so pairs are coupled by the runs: below
        ``mean_i · mean_j`` the two stand in for each other, above it they come together.

        Returns:
            ``(units, units)``.

        Raises:
            KeyError: there is no such group.
        """
        values = self.probabilities[group]
        pairs = values.T @ values / len(values)
        pairs.diagonal().copy_(values.mean(0))
        return pairs

    def highest_probability(self) -> tuple[dict[str, Tensor], float]:
        """Most probable subnetwork under the average of the runs' laws, and its log probability.

        Of one run that is the median-probability network, since its units are independent; of a
        mixture it need not be. Candidates are every run's own and that of the averaged
        probabilities, so the result is at least as probable as any of these.
        """
        runs = len(next(iter(self.probabilities.values())))
        candidates = [
            {name: values[run] > 0.5 for name, values in self.probabilities.items()}
            for run in range(runs)
        ]
        candidates.append({name: value > 0.5 for name, value in self.mean.items()})
        scored = [(self._log_probability(keep), i) for i, keep in enumerate(candidates)]
        best, index = max(scored)
        return candidates[index], best

    def _log_probability(self, keep: Mapping[str, Tensor]) -> float:
        logs = torch.stack(
            [
                torch.where(keep[name], values, 1 - values).log().sum(1)
                for name, values in self.probabilities.items()
            ]
        ).sum(0)
        return float(logs.logsumexp(0)) - math.log(len(logs))

    def __str__(self) -> str:
        lines = [("group", "units", "expected ± s.e.", "largest s.e. of a PIP")]
        for name, (count, error) in self.expected.items():
            largest = float(self.standard_error[name].max())
            units = self.probabilities[name].shape[1]
            lines.append((name, str(units), f"{count:.1f} ± {error:.1f}", f"{largest:.3f}"))
        return text_table(lines)


def merge(posteriors: Sequence[FittedNetwork]) -> MergedInclusion:
    """Merge runs of one model that differ in their seeds.

    Args:
        posteriors: of models on the same network; units are matched to the first one's.

    Raises:
        NotOfferedError: the posterior has no inclusion probabilities.
        ValueError: fewer than two runs, or networks of different groups.
    """
    if len(posteriors) < 2:
        raise ValueError(f"expected at least two runs to merge, got {len(posteriors)}")
    for posterior in posteriors:
        posterior.offer("inclusion", "merging runs")
    inclusions = [posterior.inclusion() for posterior in posteriors]
    shapes = [{name: len(pip) for name, pip in inclusion.items()} for inclusion in inclusions]
    for other in shapes[1:]:
        if other != shapes[0]:
            raise ValueError(
                f"expected runs of one network, with the same groups, got {shapes[0]} and {other}"
            )
    graph = posteriors[0].model.graph
    expected = [_expected_parameters(posterior) for posterior in posteriors]
    orders = [_match(graph, expected[0], other) for other in expected]
    probabilities = {
        name: torch.stack(
            [
                inclusion[name][order[name]] if name in order else inclusion[name]
                for inclusion, order in zip(inclusions, orders, strict=True)
            ]
        )
        for name in shapes[0]
    }
    return MergedInclusion(probabilities, tuple(orders))


@torch.no_grad()
def _expected_parameters(posterior: FittedNetwork) -> dict[str, Tensor]:
    """Posterior means of the network's parameters, exclusion counted: γ times the mean."""
    inclusion, graph = posterior.guide_inclusion(), posterior.model.graph
    rows = {}
    for name, value in posterior.guide.mean_rows().items():
        value = value.detach().double().cpu()
        rows[name] = value * inclusion[name].unsqueeze(1) if name in inclusion else value
    parameters = graph.parameters(rows)
    if "input" in inclusion:
        parameters = graph.scale_columns(parameters, "input", inclusion["input"])
    return parameters


def _match(
    graph: Graph, reference: Mapping[str, Tensor], parameters: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """The order in which each layer's units come closest to the reference's."""
    from scipy.optimize import linear_sum_assignment

    current, orders = dict(parameters), {}
    for group in graph:
        if not (group.writers and group.prunable):
            continue
        distance = torch.cdist(graph.rows(reference, group.name), graph.rows(current, group.name))
        _, order = linear_sum_assignment(distance.square().numpy())
        orders[group.name] = torch.as_tensor(order, dtype=torch.long)
        for part in (*group.writers, *group.readers):
            entries = orders[group.name].unsqueeze(1) * part.block + torch.arange(part.block)
            value = current[part.parameter]
            current[part.parameter] = value.index_select(part.dim, entries.flatten())
    return orders


# -- inputs that reach the output ------------------------------------------------------------------


def reaching_inputs(posterior: FittedNetwork, keep: Mapping[str, Tensor] | None = None) -> Tensor:
    """Which inputs have an active path to the output of the masked network.

    A path leads from an input through kept units, along weights that are not 0. In a fully
    connected network every kept input has one unless a layer keeps nothing; where single weights
    are pruned, or layers are grouped, it may have none.

    Args:
        posterior: any.
        keep: masks by group; the default rule's when absent.

    Returns:
        ``(inputs,)`` bool.
    """
    keep = posterior.keep() if keep is None else keep
    parameters = posterior.masked_parameters(keep)
    gate = keep.get("input")
    return _connected_inputs(posterior.model.graph, parameters, gate)


def _connected_inputs(
    graph: Graph, parameters: Mapping[str, Tensor], gate: Tensor | None
) -> Tensor:
    if gate is not None:
        parameters = graph.scale_columns(parameters, "input", gate)
    every = torch.ones(graph["input"].size, dtype=torch.bool)
    return graph.connected(parameters).get("input", every)


@torch.no_grad()
def input_probability(posterior: FittedNetwork, num_samples: int = 200) -> Tensor:
    """Probability under q that an input has an active path to the output.

    The share of hard draws in which the input is in and is connected: for a gated input at most its
    PIP, by the chance that a layer on the way keeps no unit.

    Args:
        posterior: any.
        num_samples: draws; the standard error of a probability p is √(p(1−p)/num_samples).

    Returns:
        ``(inputs,)``, float64.
    """
    model, graph = posterior.model, posterior.model.graph
    total = torch.zeros(graph["input"].size, dtype=torch.float64)
    for one in posterior.network_draws(num_samples):
        total += _connected_inputs(graph, model.parameters_of(one.rows), one.gate).double()
    return total / num_samples


@dataclass(frozen=True)
class InputSelection:
    """Selected inputs, with what the posterior says of the errors among them.

    Attributes:
        selected: mask of the inputs.
            Shape: (inputs,).
        probability: of every input.
            Shape: (inputs,).
        false_discovery_rate: expected share of the selected that do not matter.
        missed: expected number of inputs that matter and are not selected.
        objective: what the probabilities belong to; None where only they were given.
    """

    selected: Tensor
    probability: Tensor
    false_discovery_rate: float
    missed: float
    objective: Objective | None = None

    @property
    def indices(self) -> list[int]:
        """Of the selected inputs, the most probable first."""
        order = self.probability.argsort(descending=True, stable=True).tolist()
        return [i for i in order if bool(self.selected[i])]

    def __str__(self) -> str:
        return (
            f"{int(self.selected.sum())} of {len(self.selected)} inputs selected, expected false "
            f"discovery rate {self.false_discovery_rate:.3f}, expected missed {self.missed:.2f}"
            + ("" if self.objective is None else f" ({self.objective})")
        )


def false_discovery_rate(probability: Tensor, selected: Tensor) -> float:
    r"""Bayesian false-discovery rate, :math:`\frac{1}{|S|} Σ_{j ∈ S} (1 − p_j)`; 0 for none.

    Right as far as the probabilities are; `select_inputs` of a posterior says what they belong to.

    Args:
        probability: that each one is in.
            Shape: (n,).
        selected: mask S.
            Shape: (n,).

    Source: Newton, Noueiry, Sarkar, Ahlquist, Biostatistics 5 (2004).
    """
    chosen = probability[selected]
    return float((1 - chosen).double().mean()) if len(chosen) else 0.0


def within_false_discovery_rate(probability: Tensor, level: float) -> Tensor:
    """The largest set, by falling probability, whose Bayesian false-discovery rate is ≤ ``level``.

    Args:
        probability: that each one is in.
            Shape: (n,).
        level: in [0, 1).

    Returns:
        Mask, ``(n,)``.

    Raises:
        ValueError: the level is out of range.
    """
    if not 0 <= level < 1:
        raise ValueError(f"expected a level in [0, 1), got {level}")
    values, order = probability.double().sort(descending=True, stable=True)
    rates = (1 - values).cumsum(0) / torch.arange(1, len(values) + 1)
    # Rates rise along the order; the tolerance is for their rounding.
    mask = torch.zeros(len(values), dtype=torch.bool)
    mask[order[rates <= level + 1e-12]] = True
    return mask


def select_inputs(
    probability: Tensor | FittedNetwork | Sequence[FittedNetwork],
    *,
    level: float | None = None,
    threshold: float = 0.5,
) -> InputSelection:
    """Variable selection from probabilities, with its expected errors.

    Args:
        probability: a posterior, or several of one model (of different seeds, say, whose
            probabilities are averaged), which know what theirs belong to; or numbers, about which
            nothing is known: `input_probability`, or the PIPs of the group ``"input"``.
            Shape: (inputs,).
        level: largest Bayesian false-discovery rate, see `within_false_discovery_rate`.
        threshold: used without a level: select above it.

    Raises:
        ValueError: a posterior has no gates on its inputs, or their logits came to rest where the
            KL was cheap: false-discovery rates of such probabilities were measured at 0.9 where
            they claimed 0.04.
    """
    objective = None
    if not isinstance(probability, Tensor):
        posteriors = _posteriors(probability)
        objectives = [objective_of(posterior) for posterior in posteriors]
        unsettled = [one for one in objectives if not one.settled]
        if unsettled and not math.isnan(unsettled[0].kl_weight):
            raise ValueError(
                "expected inclusion probabilities of the evidence lower bound, got: "
                f"{unsettled[0]}; train with kl_weight=constant() "
                "(--kl-start 1 --kl-hold 0 --kl-rise 0), the default with prune_inputs"
            )
        objective = dataclasses.replace(
            objectives[0],
            seeds=len(posteriors),
            chain=all(one.chain for one in objectives),
            apart=max(one.apart for one in objectives),
        )
        probability = torch.stack([one.inclusion()["input"] for one in posteriors]).mean(0)
    probability = probability.detach().double().cpu()
    if probability.dim() != 1 or not bool(((probability >= 0) & (probability <= 1)).all()):
        raise ValueError(
            "expected probabilities in [0, 1], one for each input, got shape "
            f"{tuple(probability.shape)} with values from {float(probability.min()):g} to "
            f"{float(probability.max()):g}"
        )
    if level is None:
        selected = probability > threshold
    else:
        selected = within_false_discovery_rate(probability, level)
    return InputSelection(
        selected,
        probability,
        false_discovery_rate(probability, selected),
        float(probability[~selected].sum()),
        objective,
    )


def _posteriors(given: FittedNetwork | Sequence[FittedNetwork]) -> Sequence[FittedNetwork]:
    posteriors = given if isinstance(given, Sequence) else [given]
    for posterior in posteriors:
        if not isinstance(posterior, FittedNetwork):
            raise ValueError(f"expected a posterior or probabilities of inputs, got {posterior!r}")
        if "input" not in posterior.guide_inclusion():
            raise ValueError(
                f"the posterior of {type(posterior.model).__name__} has no gates on its inputs; "
                "make the model with prune_inputs=True"
            )
    return posteriors


# -- sets of inputs that stand in for one another --------------------------------------------------


@dataclass(frozen=True)
class InputSets:
    """Inputs in sets within which they are correlated; ``str()`` prints those that may matter.

    Attributes:
        members: the inputs of every set, the most probable first.
        probability: that at least one of a set is in.
            Shape: (sets,).
        expected: number of its inputs that are in.
            Shape: (sets,).
        spread: largest less smallest probability over the posteriors; 0 for one.
            Shape: (sets,).
    """

    members: tuple[tuple[int, ...], ...]
    probability: Tensor
    expected: Tensor
    spread: Tensor

    def select(self, level: float) -> list[tuple[int, ...]]:
        """The sets within a Bayesian false-discovery rate, see `within_false_discovery_rate`."""
        chosen = within_false_discovery_rate(self.probability, level)
        return [self.members[i] for i in chosen.nonzero().flatten().tolist()]

    def __str__(self) -> str:
        lines = ["at least one  expected  spread  inputs"]
        for i in self.probability.argsort(descending=True, stable=True).tolist():
            if self.probability[i] > 0.05:
                inputs = ", ".join(map(str, self.members[i]))
                lines.append(
                    f"{float(self.probability[i]):12.3f}  {float(self.expected[i]):8.2f}  "
                    f"{float(self.spread[i]):6.2f}  {inputs}"
                )
        return "\n".join(lines)


def input_sets(
    posteriors: FittedNetwork | Sequence[FittedNetwork], x: Tensor, *, correlation: float = 0.7
) -> InputSets:
    """Which sets of correlated inputs matter, where which of them does cannot be told.

    Of near-copies each may have a small probability while it is certain that one of them is in.
    Inputs are put together by average linkage while their mean absolute correlation is at least
    ``correlation``; the probability that at least one is in is counted in draws of supports: of the
    chain that `fit` ran where there is one, otherwise of the guide, which has them independent.

    Args:
        posteriors: one, or several of one model, whose draws are put together.
        x: inputs of the training data.
            Shape: (N, inputs).
        correlation: in (0, 1].

    Raises:
        ValueError: a posterior has no gates on its inputs, the data are no table of them, or the
            correlation is out of range.
    """
    from scipy.cluster.hierarchy import fcluster, linkage

    found = _posteriors(posteriors)
    size = found[0].model.graph["input"].size
    if x.dim() != 2 or x.shape[1] != size:
        raise ValueError(f"expected a table of {size} inputs, (N, {size}), got {tuple(x.shape)}")
    if not 0 < correlation <= 1:
        raise ValueError(f"expected a correlation in (0, 1], got {correlation}")
    related = torch.corrcoef(x.detach().double().cpu().T).reshape(size, size).abs()
    distance = (1 - related.nan_to_num(0.0)).clamp_min(0)
    upper = torch.triu_indices(size, size, 1)
    labels = torch.ones(1, dtype=torch.long)
    if size > 1:
        tree = linkage(distance[upper[0], upper[1]].numpy(), "average")
        labels = torch.from_numpy(fcluster(tree, 1 - correlation, "distance")).long()
    supports = [_supports(posterior) for posterior in found]
    pip = torch.stack([one.inclusion()["input"] for one in found]).mean(0)
    members, least, expected, spread = [], [], [], []
    for label in labels.unique().tolist():
        own = (labels == label).nonzero().flatten()
        chances = torch.stack([draws[:, own].any(1).double().mean() for draws in supports])
        if len(own) == 1:  # known more precisely than by a share of draws
            chances = torch.stack([one.inclusion()["input"][own[0]] for one in found])
        members.append(tuple(own[pip[own].argsort(descending=True, stable=True)].tolist()))
        least.append(chances.mean())
        expected.append(pip[own].sum())
        spread.append(chances.max() - chances.min())
    return InputSets(tuple(members), *map(torch.stack, (least, expected, spread)))


def _supports(posterior: FittedNetwork, count: int = 1000) -> Tensor:
    """Draws of which inputs are in, ``(draws, inputs)``."""
    chain = posterior.guide.chain()
    if chain is not None:
        return chain[1].cpu()
    generator = torch.Generator().manual_seed(0)
    pip = posterior.guide_inclusion()["input"]
    return torch.rand(count, len(pip), generator=generator, dtype=pip.dtype) < pip
