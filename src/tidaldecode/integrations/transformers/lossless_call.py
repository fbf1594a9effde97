"""Which calls of ``generate`` lossless decoding and cache correction take, and how they are reached."""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from transformers.generation.configuration_utils import GenerationMode

from tidaldecode.config import TidalConfig
from tidaldecode.errors import TidalError
from tidaldecode.integrations.transformers.rewrite_cache import check_rewritable

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedModel

_TAKEN = {
    "attention_mask",
    "position_ids",
    "past_key_values",
    "use_cache",
    "logits_to_keep",
    "output_attentions",
    "output_hidden_states",
}


def lossless(
    model: PreTrainedModel,
    choose: Callable[[dict[str, Any]], Callable[..., Any]],
    loops: Sequence[Callable[..., Any]],
) -> Callable[..., Any]:
    """``model.generate`` that decodes losslessly, and refuses what is not greedy or sampled.

    ``choose`` says by which loop a call without one decodes; it may also name one of ``loops``.

    Errors: `TidalError` for another generation mode or another loop.
    """
    generate = model.generate

    @functools.wraps(generate)
    def routed(*args: Any, **kwargs: Any) -> Any:
        call = _by_name(generate, args, kwargs)
        if call.get("custom_generate") not in (None, *loops):
            raise TidalError(
                "custom_generate: expected None in lossless mode, which has a loop of its own, got "
                f"{call['custom_generate']!r}; leave it out or use mode='sparse'"
            )
        _check_generation_mode(model, call, "mode='lossless'")
        call["custom_generate"] = call.get("custom_generate") or choose(call)
        # transformers keeps the streamer from callables.
        if call.get("streamer") is not None:
            call["token_streamer"] = call["streamer"]
        return generate(**call)

    return routed


def correcting(model: PreTrainedModel) -> Callable[..., Any]:
    """``model.generate`` that refuses what would move cached tokens between two corrections.

    Errors: `TidalError` for another mode than greedy or sampled generation, and for another loop.
    """
    generate = model.generate

    @functools.wraps(generate)
    def routed(*args: Any, **kwargs: Any) -> Any:
        call = _by_name(generate, args, kwargs)
        if call.get("custom_generate") is not None:
            raise TidalError(
                "custom_generate: expected None with correct_every, which follows generate's own loop, "
                f"got {call['custom_generate']!r}; leave it out or set correct_every=None"
            )
        _check_generation_mode(model, call, "correct_every")
        # A compiled step would not stop for a correction.
        return generate(**{**call, "disable_compile": True})

    return routed


def _by_name(
    generate: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> dict[str, Any]:
    """All arguments of a call of ``generate``, by name."""
    signature = inspect.signature(generate)
    named = dict(zip(signature.parameters, args, strict=False))
    return {**named, **kwargs}


def _check_generation_mode(model: PreTrainedModel, call: dict[str, Any], what: str) -> None:
    """Errors: `TidalError` unless this call of ``generate`` is greedy or sampled."""
    config = copy.deepcopy(call.get("generation_config") or model.generation_config)
    config.update(**{k: v for k, v in call.items() if hasattr(config, k)})
    mode = config.get_generation_mode(call.get("assistant_model"))
    if mode not in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE):
        raise TidalError(
            f"generate: expected greedy or sampled generation with {what}, got "
            f"{mode.value.replace('_', ' ')}, which moves or drops cached tokens by itself; call "
            "tidaldecode.disable(model) first or generate greedily or by sampling"
        )


def check_call(
    config: TidalConfig,
    input_ids: torch.Tensor,
    generation: GenerationConfig,
    kwargs: dict[str, Any],
    synced_gpus: bool,
) -> None:
    """Errors: `TidalError` for what lossless decoding does not do."""
    if config.mode != "lossless":
        raise TidalError(
            f"mode: expected a model enabled with mode='lossless', got mode={config.mode!r}; leave "
            "custom_generate out"
        )
    cache = kwargs.get("past_key_values")
    others = [name for name in kwargs if name not in _TAKEN and kwargs[name] is not None]
    problems = {
        "synced_gpus": synced_gpus,
        "output_attentions": generation.output_attentions,
        "output_hidden_states": generation.output_hidden_states,
        "use_cache=False": generation.use_cache is False or cache is None,
        "inputs_embeds": not input_ids.numel(),
        **dict.fromkeys(others, True),
    }
    for name, found in problems.items():
        if found:
            raise TidalError(
                "generate: expected a cached generation from token ids alone in lossless mode, got "
                f"{name}; leave it out or use mode='sparse'"
            )
    assert cache is not None
    check_rewritable(cache)
    if int(cache.get_seq_length()) >= input_ids.shape[1]:
        raise TidalError(
            "past_key_values: expected input_ids to hold every token of the cache and at least one "
            f"more, got {input_ids.shape[1]:,} tokens for a cache of {int(cache.get_seq_length()):,}"
        )


def row_places(
    input_ids: torch.Tensor, kwargs: dict[str, Any]
) -> tuple[torch.Tensor, torch.Tensor]:
    """First valid column of every row ``[B]``, and position of a token less its column ``[B]``.

    Errors: `TidalError` for padding elsewhere than on the left, and positions in several dimensions.
    """
    batch, width = input_ids.shape
    mask, positions = kwargs.get("attention_mask"), kwargs.get("position_ids")
    starts = torch.zeros(batch, dtype=torch.long, device=input_ids.device)
    if mask is not None:
        valid = mask.to(input_ids.device).bool()
        starts = valid.int().argmax(-1)
        if valid.shape != input_ids.shape or not torch.equal(valid.sum(-1), width - starts):
            raise TidalError(
                "attention_mask: expected padding on the left only in lossless mode, found it "
                "elsewhere; set the tokenizer's padding_side to 'left'"
            )
    if positions is None:
        return starts, -starts
    if positions.dim() != 2:
        raise TidalError(
            f"position_ids: expected one position for every token in lossless mode, got shape "
            f"{list(positions.shape)}"
        )
    return starts, (positions[:, -1] - (width - 1)).expand(batch).to(starts.device)
