"""Held selections: what the steps of a draft after its first attend to."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tidaldecode import LayerPlan, TidalConfig
from tidaldecode.algorithm import DecodeState, HeldSelections, decode_attention
from tidaldecode.kernels import Selection, dense_decode, sparse_decode

PLAN = LayerPlan.build(8, dense_layers=2, select_layers=(2, 5))
ROOM = 6


def chosen(lens: list[int], sets: int, budget: int, seed: int) -> Selection:
    """Ascending positions below every row's length, its newest among them, padded with -1."""
    generator = torch.Generator().manual_seed(seed)
    positions = torch.full((len(lens), sets, budget), -1, dtype=torch.int32)
    counts = torch.zeros(len(lens), sets, dtype=torch.int32)
    for row, length in enumerate(lens):
        count = min(length, budget)
        counts[row] = count
        for one in range(sets):
            others = torch.randperm(length - 1, generator=generator)[: count - 1]
            found = torch.cat([others, torch.tensor([length - 1])]).sort().values
            positions[row, one, :count] = found.int()
    return Selection(positions, counts)


def listed(selection: Selection) -> list[list[list[int]]]:
    return [
        [one[: int(count)].tolist() for one, count in zip(row, counts, strict=True)]
        for row, counts in zip(selection.positions, selection.counts, strict=True)
    ]


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    st.lists(st.integers(1, 40), min_size=1, max_size=4),
    st.integers(1, 3),
    st.integers(1, 12),
    st.integers(0, ROOM),
    st.data(),
)
def test_a_selection_grows_by_the_tokens_that_came_since(lens, sets, budget, most, data):
    held = HeldSelections(PLAN, ROOM)
    come = data.draw(st.lists(st.integers(0, most), min_size=len(lens), max_size=len(lens)))
    start = torch.tensor(lens, dtype=torch.int32)
    for seed in (0, 9):  # memory is used again by the next draft
        first, second = (chosen(lens, sets, budget, seed + n) for n in range(2))
        held.hold(2, first, start)
        held.hold(5, second, start)
        held.grow(start + torch.tensor(come, dtype=torch.int32))
        for layer, source in {0: first, 2: first, 4: first, 5: second, 7: second}.items():
            wanted = [
                [[*one, *range(length, length + more)] for one in row]
                for row, length, more in zip(listed(source), lens, come, strict=True)
            ]
            assert listed(held.at(layer)) == wanted


def test_only_plans_that_select_can_be_held():
    once = TidalConfig(mode="lossless")
    assert HeldSelections.wanted(once, PLAN)
    assert not HeldSelections.wanted(once.replace(draft_selection="token"), PLAN)
    fixed = LayerPlan.build(4, dense_layers=0, select_layers=())
    assert not HeldSelections.wanted(once, fixed)


@pytest.mark.parametrize("granularity", ["shared", "kv_head", "query_head"])
def test_a_step_that_follows_attends_to_the_held_tokens_in_every_layer(granularity):
    config = TidalConfig(budget=8, sink_tokens=1, recent_tokens=2, granularity=granularity)
    generator = torch.Generator().manual_seed(0)
    k, v = (torch.randn(2, 2, 32, 8, generator=generator) for _ in range(2))
    q = torch.randn(2, 4, 8, generator=generator)
    lens = torch.tensor([20, 5], dtype=torch.int32)
    held = HeldSelections(PLAN, ROOM)
    state = DecodeState.begin(config, PLAN, lens)
    state.holds = held
    made = {}
    for layer in range(8):
        decode_attention(q * (layer + 1), k, v, layer, PLAN, state, scale=0.3)
        made[layer] = state.selection
    later = DecodeState.begin(config, PLAN, lens + 2)
    later.follows = held
    held.grow(later.seq_lens)
    for layer in range(8):
        source = made[2] if layer < 5 else made[5]
        grown = [
            [sorted([*one, *range(length, length + 2)]) for one in row]
            for row, length in zip(listed(source), lens.tolist(), strict=True)
        ]
        assert listed(held.at(layer)) == grown
        out = decode_attention(q, k, v, layer, PLAN, later, scale=0.3)
        wanted, _ = sparse_decode(q, k, v, held.at(layer), scale=0.3)
        assert torch.equal(out, wanted)
        # Five tokens and two more are all that the second row has.
        full, _, _ = dense_decode(q, k, v, lens + 2, scale=0.3)
        torch.testing.assert_close(out[1], full[1])
        assert not torch.allclose(out[0], full[0])
