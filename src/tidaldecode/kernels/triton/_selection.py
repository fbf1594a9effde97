"""The three phases of a selection, and the kernel that runs some or all of them.

A program takes its tokens ``CHUNK`` at a time, from ``first`` up to ``last``.
"""

from __future__ import annotations

import triton
import triton.language as tl

from tidaldecode.kernels.triton._barrier import leave, wait_for_all
from tidaldecode.kernels.triton._candidates import lowest_of_few, lowest_of_many, read_keys
from tidaldecode.kernels.triton._overlap import wait_for_predecessor
from tidaldecode.kernels.triton._radix import (
    BINS,
    OCTAVE_BITS,
    OCTAVES,
    key_bin,
    token_key,
    token_rank,
)
from tidaldecode.kernels.triton.score_tokens import summed_scores


@triton.jit
def count_stretch(
    source, stride, logits, lse, histogram, octaves, index, first, last, start, end, sinks, recents,
    wanted, logits_width, log2e,
    FLOOR: tl.constexpr, HEADS: tl.constexpr, ROWS: tl.constexpr, SOFTMAX: tl.constexpr,
    CHUNK: tl.constexpr,
):  # fmt: skip
    """Add the bins of the tokens' keys to ``histogram [BINS]``; with ``HEADS`` make their scores first.

    Left out are the lowest bin, which holds most tokens of a sharp distribution, and, with ``FLOOR``,
    what is certain to lie below the ``wanted`` best: ``octaves [OCTAVES]`` count the tokens of all
    programs that have come this far, and where the upper ones hold enough, the lower ones are out.
    """
    for at in range(first, last, CHUNK):
        token = at + tl.arange(0, CHUNK)
        there = (token >= start) & (token < end)
        if HEADS > 0:
            score = summed_scores(
                logits, lse, index, token, start, end, logits_width, log2e,
                HEADS, ROWS, SOFTMAX, CHUNK,
            )  # fmt: skip
            tl.store(source + token.to(tl.int64) * stride, score, mask=there)
            key = token_key(score, token, start, end, sinks, recents)
        else:
            key = read_keys(source, stride, token, there, start, end, sinks, recents)
        bins = key_bin(key)
        counted = there & (bins > 0)
        if FLOOR:
            octave = bins >> OCTAVE_BITS
            own = tl.histogram(octave, OCTAVES, mask=counted)
            known = tl.atomic_add(octaves + tl.arange(0, OCTAVES), own, sem="relaxed") + own
            enough = tl.cumsum(known, 0, reverse=True) >= wanted
            counted = counted & (octave >= tl.sum(enough.to(tl.int32), 0) - 1)
        tl.atomic_add(histogram + bins, 1, mask=counted, sem="relaxed")


@triton.jit
def last_bin_of(histograms, wanted, COPIES: tl.constexpr):
    """``(bin, room)``: where the last of ``wanted`` selected tokens lies, and how many of it to take.

    ``histograms [COPIES, BINS]`` count some of the tokens each, and none of the lowest bin.
    """
    numbers = tl.arange(0, BINS)
    histogram = tl.zeros([BINS], tl.int32)
    for copy in tl.static_range(COPIES):
        histogram += tl.load(histograms + copy * BINS + numbers, cache_modifier=".cg")
    at_least = tl.cumsum(histogram, 0, reverse=True)
    reached = at_least >= wanted
    # Two sums in one: bins from the first to the last one, and tokens above it.
    both = tl.where(numbers == 0, 0, tl.where(reached, 1 << 32, histogram.to(tl.int64)))
    found = tl.sum(both, 0)
    return (found >> 32).to(tl.int32), wanted - found.to(tl.int32)


@triton.jit
def list_stretch(
    source, stride, listed, listing, last_bin, first, last, start, end, sinks, recents,
    LISTED: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """List the ranks of the tokens in the last bin; how many are above it."""
    above = 0
    for at in range(first, last, CHUNK):
        token = at + tl.arange(0, CHUNK)
        there = (token >= start) & (token < end)
        key = read_keys(source, stride, token, there, start, end, sinks, recents)
        bins = key_bin(key)
        candidate = (there & (bins == last_bin)).to(tl.int32)
        larger = (there & (bins > last_bin)).to(tl.int32)
        # Two sums in one; a chunk has fewer than 2**16 tokens.
        both = tl.sum((larger << 16) + candidate, 0)
        above += both >> 16
        if (both & 65535) > 0:
            base = tl.atomic_add(listed, both & 65535, sem="relaxed")
            slot = base + tl.cumsum(candidate, 0) - 1
            rank = token_rank(key, token)
            tl.store(listing + slot, rank, mask=(candidate > 0) & (slot < LISTED))
    return above


@triton.jit
def emit_stretch(
    source, stride, listed, listing, above, positions, last_bin, room,
    program, first, last, start, end, sinks, recents,
    LISTED: tl.constexpr, FEW: tl.constexpr, TILE: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Write the selected positions of the tokens, behind those of the programs before."""
    total = tl.load(listed, cache_modifier=".cg")
    before = 0
    for at in range(0, program, FEW):
        slot = at + tl.arange(0, FEW)
        counted = tl.load(above + slot, mask=slot < program, other=0, cache_modifier=".cg")
        before += tl.sum(counted, 0)
    if total <= FEW // 4:
        lowest, earlier = lowest_of_few(listing, total, room, first, FEW // 4)
    elif total <= FEW:
        lowest, earlier = lowest_of_few(listing, total, room, first, FEW)
    else:
        lowest, earlier = lowest_of_many(
            listing, total, total <= LISTED, source, stride, last_bin, room, first,
            start, end, sinks, recents, TILE,
        )  # fmt: skip
    before += earlier
    for at in range(first, last, CHUNK):
        token = at + tl.arange(0, CHUNK)
        there = (token >= start) & (token < end)
        key = read_keys(source, stride, token, there, start, end, sinks, recents)
        bins = key_bin(key)
        reached = (bins == last_bin) & (token_rank(key, token) >= lowest)
        taken = (there & ((bins > last_bin) | reached)).to(tl.int32)
        slot = before + tl.cumsum(taken, 0) - 1
        tl.store(positions + slot, token, mask=taken > 0)
        if at + CHUNK < last:
            before += tl.sum(taken, 0)


@triton.jit
def select_kernel(
    scores, logits, lse, seq_lens, starts, histograms, octaves, arrived, listed, candidates,
    above, found, positions, counts,
    sets, logits_width, score_row, score_set, score_token, budget, sinks, recents, log2e,
    FIRST: tl.constexpr,
    LAST: tl.constexpr,
    FLOOR: tl.constexpr,
    HEADS: tl.constexpr,
    ROWS: tl.constexpr,
    SOFTMAX: tl.constexpr,
    PADDED: tl.constexpr,
    CHUNK: tl.constexpr,
    LISTED: tl.constexpr,
    FEW: tl.constexpr,
    TILE: tl.constexpr,
    COPIES: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    """Grid ``(programs, B * R)``; the phases from ``FIRST`` to ``LAST``.

    ``HEADS``: query heads of a set, whose ``logits`` are scored; 0: ``scores`` are there.
    ``found [B * R, 2]``: the last bin, and how many to take of it.
    """
    wait_for_predecessor(OVERLAP)
    program, index = tl.program_id(0), tl.program_id(1)
    programs = tl.num_programs(0)
    row = index // sets
    end = tl.load(seq_lens + row)
    start = tl.load(starts + row) if PADDED else 0
    begin = start // CHUNK * CHUNK
    stretch = tl.cdiv(tl.cdiv(tl.maximum(end - begin, 0), CHUNK), programs) * CHUNK
    first = begin + program * stretch
    last = tl.where(end > start, tl.minimum(first + stretch, end), first)
    working = (program == 0) | (first < last)
    source = scores + row.to(tl.int64) * score_row + (index % sets).to(tl.int64) * score_set
    copies = histograms + index * COPIES * BINS
    listing = candidates + index.to(tl.int64) * LISTED
    counted = above + index * programs
    wanted = tl.minimum(budget, end - start)

    if FIRST == 1:
        if program == 0:
            tl.store(listed + index, 0)
        count_stretch(
            source, score_token, logits, lse, copies + (program % COPIES) * BINS,
            octaves + index * OCTAVES, index,
            first, last, start, end, sinks, recents, wanted, logits_width, log2e,
            FLOOR, HEADS, ROWS, SOFTMAX, CHUNK,
        )  # fmt: skip
    if FIRST == 1 and LAST > 1:
        wait_for_all(arrived + index, programs)
    if FIRST <= 2 and LAST >= 2:  # noqa: SIM102
        if working:
            last_bin, room = last_bin_of(copies, wanted, COPIES)
            if program == 0:
                tl.store(found + index * 2, last_bin)
                tl.store(found + index * 2 + 1, room)
            larger = list_stretch(
                source, score_token, listed + index, listing, last_bin,
                first, last, start, end, sinks, recents, LISTED, CHUNK,
            )  # fmt: skip
            tl.store(counted + program, larger)
    if FIRST <= 2 and LAST == 3:
        wait_for_all(arrived + index, (3 - FIRST) * programs)
    if LAST == 3:
        for copy in range(program, COPIES, programs):
            tl.store(copies + copy * BINS + tl.arange(0, BINS), tl.zeros([BINS], tl.int32))
        if working:
            target = positions + index.to(tl.int64) * budget
            last_bin = tl.load(found + index * 2, cache_modifier=".cg")
            room = tl.load(found + index * 2 + 1, cache_modifier=".cg")
            emit_stretch(
                source, score_token, listed + index, listing, counted, target, last_bin, room,
                program, first, last, start, end, sinks, recents, LISTED, FEW, TILE, CHUNK,
            )  # fmt: skip
            if program == 0:
                numbers = tl.arange(0, OCTAVES)
                tl.store(octaves + index * OCTAVES + numbers, tl.zeros([OCTAVES], tl.int32))
                tl.store(counts + index, wanted)
                for at in range(wanted, budget, CHUNK):
                    pad = at + tl.arange(0, CHUNK)
                    tl.store(target + pad, -1, mask=pad < budget)
    if FIRST < LAST:
        leave(arrived + index, (LAST - FIRST + 1) * programs)
