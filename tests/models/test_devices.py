"""Everything a training step touches lies where the model does.

On the device "meta", which every machine has: it computes nothing, but refuses to mix its tensors
with those of another device, as an accelerator does.
"""

import pyro
import pytest
import torch

from pyro_sparse import guides, models, nets
from pyro_sparse.infer import ELBO
from pyro_sparse.modules import own_parameters
from pyro_sparse.runs import zoo

X, IMAGES, LABELS = torch.randn(8, 6), torch.randn(8, 3, 8, 8), torch.randint(3, (8,))
NETS = {
    "mlp": (lambda: nets.mlp([6, 5, 4, 3]), X),
    "resnet": (lambda: nets.resnet(8, widths=(4, 6, 8), classes=3), IMAGES),
}
# SBP's truncated laws look at values to choose a method, Turbo-VBI's guide at its count of calls:
# on "meta" there are no values.
NAMES = sorted({entry.model for entry in zoo.ZOO.values()} - {"LogNormalNoise", "TurboMarkov"})


def test_other_devices_are_refused():
    with pytest.raises(RuntimeError, match="device"):
        torch.zeros(3) + torch.zeros(3, device="meta")


@pytest.mark.parametrize("pruned", [False, True])
@pytest.mark.parametrize("net", NETS)
@pytest.mark.parametrize("name", NAMES)
def test_a_step_on_another_device(name, net, pruned):
    build, x = NETS[net]
    model = getattr(models, name)(build(), x[:2], num_data=100)
    guide = guides.for_model(model)
    if pruned:
        model.support.restrict(
            {group: torch.arange(len(model.support[group])) > 0 for group in model.support}
        )
        guide.reduced()
    model.to("meta")
    guide.to("meta")
    with pyro.validation_enabled(False), own_parameters(model, guide):
        estimate = ELBO().estimate(model, guide, x.to("meta"), LABELS.to("meta"))
    estimate.loss.backward()
    assert all(part.device.type == "meta" for part in estimate)
    for parameter in guide.parameters():
        assert parameter.grad is not None
        assert parameter.grad.device.type == "meta"
