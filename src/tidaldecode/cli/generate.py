"""``tidaldecode generate``."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tidaldecode.cli.common import (
    BudgetOption,
    DeviceOption,
    DraftSelectionOption,
    DtypeOption,
    GranularityOption,
    ModelOption,
    PresetOption,
    RecentTokensOption,
    SelectLayersOption,
    SinkTokensOption,
    load,
    overrides,
    preset,
)
from tidaldecode.errors import TidalError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from tidaldecode.algorithm.tally import Tally
    from tidaldecode.integrations.transformers.text import Generation


def generate(
    model: ModelOption = None,
    prompt: Annotated[str | None, typer.Option(help="The text to continue.")] = None,
    prompt_file: Annotated[
        Path | None, typer.Option(help="A UTF-8 text file to continue; without a prompt: stdin.")
    ] = None,
    budget: BudgetOption = None,
    select_layers: SelectLayersOption = None,
    granularity: GranularityOption = None,
    sink_tokens: SinkTokensOption = None,
    recent_tokens: RecentTokensOption = None,
    preset_name: PresetOption = None,
    mode: Annotated[
        str | None,
        typer.Option(help="sparse; or lossless: full attention's own text, from verified drafts."),
    ] = None,
    draft_tokens: Annotated[
        str | None, typer.Option(help="Tokens to draft in lossless mode: a number, or auto.")
    ] = None,
    draft_selection: DraftSelectionOption = None,
    correct_every: Annotated[
        int | None,
        typer.Option(
            help="Sparse mode: decoded tokens between two dense corrections of the cache."
        ),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens to generate.")] = 128,
    temperature: Annotated[
        float, typer.Option(min=0.0, help="0 decodes greedily; above 0 it samples.")
    ] = 0.0,
    seed: Annotated[int, typer.Option(help="Seed of the sampling.")] = 0,
    compare: Annotated[
        bool, typer.Option("--compare", help="Run full attention too; show where the texts part.")
    ] = False,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
) -> None:
    """Stream a continuation of a prompt, from any local model directory or the embedded model."""
    import torch

    from tidaldecode.integrations.transformers import enable
    from tidaldecode.integrations.transformers.text import encode_prompt, generate_tokens

    text = _read_prompt(prompt, prompt_file)
    base, options = preset(
        preset_name,
        overrides(
            budget=budget,
            select_layers=select_layers,
            granularity=granularity,
            sink_tokens=sink_tokens,
            recent_tokens=recent_tokens,
            mode=mode,
            draft_tokens=draft_tokens,
            draft_selection=draft_selection,
            correct_every=correct_every,
        ),
    )
    loaded, tokenizer = load(model, device, dtype)
    ids = encode_prompt(loaded, tokenizer, text, max_new_tokens)
    with enable(loaded, base, **options) as handle:
        config, plan = handle.config, handle.plan
    sampling: dict[str, Any] = {"do_sample": False}
    if temperature > 0:
        sampling = {"do_sample": True, "temperature": temperature}

    def run(settings: Any, echo: Callable[[list[int]], None]) -> Generation:
        torch.manual_seed(seed)
        return generate_tokens(
            loaded, ids, max_new_tokens=max_new_tokens, config=settings, on_tokens=echo, **sampling
        )

    _note(f"{len(ids):,} prompt tokens, budget {config.budget:,}, plan {plan}")
    sparse = run(config, _printer(tokenizer))
    print(flush=True)
    _note(_speed("tidal", sparse))
    if sparse.tally is not None:
        _note(_statistics(sparse.tally))
    if len(ids) + len(sparse.tokens) <= config.budget:
        _note("the whole text fits the budget, so every step was full attention")
    if compare:
        full = run(None, lambda tokens: None)
        _note(_speed("full ", full))
        _compare(tokenizer, sparse.tokens, full.tokens)


def _read_prompt(prompt: str | None, prompt_file: Path | None) -> str:
    """The prompt from the option, the file or stdin. Errors: `TidalError`."""
    if prompt is not None and prompt_file is not None:
        raise TidalError("prompt: expected one of --prompt and --prompt-file, got both")
    if prompt is not None:
        return prompt
    if prompt_file is None and sys.stdin.isatty():
        raise TidalError("prompt: expected --prompt TEXT, --prompt-file FILE or text on stdin")
    source = "stdin" if prompt_file is None else str(prompt_file)
    try:
        data = sys.stdin.buffer.read() if prompt_file is None else prompt_file.read_bytes()
    except OSError as error:
        raise TidalError(
            f"prompt-file: expected a readable text file, got {source}: {error.strerror}"
        ) from error
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise TidalError(
            f"prompt: expected UTF-8 text, got bytes in {source} that are not ({error.reason} at "
            f"byte {error.start:,})"
        ) from error


def _printer(tokenizer: PreTrainedTokenizerBase) -> Callable[[list[int]], None]:
    """A callback that prints new text as it comes, whole characters only."""
    printed = 0

    def show(tokens: list[int]) -> None:
        nonlocal printed
        text = tokenizer.decode(tokens, skip_special_tokens=True)
        if not text.endswith("\N{REPLACEMENT CHARACTER}"):
            print(text[printed:], end="", flush=True)
            printed = len(text)

    return show


def _compare(tokenizer: PreTrainedTokenizerBase, sparse: list[int], full: list[int]) -> None:
    """Say where the two texts part, and print how full attention goes on from there."""
    from tidaldecode.integrations.transformers.text import first_difference

    where = first_difference(sparse, full)
    if where is None:
        _note(f"texts: equal, all {len(full):,} tokens")
        return
    shared = sum(one == other for one, other in zip(sparse, full, strict=False))
    _note(
        f"texts: part at token {where + 1:,} of {len(full):,}; {shared:,} tokens equal in place; "
        "from there"
    )
    _note(f"  tidal: {tokenizer.decode(sparse[where:])!r}")
    _note(f"  full : {tokenizer.decode(full[where:])!r}")


def _speed(name: str, run: Generation) -> str:
    speed = run.tokens_per_second
    shown = "too few tokens to time" if speed is None else f"{speed:,.1f} tokens/s"
    return f"{name}: {len(run.tokens):,} tokens, {shown} after a prefill of {run.prefill_seconds:.2f} s"


def _statistics(tally: Tally) -> str:
    """What lossless decoding did, in one line."""
    if not tally.verified:
        return "lossless: nothing to verify, the prompt gave the only token"
    kept = "" if tally.acceptance is None else f" ({100 * tally.acceptance:.1f} %)"
    return (
        f"lossless: {tally.drafted:,} tokens drafted, {tally.accepted:,} kept{kept}, "
        f"{tally.tokens_per_verify:.2f} tokens per verification, "
        f"{100 * (tally.kv_share or 0):.1f} % of full attention's KV reads"
    )


def _note(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
