"""Pyro's traced ELBOs: right, or refused in a sentence."""

import pyro
import pytest
import torch
from pyro.infer import SVI, JitTraceMeanField_ELBO, TraceMeanField_ELBO

from pyro_sparse import guides, models
from pyro_sparse.nets import mlp

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")


def losses(cls, elbo, steps=30):
    torch.manual_seed(0)
    x, y = torch.randn(12, 4), torch.arange(12) % 2
    pyro.clear_param_store()
    model = cls(mlp([4, 5, 2]), x[:2], num_data=12)
    svi = SVI(model, guides.for_model(model), pyro.optim.Adam({"lr": 1e-9}), elbo)
    return torch.tensor([svi.step(x, y) for _ in range(steps)])


@pytest.mark.parametrize("cls", [models.LogNormalNoise, models.ReducibleGaussian])
def test_traced_is_untraced(cls):
    plain = losses(cls, TraceMeanField_ELBO())
    traced = losses(cls, JitTraceMeanField_ELBO(ignore_jit_warnings=True))
    error = ((plain.var() + traced.var()) / len(plain)).sqrt()
    assert abs(plain.mean() - traced.mean()) < 4 * error + 1e-3


def test_a_relaxed_inclusion_is_refused():
    with pytest.raises(RuntimeError, match="have no density"):
        losses(models.SpikeSlabGaussian, JitTraceMeanField_ELBO(ignore_jit_warnings=True), 1)
