"""Lossless decoding in captured rounds: dense greedy's tokens, and nothing left of rejected drafts.

On a CPU the steps that a GPU captures run one by one, so that all but the capture is tested here.
"""

from __future__ import annotations

import importlib
import weakref

import pytest
import torch
from lossless_runs import (
    LOSSLESS,
    Collector,
    assert_same_states,
    dense_states,
    embedded,
    extended,
    states,
)
from runs import generate, left_padded
from snapshot import snapshot
from tiny import build, prompt
from transformers import StoppingCriteria, StoppingCriteriaList

import tidaldecode
from tidaldecode import TidalError, graph_generate
from tidaldecode.algorithm.speculation import Verdict
from tidaldecode.errors import ShortOfMemoryError
from tidaldecode.integrations.transformers import compiler
from tidaldecode.integrations.transformers.captured_rounds import CapturedRounds, Round
from tidaldecode.integrations.transformers.lossless_graph import RoundLoop, plain_rows
from tidaldecode.proof.equality import RandomSteps
from tidaldecode.proof.rounds import RandomRounds

PROMPT, TOKENS = 40, 30
STEP, VERIFY, HANDLE, LAYERS = (
    importlib.import_module(f"tidaldecode.integrations.transformers.{name}")
    for name in ("decode_step", "verify_step", "handle", "step_layers")
)
ATTENTION = importlib.import_module("tidaldecode.algorithm.attention")
PLAIN = {"output_logits": False, "return_dict_in_generate": False}
CAPTURED = {**PLAIN, "custom_generate": graph_generate}


@pytest.fixture(scope="module")
def trained():
    return embedded()


def padded_batch():
    return left_padded([prompt(PROMPT), prompt(23, seed=1), prompt(9, seed=2), prompt(1, seed=3)])


@pytest.mark.parametrize(
    ("family", "budget", "k"),
    [
        *(("Llama", budget, k) for budget in (8, 24) for k in (1, 3, 8, "auto")),
        *((family, 8, 3) for family in ("Qwen3", "GPTNeoX", "Mixtral")),
    ],
)
def test_a_padded_batch_gets_full_attentions_tokens(family, budget, k):
    model = build(family)
    ids, mask = padded_batch()
    expected = generate(model, ids, TOKENS, attention_mask=mask, **PLAIN)
    settings = {**LOSSLESS, "budget": budget, "draft_tokens": k}
    with tidaldecode.enable(model, **settings) as handle:
        found = generate(model, ids, TOKENS, attention_mask=mask, **CAPTURED)
        stats = handle.stats()
    assert torch.equal(found, expected)
    assert stats.drafted > 0 and stats.tokens >= 4 * (TOKENS - 1)
    if k != "auto":
        assert 0 < stats.accepted < stats.drafted  # rows did part


@pytest.mark.parametrize("selection", ["round", "token"])
@pytest.mark.parametrize("rows", [(0,), (1, 3), (0, 1, 2, 3)])
def test_rows_that_have_ended_rest(rows, selection, monkeypatch):
    model = build("Llama")
    ids, mask = padded_batch()
    settings = {**LOSSLESS, "draft_tokens": 3, "draft_selection": selection}
    attended = []

    def watch(module, name):
        kernel = getattr(module, name)

        def watched(q, k, v, lengths, **options):
            # Of a selection its counts, [B, R]; else the rows' ends.
            found = (
                lengths.counts.amax(1) if name == "sparse_decode" else lengths - options["starts"]
            )
            attended.append(found.tolist())
            return kernel(q, k, v, lengths, **options)

        monkeypatch.setattr(module, name, watched)

    watch(LAYERS, "dense_decode")
    for name in ("dense_decode", "dense_select", "sparse_decode"):
        watch(ATTENTION, name)
    with tidaldecode.enable(model, **settings) as handle:
        verdicts, caches = [], []
        for resting in ((), rows):
            rounds = CapturedRounds(model, handle.config, handle.plan, batch=4, capacity=80)
            newest = rounds.prefill(ids, mask).argmax(-1, keepdim=True)
            rounds.begin(newest, PROMPT + 1, PROMPT + 20)
            rounds.launch(3)
            before = [layer.keys.clone() for layer in rounds.draft.cache.layers]
            known = rounds.ends.known.clone()
            rounds.rest([row in resting for row in range(4)])
            attended.clear()
            verdicts.append(rounds.launch(3).verdict)
            assert (torch.tensor(attended)[:, list(resting)] == 0).all()
            caches.append([layer.keys for layer in rounds.draft.cache.layers])
        assert torch.equal(rounds.ends.known[list(rows)], known[list(rows)])
    others = [row for row in range(4) if row not in rows]
    torch.testing.assert_close(verdicts[0][others], verdicts[1][others])
    for plain, rested, kept in zip(*caches, before, strict=True):
        torch.testing.assert_close(plain[others], rested[others])
        for row in rows:
            start = PROMPT - int(mask[row].sum())
            assert torch.equal(rested[row, :, start:], kept[row, :, start:])


def test_a_round_that_is_short_of_memory_gives_all_of_it_back(monkeypatch):
    model = build("Llama")
    ids, mask = padded_batch()

    def fail(self):
        raise ShortOfMemoryError("memory: too little")

    monkeypatch.setattr(VERIFY.VerifyStep, "prepare", fail)
    with tidaldecode.enable(model, **{**LOSSLESS, "draft_tokens": 3}) as handle:
        rounds = CapturedRounds(model, handle.config, handle.plan, batch=4, capacity=80)
        rounds.begin(rounds.prefill(ids, mask).argmax(-1, keepdim=True), PROMPT + 1, PROMPT + 20)
        keys = weakref.ref(rounds.draft.cache.layers[0].keys)
        with pytest.raises(ShortOfMemoryError) as kept:
            rounds.launch(3)
        assert kept.value is not None and keys() is None


def test_a_row_rests_once_its_text_has_ended(monkeypatch):
    model = build("Llama")
    ids, mask = padded_batch()
    plain = generate(model, ids, TOKENS, attention_mask=mask, **PLAIN)
    ends = {"eos_token_id": int(plain[0, PROMPT + 6]), "pad_token_id": 0}
    expected = generate(model, ids, TOKENS, attention_mask=mask, **PLAIN, **ends)
    told = []
    rest = CapturedRounds.rest

    def watched(rounds, ended):
        told.append(list(ended))
        rest(rounds, ended)

    monkeypatch.setattr(CapturedRounds, "rest", watched)
    with tidaldecode.enable(model, **{**LOSSLESS, "draft_tokens": 3}):
        found = generate(model, ids, TOKENS, attention_mask=mask, **CAPTURED, **ends)
    assert torch.equal(found, expected)
    assert told and told[0][0] and not all(told[0])


@pytest.mark.parametrize("k", [1, 4])
def test_random_drafts_change_nothing_but_the_speed(k):
    model = build("Llama")
    ids, mask = padded_batch()
    expected = generate(model, ids, TOKENS, attention_mask=mask, **PLAIN)
    with tidaldecode.enable(model, **LOSSLESS, draft_tokens=k) as handle:
        handle.captured_rounds = RandomRounds
        found = generate(model, ids, TOKENS, attention_mask=mask, **CAPTURED)
        assert handle.stats().acceptance < 0.1
    assert torch.equal(found, expected)


@pytest.mark.parametrize("name", ["paper", "lessismore", "streaming"])
def test_every_preset_drafts(name):
    model = build("Llama")
    ids, mask = padded_batch()
    config = tidaldecode.TidalConfig.preset(name, budget=8, mode="lossless", draft_tokens=3)
    expected = generate(model, ids, TOKENS, attention_mask=mask, **PLAIN)
    with tidaldecode.enable(model, config):
        found = generate(model, ids, TOKENS, attention_mask=mask, **CAPTURED)
    assert torch.equal(found, expected)


@pytest.mark.parametrize(
    ("budget", "k", "selection"),
    [(20, 4, "round"), (64, 2, "round"), (64, 4, "token"), (256, 8, "round")],
)
def test_the_trained_model_writes_the_same_text_for_mixed_lengths(trained, budget, k, selection):
    model, text = trained
    rows = [text[None, start : start + n] for start, n in ((0, 1200), (3000, 500), (6000, 700))]
    ids, mask = left_padded(rows)
    options = {"attention_mask": mask, "max_new_tokens": 16, "do_sample": False, "pad_token_id": 0}
    expected = model.generate(ids, **options)
    settings = {
        "mode": "lossless", "budget": budget, "draft_tokens": k, "draft_selection": selection,
    }  # fmt: skip
    with tidaldecode.enable(model, **settings) as handle:
        found = model.generate(ids, custom_generate=graph_generate, **options)
        captured = handle.stats()
    assert torch.equal(found, expected)
    with tidaldecode.enable(model, **settings) as handle:
        assert torch.equal(model.generate(ids, **options), expected)
        eager = handle.stats()
    # The same drafts, kept and rejected alike.
    assert (captured.rounds, captured.tokens) == (eager.rounds, eager.tokens)
    assert captured.accepted == eager.accepted and captured.verified == eager.verified


@pytest.mark.parametrize("tokens", range(1, 9))
def test_it_stops_at_max_new_tokens_wherever_that_falls_in_a_round(tokens):
    model = build("Llama")
    expected = generate(model, prompt(PROMPT), tokens, **PLAIN)
    with tidaldecode.enable(model, **LOSSLESS, draft_tokens=4):
        found = generate(model, prompt(PROMPT), tokens, **CAPTURED)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("at", [0, 1, 2, 3, 7, 12])
def test_rows_end_at_their_own_end_of_text(at):
    model = build("Llama")
    ids, mask = padded_batch()
    options = {"attention_mask": mask, **PLAIN}
    free = generate(model, ids, TOKENS, **options)[:, PROMPT:]
    ends = [int(free[0, at]), int(free[1, at + 3])]
    streams = [Collector(), Collector()]
    expected = generate(model, ids, TOKENS, eos_token_id=ends, streamer=streams[0], **options)
    with tidaldecode.enable(model, **LOSSLESS, draft_tokens=4):
        options |= {"token_streamer": streams[1], "streamer": streams[1], **CAPTURED}
        found = generate(model, ids, TOKENS, eos_token_id=ends, **options)
    assert torch.equal(found, expected)
    assert streams[1].columns == streams[0].columns and streams[1].ended


class Odd(StoppingCriteria):
    """Ends a row whose tokens sum to a multiple of 7, and notes all it is asked."""

    def __init__(self):
        self.asked = []

    def __call__(self, input_ids, scores, **kwargs):
        self.asked.append(input_ids.tolist())
        return input_ids.sum(-1) % 7 == 0


@pytest.mark.parametrize("eos", [None, 5])
def test_criteria_of_ones_own_are_asked_the_same_questions(eos):
    model = build("Llama")
    ids, mask = padded_batch()
    asked, outputs = [], []
    for options in (PLAIN, CAPTURED):
        criteria = Odd()
        options = {**options, "stopping_criteria": StoppingCriteriaList([criteria])}
        if options.get("custom_generate"):
            with tidaldecode.enable(model, **LOSSLESS, draft_tokens=4):
                outputs.append(
                    generate(model, ids, TOKENS, attention_mask=mask, eos_token_id=eos, **options)
                )
        else:
            outputs.append(
                generate(model, ids, TOKENS, attention_mask=mask, eos_token_id=eos, **options)
            )
        asked.append(criteria.asked)
    assert asked[1] == asked[0] and 2 < len(asked[0]) <= TOKENS
    assert torch.equal(*outputs)


@pytest.mark.parametrize("k", [1, 5])
@torch.inference_mode()
def test_rejected_tokens_leave_no_trace(k):
    model = build("Llama")
    ids, mask = padded_batch()
    expected = generate(model, ids, TOKENS, attention_mask=mask, **PLAIN)
    with tidaldecode.enable(model, **LOSSLESS, draft_tokens=k) as handle:
        steps = CapturedRounds(model, handle.config, handle.plan, batch=len(ids), capacity=128)
        rows = plain_rows(ids, PROMPT + TOKENS)
        newest = steps.prefill(ids, mask).argmax(-1, keepdim=True)
        for _ in RoundLoop(rows, steps).run(newest):
            behind = torch.arange(steps.capacity) >= steps.ends.known[:, None] - 1
            for layer in steps.draft.cache.layers:
                # Whatever lies behind a row's end, its next round writes before it reads.
                layer.keys.masked_fill_(behind[:, None, :, None], float("nan"))
                layer.values.masked_fill_(behind[:, None, :, None], float("nan"))
    assert torch.equal(rows.sequences(), expected)
    assert steps.ends.known.tolist() == [PROMPT + TOKENS] * 4
    wide = extended(mask, expected.shape[1] - 1)
    found = states(steps.draft.cache, wide.shape[1])
    assert_same_states(found, dense_states(model, expected[:, :-1], wide), wide)


@torch.inference_mode()
def test_prefilled_rows_can_be_decoded_again():
    model = build("Llama")
    ids, mask = padded_batch()
    with tidaldecode.enable(model, **LOSSLESS, draft_tokens=3) as handle:
        steps = CapturedRounds(model, handle.config, handle.plan, batch=len(ids), capacity=128)
        newest = steps.prefill(ids, mask).argmax(-1, keepdim=True)
        texts = []
        for _ in range(2):
            rows = plain_rows(ids, PROMPT + TOKENS)
            for _ in RoundLoop(rows, steps).run(newest):
                pass
            texts.append(rows.sequences())
        with pytest.raises(
            TidalError, match=r"^limit: expected at most 111 tokens in a cache of 128"
        ):
            steps.begin(newest, PROMPT + 1, 112)
    assert torch.equal(*texts)


@torch.inference_mode()
def test_the_host_looks_once_a_round_and_lets_the_next_one_run(monkeypatch):
    model, order = build("Llama"), []
    read, launch = Round.read, CapturedRounds.launch
    monkeypatch.setattr(Round, "read", lambda self: order.append("read") or read(self))
    monkeypatch.setattr(
        CapturedRounds, "launch", lambda self, k: order.append("launch") or launch(self, k)
    )
    with tidaldecode.enable(model, **LOSSLESS, draft_tokens=2) as handle:
        generate(model, prompt(PROMPT), TOKENS, **CAPTURED)
        rounds = handle.stats().rounds
    assert order.count("read") == order.count("launch") == rounds
    assert order[:4] == ["launch", "launch", "read", "launch"]


def keep_all(drafted, choices):
    tokens = torch.cat([drafted, choices[:, -1:]], dim=1)
    return Verdict(tokens, torch.full((len(drafted),), tokens.shape[1]))


def keep_one_more(drafted, choices):
    verdict = RIGHT_RULE(drafted, choices)
    tokens = torch.cat([drafted, choices[:, -1:]], dim=1)
    return Verdict(tokens, (verdict.counts + 1).clamp(max=tokens.shape[1]))


RIGHT_RULE = VERIFY.accept_greedy


@pytest.mark.parametrize("rule", [keep_all, keep_one_more])
def test_a_wrong_rule_is_seen(rule, monkeypatch):
    model = build("Llama")
    ids, mask = padded_batch()
    expected = generate(model, ids, TOKENS, attention_mask=mask, **PLAIN)
    monkeypatch.setattr(VERIFY, "accept_greedy", rule)
    with tidaldecode.enable(model, **LOSSLESS, draft_tokens=4):
        found = generate(model, ids, TOKENS, attention_mask=mask, **CAPTURED)
    assert not torch.equal(found, expected)


def test_a_text_within_the_budget_is_not_drafted():
    model = build("Llama")
    expected = generate(model, prompt(PROMPT), TOKENS, **PLAIN)
    with tidaldecode.enable(model, mode="lossless", budget=128, draft_tokens=4) as handle:
        found = generate(model, prompt(PROMPT), TOKENS, **CAPTURED)
        assert handle.stats().drafted == 0 and handle.stats().tokens_per_verify == 1
    assert torch.equal(found, expected)


def test_a_compiled_round_is_two_graphs_and_gives_the_same_tokens(monkeypatch):
    torch._dynamo.reset()
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr(compiler, "COMPILER", {"backend": backend})
    model = build("Llama")
    ids, mask = padded_batch()
    expected = generate(model, ids, TOKENS, attention_mask=mask, **PLAIN)
    with tidaldecode.enable(model, **LOSSLESS, draft_tokens=3, cuda_graph="compiled"):
        for _ in range(2):
            found = generate(model, ids, TOKENS, attention_mask=mask, **CAPTURED)
            assert torch.equal(found, expected)
    assert len(graphs) == 2


# More lengths than torch compiles versions of one function. monkeypatch would leave it unset.
@torch._dynamo.config.patch(recompile_limit=2)
@torch.inference_mode()
def test_many_draft_lengths_can_be_compiled(monkeypatch):
    torch._dynamo.reset()
    monkeypatch.setattr(compiler, "COMPILER", {"backend": "eager"})
    model, ids = build("Llama", num_hidden_layers=4), prompt(PROMPT)
    settings = {**LOSSLESS, "draft_tokens": 10, "cuda_graph": "compiled", "select_layers": (2,)}
    with tidaldecode.enable(model, **settings) as handle:
        steps = CapturedRounds(model, handle.config, handle.plan, batch=1, capacity=128)
        newest = steps.prefill(ids).argmax(-1, keepdim=True)
        steps.begin(newest, PROMPT + 1, PROMPT + 60)
        for length in range(4):
            steps.launch(length).read()


def test_rounds_are_kept_for_later_calls_and_given_back_after_a_failure():
    model = build("Llama")
    ids, mask = padded_batch()
    expected = generate(model, ids, TOKENS, attention_mask=mask, **PLAIN)
    with tidaldecode.enable(model, **LOSSLESS, draft_tokens=3) as handle:
        generate(model, ids, 4, attention_mask=mask, **CAPTURED)
        with handle.rounds.borrow(4, 100) as first:
            pass
        streamer = Collector(5)
        with pytest.raises(RuntimeError):
            options = {"streamer": streamer, "token_streamer": streamer, **CAPTURED}
            generate(model, ids, TOKENS, attention_mask=mask, **options)
        assert torch.tensor(streamer.columns).T.equal(expected[:, PROMPT : PROMPT + 5])
        with handle.rounds.borrow(4, 100) as other:
            assert other is not first
        for _ in range(2):
            found = generate(model, ids, TOKENS, attention_mask=mask, **CAPTURED)
            assert torch.equal(found, expected)


@pytest.fixture
def on_gpu(monkeypatch):
    """Plain generate takes the rounds, as it does on a GPU; counts them."""
    calls, launch = [], CapturedRounds.launch
    monkeypatch.setattr(HANDLE, "can_graph", lambda model, handle: True)
    monkeypatch.setattr(
        CapturedRounds, "launch", lambda self, k: calls.append(k) or launch(self, k)
    )
    return calls


ROUTED = {
    "greedy": {},
    "a limit": {"max_length": 50},
    "a text's end": {"eos_token_id": 5},
    "sampling": {"do_sample": True, "temperature": 0.8, "top_p": 0.9},
    "suppressed tokens": {"suppress_tokens": list(range(40, 60))},
}
LEFT = {
    "repetition penalty": {"repetition_penalty": 1.3},
    "sampling with history": {"do_sample": True, "no_repeat_ngram_size": 2},
    "sampling with scores": {
        "do_sample": True,
        "return_dict_in_generate": True,
        "output_scores": True,
    },
    "a returned cache": {"return_dict_in_generate": True},
    "positions": {"position_ids": torch.arange(PROMPT)[None]},
    "a static cache": {"cache_implementation": "static", "disable_compile": True},
}


@pytest.mark.parametrize("way", [*ROUTED, *LEFT])
def test_plain_generate_takes_the_rounds_exactly_where_they_give_the_same(way, on_gpu):
    model, texts = build("Llama"), []
    options = {**PLAIN, **{**ROUTED, **LEFT}[way]}
    for graph in (False, "auto"):
        with tidaldecode.enable(model, **LOSSLESS, draft_tokens=3, cuda_graph=graph):
            assert not on_gpu
            torch.manual_seed(5)
            found = generate(model, prompt(PROMPT), 12, **options)
            texts.append(found if torch.is_tensor(found) else found.sequences)
    assert torch.equal(*texts)
    assert bool(on_gpu) == (way in ROUTED)


def test_steps_and_scores_of_ones_own_are_asked(on_gpu):
    model, seen = build("Llama"), []
    with tidaldecode.enable(model, **LOSSLESS, draft_tokens=3) as handle:
        handle.on_scores = lambda layer, scores: seen.append(layer)
        generate(model, prompt(PROMPT), 6, **PLAIN)
        assert seen and not on_gpu
        handle.on_scores, handle.speculative_steps = None, RandomSteps
        generate(model, prompt(PROMPT), 6, **PLAIN)
        assert not on_gpu


@pytest.mark.parametrize(
    "options",
    [
        {"repetition_penalty": 1.3},
        {"do_sample": True, "min_new_tokens": 2, "eos_token_id": 5},
        {"return_dict_in_generate": True, "output_logits": True},
    ],
)
def test_what_cannot_be_captured_is_refused_where_it_was_asked_for(options):
    model = build("Llama")
    with (
        tidaldecode.enable(model, **LOSSLESS),
        pytest.raises(TidalError, match=r"^custom_generate: expected a generation without records"),
    ):
        generate(model, prompt(PROMPT), 4, **{**CAPTURED, **options})


def test_disabling_leaves_the_model_as_it_was():
    model = build("Llama")
    before = snapshot(model)
    with tidaldecode.enable(model, **LOSSLESS, draft_tokens=3) as handle:
        generate(model, prompt(PROMPT), 4, **CAPTURED)
    assert snapshot(model) == before and not handle.rounds.clear()
