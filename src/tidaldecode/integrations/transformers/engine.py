"""A transformers model as an engine: dense prefill, then token-by-token decoding by any method."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch
from transformers import DynamicCache

from tidaldecode.config import TidalConfig
from tidaldecode.engine import OnScores, Script, Step
from tidaldecode.errors import TidalError
from tidaldecode.integrations.transformers.handle import enable

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class TransformersEngine:
    """One batch at a time on a transformers decoder; the cache of the prefill is kept."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self._cache: DynamicCache | None = None
        self._lengths: list[int] = []

    @torch.inference_mode()
    def prefill(self, rows: Sequence[Sequence[int]]) -> None:
        """Prefill ``rows`` with the host's own attention, shorter ones padded on the left.

        Errors: `TidalError` for an empty batch or row.
        """
        self._lengths = [len(row) for row in rows]
        if not rows or not min(self._lengths):
            raise TidalError("prefill: expected at least one row and a token in each, got fewer")
        longest = max(self._lengths)
        padded = [[0] * (longest - len(row)) + list(row) for row in rows]
        # Without the model's configuration: every layer then keeps all tokens and can be cropped.
        cache = DynamicCache()
        self.model(
            self._tensor(padded),
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
            **self._padding(longest, longest),
        )
        self._cache = cache

    @torch.inference_mode()
    def steps(
        self,
        scripts: Sequence[Script],
        config: TidalConfig | None,
        on_scores: OnScores | None = None,
    ) -> Iterator[Step]:
        """Decode steps after the prefill; see `tidaldecode.engine.Engine.steps`.

        Errors: `TidalError` when nothing was prefilled, the scripts do not match the batch or start
        with a free token, the configuration is lossless, or the model gives NaN.
        """
        if self._cache is None:
            raise TidalError("steps: expected a prefilled batch, found none; call prefill first")
        if len(scripts) != len(self._lengths) or any(not s or s[0] is None for s in scripts):
            raise TidalError(
                f"scripts: expected one for each of {len(self._lengths)} rows, with a token to begin "
                f"with, got {len(scripts)}"
            )
        if config is not None and config.mode != "sparse":
            raise TidalError(
                f"mode: expected 'sparse' where tokens are fed one by one, got {config.mode!r}, whose "
                "output is full attention's; evaluate method dense instead"
            )
        cache, length = self._cache, self._cache.get_seq_length()
        tokens = [0] * len(scripts)
        try:
            with enable(self.model, config) if config is not None else nullcontext() as handle:
                if handle is not None:
                    handle.on_scores = on_scores
                for index in range(max(map(len, scripts))):
                    tokens = [_next(s, index, t) for s, t in zip(scripts, tokens, strict=True)]
                    begin = time.perf_counter()
                    output = self.model(
                        self._tensor([[token] for token in tokens]),
                        past_key_values=cache,
                        **self._padding(length + index + 1, 1),
                    )
                    logits = output.logits[:, -1].float()
                    tokens = logits.argmax(-1).tolist()
                    elapsed = time.perf_counter() - begin
                    if logits.isnan().any():
                        raise TidalError(
                            f"logits: expected numbers, got NaN at decode step {index + 1}; the "
                            "model or its dtype is broken: try --dtype float32"
                        )
                    yield Step(logits, tokens, elapsed)
        finally:
            # A negative count, tokens to remove, is what every supported transformers understands.
            if (added := cache.get_seq_length() - length) > 0:
                cache.crop(-added)

    def _padding(self, length: int, queries: int) -> dict[str, Any]:
        """Mask and positions of the last ``queries`` of ``length`` tokens; none if no row is padded."""
        longest = max(self._lengths)
        if min(self._lengths) == longest:
            return {}
        starts = longest - torch.tensor(self._lengths, device=self.model.device)[:, None]
        index = torch.arange(length, device=self.model.device)[None]
        positions = (index - starts).clamp(min=0)
        return {
            "attention_mask": (index >= starts).long(),
            "position_ids": positions[:, length - queries :],
        }

    def _tensor(self, ids: Sequence[Sequence[int]]) -> torch.Tensor:
        return torch.tensor(ids, device=self.model.device)


def _next(script: Script, index: int, greedy: int) -> int:
    """The token to feed at step ``index``."""
    forced = script[index] if index < len(script) else None
    return greedy if forced is None else forced
