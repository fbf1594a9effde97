"""How the rows of a batch are cut into parts, one for each program of a head.

Where the rows differ, programs find their parts by the rows' lengths, which the device alone knows.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from tidaldecode.kernels.partition import parts
from tidaldecode.kernels.triton._device import processors


@triton.jit
def find_part(
    item, seq_lens, starts, row_cuts, batch, most, share, spare, noting,
    BATCH: tl.constexpr,
    PADDED: tl.constexpr,
):  # fmt: skip
    """``(row, part, parts, first)``: which part of which row ``item`` is; the row is ``batch`` if none.

    The lengths of a batch are known on the device alone, so every program looks. A row without tokens
    has no part. The others have parts of about one length, as short as the items allow: ``share``, or,
    where rows are so many that one part of each uses them up, ``spare`` more than rows, for long ones.
    ``first`` is the item of the row's first part; with ``noting`` all rows' are written to ``row_cuts``.
    """
    rows = tl.arange(0, BATCH)
    there = rows < batch
    lengths = tl.load(seq_lens + rows, mask=there, other=0)
    if PADDED:
        lengths -= tl.load(starts + rows, mask=there, other=0)
    lengths = tl.maximum(lengths, 0)
    filled = tl.sum((lengths > 0).to(tl.int32), 0)
    items = tl.maximum(
        share, tl.where(2 * filled > share, filled + tl.minimum(spare, filled - 1), 0)
    )
    tokens = lengths.to(tl.float32)
    total = tl.maximum(tl.sum(tokens, 0), 1.0)
    # Parts of this length always fit; shorter ones down to the mean, with room for rows that differ by
    # 1 %, may: rows of one length have equally many then.
    parts = tl.minimum(tl.ceil(tokens * ((items - filled) / total)).to(tl.int32), most)
    parts = tl.maximum(parts, (lengths > 0).to(tl.int32))
    length = 2 * total / items
    for _ in tl.static_range(5):
        shorter = tl.minimum(tl.ceil(tokens / length).to(tl.int32), most)
        parts = tl.where(tl.sum(shorter, 0) <= items, shorter, parts)
        length *= 0.8444
    up_to = tl.cumsum(parts, 0)
    if noting:
        tl.store(row_cuts + rows * 2, up_to - parts, mask=there)
        tl.store(row_cuts + rows * 2 + 1, parts, mask=there)
    earlier = there & (up_to <= item)
    row = tl.sum(earlier.to(tl.int32), 0)
    first = tl.sum(tl.where(earlier, parts, 0), 0)
    return row, item - first, tl.sum(tl.where(rows == row, parts, 0), 0), first


@dataclass(frozen=True)
class Cuts:
    """Into how many parts the rows of a batch are cut."""

    items: int
    """Programs of one head over all rows."""
    most: int
    """Most parts of a row."""
    share: int | None = None
    """Parts of one head over all rows, which have them by their lengths; None: each has ``most``."""
    spare: int = 0
    """Parts for long rows where the share is used up by one part a row."""

    @classmethod
    def even(cls, batch: int, splits: int) -> Cuts:
        """Every row in ``splits`` parts."""
        return cls(batch * splits, splits)

    @classmethod
    def by_length(
        cls, batch: int, heads: int, most: int, device: torch.device, per_processor: int = 1
    ) -> Cuts:
        """At most ``most`` parts a row, which just fill the device, whatever the rows' lengths.

        Args:
            heads: programs that one part of a row takes.
            per_processor: programs that a multiprocessor runs at a time.
        """
        if batch <= 1:
            return cls.even(batch, split_count(heads, most, device, per_processor))
        share = max(1, per_processor * processors(device) // heads)
        even = max(1, share // batch)
        if parts(even) != even:
            share = parts(even) * batch
        if share == 1 or most <= 1:
            return cls.even(batch, 1)
        # More programs than run at a time would be spread unevenly over the multiprocessors.
        spare = share // per_processor
        items = max(share, batch + min(spare, batch - 1) if 2 * batch > share else 0)
        return cls(items, most, share, spare)


def split_count(heads: int, most: int, device: torch.device, per_processor: int = 1) -> int:
    """Splits of each of ``heads`` (over the batch), at most ``most``, that just fill the device."""
    usual = max(1, min(most, per_processor * processors(device) // max(heads, 1)))
    return min(max(most, 1), parts(usual))
