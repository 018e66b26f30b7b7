"""What a comparison looks like in a terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from pyro_sparse.export import Benchmark
from pyro_sparse.runs.table import (
    CALIBRATION,
    SCORES,
    SECTIONS,
    Cell,
    merged_units,
    variables_table,
)
from pyro_sparse.runs.table import Table as ComparisonTable

if TYPE_CHECKING:
    from pyro_sparse.data import Dataset

__all__ = [
    "new_folder",
    "print_analysis",
    "print_bench",
    "print_comparison",
    "print_data",
    "print_result",
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
    console.print(f"{data}, {comparison.subtitle}\n", highlight=False, markup=False)
    for section in SECTIONS:
        titles, lines = comparison.section(section, sign="±")
        if not titles:
            continue
        rows = [[entry, *cells] for entry, cells in lines.items()]
        heads = [title.replace(" ", "\n", 1) for title in titles]
        _show(section.title, ["model", *heads], rows, console)
        console.print(section.note + "\n", style="dim", highlight=False)
    if comparison.footnote:
        console.print(comparison.footnote, highlight=False)


def print_result(summary: Mapping[str, Any], console: Console | None = None) -> None:
    """What is to be said of one run beside its scores: variables, or that nothing is left."""
    console = console or Console()
    if summary.get("said"):
        console.print(f"\n{summary['said']}", highlight=False, markup=False)
    for caution in summary.get("cautions", []):
        console.print(f"\n{summary['model']}: {caution}", highlight=False, markup=False)
    if summary.get("inputs"):
        console.print()
        _print_variables(summary["inputs"], console)
        if summary.get("objective"):
            # A probability is nothing without the objective at which it came to rest.
            console.print(summary["objective"], style="dim", highlight=False, markup=False)


def _print_variables(
    variables: Sequence[Mapping[str, Any]], console: Console | None, most: int = 30
) -> None:
    """Inclusion probability by variable, the prior's beside it."""
    console = console or Console()
    titles, rows = variables_table(variables, sign="±")
    _show("variables", titles, rows[:most], console)
    if len(rows) > most:
        console.print(
            f"and {len(rows) - most} more, below {variables[most - 1]['probability']:.3f}; "
            "all are in the folder's JSON and report.html\n",
            highlight=False,
        )


PIPED = 140
"""Columns of output that is no terminal's: a row of numbers is not folded at 80."""


def _show(
    title: str,
    titles: Sequence[str],
    rows: Sequence[Sequence[str]],
    console: Console | None,
    keys: int = 1,
    sections: Sequence[int] = (),
) -> None:
    """A table in as many blocks as the width asks for, each with the key columns.

    Where not even one column fits beside them, a line a number.

    Args:
        title: above it.
        titles, rows: the cells; a title may have two lines.
        console: where to.
        keys: how many of the first columns say what a row is about.
        sections: numbers of rows that a line is drawn after.
    """
    console = console or Console()
    if not console.is_terminal:
        console = Console(file=console.file, width=PIPED)

    def block(columns: Sequence[int]) -> Table:
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
        for column in (*range(keys), *columns):
            left = column < keys and not (keys > 1 and column == 0)
            table.add_column(
                Text(titles[column]), justify="left" if left else "right", no_wrap=True
            )
        for number, row in enumerate(rows):
            # Text, so that a name with brackets in it is no markup.
            cells = [Text(row[column]) for column in (*range(keys), *columns)]
            table.add_row(*cells, end_section=number in sections)
        return table

    def fits(columns: Sequence[int]) -> bool:
        wide = console.options.update(width=10_000)
        return Measurement.get(console, wide, block(columns)).maximum <= console.width

    console.print(title, style="italic", markup=False, highlight=False)
    rest = list(range(keys, len(titles)))
    if not all(fits([column]) for column in rest):
        for row in rows:
            name = " ".join(cell for cell in row[:keys] if cell)
            console.print(name, highlight=False, markup=False)
            for column in rest:
                line = f"  {' '.join(titles[column].split())}: {row[column]}"
                console.print(line, highlight=False, markup=False)
        console.print()
        return
    while rest:
        count = 1
        while count < len(rest) and fits(rest[: count + 1]):
            count += 1
        console.print(block(rest[:count]))
        rest = rest[count:]


def print_bench(benchmark: Benchmark, console: Console | None = None) -> None:
    """One row a batch size and runtime: dense beside compact, and what the removal brought."""
    times = {(row.network, row.runtime, row.batch): row for row in benchmark.timings}
    macs, parameters = benchmark.macs, benchmark.parameters
    rows, sections, last = [], [], None
    for number, ratio in enumerate(benchmark.ratios):
        dense = times["dense", ratio.dense_runtime, ratio.batch]
        compact = times["compact", ratio.compact_runtime, ratio.batch]
        if last not in (None, ratio.batch):
            sections.append(number - 1)
        rows.append(
            [
                str(ratio.batch) if ratio.batch != last else "",
                ratio.title.replace("ONNX Runtime", "ONNX"),  # 80 columns
                *(
                    f"{1e3 * row.median:.3g} ±{(row.high - row.low) / 2 / row.median:.0%}"
                    for row in (dense, compact)
                ),
                *(_count(round(row.throughput)) for row in (dense, compact)),
                f"{ratio.median:.1f}× ({ratio.low:.1f}-{ratio.high:.1f})",
            ]
        )
        last = ratio.batch
    titles = ["batch", "runtime", "dense\nms", "compact\nms", "dense\n1/s", "compact\n1/s"]
    _show(
        f"{_count(macs['dense'])} → {_count(macs['compact'])} MACs "
        f"({benchmark.mac_ratio:.1f}×), {_count(parameters['dense'])} → "
        f"{_count(parameters['compact'])} parameters",
        [*titles, "speed-up\n(quartiles)"],
        rows,
        console,
        keys=2,
        sections=sections,
    )
    (console or Console()).print(
        "medians of interleaved rounds, ± half the distance of the quartiles; "
        f"{benchmark.threads} thread{'s' if benchmark.threads > 1 else ''}, "
        f"{benchmark.clock}, {benchmark.cpu}; "
        + ", ".join(f"{name} {version}" for name, version in benchmark.versions.items()),
        style="dim",
        highlight=False,
        markup=False,
    )


def print_analysis(analysis: Mapping[str, Any], console: Console | None = None) -> None:
    """What `analyse` has found: units, scores and calibration, intervals, other sizes."""
    rows = []
    for group in analysis["groups"]:
        unknown = group["expected"] is None
        rows.append(
            [
                group["group"],
                str(group["units"]),
                str(group["kept"]),
                "–" if unknown else f"{group['expected']:.1f} ({group['low']}-{group['high']})",
                "–" if unknown else str(group["undecided"]),
                "–" if unknown else f"{group['entropy']:.2f}",
            ]
        )
    titles = ["layer", "units", "kept", "expected (95 %)", "undecided", "entropy"]
    _show("units", titles, rows, console)
    if analysis.get("inputs"):
        print_result({key: analysis.get(key) for key in ("inputs", "objective")}, console)

    which = ("ensemble", "compact", "members")
    calibrated = [one for one in CALIBRATION if one.key in analysis["calibration"]["compact"]]
    rows = [
        [score.title, *(score.text(analysis["scores"], one) for one in which)]
        for score in SCORES
        if f"{score.key}_compact" in analysis["scores"] and score.key != "ece"
    ]
    rows += [
        [column.title, *(column.text(analysis["calibration"][w]) for w in which)]
        for column in calibrated
    ]
    members = f"{analysis['members']} compact draws"
    _show("test set", ["", "ensemble", "compact", members], rows, console)
    if analysis["outside"]:
        outside = analysis["outside"]
        (console or Console()).print(
            f"told from {outside['data']} (AUROC): {outside['auroc_entropy']:.3f} by entropy, "
            f"{outside['auroc_mutual_information']:.3f} by mutual information\n"
        )

    (score,) = (one for one in SCORES if one.key == analysis["score"])
    rows = [
        [
            _joined(point["kept"]) + (" *" if point["own"] else ""),
            _count(point["params"]),
            _count(point["macs"]),
            score.text(point),
            f"{point['nll']:.4f}",
        ]
        for point in analysis["curve"]
    ]
    _show(
        f"compact networks by {analysis['measure']}; *: the run's own",
        ["units", "parameters", "MACs", score.title, "NLL"],
        rows,
        console,
    )


def print_seeds(found: Mapping[str, Any], console: Console | None = None) -> None:
    """What `analyse_seeds` has found: what seeds agree on, and scores over them."""
    runs = len(found["runs"])
    inputs = found["inputs"]
    if found["groups"]:
        titles, cells = merged_units(found["groups"], sign="±")
        rows = []
        for group, own in zip(found["groups"], cells, strict=True):
            *pair, apart = group["pair"]
            if group["group"] == "input" and inputs is not None and inputs["names"] is not None:
                pair = [inputs["names"][unit] for unit in pair]
            rows.append([*own, f"{pair[0]}, {pair[1]}: {apart:+.2f}"])
        _show(f"units, {runs} seeds, matched", [*titles, "pair"], rows, console)
        (console or Console()).print(
            "In all, in some: inclusion probability > ½. Largest s.e.: of a unit's probability. "
            "Pair: joint inclusion farthest from independence.\n",
            style="dim",
            highlight=False,
        )
    if inputs is not None:
        (console or Console()).print(f"{inputs['said']}\n", highlight=False, markup=False)
        if inputs["variables"]:
            _print_variables(inputs["variables"], console)
    rows = []
    for score in SCORES:
        if score.key in found["mixture"]:
            cell = Cell(**found["scores"][f"{score.key}_ensemble"])
            text = cell.text(score.form, sign="±")
            rows.append([score.title, text, score.text(found["mixture"])])
    _show("test set", ["", "one run", "draws of all"], rows, console)
