"""``tidaldecode bench vllm``."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from tidaldecode.cli.common import (
    GranularityOption,
    SelectLayersOption,
    overrides,
    rows_progress,
)

if TYPE_CHECKING:
    from tidaldecode.bench.vllm_job import MixedTime, Result, StepTime


def vllm(
    shape: Annotated[
        str, typer.Option(help="Random weights in this shape, such as llama-3.1-8b or qwen3-8b.")
    ] = "llama-3.1-8b",
    context: Annotated[
        list[int] | None,
        typer.Option(help="Cached tokens of every row; repeat it for several."),
    ] = None,
    batch: Annotated[
        list[int] | None, typer.Option(help="Rows decoded together; repeat it for several.")
    ] = None,
    budget: Annotated[int, typer.Option(help="Tokens that sparse layers attend to.")] = 1024,
    select_layers: SelectLayersOption = None,
    granularity: GranularityOption = None,
    steps: Annotated[int, typer.Option(min=3, help="Timed steps of each batch.")] = 30,
    prefill: Annotated[
        bool, typer.Option("--prefill", help="Compute the contexts instead of random K and V.")
    ] = False,
    mixed: Annotated[
        bool, typer.Option("--mixed", help="Also decode while prompts arrive.")
    ] = False,
    mixed_rows: Annotated[int, typer.Option(min=1, help="Rows that decode meanwhile.")] = 8,
    mixed_context: Annotated[int, typer.Option(min=1, help="Their cached tokens.")] = 32768,
    prompts: Annotated[int, typer.Option(min=1, help="Prompts that arrive.")] = 12,
    prompt_tokens: Annotated[int, typer.Option(min=1, help="Tokens of each.")] = 8192,
    new_tokens: Annotated[int, typer.Option(min=2, help="Tokens that each asks for.")] = 64,
    interval: Annotated[float, typer.Option(min=0.0, help="Seconds between arrivals.")] = 1.0,
    max_model_len: Annotated[
        int | None, typer.Option(help="vLLM's; default: what the contexts need.")
    ] = None,
    gpu_memory: Annotated[
        float, typer.Option(min=0.01, max=1.0, help="vLLM's gpu_memory_utilization.")
    ] = 0.9,
    chunk: Annotated[
        int, typer.Option(min=16, help="Tokens of one step (max_num_batched_tokens).")
    ] = 8192,
    eager: Annotated[bool, typer.Option("--eager", help="No CUDA graphs.")] = False,
    dtype: Annotated[str, typer.Option(help="bfloat16, float16 or float32.")] = "bfloat16",
    device: Annotated[str, typer.Option(help="auto (an NVIDIA GPU) or cpu.")] = "auto",
    json_file: Annotated[Path | None, typer.Option("--json", help="A copy for programs.")] = None,
    log_dir: Annotated[Path | None, typer.Option(help="Keep what the engines print here.")] = None,
) -> None:
    """Time decode steps of vLLM, with its own attention and with TidalDecode, in one run."""
    from tidaldecode.bench.vllm import make_jobs, require_device, require_vllm, run_job, write_model
    from tidaldecode.bench.vllm_job import MixedLoad
    from tidaldecode.record import run_record, write_json

    version = require_vllm()
    require_device(device)
    contexts = sorted(set(context or [2048, 32768, 102400]))
    sizes = [(tokens, rows) for tokens in contexts for rows in sorted(set(batch or [1]))]
    load = MixedLoad(mixed_rows, mixed_context, prompts, prompt_tokens, new_tokens, interval)
    options = overrides(budget=budget, select_layers=select_layers, granularity=granularity)
    console = Console()
    results: dict[str, list[Result]] = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        logs = log_dir or folder
        logs.mkdir(parents=True, exist_ok=True)
        jobs = make_jobs(
            write_model(shape, folder / "model"), options,
            sizes=sizes, steps=steps, mixed=load if mixed else None, computed=prefill, dtype=dtype,
            eager=eager, gpu_memory=gpu_memory, max_model_len=max_model_len, chunk=chunk,
        )  # fmt: skip
        # Before both engines: it looks at the device, which may take some of its memory.
        record = run_record(
            task="bench vllm", shape=shape, vllm=version, options=options,
            random_contexts=not prefill, jobs={m: asdict(j) for m, j in jobs.items()},
        )  # fmt: skip
        with rows_progress(console) as progress:
            bar = progress.add_task("vLLM", total=len(jobs) * (1 + len(sizes) + mixed))
            for method, job in jobs.items():
                log = logs / f"{method}.log"
                results[method] = run_job(job, log, lambda: progress.advance(bar))
                if json_file is not None:
                    write_json(json_file, {"record": record, "results": _plain(results)})
    title = f"vLLM {version}, {shape} ({dtype}), budget {budget:,}"
    console.print(_step_table(results, title))
    if mixed:
        console.print(_mixed_table(results, load))
    if json_file is not None:
        console.print(f"wrote {json_file}", soft_wrap=True)


def _plain(results: Mapping[str, Sequence[Result]]) -> dict[str, list[dict[str, Any]]]:
    return {method: [asdict(result) for result in found] for method, found in results.items()}


def _step_table(results: Mapping[str, Sequence[Result]], title: str) -> Table:
    """Every batch in a row, the methods side by side."""
    from tidaldecode.bench.vllm_job import STOCK, TIDAL, StepTime

    caption = "ms of one decode step: median, 10th and 90th percentile"
    table = Table(title=title, caption=caption, box=None)
    for head in ("tokens", "rows", *(f"{method} ms" for method in results), "speed-up"):
        table.add_column(head, justify="right", no_wrap=True)
    steps = {
        method: [result for result in found if isinstance(result, StepTime)]
        for method, found in results.items()
    }
    for stock, tidal in zip(steps[STOCK], steps[TIDAL], strict=True):
        faster = "-"
        if stock.milliseconds is not None and tidal.milliseconds is not None:
            faster = f"{stock.milliseconds / tidal.milliseconds:.2f}x"
        table.add_row(
            f"{stock.context:,}", str(stock.batch), _spread(stock), _spread(tidal), faster
        )
    return table


def _spread(time: StepTime) -> str:
    if time.milliseconds is None:
        return "does not fit"
    return f"{time.milliseconds:.2f} ({time.low_ms:.2f}-{time.high_ms:.2f})"


def _mixed_table(results: Mapping[str, Sequence[Result]], load: Any) -> Table:
    """Both methods under the mixed load."""
    from tidaldecode.bench.vllm_job import MixedTime

    title = (
        f"{load.rows} rows of {load.context:,} tokens decode; {load.prompts} prompts of "
        f"{load.prompt_tokens:,} tokens arrive every {load.interval:g} s"
    )
    table = Table(title=title, caption="time per output token, of all rows", box=None)
    for head in ("method", "p50 ms", "p99 ms", "first token ms", "tokens/s"):
        table.add_column(head, justify="left" if head == "method" else "right", no_wrap=True)
    for method, found in results.items():
        for time in found:
            if isinstance(time, MixedTime):
                table.add_row(method, *_mixed_cells(time))
    return table


def _mixed_cells(time: MixedTime) -> tuple[str, ...]:
    return (
        f"{time.p50_ms:.2f}",
        f"{time.p99_ms:.2f}",
        f"{time.first_token_ms:.0f}",
        f"{time.tokens_per_second:.1f}",
    )
