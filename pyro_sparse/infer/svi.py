"""`SVI`: Pyro's, for any model and guide, with steps that run without the Python around them."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any

import pyro.infer
import pyro.poutine as poutine
import torch
from pyro.optim import PyroOptim
from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from pyro_sparse.modules import adopt, leaves

from .elbo import ELBO
from .recipe import FusedAdam
from .tape import Taped

__all__ = ["SVI"]

MOST_KINDS = 16
"""Kinds of calls (shapes, and what is no tensor) of which tapes are kept."""


class SVI(pyro.infer.SVI):
    """:class:`pyro.infer.SVI`, which records the operations of a step and runs these alone.

    The same estimator, losses and parameters (in Pyro's store, or modules' own) from the same seed,
    but for rounding in the optimiser; see :mod:`pyro_sparse.infer.tape` for how. The first steps
    run as they are, with Pyro's validation in the first one. Models and guides have to do the same
    in every step: the same sites and parameters, and no Python that looks at the numbers in a
    tensor. Where one does, or where the loss does (as Pyro's own ELBOs do), all steps run as they
    are and ``reason`` says why. Python that changes by itself outside of modules, such as a counter
    in a closure, cannot be seen: pass what changes as an argument, or ``tape=False``.

    Args:
        model, guide: Pyro callables with the same latent sites.
        optim: one of :mod:`pyro.optim`. Where its options are a dictionary, without clipping, one
            torch optimiser has all parameters, ``optimizer``; otherwise it is called as by Pyro.
        loss: :class:`~pyro_sparse.infer.ELBO` by default; any loss with ``differentiable_loss``.
        tape: False runs all steps as they are.

    Attributes:
        optimizer: of all parameters, after the first step; None where ``optim`` has them.
        reason: why steps run as they are; None where they need not.
    """

    optimizer: torch.optim.Optimizer | None

    def __init__(
        self,
        model: Callable[..., Any],
        guide: Callable[..., Any],
        optim: PyroOptim,
        loss: Any = None,
        *,
        tape: bool = True,
    ) -> None:
        elbo = ELBO() if loss is None else loss
        super().__init__(model, guide, optim, elbo)
        self.optimizer = None
        self.reason = None if tape else "tape=False"
        self._elbo = elbo
        self._read = nn.Module()
        for name, function in (("model", model), ("guide", guide)):
            if isinstance(function, nn.Module):
                self._read.add_module(name, function)
        self._read.add_module("stored", nn.Module())
        self._moving: list[Tensor] = []
        self._tapes: dict[Hashable, Taped] = {}
        if tape and not hasattr(elbo, "differentiable_loss"):
            self.reason = f"{type(elbo).__name__} has no differentiable_loss"

    def step(self, *args: Any, **kwargs: Any) -> float:
        """One update of all parameters.

        Args:
            args, kwargs: of model and guide.

        Returns:
            The loss before it.
        """
        if not self._moving:
            with poutine.trace(param_only=True) as captured:
                loss = self.loss_and_grads(self.model, self.guide, *args, **kwargs)
            self.collect(captured.trace)
        else:
            loss, *gradients = self._terms(args, kwargs)
            for parameter, gradient in zip(self._moving, gradients, strict=True):
                parameter.grad = gradient
        if self.optimizer is None:
            self.optim(self._moving)
            pyro.infer.util.zero_grads(self._moving)
        else:
            self.optimizer.step()
            self.optimizer.zero_grad()
        return float(loss)

    def collect(self, trace: Any) -> None:
        """Note the parameters of a trace: what moves is what Pyro was told of, as in stock SVI."""
        known = {id(value) for value in self._read.parameters()}
        stored = self._read.get_submodule("stored")
        first, new = not self._moving, []
        for name, value in leaves(trace).items():
            if id(value) not in known:
                adopt(stored, name, value)
            if not any(value is other for other in self._moving):
                new.append(value)
                self._moving.append(value)
        if first and new:
            self.optimizer = self._make_optimizer()
        elif new and self.optimizer is not None:
            self.optimizer.add_param_group({"params": new})

    def _make_optimizer(self) -> torch.optim.Optimizer | None:
        optim: Any = self.optim
        if type(optim) is not PyroOptim or callable(optim.pt_optim_args) or optim.pt_clip_args:
            return None
        make: Any = optim.pt_optim_constructor
        parameters = self._moving
        plain = all(value.device.type == "cpu" for value in parameters)
        if make is torch.optim.Adam and plain and len({v.dtype for v in parameters}) == 1:
            make = FusedAdam
        optimizer: torch.optim.Optimizer = make(parameters, **optim.pt_optim_args)
        return optimizer

    def _terms(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Sequence[Tensor | None]:
        """Loss and gradients, from a tape where there is one."""
        given, spec = tree_flatten((args, kwargs))
        inputs = [leaf for leaf in given if isinstance(leaf, Tensor)]
        step = _Step(self, given, spec)
        if self.reason is not None:
            return step(*inputs)
        key = spec, tuple(None if isinstance(leaf, Tensor) else _Is(leaf) for leaf in given)
        if key not in self._tapes and len(self._tapes) < MOST_KINDS:
            self._tapes[key] = Taped(step, self._read)
        taped = self._tapes.get(key)
        if taped is None:
            return step(*inputs)
        self.reason = taped.reason
        return taped(*inputs)


class _Is:
    """An argument that is no tensor: the same one, or an equal number or word."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def _key(self) -> Any:
        plain = isinstance(self.value, bool | int | float | str | None)
        return (type(self.value), self.value) if plain else id(self.value)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Is) and self._key() == other._key()

    def __hash__(self) -> int:
        return hash(self._key())


class _Step:
    """Loss and gradients as a function of the tensors among the arguments."""

    def __init__(self, svi: SVI, given: list[Any], spec: TreeSpec) -> None:
        self._svi, self._spec = svi, spec
        self._others = [None if isinstance(leaf, Tensor) else leaf for leaf in given]
        self._places = [i for i, leaf in enumerate(given) if isinstance(leaf, Tensor)]

    def __call__(self, *inputs: Tensor) -> list[Tensor | None]:
        svi = self._svi
        given = list(self._others)
        for place, value in zip(self._places, inputs, strict=True):
            given[place] = value
        args, kwargs = tree_unflatten(given, self._spec)
        with pyro.validation_enabled(False), poutine.trace(param_only=True) as captured:
            loss = svi._elbo.differentiable_loss(svi.model, svi.guide, *args, **kwargs)
        svi.collect(captured.trace)  # of another batch there may be more
        gradients = torch.autograd.grad(loss, svi._moving, allow_unused=True)
        return [loss.detach(), *gradients]
