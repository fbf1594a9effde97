"""The search finds the best layers within its stated number of measurements."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tidaldecode.algorithm.calibration import LayerSearch, predicted_share, rank_correlation


def additive(weights):
    """A loss that any greedy search solves: every layer takes its own part away."""

    def measure(layers):
        return sum(weights.values()) - sum(weights[layer] for layer in layers)

    return measure


@given(st.permutations(range(2, 12)), st.integers(1, 4))
def test_an_additive_loss_is_solved_and_measured_once_a_set(order, count):
    weights = {layer: 2.0**-rank for rank, layer in enumerate(order)}
    calls = []

    def measure(layers):
        calls.append(layers)
        return additive(weights)(layers)

    search = LayerSearch(measure, range(2, 12))
    best = search.run(count)
    rest = [layer for layer in order if layer != 2]
    assert best == tuple(sorted([2, *rest[: count - 1]]))
    assert len(calls) == len(set(calls)) == sum(search.passes.values())


def test_an_exchange_repairs_what_greedy_growth_got_wrong():
    losses = {(2,): 9, (2, 5): 3, (2, 4): 4, (2, 7): 4, (2, 4, 5): 2, (2, 5, 7): 2, (2, 4, 7): 0}
    search = LayerSearch(lambda layers: losses.get(layers, 8), (2, 3, 4, 5, 6, 7))
    assert search.run(3) == (2, 4, 7)
    assert search.best[2] == (2, 5)


def test_the_first_candidate_always_selects_and_layers_ascend():
    search = LayerSearch(lambda layers: 9 - len(layers) + layers[-1] / 100, (3, 5, 7, 9))
    assert search.run(4) == (3, 5, 7, 9)
    assert all(layers[0] == 3 and list(layers) == sorted(layers) for layers in search.losses)


def test_growth_stops_below_the_target():
    search = LayerSearch(lambda layers: 1 / len(layers) ** 4, range(2, 8))
    assert len(search.run(4, target=0.07)) == 2


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_a_model_of_32_layers_takes_at_most_a_hundred_passes_a_count(count):
    scores = {layers: hash(layers) % 1000 for layers in itertools.combinations(range(2, 31), 2)}
    search = LayerSearch(lambda layers: scores.get(layers, 500 - sum(layers) % 97), range(2, 31))
    search.run(count)
    assert max(search.passes.values()) <= 100


def test_the_signal_follows_the_nearest_selector_above():
    mass = [[0.0] * 6 for _ in range(6)]
    mass[2][3], mass[4][5] = 0.9, 0.5
    assert predicted_share(mass, (2, 4)) == pytest.approx(0.7)
    mass[2][4], mass[2][5] = 0.2, 0.1
    assert predicted_share(mass, (2,)) == pytest.approx(0.4)


def test_rank_correlation_is_one_for_equal_order_and_minus_one_for_the_reverse():
    assert rank_correlation([1, 2, 5], [10, 20, 21]) == 1
    assert rank_correlation([1, 2, 5], [3, 2, 1]) == -1
    assert rank_correlation([1, 2, 3, 4], [2, 1, 3, 4]) == pytest.approx(0.8)
