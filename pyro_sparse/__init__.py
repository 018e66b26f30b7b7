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
        zoo,
    )
    from .comparison import compare
    from .export.shipping import compact
    from .infer.fit import fit
    from .posterior import Posterior, fit_seeds

__version__ = "0.1.0"

__all__ = [
    "Posterior",
    "compact",
    "compare",
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
    "zoo",
]

_HOME = {
    "Posterior": "posterior",
    "compact": "export",
    "compare": "comparison",
    "fit": "infer",
    "fit_seeds": "posterior",
}


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
    if name in __all__:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
