"""Which layers of a group are ours, and with which configuration, plan and memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from vllm.config import get_layers_from_vllm_config
from vllm.logger import init_logger
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.models.utils import extract_layer_index
from vllm.v1.kv_cache_interface import FullAttentionSpec

from tidaldecode.algorithm import LayerPlan, Role
from tidaldecode.config import TidalConfig
from tidaldecode.errors import TidalError
from tidaldecode.integrations.settings import ModelFacts, resolve
from tidaldecode.integrations.shape import read_shape
from tidaldecode.integrations.vllm.memory import WorkMemory
from tidaldecode.integrations.vllm.options import read_options
from tidaldecode.integrations.vllm.step import StepMaker
from tidaldecode.integrations.vllm.support import check_backend

logger = init_logger("vllm.tidaldecode")  # vLLM shows what is logged below its own name
OURS = (Role.SELECT, Role.SPARSE)


def plan_group(
    kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: torch.device
) -> StepMaker | None:
    """Give the group's layers their numbers; return what makes its steps, or None if it has no part.

    Errors: `TidalError` for options that cannot work on this model, and for full-attention layers
    that vLLM spreads over several groups.
    """
    if not isinstance(kv_cache_spec, FullAttentionSpec):
        return None
    config, plan, reason = _resolve(vllm_config)
    check_backend(config.backend, device, *_heads(vllm_config), vllm_config)
    layers = get_layers_from_vllm_config(vllm_config, Attention)
    here = {extract_layer_index(found): found for found in layers}
    stage = plan.for_stage(here)
    ours = {index for index in here if stage[index] in OURS}
    in_group = {index for index, found in here.items() if found in layer_names}
    if not ours & in_group:
        return None
    if missing := ours - in_group:
        raise TidalError(
            "vllm: expected all full-attention layers in one KV cache group, since they share a "
            f"selection, got layers {sorted(missing)} in another; try --disable-hybrid-kv-cache-manager"
        )
    for index in in_group:
        layer = layers[here[index]]
        if index in ours and getattr(layer, "sliding_window", None) is not None:
            raise TidalError(
                f"layer {index}: expected full attention, as the model's configuration says, got a "
                f"sliding window of {layer.sliding_window}"
            )
        layer.impl.layer_index = index
    logger.info_once(
        "TidalDecode: %s, budget %d, %s sets, selection layers %s (%s)",
        str(stage),
        config.budget,
        config.granularity,
        str(stage.layers(Role.SELECT)),
        reason,
    )
    return StepMaker(
        config,
        stage,
        sets=_sets(config, vllm_config),
        min_context=read_options(vllm_config.additional_config).min_context,
        max_rows=_max_rows(vllm_config),
        rows_at_once=work_memory(vllm_config, config).rows_at_once,
        device=device,
    )


def work_memory(vllm_config: Any, config: TidalConfig | None = None) -> WorkMemory:
    """What selection layers of this engine need. Errors: `TidalError` when a row does not fit."""
    config = config or _resolve(vllm_config)[0]
    # Block tables are as wide as the longest sequence, rounded up to whole blocks, or to 128 tokens.
    unit = max(128, vllm_config.cache_config.block_size or 0)
    return WorkMemory.plan(
        query_heads=_heads(vllm_config)[0],
        sets=_sets(config, vllm_config),
        width=-(-vllm_config.model_config.max_model_len // unit) * unit,
        budget=config.budget,
        dtype=vllm_config.model_config.dtype,
        max_rows=_max_rows(vllm_config),
        limit_mib=read_options(vllm_config.additional_config).scratch_mib,
        graphs=vllm_config.compilation_config.cudagraph_mode.has_full_cudagraphs(),
    )


def _resolve(vllm_config: Any) -> tuple[TidalConfig, LayerPlan, str]:
    """The configuration, the plan of all layers, and why these layers."""
    options = read_options(vllm_config.additional_config)
    model = vllm_config.model_config
    decoder = model.hf_text_config
    name = ", ".join(getattr(model.hf_config, "architectures", None) or [decoder.model_type])
    folder = Path(model.model)
    return resolve(
        ModelFacts(
            name=name,
            folder=folder if folder.is_dir() else None,
            model_type=model.hf_config.model_type,
            decoder=decoder,
            full_attention=read_shape(decoder, name).full_attention,
        ),
        None,
        dict(options.overrides),
    )


def _heads(vllm_config: Any) -> tuple[int, int]:
    """Query and KV heads of this rank."""
    model, parallel = vllm_config.model_config, vllm_config.parallel_config
    return int(model.get_num_attention_heads(parallel)), int(model.get_num_kv_heads(parallel))


def _sets(config: TidalConfig, vllm_config: Any) -> int:
    query_heads, kv_heads = _heads(vllm_config)
    return {"shared": 1, "kv_head": kv_heads, "query_head": query_heads}[config.granularity]


def _max_rows(vllm_config: Any) -> int:
    """Rows of the largest batch, those included that pad it for a CUDA graph."""
    rows: int = vllm_config.scheduler_config.max_num_seqs
    captured: int = vllm_config.compilation_config.max_cudagraph_capture_size or 0
    return max(rows, captured)
