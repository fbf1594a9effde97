"""The little that evaluation needs of a host: prefill once, then decode it by any method."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from tidaldecode.config import TidalConfig

if TYPE_CHECKING:
    import torch

OnScores = Callable[[int, "torch.Tensor"], None]
"""Called with a selection layer's number and its token scores ``[B, R, W]``."""
Script = Sequence[int | None]
"""What a row is fed after the prefill, one token a step; None: the likeliest token so far."""


@dataclass(frozen=True)
class Step:
    """One decode step of a batch."""

    logits: torch.Tensor
    """``[B, vocabulary]`` fp32: what follows the tokens fed so far."""
    tokens: list[int]
    """The likeliest next token of every row."""
    seconds: float
    """Wall time of the step."""


class Engine(Protocol):
    """A model behind a host library, one batch at a time."""

    def prefill(self, rows: Sequence[Sequence[int]]) -> None:
        """Prefill a batch of sequences densely; it replaces the batch before. Lengths may differ."""
        ...

    def steps(
        self,
        scripts: Sequence[Script],
        config: TidalConfig | None,
        on_scores: OnScores | None = None,
    ) -> Iterator[Step]:
        """Feed every row its script, one token a step: as many steps as the longest script has.

        A row whose script has ended goes on greedily. Starts from the prefilled batch and leaves it
        as it was, also when the caller stops early. ``config`` None: full attention. ``on_scores``
        sees the token scores of every selection layer of every step.
        """
        ...
