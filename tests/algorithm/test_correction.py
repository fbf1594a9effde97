"""Which tokens are polluted, and that none is lost."""

from __future__ import annotations

import pytest
import torch

from tidaldecode import TidalError
from tidaldecode.algorithm.correction import PollutedTokens


def token(number: int, batch: int = 2) -> torch.Tensor:
    return torch.full((batch, 1), number)


def filled(first: int, count: int) -> PollutedTokens:
    block = PollutedTokens()
    for column in range(first, first + count):
        block.add(column, token(column), token(column), None)
    return block


def test_a_block_is_handed_over_whole_and_once():
    block, seen = filled(10, 3), []
    assert block.correct(lambda b: seen.append((b.begin, torch.cat(b.inputs, 1)[0].tolist()))) == 3
    assert seen == [(10, [10, 11, 12])]
    assert block.correct(seen.append) == 0 and len(seen) == 1
    block.add(13, token(13), token(13), None)
    assert (block.begin, block.end) == (13, 14)


def test_a_failed_correction_forgets_nothing():
    block = filled(10, 3)
    with pytest.raises(KeyboardInterrupt):
        block.correct(lambda b: (_ for _ in ()).throw(KeyboardInterrupt))
    assert (block.begin, len(block)) == (10, 3)


@pytest.mark.parametrize(("length", "left"), [(13, 3), (12, 2), (10, 0), (4, 0), (99, 3)])
def test_tokens_that_a_cache_dropped_are_forgotten(length, left):
    block = filled(10, 3)
    block.cut(length)
    assert len(block) == left


def test_a_token_that_replaces_a_dropped_one_is_noted_instead():
    block = filled(10, 3)
    block.add(11, token(77), token(11), None)
    assert [int(t[0]) for t in block.inputs] == [10, 77]


@pytest.mark.parametrize(("column", "batch"), [(14, 2), (13, 3)])
def test_columns_or_rows_that_do_not_go_on_are_refused(column, batch):
    with pytest.raises(TidalError, match=r"^cache: expected the next of 2 rows in column 13, got"):
        filled(10, 3).add(column, token(0, batch), token(0, batch), None)
