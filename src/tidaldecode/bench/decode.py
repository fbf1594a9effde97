"""Times whole decode steps: every layer, the head, the choice of the next token; one graph on a GPU.

The cache is filled with random keys and values, so that no prefill has to be waited for; selections are
real. Full attention runs through the same step, with a plan of dense layers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from tidaldecode.bench.shapes import KEY_SPREAD
from tidaldecode.bench.timing import now, summarise
from tidaldecode.config import TidalConfig
from tidaldecode.errors import TidalError
from tidaldecode.integrations.transformers import enable
from tidaldecode.integrations.transformers.decode_step import DecodeStep, dense_plan
from tidaldecode.integrations.transformers.footprint import measure_footprint

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

_SLACK = 64
"""Tokens of the capacity behind the context, for the steps that are timed."""


@dataclass(frozen=True)
class StepTime:
    """One method at one context and batch size."""

    method: str
    plan: str
    context: int
    batch: int
    milliseconds: float
    """Median of the timed steps."""
    low_ms: float
    """10th percentile."""
    high_ms: float
    """90th percentile."""
    weight_bytes: int
    """Read by a step: all parameters but the input embedding's other rows."""
    kv_bytes: int
    """Read by a step: keys and values of all rows."""
    floor_ms: float
    """Both of them at the bandwidth that a plain sum reaches."""

    @property
    def times_floor(self) -> float:
        """How many times its floor a step takes."""
        return self.milliseconds / self.floor_ms


def random_model(config: PretrainedConfig, device: torch.device, dtype: torch.dtype) -> Any:
    """A model of this configuration with random weights, made on the device."""
    from transformers import AutoModelForCausalLM

    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa")
    return model.eval()


def read_bandwidth(device: torch.device) -> float:
    """Bytes a second that a plain sum over one large tensor reads."""
    size = 1 << (31 if device.type == "cuda" else 26)
    memory = torch.zeros(size // 4, dtype=torch.float32, device=device)
    times = []
    for _ in range(7):
        begin = now(device)
        memory.sum()
        times.append(now(device) - begin)
    return size / min(times)


@torch.inference_mode()
def time_steps(
    model: PreTrainedModel,
    methods: dict[str, TidalConfig | None],
    *,
    context: int,
    batch: int,
    steps: int,
    bandwidth: float,
    on_method: Callable[[], None] = lambda: None,
) -> list[StepTime]:
    """Time every method, None being full attention, at ``context`` cached tokens.

    Errors: `TidalError` for methods that the model cannot run, and too little memory.
    """
    results = []
    cache = None
    for name, config in methods.items():
        with enable(model, config or _any_config(methods)) as handle:
            plan = handle.plan if config is not None else dense_plan(handle.plan)
            step = DecodeStep(
                model, handle.config, plan, batch=batch, capacity=context + _SLACK + steps
            )
            if cache is None:
                cache = step.cache
                _fill(step)
            else:
                step.use_cache(cache)
            step.resume(context)
            footprint = measure_footprint(model, handle.config, context)
            timing = summarise(_time(step, steps))
            weights = _weight_bytes(model)
            kv = batch * (footprint.full_bytes if config is None else footprint.kv_bytes)
            results.append(
                StepTime(
                    method=name,
                    plan=str(plan),
                    context=context,
                    batch=batch,
                    milliseconds=timing.median_ms,
                    low_ms=timing.low_ms,
                    high_ms=timing.high_ms,
                    weight_bytes=weights,
                    kv_bytes=kv,
                    floor_ms=1e3 * (weights + kv) / bandwidth,
                )
            )
            step.close()
        on_method()
    return results


def _any_config(methods: dict[str, TidalConfig | None]) -> TidalConfig:
    """Settings with which the model can be enabled where only its dense plan is wanted."""
    return next((c for c in methods.values() if c is not None), TidalConfig(select_layers=(2,)))


def _fill(step: DecodeStep) -> None:
    """Random keys and values up to the capacity."""
    step.prefill(torch.ones(step.batch, 1, dtype=torch.int64, device=step.tokens.device))
    for layer in step.cache.layers:
        layer.keys.normal_(std=KEY_SPREAD)
        layer.values.normal_()


def _time(step: DecodeStep, steps: int, warm_up: int = 3) -> list[float]:
    """Milliseconds of each of ``steps`` steps."""
    device = step.tokens.device
    times = []
    for index in range(warm_up + steps):
        begin = now(device)
        step.run()
        elapsed = now(device) - begin
        if index >= warm_up:
            times.append(1e3 * elapsed)
    return times


def _weight_bytes(model: PreTrainedModel) -> int:
    embedding: torch.Tensor = model.get_input_embeddings().weight
    head: torch.Tensor = model.get_output_embeddings().weight
    read = sum(p.numel() * p.element_size() for p in model.parameters())
    tied = embedding.data_ptr() == head.data_ptr()
    return int(read if tied else read - embedding.numel() * embedding.element_size())


def check_contexts(contexts: Sequence[int], model: PreTrainedModel) -> None:
    """Errors: `TidalError` for a context that the model was not made for."""
    limit = getattr(model.config, "max_position_embeddings", None)
    longest = max(contexts)
    if limit is not None and longest > limit:
        raise TidalError(
            f"context: expected at most {limit:,} tokens for this model, got {longest:,}"
        )
