"""Times lossless decoding of real text against our own dense step: same model, cache, prompts and run.

Prompts are prefilled once; full attention and every draft decode from that cache, interleaved. Both are
whole: all layers, the head, the choice, the acceptance, the host. Greedy texts are compared in the run;
sampled ones differ by design.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from transformers.generation import LogitsProcessorList, TemperatureLogitsWarper

from tidaldecode.algorithm import LayerPlan
from tidaldecode.algorithm.chooser import Chooser
from tidaldecode.algorithm.parting import differences
from tidaldecode.algorithm.speculation import PlaceNoise
from tidaldecode.bench.timing import now, summarise
from tidaldecode.config import TidalConfig
from tidaldecode.integrations.transformers import enable
from tidaldecode.integrations.transformers.captured_rounds import CapturedRounds
from tidaldecode.integrations.transformers.decode_step import DecodeStep, dense_plan
from tidaldecode.integrations.transformers.lossless_graph import LENGTHS, RoundLoop, plain_rows
from tidaldecode.integrations.transformers.processing import Processing
from tidaldecode.integrations.transformers.round_choice import RoundChoice
from tidaldecode.integrations.transformers.settings import resolve_settings
from tidaldecode.integrations.transformers.static_cache import FixedCache
from tidaldecode.integrations.transformers.step_text import (
    greedy_text,
    sampled_text,
    watched_text,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_PREFILLED = 1 << 18
"""Tokens that are prefilled at a time."""


@dataclass(frozen=True)
class RealTime:
    """One way to draft, at one context and batch size; milliseconds are for a token of every row."""

    budget: int
    draft_tokens: int | str
    plan: str
    context: int
    batch: int
    new_tokens: int
    temperature: float
    """Of sampled texts; 0 for greedy ones."""
    full_ms: float
    """Full attention's step."""
    low_full_ms: float
    high_full_ms: float
    last_ms: float
    """Until the last row has all its tokens."""
    low_last_ms: float
    high_last_ms: float
    steady_ms: float
    """While all rows run: a server puts a new row in the place of one that is done."""
    acceptance: float | None
    """Share of drafted tokens that were kept."""
    tokens_per_verify: float
    """Over all rows."""
    slowest_tokens_per_verify: float
    """Of the row that is done last."""
    kv_share: float
    """KV read, as a share of full attention's."""
    equal: int | None
    """Rows with full attention's text; None where texts are sampled."""
    differences: list[dict[str, Any]] = field(default_factory=list)

    @property
    def last_speedup(self) -> float:
        """Against full attention, until the last row is done."""
        return self.full_ms / self.last_ms

    @property
    def steady_speedup(self) -> float:
        """Against full attention, while all rows run."""
        return self.full_ms / self.steady_ms


@torch.inference_mode()
def time_texts(
    model: PreTrainedModel,
    prompts: torch.Tensor,
    configs: Sequence[TidalConfig],
    *,
    new_tokens: int,
    repetitions: int,
    temperature: float = 0.0,
) -> Iterator[RealTime]:
    """Time lossless decoding of ``new_tokens`` tokens after ``prompts [B, S]``, by every configuration.

    With a ``temperature`` both sides sample at it; at 0 both are greedy.

    Errors: `TidalError` for configurations that the model cannot run, and too little memory.
    """
    batch, context = prompts.shape
    # Enabled once for all: a model that is enabled anew is compiled anew.
    with enable(model, configs[0]) as handle:
        capacity = context + new_tokens + max(map(CapturedRounds.room, configs))
        full = dense_plan(handle.plan)
        dense = DecodeStep(model, configs[0], full, batch=batch, capacity=capacity)
        first = prefill_rows(dense, prompts)
        newest = first.argmax(-1, keepdim=True)
        processing = _processing(temperature) if temperature else None
        wanted, gaps = watched_text(dense, first, new_tokens)
        for config in configs:
            settings, plan, _ = resolve_settings(model, handle.shape, config, {})
            trial = _Trial(model, settings, plan, dense, prompts, new_tokens, temperature)
            trial.warm_up(newest)
            full_ms, lasts, steadies = [], [], []
            for _ in range(repetitions):
                full_ms.append(_time_dense(dense, newest, context, new_tokens, processing))
                text, last, steady = trial.run(newest)
                lasts.append(last)
                steadies.append(steady)
            parted = None if temperature else differences(wanted, text, gaps)
            yield trial.result(summarise(full_ms), summarise(lasts), summarise(steadies), parted)
            trial.rounds.close()


def _processing(temperature: float) -> Processing:
    return Processing(LogitsProcessorList([TemperatureLogitsWarper(temperature)]))


def prefill_rows(step: DecodeStep, prompts: torch.Tensor) -> torch.Tensor:
    """Prefill ``prompts [B, S]`` a few rows at a time; the logits after them ``[B, vocabulary]``."""
    batch, context = prompts.shape
    at_once = max(1, _PREFILLED // context)
    logits = []
    for begin in range(0, batch, at_once):
        rows = slice(begin, min(begin + at_once, batch))
        part = FixedCache(len(step.cache.layers), context)
        output = step.model(prompts[rows], past_key_values=part, use_cache=True, logits_to_keep=1)
        logits.append(output.logits[:, -1].clone())
        for layer, filled in zip(step.cache.layers, part.layers, strict=True):
            if not layer.is_initialized:
                like = (
                    states[:1].expand(batch, -1, -1, -1) for states in (filled.keys, filled.values)
                )
                layer.lazy_initialization(*like)
            layer.keys[rows, :, :context] = filled.keys
            layer.values[rows, :, :context] = filled.values
    step.resume(context)
    return torch.cat(logits)


def _time_dense(
    step: DecodeStep,
    newest: torch.Tensor,
    context: int,
    count: int,
    processing: Processing | None,
) -> float:
    """Milliseconds a token."""
    step.resume(context)
    begin = now(newest.device)
    if processing is None:
        greedy_text(step, newest, count)
    else:
        sampled_text(step, newest, count, processing)
    return 1e3 * (now(newest.device) - begin) / (count - 1)


class _Trial:
    """One configuration, on the cache of the dense step."""

    def __init__(
        self,
        model: PreTrainedModel,
        config: TidalConfig,
        plan: LayerPlan,
        dense: DecodeStep,
        prompts: torch.Tensor,
        new_tokens: int,
        temperature: float,
    ) -> None:
        self.rounds = CapturedRounds(
            model, config, plan, batch=dense.batch, capacity=dense.capacity
        )
        self.rounds.draft.use_cache(dense.cache)
        self.prompts, self.new_tokens = prompts, new_tokens
        self.temperature = temperature
        self.loop: RoundLoop | None = None

    def warm_up(self, newest: torch.Tensor) -> None:
        """Capture every draft length that may be chosen, and decode once."""
        context, chosen = self.prompts.shape[1], self.rounds.config.draft_tokens
        self.rounds.draft.resume(context)
        self.rounds.begin(newest, context + 1, context + self.new_tokens, self._choice())
        for length in LENGTHS if chosen == "auto" else (chosen,):
            self.rounds.prepare(length)
        self.run(newest)

    def _choice(self) -> RoundChoice | None:
        """As a call of generate has it."""
        if not self.temperature:
            return None
        batch, context = self.prompts.shape
        noise = PlaceNoise(batch, self.prompts.device)
        chooser = Chooser(noise, self.new_tokens)
        processing = _processing(self.temperature)
        return RoundChoice(chooser, processing, self.rounds.ends, context)

    def run(self, newest: torch.Tensor) -> tuple[torch.Tensor, float, float]:
        """The text ``[B, n]``, milliseconds a token until the last row is done, and while all run."""
        batch, context = self.prompts.shape
        rows = plain_rows(self.prompts, context + self.new_tokens)
        self.rounds.draft.resume(context)
        loop = self.loop = RoundLoop(rows, self.rounds, self._choice())
        steady = float("nan")
        begin = now(newest.device)
        for _ in loop.run(newest):
            drawn = sum(rows.lengths) - batch * (context + 1)
            if max(rows.lengths) < rows.capacity or steady != steady:
                steady = 1e3 * (time.perf_counter() - begin) * batch / drawn
        last = 1e3 * (now(newest.device) - begin) / (self.new_tokens - 1)
        return rows.sequences()[:, context:].to(newest.device), last, steady

    def result(
        self, full: Any, last: Any, steady: Any, parted: list[dict[str, Any]] | None
    ) -> RealTime:
        """What the repetitions gave; counts are of the last one, and the same for all greedy ones."""
        assert self.loop is not None
        tally, config = self.loop.counts.tally, self.rounds.config
        batch, context = self.prompts.shape
        return RealTime(
            budget=config.budget,
            draft_tokens=config.draft_tokens,
            plan=str(self.rounds.plan),
            context=context,
            batch=batch,
            new_tokens=self.new_tokens,
            temperature=self.temperature,
            full_ms=full.median_ms,
            low_full_ms=full.low_ms,
            high_full_ms=full.high_ms,
            last_ms=last.median_ms,
            low_last_ms=last.low_ms,
            high_last_ms=last.high_ms,
            steady_ms=steady.median_ms,
            acceptance=tally.acceptance,
            tokens_per_verify=tally.tokens_per_verify or 0.0,
            slowest_tokens_per_verify=(self.new_tokens - 1) / tally.rounds,
            kv_share=tally.kv_share or 0.0,
            equal=None if parted is None else batch - len(parted),
            differences=parted or [],
        )
