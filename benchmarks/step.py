r"""What a Bayesian training step costs beside a dense one: time, memory, growth, noise.

All parts run in one process, and what is compared is interleaved: every configuration has its turn
in every round, so that drifts of the machine hit all alike. A turn is one step that is not timed
and some that are. Tables have medians over all rounds with quartiles, of CPU time (the process's,
all threads) and of wall time; ratios are medians of the rounds' own ratios, of CPU time on the CPU
and of wall time on an accelerator::

    python -m benchmarks.step [--part PART] [--quick] [--device cuda] [--threads 1]

steps
    One update on a batch that lies on the device already, by the code that `fit` runs
    (`pyro_sparse.infer.training.Training.step`: estimate, backward pass, check of the gradients,
    optimiser), relative to *dense*: the plain torch network with cross-entropy and the same fused
    Adam. *naive Pyro*: an independent normal site a parameter, a guide of ``pyro.param``
    statements, and stock SVI with Trace_ELBO. *local*: local reparameterisation; *weights*: draws
    of weights.
overhead
    *Pyro's share* is what effect handlers and traces cost: the estimate of the ELBO of the
    three-layer MLP, minus the same statements run by an interpreter that only draws, looks up and
    adds KL terms (`without_handlers`; its loss is the same, to the bit, or the benchmark stops).
    At width 1 and with one example, where tensors cost nothing: handlers do not see sizes.
    *Python's share* is the whole step at width 1 minus the dense network's: distributions,
    autograd's bookkeeping, the loop and Pyro. The check for divergence is timed by itself.
memory
    Bytes at the peak of a step, parameters, optimiser and batch included, as torch's allocator
    counts them (on the CPU by ``torch.profiler``, on CUDA by ``max_memory_allocated``), relative to
    the dense network's, and the estimate of `pyro_sparse.infer.memory_need` relative to that.
width
    A step of 784-w-w-10 for w = 100 ... 3200, and the exponent of time against the number of
    weights: fitted over all widths, and from the last doubling.
data
    An epoch against the number of examples, by the loader for data in memory.
gradient
    Variance of the gradient of the loss per example over draws, on one batch, by kind of parameter,
    relative to draws of weights with one inclusion draw for the batch; after a very short fit, when
    many units are undecided, and a longer one. Every variance has fits of its own; what is compared
    within one is at one and the same posterior. The trace is that of the gradient's covariance.
    MNIST with ``--data-root``, otherwise the digits.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import gc
import itertools
import math
import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import torch
import torch.nn.functional as F
from pyro.infer import SVI, Trace_ELBO
from torch import Tensor, nn
from torch.distributions import kl_divergence
from torch.func import functional_call

from pyro_sparse import data, guides, infer, models, nets
from pyro_sparse.infer.divergence import gradient_sums
from pyro_sparse.infer.recipe import Recipe
from pyro_sparse.infer.stopping import StopRequest
from pyro_sparse.infer.training import Run, Training
from pyro_sparse.modules import own_parameters
from pyro_sparse.runs import zoo

VARIANCES = ("tied", "row", "rank-2", "full")
"""Of the guides' rows."""
WITH_VARIANCES = ("ss-ig", "ss-gl", "ss-ghs", "bc-gnj", "bc-ghs", "turbo-vbi", "bmr")
NUM_DATA = 60_000
SHAPE = (1, 28, 28)
MLP = "mlp:400-400"
NETS = {MLP: "MLP 784-400-400-10", "lenet5-caffe": "LeNet-5-Caffe"}
BATCHES = (128, 1024)
WIDTHS = (100, 200, 400, 800, 1600, 3200)
SIZES = (1000, 2000, 4000, 8000, 16_000, 32_000)
"""Examples of an epoch."""
# What a step of the MLP may cost relative to the dense one, by variance or model, draws and batch.
BARS = {
    ("tied", "local"): {128: 1.5, 1024: 1.25},
    ("full", "weights"): {128: 2.4, 1024: 1.35},
    ("full", "local"): {128: 3.3, 1024: 2.3},
    ("sbp", "batch"): {128: 1.25, 1024: 1.25},
}
PYRO_BAR, MEMORY_BAR, WIDTH_BAR = 1.5, 2.5, 1.1  # milliseconds, ratio, exponent


@dataclass(frozen=True)
class Machine:
    """Where it runs.

    Attributes:
        device: ``"cpu"`` or ``"cuda"``.
        quick: fewer configurations and rounds.
        data_root: of MNIST, if there is one.
    """

    device: str
    quick: bool
    data_root: Path | None = None

    @property
    def clock(self) -> str:
        """The time that comparisons are made by: what others do on the CPU is no part of it."""
        return "wall" if self.device == "cuda" else "cpu"

    def synchronise(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()

    def batch(self, size: int) -> tuple[Tensor, Tensor]:
        """Inputs and labels that mean nothing, on the device."""
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(size, *SHAPE, generator=generator)
        y = torch.randint(10, (size,), generator=generator)
        return x.to(self.device), y.to(self.device)


# -- time ------------------------------------------------------------------------------------------


@dataclass
class Times:
    """Seconds a call, one entry a round."""

    cpu: list[float] = field(default_factory=list)
    wall: list[float] = field(default_factory=list)

    def by(self, machine: Machine) -> list[float]:
        """Those of the machine's clock."""
        times: list[float] = getattr(self, machine.clock)
        return times


Calls = dict[str, Callable[[], Any]]


def timed(machine: Machine, call: Callable[[], Any], times: Times, repeats: int = 1) -> None:
    """Add a round of ``repeats`` calls to ``times``."""
    machine.synchronise()
    cpu, wall = time.process_time(), time.perf_counter()
    for _ in range(repeats):
        call()
    machine.synchronise()
    times.cpu.append((time.process_time() - cpu) / repeats)
    times.wall.append((time.perf_counter() - wall) / repeats)


def interleaved(machine: Machine, calls: Calls, rounds: int, repeats: int = 3) -> dict[str, Times]:
    """Every call in turn, ``rounds`` times; each turn times ``repeats`` calls after one more."""
    times = {name: Times() for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            call()
            timed(machine, call, times[name], repeats)
    return times


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """Lower quartile, median and upper quartile."""
    if len(values) == 1:
        return values[0], values[0], values[0]
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, middle, high


def ratio(own: Sequence[float], base: Sequence[float]) -> float:
    """Median over the rounds, each of which compares its own two times."""
    return statistics.median(one / other for one, other in zip(own, base, strict=True))


def milliseconds(values: Sequence[float]) -> str:
    """Median with quartiles."""
    low, middle, high = (1000 * value for value in quartiles(values))
    return f"{middle:.2f} ({low:.2f}-{high:.2f})"


def exponent(sizes: Sequence[float], seconds: Sequence[float]) -> float:
    """Slope of log time against log size, by least squares."""
    logs = [[math.log(value) for value in values] for values in (sizes, seconds)]
    return statistics.linear_regression(*logs).slope


def print_table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """As Markdown, with columns of even width."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    print(f"\n{title}\n")
    for row in (header, ["-" * width for width in widths], *rows):
        print(f"| {' | '.join(f'{cell:{w}}' for cell, w in zip(row, widths, strict=True))} |")
    print(flush=True)


def judged(value: float, bar: float | None) -> str:
    """The bar, and whether it is met."""
    return "" if bar is None else f"{bar:g} {'met' if value <= bar else 'MISSED'}"


# -- what is timed ---------------------------------------------------------------------------------


class Dense:
    """Plain torch: the network, cross-entropy, torch's own fused Adam."""

    def __init__(self, net: nn.Module, device: str) -> None:
        self.net = net.to(device)
        self.optimizer = torch.optim.Adam(self.net.parameters(), lr=1e-3, fused=True)

    def step(self, x: Tensor, y: Tensor) -> None:
        self.optimizer.zero_grad()
        F.cross_entropy(self.net(x), y).backward()
        self.optimizer.step()


def dense_step(machine: Machine, net: nn.Module, batch: int) -> Callable[[], Any]:
    """The dense step on a batch, of a copy of the network."""
    return partial(Dense(copy.deepcopy(net), machine.device).step, *machine.batch(batch))


class NaivePyro:
    """What one writes first: a normal site a parameter, ``pyro.param`` for each, stock SVI."""

    def __init__(self, net: nn.Module, device: str) -> None:
        self.net = net.to(device)
        self.start = {name: value.detach() for name, value in self.net.named_parameters()}
        pyro.clear_param_store()  # of what another instance left there
        optimizer = pyro.optim.Adam({"lr": 1e-3})
        self.svi = SVI(self.model, self.guide, optimizer, Trace_ELBO())

    def model(self, x: Tensor, y: Tensor) -> None:
        values = {
            name: pyro.sample(name, dist.Normal(torch.zeros_like(start), 1.0).to_event(start.dim()))
            for name, start in self.start.items()
        }
        output = functional_call(self.net, values, (x,))
        with pyro.plate("data", NUM_DATA, subsample=torch.arange(len(x), device=x.device)):
            pyro.sample("y", dist.Categorical(logits=output), obs=y)

    def guide(self, x: Tensor, y: Tensor) -> None:
        for name, start in self.start.items():
            loc = pyro.param(f"{name}.loc", start.clone())
            scale = pyro.param(
                f"{name}.scale", torch.full_like(start, 0.01), dist.constraints.positive
            )
            pyro.sample(name, dist.Normal(loc, scale).to_event(start.dim()))

    def step(self, x: Tensor, y: Tensor) -> None:
        with pyro.validation_enabled(False):
            self.svi.step(x, y)


def build(
    name: str, net: nn.Module, machine: Machine, *, num_data: int = NUM_DATA, **options: Any
) -> tuple[models.SparseModel, guides.GroupGuide]:
    """Model and guide of the zoo on the device; ``options`` are the guide's."""
    example = torch.zeros(2, *SHAPE)
    model = getattr(models, zoo.find(name).model)(net, example, num_data=num_data)
    guide = guides.for_model(model, **options)
    return model.to(machine.device), guide.to(machine.device)


def training(
    machine: Machine,
    model: models.SparseModel,
    guide: guides.GroupGuide,
    loader: Any,
    *,
    local: bool = True,
) -> Training:
    """What `fit` makes of its arguments, after the first epoch of ``loader``."""
    accelerator = "gpu" if machine.device == "cuda" else "cpu"
    made = Training(
        model, guide, infer.ELBO(local_reparameterisation=local), loader, Recipe(model, guide),
        infer.make_fabric(accelerator=accelerator), StopRequest(), Run(), epochs=60,
    )  # fmt: skip
    # The first step checks the distributions' arguments.
    first = made.epoch()
    assert first is not None
    made.keep(first)
    x, y = next(iter(loader))
    while not made.settled(x, y):
        made.step(x, y)
    return made


@dataclass(frozen=True)
class Configuration:
    """A row of the table of steps.

    Attributes:
        model: a name of the zoo.
        what: the guide's variance, or draws of noise, or nothing.
        local: local reparameterisation.
        options: of the guide.
    """

    model: str
    what: str = ""
    local: bool = True
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def label(self) -> str:
        draws = "" if self.model in ("sbp", "dense") else "local" if self.local else "weights"
        return " ".join(part for part in (self.model, self.what, draws) if part)

    def bar(self, batch: int) -> float | None:
        kinds = ((self.what, "local" if self.local else "weights"), (self.model, self.what))
        return next((BARS[kind].get(batch) for kind in kinds if kind in BARS), None)

    def step(self, machine: Machine, net: nn.Module, batch: int) -> Callable[[], Any]:
        """Its step on a batch."""
        x, y = machine.batch(batch)
        model, guide = build(self.model, net, machine, **self.options)
        made = training(machine, model, guide, [(x, y)], local=self.local)
        return partial(made.step, x, y)


def configurations(names: Sequence[str]) -> list[Configuration]:
    """Every model of ``names`` with every variance and both kinds of draws."""
    made: list[Configuration] = []
    for name in names:
        if name in WITH_VARIANCES:
            made += [
                Configuration(name, variance, local, {"variance": variance})
                for variance in VARIANCES
                for local in (True, False)
            ]
            if name == "ss-ghs":
                options = {"inclusion_draws": "example"}
                made.append(Configuration(name, "tied, inclusion an example,", True, options))
        elif name == "sbp":
            made += [
                Configuration(name, draws, True, {"noise_draws": draws})
                for draws in ("batch", "example")
            ]
        else:
            made.append(Configuration(name, "by fit"))  # beside "dense", the plain torch step
    return made


# -- the parts -------------------------------------------------------------------------------------


def steps(machine: Machine) -> None:
    """Every model, variance and kind of draws, beside the dense step."""
    names = ("ss-ghs", "sbp") if machine.quick else (*WITH_VARIANCES, "sbp", "dense")
    for spec, title in NETS.items():
        if machine.quick and spec != MLP and machine.device == "cpu":
            continue
        net = nets.build(spec, SHAPE, 10)
        chosen = {one.label: one for one in configurations(names)}
        for batch in BATCHES:
            naive = NaivePyro(copy.deepcopy(net), machine.device)
            calls: Calls = {
                "dense": dense_step(machine, net, batch),
                "naive Pyro": partial(naive.step, *machine.batch(batch)),
                **{label: one.step(machine, net, batch) for label, one in chosen.items()},
            }
            if machine.device == "cuda":
                rounds, repeats = 5, 5
            elif spec == MLP:
                rounds, repeats = (31, 3) if batch == 128 else (15, 1)
            else:
                rounds, repeats = 3, 1
            times = interleaved(machine, calls, rounds, repeats)
            rows = []
            for label, found in times.items():
                value = ratio(found.by(machine), times["dense"].by(machine))
                bar = chosen[label].bar(batch) if label in chosen and spec == MLP else None
                cells = milliseconds(found.cpu), milliseconds(found.wall)
                rows.append([label, *cells, f"{value:.2f}", judged(value, bar)])
            print_table(
                f"steps: {title}, batch {batch}",
                ("step", "CPU ms", "wall ms", "to dense", "bar"),
                rows,
            )


@contextlib.contextmanager
def without_handlers(draws: int) -> Iterator[Callable[..., Tensor]]:
    """Context that gives ``loss(model, guide, x, y)``: the ELBO's estimate without Pyro.

    ``pyro.sample`` and ``pyro.plate`` are replaced by the least that does their work: the guide's
    statements draw and are remembered, the model's look up and add the KL.

    Args:
        draws: examples, for local reparameterisation.
    """
    local = infer.local_reparameterisation.LocalReparameterisation(draws)
    drawn: dict[str, tuple[Any, Any]] = {}
    terms: dict[str, Any] = {}
    plates: list[float] = []

    def sample(name: str, law: Any, obs: Any = None, infer: Any = None) -> Any:
        if obs is not None:
            terms["log-likelihood"] = plates[-1] * law.log_prob(obs).sum()
            return obs
        if name in drawn:
            value, q = drawn[name]
            terms["kl"] = terms["kl"] + kl_divergence(q, law).sum()
            return value
        message = {"fn": law, "value": None, "infer": infer or {}, "done": False}
        local._pyro_sample(message)
        value = law.rsample() if message["value"] is None else message["value"]
        drawn[name] = (value, law)
        return value

    @contextlib.contextmanager
    def plate(name: str, size: int, subsample: Tensor) -> Iterator[None]:
        plates.append(size / len(subsample))
        yield
        plates.pop()

    def loss(model: Any, guide: Any, x: Tensor, y: Tensor) -> Tensor:
        drawn.clear()
        terms["kl"] = 0.0
        with own_parameters(model, guide):
            guide.forward(x, y)
            model.forward(x, y)
        return terms["kl"] - terms["log-likelihood"]

    pyros = pyro.sample, pyro.plate
    pyro.sample, pyro.plate = sample, plate
    try:
        yield loss
    finally:
        pyro.sample, pyro.plate = pyros


def overhead(machine: Machine) -> None:
    """What is paid whatever the size of the network."""
    rounds, repeats = (10, 5) if machine.quick else (25, 8)
    x, y = machine.batch(1)
    net = nets.build("mlp:1-1", SHAPE, 10)
    calls: Calls = {"dense step": dense_step(machine, net, 1)}
    names = ("ss-ig", "ss-ghs", "sbp") if machine.quick else (*WITH_VARIANCES, "sbp")
    elbo = infer.ELBO()
    for name in names:
        model, guide = build(name, net, machine)
        made = training(machine, model, guide, [(x, y)])

        def with_pyro(model: Any = model, guide: Any = guide) -> Tensor:
            with own_parameters(model, guide), pyro.validation_enabled(False):
                return elbo.estimate(model, guide, x, y).loss

        def without_pyro(model: Any = model, guide: Any = guide) -> Tensor:
            with without_handlers(len(x)) as loss, pyro.validation_enabled(False):
                return loss(model, guide, x, y)

        found = []
        for call in (with_pyro, without_pyro):
            torch.manual_seed(0)
            found.append(float(call().detach()))
        if not math.isclose(*found, rel_tol=1e-6):
            raise RuntimeError(f"{name}: the losses {found} with and without Pyro differ")
        calls |= {
            f"{name} estimate": with_pyro,
            f"{name} plain": without_pyro,
            f"{name} step": partial(made.step, x, y),
        }
    found = interleaved(machine, calls, rounds, repeats)
    times = {name: one.by(machine) for name, one in found.items()}

    def difference(one: str, other: str) -> list[float]:
        return [a - b for a, b in zip(times[one], times[other], strict=True)]

    rows = []
    for name in names:
        share = difference(f"{name} estimate", f"{name} plain")
        rows.append(
            [
                name,
                milliseconds(times[f"{name} estimate"]),
                milliseconds(times[f"{name} plain"]),
                milliseconds(share),
                judged(1000 * statistics.median(share), PYRO_BAR),
                milliseconds(times[f"{name} step"]),
                milliseconds(difference(f"{name} step", "dense step")),
            ]
        )
    print_table(
        f"overhead: milliseconds ({machine.clock}), MLP 784-1-1-10, one example",
        ("model", "estimate", "without Pyro", "Pyro's share", "bar", "step", "Python's share"),
        rows,
    )
    rows = []
    net = nets.build(MLP, SHAPE, 10)
    for batch in BATCHES:
        x, y = machine.batch(batch)
        for variance in ("tied", "full"):
            model, guide = build("ss-ghs", net, machine, variance=variance)
            made = training(machine, model, guide, [(x, y)])
            gradients = [parameter.grad for parameter in guide.parameters()]

            def check(gradients: list[Tensor | None] = gradients) -> list[float]:
                values: list[float] = torch.stack(gradient_sums(gradients)).tolist()
                return values

            calls = {"step": partial(made.step, x, y), "check": check}
            times = interleaved(machine, calls, 5 if machine.quick else 15)
            own, whole = (times[name].by(machine) for name in ("check", "step"))
            cells = milliseconds(own), milliseconds(whole), f"{ratio(own, whole):.2%}"
            rows.append([f"ss-ghs {variance}", str(batch), *cells])
    print_table(
        f"overhead: the check for divergence, {NETS[MLP]}",
        ("model", "batch", "check, ms", "step, ms", "share"),
        rows,
    )


def peak_bytes(machine: Machine, prepare: Callable[[], Callable[[], Any]]) -> int:
    """Most bytes that live at once in what ``prepare`` makes and three of the calls it returns."""

    def work() -> None:
        call = prepare()
        for _ in range(3):
            call()

    gc.collect()  # or what earlier cases left would be freed on the way
    if machine.device == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        work()
        return torch.cuda.max_memory_allocated() - before
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profiler:
        work()
    assert profiler.profiler is not None
    results = profiler.profiler.kineto_results
    assert results is not None
    events = [event for event in results.events() if event.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    now = peak = 0
    for event in events:
        now += event.nbytes()
        peak = max(peak, now)
    return peak


def memory(machine: Machine) -> None:
    """Peak memory beside the dense network's, and beside the estimate."""
    cases = [(spec, batch) for spec in NETS for batch in BATCHES]
    if machine.quick:
        cases = [case for case in cases if case != ("lenet5-caffe", 1024)]
    else:
        cases += [(f"mlp:{size}-{size}", 128) for size in (WIDTHS[0], WIDTHS[-1])]
    names = ("ss-ghs", "sbp") if machine.quick else ("ss-ig", "ss-ghs", "bmr", "sbp")
    for spec, batch in cases:
        net = nets.build(spec, SHAPE, 10)
        base = peak_bytes(machine, partial(dense_step, machine, net, batch))
        rows = [["dense", f"{base / 2**20:.1f}", "1.00", "", ""]]
        for one in configurations(names):
            peak = peak_bytes(machine, partial(one.step, machine, net, batch))
            model, guide = build(one.model, net, machine, **one.options)
            elbo = infer.ELBO(local_reparameterisation=one.local)
            need = infer.memory_need(elbo, model, guide, *machine.batch(4), batch)
            rows.append(
                [
                    one.label, f"{peak / 2**20:.1f}", f"{peak / base:.2f}",
                    judged(peak / base, MEMORY_BAR), f"{need.total / peak:.2f}",
                ]
            )  # fmt: skip
        print_table(
            f"memory: {NETS.get(spec, spec)}, batch {batch}",
            ("step", "peak MiB", "to dense", "bar", "estimate to peak"),
            rows,
        )


def width(machine: Machine) -> None:
    """Time against the number of weights."""
    widths = WIDTHS[:-1] if machine.quick and machine.device == "cpu" else WIDTHS
    batch = 128
    seconds: dict[str, list[float]] = {}
    weights, rows = [], []
    for size in widths:
        net = nets.build(f"mlp:{size}-{size}", SHAPE, 10)
        weights.append(sum(value.numel() for value in net.parameters()))
        calls: Calls = {"dense": dense_step(machine, net, batch)}
        for one in configurations(("ss-ghs",)):
            if one.what in ("tied", "full"):
                calls[one.label] = one.step(machine, net, batch)
        rounds = 3 if machine.quick else 5 if size > 800 else 9
        times = interleaved(machine, calls, rounds, 1 if size > 800 else 3)
        for name, found in times.items():
            seconds.setdefault(name, []).append(statistics.median(found.by(machine)))
        cells = [f"{1000 * values[-1]:.1f}" for values in seconds.values()]
        rows.append([str(size), f"{weights[-1]:,}", *cells])
    fitted = {name: exponent(weights, values) for name, values in seconds.items()}
    last = {name: exponent(weights[-2:], values[-2:]) for name, values in seconds.items()}
    for title, found in (("exponent, all widths", fitted), ("exponent, last doubling", last)):
        rows.append([title, "", *(f"{value:.2f}" for value in found.values())])
    bars = ["" if name == "dense" else judged(fitted[name], WIDTH_BAR) for name in seconds]
    rows.append(["bar, all widths", "", *bars])
    print_table(
        "width: milliseconds a step, MLP 784-w-w-10, batch 128",
        ("w", "weights", *seconds),
        rows,
    )


def amount(machine: Machine) -> None:
    """Time of an epoch against the number of examples."""
    sizes = SIZES[:4] if machine.quick else SIZES
    net = nets.build(MLP, SHAPE, 10)
    calls: Calls = {}
    for size in sizes:
        loader = data.Batches(*machine.batch(size), 128)
        made = training(machine, *build("ss-ghs", net, machine, num_data=size), loader)

        def epoch(made: Training = made) -> None:
            metrics = made.epoch()
            assert metrics is not None
            made.keep(metrics)

        def load(loader: data.Batches = loader) -> None:
            for _ in loader:
                pass

        calls |= {f"{size} epoch": epoch, f"{size} loader": load}
    times = {name: Times() for name in calls}
    for _ in range(2 if machine.quick else 3):
        for name, call in calls.items():
            timed(machine, call, times[name])
    medians = {name: statistics.median(found.by(machine)) for name, found in times.items()}
    epochs, loaders = ([medians[f"{n} {what}"] for n in sizes] for what in ("epoch", "loader"))
    rows = [
        [f"{size:,}", f"{own:.3f}", f"{1e6 * own / size:.1f}", f"{1e6 * part / size:.2f}"]
        for size, own, part in zip(sizes, epochs, loaders, strict=True)
    ]
    rows.append(["exponent", f"{exponent(sizes, epochs):.2f}", "", ""])
    print_table(
        f"data: an epoch of ss-ghs, tied, {NETS[MLP]}, batch 128",
        ("examples", f"seconds ({machine.clock})", "µs an example", "of which the loader"),
        rows,
    )


def gradient(machine: Machine) -> None:
    """Noise of the gradient by kind of parameter."""
    if machine.data_root is None:
        dataset, spec, lengths = data.load("digits"), "mlp:100-100", (2, 20)
    else:
        dataset, spec, lengths = data.load("mnist", machine.data_root), MLP, (1, 4)
    # Units that are seldom in, or seldom out, give tails: the spread over blocks of draws shows it.
    blocks, draws = (2, 15) if machine.quick else (5, 40)
    split = dataset.train.to(machine.device)
    x, y = split.x[:128], split.y[:128]
    accelerator = "gpu" if machine.device == "cuda" else "cpu"
    torch.manual_seed(0)
    net = nets.build(spec, dataset.input_shape, dataset.outputs)
    example = dataset.train.x[:2]

    def noise(model: Any, guide: Any, local: bool) -> tuple[dict[str, float], list[float]]:
        """Sums over blocks by kind, and the blocks' traces."""
        found = [
            infer.gradient_variance(
                model, guide, x, y, draws=draws, local_reparameterisation=local, seed=seed
            )
            for seed in range(blocks)
        ]
        names = {id(value): name for name, value in guide.named_parameters()}
        kinds = {
            kind: sum(one.by_parameter[names[id(value)]] for one in found for value in values)
            for kind, values in guide.parameters_by_kind().items()
        }
        return kinds, [one.total for one in found]

    rows = []
    for variance, epochs in itertools.product(VARIANCES, lengths):
        model = models.SpikeSlabGroupHorseshoe(net, example, num_data=len(split))
        model = model.to(machine.device)
        guide = guides.for_model(model, variance=variance).to(machine.device)
        loader = data.Batches(split.x, split.y, 128)
        fabric = infer.make_fabric(accelerator=accelerator)
        run = infer.fit(model, guide, loader, epochs=epochs, progress=False, fabric=fabric)
        undecided = sum(run.history[-1]["undecided"].values())
        each = guides.for_model(model, variance=variance, inclusion_draws="example")
        each = each.to(machine.device)
        each.load_state_dict(guide.state_dict())
        measured = {
            "weights": noise(model, guide, False),
            "local": noise(model, guide, True),
            "local, inclusion an example": noise(model, each, True),
        }
        base, whole = measured["weights"]
        for draw, (kinds, traces) in measured.items():
            shares = [f"{kinds[kind] / base[kind]:.2f}" for kind in kinds]
            error = statistics.stdev(traces) / math.sqrt(blocks)
            trace = f"{statistics.mean(traces):.2g} ± {error:.1g}"
            total = f"{sum(traces) / sum(whole):.2f}"
            rows.append([variance, str(epochs), str(undecided), draw, *shares, total, trace])
    print_table(
        f"gradient: variance relative to draws of weights, ss-ghs, {dataset.name}, {spec}, one "
        f"batch of 128, {blocks} times {draws} draws",
        (
            "variance", "epochs", "undecided", "draws",
            "weights", "inclusion", "scales", "all", "trace",
        ),
        rows,
    )  # fmt: skip


PARTS: dict[str, Callable[[Machine], None]] = {
    "steps": steps,
    "overhead": overhead,
    "memory": memory,
    "width": width,
    "data": amount,
    "gradient": gradient,
}


def main(arguments: Sequence[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--part", choices=PARTS, action="append", help="all by default")
    parser.add_argument("--quick", action="store_true", help="fewer configurations and rounds")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--data-root", type=Path, default=os.environ.get("PYRO_SPARSE_DATA"), help="for MNIST"
    )
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no CUDA device; leave it out to run on the CPU")
    torch.set_num_threads(options.threads)
    # The profiler of memory announces each of its starts.
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    machine = Machine(options.device, options.quick, options.data_root)
    where = [f"{options.threads} thread(s)", f"torch {torch.__version__}"]
    if options.device == "cuda":
        where.insert(0, torch.cuda.get_device_name())
    print(f"{options.device}: {', '.join(where)}")
    started = time.perf_counter()
    for part in options.part or PARTS:
        PARTS[part](machine)
    print(f"{time.perf_counter() - started:.0f} seconds")


if __name__ == "__main__":
    main()
