"""rotate_append: queries and keys turned as in transformers, to the bit; the rest is append_token."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from tidaldecode.errors import TidalError
from tidaldecode.kernels import append_token, rms_norm, rotate_append

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HALF = [torch.float16] + ([torch.bfloat16] if DEVICE == "cuda" else [])


@pytest.fixture(params=["torch", "triton"])
def backend(request):
    if request.param == "triton":
        pytest.importorskip("triton")
    return request.param


def make(batch=3, tokens=1, heads=(6, 2), head_dim=20, capacity=9, dtype=torch.float16, gap=1):
    """Arguments of transformers, ``[B, H, T, D]``, parts of one product with poison in between."""
    query_heads, kv_heads = heads
    width = (query_heads + 2 * kv_heads) * head_dim
    product = torch.full((batch, tokens, width * gap), torch.nan, device=DEVICE, dtype=dtype)
    product = product[..., ::gap]
    product.copy_(torch.randn(batch, tokens, width))
    sizes = [query_heads * head_dim, kv_heads * head_dim, kv_heads * head_dim]
    q, k, v = (
        part.unflatten(-1, (-1, head_dim)).transpose(1, 2) for part in product.split(sizes, -1)
    )
    angles = torch.rand(batch, tokens, head_dim // 2, device=DEVICE).repeat(1, 1, 2) * 6.3
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    caches = torch.randn(2, batch, kv_heads, capacity, head_dim, device=DEVICE).to(dtype)
    return caches, (q, k, v), (cos, sin)


def lengths(values):
    return torch.tensor(values, dtype=torch.int32, device=DEVICE)


def check(caches, states, angles, ends, backend, gains=(None, None), one=False):
    """``one``: as a step of one token gives them, without the dimension of tokens."""
    q, k, v = states
    expected = caches.clone()
    normed = q, k
    if gains[0] is not None:
        normed = tuple(
            rms_norm(x.reshape(-1, x.shape[-1]), gain, eps=0.1, backend=backend).view(x.shape)
            for x, gain in zip((q, k), gains, strict=True)
        )
    turned_q, turned_k = apply_rotary_pos_emb(*normed, *angles)
    append_token(*expected, turned_k.transpose(1, 2), v.transpose(1, 2), ends, backend=backend)
    given = [*(x.transpose(1, 2) for x in (q, k, v)), *angles]
    wanted = turned_q.transpose(1, 2)
    if one:
        given, wanted = [x[:, 0] for x in given], wanted[:, 0]
    options = {"q_gain": gains[0], "k_gain": gains[1], "eps": 0.1, "backend": backend}
    found = rotate_append(*caches, *given, ends, **options)
    assert found.shape == wanted.shape and found.is_contiguous()
    # A GPU sums the squares of a norm in another order than its own kernel does.
    off = 16 * torch.finfo(q.dtype).eps if gains[0] is not None and DEVICE == "cuda" else 0
    torch.testing.assert_close(found, wanted, rtol=0, atol=off)
    torch.testing.assert_close(caches, expected, rtol=0, atol=off)


@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize("one", [False, True])
def test_it_is_rotation_and_append(one, normed, dtype, backend):
    case = make(dtype=dtype)
    gains = [torch.randn(20, device=DEVICE).to(dtype) for _ in "qk"] if normed else (None, None)
    check(*case, lengths([1, 9, 4]), backend, gains, one)


@settings(deadline=None, max_examples=30)
@given(
    batch=st.integers(1, 5),
    tokens=st.integers(1, 3),
    heads=st.tuples(st.integers(1, 5), st.integers(1, 3)),
    half=st.integers(1, 40),
    gap=st.integers(1, 2),
    normed=st.booleans(),
    dtype=st.sampled_from(HALF),
    data=st.data(),
)
def test_any_shape_and_stride(batch, tokens, heads, half, gap, normed, dtype, data):
    pytest.importorskip("triton")
    case = make(batch, tokens, heads, 2 * half, dtype=dtype, gap=gap)
    gains = [torch.randn(4 * half, device=DEVICE).to(dtype)[::2] for _ in "qk"]
    ends = lengths([data.draw(st.integers(tokens, 9)) for _ in range(batch)])
    check(*case, ends, "triton", gains if normed else (None, None))


def test_tokens_that_do_not_fit_are_not_written():
    pytest.importorskip("triton")
    caches, states, angles = make()
    expected = caches.clone()
    given = [*(x[:, :, 0] for x in states), *(angle[:, 0] for angle in angles)]
    rotate_append(*caches, *given, lengths([0, 10, 5]), backend="triton")
    assert torch.equal(caches[:, :2], expected[:, :2])
    assert not torch.equal(caches[:, 2, :, 4], expected[:, 2, :, 4])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.zeros(3, 2, 4, 20)}, r"q: expected shape \[3, any, 20\]"),
        ({"q": torch.zeros(3, 4, 20).half()}, "q: expected dtype float32"),
        ({"k": torch.zeros(3, 1, 20)}, "v: expected shape"),
        ({"cos": torch.zeros(3, 1, 20)}, r"cos: expected shape \[3, 20\]"),
        ({"sin": torch.zeros(1, 20)}, r"sin: expected shape \[3, 20\]"),
        ({"q_gain": torch.zeros(20)}, "q_gain, k_gain: expected both or neither, got one"),
        (
            {"q_gain": torch.zeros(20), "k_gain": torch.zeros(2)},
            r"k_gain: expected shape \[20\], got \[2\]",
        ),
    ],
)
def test_what_breaks_the_contract_is_refused_by_name(change, message):
    call = {
        "k_cache": torch.zeros(3, 2, 9, 20),
        "v_cache": torch.zeros(3, 2, 9, 20),
        "q": torch.zeros(3, 4, 20),
        "k": torch.zeros(3, 2, 20),
        "v": torch.zeros(3, 2, 20),
        "cos": torch.zeros(3, 20),
        "sin": torch.zeros(3, 20),
        "seq_lens": torch.ones(3, dtype=torch.int32),
    }
    with pytest.raises(TidalError, match=f"^{message}"):
        rotate_append(**{**call, **change})


def test_an_odd_head_dimension_is_refused():
    states = [torch.zeros(1, 1, 5)] * 3 + [torch.zeros(1, 5)] * 2
    caches = [torch.zeros(1, 1, 4, 5) for _ in "kv"]
    with pytest.raises(TidalError, match=r"^q: expected an even head dimension, got 5"):
        rotate_append(*caches, *states, torch.ones(1, dtype=torch.int32))
