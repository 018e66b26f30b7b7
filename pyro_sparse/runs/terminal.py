"""What a comparison looks like in a terminal."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console
from rich.table import Table

from pyro_sparse.export import Benchmark
from pyro_sparse.runs.table import CALIBRATION, SCORES, SECTIONS, Cell, merged_units
from pyro_sparse.runs.table import Table as ComparisonTable

if TYPE_CHECKING:
    from pyro_sparse.data import Dataset

__all__ = [
    "new_folder",
    "print_analysis",
    "print_bench",
    "print_comparison",
    "print_data",
    "print_seeds",
]


def new_folder(parent: Path, name: str) -> Path:
    """A path under ``parent`` that does not exist, with the time in its name."""
    stamp = datetime.now().strftime("%Y%m%d-%H%M%S")
    path = parent / f"{name}-{stamp}"
    count = 1
    while path.exists():
        count += 1
        path = parent / f"{name}-{stamp}-{count}"
    return path


def _count(number: int) -> str:
    for unit, size in (("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.3g}{unit}"
    return str(number)


def _joined(values: Mapping[str, int]) -> str:
    return "-".join(str(value) for value in values.values())


def print_data(dataset: Dataset, console: Console | None = None) -> None:
    """What was taken for what, before anything is trained on it, and what is suspicious."""
    console = console or Console()
    # Piped output has no width: a line a note.
    for line in (f"{dataset.name}: {dataset.taken}", *(f"  {note}" for note in dataset.notes)):
        console.print(line, highlight=False, markup=False, soft_wrap=not console.is_terminal)


def print_comparison(
    data: str, comparison: ComparisonTable, console: Console | None = None
) -> None:
    """A table a section, one row an entry: scores, size and cost, how well the guide fits."""
    console = console or Console()
    console.print(f"{data}, {comparison.subtitle}\n", highlight=False)
    for section in SECTIONS:
        titles, lines = comparison.section(section, sign="±")
        if not titles:
            continue
        table = _plain_table(section.title)
        table.add_column("model", overflow="fold")
        for title in titles:
            table.add_column(title.replace(" ", "\n", 1), justify="right", no_wrap=True)
        for entry, cells in lines.items():
            table.add_row(entry, *cells)
        _print(table, console)
        console.print(section.note + "\n", style="dim", highlight=False)
    if comparison.footnote:
        console.print(comparison.footnote, highlight=False)


def _print(table: Table, console: Console | None) -> None:
    console = console or Console()
    if not console.is_terminal:
        # Piped output has no width of its own: do not fold a row of numbers at 80 characters.
        console = Console(file=console.file, width=140)
    console.print(table)


def print_bench(benchmark: Benchmark, console: Console | None = None) -> None:
    """One row a batch size and runtime: dense beside compact, and what the removal brought."""
    times = {(row.network, row.runtime, row.batch): row for row in benchmark.timings}
    macs, parameters = benchmark.macs, benchmark.parameters
    table = Table(
        title=f"{_count(macs['dense'])} → {_count(macs['compact'])} MACs "
        f"({benchmark.mac_ratio:.1f}×), {_count(parameters['dense'])} → "
        f"{_count(parameters['compact'])} parameters",
        caption="medians of interleaved rounds, ± half the distance of the quartiles; "
        f"{benchmark.threads} thread{'s' if benchmark.threads > 1 else ''}, "
        f"{benchmark.clock}, {benchmark.cpu}; "
        + ", ".join(f"{name} {version}" for name, version in benchmark.versions.items()),
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        collapse_padding=True,
    )
    table.add_column("batch", justify="right")
    table.add_column("runtime", no_wrap=True)
    for title in ("dense\nms", "compact\nms", "dense\n1/s", "compact\n1/s"):
        table.add_column(title, justify="right", no_wrap=True)
    table.add_column("speed-up\n(quartiles)", justify="right", no_wrap=True)
    last = None
    for ratio in benchmark.ratios:
        dense = times["dense", ratio.dense_runtime, ratio.batch]
        compact = times["compact", ratio.compact_runtime, ratio.batch]
        if last not in (None, ratio.batch):
            table.add_section()
        table.add_row(
            str(ratio.batch) if ratio.batch != last else "",
            ratio.title.replace("ONNX Runtime", "ONNX"),  # 80 columns
            *(
                f"{1e3 * row.median:.3g} ±{(row.high - row.low) / 2 / row.median:.0%}"
                for row in (dense, compact)
            ),
            *(_count(round(row.throughput)) for row in (dense, compact)),
            f"[bold]{ratio.median:.1f}×[/] ({ratio.low:.1f}-{ratio.high:.1f})",
        )
        last = ratio.batch
    _print(table, console)


def print_analysis(analysis: Mapping[str, Any], console: Console | None = None) -> None:
    """What `analyse` has found: units, scores and calibration, intervals, other sizes."""
    units = _plain_table("units")
    for name in ("layer", "units", "kept", "expected (95 %)", "undecided", "entropy"):
        units.add_column(name, justify="left" if name == "layer" else "right")
    for group in analysis["groups"]:
        unknown = group["expected"] is None
        units.add_row(
            group["group"],
            str(group["units"]),
            str(group["kept"]),
            "–" if unknown else f"{group['expected']:.1f} ({group['low']}-{group['high']})",
            "–" if unknown else str(group["undecided"]),
            "–" if unknown else f"{group['entropy']:.2f}",
        )
    _print(units, console)

    which = ("ensemble", "compact", "members")
    scores = _plain_table("test set")
    scores.add_column("")
    for name in which:
        members = f"{analysis['members']} compact draws"
        scores.add_column(members if name == "members" else name, justify="right")
    calibrated = [one for one in CALIBRATION if one.key in analysis["calibration"]["compact"]]
    for score in SCORES:
        if f"{score.key}_compact" in analysis["scores"] and score.key != "ece":
            scores.add_row(score.title, *(score.text(analysis["scores"], one) for one in which))
    for column in calibrated:
        scores.add_row(column.title, *(column.text(analysis["calibration"][w]) for w in which))
    _print(scores, console)
    if analysis["outside"]:
        outside = analysis["outside"]
        (console or Console()).print(
            f"told from {outside['data']} (AUROC): {outside['auroc_entropy']:.3f} by entropy, "
            f"{outside['auroc_mutual_information']:.3f} by mutual information\n"
        )

    sizes = _plain_table(f"compact networks by {analysis['measure']}; *: the run's own")
    (score,) = (one for one in SCORES if one.key == analysis["score"])
    for name in ("units", "parameters", "MACs", score.title, "NLL"):
        sizes.add_column(name, justify="left" if name == "units" else "right")
    for point in analysis["curve"]:
        sizes.add_row(
            _joined(point["kept"]) + (" *" if point["own"] else ""),
            _count(point["params"]),
            _count(point["macs"]),
            score.text(point),
            f"{point['nll']:.4f}",
        )
    _print(sizes, console)


def print_seeds(found: Mapping[str, Any], console: Console | None = None) -> None:
    """What `analyse_seeds` has found: what seeds agree on, and scores over them."""
    runs = len(found["runs"])
    if found["groups"]:
        units = _plain_table(f"units, {runs} seeds, matched")
        titles, rows = merged_units(found["groups"], sign="±")
        for name in (*titles, "pair"):
            units.add_column(name, justify="left" if name == "layer" else "right")
        for group, cells in zip(found["groups"], rows, strict=True):
            first, second, apart = group["pair"]
            units.add_row(*cells, f"{first}, {second}: {apart:+.2f}")
        units.caption_justify = "left"
        units.caption = (
            "In all, in some: inclusion probability > ½. Largest s.e.: of a unit's probability. "
            "Pair: joint inclusion farthest from independence."
        )
        _print(units, console)
    if found["inputs"] is not None:
        said = found["inputs"]["said"]
        (console or Console()).print(f"{said}\n", highlight=False, markup=False)
    scores = _plain_table("test set")
    for name in ("", "one run", "draws of all"):
        scores.add_column(name, justify="right" if name else "left")
    for score in SCORES:
        if score.key in found["mixture"]:
            cell = Cell(**found["scores"][f"{score.key}_ensemble"])
            scores.add_row(
                score.title, cell.text(score.form, sign="±"), score.text(found["mixture"])
            )
    _print(scores, console)


def _plain_table(title: str) -> Table:
    return Table(
        title=title,
        title_justify="left",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        collapse_padding=True,
    )
