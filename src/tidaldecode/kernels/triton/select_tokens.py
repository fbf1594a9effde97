"""select_tokens in Triton: an exact radix selection, several programs to a set, three launches.

1. *count*: histogram of the keys' bins (`_radix`), over all programs of a set; where there are few
   sets, in several copies, since programs that add to one bin wait for each other.
2. *candidates*: every program finds the bin in which the last selected token lies, counts its own
   tokens above that bin, and lists those in it.
3. *emit*: every program sorts out the candidates (a few: at once; many: digit by digit) and writes
   the selected positions of its stretch, behind those of the stretches before.

Lengths are read on the device; programs beyond a row's end return at once.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from tidaldecode.errors import TidalError
from tidaldecode.kernels.scratch import CANDIDATES, COPIES, FEW_SETS, Scratch
from tidaldecode.kernels.select_tokens import Selection
from tidaldecode.kernels.triton._overlap import overlap, wait_for_predecessor
from tidaldecode.kernels.triton._radix import (
    BINS,
    DIGIT_BITS,
    DIGITS,
    POSITION_BITS,
    bin_prefix,
    key_bin,
    nth_largest,
    rank_position,
    token_key,
    token_rank,
)

STRETCH = 2048
"""Tokens of one program."""
_LISTED = CANDIDATES
"""Candidates of a set that are listed; if there are more, the scores are read again."""
_FEW = 128
"""Candidates that are compared each with each; no more than are listed."""
_TILE = 512
"""Candidates that are read at a time if there are more."""
_WARPS = 16
_COPIES, _FEW_SETS = COPIES, FEW_SETS
"""Copies of a histogram, where there are at most so many sets."""


@triton.jit
def _row_range(seq_lens, starts, row, PADDED: tl.constexpr):
    return tl.load(starts + row) if PADDED else 0, tl.load(seq_lens + row)


@triton.jit
def _read_keys(source, stride, token, there, start, end, sinks, recents):
    score = tl.load(source + token.to(tl.int64) * stride, mask=there, other=0.0)
    return token_key(score, token, start, end, sinks, recents)


@triton.jit
def count_bins(key, there, histograms, program, COPIES: tl.constexpr):
    """Add the bins of the tokens that are ``there`` to a copy of a histogram, ``[COPIES, BINS]``.

    The lowest bin, which holds most tokens of a sharp distribution, is left out: it is what remains.
    """
    bins = key_bin(key)
    histogram = histograms + (program % COPIES) * BINS
    tl.atomic_add(histogram + bins, 1, mask=there & (bins > 0), sem="relaxed")


@triton.jit
def _count_kernel(
    scores, seq_lens, starts, histograms, listed,
    sets, score_row, score_set, score_token, sinks, recents,
    PADDED: tl.constexpr, STRETCH: tl.constexpr, COPIES: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    """Grid ``(stretches, B * R)``."""
    wait_for_predecessor(OVERLAP)
    stretch, index = tl.program_id(0), tl.program_id(1)
    row = index // sets
    start, end = _row_range(seq_lens, starts, row, PADDED)
    if stretch == 0:
        tl.store(listed + index, 0)
    first = stretch * STRETCH
    if (first < end) & (first + STRETCH > start):
        token = first + tl.arange(0, STRETCH)
        there = (token >= start) & (token < end)
        source = scores + row.to(tl.int64) * score_row + (index % sets).to(tl.int64) * score_set
        key = _read_keys(source, score_token, token, there, start, end, sinks, recents)
        count_bins(key, there, histograms + index * COPIES * BINS, stretch, COPIES)


@triton.jit
def _candidates_kernel(
    scores, seq_lens, starts, histograms, listed, candidates, above, found,
    sets, stretches, score_row, score_set, score_token, budget, sinks, recents,
    PADDED: tl.constexpr, STRETCH: tl.constexpr, LISTED: tl.constexpr, COPIES: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    """Grid ``(stretches, B * R)``; ``found [B * R, 2]``: the last bin, and how many to take of it."""
    wait_for_predecessor(OVERLAP)
    stretch, index = tl.program_id(0), tl.program_id(1)
    row = index // sets
    start, end = _row_range(seq_lens, starts, row, PADDED)
    first = stretch * STRETCH
    if (stretch == 0) | ((first < end) & (first + STRETCH > start)):
        token = first + tl.arange(0, STRETCH)
        there = (token >= start) & (token < end)
        source = scores + row.to(tl.int64) * score_row + (index % sets).to(tl.int64) * score_set
        key = _read_keys(source, score_token, token, there, start, end, sinks, recents)
        bin_numbers = tl.arange(0, BINS)
        histogram = tl.zeros([BINS], tl.int32)
        for copy in tl.static_range(COPIES):
            histogram += tl.load(histograms + (index * COPIES + copy) * BINS + bin_numbers)
        remaining = end - start - tl.sum(histogram, 0)
        histogram = tl.where(bin_numbers == 0, remaining, histogram)
        wanted = tl.minimum(budget, end - start)
        last_bin, larger, _ = nth_largest(histogram, wanted, BINS)
        if stretch == 0:
            tl.store(found + index * 2, last_bin)
            tl.store(found + index * 2 + 1, wanted - larger)
        bins = key_bin(key)
        tl.store(
            above + index.to(tl.int64) * stretches + stretch,
            tl.sum((there & (bins > last_bin)).to(tl.int32), 0),
        )
        candidate = there & (bins == last_bin)
        order = tl.cumsum(candidate.to(tl.int32), 0)
        base = tl.atomic_add(listed + index, tl.sum(candidate.to(tl.int32), 0), sem="relaxed")
        slot = base + order - 1
        tl.store(
            candidates + index.to(tl.int64) * LISTED + slot,
            token_rank(key, token),
            mask=candidate & (slot < LISTED),
        )


@triton.jit
def _emit_kernel(
    scores, seq_lens, starts, histograms, listed, candidates, above, found, positions, counts,
    sets, stretches, score_row, score_set, score_token, budget, sinks, recents,
    PADDED: tl.constexpr, STRETCH: tl.constexpr, LISTED: tl.constexpr,
    FEW: tl.constexpr, TILE: tl.constexpr, COPIES: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    """Grid ``(stretches, B * R)``."""
    wait_for_predecessor(OVERLAP)
    stretch, index = tl.program_id(0), tl.program_id(1)
    row = index // sets
    start, end = _row_range(seq_lens, starts, row, PADDED)
    first = stretch * STRETCH
    if (stretch == 0) | ((first < end) & (first + STRETCH > start)):
        token = first + tl.arange(0, STRETCH)
        there = (token >= start) & (token < end)
        source = scores + row.to(tl.int64) * score_row + (index % sets).to(tl.int64) * score_set
        key = _read_keys(source, score_token, token, there, start, end, sinks, recents)
        last_bin = tl.load(found + index * 2)
        room = tl.load(found + index * 2 + 1)
        total = tl.load(listed + index)
        listing = candidates + index.to(tl.int64) * LISTED
        first_stretch = start // STRETCH
        before = 0
        for at in range(first_stretch, stretch, FEW):
            slot = at + tl.arange(0, FEW)
            counted = above + index.to(tl.int64) * stretches + slot
            before += tl.sum(tl.load(counted, mask=slot < stretch, other=0), 0)

        # The lowest selected rank is `lowest`; it lies in the last bin.
        if total <= FEW:
            slot = tl.arange(0, FEW)
            rank = tl.load(listing + slot, mask=slot < total, other=-1)
            larger = tl.sum((rank[None, :] > rank[:, None]).to(tl.int32), 1)
            accepted = (slot < total) & (larger < room)
            lowest = tl.min(tl.where(accepted, rank, 1 << 62), 0)
            before += tl.sum((accepted & (rank_position(rank) < first)).to(tl.int32), 0)
        else:
            lowest = _lowest_of_many(
                listing, total, total <= LISTED, source, score_token, last_bin, room,
                start, end, sinks, recents, TILE,
            )  # fmt: skip
            is_listed = total <= LISTED
            for at in range(tl.where(is_listed, 0, start), tl.where(is_listed, total, first), TILE):
                rank, bins, valid = _candidate_tile(
                    at, tl.where(is_listed, total, first), listing, is_listed, source, score_token,
                    start, end, sinks, recents, TILE,
                )  # fmt: skip
                accepted = valid & (bins == last_bin) & (rank >= lowest)
                before += tl.sum((accepted & (rank_position(rank) < first)).to(tl.int32), 0)

        bins = key_bin(key)
        taken = there & (
            (bins > last_bin) | ((bins == last_bin) & (token_rank(key, token) >= lowest))
        )
        slot = before + tl.cumsum(taken.to(tl.int32), 0) - 1
        target = positions + index.to(tl.int64) * budget
        tl.store(target + slot, token, mask=taken)
        if stretch == 0:
            wanted = tl.minimum(budget, end - start)
            tl.store(counts + index, wanted)
            for at in range(wanted, budget, STRETCH):
                pad = at + tl.arange(0, STRETCH)
                tl.store(target + pad, -1, mask=pad < budget)
            nothing = tl.zeros([BINS], tl.int32)
            for copy in tl.static_range(COPIES):
                counted_here = histograms + (index * COPIES + copy) * BINS + tl.arange(0, BINS)
                tl.store(counted_here, nothing)


@triton.jit
def _lowest_of_many(
    listing, total, is_listed, source, stride, last_bin, room, start, end, sinks, recents,
    TILE: tl.constexpr,
):  # fmt: skip
    """A bound that just ``room`` ranks of the last bin reach, found digit by digit."""
    begin = tl.where(is_listed, 0, start)
    stop = tl.where(is_listed, total, end)
    shift, prefix = bin_prefix(last_bin)
    equal = total
    while (equal > room) & (shift > 0):
        shift -= DIGIT_BITS
        histogram = tl.zeros([DIGITS], tl.int32)
        for at in range(begin, stop, TILE):
            rank, bins, valid = _candidate_tile(
                at, stop, listing, is_listed, source, stride, start, end, sinks, recents, TILE
            )
            match = valid & (bins == last_bin) & ((rank >> (shift + DIGIT_BITS)) == prefix)
            digit = ((rank >> shift) & (DIGITS - 1)).to(tl.int32)
            histogram += tl.histogram(digit, DIGITS, mask=match)
        chosen, larger, equal = nth_largest(histogram, room, DIGITS)
        room -= larger
        prefix = (prefix << DIGIT_BITS) | chosen
    return prefix << shift


@triton.jit
def _candidate_tile(
    at, stop, listing, is_listed, source, stride, start, end, sinks, recents, TILE: tl.constexpr
):
    """``(rank, bin, valid)`` of ``TILE`` listed candidates, or of as many tokens of the row."""
    slot = at + tl.arange(0, TILE)
    valid = slot < stop
    rank = tl.load(listing + slot, mask=slot < tl.where(is_listed, stop, 0), other=0)
    key = _read_keys(
        source, stride, slot, slot < tl.where(is_listed, 0, stop), start, end, sinks, recents
    )
    key = tl.where(is_listed, rank >> POSITION_BITS, key)
    return tl.where(is_listed, rank, token_rank(key, slot)), key_bin(key), valid


@dataclass(frozen=True)
class SelectionBuffers:
    """What the three launches hand on, for ``B * R`` sets of up to ``width`` tokens."""

    histograms: torch.Tensor
    """``[B * R * copies * BINS]``, zero before the count and after the emission."""
    listed: torch.Tensor
    """``[B * R]``, cleared by the count."""
    candidates: torch.Tensor
    above: torch.Tensor
    found: torch.Tensor
    positions: torch.Tensor
    counts: torch.Tensor
    stretches: int
    copies: int

    @classmethod
    def make(
        cls, sets: int, width: int, budget: int, scratch: Scratch, device: torch.device
    ) -> SelectionBuffers:
        """Buffers for ``sets`` sets in all. Errors: `TidalError` for too many tokens."""
        if width > 1 << POSITION_BITS.value:
            raise TidalError(
                f"scores: expected at most {1 << POSITION_BITS.value:,} tokens, got {width:,}"
            )
        stretches = max(1, triton.cdiv(width, STRETCH))
        sizes = [sets, sets * stretches, sets * 2, sets * budget, sets]
        # Each from a multiple of 16 bytes: Triton compiles a kernel anew for another alignment.
        places = [size + -size % 4 for size in sizes]
        ints = torch.empty(sum(places), dtype=torch.int32, device=device)
        pieces = zip(torch.split(ints, places), sizes, strict=True)
        listed, above, found, positions, counts = (piece[:size] for piece, size in pieces)
        copies = _COPIES if sets <= _FEW_SETS else 1
        bins = sets * copies * BINS.value
        return cls(
            histograms=scratch.zeros(bins, device)[:bins],
            listed=listed,
            candidates=torch.empty(sets * _LISTED, dtype=torch.int64, device=device),
            above=above,
            found=found,
            positions=positions,
            counts=counts,
            stretches=stretches,
            copies=copies,
        )


def select_tokens(
    scores: torch.Tensor,
    seq_lens: torch.Tensor,
    *,
    budget: int,
    sink_tokens: int,
    recent_tokens: int,
    starts: torch.Tensor | None,
    scratch: Scratch,
    counted: SelectionBuffers | None = None,
) -> Selection:
    """Twin of `tidaldecode.kernels.select_tokens`.

    ``counted``: buffers with the histograms in them, if who made the scores has counted them.
    """
    batch, sets, width = scores.shape
    buffers = counted or SelectionBuffers.make(batch * sets, width, budget, scratch, scores.device)
    positions = buffers.positions.view(batch, sets, budget)
    counts = buffers.counts.view(batch, sets)
    if batch == 0:
        return Selection(positions, counts)
    grid = (buffers.stretches, batch * sets)
    launch = overlap(scores.device)
    padded = starts is not None
    if counted is None:
        _count_kernel[grid](
            scores, seq_lens, starts, buffers.histograms, buffers.listed,
            sets, *scores.stride(), sink_tokens, recent_tokens,
            PADDED=padded, STRETCH=STRETCH, COPIES=buffers.copies, num_warps=_WARPS, **launch,
        )  # fmt: skip
    _candidates_kernel[grid](
        scores, seq_lens, starts, buffers.histograms, buffers.listed, buffers.candidates,
        buffers.above, buffers.found,
        sets, buffers.stretches, *scores.stride(), budget, sink_tokens, recent_tokens,
        PADDED=padded, STRETCH=STRETCH, LISTED=_LISTED, COPIES=buffers.copies,
        num_warps=_WARPS, **launch,
    )  # fmt: skip
    _emit_kernel[grid](
        scores, seq_lens, starts, buffers.histograms, buffers.listed, buffers.candidates,
        buffers.above, buffers.found, buffers.positions, buffers.counts,
        sets, buffers.stretches, *scores.stride(), budget, sink_tokens, recent_tokens,
        PADDED=padded, STRETCH=STRETCH, LISTED=_LISTED, FEW=_FEW, TILE=_TILE,
        COPIES=buffers.copies, num_warps=_WARPS, **launch,
    )  # fmt: skip
    return Selection(positions, counts)
