"""Intervals, against values that others published or that follow by hand."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tidaldecode.eval.statistics import Estimate, mean_interval, wilson


@pytest.mark.parametrize(
    ("hits", "n", "low", "high"),
    [
        (0, 10, 0.0, 0.2775),
        (10, 10, 0.7225, 1.0),
        (50, 100, 0.4038, 0.5962),
        (15, 148, 0.0624, 0.1605),  # Newcombe 1998, table I, method 3
        (81, 263, 0.2553, 0.3662),  # the same
        (1, 1, 0.2065, 1.0),
        (0, 1, 0.0, 0.7935),
    ],
)
def test_wilsons_interval_has_its_known_values(hits, n, low, high):
    found = wilson(hits, n)
    assert found.mean == hits / n and found.n == n
    assert (found.low, found.high) == (pytest.approx(low, abs=6e-5), pytest.approx(high, abs=6e-5))


@given(st.integers(1, 500), st.floats(0, 1))
def test_wilsons_interval_holds_the_share_and_stays_in_bounds(n, share):
    found = wilson(share * n, n)
    assert 0 <= found.low <= found.high <= 1
    assert found.low - 1e-9 <= found.mean <= found.high + 1e-9
    mirrored = wilson(n - share * n, n)
    assert mirrored.low == pytest.approx(1 - found.high, abs=1e-9)


def test_a_mean_has_the_normal_interval_of_its_standard_error():
    found = mean_interval([1.0, 2.0, 3.0, 4.0])
    half = 1.959964 * math.sqrt(5 / 3) / 2  # the sample's variance is 5/3, not 5/4
    assert (found.mean, found.n) == (2.5, 4)
    assert (found.low, found.high) == (pytest.approx(2.5 - half), pytest.approx(2.5 + half))


def test_one_value_has_a_mean_and_no_interval():
    assert mean_interval([0.25]) == Estimate(0.25, None, None, 1)


def test_equal_values_have_an_interval_of_no_width():
    assert mean_interval([3.0] * 5) == Estimate(3.0, 3.0, 3.0, 5)
