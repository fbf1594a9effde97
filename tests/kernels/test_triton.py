"""The Triton kernels against the same references: interpreted on a CPU, compiled on a GPU."""

import importlib
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import LAYOUTS, Case, cases, make_case
from reference_attention import (
    assert_attends_exactly,
    assert_scores_are_exact,
    attention,
    logit_rounding,
)
from reference_selection import assert_selection_is_exact, calls, int32
from test_sparse_decode import choose, heads_of, read_by, selection_of, sets_of

from tidaldecode.kernels import (
    Selection,
    dense_decode,
    dense_select,
    select_tokens,
    sparse_decode,
)
from tidaldecode.kernels.scratch import Scratch

pytest.importorskip("triton")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HERE = torch.empty(0, device=DEVICE).device  # with its number: a scratch tells GPUs apart
HALF = (torch.float16, torch.bfloat16) if DEVICE == "cuda" else (torch.float16,)
EXAMPLES = 60 if DEVICE == "cuda" else 40
SCORE_KINDS = ("shared", "kv_head", "query_head", "query_head_logits")
DENSE, SPARSE, SELECT, SCORE, SPLITK, CUTS = (
    importlib.import_module(f"tidaldecode.kernels.triton.{name}")
    for name in (
        "dense_decode",
        "sparse_decode",
        "select_tokens",
        "score_tokens",
        "_splitk",
        "_cuts",
    )
)


@contextmanager
def small_tiles(tokens: int | None = 16, stretch: int | None = 64) -> Iterator[None]:
    """Tiles of so few tokens that short rows need many of them; None: as shipped."""
    with pytest.MonkeyPatch.context() as patch:
        if tokens is not None:
            for module in (DENSE, SPARSE):
                patch.setattr(module, "_tile", lambda *_: (tokens, 4, 2))
            patch.setattr(SPLITK, "_MERGED_SPLITS", 4)
        if stretch is not None:
            for name in ("SHORT_CHUNK", "CHUNK", "COUNTED", "SHORT_STRETCH", "STRETCH"):
                patch.setattr(SELECT, name, stretch)
            patch.setattr(SCORE, "TOKENS", stretch)
        yield


def assert_attends(out, lse, case: Case, keep: torch.Tensor) -> None:
    """fp32 is exact; half precision rounds its weights: it may err twice as far as plain attention."""
    if out.dtype is torch.float32:
        assert_attends_exactly(out, lse, case.q, case.k, case.v, keep, case.scale)
        return
    inputs = (case.q, case.k, case.v, keep, case.scale)
    exact, exact_lse, _ = attention(*inputs)
    plain, _, _ = attention(*inputs, dtype=out.dtype)
    assert out.dtype == case.q.dtype and torch.isfinite(out).all()
    # Plain fp16 attention overflows where ours must not.
    plain_error = (plain.double() - exact).abs().nan_to_num(0, 0, 0).amax()
    rounding = 2 * logit_rounding(case.q, case.k, case.scale)
    unit = torch.finfo(out.dtype).eps + rounding
    allowed = 2 * plain_error + unit * case.v.abs().amax()
    assert (out.double() - exact).abs().amax() <= allowed
    empty = ~keep.any(-1)
    assert (out[empty] == 0).all() and torch.equal(lse.isneginf(), empty)
    error = (lse.double() - exact_lse)[~empty].abs()
    assert (error <= rounding + 4e-7 * exact_lse[~empty].abs()).all()


def moved(value):
    return value.to(DEVICE) if torch.is_tensor(value) else value


def run_dense(case: Case, **options):
    arguments = {"seq_lens": case.seq_lens, "starts": case.starts, **case.cache()}
    results = dense_decode(
        moved(case.q),
        scale=case.scale,
        backend="triton",
        **{name: moved(value) for name, value in arguments.items()},
        **options,
    )
    return [None if result is None else result.cpu() for result in results]


def check_dense(case: Case, kind: str | None) -> None:
    out, lse, scores = run_dense(case, scores=kind)
    assert_attends(out, lse, case, case.keep)
    if kind is None:
        assert scores is None
    else:
        # Exponentials of two; the hardware's are off by two units in the last place.
        half = case.q.dtype is not torch.float32
        assert_scores_are_exact(scores[..., : case.k.shape[2]], case, kind, half_distances=half)


def check_dense_select(case: Case, kind: str, options: dict[str, int]) -> None:
    scratch = Scratch()
    out, lse, selection = dense_select(
        moved(case.q),
        seq_lens=moved(case.seq_lens),
        starts=moved(case.starts),
        scale=case.scale,
        scores=kind,
        backend="triton",
        scratch=scratch,
        **{name: moved(value) for name, value in case.cache().items()},
        **options,
    )
    assert_attends(out.cpu(), lse.cpu(), case, case.keep)
    _, _, scores = run_dense(case, scores=kind)
    call = {"scores": scores, "seq_lens": case.seq_lens, "starts": case.starts, **options}
    assert_selection_is_exact(selection.to(torch.device("cpu")), call)
    assert not scratch.zeros(1, HERE).any(), "scratch was not left zeroed"


def run_sparse(case: Case, selection: Selection, readable: torch.Tensor):
    out, lse = sparse_decode(
        moved(case.q),
        selection=selection.to(torch.device(DEVICE)),
        scale=case.scale,
        backend="triton",
        **{name: moved(value) for name, value in case.cache(readable).items()},
    )
    return out.cpu(), lse.cpu()


def check_sparse(case: Case, chosen: torch.Tensor, readable: torch.Tensor, spare: int = 0) -> None:
    out, lse = run_sparse(case, selection_of(chosen, spare), readable)
    assert_attends(out, lse, case, heads_of(chosen, case.q.shape[1]))


def run_select(scratch: Scratch | None = None, **call) -> Selection:
    scratch = scratch or Scratch()
    selection = select_tokens(
        backend="triton", scratch=scratch, **{name: moved(value) for name, value in call.items()}
    )
    assert not scratch.zeros(1, HERE).any(), "scratch was not left zeroed"
    return selection.to(torch.device("cpu"))


def check_select(call: dict) -> None:
    assert_selection_is_exact(run_select(**call), call)


@settings(max_examples=EXAMPLES, deadline=None, derandomize=True)
@given(cases((torch.float32, *HALF)), st.sampled_from((None, *SCORE_KINDS)), st.booleans())
def test_dense_decode_equals_exact_attention(case, kind, small):
    with small_tiles(16 if small else None):
        check_dense(case, kind)


@settings(max_examples=EXAMPLES, deadline=None, derandomize=True)
@given(
    cases((torch.float32, *HALF)),
    st.sampled_from(("shared", "kv_head", "query_head")),
    st.sampled_from((0.0, 0.1, 0.5, 1.0)),
    st.integers(0, 3),
    st.booleans(),
)
def test_sparse_decode_equals_exact_attention_to_the_selection(
    case, granularity, share, spare, small
):
    chosen = choose(case, sets_of(case, granularity), share, ragged=small)
    with small_tiles(16 if small else None):
        check_sparse(case, chosen, read_by(case, chosen), spare)


@settings(max_examples=2 * EXAMPLES, deadline=None, derandomize=True)
@given(calls(), st.booleans())
def test_select_tokens_keeps_every_promise(call, small):
    with small_tiles(stretch=16 if small else None):
        check_select(call)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    cases((torch.float32, *HALF)),
    st.sampled_from(SCORE_KINDS),
    st.integers(1, 60),
    st.booleans(),
    st.sampled_from(((2, 64), (8, 1024))),
)
def test_dense_select_is_dense_decode_and_select_tokens(case, kind, budget, small, merging):
    options = {"budget": budget, "sink_tokens": min(3, budget // 3), "recent_tokens": budget // 4}
    with (
        small_tiles(16 if small else None, 64 if small else None),
        pytest.MonkeyPatch.context() as patch,
    ):
        for name, most in zip(("_MOST_MERGERS", "_MERGED_A_WARP"), merging, strict=True):
            patch.setattr(SPLITK, name, most)
        check_dense_select(case, kind, options)


@pytest.mark.parametrize("kind", SCORE_KINDS)
def test_scores_take_the_log_sum_exps_of_their_own_rows_parts(kind):
    case = make_case(3, 2, 3, 32, 300, ends=[300, 60, 211], sharpness=3.0)
    # Added to another row's, it would drown some of its heads and not the others.
    case.q[1, :2] *= 8
    with small_tiles():
        check_dense_select(case, kind, {"budget": 40, "sink_tokens": 3, "recent_tokens": 5})


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_row_without_tokens_is_not_looked_at(layout):
    case = make_case(1, 2, 3, 32, 50, ends=[0], layout=layout)
    check_dense_select(case, "shared", {"budget": 7, "sink_tokens": 1, "recent_tokens": 1})


@pytest.mark.parametrize("group", [1, 3, 6, 16])
@pytest.mark.parametrize("head_dim", [32, 80, 96, 256])
def test_every_head_size_and_group_works(group, head_dim):
    case = make_case(1, 1, group, head_dim, 70, ends=[69], starts=[3], dtype=torch.float32)
    with small_tiles():
        check_dense(case, "shared")
        chosen = choose(case, 1, 0.5, ragged=False)
        check_sparse(case, chosen, read_by(case, chosen))


@pytest.mark.parametrize("block_size", [1, 2, 7, 16, 256])
def test_every_page_size_works(block_size):
    case = make_case(2, 2, 2, 32, 300, ends=[300, 131], starts=[9, 0])
    case.layout = f"paged {block_size}"
    with small_tiles():
        check_dense(case, "kv_head")
        chosen = choose(case, 2, 0.3, ragged=False)
        check_sparse(case, chosen, read_by(case, chosen))


@pytest.mark.parametrize("tokens", [1, 15, 16, 17, 31, 32, 33, 97, 192, 193])
def test_tile_and_split_edges_lose_and_repeat_no_token(tokens):
    case = make_case(2, 1, 2, 16, tokens, ends=[tokens, tokens - 1], starts=[0, tokens // 3])
    with small_tiles(16, 16):
        for kind in SCORE_KINDS:
            check_dense(case, kind)
        chosen = choose(case, 1, 1.0, ragged=False)
        check_sparse(case, chosen, case.valid)


@pytest.mark.parametrize("parts", [1, 2, 3, 5, 7])
@pytest.mark.parametrize("share", [0.0, 0.1, 0.5])
def test_a_selection_is_read_in_any_number_of_parts(parts, share, monkeypatch):
    """Of one tile and of several, full, partly padded and empty."""
    monkeypatch.setattr(SPARSE, "_parts", lambda *_: parts)
    case = make_case(3, 2, 2, 16, 190, ends=[190, 40, 0])
    with small_tiles(16):
        for sets in (1, 2, 4):
            chosen = choose(case, sets, share, ragged=True)
            check_sparse(case, chosen, read_by(case, chosen), spare=3)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("poison", [float("nan"), float("inf"), 3e38])
def test_memory_outside_a_row_changes_no_bit(layout, poison):
    ends, starts = [40, 17, 0, 33], [0, 5, 0, 33]
    results = []
    for filling in (0.0, poison):
        torch.manual_seed(1)
        case = make_case(4, 2, 3, 32, 40, ends=ends, starts=starts, layout=layout, poison=filling)
        with small_tiles():
            results.append(run_dense(case, scores="shared"))
    for clean, poisoned in zip(*results, strict=True):
        assert torch.equal(clean, poisoned)


def test_uninitialised_memory_reaches_no_result(monkeypatch):
    def poisoned(*size, **options):
        memory = torch.zeros(*size, **options)
        return memory.fill_(float("nan") if memory.is_floating_point() else -(2**31))

    for module in (DENSE, SPARSE, SCORE, SELECT):
        monkeypatch.setattr(module.torch, "empty", poisoned)
    case = make_case(3, 2, 3, 32, 100, ends=[100, 0, 61], starts=[0, 0, 7])
    with small_tiles():
        for kind in SCORE_KINDS:
            check_dense(case, kind)
        for sets in (1, 2):
            chosen = choose(case, sets, 0.5, ragged=True)
            check_sparse(case, chosen, chosen.any(1), spare=2)
        for budget in (1, 9, 99, 300):
            check_select(
                {
                    "scores": torch.randint(0, 9, (3, 2, 130)).float(),
                    "seq_lens": int32([130, 0, 77]),
                    "starts": int32([3, 0, 70]),
                    "budget": budget,
                    "sink_tokens": 0,
                    "recent_tokens": 0,
                }
            )


@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
def test_huge_logits_do_not_overflow(dtype):
    case = make_case(2, 2, 2, 64, 70, dtype=dtype, sharpness=1.0, starts=[0, 9])
    case.q, case.k, case.scale = case.q * 60, case.k * 60, 1.0
    with small_tiles():
        for kind in SCORE_KINDS:
            check_dense(case, kind)


@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
@pytest.mark.parametrize("kind", SCORE_KINDS)
def test_an_offset_that_all_logits_share_costs_no_precision(kind, dtype):
    case = make_case(2, 2, 2, 64, 301, dtype=dtype, ends=[301, 211], starts=[0, 9])
    # Models with biases of keys: Qwen 2.
    case.q[..., :4] += 20
    case.k[..., :4] += 20
    for sizes in ((16, 64), (None, None)):
        with small_tiles(*sizes):
            check_dense(case, kind)


@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
def test_the_error_is_no_more_than_twice_that_of_plain_attention_in_the_same_dtype(dtype):
    case = make_case(4, 2, 4, 64, 300, dtype=dtype, ends=[300, 257, 64, 7], starts=[0, 5, 0, 3])
    out, _, _ = run_dense(case)
    exact, _, _ = attention(case.q, case.k, case.v, case.keep, case.scale)
    plain, _, _ = attention(case.q, case.k, case.v, case.keep, case.scale, dtype=dtype)
    unit = torch.finfo(dtype).eps * exact.abs().amax()
    assert (out - exact).abs().amax() <= 2 * (plain - exact).abs().amax() + 2 * unit


def test_a_hole_inside_a_set_is_skipped_and_padding_may_fill_a_split():
    case = make_case(1, 1, 2, 16, 200)
    positions = torch.arange(200, dtype=torch.int32).view(1, 1, 200)
    positions[..., 20:160] = -1
    with small_tiles(16):
        out, lse = run_sparse(case, Selection(positions, int32([[200]])), case.valid)
    keep = torch.isin(torch.arange(200), positions).expand(1, 2, -1)
    assert_attends_exactly(out, lse, case.q, case.k, case.v, keep, case.scale)


def test_positions_beyond_the_cache_are_skipped():
    case = make_case(1, 2, 2, 16, 50)  # the second head's keys lie behind the first's
    positions = torch.arange(10, 90, dtype=torch.int32).view(1, 1, 80)
    positions[..., -20:] += 1 << 30
    with small_tiles(16):
        out, lse = run_sparse(case, Selection(positions, int32([[80]])), case.valid)
    keep = (torch.arange(50) >= 10).expand(1, 4, -1)
    assert_attends_exactly(out, lse, case.q, case.k, case.v, keep, case.scale)


@pytest.mark.parametrize(
    "low, high", [(-1, 1), (0, 1), (1e-4, 1.1e-4), (-1e30, 1e30), (1e-12, 1e-9)]
)
@pytest.mark.parametrize("few, listed", [(4, 8), (4, 4096), (128, 4096)])
def test_scores_of_any_range_are_sorted_out(low, high, few, listed, monkeypatch):
    monkeypatch.setattr(SELECT, "_FEW", few)
    monkeypatch.setattr(SELECT, "_LISTED", listed)
    monkeypatch.setattr(SELECT, "_TILE", 64)
    scores = torch.empty(1, 2, 500).uniform_(low, high)
    scores[:, :, ::7] = scores[:, :, :1]
    for budget in (1, 20, 300):
        with small_tiles():
            check_select(
                {
                    "scores": scores,
                    "seq_lens": int32([480]),
                    "starts": int32([70]),
                    "budget": budget,
                    "sink_tokens": min(4, budget - 1),
                    "recent_tokens": min(15, budget - 1) // 2,
                }
            )


@pytest.mark.parametrize("bits", [6, 7, 10])
def test_bins_of_any_size_find_the_same_tokens(bits, monkeypatch):
    monkeypatch.setattr(SELECT, "bin_bits", lambda _: bits)
    monkeypatch.setattr(SELECT, "_FEW", 4)
    scores = torch.rand(1, 1, 400)
    scores[..., ::5] = 0.5
    for budget in (1, 40, 200, 300):
        call = {"scores": scores, "seq_lens": int32([390]), "starts": int32([7]), "budget": budget}
        with small_tiles():
            check_select({"sink_tokens": 0, "recent_tokens": 0, **call})


def test_strided_scores_are_read_where_they_are():
    scores = torch.randn(2, 40, 3, 2).permute(0, 2, 1, 3)[..., 1]
    assert not scores.is_contiguous()
    call = {"seq_lens": int32([40, 22]), "starts": None, "budget": 9}
    check_select({"scores": scores, "sink_tokens": 1, "recent_tokens": 2, **call})


def test_repeated_runs_are_equal_to_the_bit():
    case = make_case(3, 2, 4, 64, 200, ends=[200, 3, 77])
    with small_tiles():
        runs = [run_dense(case, scores="shared") for _ in "abc"]
        scores = runs[0][2]
        chosen = [run_select(scores=scores, seq_lens=case.seq_lens, budget=50) for _ in "abc"]
    for again, selection in zip(runs[1:], chosen[1:], strict=True):
        assert all(torch.equal(old, new) for old, new in zip(runs[0], again, strict=True))
        assert torch.equal(selection.positions, chosen[0].positions)


def test_one_scratch_serves_selections_of_any_size():
    scratch = Scratch()
    for sets, width in ((1, 90), (4, 300), (2, 30)):
        call = {
            "scores": torch.randn(2, sets, width),
            "seq_lens": int32([width, width // 2]),
            "starts": None,
            "budget": 20,
            "sink_tokens": 2,
            "recent_tokens": 3,
        }
        assert_selection_is_exact(run_select(scratch, **call), call)


@pytest.mark.parametrize("granularity", ["shared", "kv_head", "query_head"])
@pytest.mark.parametrize("tokens", [16, None])
@pytest.mark.parametrize("processors", [8, 64])
def test_rows_that_are_attended_to_whole(granularity, tokens, processors, monkeypatch):
    """Longer than the selection has slots, shorter, empty; split over several programs and not."""
    for module in (CUTS, SPARSE):
        monkeypatch.setattr(module, "processors", lambda _: processors)
    case = make_case(4, 2, 2, 16, 190, ends=[190, 161, 3, 0], layout="paged 16")
    chosen = choose(case, sets_of(case, granularity), 0.3, ragged=True)
    keep = heads_of(chosen, 4).clone()
    keep[1:3] = case.keep[1:3]
    out = torch.full_like(case.q, 9).to(DEVICE)
    with small_tiles(tokens):
        found, lse = sparse_decode(
            moved(case.q),
            selection=selection_of(chosen).to(torch.device(DEVICE)),
            scale=case.scale,
            backend="triton",
            whole_lens=torch.tensor([0, 161, 3, 0], dtype=torch.int32, device=DEVICE),
            out=out,
            **{name: moved(value) for name, value in case.cache().items()},
        )
    assert found is out
    assert_attends(out.cpu(), lse.cpu(), case, keep)
