"""What a selection layer works in: how much memory, for how many rows at a time. Imports no vLLM.

A selection layer holds a logit of every query head for every token of a row. vLLM gives all memory to
its KV cache but for what a profiling run uses, in which no row decodes. So the memory is claimed there,
held to the end of that run, and given back before the first step.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from tidaldecode.errors import TidalError
from tidaldecode.kernels.scratch import histogram_elements, select_bytes

MIB = 1 << 20


@dataclass(frozen=True)
class WorkMemory:
    """How selection layers of one engine use memory."""

    rows_at_once: int
    """Rows that select together; a batch of more is taken in parts."""
    claimed: int
    """Bytes that vLLM must leave for it."""

    @classmethod
    def plan(
        cls,
        *,
        query_heads: int,
        sets: int,
        width: int,
        budget: int,
        dtype: torch.dtype,
        max_rows: int,
        limit_mib: int,
        graphs: bool,
    ) -> WorkMemory:
        """Rows of up to ``width`` tokens, heads and sets of one rank, queries of ``dtype``.

        With ``graphs`` it is claimed twice: CUDA graphs have a pool of their own.

        Errors: `TidalError` when one row needs more than ``limit_mib``.
        """
        per_row = select_bytes(query_heads, sets, width, budget, dtype)
        at_once = min(max_rows, limit_mib * MIB // per_row)
        if at_once == 0:
            raise TidalError(
                f"scratch_mib: expected at least {-(-per_row // MIB)} for one row of {width:,} tokens "
                f"and {query_heads} query heads, got {limit_mib}; raise it or lower --max-model-len"
            )
        # Of rows in parts, the parts' selections and the whole batch's are there at once.
        selected = 2 * max_rows * sets * 4 * (budget + 1)
        pools = 2 if graphs else 1
        kept = 4 * histogram_elements(at_once * sets)
        return cls(at_once, pools * (at_once * per_row + selected) + kept)


_claims: list[torch.Tensor] = []


def claim(device: torch.device, count: int) -> None:
    """Hold ``count`` bytes until `release`; once, however many layers ask."""
    if not _claims:
        _claims.append(torch.empty(count, dtype=torch.uint8, device=device))


def release() -> None:
    """Give back what is held, if anything is."""
    _claims.clear()
