"""``tidaldecode calibrate``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from tidaldecode.calibrate import MOST_LAYERS
from tidaldecode.cli.common import (
    DeviceOption,
    DtypeOption,
    GranularityOption,
    ModelOption,
    claim_results,
    load,
    overrides,
    rows_progress,
)
from tidaldecode.errors import TidalError


def calibrate(
    model: ModelOption = None,
    budget: Annotated[
        int | None,
        typer.Option(help="Tokens that sparse layers attend to; default: 1/64 of the context."),
    ] = None,
    count: Annotated[
        int | None,
        typer.Option(
            min=1,
            max=MOST_LAYERS,
            help=f"Selection layers; default: as few as suffice, up to {MOST_LAYERS}.",
        ),
    ] = None,
    context: Annotated[int, typer.Option(help="Tokens of every prompt.")] = 8192,
    needles: Annotated[int, typer.Option(min=0, help="Prompts that ask for a needle.")] = 8,
    passages: Annotated[int, typer.Option(min=0, help="Prompts of plain text.")] = 4,
    text: Annotated[
        Path | None,
        typer.Option(help="A UTF-8 text file; default: this Python's standard library."),
    ] = None,
    granularity: GranularityOption = None,
    seed: Annotated[int, typer.Option(help="Seed of the prompts.")] = 100,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    output: Annotated[
        Path | None,
        typer.Option(help="Folder for tidal_config.json and calibration.*; default: the model's."),
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace a calibration that is there already.")
    ] = False,
    plot: Annotated[bool, typer.Option(help="Draw the heatmap (needs matplotlib).")] = True,
) -> None:
    """Find the layers that should select tokens, and write them beside the model."""
    from tidaldecode.calibrate.report import FIGURES_FILE, HEATMAP_FILE, show, write
    from tidaldecode.calibrate.run import Request, calibrate_model, most_passes
    from tidaldecode.config import CONFIG_FILE, TidalConfig
    from tidaldecode.figure import require_matplotlib

    if plot:
        require_matplotlib()
    folder = output or model
    if folder is None:
        raise TidalError(
            "output: expected a folder for the embedded model's calibration, got none; pass --output "
            "DIR (or --model DIR for your own model)"
        )
    names = [CONFIG_FILE, FIGURES_FILE, *([HEATMAP_FILE] if plot else [])]
    claim_results(folder, names, overwrite)
    size = budget or max(32, context // 64)
    settings = TidalConfig(budget=size, **overrides(granularity=granularity))
    request = Request(
        budget=settings.budget,
        count=count,
        context=context,
        needles=needles,
        passages=passages,
        granularity=settings.granularity,
        seed=seed,
        text=str(text) if text else None,
    )
    console = Console()
    loaded, tokenizer = load(model, device, dtype)
    with rows_progress(console) as progress:
        bar = progress.add_task("decode passes", total=most_passes(loaded, count))
        found = calibrate_model(
            loaded, tokenizer, request, lambda passes: progress.update(bar, completed=passes)
        )
        progress.update(bar, total=found.passes, completed=found.passes)
    show(console, found)
    for path in write(found, folder, plot=plot):
        console.print(f"wrote {path}", soft_wrap=True)
