"""How many tokens to draft: from the measured acceptance and the measured costs of both steps."""

from __future__ import annotations

from collections.abc import Sequence

FIRST = 4
"""Tokens of the first drafts, before anything is measured."""
MOST = 16
PROBE_EVERY = 32
"""Rounds without a draft after which one token is drafted again, to see whether it pays by now."""
_MEMORY = 0.9
"""Weight of a measurement one round later."""


def longest_draft(draft_tokens: int | str) -> int:
    """The most tokens that a draft may have with this setting of ``draft_tokens``."""
    return MOST if draft_tokens == "auto" else max(MOST, int(draft_tokens))


class DraftLength:
    """Chooses ``k``, tokens to draft, so that tokens per second are expected to be most.

    With acceptance ``a`` a row gains ``1 + a + ... + a^k`` tokens for ``k`` draft steps and one
    verification (arXiv 2211.17192, section 3.1). ``k`` is 0, plain full attention, where no draft
    pays.

    Args:
        fixed: always this many; None: measure and choose.
        choices: what is chosen from, 0, 1 and `FIRST` among them; by default everything up to `MOST`.
    """

    def __init__(self, fixed: int | None = None, choices: Sequence[int] = range(MOST + 1)) -> None:
        self.fixed, self.choices = fixed, choices
        self._kept, self._tried = 0.0, 0.0
        # The first token of a draft may cost more than the others: it may be the one that selects.
        self._draft_cost = _Line(grows=True)
        self._verify_cost = _Line()
        self._idle = 0

    @property
    def measures(self) -> bool:
        """Whether costs are looked at, which needs a clock."""
        return self.fixed is None

    def choose(self) -> int:
        """Tokens to draft in the next round."""
        if self.fixed is not None:
            return self.fixed
        if not self._tried:
            return FIRST
        best = max(self.choices, key=self._speed)
        return 1 if best == 0 and self._idle >= PROBE_EVERY else best

    def observe(
        self, drafted: int, accepted: list[int], draft_seconds: float, verify_seconds: float
    ) -> None:
        """Learn from a round in which every row drafted ``drafted`` and accepted so many of them."""
        self._verify_cost.add(drafted, verify_seconds)
        self._idle = 0 if drafted else self._idle + 1
        if not drafted:
            return
        self._draft_cost.add(drafted, draft_seconds)
        self._kept = self._kept * _MEMORY + sum(accepted)
        self._tried = self._tried * _MEMORY + sum(min(kept + 1, drafted) for kept in accepted)

    def _speed(self, length: int) -> float:
        """Expected tokens per second of a row with drafts of ``length`` tokens."""
        acceptance = self._kept / self._tried
        tokens = sum(acceptance**index for index in range(length + 1))
        draft = self._draft_cost.at(length) if length else 0.0
        return tokens / (draft + self._verify_cost.at(length))


class _Line:
    """A line through measurements, of which older ones count less.

    Args:
        grows: where all measurements were made at one place, a line from zero; a level one otherwise.
    """

    def __init__(self, grows: bool = False) -> None:
        self._grows = grows
        self._n = self._x = self._y = self._xx = self._xy = 0.0

    def add(self, x: float, y: float) -> None:
        sums = (self._n, self._x, self._y, self._xx, self._xy)
        self._n, self._x, self._y, self._xx, self._xy = (
            _MEMORY * total + new for total, new in zip(sums, (1, x, y, x * x, x * y), strict=True)
        )

    def at(self, x: float) -> float:
        """The line's value."""
        mean_x, mean_y = self._x / self._n, self._y / self._n
        spread = self._xx / self._n - mean_x**2
        if spread > 1e-9:
            slope = (self._xy / self._n - mean_x * mean_y) / spread
        else:
            slope = mean_y / mean_x if self._grows and mean_x else 0.0
        # More queries never cost less; a fit that says so has seen noise.
        return max(mean_y + max(slope, 0.0) * (x - mean_x), mean_y * 1e-3, 1e-9)
