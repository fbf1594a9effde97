"""The whole decode step against a Llama written out by hand (see `reference.py`)."""

import pytest
import torch
from reference import llama_logits, masked_logits
from runs import CACHES, SMALL, generate, left_padded, logits_of
from tiny import build, prompt

import tidaldecode
from tidaldecode import LayerPlan, Role, TidalConfig

PROMPT, TOKENS = 40, 10
LAST_LENGTH = PROMPT + TOKENS - 1

CONFIGS = {
    "shared": TidalConfig(budget=8, sink_tokens=1, recent_tokens=2),
    "kv_head": TidalConfig(budget=8, sink_tokens=2, recent_tokens=1, granularity="kv_head"),
    "query_head": TidalConfig(budget=8, sink_tokens=1, recent_tokens=0, granularity="query_head"),
    "logits": TidalConfig(
        budget=8, sink_tokens=2, recent_tokens=2, granularity="query_head", score="logits"
    ),
    "nothing forced": TidalConfig(budget=8, sink_tokens=0, recent_tokens=0),
    "one token": TidalConfig(budget=1, sink_tokens=0, recent_tokens=0),
    "all but forced": TidalConfig(budget=8, sink_tokens=5, recent_tokens=2),
    "one selection": TidalConfig(
        budget=8, sink_tokens=1, recent_tokens=2, select_layers=(3,), dense_layers=3
    ),
    "three selections": TidalConfig(
        budget=8, sink_tokens=1, recent_tokens=2, select_layers=(1, 3, 6), dense_layers=1
    ),
    "no dense layer": TidalConfig(
        budget=8, sink_tokens=1, recent_tokens=2, select_layers=(0, 4), dense_layers=0
    ),
    "length between": TidalConfig(budget=PROMPT + 5, sink_tokens=1, recent_tokens=2),
    "paper": TidalConfig.preset("paper", budget=8),
    "lessismore": TidalConfig.preset("lessismore", budget=12),
    "streaming": TidalConfig.preset("streaming", budget=8),
}


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found, expected, atol=2e-4, rtol=2e-4)


def dense_plan(layers: int) -> LayerPlan:
    return LayerPlan((Role.DENSE,) * layers)


def test_the_llama_written_by_hand_is_the_llama_of_transformers():
    model, ids = build("Llama"), prompt(PROMPT)
    with torch.no_grad():
        expected = model(ids).logits[0]
    close(llama_logits(model, ids, dense_plan(8), TidalConfig(), []), expected)
    close(masked_logits(model, ids, dense_plan(8), TidalConfig(), []), expected)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("cache", CACHES)
def test_decoded_logits_are_those_of_the_llama_written_by_hand(cache, name):
    model = build("Llama")
    with tidaldecode.enable(model, CONFIGS[name]) as handle:
        found = generate(model, prompt(PROMPT), TOKENS, **CACHES[cache])
    ids = found.sequences[:, :LAST_LENGTH]
    decoded = range(PROMPT, LAST_LENGTH)
    expected = llama_logits(model, ids, handle.plan, handle.config, decoded)[PROMPT - 1 :]
    close(logits_of(found)[0], expected)
    dense = llama_logits(model, ids, dense_plan(8), handle.config, [])[PROMPT - 1 :]
    assert (expected - dense).abs().max() > 1e-3  # or the comparison would show nothing


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("cache", CACHES)
def test_padded_rows_too_are_those_of_the_llama_written_by_hand(cache, name):
    rows = [prompt(PROMPT), prompt(17, seed=1), prompt(5, seed=2)]
    ids, mask = left_padded(rows)
    model = build("Llama")
    with tidaldecode.enable(model, CONFIGS[name]) as handle:
        found = generate(model, ids, TOKENS, attention_mask=mask, **CACHES[cache])
    for index, row in enumerate(rows):
        size = row.shape[1]
        alone = torch.cat([row[0], found.sequences[index, PROMPT:-1]])[None]
        decoded = range(size, alone.shape[1])
        expected = llama_logits(model, alone, handle.plan, handle.config, decoded)
        close(logits_of(found)[index], expected[size - 1 :])


@pytest.mark.parametrize("heads", [(4, 4), (8, 2), (4, 1)])
@pytest.mark.parametrize("granularity", ["shared", "kv_head", "query_head"])
def test_heads_are_grouped_as_the_model_groups_them(heads, granularity):
    model = build("Llama", num_attention_heads=heads[0], num_key_value_heads=heads[1])
    with tidaldecode.enable(model, **SMALL, granularity=granularity) as handle:
        found = generate(model, prompt(PROMPT), TOKENS)
    ids = found.sequences[:, :LAST_LENGTH]
    decoded = range(PROMPT, LAST_LENGTH)
    expected = llama_logits(model, ids, handle.plan, handle.config, decoded)
    close(logits_of(found)[0], expected[PROMPT - 1 :])


def test_a_selection_that_is_one_layer_off_would_show():
    model, ids = build("Llama"), prompt(PROMPT)
    config = TidalConfig(**SMALL)
    right, wrong = (
        LayerPlan.build(8, dense_layers=2, select_layers=layers) for layers in [(2, 4), (2, 5)]
    )
    difference = llama_logits(model, ids, right, config, [PROMPT - 1]) - llama_logits(
        model, ids, wrong, config, [PROMPT - 1]
    )
    assert difference[-1].abs().max() > 1e-2
