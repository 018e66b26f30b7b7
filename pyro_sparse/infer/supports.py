r"""Which inputs are in, by a chain over supports: what independent inclusions leave out.

A guide has the inclusions of inputs independent, and its weights too: of two near-copies it keeps
one, or both. After training, the network is linear enough in its weights around the guide's means
that their posterior given a support can be written down. With :math:`u_i` the weights that read
input i and the rest φ, :math:`f(x) ≈ f_0 + J (θ − θ_0)` and the likelihood's curvature Λ,

.. math::
    \log p(y \mid z) ≈ \tfrac12 b_z^\top (S_z^{-2} + G_z)^{-1} b_z
      − \tfrac12 \log |I + S_z G_z S_z|, \qquad
    G = J^\top Λ J, \quad b = J^\top (∇ \log p + Λ J θ_0),

with φ (the biases beside these weights) integrated out, over the columns of the inputs that are in
and their prior scales S. So the posterior of z is known up to its constant, and a chain draws from
it: single flips by their exact odds, and exchanges of an input for another that is correlated with
it. Nothing else is approximated where outputs are linear in the weights and errors normal with a
known scale; of a network it is the linearised (Laplace) posterior, with hidden units, later layers,
scales and noise as the guide has them.

Sources: George and McCulloch, Statistica Sinica 7 (1997), for the chain; Immer, Korzepa, Bauer,
AISTATS 2021, for the linearisation.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy.special import expit
from torch import Tensor
from torch.func import jacrev, vmap

from pyro_sparse.graph import evaluating
from pyro_sparse.guides import SpikeSlabGuide
from pyro_sparse.models.base import SpikeSlabModel

__all__ = ["Supports", "keep_supports", "linearised", "support_chain"]

MOST_WEIGHTS = 4000
"""Of the layers that the chain knows; their Gram matrix is kept several times."""
REFRESH = 200
"""After so many flips the chain's matrix is made anew."""


@dataclass(frozen=True)
class Supports:
    """Draws of which inputs are in.

    Attributes:
        draws: Shape: (draws, inputs), bool.
        probability: of every input, averaged over its odds given the others, which is more precise
            than the share of draws. Shape: (inputs,).
    """

    draws: Tensor
    probability: Tensor


@dataclass(frozen=True)
class Linearised:
    """The quadratic log-likelihood of the weights that read inputs, everything else integrated out.

    In units of the weights' prior scales, so that the prior is N(0, I).

    Attributes:
        gram: Shape: (weights, weights).
        moment: Shape: (weights,).
        owner: the input that each weight reads, ascending. Shape: (weights,).
    """

    gram: np.ndarray
    moment: np.ndarray
    owner: np.ndarray


def keep_supports(model: Any, guide: Any, loader: Any, seed: int = 0) -> None:
    """At the end of training: have the gate on the inputs keep what a chain over supports says.

    Nothing happens where there is no such gate, the loader does not hold all data, or the network
    is too large for the chain: the guide's own probabilities are the only ones then.
    """
    x, y = getattr(loader, "x", None), getattr(loader, "y", None)
    if not (isinstance(guide, SpikeSlabGuide) and model.prune_inputs):
        return
    if not (isinstance(x, Tensor) and isinstance(y, Tensor)):
        return
    if len(x) != model.num_data or model.support.restricted:
        return
    device = model.output_scale.device
    try:
        law = linearised(model, guide, x.to(device), y.to(device))
    except TooLargeError:
        return
    gate = guide.input_gate
    start = gate.inclusion_logits.detach() > 0
    found = support_chain(
        law, model.input_inclusion_logit.expand(len(start)), seed=seed, start=start
    )
    gate.keep_chain(found.probability, found.draws)


class TooLargeError(ValueError):
    """A network is not one for a chain over supports."""


def linearised(model: SpikeSlabModel, guide: SpikeSlabGuide, x: Tensor, y: Tensor) -> Linearised:
    """The log-likelihood of all data as a quadratic function of the weights, see the module.

    Hidden units are those with an inclusion probability above one half; later layers, scales and
    the noise are at their means.

    Args:
        model, guide: after training; the model has gates on its inputs.
        x: all training inputs. Shape: (N, ...).
        y: their targets. Shape: (N,).

    Raises:
        TooLargeError: the network does something to its inputs first, or more than `MOST_WEIGHTS`
            weights are in, or none that reads an input.
    """
    columns = model.input_columns()
    if not columns:
        raise TooLargeError("the network does something to its inputs before it reads them")
    inclusion = guide.inclusion_logits()
    gate = torch.cat([inclusion["input"].detach().sigmoid(), inclusion["input"].new_ones(1)])
    size = len(gate) - 1
    scales = guide.scales()
    rows, inside, owner, prior = {}, [], [], []
    for group, value in ((g, guide.mean_rows()[g.name].detach()) for g in model.layers):
        name = group.name
        reads = columns.get(name, torch.full((value.shape[1],), size)).to(value.device)
        units = torch.ones(group.size, dtype=torch.bool, device=value.device)
        if name in inclusion:
            units = inclusion[name].detach() > 0
        rows[name] = value * gate[reads] * units.unsqueeze(1)
        # Later layers stay at their means: what they read at these means knows of every input, and
        # would be free to stand in for inputs that are out.
        units = units & (name in columns)
        inside.append(units.unsqueeze(1).expand_as(value).flatten())
        owner.append(reads.expand_as(value).flatten())
        scale = model.prior_scale(group).expand_as(value)
        if name in scales:
            scale = scale * scales[name].detach().unsqueeze(1)
        prior.append(scale.flatten())
    start = torch.cat([value.flatten() for value in rows.values()])
    chosen = torch.cat(inside).nonzero().flatten()
    if len(chosen) > MOST_WEIGHTS:
        raise TooLargeError(f"{len(chosen)} weights are in; the chain takes up to {MOST_WEIGHTS}")
    owners, priors = torch.cat(owner)[chosen], torch.cat(prior)[chosen].double()
    if not bool((owners < size).any()):
        raise TooLargeError("no unit that reads the inputs is in, so the data say nothing of them")
    sizes = [value.numel() for value in rows.values()]

    def output(weights: Tensor, example: Tensor) -> Tensor:
        whole = start.index_put((chosen,), weights)
        parts = zip(rows.items(), whole.split(sizes), strict=True)
        return model.run(example.unsqueeze(0), {n: p.view_as(v) for (n, v), p in parts})[0]

    family = guide.noise_precision
    latents = {} if family is None else {"noise_precision": family().mean.detach()}
    here = start[chosen]
    moment = torch.zeros_like(priors)
    gram = moment.new_zeros(len(priors), len(priors))
    with evaluating(model.net):
        for part, target in zip(x.split(256), y.split(256), strict=True):
            by_weight = vmap(jacrev(output), in_dims=(None, 0))(here, part).double()
            at = vmap(output, in_dims=(None, 0))(here, part)
            slope, curvature = _expansion(model, latents, at, target)
            by_weight = by_weight.reshape(len(part), -1, len(here))
            weighed = curvature @ by_weight
            flat = by_weight.flatten(0, 1)
            gram = gram + flat.T @ weighed.flatten(0, 1)
            towards = slope + weighed @ here.double()
            moment = moment + flat.T @ towards.flatten()
    gram, moment = priors.unsqueeze(1) * gram * priors, priors * moment
    read = owners < size
    if not bool(read.all()):
        # The rest is integrated out.
        cross = gram[~read][:, read]
        precision = gram[~read][:, ~read]
        precision.diagonal().add_(1.0)
        solved = torch.linalg.solve(precision, torch.column_stack([cross, moment[~read]]))
        moment = moment[read] - cross.T @ solved[:, -1]
        gram = gram[read][:, read] - cross.T @ solved[:, :-1]
    order = owners[read].argsort(stable=True)
    return Linearised(
        gram[order][:, order].cpu().numpy(),
        moment[order].cpu().numpy(),
        owners[read][order].cpu().numpy(),
    )


def _expansion(
    model: SpikeSlabModel, latents: dict[str, Tensor], output: Tensor, y: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradient ``(N, outputs)`` and negative Hessian ``(N, outputs, outputs)``, by the output."""

    def log_prob(one: Tensor, target: Tensor) -> Tensor:
        law = model.likelihood.distribution(one.unsqueeze(0), **latents)
        return law.log_prob(target.unsqueeze(0)).sum()

    output = output.double()
    latents = {name: value.double() for name, value in latents.items()}
    target = y.double() if y.is_floating_point() else y
    flat = output.flatten(1)

    def of_flat(one: Tensor, target: Tensor) -> Tensor:
        return log_prob(one.view(output.shape[1:]), target)

    first = torch.func.grad(of_flat)
    slope = vmap(first)(flat, target)
    return slope, -vmap(jacrev(first))(flat, target)


def support_chain(
    law: Linearised,
    prior_logits: Tensor,
    *,
    sweeps: int = 600,
    seed: int = 0,
    start: Tensor | None = None,
) -> Supports:
    r"""Draw supports from :math:`p(z \mid y)` of a linearised network.

    A sweep flips every input by its odds given the others, and tries to exchange as many pairs of
    an input that is in and one that is not. A sixth of the sweeps is left out.

    Args:
        law: see `linearised`.
        prior_logits: log-odds of the inputs' prior inclusions. Shape: (inputs,).
        sweeps: how many.
        seed: of the chain's own generator.
        start: first support; none are in without. Shape: (inputs,).
    """
    prior = prior_logits.detach().double().cpu().numpy()
    state = _Swept(law, len(prior))
    generator = np.random.default_rng(seed)
    inputs = len(prior)
    if start is not None:
        for i in start.nonzero().flatten().tolist():
            state.flip(i)
    partners = state.partners()
    draws, total = [], np.zeros(inputs)
    burn = sweeps // 6
    for sweep in range(sweeps):
        # One after another, in random order: all odds stay as they are until something flips.
        order, uniform = generator.permutation(inputs), generator.random(inputs)
        while len(order):
            probability = expit(prior[order] + state.gains()[order])
            turned = np.flatnonzero((uniform[order] < probability) != state.inside[order])
            done = int(turned[0]) + 1 if len(turned) else len(order)
            if sweep >= burn:
                total[order[:done]] += probability[:done]
            if len(turned):
                state.flip(order[done - 1])
            order = order[done:]
        for i in generator.permutation(np.flatnonzero(state.inside)):
            # A partner is drawn from a law that is symmetric: the chain needs no correction.
            j = partners[i, generator.integers(partners.shape[1])] if partners.size else i
            if i == j or state.inside[j] or not state.inside[i] or i not in partners[j]:
                continue
            if math.log(generator.random()) < prior[j] - prior[i] + state.exchange_gain(i, j):
                state.flip(i)
                state.flip(j)
        if sweep >= burn:
            draws.append(state.inside.copy())
    return Supports(torch.from_numpy(np.stack(draws)), torch.from_numpy(total / (sweeps - burn)))


def _gains(own: np.ndarray, moment: np.ndarray, sign: np.ndarray) -> np.ndarray:
    """½ m' A⁻¹ m − ½ sign · log |A| with A = sign · own, for blocks of one width."""
    if moment.shape[1] == 1:
        scale = sign * own[:, 0, 0]
        gains: np.ndarray = 0.5 * (moment[:, 0] ** 2 / scale - sign * np.log(scale))
        return gains
    factor = np.linalg.cholesky(sign[:, None, None] * own)
    solved = np.linalg.solve(factor, moment[:, :, None])[:, :, 0]
    log_det = 2 * np.log(np.diagonal(factor, axis1=1, axis2=2)).sum(1)
    return np.asarray(0.5 * ((solved**2).sum(1) - sign * log_det))


class _Swept:
    """The matrix ``[I + G, b]``, swept on the weights of the inputs that are in.

    Sweeping a block of a symmetric matrix turns it into its inverse and every other block into its
    Schur complement, so what each input would add given those that are in stands on the diagonal.

    Source: Goodnight, The American Statistician 33 (1979).
    """

    def __init__(self, law: Linearised, inputs: int) -> None:
        size = len(law.moment)
        self._whole = np.zeros((size + 1, size + 1))
        self._whole[:size, :size] = law.gram + np.eye(size)
        self._whole[:size, size] = self._whole[size, :size] = law.moment
        bounds = np.searchsorted(law.owner, np.arange(inputs + 1))
        self._blocks = [slice(a, b) for a, b in itertools.pairwise(bounds.tolist())]
        widths = np.diff(bounds)
        self._by_width = []
        for width in np.unique(widths[widths > 0]):
            own = np.flatnonzero(widths == width)
            self._by_width.append((own, bounds[own, None] + np.arange(width)))
        self.inside, self._flips = np.zeros(inputs, dtype=bool), 0
        self._matrix = self._whole.copy()

    def gains(self) -> np.ndarray:
        """log p(y | i in) − log p(y | i out) of every input, the others as they are."""
        gains = np.zeros(len(self.inside))
        # In, a block is minus the inverse of what it is out, and the moment its solution.
        sign = np.where(self.inside, -1.0, 1.0)
        for own, places in self._by_width:
            blocks = self._matrix[places[:, :, None], places[:, None, :]]
            gains[own] = _gains(blocks, self._matrix[places, -1], sign[own])
        return gains

    def gain(self, i: int) -> float:
        """That of one."""
        block, sign = self._blocks[i], np.array([-1.0 if self.inside[i] else 1.0])
        return float(
            _gains(self._matrix[None, block, block], self._matrix[None, block, -1], sign)[0]
        )

    def exchange_gain(self, i: int, j: int) -> float:
        """log p(y | j in, i out) − log p(y | i in, j out), the others as they are."""
        own, other, matrix = self._blocks[i], self._blocks[j], self._matrix
        pivot = np.linalg.solve(matrix[own, own], np.c_[matrix[own, other], matrix[own, -1]])
        without = matrix[other, other] - matrix[other, own] @ pivot[:, :-1]
        moment = matrix[other, -1] - matrix[other, own] @ pivot[:, -1]
        return float(_gains(without[None], moment[None], np.ones(1))[0]) - self.gain(i)

    def flip(self, i: int) -> None:
        """Take the input in or out."""
        block, matrix = self._blocks[i], self._matrix
        if block.start != block.stop:
            pivot = np.linalg.inv(matrix[block, block])
            columns = matrix[:, block].copy()
            scaled = columns @ pivot
            matrix -= scaled @ columns.T
            # Symmetric, with the same formula both ways: what was swept has its sign turned.
            scaled[block] = 0.0
            sign = -1.0 if self.inside[i] else 1.0
            matrix[:, block] = sign * scaled
            matrix[block, :] = sign * scaled.T
            matrix[block, block] = -pivot
            # Rounding that is not symmetric grows with every flip, by a factor of its own.
            matrix += matrix.T.copy()
            matrix *= 0.5
        self.inside[i] = ~self.inside[i]
        self._flips += 1
        if self._flips == REFRESH:
            self.refresh()

    def refresh(self) -> None:
        """Make the matrix anew, without the rounding of many flips."""
        inside, self._matrix = self.inside.copy(), self._whole.copy()
        self.inside[:], self._flips = False, -len(inside)
        for i in np.flatnonzero(inside):
            self.flip(int(i))
        self._flips = 0

    def partners(self, most: int = 8) -> np.ndarray:
        """For every input those it is exchanged for: whose weights explain most of its own's."""
        inputs, size = len(self.inside), len(self._whole) - 1
        gram = self._whole[:size, :size] - np.eye(size)
        root = np.sqrt(np.maximum(np.diag(gram), 1e-30))
        correlation = (gram / root / root[:, None]) ** 2
        starts = [block.start for block in self._blocks if block.start < block.stop]
        if len(starts) < inputs or inputs < 2:
            return np.zeros((inputs, 0), dtype=int)
        near = np.add.reduceat(np.add.reduceat(correlation, starts, 0), starts, 1)
        np.fill_diagonal(near, -1.0)
        return np.argsort(-near, axis=1)[:, : min(most, inputs - 1)]
