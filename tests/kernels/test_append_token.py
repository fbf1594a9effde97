"""append_token: every row's newest token lands where the row ends, and nothing else changes."""

import pytest
import torch

from tidaldecode.errors import TidalError
from tidaldecode.kernels import append_token

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def new(batch=3, heads=2, tokens=9, head_dim=20, dtype=torch.float32):
    caches = [torch.randn(batch, heads, tokens, head_dim, dtype=dtype, device=DEVICE) for _ in "kv"]
    fresh = [torch.randn(batch, heads, head_dim, dtype=dtype, device=DEVICE) for _ in "kv"]
    return caches, fresh


def lengths(values):
    return torch.tensor(values, dtype=torch.int32, device=DEVICE)


@pytest.fixture(params=["torch", "triton"])
def backend(request):
    if request.param == "triton":
        pytest.importorskip("triton")
    return request.param


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_new_tokens_land_at_the_end_of_every_row_and_nothing_else_changes(backend, dtype):
    caches, fresh = new(dtype=dtype)
    ends = [1, 9, 4]
    expected = [cache.clone() for cache in caches]
    for cache, states in zip(expected, fresh, strict=True):
        for row, end in enumerate(ends):
            cache[row, :, end - 1] = states[row]
    append_token(*caches, *fresh, lengths(ends), backend=backend)
    assert all(torch.equal(a, b) for a, b in zip(caches, expected, strict=True))


@pytest.mark.parametrize("count", [1, 3])
def test_several_tokens_of_a_row_land_in_order(backend, count):
    caches, _ = new()
    fresh = [torch.randn(3, 2, count, 20, device=DEVICE).transpose(1, 2) for _ in "kv"]
    ends = [count, 9, 4]
    expected = [cache.clone() for cache in caches]
    for cache, states in zip(expected, fresh, strict=True):
        for row, end in enumerate(ends):
            cache[row, :, end - count : end] = states[row].transpose(0, 1)
    append_token(*caches, *fresh, lengths(ends), backend=backend)
    assert all(torch.equal(a, b) for a, b in zip(caches, expected, strict=True))


def test_tokens_that_do_not_fit_are_not_written():
    pytest.importorskip("triton")
    caches, _ = new()
    fresh = [torch.ones(3, 3, 2, 20, device=DEVICE) for _ in "kv"]
    expected = [cache.clone() for cache in caches]
    for cache in expected:
        cache[1, :, 8:9], cache[2, :, :2] = 1, 1
    append_token(*caches, *fresh, lengths([0, 11, 2]), backend="triton")
    assert all(torch.equal(a, b) for a, b in zip(caches, expected, strict=True))


@pytest.mark.parametrize("count", [1, 3])
def test_nothing_comes_before_the_first_place(backend, count):
    caches, _ = new()
    fresh = [torch.ones(3, count, 2, 20, device=DEVICE) for _ in "kv"]
    expected = [cache.clone() for cache in caches]
    for cache in expected:
        cache[0, :, : count - 1], cache[2, :, 5 - count : 5] = 1, 1
    append_token(*caches, *fresh, lengths([count - 1, 0, 5]), backend=backend)
    assert all(torch.equal(a, b) for a, b in zip(caches, expected, strict=True))


def test_strides_are_honoured(backend):
    stores = [torch.zeros(3, 11, 5, 22, device=DEVICE) for _ in "kv"]
    views = [store[:, 1:10, 1:4:2, 1:21].transpose(1, 2) for store in stores]
    fresh = [torch.randn(2, 20, 3, device=DEVICE).permute(2, 0, 1) for _ in "kv"]
    append_token(*views, *fresh, lengths([2, 2, 9]), backend=backend)
    for store, view, states in zip(stores, views, fresh, strict=True):
        assert torch.equal(view[0, :, 1], states[0]) and torch.equal(view[2, :, 8], states[2])
        assert store.count_nonzero() == states.numel()


def test_a_long_cache_is_addressed_beyond_32_bits_of_elements(backend):
    if DEVICE == "cpu":
        pytest.skip("needs 8 GB")
    cache = torch.zeros(1, 1, (1 << 31) // 64 + 8, 64, dtype=torch.float16, device=DEVICE)
    fresh = torch.ones(1, 1, 64, dtype=torch.float16, device=DEVICE)
    append_token(cache, cache, fresh, fresh, lengths([cache.shape[2]]), backend=backend)
    assert cache[0, 0, -1].eq(1).all() and cache.count_nonzero() == 64


@pytest.mark.parametrize(
    "change, message",
    [
        ({"k": torch.zeros(3, 2, 20).double()}, "k: expected dtype"),
        ({"v": torch.zeros(3, 2, 19)}, "v: expected shape"),
        ({"k_cache": torch.zeros(3, 1, 9, 20)}, "k_cache: expected shape"),
        ({"v_cache": torch.zeros(3, 2, 9, 20).half()}, "v_cache: expected dtype"),
        ({"seq_lens": torch.ones(2, dtype=torch.int32)}, "seq_lens: expected shape"),
    ],
)
def test_what_breaks_the_contract_is_refused_by_name(change, message):
    call = {
        "k_cache": torch.zeros(3, 2, 9, 20),
        "v_cache": torch.zeros(3, 2, 9, 20),
        "k": torch.zeros(3, 2, 20),
        "v": torch.zeros(3, 2, 20),
        "seq_lens": torch.ones(3, dtype=torch.int32),
    }
    with pytest.raises(TidalError, match=f"^{message}"):
        append_token(**{**call, **change})
