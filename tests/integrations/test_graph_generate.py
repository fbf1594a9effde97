"""graph_generate against plain generate: the same tokens, whatever the options.

On a CPU the step that a GPU captures runs eagerly, so that all but the capture is tested here.
"""

from __future__ import annotations

import gc
import importlib
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from runs import SMALL, generate, left_padded, logits_of
from snapshot import snapshot
from tiny import VOCABULARY, build, prompt
from transformers import DynamicCache, GenerationConfig
from transformers.generation.streamers import BaseStreamer

import tidaldecode
from tidaldecode import TidalConfig, TidalError, graph_generate
from tidaldecode.errors import ShortOfMemoryError
from tidaldecode.integrations.transformers import compiler
from tidaldecode.integrations.transformers.decode_step import DecodeStep, dense_plan
from tidaldecode.integrations.transformers.graph_generate import can_graph
from tidaldecode.integrations.transformers.static_cache import FixedLayer
from tidaldecode.kernels import dispatch

HANDLE = importlib.import_module("tidaldecode.integrations.transformers.handle")
PLAIN = {"output_logits": False, "return_dict_in_generate": False}
MODELS = ["Llama", "Qwen3", "Gemma3"]
WAYS = {
    "greedy": {},
    "sampling": {"do_sample": True, "top_p": 0.9, "temperature": 0.8},
    "several sequences": {"do_sample": True, "num_return_sequences": 3},
    "repetition penalty": {"repetition_penalty": 1.3},
}


def run(model, ids, tokens=20, **options):
    torch.manual_seed(7)
    return generate(model, ids, tokens, **options)


def both(model, ids, **options):
    return run(model, ids, **options), run(model, ids, custom_generate=graph_generate, **options)


@pytest.mark.parametrize("family", MODELS)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("budget", [8, 128])
def test_it_gives_the_tokens_of_plain_generate(family, way, budget):
    model = build(family)
    with tidaldecode.enable(model, **{**SMALL, "budget": budget}):
        plain, graphed = both(model, prompt(24), **WAYS[way])
    assert torch.equal(plain.sequences, graphed.sequences)
    torch.testing.assert_close(logits_of(graphed), logits_of(plain), atol=2e-4, rtol=2e-4)


@pytest.mark.parametrize("family", MODELS)
def test_a_greedy_run_without_records_takes_the_device_loop_and_agrees(family):
    model = build(family)
    settings = {"output_logits": False, "return_dict_in_generate": False, "tokens": 41}
    with tidaldecode.enable(model, **SMALL):
        plain, graphed = both(model, prompt(24), **settings)
    assert torch.equal(plain, graphed)


@pytest.mark.parametrize("family", MODELS)
def test_padded_rows_agree(family):
    model = build(family)
    ids, mask = left_padded([prompt(24), prompt(9, seed=2), prompt(17, seed=3)])
    with tidaldecode.enable(model, **SMALL):
        plain, graphed = both(model, ids, attention_mask=mask)
    assert torch.equal(plain.sequences, graphed.sequences)
    torch.testing.assert_close(logits_of(graphed), logits_of(plain), atol=2e-4, rtol=2e-4)


@pytest.mark.parametrize("records", [False, True])
@pytest.mark.parametrize("rows", [1, 4])
def test_rows_end_where_plain_generate_ends_them(rows, records):
    model = build("Llama")
    ids = torch.cat([prompt(24, seed=seed) for seed in range(rows)])
    options = {"output_logits": False, "return_dict_in_generate": records, "output_scores": records}
    with tidaldecode.enable(model, **SMALL):
        free = run(model, ids, tokens=40).sequences[:, 24:]
        ends = [int(row[place]) for row, place in zip(free, (3, 17, 20, 33), strict=False)]
        plain, graphed = both(model, ids, tokens=40, eos_token_id=ends, **options)
    if records:
        # Of rows that have ended, too.
        scores = [torch.stack(found.scores) for found in (plain, graphed)]
        torch.testing.assert_close(*scores, atol=2e-4, rtol=2e-4)
        plain, graphed = plain.sequences, graphed.sequences
    assert plain.shape[1] < 24 + 40
    assert torch.equal(plain, graphed)


@pytest.mark.parametrize("tokens", [1, 2, 15, 16, 17, 18, 33])
def test_every_length_is_kept(tokens):
    model = build("Llama")
    with tidaldecode.enable(model, **SMALL):
        plain, graphed = both(
            model, prompt(5), tokens=tokens, output_logits=False, return_dict_in_generate=False
        )
    assert graphed.shape == (1, 5 + tokens)
    assert torch.equal(plain, graphed)


@pytest.mark.parametrize("length", [1, 2])
def test_the_shortest_prompts_work(length):
    model = build("Llama")
    with tidaldecode.enable(model, **SMALL):
        plain, graphed = both(model, prompt(length))
    assert torch.equal(plain.sequences, graphed.sequences)


@pytest.mark.parametrize("granularity", ["shared", "kv_head", "query_head"])
def test_every_granularity_agrees(granularity):
    model = build("Llama")
    with tidaldecode.enable(model, **SMALL, granularity=granularity):
        plain, graphed = both(model, prompt(30))
    assert torch.equal(plain.sequences, graphed.sequences)


def test_a_step_is_kept_for_later_calls_and_replaced_when_too_small():
    model = build("Llama")
    with tidaldecode.enable(model, **SMALL) as handle:
        with handle.steps.borrow(2, 100) as first, handle.steps.borrow(2, 100) as other:
            assert other is not first
        # The one that came back last waits, for one borrower.
        with handle.steps.borrow(2, 100) as again, handle.steps.borrow(2, 100) as third:
            assert again is first and third is not again
        with handle.steps.borrow(2, first.capacity + 1) as larger:
            assert larger.capacity > first.capacity
        long, short = prompt(60, seed=5), prompt(10, seed=6)
        for ids in (long, short, long):
            plain, graphed = both(model, ids)
            assert torch.equal(plain.sequences, graphed.sequences)


def test_a_dense_plan_gives_the_hosts_own_tokens():
    model = build("Llama")
    ids = prompt(40)
    expected = run(model, ids).sequences[0, 40:]
    with tidaldecode.enable(model, **SMALL) as handle:
        step = DecodeStep(model, handle.config, dense_plan(handle.plan), batch=1, capacity=64)
        step.tokens.copy_(step.prefill(ids).argmax(-1, keepdim=True))
        found = [int(step.tokens)]
        while len(found) < 20:
            step.run()
            found.append(int(step.tokens))
    assert found == expected.tolist()


@pytest.mark.parametrize("family", [*MODELS, "Mixtral"])
def test_a_compiled_step_is_one_graph_and_gives_the_same_tokens(family, monkeypatch):
    torch._dynamo.reset()
    monkeypatch.setattr(compiler, "COMPILER", {"backend": "eager"})
    model = build(family)
    ids = torch.cat([prompt(24), prompt(24, seed=2)])
    with tidaldecode.enable(model, **SMALL, cuda_graph="compiled"):
        plain, graphed = both(model, ids)
    assert torch.equal(plain.sequences, graphed.sequences)
    torch.testing.assert_close(logits_of(graphed), logits_of(plain), atol=2e-4, rtol=2e-4)


def test_steps_of_every_plan_and_capacity_share_one_compilation(monkeypatch):
    torch._dynamo.reset()
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr(compiler, "COMPILER", {"backend": backend})
    model = build("Llama")
    with tidaldecode.enable(model, **SMALL, cuda_graph="compiled") as handle:
        for plan, capacity in (
            (handle.plan, 64),
            (dense_plan(handle.plan), 96),
            (handle.plan, 128),
        ):
            step = DecodeStep(model, handle.config, plan, batch=1, capacity=capacity)
            step.prefill(prompt(capacity - 4))
            step.run()
            step.run()
    assert len(graphs) == 1


def test_steps_of_several_threads_do_not_mix():
    model = build("Llama")
    prompts = [prompt(20 + seed, seed=seed) for seed in range(4)]
    with tidaldecode.enable(model, **SMALL) as handle:
        expected = [run(model, ids).sequences[0, ids.shape[1] :].tolist() for ids in prompts]

        def decode(ids):
            step = DecodeStep(model, handle.config, handle.plan, batch=1, capacity=64)
            step.tokens.copy_(step.prefill(ids).argmax(-1, keepdim=True))
            found = [int(step.tokens)]
            while len(found) < 20:
                step.run()
                found.append(int(step.tokens))
            return found

        with ThreadPoolExecutor(4) as pool:
            assert list(pool.map(decode, prompts)) == expected


def test_a_failed_call_leaves_no_step_behind():
    model = build("Llama")
    with tidaldecode.enable(model, **SMALL) as handle:
        with pytest.raises(RuntimeError, match="cut"), handle.steps.borrow(1, 10):
            raise RuntimeError("cut")
        assert not handle.steps.clear()


def test_a_lack_of_memory_says_what_was_needed_and_leaves_the_model_usable(monkeypatch):
    model = build("Llama")
    ids = prompt(24)
    options = {"output_logits": False, "return_dict_in_generate": False}
    with tidaldecode.enable(model, **SMALL) as handle:
        expected = run(model, ids, **options)
        run(model, torch.cat([ids, ids]), custom_generate=graph_generate, **options)
        take, failures = FixedLayer.lazy_initialization, [1, 1]

        def fail(self, *states):
            if failures:
                failures.pop()
                raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate")
            return take(self, *states)

        monkeypatch.setattr(FixedLayer, "lazy_initialization", fail)
        # Steps that wait are given up first; with none left the call fails.
        with pytest.raises(
            ShortOfMemoryError,
            match=r"^memory: expected room for a cache of 1 x 1,024 tokens \(0\.0 GiB\) .* fewer rows",
        ):
            run(model, ids, custom_generate=graph_generate, **options)
        assert not failures and not handle.steps.clear()
        assert torch.equal(run(model, ids, custom_generate=graph_generate, **options), expected)


def test_the_error_keeps_no_memory_of_the_call_that_failed(monkeypatch):
    model = build("Llama")
    take, taken = FixedLayer.lazy_initialization, []

    def fail(self, *states):
        if len(taken) == 2:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate")
        take(self, *states)
        taken.append(weakref.ref(self.keys))

    monkeypatch.setattr(FixedLayer, "lazy_initialization", fail)
    gc.disable()
    try:
        with tidaldecode.enable(model, **SMALL), pytest.raises(ShortOfMemoryError) as kept:
            run(model, prompt(24), tokens=4, custom_generate=graph_generate)
        assert kept.value is not None and [one() for one in taken] == [None, None]
    finally:
        gc.enable()


@pytest.mark.parametrize("budget", [8, 200])
@pytest.mark.parametrize("way", ["greedy", "sampling"])
def test_rows_that_have_ended_rest(way, budget, monkeypatch):
    model = build("Llama")
    ids, mask = left_padded([prompt(40), prompt(23, seed=1), prompt(9, seed=2)])
    options = {"attention_mask": mask, **WAYS[way], "tokens": 45, **PLAIN}
    lengths = []
    step = DecodeStep.replay

    def watched(self):
        lengths.append((self.seq_lens - self.starts).tolist())
        step(self)
        if not all(lengths[-1]):
            # What a resting row holds stays as it is, from its first token on.
            row = lengths[-1].index(0)
            kept = self.cache.layers[1].keys[row, :, int(self.starts[row]) :].clone()
            assert row not in held or torch.equal(held[row], kept)
            held[row] = kept

    with tidaldecode.enable(model, **{**SMALL, "budget": budget}):
        text = run(model, ids, custom_generate=graph_generate, **options)
        ends = {"eos_token_id": int(text[0, 46]), "pad_token_id": 0}
        expected = run(model, ids, **options, **ends)
        held = {}
        monkeypatch.setattr(DecodeStep, "replay", watched)
        found = run(model, ids, custom_generate=graph_generate, **options, **ends)
    assert torch.equal(found, expected)
    assert all(lengths[0]) and not all(lengths[-1]) and held


class Collector(BaseStreamer):
    def __init__(self) -> None:
        self.pieces: list[int] = []
        self.ended = False

    def put(self, value: torch.Tensor) -> None:
        self.pieces += value.flatten().tolist()

    def end(self) -> None:
        self.ended = True


def test_a_streamer_sees_what_plain_generate_shows_it():
    model = build("Llama")
    plain, graphed = Collector(), Collector()
    with tidaldecode.enable(model, **SMALL):
        run(model, prompt(24), streamer=plain)
        run(
            model,
            prompt(24),
            streamer=graphed,
            token_streamer=graphed,
            custom_generate=graph_generate,
        )
    assert plain.pieces == graphed.pieces and graphed.ended


@pytest.fixture
def on_gpu(monkeypatch):
    """Plain generate takes the loop, as it does on a GPU; counts the calls that reach it."""
    calls = []
    monkeypatch.setattr(HANDLE, "can_graph", lambda model, handle: True)
    step = DecodeStep.prefill
    monkeypatch.setattr(
        DecodeStep, "prefill", lambda self, *args: calls.append(1) or step(self, *args)
    )
    return calls


ROUTED = {
    "greedy": {},
    "sampling": {"do_sample": True, "top_p": 0.9},
    "several sequences": {"do_sample": True, "num_return_sequences": 2},
    "repetition penalty": {"repetition_penalty": 1.3},
}
LEFT = {
    "beams": {"num_beams": 2},
    "a returned cache": {"return_dict_in_generate": True},
    "a static cache": {"cache_implementation": "static", "disable_compile": True},
    # transformers 5.4 expects an end-of-text token here.
    "prompt lookup": {"prompt_lookup_num_tokens": 3, "eos_token_id": VOCABULARY - 1},
    "no cache": {"use_cache": False},
    "chunked prefill": {"prefill_chunk_size": 7},
}


@pytest.mark.parametrize("way", [*ROUTED, *LEFT])
def test_plain_generate_takes_the_loop_exactly_where_it_gives_the_same(way, on_gpu):
    model = build("Llama")
    options = {"output_logits": False, "return_dict_in_generate": False}
    options |= {**ROUTED, **LEFT}[way]
    with tidaldecode.enable(model, **SMALL, cuda_graph=False):
        plain = run(model, prompt(24), **options)
    assert not on_gpu
    with tidaldecode.enable(model, **SMALL):
        routed = run(model, prompt(24), **options)
    assert bool(on_gpu) == (way in ROUTED)
    if way == "a returned cache":
        plain, routed = plain.sequences, routed.sequences
    assert torch.equal(plain, routed)


def test_a_streamer_of_plain_generate_reaches_the_loop(on_gpu):
    model = build("Llama")
    plain, routed = Collector(), Collector()
    options = {"output_logits": False, "return_dict_in_generate": False}
    with tidaldecode.enable(model, **SMALL, cuda_graph=False):
        run(model, prompt(24), streamer=plain, **options)
    with tidaldecode.enable(model, **SMALL):
        run(model, prompt(24), streamer=routed, **options)
    assert on_gpu and plain.pieces == routed.pieces and routed.ended


def test_a_generation_config_is_read_as_plain_generate_reads_it(on_gpu):
    model = build("Llama")
    config = GenerationConfig(max_new_tokens=5, do_sample=False, num_beams=2, pad_token_id=0)
    with tidaldecode.enable(model, **SMALL):
        beams = model.generate(prompt(24), generation_config=config)
        assert not on_gpu
        greedy = model.generate(prompt(24), generation_config=config, num_beams=1)
        assert on_gpu
        assert beams.shape == greedy.shape == (1, 29)


def test_scores_that_someone_watches_are_shown(on_gpu):
    model, seen = build("Llama"), []
    options = {"output_logits": False, "return_dict_in_generate": False}
    with tidaldecode.enable(model, **SMALL) as handle:
        handle.on_scores = lambda layer, scores: seen.append(layer)
        run(model, prompt(24), **options)
        assert seen and not on_gpu
        with pytest.raises(TidalError, match=r"^on_scores: expected None"):
            run(model, prompt(24), custom_generate=graph_generate, **options)


@pytest.mark.parametrize(
    "settings, expected",
    [({}, True), ({"backend": "torch"}, False), ({"preset": "quest"}, False)],
)
def test_only_steps_that_ask_nothing_of_the_host_are_captured(settings, expected, monkeypatch):
    monkeypatch.setattr(dispatch, "_has_triton", lambda: True)
    model = build("Llama")
    config = TidalConfig(**SMALL, **settings) if "preset" not in settings else None
    config = config or TidalConfig.preset("quest", budget=32)
    with tidaldecode.enable(model, config) as handle:
        assert not can_graph(model, handle)  # on a CPU
        monkeypatch.setattr(type(model), "device", torch.device("cuda"))
        assert can_graph(model, handle) == expected
        monkeypatch.setattr(dispatch, "_has_triton", lambda: False)
        assert not can_graph(model, handle)
        monkeypatch.undo()


def test_disabling_takes_the_route_off(on_gpu):
    model = build("Llama")
    before = snapshot(model)
    with tidaldecode.enable(model, **SMALL):
        assert "generate" in vars(model)
    assert snapshot(model) == before


def test_after_it_plain_generate_and_the_model_are_as_before():
    model = build("Llama")
    before = run(model, prompt(24)).sequences
    with tidaldecode.enable(model, **SMALL):
        plain = run(model, prompt(24)).sequences
        run(model, prompt(24), custom_generate=graph_generate)
        assert torch.equal(run(model, prompt(24)).sequences, plain)
    assert torch.equal(run(model, prompt(24)).sequences, before)


def test_a_full_cache_is_refused():
    model = build("Llama")
    with tidaldecode.enable(model, **SMALL) as handle:
        step = DecodeStep(model, handle.config, handle.plan, batch=1, capacity=10)
        with pytest.raises(TidalError, match=r"^prompt: expected at most 10 tokens, got 11"):
            step.prefill(prompt(11))
        step.prefill(prompt(9))
        step.run()
        with pytest.raises(TidalError, match=r"^cache: expected room .* all 10 taken"):
            step.run()


def test_it_is_refused_where_it_cannot_give_what_generate_gives():
    model = build("Llama")
    ids = prompt(24)
    with pytest.raises(TidalError, match=r"^model: expected one with TidalDecode, .* not enabled"):
        run(model, ids, custom_generate=graph_generate)
    with tidaldecode.enable(model, **SMALL):
        cache = DynamicCache()
        model(ids[:, :10], past_key_values=cache)
        for name, options in {
            "past_key_values": {"past_key_values": cache},
            "output_hidden_states": {"output_hidden_states": True},
            "use_cache": {"use_cache": False},
        }.items():
            with pytest.raises(TidalError, match=f"^{name}: expected a plain greedy or sampled"):
                run(model, ids, custom_generate=graph_generate, **options)
        mask = torch.ones(1, 24, dtype=torch.long)
        mask[0, 20:] = 0
        with pytest.raises(TidalError, match=r"^attention_mask: expected padding on the left only"):
            run(model, ids, attention_mask=mask, custom_generate=graph_generate)


def test_presets_agree():
    model = build("Llama")
    for name in ("paper", "lessismore", "streaming"):
        with tidaldecode.enable(model, TidalConfig.preset(name, budget=24)):
            plain, graphed = both(model, prompt(40) % VOCABULARY)
        assert torch.equal(plain.sequences, graphed.sequences), name
