"""`fit` end to end on tiny problems: what it writes, how it repeats and resumes, its refusals."""

import json
import math
import random

import pyro
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

import pyro_sparse as ps
from pyro_sparse import guides, likelihoods, models, nets
from pyro_sparse.data import Batches
from pyro_sparse.infer import restore, schedules

CLASSES = {
    "ss-ig": models.SpikeSlabGaussian,
    "ss-gl": models.SpikeSlabGroupLasso,
    "ss-ghs": models.SpikeSlabGroupHorseshoe,
    "dense": models.Deterministic,
}
GATED = ["ss-ig", "ss-gl", "ss-ghs"]


def data(size: int = 60) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(size, 4, generator=generator)
    return x, (x[:, 0] + 0.5 * x[:, 1] > 0).long()


def problem(name: str = "ss-ig", hidden: int = 5, **options):
    """Model and guide; always the same ones."""
    with torch.random.fork_rng([]):
        torch.manual_seed(7)
        net = nets.mlp([4, hidden, 2])
    model = CLASSES[name](net, torch.zeros(1, 4), num_data=60, **options)
    return model, guides.for_model(model)


def train(model, guide, **options) -> ps.infer.Run:
    x, y = data()
    defaults = {"loader": Batches(x, y, 20, seed=1), "epochs": 3, "progress": False}
    return ps.fit(model, guide, **(defaults | options))


def state(guide: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in guide.named_parameters()}


def assert_equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    for name in one:
        torch.testing.assert_close(one[name], other[name], rtol=0, atol=0, msg=name)


def without_seconds(run: ps.infer.Run) -> list[dict]:
    return [{k: v for k, v in entry.items() if k != "seconds"} for entry in run.history]


class Stopped(Exception):
    pass


def stop_at(epoch: int):
    def stop(metrics: dict) -> None:
        if metrics["epoch"] == epoch:
            raise Stopped

    return stop


class TestTraining:
    @pytest.mark.parametrize("name", CLASSES)
    def test_end_to_end(self, name, tmp_path):
        model, guide = problem(name)
        run = train(model, guide, epochs=12, lr=0.02, out=tmp_path / "run")
        assert run.out == tmp_path / "run"
        lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
        assert [json.loads(line) for line in lines] == run.history
        assert [entry["epoch"] for entry in run.history] == list(range(1, 13))
        assert run.seconds == sum(entry["seconds"] for entry in run.history) > 0
        likelihood = [entry["log_likelihood_per_datum"] for entry in run.history]
        assert likelihood[-1] > likelihood[0] + 0.1
        last = run.history[-1]
        elbo = last["log_likelihood_per_datum"] - last["kl"] / 60
        assert last["elbo_per_datum"] == pytest.approx(elbo)
        units = {} if name == "dense" else {"fc1": 5}
        assert last["kept"].keys() == last["expected"].keys() == units.keys()
        assert all(0 <= last["kept"][group] <= size for group, size in units.items())
        assert (tmp_path / "run" / "checkpoint" / "last.safetensors").is_file()
        assert len(pyro.get_param_store()) == 0

    @pytest.mark.parametrize("name", GATED)
    def test_the_loss_falls(self, name):
        """At a constant weight of the KL, where losses can be compared."""
        model, guide = problem(name)
        run = train(model, guide, epochs=15, lr=0.02, kl_weight=schedules.constant())
        assert run.history[-1]["loss"] < 0.9 * run.history[0]["loss"]
        last = run.history[-1]
        assert last["loss"] == pytest.approx(-last["elbo_per_datum"], rel=1e-5)

    def test_a_data_loader_of_torch(self):
        x, y = data()
        loader = DataLoader(TensorDataset(x, y), batch_size=20, shuffle=True)
        histories = []
        for _ in range(2):
            torch.rand(3)  # the global state does not matter
            histories.append(without_seconds(train(*problem(), loader=loader)))
        assert histories[0] == histories[1]

    def test_any_iterable_of_batches(self):
        x, y = data()

        class Endless:
            def __iter__(self):
                yield x[:20], y[:20]
                yield x[20:], y[20:]

        assert len(train(*problem(), loader=Endless()).history) == 3

    def test_on_epoch_adds_metrics(self, tmp_path):
        seen = []

        def on_epoch(metrics: dict) -> None:
            metrics["extra"] = metrics["epoch"] ** 2
            seen.append(metrics["epoch"])

        run = train(*problem(), on_epoch=on_epoch, out=tmp_path)
        assert seen == [1, 2, 3]
        lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
        assert [json.loads(line)["extra"] for line in lines] == [1, 4, 9]
        assert [entry["extra"] for entry in run.history] == [1, 4, 9]

    def test_schedules_see_the_progress(self):
        seen = {"rates": [], "inclusion": [], "kl": []}

        def record(name: str, value):
            def schedule(progress: float) -> float:
                seen[name].append(progress)
                return value(progress)

            return schedule

        run = train(
            *problem(), epochs=2, lr=0.01,
            schedule=record("rates", lambda progress: 1 - progress),
            inclusion_schedule=record("inclusion", lambda progress: 0.0),
            kl_weight=record("kl", lambda progress: progress),
        )  # fmt: skip
        steps = [step / 6 for step in range(6)]
        assert {name: values[-6:] for name, values in seen.items()} == {
            name: pytest.approx(steps) for name in seen
        }
        assert run.history[-1]["lr"] == pytest.approx(0.01 / 6)
        assert run.history[-1]["kl_weight"] == pytest.approx(5 / 6)

    def test_rates_by_kind_of_parameter(self):
        groups = []

        def optimizer(given: list[dict]) -> torch.optim.Optimizer:
            groups.extend((group["params"], group["lr"]) for group in given)
            return torch.optim.SGD(given)

        model, guide = problem("ss-ghs")
        rates = {"lr": 1e-4, "inclusion_lr": 0.03, "scale_lr": 0.02}
        train(model, guide, optimizer=optimizer, epochs=1, **rates)
        assert [rate for _, rate in groups] == list(rates.values())
        assert [len(parameters) for parameters, _ in groups] == [6, 1, 4]
        assert groups[1][0][0] is guide.inclusion_logits()["fc1"]
        given = {id(parameter) for parameters, _ in groups for parameter in parameters}
        assert given == {id(parameter) for parameter in guide.parameters()}

    def test_clipping(self):
        """Plain gradient steps of rate 1 move no further than the norm allows."""
        model, guide = problem()
        before = state(guide)
        x, y = data()
        train(
            model, guide, loader=Batches(x, y, 60), epochs=1, clip_norm=1e-3,
            lr=1.0, inclusion_lr=1.0, scale_lr=1.0, optimizer=torch.optim.SGD,
        )  # fmt: skip
        moved = torch.cat([(v - before[n]).flatten() for n, v in state(guide).items()])
        assert float(moved.norm()) == pytest.approx(1e-3, rel=0.02)

    def test_particles_and_weight_draws(self):
        runs = [
            without_seconds(train(*problem(), **options))
            for options in ({}, {"num_particles": 3}, {"local_reparameterisation": False})
        ]
        assert runs[0] != runs[1]
        assert runs[0] != runs[2]


class TestSeeds:
    def test_the_same_bit_for_bit(self):
        results = []
        for _ in range(2):
            model, guide = problem("ss-ghs")
            torch.rand(11)
            results.append((without_seconds(train(model, guide, seed=4)), state(guide)))
        assert results[0][0] == results[1][0]
        assert_equal(results[0][1], results[1][1])
        model, other = problem("ss-ghs")
        train(model, other, seed=5)
        assert not torch.equal(other.row_families["fc1"].loc, results[0][1]["row_families.fc1.loc"])

    def test_the_callers_random_state_is_left(self):
        net = nn.Sequential(nn.Dropout(0.5), nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
        model = models.SpikeSlabGaussian(net, torch.zeros(1, 4), num_data=60)
        guide = guides.for_model(model)
        before = torch.get_rng_state(), random.getstate()
        x, y = data()
        train(model, guide)
        train(model, guide, loader=DataLoader(TensorDataset(x, y), 20, shuffle=True))
        assert torch.equal(torch.get_rng_state(), before[0])
        assert random.getstate() == before[1]

    def test_the_callers_validation_setting_is_left(self):
        for enabled in (True, False):
            with pyro.validation_enabled(enabled):
                train(*problem(), epochs=1)
                normal = torch.distributions.Normal
                if enabled:
                    with pytest.raises(ValueError, match="constraint"):
                        normal(0.0, -1.0)
                else:
                    normal(0.0, -1.0)


class TestResuming:
    @pytest.mark.parametrize("optimizer", [torch.optim.Adam, torch.optim.SGD])
    def test_goes_on_bit_for_bit(self, tmp_path, optimizer):
        options = {"epochs": 5, "lr": 0.01, "kl_weight": schedules.ramp(0.1, change=0.5)}
        if optimizer is torch.optim.SGD:
            options["optimizer"] = lambda groups: torch.optim.SGD(groups, momentum=0.9)
        model, guide = problem("ss-gl")
        whole = train(model, guide, out=tmp_path / "whole", **options)
        with pytest.raises(Stopped):
            train(*problem("ss-gl"), out=tmp_path / "cut", on_epoch=stop_at(4), **options)
        model, resumed = problem("ss-gl")
        torch.rand(5)
        run = train(model, resumed, out=tmp_path / "cut", resume=True, **options)
        assert without_seconds(run) == without_seconds(whole)
        assert_equal(state(resumed), state(guide))
        lines = (tmp_path / "cut" / "metrics.jsonl").read_text().splitlines()
        assert [json.loads(line) for line in lines] == run.history
        assert len({entry["lr"] for entry in run.history}) > 1
        assert len({entry["kl_weight"] for entry in run.history}) > 1

    def test_a_line_without_its_checkpoint_is_dropped(self, tmp_path):
        """Stopped between writing the metrics and the checkpoint."""
        with pytest.raises(Stopped):
            train(*problem(), out=tmp_path, on_epoch=stop_at(3))
        with (tmp_path / "metrics.jsonl").open("a") as file:
            file.write('{"epoch": 3}\n')
        run = train(*problem(), out=tmp_path, resume=True)
        lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
        assert [json.loads(line) for line in lines] == run.history

    def test_a_finished_run_is_not_trained_further(self, tmp_path):
        model, guide = problem()
        run = train(model, guide, out=tmp_path)
        trained = state(guide)
        model, fresh = problem()
        assert train(model, fresh, out=tmp_path, resume=True).history == run.history
        assert_equal(state(fresh), trained)

    def test_starts_where_there_is_nothing_yet(self, tmp_path):
        model, guide = problem()
        run = train(model, guide, out=tmp_path / "new", resume=True)
        model, other = problem()
        assert without_seconds(run) == without_seconds(train(model, other))
        assert_equal(state(guide), state(other))
        with pytest.raises(ValueError, match="resume=True needs out="):
            train(*problem(), resume=True)

    def test_the_checkpoint_restores_the_guide(self, tmp_path):
        model, guide = problem("ss-ghs")
        train(model, guide, out=tmp_path)
        other_model, other = problem("ss-ghs")
        before = torch.get_rng_state()
        progress = restore(tmp_path / "checkpoint" / "last.safetensors", other_model, other)
        assert len(progress["history"]) == 3
        assert_equal(state(other), state(guide))
        assert torch.equal(torch.get_rng_state(), before)


class TestRefusedBeforeTraining:
    def refused(self, match: str, x: Tensor | None = None, y: Tensor | None = None, **options):
        model, guide = problem()
        untouched = state(guide)
        x0, y0 = data()
        loader = Batches(x0 if x is None else x, y0 if y is None else y, 20)
        with pytest.raises(ValueError, match=match):
            train(model, guide, loader=loader, **options)
        assert_equal(state(guide), untouched)

    @pytest.mark.parametrize("label", [2, -1])
    def test_labels_outside_the_classes(self, label, tmp_path):
        x, y = data()
        y[-1] = label
        self.refused(r"training data: expected labels in 0\.\.1", x, y, out=tmp_path / "run")
        assert not (tmp_path / "run").exists()

    @pytest.mark.parametrize("value", [math.nan, math.inf])
    def test_features_that_are_not_finite(self, value):
        x, y = data()
        x[-1, 2] = value
        self.refused("NaN or infinite.*row 59, column 2", x, y)

    def test_feature_count(self):
        x, y = data()
        self.refused(r"expected rows of shape \(4,\)", x[:, :3], y)

    def test_targets_of_regression(self):
        x, y = data()
        self.refused("expected integer class labels", x, y.float())

    def test_empty(self):
        x, y = data()
        with pytest.raises(ValueError, match="the loader is empty"):
            train(*problem(), loader=DataLoader(TensorDataset(x[:0], y[:0])))
        with pytest.raises(ValueError, match="the loader is empty"):
            train(*problem(), loader=iter(()))

    @pytest.mark.parametrize(
        ("spoil", "message"),
        [
            (lambda x, y: (x, y[:, None]), r"expected y of shape \(N,\)"),
            (lambda x, y: (x, y[:1]), "as many rows in x as in y"),
            (lambda x, y: (x[:, :3], y), "as the network takes them"),
            (lambda x, y: (x, y + 2), "labels"),
            (lambda x, y: (x * math.nan, y), "NaN"),
        ],
    )
    def test_every_batch_is_looked_at(self, spoil, message):
        """A loader that does not hold its data shows a wrong batch when it comes."""
        x, y = data()
        batches = [(x[:20], y[:20]), spoil(x[20:40], y[20:40]), (x[40:], y[40:])]
        model, guide = problem()
        with pytest.raises(ValueError, match=f"batch 2 of epoch 1: .*{message}"):
            train(model, guide, loader=batches)

    def test_a_stream_has_no_length(self):
        class Stream(IterableDataset):
            def __iter__(self):
                yield from zip(*data(), strict=True)

        model, guide = problem()
        run = train(model, guide, loader=DataLoader(Stream(), 20))
        model, other = problem()
        x, y = data()
        whole = train(model, other, loader=Batches(x, y, 20, shuffle=False), schedule=None)
        assert len(run.history) == len(whole.history) == 3
        assert all(math.isfinite(entry["loss"]) for entry in run.history)

    @pytest.mark.parametrize("name", ["lr", "inclusion_lr", "scale_lr", "clip_norm"])
    @pytest.mark.parametrize("value", [0.0, -1e-3, math.nan, math.inf])
    def test_numbers_out_of_range(self, name, value):
        self.refused(f"expected a positive {name}, got", **{name: value})

    def test_counts(self):
        self.refused("epochs to be a whole number of at least 1, got 0", epochs=0)
        self.refused("num_particles to be a whole number of at least 1, got 0", num_particles=0)

    def test_a_folder_that_holds_a_run(self, tmp_path):
        train(*problem(), out=tmp_path, epochs=1)
        content = (tmp_path / "metrics.jsonl").read_text()
        self.refused("already holds a run", out=tmp_path)
        assert (tmp_path / "metrics.jsonl").read_text() == content

    @pytest.mark.parametrize("value", [0, 1, -0.1, 1.5, math.nan])
    def test_inclusion_probability(self, value):
        with pytest.raises(ValueError, match="inclusion_probability strictly between 0 and 1"):
            problem(inclusion_probability=value)
        with pytest.raises(ValueError, match="input_inclusion_probability strictly between"):
            problem(prune_inputs=True, input_inclusion_probability=value)

    @pytest.mark.parametrize("value", [0, -1.0, math.nan, math.inf])
    @pytest.mark.parametrize(
        ("name", "scale"),
        [
            ("ss-ig", "slab_scale"),
            ("ss-ig", "output_scale"),
            ("ss-gl", "varsigma2_shape"),
            ("ss-gl", "varsigma2_rate"),
            ("ss-ghs", "global_scale"),
            ("ss-ghs", "local_scale"),
            ("dense", "prior_scale"),
        ],
    )
    def test_scales(self, name, scale, value):
        with pytest.raises(ValueError, match=f"expected a positive, finite {scale}"):
            problem(name, **{scale: value})

    @pytest.mark.parametrize("value", [0, -1.0, math.nan])
    def test_regularisation(self, value):
        with pytest.raises(ValueError, match="expected a positive regularisation"):
            problem("ss-ghs", regularisation=value)
        problem("ss-ghs", regularisation=math.inf)

    @pytest.mark.parametrize(
        "option", [{"initial_scale": 0.0}, {"temperature": -1.0}, {"initial_inclusion": 1.0},
                   {"variance": "diagonal"}, {"inclusion": "reinforce"}], ids=str)  # fmt: skip
    def test_guide_options(self, option):
        model, _ = problem()
        with pytest.raises(ValueError, match="expected"):
            guides.for_model(model, **option)

    @pytest.mark.parametrize("likelihood", [likelihoods.Normal(), likelihoods.Bernoulli(),
                                            likelihoods.Poisson()])  # fmt: skip
    def test_columns_of_targets(self, likelihood):
        """Broadcast against (batch,), they would be batch² terms."""
        with pytest.raises(ValueError, match=r"expected targets of shape \(6,\), got \(6, 1\)"):
            likelihood.check(torch.zeros(6, 1), torch.ones(6, 1))


class TestLikelihoods:
    def toy(self, likelihood, target, **options) -> tuple[nn.Module, Tensor, Tensor]:
        """A linear predictor 1.0 - 0.8 x_0 + 0.5 x_1, fitted to 300 draws of ``target``."""
        torch.manual_seed(2)
        x = torch.randn(300, 3)
        y = target(1.0 - 0.8 * x[:, 0] + 0.5 * x[:, 1])
        model = models.SpikeSlabGaussian(
            nn.Sequential(nn.Linear(3, 1)), x[:1], num_data=300, likelihood=likelihood
        )
        guide = guides.for_model(model)
        ps.fit(
            model, guide, Batches(x, y, 100), epochs=60, lr=0.03, progress=False,
            kl_weight=schedules.constant(), **options,
        )  # fmt: skip
        (weights,) = guide.mean_rows().values()
        return guide, weights.detach().squeeze(0), y

    def test_normal_recovers_the_noise(self):
        guide, weights, _ = self.toy(
            likelihoods.Normal(), lambda mean: mean + 0.3 * torch.randn_like(mean), scale_lr=0.05
        )
        torch.testing.assert_close(weights, torch.tensor([-0.8, 0.5, 0, 1.0]), atol=0.06, rtol=0)
        precision = float(guide.noise_precision().mean.detach())
        assert precision**-0.5 == pytest.approx(0.3, rel=0.1)

    def test_bernoulli(self):
        _, weights, y = self.toy(
            likelihoods.Bernoulli(), lambda mean: torch.bernoulli(mean.sigmoid())
        )
        torch.testing.assert_close(weights, torch.tensor([-0.8, 0.5, 0, 1.0]), atol=0.4, rtol=0)
        assert y.dtype == torch.float32

    @pytest.mark.parametrize("dtype", [torch.float32, torch.int64])
    def test_poisson(self, dtype):
        _, weights, _ = self.toy(
            likelihoods.Poisson(), lambda mean: torch.poisson(mean.exp()).to(dtype)
        )
        torch.testing.assert_close(weights, torch.tensor([-0.8, 0.5, 0, 1.0]), atol=0.15, rtol=0)


class TestNumberOfExamples:
    """A model of another number of examples than the loader has would temper the posterior."""

    @pytest.fixture
    def make(self, classifier):
        model, guide, x, y = classifier("ss-ig")

        def make(num_data, loader):
            model.num_data = num_data
            return ps.fit(model, guide, loader, epochs=1, progress=False)

        return make, x, y

    def test_batches(self, make):
        run, x, y = make
        with pytest.raises(ValueError, match=r"num_data=48, but the loader 24 examples.* 2 times"):
            run(48, Batches(x, y, 8))
        # What drop_last leaves out comes in other epochs.
        run(24, Batches(x, y, 7, drop_last=True))

    def test_data_loaders(self, make):
        run, x, y = make
        data = torch.utils.data.TensorDataset(x, y)
        loader = torch.utils.data.DataLoader(data, 8, shuffle=True)
        with pytest.raises(ValueError, match="Make the model with num_data=24"):
            run(23, loader)
        run(24, loader)
        some = torch.utils.data.SubsetRandomSampler(range(16))
        run(16, torch.utils.data.DataLoader(data, 8, sampler=some))

    def test_an_iterable_cannot_be_counted(self, make):
        run, x, y = make
        run(1000, [(x, y)])


def test_tokens():
    """A network that looks its inputs up is trained on whole numbers, and on nothing else."""
    net = nn.Sequential(nn.Embedding(9, 4), nn.Flatten(), nn.Linear(12, 5), nn.ReLU())
    net.append(nn.Linear(5, 2))
    x, y = torch.randint(9, (20, 3)), torch.arange(20) % 2
    model = models.SpikeSlabGaussian(net, x[:2], num_data=20)
    guide = guides.for_model(model)
    run = train(model, guide, loader=Batches(x, y, 10, seed=1), epochs=1)
    assert math.isfinite(run.history[-1]["loss"])
    with pytest.raises(ValueError, match="x of whole numbers"):
        train(model, guide, loader=Batches(x.float(), y, 10, seed=1), epochs=1)
