"""Steps that wait for the next call: captured graphs and their cache for every batch size."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Generic, Protocol, TypeVar

import torch

from tidaldecode.errors import ShortOfMemoryError

CAPACITY_UNIT = 1024
"""Caches are made for a multiple of so many tokens, so that similar calls share one."""


class Step(Protocol):
    """What a pool asks of a step."""

    capacity: int
    """Tokens that the cache of a row holds."""


StepKind = TypeVar("StepKind", bound=Step)
Result = TypeVar("Result")


class StepPool(Generic[StepKind]):
    """Lends steps, each to one call at a time; concurrent calls get steps of their own.

    Args:
        make: makes a step for so many rows, and tokens in a row.
    """

    def __init__(self, make: Callable[[int, int], StepKind]) -> None:
        self._make = make
        self._idle: dict[int, StepKind] = {}

    @contextmanager
    def borrow(self, batch: int, tokens: int) -> Iterator[StepKind]:
        """A step for ``batch`` rows of up to ``tokens`` tokens; it is not kept if the call fails.

        Errors: `TidalError` as making a step has them.
        """
        step = self._idle.pop(batch, None)
        if step is None or step.capacity < tokens:
            # The old one goes first: there may be no room for both.
            step = None
            step = self._make(batch, -(-tokens // CAPACITY_UNIT) * CAPACITY_UNIT)
        yield step
        self._idle[batch] = step

    def run(self, call: Callable[[], Result]) -> Result:
        """``call()``, and once more without the steps that wait where memory was short.

        Errors: `ShortOfMemoryError` where it still is.
        """
        try:
            return call()
        except ShortOfMemoryError:
            # Steps of other batch sizes hold memory that this call may do with.
            if not self.clear():
                raise
        torch.cuda.empty_cache()
        return call()

    def clear(self) -> bool:
        """Give back the memory of all steps that wait; whether there were any."""
        found = bool(self._idle)
        self._idle.clear()
        return found
