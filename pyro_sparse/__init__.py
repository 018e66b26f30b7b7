"""Structurally sparse Bayesian neural networks on Pyro.

::

    import pyro_sparse as ps

    model = ps.models.SpikeSlabGroupHorseshoe(net, example, num_data=60_000)
    guide = ps.guides.for_model(model)
    run = ps.fit(model, guide, loader, epochs=60)
    posterior = ps.Posterior(model, guide)
    small = ps.compact(posterior)
    ps.export.save(small, "out/")

Submodules are imported where they are first used, so that ``pyro-sparse --help`` and the exported
networks' loader do not wait for torch and Pyro.
"""

from __future__ import annotations

import importlib
import sys
import warnings
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from . import (
        data,
        distributions,
        export,
        graph,
        guides,
        infer,
        likelihoods,
        models,
        nets,
        posterior,
        runs,
    )
    from .export.shipping import compact
    from .infer._fit import fit
    from .posterior import Posterior, compare_guides, fit_seeds
    from .runs import zoo
    from .runs.comparison import compare
    from .runs.estimator import (
        SparseBNNClassifier,
        SparseBNNPoissonRegressor,
        SparseBNNRegressor,
    )
    from .runs.sparsify import sparsify

__version__ = "0.1.0"

__all__ = [
    "Posterior",
    "SparseBNNClassifier",
    "SparseBNNPoissonRegressor",
    "SparseBNNRegressor",
    "compact",
    "compare",
    "compare_guides",
    "data",
    "distributions",
    "export",
    "fit",
    "fit_seeds",
    "graph",
    "guides",
    "infer",
    "likelihoods",
    "models",
    "nets",
    "posterior",
    "runs",
    "sparsify",
    "zoo",
]

_HOME = {
    "Posterior": "posterior",
    "SparseBNNClassifier": "runs.estimator",
    "SparseBNNPoissonRegressor": "runs.estimator",
    "SparseBNNRegressor": "runs.estimator",
    "compact": "export",
    "compare": "runs.comparison",
    "compare_guides": "posterior",
    "fit": "infer",
    "fit_seeds": "posterior",
    "sparsify": "runs.sparsify",
}

_MOVED = {
    name: f"{__name__}.runs.{'terminal' if name == 'report' else name}"
    for name in (
        *("analysis", "comparison", "deployment", "experiment", "page", "parallel"),
        *("report", "settings", "table", "zoo"),
    )
}
"""Modules that lay in this folder before there was `pyro_sparse.runs`."""


def _moved(name: str) -> ModuleType:
    """The module that was called so, with a warning that names its new place."""
    warnings.warn(f"{__name__}.{name} is now {_MOVED[name]}", DeprecationWarning, stacklevel=3)
    return importlib.import_module(_MOVED[name])


class _Moved(ModuleType):
    """Stands for a module that moved, so that ``import`` by its old name still works."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(_moved(self.__name__.rpartition(".")[2]), name)


for _name in _MOVED:
    sys.modules.setdefault(f"{__name__}.{_name}", _Moved(f"{__name__}.{_name}"))


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
    if name == "zoo":
        return importlib.import_module(_MOVED[name])
    if name in __all__:
        return importlib.import_module(f"{__name__}.{name}")
    if name in _MOVED:
        return _moved(name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
