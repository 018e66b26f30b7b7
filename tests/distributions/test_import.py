"""Importing the package leaves everybody else's process as it was."""

import subprocess
import sys

SCRIPT = """
import warnings
import matplotlib
import pyro, pyro.infer.autoguide, scipy.special, torch  # scipy.special adds a filter of its own
from torch.distributions import biject_to, kl, transform_to

def state():
    stock = lambda key: all(part.__module__.split(".")[0] in ("torch", "pyro") for part in key)
    return (
        {key: value for key, value in kl._KL_REGISTRY.items() if stock(key)},
        dict(biject_to._registry), dict(transform_to._registry), pyro.settings.get(),
        list(warnings.filters), torch.get_default_dtype(), matplotlib.get_backend(),
        torch.random.get_rng_state().tolist(), torch.distributions.Normal._validate_args,
    )

before = state()
import pyro_sparse, pyro_sparse.distributions, pyro_sparse.infer
import pyro_sparse.models, pyro_sparse.guides
after = state()
added = {(p.__name__, q.__name__) for p, q in set(after[0]) - set(before[0])}
assert added <= {("LogNormal", "Gamma"), ("LogNormal", "InverseGamma")}, added
assert all(after[0][key] is value for key, value in before[0].items())
for one, other in zip(before[1:3], after[1:3]):
    assert all(other[key] is value for key, value in one.items())
    assert all(key.__module__.startswith("pyro_sparse") for key in set(other) - set(one))
assert before[3:] == after[3:]
"""


def test_import_changes_nothing_global() -> None:
    subprocess.run([sys.executable, "-c", SCRIPT], check=True)
