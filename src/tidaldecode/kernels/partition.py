"""Another partition of the same work: what rounding alone can change, for those who study it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

_other: ContextVar[bool] = ContextVar(
    "whether rows are cut into another number of parts", default=False
)


@contextmanager
def other_partition() -> Iterator[None]:
    """While attention kernels run, or are captured: rows are cut into another number of parts.

    Results are as right as they were, but sums are rounded in another order.
    """
    token = _other.set(True)
    try:
        yield
    finally:
        _other.reset(token)


def is_other() -> bool:
    """Whether rows are cut into another number of parts; what cuts none must be done otherwise then."""
    return _other.get()


def parts(usual: int) -> int:
    """Parts to cut a row into where ``usual`` would be made: half as many, or two instead of one."""
    if not is_other():
        return usual
    return usual // 2 if usual > 1 else 2
