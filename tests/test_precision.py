"""Autocast lowers the precision of the network's forward pass, and of nothing else."""

import pytest
import torch
from torch import nn

from pyro_sparse import guides, likelihoods, models, nets
from pyro_sparse.data import Batches
from pyro_sparse.infer import ELBO, fit, make_fabric
from pyro_sparse.modules import own_parameters
from pyro_sparse.posterior import Posterior
from pyro_sparse.precision import autocast_suspended, full_precision, network_autocast

CPU = torch.device("cpu")


def product():
    return (torch.ones(2, 2) @ torch.ones(2, 2)).dtype


def test_suspended_and_taken_up_again():
    with torch.autocast("cpu", torch.bfloat16):
        assert product() == torch.bfloat16
        with autocast_suspended(CPU):
            assert product() == torch.float32
            with network_autocast(CPU):
                assert product() == torch.bfloat16
            assert product() == torch.float32
        assert product() == torch.bfloat16
    with network_autocast(CPU):
        assert product() == torch.float32
    with autocast_suspended(CPU), network_autocast(CPU):
        assert product() == torch.float32


def test_full_precision_switches_tf32_off_and_on_again():
    """The switches are there without a CUDA device, too."""
    cudnn = torch.backends.cudnn
    before = cudnn.allow_tf32
    with full_precision(CPU):
        assert cudnn.allow_tf32 == before
    with full_precision(torch.device("cuda")):
        # The names of torch 2.9 do not mix with those before.
        new = hasattr(cudnn, "conv")
        assert cudnn.conv.fp32_precision == "ieee" if new else not cudnn.allow_tf32
    assert cudnn.allow_tf32 == before


def test_targets_are_not_rounded():
    """A regression's targets keep their numbers: Fabric alone would round the whole batch."""
    seen = []

    class Remembering(likelihoods.Normal):
        def forward(self, output, y, num_data):
            seen.append(y)
            return super().forward(output, y, num_data)

    x, y = torch.randn(32, 3), torch.randn(32)
    model = models.SpikeSlabGaussian(
        nets.mlp([3, 4, 1]), x[:2], likelihood=Remembering(), num_data=32
    )
    fabric = make_fabric(accelerator="cpu", precision="bf16-mixed")
    batches = Batches(x, y, 32, shuffle=False)
    fit(model, guides.for_model(model), batches, epochs=1, progress=False, fabric=fabric)
    assert torch.equal(seen[-1], y)


class Spy(nn.Module):
    """Remembers the type of what passes through."""

    def forward(self, x):
        self.seen = x.dtype
        return x


@pytest.mark.parametrize("local", [False, True])
@pytest.mark.parametrize("name", sorted({"SpikeSlabGroupHorseshoe", "ReducibleGaussian"}))
def test_only_the_network(name, local):
    torch.manual_seed(0)
    x, y = torch.randn(16, 6), torch.randint(3, (16,))
    model = getattr(models, name)(nets.mlp([6, 8, 3]), x[:2], num_data=100)
    # A joint last layer draws its weights by a matrix product.
    options = {"last_layer": "joint"} if name == "ReducibleGaussian" else {}
    guide = guides.for_model(model, **options)
    model.net.act1 = nn.Sequential(model.net.act1, Spy())
    elbo = ELBO(local_reparameterisation=local)

    def estimate():
        torch.manual_seed(1)
        guide.zero_grad()
        with own_parameters(model, guide):
            result = elbo.estimate(model, guide, x, y)
        result.kl.backward(retain_graph=True)
        gradients = [p.grad.clone() for p in guide.parameters() if p.grad is not None]
        return result, gradients, model.net.act1[1].seen

    exact, gradients, seen = estimate()
    assert seen == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        mixed, others, seen = estimate()
    assert local or seen == torch.bfloat16
    assert torch.equal(mixed.kl, exact.kl)
    assert gradients
    assert all(torch.equal(a, b) for a, b in zip(gradients, others, strict=True))
    assert mixed.log_likelihood.dtype == torch.float32
    # Rounded to 8 bits, not more, and not less.
    error = abs(float((mixed.log_likelihood / exact.log_likelihood).detach()) - 1)
    assert 1e-7 < error < 0.02


def test_a_fit_in_mixed_precision():
    """It learns what one in full precision learns, and records a KL of full precision."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(400, 4, generator=generator)
    y = (x[:, 0] + x[:, 1] > 0).long()
    accuracy, kl, parameters = {}, {}, {}
    for precision in ("32-true", "bf16-mixed"):
        torch.manual_seed(1)
        model = models.SpikeSlabGaussian(nets.mlp([4, 16, 2]), x[:2], num_data=400)
        guide = guides.for_model(model)
        run = fit(
            *(model, guide, Batches(x, y, 50)),
            epochs=40,
            lr=0.02,
            progress=False,
            fabric=make_fabric(accelerator="cpu", precision=precision),
        )
        posterior = Posterior(model, guide)
        accuracy[precision] = float((posterior.predict(x).mean(0).argmax(1) == y).double().mean())
        kl[precision] = [entry["kl"] for entry in run.history]
        parameters[precision] = list(guide.parameters())
    assert min(accuracy.values()) > 0.9
    assert abs(accuracy["32-true"] - accuracy["bf16-mixed"]) < 0.05
    # The first epoch's differs by what its few updates differ by: far less than 8 bits would.
    assert kl["bf16-mixed"][0] == pytest.approx(kl["32-true"][0], rel=2e-3)
    assert kl["bf16-mixed"] != kl["32-true"]
    assert all(one.dtype == torch.float32 for one in parameters["bf16-mixed"])
