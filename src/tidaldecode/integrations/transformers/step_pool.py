"""Decode steps that wait for the next call: a captured graph and its cache for every batch size."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tidaldecode.integrations.transformers.decode_step import DecodeStep

CAPACITY_UNIT = 1024
"""Caches are made for a multiple of so many tokens, so that similar calls share one."""


class StepPool:
    """Lends steps, each to one call at a time; concurrent calls get steps of their own.

    Args:
        make: makes a step for so many rows, and tokens in a row.
    """

    def __init__(self, make: Callable[[int, int], DecodeStep]) -> None:
        self._make = make
        self._idle: dict[int, DecodeStep] = {}

    @contextmanager
    def borrow(self, batch: int, tokens: int) -> Iterator[DecodeStep]:
        """A step for ``batch`` rows of up to ``tokens`` tokens; it is not kept if the call fails.

        Errors: `TidalError` as a `DecodeStep` has them.
        """
        step = self._idle.pop(batch, None)
        if step is None or step.capacity < tokens:
            # The old one goes first: there may be no room for both.
            step = None
            step = self._make(batch, -(-tokens // CAPACITY_UNIT) * CAPACITY_UNIT)
        yield step
        self._idle[batch] = step

    def clear(self) -> bool:
        """Give back the memory of all steps that wait; whether there were any."""
        found = bool(self._idle)
        self._idle.clear()
        return found
