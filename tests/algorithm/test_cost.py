"""The bytes model: what a step reads, counted by hand."""

import pytest

from tidaldecode import LayerPlan, TidalConfig
from tidaldecode.algorithm.cost import KVReads, full_kv_bytes_per_step, kv_bytes_per_step

PLAN = LayerPlan.build(
    6, dense_layers=1, select_layers=(1,), full_attention=[True, True, True, False, True, True]
)
SIZES = {"context": 1000, "kv_heads": 2, "head_dim": 8, "element_bytes": 2}
ROW = 2 * 8 * 2  # K and V of one token and head


def read(granularity: str, budget: int) -> int:
    config = TidalConfig(budget=budget, select_layers=(1,), granularity=granularity)
    return kv_bytes_per_step(PLAN, config, query_heads=6, **SIZES)


@pytest.mark.parametrize(
    ("granularity", "sets"), [("shared", 2), ("kv_head", 2), ("query_head", 6)]
)
def test_sparse_layers_read_their_budget_once_for_each_set(granularity, sets):
    assert read(granularity, 100) == (2 * 1000 * 2 + 3 * 100 * sets) * ROW


def test_a_budget_beyond_the_context_reads_the_context():
    assert read("shared", 5000) == 5 * 1000 * 2 * ROW


def draft_reads(selection: str, index: int, **options) -> int:
    config = TidalConfig(
        budget=100, select_layers=(1,), mode="lossless", draft_selection=selection, **options
    )
    return KVReads(PLAN, config, 6, 2, 8, 2).draft(1000, index)


def test_a_draft_that_selects_once_reads_little_after_its_first_token():
    step = (2 * 1000 + 3 * 100) * 2 * ROW
    assert [draft_reads("token", index) for index in (0, 1, 7)] == [step] * 3
    later = [5 * (100 + index) * 2 * ROW for index in (1, 7)]
    assert [draft_reads("round", index) for index in (0, 1, 7)] == [step, *later]


def test_full_attention_reads_everything_in_every_planned_layer():
    assert full_kv_bytes_per_step(PLAN, **SIZES) == 5 * 1000 * 2 * ROW


@pytest.mark.parametrize(("context", "pages"), [(1000, 63), (1008, 63), (1009, 64), (1, 1)])
def test_a_layer_that_estimates_reads_two_bounds_of_every_page_and_its_tokens(context, pages):
    plan = LayerPlan.build(4, dense_layers=1, select_layers=(), estimate=True)
    config = TidalConfig.preset("quest", budget=100)
    sizes = {**SIZES, "context": context}
    tokens = min(100, context) * 6
    assert kv_bytes_per_step(plan, config, query_heads=6, **sizes) == (
        (context * 2 + 3 * (tokens + pages * 2)) * ROW
    )
