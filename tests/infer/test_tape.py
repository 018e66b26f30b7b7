"""Steps from tapes: the same numbers as steps, to the bit, or none."""

import contextlib
import copy
import functools
import gc
import inspect
import logging
import random

import numpy as np
import pytest
import torch
from torch import nn

from pyro_sparse import guides, infer, models, nets
from pyro_sparse.data import Batches
from pyro_sparse.infer.tape import Tape, Taped
from pyro_sparse.likelihoods import Normal, Poisson
from pyro_sparse.runs import zoo

MODELS = sorted({entry.model for entry in zoo.ZOO.values()})
LOOKS = {
    "item": lambda t: t[0].item(),
    "float": lambda t: float(t[0]),
    "int": lambda t: int(t[0]),
    "if": lambda t: 1 if t[0] > 0 else 2,
    "in": lambda t: 1.0 in t,
    "index": lambda t: range(4)[t[0].long()],
    "tolist": lambda t: t.detach().tolist(),
    "numpy": lambda t: t.detach().numpy(),
    "array": lambda t: np.asarray(t.detach()),
    "dlpack": lambda t: np.from_dlpack(t.detach()),
    "storage": lambda t: t.untyped_storage()[0],
    "format": lambda t: f"{t[0]:.1f}",
    "repr": repr,
    "copy": lambda t: copy.deepcopy(t.detach()),
    "equal": lambda t: torch.equal(t, 2 * t),
    "allclose": lambda t: torch.allclose(t, 2 * t),
    "alpha": lambda t: torch.add(t, t, alpha=t[0].detach()),
    "nonzero": torch.nonzero,
    "mask": lambda t: t[t > 0],
    "masked_select": lambda t: t.masked_select(t > 0),
    "unique": lambda t: t.detach().unique(),
    "repeat": lambda t: t.repeat_interleave(t.detach().long()),
    "split": lambda t: torch.tensor_split(t, t.detach().long()),
}
"""Ways of Python to a number in three of them, or to a shape that is made of numbers."""


class Noisy(nn.Module):
    """Something of all that a step has: parameters, noise, a buffer that moves, a gradient."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 4))
        self.norm = nn.BatchNorm1d(3)
        self.factor = 1.0

    def forward(self, x):
        loss = self.norm(x @ self.weight.T + torch.randn(len(x), 3)).square().sum() * self.factor
        loss = loss + (self.weight[:, 1] * torch.rand(3)).sum()
        return [loss.detach(), *torch.autograd.grad(loss, [self.weight, self.norm.weight]), None]


def numbers(module, call, count, seed=0):
    """What ``count`` calls give, with an update of the weights after each, and the buffers then."""
    torch.manual_seed(seed)
    given = []
    for number in range(count):
        values = call(torch.full((5, 4), float(number)).cos() + torch.arange(4.0))
        given += [value for value in values if value is not None]
        with torch.no_grad():
            module.weight -= 0.1 * values[1]
    return [*given, *(value.clone() for value in module.buffers())]


def equal(some, others):
    return len(some) == len(others) and all(map(torch.equal, some, others))


@pytest.fixture
def module():
    torch.manual_seed(1)
    return Noisy()


class TestTape:
    def test_gives_what_the_function_gives(self, module):
        start = {name: value.clone() for name, value in module.state_dict().items()}
        expected = numbers(module, module, 4)
        module.load_state_dict(start)
        tape, _ = Tape.record(module, torch.ones(5, 4))
        module.load_state_dict(start)
        assert equal(numbers(module, tape, 4), expected)

    def test_values_are_those_of_the_recorded_call(self, module):
        torch.manual_seed(3)
        _, values = Tape.record(module, torch.ones(5, 4))
        buffers = [value.clone() for value in module.buffers()]
        torch.manual_seed(1)
        other = Noisy()
        torch.manual_seed(3)
        expected = other(torch.ones(5, 4))
        assert equal(values[:3], expected[:3])
        assert values[3] is None
        assert equal(buffers, list(other.buffers()))

    def test_a_number_made_in_the_function_is_made_anew(self):
        tape, _ = Tape.record(lambda x: [torch.tensor(1.0).add_(x)], torch.ones(()))
        assert [float(tape(torch.ones(()))[0]) for _ in range(3)] == [2.0, 2.0, 2.0]

    def test_a_tensor_that_is_given_twice_may_be_two_later(self):
        x = torch.ones(3)
        tape, _ = Tape.record(lambda x, y: [x + 2 * y], x, x)
        assert equal(tape(x, 3 * x), [7 * x])

    def test_views_of_one_memory(self):
        def function(x):
            doubled = 2 * x
            flat = doubled.reshape(-1)
            later = doubled + 1
            product = later * doubled
            return [flat - product.reshape(-1), later + 0.5]

        tape, values = Tape.record(function, torch.ones(2, 3))
        for x in (torch.ones(2, 3), torch.arange(6.0).reshape(2, 3)):
            assert equal(tape(x), function(x))
        assert equal(values, function(torch.ones(2, 3)))

    def test_a_matrix_and_its_transpose(self):
        def function(x):
            square = x @ x.T
            flat = (2 * x).reshape(-1)
            return [square + square.T, square.T - square, flat.mul_(3) + flat]

        for make in (torch.ones, torch.randn):
            x = make(3, 3)
            tape, _ = Tape.record(function, x)
            assert equal(tape(x), function(x))

    @pytest.mark.parametrize("start", [1, -2, 0])
    def test_slices_and_casts(self, start):
        def function(x):
            return [(2 * x)[:, start:].double() + 1, (2 * x)[start:, 1].to(torch.int64).float()]

        x = torch.randn(3, 4)
        tape, _ = Tape.record(function, x)
        assert equal(tape(x), function(x))

    def test_random_numbers_and_what_is_written_to_are_made_anew(self):
        zero = torch.zeros(3)

        def function(x):
            counter = zero + 1
            counter.mul_(torch.rand(3))
            torch.rand(2)  # read by nobody, but the generator moves on
            return [counter, torch.randn(3) + zero, torch.empty(3).normal_()]

        torch.manual_seed(0)
        expected = [function(None) for _ in range(2)]
        tape, _ = Tape.record(function, torch.ones(1))
        torch.manual_seed(0)
        for values in expected:
            assert equal(tape(torch.ones(1)), values)

    @pytest.mark.parametrize("kind", ["argument", "parameter", "buffer", "made"])
    @pytest.mark.parametrize("look", LOOKS.values(), ids=list(LOOKS))
    def test_looking_at_numbers_cannot_be_recorded(self, look, kind):
        holder = nn.BatchNorm1d(3)

        def function(x):
            seen = {
                "argument": x, "parameter": holder.weight, "buffer": holder.running_var,
                "made": torch.full((3,), 2.0),
            }[kind]  # fmt: skip
            with contextlib.suppress(RuntimeError):  # whatever the function makes of the error
                look(seen)
            return [2 * x]

        with pytest.raises(RuntimeError, match="looks at the numbers"):
            Tape.record(function, torch.ones(3))

    def test_indices_and_masks_whose_result_has_a_fixed_shape_are_no_look(self):
        index = torch.tensor([2, 0])

        def function(x):
            y = x[index].clone()
            y[y > 1] = 0.5
            return [torch.where(y > 0, y, -y), y.masked_fill(y == 0.5, 3.0), x[1:], x.unsqueeze(0)]

        tape, _ = Tape.record(function, torch.ones(3))
        for x in (torch.arange(3.0), torch.tensor([-1.0, 4.0, 0.25])):
            assert equal(tape(x), function(x))


class TestTaped:
    @pytest.fixture
    def ran(self, monkeypatch):
        """How often any tape was run."""
        count = [0]
        own = Tape.__call__

        def run(tape, *inputs):
            count[0] += 1
            return own(tape, *inputs)

        monkeypatch.setattr(Tape, "__call__", run)
        return count

    def test_same_numbers_whether_recorded_early_or_never(self, module, ran):
        start = {name: value.clone() for name, value in module.state_dict().items()}
        expected = numbers(module, module, 9)
        for after in (1, 3, 100):
            module.load_state_dict(start)
            taped = Taped(module, module, after=after)
            assert equal(numbers(module, taped, 9), expected)
            assert taped.reason is None
        assert ran[0] == 7 + 5  # all calls after those that were recorded

    def test_other_shapes_have_their_own_tape(self, module, ran):
        taped = Taped(module, module, after=1)
        for size in (5, 5, 7, 5, 7, 7):
            assert len(taped(torch.ones(size, 4))) == 4
        assert ran[0] == 2
        assert [taped.ready(torch.ones(size, 4)) for size in (5, 6, 7)] == [True, False, True]

    def test_falls_back_where_python_looks_at_numbers(self, ran, caplog):
        module = nn.BatchNorm1d(2)

        def function(x):
            value = module(x + torch.randn(3, 2)).sum(0).detach()
            return [value if float(value[0]) > 0 else 2 * value]

        def run(call):
            torch.manual_seed(0)
            module.reset_running_stats()
            values = [call(torch.ones(3, 2))[0].detach() for _ in range(6)]
            return [*values, module.running_mean.clone(), module.num_batches_tracked.clone()]

        expected = run(function)
        taped = Taped(function, module, after=2)
        with caplog.at_level(logging.INFO):
            assert equal(run(taped), expected)
        assert "looks at the numbers" in taped.reason
        assert "steps run without a tape" in caplog.text
        assert not ran[0]

    @pytest.mark.parametrize("every", [2, 7])
    @pytest.mark.parametrize("counter", ["written", "replaced", "attribute"])
    def test_what_happens_in_every_so_many_calls_is_not_lost(self, module, counter, every):
        module.register_buffer("calls", torch.zeros((), dtype=torch.long))
        start = {name: value.clone() for name, value in module.state_dict().items()}

        def counting(x):
            if counter == "written":
                module.factor = 2.0 if int(module.calls) % every == every - 1 else 1.0
                module.calls += 1
            elif counter == "replaced":
                module.factor = torch.where(module.calls % every == every - 1, 2.0, 1.0)
                module.calls = module.calls + 1
            else:
                module.count += 1
                module.factor = 2.0 if module.count % every == 0 else 1.0
            return module(x)

        def run(call):
            module.load_state_dict(start)
            module.count = 0
            return numbers(module, call, 20)

        expected = run(counting)
        taped = Taped(counting, module, after=every - 1)
        assert equal(run(taped), expected)
        assert taped.reason

    @pytest.mark.parametrize("draw", [random.random, np.random.rand], ids=["Python", "NumPy"])
    def test_generators_beside_torchs_are_noticed(self, module, draw):
        def function(x):
            return [value if value is None else draw() * value for value in module(x)]

        def run(call):
            module.load_state_dict(start)
            random.setstate(states[0])
            np.random.set_state(states[1])  # noqa: NPY002
            return numbers(module, call, 6)

        start = {name: value.clone() for name, value in module.state_dict().items()}
        states = random.getstate(), np.random.get_state()  # noqa: NPY002
        expected = run(function)
        taped = Taped(function, module, after=1)
        assert equal(run(taped), expected)
        assert "random numbers" in taped.reason

    def test_python_outside_the_modules_is_noticed_where_two_steps_differ(self, module):
        factor = [1.0]

        def moody(x):
            factor[0] += 1
            return [value if value is None else factor[0] * value for value in module(x)]

        taped = Taped(moody, module, after=1)
        numbers(module, taped, 3)
        assert "did not give" in taped.reason

    def test_doubts_between_few_calls_do_not_keep_it_from_being_recorded(self, module, ran):
        start = {name: value.clone() for name, value in module.state_dict().items()}
        taped = Taped(module, module, after=5)

        def call(x):
            calls[0] += 1
            if calls[0] % 3 == 0:
                taped.doubt()
            return taped(x)

        calls = [0]
        values = numbers(module, call, 14)
        assert taped.reason is None
        assert ran[0] == 8  # all after the sixth, which is recorded
        module.load_state_dict(start)
        assert equal(values, numbers(module, module, 14))

    def test_a_tape_that_is_doubted_before_it_saves_anything_goes(self, module, ran):
        taped = Taped(module, module, after=1)
        for _ in range(8):
            taped(torch.ones(5, 4))
            taped.doubt()
        assert taped.ready(torch.ones(5, 4))
        assert ran[0] == 1  # compared once

    def test_doubt_notices_what_others_changed(self, module, ran):
        taped = Taped(module, module, after=1)
        numbers(module, taped, 4)
        assert ran[0] == 2
        module.factor = 3.0
        taped.doubt()
        start = {name: value.clone() for name, value in module.state_dict().items()}
        values = numbers(module, taped, 4)
        assert taped.reason is None
        assert ran[0] == 4  # once to see that it is wrong, and one of another tape
        module.load_state_dict(start)
        assert equal(values, numbers(module, module, 4))

    def test_other_numbers_in_a_buffer_that_stayed_are_noticed(self, module, ran):
        module.register_buffer("scale", torch.ones(3))
        own = module.forward

        def function(x):
            loss, *others = own(x)
            return [loss * (module.scale + 1).log().sum(), *others]

        start = {name: value.clone() for name, value in module.state_dict().items()}

        def run(call):
            module.load_state_dict(start)
            before = numbers(module, call, 4)
            module.scale += 1
            return before + numbers(module, call, 4)

        expected = run(function)
        assert equal(run(Taped(function, module, after=1)), expected)
        assert ran[0] == 2 + 2

    def test_doubt_records_anew_for_other_tensors(self, module, ran):
        taped = Taped(module, module, after=1)
        numbers(module, taped, 4)
        module.weight = nn.Parameter(torch.zeros(3, 4))
        taped.doubt()
        start = {name: value.clone() for name, value in module.state_dict().items()}
        values = numbers(module, taped, 4)
        assert taped.reason is None
        assert ran[0] == 2 + 2
        module.load_state_dict(start)
        assert equal(values, numbers(module, module, 4))


def problem(name, net=None, *, shape=(7,), size=24, **options):
    """A model, guide and loader of one small problem."""
    torch.manual_seed(0)
    x, y = torch.randn(size, *shape), torch.arange(size) % 3
    net = nets.build("mlp:6-5", shape, 3) if net is None else net
    model = getattr(models, name)(net, x[:2], num_data=size)
    return model, guides.for_model(model, **options), Batches(x, y, 8, seed=0)


def trained(build, *, epochs=10, tape=True, **options):
    """Everything that a fit of a new problem leaves."""
    model, guide, loader = build()
    run = infer.fit(model, guide, loader, epochs=epochs, progress=False, tape=tape, **options)
    for entry in run.history:
        del entry["seconds"]
    tensors = {**model.state_dict(), **guide.state_dict()}
    return run.history, {name: value.clone() for name, value in tensors.items()}


def same(one, other):
    """Whether two fits have the same history and the same bits."""
    (history, tensors), (expected_history, expected) = one, other
    return (
        history == expected_history
        and tensors.keys() == expected.keys()
        and all(torch.equal(tensors[name], expected[name]) for name in expected)
    )


def guide_options():
    """Every model with its guide's defaults, then with each option that changes operations.

    Numbers change values only, but ``update_every``, which has a test of its own.
    """
    words = {
        "variance": ["tied", "full", "row", "rank-2"],
        "inclusion": ["straight-through", "score", "soft"],
        "last_layer": ["mean-field", "joint"],
    }
    for name in MODELS:
        yield name, {}
        guide = getattr(guides, name)
        taken = inspect.signature(guide).parameters
        if issubclass(guide, guides.SpikeSlabGuide):
            taken = {**inspect.signature(guides.SpikeSlabGuide).parameters, **taken}
        for option, parameter in taken.items():
            values = words.get(option, ["batch", "example"] if option.endswith("_draws") else [])
            for value in values:
                if value != parameter.default:
                    yield name, {option: value}


@pytest.mark.parametrize("variance", ["tied", "rank-2", "full"])
@pytest.mark.parametrize("local", [False, True])
def test_a_recording_leaves_no_numbers_behind(variance, local):
    """Torch never frees what a node of the recorded backward pass keeps that is not run."""

    def alive(tape: bool) -> int:
        """How many tensors of the size of a layer's rows there are after a fit."""
        model, guide, loader = problem("SpikeSlabGaussian", variance=variance)
        infer.fit(
            model, guide, loader, epochs=8, progress=False, tape=tape,
            local_reparameterisation=local,
        )  # fmt: skip
        gc.collect()
        shape = guide.row_families["fc1"].loc.shape
        found = [one for one in gc.get_objects() if issubclass(type(one), torch.Tensor)]
        return len({one.untyped_storage().data_ptr() for one in found if one.shape == shape})

    assert alive(True) == alive(False)


class TestFit:
    """24 examples in batches of 8: a tape is recorded in the seventh epoch."""

    @pytest.fixture(autouse=True)
    def tapes(self, monkeypatch):
        """Every :class:`Taped`, and how often their tapes were run."""
        made, own = [], Taped.__init__

        def note(taped, *args, **kwargs):
            own(taped, *args, **kwargs)
            made.append(taped)

        monkeypatch.setattr(Taped, "__init__", note)
        return made

    def check(self, tapes, build, **options):
        recorded = trained(build, **options)
        assert [taped.reason for taped in tapes] == [None]
        assert len(tapes[0]._trusted) == 1
        assert same(recorded, trained(build, tape=False, **options))
        assert len(tapes) == 1

    @pytest.mark.parametrize(("name", "options"), [*guide_options()], ids=str)
    def test_every_option_of_every_guide(self, name, options, tapes):
        self.check(tapes, lambda: problem(name, **options))

    @pytest.mark.parametrize("every", [2, 3, 50])
    def test_updates_in_every_so_many_steps_are_not_on_a_tape(self, every, tapes):
        build = functools.partial(problem, "TurboMarkov", update_every=every)
        assert same(trained(build), trained(build, tape=False))
        assert "looks at the numbers" in tapes[0].reason

    @pytest.mark.parametrize(
        "options",
        [{"num_particles": 2}, {"local_reparameterisation": False}, {"clip_norm": 0.1}],
        ids=str,
    )
    def test_every_option_of_a_fit(self, options, tapes):
        self.check(tapes, lambda: problem("SpikeSlabGroupHorseshoe"), **options)

    @pytest.mark.parametrize("likelihood", [Normal(), Normal(0.5), Poisson()], ids=str)
    @pytest.mark.parametrize("name", ["SpikeSlabGaussian", "ReducibleGaussian"])
    def test_numbers_as_targets(self, name, likelihood, tapes):
        def build():
            torch.manual_seed(0)
            x = torch.randn(24, 7)
            net = nets.build("mlp:6", (7,), 1)
            model = getattr(models, name)(net, x[:2], num_data=24, likelihood=likelihood)
            return model, guides.for_model(model), Batches(x, x[:, 0].abs().round(), 8, seed=0)

        self.check(tapes, build)

    def test_convolutions_normalisation_and_dropout(self, tapes):
        def build():
            torch.manual_seed(0)
            net = nn.Sequential(
                nn.Conv2d(1, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4), nn.ReLU(),
                nn.MaxPool2d(3), nn.Flatten(), nn.Dropout(0.3), nn.Linear(64, 3),
            )  # fmt: skip
            return problem("SpikeSlabGroupLasso", net, shape=(1, 12, 12))

        self.check(tapes, build)

    def test_pruning_in_the_midst_of_training(self, tapes):
        """What `on_epoch` does to the model is noticed before a tape is run again."""

        def train(tape):
            model, guide, loader = problem("SpikeSlabGaussian")
            keep = torch.tensor([True] * 4 + [False] * 2)

            def prune(metrics):
                if metrics["epoch"] == 9:
                    assert not tape or len(tapes[0]._trusted) == 1
                    model.support.restrict({model.layers[0].name: keep})

            infer.fit(model, guide, loader, epochs=12, progress=False, tape=tape, on_epoch=prune)
            return guide.state_dict()

        recorded, expected = train(True), train(False)
        assert tapes[0].reason is None
        assert len(tapes[0]._tapes) == 0  # that of the tenth epoch's first step no longer fitted
        assert all(torch.equal(recorded[name], expected[name]) for name in expected)

    def test_resuming_is_the_same_with_and_without(self, tapes, tmp_path):
        def kill(metrics):
            if metrics["epoch"] == 10:
                raise InterruptedError

        def train(out, resume=False, tape=True, on_epoch=None):
            model, guide, loader = problem("LogNormalNoise")
            options = {"schedule": infer.schedules.constant(), "out": tmp_path / out}
            infer.fit(
                model, guide, loader, epochs=16, progress=False, resume=resume, tape=tape,
                kl_weight=infer.schedules.constant(), on_epoch=on_epoch, **options,
            )  # fmt: skip
            return guide.state_dict()

        with pytest.raises(InterruptedError):
            train("a", on_epoch=kill)
        resumed, whole = train("a", resume=True), train("b", tape=False)
        assert all(torch.equal(resumed[name], whole[name]) for name in whole)


def test_a_ramp_of_the_kl_is_recorded_once(monkeypatch):
    """What is noted of a step between steps must not make the next one be recorded anew."""
    from pyro_sparse import data, guides, infer, models, nets
    from pyro_sparse.infer import tape

    recordings = []
    record = tape.Tape.record.__func__

    def counted(cls, *arguments):
        recordings.append(1)
        return record(cls, *arguments)

    monkeypatch.setattr(tape.Tape, "record", classmethod(counted))
    torch.manual_seed(0)
    x, y = torch.randn(60, 4), torch.arange(60) % 2
    model = models.SpikeSlabGaussian(nets.mlp([4, 5, 2]), x[:2], num_data=60)
    guide = guides.for_model(model)
    ramp = infer.schedules.ramp(0.2, 0.1, 0.8)
    infer.fit(
        model, guide, data.Batches(x, y, 20), epochs=8, kl_weight=ramp, progress=False, seed=0
    )
    assert len(recordings) == 1
