"""A network with its fitted guide: which units are in, the networks they make, and their draws."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import singledispatch
from typing import Any, NamedTuple, Protocol

import torch
from pyro.poutine.messenger import Messenger
from torch import Tensor

from pyro_sparse import nets
from pyro_sparse.graph import Group, evaluating
from pyro_sparse.guides import GroupGuide, as_guide
from pyro_sparse.inputs import Several, as_rows, tensors_of
from pyro_sparse.models import SparseModel
from pyro_sparse.precision import full_precision
from pyro_sparse.ranges import whole

from .calibration import class_probabilities, temper
from .draws import Draw, draw, measuring
from .fitted import Fitted

__all__ = ["FittedNetwork", "NetworkDraw", "SelectionRule", "default_rule"]

STATISTICS = 2048
"""Examples by which batch normalisations are normalised anew."""
STATISTICS_BATCH = 256


class SelectionRule(Protocol):
    """Anything that maps a posterior to ``{group: mask}``."""

    def __call__(self, posterior: FittedNetwork) -> dict[str, Tensor]: ...


@dataclass(frozen=True)
class OwnCut:
    """The rule of a guide's own: its first offer that decides about units, at that one's cut.

    Units that are connected, where nothing in the guide decides, see
    :class:`~pyro_sparse.posterior.selection.Connected`.
    """

    def __call__(self, posterior: FittedNetwork) -> dict[str, Tensor]:
        for offer in posterior.offers().values():
            if offer.cut is not None:
                return offer.kept()
        return posterior.model.graph.connected(posterior.mean_parameters())


@singledispatch
def default_rule(model: SparseModel) -> SelectionRule:
    """The rule by which a model's posterior is pruned where none is given."""
    return OwnCut()


class NetworkDraw(NamedTuple):
    """One draw of a network.

    rows:    effective rows by group, ``(units, row length)``; 0 for what was pruned for good
    gate:    on the input features, ``(features,)``, or None; of the guide 0 for pruned ones
    latents: of the likelihood
    joint:   of all sites, with their densities
    """

    rows: dict[str, Tensor]
    gate: Tensor | None
    latents: dict[str, Tensor]
    joint: Draw

    @property
    def numbers(self) -> dict[str, Tensor]:
        """Rows by group, the gate as ``"input"``, the likelihood's latents by name."""
        gate = {} if self.gate is None else {"input": self.gate}
        return {**self.rows, **gate, **self.latents}


class FittedNetwork(Fitted):
    """Model and guide of a network; the questions about it are asked of `Posterior`.

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

    model: SparseModel
    guide: GroupGuide

    def __init__(
        self,
        model: SparseModel,
        guide: GroupGuide | Callable[..., Any],
        inputs: Any = None,
    ) -> None:
        super().__init__(model, as_guide(model, guide))
        self._normalising: tuple[Tensor, ...] = ()
        inputs = as_rows(inputs)
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

    def keep(self, rule: SelectionRule | None = None) -> dict[str, Tensor]:
        """Masks of the units to keep, for every group of the network.

        Args:
            rule: a selection rule; the model's default (`default_rule`) when absent.

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
            device = self.model.output_scale.device
            example = self.model.graph.example.map(lambda value: value.to(device))
            self._dense_macs = nets.count_macs(self.model.net, example)
        return self._dense_macs - self.model.graph.macs_saved(keep)

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
        x = self._rows(x)
        keep = self.keep() if keep is None else keep
        run = self._masked_network(keep, self.mean_parameters())
        with evaluating(self.model.net), full_precision(self._device):
            parts = [run(part.to(self._device)).to(x.device) for part in x.split(batch_size)]
        return torch.cat(parts)

    def _rows(self, x: Any) -> Any:
        """Inputs, one tensor or several, that go with the model's example."""
        x, example = as_rows(x), self.model.graph.example
        given = tensors_of(x) if isinstance(x, Several | Tensor) else []
        shapes, wanted = ([v.shape[1:] for v in values] for values in (given, example.tensors))
        named = not isinstance(x, Several) or example.like(self.model.net, x)
        if shapes != wanted or not named:
            got = f"shape {tuple(x.shape)}" if hasattr(x, "shape") else type(x).__name__
            raise ValueError(
                f"expected inputs as in the model's example ({example.described}) with any number "
                f"of rows, got {got}"
            )
        return x

    def _masked_network(
        self, keep: Mapping[str, Tensor], parameters: Mapping[str, Tensor]
    ) -> Callable[[Tensor], Tensor]:
        """The network at these parameters with excluded units off, in the mode it is in."""
        masked = self.model.graph.masked_parameters(parameters, keep)
        model, gate = self.model, keep.get("input")
        factor = None if gate is None or bool(gate.all()) else gate.to(model.output_scale)
        return lambda x: model.network_output(x, masked, factor)

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
        x = self._rows(x)
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

    # -- draws -------------------------------------------------------------------------------------

    def network_draws(
        self, num_samples: int, *, prior: bool = False, handler: Messenger | None = None
    ) -> Iterator[NetworkDraw]:
        """Draws of rows, input gate and the likelihood's latents.

        Args:
            num_samples: how many.
            prior: of the prior in place of the guide.
            handler: how units are drawn, see :func:`~.draws.draw`; hard inclusions when absent.

        Raises:
            ValueError: fewer than one draw.
            NotImplementedError: an improper prior.
        """
        whole(num_samples=num_samples)
        model, support = self.model, self.model.support
        guide = None if prior else self.guide
        for _ in range(num_samples):
            # By draw, so that no context is left open between two of them.
            with measuring(model, self.guide):
                joint = draw(model.statements, guide, handler=handler)
            rows, gate, latents = joint.value
            rows = {name: support.rows(name, value) for name, value in rows.items()}
            if gate is not None and not prior and support.restricted and "input" in support:
                gate = gate * support["input"].to(gate.dtype)
            yield NetworkDraw(rows, gate, latents, joint)

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
        x = as_rows(x)
        for one in self.network_draws(num_samples):
            yield (
                self.outputs(x, one.rows, one.gate, batch_size),
                {name: value.to(x.device) for name, value in one.latents.items()},
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
