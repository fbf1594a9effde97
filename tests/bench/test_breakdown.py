"""Kernels of a step, sorted by what they are for, and their plot."""

import pytest

from tidaldecode.bench import breakdown
from tidaldecode.bench.breakdown import DENSE, GAPS, PARTS, REST, SELECTION, SPARSE, sort_kernels
from tidaldecode.bench.decode import StepTime
from tidaldecode.bench.plots import plot_decode
from tidaldecode.kernels.triton import (
    _selection,
    _splitk,
    dense_decode,
    score_tokens,
    sparse_decode,
)


def test_merging_counts_as_the_attention_before_it_and_waiting_as_nothing():
    ran = [
        ("gemm", 0.0, 8.0),
        ("_dense_kernel", 8.5, 12.5),
        ("_merge_kernel", 8.75, 13.5),  # launched early
        ("_score_kernel", 13.5, 14.0),
        ("select_kernel", 14.0, 14.25),
        ("gemm", 15.0, 23.0),
        ("_sparse_kernel", 23.0, 25.0),
        ("_merge_kernel", 24.0, 25.125),
    ]
    parts = sort_kernels(reversed(ran))
    assert parts == {REST: 16.0, DENSE: 5.0, SELECTION: 0.75, SPARSE: 2.125, GAPS: 0.0}


def test_every_name_is_a_kernel():
    modules = (_selection, _splitk, dense_decode, score_tokens, sparse_decode)
    for name in [*breakdown._KERNELS, breakdown._MERGE]:
        assert any(hasattr(module, name) for module in modules), name


@pytest.mark.parametrize("profiled", [False, True])
def test_the_plot_stacks_what_was_profiled(profiled, tmp_path):
    parts = dict.fromkeys(PARTS, 1.0) if profiled else {}
    results = [
        StepTime(method, "D", context, 1, 5.0, 4.9, 5.1, 1, 1, 0, 4.0, parts)
        for context in (100, 200)
        for method in ("full", "tidal 32")
    ]
    path = plot_decode(results, "tiny", tmp_path / "steps.png", {})
    height = int.from_bytes(path.read_bytes()[20:24], "big")
    assert (height > 500) == profiled
