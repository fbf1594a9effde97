"""Lossless decoding: sparse drafts, one dense forward that verifies them and rewrites their K/V.

A round begins with every row's newest token, whose keys and values nobody has yet. The draft step
decodes it and the drafts after it sparsely; the verification decodes all of them again, densely and
over what the draft wrote. A row keeps its agreed prefix, and its cache ends there: whatever is cached
before a row's end was computed by full attention, at every moment.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import torch
from transformers.generation import (
    GenerateDecoderOnlyOutput,
    LogitsProcessorList,
    StoppingCriteriaList,
)

from tidaldecode.algorithm.chooser import Chooser
from tidaldecode.algorithm.draft_length import DraftLength
from tidaldecode.algorithm.speculation import PlaceNoise, Verdict
from tidaldecode.integrations.transformers.lossless_call import check_call, row_places
from tidaldecode.integrations.transformers.processing import Processing
from tidaldecode.integrations.transformers.ragged_rows import RaggedRows
from tidaldecode.integrations.transformers.rewrite_cache import RewriteCache
from tidaldecode.integrations.transformers.round_tally import RoundTally

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedModel
    from transformers.generation.streamers import BaseStreamer

    from tidaldecode.integrations.transformers.handle import TidalHandle
    from tidaldecode.integrations.transformers.speculative_steps import SpeculativeSteps


def lossless_generate(
    model: PreTrainedModel,
    input_ids: torch.Tensor,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    token_streamer: BaseStreamer | None = None,
    synced_gpus: bool = False,
    **model_kwargs: Any,
) -> torch.Tensor | GenerateDecoderOnlyOutput:
    """``model.generate`` of a model enabled with ``mode="lossless"``, which comes here by itself.

    Greedy output is full attention's; sampled tokens have its distribution. A sampled call takes one
    number from torch's random state, whatever is drafted. After an exception the cache holds what it
    would hold in plain generation at the last settled token, and can be continued.

    Errors: `TidalError` for what `check_call` refuses, and caches that cannot be rewritten.
    """
    from tidaldecode.integrations.transformers.handle import enabled_handle

    handle = enabled_handle(model)
    check_call(handle.config, input_ids, generation_config, model_kwargs, synced_gpus)
    processing = Processing(logits_processor)
    starts, shift = row_places(input_ids, model_kwargs)
    output = model._prefill(input_ids, generation_config, model_kwargs)
    rows = RaggedRows(input_ids, generation_config, stopping_criteria, token_streamer)
    cache = RewriteCache(output.past_key_values, max(rows.capacity - 1, rows.prompt))
    steps = handle.speculative_steps(model, handle, cache, starts, shift)
    loop = _Loop(handle, rows, steps, processing, bool(generation_config.do_sample))
    try:
        loop.run(output.logits[:, -1].float())
    finally:
        cache.release(max(rows.settled - 1, rows.prompt))
        handle.tally.add(loop.counts.tally)
    if rows.streamer is not None:
        rows.streamer.end()
    if not generation_config.return_dict_in_generate:
        return rows.sequences()
    return GenerateDecoderOnlyOutput(
        sequences=rows.sequences(),
        scores=rows.scores,
        logits=rows.logits,
        past_key_values=output.past_key_values,
    )


class _Loop:
    """Rounds of drafting, verifying and accepting."""

    def __init__(
        self,
        handle: TidalHandle,
        rows: RaggedRows,
        steps: SpeculativeSteps,
        processing: Processing,
        sample: bool,
    ) -> None:
        self.rows, self.steps, self.processing = rows, steps, processing
        fixed = handle.config.draft_tokens
        self.length = DraftLength(None if fixed == "auto" else fixed)
        self.counts = RoundTally(handle.reads, rows, steps.starts.tolist())
        noise = PlaceNoise(len(rows.lengths), rows.device) if sample else None
        self._chooser = Chooser(noise, rows.capacity - rows.prompt)

    def run(self, logits: torch.Tensor) -> None:
        """Decode until generate's criteria end it; ``logits [B, V]`` are the prefill's."""
        rows = self.rows
        raw = logits[:, None].to(rows.device)
        scores = self.processing(raw, self._history(0), self._lengths(1))
        nothing = torch.empty(len(raw), 0, dtype=torch.long, device=raw.device)
        first = self._judge(nothing, [], scores, self._places(1)).tokens
        rows.extend(first.tolist(), [1] * len(first), raw, scores)
        while rows.settle():
            self._round()

    def _round(self) -> None:
        """Draft, verify, and let every row take its prefix."""
        rows, begin = self.rows, time.perf_counter()
        length = self._draft_length()
        ends = [known - 1 for known in rows.lengths]
        begins = torch.tensor(ends, device=rows.device)
        longest = max(ends)
        history = self._history(length)
        places = self._places(length + 1)
        tokens = [rows.newest()]
        chances = []
        for index in range(length):
            logits = self.steps.draft(tokens[-1], begins + index, longest + index)
            scores = self.processing(logits[:, None], history, self._lengths(1, index))[:, 0]
            token, drawn_by = self._chooser.draft(scores, places, index)
            chances.append(drawn_by)
            tokens.append(self._pad_ended(token))
            self._note(history, tokens[-1], index)
        drafted = torch.cat(tokens, dim=1)
        middle = self._clock()
        raw = self.steps.verify(drafted, begins, longest)
        scores = self.processing(raw, history, self._lengths(length + 1))
        verdict = self._judge(drafted[:, 1:], chances, scores, places)
        table = torch.cat([verdict.tokens, verdict.counts[:, None]], dim=1).tolist()
        known, running = list(rows.lengths), self.counts.running()
        taken = rows.extend([row[:-1] for row in table], [row[-1] for row in table], raw, scores)
        accepted = [min(table[row][-1] - 1, taken[row]) for row in running]
        self.length.observe(length, accepted, middle - begin, self._clock() - middle)
        self.counts.add(length, running, known, taken, accepted)

    def _draft_length(self) -> int:
        """Tokens to draft now: none where a draft would be full attention, or has no room."""
        length = min(self.length.choose(), self.rows.room() - 1)
        return 0 if self.counts.fits(length) else length

    def _judge(
        self,
        drafted: torch.Tensor,
        chances: list[torch.Tensor | None],
        scores: torch.Tensor,
        places: torch.Tensor,
    ) -> Verdict:
        """What every row keeps of its draft."""
        verdict = self._chooser.judge(drafted, chances, scores, places)
        if not any(self.rows.ended):
            return verdict
        ended = torch.tensor(self.rows.ended, device=verdict.counts.device)
        counts = torch.where(ended, scores.shape[1], verdict.counts)
        return Verdict(self._pad_ended(verdict.tokens), counts)

    def _pad_ended(self, tokens: torch.Tensor) -> torch.Tensor:
        """``tokens [B, n]`` with padding in rows that have ended."""
        if not any(self.rows.ended):
            return tokens
        ended = torch.tensor(self.rows.ended, device=tokens.device)
        return torch.where(ended[:, None], self.rows.pad, tokens)

    def _places(self, count: int) -> torch.Tensor:
        """``[B]``: how many new tokens every row has, 0 for ended ones, of which no more is asked.

        Random numbers are there for ``count`` places from each of them on.
        """
        rows = self.rows
        places = [
            0 if ended else known - rows.prompt
            for known, ended in zip(rows.lengths, rows.ended, strict=True)
        ]
        self._chooser.reserve(max(places) + count)
        return torch.tensor(places, device=rows.device)

    def _lengths(self, count: int, first: int = 0) -> list[list[int]]:
        """For every row, the tokens before each of the next positions, from number ``first`` on."""
        return [
            [min(known + first + at, self.rows.capacity) for at in range(count)]
            for known in self.rows.lengths
        ]

    def _history(self, length: int) -> torch.Tensor:
        """All tokens of every row with room for a draft, where a processor looks at them."""
        rows = self.rows
        if not self.processing.needs_history:
            return rows.ids[:, :1].to(rows.device)
        known = rows.ids[:, : max(rows.lengths)]
        return torch.nn.functional.pad(known, (0, length)).to(rows.device)

    def _note(self, history: torch.Tensor, token: torch.Tensor, index: int) -> None:
        """Put draft number ``index`` behind the known tokens of every row."""
        if self.processing.needs_history:
            places = torch.tensor(self.rows.lengths, device=history.device)[:, None] + index
            history.scatter_(1, places, token)

    def _clock(self) -> float:
        """Seconds, once the device is done where that is to be measured."""
        if self.length.measures and self.rows.device.type == "cuda":
            torch.cuda.synchronize(self.rows.device)
        return time.perf_counter()
