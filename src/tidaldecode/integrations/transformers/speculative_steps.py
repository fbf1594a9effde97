"""The two forwards of lossless decoding, on one cache: a sparse step for drafts, a dense one for all.

Both write the keys and values of what they are fed at each row's own end; the dense one overwrites
those of the drafts. They run eagerly here; `captured_rounds` has them on the device.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from tidaldecode.algorithm import DecodeState, HeldSelections
from tidaldecode.algorithm.draft_length import longest_draft
from tidaldecode.integrations.transformers.attention import KEYWORD, Forward
from tidaldecode.integrations.transformers.rewrite_cache import RewriteCache

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from tidaldecode.integrations.transformers.handle import TidalHandle


class SpeculativeSteps:
    """Drafts and verifies.

    Args:
        cache: holds every row's tokens as full attention has them.
        starts: ``[B]`` int64: first valid column of every row.
        shift: ``[B]`` int64: position of a token less its column.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        handle: TidalHandle,
        cache: RewriteCache,
        starts: torch.Tensor,
        shift: torch.Tensor,
    ) -> None:
        self._model, self._handle, self.cache = model, handle, cache
        self.starts, self._shift = starts.to(model.device), shift.to(model.device)
        config, plan = handle.config, handle.plan
        self._held: HeldSelections | None = None
        if HeldSelections.wanted(config, plan):
            self._held = HeldSelections(plan, longest_draft(config.draft_tokens))
        self._drafted = 0

    def draft(self, tokens: torch.Tensor, begins: torch.Tensor, longest: int) -> torch.Tensor:
        """Logits ``[B, V]`` fp32 after ``tokens [B, 1]``, by sparse attention.

        ``begins [B]`` int64: the columns that the tokens go to, ``longest`` the largest of them.
        """
        handle = self._handle
        forward = Forward(handle.config, handle.plan, handle.on_scores)
        width = min(longest + 1, self.cache.limit)
        lengths = (begins + 1).clamp(max=width).int().to(self.starts.device)
        forward.state = DecodeState.begin(
            handle.config, handle.plan, lengths, self.starts.int(), width=width
        )
        forward.state.on_scores = handle.on_scores
        self._select_once(forward.state)
        return self._run(forward, tokens, begins, longest)[:, -1]

    def verify(self, tokens: torch.Tensor, begins: torch.Tensor, longest: int) -> torch.Tensor:
        """Logits ``[B, n, V]`` fp32 after each of ``tokens [B, n]``, by full attention; ends a draft."""
        self._drafted = 0
        forward = Forward(self._handle.config, self._handle.plan, dense=True)
        return self._run(forward, tokens, begins, longest)

    def _select_once(self, state: DecodeState) -> None:
        """Let the first step of a draft select for all, where that is wanted."""
        held = self._held
        if held is not None and self._drafted == 0:
            state.holds = held
        elif held is not None:
            held.grow(state.seq_lens)
            state.follows = held
        self._drafted += 1

    def _run(
        self, forward: Forward, tokens: torch.Tensor, begins: torch.Tensor, longest: int
    ) -> torch.Tensor:
        device = self.starts.device
        window = self.cache.open(begins.to(device), tokens.shape[1], longest)
        options: dict[str, Any] = {KEYWORD: forward}
        output = self._model(
            tokens.to(device),
            past_key_values=self.cache,
            attention_mask=window.mask(self.starts),
            position_ids=window.columns + self._shift[:, None],
            use_cache=True,
            **options,
        )
        logits: torch.Tensor = output.logits
        return logits.float().to(tokens.device)
