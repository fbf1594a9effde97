"""Plots of timings. Needs matplotlib (the ``eval`` extra)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tidaldecode.bench.breakdown import PARTS
from tidaldecode.bench.decode import StepTime
from tidaldecode.figure import save_figure


def plot_decode(
    results: Sequence[StepTime], title: str, path: Path, record: dict[str, Any]
) -> Path:
    """Milliseconds a step against the context, one panel a batch size, floors dotted.

    Below, where steps were profiled, what they are made of.
    """
    from matplotlib.figure import Figure

    batches = sorted({result.batch for result in results})
    profiled = all(result.parts_ms for result in results)
    lines = 2 if profiled else 1
    figure = Figure(figsize=(4.8 * len(batches), 3.8 * lines), layout="constrained")
    grid = figure.subplots(lines, len(batches), squeeze=False)
    panels = grid[0]
    for panel, batch in zip(panels, batches, strict=True):
        for index, method in enumerate(dict.fromkeys(result.method for result in results)):
            found = [r for r in results if (r.batch, r.method) == (batch, method)]
            contexts = [r.context for r in found]
            colour = f"C{index}"
            panel.plot(
                contexts, [r.milliseconds for r in found], marker="o", color=colour, label=method
            )
            panel.plot(contexts, [r.floor_ms for r in found], ":", color=colour)
        panel.set(
            title=f"batch {batch}",
            xlabel="context (tokens)",
            ylabel="decode step (ms)",
            ylim=(0, None),
        )
        panel.grid(alpha=0.3)
    panels[0].legend(title="dotted: bandwidth floor")
    if profiled:
        for panel, batch in zip(grid[1], batches, strict=True):
            _stack(panel, [result for result in results if result.batch == batch])
        grid[1][0].legend(fontsize="small")
    figure.suptitle(title)
    return save_figure(figure, path, record)


def _stack(panel: Any, results: Sequence[StepTime]) -> None:
    """One bar a context and method: the parts of its step."""
    labels = [f"{result.context:,}\n{result.method}" for result in results]
    bottom = [0.0] * len(results)
    for part in PARTS:
        heights = [result.parts_ms[part] for result in results]
        panel.bar(labels, heights, bottom=bottom, label=part)
        bottom = [low + height for low, height in zip(bottom, heights, strict=True)]
    panel.set(ylabel="decode step (ms)")
    panel.tick_params(axis="x", labelsize="x-small")
