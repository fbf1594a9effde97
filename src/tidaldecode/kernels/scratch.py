"""Memory that kernels work in: what is kept zero between them, and how much a selection layer needs."""

from __future__ import annotations

import torch

_FEWEST = 4096
OCTAVES = 32
"""Octaves of a set's histogram."""
_MOST_BINS = 1 << 14
"""Of an octave, over all sets."""
CANDIDATES = 4096
"""Listed candidates of a set, eight bytes each."""


class Scratch:
    """Zeroed int32 memory that every kernel leaves zeroed. For one stream at a time.

    ``reserved``: elements from the start; a CUDA graph must find its memory where it was captured.
    """

    def __init__(self, reserved: int = 0) -> None:
        self._memory: torch.Tensor | None = None
        self._fewest = max(_FEWEST, reserved)

    def zeros(self, count: int, device: torch.device) -> torch.Tensor:
        """At least ``count`` zeros on ``device``; the same memory every time, while it suffices."""
        memory = self._memory
        if memory is None or memory.device != device or len(memory) < count:
            count = max(count, self._fewest)
            memory = self._memory = torch.zeros(count, dtype=torch.int32, device=device)
        return memory


def bin_bits(sets: int) -> int:
    """An octave of a histogram has 2 to the power of this bins, where there are ``sets`` sets in all."""
    return min(10, max(6, (_MOST_BINS // max(sets, 1)).bit_length() - 1))


def histogram_elements(sets: int) -> int:
    """Zeroed elements that a selection for up to ``sets`` sets in all asks for."""
    # Fewer sets have finer bins, and may have more of them in all.
    bins = max(min(sets << bin_bits(1), _MOST_BINS), sets << bin_bits(sets))
    return OCTAVES * (bins + sets) + sets


def padded_width(width: int) -> int:
    """Tokens that a row of logits or scores has room for, a multiple of 16: rows start aligned."""
    return width + -width % 16


def logits_dtype(dtype: torch.dtype) -> torch.dtype:
    """What logits of queries of ``dtype`` are kept in."""
    return torch.float32 if dtype.itemsize == 4 else torch.float16


def select_bytes(query_heads: int, sets: int, width: int, budget: int, dtype: torch.dtype) -> int:
    """Memory of `dense_select` for one row of up to ``width`` tokens, its result included.

    Kept logits of every query head and scores of every set, fp32, are most of it. What the parts of its
    attention need beside them (an output of every head for each, some MiB a batch) is not in it.
    """
    scores = padded_width(width) * (logits_dtype(dtype).itemsize * query_heads + 4 * sets)
    chosen = sets * (8 * CANDIDATES + 4 * (budget + width // 512 + 16))
    return scores + chosen
