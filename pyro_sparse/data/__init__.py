"""Data sets in memory, split and standardised without leakage; no Pyro in here.

Conventions
    - ``x`` is float32 of shape (N, features...), images are (N, channels, height, width); ``y`` has
      shape (N,): int64 labels 0..classes-1, or float32 targets for regression.
    - The test rows are the official ones, or, where there are none, a fixed fifth of the rows that
      no seed of the user's changes. Validation rows are carved from the training rows only.
    - Every statistic (means, standard deviations) comes from the training rows that are left then.
    - Nothing downloads unless asked to.

Tables, as files or frames, are read by :mod:`pyro_sparse.data.tables`; what was guessed about them
is in `Dataset.taken` and `Dataset.notes`.

To add a data set, write one function in :mod:`pyro_sparse.data.sources` that returns a ``Source``
(all rows, and which of them are for training and which for testing), and name it in ``load``.
"""

from pyro_sparse.data.batches import Batches, crop_and_flip
from pyro_sparse.data.checks import check
from pyro_sparse.data.dataset import Dataset, Split
from pyro_sparse.data.sources import NAMES, load

__all__ = ["NAMES", "Batches", "Dataset", "Split", "check", "crop_and_flip", "load"]
