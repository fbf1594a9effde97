"""linear: one pass over several weights gives each one's own product, in fp32 accumulation."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tidaldecode.errors import TidalError
from tidaldecode.kernels import linear

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
EXAMPLES = 20
DTYPES = [torch.float32, torch.float16] + ([torch.bfloat16] if DEVICE == "cuda" else [])


@pytest.fixture(params=["torch", "triton"])
def backend(request):
    if request.param == "triton":
        pytest.importorskip("triton")
    return request.param


def check(batch, inputs, sizes, dtype, backend, x=None):
    weights = [torch.randn(n, inputs, dtype=dtype, device=DEVICE) for n in sizes]
    x = torch.randn(batch, inputs, dtype=dtype, device=DEVICE) if x is None else x
    out = linear(x, weights, backend=backend)
    assert out.shape == (batch, sum(sizes)) and out.dtype == dtype
    stacked = torch.cat(weights).double()
    exact, sums = x.double() @ stacked.T, x.double().abs() @ stacked.abs().T
    unit = torch.finfo(dtype).eps
    allowed = unit * exact.abs() + 8 * torch.finfo(torch.float32).eps * sums
    assert ((out.double() - exact).abs() <= allowed).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sizes", [(1,), (33,), (40, 8, 8), (17, 5)])
@pytest.mark.parametrize("batch", [1, 3, 17])
def test_every_weight_is_multiplied(batch, sizes, dtype, backend):
    check(batch, 200, sizes, dtype, backend)


@pytest.mark.parametrize("inputs", [1, 15, 127, 128, 129, 511, 513, 4096, 4097, 5000])
@pytest.mark.parametrize("batch", [1, 2])
def test_edges_of_tiles(batch, inputs, backend):
    check(batch, inputs, (9, 16), torch.float16, backend)


@settings(deadline=None, max_examples=EXAMPLES)
@given(
    batch=st.integers(1, 64),
    inputs=st.integers(1, 300),
    sizes=st.lists(st.integers(1, 70), min_size=1, max_size=3),
)
def test_any_shape(batch, inputs, sizes):
    pytest.importorskip("triton")
    check(batch, inputs, tuple(sizes), torch.float16, "triton")


def test_a_wide_product_takes_the_other_tile(backend):
    check(2, 70, (8200,), torch.float16, backend)


def test_strides_of_the_input_are_honoured(backend):
    x = torch.full((6, 90), torch.nan, dtype=torch.float16, device=DEVICE)
    x[::2, 1:81:2] = torch.randn(3, 40, dtype=torch.float16, device=DEVICE)
    check(3, 40, (12, 7), torch.float16, backend, x=x[::2, 1:81:2])


def test_no_rows(backend):
    check(0, 16, (4,), torch.float16, backend)


X, W = torch.zeros(2, 8), torch.zeros(4, 8)


@pytest.mark.parametrize(
    ("x", "weights", "message"),
    [
        (X[0], [W], r"^x: expected shape \[any, any\], got \[8\]"),
        (X, [], "^linear: expected 1 to 3 weights and up to 64 rows, got 0 and 2"),
        (
            torch.zeros(65, 8),
            [W],
            "^linear: expected 1 to 3 weights and up to 64 rows, got 1 and 65",
        ),
        (X, [W, W[:, :4]], r"^weight: expected shape \[any, 8\], got \[4, 4\]"),
        (X, [W.half()], "^weight: expected dtype float32, got float16"),
        (X, [torch.zeros(8, 4).T], "^weight: expected it contiguous"),
    ],
)
def test_bad_arguments_are_named(x, weights, message):
    with pytest.raises(TidalError, match=message):
        linear(x, weights)
