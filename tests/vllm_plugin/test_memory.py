"""How much memory selection layers take, and that vLLM is told; needs no vLLM."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tidaldecode import TidalError
from tidaldecode.integrations.vllm import memory
from tidaldecode.integrations.vllm.memory import MIB, WorkMemory
from tidaldecode.kernels import dense_select
from tidaldecode.kernels.scratch import Scratch, histogram_elements, select_bytes

LLAMA = {
    "query_heads": 32,
    "sets": 1,
    "width": 131072,
    "budget": 1024,
    "dtype": torch.bfloat16,
}


def plan(**changes) -> WorkMemory:
    rest = {"max_rows": 256, "limit_mib": 512, "graphs": False}
    return WorkMemory.plan(**{**LLAMA, **rest, **changes})


def test_rows_are_as_many_as_fit():
    work = plan()
    assert work.rows_at_once * select_bytes(**LLAMA) <= 512 * MIB
    assert (work.rows_at_once + 1) * select_bytes(**LLAMA) > 512 * MIB
    assert 512 * MIB * 0.9 < work.claimed < 512 * MIB * 1.1
    assert 1.9 < plan(graphs=True).claimed / work.claimed <= 2.0


def test_a_small_engine_claims_only_what_its_rows_need():
    work = plan(max_rows=3, width=1024)
    assert work.rows_at_once == 3
    assert work.claimed < 2 * MIB


def test_a_row_that_does_not_fit_is_refused_with_the_number_that_does():
    with pytest.raises(
        TidalError, match=r"scratch_mib: expected at least (\d+) for one row"
    ) as error:
        plan(limit_mib=8)
    enough = int(str(error.value).split("at least ")[1].split()[0])
    assert plan(limit_mib=enough).rows_at_once == 1


def test_memory_is_claimed_once_and_given_back():
    place = torch.device("cpu")
    memory.release()
    memory.claim(place, 100)
    memory.claim(place, 100)
    assert [len(held) for held in memory._claims] == [100]
    memory.release()
    assert not memory._claims


class Allocations(TorchDispatchMode):
    """Counts the bytes of new memory."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if function._schema.name.removeprefix("aten::").startswith(("empty", "zeros", "full")):
            self.count += result.numel() * result.element_size()
        return result


@pytest.mark.parametrize("kind", ["shared", "kv_head", "query_head"])
@pytest.mark.parametrize(
    "rows, dtype", [(1, torch.float32), (5, torch.float32), (5, torch.float16)]
)
def test_the_kernels_allocate_no_more_than_is_planned(kind, rows, dtype):
    pytest.importorskip("triton")
    heads, kv_heads, head_dim, block, width, budget = 4, 2, 16, 16, 2048, 24
    sets = {"shared": 1, "kv_head": kv_heads, "query_head": heads}[kind]
    cache = torch.randn(2, rows * width // block, block, kv_heads, head_dim, dtype=dtype)
    table = torch.arange(rows * width // block, dtype=torch.int32).view(rows, -1)
    scratch = Scratch(histogram_elements(rows * sets))
    kept = scratch.zeros(1, torch.device("cpu"))
    with Allocations() as allocated:
        dense_select(
            torch.randn(rows, heads, head_dim, dtype=dtype),
            *cache,
            torch.full((rows,), 300, dtype=torch.int32),
            scale=0.3,
            scores=kind,
            budget=budget,
            block_table=table,
            backend="triton",
            scratch=scratch,
        )
    assert scratch.zeros(1, torch.device("cpu")) is kept
    planned = rows * select_bytes(heads, sets, width, budget, dtype)
    split = 2 * 64 * heads * (head_dim + 1) * 4
    assert 0.9 * planned <= allocated.count <= planned + split
