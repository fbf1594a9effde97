"""What lossless decoding and cache correction refuse, and that the model is as before then."""

from __future__ import annotations

import pytest
import torch
from lossless_runs import LOSSLESS, new_cache
from runs import SMALL, generate
from snapshot import snapshot
from tiny import build, prompt
from transformers import LogitsProcessor, LogitsProcessorList, StaticCache
from transformers.cache_utils import DynamicCache, QuantizedCache

import tidaldecode
from tidaldecode import TidalError, graph_generate
from tidaldecode.integrations.transformers.engine import TransformersEngine
from tidaldecode.integrations.transformers.lossless import lossless_generate

CORRECTING = {**SMALL, "correct_every": 4}
both = pytest.mark.parametrize("settings", [LOSSLESS, CORRECTING])


def refuse(settings, message, model=None, ids=None, **options):
    model = model or build("Llama")
    ids = prompt(20) if ids is None else ids
    with tidaldecode.enable(model, **settings):
        with pytest.raises(TidalError, match=message):
            generate(model, ids, 4, **options)
        if settings is LOSSLESS:
            expected = generate(model, prompt(20), 4).sequences
    if settings is LOSSLESS:
        assert torch.equal(generate(model, prompt(20), 4).sequences, expected)


@both
@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"num_beams": 2}, "beam search"),
        ({"num_beams": 2, "do_sample": True}, "beam sample"),
        ({"penalty_alpha": 0.6, "top_k": 4}, "contrastive search"),
        ({"dola_layers": "low"}, "dola generation"),
        ({"prompt_lookup_num_tokens": 3}, "assisted generation"),
    ],
)
def test_other_ways_to_generate_are_refused(settings, options, named):
    refuse(
        settings,
        f"^generate: expected greedy or sampled generation with .*, got {named}",
        **options,
    )


@both
def test_an_assistant_is_refused(settings):
    refuse(settings, "got assisted generation", assistant_model=build("Llama"))


@both
@pytest.mark.parametrize("loop", [lambda *args, **kwargs: None, "org/name"])
def test_a_loop_of_ones_own_is_refused(settings, loop):
    refuse(settings, "^custom_generate: expected None", custom_generate=loop)


def test_correction_refuses_the_captured_loop_too():
    refuse(CORRECTING, "^custom_generate: expected None", custom_generate=graph_generate)


def test_its_own_loop_may_be_named():
    model = build("Llama")
    with tidaldecode.enable(model, **LOSSLESS):
        named = generate(model, prompt(20), 4, custom_generate=lossless_generate)
        assert torch.equal(named.sequences, generate(model, prompt(20), 4).sequences)


def test_its_loop_needs_a_lossless_model():
    model = build("Llama")
    with (
        tidaldecode.enable(model, **SMALL),
        pytest.raises(TidalError, match=r"^mode: expected a model enabled with mode='lossless'"),
    ):
        generate(model, prompt(20), 4, custom_generate=lossless_generate)


class Own(LogitsProcessor):
    def __call__(self, input_ids, scores):
        return scores - scores.mean() * (input_ids.shape[1] % 2)


def test_processors_that_cannot_be_replayed_are_refused():
    for options in (
        {"logits_processor": LogitsProcessorList([Own()])},
        {"prefix_allowed_tokens_fn": lambda row, ids: [3, 4, 5]},
        {"guidance_scale": 1.5, "negative_prompt_ids": prompt(3)},
    ):
        refuse(LOSSLESS, "^logits_processor: expected ones that depend on", **options)


def test_a_processor_of_ones_own_may_promise_to_be_replayable():
    class Promised(Own):
        tidal_replayable = True

    model = build("Llama")
    options = {"logits_processor": LogitsProcessorList([Promised()])}
    expected = generate(model, prompt(20), 20, **options)
    with tidaldecode.enable(model, **LOSSLESS, draft_tokens=3):
        found = generate(model, prompt(20), 20, **options)
    assert torch.equal(found.sequences, expected.sequences)


class Offloaded(DynamicCache):
    """A cache of another class."""


@both
@pytest.mark.parametrize(
    "make",
    [
        lambda config: Offloaded(config=config),
        lambda config: DynamicCache(config=config, offloading=True),
        lambda config: object.__new__(QuantizedCache),
    ],
)
def test_caches_that_cannot_be_rewritten_are_refused(settings, make):
    model = build("Llama")
    cache = make(model.config)
    if isinstance(cache, QuantizedCache):
        cache.layers = []
    message = r"^cache: expected a DynamicCache or StaticCache with full attention"
    with tidaldecode.enable(model, **settings), pytest.raises(TidalError, match=message):
        generate(model, prompt(20), 4, past_key_values=cache)


@both
def test_models_with_other_layers_are_refused(settings):
    model = build("Gemma3")
    before = snapshot(model)
    what = "mode='lossless'" if settings is LOSSLESS else "correct_every"
    with pytest.raises(
        TidalError, match=f"^model: expected full attention in every layer with {what}"
    ):
        tidaldecode.enable(model, **settings)
    assert snapshot(model) == before


@both
def test_enabling_and_disabling_leaves_no_trace(settings):
    model = build("Llama")
    before = snapshot(model)
    with tidaldecode.enable(model, **settings):
        generate(model, prompt(20), 4)
    assert snapshot(model) == before


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"use_cache": False}, "use_cache=False"),
        ({"output_hidden_states": True}, "output_hidden_states"),
        ({"labels": torch.zeros(1, 20, dtype=torch.long)}, "labels"),
    ],
)
def test_calls_with_more_than_tokens_are_refused(options, named):
    refuse(LOSSLESS, f"^generate: expected a cached generation .* got {named}", **options)


def test_embeddings_are_refused():
    model = build("Llama")
    with tidaldecode.enable(model, **LOSSLESS), pytest.raises(TidalError, match="inputs_embeds"):
        model.generate(inputs_embeds=torch.zeros(1, 20, 64), max_new_tokens=3)


def test_padding_elsewhere_is_refused():
    mask = torch.ones(1, 20, dtype=torch.long)
    for place in (19, 10):
        holed = mask.index_fill(1, torch.tensor([place]), 0)
        refuse(LOSSLESS, "^attention_mask: expected padding on the left only", attention_mask=holed)


def test_a_cache_that_is_too_small_or_too_long_is_refused():
    model = build("Llama")
    small = StaticCache(config=model.config, max_cache_len=21)
    refuse(
        LOSSLESS, "^cache: expected room for 23 tokens, got a static cache of 21", model,
        past_key_values=small,
    )  # fmt: skip
    past = new_cache("dynamic", model)
    with tidaldecode.enable(model, **LOSSLESS):
        generate(model, prompt(20), 4, past_key_values=past)
        with pytest.raises(TidalError, match=r"^past_key_values: expected input_ids to hold every"):
            generate(model, prompt(20), 4, past_key_values=past)


def test_statistics_and_corrections_belong_to_their_modes():
    model = build("Llama")
    with tidaldecode.enable(model, **SMALL) as handle:
        with pytest.raises(
            TidalError, match=r"^stats: expected a model enabled with mode='lossless'"
        ):
            handle.stats()
        with pytest.raises(
            TidalError, match=r"^correct: expected a model enabled with correct_every"
        ):
            handle.correct()


def test_an_engine_that_feeds_tokens_refuses_the_lossless_mode():
    model = build("Llama")
    engine = TransformersEngine(model)
    engine.prefill([[5, 6, 7]])
    with pytest.raises(
        TidalError, match=r"^mode: expected 'sparse' where tokens are fed one by one"
    ):
        next(engine.steps([[3]], tidaldecode.TidalConfig(**LOSSLESS)))
