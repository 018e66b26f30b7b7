"""`Posterior`: a model with its fitted guide."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import pyro
import pyro.poutine as poutine
import torch
from torch import Tensor
from torch.func import functional_call

from pyro_sparse import nets
from pyro_sparse.distributions import TruncatedLogNormal
from pyro_sparse.graph import Group, evaluating
from pyro_sparse.guides import GroupGuide, Reducible
from pyro_sparse.models import SparseModel
from pyro_sparse.modules import own_parameters
from pyro_sparse.names import UNDECIDED
from pyro_sparse.precision import full_precision

from .calibration import (
    PredictiveCalibration,
    calibrate,
    class_probabilities,
    fitted_temperature,
    predictive_scores,
    temper,
)
from .contraction import Contraction, Radius, contraction, radius
from .diagnostics import KHat, khat
from .exact import ExactDraws
from .metrics import (
    mutual_information,
    out_of_distribution_auroc,
    predictive_entropy,
)
from .selection import SelectionRule, default_rule
from .summary import GroupSummary, Objective, Summary

__all__ = ["Posterior"]

STATISTICS = 2048
"""Examples by which batch normalisations are normalised anew."""
STATISTICS_BATCH = 256


class Posterior:
    """What the data say about the network, by the fitted guide.

    Dropout, normalisations and the like are in eval mode for everything here.

    Args:
        model: the model.
        guide: its guide, after training.
        inputs: those of the training data, for networks with batch normalisation: every draw is
            normalised by the statistics that it has on them (on `STATISTICS` of them, chosen at
            random), and so is the network of `refresh_statistics`. Without them there are only the
            running averages of training, over the noisy weights of many steps.
            Shape: (N, ...).
    """

    def __init__(self, model: SparseModel, guide: GroupGuide, inputs: Tensor | None = None) -> None:
        self.model = model
        self.guide = guide
        self._normalising: tuple[Tensor, ...] = ()
        if inputs is not None and nets.normalisations(model.net):
            # In random order: data sets are often sorted by class.
            generator = torch.Generator().manual_seed(0)
            chosen = torch.randperm(len(inputs), generator=generator)[:STATISTICS]
            size = min(len(chosen), STATISTICS_BATCH)
            chosen = chosen[: len(chosen) // size * size].to(inputs.device)
            self._normalising = inputs[chosen].split(size)
        self._dense_macs: int | None = None

    # -- which units -----------------------------------------------------------------------------

    def inclusion(self) -> dict[str, Tensor]:
        """Posterior inclusion probabilities by group.

        Of hidden units the guide's γ. Of inputs those of a chain over supports that `fit` ran at
        its end, where it did: it knows of correlated inputs, which the guide has independent, see
        :mod:`pyro_sparse.infer.supports`. `objective` says which they are. Groups that the model
        cannot exclude are absent; a dense model has none.

        Returns:
            ``{group: (units,)}``, on the CPU.
        """
        found, chain = self.guide_inclusion(), self.guide.chain()
        if chain is not None:
            found["input"] = chain[0].double().cpu()
        return found

    def objective(self) -> Objective:
        """What the inclusion probabilities belong to."""
        weights = getattr(self.guide, "inclusion_kl_weights", None)
        lowest, last = (math.nan, math.nan) if weights is None else weights.tolist()
        return Objective(
            last,
            lowest,
            getattr(self.guide, "inclusion", None),
            self.guide.chain() is not None,
        )

    def guide_inclusion(self) -> dict[str, Tensor]:
        """γ by group under the guide, by which units are kept and networks drawn.

        Returns:
            ``{group: (units,)}``, on the CPU.
        """
        return {
            name: logits.detach().double().sigmoid().cpu()
            for name, logits in self.guide.inclusion_logits().items()
        }

    def noise(self) -> dict[str, TruncatedLogNormal]:
        """Laws ``(units,)`` of the multiplicative noise by group, in float64; empty without one."""
        return self.guide.noise()

    def gaussians(self) -> dict[str, Reducible]:
        """Gaussian posterior and prior of the weights by group; empty where they are not."""
        return self.guide.gaussians()

    def log_alpha(self) -> dict[str, Tensor]:
        """Log dropout rates log α ``(units,)`` of units by group; empty without any."""
        return self.guide.log_alpha()

    def log_scales(self) -> dict[str, Tensor]:
        """Mean log scale ``(units,)`` of units by group; empty without any, or with a spike."""
        return self.guide.log_scales()

    def row_variances(self) -> dict[str, Tensor]:
        """Posterior variance of every weight, ``(units, row length)`` by group.

        For included units, and marginal over their scales; empty where rows are not Gaussian.
        """
        return self.guide.row_variances()

    def keep(self, rule: SelectionRule | None = None) -> dict[str, Tensor]:
        """Masks of the units to keep, for every group of the network.

        Args:
            rule: a selection rule; the model's default (`selection.default_rule`) when absent.

        Returns:
            ``{group: (units,) bool}``, on the CPU; all True for groups that are never pruned. What
            was pruned for good (`prune`) is False whatever the rule says.

        Raises:
            NotOfferedError: the rule needs what this posterior does not have.
            ValueError: the rule is about single weights; `prune` takes those.
        """
        chosen = (rule or default_rule(self.model))(self)
        keep = {}
        for group in self.model.graph:
            mask = chosen.get(group.name, torch.ones(group.size, dtype=torch.bool)).cpu()
            if mask.shape != (group.size,):
                raise ValueError(
                    f"expected masks of units from the rule, ({group.size},) for {group.name!r}, "
                    f"got {tuple(mask.shape)}: a rule about single weights goes to prune()"
                )
            if group.name in self.model.support and group.prunable:
                mask = mask & self.model.support.units(group.name).cpu()
            keep[group.name] = mask
        return keep

    def prune(self, rule: SelectionRule | None = None) -> int:
        """Take out for good what a rule drops: units, or single weights where the model allows.

        The model and its guide go on without it: it pays no KL, and further training leaves it at
        0. See :mod:`.pruning` for loops of training and pruning.

        Args:
            rule: a selection rule; the model's default when absent.

        Returns:
            How many units or weights were taken out.
        """
        removed = self.model.support.restrict((rule or default_rule(self.model))(self))
        self.guide.reduced()
        return removed

    def prunable_groups(self) -> list[Group]:
        """The groups whose units this posterior may drop, in the network's order."""
        inclusion, support = self.inclusion(), self.model.support
        return [
            group
            for group in self.model.graph
            if group.name in inclusion or (group.prunable and group.name in support)
        ]

    def macs(self, keep: Mapping[str, Tensor]) -> int:
        """Multiply-accumulate operations of the compact network for one input.

        Without those of excluded units that have to stay for the constant that they emit, see
        :mod:`pyro_sparse.export.compact`.
        """
        if self._dense_macs is None:
            shape = (1, *self.model.example_shape[1:])
            example = next(self.model.net.buffers()).new_zeros(shape)
            self._dense_macs = nets.count_macs(self.model.net, example)
        return self._dense_macs - self.model.graph.macs_saved(keep)

    def summary(self, rule: SelectionRule | None = None) -> Summary:
        """A table by group: kept, expected kept with its interval, undecided, entropy.

        The last three are known where the posterior has inclusion probabilities.
        """
        keep = self.keep(rule)
        inclusion = self.inclusion()
        groups = []
        for group in self.prunable_groups():
            name = group.name
            pip = inclusion.get(name)
            counts: dict[str, Any] = {
                "group": name,
                "units": group.size,
                "kept": int(keep[name].sum()),
            }
            if pip is None:
                groups.append(GroupSummary(**counts))
                continue
            if name == "input" and self.guide.chain() is not None:
                draws = self.guide.chain()[1].sum(1).cpu()
                law = torch.bincount(draws, minlength=len(pip) + 1).double() / len(draws)
            else:
                law = _poisson_binomial(pip)
            cumulative = law.cumsum(0)
            entropy = torch.special.entr(pip) + torch.special.entr(1 - pip)
            groups.append(
                GroupSummary(
                    **counts,
                    expected=float(pip.sum()),
                    low=int((cumulative < 0.025).sum()),
                    high=int((cumulative < 0.975).sum()),
                    undecided=int(((pip > UNDECIDED[0]) & (pip < UNDECIDED[1])).sum()),
                    entropy=float(entropy.sum()),
                )
            )
        return Summary(tuple(groups), self.objective() if inclusion else None)

    # -- the network they leave --------------------------------------------------------------------

    @torch.no_grad()
    def mean_parameters(self) -> dict[str, Tensor]:
        """The network's parameters with every unit included, at the posterior means.

        What was pruned for good is 0, and so are the weights that read a pruned input.
        """
        # A view of a parameter requires a gradient even where it is taken without.
        rows = {name: value.detach() for name, value in self.guide.mean_rows().items()}
        parameters = self.model.parameters_of(rows)
        scale, support = self.guide.mean_input(), self.model.support
        if "input" in support and support.restricted:
            inside = support["input"].to(self.model.output_scale.dtype)
            scale = inside if scale is None else scale * inside
        if scale is None:
            return parameters
        return self.model.graph.scale_columns(parameters, "input", scale)

    @torch.no_grad()
    def masked_parameters(self, keep: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        """As `mean_parameters`, with the rows of units that are not kept at 0."""
        keep = self.keep() if keep is None else keep
        return self.model.graph.masked_parameters(self.mean_parameters(), keep)

    @torch.no_grad()
    def masked(
        self, x: Tensor, keep: Mapping[str, Tensor] | None = None, batch_size: int = 4096
    ) -> Tensor:
        """The full-size network at posterior means with excluded units off.

        This is what the compact network must equal.

        Args:
            x: inputs.
                Shape: (batch, ...).
            keep: masks by group; the default rule's when absent.
            batch_size: examples that pass through the network at once.

        Returns:
            The network's raw output, ``(batch, ...)``, on the device of ``x``.
        """
        keep = self.keep() if keep is None else keep
        run = self._masked_network(keep, self.mean_parameters())
        with evaluating(self.model.net), full_precision(self._device):
            parts = [run(part.to(self._device)).to(x.device) for part in x.split(batch_size)]
        return torch.cat(parts)

    def _masked_network(
        self, keep: Mapping[str, Tensor], parameters: Mapping[str, Tensor]
    ) -> Callable[[Tensor], Tensor]:
        """The network at these parameters with excluded units off, in the mode it is in."""
        net, graph, gate = self.model.net, self.model.graph, keep.get("input")
        masked = graph.masked_parameters(parameters, keep)

        def run(x: Tensor) -> Tensor:
            if gate is not None and not bool(gate.all()):
                x = graph.gate_inputs(x, gate.to(x))
            return functional_call(net, masked, (x,))

        return run

    @property
    def _device(self) -> torch.device:
        return self.model.output_scale.device

    # -- batch normalisation -----------------------------------------------------------------------

    def refresh_statistics(self, keep: Mapping[str, Tensor] | None = None) -> None:
        """Estimate the network's running means and variances for what `masked` computes.

        At posterior means, with excluded units off, on the ``inputs`` given to this posterior. They
        are buffers of the model: its checkpoints and compact networks have them. Nothing happens
        without ``inputs``, or to a network without batch normalisation.

        Args:
            keep: masks by group; the default rule's when absent.
        """
        keep = self.keep() if keep is None else keep
        self._estimate(self._masked_network(keep, self.mean_parameters()))

    @contextlib.contextmanager
    def statistics_of(
        self, parameters: Mapping[str, Tensor], keep: Mapping[str, Tensor]
    ) -> Iterator[None]:
        """Context in which the network has the statistics of these parameters, masked.

        Args:
            parameters: of the network, by name.
            keep: masks by group.
        """
        with nets.kept_statistics(self.model.net):
            self._estimate(self._masked_network(keep, parameters))
            yield

    def _estimate(self, run: Callable[[Tensor], Tensor]) -> None:
        if self._normalising:
            batches = (batch.to(self._device) for batch in self._normalising)
            with full_precision(self._device):
                nets.estimate_statistics(self.model.net, run, batches)

    @torch.no_grad()
    def outputs(
        self,
        x: Tensor,
        rows: Mapping[str, Tensor],
        gate: Tensor | None = None,
        batch_size: int = 4096,
    ) -> Tensor:
        """The network's output at given rows, in eval mode, with statistics of its own.

        Args:
            x: inputs.
                Shape: (N, ...).
            rows: effective rows by group.
                Shape of each: (units, row length).
            gate: on the input features.
                Shape: (features,).
            batch_size: examples that pass through the network at once.

        Returns:
            ``(N, ...)``, on the device of ``x``.
        """
        model = self.model
        with (
            evaluating(model.net),
            nets.kept_statistics(model.net),
            full_precision(self._device),
        ):
            self._estimate(lambda batch: model.run(batch, rows, gate))
            parts = [
                model.run(part.to(self._device), rows, gate).to(x.device)
                for part in x.split(batch_size)
            ]
        return torch.cat(parts)

    def mean_latents(self) -> dict[str, Tensor]:
        """Posterior means of the likelihood's latents: those of the one network that is shipped."""
        family = self.guide.noise_precision
        return {} if family is None else {"noise_precision": family().mean.detach()}

    # -- predictions -------------------------------------------------------------------------------

    @torch.no_grad()
    def draws(
        self, x: Tensor, num_samples: int = 20, batch_size: int = 4096
    ) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
        """Draws of the posterior: the network's output, and the likelihood's latents.

        Each draw is one set of hard inclusions and weights for all of ``x``, and for its statistics
        where ``inputs`` were given.

        Args:
            x: inputs.
                Shape: (N, ...).
            num_samples: how many draws.
            batch_size: examples that pass through the network at once.

        Yields:
            Output ``(N, ...)`` and, for a likelihood with latents, their values, on the device of
            ``x``.
        """
        if num_samples < 1:
            raise ValueError(f"expected at least one draw, got num_samples={num_samples}")
        with own_parameters(self.model, self.guide), pyro.validation_enabled(False):
            for _ in range(num_samples):
                with ExactDraws():
                    trace = poutine.trace(self.guide).get_trace()
                with poutine.replay(trace=trace):
                    rows, gate = self.model.latents()
                    latents = self.model.likelihood.sites()
                yield (
                    self.outputs(x, rows, gate, batch_size),
                    {name: value.to(x.device) for name, value in latents.items()},
                )

    def predict(
        self, x: Tensor, num_samples: int = 20, batch_size: int = 4096, temperature: float = 1.0
    ) -> Tensor:
        """Draws of the likelihood's natural output: class probabilities, or the mean.

        Args:
            x: inputs.
                Shape: (N, ...).
            num_samples: how many draws; average over them for the ensemble's prediction.
            batch_size: examples that pass through the network at once.
            temperature: of that average, for classes; by `temperature`. See
                :func:`~pyro_sparse.posterior.calibration.temper`.

        Returns:
            ``(num_samples, N, ...)``.

        Raises:
            ValueError: a temperature other than 1 where targets are numbers.
        """
        likelihood = self.model.likelihood
        drawn = self.draws(x, num_samples, batch_size)
        natural = torch.stack([likelihood.natural(output) for output, _ in drawn])
        if temperature == 1:
            return natural
        tempered = temper(class_probabilities(likelihood, natural), temperature).to(natural.dtype)
        return tempered if tempered.dim() == natural.dim() else tempered[..., 1]

    def temperature(self, x: Tensor, y: Tensor, num_samples: int = 100) -> float:
        """The temperature at which the ensemble predicts these classes best.

        Args:
            x: inputs that training has not seen, and that no test is made on.
                Shape: (N, ...).
            y: their labels.
                Shape: (N,).
            num_samples: draws.

        Raises:
            ValueError: there are no rows, or targets are numbers.
        """
        probabilities = class_probabilities(self.model.likelihood, self.predict(x, num_samples))
        return fitted_temperature(probabilities, y)

    @torch.no_grad()
    def evaluate(
        self,
        x: Tensor,
        y: Tensor,
        num_samples: int = 20,
        keep: Mapping[str, Tensor] | None = None,
        target_scale: float = 1.0,
        temperature: float = 1.0,
    ) -> dict[str, float]:
        """Scores of the ensemble of draws beside those of the one network that is shipped.

        Args:
            x: inputs.
                Shape: (N, ...).
            y: targets.
                Shape: (N,).
            num_samples: draws of the ensemble.
            keep: masks by group; the default rule's when absent.
            target_scale: standard deviation that the targets were divided by: RMSE and NLL are
                given in the target's own unit.
            temperature: of the ensemble, see `predict`.

        Returns:
            ``accuracy_…`` and ``ece_…`` for classes, ``rmse_…`` for numbers, and ``nll_…`` (nats
            per example), each for ``ensemble`` and ``compact``; with standard errors by the rows,
            ``accuracy_ensemble_error`` and so on.
        """
        latents = {name: value.to(x.device) for name, value in self.mean_latents().items()}
        predictors: dict[str, Iterable[tuple[Tensor, dict[str, Tensor]]]] = {
            "ensemble": self.draws(x, num_samples),
            "compact": [(self.masked(x, keep), latents)],
        }
        scores = {}
        for name, draws in predictors.items():
            own = temperature if name == "ensemble" else 1.0
            found = predictive_scores(self.model.likelihood, draws, y, target_scale, own)
            for key, value in found.items():
                score, *error = key.split("_")
                scores["_".join([score, name, *error])] = value
        return scores

    def calibration(
        self,
        x: Tensor,
        y: Tensor,
        num_samples: int = 100,
        keep: Mapping[str, Tensor] | None = None,
        target_scale: float = 1.0,
        temperature: float = 1.0,
    ) -> dict[str, PredictiveCalibration]:
        """How far predictions can be believed: of the ensemble, and of the one compact network.

        Args:
            x: inputs.
                Shape: (N, ...).
            y: targets.
                Shape: (N,).
            num_samples: draws of the ensemble; the 95 % interval needs more than a mean does.
            keep: masks by group; the default rule's when absent.
            target_scale: standard deviation that the targets were divided by.
            temperature: of the ensemble, see `predict`.

        Returns:
            ``{"ensemble": ..., "compact": ...}``.

        Raises:
            ValueError: the likelihood is neither one of classes nor normal.
        """
        likelihood = self.model.likelihood
        ensemble = self.draws(x, num_samples)
        latents = {name: value.to(x.device) for name, value in self.mean_latents().items()}
        compact = [(self.masked(x, keep), latents)]
        return {
            "ensemble": calibrate(likelihood, ensemble, y, target_scale, temperature),
            "compact": calibrate(likelihood, compact, y, target_scale),
        }

    def out_of_distribution(
        self, inside: Tensor, outside: Tensor, num_samples: int = 50
    ) -> dict[str, float]:
        """How well the ensemble's uncertainty tells unfamiliar inputs from familiar ones.

        Args:
            inside: inputs like the training data, which were not trained on.
                Shape: (N, ...).
            outside: others.
                Shape: (M, ...).
            num_samples: draws of the ensemble.

        Returns:
            ``auroc_entropy`` and ``auroc_mutual_information``, each in [0, 1]; ½ is chance.

        Raises:
            ValueError: targets are not classes.
        """
        # The same networks for both: one pass over all inputs.
        draws = self.predict(torch.cat([inside, outside]), num_samples)
        probabilities = class_probabilities(self.model.likelihood, draws)
        scores = {}
        for name, measure in (
            ("entropy", predictive_entropy),
            ("mutual_information", mutual_information),
        ):
            values = measure(probabilities)
            scores[f"auroc_{name}"] = out_of_distribution_auroc(
                values[: len(inside)], values[len(inside) :]
            )
        return scores

    def to_arviz(
        self,
        x: Tensor | None = None,
        y: Tensor | None = None,
        num_samples: int = 500,
        *,
        rows: bool = False,
        batch_size: int = 4096,
    ) -> Any:
        """Draws of everything, for ArviZ: an InferenceData with 0.2x, a DataTree with 1.x.

        The groups, of independent draws in one chain:

        - posterior, and prior where it is proper: ``{group}.inclusion`` (0 or 1, by unit),
          ``units_included`` (by group), ``{group}.norm`` of each unit's effective row, scales and
          noises under the names of their sites, ``noise_scale`` for numbers; with ``rows`` the
          effective ``{group}.rows``;
        - posterior_predictive and prior_predictive, given x: ``y`` with the observation noise, and
          ``mean`` or ``probability``;
        - log_likelihood and observed_data, given y;
        - sample_stats, given all of the training data: ``log_p``, the joint density, and
          ``log_q``, by which :func:`.arviz.loo` corrects for the guide;
        - constant_data: ``x``, and ``{group}.inclusion_probability``, which needs no draws.

        Args:
            x: inputs, or None for parameters only.
                Shape: (N, ...).
            y: their targets.
                Shape: (N,).
            num_samples: draws of posterior and prior.
            rows: record all weights, too; draws · weights numbers each.
            batch_size: examples that pass through the network at once.

        Raises:
            ValueError: no draws, or targets that do not go with the inputs.
        """
        from . import arviz, record

        made = record.record(self, x, y, num_samples, rows, batch_size)
        attrs = {"model": type(self.model).__name__, "num_data": self.model.num_data}
        return arviz.build(made.groups, made.coords, made.dims, attrs)

    # -- can it be trusted -------------------------------------------------------------------------

    def khat(self, x: Tensor, y: Tensor, num_samples: int = 1000, **options: Any) -> KHat:
        """Pareto k-hat of the guide, joint and by block, with the importance-weighted ELBO.

        Args:
            x: inputs of all training examples.
                Shape: (N, ...).
            y: their targets.
                Shape: (N,).
            num_samples: draws.
            options: see :func:`~pyro_sparse.posterior.diagnostics.khat`.

        Raises:
            ValueError: these are not ``num_data`` examples: a part of the data would be scaled up
                to all, which is another posterior.
        """
        if len(x) != self.model.num_data:
            raise ValueError(
                f"expected all {self.model.num_data} training examples, got {len(x)}: the "
                "importance ratios are those of the whole posterior"
            )
        x, y = x.to(self._device), y.to(self._device)
        return khat(self.model, self.guide, x, y, num_samples=num_samples, **options)

    # -- has it contracted -------------------------------------------------------------------------

    def contraction(
        self, truth: Mapping[str, Tensor] | None = None, num_samples: int = 1000
    ) -> Contraction:
        """1 − Var_q/Var_p and z-scores by group, see :func:`~.contraction.contraction`."""
        return contraction(self, truth, num_samples)

    def radius(self, x: Tensor, reference: Tensor | None = None, num_samples: int = 200) -> Radius:
        """Distances of draws' predictions from a reference, see :func:`~.contraction.radius`."""
        return radius(self, x, reference, num_samples)


def _poisson_binomial(probabilities: Tensor) -> Tensor:
    """Law of a sum of independent Bernoullis, ``(n + 1,)``, by convolution in float64."""
    law = torch.ones(1, dtype=torch.float64)
    for p in probabilities.tolist():
        law = torch.cat([law * (1 - p), law.new_zeros(1)]) + torch.cat([law.new_zeros(1), law * p])
    return law
