"""The little that evaluation needs of a host: prefill once, then decode it by any method."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from tidaldecode.config import TidalConfig


class Engine(Protocol):
    """A model behind a host library, one sequence at a time."""

    def prefill(self, ids: Sequence[int]) -> None:
        """Prefill a sequence densely; it replaces the one before."""
        ...

    def decode(
        self, forced: Sequence[int], new_tokens: int, config: TidalConfig | None
    ) -> tuple[list[int], list[float]]:
        """Feed ``forced`` token by token, then decode ``new_tokens`` greedily.

        Starts from the prefilled sequence and leaves it as it was. ``config`` None: full attention.
        Returns the decoded tokens and the seconds of every step, forced and free.
        """
        ...
