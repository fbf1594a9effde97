"""rms_norm: every row by itself, rounded where PyTorch's operations round."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tidaldecode.errors import TidalError
from tidaldecode.kernels import rms_norm

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.float16] + ([torch.bfloat16] if DEVICE == "cuda" else [])
EPS = 1e-5


@pytest.fixture(params=["torch", "triton"])
def backend(request):
    if request.param == "triton":
        pytest.importorskip("triton")
    return request.param


def new(*shape, dtype=torch.float32):
    return torch.randn(*shape, device=DEVICE).to(dtype)


def check(x, gain, backend, eps=EPS):
    """Against fp64, with the two roundings of the result where they belong."""
    out = rms_norm(x, gain, eps=eps, backend=backend)
    assert out.shape == x.shape and out.dtype == x.dtype and out.is_contiguous()
    exact = x.double() * torch.rsqrt(x.double().pow(2).mean(-1, keepdim=True) + eps)
    expected = (exact.to(x.dtype).double() * gain.double()).to(x.dtype)
    # fp32 arithmetic errs a little, and may fall to the other side of two roundings.
    kind = torch.finfo(x.dtype)
    unit = 2 * kind.eps + 8 * torch.finfo(torch.float32).eps
    error = (out.double() - expected.double()).abs()
    assert (error <= unit * expected.double().abs() + 2 * kind.eps * kind.tiny).all()
    if x.dtype is not torch.float32 and x.numel() > 500:
        assert (error == 0).double().mean() > 0.98


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("inputs", [1, 15, 128, 129, 511, 513, 4096, 5000, 16384])
@pytest.mark.parametrize("batch", [1, 3])
def test_rows_of_any_size(batch, inputs, dtype, backend):
    check(new(batch, inputs, dtype=dtype), new(inputs, dtype=dtype), backend)


@settings(deadline=None, max_examples=40)
@given(
    batch=st.integers(1, 20),
    inputs=st.integers(1, 700),
    dtype=st.sampled_from(DTYPES),
    step=st.integers(1, 3),
    scale=st.sampled_from([1e-3, 1.0, 50.0]),
    eps=st.sampled_from([1e-6, 1e-2]),
)
def test_any_shape_and_stride(batch, inputs, dtype, step, scale, eps):
    pytest.importorskip("triton")
    store = torch.full((2 * batch, inputs * step + 3), torch.nan, device=DEVICE, dtype=dtype)
    x = store[::2, 1 : 1 + inputs * step : step]
    x.copy_(new(batch, inputs, dtype=dtype) * scale)
    gain = new(2 * inputs, dtype=dtype)[::2]
    check(x, gain, "triton", eps)


def test_a_row_of_zeros_and_a_huge_row_stay_finite(backend):
    x = torch.zeros(3, 40, device=DEVICE)
    x[1], x[2] = 1e15, 1e-30
    out = rms_norm(x, torch.ones(40, device=DEVICE), eps=EPS, backend=backend)
    torch.testing.assert_close(out[1], torch.ones(40, device=DEVICE))
    assert out.isfinite().all() and not out[0].any()


@pytest.mark.parametrize("shape", [(0, 16), (2, 0)])
def test_nothing_to_normalise(shape, backend):
    assert rms_norm(new(*shape), new(shape[1]), eps=EPS, backend=backend).shape == shape


@pytest.mark.parametrize(
    ("x", "gain", "message"),
    [
        (torch.zeros(8), torch.ones(8), r"^x: expected shape \[any, any\], got \[8\]"),
        (torch.zeros(2, 8).long(), torch.ones(8), "^x: expected dtype"),
        (torch.zeros(2, 8), torch.ones(4), r"^gain: expected shape \[8\], got \[4\]"),
        (torch.zeros(2, 8), torch.ones(8).half(), "^gain: expected dtype float32, got float16"),
    ],
)
def test_bad_arguments_are_named(x, gain, message):
    with pytest.raises(TidalError, match=message):
        rms_norm(x, gain, eps=EPS)
