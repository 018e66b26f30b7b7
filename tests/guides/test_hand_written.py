"""Guides of one's own: functions and modules, beside the package's guide of the same law."""

import copy

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI
from pyro.nn import PyroModule, PyroParam
from torch import nn

import pyro_sparse as ps
from pyro_sparse.distributions import RelaxedSpikeAndSlab

X = torch.randn(60, 4, generator=torch.Generator().manual_seed(0))
Y = (X[:, 0] > 0).long()


@pytest.fixture(autouse=True)
def _own_store():
    with pyro.get_param_store().scope():
        yield


@pytest.fixture
def model():
    torch.manual_seed(0)
    return ps.models.SpikeSlabGaussian(ps.nets.mlp([4, 5, 2]), X[:2], num_data=60)


def rows(group, loc, scale, logits):
    slab = dist.Normal(loc, scale).to_event(1)
    if group.prunable:
        slab = RelaxedSpikeAndSlab(0.5, logits=logits, slab=slab)
    pyro.sample(f"{group.name}.rows", slab.to_event(1))


def as_function(model):
    start = model.initial_rows()

    def guide(x=None, y=None):
        for group in model.layers:
            loc = pyro.param(f"{group.name}.loc", lambda group=group: start[group.name].clone())
            scale = pyro.param(
                f"{group.name}.scale", torch.full_like(loc, 0.05), dist.constraints.positive
            )
            logits = pyro.param(f"{group.name}.logits", torch.zeros(group.size))
            rows(group, loc, scale, logits)

    return guide


class Module(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.groups = model.layers
        start = model.initial_rows()
        self.loc = nn.ParameterList([start[group.name].clone() for group in self.groups])
        self.logits = nn.ParameterList([torch.zeros(group.size) for group in self.groups])

    def forward(self, x=None, y=None):
        for group, loc, logits in zip(self.groups, self.loc, self.logits, strict=True):
            rows(group, loc, torch.full_like(loc, 0.05), logits)


class OfPyro(PyroModule):
    def __init__(self, model):
        super().__init__()
        self.groups = model.layers
        for number, group in enumerate(self.groups):
            loc = model.initial_rows()[group.name].clone()
            setattr(self, f"loc{number}", nn.Parameter(loc))
            setattr(
                self,
                f"scale{number}",
                PyroParam(torch.full_like(loc, 0.05), dist.constraints.positive),
            )
            setattr(self, f"logits{number}", nn.Parameter(torch.zeros(group.size)))

    def forward(self, x=None, y=None):
        for number, group in enumerate(self.groups):
            rows(group, *(getattr(self, f"{kind}{number}") for kind in ("loc", "scale", "logits")))


KINDS = {"function": as_function, "module": Module, "Pyro's module": OfPyro}


@pytest.fixture(params=KINDS)
def guide(request, model):
    return KINDS[request.param](model)


def train(model, guide, **options):
    loader = ps.data.Batches(X, Y, 20)
    return ps.fit(
        model,
        guide,
        loader,
        epochs=40,
        lr=2e-2,
        progress=False,
        kl_weight=lambda progress: 0.1,
        **options,
    )


def test_trains_and_answers(model, guide):
    run = train(model, guide)
    losses = [epoch["elbo_per_datum"] for epoch in run.history]
    assert losses[-1] > losses[0] + 0.1
    posterior = ps.Posterior(model, guide)
    scores = posterior.evaluate(X, Y)
    assert scores["accuracy_ensemble"] > 0.9
    assert set(posterior.inclusion()) == {"fc1"}
    summary = posterior.summary().groups[0]
    assert summary.expected == pytest.approx(float(posterior.inclusion()["fc1"].sum()))
    keep = {"fc1": torch.tensor([True, False, True, True, False])}
    compact = ps.export.compact(posterior, keep)
    assert compact(X).detach() == pytest.approx(posterior.masked(X, keep), abs=1e-5)


def test_what_is_trained_stands_in_the_store(model):
    guide = as_function(model)
    before = {
        name: value.clone()
        for name, value in ps.guides.HandWritten(model, guide).named_parameters()
    }
    train(model, guide)
    store = pyro.get_param_store()
    assert set(store) == {
        f"{g}.{kind}" for g in ("fc1", "out") for kind in ("loc", "scale", "logits")
    }
    logits = pyro.param("fc1.logits").detach().clone()
    assert not torch.equal(logits, before["written.stored.fc1/logits"])
    posterior = ps.Posterior(model, guide)
    assert posterior.inclusion()["fc1"] == pytest.approx(logits.double().sigmoid())
    assert posterior.guide.mean_rows()["fc1"] == pytest.approx(pyro.param("fc1.loc").detach())
    # And stock SVI goes on with the same numbers.
    SVI(model, guide, pyro.optim.Adam({"lr": 0.1}), ps.infer.ELBO()).step(X, Y)
    assert posterior.inclusion()["fc1"] == pytest.approx(
        pyro.param("fc1.logits").detach().double().sigmoid()
    )
    assert not torch.equal(pyro.param("fc1.logits"), logits)


def test_logits_have_the_rate_of_inclusions(model, guide):
    kinds = ps.guides.HandWritten(model, guide).parameters_by_kind()
    assert sorted(value.shape for value in kinds["inclusion"]) == [(5,)]
    assert len(kinds["weights"]) >= 3


def test_resumes_to_the_bit(model, tmp_path):
    loader = ps.data.Batches(X, Y, 20)
    options = {"epochs": 4, "lr": 1e-2, "progress": False}
    other = copy.deepcopy(model)
    with pyro.get_param_store().scope():
        whole = ps.guides.HandWritten(other, as_function(other))
        ps.fit(other, whole, loader, **options)

    def stop(metrics):
        if metrics["epoch"] == 2:
            raise InterruptedError

    guide = as_function(model)
    with pytest.raises(InterruptedError):
        ps.fit(model, guide, ps.data.Batches(X, Y, 20), on_epoch=stop, out=tmp_path, **options)
    ps.fit(model, guide, ps.data.Batches(X, Y, 20), out=tmp_path, resume=True, **options)
    own = ps.guides.as_guide(model, guide).state_dict()
    for name, value in whole.state_dict().items():
        if name != "inclusion_kl_weights":
            assert torch.equal(value, own[name]), name


def test_learnt_noise():
    y = X[:, 0] + 0.1 * torch.randn(60, generator=torch.Generator().manual_seed(1))
    model = ps.models.ReducibleGaussian(
        ps.nets.mlp([4, 1]), X[:2], likelihood=ps.likelihoods.Normal(), num_data=60
    )

    def guide(x=None, y=None):
        for group in model.layers:
            loc = pyro.param("loc", model.initial_rows()[group.name].clone())
            pyro.sample(f"{group.name}.rows", dist.Normal(loc, 0.05).to_event(2))
        a, b = (pyro.param(name, torch.tensor(5.0), dist.constraints.positive) for name in "ab")
        pyro.sample("noise_precision", dist.Gamma(a, b))

    ps.fit(model, guide, ps.data.Batches(X, y, 60), epochs=300, lr=2e-2, progress=False)
    posterior = ps.Posterior(model, guide)
    assert posterior.mean_latents()["noise_precision"] == pytest.approx(
        (pyro.param("a") / pyro.param("b")).detach()
    )
    assert posterior.evaluate(X, y)["rmse_compact"] < 0.3
    assert posterior.inclusion() == {}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda model: lambda x, y: None, "called without arguments"),
        (lambda model: lambda x=None, y=None: None, r"fc1.rows missing \(expected \(5, 5\)\)"),
        (lambda model: nn.Linear(2, 2), "called without arguments"),
        (lambda model: "guide", "expected a guide, a Pyro callable"),
        (lambda model: Module, "expected a guide, a Pyro callable"),
    ],
)
@pytest.mark.parametrize("use", [train, ps.Posterior], ids=["fit", "Posterior"])
def test_refused_before_work(model, make, message, use):
    with pytest.raises(ValueError, match=message):
        use(model, make(model))


def test_sites_of_another_shape(model):
    def guide(x=None, y=None):
        for name in ("fc1", "out"):
            pyro.sample(f"{name}.rows", dist.Normal(torch.zeros(3, 2), 1.0).to_event(2))

    with pytest.raises(ValueError, match=r"fc1.rows \(3, 2\) \(expected \(5, 5\)\)"):
        ps.Posterior(model, guide)


def test_a_site_without_a_mean(model):
    def guide(x=None, y=None):
        for group in model.layers:
            loc = model.initial_rows()[group.name]
            law = dist.TransformedDistribution(
                dist.Normal(loc, 1.0), [dist.transforms.SoftplusTransform()]
            )
            pyro.sample(f"{group.name}.rows", law.to_event(2))

    with pytest.raises(ValueError, match=r"mean of the guide's site 'fc1\.rows'"):
        ps.Posterior(model, guide).masked(X)
