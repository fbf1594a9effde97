"""Plots of timings. Needs matplotlib (the ``eval`` extra)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tidaldecode.bench.decode import StepTime
from tidaldecode.figure import save_figure


def plot_decode(
    results: Sequence[StepTime], title: str, path: Path, record: dict[str, Any]
) -> Path:
    """Milliseconds a step against the context, one panel a batch size, floors dotted."""
    from matplotlib.figure import Figure

    batches = sorted({result.batch for result in results})
    figure = Figure(figsize=(4.8 * len(batches), 3.8), layout="constrained")
    panels = figure.subplots(1, len(batches), squeeze=False)[0]
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
    figure.suptitle(title)
    return save_figure(figure, path, record)
