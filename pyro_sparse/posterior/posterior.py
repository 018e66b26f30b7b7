"""`Posterior`: a model with its fitted guide, and everything that one asks of it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from pyro_sparse.graph import evaluating
from pyro_sparse.infer import check_data
from pyro_sparse.inputs import as_rows

from . import arviz
from .calibration import (
    PredictiveCalibration,
    calibrate,
    class_probabilities,
    fitted_temperature,
    predictive_scores,
)
from .contraction import Contraction, Radius, contraction, radius
from .diagnostics import KHat, khat
from .draws import scoring
from .metrics import (
    mutual_information,
    out_of_distribution_auroc,
    predictive_entropy,
)
from .network import FittedNetwork, SelectionRule
from .record import record
from .summary import Objective, Summary, objective, summarise

__all__ = ["Posterior"]


class Posterior(FittedNetwork):
    """What the data say about the network, by the fitted guide.

    Dropout, normalisations and the like are in eval mode for everything here.

    Args:
        model: the model.
        guide: its guide, after training; one of your own too, see
            :class:`~pyro_sparse.guides.HandWritten`.
        inputs: those of the training data, for networks with batch normalisation: every draw is
            normalised by the statistics that it has on them (on `STATISTICS` of them, chosen at
            random), and so is the network of `refresh_statistics`. Without them there are only the
            running averages of training, over the noisy weights of many steps.
            Shape: (N, ...).
    """

    def summary(self, rule: SelectionRule | None = None) -> Summary:
        """A table by group: kept, expected kept with its interval, undecided, entropy.

        The last three are known where the posterior has inclusion probabilities.
        """
        return summarise(self, rule)

    def objective(self) -> Objective:
        """What the inclusion probabilities belong to."""
        return objective(self)

    @scoring()
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

    @scoring()
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
        x = self._check_data(x, y)
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

    @scoring()
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
        x = self._check_data(x, y)
        likelihood = self.model.likelihood
        ensemble = self.draws(x, num_samples)
        latents = {name: value.to(x.device) for name, value in self.mean_latents().items()}
        compact = [(self.masked(x, keep), latents)]
        return {
            "ensemble": calibrate(likelihood, ensemble, y, target_scale, temperature),
            "compact": calibrate(likelihood, compact, y, target_scale),
        }

    @scoring()
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
        made = record(self, x, y, num_samples, rows, batch_size)
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
        x = self._check_data(x, y)
        if len(x) != self.model.num_data:
            raise ValueError(
                f"expected all {self.model.num_data} training examples, got {len(x)}: the "
                "importance ratios are those of the whole posterior"
            )
        x, y = x.to(self._device), y.to(self._device)
        return khat(self.model, self.guide, x, y, num_samples=num_samples, **options)

    def _check_data(self, x: Any, y: Tensor) -> Any:
        with evaluating(self.model.net):
            check_data(self.model, x, y, "examples to score")
        return as_rows(x)

    # -- has it contracted -------------------------------------------------------------------------

    def contraction(
        self, truth: Mapping[str, Tensor] | None = None, num_samples: int = 1000
    ) -> Contraction:
        """1 − Var_q/Var_p and z-scores by group, see :func:`~.contraction.contraction`."""
        return contraction(self, truth, num_samples)

    def radius(self, x: Tensor, reference: Tensor | None = None, num_samples: int = 200) -> Radius:
        """Distances of draws' predictions from a reference, see :func:`~.contraction.radius`."""
        return radius(self, x, reference, num_samples)
