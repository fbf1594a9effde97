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


def new(*shape, dtype):
    return torch.randn(*shape, dtype=dtype, device=DEVICE)


def check(batch, inputs, sizes, dtype, backend, x=None, gain=False, gated=False, residual=False):
    weights = [new(n, inputs, dtype=dtype) for n in sizes]
    x = new(batch, inputs, dtype=dtype) if x is None else x
    outputs = sizes[0] if gated else sum(sizes)
    extras = {
        "gain": new(inputs, dtype=dtype) if gain else None,
        "residual": new(batch, outputs, dtype=dtype) if residual else None,
    }
    out = linear(x, weights, eps=0.5, gated=gated, backend=backend, **extras)
    assert out.shape == (batch, outputs) and out.dtype == dtype
    exact, allowed = reference(x, weights, gated, **extras)
    assert ((out.double() - exact).abs() <= allowed).all()


def reference(x, weights, gated, gain, residual):
    """fp64, and what rounding once at each named step may change."""
    unit, smallest = torch.finfo(x.dtype).eps, torch.finfo(x.dtype).tiny
    x, stacked = x.double(), torch.cat(weights).double()
    steps = 1
    if gain is not None:
        x, steps = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 0.5) * gain.double(), 3
    exact, sums = x @ stacked.T, x.abs() @ stacked.abs().T
    # Rounded inputs of a product err independently of each other: far below their sum.
    allowed = unit * exact.abs() + 8 * torch.finfo(torch.float32).eps * sums
    allowed += (steps - 1) * unit * (x.pow(2) @ stacked.pow(2).T).sqrt()
    if gated:
        (gate, up), (gate_off, up_off) = exact.chunk(2, 1), allowed.chunk(2, 1)
        exact = torch.nn.functional.silu(gate) * up
        allowed = 1.1 * gate_off * up.abs() + gate.abs() * up_off + 3 * unit * exact.abs()
        allowed += gate_off * up_off
    if residual is not None:
        exact = exact + residual.double()
        allowed = allowed + unit * (exact.abs() + residual.double().abs())
    # Below the smallest normal number the steps of a dtype no longer shrink.
    return exact, allowed + smallest * unit


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sizes", [(1,), (33,), (40, 8, 8), (17, 5)])
@pytest.mark.parametrize("batch", [1, 3, 17])
def test_every_weight_is_multiplied(batch, sizes, dtype, backend):
    check(batch, 200, sizes, dtype, backend)


@pytest.mark.parametrize("inputs", [1, 15, 127, 128, 129, 511, 513, 4096, 4097, 5000])
@pytest.mark.parametrize("batch", [1, 2])
def test_edges_of_tiles(batch, inputs, backend):
    check(batch, inputs, (9, 16), torch.float16, backend)


@pytest.mark.parametrize("inputs", [40, 128, 513, 4200])
@pytest.mark.parametrize("extra", ["gain", "gated", "residual", "all"])
def test_what_comes_before_and_after(extra, inputs, backend):
    extras = dict.fromkeys(("gain", "gated", "residual") if extra == "all" else (extra,), True)
    check(1, inputs, (21, 21), torch.float16, backend, **extras)
    if "gain" not in extras:
        check(5, inputs, (21, 21), torch.float16, backend, **extras)


@pytest.mark.parametrize("batch", [8, 16, 32, 64])
@pytest.mark.parametrize("sizes, extras", [((21,), {}), ((4100,), {}), ((21, 21), {"gated": True})])
def test_every_tile_fits_its_memory(batch, sizes, extras, backend):
    check(batch, 4200 if sizes == (21,) else 700, sizes, torch.float16, backend, **extras)


def test_strides_of_the_residual_are_honoured(backend):
    x, weight = new(3, 32, dtype=torch.float16), new(8, 32, dtype=torch.float16)
    store = torch.full((3, 16), torch.nan, dtype=torch.float16, device=DEVICE)
    store[:, ::2] = new(3, 8, dtype=torch.float16)
    expected = linear(x, [weight], residual=store[:, ::2].clone(), backend=backend)
    assert torch.equal(linear(x, [weight], residual=store[:, ::2], backend=backend), expected)


@settings(deadline=None, max_examples=EXAMPLES)
@given(
    batch=st.integers(1, 64),
    inputs=st.integers(1, 300),
    sizes=st.lists(st.integers(1, 70), min_size=1, max_size=3),
)
def test_any_shape(batch, inputs, sizes):
    pytest.importorskip("triton")
    check(batch, inputs, tuple(sizes), torch.float16, "triton")


def test_products_below_the_normal_numbers(backend):
    x = torch.full((3, 1), 3.1e-5, dtype=torch.float16, device=DEVICE)
    check(3, 1, (40,), torch.float16, backend, x=x)


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


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gain": torch.ones(8)}, "^gain: expected one row to normalise, got 2"),
        ({"gain": torch.ones(4)}, r"^gain: expected shape \[8\], got \[4\]"),
        ({"residual": torch.ones(2, 3)}, r"^residual: expected shape \[2, 4\], got \[2, 3\]"),
        ({"gated": True}, r"^gated: expected two weights of one size, got sizes \[4\]"),
    ],
)
def test_bad_extras_are_named(options, message):
    with pytest.raises(TidalError, match=message):
        linear(X, [W], **options)
