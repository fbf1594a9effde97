"""sparse_decode against exact attention to the selected tokens alone."""

import importlib

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import LAYOUTS, Case, cases, make_case
from reference_attention import assert_attends_exactly, attention

from tidaldecode.errors import TidalError
from tidaldecode.kernels import Selection, dense_decode, sparse_decode

MODULE = importlib.import_module("tidaldecode.kernels.sparse_decode")
pytestmark = pytest.mark.usefixtures("cpu_backend")
HALF = (torch.float16, torch.bfloat16)


def sets_of(case: Case, granularity: str) -> int:
    return {"shared": 1, "kv_head": case.k.shape[1], "query_head": case.q.shape[1]}[granularity]


def choose(case: Case, sets: int, share: float, *, ragged: bool) -> torch.Tensor:
    """A random mask of valid tokens ``[B, R, S]``; without ``ragged`` a row's sets are equally big."""
    valid = case.valid[:, None].expand(-1, sets, -1)
    if ragged:
        return valid & (torch.rand(valid.shape) < torch.rand(*valid.shape[:2], 1) * 2 * share)
    order = torch.rand(valid.shape).masked_fill(~valid, 2.0).argsort(-1).argsort(-1)
    return valid & (order < (case.valid.sum(-1) * share).ceil()[:, None, None])


def selection_of(chosen: torch.Tensor, spare: int = 0) -> Selection:
    """The selection that a mask ``[B, R, S]`` stands for, with ``spare`` more slots than needed."""
    slots = int(chosen.sum(-1).max()) + spare
    positions = torch.full((*chosen.shape[:2], slots), -1, dtype=torch.int32)
    for row, index in torch.cartesian_prod(*map(torch.arange, chosen.shape[:2])).view(-1, 2):
        found = chosen[row, index].nonzero()[:, 0]
        positions[row, index, : len(found)] = found.int()
    return Selection(positions, chosen.sum(-1, dtype=torch.int32))


def heads_of(chosen: torch.Tensor, heads: int) -> torch.Tensor:
    """A mask per set ``[B, R, S]`` as a mask per head."""
    return chosen.repeat_interleave(heads // chosen.shape[1], 1)


def read_by(case: Case, chosen: torch.Tensor) -> torch.Tensor:
    """``[B, Hkv, S]``: the rows that a selection lets each KV head read."""
    per_query_head = heads_of(chosen, case.q.shape[1])
    return per_query_head.unflatten(1, (case.k.shape[1], -1)).any(2)


def run(case: Case, chosen: torch.Tensor, readable: torch.Tensor, spare: int = 0):
    selection = selection_of(chosen, spare)
    return sparse_decode(case.q, selection=selection, scale=case.scale, **case.cache(readable))


def check(case: Case, chosen: torch.Tensor, readable: torch.Tensor, spare: int = 0) -> None:
    out, lse = run(case, chosen, readable, spare)
    keep = heads_of(chosen, case.q.shape[1])
    assert_attends_exactly(out, lse, case.q, case.k, case.v, keep, case.scale)


granularities = st.sampled_from(("shared", "kv_head", "query_head"))
shares = st.sampled_from((0.0, 0.1, 0.5, 1.0))


@settings(max_examples=120, deadline=None, derandomize=True)
@given(cases(), granularities, shares, st.integers(0, 3))
def test_any_selection_equals_exact_attention_to_it_with_poison_elsewhere(
    case, granularity, share, spare
):
    chosen = choose(case, sets_of(case, granularity), share, ragged=False)
    check(case, chosen, read_by(case, chosen), spare)


@settings(max_examples=120, deadline=None, derandomize=True)
@given(cases(), granularities, shares, st.integers(0, 3), st.booleans())
def test_sets_of_different_sizes_equal_exact_attention_to_them(
    case, granularity, share, spare, queries_first
):
    chosen = choose(case, sets_of(case, granularity), share, ragged=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MODULE, "is_intel", lambda: queries_first)
        check(case, chosen, chosen.any(1), spare)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(cases(HALF), granularities, shares, st.booleans())
def test_half_precision_is_accumulated_in_fp32(case, granularity, share, ragged):
    chosen = choose(case, sets_of(case, granularity), share, ragged=ragged)
    check(case, chosen, chosen.any(1))


@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
def test_the_error_is_no_more_than_twice_that_of_plain_attention_in_the_same_dtype(dtype):
    case = make_case(4, 2, 4, 64, 300, dtype=dtype)
    chosen = choose(case, 2, 0.5, ragged=False)
    keep = heads_of(chosen, 8)
    out, _ = run(case, chosen, read_by(case, chosen))
    exact, _, _ = attention(case.q, case.k, case.v, keep, case.scale)
    plain, _, _ = attention(case.q, case.k, case.v, keep, case.scale, dtype=dtype)
    unit = torch.finfo(dtype).eps * exact.abs().amax()
    assert (out - exact).abs().amax() <= 2 * (plain - exact).abs().amax() + 2 * unit


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("granularity", ["shared", "kv_head", "query_head"])
def test_selecting_everything_equals_dense_decode(layout, granularity):
    case = make_case(3, 2, 3, 32, 45, ends=[45, 20, 0], starts=[0, 4, 0], layout=layout)
    chosen = case.valid[:, None].expand(-1, sets_of(case, granularity), -1)
    out, lse = run(case, chosen, case.valid)
    dense_out, dense_lse, _ = dense_decode(
        case.q, seq_lens=case.seq_lens, starts=case.starts, scale=case.scale, **case.cache()
    )
    torch.testing.assert_close(out, dense_out)
    torch.testing.assert_close(lse, dense_lse)


@pytest.mark.parametrize("granularity", ["shared", "kv_head", "query_head"])
def test_every_head_reads_its_own_tokens(granularity):
    case = make_case(1, 2, 2, 16, 8)
    sets = sets_of(case, granularity)
    chosen = torch.zeros(1, sets, 8, dtype=torch.bool)
    chosen[0, torch.arange(sets), torch.arange(sets) * 2 + 1] = True
    out, _ = run(case, chosen, read_by(case, chosen))
    for head in range(4):
        token = head // (4 // sets) * 2 + 1
        torch.testing.assert_close(out[0, head], case.v[0, head // 2, token])


def test_an_empty_selection_gives_zeros_and_minus_infinity():
    case = make_case(2, 2, 2, 16, 9)
    for slots in (0, 4):
        positions = torch.full((2, 1, slots), -1, dtype=torch.int32)
        selection = Selection(positions, torch.zeros(2, 1, dtype=torch.int32))
        nothing = torch.zeros_like(case.valid)
        out, lse = sparse_decode(
            case.q, selection=selection, scale=case.scale, **case.cache(nothing)
        )
        assert (out == 0).all() and lse.isneginf().all()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_one_empty_set_beside_full_ones_gives_zeros_for_its_heads(layout):
    case = make_case(2, 2, 2, 16, 9, layout=layout)
    chosen = torch.zeros(2, 2, 9, dtype=torch.bool)
    chosen[:, 1, 2:5] = True
    out, lse = run(case, chosen, chosen.any(1))
    assert (out[:, :2] == 0).all() and lse[:, :2].isneginf().all()
    check(case, chosen, chosen.any(1))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_padding_reads_nothing_that_its_own_head_did_not_select(layout):
    case = make_case(2, 2, 2, 16, 9, layout=layout)
    chosen = torch.zeros(2, 2, 9, dtype=torch.bool)
    chosen[:, 0, 1] = True
    chosen[:, 1, 2:8] = True
    check(case, chosen, read_by(case, chosen))


@pytest.mark.parametrize("block_size", [1, 3, 16])
def test_padding_follows_no_block_that_the_row_does_not_hold(block_size):
    ends, starts = [40, 39], [17, 33]
    case = make_case(2, 2, 2, 16, 60, ends=ends, starts=starts, layout=f"paged {block_size}")
    chosen = torch.zeros(2, 2, 60, dtype=torch.bool)
    chosen[:, 0, 35] = True
    chosen[:, 1, 33:38] = True
    check(case, chosen, read_by(case, chosen))


@pytest.mark.parametrize("block_size", [1, 3, 16])
@pytest.mark.parametrize("granularity", ["shared", "kv_head", "query_head"])
def test_a_paged_cache_gives_what_a_contiguous_one_gives(block_size, granularity):
    case = make_case(3, 2, 2, 32, 50, ends=[50, 31, 1], starts=[0, 16, 0])
    chosen = choose(case, sets_of(case, granularity), 0.4, ragged=False)
    contiguous = run(case, chosen, read_by(case, chosen))
    case.layout = f"paged {block_size}"
    for expected, got in zip(contiguous, run(case, chosen, read_by(case, chosen)), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
def test_huge_logits_do_not_overflow(dtype):
    case = make_case(2, 2, 2, 64, 40, dtype=dtype)
    case.q, case.k, case.scale = case.q * 60, case.k * 60, 1.0
    for granularity in ("shared", "kv_head", "query_head"):
        chosen = choose(case, sets_of(case, granularity), 0.5, ragged=True)
        check(case, chosen, chosen.any(1))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_repeated_runs_are_equal_and_leave_arguments_alone(layout):
    case = make_case(2, 2, 4, 64, 90, layout=layout, poison=0.0)
    chosen = choose(case, 2, 0.5, ragged=True)
    selection, cache = selection_of(chosen, 2), case.cache()
    watched = (case.q, cache["k"], cache["v"], selection.positions, selection.counts)
    before = [tensor.clone() for tensor in watched]
    runs = [sparse_decode(case.q, selection=selection, scale=case.scale, **cache) for _ in "abc"]
    for again in runs[1:]:
        for expected, got in zip(runs[0], again, strict=True):
            assert torch.equal(expected, got)
    assert all(torch.equal(old, new) for old, new in zip(before, watched, strict=True))


INT32 = torch.int32
POSITIONS, COUNTS = torch.zeros(2, 2, 3, dtype=INT32), torch.ones(2, 2, dtype=INT32)


@pytest.mark.parametrize(
    "positions, counts, message",
    [
        (
            POSITIONS[0],
            COUNTS,
            r"^selection.positions: expected shape \[2, any, any\], got \[2, 3\]",
        ),
        (POSITIONS[:1], COUNTS, r"^selection.positions: expected shape .*, got \[1, 2, 3\]"),
        (POSITIONS.long(), COUNTS, "^selection.positions: expected dtype int32, got int64"),
        (POSITIONS.to("meta"), COUNTS, "^selection.positions: expected device cpu.*got meta"),
        (POSITIONS, COUNTS[:, :1], r"^selection.counts: expected shape \[2, 2\], got \[2, 1\]"),
        (POSITIONS, COUNTS.long(), "^selection.counts: expected dtype int32, got int64"),
        (POSITIONS, COUNTS.to("meta"), "^selection.counts: expected device cpu.*got meta"),
        (
            POSITIONS.repeat(1, 4, 1),
            COUNTS.repeat(1, 4),
            "^selection: expected 1, Hkv=2 or Hq=6 sets per sequence, got 8",
        ),
        (POSITIONS[:, :0], COUNTS[:, :0], "^selection: expected 1, .* got 0"),
    ],
)
def test_a_selection_that_breaks_the_contract_is_refused_by_name(positions, counts, message):
    case = make_case(2, 2, 3, 16, 5)
    with pytest.raises(TidalError, match=message):
        sparse_decode(case.q, case.k, case.v, Selection(positions, counts), scale=1.0)


def whole(case: Case, *lens: int) -> dict[str, torch.Tensor]:
    return {"whole_lens": torch.tensor(lens, dtype=torch.int32), "out": torch.full_like(case.q, 9)}


@pytest.mark.parametrize("layout", ["contiguous", "paged 3"])
@pytest.mark.parametrize("granularity", ["shared", "kv_head", "query_head"])
def test_rows_that_are_attended_to_whole_do_not_look_at_their_selection(layout, granularity):
    case = make_case(3, 2, 2, 16, 40, ends=[40, 25, 0], layout=layout)
    chosen = choose(case, sets_of(case, granularity), 0.2, ragged=False)
    keep = heads_of(chosen, 4).clone()
    keep[1] = case.keep[1]
    options = whole(case, 0, 25, 0)
    out, lse = sparse_decode(
        case.q, selection=selection_of(chosen), scale=case.scale, **case.cache(), **options
    )
    assert out is options["out"]
    assert_attends_exactly(out, lse, case.q, case.k, case.v, keep, case.scale)


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("whole_lens", torch.zeros(2, dtype=torch.int64)),
        ("whole_lens", torch.zeros(3, dtype=torch.int32)),
        ("out", torch.zeros(2, 4, 8)),
        ("out", torch.zeros(2, 16, 4).transpose(1, 2)),
    ],
)
def test_memory_of_another_shape_is_refused(name, wrong):
    case = make_case(2, 2, 2, 16, 8)
    with pytest.raises(TidalError, match=f"{name}: expected"):
        sparse_decode(
            case.q,
            selection=selection_of(case.valid[:, None]),
            scale=1.0,
            **{**case.cache(), name: wrong},
        )
