"""A selection's phases: in one launch or in three, they choose the same tokens."""

import importlib
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from reference_selection import assert_selection_is_exact, int32

from tidaldecode.kernels import dense_select, select_tokens
from tidaldecode.kernels.scratch import Scratch, bin_bits, histogram_elements

pytest.importorskip("triton")

SELECT, LOGITS = (
    importlib.import_module(f"tidaldecode.kernels.triton.{name}")
    for name in ("select_tokens", "_logits")
)
CUDA = torch.device("cuda")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HERE = torch.empty(0, device=DEVICE).device  # with its number: a scratch tells GPUs apart
H200_PROCESSORS = 132
needs_gpu = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="programs wait for each other on an NVIDIA GPU alone"
)


@pytest.fixture
def on_an_h200(monkeypatch):
    monkeypatch.setattr(SELECT, "processors", lambda _: H200_PROCESSORS)


@pytest.mark.parametrize("width", [0, 1, 1024, 1025, 32_768, 102_400, 1 << 20])
@pytest.mark.parametrize("sets", [1, 2, 3, 4, 5, 16, 512])
@pytest.mark.parametrize("mergers", [0, 8, 50])
def test_programs_that_wait_for_each_other_fit_on_the_gpu(on_an_h200, sets, width, mergers):
    launches = SELECT._launches(width, sets, CUDA, mergers)
    assert [launches[0].first, launches[-1].last] == [1, 3]
    assert all(a.last + 1 == b.first for a, b in pairwise(launches))
    for launch in launches:
        assert launch.programs >= 1
        if launch.first < launch.last:
            assert (launch.programs + mergers) * sets <= H200_PROCESSORS
        else:
            assert launch.programs * launch.chunk >= width
    # What the second phase counts for each program the third one reads.
    assert launches[-1].programs == launches[-2 if len(launches) > 1 else -1].programs


def test_few_sets_take_one_launch_and_none_where_kernels_are_interpreted(on_an_h200):
    assert len(SELECT._launches(32_768, 1, CUDA)) == 1
    assert len(SELECT._launches(32_768, 4, CUDA, 8)) == 1
    assert len(SELECT._launches(32_768, 16, CUDA)) == 3
    assert len(SELECT._launches(32_768, 1, torch.device("cpu"))) == 3


def a_call(sets: int, width: int, batch: int = 1) -> dict:
    """Ragged, padded rows, one of them empty where there are several."""
    ends = [width - 5, 0, width // 3][:batch]
    return {
        "scores": torch.rand(batch, sets, width) ** 8,
        "seq_lens": int32(ends),
        "starts": int32([77, 0, 5][:batch]) if batch > 1 else None,
        "budget": 300,
        "sink_tokens": 4,
        "recent_tokens": 15,
    }


def choose(call: dict, scratch: Scratch):
    moved = {k: v.to(DEVICE) if torch.is_tensor(v) else v for k, v in call.items()}
    selection = select_tokens(backend="triton", scratch=scratch, **moved)
    assert not scratch.zeros(1, HERE).any(), "scratch was not left zeroed"
    return selection.to(torch.device("cpu"))


@pytest.mark.parametrize("programs", [1, 2, 3, 7])
def test_a_program_takes_its_tokens_chunk_by_chunk(programs, monkeypatch):
    launches = [SELECT._Launch(phase, phase, programs, 64, 4) for phase in (1, 2, 3)]
    monkeypatch.setattr(SELECT, "_launches", lambda *_: launches)
    for call in (a_call(1, 1000), a_call(2, 900, 3)):
        assert_selection_is_exact(choose(call, Scratch()), call)


@needs_gpu
@pytest.mark.parametrize("sets, batch", [(1, 1), (2, 1), (4, 1), (1, 3)])
@pytest.mark.parametrize("width", [1, 1023, 5_000, 40_001, 300_000])
def test_one_launch_chooses_what_three_choose(sets, batch, width, monkeypatch):
    call, scratch = a_call(sets, width, batch), Scratch()
    call["seq_lens"].clamp_(min=0)
    if call["starts"] is not None:
        call["starts"] = torch.minimum(call["starts"], call["seq_lens"])
    chosen = [choose(call, scratch) for _ in range(3)]
    monkeypatch.setattr(SELECT, "_SETS_AT_ONCE", 0)
    chosen.append(choose(call, scratch))
    chosen.append(select_tokens(backend="torch", **call))
    for other in chosen[1:]:
        assert torch.equal(chosen[0].positions, other.positions)
        assert torch.equal(chosen[0].counts, other.counts)


@needs_gpu
@pytest.mark.parametrize("tokens", [9_000, 100_000])
def test_equal_logits_make_more_candidates_than_are_listed(tokens):
    q = torch.randn(1, 8, 64, device=DEVICE, dtype=torch.float16)
    k = torch.zeros(1, 2, tokens, 64, device=DEVICE, dtype=torch.float16)
    lens = torch.tensor([tokens], dtype=torch.int32, device=DEVICE)
    options = {"scale": 0.1, "scores": "shared", "budget": 300, "recent_tokens": 15}
    for scratch in [Scratch()] * 2:
        _, _, chosen = dense_select(
            q, k, torch.randn_like(k), lens, backend="triton", scratch=scratch, **options
        )
        first, newest = torch.arange(284), torch.arange(tokens - 16, tokens)
        assert torch.equal(chosen.positions.cpu().flatten(), torch.cat([first, newest]).int())
        assert not scratch.zeros(1, HERE).any()


@needs_gpu
def test_one_launch_can_be_captured_and_replayed():
    call, scratch = a_call(1, 50_000), Scratch()
    moved = {k: v.cuda() if torch.is_tensor(v) else v for k, v in call.items()}
    expected = select_tokens(backend="triton", scratch=scratch, **moved).positions.clone()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = select_tokens(backend="triton", scratch=scratch, **moved)
    for _ in range(20):
        captured.positions.zero_()
        graph.replay()
        assert torch.equal(captured.positions, expected)


@pytest.mark.parametrize(
    "rows, heads, width, stays",
    [(1, 32, 102_400, True), (16, 32, 65_536, True), (16, 32, 80_000, False), (17, 8, 64, False)],
)
def test_logits_stay_in_the_cache_where_they_fit(rows, heads, width, stays, monkeypatch):
    monkeypatch.setattr(LOGITS, "cache_bytes", lambda _: 60 << 20)

    class OnGpu:
        device = CUDA

        def __len__(self) -> int:
            return rows

        def untyped_storage(self):
            half = torch.empty(rows, heads, width, dtype=torch.float16, device="meta")
            return half.untyped_storage()

    kept = LOGITS.KeptLogits.make(torch.empty(1, heads, 64), 16)
    assert kept.eviction == ""
    assert (replace(kept, distances=OnGpu()).eviction == "evict_last") == stays


@pytest.mark.parametrize("most", [1, 3, 16, 17, 100, 2000])
def test_a_scratch_that_is_planned_has_room_for_all_that_is_asked_of_it(most):
    planned = histogram_elements(most)
    for sets in range(1, most + 1):
        scratch = Asked()
        SELECT._Buffers.make(sets, 1, bin_bits(sets), 1, scratch, torch.device("meta"))
        assert scratch.count <= planned


class Asked:
    """What a scratch is asked for."""

    count = 0

    def zeros(self, count: int, device: torch.device) -> torch.Tensor:
        self.count = count
        return torch.empty(count, dtype=torch.int32, device=device)


@pytest.mark.parametrize("sets", [1, 6, 9])
@pytest.mark.parametrize("tokens", [1, 300, 1500, 5000])
def test_short_rows_of_a_long_cache_are_chosen_from_as_shipped(sets, tokens):
    scores = torch.rand(1, sets, 20_000) ** 8
    options = {"budget": 40, "sink_tokens": 4, "recent_tokens": 15}
    call = {"scores": scores, "seq_lens": int32([tokens]), "starts": None, **options}
    scratch = Scratch()
    for _ in "ab":  # what the first leaves behind, the second would count
        assert_selection_is_exact(choose(call, scratch), call)
