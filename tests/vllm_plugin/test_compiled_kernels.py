"""A kernel that is compiled while requests wait, or within a capture, was forgotten by the warm-up."""

import importlib
import inspect

import pytest
import torch

from tidaldecode import TidalConfig
from tidaldecode.algorithm import LayerPlan
from tidaldecode.integrations.vllm.step import StepMaker

pytest.importorskip("triton")
if torch.cuda.is_available():
    pytest.skip("records launches instead of running them", allow_module_level=True)

from triton.runtime.interpreter import InterpretedFunction

H200_PROCESSORS, MAX_ROWS = 132, 80
PLAN = LayerPlan.build(4, dense_layers=1, select_layers=(1,))
SELECT, *OTHERS = (
    importlib.import_module(f"tidaldecode.kernels.triton.{name}")
    for name in ("select_tokens", "sparse_decode", "_cuts", "_device")
)


def variant(kernel, arguments: dict) -> tuple:
    """What Triton compiles one version of a kernel for: constants, and what it sees in arguments."""
    unseen = kernel.kwargs.get("do_not_specialize") or ()
    at_any_address = kernel.kwargs.get("do_not_specialize_on_alignment") or ()
    seen = []
    for name, parameter in inspect.signature(kernel.fn).parameters.items():
        value = arguments.get(name)
        if "constexpr" in str(parameter.annotation) or value is None:
            seen.append((name, value))
        elif torch.is_tensor(value):
            offset = value.storage_offset() * value.element_size()
            seen.append((name, value.dtype, name in at_any_address or offset % 16 == 0))
        elif isinstance(value, int) and name not in unseen:
            seen.append((name, value == 1, value % 16 == 0))
    return kernel.fn.__name__, arguments.get("num_warps"), arguments.get("num_stages"), *seen


@pytest.fixture
def launched(monkeypatch):
    """The kernels that would have been launched on an H200."""
    found = set()

    def record(kernel, *args, grid, warmup, **kwargs):
        found.add(variant(kernel, {**dict(zip(kernel.arg_names, args, strict=False)), **kwargs}))

    monkeypatch.setattr(InterpretedFunction, "run", record)
    for module in (SELECT, *OTHERS):
        monkeypatch.setattr(module, "processors", lambda _: H200_PROCESSORS)
    launches = SELECT._launches
    monkeypatch.setattr(
        SELECT,
        "_launches",
        lambda width, sets, _, mergers: launches(width, sets, torch.device("cuda"), mergers),
    )
    return found


@pytest.mark.parametrize("kv_heads", [1, 8])
@pytest.mark.parametrize("rows_at_once", [3, 22, MAX_ROWS])
@pytest.mark.parametrize("granularity", ["shared", "kv_head"])
def test_no_batch_needs_a_kernel_that_was_not_compiled(
    launched, kv_heads, rows_at_once, granularity
):
    config = TidalConfig(
        budget=256, dense_layers=1, select_layers=(1,), granularity=granularity, backend="triton"
    )
    made = StepMaker(
        config,
        PLAN,
        sets=1 if granularity == "shared" else kv_heads,
        min_context=0,
        max_rows=MAX_ROWS,
        rows_at_once=rows_at_once,
        device=torch.device("cpu"),
    )
    k, v = torch.zeros(4, 16, kv_heads, 64, dtype=torch.float16).chunk(2, dim=-1)
    q = torch.zeros(MAX_ROWS, 2 * kv_heads, 32, dtype=torch.float16)
    # One row of the table more, and an odd number of blocks: rows lie at all kinds of addresses.
    lens = torch.full([MAX_ROWS + 1], 50, dtype=torch.int32)[1:]
    table = torch.zeros(MAX_ROWS + 1, 7, dtype=torch.int32)[1:]
    made.is_warm = False
    made.warm_up(q[:1], k, v, made.make(1, lens, table, None), 0.5)
    compiled = set(launched)
    assert {name for name, *_ in compiled} == {
        "_dense_kernel",
        "_merge_kernel",
        "_sparse_kernel",
        "select_kernel",
    }
    for rows in range(1, MAX_ROWS + 1):
        step = made.make(rows, lens, table, None)
        for layer in (1, 2):
            step.attend(q[:rows], k, v, layer, scale=0.5, out=torch.empty_like(q[:rows]))
        assert launched == compiled, f"{rows} rows"
