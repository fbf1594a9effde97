"""``tidaldecode prove``: does lossless decoding give full attention's tokens on this model?"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from tidaldecode.cli.common import DeviceOption, DtypeOption, ModelOption, load, rows_progress
from tidaldecode.errors import TidalError


def prove(
    model: ModelOption = None,
    prompts: Annotated[int, typer.Option(min=1, help="Prompts: needles and code in turn.")] = 8,
    shortest: Annotated[int, typer.Option(min=1, help="Tokens of the shortest prompt.")] = 500,
    longest: Annotated[int, typer.Option(min=1, help="Tokens of the longest prompt.")] = 2000,
    new_tokens: Annotated[int, typer.Option(min=1, help="Tokens to decode.")] = 64,
    draft: Annotated[
        list[str] | None,
        typer.Option(
            help="TOKENS:BUDGET, such as 4:64 or auto:256, with :random for random drafts; repeat it."
        ),
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Prompts decoded together.")] = 4,
    seed: Annotated[int, typer.Option(help="Seed of the prompts.")] = 0,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "float32",
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write it here.")] = None,
) -> None:
    """Compare greedy lossless decoding with full attention, token for token."""
    from rich.console import Console

    from tidaldecode.eval.haystack import source_text
    from tidaldecode.eval.needle import Haystack
    from tidaldecode.integrations.transformers import enable
    from tidaldecode.proof.equality import compare_batch, summarise
    from tidaldecode.proof.prompts import PromptSet
    from tidaldecode.record import run_record, write_json

    drafts = [parse_draft(text) for text in draft or ["2:32", "4:64", "8:64", "4:20:random"]]
    console = Console()
    loaded, tokenizer = load(model, device, dtype)
    with enable(loaded) as handle:
        config = handle.config

    def encode(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False).input_ids)

    text = source_text(None, longest * 64, seed)
    chosen = PromptSet(prompts, shortest, longest, seed)
    ids = chosen.build(Haystack.from_text(text, encode, tokenizer.decode), encode)
    rows: list[dict[str, Any]] = []
    with rows_progress(console) as progress:
        bar = progress.add_task("batches x drafts", total=-(-len(ids) // batch_size) * len(drafts))
        for first in range(0, len(ids), batch_size):
            batch = ids[first : first + batch_size]
            for row in compare_batch(loaded, batch, drafts, config, new_tokens=new_tokens):
                rows.append(row)
                progress.advance(bar)
    lines = summarise(rows)
    _show(console, lines, new_tokens)
    if json_file is not None:
        record = run_record(
            prompts=vars(chosen), new_tokens=new_tokens, batch_size=batch_size, dtype=dtype,
            config=config.to_dict(), n=prompts,
        )  # fmt: skip
        write_json(json_file, {"record": record, "summary": lines})
        console.print(f"wrote {json_file}", soft_wrap=True)
    if any(line["equal"] < line["prompts"] for line in lines):
        raise typer.Exit(1)


def parse_draft(text: str) -> Any:
    """``4:64``, ``auto:64`` or ``4:64:random``. Errors: `TidalError`."""
    from tidaldecode.proof.equality import Draft

    tokens, _, rest = text.partition(":")
    budget, _, kind = rest.partition(":")
    known = tokens == "auto" or tokens.isdecimal()
    if not known or not budget.isdecimal() or kind not in ("", "random"):
        raise TidalError(
            f"draft: expected TOKENS:BUDGET such as 4:64, auto:64 or 4:64:random, got {text!r}"
        )
    return Draft(
        int(tokens) if tokens.isdecimal() else tokens, int(budget), random=kind == "random"
    )


def _show(console: Any, lines: list[dict[str, Any]], new_tokens: int) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table(
        title=f"Lossless against full attention, {new_tokens} greedy tokens", box=SIMPLE_HEAD
    )
    names = ["draft", "equal", "drafts kept\n(%)", "tokens per\nverify", "KV read\n(% of full)"]
    for index, name in enumerate([*names, "time\n(s)", "full\n(s)"]):
        table.add_column(name, justify="right" if index else "left", no_wrap=not index)
    for line in lines:
        shares = [line["acceptance"], line["kv_share"]]
        kept, read = ("-" if share is None else f"{100 * share:.1f}" for share in shares)
        table.add_row(
            line["draft"],
            f"{line['equal']}/{line['prompts']}",
            kept,
            f"{line['tokens_per_verify'] or 0:.2f}",
            read,
            f"{line['seconds']:.1f}",
            f"{line['dense_seconds']:.1f}",
        )
    console.print(table)
    for line in lines:
        for one in line["differences"]:
            console.print(
                f"{line['draft']}: parts at token {one['token']}, where full attention's two best "
                f"logits differ by {one['gap']:.2e}"
            )
