"""What a comparison looks like in a terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

__all__ = ["new_folder", "print_table"]


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


def print_table(summaries: Sequence[Mapping[str, Any]], console: Console | None = None) -> None:
    """One row a model: ensemble beside compact, what was kept, and what it cost."""
    classification = "accuracy_ensemble" in summaries[0]
    first = summaries[0]
    table = Table(
        title=f"{first['data']}, {first['net']} ({_joined(first['units'])} units), "
        f"{first['epochs']} epochs, seed {first['seed']}",
        caption="ens: mean of 20 posterior draws; compact: the one pruned network that is shipped",
    )
    table.add_column("model")
    scores = (
        [("accuracy", "accuracy", "{:.2%}"), ("NLL", "nll", "{:.3f}"), ("ECE", "ece", "{:.3f}")]
        if classification
        else [("RMSE", "rmse", "{:.4g}"), ("NLL", "nll", "{:.3f}")]
    )
    for title, _, _ in scores:
        table.add_column(f"{title}\nens", justify="right")
        table.add_column(f"{title}\ncompact", justify="right")
    for title in ("kept", "undecided", "parameters", "MACs", "seconds"):
        table.add_column(title, justify="right")
    for summary in summaries:
        cells = [
            form.format(summary[f"{key}_{which}"])
            for _, key, form in scores
            for which in ("ensemble", "compact")
        ]
        table.add_row(
            summary["model"],
            *cells,
            _joined(summary["kept"]),
            _joined(summary["undecided"]),
            _count(summary["params_compact"]),
            _count(summary["macs_compact"]),
            f"{summary['train_seconds']:.0f}",
        )
    console = console or Console()
    if not console.is_terminal:
        # Piped output has no width of its own: do not fold a row of numbers at 80 characters.
        console = Console(file=console.file, width=140)
    console.print(table)
