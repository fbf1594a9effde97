"""How captured rounds choose tokens where a graph cannot: by drawing, or from processed logits.

The graphs know nothing of a call's settings. They leave logits, and what is done with these follows
every replay as ordinary operations, which the device runs in turn while the host goes on.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from tidaldecode.algorithm.chooser import Chooser
from tidaldecode.algorithm.speculation import Verdict
from tidaldecode.integrations.transformers.processing import Processing
from tidaldecode.integrations.transformers.row_ends import RowEnds


class RoundChoice:
    """Chooses the tokens of one call of generate, wherever the device stands in it.

    Args:
        processing: the call's processors, which must do without history.
        ends: the rows.
        prompt: columns of the prompts.
    """

    def __init__(
        self, chooser: Chooser, processing: Processing, ends: RowEnds, prompt: int
    ) -> None:
        self._chooser, self._processing = chooser, processing
        self._ends, self._prompt = ends, prompt

    def reserve(self, limit: int) -> None:
        """Draw the random numbers of all columns below ``limit``, which must be done before."""
        self._chooser.reserve(limit - self._prompt)

    def first(self, logits: torch.Tensor) -> torch.Tensor:
        """The tokens ``[B, 1]`` after the prompts, of which ``logits [B, V]`` are the prefill's."""
        self.reserve(self._prompt + 1)
        places = torch.zeros_like(self._ends.known)
        nothing = self._ends.newest[:, :0]
        return self._chooser.judge(nothing, [], self._scores(logits[:, None]), places).tokens

    def draft(self, logits: torch.Tensor, index: int) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Draft number ``index`` of every row after its newest token, as a `Chooser` gives it."""
        return self._chooser.draft(self._scores(logits[:, None])[:, 0], self._places(), index)

    def judge(
        self,
        drafted: torch.Tensor,
        chances: Sequence[torch.Tensor | None],
        logits: torch.Tensor,
    ) -> Verdict:
        """What every row keeps of ``drafted [B, k]``; ``logits [B, k + 1, V]`` are a verification's."""
        return self._chooser.judge(drafted, chances, self._scores(logits), self._places())

    def _places(self) -> torch.Tensor:
        return self._ends.known - self._prompt

    def _scores(self, logits: torch.Tensor) -> torch.Tensor:
        return self._processing(logits.float(), self._ends.newest, [])
