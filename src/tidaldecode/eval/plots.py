"""Plots of results, written as PNG files. Needs matplotlib (the ``eval`` extra)."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path

from tidaldecode.errors import TidalError
from tidaldecode.eval.runner import NeedleRow
from tidaldecode.record import write_file


def require_matplotlib() -> None:
    """Raise `TidalError` where plots cannot be drawn, before any long work."""
    if importlib.util.find_spec("matplotlib") is None:
        raise TidalError(
            "plot: expected matplotlib, found none; run pip install 'tidaldecode[eval]' or leave "
            "plots out with --no-plot"
        )


def plot_needle(rows: Sequence[NeedleRow], path: Path, title: str) -> Path:
    """Heatmaps of exact match in percent, depth by length, one panel per method."""
    import numpy as np
    from matplotlib.figure import Figure

    methods = list(dict.fromkeys(row.method for row in rows))
    contexts = sorted({row.context for row in rows})
    depths = sorted({row.depth for row in rows})
    figure = Figure(figsize=(1.2 + 2.4 * len(methods), 3.6), layout="constrained")
    axes = figure.subplots(1, len(methods), sharey=True, squeeze=False)[0]
    for axis, method in zip(axes, methods, strict=True):
        share = np.full((len(depths), len(contexts)), np.nan)
        for i, depth in enumerate(depths):
            for j, context in enumerate(contexts):
                hits = [
                    row.exact
                    for row in rows
                    if (row.method, row.depth, row.context) == (method, depth, context)
                ]
                if hits:
                    share[i, j] = 100 * sum(hits) / len(hits)
        image = axis.imshow(share, cmap="RdYlGn", vmin=0, vmax=100, aspect="auto")
        for (i, j), value in np.ndenumerate(share):
            if not np.isnan(value):
                axis.text(j, i, f"{value:.0f}", ha="center", va="center", fontsize=9)
        axis.set_title(method, fontsize=10)
        axis.set_xticks(range(len(contexts)), [f"{context:,}" for context in contexts], fontsize=8)
        axis.set_xlabel("context (tokens)")
    axes[0].set_yticks(range(len(depths)), [f"{100 * depth:.0f} %" for depth in depths])
    axes[0].set_ylabel("depth of the needle")
    figure.colorbar(image, ax=list(axes), label="exact match (%)")
    figure.suptitle(title, fontsize=11)
    return write_file(path, lambda temporary: figure.savefig(temporary, dpi=130, format="png"))
