"""A fitted pair: any Pyro model with its guide, and what the guide says of itself."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor

from pyro_sparse.distributions import TruncatedLogNormal
from pyro_sparse.guides import Offer, Reducible
from pyro_sparse.ranges import whole

from .draws import Draw, draw, measuring

__all__ = ["OFFERS", "Fitted", "NotOfferedError"]


class NotOfferedError(ValueError):
    """A measure or rule asks for something that the posterior does not have."""


OFFERS = {
    "inclusion": "inclusion probabilities (ss-ig, ss-gl, ss-ghs, turbo-vbi)",
    "noise": "a multiplicative noise on units (sbp)",
    "gaussians": "a reducible Gaussian on every weight (bmr)",
    "log_alpha": "dropout rates of units (bc-gnj)",
    "log_scales": "scales of units (bc-ghs)",
    "row_variances": "Gaussian weights (all but sbp and dense)",
}
"""What guides may offer, by name, and whose do; see :class:`pyro_sparse.guides.Offer`."""


class Fitted:
    """A Pyro model and a guide with the same latent sites, after training.

    Nothing here knows of networks; :class:`~.network.FittedNetwork` does.

    Args:
        model: any Pyro callable.
        guide: any Pyro callable; what it says beyond draws, it says by a method ``offers``, see
            :class:`pyro_sparse.guides.Offer`.
    """

    def __init__(self, model: Any, guide: Any) -> None:
        self.model = model
        self.guide = guide

    # -- what the guide says ---------------------------------------------------------------------

    def offers(self) -> dict[str, Offer]:
        """What the guide says of units and weights, by name; empty where it says nothing."""
        offers = getattr(self.guide, "offers", None)
        return {} if offers is None else offers()

    def offer(self, name: str, who: str) -> Offer:
        """One of `offers`.

        Args:
            name: of it.
            who: what needs it, for the error.

        Raises:
            NotOfferedError: the guide has no such thing; the message says which models' guides
                have, and what this one has.
        """
        offers = self.offers()
        if name in offers:
            return offers[name]
        own = {
            **{name: OFFERS[name] for name in OFFERS if name in offers},
            **{name: offer.title for name, offer in offers.items() if name not in OFFERS},
        }
        raise NotOfferedError(
            f"{who} needs {OFFERS.get(name, name)}, which the posterior of "
            f"{type(self.model).__name__} does not have; it has "
            f"{'; '.join(own.values()) or 'point estimates only'}"
        )

    def _laws(self, name: str) -> dict[str, Any]:
        offers = self.offers()
        return offers[name].laws if name in offers else {}

    def inclusion(self) -> dict[str, Tensor]:
        """Posterior inclusion probabilities γ by group.

        Groups that the model cannot exclude are absent; a dense model has none.

        Returns:
            ``{group: (units,)}``, on the CPU.
        """
        return self.guide_inclusion()

    def guide_inclusion(self) -> dict[str, Tensor]:
        """γ by group under the guide, by which units are kept and networks drawn.

        Returns:
            ``{group: (units,)}``, on the CPU.
        """
        return self._laws("inclusion")

    def noise(self) -> dict[str, TruncatedLogNormal]:
        """Laws ``(units,)`` of the multiplicative noise by group, in float64; empty without one."""
        return self._laws("noise")

    def gaussians(self) -> dict[str, Reducible]:
        """Gaussian posterior and prior of the weights by group; empty where they are not."""
        return self._laws("gaussians")

    def log_alpha(self) -> dict[str, Tensor]:
        """Log dropout rates log α ``(units,)`` of units by group; empty without any."""
        return self._laws("log_alpha")

    def log_scales(self) -> dict[str, Tensor]:
        """Mean log scale ``(units,)`` of units by group; empty without any, or with a spike."""
        return self._laws("log_scales")

    def row_variances(self) -> dict[str, Tensor]:
        """Posterior variance of every weight, ``(units, row length)`` by group.

        For included units, and marginal over their scales; empty where rows are not Gaussian.
        """
        return self._laws("row_variances")

    # -- what it draws ---------------------------------------------------------------------------

    def joint_draws(self, num_samples: int, *args: Any, **kwargs: Any) -> Iterator[Draw]:
        """Draws of the guide with the model replayed by them; see :class:`~.draws.Draw`.

        Args:
            num_samples: how many.
            args, kwargs: what model and guide are called with.

        Raises:
            ValueError: fewer than one draw.
        """
        whole(num_samples=num_samples)
        for _ in range(num_samples):
            # By draw, so that no context is left open between two of them.
            with measuring(self.model, self.guide):
                one = draw(self.model, self.guide, *args, **kwargs)
            yield one
