"""dense_decode for the T newest queries of every row: each sees what was there when it was newest."""

import importlib
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import LAYOUTS, Case, cases, make_case
from reference_attention import assert_attends_exactly

from tidaldecode.errors import TidalError
from tidaldecode.kernels import dense_decode

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
EXAMPLES = 150 if DEVICE == "cuda" else 40
PLAIN = importlib.import_module("tidaldecode.kernels.dense_decode")


@pytest.fixture(params=["torch", "triton"])
def backend(request):
    if request.param == "triton":
        pytest.importorskip("triton")
    return request.param


@contextmanager
def small_steps(
    backend: str, tokens: int = 16, rows: int | None = None, queries_first: bool = False
) -> Iterator[None]:
    """Chunks and tiles of so few tokens, and tiles of so few queries, that there are many."""
    with pytest.MonkeyPatch.context() as patch:
        if backend == "torch":
            patch.setattr(PLAIN, "_CHUNK_LOGITS", 64)
            patch.setattr(PLAIN, "is_intel", lambda: queries_first)
        else:
            twin = importlib.import_module("tidaldecode.kernels.triton.dense_decode")
            splitk = importlib.import_module("tidaldecode.kernels.triton._splitk")
            patch.setattr(twin, "_tile", lambda *_: (tokens, 4, 2))
            patch.setattr(splitk, "_MERGED_SPLITS", 4)
            if rows is not None:
                patch.setattr(twin, "_tile_rows", lambda *_: rows)
        yield


def moved(value):
    return value.to(DEVICE) if torch.is_tensor(value) else value


def run(case: Case, queries: torch.Tensor, backend: str):
    arguments = {"seq_lens": case.seq_lens, "starts": case.starts, **case.cache()}
    out, lse, scores = dense_decode(
        moved(queries),
        scale=case.scale,
        backend=backend,
        **{name: moved(value) for name, value in arguments.items()},
    )
    assert scores is None
    return out.cpu(), lse.cpu()


def queries_of(case: Case, count: int) -> torch.Tensor:
    """``[B, T, Hq, D]``, stored as ``[B, Hq, T, D]`` like a model has them."""
    batch, heads, head_dim = case.q.shape
    return torch.randn(batch, heads, count, head_dim).to(case.q.dtype).transpose(1, 2)


def check(case: Case, count: int, backend: str) -> None:
    queries = queries_of(case, count)
    out, lse = run(case, queries, backend)
    assert out.shape == queries.shape and lse.shape == queries.shape[:3]
    positions = torch.arange(case.k.shape[2])
    for index in range(count):
        # What was valid when this query's token was the newest.
        seen = case.valid & (positions < case.seq_lens[:, None] - (count - 1 - index))
        keep = seen[:, None].expand(-1, queries.shape[2], -1)
        assert_attends_exactly(
            out[:, index], lse[:, index], queries[:, index], case.k, case.v, keep, case.scale
        )


@settings(max_examples=2 * EXAMPLES, deadline=None, derandomize=True)
@given(cases(), st.integers(1, 17), st.booleans())
def test_the_plain_path_equals_exact_attention(case, count, queries_first):
    with small_steps("torch", queries_first=queries_first):
        check(case, count, "torch")


@settings(max_examples=EXAMPLES, deadline=None, derandomize=True)
@given(cases(), st.integers(1, 17), st.sampled_from((16, 32, None)))
def test_the_triton_kernel_equals_exact_attention(case, count, rows):
    pytest.importorskip("triton")
    with small_steps("triton", rows=rows):
        check(case, count, "triton")


@pytest.mark.parametrize("group", [1, 3, 8, 16])
@pytest.mark.parametrize("count", [1, 2, 5, 17])
def test_every_group_and_count_works_with_the_tiles_as_shipped(backend, group, count):
    check(make_case(2, 2, group, 32, 70, ends=[70, 41], starts=[0, 33]), count, backend)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_works(backend, layout):
    case = make_case(3, 2, 2, 32, 60, ends=[60, 17, 33], starts=[5, 0, 30], layout=layout)
    with small_steps(backend):
        check(case, 5, backend)


@pytest.mark.parametrize("tokens", [1, 2, 15, 16, 17, 18, 31, 32, 33, 97, 192, 193])
def test_edges_of_tiles_and_splits_lose_and_repeat_no_token(backend, tokens):
    case = make_case(2, 1, 2, 16, tokens, ends=[tokens, tokens - 1], starts=[0, tokens // 3])
    with small_steps(backend):
        for count in (2, 3, 9):
            check(case, count, backend)


def test_a_query_before_the_first_token_sees_nothing(backend):
    case = make_case(3, 2, 2, 16, 20, ends=[3, 0, 20], starts=[1, 0, 19])
    out, lse = run(case, queries_of(case, 4), backend)
    empty = [[True, True, False, False], [True] * 4, [True, True, True, False]]
    assert lse.isneginf().all(-1).tolist() == empty
    assert (out[torch.tensor(empty)] == 0).all()
    check(case, 4, backend)


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), 3e38])
def test_memory_outside_a_row_changes_no_bit(backend, poison):
    results = []
    for filling in (0.0, poison):
        torch.manual_seed(1)
        ends, starts = [40, 17, 0, 33], [0, 5, 0, 33]
        case = make_case(4, 2, 3, 32, 40, ends=ends, starts=starts, layout="sliced", poison=filling)
        with small_steps(backend):
            results.append(run(case, queries_of(case, 6), backend))
    for clean, poisoned in zip(*results, strict=True):
        assert torch.equal(clean, poisoned)


def test_uninitialised_memory_reaches_no_result(monkeypatch):
    pytest.importorskip("triton")
    splitk = importlib.import_module("tidaldecode.kernels.triton._splitk")

    def poisoned(*size, **options):
        memory = torch.zeros(*size, **options)
        return memory.fill_(float("nan") if memory.is_floating_point() else 1 << 30)

    monkeypatch.setattr(splitk.torch, "empty", poisoned)
    case = make_case(3, 2, 3, 32, 100, ends=[100, 0, 61], starts=[0, 0, 7])
    with small_steps("triton", rows=16):
        check(case, 7, "triton")


def test_one_query_is_what_the_call_without_the_dimension_gives(backend):
    case = make_case(3, 2, 4, 64, 200, ends=[200, 3, 77])
    with small_steps(backend):
        out, lse = run(case, case.q[:, None], backend)
        alone, alone_lse = run(case, case.q, backend)
    assert torch.equal(out[:, 0], alone) and torch.equal(lse[:, 0], alone_lse)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_as_good_as_that_of_one_query(backend, dtype):
    if backend == "triton" and DEVICE == "cpu" and dtype is torch.bfloat16:
        pytest.skip("the interpreter has no bfloat16")
    case = make_case(2, 2, 4, 64, 150, dtype=dtype, ends=[150, 61], starts=[3, 0])
    queries = queries_of(case, 5)
    out, lse = run(case, queries, backend)
    for index in range(5):
        shorter = Case(
            queries[:, index], case.k, case.v, case.seq_lens - (4 - index), case.starts, case.scale
        )
        alone, alone_lse = run(shorter, queries[:, index], backend)
        unit = 4 * torch.finfo(dtype).eps
        torch.testing.assert_close(out[:, index], alone, atol=unit, rtol=unit)
        torch.testing.assert_close(lse[:, index], alone_lse, atol=1e-4, rtol=1e-5)


def test_what_breaks_the_contract_is_refused_by_name():
    case = make_case(2, 2, 2, 16, 8)
    rest = {"seq_lens": case.seq_lens, "scale": 1.0}
    for queries, options, message in (
        (queries_of(case, 3), {"scores": "shared"}, "scores: expected None for several queries"),
        (torch.zeros(2, 0, 4, 16), {}, "q: expected at least one query in each row"),
        (torch.zeros(2, 3, 3, 16), {}, "q: expected .* divisible by the 2 KV heads of k, got 3"),
        (torch.zeros(1, 3, 4, 16), {}, r"k: expected shape \[1, any, any, 16\]"),
        (torch.zeros(2, 1, 3, 4, 16), {}, r"q: expected shape \[any, any, any\]"),
    ):
        with pytest.raises(TidalError, match=f"^{message}"):
            dense_decode(queries, case.k, case.v, **rest, **options)
