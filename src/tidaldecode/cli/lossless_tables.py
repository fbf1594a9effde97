"""The tables of ``tidaldecode bench lossless``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from rich.console import Console
from rich.table import Table

from tidaldecode.bench.imposed import RoundTime
from tidaldecode.bench.lossless import RealTime

_SHOWN = 3
"""Differences of a line that are listed; the file has all."""


def as_row(one: RealTime | RoundTime, chances: Sequence[float]) -> dict[str, Any]:
    """One result for programs, with what follows from it."""
    row = asdict(one)
    if isinstance(one, RoundTime):
        row["imposed"] = {
            str(chance): {
                "tokens_per_round": one.tokens(chance),
                "ms_per_token": one.round_ms / one.tokens(chance),
                "speedup": one.speedup(chance),
            }
            for chance in chances
        }
        return row
    return {**row, "last_speedup": one.last_speedup, "steady_speedup": one.steady_speedup}


def imposed_tables(
    results: Sequence[RoundTime], chances: Sequence[float], title: str
) -> list[Table]:
    """Measured rounds, and what follows from an imposed acceptance; the best draft length has a star."""
    measured = _table(f"Rounds of {title}: measured")
    for head in (
        "tokens", "rows", "N", "k", "full ms", "10-90 %", "draft ms", "verify ms", "round ms", "10-90 %",
    ):  # fmt: skip
        measured.add_column(head, justify="right", no_wrap=True)
    for one in results:
        measured.add_row(
            f"{one.context:,}", str(one.batch), str(one.budget), str(one.draft_tokens),
            f"{one.full_ms:.2f}", f"{one.low_full_ms:.2f}-{one.high_full_ms:.2f}",
            f"{one.draft_ms:.2f}", f"{one.verify_ms:.2f}", f"{one.round_ms:.2f}",
            f"{one.low_round_ms:.2f}-{one.high_round_ms:.2f}",
        )  # fmt: skip
    follows = _table(
        "Acceptance IMPOSED, not measured; ms and speed-up follow from it",
        "*: the best k of its acceptance; tokens: a round and row",
    )
    for head in ("tokens", "rows", "N", "acceptance", "k", "tokens/round", "ms/token", "speed-up"):
        follows.add_column(head, justify="right", no_wrap=True)
    for size in dict.fromkeys((one.context, one.batch, one.budget) for one in results):
        mine = [one for one in results if (one.context, one.batch, one.budget) == size]
        for chance in chances:
            best = max(one.speedup(chance) for one in mine)
            for one in mine:
                star = " *" if one.speedup(chance) == best else "  "
                follows.add_row(
                    f"{size[0]:,}", str(size[1]), str(size[2]), f"{chance:.2f}",
                    str(one.draft_tokens), f"{one.tokens(chance):.2f}",
                    f"{one.round_ms / one.tokens(chance):.2f}", f"{one.speedup(chance):.2f}x{star}",
                )  # fmt: skip
    return [measured, follows]


def real_table(results: Sequence[RealTime], title: str) -> Table:
    """All ways to draft, each against the dense step timed beside it."""
    table = _table(
        f"Lossless decoding of {title}, real acceptance",
        "ms: a token of every row, full attention's and lossless while all rows run (steady),\n"
        "and until the last row is done (last); x: full attention's time by ours",
    )
    for head in (
        "tokens", "rows", "N", "k", "kept\n%", "tokens/\nverify", "full\nms", "steady\nms", "steady\nx",
        "last\nms", "last\nx", "same\ntext",
    ):  # fmt: skip
        table.add_column(head, justify="right", no_wrap=True)
    for one in results:
        kept = "-" if one.acceptance is None else f"{100 * one.acceptance:.1f}"
        table.add_row(
            f"{one.context:,}", str(one.batch), str(one.budget), str(one.draft_tokens), kept,
            f"{one.tokens_per_verify:.2f}", f"{one.full_ms:.3f}",
            f"{one.steady_ms:.3f}", f"{one.steady_speedup:.2f}",
            f"{one.last_ms:.3f}", f"{one.last_speedup:.2f}",
            "-" if one.equal is None else f"{one.equal}/{one.batch}",
        )  # fmt: skip
    return table


def list_differences(console: Console, results: Sequence[RealTime]) -> None:
    """Where texts part, and how close the choice was."""
    for one in results:
        for place in one.differences[:_SHOWN]:
            console.print(
                f"budget {one.budget}, k {one.draft_tokens}: row {place['row']} parts at token "
                f"{place['token']}, where full attention prefers its own by {place['gap']:.1e}"
            )


def _table(title: str, caption: str | None = None) -> Table:
    """A narrow table: its lines fit 80 columns."""
    return Table(title=title, caption=caption, box=None, padding=(0, 1, 0, 0))
