"""Everything that `generate` can do, on models with and without sliding-window layers."""

from __future__ import annotations

import pytest
import torch
from reference import masked_logits
from runs import CACHES, SMALL, generate, left_padded, logits_of
from tiny import VOCABULARY, build, prompt
from transformers import DynamicCache, StaticCache

import tidaldecode
from tidaldecode import TidalConfig, TidalHandle

PROMPT, TOKENS = 24, 6
LENGTH = PROMPT + TOKENS
FULL = 64

MODELS = ["Llama", "Qwen3", "Gemma3"]
CONFIGS = {
    "shared": TidalConfig(budget=8, sink_tokens=1, recent_tokens=2),
    "kv_head": TidalConfig(budget=8, sink_tokens=1, recent_tokens=2, granularity="kv_head"),
    "query_head": TidalConfig(budget=8, sink_tokens=0, recent_tokens=0, granularity="query_head"),
    "paper": TidalConfig.preset("paper", budget=8),
    "lessismore": TidalConfig.preset("lessismore", budget=12),
    "streaming": TidalConfig.preset("streaming", budget=8),
}
# How to decode: what a small budget must give with both caches, and a full one as sdpa does.
WAYS = {
    "greedy": {},
    "sampling": {"do_sample": True, "top_p": 0.9, "temperature": 0.8},
    "beam search": {"num_beams": 3},
    "several sequences": {"do_sample": True, "num_return_sequences": 3},
    "several beams": {"num_beams": 4, "num_return_sequences": 2},
    "chunked prefill": {"prefill_chunk_size": 7},
    "chunked prefill with a tail of one": {"prefill_chunk_size": PROMPT - 1},
    "repetition penalty": {"repetition_penalty": 1.3},
}

models = pytest.mark.parametrize("family", MODELS)
caches = pytest.mark.parametrize("cache", CACHES)


def run(model, ids, cache="dynamic", tokens=TOKENS, **options):
    torch.manual_seed(7)
    return generate(model, ids, tokens, **CACHES[cache], **options)


def reference(
    model, handle: TidalHandle, sequence: torch.Tensor, first: int = PROMPT
) -> torch.Tensor:
    """Logits of the new tokens of one sequence ``[T]``, of which those from ``first`` were decoded."""
    ids = sequence[None, :-1]
    decoded = range(first, ids.shape[1])
    return masked_logits(model, ids, handle.plan, handle.config, decoded)


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found, expected, atol=2e-4, rtol=2e-4)


@pytest.mark.parametrize("way", WAYS)
@caches
@models
def test_a_full_budget_generates_what_sdpa_generates(family, cache, way):
    model = build(family)
    expected = run(model, prompt(PROMPT), cache, **WAYS[way])
    with tidaldecode.enable(model, budget=FULL):
        found = run(model, prompt(PROMPT), cache, **WAYS[way])
    assert torch.equal(found.sequences, expected.sequences)
    assert torch.equal(logits_of(found), logits_of(expected))


@pytest.mark.parametrize("way", WAYS)
@models
def test_a_small_budget_generates_the_same_with_both_caches(family, way):
    model = build(family)
    dense = run(model, prompt(PROMPT), **WAYS[way])
    with tidaldecode.enable(model, **SMALL):
        dynamic = run(model, prompt(PROMPT), "dynamic", **WAYS[way])
        static = run(model, prompt(PROMPT), "static", **WAYS[way])
    assert torch.equal(dynamic.sequences, static.sequences)
    close(logits_of(dynamic), logits_of(static))
    assert not torch.equal(logits_of(dynamic), logits_of(dense))


@pytest.mark.parametrize("name", CONFIGS)
@models
def test_every_granularity_and_preset_generates_the_same_with_both_caches(family, name):
    model = build(family)
    ids, mask = left_padded([prompt(PROMPT), prompt(15, seed=1)])
    dense = run(model, ids, attention_mask=mask)
    with tidaldecode.enable(model, CONFIGS[name]):
        dynamic = run(model, ids, "dynamic", attention_mask=mask)
        static = run(model, ids, "static", attention_mask=mask)
    assert torch.equal(dynamic.sequences, static.sequences)
    close(logits_of(dynamic), logits_of(static))
    assert (dynamic.logits[1] - dense.logits[1]).abs().amax(-1).min() > 1e-4  # in both rows


@caches
@models
def test_sampled_sequences_each_have_the_logits_of_their_own_tokens(family, cache):
    model = build(family)
    with tidaldecode.enable(model, **SMALL) as handle:
        found = run(model, prompt(PROMPT), cache, do_sample=True, num_return_sequences=3)
    assert len({tuple(row) for row in found.sequences.tolist()}) == 3
    for row, logits in zip(found.sequences, logits_of(found), strict=True):
        close(logits, reference(model, handle, row)[PROMPT - 1 :])


@caches
@models
def test_a_beam_scores_its_own_tokens_although_beams_change_places(family, cache):
    model = build(family)
    options = {"num_beams": 4, "num_return_sequences": 4, "length_penalty": 0.0}
    with tidaldecode.enable(model, **SMALL) as handle:
        found = run(model, prompt(PROMPT), cache, output_scores=True, **options)
    assert any(len(set(row)) > 1 for row in found.beam_indices.tolist())  # they did change places
    for row, score in zip(found.sequences, found.sequences_scores, strict=True):
        chances = reference(model, handle, row)[PROMPT - 1 :].log_softmax(-1)
        taken = chances.gather(-1, row[PROMPT:, None])
        close(score, taken.sum())


@caches
@models
def test_rows_of_a_padded_batch_equal_the_same_rows_alone(family, cache):
    # Relative to the budget: far longer, just longer, shorter until the end, one token.
    rows = [prompt(size, seed=size) for size in (PROMPT, SMALL["budget"], 2, 1)]
    ids, mask = left_padded(rows)
    model = build(family)
    with tidaldecode.enable(model, **SMALL):
        batch = run(model, ids, cache, attention_mask=mask)
        alone = [run(model, row, cache) for row in rows]
    for index, single in enumerate(alone):
        assert torch.equal(batch.sequences[index, PROMPT:], single.sequences[0, -TOKENS:])
        close(logits_of(batch)[index], logits_of(single)[0])


@models
def test_a_row_that_fits_the_budget_is_dense_beside_one_that_does_not(family):
    ids, mask = left_padded([prompt(PROMPT), prompt(2, seed=1)])
    model = build(family)
    dense = run(model, ids, attention_mask=mask)
    with tidaldecode.enable(model, **SMALL):
        found = run(model, ids, attention_mask=mask)
    close(logits_of(found)[1], logits_of(dense)[1])
    assert (logits_of(found)[0, 1] - logits_of(dense)[0, 1]).abs().max() > 1e-2


@caches
@models
def test_a_padded_batch_at_full_budget_is_sdpa_bit_for_bit(family, cache):
    ids, mask = left_padded([prompt(PROMPT), prompt(7, seed=1)])
    model = build(family)
    expected = run(model, ids, cache, attention_mask=mask)
    # Padding does not count: the longest row has PROMPT tokens.
    with tidaldecode.enable(model, budget=LENGTH - 1):
        found = run(model, ids, cache, attention_mask=mask)
    assert torch.equal(logits_of(found), logits_of(expected))


@caches
@models
def test_padding_does_not_count_against_the_budget(family, cache):
    ids, mask = left_padded([prompt(7)])
    ids = torch.cat([torch.zeros(1, 10, dtype=torch.long), ids], dim=1)
    mask = torch.cat([torch.zeros(1, 10, dtype=torch.long), mask], dim=1)
    model = build(family)
    expected = run(model, ids, cache, attention_mask=mask)
    with tidaldecode.enable(model, budget=7 + TOKENS - 1, sink_tokens=1, recent_tokens=2):
        found = run(model, ids, cache, attention_mask=mask)
    assert torch.equal(logits_of(found), logits_of(expected))


@caches
@models
def test_a_prompt_of_one_token_generates(family, cache):
    tokens = 16
    model = build(family)
    expected = run(model, prompt(1), cache, tokens=tokens)
    with tidaldecode.enable(model, **SMALL) as handle:
        found = run(model, prompt(1), cache, tokens=tokens)
    inside = SMALL["budget"]
    assert torch.equal(logits_of(found)[:, :inside], logits_of(expected)[:, :inside])
    close(logits_of(found)[0], reference(model, handle, found.sequences[0], first=0))


@caches
@models
def test_a_chunk_of_one_token_is_decoded_and_the_others_are_dense(family, cache):
    model = build(family)
    with tidaldecode.enable(model, **SMALL) as handle:
        found = run(model, prompt(PROMPT), cache, prefill_chunk_size=PROMPT - 1)
        whole = run(model, prompt(PROMPT), cache, prefill_chunk_size=PROMPT // 2)
    tail = reference(model, handle, found.sequences[0], first=PROMPT - 1)
    close(logits_of(found)[0], tail[PROMPT - 1 :])
    close(logits_of(whole)[0], reference(model, handle, whole.sequences[0])[PROMPT - 1 :])


def new_cache(kind, model, size=64):
    if kind == "static":
        return StaticCache(config=model.config, max_cache_len=size)
    return DynamicCache(config=model.config)


@caches
@models
def test_a_second_generate_continues_a_cache(family, cache):
    model, more = build(family), prompt(5, seed=3)

    def talk():
        past = new_cache(cache, model)
        first = generate(model, prompt(PROMPT), TOKENS, past_key_values=past)
        ids = torch.cat([first.sequences, more], dim=1)
        second = generate(model, ids, TOKENS, past_key_values=past)
        return torch.cat([logits_of(first), logits_of(second)], dim=1)[0], second.sequences

    expected, _ = talk()
    with tidaldecode.enable(model, budget=FULL):
        full, _ = talk()
    with tidaldecode.enable(model, **SMALL) as handle:
        found, sequence = talk()
    assert torch.equal(full, expected)

    ids = sequence[:, :-1]
    # The last token of the first answer was never decoded: the second prefill brings it in.
    decoded = [*range(PROMPT, LENGTH - 1), *range(LENGTH + 5, ids.shape[1])]
    wanted = masked_logits(model, ids, handle.plan, handle.config, decoded)
    close(found[:TOKENS], wanted[PROMPT - 1 : LENGTH - 1])
    close(found[TOKENS:], wanted[LENGTH + 5 - 1 :])


@caches
@models
def test_a_padded_batch_is_continued_row_by_row(family, cache):
    model = build(family)
    rows, more = [prompt(PROMPT), prompt(9, seed=1)], prompt(5, batch=2, seed=3)

    def talk(ids, mask, more):
        past = new_cache(cache, model)
        first = generate(model, ids, TOKENS, attention_mask=mask, past_key_values=past)
        ids = torch.cat([first.sequences, more], dim=1)
        mask = torch.cat([mask, torch.ones(len(ids), TOKENS + more.shape[1])], dim=1).long()
        return generate(model, ids, TOKENS, attention_mask=mask, past_key_values=past)

    with tidaldecode.enable(model, **SMALL):
        batch = talk(*left_padded(rows), more)
        for index, row in enumerate(rows):
            alone = talk(row, torch.ones_like(row), more[index : index + 1])
            assert torch.equal(batch.sequences[index, -TOKENS:], alone.sequences[0, -TOKENS:])
            close(logits_of(batch)[index], logits_of(alone)[0])


@models
def test_prompt_lookup_at_full_budget_generates_what_sdpa_generates(family):
    model = build(family)
    ids = prompt(8).repeat(1, 3)
    options = {"prompt_lookup_num_tokens": 3, "eos_token_id": VOCABULARY - 1}
    expected = run(model, ids, tokens=12, **options)
    with tidaldecode.enable(model, budget=FULL):
        found = run(model, ids, tokens=12, **options)
    with tidaldecode.enable(model, **SMALL):
        small = run(model, ids, tokens=12, **options)
    assert torch.equal(found.sequences, expected.sequences)
    assert torch.equal(logits_of(found), logits_of(expected))
    assert torch.equal(small.sequences[:, : ids.shape[1]], ids)
    assert not torch.equal(small.sequences, expected.sequences)


class Collector:
    """A streamer that keeps what it is given."""

    def __init__(self):
        self.tokens: list[int] = []
        self.ended = False

    def put(self, value):
        self.tokens += value.flatten().tolist()

    def end(self):
        self.ended = True


@caches
def test_a_streamer_sees_every_token(cache):
    model, streamer = build("Llama"), Collector()
    with tidaldecode.enable(model, **SMALL):
        silent = run(model, prompt(PROMPT), cache)
        found = run(model, prompt(PROMPT), cache, streamer=streamer)
    assert streamer.ended
    assert streamer.tokens == found.sequences[0].tolist()
    assert torch.equal(found.sequences, silent.sequences)


@pytest.mark.parametrize("name", CONFIGS)
@caches
@models
def test_bf16_models_run(family, cache, name):
    model = build(family).to(torch.bfloat16)
    expected = run(model, prompt(PROMPT), cache)
    with tidaldecode.enable(model, CONFIGS[name]):
        found = run(model, prompt(PROMPT), cache)
    with tidaldecode.enable(model, budget=FULL):
        full = run(model, prompt(PROMPT), cache)
    assert torch.equal(logits_of(full), logits_of(expected))
    assert logits_of(found).isfinite().all()
    assert not torch.equal(found.logits[1], expected.logits[1])


def test_generating_without_a_cache_is_dense():
    model = build("Llama")
    expected = run(model, prompt(PROMPT), use_cache=False)
    with tidaldecode.enable(model, **SMALL):
        found = run(model, prompt(PROMPT), use_cache=False)
    assert torch.equal(logits_of(found), logits_of(expected))
