"""dense_output: the output of dense_decode, by torch's fused attention or by ours."""

import importlib

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import LAYOUTS, cases, make_case
from reference_attention import attention

from tidaldecode.errors import TidalError
from tidaldecode.kernels import dense_decode, dense_output
from tidaldecode.kernels.partition import other_partition

MODULE = importlib.import_module("tidaldecode.kernels.dense_output")


def run(case, fused: bool, **changes):
    """The output, and whether torch's fused attention made it."""
    calls = []

    def watched(*inputs, **options):
        calls.append(inputs[0].shape)
        return torch.nn.functional.scaled_dot_product_attention(*inputs, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MODULE, "is_intel", lambda: fused)
        patch.setattr(MODULE.torch, "get_num_threads", lambda: 1)
        patch.setattr(MODULE, "scaled_dot_product_attention", watched)
        options = {"seq_lens": case.seq_lens, "starts": case.starts, "scale": case.scale}
        options["backend"] = "torch"
        out = dense_output(case.q, **case.cache(), **{**options, **changes})
    return out, bool(calls)


@settings(max_examples=80, deadline=None, derandomize=True)
@given(cases(), st.booleans())
def test_any_case_equals_exact_attention(case, fused):
    out, used = run(case, fused)
    exact, _, _ = attention(case.q, case.k, case.v, case.keep, case.scale)
    torch.testing.assert_close(out.double(), exact, atol=2e-5, rtol=2e-5)
    if case.layout == "contiguous":
        assert used == (fused and bool(case.keep.any()))
    assert fused or not used


def test_another_partition_rounds_otherwise():
    case = make_case(1, 2, 4, 64, 3000)
    _, used = run(case, True)
    with other_partition():
        _, used_then = run(case, True)
    assert used and not used_then


def test_the_output_is_contiguous_whatever_the_query_is():
    case = make_case(2, 2, 2, 16, 50)
    case.q = torch.randn(4, 2, 16).transpose(0, 1)
    out, used = run(case, True)
    assert used and out.is_contiguous()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_rows_are_read_between_their_bounds_alone(layout):
    ends, starts = [40, 17, 0, 33], [0, 5, 0, 33]
    outputs = []
    for poison in (0.0, float("nan")):
        torch.manual_seed(1)
        case = make_case(4, 2, 3, 32, 40, ends=ends, starts=starts, layout=layout, poison=poison)
        outputs.append(run(case, True)[0])
    assert torch.equal(*outputs)
    assert not outputs[0][2:].any(), "empty rows give zeros"


@pytest.mark.parametrize("changed", ["half", "other processor", "more threads than KV heads"])
def test_our_own_attention_is_taken_where_the_fused_one_is_slower(changed, monkeypatch):
    case = make_case(1, 2, 2, 16, 50)
    if changed == "half":
        case = make_case(1, 2, 2, 16, 50, dtype=torch.float16)
    _, used = run(case, changed != "other processor")
    assert used == (changed == "more threads than KV heads")
    if used:
        monkeypatch.setattr(MODULE, "is_intel", lambda: True)
        monkeypatch.setattr(MODULE.torch, "get_num_threads", lambda: 3)
        assert not MODULE._fused_is_faster(case.q, case.k, case.v, 2)


def test_it_agrees_with_dense_decode():
    case = make_case(2, 2, 4, 64, 3000, ends=[3000, 1234], starts=[7, 0])
    out, used = run(case, True)
    assert used
    expected, _, _ = dense_decode(
        case.q, seq_lens=case.seq_lens, starts=case.starts, scale=case.scale, **case.cache()
    )
    torch.testing.assert_close(out, expected)


@pytest.mark.parametrize("fused", [False, True])
def test_what_breaks_the_contract_is_refused_by_name(fused):
    case = make_case(1, 2, 2, 16, 50)
    with pytest.raises(TidalError, match="seq_lens"):
        run(case, fused, seq_lens=torch.tensor([51], dtype=torch.int32))
    with pytest.raises(TidalError, match="starts"):
        run(case, fused, starts=torch.tensor([1, 2], dtype=torch.int32))
