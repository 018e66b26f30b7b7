"""Pyro modules whose parameters can be their own."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pyro
import pyro.poutine as poutine
import torch
from pyro.nn import PyroModule
from pyro.nn.module import _is_module_local_param_enabled
from pyro.poutine.messenger import Messenger
from torch import nn
from torch.distributions import constraints, transform_to

from pyro_sparse.threads import ALONE

__all__ = ["LocalPyroModule", "StoredParameters", "adopt", "leaves", "own_parameters"]


class LocalPyroModule(PyroModule):
    """A PyroModule that works with ``module_local_params`` both on and off.

    Pyro decides at construction whether a module can hold its own parameters; off is its default.
    Stock SVI needs it off when the module is run, ELBO modules with torch optimisers want it on.
    """

    def __init__(self) -> None:
        with pyro.settings.context(module_local_params=True):
            super().__init__()

    def __getattr__(self, name: str) -> Any:
        # With local parameters Pyro would announce every parameter below a submodule to its
        # handlers on each access, a millisecond a step, for no one to hear.
        if _is_module_local_param_enabled():
            value = self.__dict__["_modules"].get(name)
            if value is not None and not isinstance(value, PyroModule):
                return value
        return super().__getattr__(name)


@contextmanager
def own_parameters(*functions: Callable[..., Any]) -> Iterator[None]:
    """Context in which these models and guides use their own parameters, if they all can.

    Otherwise the setting is left as it is: hand-written functions and modules made without
    `LocalPyroModule` go on using the global parameter store.
    """
    modules = [function for function in functions if isinstance(function, PyroModule)]
    local = len(modules) == len(functions) and all(
        hasattr(module._pyro_context, "param_state") for module in modules
    )
    with ALONE, pyro.settings.context(module_local_params=True) if local else nullcontext():
        yield


class StoredParameters(nn.Module):
    """A Pyro callable with the parameters that it has in Pyro's store as parameters of this module.

    They are the store's own tensors, unconstrained: what trains one of them trains the other, and
    what is saved with the module is what ``pyro.param`` gives. Those of an ``nn.Module`` are its
    own.

    Args:
        function: a Pyro callable: a function, an ``nn.Module`` or one of Pyro's.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        # Below this module where it is one; a function is a plain attribute.
        self.function = function
        self._of_pyro = isinstance(function, PyroModule)
        self._local = isinstance(function, PyroModule) and hasattr(
            function._pyro_context, "param_state"
        )
        self.stored = nn.Module()
        self._values: dict[str, torch.Tensor | None] = {}  # None for a module's own

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        # A local module has the store out of the way; its tensors are here. Pyro's modules have
        # their own, and would leave copies of their names in the store.
        store = pyro.get_param_store().scope() if self._of_pyro else nullcontext()
        with store, _Stored(self), pyro.settings.context(module_local_params=self._local):
            return self.function(*args, **kwargs)

    def collect(self, *args: Any, **kwargs: Any) -> Any:
        """Run once, without leaving a mark on random states, and note the parameters it reads.

        Returns:
            The trace.
        """
        with (
            torch.random.fork_rng([]),
            torch.no_grad(),
            pyro.settings.context(module_local_params=self._local),
        ):
            trace = poutine.trace(self.function).get_trace(*args, **kwargs)
        known = {id(value) for value in self.parameters()}
        for name, value in leaves(trace).items():
            if id(value) in known:
                self._values.setdefault(name, None)
                continue
            adopt(self.stored, name, value)
            self._values[name] = value
        return trace


def leaves(trace: Any) -> dict[str, torch.Tensor]:
    """What moves of the ``pyro.param`` statements of a trace, unconstrained, by name."""
    values = {name: site["value"] for name, site in trace.nodes.items() if site["type"] == "param"}
    return {
        name: value.unconstrained() if hasattr(value, "unconstrained") else value
        for name, value in values.items()
    }


def adopt(module: nn.Module, name: str, value: Any) -> None:
    """Make a tensor of Pyro's parameter store a parameter of a module; it stays the store's own."""
    value._is_param = True  # by which torch knows a parameter that is no nn.Parameter
    module.register_parameter(name.replace(".", "/"), value)


class _Stored(Messenger):
    """Handler under which ``pyro.param`` statements have what is collected in a module."""

    def __init__(self, module: StoredParameters) -> None:
        super().__init__()
        self._module = module

    def _pyro_param(self, msg: Any) -> None:
        name = msg["name"]
        if name not in self._module._values:
            raise ValueError(
                f"the parameter {name!r} was not there when the function ran first; expected the "
                "same pyro.param statements in every run"
            )
        value = self._module._values[name]
        if value is None:
            return
        constrained: Any = transform_to(msg["kwargs"].get("constraint", constraints.real))(value)
        constrained.unconstrained = weakref.ref(value)
        msg["value"], msg["done"] = constrained, True
