"""The dense step of greedy lossless decoding: verify a draft, accept, and move the rows on.

One CUDA graph on a GPU, which decides what every row keeps, and leaves the rows' new ends where the next
draft begins.
"""

from __future__ import annotations

import torch

from tidaldecode.algorithm.speculation import accept_greedy
from tidaldecode.integrations.transformers.score_step import ScoreStep


class VerifyStep(ScoreStep):
    """Scores a draft, keeps what full attention would have chosen too, and settles the rows.

    Args and errors: as a `ScoreStep`.
    """

    def _step(self) -> None:
        """What is captured: decode newest token and draft densely, accept, move on."""
        self.settle(accept_greedy(self.tokens[:, 1:], self._score()))

    def _moving(self) -> tuple[torch.Tensor, ...]:
        return (self.tokens, self.ends.known, self.ends.newest)
