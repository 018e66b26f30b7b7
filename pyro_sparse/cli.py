"""``python -m pyro_sparse.cli``: the command line, which is :mod:`pyro_sparse.runs.cli`."""

from __future__ import annotations

import sys

from pyro_sparse.runs.cli import main

__all__ = ["main"]

if __name__ == "__main__":
    sys.exit(main())
