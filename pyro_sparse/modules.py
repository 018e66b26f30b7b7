"""Pyro modules whose parameters can be their own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pyro
from pyro.nn import PyroModule
from pyro.nn.module import _is_module_local_param_enabled

from pyro_sparse.threads import ALONE

__all__ = ["LocalPyroModule", "own_parameters"]


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
