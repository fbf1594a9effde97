"""``tidaldecode eval needle | perplexity | agreement``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tidaldecode.cli.common import DeviceOption, DtypeOption, ModelOption

app = typer.Typer(
    help="Compare ways of decoding with full attention, on your own model and text, offline.",
    no_args_is_help=True,
)

MethodOption = Annotated[
    list[str] | None,
    typer.Option(
        "--method",
        help="dense, tidal, paper, lessismore, streaming, recent or quest, with options such as "
        "tidal:granularity=kv_head,select_layers=2+6; repeat it for several.",
    ),
]
BudgetsOption = Annotated[
    list[int] | None,
    typer.Option("--budget", help="Tokens that sparse layers attend to; repeat it for several."),
]
TextOption = Annotated[
    Path | None,
    typer.Option("--text", help="A UTF-8 text file; default: this Python's standard library."),
]
SeedOption = Annotated[int, typer.Option(help="Seed of the samples.")]
BatchOption = Annotated[int, typer.Option(min=1, help="Samples decoded together.")]
OutputOption = Annotated[
    Path | None,
    typer.Option(help="Folder for rows, summary and plots; default: eval-results/NAME."),
]
JsonOption = Annotated[
    Path | None, typer.Option("--json", help="A further copy of the summary, for programs.")
]
OverwriteOption = Annotated[
    bool, typer.Option("--overwrite", help="Start anew where another run left its rows.")
]
PlotOption = Annotated[bool, typer.Option(help="Draw plots (needs matplotlib).")]


@app.command()
def needle(
    model: ModelOption = None,
    context: Annotated[
        list[int] | None, typer.Option(help="Context in tokens; repeat it for several.")
    ] = None,
    depth: Annotated[
        list[float] | None, typer.Option(help="Depth of the needle, 0 to 1; repeat for several.")
    ] = None,
    kind: Annotated[
        list[str] | None,
        typer.Option(help="single, multi-key, multi-query or multi-value; repeat for several."),
    ] = None,
    samples: Annotated[int, typer.Option(min=1, help="Questions per kind, context, depth.")] = 2,
    distractors: Annotated[int, typer.Option(min=0, help="Needles nobody asks for.")] = 8,
    decoded_tokens: Annotated[
        int,
        typer.Option(min=0, help="Last tokens of the context that are decoded, not prefilled."),
    ] = 0,
    haystack: Annotated[
        Path | None,
        typer.Option(help="A UTF-8 text file; default: this Python's standard library."),
    ] = None,
    method: MethodOption = None,
    budget: BudgetsOption = None,
    batch_size: BatchOption = 1,
    seed: SeedOption = 0,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    output_dir: OutputOption = None,
    json_file: JsonOption = None,
    overwrite: OverwriteOption = False,
    plot: PlotOption = True,
) -> None:
    """Hide key-value needles in a long text and ask for them, token by token after a dense prefill."""
    from tidaldecode.cli.study import Study
    from tidaldecode.eval.needle_task import NeedleGrid, NeedleTask
    from tidaldecode.eval.report import report_needle

    grid = NeedleGrid(
        contexts=tuple(sorted(set(context or [4096, 8192]))),
        depths=tuple(sorted(set(depth or [0.0, 0.25, 0.5, 0.75, 0.95]))),
        samples=samples,
        distractors=distractors,
        kinds=tuple(dict.fromkeys(kind or ["multi-key"])),
        seed=seed,
        decoded_tokens=decoded_tokens,
    )
    study = Study.open(
        "needle", model, method, budget, device=device, dtype=dtype, output_dir=output_dir,
        plot=plot, overwrite=overwrite,
    )  # fmt: skip
    study.check_context(max(grid.contexts))
    text = study.haystack(haystack, max(grid.contexts), seed)
    task = NeedleTask(text, study.encode, study.decode, grid)
    study.run(task, batch_size, {"grid": vars(grid), "haystack": str(haystack or "stdlib")})
    study.finish(report_needle, json_file, context=max(grid.contexts))


@app.command()
def perplexity(
    model: ModelOption = None,
    text: TextOption = None,
    context: Annotated[int, typer.Option(help="Tokens that are prefilled.")] = 4096,
    new_tokens: Annotated[int, typer.Option(min=1, help="Tokens decoded after them.")] = 128,
    samples: Annotated[int, typer.Option(min=1, help="Passages.")] = 8,
    method: MethodOption = None,
    budget: BudgetsOption = None,
    batch_size: BatchOption = 1,
    seed: SeedOption = 0,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    output_dir: OutputOption = None,
    json_file: JsonOption = None,
    overwrite: OverwriteOption = False,
    plot: PlotOption = True,
) -> None:
    """Loss of a text that is decoded token by token after a dense prefill."""
    from tidaldecode.cli.study import Study
    from tidaldecode.eval.passages import PassageSet
    from tidaldecode.eval.perplexity import PerplexityTask
    from tidaldecode.eval.report import report_perplexity

    study = Study.open(
        "perplexity", model, method, budget, device=device, dtype=dtype, output_dir=output_dir,
        plot=plot, overwrite=overwrite, usual=["dense", "tidal", "recent", "streaming", "quest"],
    )  # fmt: skip
    study.check_context(context + new_tokens)
    words = study.haystack(text, context + new_tokens, seed)
    passages = PassageSet(words, context, new_tokens, samples, seed)
    study.run(PerplexityTask(passages), batch_size, _passage_details(passages, text))
    study.finish(report_perplexity, json_file, context=context)


@app.command()
def agreement(
    model: ModelOption = None,
    text: TextOption = None,
    context: Annotated[int, typer.Option(help="Tokens that are prefilled.")] = 4096,
    new_tokens: Annotated[int, typer.Option(min=1, help="Tokens decoded after them.")] = 64,
    samples: Annotated[int, typer.Option(min=1, help="Passages.")] = 8,
    method: MethodOption = None,
    budget: BudgetsOption = None,
    batch_size: BatchOption = 1,
    seed: SeedOption = 0,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    output_dir: OutputOption = None,
    json_file: JsonOption = None,
    overwrite: OverwriteOption = False,
    plot: PlotOption = True,
) -> None:
    """Share of greedy tokens equal to full attention's, and KL of the logits, by position."""
    from tidaldecode.cli.study import Study
    from tidaldecode.eval.agreement import AgreementTask
    from tidaldecode.eval.passages import PassageSet
    from tidaldecode.eval.report import report_agreement

    study = Study.open(
        "agreement", model, method, budget, device=device, dtype=dtype, output_dir=output_dir,
        plot=plot, overwrite=overwrite, usual=["tidal", "streaming", "quest"],
    )  # fmt: skip
    study.check_context(context + new_tokens)
    words = study.haystack(text, context + new_tokens, seed)
    passages = PassageSet(words, context, new_tokens, samples, seed)
    study.run(AgreementTask(passages), batch_size, _passage_details(passages, text))
    study.finish(report_agreement, json_file, context=context)


def _passage_details(passages: object, text: Path | None) -> dict[str, object]:
    details = {name: value for name, value in vars(passages).items() if name != "text"}
    return {"passages": details, "text": str(text or "stdlib")}
