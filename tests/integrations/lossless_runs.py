"""What the tests of lossless decoding and cache correction share."""

from __future__ import annotations

from typing import Any

import torch
from runs import SMALL
from transformers import DynamicCache, PreTrainedModel, StaticCache

from tidaldecode.demo import MODEL_DIRECTORY
from tidaldecode.eval.haystack import standard_library_text
from tidaldecode.integrations.transformers.loading import load_model

LOSSLESS: dict[str, Any] = {**SMALL, "mode": "lossless"}


def embedded() -> tuple[PreTrainedModel, torch.Tensor]:
    """The embedded model in fp32, and ids ``[n]`` of real text."""
    model, tokenizer = load_model(MODEL_DIRECTORY, device="cpu", dtype="float32")
    return model, torch.tensor(tokenizer(standard_library_text(60_000)).input_ids)


def new_cache(kind: str, model: PreTrainedModel, size: int = 96) -> Any:
    """An empty cache of either kind."""
    if kind == "static":
        return StaticCache(config=model.config, max_cache_len=size)
    return DynamicCache(config=model.config)


def states(cache: Any, length: int | None = None) -> torch.Tensor:
    """Keys and values of all layers, ``[layers, B, Hkv, length, 2 D]``, copied."""
    length = int(cache.get_seq_length()) if length is None else length
    both = [
        torch.cat([layer.keys[:, :, :length], layer.values[:, :, :length]], -1)
        for layer in cache.layers
    ]
    return torch.stack(both).clone()


@torch.no_grad()
def dense_states(model: PreTrainedModel, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """The same after one dense prefill of ``ids [B, n]``, by a model that is not enabled."""
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    output = model(ids, attention_mask=mask, position_ids=positions, use_cache=True)
    return states(output.past_key_values)


def assert_same_states(found: torch.Tensor, wanted: torch.Tensor, mask: torch.Tensor) -> None:
    """Equal within fp32 rounding wherever ``mask [B, n]`` is not 0."""
    assert found.shape == wanted.shape
    valid = mask.bool()[None, :, None, :, None].expand_as(found)
    torch.testing.assert_close(found[valid], wanted[valid], atol=3e-4, rtol=3e-4)


def extended(mask: torch.Tensor, length: int) -> torch.Tensor:
    """``mask`` for ``length`` columns, the new ones valid."""
    return torch.nn.functional.pad(mask, (0, length - mask.shape[1]), value=1)


class Collector:
    """A streamer that keeps what it is given, and may fail at one of the new tokens."""

    def __init__(self, fail_at: int | None = None, error: type[BaseException] = RuntimeError):
        self.columns: list[list[int]] = []
        self.ended = False
        self._fail_at, self._error = fail_at, error
        self._prompt = True

    def put(self, value: torch.Tensor) -> None:
        if self._prompt:
            self._prompt = False
            return
        self.columns.append(value.tolist())
        if len(self.columns) == self._fail_at:
            raise self._error

    def end(self) -> None:
        self.ended = True
