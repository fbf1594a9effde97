"""graph_generate: a decoding loop for `model.generate(custom_generate=...)` around `DecodeStep`.

Greedy and sampled decoding with generate's own logits processors and stopping criteria. Where a greedy
run stops at end-of-text tokens and lengths only, the next token never leaves the device, and the host
looks once every `CHECK_EVERY` tokens whether all rows are done.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from transformers.generation import (
    EosTokenCriteria,
    GenerateDecoderOnlyOutput,
    LogitsProcessorList,
    MaxLengthCriteria,
    StoppingCriteriaList,
)
from transformers.generation.configuration_utils import GenerationMode

from tidaldecode.algorithm import Role
from tidaldecode.errors import TidalError
from tidaldecode.integrations.transformers.decode_step import DecodeStep
from tidaldecode.kernels.dispatch import resolve_backend

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedModel
    from transformers.generation.streamers import BaseStreamer

    from tidaldecode.integrations.transformers.handle import TidalHandle

CHECK_EVERY = 16
"""Tokens between two looks of the host at what was decoded."""


@torch.inference_mode()
def graph_generate(
    model: PreTrainedModel,
    input_ids: torch.Tensor,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    token_streamer: BaseStreamer | None = None,
    synced_gpus: bool = False,
    **model_kwargs: Any,
) -> torch.Tensor | GenerateDecoderOnlyOutput:
    """``model.generate(**inputs, custom_generate=graph_generate)`` of an enabled model.

    On a GPU every decode step is one CUDA graph; the graph and its cache are kept for later calls of
    the same batch size. Results are those of plain ``generate``. transformers keeps ``streamer`` from
    callables, so new tokens go to ``token_streamer``.

    In lossless mode drafts and verifications are captured (`lossless_graph`).

    Errors: `TidalError` for a model that is not enabled, a cache to continue, several GPUs in step,
    returned attentions or hidden states, and whatever a `DecodeStep` refuses.
    """
    from tidaldecode.integrations.transformers.handle import enabled_handle

    handle = enabled_handle(model)
    _refuse(generation_config, model_kwargs, synced_gpus)
    if handle.on_scores is not None:
        raise TidalError(
            "on_scores: expected None, since a captured step shows its scores to nobody, got a "
            "function; leave custom_generate out"
        )
    if handle.config.mode == "lossless":
        from tidaldecode.integrations.transformers.lossless_graph import require_captured

        return require_captured(
            model,
            input_ids,
            logits_processor,
            stopping_criteria,
            generation_config,
            token_streamer,
            synced_gpus,
            **model_kwargs,
        )
    run = functools.partial(
        _generate,
        handle,
        input_ids,
        logits_processor,
        stopping_criteria,
        generation_config,
        token_streamer,
        model_kwargs.get("attention_mask"),
    )
    return handle.steps.run(run)


def _generate(
    handle: TidalHandle,
    input_ids: torch.Tensor,
    processors: LogitsProcessorList,
    criteria: StoppingCriteriaList,
    config: GenerationConfig,
    streamer: BaseStreamer | None,
    mask: torch.Tensor | None,
) -> torch.Tensor | GenerateDecoderOnlyOutput:
    """Prefill, and the loop that suits."""
    with handle.steps.borrow(len(input_ids), config.max_length) as step:
        device = step.tokens.device
        logits = step.prefill(input_ids.to(device), None if mask is None else mask.to(device))
        loop = _Loop(step, logits, input_ids, config, criteria, streamer)
        plain = not processors and streamer is None and not loop.records
        known = all(isinstance(c, (MaxLengthCriteria, EosTokenCriteria)) for c in criteria)
        if not config.do_sample and plain and known:
            return loop.greedy(config.max_length - input_ids.shape[1])
        return loop.general(processors, config.do_sample)


def can_graph(model: PreTrainedModel, handle: TidalHandle) -> bool:
    """Whether generate's decode steps can be captured: one GPU, Triton kernels, and no page bounds."""
    spread = getattr(model, "hf_device_map", None)
    if model.device.type != "cuda" or (spread is not None and len(set(spread.values())) > 1):
        return False
    shape = handle.shape
    group = shape.query_heads // shape.kv_heads
    backend = resolve_backend(
        handle.config.backend,
        model.device,
        dtype=model.dtype,
        head_dim=shape.head_dim,
        group=group,
    )
    # The PyTorch kernels ask the device for lengths, and so do page bounds.
    return backend == "triton" and Role.ESTIMATE not in handle.plan.roles


def graphed(model: PreTrainedModel, handle: TidalHandle) -> Callable[..., Any]:
    """``model.generate`` that takes `graph_generate` wherever it gives the same, and else itself."""
    generate = model.generate

    @functools.wraps(generate)
    def routed(*args: Any, **kwargs: Any) -> Any:
        if handle.on_scores is not None or not suits(model, args, kwargs):
            return generate(*args, **kwargs)
        streamer = kwargs.get("streamer")
        extra = {} if streamer is None else {"token_streamer": streamer}
        return generate(*args, custom_generate=graph_generate, **extra, **kwargs)

    return routed


_UNSUITED = (
    "custom_generate assistant_model past_key_values inputs_embeds cache_implementation "
    "prefill_chunk_size synced_gpus negative_prompt_ids"
).split()


def suits(model: PreTrainedModel, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether `graph_generate` can serve this call of ``model.generate``."""
    if len(args) > 1 or any(kwargs.get(name) is not None for name in _UNSUITED):
        return False
    config = copy.deepcopy(kwargs.get("generation_config") or model.generation_config)
    config.update(**{k: v for k, v in kwargs.items() if hasattr(config, k)})
    mode = config.get_generation_mode()
    return (
        mode in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE)
        and config.use_cache is not False
        # The cache that plain generate returns can be continued; ours serves the next call.
        and not config.return_dict_in_generate
        and not any(getattr(config, name, None) is not None for name in _UNSUITED)
    )


class _Loop:
    """What both loops share: the rows, the ends of rows, and the result."""

    def __init__(
        self,
        step: DecodeStep,
        logits: torch.Tensor,
        input_ids: torch.Tensor,
        config: GenerationConfig,
        criteria: StoppingCriteriaList,
        streamer: BaseStreamer | None,
    ) -> None:
        self.step, self.logits, self.ids = step, logits, input_ids
        self.criteria, self.streamer = criteria, streamer
        self.pad = config._pad_token_tensor
        self.eos: torch.Tensor | None = next(
            (c.eos_token_id for c in criteria if hasattr(c, "eos_token_id")), None
        )
        self.returns_output = bool(config.return_dict_in_generate)
        self.records = self.returns_output and bool(config.output_scores or config.output_logits)
        self.scores: tuple[torch.Tensor, ...] | None = () if config.output_scores else None
        self.raw_logits: tuple[torch.Tensor, ...] | None = () if config.output_logits else None

    def greedy(self, new_tokens: int) -> torch.Tensor | GenerateDecoderOnlyOutput:
        """Most likely tokens, chosen on the device, up to ``new_tokens`` of them."""
        step, batch = self.step, len(self.ids)
        drawn = torch.empty(batch, new_tokens, dtype=torch.int64, device=step.tokens.device)
        step.tokens.copy_(self.logits.argmax(-1, keepdim=True))
        drawn[:, 0] = step.tokens[:, 0]
        count = 1
        while count < new_tokens and not self._all_ended(drawn[:, :count]):
            self._rest(self._ended(drawn[:, :count])[:, -1])
            for _ in range(min(CHECK_EVERY, new_tokens - count)):
                step.run()
                drawn[:, count] = step.tokens[:, 0]
                count += 1
        return self._result(torch.cat([self.ids, self._padded(drawn[:, :count])], dim=-1))

    def general(
        self, processors: LogitsProcessorList, sample: bool
    ) -> torch.Tensor | GenerateDecoderOnlyOutput:
        """Any processors and criteria, applied on every token as generate does."""
        ids, logits = self.ids, self.logits
        unfinished = torch.ones(len(ids), dtype=torch.long, device=ids.device)
        while True:
            raw = logits.to(copy=True, dtype=torch.float32, device=ids.device)
            scores = processors(ids, raw)
            if self.scores is not None:
                self.scores += (scores,)
            if self.raw_logits is not None:
                self.raw_logits += (raw,)
            if sample:
                drawn = torch.multinomial(scores.softmax(-1), num_samples=1).squeeze(1)
            else:
                drawn = scores.argmax(-1)
            if self.eos is not None:
                drawn = drawn * unfinished + self.pad * (1 - unfinished)
            ids = torch.cat([ids, drawn[:, None]], dim=-1)
            if self.streamer is not None:
                self.streamer.put(drawn.cpu())
            unfinished = unfinished & ~self.criteria(ids, self.scores)
            if not unfinished.any():
                break
            if (ids.shape[1] - self.ids.shape[1]) % CHECK_EVERY == 0:
                self._rest(unfinished == 0)
            self.step.tokens.copy_(drawn[:, None])
            logits = self.step.run()
        if self.streamer is not None:
            self.streamer.end()
        return self._result(ids)

    def _rest(self, ended: torch.Tensor) -> None:
        """Spare the rows that have ended ``[B]``, but where their logits are recorded."""
        if self.eos is not None and not self.records:
            self.step.rest(ended.to(self.step.tokens.device))

    def _ended(self, drawn: torch.Tensor) -> torch.Tensor:
        """``[B, n]``: whether a row has ended before or with each of its tokens."""
        if self.eos is None:
            return torch.zeros_like(drawn, dtype=torch.bool)
        return torch.isin(drawn, self.eos.to(drawn.device)).cumsum(-1) > 0

    def _all_ended(self, drawn: torch.Tensor) -> bool:
        return self.eos is not None and bool(self._ended(drawn)[:, -1].all())

    def _padded(self, drawn: torch.Tensor) -> torch.Tensor:
        """Tokens up to where the last row ends; padding behind the end of the others."""
        if self.eos is None:
            return drawn.to(self.ids.device)
        ended = self._ended(drawn)
        # All rows have ended with column `ended.all(0)`'s first True; nothing is kept behind it.
        needed = min(drawn.shape[1], int((~ended.all(0)).sum()) + 1)
        behind = torch.nn.functional.pad(ended, (1, 0))[:, :-1]
        pad = self.pad.to(drawn.device)
        return torch.where(behind, pad, drawn)[:, :needed].to(self.ids.device)

    def _result(self, ids: torch.Tensor) -> torch.Tensor | GenerateDecoderOnlyOutput:
        if not self.returns_output:
            return ids
        return GenerateDecoderOnlyOutput(
            sequences=ids, scores=self.scores, logits=self.raw_logits, past_key_values=None
        )


def _refuse(config: GenerationConfig, kwargs: dict[str, Any], synced_gpus: bool) -> None:
    """Errors: `TidalError` for what the loop does not do."""
    cache = kwargs.get("past_key_values")
    problems = {
        "past_key_values": cache is not None and cache.get_seq_length() > 0,
        "synced_gpus": synced_gpus,
        "output_attentions": config.output_attentions,
        "output_hidden_states": config.output_hidden_states,
        "num_beams": config.num_beams not in (1, None),
        "use_cache": config.use_cache is False,
        "inputs_embeds": kwargs.get("inputs_embeds") is not None,
    }
    for name, found in problems.items():
        if found:
            raise TidalError(
                f"{name}: expected a plain greedy or sampled generation from token ids, got "
                f"{name}, which graph_generate does not have; leave custom_generate out"
            )
