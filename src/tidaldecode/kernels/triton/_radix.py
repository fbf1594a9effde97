"""Sort keys of scored tokens, and where in a histogram of them the n-th largest lies.

A token's key is an unsigned 32-bit number, held in int64, that orders like its score. Its rank is the
key with the position below it, so that no two tokens are equal. Its bin is a coarse digit of the key:
``2**FINE`` to an octave from 2**-27 to 2**5, where softmax probabilities lie; the first and the last
bin hold whatever lies beyond. ``FINE`` is 6 or more.
"""

from __future__ import annotations

import triton
import triton.language as tl

OCTAVES: tl.constexpr = tl.constexpr(32)
DIGIT_BITS: tl.constexpr = tl.constexpr(10)
DIGITS: tl.constexpr = tl.constexpr(1024)
POSITION_BITS: tl.constexpr = tl.constexpr(23)
_LAST_POSITION: tl.constexpr = tl.constexpr((1 << 23) - 1)
_SIGN: tl.constexpr = tl.constexpr(1 << 31)
_HIGHEST: tl.constexpr = tl.constexpr((1 << 32) - 1)
_MANTISSA_BITS: tl.constexpr = tl.constexpr(23)
_FIRST_OCTAVE: tl.constexpr = tl.constexpr((1 << 8) + 100)  # sign and exponent of 2**-27
_COARSEST: tl.constexpr = tl.constexpr(6)
_INNER_SHIFT: tl.constexpr = tl.constexpr(40)  # below what _COARSEST bins share
_OUTER_SHIFT: tl.constexpr = tl.constexpr(60)  # above every rank, a whole number of digits away


@triton.jit
def token_key(score, position, start, end, sinks, recents):
    """Key of a token's score; sinks, recents and the newest token rank above all, NaN with -inf."""
    forced = (position < start + sinks) | (position >= end - 1 - recents)
    score = tl.where(score == score, score, float("-inf"))
    score = tl.where(score == 0.0, 0.0, score)  # -0 equals 0
    bits = score.to(tl.int32, bitcast=True)
    key = tl.where(bits < 0, ~bits, bits).to(tl.int64) + tl.where(bits < 0, 0, _SIGN)
    return tl.where(forced, _HIGHEST, key)


@triton.jit
def key_bin(key, FINE: tl.constexpr):
    """The bin of a key; a larger key has no smaller bin."""
    step = (key >> (_MANTISSA_BITS - FINE)).to(tl.int32) - (_FIRST_OCTAVE << FINE)
    return tl.minimum(tl.maximum(step, 0), (OCTAVES << FINE) - 1)


@triton.jit
def bin_prefix(chosen, FINE: tl.constexpr):
    """``(shift, prefix)``: what ranks of this bin share above shift; the outer bins share nothing."""
    inner = (chosen > 0) & (chosen < (OCTAVES << FINE) - 1)
    coarse = (chosen >> (FINE - _COARSEST)) + (_FIRST_OCTAVE << _COARSEST)
    return (
        tl.where(inner, _INNER_SHIFT, _OUTER_SHIFT),
        tl.where(inner, coarse, 0).to(tl.int64),
    )


@triton.jit
def token_rank(key, position):
    """Key and position as one number: of equal scores the lower position ranks higher."""
    return (key << POSITION_BITS) | (-position + _LAST_POSITION).to(tl.int64)


@triton.jit
def rank_position(rank):
    """The position in a rank."""
    return _LAST_POSITION - (rank & _LAST_POSITION).to(tl.int32)


@triton.jit
def nth_largest(histogram, nth, SIZE: tl.constexpr):
    """``(digit, above, equal)`` of the ``nth`` largest (from 1) of what ``histogram [SIZE]`` counts.

    ``above``: how many have a larger digit; ``equal``: how many have this one.
    """
    digits = tl.arange(0, SIZE)
    at_least = tl.sum(histogram, 0) - tl.cumsum(histogram, 0) + histogram
    digit = tl.maximum(tl.sum((at_least >= nth).to(tl.int32), 0) - 1, 0)
    above = tl.sum(tl.where(digits > digit, histogram, 0), 0)
    equal = tl.sum(tl.where(digits == digit, histogram, 0), 0)
    return digit, above, equal
