"""How the tokens of a lossless generation are chosen, greedily or by sampling: no model, and no host.

Rows may stand at different places, which the device alone need know: nothing here waits for it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from tidaldecode.algorithm.speculation import (
    ACCEPT,
    DRAFT,
    REDRAW,
    PlaceNoise,
    Verdict,
    accept_greedy,
    accept_sampled,
    draw,
)


class Chooser:
    """Chooses drafts, and what is kept of them.

    A *place* is a row's number of new tokens so far, ``places [B]`` integers of the device.

    Args:
        noise: draws the tokens; None: the likeliest are chosen.
        new_tokens: most tokens that a row is given. A row's last is full attention's own, whatever
            was drafted for it: a text does not depend on how far drafts reach behind its limit.
    """

    def __init__(self, noise: PlaceNoise | None, new_tokens: int) -> None:
        self._noise = noise
        self._last = new_tokens - 1

    def reserve(self, places: int) -> None:
        """Draw the random numbers of the first ``places`` places, which must be done before."""
        if self._noise is not None:
            self._noise.reserve(places)

    def draft(
        self, scores: torch.Tensor, places: torch.Tensor, index: int
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Draft number ``index`` of every row ``[B, 1]``, and the chances ``[B, V]`` it was drawn by.

        ``scores [B, V]``: processed logits. Where nothing is drawn, there are no chances.
        """
        if self._noise is None:
            return scores.argmax(-1, keepdim=True), None
        chances = scores.softmax(-1)
        noise = self._noise.at(places, index, 1)[:, 0, DRAFT]
        return draw(chances, noise)[:, None], chances

    def judge(
        self,
        drafted: torch.Tensor,
        chances: Sequence[torch.Tensor | None],
        scores: torch.Tensor,
        places: torch.Tensor,
    ) -> Verdict:
        """What every row keeps of ``drafted [B, k]``, and the token after it.

        ``chances``: as the ``k`` drafts had them; ``scores [B, k + 1, V]``: full attention's processed
        logits at each place, given the drafts before it.
        """
        if self._noise is None:
            return accept_greedy(drafted, scores.argmax(-1))
        length = drafted.shape[1]
        dense = scores.softmax(-1)
        drawn_by = [each for each in chances if each is not None]
        noise = self._noise.at(places, 0, length + 1)
        return accept_sampled(
            drafted,
            torch.stack(drawn_by, dim=1) if drawn_by else dense[:, :0],
            dense,
            noise[:, :length, ACCEPT],
            noise[..., REDRAW],
            wanted=(self._last - places.long()).clamp(min=0, max=length),
        )
