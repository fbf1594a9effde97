"""Numba's loops: where they run, how they cut rows, and that threads do not meet in them."""

import sys
import threading

import pytest
import torch
from kernel_cases import make_case
from reference_attention import assert_attends_exactly, assert_scores_are_exact

from tidaldecode.errors import TidalError
from tidaldecode.kernels import (
    Selection,
    dense_decode,
    dense_output,
    dense_select,
    dispatch,
    sparse_decode,
)
from tidaldecode.kernels.partition import other_partition

pytest.importorskip("numba")
from tidaldecode.kernels.numba import _loops, rows

CPU = torch.device("cpu")


def run(case, **options):
    return dense_decode(
        case.q,
        seq_lens=case.seq_lens,
        starts=case.starts,
        scale=case.scale,
        **{"backend": "numba", **case.cache(), **options},
    )


def check(case, kind="shared") -> None:
    out, lse, scores = run(case, scores=kind)
    assert_attends_exactly(out, lse, case.q, case.k, case.v, case.keep, case.scale)
    assert_scores_are_exact(scores, case, kind)


@pytest.mark.parametrize(
    "tokens", [1, 2, 3, 4, 5, 15, 16, 17, 255, 256, 257, 513, 1024, 1025, 2049]
)
def test_blocks_and_streams_of_any_length_lose_and_repeat_no_token(tokens):
    check(make_case(1, 2, 3, 32, tokens))


@pytest.mark.parametrize("group", [1, 2, 3, 4, 5, 7, 8, 16])
@pytest.mark.parametrize("head_dim", [16, 64, 80, 128, 256])
def test_every_group_and_head_size_works(group, head_dim):
    check(make_case(2, 2, group, head_dim, 300, ends=[300, 41]), "query_head")


@pytest.mark.parametrize("part", [1, 7, 64])
def test_rows_are_cut_into_any_number_of_parts(part, monkeypatch):
    monkeypatch.setattr(rows, "_PART", part)
    for tokens in (1, 6, 50, 333):
        check(make_case(1, 2, 3, 32, tokens), "kv_head")
        check(make_case(3, 1, 2, 16, tokens, ends=[tokens, 0, tokens // 2], sharpness=6.0))


def test_parts_of_sets_that_end_before_them_are_empty(monkeypatch):
    monkeypatch.setattr(rows, "_PART", 4)
    case = make_case(1, 2, 2, 16, 64)
    positions = torch.full((1, 2, 40), -1, dtype=torch.int32)
    positions[0, 0], positions[0, 1, 7] = torch.arange(40), 3
    selection = Selection(positions, torch.tensor([[40, 8]], dtype=torch.int32))
    keep = torch.zeros(1, 4, 64, dtype=torch.bool)
    keep[0, :2, :40] = keep[0, 2:, 3] = True
    cache = {"k": case.k, "v": case.v}
    out, lse = sparse_decode(
        case.q, selection=selection, scale=case.scale, backend="numba", **cache
    )
    assert_attends_exactly(out, lse, case.q, case.k, case.v, keep, case.scale)


@pytest.mark.parametrize("tokens", [300, 5000])
def test_a_key_that_is_not_a_number_is_not_passed_over(tokens):
    case = make_case(1, 2, 2, 16, tokens)
    case.k[0, 1, tokens // 2, 3] = float("nan")
    out, lse, _ = run(case)
    assert out[0, :2].isfinite().all() and lse[0, :2].isfinite().all()
    assert out[0, 2:].isnan().all() and lse[0, 2:].isnan().all()


def test_another_partition_rounds_otherwise():
    case = make_case(1, 2, 4, 64, 3000)
    out, lse, _ = run(case)
    with other_partition():
        other, other_lse, _ = run(case)
    assert not torch.equal(out, other)
    torch.testing.assert_close(out, other)
    torch.testing.assert_close(lse, other_lse)


def test_powers_of_two_are_exact_to_rounding():
    x = torch.cat([torch.linspace(-126, 0, 100_001), torch.tensor([-1e30, -127.0, -0.5, -0.0])])
    powers, bits = torch.empty_like(x).numpy(), torch.empty(len(x), dtype=torch.int32).numpy()
    _loops._exp2(x.numpy(), x.new_zeros(1).numpy()[0], len(x), powers, bits, bits.view("float32"))
    exact = x.double().clamp(min=-126).exp2()
    error = (torch.from_numpy(powers).double() - exact).abs() / exact
    assert error.max() <= 2 * torch.finfo(torch.float32).eps


def test_threads_of_a_program_do_not_meet():
    cases = [make_case(1, 4, 2, 32, 5000) for _ in range(4)]
    alone = [run(case, scores="shared") for case in cases]
    found: dict[int, bool] = {}

    def decode(number: int) -> None:
        again = [run(cases[number], scores="shared") for _ in range(20)]
        found[number] = all(
            torch.equal(x, y) for run_ in again for x, y in zip(run_, alone[number], strict=True)
        )

    threads = [threading.Thread(target=decode, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == dict.fromkeys(range(4), True)


@pytest.mark.parametrize("backend", ["auto", "numba"])
def test_attention_runs_in_the_loops_where_it_can(backend, monkeypatch):
    calls = []
    attend = rows._attend
    monkeypatch.setattr(rows, "_attend", lambda *args: calls.append(1) or attend(*args))
    monkeypatch.delenv("TIDALDECODE_BACKEND", raising=False)
    case = make_case(1, 2, 2, 16, 60)
    given = {"q": case.q, "k": case.k, "v": case.v, "scale": case.scale, "backend": backend}
    dense_decode(seq_lens=case.seq_lens, **given)
    dense_output(seq_lens=case.seq_lens, **given)
    _, _, chosen = dense_select(seq_lens=case.seq_lens, scores="shared", budget=9, **given)
    sparse_decode(selection=chosen, **given)
    assert len(calls) == 4


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"dtype": torch.float16}, "float32, got torch.float16"),
        ({"layout": "paged 16"}, "not paged"),
        ({"queries": 2}, "one query a row"),
    ],
)
def test_what_the_loops_cannot_do_is_refused_or_left_to_pytorch(changes, message, monkeypatch):
    monkeypatch.delenv("TIDALDECODE_BACKEND", raising=False)
    queries = changes.pop("queries", 1)
    case = make_case(1, 2, 2, 16, 60, **changes)
    if queries > 1:
        case.q = case.q[:, None].expand(-1, queries, -1, -1)
    with pytest.raises(TidalError, match=f"backend: .*{message}.*use 'torch' or 'auto'"):
        run(case)
    assert run(case, backend="auto")[0].isfinite().all()


@pytest.mark.parametrize("missing", ["package", "threads"])
def test_without_numba_or_its_threads_everything_is_pytorch(missing, monkeypatch):
    if missing == "package":
        monkeypatch.setattr(dispatch.importlib.util, "find_spec", lambda name: None)
    else:
        for layer in ("omppool", "tbbpool"):  # what cannot be imported
            monkeypatch.setitem(sys.modules, f"numba.np.ufunc.{layer}", None)
    dispatch._numba_missing.cache_clear()
    try:
        assert dispatch.resolve_backend("auto", CPU, in_rows=True) == "torch"
        with pytest.raises(TidalError, match="backend: Numba's loops expect"):
            dispatch.resolve_backend("numba", CPU, in_rows=True)
    finally:
        dispatch._numba_missing.cache_clear()


def test_every_other_kernel_is_pytorchs():
    assert dispatch.resolve_backend("numba", CPU) == "torch"
    assert dispatch.resolve_backend("auto", CPU) == "torch"
