"""What all models share: the network, its groups, and how sampled rows become its parameters."""

from __future__ import annotations

import contextlib
import copy
import logging
import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import pyro
import pyro.distributions as dist
import pyro.poutine as poutine
import torch
from pyro.distributions.torch_distribution import TorchDistributionMixin
from torch import Tensor, nn
from torch.func import functional_call

from pyro_sparse.distributions import SpikeAndSlab
from pyro_sparse.graph import (
    Graph,
    Group,
    Output,
    evaluating,
    groups,
    without_weight_norm,
)
from pyro_sparse.inputs import Example, Inputs
from pyro_sparse.likelihoods import Categorical, Likelihood
from pyro_sparse.modules import LocalPyroModule, own_parameters
from pyro_sparse.precision import network_autocast
from pyro_sparse.ranges import positive, whole
from pyro_sparse.threads import ALONE

from .inclusion import layerwise_inclusion_logits, logit
from .support import Support

__all__ = ["SparseModel", "positive"]

logger = logging.getLogger(__name__)


FEW_DATA = 1000
"""Up to so many training examples are few."""


def _probability(name: str, value: float) -> float:
    if not isinstance(value, int | float) or not 0 < value < 1:
        raise ValueError(f"expected {name} strictly between 0 and 1, got {value}")
    return logit(math.log(value))


def _template(net: nn.Module) -> nn.Module:
    """A copy of ``net`` whose parameters are buffers, and weight normalisations plain weights.

    The trained parameters live in the guide. As buffers the initial ones still move with
    ``.to(device)`` and stand in the state_dict, but no optimiser and no Pyro statement sees them.
    """
    net = copy.deepcopy(without_weight_norm(net))
    for module in net.modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is not None:
                del module._parameters[name]
                module.register_buffer(name, parameter.detach().clone())
    return net


@contextlib.contextmanager
def _with_buffers(net: nn.Module, values: Mapping[str, Tensor]) -> Iterator[None]:
    """``net`` with these tensors in place of buffers of these names."""
    with ALONE:
        split = [name.rpartition(".") for name in values]
        places = [(net.get_submodule(path)._buffers, name) for path, _, name in split]
        before = [owner[name] for owner, name in places]
        try:
            for (owner, name), value in zip(places, values.values(), strict=True):
                owner[name] = value
            yield
        finally:
            for (owner, name), buffer in zip(places, before, strict=True):
                owner[name] = buffer


def _learnt(name: str, value: float | str) -> bool:
    """Whether a scale is ``"learnt"``; ``ValueError`` unless it is that or positive."""
    if isinstance(value, str):
        if value != "learnt":
            raise ValueError(f"expected a positive {name} or 'learnt', got {value!r}")
        return True
    positive(**{name: value})
    return False


class SparseModel(LocalPyroModule):
    r"""A network with a prior on the rows of its groups.

    Args:
        net: any ``nn.Module`` that :func:`pyro_sparse.graph.groups` can trace; copied. What is
            frozen in it (``requires_grad=False``) has no prior and stays as it is.
        example: what it is called with: an input ``(batch, ...)``, a tuple of inputs, or a
            dictionary of keyword inputs. A few are kept, to check compact networks.
        output: which output the likelihood reads, by its name in a dictionary or dataclass, or its
            place in a tuple; not needed for a single tensor, or one that is called ``logits``.
        likelihood: how outputs become targets; :class:`~pyro_sparse.likelihoods.Categorical` by
            default.
        num_data: number of training examples, the size of the data plate.
        output_scale: prior standard deviation of layers that are never pruned; or ``"learnt"``: a
            site ``{group}.prior_precision`` ∼ Gamma(2, 2) for each such layer, whose inverse is the
            variance of its weights.
        prune_inputs: gate the input features too, :math:`z_i \sim` Bernoulli
            (``input_inclusion_probability``) each: variable selection.
        input_inclusion_probability: prior inclusion probability of an input feature.

    Raises:
        ValueError: where a scale, probability or ``num_data`` is out of range, ``net`` has
            nothing to put a prior on, or nothing of it can be pruned, although that is what the
            model is for; the message says what is in the way.

    Sites: ``{group}.rows`` for every group, shape ``(units, row length)``; further ones are named
    by the model. Group names are the dotted names of the writing modules.
    """

    prunes = True
    """Whether the model is there to prune; a dense one is not."""

    not_taken: tuple[str, ...] = ()
    """Parameters of parents that mean nothing to a class; runs do not offer them."""

    def __init__(
        self,
        net: nn.Module,
        example: Example,
        *,
        likelihood: Likelihood | None = None,
        num_data: int,
        output: str | int | None = None,
        output_scale: float | str = 1.0,
        prune_inputs: bool = False,
        input_inclusion_probability: float = 0.5,
    ) -> None:
        super().__init__()
        learnt = _learnt("output_scale", output_scale)
        if learnt and "output_scale" in self.not_taken:
            raise ValueError(
                f"{type(self).__name__} has no prior of its own on the output layer, whose scale "
                "could be learnt; pass output_scale a number"
            )
        whole(num_data=num_data)
        if not isinstance(net, nn.Module):
            raise ValueError(f"expected net, a torch.nn.Module, got {net!r}")
        if not (likelihood is None or isinstance(likelihood, Likelihood)):
            raise ValueError(
                f"expected likelihood, one of pyro_sparse.likelihoods, got {likelihood!r}"
            )
        if not isinstance(prune_inputs, bool):
            raise ValueError(f"expected prune_inputs to be True or False, got {prune_inputs!r}")
        if not Inputs.of(net, example).batch:
            raise ValueError("expected an example of at least one row, got none")
        self.output = Output(output)
        graph = groups(net, example, self.output)
        if not any(group.writers for group in graph):
            raise ValueError(
                "expected a network with at least one linear or convolution layer to put a prior "
                f"on, found none in {type(net).__name__}"
                + (" that is not frozen" if graph.ungrouped else "")
            )
        _left_out(net, graph)
        self.graph = graph
        # Groups whose weights have a common prior precision that is a latent of its own.
        self.learnt_scales: list[str] = []
        if learnt:
            self.learnt_scales += [group.name for group in self.layers if not group.prunable]
        self._laws: dict[str, Any] = {}
        self.example_shape = tuple(example.shape) if isinstance(example, Tensor) else ()
        # What a call passes beside a single tensor.
        self._beside = Inputs.of(net, torch.zeros(())).kwargs
        self.prune_inputs = prune_inputs
        self.num_data = num_data
        self.net = _template(net)
        device = self.net.get_buffer(self.layers[0].writers[0].parameter).device
        self.support = Support(self.support_shapes()).to(device)
        if not self.support_shapes() and self.prunes:
            _nothing_to_prune(net, graph)
        _report_coverage(graph)
        self.likelihood = (Categorical() if likelihood is None else likelihood).to(device)
        self.register_constant("output_scale", 1.0 if learnt else float(output_scale))
        input_logit = _probability("input_inclusion_probability", input_inclusion_probability)
        self.register_constant("input_inclusion_logit", input_logit)

    # -- what a model writes ---------------------------------------------------------------------

    def rows(self) -> dict[str, Tensor]:
        """Sample statements; the effective rows ``(units, row length)`` of every group."""
        raise NotImplementedError

    # -- what models share -----------------------------------------------------------------------

    def register_constant(self, name: str, value: float | Sequence[float]) -> None:
        """Register numbers of the prior as a buffer, of the network's type and on its device."""
        like = self.net.get_buffer(self.layers[0].writers[0].parameter)
        self.register_buffer(name, torch.tensor(value, dtype=like.dtype, device=like.device))

    @property
    def layers(self) -> list[Group]:
        """The groups with parameters of their own, in the network's order."""
        return [group for group in self.graph if group.writers]

    def initial_rows(self) -> dict[str, Tensor]:
        """The network's own weights as rows, before any training."""
        values = dict(self.net.named_buffers())
        return {group.name: self.graph.rows(values, group.name) for group in self.layers}

    @property
    def asks_for_probabilities(self) -> bool:
        """Whether inclusion probabilities are the question, and not the last tenth of accuracy.

        So it is where inputs are selected, and where data are few. Training then maximises the
        evidence lower bound from its first step, see :class:`~pyro_sparse.infer.recipe.Recipe`.
        """
        return self.prune_inputs or self.num_data <= FEW_DATA

    def support_shapes(self) -> dict[str, tuple[int, ...]]:
        """What can be pruned for good, by group: units here; models may override it."""
        return {
            group.name: (group.size,)
            for group in self.graph
            if group.prunable and (group.writers or self.prune_inputs)
        }

    def row_shape(self, group: Group) -> torch.Size:
        return torch.Size((group.size, self.graph.row_length(group.name)))

    def fixed_law(
        self, site: str, make: Callable[[], TorchDistributionMixin]
    ) -> TorchDistributionMixin:
        """A prior without parents, made once: a step then neither builds nor looks at it.

        It is made anew when a constant of the prior was moved, loaded or replaced, or when other
        units are in.

        Args:
            site: its name.
            make: makes it from the model's constants.
        """
        constants = list(self._constants())
        state = [(id(value), value._version) for value in constants]
        kept = self._laws.get(site)
        if kept is None or kept[0] != state:
            # With the constants themselves, so that no other tensor gets the place of one.
            kept = self._laws[site] = (state, make(), constants)
        return kept[1]

    def _constants(self) -> Iterator[Tensor]:
        """The numbers of the prior and the support's masks."""
        for module in (self, self.support):
            yield from (value for value in module._buffers.values() if value is not None)

    def __getstate__(self) -> dict[str, Any]:
        state = super().__getstate__()
        state["_laws"] = {}
        return state

    def drawn_scale(self, group: Group) -> Tensor | None:
        """A draw of the prior scale of a layer's weights where that is learnt, None elsewhere."""
        if group.name not in self.learnt_scales:
            return None
        two = self.output_scale.new_tensor(2.0)
        precision = pyro.sample(f"{group.name}.prior_precision", dist.Gamma(two, two))
        return precision.rsqrt()

    def gaussian_rows(self, group: Group, scale: Tensor | float | None = None) -> Tensor:
        """``{group}.rows``: independent ``N(0, scale²)``.

        Args:
            scale: a number, or a tensor, which may be a draw; by default ``output_scale``, the
                prior of a layer that is never pruned, or a draw of it where that is learnt.
        """
        if scale is None:
            scale = self.drawn_scale(group)

        def make() -> TorchDistributionMixin:
            given = self.output_scale
            if scale is not None:
                given = torch.as_tensor(scale).to(given)
            prior = dist.Normal(torch.zeros_like(given), given).expand(self.row_shape(group))
            return self.support.law(group.name, prior.to_event(1)).to_event(1)

        site = f"{group.name}.rows"
        law = make() if isinstance(scale, Tensor) else self.fixed_law(site, make)
        return pyro.sample(site, law)

    def input_gate(self) -> Tensor | None:
        """The gate on the input features, or None."""
        if not self.prune_inputs:
            return None
        size = self.graph["input"].size
        # Included, a gate is exactly 1: a spike at 0 beside a point mass at 1.
        one = torch.ones(size, device=self.output_scale.device, dtype=self.output_scale.dtype)
        prior = SpikeAndSlab(logits=self.input_inclusion_logit.expand(size), slab=dist.Delta(one))
        return pyro.sample("input.gate", self.support.law("input", prior).to_event(1))

    def latents(self) -> tuple[dict[str, Tensor], Tensor | None]:
        """Sample the rows, see `rows`, and the input gate, in the order in which the guide does."""
        return self.rows(), self.input_gate()

    def statements(self) -> tuple[dict[str, Tensor], Tensor | None, dict[str, Tensor]]:
        """All latents without the data: `latents`, and those of the likelihood."""
        rows, gate = self.latents()
        return rows, gate, self.likelihood.sites()

    def rows_at(self, values: dict[str, Tensor]) -> dict[str, Tensor]:
        """The effective rows with every latent at a value.

        Args:
            values: by site.
        """
        with own_parameters(self), poutine.block(), poutine.condition(data=values):
            rows, _ = self.latents()
        return {name: value.detach() for name, value in rows.items()}

    def input_columns(self) -> dict[str, Tensor]:
        """For every group that reads the inputs, which of them each column of its rows reads.

        Returns:
            ``(row length,)`` each: the number of an input, or that of inputs for biases and the
            like. Empty where a factor on the inputs is not one on these columns (the network does
            something to its input first), or where rows of one group read different inputs.
        """
        if not self._reads_input_directly():
            return {}
        graph, size = self.graph, self.graph["input"].size
        labels = {name: torch.full(shape, size) for name, shape in graph.shapes.items()}
        for part in graph["input"].readers:
            # Every entry of the dimension is some input's.
            owner = torch.full((labels[part.parameter].shape[part.dim],), size)
            owner[part.entries(size)] = torch.arange(size).repeat_interleave(part.block)
            shape = [-1 if dim == part.dim else 1 for dim in range(labels[part.parameter].dim())]
            labels[part.parameter] = owner.reshape(shape).expand(labels[part.parameter].shape)
        columns = {}
        for group in self.layers:
            rows = graph.rows(labels, group.name)
            if bool((rows != rows[0]).any()):
                return {}
            if bool((rows[0] < size).any()):
                columns[group.name] = rows[0].clone()
        return columns

    def check_input_scale(self) -> None:
        """Raise ``ValueError`` unless a factor on the inputs is one on the first layer's columns.

        Only then can the posterior mean of a scale on the inputs move into weights.
        """
        if not self._reads_input_directly():
            raise ValueError(
                f"{type(self.net).__name__} does something to its input before the first layer "
                "reads it, so that the mean of a noise on the input cannot move into weights; pass "
                "prune_inputs=False, or do it to the data beforehand"
            )

    def _reads_input_directly(self) -> bool:
        """Whether a factor on the inputs is one on the columns that read them."""
        if not self.graph["input"].size:
            return False
        size = self.graph["input"].size
        like = self.output_scale
        factor = torch.linspace(0.5, 1.5, size, dtype=like.dtype, device=like.device)
        rows = self.initial_rows()
        # Not the example itself: of zeros, say, one could not tell anything.
        generator = torch.Generator().manual_seed(0)
        probe = torch.randn(self.example_shape, generator=generator).to(like)
        with evaluating(self.net):
            gated = self.run(probe, rows, factor)
            parameters = self.graph.scale_columns(self.parameters_of(rows), "input", factor)
            scaled = self.network_output(probe, parameters)
        atol = 1e-4 * float(gated.abs().max())
        return torch.allclose(gated, scaled, rtol=1e-3, atol=atol)

    def parameters_of(self, rows: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The network's parameters at the given effective rows, with 0 for what was pruned.

        Those that have no rows are the network's own.
        """
        parameters = self.graph.parameters(
            {name: self.support.rows(name, value) for name, value in rows.items()}
        )
        for name in self.graph.ungrouped:
            parameters[name] = self.net.get_buffer(name)
        return parameters

    def inputs(self, x: Example) -> Inputs:
        """The arguments with which the network is called for a batch."""
        if isinstance(x, Tensor):
            return Inputs((x,), self._beside)
        return Inputs.of(self.net, x)

    def network_output(
        self, x: Example, parameters: Mapping[str, Tensor], gate: Tensor | None = None
    ) -> Tensor:
        """The output that the likelihood reads, at the given parameters and input gate."""
        inputs = self.inputs(x)
        if gate is not None:
            factor = gate
            inputs = inputs.map(lambda value: self.graph.gate_inputs(value, factor))
        if torch._C._is_tracing():  # which functional_call refuses
            with _with_buffers(self.net, parameters):
                outputs = inputs.call(self.net)
        else:
            outputs = functional_call(
                self.net, dict(parameters), inputs.args, inputs.kwargs, tie_weights=False
            )
        return self.output(outputs)

    def run(self, x: Example, rows: Mapping[str, Tensor], gate: Tensor | None = None) -> Tensor:
        """The network's output at the given effective rows and input gate."""
        if gate is not None and self.support.restricted:
            gate = gate * self.support["input"].to(gate.dtype)
        parameters = self.parameters_of(rows)
        with network_autocast(self.output_scale.device):
            output = self.network_output(x, parameters, gate)
        return output.to(self.output_scale.dtype)

    def forward(self, x: Example, y: Tensor | None = None) -> Tensor:
        """Sample everything; observe ``y`` where given. Returns the network's output."""
        output = self.run(x, *self.latents())
        return self.likelihood(output, y, self.num_data)


def _left_out(net: nn.Module, graph: Graph) -> None:
    """Warn of parameters without a prior, but those that the user has frozen."""
    unread = [name for name, why in graph.ungrouped.items() if not why.startswith("frozen")]
    if unread:
        listed = ", ".join(repr(name) for name in unread[:5])
        more = f" and {len(unread) - 5} more" if len(unread) > 5 else ""
        warnings.warn(
            f"{listed}{more} of {type(net).__name__}: {graph.ungrouped[unread[0]]}; without a "
            "prior, they stay as they are",
            stacklevel=4,
        )


def _nothing_to_prune(net: nn.Module, graph: Graph) -> None:
    """Raise ``ValueError`` where something stands in the way of pruning anything."""
    obstacles = graph.obstacles()
    if obstacles:
        listed = "; ".join(f"{share:.0%} of the units: {why}" for why, share in obstacles.items())
        raise ValueError(
            f"nothing of {type(net).__name__} can be pruned ({listed}); "
            "pyro_sparse.graph.explain(net, example) says more"
        )


def _report_coverage(graph: Graph) -> None:
    """Log how much can be pruned, loudly only where that is little."""
    obstacles = graph.obstacles()
    reasons = "; ".join(f"{share:.0%}: {why}" for why, share in list(obstacles.items())[:3])
    covered = 1 - sum(obstacles.values())
    level = logging.WARNING if covered < 0.1 and obstacles else logging.INFO
    logger.log(level, "%.0f %% of the units can be pruned. %s", 100 * covered, reasons)


class SpikeSlabModel(SparseModel):
    r"""Shared by SS-IG, SS-GL and SS-GHS: the inclusion prior and the slab's scale.

    Args:
        inclusion_probability: prior inclusion probability λ: one number in (0, 1), or
            ``"layerwise"`` for the rule of
            :func:`~pyro_sparse.models.inclusion.layerwise_inclusion_logits`.
        inclusion_constant: ``C`` of the layer-wise rule.
        inclusion_floor: the least probability that the rule may give, with a warning where it would
            give less; 0 is the rule as its authors have it.
        slab_scale: standard deviation :math:`σ_0` of the (non-centred) slab; ``"learnt"``: one a
            layer, as of ``output_scale``.

    Further parameters: see :class:`SparseModel`.
    """

    def __init__(
        self,
        net: nn.Module,
        example: Tensor,
        *,
        inclusion_probability: float | str = "layerwise",
        inclusion_constant: float = 1e-9,
        inclusion_floor: float = 1e-4,
        slab_scale: float | str = 1.0,
        **shared: Any,
    ) -> None:
        super().__init__(net, example, **shared)
        learnt = _learnt("slab_scale", slab_scale)
        if learnt:
            self.learnt_scales += [group.name for group in self.layers if group.prunable]
        if inclusion_probability == "layerwise":
            layers = self.layers
            # The bias is part of the row: a fan-in of k gives rows of k + 1 numbers.
            rule = (
                [self.graph.row_length(group.name) - 1 for group in layers],
                [group.size for group in layers],
                self.num_data,
                inclusion_constant,
            )
            logits = layerwise_inclusion_logits(*rule, inclusion_floor)
            raised = [
                group.name
                for group, before, after in zip(
                    layers, layerwise_inclusion_logits(*rule), logits, strict=True
                )
                if group.prunable and after > before
            ]
            if raised:
                warnings.warn(
                    f"the layer-wise rule gives units of {', '.join(raised)} a prior inclusion "
                    f"probability below {inclusion_floor:g}, since its constant of "
                    f"{inclusion_constant:g} was set for 784 inputs; {inclusion_floor:g} is taken. "
                    "Pass inclusion_probability= to set it, or inclusion_floor=0 for the rule",
                    stacklevel=3,
                )
        elif isinstance(inclusion_probability, str):
            raise ValueError(
                "expected inclusion_probability to be a number in (0, 1) or 'layerwise', got "
                f"{inclusion_probability!r}"
            )
        else:
            value = _probability("inclusion_probability", inclusion_probability)
            logits = [value] * len(self.layers)
        self._layer_index = {group.name: i for i, group in enumerate(self.layers)}
        self.register_constant("inclusion_logits", logits)
        self.register_constant("slab_scale", 1.0 if learnt else float(slab_scale))
        gated = self.input_columns() if self.prune_inputs and self.learnt_scales else {}
        if any(name in gated for name in self.learnt_scales):
            raise ValueError(
                "a layer whose columns are gated with the inputs has a fixed prior scale, as the "
                "weights of excluded inputs follow their prior: pass slab_scale (of the output "
                "layer output_scale) a number, or prune_inputs=False"
            )

    def latents(self) -> tuple[dict[str, Tensor], Tensor | None]:
        """The input gate comes first: under the guide, columns are in or out with it."""
        gate = self.input_gate()
        return self.rows(), gate

    def prior_scale(self, group: Group) -> Tensor:
        """Prior standard deviation of the (non-centred) weights of a unit that is in."""
        return self.slab_scale if group.prunable else self.output_scale

    def column_prior(self, group: Group, scale: Tensor | None = None) -> TorchDistributionMixin:
        """The prior of an included unit's row, ``(units,)`` of ``(row length,)``."""
        scale = self.prior_scale(group) if scale is None else scale
        prior = dist.Normal(torch.zeros_like(scale), scale)
        return prior.expand(self.row_shape(group)).to_event(1)

    def spike_and_slab_rows(self, group: Group) -> Tensor:
        r"""``{group}.rows``: :math:`z_j \tilde w_j`, :math:`\tilde w_j ∼ N(0, σ_0² I)`."""
        drawn = self.drawn_scale(group)

        def make() -> TorchDistributionMixin:
            slab = self.column_prior(group, drawn)
            logits = self.inclusion_logits[self._layer_index[group.name]].expand(group.size)
            prior = SpikeAndSlab(logits=logits, slab=slab)
            return self.support.law(group.name, prior).to_event(1)

        site = f"{group.name}.rows"
        return pyro.sample(site, self.fixed_law(site, make) if drawn is None else make())
