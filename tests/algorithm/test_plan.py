"""LayerPlan: what it prints, what it assigns, and what it refuses."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tidaldecode.algorithm import LayerPlan, Role, default_select_layers
from tidaldecode.errors import TidalError

D, S, SPARSE, HOST = Role.DENSE, Role.SELECT, Role.SPARSE, Role.HOST
ESTIMATE = Role.ESTIMATE


def test_the_papers_plan_prints_as_the_readme_shows_it():
    plan = LayerPlan.build(32, dense_layers=2, select_layers=(2, 13))
    assert str(plan) == "DDS..........S.................."
    assert f"{plan}" == str(plan) and not plan.preselected


def test_a_plan_reads_like_a_sequence_of_roles():
    plan = LayerPlan.build(6, dense_layers=1, select_layers=(1, 3))
    assert list(plan) == [D, S, SPARSE, S, SPARSE, SPARSE]
    assert len(plan) == 6 and plan[0] is D and plan[5] is SPARSE
    assert plan.layers(D) == (0,)
    assert plan.layers(S) == (1, 3)
    assert plan.layers(SPARSE) == (2, 4, 5)
    assert plan.layers(HOST) == ()


def test_plans_are_values():
    plan = LayerPlan.build(5, dense_layers=1, select_layers=(1,))
    assert plan == LayerPlan((D, S, SPARSE, SPARSE, SPARSE)) and len({plan, plan}) == 1
    with pytest.raises(AttributeError):
        plan.roles = ()


def test_layers_without_full_attention_stay_the_hosts():
    full = [layer % 3 == 2 for layer in range(15)]
    plan = LayerPlan.build(15, dense_layers=1, select_layers=(5, 11), full_attention=full)
    assert str(plan) == "--D--S--.--S--."


def test_dense_layers_are_counted_over_full_attention_layers_only():
    full = [False, True, False, True, True, True]
    plan = LayerPlan.build(6, dense_layers=2, select_layers=(4,), full_attention=full)
    assert str(plan) == "-D-DS."


def test_a_plan_without_selection_layers_is_preselected():
    plan = LayerPlan.build(4, dense_layers=1, select_layers=())
    assert str(plan) == "D..." and plan.preselected
    assert str(LayerPlan.build(3, dense_layers=0, select_layers=())) == "..."


def test_layers_that_pick_for_themselves_follow_the_dense_ones_and_need_no_selection():
    plan = LayerPlan.build(6, dense_layers=2, select_layers=(), estimate=True)
    assert str(plan) == "DDEEEE" and not plan.preselected
    assert plan.layers(ESTIMATE) == (2, 3, 4, 5)
    full = [True, False, True, True, False]
    hybrid = LayerPlan.build(
        5, dense_layers=1, select_layers=(), full_attention=full, estimate=True
    )
    assert str(hybrid) == "D-EE-"
    with pytest.raises(TidalError, match=r"^plan DDD: expected at least one sparse layer"):
        LayerPlan.build(3, dense_layers=3, select_layers=(), estimate=True)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.data())
def test_every_layer_of_a_plan_has_the_role_that_was_asked_for(data):
    full = data.draw(st.lists(st.booleans(), min_size=1, max_size=40))
    numbers = [layer for layer, is_full in enumerate(full) if is_full]
    dense = data.draw(st.integers(0, 3))
    later = numbers[dense:]
    if len(later) < 2:
        return
    chosen = sorted(data.draw(st.sets(st.sampled_from(later[1:-1] or later[:1]))) | {later[0]})
    plan = LayerPlan.build(len(full), dense_layers=dense, select_layers=chosen, full_attention=full)
    assert plan.layers(HOST) == tuple(i for i, is_full in enumerate(full) if not is_full)
    assert plan.layers(D) == tuple(numbers[:dense])
    assert plan.layers(S) == tuple(chosen)
    assert plan.layers(SPARSE) == tuple(i for i in later if i not in chosen)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"select_layers": (2, 8)}, r"^select_layers: expected layer numbers from 0 to 7, got 8"),
        ({"select_layers": (-1, 2)}, r"^select_layers: expected layer numbers from 0 to 7, got -1"),
        (
            {"select_layers": (1, 4)},
            r"^select_layers: expected layers after the 2 dense .* layer 1",
        ),
        ({"select_layers": (3,)}, r"^plan DD\.S\.\.\.\.: expected a selection layer .* layer 2;"),
        ({"select_layers": range(2, 8)}, r"^plan DDSSSSSS: expected at least one sparse layer"),
        ({"select_layers": (), "dense_layers": 8}, r"^plan DDDDDDDD: expected at least one sparse"),
        ({"select_layers": (), "dense_layers": 99}, r"^plan DDDDDDDD: .* dense_layers=99"),
        (
            {"select_layers": (4,), "full_attention": [True] * 4 + [False] + [True] * 3},
            r"^select_layers: expected layers with full attention \(0, 1, 2, 3, 5, 6, 7\), got layer 4",
        ),
        (
            {"select_layers": (4,), "full_attention": [False] * 8},
            r"^select_layers: .*\(this model has none\), got layer 4",
        ),
        (
            {"select_layers": (), "full_attention": [False] * 8},
            r"^plan --------: expected at least one sparse layer, found none among 0 full-attention",
        ),
    ],
)
def test_a_plan_that_cannot_work_is_refused(options, message):
    with pytest.raises(TidalError, match=message):
        LayerPlan.build(8, **{"dense_layers": 2, **options})


def test_a_sparse_layer_needs_a_selection_before_it_however_the_plan_is_made():
    with pytest.raises(TidalError, match=r"^plan D\.S: .* found none before layer 1"):
        LayerPlan((D, SPARSE, S))
    assert LayerPlan((D, SPARSE, S), preselected=True).preselected
    assert LayerPlan((D, S, SPARSE))[2] is SPARSE


def test_default_selection_of_32_layers_is_the_papers():
    assert default_select_layers([True] * 32, 2) == (2, 13)


@pytest.mark.parametrize(
    "layers, dense, expected",
    [(28, 2, (2, 11)), (16, 2, (2, 6)), (5, 2, (2, 3)), (80, 2, (2, 32)), (12, 0, (0, 5))],
)
def test_default_selection_is_the_first_sparse_candidate_and_one_near_two_fifths(
    layers, dense, expected
):
    assert default_select_layers([True] * layers, dense) == expected


def test_default_selection_of_a_hybrid_takes_full_attention_layers_only():
    full = [layer % 6 == 5 for layer in range(48)]
    assert default_select_layers(full, 2) == (17, 23)
    assert default_select_layers([layer % 2 == 1 for layer in range(32)], 2) == (5, 13)


def test_of_two_equally_near_layers_the_default_is_the_earlier():
    assert default_select_layers([layer % 2 == 1 for layer in range(10)], 0) == (1, 3)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.lists(st.booleans(), max_size=60), st.integers(0, 4))
def test_default_selection_makes_a_plan_or_says_why_not(full, dense):
    if sum(full) < dense + 3:
        with pytest.raises(TidalError, match=rf"^model: .* at least {dense + 3} layers with full"):
            default_select_layers(full, dense)
        return
    chosen = default_select_layers(full, dense)
    plan = LayerPlan.build(len(full), dense_layers=dense, select_layers=chosen, full_attention=full)
    numbers = [layer for layer, is_full in enumerate(full) if is_full]
    assert chosen[0] == numbers[dense] and plan.layers(S) == chosen
    nearest = min(abs(layer - 0.4 * len(full)) for layer in numbers[dense + 1 : -1])
    assert abs(chosen[1] - 0.4 * len(full)) == nearest
    assert plan.layers(SPARSE)[-1] == numbers[-1]


def test_a_plan_needs_one_flag_for_each_layer():
    for flags in ([True] * 3, [True] * 6):
        with pytest.raises(TidalError, match=r"^full_attention: expected one value for each of 5"):
            LayerPlan.build(5, dense_layers=1, select_layers=(1,), full_attention=flags)


def test_a_negative_number_of_dense_layers_is_refused():
    with pytest.raises(TidalError, match=r"^dense_layers: expected a number from 0 up, got -1"):
        LayerPlan.build(8, dense_layers=-1, select_layers=())
