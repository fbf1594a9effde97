"""The length of drafts against costs and acceptance that are known."""

from __future__ import annotations

import pytest

from tidaldecode.algorithm.draft_length import FIRST, MOST, PROBE_EVERY, DraftLength


def settle(acceptance: float, draft: float, verify: float, per_query: float, rounds: int = 60):
    """Lengths chosen where every round accepts its mean and costs are exact."""
    length, chosen = DraftLength(), []
    for _ in range(rounds):
        k = length.choose()
        chosen.append(k)
        # Many rows, so that counts are close to their mean.
        full = round(100 * acceptance**k) if k else 0
        rows = [k] * full + _others(acceptance, k, 100 - full)
        length.observe(k, rows, k * draft, verify + per_query * k)
    return chosen


def _others(acceptance: float, k: int, count: int) -> list[int]:
    """Accepted tokens of the rows that lost one, in the proportions of a geometric law."""
    if not k or not count:
        return []
    weights = [acceptance**n for n in range(k)]
    return [n for n, w in enumerate(weights) for _ in range(round(count * w / sum(weights)))] or [0]


def best(acceptance: float, draft: float, verify: float, per_query: float) -> int:
    def speed(k: int) -> float:
        tokens = sum(acceptance**n for n in range(k + 1))
        return tokens / (k * draft + verify + k * per_query)

    return max(range(MOST + 1), key=speed)


@pytest.mark.parametrize(
    ("acceptance", "draft", "verify", "per_query"),
    [(0.95, 0.3, 1.0, 0.0), (0.8, 0.5, 1.0, 0.02), (0.98, 0.05, 1.0, 0.01), (0.6, 0.2, 1.0, 0.1)],
)
def test_it_finds_the_length_that_costs_and_acceptance_call_for(
    acceptance, draft, verify, per_query
):
    chosen = settle(acceptance, draft, verify, per_query)
    assert chosen[0] == FIRST
    assert abs(chosen[-1] - best(acceptance, draft, verify, per_query)) <= 1


def test_a_first_token_that_costs_more_makes_longer_drafts_cheaper_for_each_token():
    def settle_on(first: float) -> int:
        length = DraftLength()
        for _ in range(60):
            k = length.choose()
            length.observe(k, [min(k, 6)] * 20, first + 0.1 * k if k else 0.0, 1.0)
        return length.choose()

    assert settle_on(0.0) < settle_on(2.0)


def test_where_no_draft_pays_it_stops_and_tries_again_now_and_then():
    chosen = settle(0.3, 1.0, 1.0, 0.0, rounds=3 * PROBE_EVERY + 10)
    assert chosen.count(0) > 2.5 * PROBE_EVERY
    assert 2 <= chosen[1:].count(1) <= 4


def test_a_fixed_length_needs_no_clock():
    length = DraftLength(5)
    length.observe(5, [0], 1.0, 1.0)
    assert length.choose() == 5 and not length.measures


def test_rounds_without_rows_teach_nothing():
    length = DraftLength()
    length.observe(4, [], 1.0, 1.0)
    assert length.choose() == FIRST
