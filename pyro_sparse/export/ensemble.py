"""Uncertainty without Pyro: compact networks drawn from a posterior, all with the same units."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from pyro_sparse.likelihoods import Likelihood
from pyro_sparse.posterior import Posterior, SelectionRule
from pyro_sparse.posterior.calibration import predictive_scores
from pyro_sparse.posterior.draws import Included

from ._compact import compact_network
from .shipping import check_compact

__all__ = ["Ensemble", "compact_draws", "ensemble_scores"]


class Ensemble(nn.Module):
    """Networks of the same inputs and outputs, run side by side.

    ``forward`` maps inputs ``(batch, ...)`` to outputs ``(draws, batch, ...)``. The output of an
    average prediction is the average of what each network's output *means*: for classes,
    ``ensemble(x).softmax(-1).mean(0)``.

    Args:
        nets: at least one network.
        latents: the likelihood's latents that were drawn with each network, such as
            ``noise_precision``.
            Shape of each: (draws,).
    """

    def __init__(
        self, nets: Sequence[nn.Module], latents: Mapping[str, Tensor] | None = None
    ) -> None:
        super().__init__()
        if not nets:
            raise ValueError("expected at least one network")
        self.nets = nn.ModuleList(nets)
        self.draws = len(nets)
        self.latents = dict(latents or {})

    def forward(self, inputs: Tensor) -> Tensor:
        return torch.stack([net(inputs) for net in self.nets])


def _included_draws(
    posterior: Posterior, draws: int
) -> Iterator[tuple[dict[str, Tensor], dict[str, Tensor]]]:
    """Draws of the network's parameters given that all units are in, and the likelihood's latents.

    The counterpart of :meth:`Posterior.mean_parameters`, which is their mean.
    """
    model = posterior.model
    for one in posterior.network_draws(draws, handler=Included()):
        parameters = model.parameters_of(one.rows)
        if one.gate is not None:
            # A noise on the inputs moves into the columns that read them; a gate is 1 here.
            parameters = model.graph.scale_columns(parameters, "input", one.gate)
        yield parameters, one.latents


def compact_draws(
    posterior: Posterior,
    keep: Mapping[str, Tensor] | None = None,
    *,
    draws: int = 20,
    rule: SelectionRule | None = None,
    seed: int = 0,
) -> Ensemble:
    """Compact networks whose weights are drawn from the posterior, given the units that are kept.

    All draws have the units of one mask, so each is as small as the network of
    :func:`~pyro_sparse.export.compact`. What they share is certain: uncertainty about which units
    are in, which :meth:`~pyro_sparse.posterior.Posterior.predict` averages over, is not in them.

    Args:
        posterior: model with fitted guide.
        keep: masks ``(units,)`` by group; by ``rule`` when absent.
        draws: how many networks.
        rule: a selection rule; the model's default when absent.
        seed: of the draws; torch's global generator is left as it was.

    Returns:
        An :class:`Ensemble`, on the CPU and in eval mode, for :func:`~pyro_sparse.export.save`.

    Raises:
        ValueError: fewer than one draw; a layer would keep no unit; a mask does not fit its group.
        RuntimeError: a compact network does not compute what the masked one does.
    """
    if draws < 1:
        raise ValueError(f"expected at least one draw, got draws={draws}")
    keep = posterior.keep(rule) if keep is None else keep
    model = posterior.model
    networks, noises = [], []
    with torch.random.fork_rng(range(torch.cuda.device_count())):
        torch.manual_seed(seed)
        for parameters, latents in _included_draws(posterior, draws):
            with posterior.statistics_of(parameters, keep):
                small = compact_network(
                    model.net, model.graph, parameters, keep, output=model.output
                )
                check_compact(model, parameters, keep, small)
            networks.append(small)
            noises.append(latents)
    ensemble = Ensemble(
        networks,
        {name: torch.stack([drawn[name] for drawn in noises]).cpu() for name in noises[0]},
    )
    ensemble.compaction = networks[0].compaction
    ensemble.input_shape = tuple(model.example_shape[1:])  # type: ignore[assignment]
    return ensemble.eval().requires_grad_(True)


@torch.no_grad()
def ensemble_scores(
    ensemble: Ensemble,
    likelihood: Likelihood,
    x: Tensor,
    y: Tensor,
    target_scale: float = 1.0,
    batch_size: int = 4096,
    temperature: float = 1.0,
) -> dict[str, float]:
    """Scores of the average prediction of an ensemble, as `Posterior.evaluate` has for others.

    Args:
        ensemble: by `compact_draws`.
        likelihood: the model's.
        x: inputs.
            Shape: (N, ...).
        y: targets.
            Shape: (N,).
        target_scale: standard deviation that the targets were divided by.
        batch_size: examples that pass through the networks at once.
        temperature: of the average prediction of classes, see
            :func:`~pyro_sparse.posterior.calibration.temper`.

    Returns:
        ``accuracy`` and ``ece`` for classes, ``rmse`` for numbers, and ``nll``.
    """
    outputs = torch.cat([ensemble(part) for part in x.split(batch_size)], 1)
    draws = [
        (output, {name: values[draw] for name, values in ensemble.latents.items()})
        for draw, output in enumerate(outputs)
    ]
    scores = predictive_scores(likelihood, draws, y, target_scale, temperature)
    return {name: value for name, value in scores.items() if not name.endswith("_error")}
