"""A transformers model as an engine: dense prefill, then token-by-token decoding by any method."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING

import torch
from transformers import DynamicCache

from tidaldecode.config import TidalConfig
from tidaldecode.errors import TidalError
from tidaldecode.integrations.transformers.handle import enable

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class TransformersEngine:
    """One sequence at a time on a transformers decoder; the cache of the prefill is kept."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self._cache: DynamicCache | None = None

    @torch.inference_mode()
    def prefill(self, ids: Sequence[int]) -> None:
        """Prefill ``ids`` with the host's own attention; replaces the sequence before."""
        cache = DynamicCache(config=self.model.config)
        self.model(self._tensor(ids), past_key_values=cache, use_cache=True, logits_to_keep=1)
        self._cache = cache

    @torch.inference_mode()
    def steps(
        self, forced: Sequence[int], new_tokens: int, config: TidalConfig | None
    ) -> Iterator[tuple[torch.Tensor, float]]:
        """Decode steps after the prefill: logits ``[vocabulary]`` fp32 and seconds of each.

        First ``forced`` is fed, one token a step; every further step feeds the likeliest token. The
        last logits are those that give the last of ``new_tokens``. The prefilled sequence is left as
        it was, also when the caller stops early.

        Errors: `TidalError` when nothing was prefilled or nothing is forced.
        """
        if self._cache is None or not forced:
            raise TidalError("engine: expected a prefilled sequence and at least one forced token")
        length = self._cache.get_seq_length()
        last_step = len(forced) + new_tokens - 1
        token = 0
        try:
            with enable(self.model, config) if config is not None else nullcontext():
                for step in range(last_step):
                    token = forced[step] if step < len(forced) else token
                    begin = time.perf_counter()
                    output = self.model(self._tensor([token]), past_key_values=self._cache)
                    logits = output.logits[0, -1].float()
                    token = int(logits.argmax())
                    yield logits, time.perf_counter() - begin
        finally:
            # A negative count, tokens to remove, is what every supported transformers understands.
            if (added := self._cache.get_seq_length() - length) > 0:
                self._cache.crop(-added)

    def decode(
        self, forced: Sequence[int], new_tokens: int, config: TidalConfig | None
    ) -> tuple[list[int], list[float]]:
        """`steps`, reduced to the ``new_tokens`` decoded tokens and the seconds of every step."""
        tokens, seconds = [], []
        for logits, elapsed in self.steps(forced, new_tokens, config):
            tokens.append(int(logits.argmax()))
            seconds.append(elapsed)
        return tokens[len(forced) - 1 :], seconds

    def _tensor(self, ids: Sequence[int]) -> torch.Tensor:
        return torch.tensor([list(ids)], device=self.model.device)
