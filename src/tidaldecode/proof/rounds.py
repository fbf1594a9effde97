"""Drafts that have nothing to do with the model, for captured rounds: the worst a draft can do."""

from __future__ import annotations

import torch

from tidaldecode.integrations.transformers.captured_rounds import CapturedRounds


class RandomRounds(CapturedRounds):
    """Random tokens take the place of the draft's; the cache is written as by a real draft."""

    def fill_draft(self, drafted: torch.Tensor) -> list[torch.Tensor | None]:
        """Draft into ``drafted [B, length]``, then overwrite it; its chances are all equal."""
        chances = super().fill_draft(drafted)
        vocabulary = self.model.config.get_text_config().vocab_size
        drafted.random_(0, vocabulary)
        return [None if each is None else torch.full_like(each, 1 / vocabulary) for each in chances]
