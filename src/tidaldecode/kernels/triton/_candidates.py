"""Which of a set's candidates, the tokens in the last bin, are selected: those of the largest ranks."""

from __future__ import annotations

import triton
import triton.language as tl

from tidaldecode.kernels.triton._radix import (
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


@triton.jit
def read_keys(source, stride, token, there, start, end, sinks, recents):
    """Sort keys of scored tokens; void for tokens that are not ``there``."""
    score = tl.load(source + token.to(tl.int64) * stride, mask=there, other=0.0)
    return token_key(score, token, start, end, sinks, recents)


@triton.jit
def lowest_of_few(listing, total, room, first, FEW: tl.constexpr):
    """The lowest of the ``room`` largest ranks, and how many of these lie before ``first``."""
    slot = tl.arange(0, FEW)
    rank = tl.load(listing + slot, mask=slot < total, other=-1, cache_modifier=".cg")
    larger = tl.sum((rank[None, :] > rank[:, None]).to(tl.int32), 1)
    accepted = (slot < total) & (larger < room)
    lowest = tl.min(tl.where(accepted, rank, 1 << 62), 0)
    return lowest, tl.sum((accepted & (rank_position(rank) < first)).to(tl.int32), 0)


@triton.jit
def lowest_of_many(
    listing, total, is_listed, source, stride, last_bin, room, first, start, end, sinks, recents,
    FINE: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """A bound that just ``room`` ranks reach, found digit by digit; as `lowest_of_few`."""
    begin = tl.where(is_listed, 0, start)
    stop = tl.where(is_listed, total, end)
    shift, prefix = bin_prefix(last_bin, FINE)
    equal = total
    while (equal > room) & (shift > 0):
        shift -= DIGIT_BITS
        histogram = tl.zeros([DIGITS], tl.int32)
        for at in range(begin, stop, TILE):
            rank, bins, valid = _candidate_tile(
                at, stop, listing, is_listed, source, stride, start, end, sinks, recents, FINE, TILE
            )
            match = valid & (bins == last_bin) & ((rank >> (shift + DIGIT_BITS)) == prefix)
            digit = ((rank >> shift) & (DIGITS - 1)).to(tl.int32)
            histogram += tl.histogram(digit, DIGITS, mask=match)
        chosen, larger, equal = nth_largest(histogram, room, DIGITS)
        room -= larger
        prefix = (prefix << DIGIT_BITS) | chosen
    lowest = prefix << shift
    earlier = 0
    stop = tl.where(is_listed, total, first)
    for at in range(begin, stop, TILE):
        rank, bins, valid = _candidate_tile(
            at, stop, listing, is_listed, source, stride, start, end, sinks, recents, FINE, TILE
        )
        accepted = valid & (bins == last_bin) & (rank >= lowest)
        earlier += tl.sum((accepted & (rank_position(rank) < first)).to(tl.int32), 0)
    return lowest, earlier


@triton.jit
def _candidate_tile(
    at, stop, listing, is_listed, source, stride, start, end, sinks, recents,
    FINE: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """``(rank, bin, valid)`` of ``TILE`` listed candidates, or of as many tokens of the row."""
    slot = at + tl.arange(0, TILE)
    valid = slot < stop
    rank = tl.load(
        listing + slot, mask=slot < tl.where(is_listed, stop, 0), other=0, cache_modifier=".cg"
    )
    key = read_keys(
        source, stride, slot, slot < tl.where(is_listed, 0, stop), start, end, sinks, recents
    )
    key = tl.where(is_listed, rank >> POSITION_BITS, key)
    return tl.where(is_listed, rank, token_rank(key, slot)), key_bin(key, FINE), valid
