"""Plots of results, written as PNG files. Needs matplotlib (the ``eval`` extra)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tidaldecode.eval.store import Row
from tidaldecode.figure import save_figure


def plot_needle(rows: Sequence[Row], path: Path, title: str, record: dict[str, Any]) -> Path:
    """Heatmaps of exact match in percent, depth by length, one panel per method."""
    import numpy as np
    from matplotlib.figure import Figure

    methods = list(dict.fromkeys(row["method"] for row in rows))
    contexts = sorted({row["context"] for row in rows})
    depths = sorted({row["depth"] for row in rows})
    figure = Figure(figsize=(1.8 + 2.4 * len(methods), 3.6), layout="constrained")
    axes = figure.subplots(1, len(methods), sharey=True, squeeze=False)[0]
    for axis, method in zip(axes, methods, strict=True):
        share = np.full((len(depths), len(contexts)), np.nan)
        for i, depth in enumerate(depths):
            for j, context in enumerate(contexts):
                hits = [
                    row["exact"]
                    for row in rows
                    if (row["method"], row["depth"], row["context"]) == (method, depth, context)
                ]
                if hits:
                    share[i, j] = 100 * sum(hits) / len(hits)
        image = axis.imshow(share, cmap="RdYlGn", vmin=0, vmax=100, aspect="auto")
        for (i, j), value in np.ndenumerate(share):
            if not np.isnan(value):
                axis.text(j, i, f"{value:.0f}", ha="center", va="center", fontsize=9)
        axis.set_title(method, fontsize=10, wrap=True)
        axis.set_xticks(range(len(contexts)), [f"{context:,}" for context in contexts], fontsize=8)
        axis.set_xlabel("context (tokens)")
    axes[0].set_yticks(range(len(depths)), [f"{100 * depth:.0f} %" for depth in depths])
    axes[0].set_ylabel("depth of the needle")
    figure.colorbar(image, ax=list(axes), label="exact match (%)")
    figure.suptitle(title, fontsize=11)
    return save_figure(figure, path, record)


def plot_budget(
    series: dict[str, list[tuple[int, float, float | None, float | None]]],
    path: Path,
    title: str,
    quality: str,
    record: dict[str, Any],
    full: float | None = None,
) -> Path:
    """Quality against budget: for every method ``(budget, value, low, high)``; ``full`` is a line."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    axis = figure.subplots()
    for name, points in series.items():
        points = sorted(points)
        budgets, values = [p[0] for p in points], [p[1] for p in points]
        below = [p[1] - (p[1] if p[2] is None else p[2]) for p in points]
        above = [(p[1] if p[3] is None else p[3]) - p[1] for p in points]
        axis.errorbar(budgets, values, yerr=[below, above], marker="o", capsize=3, label=name)
    if full is not None:
        axis.axhline(full, color="black", linestyle="--", linewidth=1, label="full attention")
    budgets_shown = sorted({point[0] for points in series.values() for point in points})
    axis.set_xscale("log", base=2)
    axis.set_xticks(budgets_shown, [f"{budget:,}" for budget in budgets_shown])
    axis.minorticks_off()
    axis.set_xlabel("budget (tokens that a sparse layer attends to)")
    axis.set_ylabel(quality)
    axis.set_title(title, fontsize=11)
    axis.legend(fontsize=8)
    return save_figure(figure, path, record)


def plot_positions(
    series: dict[str, list[float]],
    path: Path,
    title: str,
    quality: str,
    record: dict[str, Any],
    tokens_per_point: float = 1.0,
) -> Path:
    """Quality along the decoded length: one value per ``tokens_per_point`` tokens and method."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    axis = figure.subplots()
    for name, values in series.items():
        places = [(index + 0.5) * tokens_per_point for index in range(len(values))]
        axis.plot(places, values, marker="." if len(values) < 40 else None, label=name)
    axis.set_xlabel("decoded tokens")
    axis.set_ylabel(quality)
    axis.set_title(title, fontsize=11)
    axis.legend(fontsize=8)
    return save_figure(figure, path, record)


def plot_calibration(
    rounds: dict[str, dict[int, float]],
    shared_mass: list[list[float]],
    path: Path,
    chosen: Sequence[int],
    record: dict[str, Any],
) -> Path:
    """KL by added layer, one row a round of the search, over the shared softmax mass of all layers."""
    import numpy as np
    from matplotlib.colors import LogNorm
    from matplotlib.figure import Figure

    layers = len(shared_mass)
    losses = np.full((max(1, len(rounds)), layers), np.nan)
    for row, grown in enumerate(rounds.values()):
        for layer, loss in grown.items():
            losses[row, layer] = max(loss, 1e-6)
    width = max(6.0, 0.45 * layers)
    figure = Figure(figsize=(width, 1.5 + 0.5 * len(losses) + width * 0.75), layout="constrained")
    top, bottom = figure.subplots(2, 1, height_ratios=[1 + len(losses), 0.75 * layers])
    image = top.imshow(losses, cmap="RdYlGn_r", norm=LogNorm(), aspect="auto")
    for (row, layer), loss in np.ndenumerate(losses):
        if not np.isnan(loss):
            shown = f"{loss:.3f}" if layers <= 16 else f"{loss:.2f}"
            top.text(layer, row, shown, ha="center", va="center", fontsize=7)
    top.set_yticks(range(len(rounds)), [f"with {base}" for base in rounds], fontsize=8)
    top.set_xticks(range(layers), range(layers), fontsize=7)
    top.set_xlabel("layer added")
    top.set_title(f"KL to full attention (nats/token); chosen {', '.join(map(str, chosen))}")
    figure.colorbar(image, ax=top)
    mass = np.array(shared_mass)
    image = bottom.imshow(np.where(mass > 0, mass, np.nan), cmap="viridis", vmin=0, vmax=1)
    bottom.set_xlabel("layer that reads")
    bottom.set_ylabel("layer that selects")
    bottom.set_title("softmax mass found in another layer's tokens, over that in its own")
    figure.colorbar(image, ax=bottom)
    return save_figure(figure, path, record)
