"""Every argument that breaks the kernel contract is refused with a message that opens with its name."""

import pytest
import torch

from tidaldecode.errors import TidalError
from tidaldecode.kernels import Selection, dense_decode, dispatch, select_tokens, sparse_decode
from tidaldecode.kernels.dispatch import resolve_backend

INT32 = torch.int32
BATCH, QUERY_HEADS, KV_HEADS, TOKENS, HEAD_DIM = 2, 6, 2, 8, 16


def arguments() -> dict:
    """What both attention kernels take, strided."""
    return {
        "q": torch.randn(BATCH, QUERY_HEADS, HEAD_DIM),
        "k": torch.randn(BATCH, KV_HEADS, TOKENS, HEAD_DIM),
        "v": torch.randn(BATCH, KV_HEADS, TOKENS, HEAD_DIM),
        "scale": 0.25,
    }


def paged_arguments() -> dict:
    """The same, in blocks of 4."""
    return {
        **arguments(),
        "k": torch.randn(5, 4, KV_HEADS, HEAD_DIM),
        "v": torch.randn(5, 4, KV_HEADS, HEAD_DIM),
        "block_table": torch.tensor([[3, 1], [0, 4]], dtype=INT32),
    }


def dense(**call):
    call.setdefault("seq_lens", torch.tensor([8, 5], dtype=INT32))
    return dense_decode(**call)


def sparse(**call):
    positions = torch.tensor([[[0, 3]], [[1, -1]]], dtype=INT32)
    counts = torch.tensor([[2], [1]], dtype=INT32)
    return sparse_decode(selection=Selection(positions, counts), **call)


@pytest.fixture(params=[dense, sparse])
def kernel(request):
    return request.param


BROKEN = [
    ("q", lambda x: x[0], r"q: expected shape \[any, any, any\], got \[6, 16\]"),
    ("q", lambda x: x[:, :, None, None], r"q: expected shape .* got \[2, 6, 1, 1, 16\]"),
    ("q", lambda x: x.double(), "q: expected dtype float32 or float16 or bfloat16, got float64"),
    ("q", lambda x: x.long(), "q: expected dtype .* got int64"),
    ("q", lambda x: x[:, :5], "q: expected .* divisible by the 2 KV heads of k, got 5"),
    ("q", lambda x: x[:, :1], "q: expected .* divisible by the 2 KV heads of k, got 1"),
    ("k", lambda x: x[0], "k: expected shape "),
    ("k", lambda x: x[..., :8], r"k: expected shape .*, 16\], got .*, 8\]"),
    ("k", lambda x: x.half(), "k: expected dtype float32, got float16"),
    ("k", lambda x: x.to("meta"), "k: expected device cpu .*, got meta"),
    ("v", lambda x: x[0], "v: expected shape "),
    ("v", lambda x: x[:, :1], "v: expected shape "),
    ("v", lambda x: x[..., :8], "v: expected shape "),
    ("v", lambda x: x.bfloat16(), "v: expected dtype float32, got bfloat16"),
    ("v", lambda x: x.to("meta"), "v: expected device cpu .*, got meta"),
]
STRIDED_ONLY = [
    ("q", lambda x: x[:1], r"k: expected shape \[1, any, any, 16\], got \[2, 2, 8, 16\]"),
    ("k", lambda x: x[:, :0], "v: expected shape "),
    ("v", lambda x: x[:, :, :7], r"v: expected shape \[2, 2, 8, 16\], got \[2, 2, 7, 16\]"),
]
PAGED_ONLY = [
    ("q", lambda x: x[:1], r"block_table: expected shape \[1, any\], got \[2, 2\]"),
    ("block_table", lambda x: x[0], r"block_table: expected shape \[2, any\], got \[2\]"),
    ("block_table", lambda x: x.long(), "block_table: expected dtype int32, got int64"),
    ("block_table", lambda x: x.to("meta"), "block_table: expected device cpu .*, got meta"),
    ("v", lambda x: x[:, :3], "v: expected shape "),
]


@pytest.mark.parametrize("build", [arguments, paged_arguments])
def test_what_keeps_the_contract_is_accepted(kernel, build):
    out, lse, *_ = kernel(**build())
    assert out.shape == (BATCH, QUERY_HEADS, HEAD_DIM) and lse.shape == (BATCH, QUERY_HEADS)


@pytest.mark.parametrize("name, spoil, message", [*BROKEN, *STRIDED_ONLY])
def test_a_broken_strided_call_is_refused_by_name(kernel, name, spoil, message):
    call = arguments()
    call[name] = spoil(call[name])
    with pytest.raises(TidalError, match=f"^{message}"):
        kernel(**call)


@pytest.mark.parametrize("name, spoil, message", [*BROKEN, *PAGED_ONLY])
def test_a_broken_paged_call_is_refused_by_name(kernel, name, spoil, message):
    call = paged_arguments()
    call[name] = spoil(call[name])
    with pytest.raises(TidalError, match=f"^{message}"):
        kernel(**call)


def test_a_cache_without_heads_is_refused(kernel):
    call = arguments()
    call["k"] = call["v"] = call["k"][:, :0]
    with pytest.raises(TidalError, match=r"^q: expected .* divisible by the 0 KV heads"):
        kernel(**call)


@pytest.mark.parametrize("build", [arguments, paged_arguments])
@pytest.mark.parametrize(
    "ranges, message",
    [
        (
            {"seq_lens": torch.tensor([8], dtype=INT32)},
            r"seq_lens: expected shape \[2\], got \[1\]",
        ),
        ({"seq_lens": torch.tensor([8, 5])}, "seq_lens: expected dtype int32, got int64"),
        (
            {"seq_lens": torch.tensor([8, 9], dtype=INT32)},
            r"seq_lens: expected .* <= 8 \(what the cache or the .*, got starts=0 and seq_lens=9",
        ),
        ({"seq_lens": torch.tensor([-1, 8], dtype=INT32)}, "seq_lens: .* seq_lens=-1 in row 0"),
        ({"starts": torch.zeros(3, dtype=INT32)}, r"starts: expected shape \[2\], got \[3\]"),
        ({"starts": torch.zeros(2)}, "starts: expected dtype int32, got float32"),
        ({"starts": torch.zeros(2, dtype=INT32, device="meta")}, "starts: expected device cpu"),
        (
            {"starts": torch.tensor([0, 6], dtype=INT32)},
            "seq_lens: expected 0 <= starts <= seq_lens .* got starts=6 and seq_lens=5 in row 1",
        ),
        ({"starts": torch.tensor([-1, 0], dtype=INT32)}, "seq_lens: .* got starts=-1 .* in row 0"),
    ],
)
def test_a_row_range_that_the_cache_cannot_hold_is_refused(build, ranges, message):
    with pytest.raises(TidalError, match=f"^{message}"):
        dense(**build(), **ranges)


def test_seq_lens_on_another_device_are_refused():
    with pytest.raises(TidalError, match=r"^seq_lens: expected device cpu"):
        dense(**arguments(), seq_lens=torch.tensor([8, 5], dtype=INT32, device="meta"))


@pytest.mark.parametrize("scores", ["head", "", True, "Shared"])
def test_an_unknown_score_kind_is_refused(scores):
    with pytest.raises(TidalError, match=r"^scores: expected one of shared, kv_head, "):
        dense(**arguments(), scores=scores)


def select(backend: str = "auto", **_):
    lengths = torch.tensor([3], dtype=INT32)
    return select_tokens(torch.zeros(1, 1, 3), lengths, budget=2, backend=backend)


@pytest.fixture(params=[dense, sparse, select])
def any_kernel(request):
    return request.param


@pytest.mark.parametrize("backend", ["cuda", "", "Torch"])
def test_an_unknown_backend_is_refused_wherever_it_is_asked_for(any_kernel, backend, monkeypatch):
    expected = f"expected one of auto, torch, numba, triton, got '{backend}'"
    with pytest.raises(TidalError, match=f"^backend: {expected}"):
        any_kernel(**arguments(), backend=backend)
    monkeypatch.setenv("TIDALDECODE_BACKEND", backend)
    with pytest.raises(TidalError, match=f"^TIDALDECODE_BACKEND: {expected}"):
        any_kernel(**arguments())


def test_the_triton_backend_is_refused_and_never_replaced_in_silence(any_kernel, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    expected = "the Triton kernels expect tensors on a GPU, got cpu"
    with pytest.raises(TidalError, match=f"^backend: {expected}"):
        any_kernel(**arguments(), backend="triton")
    monkeypatch.setenv("TIDALDECODE_BACKEND", "triton")
    with pytest.raises(TidalError, match=f"^TIDALDECODE_BACKEND: {expected}"):
        any_kernel(**arguments(), backend="auto")


@pytest.mark.parametrize(
    "device, options, expected",
    [
        ("cuda", {"head_dim": 320}, "a head dimension up to 256, got 320"),
        ("cuda", {"group": 71}, "up to 64 query heads per KV head, got 71"),
        ("cuda", {"twin": False}, "no twin"),
        ("cpu", {"dtype": torch.bfloat16}, "cannot multiply bfloat16"),
    ],
)
def test_what_triton_cannot_run_is_refused_if_asked_for_and_left_to_torch_if_not(
    device, options, expected, monkeypatch
):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(TidalError, match=f"^backend: .*{expected}"):
        resolve_backend("triton", torch.device(device), **options)
    assert resolve_backend("auto", torch.device(device), **options) == "torch"


def test_a_missing_triton_package_is_refused_by_name(monkeypatch):
    monkeypatch.setattr(dispatch, "_has_triton", lambda: False)
    with pytest.raises(TidalError, match=r"^backend: .* triton package, which is not installed"):
        resolve_backend("triton", torch.device("cuda"))
    assert resolve_backend("auto", torch.device("cuda")) == "torch"


def test_a_gpu_gets_triton_and_a_cpu_torch_unless_told_otherwise(monkeypatch):
    monkeypatch.setattr(dispatch, "_has_triton", lambda: True)
    assert resolve_backend("auto", torch.device("cuda")) == "triton"
    assert resolve_backend("auto", torch.device("cpu")) == "torch"
    assert resolve_backend("torch", torch.device("cuda")) == "torch"


def test_the_backend_argument_overrides_the_environment(any_kernel, monkeypatch):
    monkeypatch.setenv("TIDALDECODE_BACKEND", "triton")
    any_kernel(**arguments(), backend="torch")


@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_known_backends_run_wherever_they_are_asked_for(any_kernel, backend, monkeypatch):
    any_kernel(**arguments(), backend=backend)
    monkeypatch.setenv("TIDALDECODE_BACKEND", backend)
    any_kernel(**arguments())


def test_an_empty_batch_gives_an_empty_answer(kernel):
    empty = {name: x[:0] if name in "qkv" else x for name, x in arguments().items()}
    if kernel is dense:
        out, lse, _ = dense(**empty, seq_lens=torch.zeros(0, dtype=INT32))
    else:
        nothing = Selection(torch.zeros(0, 1, 2, dtype=INT32), torch.zeros(0, 1, dtype=INT32))
        out, lse = sparse_decode(**empty, selection=nothing)
    assert out.shape == (0, QUERY_HEADS, HEAD_DIM) and lse.shape == (0, QUERY_HEADS)


def test_scores_narrower_than_a_row_are_refused():
    with pytest.raises(TidalError, match=r"^seq_lens: expected 0 <= starts <= seq_lens <= 3"):
        select_tokens(torch.zeros(1, 1, 3), torch.tensor([5], dtype=INT32), budget=2)


@pytest.mark.parametrize(
    ("positions", "counts"), [([[[6], [1]]], [[1, 1]]), ([[[1, 2], [1, 2]]], [[3, 3]])]
)
def test_a_selection_beyond_the_cache_is_refused(positions, counts):
    selection = Selection(torch.tensor(positions, dtype=INT32), torch.tensor(counts, dtype=INT32))
    k = torch.randn(1, 2, 5, 4)
    with pytest.raises(TidalError, match=r"^selection: expected at most"):
        sparse_decode(torch.randn(1, 2, 4), k, k, selection, scale=1.0)


def test_a_hole_inside_a_set_is_skipped():
    q, k, v = torch.randn(1, 2, 4), torch.randn(1, 2, 5, 4), torch.randn(1, 2, 5, 4)
    holes = Selection(
        torch.tensor([[[1, 3], [-1, 2]]], dtype=INT32), torch.tensor([[2, 2]], dtype=INT32)
    )
    clean = Selection(
        torch.tensor([[[1, 3], [2, -1]]], dtype=INT32), torch.tensor([[2, 1]], dtype=INT32)
    )
    for left, right in zip(
        sparse_decode(q, k, v, holes, scale=1.0),
        sparse_decode(q, k, v, clean, scale=1.0),
        strict=True,
    ):
        torch.testing.assert_close(left, right)


def test_something_that_is_no_tensor_is_refused():
    with pytest.raises(TidalError, match=r"^seq_lens: expected a tensor, got list"):
        dense(**arguments(), seq_lens=[8, 5])
