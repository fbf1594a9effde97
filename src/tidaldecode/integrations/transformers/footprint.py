"""What a method reads of the KV cache of a given model, for tables that compare methods."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from tidaldecode.algorithm.cost import KVReads
from tidaldecode.algorithm.plan import LayerPlan
from tidaldecode.config import TidalConfig
from tidaldecode.integrations.transformers.settings import resolve_settings
from tidaldecode.integrations.transformers.support import inspect_model

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Footprint:
    """Reads of one decode step of one sequence; sliding-window layers are left out."""

    plan: LayerPlan | None
    """None for full attention."""
    attended_tokens: int
    """Tokens that a sparse layer attends to."""
    kv_bytes: int
    full_bytes: int
    """The same for full attention."""


def kv_reads(model: PreTrainedModel, config: TidalConfig, plan: LayerPlan) -> KVReads:
    """What steps of ``model`` read of the cache. Errors: `TidalError`, as `enable`."""
    _, shape = inspect_model(model)
    return KVReads(
        plan, config, shape.query_heads, shape.kv_heads, shape.head_dim, model.dtype.itemsize
    )


def measure_footprint(
    model: PreTrainedModel, config: TidalConfig | None, context: int
) -> Footprint:
    """Bytes of K and V that a step reads at ``context`` tokens. Errors: `TidalError`, as `enable`."""
    _, shape = inspect_model(model)
    settings, plan, _ = resolve_settings(model, shape, config or TidalConfig(), {})
    reads = kv_reads(model, settings, plan)
    full = reads.full(context)
    if config is None:
        return Footprint(None, context, full, full)
    read = reads.sparse(context)
    return Footprint(plan, min(context, settings.budget), read, full)
