"""How evaluations show their results: a table for people, plots, and the summary for programs."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from tidaldecode.eval.agreement import summarise_agreement
from tidaldecode.eval.methods import DENSE, Method
from tidaldecode.eval.needle_task import summarise_needle
from tidaldecode.eval.perplexity import summarise_perplexity
from tidaldecode.eval.plots import plot_budget, plot_needle, plot_positions
from tidaldecode.eval.store import Row


@dataclass(frozen=True)
class MethodCost:
    """What a method reads in one decode step at the longest context."""

    plan: str
    attended_tokens: int
    kv_bytes: int
    full_bytes: int


@dataclass
class Report:
    """Rows of a finished run and where to show them."""

    rows: list[Row]
    record: dict[str, Any]
    methods: Sequence[Method]
    costs: dict[str, MethodCost]
    context: int
    """The context in tokens at which ``costs`` hold."""
    folder: Path | None
    """Where plots go; None: no plots."""
    console: Console
    written: list[Path] = field(default_factory=list)
    """Plots that were written."""

    def table(self, title: str, headers: Sequence[str], lines: Sequence[Sequence[str]]) -> None:
        """Print a table whose first column is the method, and the cost of each."""
        table = Table(title=title, box=SIMPLE_HEAD, padding=0)
        for index, header in enumerate(
            ["method", *headers, "attended\n(tokens)", "KV read\n(MB/step)"]
        ):
            table.add_column(header, justify="right" if index else "left", no_wrap=not index)
        for name, *cells in lines:
            cost = self.costs[name]
            table.add_row(name, *cells, f"{cost.attended_tokens:,}", f"{cost.kv_bytes / 1e6:.2f}")
        self.console.print(table)

    def with_cost(self, line: dict[str, Any]) -> dict[str, Any]:
        """A line of the summary with plan, attended tokens and bytes added."""
        return {**line, **vars(self.costs[line["method"]])}

    def by_budget(
        self, lines: Sequence[dict[str, Any]], key: str, factor: float = 1.0
    ) -> dict[str, list[tuple[int, float, float | None, float | None]]]:
        """Points of quality against budget for every method, budgets taken off its name."""
        series: dict[str, list[tuple[int, float, float | None, float | None]]] = {}
        for line in lines:
            config = next(m.config for m in self.methods if m.name == line["method"])
            if config is None:
                continue
            name = line["method"].rpartition(" ")[0]
            value = line[key]
            ends = [None if v is None else factor * v for v in (value["low"], value["high"])]
            series.setdefault(name, []).append((config.budget, factor * value["mean"], *ends))
        return series


def report_needle(report: Report) -> list[dict[str, Any]]:
    """Table, heatmaps and quality against budget of a needle run; returns the summary."""
    lines = summarise_needle(report.rows, report.methods)
    for kind in dict.fromkeys(line["kind"] for line in lines):
        mine = [line for line in lines if line["kind"] == kind]
        contexts = sorted({line["context"] for line in mine})
        cells = {(line["method"], line["context"]): line for line in mine}
        report.table(
            f"Needles, {kind}: exact match in % (95 % interval)",
            [*(f"{context:,}\ntokens" for context in contexts), "tokens\nright (%)", "step\n(ms)"],
            [
                (
                    method.name,
                    *(_percent(cells[method.name, context]["exact"]) for context in contexts),
                    f"{100 * cells[method.name, contexts[-1]]['token_accuracy']['mean']:.1f}",
                    f"{cells[method.name, contexts[-1]]['step_ms']:.1f}",
                )
                for method in report.methods
            ],
        )
        if report.folder is not None:
            rows = [row for row in report.rows if row["kind"] == kind]
            title = f"Needles, {kind}"
            report.written.append(
                plot_needle(rows, report.folder / f"needle-{kind}.png", title, report.record)
            )
            for method in report.methods:
                path = report.folder / f"needle-{kind}-{_slug(method.name)}.png"
                own = [row for row in rows if row["method"] == method.name]
                report.written.append(plot_needle(own, path, title, report.record))
            longest = [line for line in mine if line["context"] == contexts[-1]]
            full = [100 * line["exact"]["mean"] for line in longest if line["method"] == DENSE]
            _budget_plot(report, longest, "exact", 100, f"{title} at {contexts[-1]:,} tokens",
                         "exact match (%)", f"needle-{kind}-budget.png", full)  # fmt: skip
    return [report.with_cost(line) for line in lines]


def report_perplexity(report: Report) -> list[dict[str, Any]]:
    """Table, drift and quality against budget of a perplexity run; returns the summary."""
    lines = summarise_perplexity(report.rows, report.methods)
    report.table(
        f"Loss of text decoded after {report.context:,} tokens",
        [
            "nats/token\n(95 % interval)",
            "perplexity",
            "more than full\n(%)",
            "step (ms)\nmedian, mean",
        ],
        [
            (
                line["method"],
                _interval(line["nll"], 4),
                f"{line['perplexity']:.2f}",
                _interval(line["extra_percent"], 2) if "extra_percent" in line else "-",
                f"{line['step_ms']:.1f}, {line['mean_ms']:.1f}",
            )
            for line in lines
        ],
    )
    compared = [line for line in lines if "extra_percent" in line and line["method"] != DENSE]
    if report.folder is not None:
        full = [line["nll"]["mean"] for line in lines if line["method"] == DENSE]
        _budget_plot(report, lines, "nll", 1, f"Text decoded after {report.context:,} tokens",
                     "loss (nats/token)", "perplexity-budget.png", full)  # fmt: skip
        if compared:
            tokens = len(report.rows[0]["nll"])
            report.written.append(
                plot_positions(
                    {line["method"]: line["drift_nats"] for line in compared},
                    report.folder / "perplexity-drift.png",
                    "Extra loss along the decoded text",
                    "loss above full attention (nats/token)",
                    report.record,
                    tokens / len(compared[0]["drift_nats"]),
                )
            )
    return [report.with_cost(line) for line in lines]


def report_agreement(report: Report) -> list[dict[str, Any]]:
    """Table and plots by position of an agreement run; returns the summary."""
    lines = summarise_agreement(report.rows, report.methods)
    report.table(
        f"Agreement with full attention after {report.context:,} tokens",
        ["greedy tokens equal\n(%, 95 % interval)", "KL of the logits\n(nats/token)"],
        [
            (line["method"], _percent(line["equal"]), _interval(line["kl_nats"], 4))
            for line in lines
        ],
    )
    shown = [line for line in lines if line["method"] != DENSE]
    if report.folder is not None and shown:
        for key, label, name in (
            ("equal_by_position", "greedy tokens equal (share)", "agreement-equal.png"),
            ("kl_by_position", "KL of the logits (nats)", "agreement-kl.png"),
        ):
            report.written.append(
                plot_positions(
                    {line["method"]: line[key] for line in shown},
                    report.folder / name,
                    f"Agreement with full attention after {report.context:,} tokens",
                    label,
                    report.record,
                )
            )
    return [report.with_cost(line) for line in lines]


def _budget_plot(
    report: Report,
    lines: Sequence[dict[str, Any]],
    key: str,
    factor: float,
    title: str,
    quality: str,
    name: str,
    full: Sequence[float],
) -> None:
    series = report.by_budget(lines, key, factor)
    if report.folder is not None and any(len(points) > 1 for points in series.values()):
        level = full[0] if full else None
        path = report.folder / name
        report.written.append(plot_budget(series, path, title, quality, report.record, level))


def _percent(value: dict[str, Any]) -> str:
    shown = f"{100 * value['mean']:.1f}"
    if value["low"] is None:
        return shown
    return f"{shown} ({100 * max(0.0, value['low']):.0f}-{100 * min(1.0, value['high']):.0f})"


def _interval(value: dict[str, Any], digits: int) -> str:
    shown = f"{value['mean']:.{digits}f}"
    if value["low"] is None:
        return shown
    return f"{shown} ({value['low']:.{digits}f} to {value['high']:.{digits}f})"


def _slug(name: str) -> str:
    """A method's name as part of a file name."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
