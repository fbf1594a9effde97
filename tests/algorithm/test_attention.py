"""decode_attention over a stack of random layers: every layer does what the plan says, no more."""

import pytest
import torch
from kernel_cases import LAYOUTS, Case, make_case
from reference_attention import assert_attends_exactly, attention

from tidaldecode.algorithm import DecodeState, LayerPlan, decode_attention
from tidaldecode.config import TidalConfig
from tidaldecode.errors import TidalError
from tidaldecode.kernels import (
    dense_decode,
    dense_output,
    page_bound_scores,
    select_tokens,
    sparse_decode,
)

LAYERS, TOKENS, KV_HEADS, GROUP = 7, 60, 2, 3
ENDS, STARTS = [60, 41, 9, 30], [0, 13, 0, 29]
PLAN = LayerPlan.build(LAYERS, dense_layers=1, select_layers=(1, 4))
SMALL = TidalConfig(budget=16, dense_layers=1, select_layers=(1, 4), sink_tokens=2, recent_tokens=3)
CONFIGS = {
    "shared": SMALL,
    "kv_head": SMALL.replace(granularity="kv_head"),
    "query_head": SMALL.replace(granularity="query_head"),
    "query_head logits": SMALL.replace(granularity="query_head", score="logits"),
    "paper": TidalConfig.preset("paper", budget=16, dense_layers=1, select_layers=(1, 4)),
    "lessismore": TidalConfig.preset("lessismore", budget=16, dense_layers=1, select_layers=(1, 4)),
}
SETS = {"shared": 1, "kv_head": KV_HEADS, "query_head": KV_HEADS * GROUP}


@pytest.fixture(params=CONFIGS)
def config(request) -> TidalConfig:
    return CONFIGS[request.param]


def make_stack(layout: str = "contiguous", **options) -> list[Case]:
    """One case per layer: the same rows, other tensors."""
    options = {"ends": ENDS, "starts": STARTS, "sharpness": 3.0, "layout": layout, **options}
    return [make_case(len(ENDS), KV_HEADS, GROUP, 16, TOKENS, **options) for _ in range(LAYERS)]


def make_caches(stack: list[Case]) -> list[dict]:
    """The layers' caches; paged ones share one block table, as in a model."""
    caches = []
    for case in stack:
        torch.manual_seed(7)
        caches.append(case.cache())
    return caches


def begin(stack: list[Case], caches: list[dict], config: TidalConfig, plan=PLAN) -> DecodeState:
    case = stack[0]
    return DecodeState.begin(config, plan, case.seq_lens, case.starts, caches[0]["block_table"])


def attend(case: Case, cache: dict, layer: int, plan: LayerPlan, state: DecodeState):
    return decode_attention(case.q, cache["k"], cache["v"], layer, plan, state, scale=case.scale)


def mask_of(state: DecodeState, case: Case) -> torch.Tensor:
    """The selection as a mask ``[B, Hq, S]``."""
    positions = state.selection.positions.long()
    mask = torch.zeros(*positions.shape[:2], TOKENS + 1, dtype=torch.bool)
    mask.scatter_(-1, torch.where(positions < 0, TOKENS, positions), True)
    return mask[..., :TOKENS].repeat_interleave(case.q.shape[1] // mask.shape[1], 1)


def assert_selects_the_best(state: DecodeState, case: Case, config: TidalConfig) -> None:
    """The selection holds the budget, what is forced, and nothing worse than what it leaves out."""
    _, lse, logits = attention(case.q, case.k, case.v, case.keep, case.scale)
    scores = logits if config.score == "logits" else (logits - lse[..., None]).exp()
    sets = SETS[config.granularity]
    if config.score == "softmax":
        scores = scores.unflatten(1, (sets, -1)).sum(2)
    kept = mask_of(state, case)[:, :: case.q.shape[1] // sets]
    assert kept.shape == scores.shape
    positions, ends, starts = torch.arange(TOKENS), case.seq_lens[:, None], case.starts[:, None]
    valid = case.valid[:, None]
    forced = (positions < starts + config.sink_tokens) | (
        positions >= ends - 1 - config.recent_tokens
    )
    forced = forced[:, None] & valid
    budget = torch.minimum(case.valid.sum(-1), torch.tensor(config.budget))
    assert torch.equal(kept.sum(-1), budget[:, None].expand(-1, sets))
    assert torch.equal(state.selection.counts.long(), kept.sum(-1))
    assert not (kept & ~valid).any() and (kept | ~forced).all()
    worst_kept = scores.masked_fill(~kept | forced, torch.inf).amin(-1)
    best_dropped = scores.masked_fill(kept | ~valid, -torch.inf).amax(-1)
    largest = scores.masked_fill(~valid, 0).abs().amax()
    assert (worst_kept >= best_dropped - 1e-6 * (1 + largest)).all()


def assert_layer_attends_to(out, case: Case, keep: torch.Tensor) -> None:
    assert_attends_exactly(out, None, case.q, case.k, case.v, keep, case.scale)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layer_attends_to_what_its_role_says(config, layout):
    stack = make_stack(layout)
    caches = make_caches(stack)
    state = begin(stack, caches, config)
    for layer, (case, cache, role) in enumerate(zip(stack, caches, "DS..S..", strict=True)):
        selection = state.selection
        out = attend(case, cache, layer, PLAN, state)
        if role == ".":
            assert_layer_attends_to(out, case, mask_of(state, case))
        else:
            assert_layer_attends_to(out, case, case.keep)
        if role == "S":
            assert state.selection is not selection
            assert_selects_the_best(state, case, config)
        else:
            assert state.selection is selection


def test_every_layer_equals_the_kernels_called_by_hand(config):
    stack = make_stack()
    caches = make_caches(stack)
    state = begin(stack, caches, config)
    kind = "query_head_logits" if config.score == "logits" else config.granularity
    selection = None
    for layer, (case, cache, role) in enumerate(zip(stack, caches, "DS..S..", strict=True)):
        rows = {"seq_lens": case.seq_lens, "starts": case.starts}
        if role == ".":
            expected, _ = sparse_decode(case.q, selection=selection, scale=case.scale, **cache)
        elif role == "D":
            expected = dense_output(case.q, scale=case.scale, **rows, **cache)
        else:
            expected, _, scores = dense_decode(
                case.q, scale=case.scale, scores=kind, **rows, **cache
            )
            selection = select_tokens(
                scores,
                **rows,
                budget=config.budget,
                sink_tokens=config.sink_tokens,
                recent_tokens=config.recent_tokens,
            )
        assert torch.equal(attend(case, cache, layer, PLAN, state), expected)
        if selection is not None:
            assert torch.equal(state.selection.positions, selection.positions)
            assert torch.equal(state.selection.counts, selection.counts)


@pytest.mark.parametrize("granularity", SETS)
def test_a_budget_of_the_whole_context_gives_dense_attention(granularity):
    stack = make_stack()
    caches = make_caches(stack)
    config = SMALL.replace(budget=TOKENS, granularity=granularity)
    state = begin(stack, caches, config)
    for layer, (case, cache) in enumerate(zip(stack, caches, strict=True)):
        out = attend(case, cache, layer, PLAN, state)
        dense, _, _ = dense_decode(
            case.q, seq_lens=case.seq_lens, starts=case.starts, scale=case.scale, **cache
        )
        torch.testing.assert_close(out, dense)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_sparse_layer_reads_its_selected_rows_and_no_others(config, layout):
    stack = make_stack(layout)
    caches = make_caches(stack)
    state = begin(stack, caches, config)
    for layer in range(2):
        attend(stack[layer], caches[layer], layer, PLAN, state)
    case = stack[2]
    clean = attend(case, caches[2], 2, PLAN, state)
    torch.manual_seed(7)
    read = mask_of(state, case).unflatten(1, (KV_HEADS, GROUP)).any(2)
    assert not torch.equal(read, case.valid[:, None].expand_as(read))
    poisoned = attend(case, case.cache(read), 2, PLAN, state)
    assert torch.isfinite(poisoned).all() and torch.equal(poisoned, clean)


def test_raw_logits_rank_tokens_whose_probability_is_nothing():
    config = CONFIGS["paper"]
    stack = make_stack(sharpness=300.0)
    caches = make_caches(stack)
    state = begin(stack, caches, config)
    attend(stack[1], caches[1], 1, PLAN, state)
    assert_selects_the_best(state, stack[1], config)


def test_each_step_selects_afresh():
    stack = make_stack()
    caches = make_caches(stack)
    first, second = (begin(stack, caches, SMALL) for _ in range(2))
    attend(stack[1], caches[1], 1, PLAN, first)
    assert first.selection is not None and second.selection is None


def test_the_streaming_preset_reads_sinks_and_recents_in_every_layer():
    config = TidalConfig.preset("streaming", budget=12)
    plan = LayerPlan.build(
        LAYERS, dense_layers=config.dense_layers, select_layers=config.select_layers
    )
    assert str(plan) == "......." and plan.preselected
    stack = make_stack()
    caches = make_caches(stack)
    state = begin(stack, caches, config, plan)
    keep = torch.zeros(len(ENDS), TOKENS, dtype=torch.bool)
    for row, (start, end) in enumerate(zip(STARTS, ENDS, strict=True)):
        keep[row, start : start + 4] = True
        keep[row, max(end - 8, start) : end] = True
    for layer, (case, cache) in enumerate(zip(stack, caches, strict=True)):
        out = attend(case, cache, layer, plan, state)
        read = (keep & case.valid)[:, None].expand_as(case.keep)
        assert_layer_attends_to(out, case, read)


def test_a_plan_with_selection_layers_starts_without_a_selection():
    stack = make_stack()
    assert begin(stack, make_caches(stack), SMALL).selection is None


def test_a_sparse_layer_without_a_selection_is_refused():
    stack = make_stack()
    caches = make_caches(stack)
    state = begin(stack, caches, SMALL)
    attend(stack[0], caches[0], 0, PLAN, state)
    with pytest.raises(TidalError, match=r"^layer 2: expected a selection made earlier .* DS\.\.S"):
        attend(stack[2], caches[2], 2, PLAN, state)


def test_a_layer_of_the_hosts_is_refused():
    plan = LayerPlan.build(
        4, dense_layers=1, select_layers=(2,), full_attention=[True, False, True, True]
    )
    stack = make_stack()
    caches = make_caches(stack)
    with pytest.raises(TidalError, match=r"^layer 1: expected a planned layer, .* the host's"):
        attend(stack[1], caches[1], 1, plan, begin(stack, caches, SMALL, plan))


@pytest.mark.parametrize("layer", [0, 1, 2])
def test_the_configured_backend_reaches_the_kernels(layer, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    stack = make_stack()
    caches = make_caches(stack)
    state = begin(stack, caches, SMALL)
    attend(stack[1], caches[1], 1, PLAN, state)
    state.config = SMALL.replace(backend="triton")
    with pytest.raises(TidalError, match=r"^backend: the Triton kernels"):
        attend(stack[layer], caches[layer], layer, PLAN, state)


def test_the_configured_backend_reaches_the_selection(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    config = TidalConfig.preset("streaming", budget=12, backend="triton")
    plan = LayerPlan.build(LAYERS, dense_layers=0, select_layers=())
    stack = make_stack()
    with pytest.raises(TidalError, match=r"^backend: the Triton kernels"):
        begin(stack, make_caches(stack), config, plan)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_models_get_half_precision_back(dtype):
    stack = make_stack(dtype=dtype)
    caches = make_caches(stack)
    state = begin(stack, caches, SMALL)
    for layer in range(3):
        out = attend(stack[layer], caches[layer], layer, PLAN, state)
        assert out.dtype == dtype
    assert_layer_attends_to(out, stack[2], mask_of(state, stack[2]))


@pytest.mark.parametrize("layer", [-1, LAYERS, 99])
def test_a_layer_beyond_the_plan_is_refused(layer):
    stack = make_stack()
    caches = make_caches(stack)
    with pytest.raises(
        TidalError, match=rf"^layer {layer}: expected a layer of the plan, from 0 to 6"
    ):
        attend(stack[0], caches[0], layer, PLAN, begin(stack, caches, SMALL))


def test_the_state_follows_a_model_to_another_device_whole():
    stack = make_stack("paged 16")
    caches = make_caches(stack)
    state = begin(stack, caches, SMALL)
    attend(stack[1], caches[1], 1, PLAN, state)
    held = (state.seq_lens, state.starts, state.block_table, state.selection)
    state.move_to(torch.device("cpu"))
    after = (state.seq_lens, state.starts, state.block_table, state.selection)
    assert all(old is new for old, new in zip(held, after, strict=True))
    state.move_to(torch.device("meta"))
    selection = (state.selection.positions, state.selection.counts)
    moved = (state.seq_lens, state.starts, state.block_table, *selection)
    assert all(tensor.device.type == "meta" for tensor in moved)


def test_a_state_of_lengths_alone_moves_too():
    state = DecodeState(SMALL, torch.tensor([3], dtype=torch.int32))
    state.move_to(torch.device("meta"))
    assert state.seq_lens.device.type == "meta"
    assert state.starts is state.block_table is state.selection is None


def test_a_layer_brings_the_state_to_the_device_of_its_query():
    stack = make_stack()
    caches = make_caches(stack)
    state = begin(stack, caches, SMALL)
    with pytest.raises((NotImplementedError, RuntimeError)):  # a meta tensor has no lengths to read
        q, k, v = (x.to("meta") for x in (stack[0].q, caches[0]["k"], caches[0]["v"]))
        decode_attention(q, k, v, 0, PLAN, state, scale=1.0)
    assert state.seq_lens.device.type == state.starts.device.type == "meta"


QUEST_PLAN = LayerPlan.build(LAYERS, dense_layers=2, select_layers=(), estimate=True)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_quest_preset_picks_by_the_bounds_of_each_layers_own_pages(layout):
    config = TidalConfig.preset("quest", budget=16, page_tokens=4)
    assert str(QUEST_PLAN) == "DDEEEEE"
    stack = make_stack(layout)
    caches = make_caches(stack)
    state = begin(stack, caches, config, QUEST_PLAN)
    assert state.selection is None
    for layer, (case, cache) in enumerate(zip(stack, caches, strict=True)):
        selection = state.selection
        out = attend(case, cache, layer, QUEST_PLAN, state)
        if layer < 2:
            assert_layer_attends_to(out, case, case.keep)
            assert state.selection is None
            continue
        rows = {"seq_lens": case.seq_lens, "starts": case.starts}
        bounds = page_bound_scores(case.q, scale=case.scale, page_tokens=4, **rows, **cache)
        expected = select_tokens(bounds, **rows, budget=16)
        assert state.selection is not selection
        assert torch.equal(state.selection.positions, expected.positions)
        assert state.selection.positions.shape[1] == KV_HEADS * GROUP
        assert_layer_attends_to(out, case, mask_of(state, case))


def test_quest_with_a_budget_of_the_whole_context_is_dense_attention():
    config = TidalConfig.preset("quest", budget=TOKENS)
    stack = make_stack()
    caches = make_caches(stack)
    state = begin(stack, caches, config, QUEST_PLAN)
    for layer, (case, cache) in enumerate(zip(stack, caches, strict=True)):
        out = attend(case, cache, layer, QUEST_PLAN, state)
        dense, _, _ = dense_decode(
            case.q, seq_lens=case.seq_lens, starts=case.starts, scale=case.scale, **cache
        )
        torch.testing.assert_close(out, dense)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_quest_takes_values_of_its_selected_tokens_and_no_others(layout):
    config = TidalConfig.preset("quest", budget=12, page_tokens=4)
    stack = make_stack(layout)
    caches = make_caches(stack)
    state = begin(stack, caches, config, QUEST_PLAN)
    case = stack[2]
    clean = attend(case, caches[2], 2, QUEST_PLAN, state)
    read = mask_of(state, case).unflatten(1, (KV_HEADS, GROUP)).any(2)
    assert not torch.equal(read, case.valid[:, None].expand_as(read))
    torch.manual_seed(7)  # the same blocks again
    poisoned = {**caches[2], "v": case.cache(read)["v"]}  # keys have to be read, for their bounds
    out = attend(case, poisoned, 2, QUEST_PLAN, begin(stack, caches, config, QUEST_PLAN))
    assert torch.isfinite(out).all() and torch.equal(out, clean)


def test_the_configured_backend_reaches_the_bounds():
    stack = make_stack()
    caches = make_caches(stack)
    config = TidalConfig.preset("quest", budget=12, backend="triton")
    with pytest.raises(TidalError, match=r"^backend: the Triton kernels"):
        attend(stack[2], caches[2], 2, QUEST_PLAN, begin(stack, caches, config, QUEST_PLAN))
