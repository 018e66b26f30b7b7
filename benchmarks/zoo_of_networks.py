"""What the package makes of networks that others wrote: grouped, pruned, compacted, shipped.

Families of torchvision, timm and transformers, small and with random weights, and networks of the
kinds that people write by hand. For each: is it accepted, which share of its hidden units can go,
how far is the compact network from the masked one when half of them do, is it of the network's
own class, are its MACs those that were predicted, can it be written as .pt2, ONNX and int8, how
long does it take. Every network runs in a process of its own. The table of docs/networks.md is
made here.

Usage::

    python -m benchmarks.zoo_of_networks OUT [--only REGEX] [--no-export] [--resume]
    python -m benchmarks.zoo_of_networks OUT --resume --docs docs/networks.md
"""

from __future__ import annotations

import argparse
import copy
import inspect
import json
import multiprocessing
import re
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import pyro_sparse as ps
from pyro_sparse import nets
from pyro_sparse.export._compact import tensors_of
from pyro_sparse.models.base import SparseModel

from . import hand_written, library_networks

MINUTES = 5.0
EXACT = 1e-5  # of the outputs' size
FAMILIES: dict[str, Callable[[], library_networks.Networks]] = {
    "by hand": lambda: hand_written.NETWORKS,
    "torchvision": library_networks.torchvision_networks,
    "transformers": library_networks.transformers_networks,
    "timm": library_networks.timm_networks,
}


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("out", type=Path, help="table as JSON")
    parser.add_argument("--only", default="", help="of 'family/network', a regular expression")
    parser.add_argument("--no-export", action="store_true", help="stop at the compact network")
    parser.add_argument("--resume", action="store_true", help="keep what OUT has already")
    parser.add_argument("--docs", type=Path, help="write the table there, too")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    # What is imported and compiled at first use is no network's own time.
    measure(hand_written.NETWORKS["perceptron"], not options.no_export)
    table = json.loads(options.out.read_text()) if options.resume else {}
    for family, networks in FAMILIES.items():
        for name, make in networks().items():
            key = f"{family}/{name}"
            if key in table or not re.search(options.only, key):
                continue
            table[key] = row = _apart(make, not options.no_export)
            options.out.write_text(json.dumps(table, indent=1))
            print(f"{key}: {_line(row)}", flush=True)
    print(summary(table))
    if options.docs:
        options.docs.write_text(document(table), encoding="utf-8")


def _apart(make: Callable[[], tuple[nn.Module, Any]], export: bool) -> dict[str, Any]:
    """`measure` in a process of its own, for a limited time."""
    context = multiprocessing.get_context("fork")
    here, there = context.Pipe(duplex=False)

    def work() -> None:
        there.send(measure(make, export))

    process = context.Process(target=work)
    process.start()
    there.close()
    try:
        if here.poll(60 * MINUTES):
            return here.recv()
        return {"trouble": "traceback", "said": f"not done after {MINUTES:g} minutes"}
    except EOFError:
        return {"trouble": "traceback", "said": "the process died"}
    finally:
        process.kill()
        process.join()


def measure(make: Callable[[], tuple[nn.Module, Any]], export: bool = True) -> dict[str, Any]:
    """One row of the table."""
    torch.manual_seed(0)
    row: dict[str, Any] = {}
    stage = "making"
    try:
        net, example = make()
        _with_statistics(net.eval())
        row["parameters"] = nets.count_parameters(net)
        stage = "construction"
        start = time.perf_counter()
        model = ps.models.SpikeSlabGaussian(net, example, num_data=100, **_output(net, example))
        row["seconds"] = {stage: time.perf_counter() - start}
        groups = [group for group in model.graph if group.writers]
        prunable = [group for group in groups if group.prunable]
        row["kinds"] = sorted({group.kind for group in prunable})
        row["share"] = _share(groups)
        row["obstacles"] = {
            group.name: group.reason for group in groups if not group.prunable and group.reason
        }
        stage = "compaction"
        start = time.perf_counter()
        posterior = ps.Posterior(model, ps.guides.for_model(model))
        keep = {group.name: _half(group.size) for group in prunable}
        macs = posterior.macs(keep)
        small = ps.compact(posterior, keep)
        row["seconds"][stage] = time.perf_counter() - start
        row["own class"] = type(small) is type(net)
        stage = "comparison"
        row["difference"], row["rounding"] = differences(
            model, small, posterior.masked_parameters(keep), example
        )
        row["macs"] = {"predicted": macs, "counted": nets.count_macs(small, example)}
        if row["difference"] > max(EXACT, 10 * row["rounding"]):
            return {**row, "trouble": "wrong", "said": f"off by {row['difference']:.1e}"}
        if export:
            row["seconds"]["export"], row["formats"] = _shipped(small, example)
    except Exception as error:
        return {**row, **_trouble(stage, error)}
    return row


def _trouble(stage: str, error: Exception) -> dict[str, str]:
    """A refusal is one sentence in a ValueError; anything else comes from the depths."""
    refused = type(error) is ValueError and stage == "construction"
    where = traceback.extract_tb(error.__traceback__)[-1]
    said = f"{type(error).__name__}: {error}"
    if not refused:
        said += f" [{stage}: {Path(where.filename).name}:{where.lineno}]"
    return {"trouble": "refused" if refused else "traceback", "said": said[:600]}


def _output(net: nn.Module, example: Any) -> dict[str, str | int]:
    """Which output the likelihood reads, where a network has several that have names."""
    with torch.no_grad():
        result = _called(net, example)
    if not isinstance(result, Mapping | tuple | list) or len(result) == 1:
        return {}
    if "output" not in inspect.signature(ps.models.base.SparseModel.__init__).parameters:
        return {}
    return {"output": next(iter(result)) if isinstance(result, Mapping) else 0}


def _with_statistics(net: nn.Module) -> None:
    """Normalisations that do something: as new, they would hide constants."""
    for module in net.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.affine:
            module.running_mean.normal_(std=0.1)
            module.running_var.uniform_(0.5, 2)
            nn.init.normal_(module.bias, std=0.1)


def _half(size: int) -> Tensor:
    kept = torch.zeros(size, dtype=torch.bool)
    kept[torch.randperm(size)[: max(1, size // 2)]] = True
    return kept


def _share(groups: list[Any]) -> float:
    """Of the units of layers; the outputs' must stay."""
    hidden = [
        group
        for group in groups
        if group.prunable
        or (group.kind not in ("norm", "parameter") and "network's output" not in group.reason)
    ]
    units = sum(group.size for group in hidden)
    return sum(group.size for group in hidden if group.prunable) / max(units, 1)


def _called(net: Callable[..., Any], example: Any) -> Any:
    """The network's outputs: a dictionary holds keywords, if forward has these names."""
    if isinstance(example, tuple):
        return net(*example)
    if isinstance(example, dict):
        names = inspect.signature(net.forward).parameters  # type: ignore[attr-defined]
        return net(**example) if example.keys() <= names.keys() else net(example)
    return net(example)


def _read(model: SparseModel, outputs: Any) -> list[Tensor]:
    return [value.double() for value in tensors_of(outputs, model.output)]


def _doubled(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.double() if value.is_floating_point() else value
    if isinstance(value, dict):
        return {name: _doubled(part) for name, part in value.items()}
    return tuple(_doubled(part) for part in value) if isinstance(value, tuple) else value


@torch.no_grad()
def differences(
    model: SparseModel, small: nn.Module, masked: Mapping[str, Tensor], example: Any
) -> tuple[float, float]:
    """Masked from compact network, and the masked network from itself in double precision.

    Largest of all outputs, over the outputs' size; of the one that is read, where that is named.
    """
    full = copy.deepcopy(model.net).eval()
    for name, value in masked.items():  # buffers, in the network of a model
        full.get_buffer(name).copy_(value)
    expected = _read(model, _called(full, example))
    got = _read(model, _called(small, example))
    try:
        exact = _read(model, _called(full.double(), _doubled(example)))
    except RuntimeError:  # forward makes numbers of a type of its own
        exact = expected
    if len(got) != len(expected):
        return float("inf"), 0.0
    largest = max(float(value.abs().max()) for value in expected)
    return tuple(
        max(
            float((a - b).abs().max()) if a.shape == b.shape else float("inf")
            for a, b in zip(expected, others, strict=True)
        )
        / max(largest, 1e-12)
        for others in (got, exact)
    )  # type: ignore[return-value]


def _shipped(small: nn.Module, example: Any) -> tuple[float, dict[str, Any]]:
    """Seconds, and what each format said: how far it is from torch, or why it is not written."""
    start = time.perf_counter()
    said: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        for options in ({}, {"onnx": True}, {"int8": True, "calibration": example}):
            format_ = next(iter(options), "pt2")
            try:
                ps.export.save(small, folder, example=example, overwrite=True, **options)
                config = json.loads((Path(folder) / "config.json").read_text())
                said[format_] = config["formats"][format_]["max_abs_diff"]
            except Exception as error:
                said[format_] = f"{type(error).__name__}: {error}"[:300]
    return time.perf_counter() - start, said


# -- what is said of it ----------------------------------------------------------------------------


def _line(row: Mapping[str, Any]) -> str:
    if "trouble" in row:
        return f"{row['trouble']}: {row['said']}"
    formats = {
        name: "yes" if isinstance(value, float) else value
        for name, value in row.get("formats", {}).items()
    }
    seconds = sum(row["seconds"].values())
    return f"{row['share']:.0%} can go, off by {row['difference']:.0e}, {seconds:.1f} s {formats}"


def counts(table: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, int]]:
    """By family: networks, accepted, wrong, tracebacks, and which formats were written."""
    found: dict[str, dict[str, int]] = {}
    measured = any("formats" in row for row in table.values())
    for key, row in table.items():
        family = key.partition("/")[0]
        for name in (family, "all"):
            of = found.setdefault(name, {})
            trouble = row.get("trouble")
            formats = row.get("formats", {})
            for column, true in (
                ("networks", True),
                ("accepted", trouble is None),
                ("refused", trouble == "refused"),
                ("wrong", trouble == "wrong"),
                ("tracebacks", trouble == "traceback"),
                ("own class", row.get("own class", False)),
                ("MACs right", "macs" in row and len(set(row["macs"].values())) == 1),
                *(
                    (name, isinstance(formats.get(name), float))
                    for name in ("pt2", "onnx", "int8")
                    if measured
                ),
            ):
                of[column] = of.get(column, 0) + bool(true)
    found["all"] = found.pop("all", {})
    return found


def _markdown(rows: list[list[str]]) -> str:
    rows = [rows[0], ["---", *["---:"] * (len(rows[0]) - 1)], *rows[1:]]
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def summary(table: Mapping[str, Mapping[str, Any]]) -> str:
    """`counts` as a table."""
    found = counts(table)
    columns = list(found["all"])
    body = [[name, *(str(of[column]) for column in columns)] for name, of in found.items()]
    return _markdown([["", *columns], *body])


INTRODUCTION = """# Networks that others wrote

Made by `python -m benchmarks.zoo_of_networks`: every network small, with random weights; half of
all units that can go are cut out. *Can go*: share of the hidden units that are prunable.
*Difference*: masked full-size network from compact one, over the outputs' size, on the example;
*rounding*: the masked network from itself in double precision. *Own class*: the compact network is
of the network's class, not an exported graph. Formats: written, read back and compared. Seconds:
construction of the model, and everything, on one core that others use as well. What is empty was
not measured.

"""


def document(table: Mapping[str, Mapping[str, Any]]) -> str:
    """The text of docs/networks.md."""
    text = INTRODUCTION
    text += summary(table)
    for family in FAMILIES:
        rows = {
            key.partition("/")[2]: row for key, row in table.items() if key.startswith(f"{family}/")
        }
        text += f"\n## {family}\n\n"
        header = "network, can go, difference, rounding, own class, MACs, pt2, ONNX, int8, seconds"
        body = [_cells(name, row) for name, row in rows.items() if "trouble" not in row]
        text += _markdown([header.split(", "), *body])
        for name, row in rows.items():
            if "trouble" in row:
                text += f"\n- **{name}** {row['trouble']}: {_escaped(row['said'])}"
        unwritten = [
            f"\n- **{name}** not as {format_}: {_escaped(value)}"
            for name, row in rows.items()
            for format_, value in row.get("formats", {}).items()
            if isinstance(value, str)
        ]
        text += "".join(unwritten) + "\n"
    return text


def _escaped(said: str) -> str:
    return " ".join(said.split()).replace("|", "\\|").replace("<", "&lt;")


def _cells(name: str, row: Mapping[str, Any]) -> list[str]:
    macs, formats, seconds = row["macs"], row.get("formats", {}), row["seconds"]
    return [
        name,
        f"{row['share']:.0%}" if "share" in row else "",
        f"{row['difference']:.0e}",
        f"{row['rounding']:.0e}",
        "yes" if row["own class"] else "graph",
        "=" if macs["predicted"] == macs["counted"] else f"{macs['predicted']}≠{macs['counted']}",
        *(
            "yes" if isinstance(formats.get(key), float) else "no" if key in formats else ""
            for key in ("pt2", "onnx", "int8")
        ),
        f"{seconds['construction']:.1f}, {sum(seconds.values()):.1f}",
    ]


if __name__ == "__main__":
    main()
