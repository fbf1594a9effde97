"""``tidaldecode info``."""

from __future__ import annotations

import os
import platform
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from tidaldecode.cli.common import (
    BudgetOption,
    GranularityOption,
    ModelOption,
    PresetOption,
    RecentTokensOption,
    SelectLayersOption,
    SinkTokensOption,
    overrides,
    preset,
    silence_host,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from tidaldecode.integrations.transformers import TidalHandle


def info(
    model: ModelOption = None,
    budget: BudgetOption = None,
    select_layers: SelectLayersOption = None,
    granularity: GranularityOption = None,
    sink_tokens: SinkTokensOption = None,
    recent_tokens: RecentTokensOption = None,
    preset_name: PresetOption = None,
    context: Annotated[
        int, typer.Option(min=1, help="Tokens of context for the figures of KV read.")
    ] = 32768,
) -> None:
    """Print versions, devices and backends; with --model, the plan it gets and why."""
    base, options = preset(
        preset_name,
        overrides(
            budget=budget,
            select_layers=select_layers,
            granularity=granularity,
            sink_tokens=sink_tokens,
            recent_tokens=recent_tokens,
        ),
    )
    table = _machine()
    if model is not None:
        from tidaldecode.integrations.transformers import enable
        from tidaldecode.integrations.transformers.loading import load_skeleton

        silence_host()
        skeleton = load_skeleton(model)
        with enable(skeleton, base, **options) as handle:
            _describe(table, skeleton, handle, context)
    Console().print(table)


def _machine() -> Table:
    """Versions, devices and backends of this machine."""
    import torch

    from tidaldecode.kernels.dispatch import ENVIRONMENT_VARIABLE, resolve_backend
    from tidaldecode.record import package_version

    table = Table(show_header=False, box=None)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name in ("tidaldecode", "torch", "transformers", "numba", "triton", "vllm"):
        table.add_row(name, package_version(name) or "not installed")
    table.add_row("python", platform.python_version())
    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    table.add_row("devices", ", ".join([f"cpu ({torch.get_num_threads()} threads)", *devices]))
    device = torch.device("cuda" if devices else "cpu")
    chosen = os.environ.get(ENVIRONMENT_VARIABLE, "unset")
    table.add_row(
        "backend",
        f"{resolve_backend('auto', device, in_rows=True)} ({ENVIRONMENT_VARIABLE} {chosen})",
    )
    return table


def _describe(table: Table, model: PreTrainedModel, handle: TidalHandle, context: int) -> None:
    """Add what TidalDecode does with ``model``."""
    from tidaldecode.algorithm.cost import full_kv_bytes_per_step, kv_bytes_per_step

    shape, config = handle.shape, handle.config
    element_bytes = 2
    sizes = {
        "context": context,
        "kv_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
        "element_bytes": element_bytes,
    }
    full = full_kv_bytes_per_step(handle.plan, **sizes)
    read = kv_bytes_per_step(handle.plan, config, query_heads=shape.query_heads, **sizes)
    table.add_row()
    table.add_row(
        "model", f"{type(model).__name__}, {model.num_parameters() / 1e6:,.1f} M parameters"
    )
    table.add_row(
        "heads", f"{shape.query_heads} query, {shape.kv_heads} KV, head size {shape.head_dim}"
    )
    table.add_row("plan", str(handle.plan))
    table.add_row("", "D dense, S dense and selects, . sparse, - not full attention (the host's)")
    table.add_row("why", handle.reason)
    table.add_row("budget", f"{config.budget:,} tokens, sets: {config.granularity}")
    table.add_row(
        "KV read",
        f"{read / 1e6:,.1f} MB/token instead of {full / 1e6:,.1f} at {context:,} tokens in 16 bit "
        f"({full / read:.1f}x less)",
    )
