"""What becomes of a draft once full attention has seen it: pure tensors, and no model.

A round drafts ``k`` tokens for each of ``B`` rows, one dense forward scores them all, and every row
keeps its own agreed prefix and one more token, which full attention chose. Leviathan et al.
(arXiv 2211.17192, Algorithm 1): the kept tokens are distributed exactly as full attention's own.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

DRAFT, ACCEPT, REDRAW = range(3)
"""What the three random numbers of a place are for."""
_BLOCK = 64


class PlaceNoise:
    """Three uniform numbers for every row and place, the same however often a place is drafted.

    Whether a draft is rejected is decided by the numbers of the places before it alone, so those of
    its own place are as good as new for the next draft there, and rejected drafts leave no trace. Takes
    one number from torch's random state.
    """

    def __init__(self, batch: int, device: torch.device) -> None:
        seed = int(torch.randint(2**62, (), dtype=torch.int64))
        self._generator = torch.Generator(device)
        self._generator.manual_seed(seed)
        self._numbers = torch.empty(batch, 0, 3, dtype=torch.float64, device=device)

    def reserve(self, places: int) -> None:
        """Draw the numbers of the first ``places`` places, as far as that is still to be done."""
        batch, have, _ = self._numbers.shape
        device = self._numbers.device
        # Block by block, so that a place's numbers do not depend on how many are reserved at once.
        more = [
            torch.rand(
                (batch, _BLOCK, 3), generator=self._generator, dtype=torch.float64, device=device
            )
            for _ in range(have, places, _BLOCK)
        ]
        if more:
            self._numbers = torch.cat([self._numbers, *more], dim=1)

    def at(self, places: torch.Tensor, first: int, length: int) -> torch.Tensor:
        """``[B, length, 3]`` fp64: those of row ``b`` from place ``places[b] + first`` on.

        ``places [B]``: integers on the device, where the host need not know them. All that is asked
        for must be reserved.
        """
        index = places.long()[:, None] + torch.arange(first, first + length, device=places.device)
        return self._numbers.gather(1, index[..., None].expand(-1, -1, 3))


@dataclass(frozen=True)
class Verdict:
    """The outcome of one verification."""

    tokens: torch.Tensor
    """``[B, k + 1]`` int64: the new tokens of every row; what stands behind its count is void."""
    counts: torch.Tensor
    """``[B]`` int64, 1 to ``k + 1``: accepted drafts, and the token of full attention after them."""


def accept_greedy(drafted: torch.Tensor, choices: torch.Tensor) -> Verdict:
    """Keep drafts for as long as full attention would have chosen the same.

    ``drafted [B, k]``; ``choices [B, k + 1]``: full attention's choice at each place, given the drafts
    before it.
    """
    agrees = drafted == choices[:, : drafted.shape[1]]
    # An accepted draft is full attention's choice, so the choices are the new tokens.
    return Verdict(choices, agrees.long().cumprod(-1).sum(-1) + 1)


def accept_sampled(
    drafted: torch.Tensor,
    draft_probs: torch.Tensor,
    dense_probs: torch.Tensor,
    accept_noise: torch.Tensor,
    redraw_noise: torch.Tensor,
    wanted: torch.Tensor | None = None,
) -> Verdict:
    """Speculative rejection sampling (arXiv 2211.17192, section 2.3).

    A draft ``x`` is kept with probability ``min(1, p(x) / q(x))``; the first that is not kept is
    replaced by a draw from ``norm(max(p - q, 0))``; where all are kept, one more is drawn from ``p``.

    Args:
        drafted: ``[B, k]``, each drawn from its ``draft_probs``.
        draft_probs: ``[B, k, V]``, the ``q`` of every draft.
        dense_probs: ``[B, k + 1, V]``, full attention's ``p`` at each place.
        accept_noise, redraw_noise: ``[B, k]`` and ``[B, k + 1]``, uniform in [0, 1) and independent of
            the draws of the drafts.
        wanted: ``[B]`` int64, 0 to ``k``: what a row drafted behind so many tokens counts as never
            drafted; by default all is wanted.
    """
    batch, length = drafted.shape
    at_draft = drafted[..., None]
    dense = dense_probs[:, :length].gather(-1, at_draft).squeeze(-1)
    draft = draft_probs.gather(-1, at_draft).squeeze(-1)
    kept = (accept_noise * draft < dense).long().cumprod(-1).sum(-1)
    most = torch.full_like(kept, length) if wanted is None else wanted
    kept = torch.minimum(kept, most)
    rows = torch.arange(batch, device=drafted.device)
    residual = chance = dense_probs[rows, kept]
    if length:
        # Past the last draft q is nothing, and the residual is p itself.
        q = draft_probs[rows, kept.clamp(max=length - 1)]
        residual = torch.where((kept < most)[:, None], (chance - q).clamp(min=0), chance)
    # Only rounding can reject a draft where p equals q; p is then right.
    residual = torch.where(residual.sum(-1, keepdim=True) > 0, residual, chance)
    last = draw(residual, redraw_noise[rows, kept])
    tokens = torch.cat([drafted, last[:, None]], dim=1)
    tokens[rows, kept] = last
    return Verdict(tokens, kept + 1)


def draw(weights: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """One index for each row of ``weights [..., V]`` (not negative), by inverting their running sum.

    ``noise [...]``, uniform in [0, 1), decides alone: the same noise draws the same index. An index
    of weight 0 is never drawn.
    """
    sums = weights.double().cumsum(-1)
    below = noise.double()[..., None] * sums[..., -1:]
    index = torch.searchsorted(sums, below, right=True).squeeze(-1)
    return index.clamp(max=weights.shape[-1] - 1)
