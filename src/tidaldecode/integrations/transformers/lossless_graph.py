"""Lossless decoding in captured rounds: the device drafts, verifies and goes on by itself.

The host follows one round behind, with the rows of the eager loop: it shows tokens to streamers and
stopping criteria, pads rows that have ended, and says when all is done. Processors that look at the
tokens before, records and caches of one's own take the eager loop, `lossless_generate`.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from transformers.generation import (
    GenerateDecoderOnlyOutput,
    GenerationConfig,
    LogitsProcessorList,
    MaxLengthCriteria,
    StoppingCriteriaList,
)

from tidaldecode.algorithm.chooser import Chooser
from tidaldecode.algorithm.draft_length import DraftLength
from tidaldecode.algorithm.speculation import PlaceNoise
from tidaldecode.errors import TidalError
from tidaldecode.integrations.transformers.captured_rounds import CapturedRounds, Round
from tidaldecode.integrations.transformers.lossless import lossless_generate
from tidaldecode.integrations.transformers.lossless_call import check_call
from tidaldecode.integrations.transformers.processing import Processing, beyond_scores
from tidaldecode.integrations.transformers.ragged_rows import RaggedRows
from tidaldecode.integrations.transformers.round_choice import RoundChoice
from tidaldecode.integrations.transformers.round_tally import RoundTally

if TYPE_CHECKING:
    from transformers import PreTrainedModel
    from transformers.generation.streamers import BaseStreamer

    from tidaldecode.integrations.transformers.handle import TidalHandle

LENGTHS = (0, 1, 2, 4, 8, 16)
"""Draft lengths that ``draft_tokens="auto"`` chooses from: each is a graph of its own."""


def captured_generate(
    model: PreTrainedModel,
    input_ids: torch.Tensor,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    token_streamer: BaseStreamer | None = None,
    synced_gpus: bool = False,
    **model_kwargs: Any,
) -> torch.Tensor | GenerateDecoderOnlyOutput:
    """`lossless_generate`, in captured rounds wherever there are such for this call."""
    obstacle = _obstacle(logits_processor, generation_config)
    loop = lossless_generate if obstacle else require_captured
    return loop(
        model,
        input_ids,
        logits_processor,
        stopping_criteria,
        generation_config,
        token_streamer,
        synced_gpus,
        **model_kwargs,
    )


@torch.inference_mode()
def require_captured(
    model: PreTrainedModel,
    input_ids: torch.Tensor,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    token_streamer: BaseStreamer | None = None,
    synced_gpus: bool = False,
    **model_kwargs: Any,
) -> torch.Tensor | GenerateDecoderOnlyOutput:
    """`lossless_generate` in captured rounds; steps are kept for later calls of the batch size.

    Errors: `TidalError` for records and for processors that look at more than the scores, and as
    `lossless_generate`.
    """
    from tidaldecode.integrations.transformers.handle import enabled_handle

    handle = enabled_handle(model)
    check_call(handle.config, input_ids, generation_config, model_kwargs, synced_gpus)
    if obstacle := _obstacle(logits_processor, generation_config):
        raise TidalError(
            "custom_generate: expected a generation without records, and without processors that look "
            f"at more than the scores, got {obstacle}, which captured rounds do not have; leave "
            "custom_generate out"
        )
    # Once for all attempts: a call takes one number from torch's random state.
    noise = PlaceNoise(len(input_ids), model.device) if generation_config.do_sample else None
    mask = model_kwargs.get("attention_mask")
    run = functools.partial(
        _generate,
        handle,
        input_ids,
        noise,
        Processing(logits_processor),
        stopping_criteria,
        generation_config,
        token_streamer,
        None if mask is None else mask.to(model.device),
    )
    sequences = handle.rounds.run(run)
    if not generation_config.return_dict_in_generate:
        return sequences
    return GenerateDecoderOnlyOutput(sequences=sequences, past_key_values=None)


def _obstacle(processors: LogitsProcessorList, config: GenerationConfig) -> str:
    """Why a call cannot be captured, or nothing."""
    if names := beyond_scores(processors):
        return names[0]
    records = config.return_dict_in_generate and (config.output_scores or config.output_logits)
    return "output_scores or output_logits" if records else ""


def _generate(
    handle: TidalHandle,
    input_ids: torch.Tensor,
    noise: PlaceNoise | None,
    processing: Processing,
    criteria: StoppingCriteriaList,
    config: GenerationConfig,
    streamer: BaseStreamer | None,
    mask: torch.Tensor | None,
) -> torch.Tensor:
    """Prefill, rounds, and the sequences."""
    rows = RaggedRows(input_ids, config, criteria, streamer)
    room = CapturedRounds.room(handle.config)
    with handle.rounds.borrow(len(input_ids), rows.capacity + room) as steps:
        logits = steps.prefill(input_ids.to(steps.model.device), mask)
        choice: RoundChoice | None = None
        if noise is not None or processing.processes:
            chooser = Chooser(noise, rows.capacity - rows.prompt)
            choice = RoundChoice(chooser, processing, steps.ends, rows.prompt)
        loop = RoundLoop(rows, steps, choice)
        newest = logits.argmax(-1, keepdim=True) if choice is None else choice.first(logits)
        try:
            for _ in loop.run(newest):
                pass
        finally:
            handle.tally.add(loop.counts.tally)
    if streamer is not None:
        streamer.end()
    return rows.sequences()


def plain_rows(ids: torch.Tensor, limit: int) -> RaggedRows:
    """Rows of ``ids [B, W]`` that go on greedily to ``limit`` tokens, with nobody watching."""
    config = GenerationConfig(max_length=limit)
    config._pad_token_tensor = None
    return RaggedRows(ids, config, StoppingCriteriaList([MaxLengthCriteria(limit)]), None)


class RoundLoop:
    """Lets rounds run on the device, and follows them.

    Args:
        rows: the prompts, of which ``steps`` hold the keys and values.
        choice: how tokens are chosen; by default the likeliest.
    """

    def __init__(
        self, rows: RaggedRows, steps: CapturedRounds, choice: RoundChoice | None = None
    ) -> None:
        self.rows, self.steps, self._choice = rows, steps, choice
        fixed = steps.config.draft_tokens
        self.length = DraftLength(None if fixed == "auto" else fixed, choices=LENGTHS)
        self.counts = RoundTally(steps.reads, rows, steps.draft.starts.tolist())
        self._resting = list(rows.ended)

    def run(self, newest: torch.Tensor) -> Iterator[Round]:
        """Decode after ``newest [B, 1]``, the first new tokens, until generate's criteria end it.

        Yields every round once its tokens are known.
        """
        rows = self.rows
        rows.extend(newest.tolist(), [1] * len(newest))
        self.steps.begin(newest, rows.prompt + 1, rows.capacity, self._choice)
        pending: Round | None = None
        while rows.settle():
            if rows.ended != self._resting:
                self._resting = list(rows.ended)
                self.steps.rest(self._resting)
            current = self._launch() if pending is None else pending
            # The next round does not wait for the host, unless this one may be the last.
            pending = self._launch() if rows.room() > current.length + 1 else None
            self._take(current)
            yield current

    def _launch(self) -> Round:
        length = self.length.choose()
        return self.steps.launch(0 if self.counts.fits(length) else length)

    def _take(self, done: Round) -> None:
        """Give the rows their tokens of a round."""
        rows, width = self.rows, done.length + 1
        tokens, counts = done.read()
        known, running = list(rows.lengths), self.counts.running()
        for row, ended in enumerate(rows.ended):
            if ended:
                tokens[row], counts[row] = [rows.pad] * width, width
        taken = rows.extend(tokens, counts)
        accepted = [min(counts[row] - 1, taken[row]) for row in running]
        self.length.observe(done.length, accepted, *done.seconds())
        self.counts.add(done.length, running, known, taken, accepted)
