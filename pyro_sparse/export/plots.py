"""Plots of a benchmark: each takes a matplotlib Axes, draws on it and returns it."""

from __future__ import annotations

from typing import Any

from matplotlib.axes import Axes

from pyro_sparse.posterior.plots import COLOURS

from .latency import Benchmark

__all__ = ["latencies", "speed_ups"]

# A network's hue and a runtime's line, so that what belongs together looks alike.
NETWORK_COLOURS = {"dense": COLOURS[1], "compact": COLOURS[0]}
RUNTIME_STYLES = ({"linestyle": "-", "marker": "o"}, {"linestyle": "--", "marker": "s"})
RATIO_COLOURS = (COLOURS[5], COLOURS[0], COLOURS[4])


def latencies(benchmark: Benchmark, ax: Axes) -> Axes:
    """Time for one input over the batch size, a line a network and runtime, with quartiles."""
    runtimes = list(dict.fromkeys(timing.runtime for timing in benchmark.timings))
    for network, colour in NETWORK_COLOURS.items():
        for runtime, style in zip(runtimes, RUNTIME_STYLES, strict=False):
            rows = [t for t in benchmark.timings if (t.network, t.runtime) == (network, runtime)]
            batches = [row.batch for row in rows]
            middle = [1e6 * row.median / row.batch for row in rows]
            low = [1e6 * (row.median - row.low) / row.batch for row in rows]
            high = [1e6 * (row.high - row.median) / row.batch for row in rows]
            options: Any = {**style, "color": colour, "capsize": 3, "markersize": 5}
            ax.errorbar(batches, middle, (low, high), label=f"{network}, {runtime}", **options)
    ax.set_xscale("log", base=2)
    ax.set_yscale("log")
    batches = sorted({timing.batch for timing in benchmark.timings})
    ax.set_xticks(batches, [str(batch) for batch in batches])
    ax.minorticks_off()
    ax.set_xlabel("batch size")
    ax.set_ylabel("µs per input")
    ax.set_title(f"latency, {_threads(benchmark)}, {benchmark.clock}")
    # Room for the legend above the highest whisker.
    bottom, top = ax.get_ylim()
    ax.set_ylim(bottom, top * (top / bottom) ** 0.25)
    ax.legend(frameon=False, loc="upper right", ncols=2, fontsize=8)
    return ax


def speed_ups(benchmark: Benchmark, ax: Axes) -> Axes:
    """Dense over compact time by batch size, beside the ratio of MACs; whiskers are quartiles."""
    titles = list(dict.fromkeys(ratio.title for ratio in benchmark.ratios))
    batches = list(dict.fromkeys(ratio.batch for ratio in benchmark.ratios))
    width = 0.8 / len(titles)
    for index, (title, colour) in enumerate(zip(titles, RATIO_COLOURS, strict=False)):
        rows = [ratio for ratio in benchmark.ratios if ratio.title == title]
        places = [place + (index - (len(titles) - 1) / 2) * width for place in range(len(rows))]
        middle = [row.median for row in rows]
        spread = (
            [row.median - row.low for row in rows],
            [row.high - row.median for row in rows],
        )
        first, last = rows[0].dense_runtime, rows[0].compact_runtime
        label = title if first == last else f"dense in {first}, compact in {last}"
        ax.bar(places, middle, width * 0.92, color=colour, label=label)
        ax.errorbar(places, middle, spread, fmt="none", ecolor="0.25", elinewidth=1, capsize=2)
        for place, row in zip(places, rows, strict=True):
            text = f"{row.median:.1f}×"
            above: Any = {"xytext": (0, 3), "textcoords": "offset points", "fontsize": 8}
            ax.annotate(text, (place, row.high), ha="center", va="bottom", **above)
    ratio = benchmark.mac_ratio
    ax.axhline(
        ratio, color="0.4", linestyle="--", linewidth=1, zorder=0, label=f"MACs: {ratio:.1f}×"
    )
    ax.axhline(1, color="0.7", linewidth=1, zorder=0)
    ax.set_xticks(range(len(batches)), [str(batch) for batch in batches])
    # Room for the legend above the highest whisker.
    ax.set_ylim(0, 1.45 * max(ratio, *(row.high for row in benchmark.ratios)))
    ax.set_xlabel("batch size")
    ax.set_ylabel("times as fast as the dense network")
    ax.set_title(f"speed-up, {_threads(benchmark)}")
    ax.legend(frameon=False, loc="upper left", fontsize=8)
    return ax


def _threads(benchmark: Benchmark) -> str:
    return f"{benchmark.threads} thread{'s' if benchmark.threads > 1 else ''}"
