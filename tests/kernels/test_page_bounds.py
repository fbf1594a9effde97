"""page_bound_scores: never below a true logit of the page, and blind to all outside a row's range."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import LAYOUTS, Case, cases, make_case
from reference_attention import attention, logit_rounding

from tidaldecode.errors import TidalError
from tidaldecode.kernels import page_bound_scores

PAGES = st.sampled_from((1, 2, 3, 7, 16, 64))


def scored(case: Case, page_tokens: int = 16, **changes) -> torch.Tensor:
    call = {"seq_lens": case.seq_lens, "starts": case.starts, "scale": case.scale, **case.cache()}
    return page_bound_scores(case.q, page_tokens=page_tokens, **{**call, **changes})


def true_logits(case: Case, width: int) -> torch.Tensor:
    return attention(case.q, case.k, case.v, case.keep, case.scale)[2][..., :width]


def by_hand(case: Case, page_tokens: int) -> torch.Tensor:
    """The formula of Quest, page by page and in fp64."""
    width = int(case.seq_lens.max())
    batch, heads, _ = case.q.shape
    scores = torch.full((batch, heads, width), -torch.inf, dtype=torch.float64)
    group = heads // case.k.shape[1]
    starts = [0] * batch if case.starts is None else case.starts.tolist()
    for row, (start, end) in enumerate(zip(starts, case.seq_lens.tolist(), strict=True)):
        for first in range(start, end, page_tokens):
            last = min(first + page_tokens, end)
            keys = case.k[row, :, first:last].double().repeat_interleave(group, 0)
            query = case.q[row].double()
            low, high = query * keys.amin(1), query * keys.amax(1)
            scores[row, :, first:last] = torch.maximum(low, high).sum(-1, keepdim=True) * case.scale
    return scores


def check(case: Case, page_tokens: int) -> None:
    scores = scored(case, page_tokens)
    width = int(case.seq_lens.max())
    assert scores.shape == (*case.q.shape[:2], width) and scores.dtype == torch.float32
    inside = case.keep[..., :width]
    assert torch.equal(scores.isneginf(), ~inside), "-inf exactly outside the range"
    assert torch.isfinite(scores[inside]).all()
    rounding = logit_rounding(case.q, case.k, case.scale)
    true = true_logits(case, width)
    assert (scores[inside] >= true[inside] - rounding).all(), "a bound below a logit"
    expected = by_hand(case, page_tokens)
    assert ((scores - expected)[inside].abs() <= 2 * rounding).all()
    if page_tokens == 1:
        assert ((scores - true)[inside].abs() <= rounding).all()


@settings(max_examples=80, deadline=None, derandomize=True)
@given(cases((torch.float32, torch.float16, torch.bfloat16)), PAGES)
def test_any_bound_holds_and_is_the_formulas(case, page_tokens):
    check(case, page_tokens)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("page_tokens", [1, 4, 16, 100])
def test_ragged_rows_that_start_late_are_bounded_in_every_layout(layout, page_tokens):
    rows = {"ends": [90, 61, 9, 30], "starts": [0, 13, 5, 29]}
    check(make_case(4, 2, 3, 16, 90, **rows, layout=layout, sharpness=3.0), page_tokens)


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "contiguous"])
def test_every_layout_gives_the_same_bounds(layout):
    case = make_case(3, 2, 2, 16, 50, ends=[50, 33, 7], starts=[3, 0, 7])
    expected = scored(case, 8)
    case.layout = layout
    assert torch.equal(scored(case, 8), expected)


def test_pages_are_counted_from_the_start_of_the_row():
    case = make_case(1, 1, 2, 16, 40, ends=[37], starts=[5])
    scores = scored(case, 8)[0]
    for first in range(5, 37, 8):
        page = scores[:, first : min(first + 8, 37)]
        assert torch.equal(page, page[:, :1].expand_as(page))
    edges = range(13, 37, 8)
    assert all((scores[:, edge] != scores[:, edge - 1]).all() for edge in edges)


def test_a_row_scores_the_same_wherever_it_is_padded():
    case = make_case(1, 2, 2, 16, 60, starts=[11])
    alone = Case(
        case.q, case.k[:, :, 11:], case.v[:, :, 11:], case.seq_lens - 11, None, case.scale
    )  # fmt: skip
    assert torch.equal(scored(case, 8)[..., 11:], scored(alone, 8))


def test_both_extremes_of_a_page_count():
    k = torch.tensor([[1.0, -2.0], [3.0, 5.0], [-4.0, 0.5]]).view(1, 1, 3, 2)
    lengths = torch.tensor([3], dtype=torch.int32)
    for query, bound in [((1, 1), 3 + 5), ((-1, -1), 4 + 2), ((1, -1), 3 + 2), ((-2, 0), 8)]:
        q = torch.tensor([[query]], dtype=torch.float32)
        scores = page_bound_scores(q, k, k, lengths, scale=0.5, page_tokens=3)
        assert scores.tolist() == [[[bound / 2] * 3]]


def test_each_query_head_is_bounded_by_the_keys_of_its_own_kv_head():
    case = make_case(1, 2, 3, 16, 20)
    scores = scored(case, 4)
    for kv_head in range(2):
        heads = slice(3 * kv_head, 3 * kv_head + 3)
        one = slice(kv_head, kv_head + 1)
        alone = Case(
            case.q[:, heads], case.k[:, one], case.v[:, one], case.seq_lens, None, case.scale
        )
        torch.testing.assert_close(scores[:, heads], scored(alone, 4), atol=1e-6, rtol=1e-6)


def test_a_short_last_page_is_bounded_by_its_own_keys():
    case = make_case(1, 1, 1, 16, 17, sharpness=3.0)
    scores = scored(case, 16)
    assert scores[0, 0, 16] == pytest.approx(true_logits(case, 17)[0, 0, 16].item(), abs=1e-4)
    assert scores[0, 0, 0] != scores[0, 0, 16]


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), -float("inf"), 1e30])
def test_nothing_outside_a_row_leaks_into_its_bounds(poison):
    options = {"ends": [40, 22, 0], "starts": [9, 3, 0]}
    torch.manual_seed(5)
    case = make_case(3, 2, 2, 16, 48, poison=poison, **options)
    clean = make_case(3, 2, 2, 16, 48, poison=0.0, **options)
    clean.q, clean.k, clean.v = case.q, case.k, case.v
    assert torch.equal(scored(case, 7), scored(clean, 7))


def test_empty_rows_and_an_empty_batch_score_nothing():
    empty = make_case(2, 1, 2, 16, 8, ends=[0, 5], starts=[0, 5])
    assert scored(empty).shape == (2, 2, 5) and scored(empty).isneginf().all()
    assert scored(make_case(2, 1, 2, 16, 8, ends=[0, 0])).shape == (2, 2, 0)


def test_the_cache_is_left_as_it_was():
    case = make_case(2, 2, 2, 16, 30)
    cache = case.cache()
    before = [cache["k"].clone(), cache["v"].clone(), case.q.clone()]
    runs = [scored(case, 4, **cache) for _ in range(2)]
    assert torch.equal(*runs)
    assert all(map(torch.equal, before, [cache["k"], cache["v"], case.q]))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"page_tokens": 0}, r"^page_tokens: expected a number from 1 up, got 0"),
        ({"page_tokens": -4}, r"^page_tokens: expected a number from 1 up, got -4"),
        ({"backend": "cuda"}, r"^backend: expected one of auto, torch, numba, triton, got 'cuda'"),
        ({"backend": "triton"}, r"^backend: .*Triton"),
        ({"v": torch.zeros(2, 2, 24, 8)}, r"^v: expected shape \[2, 2, 24, 16\]"),
        (
            {"k": torch.zeros(2, 3, 24, 16), "v": torch.zeros(2, 3, 24, 16)},
            r"^q: expected a number",
        ),
        (
            {"seq_lens": torch.tensor([25, 3], dtype=torch.int32)},
            r"^seq_lens: expected 0 <= starts",
        ),
        ({"seq_lens": torch.tensor([4, 3])}, r"^seq_lens: expected dtype int32"),
        ({"starts": torch.tensor([25, 0], dtype=torch.int32)}, r"^seq_lens: expected 0 <= starts"),
    ],
)
def test_what_breaks_the_contract_is_refused_by_name(changes, message):
    with pytest.raises(TidalError, match=message):
        scored(make_case(), **{"page_tokens": 16, **changes})
