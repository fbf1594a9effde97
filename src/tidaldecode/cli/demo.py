"""``tidaldecode demo``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from tidaldecode.cli.common import DeviceOption, DtypeOption, claim_results, load, rows_progress

DEFAULT_BUDGETS = (32, 64, 128)


def demo(
    context: Annotated[int, typer.Option(help="Longest context in tokens, up to 16384.")] = 8192,
    budget: Annotated[
        list[int] | None,
        typer.Option(help="Tokens that sparse layers attend to; repeat it for several."),
    ] = None,
    samples: Annotated[int, typer.Option(min=1, help="Questions per context and depth.")] = 1,
    distractors: Annotated[int, typer.Option(min=0, help="Other needles in each context.")] = 8,
    seed: Annotated[int, typer.Option(help="Seed of haystacks and needles.")] = 0,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    output_dir: Annotated[
        Path, typer.Option(help="Where demo.json and needle.png are written.")
    ] = Path("demo-results"),
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace results that are there already.")
    ] = False,
    plot: Annotated[bool, typer.Option(help="Draw the heatmap (needs matplotlib).")] = True,
) -> None:
    """Find needles in this Python's own source: full attention, TidalDecode, recent tokens alone."""
    from tidaldecode.demo import MODEL_DIRECTORY
    from tidaldecode.demo.report import HEATMAP_FILE, RESULT_FILE, save_results, show_table
    from tidaldecode.demo.run import Demo
    from tidaldecode.figure import require_matplotlib

    if plot:
        require_matplotlib()
    claim_results(output_dir, [RESULT_FILE, HEATMAP_FILE] if plot else [RESULT_FILE], overwrite)
    console = Console()
    model, tokenizer = load(MODEL_DIRECTORY, device, dtype)
    study = Demo.prepare(
        model,
        tokenizer,
        context=context,
        budgets=sorted(set(budget or DEFAULT_BUDGETS)),
        samples=samples,
        distractors=distractors,
        seed=seed,
    )
    with rows_progress(console) as progress:
        task = progress.add_task("answers", total=study.questions * len(study.methods))
        rows = study.run(lambda count: progress.update(task, advance=count))
    summaries = study.summarise(rows)
    show_table(console, study, summaries)
    for path in save_results(output_dir, study, rows, summaries, plot=plot):
        console.print(f"wrote {path}", soft_wrap=True)
