"""Networks of several inputs, and targets of any shape, through training and the posterior."""

import pyro.distributions as dist
import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader

import pyro_sparse as ps

GENERATOR = torch.Generator().manual_seed(0)
X, Z = torch.randn(60, 4, generator=GENERATOR), torch.randn(60, 3, generator=GENERATOR)
Y = (X[:, 0] + Z[:, 1] > 0).long()


class One(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.o = nn.Linear(4, 6), nn.Linear(3, 6), nn.Linear(6, 2)

    def join(self, x, z):
        return self.o(torch.relu(self.a(x) + self.b(z)))

    def forward(self, both):
        return self.join(both[:, :4], both[:, 4:])


class Two(One):
    def forward(self, x, z):
        return self.join(x, z)


class Named(One):
    def forward(self, inputs):
        return self.join(inputs["x"], inputs["z"])


FORMS = {
    "tuple": (Two, (X, Z)),
    "keywords": (Two, {"x": X, "z": Z}),
    "dictionary": (Named, {"x": X, "z": Z}),
}


def rows(value, index):
    if isinstance(value, dict):
        return {name: tensor[index] for name, tensor in value.items()}
    return tuple(tensor[index] for tensor in value) if isinstance(value, tuple) else value[index]


def fitted(net, x, loader=None, **options):
    model = ps.models.SpikeSlabGroupHorseshoe(net, rows(x, slice(2)), num_data=60)
    guide = ps.guides.for_model(model)
    loader = loader or ps.data.Batches(x, Y, 20)
    run = ps.fit(model, guide, loader, epochs=15, lr=2e-2, progress=False, **options)
    return run, ps.Posterior(model, guide)


@pytest.fixture(scope="module")
def joined():
    x = torch.cat([X, Z], 1)
    run, posterior = fitted(One(), x, validation=(x, Y))
    torch.manual_seed(3)
    return run, posterior.evaluate(x, Y), posterior.masked(x)


@pytest.mark.parametrize("form", FORMS)
def test_the_numbers_of_one_input(form, joined):
    """The same operations, so the same to rounding as with one input that is taken apart."""
    net, x = FORMS[form]
    run, posterior = fitted(net(), x, validation=(x, Y))
    for own, other in zip(run.history, joined[0].history, strict=True):
        assert own["loss"] == pytest.approx(other["loss"], rel=1e-4)
        assert own["validation_elbo_per_datum"] == pytest.approx(
            other["validation_elbo_per_datum"], rel=1e-4
        )
    assert posterior.masked(x) == pytest.approx(joined[2], abs=1e-3)
    torch.manual_seed(3)
    assert posterior.evaluate(x, Y)["nll_ensemble"] == pytest.approx(
        joined[1]["nll_ensemble"], rel=1e-3
    )
    assert posterior.predict(x, 3).shape == (3, 60, 2)
    assert len(posterior.khat(x, Y, num_samples=30, blocks={}).ratios) == 30
    recorded = posterior.to_arviz(x, Y, num_samples=2)
    assert recorded["log_likelihood"]["y"].shape == (1, 2, 60)
    compact = ps.compact(posterior)
    args, kwargs = ((), x) if form == "keywords" else ((x if form == "tuple" else (x,)), {})
    assert compact(*args, **kwargs).detach() == pytest.approx(posterior.masked(x), abs=1e-5)


def test_a_data_loader_of_dictionaries_resumes_to_the_bit(tmp_path):
    samples = [({"x": x, "z": z}, y) for x, z, y in zip(X, Z, Y, strict=True)]

    def train(**options):
        model = ps.models.SpikeSlabGaussian(Two(), {"x": X[:2], "z": Z[:2]}, num_data=60)
        guide = ps.guides.for_model(model)
        loader = DataLoader(samples, batch_size=20, shuffle=True)
        ps.fit(model, guide, loader, epochs=3, progress=False, **options)
        return guide.state_dict()

    def stop(metrics):
        if metrics["epoch"] == 1:
            raise InterruptedError

    whole = train()
    with pytest.raises(InterruptedError):
        train(out=tmp_path, on_epoch=stop)
    resumed = train(out=tmp_path, resume=True)
    assert all(torch.equal(value, resumed[name]) for name, value in whole.items())


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (X, r"as in the model's example \(x \(2, 4\), z \(2, 3\)\).*got shape \(60, 4\)"),
        ({"x": X}, r"got x \(60, 4\)"),
        ({"x": X, "other": Z}, r"as in the model's example"),
        ({"x": X, "z": Z[:, :2]}, r"input 2: expected rows of shape \(3,\)"),
        ({"x": X, "z": Z[:50]}, "as many rows in x as in y"),
        ({"x": X, "z": Z.long()}, "floating-point x"),
        ({"x": X, "z": Z.double()}, "network's dtype"),
        ({"x": X, "z": torch.full_like(Z, torch.nan)}, "NaN"),
    ],
)
def test_inputs_that_do_not_fit(x, message):
    model = ps.models.SpikeSlabGaussian(Two(), {"x": X[:2], "z": Z[:2]}, num_data=60)
    guide = ps.guides.for_model(model)
    with pytest.raises(ValueError, match=message):
        ps.fit(model, guide, [(x, Y)], epochs=1, progress=False)
    if not isinstance(x, dict) or "z" not in x or x["z"].shape[1] != 3:
        with pytest.raises(ValueError, match="as in the model's example"):
            ps.Posterior(model, guide).masked(x)


def test_learnt_noise_of_several_inputs():
    y = X[:, 0] - Z[:, 0]

    class Sum(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 1), nn.Linear(3, 1)

        def forward(self, x, z):
            return self.a(x) + self.b(z)

    torch.manual_seed(0)
    model = ps.models.ReducibleGaussian(
        Sum(), (X[:2], Z[:2]), likelihood=ps.likelihoods.Normal(), num_data=60
    )
    guide = ps.guides.for_model(model)
    loader = ps.data.Batches((X, Z), y, 20)
    ps.fit(model, guide, loader, epochs=100, lr=2e-2, progress=False)
    assert ps.Posterior(model, guide).evaluate((X, Z), y)["rmse_compact"] < 0.3


# -- targets ---------------------------------------------------------------------------------------


class Pixels(ps.likelihoods.Likelihood):
    """A class for every pixel: outputs ``(batch, classes, height, width)``."""

    def distribution(self, output, **latents):
        return dist.Categorical(logits=output.movedim(1, -1)).to_event(2)

    def natural(self, output):
        return output.softmax(1)


class Reconstruction(ps.likelihoods.Likelihood):
    def distribution(self, output, **latents):
        return dist.Normal(output, 0.5).to_event(1)

    def natural(self, output):
        return output


def test_segmentation_with_a_likelihood_of_ones_own():
    torch.manual_seed(0)
    images = functional.avg_pool2d(torch.randn(40, 1, 8, 8), 3, 1, 1)
    labels = (images[:, 0] > 0).long()
    net = nn.Sequential(nn.Conv2d(1, 6, 3, padding=1), nn.ReLU(), nn.Conv2d(6, 2, 1))
    model = ps.models.SpikeSlabGroupHorseshoe(net, images[:2], likelihood=Pixels(), num_data=40)
    guide = ps.guides.for_model(model)
    loader = ps.data.Batches(images, labels, 20)
    run = ps.fit(model, guide, loader, epochs=40, lr=2e-2, progress=False)
    assert run.history[-1]["loss"] < 0.5 * run.history[0]["loss"]
    posterior = ps.Posterior(model, guide)
    predicted = posterior.predict(images, 10).mean(0).argmax(1)
    assert float((predicted == labels).double().mean()) > 0.9
    recorded = posterior.to_arviz(images, labels, num_samples=2)
    assert recorded["log_likelihood"]["y"].shape == (1, 2, 40)
    scores = posterior.evaluate(images, labels)
    assert {name.partition("_")[0] for name in scores} == {"nll"}  # no rate, no RMSE of classes
    with pytest.raises(ValueError, match=r"expected targets of shape \(\d+, 8, 8\)"):
        ps.fit(model, guide, ps.data.Batches(images, labels[:, 0], 20), epochs=1, progress=False)


def test_an_autoencoder():
    torch.manual_seed(0)
    x = torch.randn(60, 2) @ torch.randn(2, 8)
    net = ps.nets.mlp([8, 6, 8])
    model = ps.models.SpikeSlabGaussian(net, x[:2], likelihood=Reconstruction(), num_data=60)
    guide = ps.guides.for_model(model)
    ps.fit(model, guide, ps.data.Batches(x, x, 20), epochs=150, lr=2e-2, progress=False)
    posterior = ps.Posterior(model, guide)
    error = (posterior.masked(x) - x).square().mean()
    assert float(error) < 0.3 * float(x.var())
    assert posterior.evaluate(x, x)["rmse_compact"] == pytest.approx(float(error) ** 0.5)
