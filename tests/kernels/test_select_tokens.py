"""select_tokens: its promises as properties, over scores made to tie, to be absent and to be NaN."""

import pytest
import torch
from hypothesis import given, settings
from reference_selection import assert_selection_is_exact, calls, int32

from tidaldecode.errors import TidalError
from tidaldecode.kernels import select_tokens

NAN, INF = float("nan"), float("inf")


def check(call: dict) -> None:
    assert_selection_is_exact(select_tokens(**call), call)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(calls())
def test_any_selection_keeps_every_promise(call):
    check(call)


@pytest.mark.parametrize("budget", [1, 2, 5, 63, 64, 65])
def test_equal_scores_go_to_the_lower_positions(budget):
    selection = select_tokens(torch.zeros(2, 3, 64), int32([64, 64]), budget=budget)
    expected = [*range(min(budget - 1, 63)), 63][:budget] + [-1] * (budget - 64)
    assert (selection.positions == int32(expected)).all()


def test_long_rows_with_many_ties_keep_every_promise():
    scores = torch.randint(0, 4, (2, 2, 700)).float()
    lengths, starts = int32([700, 512]), int32([0, 100])
    options = {"sink_tokens": 4, "recent_tokens": 15, "budget": 256}
    check({"scores": scores, "seq_lens": lengths, "starts": starts, **options})


@pytest.mark.parametrize("special", [NAN, INF, -INF, torch.finfo(torch.float32).min])
def test_special_scores_never_displace_sinks_recents_and_the_newest(special):
    scores = torch.full((1, 1, 20), special)
    selection = select_tokens(scores, int32([18]), budget=7, sink_tokens=2, recent_tokens=2)
    assert selection.positions.tolist() == [[[0, 1, 2, 3, 15, 16, 17]]]


@pytest.mark.parametrize("special", [NAN, -INF, torch.finfo(torch.float32).min])
def test_the_lowest_scores_still_win_over_positions_outside_the_row(special):
    scores = torch.full((1, 1, 20), special)
    selection = select_tokens(scores, int32([16]), starts=int32([7]), budget=4, recent_tokens=1)
    assert selection.positions.tolist() == [[[7, 8, 14, 15]]]


def test_nan_loses_to_every_number_and_infinity_wins():
    scores = torch.tensor([[[NAN, 1.0, NAN, -3e38, INF, NAN, 2.0, 0.0]]])
    selection = select_tokens(scores, int32([8]), budget=5)
    assert selection.positions.tolist() == [[[1, 3, 4, 6, 7]]]


def test_sinks_are_counted_from_the_start_of_the_row():
    selection = select_tokens(
        torch.zeros(1, 1, 12), int32([12]), starts=int32([5]), budget=3, sink_tokens=2
    )
    assert selection.positions.tolist() == [[[5, 6, 11]]]


def test_recents_are_those_before_the_newest():
    scores = torch.arange(12, 0, -1.0).view(1, 1, 12)
    selection = select_tokens(scores, int32([10]), budget=4, recent_tokens=3)
    assert selection.positions.tolist() == [[[6, 7, 8, 9]]]


def test_scores_outside_a_row_are_ignored():
    scores = torch.tensor([[[INF, 9.0, 1.0, 2.0, 3.0, 9.0, NAN, INF]]])
    selection = select_tokens(scores, int32([5]), starts=int32([2]), budget=2)
    assert selection.positions.tolist() == [[[3, 4]]]
    assert selection.counts.tolist() == [[2]]


def test_a_budget_beyond_the_width_selects_the_row_whole():
    selection = select_tokens(torch.zeros(1, 2, 3), int32([3]), budget=9)
    assert (selection.positions == int32([0, 1, 2, -1, -1, -1, -1, -1, -1])).all()
    assert selection.counts.tolist() == [[3, 3]]


def test_an_empty_row_selects_nothing():
    selection = select_tokens(torch.zeros(2, 1, 6), int32([0, 4]), starts=int32([0, 4]), budget=3)
    assert (selection.positions == -1).all() and (selection.counts == 0).all()


@pytest.mark.parametrize("sets", [1, 2, 8])
def test_sets_are_independent_of_each_other(sets):
    scores = torch.randn(3, sets, 50)
    lengths, starts = int32([50, 31, 6]), int32([0, 9, 2])
    options = {"budget": 12, "sink_tokens": 2, "recent_tokens": 3, "starts": starts}
    together = select_tokens(scores, lengths, **options)
    for index in range(sets):
        alone = select_tokens(scores[:, index : index + 1], lengths, **options)
        assert torch.equal(together.positions[:, index : index + 1], alone.positions)
        assert torch.equal(together.counts[:, index : index + 1], alone.counts)


def test_repeated_runs_are_equal_and_leave_the_scores_alone():
    scores = torch.randint(0, 5, (2, 4, 300)).float()
    before = scores.clone()
    runs = [select_tokens(scores, int32([300, 200]), budget=64) for _ in range(3)]
    assert all(torch.equal(runs[0].positions, again.positions) for again in runs[1:])
    assert torch.equal(scores, before)


def test_scores_that_require_a_gradient_are_ranked_as_any():
    scores = torch.rand(2, 3, 20)
    lens = int32([20, 11])
    plain = select_tokens(scores, lens, budget=5)
    ranked = select_tokens(scores.requires_grad_(), lens, budget=5)
    assert torch.equal(plain.positions, ranked.positions)


def test_a_selection_moves_between_devices_only_where_it_must():
    selection = select_tokens(torch.zeros(1, 1, 4), int32([4]), budget=2)
    assert selection.to(torch.device("cpu")) is selection
    moved = selection.to(torch.device("meta"))
    assert moved.positions.device.type == moved.counts.device.type == "meta"


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"scores": torch.zeros(2, 8)}, r"^scores: expected shape \[any, any, any\], got \[2, 8\]"),
        ({"scores": torch.zeros(2, 1, 8).half()}, "^scores: expected dtype float32, got float16"),
        ({"scores": torch.zeros(2, 1, 8).double()}, "^scores: expected dtype float32, got float64"),
        ({"seq_lens": int32([8])}, r"^seq_lens: expected shape \[2\], got \[1\]"),
        ({"seq_lens": torch.tensor([8, 8])}, "^seq_lens: expected dtype int32, got int64"),
        ({"seq_lens": int32([8, 8]).to("meta")}, "^seq_lens: expected device cpu.*got meta"),
        ({"starts": int32([0, 0, 0])}, r"^starts: expected shape \[2\], got \[3\]"),
        ({"starts": torch.zeros(2)}, "^starts: expected dtype int32, got float32"),
        ({"starts": int32([0, 0]).to("meta")}, "^starts: expected device cpu.*got meta"),
        ({"budget": 0}, "^budget: expected at least .* = 1 tokens, got 0"),
        ({"budget": -3}, "^budget: expected at least .* = 1 tokens, got -3"),
        ({"sink_tokens": 4, "recent_tokens": 3, "budget": 7}, "^budget: .* = 8 tokens, got 7"),
        ({"sink_tokens": -1, "budget": 4}, "^budget: "),
        ({"recent_tokens": -1, "budget": 4}, "^budget: "),
        ({"backend": "cuda"}, "^backend: expected one of auto, torch, numba, triton, got 'cuda'"),
        ({"backend": "triton"}, "^backend: the Triton kernels expect tensors on a GPU, got cpu"),
    ],
)
def test_what_breaks_the_contract_is_refused_by_name(changes, message, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    call = {"scores": torch.zeros(2, 1, 8), "seq_lens": int32([8, 8]), "budget": 4}
    with pytest.raises(TidalError, match=message):
        select_tokens(**{**call, **changes})


def test_the_smallest_budget_is_the_forced_tokens():
    selection = select_tokens(
        torch.zeros(1, 1, 20), int32([20]), budget=8, sink_tokens=4, recent_tokens=3
    )
    assert selection.positions.tolist() == [[[0, 1, 2, 3, 16, 17, 18, 19]]]
