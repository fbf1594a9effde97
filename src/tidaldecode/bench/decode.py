"""Times whole decode steps: every layer, the head, the choice of the next token; one graph on a GPU.

The cache is filled with random keys and values, so that no prefill has to be waited for; selections are
real. Full attention runs through the same step, with a plan of dense layers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch

from tidaldecode.algorithm import Role
from tidaldecode.bench.breakdown import is_profiled, step_parts
from tidaldecode.bench.shapes import KEY_SPREAD
from tidaldecode.bench.timing import now, summarise
from tidaldecode.config import TidalConfig
from tidaldecode.errors import TidalError
from tidaldecode.integrations.transformers import TidalHandle, enable
from tidaldecode.integrations.transformers.decode_step import DecodeStep, dense_plan
from tidaldecode.integrations.transformers.footprint import measure_footprint
from tidaldecode.integrations.transformers.settings import resolve_settings

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
    selected_kv_bytes: int
    """The part of them that sparse layers read."""
    floor_ms: float
    """Both of them at the bandwidth that a plain sum reaches."""
    parts_ms: dict[str, float] = field(default_factory=dict)
    """Where one step's time goes (`tidaldecode.bench.breakdown`); empty on a CPU."""

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
    sizes: Sequence[tuple[int, int]],
    steps: int,
    bandwidth: float,
    on_method: Callable[[], None] = lambda: None,
) -> list[StepTime]:
    """Time every method, None being full attention, at every ``(cached tokens, rows)`` of ``sizes``.

    ``on_method`` is called after each that was timed and, where they are profiled, after each profile.

    Errors: `TidalError` for methods that the model cannot run, and too little memory.
    """
    results = []
    # Enabled once for all: a model that is enabled anew is compiled anew.
    with enable(model, _any_config(methods)) as handle:
        for method, context, step in _filled_steps(model, handle, methods, sizes, steps):
            sparse = methods[method] is not None
            results.append(_time_step(step, method, sparse, context, steps, bandwidth))
            on_method()
        if is_profiled(model.device):
            # Last of all: once it was profiled, a process replays its graphs up to 3 % slower.
            again = _filled_steps(model, handle, methods, sizes, steps)
            for index, (_, context, step) in enumerate(again):
                step.resume(context)
                step_times(step, 1)
                parts = step_parts(step, results[index].milliseconds)
                results[index] = replace(results[index], parts_ms=parts)
                on_method()
    return results


def _filled_steps(
    model: PreTrainedModel,
    handle: TidalHandle,
    methods: dict[str, TidalConfig | None],
    sizes: Sequence[tuple[int, int]],
    steps: int,
) -> Iterator[tuple[str, int, DecodeStep]]:
    """``(method, cached tokens, its step)``, all methods of a size on one cache; closed afterwards."""
    for context, batch in sizes:
        cache = None
        for method, config in methods.items():
            settings, plan = handle.config, dense_plan(handle.plan)
            if config is not None:
                settings, plan, _ = resolve_settings(model, handle.shape, config, {})
            capacity = context + _SLACK + steps
            step = DecodeStep(model, settings, plan, batch=batch, capacity=capacity)
            if cache is None:
                cache = step.cache
                fill_cache(step)
            else:
                step.use_cache(cache)
            yield method, context, step
            step.close()


def _time_step(
    step: DecodeStep, method: str, sparse: bool, context: int, steps: int, bandwidth: float
) -> StepTime:
    """Time one step, and count what it reads."""
    step.resume(context)
    timing = summarise(step_times(step, steps))
    footprint = measure_footprint(step.model, step.config, context)
    weights = _weight_bytes(step.model)
    kv = step.batch * (footprint.kv_bytes if sparse else footprint.full_bytes)
    roles = [role for role in step.plan if role is not Role.HOST]
    full_layers = sum(role in (Role.DENSE, Role.SELECT) for role in roles)
    dense_kv = step.batch * footprint.full_bytes * full_layers // len(roles)
    return StepTime(
        method=method,
        plan=str(step.plan),
        context=context,
        batch=step.batch,
        milliseconds=timing.median_ms,
        low_ms=timing.low_ms,
        high_ms=timing.high_ms,
        weight_bytes=weights,
        kv_bytes=kv,
        selected_kv_bytes=kv - dense_kv,
        floor_ms=1e3 * (weights + kv) / bandwidth,
    )


def _any_config(methods: dict[str, TidalConfig | None]) -> TidalConfig:
    """Settings with which the model can be enabled where only its dense plan is wanted."""
    return next((c for c in methods.values() if c is not None), TidalConfig(select_layers=(2,)))


def fill_cache(step: DecodeStep) -> None:
    """Random keys and values up to the capacity."""
    step.prefill(torch.ones(step.batch, 1, dtype=torch.int64, device=step.tokens.device))
    for layer in step.cache.layers:
        layer.keys.normal_(std=KEY_SPREAD)
        layer.values.normal_()


def step_times(step: DecodeStep, steps: int, warm_up: int = 3) -> list[float]:
    """Milliseconds of each of ``steps`` steps, after ``warm_up`` others."""
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
