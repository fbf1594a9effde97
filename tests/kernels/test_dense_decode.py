"""dense_decode against exact attention: any shape, layout, row range, chunking and score kind."""

import importlib
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import LAYOUTS, Case, cases, make_case
from reference_attention import assert_attends_exactly, assert_scores_are_exact, attention

from tidaldecode.kernels import dense_decode

# The package exports the function under its module's name.
MODULE = importlib.import_module("tidaldecode.kernels.dense_decode")
SCORE_KINDS = ("shared", "kv_head", "query_head", "query_head_logits")
HALF = (torch.float16, torch.bfloat16)
pytestmark = pytest.mark.usefixtures("cpu_backend")


@contextmanager
def chunk_logits(limit: int | None, queries_first: bool = False) -> Iterator[None]:
    """Walk the cache in chunks of ``limit`` logits (16 tokens at least); None: as shipped."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MODULE, "is_intel", lambda: queries_first)
        if limit is not None:
            patch.setattr(MODULE, "_CHUNK_LOGITS", limit)
        yield


def run(case: Case, **options):
    return dense_decode(
        case.q,
        seq_lens=case.seq_lens,
        starts=case.starts,
        scale=case.scale,
        **case.cache(),
        **options,
    )


def check(case: Case, kind: str | None = None) -> None:
    out, lse, scores = run(case, scores=kind)
    assert_attends_exactly(out, lse, case.q, case.k, case.v, case.keep, case.scale)
    if kind is None:
        assert scores is None
    else:
        assert_scores_are_exact(scores, case, kind)


@settings(max_examples=120, deadline=None, derandomize=True)
@given(
    cases(),
    st.sampled_from((None, *SCORE_KINDS)),
    st.sampled_from((1, 256, 1024, None)),
    st.booleans(),
)
def test_any_case_equals_exact_attention(case, kind, chunk, queries_first):
    with chunk_logits(chunk, queries_first):
        check(case, kind)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(cases(HALF), st.sampled_from((None, *SCORE_KINDS)), st.sampled_from((1, 1024, None)))
def test_half_precision_is_accumulated_in_fp32(case, kind, chunk):
    with chunk_logits(chunk):
        check(case, kind)


@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
def test_the_error_is_no_more_than_twice_that_of_plain_attention_in_the_same_dtype(dtype):
    case = make_case(4, 2, 4, 64, 300, dtype=dtype, ends=[300, 257, 64, 7], starts=[0, 5, 0, 3])
    out, _, _ = run(case)
    exact, _, _ = attention(case.q, case.k, case.v, case.keep, case.scale)
    plain, _, _ = attention(case.q, case.k, case.v, case.keep, case.scale, dtype=dtype)
    unit = torch.finfo(dtype).eps * exact.abs().amax()
    assert (out - exact).abs().amax() <= 2 * (plain - exact).abs().amax() + 2 * unit


@pytest.mark.parametrize("queries_first", [False, True])
@pytest.mark.parametrize("kind", [None, *SCORE_KINDS])
@pytest.mark.parametrize("tokens", [1, 15, 16, 17, 31, 32, 33, 48, 100, 161])
def test_chunk_edges_lose_and_repeat_no_token(tokens, kind, queries_first):
    case = make_case(2, 2, 3, 16, tokens, ends=[tokens, tokens - 1], starts=[0, tokens // 3])
    with chunk_logits(1, queries_first):
        check(case, kind)


@pytest.mark.parametrize("queries_first", [False, True])
@pytest.mark.parametrize("chunks, beyond", [(1, -1), (1, 0), (1, 1), (2, 1)])
def test_contexts_around_the_shipped_chunk_size_equal_exact_attention(
    chunks, beyond, queries_first
):
    chunk = (MODULE._CHUNK_LOGITS << queries_first) // 28
    case = make_case(1, 4, 7, 16, chunks * chunk + beyond, sharpness=3.0, layout="transposed")
    with chunk_logits(None, queries_first):
        check(case, "shared")


def test_the_peak_logit_may_lie_in_any_chunk():
    for place in (0, 20, 40, 60):
        case = make_case(1, 1, 2, 16, 64)
        case.k[0, 0, place] = 4 * case.q[0, 0]
        with chunk_logits(1):
            check(case, "shared")


@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
@pytest.mark.parametrize("chunk", [1, None])
def test_huge_logits_do_not_overflow(dtype, chunk):
    case = make_case(2, 2, 2, 64, 70, dtype=dtype, sharpness=1.0, starts=[0, 9])
    case.q, case.k, case.scale = case.q * 60, case.k * 60, 1.0
    logits = attention(case.q, case.k, case.v, case.keep, case.scale)[2]
    assert logits.amax() > 65504  # beyond fp16, and exp of it beyond everything
    with chunk_logits(chunk):
        for kind in SCORE_KINDS:
            check(case, kind)


def test_equal_logits_average_the_values():
    case = make_case(1, 2, 2, 16, 50)
    case.q.zero_()
    out, lse, scores = run(case, scores="query_head")
    torch.testing.assert_close(out[0, 0], case.v[0, 0].mean(0))
    torch.testing.assert_close(out[0, 3], case.v[0, 1].mean(0))
    torch.testing.assert_close(lse, torch.full((1, 4), 50.0).log())
    torch.testing.assert_close(scores, torch.full((1, 4, 50), 0.02))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("poison", [float("nan"), float("inf"), 3e38])
def test_memory_outside_a_row_changes_no_bit(layout, poison):
    ends, starts = [40, 17, 0, 33], [0, 5, 0, 33]
    torch.manual_seed(1)
    clean = make_case(4, 2, 3, 32, 40, ends=ends, starts=starts, layout=layout, poison=0.0)
    torch.manual_seed(1)
    poisoned = make_case(4, 2, 3, 32, 40, ends=ends, starts=starts, layout=layout, poison=poison)
    for kind in SCORE_KINDS:
        for expected, got in zip(run(clean, scores=kind), run(poisoned, scores=kind), strict=True):
            assert torch.equal(expected, got)


@pytest.mark.parametrize("starts", [None, [0, 0, 0], [0, 7, 0]])
def test_an_empty_row_gives_zeros_and_minus_infinity(starts):
    ends = [0, 7 if starts and starts[1] else 0, 9]
    case = make_case(3, 2, 2, 16, 9, ends=ends, starts=starts)
    out, lse, scores = run(case, scores="shared")
    assert (out[:2] == 0).all() and lse[:2].isneginf().all() and scores[:2].isneginf().all()
    check(case, "shared")


def test_a_batch_of_empty_rows_has_scores_of_any_width():
    out, lse, scores = run(make_case(2, 1, 2, 16, 9, ends=[0, 0]), scores="kv_head")
    assert (out == 0).all() and lse.isneginf().all() and scores.isneginf().all()
    assert scores.shape[:2] == (2, 1)


@pytest.mark.parametrize("block_size", [1, 3, 16])
@pytest.mark.parametrize("kind", SCORE_KINDS)
def test_a_paged_cache_gives_what_a_contiguous_one_gives(block_size, kind):
    case = make_case(3, 2, 2, 32, 50, ends=[50, 31, 1], starts=[0, 16, 0])
    contiguous = run(case, scores=kind)
    case.layout = f"paged {block_size}"
    for expected, got in zip(contiguous, run(case, scores=kind), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("block_size", [1, 3, 16])
def test_rows_may_share_blocks(block_size):
    case = make_case(2, 2, 2, 16, 3 * 16, layout=f"paged {block_size}", ends=[48, 20])
    case.k[1], case.v[1] = case.k[0], case.v[0]
    cache = case.cache(torch.ones(2, 48, dtype=torch.bool))
    cache["block_table"][1] = cache["block_table"][0]
    out, lse, _ = dense_decode(case.q, seq_lens=case.seq_lens, scale=case.scale, **cache)
    assert_attends_exactly(out, lse, case.q, case.k, case.v, case.keep, case.scale)


@pytest.mark.parametrize(
    "kind, total", [("shared", 6.0), ("kv_head", 3.0), ("query_head", 1.0)], ids=lambda x: str(x)
)
def test_softmax_scores_of_a_set_sum_to_the_heads_that_share_it(kind, total):
    case = make_case(3, 2, 3, 32, 90, ends=[90, 60, 8], starts=[0, 31, 7], sharpness=4.0)
    with chunk_logits(1):
        scores = run(case, scores=kind)[2]
    sums = torch.where(scores.isneginf(), 0, scores).double().sum(-1)
    torch.testing.assert_close(sums, torch.full_like(sums, total), rtol=1e-5, atol=0)


def test_asking_for_scores_changes_no_bit_of_the_output():
    case = make_case(2, 2, 2, 32, 70)
    for kind in SCORE_KINDS:
        for expected, got in zip(run(case)[:2], run(case, scores=kind)[:2], strict=True):
            assert torch.equal(expected, got)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_repeated_runs_are_equal_to_the_bit(layout):
    case = make_case(3, 2, 4, 64, 200, ends=[200, 3, 77], layout=layout)
    cache = case.cache()
    runs = [
        dense_decode(case.q, seq_lens=case.seq_lens, scale=case.scale, scores="shared", **cache)
        for _ in range(3)
    ]
    for again in runs[1:]:
        for expected, got in zip(runs[0], again, strict=True):
            assert torch.equal(expected, got)


def test_a_row_does_not_depend_on_its_neighbours():
    case = make_case(3, 2, 2, 32, 40, ends=[40, 11, 25], starts=[2, 0, 7])
    out, lse, _ = run(case)
    for row in range(3):
        one = slice(row, row + 1)
        alone = Case(
            case.q[one],
            case.k[one],
            case.v[one],
            case.seq_lens[one],
            case.starts[one],
            case.scale,
        )
        alone_out, alone_lse, _ = run(alone)
        assert torch.equal(out[one], alone_out) and torch.equal(lse[one], alone_lse)


@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
def test_arguments_are_left_as_they_were(dtype):
    case = make_case(2, 2, 2, 16, 40, dtype=dtype, layout="transposed")
    cache = case.cache()
    before = [tensor.clone() for tensor in (case.q, cache["k"], cache["v"], case.seq_lens)]
    for kind in SCORE_KINDS:
        dense_decode(case.q, seq_lens=case.seq_lens, scale=case.scale, scores=kind, **cache)
    after = (case.q, cache["k"], cache["v"], case.seq_lens)
    assert all(torch.equal(old, new) for old, new in zip(before, after, strict=True))


def test_queries_may_be_a_strided_view():
    case = make_case(2, 2, 2, 16, 20)
    case.q = torch.randn(2, 16, 8).transpose(1, 2)[:, ::2]
    assert not case.q.is_contiguous()
    check(case, "shared")
