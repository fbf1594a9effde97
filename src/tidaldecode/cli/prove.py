"""``tidaldecode prove``: does lossless decoding give full attention's tokens on this model?"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Annotated, Any

import typer

from tidaldecode.cli.common import DeviceOption, DtypeOption, ModelOption, load, rows_progress
from tidaldecode.errors import TidalError

_SHOWN = 5
"""Differences of a draft that are listed; the file has all."""


def prove(
    model: ModelOption = None,
    prompts: Annotated[int, typer.Option(min=1, help="Prompts: needles and code in turn.")] = 8,
    shortest: Annotated[int, typer.Option(min=1, help="Tokens of the shortest prompt.")] = 500,
    longest: Annotated[int, typer.Option(min=1, help="Tokens of the longest prompt.")] = 2000,
    new_tokens: Annotated[int, typer.Option(min=1, help="Tokens to decode.")] = 64,
    draft: Annotated[
        list[str] | None,
        typer.Option(
            help="TOKENS:BUDGET, such as 4:64 or auto:256; with :token drafts select for every token, "
            "with :random they are random; repeat it."
        ),
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Prompts decoded together.")] = 4,
    seed: Annotated[int, typer.Option(help="Seed of the prompts.")] = 0,
    first: Annotated[int, typer.Option(min=0, help="Number of the first prompt.")] = 0,
    captured: Annotated[
        bool | None,
        typer.Option(
            help="Prove the captured steps, against our own dense step; default: on a GPU.",
            show_default=False,
        ),
    ] = None,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "float32",
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Also write it here, after every batch.")
    ] = None,
    resume: Annotated[bool, typer.Option(help="Go on from what the file holds.")] = False,
) -> None:
    """Compare greedy lossless decoding with full attention, token for token."""
    from rich.console import Console

    from tidaldecode.eval.haystack import source_text
    from tidaldecode.eval.needle import Haystack
    from tidaldecode.integrations.transformers import enable
    from tidaldecode.proof.captured import compare_captured
    from tidaldecode.proof.equality import compare_batch, summarise
    from tidaldecode.proof.progress import Progress
    from tidaldecode.proof.prompts import PromptSet
    from tidaldecode.record import run_record

    drafts = [parse_draft(text) for text in draft or ["2:32", "4:64", "8:64", "4:20:random"]]
    console = Console()
    loaded, tokenizer = load(model, device, dtype)
    captured = loaded.device.type == "cuda" if captured is None else captured
    with enable(loaded) as handle:
        config = handle.config

    def encode(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False).input_ids)

    text = source_text(None, longest * 64, seed)
    chosen = PromptSet(prompts, shortest, longest, seed, first)
    settings = {
        "prompts": vars(chosen), "drafts": [one.name for one in drafts], "captured": captured,
        "new_tokens": new_tokens, "batch_size": batch_size, "dtype": dtype,
        "config": config.to_dict(),
    }  # fmt: skip
    done = Progress(json_file, run_record(task="prove", n=prompts, **settings), settings)
    if resume:
        done.resume()
    ids = chosen.build(Haystack.from_text(text, encode, tokenizer.decode), encode)
    batches = [ids[at : at + batch_size] for at in range(0, len(ids), batch_size)][done.batches :]
    with rows_progress(console) as progress:
        bar = progress.add_task("batches", total=len(batches))
        if captured and batches:
            found = compare_captured(loaded, batches, drafts, config, new_tokens=new_tokens)
        else:
            compare = functools.partial(
                compare_batch, loaded, drafts=drafts, config=config, new_tokens=new_tokens
            )
            found = (list(compare(batch)) for batch in batches)
        for rows in found:
            done.add(rows)
            progress.advance(bar)
    lines = summarise(done.rows)
    _show(console, lines, new_tokens)
    if json_file is not None:
        console.print(f"wrote {json_file}", soft_wrap=True)
    # Where full attention parts from itself, ties do, and a draft may.
    exact = loaded.dtype.itemsize == 4 or not captured
    if exact and any(line["equal"] < line["prompts"] for line in lines):
        raise typer.Exit(1)


def parse_draft(text: str) -> Any:
    """``4:64``, ``auto:64``, ``4:64:token`` or ``4:64:random``. Errors: `TidalError`."""
    from tidaldecode.proof.equality import Draft

    tokens, _, rest = text.partition(":")
    budget, _, kind = rest.partition(":")
    known = tokens == "auto" or tokens.isdecimal()
    if not known or not budget.isdecimal() or kind not in ("", "random", "token"):
        raise TidalError(
            "draft: expected TOKENS:BUDGET such as 4:64, auto:64, 4:64:token or 4:64:random, got "
            f"{text!r}"
        )
    return Draft(
        int(tokens) if tokens.isdecimal() else tokens,
        int(budget),
        random=kind == "random",
        selection="token" if kind == "token" else "round",
    )


def _show(console: Any, lines: list[dict[str, Any]], new_tokens: int) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table(
        title=f"Lossless against full attention, {new_tokens} greedy tokens", box=SIMPLE_HEAD
    )
    names = ["draft", "equal", "gap where they part\n(median, largest)", "drafts kept\n(%)"]
    names += ["tokens per\nverify", "KV read\n(% of full)", "time\n(s)", "full\n(s)"]
    for index, name in enumerate(names):
        table.add_column(name, justify="right" if index else "left", no_wrap=not index)
    for line in lines:
        shares = [line["acceptance"], line["kv_share"]]
        kept, read = ("-" if share is None else f"{100 * share:.1f}" for share in shares)
        table.add_row(
            line["draft"],
            f"{line['equal']}/{line['prompts']}",
            ", ".join(f"{gap:.1e}" for gap in line["gaps"] or ()) or "-",
            kept,
            f"{line['tokens_per_verify'] or 0:.2f}",
            read,
            f"{line['seconds']:.1f}",
            f"{line['dense_seconds']:.1f}",
        )
    console.print(table)
    for line in lines:
        for one in line["differences"][:_SHOWN]:
            gap = "has ended" if one["gap"] is None else f"prefers its token by {one['gap']:.2e}"
            console.print(
                f"{line['draft']}: parts at token {one['token']}, where full attention {gap}"
            )
        if (more := len(line["differences"]) - _SHOWN) > 0:
            console.print(f"{line['draft']}: {more} more")
