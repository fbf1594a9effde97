"""Times the attention of one decode step on a CPU: dense, selecting and sparse layers, whole steps.

    python -m tidaldecode.bench.attention_step [--json FILE]

Every layer has its own K and V, more than the processor's cache holds, and attends through
`decode_attention` with real selections. Baseline: torch's scaled_dot_product_attention (enable_gqa)
over the same tensors. Candidates take turns within each round; what counts is the ratio of medians of
one run.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from tidaldecode.algorithm import DecodeState, LayerPlan, Role, decode_attention
from tidaldecode.bench.timing import Timing, time_interleaved
from tidaldecode.config import TidalConfig
from tidaldecode.errors import TidalError
from tidaldecode.record import run_record, write_json


@dataclass(frozen=True)
class Shape:
    """The attention of a model; the default is Llama-3.2-1B's."""

    layers: int = 16
    query_heads: int = 32
    kv_heads: int = 8
    head_dim: int = 64
    context: int = 32768
    batch: int = 1


class AttentionStep:
    """The attention layers of one model with a filled cache, and ways to run them."""

    def __init__(self, shape: Shape, config: TidalConfig, seed: int = 0) -> None:
        if shape.context <= config.budget:
            raise TidalError(
                f"context: expected more tokens than the budget of {config.budget:,}, got "
                f"{shape.context:,}"
            )
        self.shape, self.config = shape, config
        assert config.select_layers != "auto"
        self.plan = LayerPlan.build(
            shape.layers, dense_layers=config.dense_layers, select_layers=config.select_layers
        )
        self.dense_plan = LayerPlan((Role.DENSE,) * shape.layers)
        random = torch.Generator().manual_seed(seed)
        cache = (shape.batch, shape.kv_heads, shape.context, shape.head_dim)
        self.q = torch.randn(shape.batch, shape.query_heads, shape.head_dim, generator=random)
        self.kv = [
            (torch.randn(cache, generator=random), torch.randn(cache, generator=random))
            for _ in range(shape.layers)
        ]
        self.scale = shape.head_dim**-0.5
        seq_lens = torch.full((shape.batch,), shape.context, dtype=torch.int32)
        self.state = DecodeState.begin(config, self.plan, seq_lens)

    def layer(self, role: Role, ahead: int = 0) -> Callable[[int], torch.Tensor]:
        """Run one layer of this role; rotates through the layers' caches, from layer ``ahead`` on.

        Candidates of one round need layers of their own: the processor may still hold the last one's.
        """
        plan = LayerPlan((role,) * self.shape.layers, preselected=True)
        return lambda index: self._attend((index + ahead) % self.shape.layers, plan)

    def sdpa_layer(self, index: int) -> torch.Tensor:
        """The baseline for one layer."""
        k, v = self.kv[index % self.shape.layers]
        return torch.nn.functional.scaled_dot_product_attention(
            self.q[:, :, None], k, v, scale=self.scale, enable_gqa=True
        )

    def step(self, plan: LayerPlan) -> None:
        """All layers of one step."""
        for layer in range(self.shape.layers):
            self._attend(layer, plan)

    def sdpa_step(self) -> None:
        """All layers of one step by the baseline."""
        for layer in range(self.shape.layers):
            self.sdpa_layer(layer)

    def _attend(self, layer: int, plan: LayerPlan) -> torch.Tensor:
        k, v = self.kv[layer]
        return decode_attention(self.q, k, v, layer, plan, self.state, scale=self.scale)


def measure(
    step: AttentionStep, repetitions: int, on_round: Callable[[], None] = lambda: None
) -> dict[str, Timing]:
    """Medians of single layers and whole steps, milliseconds."""
    step.layer(Role.SELECT)(0)
    apart = step.shape.layers // 4
    candidates: dict[str, Callable[[int], object]] = {
        "layer: SDPA": step.sdpa_layer,
        "layer: dense": step.layer(Role.DENSE, apart),
        "layer: select": step.layer(Role.SELECT, 2 * apart),
        "layer: sparse": step.layer(Role.SPARSE, 3 * apart),
        "step: SDPA": lambda _: step.sdpa_step(),
        "step: dense": lambda _: step.step(step.dense_plan),
        "step: tidal": lambda _: step.step(step.plan),
    }
    with torch.inference_mode():
        return time_interleaved(candidates, repetitions=repetitions, on_round=on_round)


def ratios(timings: dict[str, Timing]) -> dict[str, float]:
    """What the project promises of a CPU, as ratios of medians."""
    median = {name: timing.median_ms for name, timing in timings.items()}
    return {
        "sparse layer, times faster than SDPA": median["layer: SDPA"] / median["layer: sparse"],
        "dense layer, times faster than SDPA": median["layer: SDPA"] / median["layer: dense"],
        "select layer, times a dense layer": median["layer: select"] / median["layer: dense"],
        "step, times faster than SDPA": median["step: SDPA"] / median["step: tidal"],
        "step, times faster than our dense": median["step: dense"] / median["step: tidal"],
    }


def main(
    context: Annotated[int, typer.Option(help="Cached tokens.")] = 32768,
    budget: Annotated[int, typer.Option(help="Tokens a sparse layer reads.")] = 1024,
    batch: Annotated[int, typer.Option(min=1, help="Sequences.")] = 1,
    threads: Annotated[int, typer.Option(min=1, help="CPU threads.")] = 2,
    repetitions: Annotated[int, typer.Option(min=1, help="Timed rounds.")] = 30,
    json: Annotated[Path | None, typer.Option(help="Also write the figures here.")] = None,
) -> None:
    """Time the attention of one decode step, Llama-3.2-1B's shape, fp32, on this CPU."""
    torch.set_num_threads(threads)
    shape = replace(Shape(), context=context, batch=batch)
    step = AttentionStep(shape, TidalConfig(budget=budget, select_layers=(2, 6)))
    with Progress(transient=True) as progress:
        task = progress.add_task("timing", total=repetitions + 3)
        timings = measure(step, repetitions, lambda: progress.advance(task))
    record = run_record(
        shape=asdict(shape), dtype="float32", budget=budget, plan=str(step.plan), n=repetitions
    )
    show(timings, record["device"], step)
    if json is not None:
        figures = {name: asdict(timing) for name, timing in timings.items()}
        write_json(json, {"record": record, "timings": figures, "ratios": ratios(timings)})


def show(timings: dict[str, Timing], device: str, step: AttentionStep) -> None:
    """Print the timings, then the ratios."""
    console = Console()
    shape = step.shape
    console.print(
        f"{device}; fp32, {shape.layers} layers, {shape.query_heads} query / {shape.kv_heads} KV "
        f"heads of {shape.head_dim}, {shape.context:,} tokens, batch {shape.batch}, budget "
        f"{step.config.budget:,}, plan {step.plan}",
        soft_wrap=True,
    )
    table = Table("attention", "median (ms)", "10 % (ms)", "90 % (ms)")
    for name, timing in timings.items():
        table.add_row(
            name, f"{timing.median_ms:.2f}", f"{timing.low_ms:.2f}", f"{timing.high_ms:.2f}"
        )
    console.print(table)
    for name, value in ratios(timings).items():
        console.print(f"{value:7.2f}  {name}")


if __name__ == "__main__":
    typer.run(main)
