"""How fast the compact network is beside the dense one: both, in both runtimes, in one run.

Machines are shared and their frequencies change, so times of two runs cannot be compared. Here
every round times each network in each runtime once, in an order that changes; a ratio is the median
of the rounds' own ratios. With one thread the clock is the process's own processor time, which does
not run while others have the processor. By the wall clock, on a busy machine, whatever takes longer
than a time slice looks slower than it is, and that is the dense network.
"""

from __future__ import annotations

import copy
import dataclasses
import math
import platform
import random
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pyro_sparse import nets
from pyro_sparse.inputs import Example, Inputs

from .check import Runner, example_rows, input_of, largest_difference, outputs_of
from .onnx import onnx_available, onnx_runner, write_onnx
from .program import export_program

__all__ = ["INT8", "ONNX", "TORCH", "Benchmark", "Ratio", "Timing", "bench", "time_alone"]

TORCH = "torch"
ONNX = "ONNX Runtime"
INT8 = "ONNX Runtime, int8"
PROCESSOR = "processor time"
WALL = "wall clock"

# A network is timed over this many seconds in a round, at least: long beside the clock's own cost,
# short beside a scheduler's time slice.
ROUND_SECONDS = 0.0005
LEAST_ROUNDS, MOST_ROUNDS = 7, 1000


@dataclass(frozen=True)
class Timing:
    """Seconds for one batch: median and quartiles over rounds.

    network: ``"dense"`` or ``"compact"``. throughput: inputs a second, at the median.
    """

    network: str
    runtime: str
    batch: int
    median: float
    low: float
    high: float
    throughput: float
    rounds: int


@dataclass(frozen=True)
class Ratio:
    """Dense time over compact time: median and quartiles of the rounds' ratios.

    title: the runtime, or ``"torch → ONNX Runtime"``: dense in the first, compact in the second.
    For int8, which only the compact network is written in: ``"ONNX Runtime → ONNX Runtime, int8"``.
    """

    title: str
    dense_runtime: str
    compact_runtime: str
    batch: int
    median: float
    low: float
    high: float


@dataclass(frozen=True)
class Benchmark:
    """What `bench` measured.

    threads: of each runtime. clock: what times are measured by. cpu: the processor's name.
    versions: of the runtimes. macs, parameters: of ``dense`` and ``compact``. runtime_difference:
    between the runtimes' outputs, beside these outputs' size, by network.
    """

    timings: tuple[Timing, ...]
    ratios: tuple[Ratio, ...]
    threads: int
    clock: str
    cpu: str
    versions: dict[str, str]
    macs: dict[str, int]
    parameters: dict[str, int]
    runtime_difference: dict[str, dict[str, float]]

    @property
    def mac_ratio(self) -> float:
        """Dense MACs over compact MACs."""
        return self.macs["dense"] / max(self.macs["compact"], 1)

    def to_dict(self) -> dict[str, Any]:
        """In JSON's types."""
        return {**dataclasses.asdict(self), "mac_ratio": self.mac_ratio}


def bench(
    dense: nn.Module,
    compact: nn.Module,
    example: Example | Inputs,
    *,
    int8: str | Path | None = None,
    batches: Sequence[int] = (1, 16, 256),
    threads: int = 1,
    seconds: float = 5.0,
) -> Benchmark:
    """Time both networks, in torch (eager) and (where it is installed) in ONNX Runtime, on the CPU.

    The outputs of the two runtimes are compared first.

    Args:
        dense: the full network.
        compact: the one cut out of it.
        example: inputs, see :func:`~pyro_sparse.export.save`.
            Shape: (any batch, ...).
        int8: the compact network's ``model-int8.onnx``, to be timed, too.
        batches: batch sizes.
        threads: that each runtime may use.
        seconds: time for each batch size; at least 7 rounds are made.

    Raises:
        ValueError: for no or wrong numbers; where a network cannot be written as ONNX, or computes
            something else there.
    """
    both = {"dense": dense, "compact": compact}
    measured = _measured(both, example, int8, batches, threads, seconds)
    versions = {"torch": str(torch.__version__)}
    if onnx_available():
        import onnxruntime

        versions[ONNX] = onnxruntime.__version__
    pairs = [(TORCH, TORCH)]
    if ONNX in versions:
        pairs += [(ONNX, ONNX), (TORCH, ONNX)]
    if any(("compact", INT8) in times for times in measured.rounds.values()):
        pairs += [(ONNX, INT8)]
    return Benchmark(
        timings=measured.timings(),
        ratios=tuple(
            _ratio(first, second, batch, times)
            for batch, times in measured.rounds.items()
            for first, second in pairs
        ),
        threads=threads,
        clock=measured.clock,
        cpu=_cpu(),
        versions=versions,
        macs={
            name: nets.count_macs(net, measured.inputs) for name, net in measured.networks.items()
        },
        parameters={name: nets.count_parameters(net) for name, net in measured.networks.items()},
        runtime_difference=measured.differences,
    )


def time_alone(
    net: nn.Module, example: Example | Inputs, *, batch: int = 1, seconds: float = 1.0
) -> tuple[Timing, ...]:
    """What `bench` says of its compact network, at one batch size, on one thread.

    Args:
        net: the network.
        example: inputs, see :func:`~pyro_sparse.export.save`.
        batch: inputs at a time.
        seconds: time for it; at least 7 rounds are made.

    Raises:
        ValueError: as of `bench`.
    """
    return _measured({"compact": net}, example, None, (batch,), 1, seconds).timings()


@dataclass(frozen=True)
class _Measured:
    """What `bench` measures.

    networks: copies, on the CPU.
    rounds: by batch size the times of every network in every runtime, see `_rounds`.
    differences: between the runtimes.
    """

    networks: Mapping[str, nn.Module]
    inputs: Inputs
    rounds: dict[int, dict[tuple[str, str], Tensor]]
    differences: dict[str, dict[str, float]]
    clock: str

    def timings(self) -> tuple[Timing, ...]:
        return tuple(
            _timing(network, runtime, batch, times)
            for batch, measured in self.rounds.items()
            for (network, runtime), times in measured.items()
        )


def _measured(
    networks: Mapping[str, nn.Module],
    example: Example | Inputs,
    int8: str | Path | None,
    batches: Sequence[int],
    threads: int,
    seconds: float,
) -> _Measured:
    if not batches or min(batches) < 1:
        raise ValueError(f"expected batch sizes of at least 1, got {list(batches)}")
    if threads < 1:
        raise ValueError(f"expected at least one thread, got {threads}")
    if not 0 < seconds < math.inf:
        raise ValueError(f"expected a positive number of seconds, got {seconds}")
    networks = {name: copy.deepcopy(net).cpu().eval() for name, net in networks.items()}
    inputs = input_of(networks["compact"], example)
    runners: dict[tuple[str, str], Runner] = {
        (name, TORCH): _eager(net) for name, net in networks.items()
    }
    differences = {}
    sizes = tuple(dict.fromkeys(batches))
    clock, clock_name = _clock(threads)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with (
            tempfile.TemporaryDirectory() as folder,
            torch.inference_mode(),
        ):
            if onnx_available():
                for name, net in networks.items():
                    path = Path(folder) / f"{name}.onnx"
                    with torch.inference_mode(False):
                        made = export_program(net, inputs)
                        write_onnx(made, path)
                    if made.fixed:
                        sizes = (inputs.batch,)
                    runners[name, ONNX] = onnx_runner(path, made.names, made.outputs, threads)
                    differences[name] = largest_difference(
                        net,
                        runners[name, ONNX],
                        inputs,
                        f"ONNX Runtime's {name} network",
                        None if made.fixed else sizes,
                    )
                    if int8 is not None and name == "compact":
                        runners[name, INT8] = onnx_runner(int8, made.names, made.outputs, threads)
            rounds = {
                batch: _rounds(
                    runners,
                    inputs if sizes == (inputs.batch,) else example_rows(inputs, batch),
                    seconds,
                    clock,
                )
                for batch in sizes
            }
    finally:
        torch.set_num_threads(before)
    return _Measured(networks, inputs, rounds, differences, clock_name)


def _eager(net: nn.Module) -> Runner:
    return lambda inputs: outputs_of(inputs.call(net))


def _rounds(
    runners: dict[tuple[str, str], Runner],
    inputs: Inputs,
    seconds: float,
    clock: Callable[[], float],
) -> dict[tuple[str, str], Tensor]:
    """Seconds a call by runner, ``(rounds,)`` each; entry i of all is from round i."""
    calls = {}
    for key, run in runners.items():
        run(inputs)
        start = clock()
        run(inputs)
        run(inputs)
        once = (clock() - start) / 2
        calls[key] = math.ceil(ROUND_SECONDS / once)
    times: dict[tuple[str, str], list[float]] = {key: [] for key in runners}
    order = list(runners)
    shuffle = random.Random(0).shuffle
    end = time.perf_counter() + seconds
    for index in range(MOST_ROUNDS):
        if index >= LEAST_ROUNDS and time.perf_counter() > end:
            break
        shuffle(order)
        for key in order:
            run, count = runners[key], calls[key]
            # What the network before has left in the caches is no part of this one's time.
            run(inputs)
            start = clock()
            for _ in range(count):
                run(inputs)
            times[key].append((clock() - start) / count)
    return {key: torch.tensor(values, dtype=torch.float64) for key, values in times.items()}


def _clock(threads: int) -> tuple[Callable[[], float], str]:
    """Processor time for one thread, where the system counts it finely; else the wall clock."""
    fine = time.get_clock_info("process_time").resolution < ROUND_SECONDS / 100
    return (time.process_time, PROCESSOR) if threads == 1 and fine else (time.perf_counter, WALL)


def _quartiles(values: Tensor) -> dict[str, float]:
    low, median, high = values.quantile(values.new_tensor([0.25, 0.5, 0.75])).tolist()
    return {"median": median, "low": low, "high": high}


def _timing(network: str, runtime: str, batch: int, times: Tensor) -> Timing:
    spread = _quartiles(times)
    throughput = batch / spread["median"]
    return Timing(network, runtime, batch, **spread, throughput=throughput, rounds=len(times))


def _ratio(dense: str, compact: str, batch: int, measured: dict[tuple[str, str], Tensor]) -> Ratio:
    title = dense if dense == compact else f"{dense} → {compact}"
    values = measured["dense", dense] / measured["compact", compact]
    return Ratio(title, dense, compact, batch, **_quartiles(values))


def _cpu() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
