r"""The noise precision of a regression at its closed optimum, given everything else.

With :math:`β ∼ \text{Gamma}(a, b)` and :math:`y_i ∼ N(f(x_i), 1/β)` the evidence lower bound is
largest, whatever q says of the weights, at

.. math:: q(β) = \text{Gamma}\left( a + \tfrac N2,\; b + \tfrac12 Σ_i E_q (y_i − f(x_i))² \right),

the coordinate update of variational Bayes (Bishop, *Pattern Recognition and Machine Learning*,
section 10.3). Steps of a gradient follow it from afar, and an error of δ in log β costs N δ²/4
nats.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from pyro_sparse import nets
from pyro_sparse.guides import GroupGuide
from pyro_sparse.guides.families import GammaFamily
from pyro_sparse.inputs import joined
from pyro_sparse.likelihoods import Normal
from pyro_sparse.models import SparseModel
from pyro_sparse.modules import own_parameters

from .elbo import ELBO

__all__ = ["NoiseOptimum"]

ROWS = 8192
"""Examples, at least, whose errors are looked at where there are so many: log β then is known to
√(2 / ROWS)."""
TOGETHER = 512
"""Examples that pass through the network at once."""


class NoiseOptimum:
    """Sets q(noise precision) to its optimum, by the errors on the batches that came last.

    Args:
        model, guide: of any likelihood; nothing is done where no noise precision is learnt, or
            where its guide is no gamma law of its own (as under an autoguide).
    """

    def __init__(self, model: SparseModel, guide: GroupGuide) -> None:
        self.model, self.guide = model, guide
        learnt = isinstance(model.likelihood, Normal) and isinstance(
            guide.noise_precision, GammaFamily
        )
        self._recent: deque[tuple[Tensor, Tensor]] | None = deque() if learnt else None

    def forget(self) -> None:
        """Forget all batches: an epoch begins."""
        if self._recent is not None:
            self._recent.clear()

    def see(self, x: Tensor, y: Tensor) -> None:
        """Note a batch; older ones are forgotten once the later ones are enough."""
        if self._recent is None:
            return
        self._recent.append((x, y))
        rows = sum(len(one) for _, one in self._recent)
        while rows - len(self._recent[0][1]) >= min(ROWS, self.model.num_data):
            rows -= len(self._recent.popleft()[1])

    def _together(self) -> Iterator[tuple[Tensor, Tensor]]:
        """The batches, joined to about `TOGETHER` rows: what a pass costs is mostly Python."""
        assert self._recent
        each = max(1, TOGETHER // max(len(y) for _, y in self._recent))
        batches = list(self._recent)
        for first in range(0, len(batches), each):
            xs, ys = zip(*batches[first : first + each], strict=True)
            yield joined(xs), torch.cat(ys)

    @torch.no_grad()
    def settle(self, draws: int = 4, mean: Callable[[Tensor], list[float]] = Tensor.tolist) -> None:
        """Move q(noise precision) to its optimum given the rest of the guide.

        Args:
            draws: of the guide, over which squared errors are averaged.
            mean: over processes.
        """
        if not self._recent:
            return
        model, family, likelihood = self.model, self.guide.noise_precision, self.model.likelihood
        assert isinstance(family, GammaFamily)
        assert isinstance(likelihood, Normal)
        elbo = ELBO()
        errors, count = model.output_scale.new_zeros((), dtype=torch.float64), 0
        with nets.kept_statistics(model.net), own_parameters(model, self.guide):
            for x, y in self._together():
                x, y = x.to(errors.device), y.to(errors.device)
                for _ in range(draws):
                    sites, _ = elbo._get_trace(model, self.guide, (x, y), {})
                    errors += (y - sites["y"]["fn"].mean).double().square().sum() / draws
                count += len(y)
        (squares,) = mean((errors * (model.num_data / count)).reshape(1))
        family.log_concentration.copy_((likelihood.shape + model.num_data / 2).log())
        family.log_rate.copy_((likelihood.rate + squares / 2).log())
