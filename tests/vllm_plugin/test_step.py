"""Which rows decode, and which of them densely; needs no vLLM."""

import pytest
import torch

from tidaldecode import TidalConfig
from tidaldecode.algorithm import LayerPlan, Role
from tidaldecode.integrations.vllm.step import DecodeStep, StepMaker, count_decode_rows
from tidaldecode.kernels import dense_decode
from tidaldecode.kernels.scratch import histogram_elements

BLOCK, HEADS, KV_HEADS, DIM, MAX_ROWS = 4, 4, 2, 8, 6
PLAN = LayerPlan.build(4, dense_layers=1, select_layers=(1,))
CONFIG = TidalConfig(budget=6, dense_layers=1, select_layers=(1,), sink_tokens=1, recent_tokens=1)


def starts(*query_lens: int) -> torch.Tensor:
    return torch.tensor([0, *query_lens], dtype=torch.int32).cumsum(0, dtype=torch.int32)


@pytest.mark.parametrize(
    ("query_lens", "rows"),
    [
        ((1, 1, 1), 3),
        ((1, 1, 5), 2),
        ((1, 7, 1), 1),
        ((7, 9), 0),
        ((1, 1, 0, 0), 4),
        ((4, 4), 0),
        ((1,), 1),
    ],
)
def test_leading_rows_of_one_token_decode(query_lens, rows):
    assert count_decode_rows(starts(*query_lens), max(query_lens)) == rows


def test_rows_that_pad_a_mixed_batch_are_not_counted():
    assert count_decode_rows(starts(1, 3, 0), 3) == 1


class Batch:
    """A paged cache with rows of these lengths, blocks in random order."""

    def __init__(self, *lengths: int) -> None:
        generator = torch.Generator().manual_seed(0)
        width = -(-max(lengths) // BLOCK)
        blocks = len(lengths) * width
        packed = torch.randn(blocks, KV_HEADS, BLOCK, 2 * DIM, generator=generator)
        self.k, self.v = packed.transpose(1, 2).chunk(2, dim=-1)
        self.q = torch.randn(len(lengths), HEADS, DIM, generator=generator)
        order = torch.randperm(blocks, generator=generator).int()
        self.block_table = order.view(len(lengths), width)
        self.seq_lens = torch.tensor(lengths, dtype=torch.int32)

    def dense(self) -> torch.Tensor:
        out, _, _ = dense_decode(
            self.q, self.k, self.v, self.seq_lens, scale=0.5, block_table=self.block_table
        )
        return out

    def run(self, maker: StepMaker, layer: int, prefilling=None) -> torch.Tensor:
        step = maker.make(len(self.seq_lens), self.seq_lens, self.block_table, prefilling)
        return self.walk(step, layer)

    def walk(self, step: DecodeStep, layer: int) -> torch.Tensor:
        """The output of a layer, the selection layer having run before it."""
        outs = torch.full((2, *self.q.shape), torch.nan)
        for out, index in zip(outs, (1, layer), strict=True):
            step.attend(self.q, self.k, self.v, index, scale=0.5, out=out)
        return outs[1]


def maker(min_context: int = 0, rows_at_once: int = MAX_ROWS) -> StepMaker:
    return StepMaker(
        CONFIG,
        PLAN,
        sets=1,
        min_context=min_context,
        max_rows=MAX_ROWS,
        rows_at_once=rows_at_once,
        device=torch.device("cpu"),
    )


def differs(out: torch.Tensor, expected: torch.Tensor) -> list[bool]:
    return [not torch.allclose(a, b, atol=1e-5) for a, b in zip(out, expected, strict=True)]


def test_long_rows_are_sparse_and_rows_within_the_budget_dense():
    batch = Batch(20, 6, 13, 1)
    assert differs(batch.run(maker(), 2), batch.dense()) == [True, False, True, False]


def test_a_selection_layer_is_dense_for_every_row():
    batch = Batch(20, 6, 13)
    assert not any(differs(batch.run(maker(), 1), batch.dense()))


def test_a_row_in_prefill_is_dense_at_any_length():
    batch = Batch(20, 19, 18)
    prefilling = torch.tensor([False, True, False])
    assert differs(batch.run(maker(), 2, prefilling), batch.dense()) == [True, False, True]


def test_flags_of_one_batch_do_not_reach_the_next():
    batch, ours = Batch(20, 19, 18), maker()
    batch.run(ours, 2, torch.tensor([True, True, True]))
    assert all(differs(batch.run(ours, 2), batch.dense()))


def test_a_captured_step_serves_the_batch_that_was_made_last():
    """A graph replays with the memory of its own step, whatever the step of this batch is used for."""
    ours, first = maker(), Batch(20, 19, 18)
    captured = ours.make(3, first.seq_lens, first.block_table, torch.tensor([True, True, True]))
    later = Batch(20, 19, 18)
    ours.make(3, later.seq_lens, later.block_table, torch.tensor([False, True, False]))
    assert differs(first.walk(captured, 2), first.dense()) == [True, False, True]


def test_fewer_flags_than_rows_leave_the_rest_alone():
    batch = Batch(20, 19, 18)
    out = batch.run(maker(), 2, torch.tensor([True, False]))
    assert differs(out, batch.dense()) == [False, True, True]


def test_rows_below_min_context_are_dense():
    batch = Batch(20, 14, 15)
    assert differs(batch.run(maker(15), 2), batch.dense()) == [True, False, True]


@pytest.mark.parametrize("rows_at_once", [1, 2, 3, 4])
def test_rows_that_select_in_parts_select_the_same(rows_at_once):
    batch = Batch(20, 6, 13, 17, 9)
    parts = maker(rows_at_once=rows_at_once)
    for layer in (1, 2):
        assert torch.equal(batch.run(parts, layer), batch.run(maker(), layer))


def test_rows_of_length_zero_pad_a_batch():
    batch = Batch(20, 9)
    batch.seq_lens[1] = 0
    out = batch.run(maker(), 2)
    assert out[1].abs().max() == 0
    assert out.isfinite().all()


def test_steps_reuse_the_memory_that_a_graph_keeps():
    ours, batch = maker(), Batch(20, 9)
    steps = [ours.make(2, batch.seq_lens, batch.block_table, None) for _ in range(2)]
    assert steps[0].state.whole_lens.data_ptr() == steps[1].state.whole_lens.data_ptr()
    memory = steps[0].state.scratch.zeros(1, torch.device("cpu"))
    largest = steps[0].state.scratch.zeros(histogram_elements(MAX_ROWS), torch.device("cpu"))
    assert memory.data_ptr() == largest.data_ptr()
    assert steps[0].state.selection is None


def test_compiling_for_every_number_of_rows_leaves_the_step_as_it_was(monkeypatch):
    batch, cold, seen = Batch(20, 19, 9), maker(), []
    step = cold.make(3, batch.seq_lens, batch.block_table, torch.tensor([False, True, False]))
    cold.is_warm = False
    begin = cold.begin
    monkeypatch.setattr(
        cold, "begin", lambda lens, table: seen.append(len(lens)) or begin(lens, table)
    )
    cold.warm_up(batch.q, batch.k, batch.v, step, 0.5)
    assert differs(batch.walk(step, 2), batch.dense()) == [True, False, True]
    assert seen == list(range(1, MAX_ROWS + 1)) and cold.is_warm


def test_short_batches_are_dense_altogether():
    assert maker().is_dense(6)
    assert not maker().is_dense(7)
    assert maker(15).is_dense(14)
    assert not maker(15).is_dense(15)


@pytest.mark.parametrize(
    ("stage", "printed"),
    [
        (range(0, 8), "DDS.S..."),
        (range(0, 3), "DDS.S..."),
        (range(3, 8), "DDSSS..."),
        (range(4, 8), "DDS.S..."),
        (range(5, 8), "DDS.SS.."),
        (range(1, 2), "DDS.S..."),
    ],
)
def test_the_first_sparse_layer_of_a_stage_selects(stage, printed):
    plan = LayerPlan.build(8, dense_layers=2, select_layers=(2, 4))
    assert str(plan.for_stage(stage)) == printed


def test_layers_of_the_host_do_not_select():
    full = (True, True, True, False, True, True, False, True)
    plan = LayerPlan.build(8, dense_layers=1, select_layers=(1,), full_attention=full)
    assert plan.for_stage(range(3, 8)).layers(Role.SELECT) == (1, 4)
