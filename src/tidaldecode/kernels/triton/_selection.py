"""The three phases of a selection, and the kernel that runs some or all of them.

A program takes its tokens ``CHUNK`` at a time, from ``first`` up to ``last``.
"""

from __future__ import annotations

import triton
import triton.language as tl

from tidaldecode.kernels.triton._barrier import leave, wait_for_all
from tidaldecode.kernels.triton._cache import ROW_ARGUMENTS
from tidaldecode.kernels.triton._candidates import lowest_of_few, lowest_of_many, read_keys
from tidaldecode.kernels.triton._logits import summed_scores
from tidaldecode.kernels.triton._merge import merge_heads
from tidaldecode.kernels.triton._overlap import wait_for_predecessor
from tidaldecode.kernels.triton._radix import (
    OCTAVES,
    key_bin,
    token_key,
    token_rank,
)

CLEARED: tl.constexpr = tl.constexpr(2048)
"""Bins that a program clears at a time; every histogram has so many or a multiple."""


@triton.jit
def count_stretch(
    source, stride, distances, origins, part_lse, row_cuts, lse, histogram, octaves,
    index, first, last, start, end, sinks, recents, wanted, logits_width, splits, row_heads,
    HEADS: tl.constexpr, ROWS: tl.constexpr, SOFTMAX: tl.constexpr,
    CUT: tl.constexpr, PARTS: tl.constexpr,
    FINE: tl.constexpr, CHUNK: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """Count the tokens' keys by bin and by octave; with ``HEADS`` make their scores first.

    Left out are the lowest bin, which holds most tokens of a sharp distribution, and of the bins what
    is certain to lie below the ``wanted`` best: ``octaves`` count the tokens of all programs that have
    come this far, and where the upper ones hold enough, the lower ones are out.
    """
    for at in range(first, last, CHUNK):
        token = at + tl.arange(0, CHUNK)
        there = token < end
        if HEADS > 0:
            score = summed_scores(
                distances, origins, part_lse, row_cuts, lse, index, at - start, end - start,
                logits_width, splits, row_heads, HEADS, ROWS, SOFTMAX, CUT, PARTS, CHUNK, VECTOR,
            )  # fmt: skip
            tl.store(source + token.to(tl.int64) * stride, score, mask=there)
            key = token_key(score, token, start, end, sinks, recents)
        else:
            key = read_keys(source, stride, token, there, start, end, sinks, recents)
        bins = key_bin(key, FINE)
        counted = there & (bins > 0)
        octave = bins >> FINE
        own = tl.histogram(octave, OCTAVES, mask=counted)
        known = tl.atomic_add(octaves + tl.arange(0, OCTAVES), own, sem="relaxed") + own
        enough = tl.cumsum(known, 0, reverse=True) >= wanted
        counted = counted & (octave >= tl.sum(enough.to(tl.int32), 0) - 1)
        tl.atomic_add(histogram + bins, 1, mask=counted, sem="relaxed")


@triton.jit
def last_bin_of(histogram, octaves, wanted, FINE: tl.constexpr):
    """``(bin, room)``: where the last of ``wanted`` selected tokens lies, and how many of it to take.

    ``octaves [OCTAVES]`` and ``histogram [OCTAVES << FINE]`` count none of the lowest bin, and the
    latter all tokens of the octave that is asked for.
    """
    octave, above = _last_to_reach(octaves, wanted, OCTAVES)
    step, above_in_octave = _last_to_reach(histogram + (octave << FINE), wanted - above, 1 << FINE)
    return (octave << FINE) + step, wanted - above - above_in_octave


@triton.jit
def _last_to_reach(counts, wanted, SIZE: tl.constexpr):
    """The last of ``counts [SIZE]`` to make ``wanted`` with those above, else the first; their sum."""
    numbers = tl.arange(0, SIZE)
    count = tl.load(counts + numbers, cache_modifier=".cg")
    reached = (tl.cumsum(count, 0, reverse=True) >= wanted) | (numbers == 0)
    # Two sums in one.
    found = tl.sum(tl.where(reached, 1 << 32, count.to(tl.int64)), 0)
    return (found >> 32).to(tl.int32) - 1, found.to(tl.int32)


@triton.jit
def list_stretch(
    source, stride, listed, listing, last_bin, first, last, start, end, sinks, recents,
    FINE: tl.constexpr, LISTED: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """List the ranks of the tokens in the last bin; how many are above it."""
    above = 0
    for at in range(first, last, CHUNK):
        token = at + tl.arange(0, CHUNK)
        there = token < end
        key = read_keys(source, stride, token, there, start, end, sinks, recents)
        bins = key_bin(key, FINE)
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
    FINE: tl.constexpr, LISTED: tl.constexpr, FEW: tl.constexpr, TILE: tl.constexpr, CHUNK: tl.constexpr,
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
            start, end, sinks, recents, FINE, TILE,
        )  # fmt: skip
    before += earlier
    for at in range(first, last, CHUNK):
        token = at + tl.arange(0, CHUNK)
        there = token < end
        key = read_keys(source, stride, token, there, start, end, sinks, recents)
        bins = key_bin(key, FINE)
        reached = (bins == last_bin) & (token_rank(key, token) >= lowest)
        taken = (there & ((bins > last_bin) | reached)).to(tl.int32)
        slot = before + tl.cumsum(taken, 0) - 1
        tl.store(positions + slot, token, mask=taken > 0)
        if at + CHUNK < last:
            before += tl.sum(taken, 0)


@triton.jit(
    do_not_specialize=["logits_width", "splits"], do_not_specialize_on_alignment=ROW_ARGUMENTS
)
def select_kernel(
    scores, distances, origins, part_out, part_lse, row_cuts, out, lse, seq_lens, starts,
    histograms, octaves, arrived, listed, candidates, above, found, positions, counts,
    sets, logits_width, score_row, score_set, score_token, budget, sinks, recents, splits,
    FIRST: tl.constexpr,
    LAST: tl.constexpr,
    HEADS: tl.constexpr,
    ROWS: tl.constexpr,
    SOFTMAX: tl.constexpr,
    CUT: tl.constexpr,
    PARTS: tl.constexpr,
    MERGERS: tl.constexpr,
    MERGED: tl.constexpr,
    D: tl.constexpr,
    DP: tl.constexpr,
    PADDED: tl.constexpr,
    CHUNK: tl.constexpr,
    VECTOR: tl.constexpr,
    LISTED: tl.constexpr,
    FEW: tl.constexpr,
    TILE: tl.constexpr,
    FINE: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    """Grid ``(MERGERS + programs, B * R)``; the phases from ``FIRST`` to ``LAST``.

    ``HEADS``: query heads of a set, whose kept logits are scored; 0: ``scores`` are there. What
    attention found of a head may be in parts (`_merge`): the first ``MERGERS`` programs of a set merge
    these, ``MERGED`` heads each, and the others do not wait for them.
    ``found [B * R, 2]``: the last bin, and how many to take of it.
    """
    wait_for_predecessor(OVERLAP)
    program, index = tl.program_id(0) - MERGERS, tl.program_id(1)
    programs = tl.num_programs(0) - MERGERS
    row = index // sets
    if MERGERS > 0:  # noqa: SIM102
        if program < 0:
            head = (program + MERGERS) * MERGED + tl.arange(0, MERGED)
            merge_heads(
                part_out, part_lse, row_cuts, out, lse, index.to(tl.int64) * HEADS + head, head < HEADS,
                splits, sets * HEADS, CUT, MERGED, PARTS, D, DP,
            )  # fmt: skip
            return
    end = tl.load(seq_lens + row)
    start = tl.load(starts + row) if PADDED else 0
    stretch = tl.cdiv(tl.cdiv(tl.maximum(end - start, 0), CHUNK), programs) * CHUNK
    first = start + program * stretch
    last = tl.where(end > start, tl.minimum(first + stretch, end), first)
    working = (program == 0) | (first < last)
    source = scores + row.to(tl.int64) * score_row + (index % sets).to(tl.int64) * score_set
    histogram = histograms + index * (OCTAVES << FINE)
    octave = octaves + index * OCTAVES
    listing = candidates + index.to(tl.int64) * LISTED
    counted = above + index * programs
    wanted = tl.minimum(budget, end - start)

    if FIRST == 1:
        if program == 0:
            tl.store(listed + index, 0)
        count_stretch(
            source, score_token, distances, origins, part_lse, row_cuts, lse, histogram, octave,
            index, first, last, start, end, sinks, recents, wanted, logits_width, splits, sets * HEADS,
            HEADS, ROWS, SOFTMAX, CUT, PARTS, FINE, CHUNK, VECTOR,
        )  # fmt: skip
    if FIRST == 1 and LAST > 1:
        wait_for_all(arrived + index, programs)
    if FIRST <= 2 and LAST >= 2:  # noqa: SIM102
        if working:
            last_bin, room = last_bin_of(histogram, octave, wanted, FINE)
            if program == 0:
                tl.store(found + index * 2, last_bin)
                tl.store(found + index * 2 + 1, room)
            larger = list_stretch(
                source, score_token, listed + index, listing, last_bin,
                first, last, start, end, sinks, recents, FINE, LISTED, CHUNK,
            )  # fmt: skip
            tl.store(counted + program, larger)
    if FIRST <= 2 and LAST == 3:
        wait_for_all(arrived + index, (3 - FIRST) * programs)
    if LAST == 3:
        for part in range(program, (OCTAVES << FINE) // CLEARED, programs):
            bins = part * CLEARED + tl.arange(0, CLEARED)
            tl.store(histogram + bins, tl.zeros([CLEARED], tl.int32))
        if working:
            target = positions + index.to(tl.int64) * budget
            last_bin = tl.load(found + index * 2, cache_modifier=".cg")
            room = tl.load(found + index * 2 + 1, cache_modifier=".cg")
            emit_stretch(
                source, score_token, listed + index, listing, counted, target, last_bin, room,
                program, first, last, start, end, sinks, recents, FINE, LISTED, FEW, TILE, CHUNK,
            )  # fmt: skip
            if program == 0:
                tl.store(octave + tl.arange(0, OCTAVES), tl.zeros([OCTAVES], tl.int32))
                tl.store(counts + index, wanted)
                for at in range(wanted, budget, CHUNK):
                    pad = at + tl.arange(0, CHUNK)
                    tl.store(target + pad, -1, mask=pad < budget)
    if FIRST < LAST:
        leave(arrived + index, (LAST - FIRST + 1) * programs)
