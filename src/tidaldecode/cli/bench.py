"""``tidaldecode bench kernels | decode | lossless | vllm``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from tidaldecode.cli.bench_vllm import vllm
from tidaldecode.cli.common import (
    DeviceOption,
    ModelOption,
    SelectLayersOption,
    load,
    overrides,
    rows_progress,
)
from tidaldecode.errors import TidalError

if TYPE_CHECKING:
    import torch

    from tidaldecode.bench.decode import StepTime

FULL = "full"

ShapeOption = Annotated[
    str,
    typer.Option(
        help="Random weights in this shape: llama-2-7b, llama-3.1-8b, llama-3.2-1b or qwen3-8b."
    ),
]
ContextsOption = Annotated[
    list[int] | None, typer.Option("--context", help="Cached tokens; repeat it for several.")
]
BatchesOption = Annotated[
    list[int] | None, typer.Option("--batch", help="Rows decoded together; repeat it for several.")
]
BudgetsOption = Annotated[
    list[int] | None,
    typer.Option("--budget", help="Tokens that sparse layers attend to; repeat it for several."),
]
DtypeOption = Annotated[str, typer.Option("--dtype", help="bfloat16, float16 or float32.")]
JsonOption = Annotated[Path | None, typer.Option("--json", help="A copy for programs.")]

app = typer.Typer(help="Time TidalDecode against full attention.", no_args_is_help=True)
app.command()(vllm)


@app.command()
def decode(
    shape: ShapeOption = "llama-3.1-8b",
    model: ModelOption = None,
    context: ContextsOption = None,
    batch: BatchesOption = None,
    budget: BudgetsOption = None,
    select_layers: SelectLayersOption = None,
    compiled: Annotated[
        bool, typer.Option("--compile", help="Fuse small operations first (torch.compile).")
    ] = False,
    steps: Annotated[int, typer.Option(min=3, help="Timed steps of each method.")] = 20,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "bfloat16",
    json_file: JsonOption = None,
    plot_file: Annotated[
        Path | None, typer.Option("--plot", help="PNG of latency against context.")
    ] = None,
) -> None:
    """Time whole decode steps, sparse and with full attention, in one run."""
    from tidaldecode.bench.breakdown import is_profiled
    from tidaldecode.bench.decode import check_contexts, random_model, read_bandwidth, time_steps
    from tidaldecode.bench.plots import plot_decode
    from tidaldecode.bench.shapes import shape_config
    from tidaldecode.config import TidalConfig
    from tidaldecode.figure import require_matplotlib
    from tidaldecode.integrations.transformers.loading import resolve_device
    from tidaldecode.record import run_record, write_json

    if plot_file is not None:
        require_matplotlib()
    place, kind = resolve_device(device), precision(dtype)
    console = Console()
    if model is not None:
        loaded, _ = load(model, device, dtype)
        name = str(model)
    else:
        loaded, name = random_model(shape_config(shape), place, kind), shape
    contexts, batches = sorted(set(context or [10240, 32768, 102400])), sorted(set(batch or [1]))
    check_contexts(contexts, loaded)
    methods: dict[str, TidalConfig | None] = {FULL: None}
    for tokens in sorted(set(budget or [512])):
        methods[f"tidal {tokens}"] = TidalConfig(
            **overrides(budget=tokens, select_layers=select_layers),
            cuda_graph="compiled" if compiled else "auto",
        )
    bandwidth = read_bandwidth(place)
    sizes = [(tokens, rows) for tokens in contexts for rows in batches]
    with rows_progress(console) as progress:
        rounds = 2 if is_profiled(place) else 1
        bar = progress.add_task("methods", total=rounds * len(sizes) * len(methods))
        results = time_steps(
            loaded,
            methods,
            sizes=sizes,
            steps=steps,
            bandwidth=bandwidth,
            on_method=lambda: progress.advance(bar),
        )
    console.print(_table(results, f"{name} ({dtype}); floor at {bandwidth / 1e12:.2f} TB/s"))
    if json_file is not None or plot_file is not None:
        record = run_record(
            task="bench decode", model=name, dtype=dtype, steps=steps, bandwidth=bandwidth,
            methods={m: c.to_dict() if c else None for m, c in methods.items()},
        )  # fmt: skip
        written = []
        if json_file is not None:
            rows_found = [asdict(result) for result in results]
            written.append(write_json(json_file, {"record": record, "results": rows_found}))
        if plot_file is not None:
            written.append(plot_decode(results, name, plot_file, record))
        for path in written:
            console.print(f"wrote {path}", soft_wrap=True)


@app.command()
def kernels(
    shape: ShapeOption = "llama-3.1-8b",
    context: ContextsOption = None,
    batch: BatchesOption = None,
    budget: BudgetsOption = None,
    repetitions: Annotated[int, typer.Option(min=3, help="Timed walks through the layers.")] = 20,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "bfloat16",
    json_file: JsonOption = None,
) -> None:
    """Time the kernels of one layer against a sum of its bytes, torch SDPA and installed peers."""
    from tidaldecode.bench.kernels import cases_of, time_case
    from tidaldecode.bench.shapes import shape_config
    from tidaldecode.integrations.transformers.loading import resolve_device
    from tidaldecode.record import run_record, write_json

    place, kind = resolve_device(device), precision(dtype)
    cases = cases_of(
        shape_config(shape),
        sorted(set(context or [32768, 102400])),
        sorted(set(batch or [1])),
        sorted(set(budget or [512])),
    )
    console = Console()
    results = []
    with rows_progress(console) as progress:
        bar = progress.add_task("cases", total=len(cases))
        for case in cases:
            results += time_case(case, place, kind, repetitions)
            progress.advance(bar)
    table = Table(title=f"One layer of {shape} ({dtype})", box=None)
    for head in ("tokens", "rows", "kernel", "us", "10-90 %", "TB/s", "/ dense"):
        table.add_column(head, justify="left" if head == "kernel" else "right", no_wrap=True)
    dense = {r.case: r.microseconds for r in results if r.kernel == "dense_decode"}
    for r in results:
        table.add_row(
            f"{r.case.context:,}", str(r.case.batch), r.kernel, f"{r.microseconds:.1f}",
            f"{r.low_us:.1f}-{r.high_us:.1f}", f"{r.terabytes_per_second:.2f}",
            f"{r.microseconds / dense[r.case]:.2f}x",
        )  # fmt: skip
    console.print(table)
    if json_file is not None:
        record = run_record(task="bench kernels", shape=shape, dtype=dtype, repetitions=repetitions)
        found = [asdict(result) for result in results]
        write_json(json_file, {"record": record, "results": found})
        console.print(f"wrote {json_file}", soft_wrap=True)


def precision(name: str) -> torch.dtype:
    """A dtype by its name. Errors: `TidalError`."""
    from tidaldecode.integrations.transformers.loading import DTYPES

    if name not in DTYPES:
        raise TidalError(f"dtype: expected one of {', '.join(DTYPES)}, got {name!r}")
    return DTYPES[name]


def _table(results: Sequence[StepTime], title: str) -> Table:
    """All results, each against full attention at the same context and batch size."""
    caption = "read: weights + K and V of full layers + of selected tokens; floor: times their time"
    table = Table(title=f"One decode step of {title}", caption=caption, box=None)
    for head in (
        "tokens", "rows", "method", "ms", "10-90 %", "speed-up", "GB read", "floor",
    ):  # fmt: skip
        table.add_column(head, justify="left" if head == "method" else "right", no_wrap=True)
    full = {(r.context, r.batch): r.milliseconds for r in results if r.method == FULL}
    for result in results:
        speedup = full[result.context, result.batch] / result.milliseconds
        table.add_row(
            f"{result.context:,}", str(result.batch), result.method, f"{result.milliseconds:.3f}",
            f"{result.low_ms:.2f}-{result.high_ms:.2f}", f"{speedup:.2f}x",
            _gigabytes(result),
            f"{result.times_floor:.2f}x",
        )  # fmt: skip
    return table


def _gigabytes(result: StepTime) -> str:
    """What a step reads: weights, K and V of full layers, K and V of selected tokens."""
    full = result.kv_bytes - result.selected_kv_bytes
    parts = (result.weight_bytes, full, result.selected_kv_bytes)
    return "+".join(f"{part / 1e9:.1f}" for part in parts)
