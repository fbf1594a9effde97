"""Every Triton kernel a few times at small sizes: quick enough for a memory checker.

compute-sanitizer --tool memcheck python -m pytest tests/gpu/test_every_kernel.py
compute-sanitizer --tool racecheck python -m pytest tests/gpu/test_every_kernel.py
"""

from __future__ import annotations

import pytest
import torch
from kernel_cases import Case, lay_out

from tidaldecode.kernels import (
    append_token,
    dense_decode,
    dense_select,
    linear,
    rms_norm,
    rotate_append,
    select_tokens,
    sparse_decode,
)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]
BATCH, KV_HEADS, GROUP, HEAD_DIM, TOKENS, BUDGET = 3, 2, 4, 64, 3000, 200


@pytest.fixture(params=["contiguous", "paged 16", "contiguous, not padded"])
def inputs(request):
    """Left-padded rows of different lengths, one of them empty, with poison around them."""
    layout, *unpadded = request.param.split(", ")
    k, v = (torch.randn(BATCH, KV_HEADS, TOKENS, HEAD_DIM) for _ in range(2))
    q = torch.randn(BATCH, KV_HEADS * GROUP, HEAD_DIM)
    ends, begins = ([TOKENS, 1700, 0], None) if unpadded else ([TOKENS, 1700, 5], [0, 40, 5])
    seq_lens = torch.tensor(ends, dtype=torch.int32)
    starts = None if begins is None else torch.tensor(begins, dtype=torch.int32)
    case = Case(q, k, v, seq_lens, starts, HEAD_DIM**-0.5, layout)
    cache = lay_out(k.half(), v.half(), layout, float("nan"), case.valid)
    moved = {name: None if value is None else value.cuda() for name, value in cache.items()}
    rows = {"seq_lens": seq_lens.cuda(), "starts": None if starts is None else starts.cuda()}
    return {"q": q.cuda().half(), "scale": case.scale, **moved}, rows


def test_attention_and_selection_agree_with_the_plain_path(inputs):
    attention, rows = inputs
    options = {"scores": "shared", "budget": BUDGET, "sink_tokens": 4, "recent_tokens": 15}
    results = []
    for backend in ("torch", "triton"):
        out, lse, selection = dense_select(**attention, **rows, **options, backend=backend)
        dense, _, scores = dense_decode(**attention, **rows, scores="kv_head", backend=backend)
        chosen = select_tokens(scores, rows["seq_lens"], budget=BUDGET, starts=rows["starts"])
        for picked in (selection, chosen):
            sparse, _ = sparse_decode(**attention, selection=picked, backend=backend)
            assert sparse.isfinite().all()
        results.append((out.float(), lse, selection.counts, dense.float()))
    for plain, twin in zip(*results, strict=True):
        torch.testing.assert_close(twin, plain, atol=4e-3, rtol=4e-3)


def test_several_queries_agree_with_the_plain_path(inputs):
    attention, rows = inputs
    queries = torch.randn(BATCH, 5, KV_HEADS * GROUP, HEAD_DIM).cuda().half()
    plain, twin = (
        dense_decode(**{**attention, "q": queries}, **rows, backend=backend)
        for backend in ("torch", "triton")
    )
    for expected, found in zip(plain[:2], twin[:2], strict=True):
        torch.testing.assert_close(found.float(), expected.float(), atol=4e-3, rtol=4e-3)


def test_a_token_is_appended():
    cache = torch.zeros(2, BATCH, KV_HEADS, 64, HEAD_DIM, device="cuda")
    new = torch.randn(2, BATCH, KV_HEADS, HEAD_DIM, device="cuda")
    lens = torch.tensor([1, 30, 64], dtype=torch.int32, device="cuda")
    append_token(cache[0], cache[1], new[0], new[1], lens)
    for row, last in enumerate(lens.tolist()):
        assert torch.equal(cache[:, row, :, last - 1], new[:, row])
    assert int(cache.count_nonzero()) == int(new.count_nonzero())


@pytest.mark.parametrize("tokens", [1, 4])
@pytest.mark.parametrize("normed", [False, True])
def test_a_token_is_rotated_and_appended(tokens, normed):
    caches = torch.zeros(2, 2, BATCH, KV_HEADS, 64, HEAD_DIM, device="cuda").bfloat16()
    heads = (KV_HEADS * GROUP, KV_HEADS, KV_HEADS)
    product = torch.randn(BATCH, tokens, sum(heads) * HEAD_DIM, device="cuda").bfloat16()
    new = [
        part.unflatten(-1, (-1, HEAD_DIM))
        for part in product.split([HEAD_DIM * count for count in heads], -1)
    ]
    new += torch.randn(2, BATCH, tokens, HEAD_DIM, device="cuda").bfloat16()
    lens = torch.tensor([tokens, 30, 64], dtype=torch.int32, device="cuda")
    gains = torch.rand(2, HEAD_DIM, device="cuda").bfloat16() if normed else (None, None)
    options = {"q_gain": gains[0], "k_gain": gains[1], "eps": 1e-5}
    plain, twin = (
        rotate_append(*cache, *new, lens, **options, backend=backend)
        for cache, backend in zip(caches, ("torch", "triton"), strict=True)
    )
    torch.testing.assert_close(twin, plain, atol=0.1 if normed else 0, rtol=0)
    torch.testing.assert_close(caches[1], caches[0], atol=0.1 if normed else 0, rtol=0)


@pytest.mark.parametrize("rows", [1, 5])
def test_weights_are_multiplied(rows):
    x = torch.randn(rows, 600, device="cuda", dtype=torch.bfloat16)
    weights = [torch.randn(200, 600, device="cuda", dtype=torch.bfloat16) / 25 for _ in range(2)]
    residual = torch.randn(rows, 200, device="cuda", dtype=torch.bfloat16)
    gain = torch.rand(600, device="cuda", dtype=torch.bfloat16) if rows == 1 else None
    plain, twin = (
        linear(x, weights, gain=gain, gated=True, residual=residual, backend=backend)
        for backend in ("torch", "triton")
    )
    torch.testing.assert_close(twin, plain, atol=0.1, rtol=0.05)


@pytest.mark.parametrize("inputs", [600, 4096])
def test_rows_are_normalised(inputs):
    x = torch.randn(3, 2 * inputs, device="cuda", dtype=torch.bfloat16)[:, ::2]
    gain = torch.rand(inputs, device="cuda", dtype=torch.bfloat16)
    plain, twin = (rms_norm(x, gain, eps=1e-5, backend=backend) for backend in ("torch", "triton"))
    torch.testing.assert_close(twin, plain)
