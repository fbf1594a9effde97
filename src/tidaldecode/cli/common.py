"""Options and small steps that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tidaldecode.config import TidalConfig
from tidaldecode.errors import TidalError

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

ModelOption = Annotated[
    Path | None, typer.Option("--model", help="Local model directory; default: the embedded model.")
]
DeviceOption = Annotated[str, typer.Option("--device", help="auto, cpu, cuda, cuda:1, ...")]
DtypeOption = Annotated[
    str, typer.Option("--dtype", help="auto, float32, bfloat16 or float16; auto: float32 on a CPU.")
]
BudgetOption = Annotated[
    int | None,
    typer.Option(
        "--budget", help="Tokens that sparse layers attend to; default: the model's file."
    ),
]
SelectLayersOption = Annotated[
    str | None,
    typer.Option("--select-layers", help="Layers that select tokens, such as 2,13; or auto."),
]
DraftSelectionOption = Annotated[
    str | None,
    typer.Option(
        "--draft-selection",
        help="Lossless mode: drafts select once a round, or for every token (round, token).",
    ),
]
GranularityOption = Annotated[
    str | None,
    typer.Option("--granularity", help="Tokens per layer: shared, kv_head or query_head sets."),
]
SinkTokensOption = Annotated[
    int | None, typer.Option("--sink-tokens", help="First tokens that are always attended to.")
]
RecentTokensOption = Annotated[
    int | None,
    typer.Option("--recent-tokens", help="Tokens before the newest that are always attended to."),
]
PresetOption = Annotated[
    str | None,
    typer.Option("--preset", help="A published system: paper, lessismore, streaming or quest."),
]


def load(
    directory: Path | None, device: str, dtype: str
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a model directory, or the embedded model, without the host's chatter."""
    from tidaldecode.demo import MODEL_DIRECTORY
    from tidaldecode.integrations.transformers.loading import load_model

    silence_host()
    return load_model(directory or MODEL_DIRECTORY, device=device, dtype=dtype)


def silence_host() -> None:
    """Keep transformers' own warnings and progress bars off the terminal."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def overrides(
    *,
    budget: int | None = None,
    select_layers: str | None = None,
    granularity: str | None = None,
    sink_tokens: int | None = None,
    recent_tokens: int | None = None,
    mode: str | None = None,
    draft_tokens: str | None = None,
    draft_selection: str | None = None,
    correct_every: int | None = None,
) -> dict[str, Any]:
    """The settings that were given on the command line, by the names of `TidalConfig`."""
    given = {
        "budget": budget,
        "select_layers": parse_layers(select_layers),
        "granularity": granularity,
        "sink_tokens": sink_tokens,
        "recent_tokens": recent_tokens,
        "mode": mode,
        "draft_tokens": parse_draft_tokens(draft_tokens),
        "draft_selection": draft_selection,
        "correct_every": correct_every,
    }
    return {name: value for name, value in given.items() if value is not None}


def preset(name: str | None, options: dict[str, Any]) -> tuple[TidalConfig | None, dict[str, Any]]:
    """The preset's configuration with ``options`` worked in, or None and the options themselves."""
    if name is None:
        return None, options
    return TidalConfig.preset(name, **options), {}


def parse_layers(text: str | None) -> tuple[int, ...] | str | None:
    """``"2,13"`` to ``(2, 13)``; ``"auto"`` and None stay. Errors: `TidalError`."""
    if text is None or text == "auto":
        return text
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise TidalError(
            f"select-layers: expected auto or layer numbers such as 2,13, got {text!r}"
        ) from None


def parse_draft_tokens(text: str | None) -> int | str | None:
    """``"4"`` to 4; ``"auto"`` and None stay. Errors: `TidalError`."""
    if text is None or text == "auto":
        return text
    if not text.isdecimal():
        raise TidalError(
            f"draft-tokens: expected auto or a number of tokens such as 4, got {text!r}"
        )
    return int(text)


def claim_results(directory: Path, names: list[str], overwrite: bool) -> None:
    """Make sure, before any long work, that these results can be written to ``directory``.

    Errors: `TidalError` when the folder cannot be made, or would lose results without ``overwrite``.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise TidalError(
            f"output-dir: expected a folder to write to, got {directory}: {error.strerror}"
        ) from error
    present = [name for name in names if (directory / name).exists()]
    if present and not overwrite:
        raise TidalError(
            f"output-dir: expected no earlier results in {directory}, found {', '.join(present)}; "
            "pass --overwrite or another --output-dir"
        )


def rows_progress(console: Console) -> Progress:
    """A progress bar with the count so far and the time left."""
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("elapsed"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=console,
    )
