"""Binary Markov chains: an Ising prior on a line, with exact messages that are parallel in length.

Everything is a product of 2×2 matrices along the chain. Products are associative, so all prefixes
(or suffixes) take log₂ K vectorised steps in place of a loop over K nodes. Numbers are logits and
log-probabilities throughout; a logit of −∞ or ∞ fixes a node.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from pyro.distributions import TorchDistribution
from torch import Tensor
from torch.distributions import constraints
from torch.nn.functional import logsigmoid, softplus

__all__ = ["MarkovChain"]


class MarkovChain(TorchDistribution):
    r"""A chain of binary variables :math:`s ∈ \{0, 1\}^K`, each depending on the one before.

    .. math::
        p(s) = p(s_1) \prod_{j=1}^{K-1} p(s_{j+1} \mid s_j), \qquad
        p(s_1 = 1) = σ(α), \quad p(s_{j+1} = 1 \mid s_j = i) = σ(β_{ji})

    Every Ising model on a line, :math:`p(s) ∝ \exp(Σ_j h_j s_j + Σ_j J_j s_j s_{j+1})`, has this
    form, which is already normalised. Times evidence for single nodes it is such a chain again:
    :meth:`condition`. The KL between two chains is registered and exact.

    Draws carry no gradient: ``has_rsample`` is True for constant logits, where there is none to
    carry, and False for logits that require one (a guide then uses the score function).

    Args:
        initial_logits: α, shape (...).
        transition_logits: β, shape (..., K − 1, 2); the last axis is the state before.

    Raises:
        ValueError: the shapes do not fit.
    """

    arg_constraints = {
        "initial_logits": constraints.real,
        "transition_logits": constraints.independent(constraints.real, 2),
    }
    support = constraints.independent(constraints.boolean, 1)

    def __init__(
        self,
        initial_logits: Tensor,
        transition_logits: Tensor,
        validate_args: bool | None = None,
    ) -> None:
        if transition_logits.dim() < 2 or transition_logits.shape[-1] != 2:
            raise ValueError(
                "MarkovChain needs transition_logits (..., K - 1, 2), got "
                f"{tuple(transition_logits.shape)}"
            )
        try:
            batch = torch.broadcast_shapes(initial_logits.shape, transition_logits.shape[:-2])
        except RuntimeError as error:
            raise ValueError(
                "MarkovChain needs initial_logits that broadcast with the chains, got "
                f"{tuple(initial_logits.shape)} and {tuple(transition_logits.shape)}"
            ) from error
        dtype = torch.promote_types(initial_logits.dtype, transition_logits.dtype)
        if not dtype.is_floating_point:
            dtype = torch.get_default_dtype()
        self.initial_logits = initial_logits.to(dtype).expand(batch)
        self.transition_logits = transition_logits.to(dtype).expand(
            batch + transition_logits.shape[-2:]
        )
        event = torch.Size([transition_logits.shape[-2] + 1])
        super().__init__(batch, event, validate_args=validate_args)

    @classmethod
    def stationary(cls, density: Tensor, persistence: Tensor, length: int) -> MarkovChain:
        r"""The chain whose nodes all have :math:`p(s_j = 1) = λ`, neighbours with correlation κ.

        :math:`p(s_{j+1} = 1 \mid s_j) = λ + κ (s_j − λ)`: nodes k apart have correlation
        :math:`κ^k`, and a run of ones has mean length :math:`1 / ((1 − κ)(1 − λ))`.

        Args:
            density: λ in (0, 1), shape (...).
            persistence: κ in [0, 1), shape (...).
            length: K.
        """
        after_zero = density * (1 - persistence)
        after_one = after_zero + persistence
        stays_out = (1 - density) * (1 - persistence)
        transition = torch.stack(
            [after_zero.log() - (-after_zero).log1p(), after_one.log() - stays_out.log()], -1
        )
        transition = transition.unsqueeze(-2)
        transition = transition.expand(*transition.shape[:-2], length - 1, 2)
        return cls(density.log() - (-density).log1p(), transition)

    @property
    def has_rsample(self) -> bool:  # type: ignore[override]
        return not (self.initial_logits.requires_grad or self.transition_logits.requires_grad)

    def expand(self, batch_shape: Any, _instance: Any = None) -> MarkovChain:
        new = self._get_checked_instance(MarkovChain, _instance)
        batch = torch.Size(batch_shape)
        new.initial_logits = self.initial_logits.expand(batch)
        new.transition_logits = self.transition_logits.expand(
            batch + self.transition_logits.shape[-2:]
        )
        super(MarkovChain, new).__init__(batch, self.event_shape, validate_args=False)
        new._validate_args = self._validate_args
        return new

    # -- messages --------------------------------------------------------------------------------

    def log_marginals(self) -> Tensor:
        """log p(s_j = i), shape (..., K, 2): the forward messages."""
        first = _log_pair(self.initial_logits)
        prefixes = _scan(_log_product, _log_pair(self.transition_logits))
        rest = torch.logsumexp(first[..., None, :, None] + prefixes, -2)
        return torch.cat([first.unsqueeze(-2), rest], -2)

    def log_pair_marginals(self) -> Tensor:
        """log p(s_j = i, s_{j+1} = k), shape (..., K − 1, 2, 2)."""
        before = self.log_marginals()[..., :-1, :]
        return before.unsqueeze(-1) + _log_pair(self.transition_logits)

    @property
    def marginal_logits(self) -> Tensor:
        """Logits of p(s_j = 1), shape (..., K)."""
        logs = self.log_marginals()
        return logs[..., 1] - logs[..., 0]

    @property
    def any_logits(self) -> Tensor:
        """Logits of p(some s_j = 1), shape (...): all are 0 along one path only."""
        none = logsigmoid(-self.initial_logits)
        none = none + logsigmoid(-self.transition_logits[..., 0]).sum(-1)
        return torch.log(-torch.expm1(none)) - none

    def _backward(self, evidence: Tensor) -> tuple[Tensor, Tensor]:
        """Log messages (..., K, 2) from the nodes after each one, and evidence (..., K, 2)."""
        # Normalised, where (0, e) would be as good but for an infinite e.
        pair = _log_pair(evidence)
        steps = _log_pair(self.transition_logits) + pair[..., 1:, None, :]
        # Suffix products are prefix products of the reversed chain, factors swapped.
        flipped = _scan(lambda later, earlier: _log_product(earlier, later), steps.flip(-3))
        messages = flipped.flip(-3).logsumexp(-1)
        return torch.cat([messages, torch.zeros_like(pair[..., :1, :])], -2), pair

    def condition(self, evidence: Tensor) -> MarkovChain:
        r"""The chain :math:`∝ p(s) \exp(Σ_j e_j s_j)`: the posterior given evidence by node.

        Args:
            evidence: log-likelihood ratios :math:`e_j`, shape (..., K); −∞ fixes a node at 0 and
                ∞ at 1.
        """
        messages, _ = self._backward(evidence)
        shift = evidence + messages[..., 1] - messages[..., 0]
        return MarkovChain(
            self.initial_logits + shift[..., 0],
            self.transition_logits + shift[..., 1:, None],
            validate_args=False,
        )

    def log_normaliser(self, evidence: Tensor) -> Tensor:
        r""":math:`\log E_p \exp(Σ_j e_j s_j)`, shape (...)."""
        messages, pair = self._backward(evidence)
        first = _log_pair(self.initial_logits) + messages[..., 0, :] + pair[..., 0, :]
        return first.logsumexp(-1) + softplus(evidence).sum(-1)

    # -- the distribution ------------------------------------------------------------------------

    @property
    def mean(self) -> Tensor:
        return self.log_marginals()[..., 1].exp()

    @property
    def variance(self) -> Tensor:
        return self.mean * self.log_marginals()[..., 0].exp()

    def sample(self, sample_shape: Any = torch.Size()) -> Tensor:
        with torch.no_grad():
            shape = self._extended_shape(sample_shape)
            uniform = torch.rand(shape, dtype=self.initial_logits.dtype, device=self._device)
            first = uniform[..., 0] < torch.sigmoid(self.initial_logits)
            # With its uniform number drawn, a step is a map from {0, 1} to itself.
            maps = uniform[..., 1:, None] < torch.sigmoid(self.transition_logits)
            to_zero, to_one = _scan(_compose, maps).unbind(-1)
            rest = torch.where(first.unsqueeze(-1), to_one, to_zero)
            return torch.cat([first.unsqueeze(-1), rest], -1).to(uniform.dtype)

    def rsample(self, sample_shape: Any = torch.Size()) -> Tensor:
        if not self.has_rsample:
            raise NotImplementedError("draws of a MarkovChain carry no gradient to its logits")
        return self.sample(sample_shape)

    def log_prob(self, value: Tensor) -> Tensor:
        if self._validate_args:
            self._validate_sample(value)
        transition = self.transition_logits
        before, after = value[..., :-1] > 0.5, value > 0.5
        chosen = torch.where(before, transition[..., 1], transition[..., 0])
        initial = self.initial_logits.expand(chosen.shape[:-1]).unsqueeze(-1)
        logits = torch.cat([initial, chosen], -1)
        return torch.where(after, logsigmoid(logits), logsigmoid(-logits)).sum(-1)

    def entropy(self) -> Tensor:
        before = self.log_marginals()[..., :-1, :].exp()
        later = (before * _entropy(self.transition_logits)).sum((-1, -2))
        return _entropy(self.initial_logits) + later

    @property
    def _device(self) -> torch.device:
        return self.initial_logits.device


def _log_pair(logits: Tensor) -> Tensor:
    """log (p(0), p(1)) on a new last axis."""
    return torch.stack([logsigmoid(-logits), logsigmoid(logits)], -1)


def _entropy(logits: Tensor) -> Tensor:
    """Entropy of a Bernoulli; 0 for infinite logits."""
    return torch.special.entr(torch.sigmoid(logits)) + torch.special.entr(torch.sigmoid(-logits))


def _log_product(left: Tensor, right: Tensor) -> Tensor:
    """log(exp(left) @ exp(right)) of 2×2 matrices."""
    return torch.logaddexp(
        left[..., :, 0:1] + right[..., 0:1, :], left[..., :, 1:2] + right[..., 1:2, :]
    )


def _compose(first: Tensor, then: Tensor) -> Tensor:
    """``then`` after ``first``, maps from {0, 1} to itself as pairs of their values."""
    return torch.where(first, then[..., 1:2], then[..., 0:1])


def _scan(combine: Callable[[Tensor, Tensor], Tensor], values: Tensor) -> Tensor:
    """All prefixes of an associative ``combine`` along the chain, doubling their span each step.

    Matrices lie on the last two axes with the chain before them; boolean maps lie on the last.
    """
    axis = -2 if values.dtype == torch.bool else -3
    length, span = values.shape[axis], 1
    for _ in range(max(0, math.ceil(math.log2(max(length, 1))))):
        head = values.narrow(axis, 0, span)
        combined = combine(
            values.narrow(axis, 0, length - span), values.narrow(axis, span, length - span)
        )
        values = torch.cat([head, combined], axis)
        span *= 2
    return values
