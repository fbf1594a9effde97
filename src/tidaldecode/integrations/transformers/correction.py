"""Cache correction on an enabled model: watches its forwards, and recomputes what they polluted.

Every cache has its own block of polluted tokens, which lives as long as the cache. Whoever decodes
(``generate``, a loop of the user's own, the evaluation) has its cache corrected alike.
"""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any

import torch
from transformers.cache_utils import Cache

from tidaldecode.algorithm import LayerPlan
from tidaldecode.algorithm.correction import PollutedTokens
from tidaldecode.config import TidalConfig
from tidaldecode.errors import TidalError
from tidaldecode.integrations.transformers.attention import KEYWORD, Forward
from tidaldecode.integrations.transformers.rewrite_cache import RewriteCache, check_rewritable

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Corrector:
    """Corrects the caches that ``decoder`` decodes with, every ``config.correct_every`` tokens."""

    def __init__(self, decoder: PreTrainedModel, config: TidalConfig, plan: LayerPlan) -> None:
        self._decoder, self._config, self._plan = decoder, config, plan
        self._blocks: weakref.WeakKeyDictionary[Cache, PollutedTokens] = weakref.WeakKeyDictionary()
        self.corrected = 0
        """Columns recomputed so far."""

    def before(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Correct a cache before several tokens at once are built upon it densely.

        Errors: `TidalError` for a cache that cannot be rewritten.
        """
        cache = kwargs.get("past_key_values")
        if cache is None:
            return
        check_rewritable(cache)
        if _inputs(args, kwargs).shape[1] > 1 and cache in self._blocks:
            self._blocks[cache].cut(int(cache.get_seq_length()))
            self.correct(cache)

    def after(self, args: tuple[Any, ...], kwargs: dict[str, Any], forward: Forward) -> None:
        """Note the token of a sparse step, and correct the block once it is full."""
        cache = kwargs.get("past_key_values")
        sparse = forward.state is not None and not forward.fits
        if cache is None or not (sparse or self._blocks.get(cache)):
            return
        inputs = _inputs(args, kwargs)
        if inputs.shape[1] != 1:
            return
        column = int(cache.get_seq_length()) - 1
        positions = kwargs.get("position_ids")
        if positions is None:
            positions = torch.full((1, 1), column, device=inputs.device)
        block = self._blocks.setdefault(cache, PollutedTokens())
        starts = None if forward.state is None else forward.state.starts
        block.add(column, inputs, positions.expand(len(inputs), -1), starts)
        assert self._config.correct_every is not None
        if len(block) >= self._config.correct_every:
            self.correct(cache)

    def correct(self, cache: Cache | None = None) -> int:
        """Correct one cache, or all; how many tokens of a row were recomputed.

        Errors: `TidalError` for a cache that was changed by other means.
        """
        caches = list(self._blocks) if cache is None else [cache]
        count = 0
        for one in caches:
            block = self._blocks.get(one)
            if block is not None:
                block.cut(int(one.get_seq_length()))
                count += block.correct(lambda tokens, one=one: self._recompute(one, tokens))  # type: ignore[misc]
        self.corrected += count
        return count

    def _recompute(self, cache: Cache, block: PollutedTokens) -> None:
        """One dense forward over the block, which overwrites its keys and values in place."""
        inputs = torch.cat(block.inputs, dim=1)
        batch, length = inputs.shape[:2]
        if int(cache.get_seq_length()) != block.end:
            raise TidalError(
                f"cache: expected {block.end:,} tokens, the last {length} of them to be corrected, got "
                f"{int(cache.get_seq_length()):,}; call handle.correct() before a cache is changed by "
                "other means"
            )
        starts = torch.zeros(batch, dtype=torch.int64, device=inputs.device)
        if block.starts is not None:
            starts = block.starts.to(starts)
        with _like(cache):
            over = RewriteCache(cache)
            window = over.open(torch.full_like(starts, block.begin), length, block.begin)
            forward = Forward(self._config, self._plan, dense=True)
            feed = {"inputs_embeds" if inputs.is_floating_point() else "input_ids": inputs}
            self._decoder(
                **feed,
                past_key_values=over,
                attention_mask=window.mask(starts),
                position_ids=torch.cat(block.positions, dim=1),
                use_cache=True,
                **{KEYWORD: forward},
            )


def _inputs(args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
    """What the decoder is fed: ids ``[B, n]`` or embeddings ``[B, n, hidden size]``."""
    ids = args[0] if args else kwargs.get("input_ids")
    found: torch.Tensor = kwargs["inputs_embeds"] if ids is None else ids
    return found


def _like(cache: Cache) -> Any:
    """The grad mode in which the cache's tensors may be written."""
    made_in_inference = any(layer.keys.is_inference() for layer in cache.layers)
    return torch.inference_mode() if made_in_inference else torch.no_grad()
