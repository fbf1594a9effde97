"""How the demo shows its results: a table for people, a heatmap, one JSON file for programs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from tidaldecode.demo.run import Demo, MethodSummary
from tidaldecode.eval.plots import plot_needle
from tidaldecode.eval.store import Row
from tidaldecode.record import run_record, write_json

RESULT_FILE = "demo.json"
HEATMAP_FILE = "needle.png"


def show_table(console: Console, demo: Demo, summaries: Sequence[MethodSummary]) -> None:
    """Print the table and the plan."""
    longest = max(demo.grid.contexts)
    table = Table(
        title="Needles found in this Python's own standard library", box=SIMPLE_HEAD, padding=0
    )
    for header in ("method", "exact match", "attended\n(tokens)", "KV read\n(MB/step)"):
        table.add_column(header, justify="left" if header == "method" else "right", no_wrap=True)
    table.add_column("full reads\n(times)", justify="right", no_wrap=True)
    table.add_column("time\n(ms/token)", justify="right", no_wrap=True)
    for line in summaries:
        table.add_row(
            line.method,
            f"{100 * line.exact / line.questions:.0f} % ({line.exact}/{line.questions})",
            f"{line.attended_tokens:,}",
            f"{line.kv_bytes / 1e6:.2f}",
            f"{line.kv_ratio:.1f}x",
            f"{line.step_ms:.1f}",
        )
    console.print(table)
    lengths = ", ".join(f"{context:,}" for context in demo.grid.contexts)
    console.print(
        f"contexts {lengths} tokens x {len(demo.grid.depths)} depths, "
        f"{demo.grid.distractors} distractor needles; KV and time at {longest:,} tokens"
    )
    console.print(f"plan  {demo.plan}  ({demo.plan_reason})", soft_wrap=True)
    console.print(
        "      D dense, S dense and selects tokens, . attends to the selected tokens only"
    )


def save_results(
    directory: Path,
    demo: Demo,
    rows: Sequence[Row],
    summaries: Sequence[MethodSummary],
    *,
    plot: bool,
) -> list[Path]:
    """Write the JSON file and, with ``plot``, the heatmap; return their paths."""
    record = run_record(
        task="needle in the standard library",
        seed=demo.grid.seed,
        questions_per_method=demo.questions,
        distractors=demo.grid.distractors,
        plan=str(demo.plan),
        methods={
            method.name: method.config.to_dict() if method.config else None
            for method in demo.methods
        },
    )
    result = {
        "record": record,
        "summary": [line.to_dict() for line in summaries],
        "rows": list(rows),
    }
    paths = [write_json(directory / RESULT_FILE, result)]
    if plot:
        title = f"Needles in the standard library's source, {demo.grid.distractors} distractors"
        paths.append(plot_needle(rows, directory / HEATMAP_FILE, title, record))
    return paths
