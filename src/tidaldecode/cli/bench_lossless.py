"""``tidaldecode bench lossless``: real text of a trained model, or rounds of a shape by themselves."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from tidaldecode.cli.common import (
    DeviceOption,
    DraftSelectionOption,
    ModelOption,
    SelectLayersOption,
    load,
    overrides,
    parse_draft_tokens,
    rows_progress,
)
from tidaldecode.errors import TidalError

if TYPE_CHECKING:
    from tidaldecode.bench.imposed import RoundTime
    from tidaldecode.bench.lossless import RealTime
    from tidaldecode.config import TidalConfig


def lossless(
    model: ModelOption = None,
    shape: Annotated[
        str | None,
        typer.Option(help="Random weights in this shape, with an imposed acceptance, instead."),
    ] = None,
    context: Annotated[
        list[int] | None, typer.Option("--context", help="Cached tokens; repeat it for several.")
    ] = None,
    batch: Annotated[
        list[int] | None, typer.Option("--batch", help="Rows decoded together; repeat it.")
    ] = None,
    budget: Annotated[
        list[int] | None,
        typer.Option("--budget", help="Tokens that sparse layers attend to; repeat it."),
    ] = None,
    draft_tokens: Annotated[
        list[str] | None,
        typer.Option(help="Tokens drafted between verifications, or auto; repeat it."),
    ] = None,
    accept: Annotated[
        list[float] | None,
        typer.Option(min=0.0, max=1.0, help="Imposed chance that a draft is kept; repeat it."),
    ] = None,
    draft_selection: DraftSelectionOption = None,
    select_layers: SelectLayersOption = None,
    new_tokens: Annotated[int, typer.Option(min=2, help="Tokens to decode of each row.")] = 128,
    temperature: Annotated[
        float,
        typer.Option(min=0.0, help="Sample at this temperature, on both sides; 0: greedy texts."),
    ] = 0.0,
    repetitions: Annotated[
        int, typer.Option(min=1, help="Timed texts; rounds of a shape: 4 times as many.")
    ] = 5,
    compiled: Annotated[
        bool, typer.Option("--compile", help="Fuse small operations first (torch.compile).")
    ] = False,
    seed: Annotated[int, typer.Option(help="Seed of the prompts.")] = 0,
    device: DeviceOption = "auto",
    dtype: Annotated[str, typer.Option(help="bfloat16, float16 or float32.")] = "bfloat16",
    json_file: Annotated[Path | None, typer.Option("--json", help="A copy for programs.")] = None,
) -> None:
    """Time lossless decoding against our own dense step, in one run."""
    from tidaldecode.cli.lossless_tables import as_row, imposed_tables, list_differences, real_table
    from tidaldecode.config import TidalConfig
    from tidaldecode.record import run_record, write_json

    _check(model, shape, accept, draft_tokens, temperature)
    lengths = [parse_draft_tokens(text) for text in draft_tokens or ["2", "4", "8"]]
    sizes = [
        (tokens, rows)
        for tokens in sorted(set(context or [4096 if shape is None else 102400]))
        for rows in sorted(set(batch or [1]))
    ]
    budgets = sorted(set(budget or [64 if shape is None else 512]))
    configs = [
        TidalConfig(
            **overrides(
                budget=tokens,
                select_layers=select_layers,
                mode="lossless",
                draft_selection=draft_selection,
            ),
            cuda_graph="compiled" if compiled else "auto",
        )
        for tokens in budgets
    ]
    chances = sorted(set(accept or [0.90, 0.95, 0.98]))
    record = run_record(
        task="bench lossless", model=str(shape or model or "embedded"), dtype=dtype, seed=seed,
        repetitions=repetitions, temperature=temperature, configs=[one.to_dict() for one in configs],
    )  # fmt: skip
    console = Console()
    found: Iterator[RealTime | RoundTime]
    if shape is not None:
        found = _imposed(shape, device, dtype, configs, lengths, sizes, 4 * repetitions)
    else:
        found = _real(
            model,
            device,
            dtype,
            configs,
            lengths,
            sizes,
            new_tokens,
            repetitions,
            seed,
            temperature,
        )
    results: list[Any] = []
    with rows_progress(console) as progress:
        bar = progress.add_task("drafts", total=len(sizes) * len(configs) * len(lengths))
        for one in found:
            results.append(one)
            if json_file is not None:
                rows = [as_row(each, chances) for each in results]
                write_json(json_file, {"record": record, "results": rows})
            progress.advance(bar)
    if shape is not None:
        for table in imposed_tables(results, chances, f"{shape} ({dtype})"):
            console.print(table)
    else:
        ways = f"{dtype}, sampled at {temperature:g}" if temperature else dtype
        console.print(real_table(results, f"{model or 'the embedded model'} ({ways})"))
        list_differences(console, results)
    if json_file is not None:
        console.print(f"wrote {json_file}", soft_wrap=True)


def _check(
    model: Path | None,
    shape: str | None,
    accept: list[float] | None,
    draft_tokens: list[str] | None,
    temperature: float,
) -> None:
    """Errors: `TidalError` for options that do not go together."""
    if shape is not None and model is not None:
        raise TidalError(f"shape: expected --shape or --model, got both ({shape} and {model})")
    if shape is None and accept:
        raise TidalError(
            f"accept: expected --shape beside it, got --accept {accept[0]} for a trained model, whose "
            "acceptance is measured"
        )
    if shape is not None and temperature:
        raise TidalError(
            "temperature: expected a trained model where texts are sampled, got --shape, whose rounds "
            "have no text"
        )
    if shape is not None and draft_tokens and "auto" in draft_tokens:
        raise TidalError("draft-tokens: expected numbers where the acceptance is imposed, got auto")


def _real(
    model: Path | None,
    device: str,
    dtype: str,
    configs: Sequence[TidalConfig],
    lengths: Sequence[Any],
    sizes: Sequence[tuple[int, int]],
    new_tokens: int,
    repetitions: int,
    seed: int,
    temperature: float,
) -> Iterator[RealTime]:
    """Texts of a trained model; prompts are windows of the standard library's source."""
    import torch

    from tidaldecode.bench.decode import check_contexts
    from tidaldecode.bench.lossless import time_texts
    from tidaldecode.eval.haystack import source_text

    loaded, tokenizer = load(model, device, dtype)
    check_contexts([tokens + new_tokens for tokens, _ in sizes], loaded)
    text = source_text(None, 8 * max(tokens for tokens, _ in sizes) + 1_000_000, seed)
    ids = tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids[0]
    drafts = [one.replace(draft_tokens=length) for one in configs for length in lengths]
    for tokens, rows in sizes:
        generator = torch.Generator().manual_seed(seed)
        begins = torch.randint(len(ids) - tokens, (rows,), generator=generator)
        prompts = torch.stack([ids[at : at + tokens] for at in begins.tolist()])
        yield from time_texts(
            loaded,
            prompts.to(loaded.device),
            drafts,
            new_tokens=new_tokens,
            repetitions=repetitions,
            temperature=temperature,
        )


def _imposed(
    shape: str,
    device: str,
    dtype: str,
    configs: Sequence[TidalConfig],
    lengths: Sequence[Any],
    sizes: Sequence[tuple[int, int]],
    rounds: int,
) -> Iterator[RoundTime]:
    """Rounds of a shape."""
    from tidaldecode.bench.decode import check_contexts, random_model
    from tidaldecode.bench.imposed import time_rounds
    from tidaldecode.bench.shapes import shape_config
    from tidaldecode.cli.bench import precision
    from tidaldecode.integrations.transformers.loading import resolve_device

    loaded = random_model(shape_config(shape), resolve_device(device), precision(dtype))
    check_contexts([tokens for tokens, _ in sizes], loaded)
    for config in configs:
        yield from time_rounds(loaded, config, lengths, sizes=sizes, rounds=rounds)
